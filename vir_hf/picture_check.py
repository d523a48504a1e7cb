"""Before the first step: every picture of a loaded data set looked at once, so that no run meets a broken one at hour 20."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from filelock import FileLock

from vir_hf import files
from vir_hf.checks import look_at_pictures
from vir_hf.images import ImageHeader
from vir_hf.row_cache import cache_folder
from vir_hf.rows import BadRow, BadRowPolicy

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_ROWS_PER_BATCH = 10_000
_URL = "https?://"


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

    What was found is remembered by the list of pictures; the next start looks only at those that were broken.

    Args:
        dataset: what `load_llava_dataset(..., decode_images=False)` returns.
        source: what to call it in errors.
        bad_rows: a list that receives the rows left out, with their numbers among `dataset`.

    Raises:
        DataError: a picture is broken and `policy.on_bad_image` is `raise`, or too many are.
    """
    with PartialState().local_main_process_first():  # the others of a node read what it found
        broken = _find_broken(dataset, num_workers, progress)
    found = []
    for start, table in _batches(dataset):
        for number, place in _uses(table, broken):
            row_id = table.column("id")[number].as_py()
            found.append(BadRow(source, start + number, row_id, *broken[place]))
    unique = {bad.row: bad for bad in reversed(found)}
    found = [unique[row] for row in sorted(unique)]
    policy.enforce(found, len(dataset), source)
    if bad_rows is not None:
        bad_rows += found
    return dataset.select([row for row in range(len(dataset)) if row not in unique]) if unique else dataset


def _batches(dataset: Dataset) -> Iterator[tuple[int, pa.Table]]:
    rows = dataset.select_columns(["id", "images"]).with_format("arrow")
    for index, table in enumerate(rows.iter(_ROWS_PER_BATCH)):
        yield index * _ROWS_PER_BATCH, table


def _places(table: pa.Table) -> pa.Array:
    """Return a name for every picture of a batch: its place, or the digest of its embedded bytes."""
    images = table.column("images").combine_chunks().flatten()
    places, contents = images.field("path"), images.field("bytes")
    if contents.null_count == len(contents):
        return places
    names = [
        place if content is None else f"bytes:{hashlib.blake2b(content, digest_size=16).hexdigest()}"
        for place, content in zip(places.to_pylist(), contents.to_pylist(), strict=True)
    ]
    return pa.array(names, pa.string())


def _uses(table: pa.Table, broken: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """Yield (row in the batch, name of the picture) of every use of a broken picture."""
    if not broken:
        return
    names = _places(table)
    rows = pc.list_parent_indices(table.column("images").combine_chunks())
    is_broken = pc.is_in(names, value_set=pa.array(list(broken), pa.string()))
    yield from zip(rows.filter(is_broken).to_pylist(), names.filter(is_broken).to_pylist(), strict=True)


def _find_broken(
    dataset: Dataset, num_workers: int | None, progress: Callable[[int, int], None]
) -> dict[str, tuple[str, str]]:
    """Return kind and detail of every picture that cannot be opened, by name."""
    started = time.perf_counter()
    sources: dict[str, Any] = {}
    for _, table in _batches(dataset):
        names = _places(table)
        for name in pc.unique(
            names.filter(pc.invert(pc.match_substring_regex(names, f"^({_URL}|bytes:)")))
        ).to_pylist():
            sources[name] = name
        if pc.any(pc.starts_with(names, "bytes:")).as_py():
            contents = table.column("images").combine_chunks().flatten().field("bytes")
            sources |= {
                name: {"bytes": content.as_py(), "path": name}
                for name, content in zip(names.to_pylist(), contents, strict=True)
                if name.startswith("bytes:") and name not in sources
            }
    digest = hashlib.sha256("\n".join(sources).encode()).hexdigest()[:24]
    path = cache_folder() / f"pictures-{digest}.json"
    with FileLock(f"{path}.lock"):  # another run on the same data waits for this one
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            sources = {name: sources[name] for name in known}
        except (OSError, ValueError, KeyError):
            known = None
        outcomes = look_at_pictures(list(sources.values()), num_workers, progress)
        broken = {
            name: outcome
            for name, outcome in zip(sources, outcomes, strict=True)
            if not isinstance(outcome, ImageHeader)
        }
        if known is None or broken.keys() != known.keys():  # of many ranks one writes
            files.write_text(path, json.dumps(broken))
    if known is None:
        logger.info("looked at %d pictures in %.1f s", len(sources), time.perf_counter() - started)
    return broken
