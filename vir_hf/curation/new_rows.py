"""LLaVA rows from what people have: a table about images, folders named after classes, or images with a text beside each.

Every choice that is made is written down in words (`NewRows.notes`), and what fits two readings is asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vir_hf.curation.tables import TABLE_SUFFIXES, read_table
from vir_hf.errors import DataError, ImageError, RecipeError, clipped
from vir_hf.images.folder import ImageFolder, read_bytes
from vir_hf.rows.keys import row_key_meaning

WAYS = ("table", "classes", "texts")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
DESCRIBE = "Describe the image."
_DESCRIPTIONS = ("caption", "description", "text", "alt", "alt_text")
_MOST_LISTED = 20


@dataclasses.dataclass
class NewRows:
    """Rows made, with image names below the folder, what was decided, and what was left out and why."""

    way: str
    rows: list[dict[str, Any]]
    notes: list[str]
    left_out: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What the caller decides: which table and columns, and the questions, by column (`""`: the only one)."""

    table: str | None = None
    sheet: str | None = None
    image_column: str | None = None
    columns: Sequence[str] = ()
    questions: Mapping[str, str] = dataclasses.field(default_factory=dict)


def find_images(folder: Path) -> list[str]:
    """Return the images below a folder as paths from it, hidden ones left out, sorted."""
    found = []
    for place, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith((".", "__MACOSX")))
        found += [
            os.path.relpath(os.path.join(place, name), folder)
            for name in names
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found)


