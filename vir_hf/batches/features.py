"""A cache of the frozen tower's features on disk: a picture that has been encoded once is never encoded again.

A cache belongs to one tower, one preprocessing, one feature layer and one dtype; its `cache.json` says which, and it is
refused for any other. Pictures are known by their content, so renamed and repeated files share an entry. Every writer has
files of its own, so that any number of ranks may write at once, and an entry counts from the moment its line is in an
index: a run killed in the middle loses at most the picture it was writing. A line holds a checksum, so that an entry which the
disk has lost or damaged is computed again, and no other.
"""

# Over 400 lines: writing and reading share the shard format, which is easier to trust in one place.

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from vir_hf import files
from vir_hf.console import Progress
from vir_hf.data.cache import flat_batches
from vir_hf.errors import DataError, RecipeError
from vir_hf.images.folder import file_stamp
from vir_hf.images.identity import Folders, picture_identities, picture_identity
from vir_hf.images.opening import read_image_bytes
from vir_hf.images.preprocessing import ImagePreprocessor
from vir_hf.llava.configuration_llava import num_image_tokens
from vir_hf.rows.image_lengths import views_of_image

if TYPE_CHECKING:
    from vir_hf.llava.modeling_llava import LlavaModel
    from vir_hf.llava.processing_llava import LlavaProcessor
    from vir_hf.recipe.load import Recipe

logger = logging.getLogger(__name__)

SHARD_BYTES = 2 * 2**30
_NUMPY_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}  # numpy has no bfloat16


