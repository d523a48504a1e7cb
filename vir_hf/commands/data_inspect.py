"""`vir-hf data inspect`: rows as the model will see them."""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from vir_hf import files
from vir_hf.commands.data_check import is_recipe
from vir_hf.commands.outputs import add_json, add_overwrite, data_inputs, recipe_inputs, refuse_outputs, write_json
from vir_hf.commands.reading import add_reading, reading_of, recipe_reading
from vir_hf.curation.terminal import printable
from vir_hf.errors import DataError, RecipeError
from vir_hf.recipe.load import RecipeArgumentParser, recipe_from

_EPILOG = """\
examples:
  vir-hf data inspect experiment=llava15_7b_lora data.data_path=train.json data.image_folder=images
  vir-hf data inspect train.json --image-folder images --tokenizer lmsys/vicuna-7b-v1.5 --rows 0-4,17
  vir-hf data inspect experiment=local_lite data.data_path=train.json --random 8 --html rows.html

Learned tokens are green and stand between \u00ab and \u00bb; an image's tokens are folded to <image x576>.
"""


def main(argv: list[str]) -> int:
    """Show rows; return 0, or 1 when one of them, or an image of one, cannot be trained on."""
    arguments = _parse(argv)
    processor, rows, max_length, lead, left_out, boxes = _open(arguments)
    from vir_hf.curation.inspection import as_page, as_terminal_text, inspect_row
    from vir_hf.images.folder import is_url
    from vir_hf.images.opening import open_image

    shown, failed = [], []
    index_of = _indices(len(rows), left_out)
    for number in _choose(arguments, rows, index_of, left_out):
        if number not in index_of:
            bad = left_out[number]
            failed.append(f"row {number} (id {bad.id}): training leaves it out: {bad.detail}")
            continue
        try:
            shown.append(inspect_row(rows[index_of[number]], number, processor, max_length))
            for image in shown[-1].images:
                if not is_url(_name(image)):
                    open_image(image)
        except DataError as error:
            failed.append(str(error) if str(error).startswith("row ") else f"row {number}: {error}")
    if arguments.json != "-":
        console = Console(highlight=False)
        for row in shown:
            console.print(Text(printable(row.title), style="bold"), soft_wrap=True)
            for image in row.images:
                console.print(
                    Text(f"image {printable(_name(image)) or 'embedded in the row'}", style="dim"), soft_wrap=True
                )
            console.print(as_terminal_text(row, arguments.ids), soft_wrap=True)
            console.print()
    write_json(arguments.json, {"rows": [row.to_json() for row in shown], "errors": failed})
    if arguments.html:
        files.write_text(arguments.html, as_page(shown, processor, lead, arguments.ids, boxes))
    for reason in failed:
        print(f"error: {printable(reason)}", file=sys.stderr)
    return 1 if failed else 0


def _name(image: Any) -> str:
    return (image.get("path") or "") if isinstance(image, dict) else str(image)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = RecipeArgumentParser(
        prog="vir-hf data inspect",
        description="Show rows as the model will see them: tokens, what is learned, and the image the tower gets.",
        epilog=_EPILOG,
        takes_path=True,
    )
    parser.add_argument(
        "--image-folder", metavar="DIR", help="a folder, .zip or .tar; the data file's own folder by default"
    )
    parser.add_argument(
        "--processor", metavar="NAME", help="a trained model or llava-hf checkpoint whose processor to use"
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="a tokenizer, where there is no processor yet")
    parser.add_argument(
        "--template", help="the template (vicuna_v1 with --tokenizer, else the recipe's or processor's)"
    )
    parser.add_argument(
        "--image-tokens", type=int, default=576, metavar="N", help="with --tokenizer: tokens an image takes"
    )
    parser.add_argument("--max-length", type=int, metavar="N", help="cut rows as training would")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rows", metavar="0-4,17", help="these rows, counted from 0 (the first 3)")
    which.add_argument("--random", type=int, metavar="N", help="so many rows drawn at random")
    which.add_argument("--id", metavar="ID", help="the rows with this id")
    parser.add_argument("--seed", type=int, default=0, help="for --random")
    parser.add_argument("--ids", action="store_true", help="show the number of every token")
    parser.add_argument("--html", metavar="FILE", help="write one HTML page with the images as the tower sees them")
    add_reading(parser, with_boxes=True)
    add_json(parser, "the rows")
    add_overwrite(parser)
    arguments = parser.parse_args(argv)
    if arguments.random is not None and arguments.random < 1:
        raise RecipeError(f"--random {arguments.random}: expected 1 or more.")
    return arguments


