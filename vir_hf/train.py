"""`vir-hf train` and `python -m vir_hf.train`: the same, also under `accelerate launch`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vir_hf import console
from vir_hf.recipe.load import Recipe, RecipeArgumentParser, recipe_from
from vir_hf.recipe.requirements import check_requirements
from vir_hf.recipe.rules import SELF_CONTAINED

_EPILOG = """\
examples:
  vir-hf train experiment=quickstart
  vir-hf train experiment=local_lite data.data_path=rows.json data.image_folder=images training.learning_rate=5e-5
  accelerate launch --config_file zero2.yaml -m vir_hf.train experiment=cloud_gpu_scale data.data_path=rows.json

`vir-hf recipes` lists the experiments.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Train; return the exit code.

    0 done; 1 the run could not go on, and says why; 2 a recipe or data that cannot be run; 75 a signal stopped it after a
    checkpoint, start it again with `--resume`; 130 a second Ctrl-C.
    """
    # Only light imports up to here: a typo is answered before anything heavy is loaded.
    parser = RecipeArgumentParser(
        prog="vir-hf train",
        description="Train a vision-language model from a recipe.",
        epilog=_EPILOG,
        can_resume=True,
    )
    recipe = recipe_from(parser.parse_args(argv))
    check_requirements(recipe, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    from vir_hf.errors import RunError
    from vir_hf.training.checkpoints import list_checkpoints
    from vir_hf.training.signals import RunStopped, say_stopped

    try:
        metrics = _run(recipe)
    except RunStopped as stopped:
        found = list_checkpoints(Path(recipe.training.output_dir))
        return say_stopped(stopped, recipe.training.output_dir, str(found[0].path) if found else None)
    except RunError as error:
        console.print_error(f"error: {error}", 1)
        return 1
    if os.environ.get("RANK", "0") == "0":
        console.conclude(closing_words(metrics, recipe.training.output_dir))
    _leave_process_group()
    return 0


def _leave_process_group() -> None:
    """End what talks to other ranks while Python is whole: a thread of it left over aborts a finished run at its exit."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _run(recipe: Recipe) -> dict[str, Any]:
    """Train; the quickstart makes its data and parts first."""
    if recipe.experiment.name == SELF_CONTAINED and recipe.data.data_path is None and recipe.data.sources is None:
        from vir_hf.quickstart.run import run_quickstart

        return run_quickstart(recipe)
    from vir_hf.training.run import train

    return train(recipe)


def closing_words(metrics: dict, output_dir: str) -> str:
    """What was made, where it lies, and what to type next."""
    picture, run = metrics.get("example_image", "photo.jpg"), shlex.quote(output_dir)
    first, final = metrics["first_loss"], metrics["final_loss"]
    loss = (
        "" if first is None else f"loss {first:.4f} -> {final:.4f}, "
    )  # none where a run is shorter than logging_steps
    return (
        f"\ndone: {metrics['num_steps']} steps, {loss}{console.duration(metrics['seconds'])}. In {output_dir}: model, processor, "
        "recipe.yaml, metrics.json\n"
        f"next:\n  vir-hf chat {run} --image {shlex.quote(str(picture))}\n  vir-hf evaluate {run} --data HELDOUT.json\n"
        f"  vir-hf push {run} you/your-model --dry-run"
    )


if __name__ == "__main__":
    from vir_hf.cli import main as run_command

    sys.exit(run_command(["train", *sys.argv[1:]]))
