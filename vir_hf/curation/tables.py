"""A spreadsheet as rows of text: CSV, TSV, or the one sheet of an Excel file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vir_hf.errors import DataError, RecipeError
from vir_hf.rows.files import read_rows

TABLE_SUFFIXES = (".csv", ".tsv", ".xlsx", ".xlsm")


def read_table(path: Path, sheet: str | None = None) -> list[dict[str, str]]:
    """Return the rows of a table, each cell as text; an empty cell is a key that the row has not.

    Args:
        sheet: which sheet of an Excel file; it may be left out where only one has anything in it.

    Raises:
        DataError: the table cannot be read, or has no rows.
        RecipeError: several sheets, or openpyxl is not installed.
    """
    if path.suffix.lower() in (".csv", ".tsv"):
        rows = [row for _, row in read_rows(str(path))]
    else:
        rows = _read_sheet(path, sheet)
    if not rows:
        raise DataError(f"{path}: holds no rows below its first line, which names the columns.")
    return rows


def _read_sheet(path: Path, sheet: str | None) -> list[dict[str, str]]:
    try:
        import openpyxl  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise RecipeError(
            f"{path}: Excel files are read by openpyxl, which is not installed. pip install 'vir-hf[excel]', or save the sheet "
            "as CSV."
        ) from error
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # zip, XML and openpyxl's own errors, whatever is wrong with the file
        raise DataError(
            f"{path}: cannot be read ({type(error).__name__}: {error}). Save it as .xlsx or CSV."
        ) from error
    sheets = {name: list(book[name].iter_rows(values_only=True)) for name in book.sheetnames}
    filled = [name for name, lines in sheets.items() if any(any(cell is not None for cell in line) for line in lines)]
    if sheet is None and len(filled) != 1:
        raise RecipeError(
            f"{path}: has {len(filled)} sheets with cells ({', '.join(filled)}); say which with --sheet NAME."
        )
    if sheet is not None and sheet not in sheets:
        raise RecipeError(f"--sheet {sheet}: {path} has the sheets {', '.join(sheets)}.")
    lines = sheets[sheet or filled[0]]
    names = [_text(cell) for cell in lines[0]] if lines else []
    while names and not names[-1]:
        names.pop()
    if not all(names) or len(set(names)) < len(names):
        raise DataError(f"{path}: its first line names the columns {names}; expected a name for each, all different.")
    rows = ({n: _text(cell) for n, cell in zip(names, line, strict=False) if _text(cell)} for line in lines[1:])
    return [row for row in rows if row]


def _text(cell: Any) -> str:
    """Return a cell as one would read it; Excel keeps whole numbers as 3.0."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return "" if cell is None else str(cell).strip()
