"""Data files and Hub data sets -> datasets of rows `{"id", "messages", "images"}` whose pictures open when a row is read."""

# Over 400 lines: each kind of source is short; what they share is the same loading.

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from huggingface_hub import hf_hub_download, snapshot_download

from vir_hf import files
from vir_hf.data.cache import cache_folder, cached_rows, fingerprint
from vir_hf.data.duplicates import Duplicates
from vir_hf.data.located import BadRow, BadRowPolicy, normalise_row
from vir_hf.data.reading import BY_COLUMNS, READING_KEYS, Reading, Seen
from vir_hf.errors import DataError, ImageError, RecipeError, clipped
from vir_hf.images.folder import ImageFolder
from vir_hf.images.opening import open_image
from vir_hf.rows.files import (
    DATA_SUFFIXES,
    OTHER_DATA_SUFFIXES,
    RowRange,
    find_data_files,
    image_root,
    read_rows,
    split_rows,
)

logger = logging.getLogger(__name__)

ROW_FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "messages": datasets.List(
            {
                "role": datasets.Value("string"),
                "content": datasets.List({"type": datasets.Value("string"), "text": datasets.Value("string")}),
                "supervised": datasets.Value("bool"),  # false in an answer that is not learned, else null
            }
        ),
        "images": datasets.List(datasets.Image(decode=False)),
    }
)
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_HUB_FILE = re.compile(r"^hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<file>.+)$")


def load_llava_dataset(
    path: str | os.PathLike[str],
    image_folder: str | os.PathLike[str] | None = None,
    *,
    decode_images: bool = True,
    streaming: bool = False,
    max_rows: int | None = None,
    allow_urls: bool = False,
    on_bad_row: str = "raise",
    on_bad_image: str = "raise",
    max_bad_fraction: float = 0.05,
    bad_rows: list[BadRow] | None = None,
    name: str | None = None,
    split: str | None = None,
    reading: Reading = BY_COLUMNS,
    duplicates: Duplicates | None = None,
    tell: Callable[[str], None] = logger.info,
) -> datasets.Dataset | datasets.IterableDataset:
    """Return the rows of LLaVA data as a dataset with the columns `id`, `messages` and `images`.

    Args:
        path: a `.json`, `.jsonl` or `.parquet` file, a directory or glob of them, a Hub data set `owner/name`, or one file of
            it, `hf://datasets/owner/name[@revision]/file.json`.
        image_folder: where the rows' image paths start: a directory, a `.zip` or a `.tar`. By default the data file's own
            directory.
        decode_images: give PIL images in mode RGB (opened when the row is read), or `{"bytes", "path"}` for `open_image`.
        streaming: read shards as they are needed; they are shared out among ranks (`datasets.distributed`) and dataloader
            workers, and `state_dict` resumes where it stopped.
        max_rows: read no more than this many rows from the front.
        allow_urls: let an image be an http(s) URL, fetched when the row is read.
        on_bad_row, on_bad_image: `raise`, or `skip` the row; at most `max_bad_fraction` of all rows. A stream meets its bad
            rows one by one and does not count the fraction.
        bad_rows: a list that receives the rows left out.
        name, split: which configuration and split of a Hub data set; by default its only one, and `train`.
        reading: in which shape rows are read and which of them, `Reading.of(format="vqa", filter={"relevance_min": ">=3"})`.
        duplicates: what other sources have given; rows that repeat it, or each other, are left out. Not of a stream.
        tell: takes the line that says in which shape rows were read, and how many a filter left out.

    Raises:
        DataError: no data file, malformed JSON (with its line), or rows that cannot be trained on (with number and id).
    """
    policy = BadRowPolicy(on_bad_row, on_bad_image, max_bad_fraction)
    path = local_path(path)
    source: _FileRows | _HubRows
    if not os.path.exists(path) and is_hub_id(path):
        folder = None if image_folder is None else ImageFolder(image_folder, allow_urls=allow_urls)
        source = _HubRows(path, folder, streaming, reading, name=name, split=split)
    else:
        if split is not None:
            raise RecipeError(f"{path}: split {split!r} goes with a data set on the Hub; of files, name those to read.")
        source = _FileRows(path, image_folder, allow_urls, reading)
    if streaming:
        stream = source.stream(policy)
        stream = stream if max_rows is None else stream.take(max_rows)
        return stream.map(OpenImages(allow_urls), batched=True, batch_size=1) if decode_images else stream
    dataset, bad = source.load(max_rows, tell)
    policy.enforce(bad, len(dataset) + len(bad), path)
    if bad_rows is not None:
        bad_rows.extend(bad)
    if duplicates is not None:
        dataset = duplicates.left_out_of(dataset, path)
    return dataset.with_transform(OpenImages(allow_urls)) if decode_images else dataset


