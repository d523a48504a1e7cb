"""Attention over packed segments against one dense block-diagonal mask: forward and backward, as rows are added.

    python benchmarks/attention.py                 # the CPU's sdpa per segment, or every CUDA kernel at hand
    python benchmarks/attention.py --shared 600    # every four rows share a prefix of 600 tokens

The cost of the dense mask grows with the square of the packed row, that of segments with their number.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from vir_hf.llava.attention import BACKENDS, SegmentLayout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--length", type=int, default=700, help="tokens a row")
    parser.add_argument("--shared", type=int, default=0, help="tokens that every four rows share")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the figures to a file, or - for standard output")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    names = ["sdpa", "varlen", "flex", "flash_attn"] if device == "cuda" else ["sdpa"]
    results: list[dict[str, Any]] = []
    for num_rows in options.rows:
        layout = make_layout(num_rows, options.length, options.shared)
        inputs = [
            torch.randn(1, heads, layout.num_tokens, options.width, device=device, dtype=dtype, requires_grad=True)
            for heads in (options.heads, options.kv_heads, options.kv_heads)
        ]
        ways = {"dense mask": dense(layout, device)}
        for name in names:
            ways[name] = lambda q, k, v, layout=layout, name=name: BACKENDS[name](
                q, k, v, layout, options.width**-0.5, 0.0, None
            )
        entry: dict[str, Any] = {"rows": num_rows, "tokens": layout.num_tokens}
        reference = None
        for name, way in list(ways.items()):
            try:
                output = way(*inputs)
            except (ImportError, RuntimeError, ValueError) as error:
                print(f"{name}: not available here ({type(error).__name__})", file=sys.stderr)
                names = [other for other in names if other != name]
                continue
            if reference is None:
                reference = output.detach().float()
            elif not torch.allclose(output.detach().float(), reference, atol=3e-2 if device == "cuda" else 1e-4):
                print(f"{name} differs from the dense mask: the timings mean nothing", file=sys.stderr)
                return 1
        seconds: dict[str, list[float]] = {name: [] for name in ["dense mask", *names]}
        for _ in range(options.repeats + 1):  # in turn, so that a slow moment meets every way
            for name in seconds:
                seconds[name].append(timed(ways[name], inputs))
        entry.update({name: statistics.median(values[1:]) for name, values in seconds.items()})
        results.append(entry)
    show(results)
    if options.json == "-":
        print(json.dumps(results, indent=2))
    elif options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


def make_layout(num_rows: int, length: int, shared: int) -> SegmentLayout:
    lengths: list[int] = []
    prefixes: list[int] = []
    for row in range(num_rows):
        if shared and row % 4 == 0:
            prefix = len(lengths)
            lengths.append(shared)
            prefixes.append(-1)
        lengths.append(length - shared)
        prefixes.append(prefix if shared else -1)
    return SegmentLayout(tuple(lengths), tuple(prefixes))


def dense(layout: SegmentLayout, device: str) -> Any:
    """One sdpa call under a `(T, T)` mask."""
    segments = torch.repeat_interleave(torch.arange(len(layout.lengths)), torch.tensor(layout.lengths))
    prefixes = torch.tensor(layout.prefixes)[segments]
    mask = (segments[:, None] == segments[None, :]) | (prefixes[:, None] == segments[None, :])
    mask = (mask & torch.ones_like(mask).tril()).to(device)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        repeats = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)

    return attend


def timed(way: Any, inputs: list[torch.Tensor]) -> float:
    """Seconds of one forward and backward."""
    for tensor in inputs:
        tensor.grad = None
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    way(*inputs).float().sum().backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def show(results: list[dict[str, Any]]) -> None:
    names = [name for name in results[-1] if name not in ("rows", "tokens")]
    print("| rows | tokens | " + " | ".join(f"{name}, ms" for name in names) + " |")
    print("|---" * (len(names) + 2) + "|")
    for entry in results:
        cells = [f"{1000 * entry[name]:.1f}" if name in entry else "-" for name in names]
        print(f"| {entry['rows']} | {entry['tokens']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.exit(main())
