"""How long the command takes to answer, and a run to reach its first step.

python benchmarks/startup.py --repeats 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

CASES = {
    "vir-hf --help": ["--help"],
    "vir-hf train --help": ["train", "--help"],
    "a mistyped command": ["trian"],
    "a mistyped key": ["train", "experiment=local_lite", "training.lerning_rate=1"],
    "vir-hf recipes": ["recipes"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the figures to a file, or - for standard output")
    options = parser.parse_args()
    commands = {name: [sys.executable, "-m", "vir_hf.cli", *words] for name, words in CASES.items()}
    commands["import torch, transformers, trl"] = [
        sys.executable,
        "-c",
        "import torch, transformers; from trl import SFTTrainer",
    ]
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(options.repeats + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, capture_output=True, check=False)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    print("| | seconds (median) |\n|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value:.2f} |")
    if options.json == "-":
        print(json.dumps(medians, indent=2))
    elif options.json:
        Path(options.json).write_text(json.dumps(medians, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
