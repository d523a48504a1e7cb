"""`vir-hf data cache-features`: encode every image of a recipe's data once, ahead of training."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from vir_hf.commands.outputs import add_json, add_overwrite, recipe_inputs, refuse_outputs, write_json
from vir_hf.recipe.load import RecipeArgumentParser, recipe_from


def main(argv: Sequence[str] | None = None) -> int:
    """Fill the recipe's feature cache; what is there already and whole is kept. Returns 0."""
    parser = RecipeArgumentParser(
        prog="vir-hf data cache-features",
        description="Run the recipe's frozen vision tower over every image once and keep its features on disk. Training "
        "with training.feature_cache=FOLDER then opens no image. A run cut short goes on where it stopped, and damaged "
        "entries are made anew.",
    )
    add_json(parser, "the figures")
    add_overwrite(parser)
    options = parser.parse_args(argv)
    recipe = recipe_from(options)
    inputs = recipe_inputs(recipe, options.recipe)
    refuse_outputs([("--json", options.json)], inputs, overwrite=options.overwrite)
    if not recipe.training.feature_cache:
        recipe.training.feature_cache = True

    from vir_hf.batches.features import cache_for_training
    from vir_hf.data.sources import load_recipe_rows
    from vir_hf.model.for_training import load_model_and_processor
    from vir_hf.model.precision import precision_of
    from vir_hf.training.arguments import training_arguments

    precision = precision_of(recipe)
    arguments = training_arguments(recipe, precision)
    model, processor = load_model_and_processor(recipe, precision)
    rows = load_recipe_rows(recipe)
    cache = cache_for_training(recipe, model.model, processor, rows, arguments.device, verify=True)
    if cache is None:  # training.feature_cache is set above, so there is one
        raise RuntimeError("no cache was made")
    figures: dict[str, Any] = {
        "folder": str(cache.folder),
        "num_pictures": len(cache),
        "bytes_per_picture": cache.bytes_per_image,
        "bytes": len(cache) * cache.bytes_per_image,
    }
    if options.json != "-":
        print(f"{len(cache)} images, {figures['bytes'] / 1e9:.3f} GB in {cache.folder}")
        print(f"next: vir-hf train ... training.feature_cache={cache.folder}")
    write_json(options.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
