"""How long a small run takes on a quiet machine and beside busy processes, by how OpenMP's threads wait.

python benchmarks/busy_machine.py                            # vir-hf's own choice against OpenMP's default
python benchmarks/busy_machine.py --spins 0 1000 10000 --rounds 5
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from vir_hf.waiting import CHOSEN_BY, SPINS

NUM_STEPS = 40
OPENMP_DEFAULT = {"OMP_WAIT_POLICY": ""}  # an empty value is ignored by OpenMP, and a choice to vir-hf


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each setting is run, in turns")
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--busy", type=int, default=os.cpu_count(), help="busy processes beside the run")
    parser.add_argument("--spins", type=int, nargs="*", default=[], help="further values of GOMP_SPINCOUNT to try")
    parser.add_argument("--only", choices=("quiet", "busy"))
    parser.add_argument("--json", help="write the figures to a file, or - for standard output")
    options = parser.parse_args()
    settings: dict[str, dict[str, str]] = {
        "OpenMP's default": OPENMP_DEFAULT,
        f"vir-hf ({SPINS} spins)": {},
        "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
        **{f"GOMP_SPINCOUNT={spins}": {"GOMP_SPINCOUNT": str(spins)} for spins in options.spins},
    }
    figures: dict[str, dict[str, list[float]]] = {name: {"quiet": [], "busy": []} for name in settings}
    with tempfile.TemporaryDirectory() as folder:
        recipe = prepare(Path(folder))
        for _ in range(options.rounds):
            for state in ("quiet", "busy") if options.only is None else (options.only,):
                for name, variables in settings.items():
                    with busy_processes(options.busy if state == "busy" else 0):
                        figures[name][state].append(run(recipe, Path(folder), variables, options.steps))
    print_table(figures, options)
    if options.json == "-":
        print(json.dumps(figures, indent=2))
    elif options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def prepare(folder: Path) -> Path:
    """Return the recipe of a small run like the quickstart's second stage, whose parts and rows lie in the folder."""
    from vir_hf.quickstart.drawing import write_pictures
    from vir_hf.quickstart.parts import make_language_model, make_vision_tower
    from vir_hf.quickstart.run import finetune_recipe, read_rows, texts_of
    from vir_hf.recipe.load import load_recipe

    data, parts = folder / "data", folder / "parts"
    scenes = write_pictures(data, num_pictures=320, num_questions=72, seed=0)
    rows = {name: read_rows(data / f"{name}.json") for name in ("pretrain", "finetune")}
    make_language_model(parts / "language_model", texts_of(rows["pretrain"] + rows["finetune"]), seed=0)
    images = [data / "images" / str(row["image"]) for row in rows["pretrain"]]
    make_vision_tower(parts / "vision_tower", images, scenes, num_steps=2, seed=0)
    recipe = finetune_recipe(load_recipe(["experiment=quickstart"], require_data=False), data, parts)
    recipe.experiment.name, recipe.model.pretrained_projector = "busy_machine", None
    recipe.save(folder / "recipe.yaml")
    return folder / "recipe.yaml"


def run(recipe: Path, folder: Path, variables: dict[str, str], num_steps: int) -> float:
    """Return the seconds a run's training takes in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY} | variables
    output = folder / f"run-{time.monotonic_ns()}"
    words = ["train", "--recipe", str(recipe), f"training.output_dir={output}", f"training.max_steps={num_steps}"]
    done = subprocess.run(
        [sys.executable, "-m", "vir_hf.cli", *words], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return float(json.loads((output / "metrics.json").read_text(encoding="utf-8"))["seconds"])


@contextlib.contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Keep so many processes computing without pause."""
    loop = "while True: pass"
    processes = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def print_table(figures: dict[str, dict[str, list[float]]], options: argparse.Namespace) -> None:
    """Print medians over the rounds, and ratios to OpenMP's default on a quiet machine."""
    base = statistics.median(figures["OpenMP's default"]["quiet"] or [float("nan")])
    print(f"{options.steps} steps, {options.rounds} rounds, median seconds; busy: beside {options.busy} busy processes")
    print("| waiting | quiet, s | ratio | busy, s | ratio |\n|---|---|---|---|---|")
    for name, values in figures.items():
        quiet, busy = (statistics.median(values[state] or [float("nan")]) for state in ("quiet", "busy"))
        print(f"| {name} | {quiet:.1f} | {quiet / base:.2f} | {busy:.1f} | {busy / base:.2f} |")


if __name__ == "__main__":
    sys.exit(main())
