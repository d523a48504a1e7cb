"""`vir-hf merge RUN --out DIR`: adapter and projector into a plain checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import json

from vir_hf.commands.outputs import add_json, add_overwrite, refuse_outputs, write_json


def main(argv: list[str]) -> int:
    """Merge; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="vir-hf merge",
        description="Write a run's adapter and projector into a plain checkpoint that opens in stock transformers.",
        epilog="A base that was trained on in 4 or 8 bit is made 16 bit first. A base with other weights is refused.",
    )
    parser.add_argument("run", help="a run's output directory, a checkpoint-N in it, or an adapter on the Hub")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder for the merged model")
    parser.add_argument("--base", metavar="DIR", help="where the base lies now, if it has been moved")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    parser.add_argument("--revision", help="of an adapter on the Hub")
    add_json(parser, "the result")
    add_overwrite(parser)
    arguments = parser.parse_args(argv)
    inputs = [arguments.run, arguments.base]
    refuse_outputs([("--json", arguments.json)], inputs, overwrite=arguments.overwrite)

    import torch

    from vir_hf.model.merging import merge_run

    dtype = "auto" if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    merged = merge_run(arguments.run, arguments.out, base=arguments.base, dtype=dtype, revision=arguments.revision)
    write_json(arguments.json, json.loads(json.dumps(dataclasses.asdict(merged), default=str)))
    if arguments.json == "-":
        return 0
    widened = ", made 16 bit first" if merged.was_quantized else ""
    print(
        f"merged {merged.adapter} and its base {merged.base}{widened} into {merged.out}\n"
        f"  {merged.num_parameters:,} parameters, {merged.dtype}, {merged.fingerprint}\n"
        f"next:\n  vir-hf chat {merged.out} --image photo.jpg"
    )
    return 0