def _open(arguments: argparse.Namespace) -> tuple[Any, Any, int | None, str, dict[int, Any], Any]:
    """Return processor, rows, max_length, a line that says what is shown, the rows left out by number, and the form of boxes."""
    from vir_hf.data.sources import load_llava_dataset, load_recipe_rows
    from vir_hf.model.row_processor import load_recipe_processor, make_row_processor

    written = [("--json", arguments.json), ("--html", arguments.html)]
    if is_recipe(arguments):
        recipe = recipe_from(arguments)
        inputs = [*recipe_inputs(recipe, arguments.recipe), arguments.image_folder, arguments.processor]
        refuse_outputs(written, inputs, overwrite=arguments.overwrite)
        recipe.data.streaming = False  # rows are chosen by number here
        rows = load_recipe_rows(recipe)
        lead = f"{' '.join(arguments.overrides) or arguments.recipe}: template {recipe.model.template}"
        boxes = recipe_reading(recipe).boxes
        max_length = arguments.max_length or recipe.training.max_length
        return load_recipe_processor(recipe), rows, max_length, lead, {}, boxes and boxes.written
    path = arguments.overrides[0]
    inputs = [*data_inputs(path, arguments.image_folder), arguments.processor, arguments.tokenizer]
    refuse_outputs(written, inputs, overwrite=arguments.overwrite)
    if arguments.processor:
        from vir_hf.model.for_use import load_processor

        processor = load_processor(arguments.processor, arguments.template)
    elif arguments.tokenizer:
        processor = make_row_processor(arguments.tokenizer, arguments.template or "vicuna_v1", arguments.image_tokens)
    else:
        raise RecipeError(
            f"data inspect: nothing says how {path} is tokenised. Name a recipe (experiment=NAME data.data_path={path}), or "
            "--processor MODEL, or --tokenizer NAME."
        )
    bad_rows: list[Any] = []
    reading = reading_of(arguments)
    rows = load_llava_dataset(
        path,
        arguments.image_folder,
        decode_images=False,
        on_bad_row="skip",
        on_bad_image="skip",
        max_bad_fraction=1.0,
        bad_rows=bad_rows,
        reading=reading,
    )
    # Of several files, rows count through those that can be used: no number would say which file it counts in.
    left_out = {bad.row: bad for bad in bad_rows} if os.path.isfile(path) else {}
    lead = f"{path}: template {processor.template}"
    return processor, rows, arguments.max_length, lead, left_out, reading.boxes and reading.boxes.written


def _indices(num_rows: int, left_out: Mapping[int, Any]) -> dict[int, int]:
    """Return where each row of the file, by its number there, stands among those that can be used."""
    usable = (number for number in range(num_rows + len(left_out)) if number not in left_out)
    return {number: index for index, number in enumerate(usable)}


def _choose(
    arguments: argparse.Namespace, rows: Any, index_of: Mapping[int, int], left_out: Mapping[int, Any]
) -> list[int]:
    """Return the numbers of the rows to show, as they count in the file."""
    num_rows = len(index_of) + len(left_out)
    if arguments.id is not None:
        ids = rows["id"]
        found = [number for number, index in index_of.items() if ids[index] == arguments.id]
        found += [number for number, bad in left_out.items() if bad.id == arguments.id]
        if not found:
            raise DataError(f"--id {arguments.id}: none of the {num_rows} rows has it.")
        return sorted(found)
    if arguments.random is not None:
        return sorted(random.Random(arguments.seed).sample(list(index_of), min(arguments.random, len(index_of))))
    if arguments.rows is None:
        return list(index_of)[:3]
    numbers: list[int] = []
    try:
        for part in arguments.rows.split(","):
            first, _, last = part.partition("-")
            numbers += range(int(first), min(int(last or first) + 1, num_rows))
    except ValueError:
        raise RecipeError(f"--rows {arguments.rows}: expected numbers and ranges such as 0-4,17.") from None
    if not numbers:
        raise RecipeError(f"--rows {arguments.rows}: there are {num_rows} rows, counted from 0.")
    return numbers
