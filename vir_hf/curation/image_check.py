"""Before the first step: every picture of a loaded data set looked at once, so that no run meets a broken one at hour 20."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from accelerate import PartialState
from filelock import FileLock
from torch import distributed

import vir_hf
from vir_hf import files
from vir_hf.curation.checks import look_at_pictures
from vir_hf.data.cache import cache_folder, flat_batches
from vir_hf.data.located import BadRow, BadRowPolicy
from vir_hf.images.folder import file_stamp
from vir_hf.images.identity import Folders, picture_identity, place_identities
from vir_hf.images.opening import ImageHeader

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_URL = "^https?://"
_NO_FILE = (-1, -1)
# Fewer embedded pictures than this are looked at by one process sooner than by several.
_EMBEDDED_PER_PROCESS = 2_000
Fault = tuple[str, str]  # kind and detail


def leave_out_broken_pictures(
    dataset: Dataset,
    policy: BadRowPolicy,
    source: str,
    *,
    bad_rows: list[BadRow] | None = None,
    num_workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Dataset:
    """Return the data set without the rows whose pictures cannot be opened, judged by header and end of each file.

    What was found is remembered with the size and time of every file; the next start looks only at files that have changed
    and at those that were broken. Embedded pictures, which cannot change, are looked at once. A picture that is broken on one
    machine of several is left out on all, so that all train on the same rows.

    Args:
        dataset: what `load_llava_dataset(..., decode_images=False)` returns.
        source: what to call it in errors.
        bad_rows: a list that receives the rows left out, with their numbers among `dataset`.

    Raises:
        DataError: a picture is broken and `policy.on_bad_image` is `raise`, or too many are.
    """
    faults = _of_all_machines(
        _find_faults(dataset, num_workers, progress) if PartialState().is_local_main_process else {}
    )
    ids = dataset.select_columns(["id"])
    found = [BadRow(source, row, ids[row]["id"], *faults[row]) for row in sorted(faults)]
    policy.enforce(found, len(dataset), source)
    if bad_rows is not None:
        bad_rows += found
    return dataset.select([row for row in range(len(dataset)) if row not in faults]) if faults else dataset


def _of_all_machines(faults: dict[int, Fault]) -> dict[int, Fault]:
    """Return the faults that any process has found, the same on all of them."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return faults
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, faults)
    return {row: fault for part in reversed(found) for row, fault in part.items()}


def _find_faults(dataset: Dataset, num_workers: int | None, progress: Callable[[int, int], None]) -> dict[int, Fault]:
    """Return what is wrong with the first broken picture of every row that has one."""
    folders = Folders()
    places: dict[str, str] = {}  # by identity, as one of the rows writes it
    has_embedded = False
    for _, images in _batches(dataset):
        _, named = _named(images)
        contents = images.flatten().field("bytes")
        has_embedded |= contents.null_count < len(contents)
        for identity, place in zip(place_identities(named, folders).to_pylist(), named.to_pylist(), strict=True):
            places.setdefault(identity, place)
    broken = _look_at_places(places, num_workers, progress)
    faults: dict[int, Fault] = {}
    if broken:
        for start, images in _batches(dataset):
            is_place, named = _named(images)
            rows = pc.list_parent_indices(images).filter(is_place)
            identities = place_identities(named, folders)
            is_broken = pc.is_in(identities, value_set=pa.array(list(broken), pa.string()))
            for row, identity in zip(
                rows.filter(is_broken).to_pylist(), identities.filter(is_broken).to_pylist(), strict=True
            ):
                faults.setdefault(start + row, broken[identity])
    if has_embedded:
        for row, fault in _look_at_embedded(dataset, num_workers, progress).items():
            faults.setdefault(row, fault)
    return faults


def _batches(dataset: Dataset) -> Iterator[tuple[int, pa.ListArray]]:
    for start, table in flat_batches(dataset, ["images"]):
        yield start, table.column("images").combine_chunks()


def _named(images: pa.ListArray) -> tuple[pa.Array, pa.Array]:
    """Return which pictures of a batch are files to look at rather than embedded ones and URLs, and their places."""
    pictures = images.flatten()
    places = pictures.field("path")
    is_embedded, is_url = pictures.field("bytes").is_valid(), pc.match_substring_regex(places, _URL).fill_null(False)
    is_place = pc.and_(pc.and_not(places.is_valid(), is_embedded), pc.invert(is_url))
    return is_place, places.filter(is_place)


