"""The rows of a data file, one at a time, with flat memory and errors that name the line.

JSON, JSON Lines, Parquet and Arrow are read here, CSV, TSV and tar shards in `containers`.

The content decides, not the suffix: a `.json` file may hold one list or one object after another, and so may a `.jsonl`. Either
may be compressed (`.gz`, `.zst`).
"""

# Over 400 lines: one reader of every container, told apart in one place.

from __future__ import annotations

import array
import contextlib
import difflib
import glob
import gzip
import io
import itertools
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from vir_hf.errors import DataError
from vir_hf.files import is_report
from vir_hf.rows.containers import read_shard_rows, read_table_rows

logger = logging.getLogger(__name__)

_TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson")
_TABLE_SUFFIXES = (".parquet", ".pq", ".arrow")
_PACKED_SUFFIXES = (".gz", ".zst")
DATA_SUFFIXES = (
    *_TEXT_SUFFIXES,
    *(text + packed for text in _TEXT_SUFFIXES for packed in _PACKED_SUFFIXES),
    *_TABLE_SUFFIXES,
)
# Read where they are named, or where a folder holds nothing of the above: beside rows, they mostly are something else.
_CSV_SUFFIXES = (".csv", ".tsv", *(name + packed for name in (".csv", ".tsv") for packed in _PACKED_SUFFIXES))
_SHARD_SUFFIX = ".tar"
OTHER_DATA_SUFFIXES = (*_CSV_SUFFIXES, _SHARD_SUFFIX)
# What lies beside rows and is none: descriptions of data sets, and what commands of this project write there.
_DESCRIPTIONS = re.compile(r"dataset_infos?\.json|dataset_dict\.json", re.IGNORECASE)
_OWN_FILES = re.compile(r"failed\.json|.*\.dropped\.json", re.IGNORECASE)
_NOT_DATA_FOLDERS = ("__MACOSX", "__pycache__")
MAX_ROW_CHARACTERS = 64 * 2**20
_CHUNK_CHARACTERS = 2**22
_SPACE_OR_COMMA = re.compile(r"[\s,]*")
_SPACE = re.compile(r"\s*")
_START = re.compile(r"[\s\ufeff]*")  # some editors put a byte order mark before the text
_EXPECTED = 'expected a list of rows, or one row a line, such as {"id": "1", "image": "1.jpg", "conversations": [...]}'


def is_data_file(name: str) -> bool:
    """Whether a file's suffix is that of rows, in letters of either case."""
    return name.lower().endswith(DATA_SUFFIXES)


def image_root(file: str, image_folder: str | None) -> str:
    """Return where the image paths of a data file start: the folder that was named, else its own; of a shard always its own."""
    own = os.path.dirname(os.path.abspath(file))
    return own if image_folder is None or file.lower().endswith(_SHARD_SUFFIX) else image_folder


def find_data_files(path: str | os.PathLike[str]) -> list[str]:
    """Return the data files a file name, a directory (searched recursively) or a glob pattern stands for, sorted.

    Of a directory, hidden files and folders are passed over (`._rows.json`, `.ipynb_checkpoints`), descriptions of data sets,
    and what this project's own commands write beside rows. A folder that `save_to_disk` wrote gives its Arrow files in order.

    Raises:
        DataError: there is none; what comes near is named.
    """
    path = os.fspath(path)
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        found, others = _files_of_folder(path)
    else:
        found, others = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name)), []
    if not found:
        near = f" It holds {others[0]}, which is not read." if others else _near_miss(path)
        raise DataError(
            f"{path}: no data file found (looked in {os.getcwd()}); expected a .json, .jsonl, .parquet, .arrow, .csv or "
            f".tar file, a directory or glob of them, or a Hub dataset id such as owner/name.{near} Set data.data_path to it."
        )
    return found


