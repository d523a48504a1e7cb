"""Tokens a second with 1 to 4 processes on this machine's CPU (DDP over gloo), the same rows in every step.

    python benchmarks/scaling.py [--processes 1 2 4] [--steps 20] [--config cpu] [--json FILE]

The model is tiny and made on the spot, so this shows the cost of processes and of summing gradients, not of a real model; the
speed-up can be no larger than the number of cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "tests" / "distributed"))

import launches  # noqa: E402
import scenarios  # noqa: E402


def measure(root: Path, output_dir: Path, num_processes: int, num_steps: int, config: str) -> dict[str, Any]:
    """Train on a number of processes and return the figures of the whole run, start-up of the trainer included."""
    changes = {
        "training.max_steps": num_steps,
        "training.global_batch_size": 16,
        "training.per_device_train_batch_size": 4,
    }
    overrides = scenarios.overrides(root, output_dir, "full", **changes)
    words = [*launches.accelerate_words(config, num_processes), "-m", "vir_hf.train", *overrides]
    done = launches.run(words, timeout_seconds=600)
    if done.returncode:
        raise SystemExit(done.stdout[-4000:])
    metrics = json.loads((output_dir / "metrics.json").read_text(encoding="utf-8"))
    return {
        "processes": num_processes,
        "seconds": metrics["seconds"],
        "tokens": metrics["num_tokens"],
        "tokens_per_second": round(metrics["num_tokens"] / metrics["seconds"], 1),
        "final_loss": metrics["final_loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--config", default="cpu", help="an accelerate config that runs on a CPU: cpu, zero2 or zero3")
    parser.add_argument("--json", help="write the figures into this file, or - for the standard output")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="vir_hf_scaling_") as folder:
        root = scenarios.make_parts(Path(folder))
        for count in options.processes:
            rows.append(measure(root, root / f"run-{count}", count, options.steps, options.config))
    print(f"{options.config} on {os.cpu_count()} cores, {options.steps} steps of 16 rows")
    print(f"{'processes':>9} {'seconds':>8} {'tokens/s':>9} {'speed-up':>8} {'final loss':>11}")
    for row in rows:
        speed_up = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        print(
            f"{row['processes']:>9} {row['seconds']:>8} {row['tokens_per_second']:>9} {speed_up:>8.2f} {row['final_loss']:>11.6f}"
        )
    if options.json:
        text = json.dumps(rows, indent=2) + "\n"
        print(text) if options.json == "-" else Path(options.json).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
