"""`vir-hf train` and `python -m vir_hf.train`: the same, also under `accelerate launch`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

_EPILOG = """\
examples:
  vir-hf train experiment=quickstart
  vir-hf train experiment=local_lite data.data_path=rows.json data.image_folder=images training.learning_rate=5e-5
  accelerate launch --config_file zero2.yaml -m vir_hf.train experiment=cloud_gpu_scale data.data_path=rows.json

`vir-hf recipes` lists the experiments.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Train; return the exit code (0 done, 2 a recipe or data that cannot be run)."""
    parser = argparse.ArgumentParser(
        prog="vir-hf train",
        description="Train a vision-language model from a recipe.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="experiment=NAME and section.key=value")
    parser.add_argument("--recipe", help="a recipe.yaml that a run has written, to run it again")
    parser.add_argument("--recipes-dir", help="a folder of your own recipes, searched first")
    options = parser.parse_args(argv)

    from vir_hf.recipe import load_recipe  # answers a typo before anything heavy is imported

    recipe = load_recipe(options.overrides, recipe_file=options.recipe, recipes_dir=options.recipes_dir)
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
    sys.exit(main())