def _files_of_folder(path: str) -> tuple[list[str], list[str]]:
    """Return the data files below a folder, and the other visible files at its top."""
    found: list[str] = []
    further: list[str] = []
    for folder, inner, names in os.walk(path):
        inner[:] = sorted(name for name in inner if not name.startswith(".") and name not in _NOT_DATA_FOLDERS)
        if "dataset_dict.json" in names:
            inner[:] = [_only_split(folder)]
        if "state.json" in names and "dataset_info.json" in names:
            found += _saved_to_disk(folder)
            continue
        for name in names:
            place = os.path.join(folder, name)
            if name.lower().endswith(OTHER_DATA_SUFFIXES) and not name.startswith("."):
                further.append(place)
            if name.startswith(".") or not is_data_file(name) or _DESCRIPTIONS.fullmatch(name):
                continue
            if _OWN_FILES.fullmatch(name) or is_report(place):
                logger.warning("%s: passed over, vir-hf writes such files beside rows; name it to read it", place)
                continue
            found.append(place)
    visible = sorted(name for name in os.listdir(path) if not name.startswith("."))
    return sorted(found or further), [name for name in visible if os.path.isfile(os.path.join(path, name))]


def _only_split(folder: str) -> str:
    """Return the split of a saved data set to train on: `train`, or the only one.

    Raises:
        DataError: there are others, and none of them is called so.
    """
    with open(os.path.join(folder, "dataset_dict.json"), encoding="utf-8") as file:
        splits = [str(split) for split in json.load(file).get("splits", [])]
    if "train" in splits or len(splits) == 1:
        return "train" if "train" in splits else splits[0]
    raise DataError(f"{folder}: holds the splits {', '.join(splits) or '(none)'}; name the folder of one of them.")


