"""`vir-hf data new`: LLaVA rows from a table about images, folders of classes, or images with texts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vir_hf.commands.outputs import add_overwrite
from vir_hf.curation.terminal import printable
from vir_hf.errors import RecipeError

TRAIN, HELD_OUT, LEFT_OUT, PREVIEW, CHECK = "train.json", "heldout.json", "left_out.json", "preview.html", "check.html"
_EPILOG = """\
examples:
  vir-hf data new photos new-data                                  # photos/products.xlsx, or photos/*.txt, or photos/CLASS/*
  vir-hf data new photos new-data --table products.csv --columns colour,material --question "colour=Which colour is it?"
  vir-hf data new animals new-data --from classes --question "Which animal is this?" --heldout 0.2

Writes OUT/train.json and OUT/heldout.json (no image is in both), OUT/left_out.json, OUT/preview.html and OUT/check.html. Images
stay where they are. Then:
  vir-hf train experiment=local_lite data.data_path=OUT/train.json data.image_folder=FOLDER

exit code: 0 done, 1 some were left out or the check found something, 2 a wrong call or data that cannot be read.
"""


def main(argv: list[str]) -> int:
    """Make rows; return 0, or 1 where something was left out or is wrong."""
    arguments = _parse(argv)
    from vir_hf.curation import new_rows, pages
    from vir_hf.curation.checks import check_data
    from vir_hf.curation.report import report_as_html
    from vir_hf.files import OutputFolder

    folder = Path(arguments.folder)
    if not folder.is_dir():
        raise RecipeError(f"{folder}: no such folder; name the one that holds the images.")
    output = OutputFolder(Path(arguments.out))
    names = (TRAIN, HELD_OUT, LEFT_OUT, PREVIEW, CHECK)
    if arguments.overwrite:
        output.adopt(names)
    output.refuse_foreign(names, str(output.path), "Name another folder, or add --overwrite to replace it.")
    wishes = new_rows.Wishes(
        arguments.table, arguments.sheet, arguments.image_column, arguments.columns, _questions(arguments.question)
    )
    made = new_rows.make_rows(folder, arguments.way, wishes)
    if not made.rows:
        raise RecipeError(f"{folder}: no row could be made; the first reason: {made.left_out[0]}.")
    train, held_out = new_rows.held_out(made.rows, folder, arguments.heldout, arguments.seed)
    output.path.mkdir(parents=True, exist_ok=True)
    output.write_json(TRAIN, train, indent=1, ensure_ascii=True)
    output.write_json(HELD_OUT, held_out, indent=1, ensure_ascii=True)
    output.write_json(LEFT_OUT, made.left_out, indent=1, ensure_ascii=True)
    lead = f"{made.way}: {len(train):,} rows to train on, {len(held_out):,} held out"
    shown = list(new_rows.preview_rows(train, folder, arguments.preview))
    about = "Images are as they lie in their files."
    page = pages.render("rows.html", title="New rows", lead=lead, foot="", about_images=about, rows=shown)
    output.write_text(PREVIEW, page)
    report = check_data(output.path / TRAIN, folder)
    output.write_text(CHECK, report_as_html(report, 16))
    print(f"rows are made from: {made.way}")
    for note in made.notes:
        print(printable(f"  {note}"))
    print(
        f"{len(train):,} rows in {output.path / TRAIN}, {len(held_out):,} in {output.path / HELD_OUT} (no image is in both)"
    )
    if made.left_out:
        print(
            printable(f"{len(made.left_out):,} left out, listed in {output.path / LEFT_OUT}: {made.left_out[0]}"),
            file=sys.stderr,
        )
    found = ", ".join(f"{count:,} {kind}" for kind, count in report.kinds().items())
    print(f"check: {found or 'nothing wrong was found'}; look at {output.path / PREVIEW} and {output.path / CHECK}")
    return 1 if made.left_out or report.problems else 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vir-hf data new",
        description="Make LLaVA rows of a folder of images and what is known about them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", help="the folder of images")
    parser.add_argument("out", help="where the rows go: a folder")
    parser.add_argument("--from", dest="way", choices=("table", "classes", "texts"), help="what the rows are made from")
    parser.add_argument("--table", metavar="FILE", help="the table: .csv, .tsv or .xlsx (the only one in the folder)")
    parser.add_argument("--sheet", metavar="NAME", help="which sheet of an Excel file")
    parser.add_argument("--image-column", metavar="NAME", help="the column that names the images")
    parser.add_argument("--columns", metavar="A,B", default=(), type=_names, help="ask about these columns alone")
    parser.add_argument(
        "--question", action="append", default=[], metavar="[COLUMN=]TEXT", help="the question to ask; repeatable"
    )
    parser.add_argument(
        "--heldout", type=float, default=0.1, metavar="F", help="share of the images kept for tests (0.1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which images are held out")
    parser.add_argument("--preview", type=int, default=24, metavar="N", help="rows on the preview page (24)")
    add_overwrite(parser)
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.heldout < 1:
        raise RecipeError(f"--heldout {arguments.heldout:g}: expected a share from 0 to below 1.")
    return arguments


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _questions(words: list[str]) -> dict[str, str]:
    """Return questions by column; one without a column, or whose `=` stands in a sentence, is for all images."""
    questions = {}
    for word in words:
        column, equals, text = word.partition("=")
        is_of_column = bool(equals and text.strip() and not column.strip().endswith("?"))
        questions[column.strip() if is_of_column else ""] = text.strip() if is_of_column else word.strip()
    if not all(questions.values()):
        raise RecipeError("--question: is empty; expected a text, or COLUMN=TEXT.")
    return questions