def cache_identity(model: LlavaModel, processor: LlavaProcessor) -> dict[str, Any]:
    """Return what features depend on: the weights below the selected layer, the layer, the preprocessing and the dtype."""
    digest = hashlib.sha256()
    unused = model.unused_vision_parameters()
    for name, parameter in sorted(model.vision_tower.named_parameters()):
        if name not in unused:
            digest.update(name.encode())
            digest.update(parameter.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return {
        "tower": digest.hexdigest(),
        "vision_feature_layer": model.config.vision_feature_layer,
        "vision_feature_select_strategy": model.config.vision_feature_select_strategy,
        "dtype": str(model.vision_tower.dtype).removeprefix("torch."),
        "image_processor": json.loads(json.dumps(processor.image_processor.to_dict(), default=str, sort_keys=True)),
        "num_patches": num_image_tokens(model.config.vision_config, model.config.vision_feature_select_strategy),
        "width": model.config.vision_config.hidden_size
        * (1 if isinstance(model.config.vision_feature_layer, int) else len(model.config.vision_feature_layer)),
    }


class FeatureCache:
    """Features by picture content; callable, so that it serves as a collator's `feature_lookup`.

    Args:
        folder: made if it does not exist.
        identity: of `cache_identity`.
        processor: says how many views an image has, each of which is an entry; every image is one by default.

    Raises:
        RecipeError: the folder holds features of another tower, preprocessing, layer or dtype.
    """

    def __init__(
        self, folder: str | os.PathLike[str], identity: dict[str, Any], processor: LlavaProcessor | None = None
    ):
        self.folder, self.identity = Path(folder), identity
        self._processor = None if processor is None or processor.views.is_fixed else processor
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_identity()
        self.shape = (int(identity["num_patches"]), int(identity["width"]))
        self._numpy_type = np.dtype(_NUMPY_TYPES[identity["dtype"]])
        self._entries: dict[str, _Entry] = {}
        self._num_whole: dict[str, int] = {}
        self._read_until: dict[str, int] = {}
        self._maps: dict[str, np.ndarray] = {}
        self._digests: dict[Any, str] = {}
        self._writer: _ShardWriter | None = None
        self.refresh()

    @property
    def bytes_per_image(self) -> int:
        return self.shape[0] * self.shape[1] * self._numpy_type.itemsize

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, source: Any) -> bool:
        entries = [self._entries.get(digest) for digest in self._digests_of(source)]
        return all(entry is not None and self._is_whole(entry) for entry in entries)

    def __call__(self, source: Any) -> torch.Tensor | None:
        """Return the features of a picture, `(num_patches, vision_hidden)`, or `(num_views, num_patches, vision_hidden)`.

        `None` if they are not in the cache, are damaged there, or if the picture cannot be read: who opens it will see why.
        """
        try:
            digests = self._digests_of(source)
        except DataError:
            return None
        features = [self._read(digest) for digest in digests]
        whole = [feature for feature in features if feature is not None]
        if len(whole) < len(features):
            return None
        return whole[0] if self._processor is None else torch.stack(whole)

    def _digests_of(self, source: Any) -> list[str]:
        """The names of a picture's entries: its digest, where it has views with their numbers."""
        digest = self.digest(source)
        if self._processor is None:
            return [digest]
        return [f"{digest}/{number}" for number in range(views_of_image(source, self._processor).num_views)]

    def _read(self, digest: str) -> torch.Tensor | None:
        entry = self._entries.get(digest)
        if entry is None or not self._is_whole(entry):
            return None
        values = self._shard(entry)[entry.number].copy()
        if entry.checksum is not None and zlib.crc32(values) != entry.checksum:
            logger.warning(
                "%s: entry %d of %s is damaged and not used; run vir-hf data cache-features again",
                self.folder, entry.number, entry.shard,
            )  # fmt: skip
            return None
        tensor = torch.from_numpy(values)
        return tensor.view(torch.bfloat16) if self.identity["dtype"] == "bfloat16" else tensor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}, "_writer": None}

    def digest(self, source: Any) -> str:
        """Return the content's digest; a file is read again only if its size or time has changed.

        Raises:
            DataError: the picture cannot be read.
        """
        identity = picture_identity(source)
        if not isinstance(identity, str):
            raise DataError(
                f"image: {type(source).__name__} that cannot be read; expected a path, bytes or a PIL image."
            )
        kind, _, found = identity.partition(":")
        if kind in ("bytes", "pixels", "array"):
            return found
        # A file, known by its content wherever it lies; read again only if it has changed.
        key = (identity, file_stamp(identity))
        if key not in self._digests:
            content = picture_identity(read_image_bytes(source)[0])
            self._digests[key] = str(content).partition(":")[2]
        return self._digests[key]

    def verify(self, source: Any) -> bool:
        """Whether a picture's features are there and as they were written; a damaged entry is taken out of its index."""
        found = [self._verify(digest) for digest in self._digests_of(source)]  # every one: each may be damaged
        return all(found)

    def _verify(self, digest: str) -> bool:
        entry = self._entries.get(digest)
        if entry is None or not self._is_whole(entry):
            return False
        if entry.checksum in (None, zlib.crc32(self._shard(entry)[entry.number])):
            return True
        del self._entries[digest]
        index = self.folder / f"{entry.shard}.index"
        lines = [line for line in index.read_bytes().splitlines(keepends=True) if line.split()[:1] != [digest.encode()]]
        files.write_bytes(index, b"".join(lines))
        self._read_until[index.name] = index.stat().st_size
        return False

    def add(self, source: Any, features: torch.Tensor) -> None:
        """Store the features of one picture, as calling the cache returns them."""
        self.store(self.digest(source), features)

    def store(self, digest: str, features: torch.Tensor) -> None:
        """`add`, for a picture whose digest is known."""
        if self._processor is None:
            self._store(digest, features)
            return
        for number, view in enumerate(features):
            self._store(f"{digest}/{number}", view)

    def _store(self, digest: str, features: torch.Tensor) -> None:
        if tuple(features.shape) != self.shape:
            raise ValueError(f"features of shape {tuple(features.shape)}; this cache holds {self.shape}")
        if self._writer is None:
            self._writer = _ShardWriter(self.folder, self.bytes_per_image)
        features = features.detach().to("cpu", getattr(torch, self.identity["dtype"])).contiguous()
        values = features.view(torch.uint16) if self.identity["dtype"] == "bfloat16" else features
        self._entries[digest] = self._writer.write(digest, values.numpy().tobytes())

    def flush(self) -> None:
        """Make sure everything stored so far is on the disk."""
        if self._writer is not None:
            self._writer.flush()

    def refresh(self) -> None:
        """Read what other writers have added."""
        for index in sorted(self.folder.glob("*.index")):
            start = self._read_until.get(index.name, 0)
            with index.open("rb") as file:
                file.seek(start)
                block = file.read()
            whole = block[: block.rfind(b"\n") + 1]  # a line being written is read the next time
            for line in whole.splitlines():
                try:
                    digest, number, *checksum = line.decode().split()
                    entry = _Entry(index.stem, int(number), int(checksum[0]) if checksum else None)
                except ValueError:  # a line that the disk has lost
                    continue
                known = self._entries.get(digest)
                if known is None or not self._is_whole(known):
                    self._entries[digest] = entry
            self._read_until[index.name] = start + len(whole)

    def check_disk(self, num_images: int) -> str:
        """Return how much the cache will take, in words.

        Raises:
            RecipeError: the disk has less room than `num_images` more pictures take.
        """
        needed, free = num_images * self.bytes_per_image, shutil.disk_usage(self.folder).free
        size = f"{num_images} pictures x {self.bytes_per_image / 1e6:.2f} MB = {needed / 1e9:.2f} GB"
        words = f"feature cache {self.folder}: {size}"
        if needed > free:
            raise RecipeError(
                f"{words}, but the disk has {free / 1e9:.2f} GB free. Set training.feature_cache to a folder on a larger disk, "
                "or to null."
            )
        return words

    def _shard(self, entry: _Entry) -> np.ndarray:
        if entry.shard not in self._maps or len(self._maps[entry.shard]) <= entry.number:  # it has grown since
            path = self.folder / f"{entry.shard}.features"
            shape = (self._count_whole(entry.shard), *self.shape)
            self._maps[entry.shard] = np.memmap(path, dtype=self._numpy_type, mode="r", shape=shape)
        return self._maps[entry.shard]

    def _is_whole(self, entry: _Entry) -> bool:
        """Whether a shard holds all of an entry; one that was cut while it was written lacks the last ones."""
        if entry.number >= self._num_whole.get(entry.shard, 0):
            self._num_whole[entry.shard] = self._count_whole(entry.shard)
        return 0 <= entry.number < self._num_whole[entry.shard]

    def _count_whole(self, shard: str) -> int:
        try:
            return (self.folder / f"{shard}.features").stat().st_size // self.bytes_per_image
        except OSError:
            return 0

    def _check_identity(self) -> None:
        path = self.folder / "cache.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            files.write_text(path, json.dumps(self.identity, indent=2))
            return
        except ValueError as error:
            raise RecipeError(
                f"{path}: not readable as JSON ({error}). Delete the folder to build the cache anew."
            ) from error
        if not isinstance(found, dict):
            raise RecipeError(
                f"{path}: holds {type(found).__name__}; expected an object. Delete the folder to build the cache anew."
            )
        differing = sorted(key for key in {*found, *self.identity} if found.get(key) != self.identity.get(key))
        if differing:
            raise RecipeError(
                f"training.feature_cache={self.folder}: was made with another {', '.join(differing)}. Name another folder, or "
                "delete this one to build it anew."
            )