def _saved_to_disk(folder: str) -> list[str]:
    """Return the Arrow files of a folder that `Dataset.save_to_disk` wrote, in the order of its rows."""
    try:
        with open(os.path.join(folder, "state.json"), encoding="utf-8") as file:
            return [os.path.join(folder, entry["filename"]) for entry in json.load(file)["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: its state.json cannot be read ({error}). Save the data set again.") from error


def _near_miss(path: str) -> str:
    """Return words about a file whose name is nearly this one, or none."""
    folder, name = os.path.split(path)
    try:
        near = difflib.get_close_matches(name, os.listdir(folder or "."), n=1, cutoff=0.8)
    except OSError:
        return ""
    return f" Did you mean {os.path.join(folder, near[0])}?" if near else ""


class RowRange(NamedTuple):
    """A stretch of a data file: bytes of a JSON file (or row groups of a Parquet file) `start` to `stop`, and its first row."""

    start: int
    stop: int
    first_row: int


def read_rows(path: str, part: RowRange | None = None) -> Iterator[tuple[int, Any]]:
    """Yield (row number counted from 0, raw row) of one data file, or of one part of it.

    Raises:
        DataError: the file is missing, empty, cut short or malformed; the message names the line.
    """
    with _data_errors(path):
        kind = _kind_of(path)
        if kind == "parquet":
            yield from _read_parquet_rows(path, part)
        elif kind == "arrow":
            yield from _read_arrow_rows(path)
        elif kind == "shard":
            yield from read_shard_rows(path)
        elif kind == "csv":
            with _open_text(path) as table:
                yield from read_table_rows(table, path)
        elif part is None or kind == "packed":
            yield from _read_json_rows(path)
        else:
            with open(path, "rb") as file:
                file.seek(part.start)
                window = _Window(path, io.StringIO(file.read(part.stop - part.start).decode()))
            for number in itertools.count(part.first_row):
                window.skip(_SPACE_OR_COMMA)
                if window.position == len(window.text):
                    return
                yield number, window.decode(number)


def split_rows(path: str, max_parts: int, min_rows: int = 1) -> list[RowRange]:
    """Return at most `max_parts` parts of a data file, with about as many rows each, found in one pass over it.

    Parts have at least `min_rows` rows. The parts of a Parquet file are its row groups, whatever was asked; a compressed file,
    an Arrow file, a table as text and a shard are one part.
    """
    with _data_errors(path):
        kind = _kind_of(path)
        if kind in ("packed", "arrow", "csv", "shard"):
            return [RowRange(0, 0, 0)]
        if kind == "parquet":
            with _open_parquet(path) as file:
                sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
            first_rows = list(itertools.accumulate(sizes, initial=0))
            return [RowRange(index, index + 1, first_rows[index]) for index in range(len(sizes))]
        ends = array.array("q", [0])
        for _ in _read_json_rows(path, ends):
            pass
    num_rows = len(ends) - 1
    max_parts = min(max_parts, max(1, num_rows // min_rows))
    cuts = sorted({num_rows * part // max_parts for part in range(max_parts + 1)})
    return [RowRange(ends[first], ends[last], first) for first, last in itertools.pairwise(cuts)]


def lines_of(data: bytes) -> list[bytes]:
    """Return the lines of JSON Lines: they end at a line feed alone, whatever else Unicode calls the end of a line."""
    lines = data.split(b"\n")
    return lines[:-1] if not lines[-1] else lines


def _kind_of(path: str) -> str:
    name = path.lower()
    if name.endswith(_CSV_SUFFIXES):
        return "csv"
    if name.endswith(_PACKED_SUFFIXES):
        return "packed"
    if name.endswith(_SHARD_SUFFIX):
        return "shard"
    return "parquet" if name.endswith((".parquet", ".pq")) else "arrow" if name.endswith(".arrow") else "text"


def _open_text(path: str) -> TextIO:
    """Open a text in UTF-8, unpacked where its suffix says that it is packed."""
    # newline="" keeps every character, so that characters can be counted as bytes
    name = path.lower()
    if name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    if name.endswith(".zst"):
        return io.TextIOWrapper(pa.input_stream(path, compression="zstd"), encoding="utf-8", newline="")
    return open(path, encoding="utf-8", newline="")


def _read_arrow_rows(path: str) -> Iterator[tuple[int, Any]]:
    """Yield the rows of an Arrow file, written as a stream (as `datasets` does) or for random access."""
    number = 0
    with pa.memory_map(path) as source:
        try:
            reader: Any = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            source.seek(0)
            reader = pa.ipc.open_file(source)
            reader = (reader.get_batch(index) for index in range(reader.num_record_batches))
        for batch in reader:
            for start in range(0, batch.num_rows, 64):
                for row in batch.slice(start, 64).to_pylist():
                    yield number, row
                    number += 1


@contextlib.contextmanager
def _data_errors(path: str) -> Iterator[None]:
    """Turn what reading a file can raise into a `DataError` that says what to do."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8 ({error.reason}). Save the file as UTF-8.") from error
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file (looked in {os.getcwd()}). Set data.data_path to the data file."
        ) from None
    except (OSError, EOFError, zlib.error, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be read ({error}). Was the copy or download cut short?") from error


def _open_parquet(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: is no readable Parquet file ({error}). Was the download cut short?") from error


def _read_parquet_rows(path: str, part: RowRange | None) -> Iterator[tuple[int, Any]]:
    with _open_parquet(path) as file:
        row_groups = range(file.num_row_groups) if part is None else range(part.start, part.stop)
        number = 0 if part is None else part.first_row
        for group in row_groups:  # one at a time: pyarrow holds all that it has read of several
            for batch in file.iter_batches(batch_size=64, row_groups=[group]):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1


def _read_json_rows(path: str, ends: array.array[int] | None = None) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a whole JSON file; `ends`, when given, receives the byte at which each row ends."""
    with _open_text(path) as file:
        window = _Window(path, file)
        window.skip(_START)
        opening = window.text[window.position : window.position + 1]
        if opening not in ("[", "{"):
            raise DataError(f"{path}: {'starts with ' + repr(opening) if opening else 'is empty'}; {_EXPECTED}.")
        window.position += opening == "["
        if ends is not None:
            ends[0] = window.byte()
        for number in itertools.count():
            window.skip(_SPACE_OR_COMMA)
            is_at_end = window.position == len(window.text)
            if is_at_end and opening == "[":
                raise DataError(
                    f"{path}: line {window.line()}: the file ends after row {number - 1} without the closing ']'. Was the "
                    "copy or download cut short? Fetch it again."
                )
            if is_at_end or (opening == "[" and window.text[window.position] == "]"):
                break
            yield number, window.decode(number)
            if ends is not None:
                ends.append(window.byte())
        window.position += not is_at_end
        window.skip(_SPACE)
        if window.position != len(window.text):
            raise DataError(f"{path}: line {window.line()}: text after the closing ']' of the rows; expected the end.")
        if number == 0:
            raise DataError(f"{path}: holds no rows; {_EXPECTED}.")


class _Window:
    """A stretch of a text file that slides forward, one JSON value at a time."""

    def __init__(self, path: str, file: TextIO) -> None:
        self.path = path
        self.file = file
        self.text = ""
        self.position = 0
        self._lines_before = 1
        self._columns_before = 0
        self._bytes_before = 0
        self._counted = 0  # up to this position of the text, its bytes are in _bytes_before
        self._is_at_end = False
        self._decode = json.JSONDecoder().raw_decode

    def _read_more(self) -> bool:
        """Drop what was read, append the next chunk; False at the end of the file."""
        if self._is_at_end:
            return False
        chunk = self.file.read(_CHUNK_CHARACTERS)
        if not chunk:
            self._is_at_end = True
            return False
        self._lines_before += self.text.count("\n", 0, self.position)
        self._columns_before = self.column(self.position) - 1
        self.byte()
        self._counted = 0
        self.text = self.text[self.position :] + chunk
        self.position = 0
        return True

    def skip(self, pattern: re.Pattern[str]) -> None:
        """Move past what the pattern matches, reading on where it reaches the end of the window."""
        while True:
            match = pattern.match(self.text, self.position)
            self.position = match.end() if match else self.position
            if self.position < len(self.text) or not self._read_more():
                return

    def line(self, position: int | None = None) -> int:
        """Return the line number, counted from 1, of a position in the window."""
        return self._lines_before + self.text.count("\n", 0, self.position if position is None else position)

    def column(self, position: int) -> int:
        """Return the place in its line, counted from 1, of a position in the window."""
        line_start = self.text.rfind("\n", 0, position) + 1
        return position - line_start + 1 + (0 if line_start else self._columns_before)

    def byte(self) -> int:
        """Return the byte of the file this position is at; asked after every row, it costs one pass over the text."""
        self._bytes_before += len(self.text[self._counted : self.position].encode())
        self._counted = self.position
        return self._bytes_before

    def decode(self, number: int) -> Any:
        """Return the JSON value that starts here and move past it."""
        while True:
            try:
                value, end = self._decode(self.text, self.position)
                if end < len(self.text) or isinstance(value, (dict, list)) or not self._read_more():
                    self.position = end
                    return value
            except json.JSONDecodeError as error:
                if self._may_be_cut(error) and self._read_more():
                    continue
                raise DataError(f"{self.path}: {self._describe(error, number)}") from None
            except (RecursionError, ValueError) as error:
                raise DataError(f"{self.path}: line {self.line()}: row {number} cannot be read ({error}).") from None

    def _describe(self, error: json.JSONDecodeError, number: int) -> str:
        if error.msg.startswith("Unterminated string") or not self.text[error.pos :].strip():
            return (
                f"line {self.line()}: the file ends in the middle of row {number}, which starts here. Was the copy or download "
                "cut short? Fetch it again."
            )
        place = f"line {self.line(error.pos)}, column {self.column(error.pos)}"
        starts = "" if self.line() == self.line(error.pos) else f", which starts in line {self.line()}"
        return f"{place}: malformed JSON in row {number}{starts} ({error.msg}). Mend that line; {_EXPECTED}."

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the window's end, rather than the text, may be what is wrong."""
        if len(self.text) - self.position > MAX_ROW_CHARACTERS:
            return False
        return error.msg.startswith("Unterminated string") or error.pos > len(self.text) - 16
