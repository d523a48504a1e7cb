"""Rows written once as an Arrow file and mapped into memory ever after: flat memory, and a second start in seconds.

A cache file is named by what it was made from (the data files' size and time, the image folder, this code), so that a
changed file is read anew. Beside it lies a `.json` with the rows that could not be used, what was noticed, and the
time of change of every folder and archive in which images were found, so that images which are gone are missed at the next start.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import logging
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from filelock import FileLock

from vir_hf import files
from vir_hf.data.located import BadRow
from vir_hf.data.reading import Seen
from vir_hf.images.folder import file_stamp, is_url, split_place

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_ROWS_PER_BATCH = 2_000
_BYTES_PER_BATCH = 16 * 2**20
_FIRST_ROWS = 16
_BYTES_READ_AT_ONCE = 4 * 2**20
_BYTES_MAPPED_AT_ONCE = 16 * 2**20
_CODE = (
    "rows/messages.py",
    "rows/encoding.py",
    "images/folder.py",
    "data/cache.py",
    "rows/files.py",
    "rows/keys.py",
    "data/located.py",
    "rows/shapes.py",
    "rows/vqa.py",
    "rows/boxes.py",
    "rows/containers.py",
    "data/reading.py",
    "data/filters.py",
)

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
                        ("supervised", pa.bool_()),
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
        digest.update((Path(__file__).parents[1] / name).read_bytes())
    return digest.hexdigest()[:24]


def cached_rows(
    name: str,
    rows: Callable[[Seen], Iterable[dict[str, Any] | BadRow | None]],
    has_arrived: Callable[[BadRow], bool] = lambda bad: False,
) -> tuple[Path, list[BadRow], Seen]:
    """Return the Arrow file called `name`, its bad rows and what was noticed, made anew where it is missing or not true any more.

    Args:
        rows: makes the rows, None for those left out, and tells what it is given what it notices (see `normalise_row`).
        has_arrived: whether the image that a row was left out for is there by now.
    """
    path = cache_folder() / f"rows-{name}.arrow"
    with FileLock(f"{path}.lock"):  # other ranks wait for the first instead of doing the same work
        known = _read_report(path, has_arrived)
        if known is None:
            seen = Seen()
            known = _write(path, rows(seen), seen), seen
    return path, *known


def _read_report(path: Path, has_arrived: Callable[[BadRow], bool]) -> tuple[list[BadRow], Seen] | None:
    """Return the rows a complete cache file left out and what was noticed, or None when it has to be written (again)."""
    try:
        report = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        bad_rows = [BadRow(**entry) for entry in report["bad_rows"]]
        seen = Seen.of_json(report["seen"])
        stamps: dict[str, Any] = report["stamps"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if any(has_arrived(bad) for bad in bad_rows):
        return None
    changed = [place for place, stamp in stamps.items() if _stamp(place) != stamp]
    if changed:
        started = time.time_ns()
        if _has_lost_pictures(path, changed):
            logger.info("pictures are gone from %s: the rows are read again", ", ".join(changed[:3]))
            return None
        _write_report(path, bad_rows, seen, stamps, started)
    return bad_rows, seen


def _has_lost_pictures(path: Path, changed: list[str]) -> bool:
    """Whether a picture that the rows of a cache file show is no longer in one of these folders."""
    if any(not os.path.isdir(place) for place in changed):  # an archive of another content, or nothing at all
        return True
    names = {folder: set(os.listdir(folder)) for folder in changed}
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        for batch in reader:
            for place in batch.column("images").flatten().field("path").drop_null().to_pylist():
                folder, name = os.path.split(place)
                if folder in names and name not in names[folder]:
                    return True
    return False


def _stamp(place: str) -> list[int] | None:
    """Return what changes when a folder loses a file, or an archive is another: for JSON, as a list."""
    stamp = file_stamp(place)
    return None if stamp is None else [0 if os.path.isdir(place) else stamp[0], stamp[1]]


def _write_report(path: Path, bad_rows: list[BadRow], seen: Seen, places: Iterable[str], started: int) -> None:
    stamps = {place: _stamp(place) for place in places}
    # What changed while its pictures were being found is looked through again the next time; file systems round times.
    stamps = {place: stamp if stamp and stamp[1] < started - 10**7 else None for place, stamp in stamps.items()}
    bad = [dataclasses.asdict(bad) for bad in bad_rows]
    report = {"bad_rows": bad, "seen": seen.to_json(), "stamps": stamps}
    files.write_text(path.with_suffix(".json"), json.dumps(report))


def flat_batches(rows: Dataset, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """Yield columns of a data set in parts, each with the number of its first row, in memory that does not grow.

    A part holds some MiB, or one row. Pages of a mapped file count as this process's memory once they are read, so the file is
    mapped anew whenever enough of it has been.
    """
    view = rows.select_columns(columns).with_format("arrow")
    num_file_bytes = sum(os.path.getsize(file["filename"]) for file in rows.cache_files)
    # Mapping a large file takes long: that is done some hundred times at most.
    most_mapped = max(_BYTES_MAPPED_AT_ONCE, num_file_bytes // 512)
    start, num_rows, num_mapped = 0, _FIRST_ROWS, 0
    while start < len(rows):
        table = view[start : start + num_rows]
        num_bytes = table.nbytes
        yield start, table
        del table
        start, num_mapped = start + num_rows, num_mapped + num_bytes
        if num_bytes > _BYTES_READ_AT_ONCE:
            num_rows = max(1, num_rows // 2)
        elif 2 * num_bytes < _BYTES_READ_AT_ONCE:
            num_rows = min(2 * num_rows, 10_000)
        if num_file_bytes and num_mapped > most_mapped:
            view, num_mapped = pickle.loads(pickle.dumps(view)), 0


def _write(path: Path, rows: Iterable[dict[str, Any] | BadRow | None], seen: Seen) -> list[BadRow]:
    bad_rows: list[BadRow] = []
    places: dict[str, None] = {}
    started = time.time_ns()
    was_collecting = gc.isenabled()
    gc.disable()  # rows are trees, freed at once; looking for cycles in them takes a third of the time
    try:
        with files.writing(path) as temporary:
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, ROW_SCHEMA) as writer:
                for batch in _batches(rows, bad_rows):
                    writer.write_batch(to_record_batch(batch))
                    places.update(dict.fromkeys(_holder(image) for row in batch for image in row["images"]))
    finally:
        if was_collecting:
            gc.enable()
    # Written last: its presence says that the Arrow file is complete.
    _write_report(path, bad_rows, seen, filter(None, places), started)
    return bad_rows


def _holder(image: dict[str, Any]) -> str:
    """Return the folder or archive that a located picture lies in; nothing for an embedded one or a URL."""
    place = image["path"]
    if image["bytes"] is not None or not place:
        return ""
    in_archive = split_place(place)
    return in_archive[0] if in_archive else "" if is_url(place) else os.path.dirname(place)


def _batches(rows: Iterable[dict[str, Any] | BadRow | None], bad_rows: list[BadRow]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    num_bytes = 0
    for row in rows:
        if row is None:
            continue
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
    supervised: list[bool | None] = []
    types: list[str] = []
    texts: list[str | None] = []
    message_offsets, content_offsets, image_offsets = [0], [0], [0]
    image_bytes: list[bytes | None] = []
    image_paths: list[str | None] = []
    for row in rows:
        for message in row["messages"]:
            roles.append(message["role"])
            supervised.append(message.get("supervised"))
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
    messages = pa.StructArray.from_arrays(
        [pa.array(roles, pa.string()), content, pa.array(supervised, pa.bool_())],
        names=["role", "content", "supervised"],
    )
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