class _Entry(NamedTuple):
    """Where features lie: the shard, their number in it, and a checksum (CRC-32) where the index has one."""

    shard: str
    number: int
    checksum: int | None


class _ShardWriter:
    """Appends to shard files of its own; a new one is begun when one is full."""

    def __init__(self, folder: Path, entry_bytes: int):
        self.folder, self.per_shard = folder, max(1, SHARD_BYTES // entry_bytes)
        self._begin()

    def _begin(self) -> None:
        self.name = f"shard-{uuid.uuid4().hex[:12]}"
        self.count = 0
        self._features = (self.folder / f"{self.name}.features").open("wb")
        self._index = (self.folder / f"{self.name}.index").open("wb")

    def write(self, digest: str, values: bytes) -> _Entry:
        if self.count == self.per_shard:
            self.flush()
            self._features.close()
            self._index.close()
            self._begin()
        self._features.write(values)
        self._features.flush()  # the index never names what the features file does not hold
        entry = _Entry(self.name, self.count, zlib.crc32(values))
        self._index.write(f"{digest} {entry.number} {entry.checksum}\n".encode())
        self._index.flush()
        self.count += 1
        return entry

    def flush(self) -> None:
        for file in (self._features, self._index):
            file.flush()
            os.fsync(file.fileno())


class _Pictures(Dataset[tuple[str, torch.Tensor] | None]):
    """Digest and pixels of some of the pictures, both from one reading; `None` for one that cannot be opened."""

    def __init__(self, sources: Sequence[Any], numbers: Sequence[int], cache: FeatureCache, preprocess: Any):
        self.sources, self.numbers, self.cache, self.preprocess = sources, numbers, cache, preprocess

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor] | None:
        source = self.sources[self.numbers[index]]
        try:
            if not isinstance(source, Image.Image):
                content, name = read_image_bytes(source)
                source = {"bytes": content, "path": name}
            return self.cache.digest(source), self.preprocess(source)
        except DataError as error:
            logger.warning("not cached: %s", error)
            return None