def _look_at_places(
    places: dict[str, str], num_workers: int | None, progress: Callable[[int, int], None]
) -> dict[str, Fault]:
    """Return the faults of files by identity; only those are opened that are new, have changed or were broken."""
    if not places:
        return {}
    started = time.perf_counter()
    identities = list(places)
    about = [vir_hf.__version__, PIL.__version__, *identities]
    digest = hashlib.sha256("\n".join(about).encode("utf-8", "surrogatepass")).hexdigest()[:24]
    path = cache_folder() / f"pictures-{digest}.parquet"
    with FileLock(f"{path}.lock"):  # another run on the same data waits for this one
        # Before they are looked at: what changes meanwhile is seen at the next start.
        stamps = np.array([file_stamp(place) or _NO_FILE for place in identities], dtype=np.int64)
        faults, wanted = _recall(path, identities, stamps)
        outcomes = look_at_pictures([places[name] for name in wanted], len(wanted), num_workers, progress)
        found = {
            name: outcome
            for name, outcome in zip(wanted, outcomes, strict=True)
            if not isinstance(outcome, ImageHeader)
        }
        if found != faults or len(wanted) > len(faults):
            _remember(path, identities, stamps, found)
    if len(wanted) > len(faults):
        logger.info("looked at %d of %d pictures in %.1f s", len(wanted), len(places), time.perf_counter() - started)
    return found


def _recall(path: Path, identities: list[str], stamps: np.ndarray) -> tuple[dict[str, Fault], list[str]]:
    """Return the faults found the last time and the pictures to look at: those, and those with another stamp than then."""
    try:
        table = pq.read_table(path)
        before = np.stack([table.column(name).to_numpy() for name in ("num_bytes", "modified")], axis=1)
        kinds, details = table.column("kind").to_pylist(), table.column("detail").to_pylist()
        has_changed = (before != stamps).any(axis=1)
    except (OSError, ValueError, KeyError, pa.ArrowException):  # nothing there, or not whole
        return {}, identities
    faults = {
        name: (kind, detail) for name, kind, detail in zip(identities, kinds, details, strict=True) if kind is not None
    }
    wanted = [name for name, differs in zip(identities, has_changed.tolist(), strict=True) if differs or name in faults]
    return faults, wanted


def _remember(path: Path, identities: list[str], stamps: np.ndarray, faults: dict[str, Fault]) -> None:
    table = pa.table(
        {
            "num_bytes": stamps[:, 0],
            "modified": stamps[:, 1],
            "kind": pa.array([faults[name][0] if name in faults else None for name in identities], pa.string()),
            "detail": pa.array([faults[name][1] if name in faults else None for name in identities], pa.string()),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    files.write_bytes(path, buffer.getvalue())


def _look_at_embedded(
    dataset: Dataset, num_workers: int | None, progress: Callable[[int, int], None]
) -> dict[int, Fault]:
    """Return the faults of embedded pictures by row. Each distinct one is looked at, once for as long as the rows are these."""
    digest = hashlib.sha256(f"{vir_hf.__version__} {PIL.__version__} {dataset._fingerprint}".encode()).hexdigest()[:24]
    path = cache_folder() / f"embedded-{digest}.json"
    with FileLock(f"{path}.lock"):
        try:
            return {int(row): (kind, detail) for row, (kind, detail) in json.loads(path.read_text("utf-8")).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            pass
        rows_of: dict[str, list[int]] = {}

        def distinct_pictures() -> Iterator[dict[str, Any]]:
            for start, images in _batches(dataset):
                pictures, rows = images.flatten(), pc.list_parent_indices(images).to_pylist()
                for row, content, place in zip(rows, pictures.field("bytes"), pictures.field("path"), strict=True):
                    if not content.is_valid:
                        continue
                    picture = {"bytes": memoryview(content.as_buffer()), "path": place.as_py()}
                    users = rows_of.setdefault(str(picture_identity(picture)), [])
                    users.append(start + row)
                    if len(users) == 1:
                        yield {**picture, "bytes": content.as_py()}

        num_tasks = len(dataset) if len(dataset) > _EMBEDDED_PER_PROCESS else 1
        outcomes = enumerate(look_at_pictures(distinct_pictures(), num_tasks, num_workers, progress))
        broken = {number: outcome for number, outcome in outcomes if not isinstance(outcome, ImageHeader)}
        faults: dict[int, Fault] = {}
        for number, users in enumerate(rows_of.values() if broken else ()):
            if number in broken:
                faults |= {row: broken[number] for row in users if row not in faults}
        files.write_text(path, json.dumps(faults))
    return faults
