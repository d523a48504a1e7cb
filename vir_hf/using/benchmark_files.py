"""The files of a benchmark as they are published, read into rows: JSON, JSON Lines, tables, MME's folder, Hub data sets."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vir_hf.data.sources import local_data
from vir_hf.errors import DataError, shown
from vir_hf.rows.files import find_data_files, read_rows

KEY = "_key"  # the name of a row in a file that holds one object, such as GQA's questions
SPLIT_FILE = "pid_splits.json"
_LISTS = ("annotations", "data", "questions", "results")
_TABLES = (".tsv", ".csv", ".tsv.gz", ".csv.gz")
_MME_LABELS = "questions_answers_YN"


def read_table(place: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the rows of a file, a folder, or a Hub data set.

    A JSON file may hold a list, one row a line, an object of rows by their ids (GQA, ScienceQA), or an object with the rows under
    `annotations`, `data` or `questions` (VQA, COCO captions, TextVQA, DocVQA). `.tsv` and `.csv` are read as MMBench's.

    Raises:
        DataError: nothing there, or no rows in it.
    """
    path = Path(place)
    if not path.exists():
        path = Path(local_data(os.fspath(place)))
        if not path.exists():
            raise DataError(
                f"{place}: no such file; expected a file of questions or labels, as its benchmark publishes it."
            )
    if path.is_dir():
        return _read_mme_folder(path) or [
            row for file in find_data_files(path) for row in _checked(Path(file), _rows_of_file(Path(file)))
        ]
    rows = _checked(path, _rows_of_file(path))
    if not rows:
        raise DataError(f"{path}: holds no rows, so there is nothing to score.")
    return rows


def _checked(path: Path, rows: Any) -> list[dict[str, Any]]:
    rows = list(rows)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(
                f"{path} row {number}: found {type(row).__name__}, expected an object with a question or answer."
            )
    return rows


def _rows_of_file(path: Path) -> Any:
    if path.name.lower().endswith(_TABLES):
        return _read_separated(path)
    if path.suffix.lower() == ".txt":
        return _read_mme_results(path)
    if path.suffix.lower() == ".json":
        try:
            whole = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, UnicodeDecodeError):
            whole = None  # one row a line, as POPE's labels; what is malformed is named by its line below
        if isinstance(whole, list):
            return whole
        if isinstance(whole, dict):
            return _rows_of_object(path, whole)
    return (row for _, row in read_rows(os.fspath(path)))


def _rows_of_object(path: Path, whole: dict[str, Any]) -> list[dict[str, Any]]:
    for name in _LISTS:
        if isinstance(whole.get(name), list):
            return _with_file_names(whole[name], whole.get("images"))
    if whole and all(isinstance(row, dict) for row in whole.values()):
        chosen = _chosen_ids(path, whole)
        return [{KEY: key, **row} for key, row in whole.items() if key in chosen]
    return [whole]


def _with_file_names(rows: list[Any], images: Any) -> list[Any]:
    """Return COCO's rows with the file names of their images, which stand in a list beside them."""
    if not isinstance(images, list):
        return rows
    names = {image["id"]: image["file_name"] for image in images if isinstance(image, dict) and "file_name" in image}
    return [{**row, "image": names[row["image_id"]]} if row.get("image_id") in names else row for row in rows]


def _chosen_ids(path: Path, rows: Mapping[str, Any]) -> set[str]:
    """Return the ids to read: all, or of ScienceQA's problems those of the test, by the file of splits beside them."""
    splits = path.parent / SPLIT_FILE
    if path.name == "problems.json" and splits.is_file():
        return set(json.loads(splits.read_text(encoding="utf-8")).get("test", rows))
    if all(isinstance(row, dict) and "choices" in row and "split" in row for row in rows.values()):
        tested = {key for key, row in rows.items() if row["split"] == "test"}
        return tested or set(rows)
    return set(rows)


def _read_separated(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # images lie in it as base64
    opened = gzip.open(path, "rt", encoding="utf-8-sig", newline="") if path.suffix == ".gz" else None
    with opened or path.open(encoding="utf-8-sig", newline="") as file:
        separator = "\t" if ".tsv" in path.name.lower() else ","
        for row in csv.DictReader(file, delimiter=separator):
            yield {key: value for key, value in row.items() if key and not is_missing(value)}


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: empty, or the `nan` and `None` that tables are written with."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and value.strip().lower() in ("", "nan", "none", "null"))
    )


def _read_mme_results(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of MME's result files: image, question, right answer and, in a result, the model's."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        cells = line.split("\t")
        if len(cells) not in (3, 4):
            raise DataError(
                f"{path} line {number}: found {len(cells)} columns, expected image, question, answer [, given]."
            )
        row = {"category": path.stem, "image": cells[0], "question": cells[1], "answer": cells[2]}
        yield {**row, "prediction": cells[3]} if len(cells) == 4 else row


def _read_mme_folder(path: Path) -> list[dict[str, Any]]:
    """Return the questions of `MME_Benchmark_release_version`, or of a folder of result files; nothing for another folder."""
    results = sorted(path.glob("*.txt"))
    if results and not any(child.is_dir() for child in path.iterdir()):
        return [row for file in results for row in _read_mme_results(file)]
    rows = []
    for category in sorted(child for child in path.iterdir() if child.is_dir()):
        labels = category / _MME_LABELS if (category / _MME_LABELS).is_dir() else category
        images = category / "images" if (category / "images").is_dir() else category
        for file in sorted(labels.glob("*.txt")):
            image = next((one for one in images.glob(f"{file.stem}.*") if one.suffix != ".txt"), None)
            for line in file.read_text(encoding="utf-8").splitlines():
                question, separator, answer = line.strip().partition("\t")
                if not separator:
                    raise DataError(f"{file}: found {shown(line)}, expected a question, a tab and the right answer.")
                name = image.relative_to(path).as_posix() if image else file.stem
                rows.append({"category": category.name, "image": name, "question": question, "answer": answer})
    return rows
