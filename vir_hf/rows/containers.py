"""Tables as text and tar shards: files of rows besides JSON, Parquet and Arrow.

A `.csv` or `.tsv` has its columns in the first line. A tar shard in WebDataset's form holds the files of one row beside each
other, called alike but for their suffixes; a row of it is `{"__key__", suffix: file ...}`, as `datasets` reads it, with images
as places in the shard that are opened when they are needed.
"""

from __future__ import annotations

import csv
import json
import os
import tarfile
from collections.abc import Iterator
from typing import Any, TextIO

from vir_hf.errors import DataError, shown
from vir_hf.rows.keys import row_key_meaning

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_TEXT_SUFFIXES = ("json", "txt", "cls", "caption", "text")
_MEDIA_SUFFIXES = ("mp4", "webm", "mov", "avi", "mkv", "wav", "mp3", "flac", "ogg")
# What lies in a shard and is no row: files that systems leave behind.
_LEFT_BEHIND = ("._", ".DS_Store", "__MACOSX")
_MAX_TEXT_BYTES = 64 * 2**20


def read_table_rows(file: TextIO, path: str) -> Iterator[tuple[int, Any]]:
    """Yield number and row of a table written as text; an empty cell is a key that the row has not.

    A cell of an image or of turns that is a JSON list is read as one.

    Raises:
        DataError: columns without names or with the same name, a line of more cells than columns, or broken quotes.
    """
    csv.field_size_limit(2**31 - 1)
    is_tsv = path.lower().removesuffix(".gz").removesuffix(".zst").endswith(".tsv")
    reader = csv.reader(file, delimiter="\t" if is_tsv else ",", strict=True)
    try:
        names = [name.lstrip("\ufeff").strip() for name in next(reader, [])]
        if not names or not all(names) or len(set(names)) < len(names):
            raise DataError(
                f"{path}: line 1: found the columns {shown(names)}; expected a name for each, all different, such as "
                "image,question,answer."
            )
        number = 0
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(names):
                raise DataError(
                    f"{path}: line {reader.line_num}: row {number} has {len(cells)} cells, expected {len(names)} "
                    f"({', '.join(names)[:120]}). Put a text with {'a tab' if is_tsv else 'commas'} in quotes."
                )
            yield number, {name: _cell(name, text) for name, text in zip(names, cells, strict=True) if text.strip()}
            number += 1
    except csv.Error as error:
        raise DataError(
            f"{path}: line {reader.line_num}: {error}. Was the file cut short, or a quote left open?"
        ) from error


def _cell(name: str, text: str) -> Any:
    if text.lstrip()[:1] == "[" and row_key_meaning(name) in ("image", "other_image", "turns"):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def read_shard_rows(path: str) -> Iterator[tuple[int, Any]]:
    """Yield number and row of a tar shard, read from its front to its end with the files of one row in memory.

    Raises:
        DataError: the shard is cut short, or a row's files do not stand beside each other.
    """
    number, key = 0, None
    row: dict[str, Any] = {}
    finished: set[str] = set()
    try:
        with tarfile.open(path, "r:") as shard:
            for info in shard:
                shard.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                name = info.name.removeprefix("./")
                if not info.isfile() or os.path.basename(name).startswith(_LEFT_BEHIND) or "__MACOSX" in name:
                    continue
                this, suffix = split_member(name)
                if this != key:
                    if key is not None:
                        yield number, row
                        number += 1
                        finished.add(key)
                    if this in finished:
                        raise DataError(
                            f"{path}: {name}: the files of {this} do not stand beside each other. Sort the shard's files by "
                            "name, or read it as an image folder."
                        )
                    key, row = this, {"__key__": this}
                row[_column(suffix)] = _content(shard, info, name, suffix, path)
            if not _has_end(path, shard.offset):
                raise DataError(
                    f"{path}: ends after row {number} without the zeros that end a tar. Was it cut short? Fetch it again."
                )
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path}: is cut short or no tar shard ({error}). Fetch it again.") from error
    if key is not None:
        yield number, row


def _has_end(path: str, offset: int) -> bool:
    """Whether an archive ends as it should where its reader stopped, which tarfile also does at a header that is cut off."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE


def split_member(name: str) -> tuple[str, str]:
    """Return a shard member's key, which its row's files share, and its suffix; as WebDataset cuts them, at the first dot."""
    folder, slash, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    return folder + slash + key, suffix.lower()


def _column(suffix: str) -> str:
    return "video" if suffix.rpartition(".")[2] in _MEDIA_SUFFIXES else suffix


def _content(shard: tarfile.TarFile, info: tarfile.TarInfo, name: str, suffix: str, path: str) -> Any:
    """Return what a row says of a member: an image's place, a text, a JSON value, else the member's name."""
    kind = suffix.rpartition(".")[2]
    if kind in _IMAGE_SUFFIXES:
        return f"tar://{name}::{os.path.realpath(path)}"
    if kind not in _TEXT_SUFFIXES:
        return name
    if info.size > _MAX_TEXT_BYTES:
        raise DataError(f"{path}: {name}: {info.size:,} bytes; expected a row of at most 64 MiB.")
    file = shard.extractfile(info)
    data = file.read() if file else b""
    if len(data) != info.size:
        raise DataError(
            f"{path}: {name}: {len(data)} of {info.size} bytes. Was the download cut short? Fetch it again."
        )
    try:
        return json.loads(data) if kind == "json" else data.decode()
    except ValueError as error:
        raise DataError(f"{path}: {name}: cannot be read ({error}). Mend it, or make the shard again.") from error
