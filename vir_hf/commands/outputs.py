"""What a command writes where an option says: checked before the work begins, asked about, and written whole."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vir_hf import files
from vir_hf.errors import DataError

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe

_MODEL_KEYS = ("name_or_path", "language_model", "vision_tower", "tokenizer", "adapter", "pretrained_projector")


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add `--overwrite`, the same for every command that writes a file it is told the name of."""
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files that are there; what the command reads is never replaced",
    )


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """Add `--json FILE`, the same for every command that reports: `what` says what is written."""
    parser.add_argument("--json", metavar="FILE", help=f"write {what} as JSON to FILE, or - for standard output")


def write_json(name: str | None, report: dict[str, Any]) -> None:
    """Write what `--json` asked for: a file, whole or not at all; standard output for `-`; nothing without the option."""
    if name is None:
        return
    text = files.as_report(report, indent=1, ensure_ascii=True)  # half a character of a row cannot be written as UTF-8
    if name == "-":
        sys.stdout.write(text)
    else:
        files.write_text(name, text)


def refuse_outputs(
    written: Iterable[tuple[str, str | None]], inputs: Iterable[str | None], *, overwrite: bool = False
) -> None:
    """Refuse, before the work, what could not be written after it, or would replace an input, another output or a user's file.

    Args:
        written: options as typed and the files they name.
        inputs: files, folders and globs that are read; `None` and names on the Hub are none.
        overwrite: replace a file that is neither an input nor a report of ours.
    """
    taken = [name for name in inputs if name]
    for option, name in written:
        files.refuse_output(name, option, taken, overwrite=overwrite)
        if name and name != "-":
            taken.append(name)


def data_inputs(path: str, image_folder: str | None = None) -> list[str]:
    """Return what is read of a data set: its files of rows, and the folder of images if one was named."""
    from vir_hf.rows.files import find_data_files

    found = [path]
    if os.path.isdir(path):
        found = []
        with suppress(DataError):  # nothing in it, which the reader says better
            found += [name for name in find_data_files(path) if not files.is_report(name)]
    return [*found, *([image_folder] if image_folder else [])]


def recipe_inputs(recipe: Recipe, recipe_file: str | None = None) -> list[str]:
    """Return the files, folders and globs that a recipe reads, and the recipe file it was read from."""
    return [*([recipe_file] if recipe_file else []), *_recipe_inputs(recipe)]


def _recipe_inputs(recipe: Recipe) -> Iterator[str]:
    data: Any = recipe.data
    pairs = [(data.data_path, data.image_folder), (data.eval_path, data.eval_image_folder)]
    pairs += [(source.path, source.image_folder) for source in data.sources or []]
    for path, image_folder in pairs:
        if path:
            yield from data_inputs(path, image_folder)
        elif image_folder:
            yield image_folder
    yield from (name for name in (getattr(recipe.model, key) for key in _MODEL_KEYS) if name)