def make_rows(folder: Path, way: str | None = None, wishes: Wishes = Wishes()) -> NewRows:
    """Return LLaVA rows about the images of a folder.

    Args:
        way: one of `WAYS`; by default the one that fits.

    Raises:
        RecipeError: no way fits or several do, or a column or question that does not exist.
        DataError: a table that cannot be read.
    """
    images = find_images(folder)
    if not images:
        raise DataError(f"{folder}: holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    if way is None and wishes.table is not None:
        way = "table"
    if way is None:
        fitting = [name for name, fits in _fits(folder, images).items() if fits]
        if len(fitting) != 1:
            found = (
                f"fits {' and '.join(fitting)}" if fitting else "has no table, no folders of classes and no .txt files"
            )
            raise RecipeError(
                f"{folder}: {found}; say what the rows are made from with --from table, classes or texts (a table: one of "
                f"{', '.join(TABLE_SUFFIXES)}, or --table FILE; classes: a folder for each; texts: a.txt beside a.jpg)."
            )
        way = fitting[0]
    if way == "table":
        return _of_table(folder, wishes)
    return _of_classes(images, wishes) if way == "classes" else _of_texts(folder, images, wishes)


def _fits(folder: Path, images: Sequence[str]) -> dict[str, bool]:
    num_texts = sum((folder / image).with_suffix(".txt").is_file() for image in images)
    return {
        "table": bool(_tables(folder)),
        "texts": 2 * num_texts > len(images),
        "classes": not num_texts and all(os.sep in image for image in images) and len(_classes(images)) > 1,
    }


def _tables(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if p.suffix.lower() in TABLE_SUFFIXES and not p.name.startswith((".", "~$"))
    )


def _row(row_id: str, image: str, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    conversations = []
    for number, (question, answer) in enumerate(turns):
        conversations.append({"from": "human", "value": f"<image>\n{question}" if number == 0 else question})
        conversations.append({"from": "gpt", "value": answer})
    return {"id": row_id, "image": image.replace(os.sep, "/"), "conversations": conversations}


def _classes(images: Sequence[str]) -> Counter[str]:
    return Counter(os.path.basename(os.path.dirname(image)) for image in images)


def _of_classes(images: Sequence[str], wishes: Wishes) -> NewRows:
    classes = {name: name.replace("_", " ").strip() for name in _classes(images) if name}
    if len(classes) < 2:
        raise RecipeError(
            f"--from classes: found {len(classes)} folders with images; expected one for each of 2 or more."
        )
    listed = ", ".join(sorted(classes.values()))
    if "" in wishes.questions:
        question = wishes.questions[""]
    elif len(classes) <= _MOST_LISTED:
        question = f"What does the image show? Answer with one of: {listed}."
    else:
        question = "What does the image show? Answer with its class alone."
    notes = [f"each image is asked {question!r}, and the answer is the name of its folder ({len(classes)} classes)"]
    renamed = [f"{name} is called {text!r}" for name, text in classes.items() if name != text]
    notes += [f"underscores become spaces: {clipped(', '.join(renamed), 200)}"] if renamed else []
    rows, left_out = [], []
    for image in images:
        name = os.path.basename(os.path.dirname(image))
        if name:
            rows.append(_row(image, image, [(question, classes[name])]))
        else:
            left_out.append(f"{image}: lies in no folder of a class")
    return NewRows("classes", rows, notes, left_out)


def _of_texts(folder: Path, images: Sequence[str], wishes: Wishes) -> NewRows:
    question = wishes.questions.get("", DESCRIBE)
    rows, left_out = [], []
    for image in images:
        path = (folder / image).with_suffix(".txt")
        try:
            text = path.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            left_out.append(f"{image}: no {path.name} beside it")
            continue
        except (OSError, UnicodeDecodeError) as error:
            left_out.append(f"{image}: {path.name} cannot be read ({error})")
            continue
        if text:
            rows.append(_row(image, image, [(question, text)]))
        else:
            left_out.append(f"{image}: {path.name} is empty")
    return NewRows("texts", rows, [f"each image is asked {question!r}, and the answer is the text beside it"], left_out)


def _of_table(folder: Path, wishes: Wishes) -> NewRows:
    path = _chosen_table(folder, wishes.table)
    rows = read_table(path, wishes.sheet)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    images = ImageFolder(folder)
    image_column = _image_column(path, rows, columns, images, wishes.image_column)
    questions, notes = _questions(path, rows, columns, image_column, wishes)
    made, left_out = [], []
    for number, row in enumerate(rows):
        place = f"{path.name} row {number}"
        name = row.get(image_column)
        try:
            if not name:
                raise ImageError("image_missing", f"no {image_column}")
            images.locate(name)
        except ImageError as error:
            left_out.append(f"{place}: {error}")
            continue
        if isinstance(questions, tuple):
            asked = [(row[questions[0]], row[questions[1]])] if all(row.get(name) for name in questions) else []
        else:
            asked = [(question, row[column]) for column, question in questions.items() if row.get(column)]
        if asked:
            made.append(_row(row.get("id") or f"row-{number}", name, asked))
        else:
            left_out.append(f"{place}: no answer in any of its columns")
    return NewRows("table", made, [f"images are named in the column {image_column!r}", *notes], left_out)


def _chosen_table(folder: Path, named: str | None) -> Path:
    if named is not None:
        return Path(named)
    tables = _tables(folder)
    if len(tables) != 1:
        found = f"{len(tables)} tables ({', '.join(table.name for table in tables)})" if tables else "no table"
        raise RecipeError(f"{folder}: holds {found}; say which with --table FILE.")
    return tables[0]


def _image_column(
    path: Path, rows: Sequence[Mapping[str, str]], columns: Sequence[str], images: ImageFolder, wanted: str | None
) -> str:
    """Return the column that names images: the one asked for, else the only one whose cells mostly do."""
    if wanted is not None:
        _refuse_unknown(path, [wanted], columns, "--image-column")
        return wanted
    shares = {column: _share_found([row[column] for row in rows if column in row][:200], images) for column in columns}
    fitting = [column for column, share in shares.items() if share > 0.5]
    if len(fitting) != 1:
        best = ", ".join(f"{column} ({share:.0%})" for column, share in shares.items() if share) or "none"
        raise RecipeError(
            f"{path}: {len(fitting) or 'no'} columns name images below {images.path} (cells found: {clipped(best, 160)}); say "
            "which with --image-column NAME."
        )
    return fitting[0]


def _share_found(cells: Sequence[str], images: ImageFolder) -> float:
    def is_found(cell: str) -> bool:
        try:
            return bool(images.locate(cell)) and cell.lower().endswith(IMAGE_SUFFIXES)
        except (ImageError, DataError):
            return False

    return sum(map(is_found, cells)) / len(cells) if cells else 0.0


def _questions(
    path: Path, rows: Sequence[Mapping[str, str]], columns: Sequence[str], image_column: str, wishes: Wishes
) -> tuple[dict[str, str] | tuple[str, str], list[str]]:
    """Return the question of each column that is asked about, or the columns of questions and answers, and notes on them."""
    others = [column for column in columns if column != image_column and column.lower() != "id"]
    named = [column for column in wishes.questions if column]
    _refuse_unknown(path, [*wishes.columns, *named], columns, "--columns and --question")
    if {"question", "answer"} <= set(others) and not wishes.columns and not wishes.questions:
        return ("question", "answer"), ["questions and answers are those of the columns 'question' and 'answer'"]
    chosen = list(wishes.columns) or others
    notes, questions = [], {}
    for column in chosen:
        values = [row[column] for row in rows if column in row]
        if not wishes.columns and column not in wishes.questions:
            reason = _why_not_asked(column, values)
            if reason:
                notes.append(
                    f"the column {column!r} is not asked about: {reason} (--columns {column} asks all the same)"
                )
                continue
        default = DESCRIBE if column.lower() in _DESCRIPTIONS else f"What is the {_words(column)}?"
        questions[column] = wishes.questions.get(column, default)
        notes.append(f"the column {column!r} answers {questions[column]!r} ({len(set(values)):,} different answers)")
    if not questions:
        raise RecipeError(f"{path}: no column is left to ask about; name some with --columns. {'; '.join(notes)}")
    return questions, notes


def _why_not_asked(column: str, values: Sequence[str]) -> str:
    """Return why an image could hardly tell what a column says, or an empty text."""
    if row_key_meaning(column) in ("image", "other_image"):
        return "its name is that of images"
    if len(values) > 3 and len(set(values)) == 1:
        return "it says the same of all images"
    is_key = len(values) > 3 and len(set(values)) == len(values) and all(" " not in value for value in values)
    return "each of its cells is a single word or number that no other has, as keys are" if is_key else ""


def _words(column: str) -> str:
    return column.replace("_", " ").strip().lower()


def _refuse_unknown(path: Path, names: Sequence[str], columns: Sequence[str], option: str) -> None:
    for name in names:
        if name not in columns:
            raise RecipeError(
                f"{option}: {path} has no column {name!r}; its columns are {clipped(', '.join(columns), 200)}."
            )


def held_out(rows: Sequence[dict[str, Any]], folder: Path, fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Return the rows to train on and those held out: no image is in both, by the content of its file.

    Raises:
        DataError: too few images for a split.
    """
    places = ImageFolder(folder)
    digests = {
        image: hashlib.sha256(read_bytes(places.locate(image))).hexdigest()
        for image in dict.fromkeys(row["image"] for row in rows)
    }
    order = sorted(set(digests.values()), key=lambda d: hashlib.sha256(f"{seed}|{d}".encode()).digest())
    num_held_out = round(fraction * len(order)) if fraction else 0
    if fraction and not 0 < num_held_out < len(order):
        raise DataError(
            f"{folder}: {len(order)} different images cannot be split with --heldout {fraction:g}; add images, or set "
            "--heldout 0."
        )
    chosen = set(order[:num_held_out])
    return [r for r in rows if digests[r["image"]] not in chosen], [r for r in rows if digests[r["image"]] in chosen]


def preview_rows(rows: Sequence[dict[str, Any]], folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """Yield the first rows as the template of `data inspect` takes them, answers as what is learned."""
    from vir_hf.curation.inspection import shown_file

    places = ImageFolder(folder)
    for number, row in enumerate(rows[:count]):
        spans = [
            {
                "sort": "learned" if turn["from"] == "gpt" else "read",
                "text": turn["value"],
                "pieces": [(turn["value"].replace("<image>\n", "") + "\n", None)],
            }
            for turn in row["conversations"]
        ]
        yield {
            "title": f"row {number}, {clipped(row['id'], 80)}",
            "images": [shown_file(places.locate(row["image"]))],
            "spans": spans,
        }