class RowPictures(Sequence[Any]):
    """Some pictures of a data set by number, each read when it is asked for: embedded ones would fill the memory.

    Args:
        places: of every picture the row, and which of the row's pictures it is.
    """

    def __init__(self, rows: Any, places: Sequence[tuple[int, int]]):
        self.rows, self.places = rows, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: Any) -> Any:
        row, index = self.places[number]
        return self.rows[row]["images"][index]


def distinct_pictures(rows: Any) -> Sequence[Any]:
    """Return one reference for every distinct picture (`picture_identity`) of undecoded rows, in order of appearance."""
    if not hasattr(rows, "select_columns") or not hasattr(rows, "__len__"):  # a stream, or plain rows
        found: dict[Any, Any] = {}
        for row in rows:
            for source in row["images"]:
                found.setdefault(picture_identity(source), source)
        return list(found.values())
    places: dict[str, tuple[int, int]] = {}
    folders = Folders()
    for start, table in flat_batches(rows, ["images"]):
        images = table.column("images").combine_chunks()
        identities = iter(picture_identities(images, folders).to_pylist())
        for row, count in enumerate(pc.list_value_length(images).to_pylist(), start):
            for index in range(count or 0):
                places.setdefault(next(identities), (row, index))
    return RowPictures(rows.select_columns(["images"]), list(places.values()))


def fill_cache(
    cache: FeatureCache,
    model: LlavaModel,
    processor: LlavaProcessor,
    sources: Sequence[Any],
    *,
    batch_size: int = 16,
    num_workers: int = 0,
    rank: int = 0,
    num_replicas: int = 1,
    verify: bool = False,
) -> Iterator[int]:
    """Encode this rank's share of the pictures that are missing; yields how many each batch has added.

    Pictures that cannot be opened are left out: training meets and reports them by row.

    Args:
        verify: compare every entry with its checksum, which reads the whole cache, and encode damaged ones anew.
    """
    wanted = []
    is_there = cache.verify if verify else cache.__contains__
    for number in range(rank, len(sources), num_replicas):
        try:
            if not is_there(sources[number]):
                wanted.append(number)
        except DataError as error:
            logger.warning("not cached: %s", error)
    loader = DataLoader(
        _Pictures(sources, wanted, cache, ImagePreprocessor(processor.image_processor)),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=list,
    )
    device = next(model.vision_tower.parameters()).device
    with torch.no_grad():
        for batch in loader:
            opened = [picture for picture in batch if picture is not None]
            if opened:
                views = [pixels if pixels.ndim == 4 else pixels.unsqueeze(0) for _, pixels in opened]
                features = model.encode_images(torch.cat(views).to(device)).split([len(of_one) for of_one in views])
                for (digest, pixels), value in zip(opened, features, strict=True):
                    cache.store(digest, value if pixels.ndim == 4 else value[0])
            yield len(opened)
    cache.flush()


def cache_for_training(
    recipe: Recipe,
    model: LlavaModel,
    processor: LlavaProcessor,
    rows: Iterable[dict[str, Any]],
    device: torch.device,
    *,
    verify: bool = False,
) -> FeatureCache | None:
    """Return the recipe's feature cache, filled with every picture of the rows by all ranks together; `None` without one.

    Of a stream each rank has rows of its own, and fills the cache with all of their pictures.

    Raises:
        RecipeError: a cache of another tower or preprocessing, or a disk too small for it.
    """
    wanted = recipe.training.feature_cache
    if not wanted:
        return None
    state = PartialState()
    folder = Path(recipe.training.output_dir) / "feature_cache" if wanted is True else Path(str(wanted))
    cache = FeatureCache(folder, cache_identity(model, processor), processor)
    sources = distinct_pictures(rows)
    if state.is_main_process:
        logger.warning("%s (%d there already)", cache.check_disk(max(0, len(sources) - len(cache))), len(cache))
    state.wait_for_everyone()  # nobody fills the disk before its room is checked
    place = next(model.vision_tower.parameters()).device
    if place != device:
        model.vision_tower.to(device)
    rank, num_replicas = (state.process_index, state.num_processes) if hasattr(rows, "__len__") else (0, 1)
    with Progress(len(range(rank, len(sources), num_replicas)), "caching features", "image") as progress:
        for added in fill_cache(cache, model, processor, sources, rank=rank, num_replicas=num_replicas, verify=verify):
            progress.update(added)
    if place != device:
        model.vision_tower.to(place)
    state.wait_for_everyone()
    cache.refresh()
    return cache