def load_recipe_rows(
    recipe: Any, bad_rows: list[BadRow] | None = None, tell: Callable[[str], None] = logger.info
) -> Any:
    """Return the training rows a recipe names, `data.data_path` or the mixture of `data.sources`, pictures undecoded."""
    data = recipe.data
    options = _recipe_options(data, bad_rows) | {"tell": tell}
    if data.sources:
        sources = [dataclasses.asdict(source) for source in data.sources]
        return load_sources(sources, seed=recipe.training.seed, decode_images=False, **options)
    if data.data_path is None:
        raise RecipeError(
            "data.data_path: not set; name a LLaVA JSON file: data.data_path=rows.json data.image_folder=images"
        )
    source = {"path": data.data_path, "image_folder": data.image_folder, "name": data.name, "split": data.split}
    return load_source(source, **options)


def load_recipe_parts(recipe: Any) -> list[datasets.Dataset]:
    """Return the rows of each source of a recipe's mixture by itself, before any is drawn."""
    options = _recipe_options(recipe.data, None)
    return [load_source(dataclasses.asdict(source), **options) for source in recipe.data.sources]


def _recipe_options(data: Any, bad_rows: list[BadRow] | None) -> dict[str, Any]:
    return {
        "streaming": data.streaming,
        "max_rows": data.max_rows,
        "allow_urls": data.allow_urls,
        "on_bad_row": data.on_bad_row,
        "on_bad_image": data.on_bad_image,
        "max_bad_fraction": data.max_bad_fraction,
        "bad_rows": bad_rows,
        "duplicates": Duplicates(data.deduplicate) if data.deduplicate else None,
        "reading_keys": {key: getattr(data, key) for key in READING_KEYS},
    }


def share_of_stream(stream: datasets.IterableDataset, rank: int, world_size: int) -> datasets.IterableDataset:
    """Return the part of a stream that one of several processes reads; whole shards where they divide evenly."""
    if world_size == 1:
        return stream
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(stream, rank=rank, world_size=world_size)


