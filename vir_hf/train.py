"""`vir-hf train` and `python -m vir_hf.train`: the same, also under `accelerate launch`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vir_hf.recipe import RecipeArgumentParser, recipe_from

_EPILOG = """\
examples:
  vir-hf train experiment=quickstart
  vir-hf train experiment=local_lite data.data_path=rows.json data.image_folder=images training.learning_rate=5e-5
  accelerate launch --config_file zero2.yaml -m vir_hf.train experiment=cloud_gpu_scale data.data_path=rows.json

`vir-hf recipes` lists the experiments.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Train; return the exit code (0 done, 2 a recipe or data that cannot be run)."""
    # Only light imports up to here: a typo is answered before anything heavy is loaded.
    parser = RecipeArgumentParser(
        prog="vir-hf train", description="Train a vision-language model from a recipe.", epilog=_EPILOG
    )
    recipe = recipe_from(parser.parse_args(argv))
    from vir_hf.training import train

    metrics = train(recipe)
    print(closing_words(metrics, recipe.training.output_dir))
    return 0


def closing_words(metrics: dict, output_dir: str) -> str:
    """What was made, where it lies, and what to type next."""
    return (
        f"\ndone: {metrics['num_steps']} steps, loss {metrics['first_loss']:.4f} -> {metrics['final_loss']:.4f}, "
        f"{metrics['seconds']} s. In {output_dir}: model, processor, recipe.yaml, metrics.json\n"
        f"next:\n  vir-hf chat {output_dir} --image photo.jpg\n  vir-hf push {output_dir} you/your-model --dry-run"
    )


if __name__ == "__main__":
    from vir_hf.cli import main as run_command

    sys.exit(run_command(["train", *sys.argv[1:]]))
