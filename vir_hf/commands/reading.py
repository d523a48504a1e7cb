"""The options that say how rows are read, the same for every command over a file of them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vir_hf.errors import RecipeError

if TYPE_CHECKING:
    from vir_hf.data.reading import Reading
    from vir_hf.recipe.load import Recipe


def add_reading(parser: argparse.ArgumentParser, *, with_boxes: bool = False) -> None:
    """Add `--format` and `--column`, and for commands that look at data `--boxes`."""
    parser.add_argument(
        "--format", metavar="SHAPE", help="read rows in this shape (vqa, caption ...; by default their columns tell)"
    )
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="OURS=THEIRS",
        help="where a column is found, such as question=problem; repeatable",
    )
    if with_boxes:
        parser.add_argument(
            "--boxes",
            metavar="FORM",
            help="how boxes in texts are written, such as '0-1000 xyxy' or 'pixel xywh padded'",
        )


def reading_of(arguments: argparse.Namespace) -> Reading:
    """Return the reading that the options ask for.

    Raises:
        RecipeError: an unknown shape, or a column that cannot be read.
    """
    from vir_hf.data.reading import Reading

    columns = {}
    for word in arguments.column:
        name, equals, column = word.partition("=")
        if not (name and equals and column):
            raise RecipeError(f"--column {word}: expected OURS=THEIRS, such as question=problem.")
        columns[name] = column
    boxes = getattr(arguments, "boxes", None)
    return Reading.of(arguments.format, columns, boxes={"from": boxes} if boxes else None)


def recipe_reading(recipe: Recipe) -> Reading:
    """Return how a recipe reads the rows of `data.data_path`."""
    from vir_hf.data.reading import READING_KEYS, Reading

    return Reading.of(**{key: getattr(recipe.data, key) for key in READING_KEYS})
