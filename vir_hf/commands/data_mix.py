"""`vir-hf data mix`: what a mixture comes to, source by source, before it is trained on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from vir_hf.commands.outputs import add_json, add_overwrite, recipe_inputs, refuse_outputs, write_json
from vir_hf.curation.terminal import printable
from vir_hf.errors import RecipeError
from vir_hf.recipe.load import RecipeArgumentParser, recipe_from

_EPILOG = """\
examples:
  vir-hf data mix experiment=local_lite 'data.sources=[{path: a.json, weight: 0.7}, {path: b.jsonl, weight: 0.3}]'
  vir-hf data mix --recipe mixture.yaml --weights 0.5,0.5

"each seen" is how often a row of the source is seen in the whole training, by training.num_train_epochs. Tokens are counted
on up to 2,000 rows of each source; images are not opened.
"""


def main(argv: list[str]) -> int:
    """Show the mixture; return 0."""
    parser = RecipeArgumentParser(
        prog="vir-hf data mix",
        description="Show a mixture's rows, images and tokens by source, and what other weights would change.",
        epilog=_EPILOG,
    )
    parser.add_argument("--weights", metavar="W,W", help="show it with these weights too, one for each source")
    add_json(parser, "the figures")
    add_overwrite(parser)
    arguments = parser.parse_args(argv)
    recipe = recipe_from(arguments)
    refuse_outputs([("--json", arguments.json)], recipe_inputs(recipe, arguments.recipe), overwrite=arguments.overwrite)
    if recipe.data.streaming or not recipe.data.sources:
        raise RecipeError(
            "data mix: needs a mixture that is not streamed: 'data.sources=[{path: a.json, weight: 0.7}, ...]' and "
            "data.streaming=false."
        )
    from vir_hf.curation import mixture
    from vir_hf.data.sources import load_recipe_parts
    from vir_hf.model.row_processor import load_recipe_processor

    sources = [dataclasses.asdict(source) for source in recipe.data.sources]
    if arguments.weights:
        other = mixture.with_weights(sources, arguments.weights)
    processor = load_recipe_processor(recipe)
    training = recipe.training
    parts = [
        mixture.measure_part(
            source["name"] or Path(source["path"]).name, rows, processor, training.max_length, training.seed
        )
        for source, rows in zip(sources, load_recipe_parts(recipe), strict=True)
    ]
    views = {"as it is": mixture.mixed(parts, sources)}
    if arguments.weights:
        views[f"with weights {arguments.weights}"] = mixture.mixed(parts, other)
    epochs = float(training.num_train_epochs) if not training.max_steps or training.max_steps < 1 else 1.0
    if arguments.json != "-":
        for title, view in views.items():
            print(f"{title}:\n{printable(mixture.table(view, epochs))}\n")
    write_json(
        arguments.json, {"mixtures": {title: [part.to_json() for part in view] for title, view in views.items()}}
    )
    return 0