def load_sources(
    sources: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
    decode_images: bool = True,
    streaming: bool = False,
    **options: Any,
) -> datasets.Dataset | datasets.IterableDataset:
    """Return a mixture of sources as one dataset.

    A source with neither `weight` nor `num_rows` gives all its rows. Sources with a `weight` share the mixture in that
    proportion, and the one that would run out first is used whole, so that no row comes twice. A source with `num_rows`
    gives so many, drawn with `seed`; rows come twice only where it has fewer.

    Args:
        sources: mappings with `path`, and optionally `image_folder`, `weight` or `num_rows`, and `name`.
        options: as for `load_llava_dataset`.

    Raises:
        RecipeError: a source with both `weight` and `num_rows`, or an unknown key.
        DataError: as `load_llava_dataset`.
    """
    for number, source in enumerate(sources):
        unknown = set(source) - {"path", "image_folder", "weight", "num_rows", "name", "split", *READING_KEYS}
        if unknown or "path" not in source or (source.get("weight") is not None and source.get("num_rows") is not None):
            raise RecipeError(
                f"data.sources[{number}]: found {dict(source)}; expected path, and optionally image_folder, name, split, "
                f"{', '.join(READING_KEYS)}, and weight or num_rows."
            )
    parts = [load_source(source, streaming=streaming, **options) for source in sources]
    allow_urls = bool(options.get("allow_urls"))
    if streaming:
        stream = _mix_streams(parts, sources, seed)
        return stream.map(OpenImages(allow_urls), batched=True, batch_size=1) if decode_images else stream
    counts = mixture_counts([len(part) for part in parts], sources)
    drawn = []
    for number, (part, source, count) in enumerate(zip(parts, sources, counts, strict=True)):
        name = source.get("name") or source["path"]
        logger.info("mixture: %s gives %d of %d rows (%.1f %%)", name, count, len(part), 100 * count / sum(counts))
        if count == 0:
            logger.warning("mixture: %s is left out: its share is less than half a row", name)
            continue
        if count != len(part):
            generator = np.random.default_rng([seed, number])
            rounds = [generator.permutation(len(part)) for _ in range(-(-count // len(part)))]
            part = part.select(np.sort(np.concatenate(rounds)[:count]))
        drawn.append(part)
    dataset = datasets.concatenate_datasets(drawn)
    return dataset.with_transform(OpenImages(allow_urls)) if decode_images else dataset


def load_source(
    source: Mapping[str, Any], *, reading_keys: Mapping[str, Any] | None = None, **options: Any
) -> datasets.Dataset | datasets.IterableDataset:
    """Return the rows of one source of a mixture; what it does not say of how they are read, `reading_keys` says for all."""
    own = {key: source[key] for key in READING_KEYS if source.get(key) is not None}
    return load_llava_dataset(
        source["path"],
        source.get("image_folder"),
        decode_images=False,
        name=source.get("name"),
        split=source.get("split"),
        reading=Reading.of(**{**(reading_keys or {}), **own}),
        **options,
    )


def mixture_counts(sizes: Sequence[int], sources: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return how many rows each source of a mixture gives; `sizes` are the rows they have."""
    shares = [source.get("weight") for source in sources]
    # How many rows a weight of 1 stands for: as many as the scarcest source allows.
    scale = min((size / share for size, share in zip(sizes, shares, strict=True) if share is not None), default=0.0)
    counts = []
    for size, share, source in zip(sizes, shares, sources, strict=True):
        wanted = source.get("num_rows")
        counts.append(round(scale * share) if share is not None else size if wanted is None else int(wanted))
    return counts


def _mix_streams(
    parts: list[datasets.IterableDataset], sources: Sequence[Mapping[str, Any]], seed: int
) -> datasets.IterableDataset:
    parts = [
        part if source.get("num_rows") is None else part.take(source["num_rows"])
        for part, source in zip(parts, sources, strict=True)
    ]
    weighted = [part for part, source in zip(parts, sources, strict=True) if source.get("weight") is not None]
    others = [part for part, source in zip(parts, sources, strict=True) if source.get("weight") is None]
    if weighted:
        weights = np.array([source["weight"] for source in sources if source.get("weight") is not None], dtype=float)
        weighted = [datasets.interleave_datasets(weighted, probabilities=list(weights / weights.sum()), seed=seed)]
    return datasets.concatenate_datasets([*weighted, *others]) if others else weighted[0]


class _FileRows:
    """The rows of files on this machine."""

    def __init__(
        self, path: str, image_folder: str | os.PathLike[str] | None, allow_urls: bool, reading: Reading
    ) -> None:
        self.path = path
        self.reading = reading
        self.files = find_data_files(path)
        named = None if image_folder is None else os.fspath(image_folder)
        roots = [image_root(file, named) for file in self.files]
        folders = {root: ImageFolder(root, allow_urls=allow_urls) for root in dict.fromkeys(roots)}
        self.folders = [folders[root] for root in roots]

    def load(self, max_rows: int | None, tell: Callable[[str], None]) -> tuple[datasets.Dataset, list[BadRow]]:
        for folder in self.folders:
            folder.open()
        name = fingerprint(self.files, [folder.identity for folder in self.folders], max_rows, self.reading.identity)
        return _open_cache(name, lambda seen: self._rows(max_rows, seen), self.path, tell, self._has_arrived)

    def _rows(self, max_rows: int | None, seen: Seen) -> Iterator[dict[str, Any] | BadRow | None]:
        num_rows = 0
        for file, folder in zip(self.files, self.folders, strict=True):
            for number, raw in read_rows(file):
                if num_rows == max_rows:
                    return
                num_rows += 1
                yield normalise_row(raw, folder, file, number, seen, self.reading)

    def _has_arrived(self, bad: BadRow) -> bool:
        try:
            return bad.reference is not None and bool(self.folders[self.files.index(bad.file)].locate(bad.reference))
        except DataError:
            return False

    def stream(self, policy: BadRowPolicy) -> datasets.IterableDataset:
        # All but the last divide evenly over 1, 2, 4, 8 ... and most other numbers of ranks.
        num_parts = next(parts for parts in (960, 96, 8, 1) if parts * len(self.files) <= 8_000 or parts == 1)
        shards = [
            (file, folder, part)
            for file, folder in zip(self.files, self.folders, strict=True)
            for part in _parts_of(file, num_parts)
        ]
        return datasets.IterableDataset.from_generator(
            _generate_rows,
            features=ROW_FEATURES,
            gen_kwargs={"shards": shards, "policy": policy, "reading": self.reading},
        )


def _parts_of(file: str, max_parts: int) -> list[RowRange]:
    """Return the parts of a file, remembered on disk: finding them takes a pass over it."""
    path = cache_folder() / f"parts-{fingerprint([file], max_parts)}.json"
    try:
        return [RowRange(*part) for part in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        parts = split_rows(file, max_parts)
        files.write_text(path, json.dumps(parts))
        return parts


def _generate_rows(
    shards: list[tuple[str, ImageFolder, RowRange]], policy: BadRowPolicy, reading: Reading
) -> Iterator[dict[str, Any]]:
    reported = Seen()
    for file, folder, part in shards:
        for number, raw in read_rows(file, part):
            row = _usable(_normalise_streamed(raw, folder, file, number, reported, reading), policy)
            if row is not None:
                yield row


def _normalise_streamed(
    raw: Any, folder: ImageFolder | None, source: str, number: int, reported: Seen, reading: Reading
) -> dict[str, Any] | BadRow | None:
    """`normalise_row` of a stream: what is noticed is told at the first row it is noticed of, nobody knows how many come."""
    seen = Seen()
    row = normalise_row(raw, folder, source, number, seen, reading)
    reported.report_new(seen, f"{source} (first in row {number})")
    return row


def _usable(row: dict[str, Any] | BadRow | None, policy: BadRowPolicy) -> dict[str, Any] | None:
    """Return a row of a stream; a bad one raises, or is logged and None."""
    if not isinstance(row, BadRow):
        return row
    if (policy.on_bad_image if row.is_image else policy.on_bad_row) == "raise":
        policy.enforce([row], row.row + 1, row.file)
    logger.warning("%s", clipped(f"left out: {row.file}: row {row.row} (id {row.id}): {row.detail}"))
    return None


class _HubRows:
    """The rows of a data set on the Hub, with embedded images or with names of files in an image folder."""

    def __init__(
        self,
        path: str,
        folder: ImageFolder | None,
        streaming: bool,
        reading: Reading,
        *,
        name: str | None = None,
        split: str | None = None,
    ) -> None:
        self.name = path
        self.folder = folder
        self.reading = reading
        try:
            dataset = datasets.load_dataset(path, name, split=split or "train", streaming=streaming)
        except Exception as error:  # datasets lets through whatever its many layers raise
            raise DataError(
                f"{path}: neither a file here nor a Hub data set that can be loaded ({type(error).__name__}: "
                f"{clipped(str(error), 160)}). Check the spelling, the configuration (name: {name}), the split and, for a "
                "gated one, `hf auth login`. One that is a JSON file is named hf://datasets/owner/name/file.json."
            ) from error
        self.dataset = _without_decoding(dataset)

    def load(self, max_rows: int | None, tell: Callable[[str], None]) -> tuple[datasets.Dataset, list[BadRow]]:
        dataset = self.dataset if max_rows is None else self.dataset.take(max_rows)
        name = fingerprint(
            [], self.name, dataset._fingerprint, self.folder.identity if self.folder else None, self.reading.identity
        )

        def rows(seen: Seen) -> Iterator[dict[str, Any] | BadRow | None]:
            numbered = enumerate(dataset)
            return (normalise_row(raw, self.folder, self.name, i, seen, self.reading) for i, raw in numbered)

        return _open_cache(name, rows, self.name, tell)

    def stream(self, policy: BadRowPolicy) -> datasets.IterableDataset:
        columns = self.dataset.column_names or list(next(iter(self.dataset)))

        reported = Seen()

        def normalise(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
            raws = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
            rows = [
                _usable(_normalise_streamed(raw, self.folder, self.name, i, reported, self.reading), policy)
                for i, raw in zip(numbers, raws, strict=True)
            ]
            return {column: [row[column] for row in rows if row is not None] for column in ROW_FEATURES}

        return self.dataset.map(
            normalise, batched=True, batch_size=16, with_indices=True, remove_columns=columns, features=ROW_FEATURES
        )


def _without_decoding(dataset: Any) -> Any:
    """Return a Hub data set whose images stay `{"bytes", "path"}`, however deep in a column they lie.

    `datasets` would open them with whatever Pillow knows; here they are opened in one place, from a list of kinds.
    """
    for name, feature in (dataset.features or {}).items():
        undecoded = _undecoded(feature)
        if undecoded != feature:
            dataset = dataset.cast_column(name, undecoded)
    return dataset


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, (list, tuple)):
        return [_undecoded(inner) for inner in feature]
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return dataclasses.replace(feature, feature=_undecoded(feature.feature))
    return feature


def _open_cache(
    name: str,
    rows: Callable[[Seen], Iterator[dict[str, Any] | BadRow | None]],
    source: str,
    tell: Callable[[str], None],
    has_arrived: Callable[[BadRow], bool] = lambda bad: False,
) -> tuple[datasets.Dataset, list[BadRow]]:
    path, bad_rows, seen = cached_rows(name, rows, has_arrived)
    seen.report(source, tell)
    return datasets.Dataset.from_file(str(path), info=datasets.DatasetInfo(features=ROW_FEATURES)), bad_rows


def local_data(path: str | os.PathLike[str]) -> str:
    """Return where the data files of a path lie: like `local_path`, and of a Hub data set all its files of rows."""
    path = local_path(path)
    if os.path.exists(path) or not is_hub_id(path):
        return path
    try:
        patterns = [f"*{suffix}" for suffix in (*DATA_SUFFIXES, *OTHER_DATA_SUFFIXES)]
        return snapshot_download(path, repo_type="dataset", allow_patterns=patterns)
    except Exception as error:  # the same as below
        raise DataError(
            f"{path}: neither a file here nor a Hub data set that can be fetched ({type(error).__name__}: {error}). Check the "
            "spelling, the connection, and `hf auth login` for a gated one."
        ) from error


def is_hub_id(path: str) -> bool:
    """Whether a path that is no file here can be the name of a Hub data set, `owner/name`."""
    return bool(_HUB_ID.match(path)) and not path.lower().endswith((*DATA_SUFFIXES, *OTHER_DATA_SUFFIXES))


def local_path(path: str | os.PathLike[str]) -> str:
    """Return the path; of `hf://datasets/owner/name[@revision]/file` where the file lies after downloading it."""
    path = os.fspath(path)
    match = _HUB_FILE.match(path)
    if not match:
        return path
    try:
        return hf_hub_download(match["repo"], match["file"], repo_type="dataset", revision=match["revision"])
    except Exception as error:  # the same: HTTP, offline mode, gating, a missing file
        raise DataError(
            f"{path}: cannot be fetched ({type(error).__name__}: {error}). Check the name, the connection, and "
            "`hf auth login` for a gated data set."
        ) from error


class OpenImages:
    """The transform of a dataset that opens a row's pictures when the row is read."""

    def __init__(self, allow_urls: bool = False) -> None:
        self.allow_urls = allow_urls

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if "images" not in batch:
            return batch
        opened = []
        for index, images in enumerate(batch["images"]):
            try:
                opened.append([open_image(image, allow_urls=self.allow_urls) for image in images])
            except ImageError as error:
                row_id = batch["id"][index] if "id" in batch else "unknown"
                raise ImageError(error.kind, f"row with id {row_id}: {error}") from error
        return {**batch, "images": opened}
