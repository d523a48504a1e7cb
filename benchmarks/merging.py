"""Memory of `vir-hf merge`: the peak of anonymous memory beside the size of the 16-bit weights.

python benchmarks/merging.py [--hidden 1024 --layers 12]    a language model made on the spot; nothing is downloaded
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

_MEASURED = """
import json, re, sys, threading, time
from vir_hf.model.merging import merge_run

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

peak, running = 0, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.005)

before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
merged = merge_run(sys.argv[1], sys.argv[2])
seconds = time.perf_counter() - start
running = False
thread.join()
print(json.dumps({"before": before, "peak": peak, "seconds": seconds, "parameters": merged.num_parameters}))
"""


def main() -> None:
    """Train one step of LoRA beside 16-bit and beside 4-bit weights, merge each in a process of its own, print the peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    import tiny
    from tiny_training import NF4, UNQUANTIZED, run

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tiny.training_overrides(root, root / "out")
        large = tiny.save_language_model(
            root / "large",
            hidden_size=options.hidden,
            intermediate_size=4 * options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=16,
            num_key_value_heads=16,
        )
        for name, quantization in (("bf16", UNQUANTIZED), ("nf4", NF4)):
            changes = {"model.language_model": large, "model.dtype": "bfloat16", "training.max_steps": 1, "lora.r": 64}
            run(root, root / name, **changes, **quantization)
            output = subprocess.run(
                [sys.executable, "-c", _MEASURED, str(root / name), str(root / f"{name}_merged")],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            found = json.loads(output.splitlines()[-1])
            weights = 2 * found["parameters"] / 2**20
            used = (found["peak"] - found["before"]) / 2**20
            print(
                f"{name}: {found['parameters'] / 1e6:.0f} M parameters, 16-bit weights {weights:.0f} MiB, peak over the start "
                f"{used:.0f} MiB ({used / weights:.2f} x), {found['seconds']:.1f} s"
            )


if __name__ == "__main__":
    main()
