"""Rows written once as an Arrow file and mapped into memory ever after: flat memory, and a second start in seconds.

A cache file is named by what it was made from (the data files' size and time, the image folder, this code), so that a
changed file is read anew. Beside it lies a `.json` with the rows that could not be used.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock

from vir_hf import files
from vir_hf.rows import BadRow

logger = logging.getLogger(__name__)

_ROWS_PER_BATCH = 2_000
_BYTES_PER_BATCH = 64 * 2**20
_CODE = ("conversations.py", "image_folder.py", "row_cache.py", "row_files.py", "rows.py")

ROW_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        (
            "messages",
            pa.list_(
                pa.struct(
                    [
                        ("role", pa.string()),
                        ("content", pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())]))),
                    ]
                )
            ),
        ),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
    ]
)


def cache_folder() -> Path:
    """Return where the cache files lie: below `HF_DATASETS_CACHE`, or a temporary folder where that is read-only."""
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "vir_hf"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        fallback = Path(tempfile.gettempdir()) / f"vir_hf_cache_{os.getuid() if hasattr(os, 'getuid') else 'user'}"
        logger.info(
            "%s cannot be written (%s); rows are cached in %s instead (set HF_DATASETS_CACHE)", folder, error, fallback
        )
        fallback.mkdir(parents=True, exist_ok=True)
        return fallback


def fingerprint(files: list[str], *others: object) -> str:
    """Return a name for what a cache is made from: the files by size and time, this package's code, and `others`."""
    identity: list[Any] = [list(others)]
    for file in files:
        stat = os.stat(file)
        identity.append([os.path.realpath(file), stat.st_size, stat.st_mtime_ns])
    digest = hashlib.sha256(json.dumps(identity, default=str).encode())
    for name in _CODE:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:24]


def cached_rows(name: str, rows: Iterable[dict[str, Any] | BadRow]) -> tuple[Path, list[BadRow]]:
    """Return the Arrow file called `name` and its bad rows, written from `rows` when it is not there yet."""
    path = cache_folder() / f"rows-{name}.arrow"
    with FileLock(f"{path}.lock"):  # other ranks wait for the first instead of doing the same work
        bad_rows = read_bad_rows(path)
        if bad_rows is None:
            bad_rows = _write(path, rows)
    return path, bad_rows


def read_bad_rows(path: Path) -> list[BadRow] | None:
    """Return the rows that a complete cache file left out, or None when there is no complete cache file."""
    try:
        return [BadRow(**entry) for entry in json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return None


def _write(path: Path, rows: Iterable[dict[str, Any] | BadRow]) -> list[BadRow]:
    bad_rows: list[BadRow] = []
    was_collecting = gc.isenabled()
    gc.disable()  # rows are trees, freed at once; looking for cycles in them takes a third of the time
    try:
        with files.writing(path) as temporary:
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, ROW_SCHEMA) as writer:
                for batch in _batches(rows, bad_rows):
                    writer.write_batch(to_record_batch(batch))
    finally:
        if was_collecting:
            gc.enable()
    # Written last: its presence says that the Arrow file is complete.
    files.write_text(path.with_suffix(".json"), json.dumps([dataclasses.asdict(bad) for bad in bad_rows]))
    return bad_rows


def _batches(rows: Iterable[dict[str, Any] | BadRow], bad_rows: list[BadRow]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    num_bytes = 0
    for row in rows:
        if isinstance(row, BadRow):
            bad_rows.append(row)
            continue
        batch.append(row)
        num_bytes += sum(len(image["bytes"] or b"") for image in row["images"])
        if len(batch) == _ROWS_PER_BATCH or num_bytes > _BYTES_PER_BATCH:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def to_record_batch(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    """Return rows `{"id", "messages", "images"}` as one Arrow batch of `ROW_SCHEMA`.

    Written column by column: pyarrow's own conversion of nested dictionaries takes three times as long.
    """
    roles: list[str] = []
    types: list[str] = []
    texts: list[str | None] = []
    message_offsets, content_offsets, image_offsets = [0], [0], [0]
    image_bytes: list[bytes | None] = []
    image_paths: list[str | None] = []
    for row in rows:
        for message in row["messages"]:
            roles.append(message["role"])
            for part in message["content"]:
                types.append(part["type"])
                texts.append(part.get("text"))
            content_offsets.append(len(types))
        message_offsets.append(len(roles))
        for image in row["images"]:
            image_bytes.append(image["bytes"])
            image_paths.append(image["path"])
        image_offsets.append(len(image_paths))
    parts = pa.StructArray.from_arrays(
        [pa.array(types, pa.string()), pa.array(texts, pa.string())], names=["type", "text"]
    )
    content = pa.ListArray.from_arrays(pa.array(content_offsets, pa.int32()), parts)
    messages = pa.StructArray.from_arrays([pa.array(roles, pa.string()), content], names=["role", "content"])
    images = pa.StructArray.from_arrays(
        [pa.array(image_bytes, pa.binary()), pa.array(image_paths, pa.string())], names=["bytes", "path"]
    )
    return pa.RecordBatch.from_arrays(
        [
            pa.array([row["id"] for row in rows], pa.string()),
            pa.ListArray.from_arrays(pa.array(message_offsets, pa.int32()), messages),
            pa.ListArray.from_arrays(pa.array(image_offsets, pa.int32()), images),
        ],
        schema=ROW_SCHEMA,
    )
