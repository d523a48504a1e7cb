"""A cache of the frozen tower's features on disk: a picture that has been encoded once is never encoded again.

A cache belongs to one tower, one preprocessing, one feature layer and one dtype; its `cache.json` says which, and it is
refused for any other. Pictures are known by their content, so renamed and repeated files share an entry. Every writer has
files of its own, so that any number of ranks may write at once, and an entry counts from the moment its line is in an
index: a run killed in the middle loses at most the picture it was writing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from vir_hf import files
from vir_hf.errors import DataError, RecipeError
from vir_hf.images import read_image_bytes
from vir_hf.preprocessing import ImagePreprocessor

if TYPE_CHECKING:
    from vir_hf.llava.modeling_llava import LlavaModel
    from vir_hf.llava.processing_llava import LlavaProcessor
    from vir_hf.recipe import Recipe

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
        "num_patches": processor.num_image_tokens,
        "width": model.config.vision_config.hidden_size
        * (1 if isinstance(model.config.vision_feature_layer, int) else len(model.config.vision_feature_layer)),
    }


class FeatureCache:
    """Features by picture content; callable, so that it serves as a collator's `feature_lookup`.

    Args:
        folder: made if it does not exist.
        identity: of `cache_identity`.

    Raises:
        RecipeError: the folder holds features of another tower, preprocessing, layer or dtype.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: dict[str, Any]):
        self.folder, self.identity = Path(folder), identity
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_identity()
        self.shape = (int(identity["num_patches"]), int(identity["width"]))
        self._numpy_type = np.dtype(_NUMPY_TYPES[identity["dtype"]])
        self._entries: dict[str, tuple[str, int]] = {}
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
        return self.digest(source) in self._entries

    def __call__(self, source: Any) -> torch.Tensor | None:
        """Return the features of a picture, `(num_patches, vision_hidden)`, or `None` if they are not in the cache."""
        entry = self._entries.get(self.digest(source))
        if entry is None:
            return None
        name, number = entry
        values = self._shard(name, number)[number].copy()
        tensor = torch.from_numpy(values)
        return tensor.view(torch.bfloat16) if self.identity["dtype"] == "bfloat16" else tensor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}, "_writer": None}

    def digest(self, source: Any) -> str:
        """Return the content's digest; a file is read again only if its size or time has changed.

        Raises:
            DataError: the picture cannot be read.
        """
        key = _stamp(source)
        if key is None or key not in self._digests:
            content = source.tobytes() if hasattr(source, "tobytes") else read_image_bytes(source)[0]
            found = hashlib.blake2b(content, digest_size=16).hexdigest()
            if key is None:
                return found
            self._digests[key] = found
        return self._digests[key]

    def add(self, source: Any, features: torch.Tensor) -> None:
        """Store the features of one picture, `(num_patches, vision_hidden)`."""
        if tuple(features.shape) != self.shape:
            raise ValueError(f"features of shape {tuple(features.shape)}; this cache holds {self.shape}")
        if self._writer is None:
            self._writer = _ShardWriter(self.folder, self.bytes_per_image)
        features = features.detach().to("cpu", getattr(torch, self.identity["dtype"])).contiguous()
        values = features.view(torch.uint16) if self.identity["dtype"] == "bfloat16" else features
        digest = self.digest(source)
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
                digest, number = line.decode().split()
                self._entries[digest] = (index.stem, int(number))
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

    def _shard(self, name: str, number: int) -> np.ndarray:
        if name not in self._maps or len(self._maps[name]) <= number:  # it has grown since it was mapped
            path = self.folder / f"{name}.features"
            self._maps[name] = np.memmap(path, dtype=self._numpy_type, mode="r").reshape(-1, *self.shape)
        return self._maps[name]

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
        differing = sorted(key for key in {*found, *self.identity} if found.get(key) != self.identity.get(key))
        if differing:
            raise RecipeError(
                f"training.feature_cache={self.folder}: was made with another {', '.join(differing)}. Name another folder, or "
                "delete this one to build it anew."
            )


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

    def write(self, digest: str, values: bytes) -> tuple[str, int]:
        if self.count == self.per_shard:
            self.flush()
            self._features.close()
            self._index.close()
            self._begin()
        self._features.write(values)
        self._features.flush()  # the index never names what the features file does not hold
        self._index.write(f"{digest} {self.count}\n".encode())
        self._index.flush()
        self.count += 1
        return self.name, self.count - 1

    def flush(self) -> None:
        for file in (self._features, self._index):
            file.flush()
            os.fsync(file.fileno())


def _stamp(source: Any) -> Any:
    """What tells an unchanged file without reading it; `None` for what has no file."""
    path = source.get("path") if isinstance(source, dict) else source
    if isinstance(source, dict) and source.get("bytes") is not None:
        return None
    if not isinstance(path, str) or "://" in path:
        return path if isinstance(path, str) else None
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (path, status.st_size, status.st_mtime_ns)


class _Pictures(Dataset[tuple[int, torch.Tensor | None]]):
    """Pixels of pictures by number; `None` for one that cannot be opened."""

    def __init__(self, sources: Sequence[Any], preprocess: ImagePreprocessor):
        self.sources, self.preprocess = sources, preprocess

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, number: int) -> tuple[int, torch.Tensor | None]:
        try:
            return number, self.preprocess(self.sources[number])
        except DataError as error:
            logger.warning("not cached: %s", error)
            return number, None


def distinct_pictures(rows: Iterable[dict[str, Any]]) -> list[Any]:
    """Return one reference for every distinct picture path of undecoded rows, in order."""
    found: dict[Any, Any] = {}
    for row in rows:
        for source in row["images"]:
            found.setdefault(source.get("path") or source.get("bytes"), source)
    return list(found.values())


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
) -> Iterator[int]:
    """Encode this rank's share of the pictures that are missing; yields how many each batch has added.

    Pictures that cannot be opened are left out: training meets and reports them by row.
    """
    wanted = []
    for source in list(sources)[rank::num_replicas]:
        try:
            if source not in cache:
                wanted.append(source)
        except DataError as error:
            logger.warning("not cached: %s", error)
    loader = DataLoader(
        _Pictures(wanted, ImagePreprocessor(processor.image_processor)),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=list,
    )
    device = next(model.vision_tower.parameters()).device
    with torch.no_grad():
        for batch in loader:
            opened = [(number, pixels) for number, pixels in batch if pixels is not None]
            if opened:
                features = model.encode_images(torch.stack([pixels for _, pixels in opened]).to(device))
                for (number, _), value in zip(opened, features, strict=True):
                    cache.add(wanted[number], value)
            yield len(opened)
    cache.flush()


def cache_for_training(
    recipe: Recipe, model: LlavaModel, processor: LlavaProcessor, rows: Iterable[dict[str, Any]], device: torch.device
) -> FeatureCache | None:
    """Return the recipe's feature cache, filled with every picture of the rows by all ranks together; `None` without one.

    Raises:
        RecipeError: a cache of another tower or preprocessing, or a disk too small for it.
    """
    wanted = recipe.training.feature_cache
    if not wanted:
        return None
    state = PartialState()
    folder = Path(recipe.training.output_dir) / "feature_cache" if wanted is True else Path(str(wanted))
    cache = FeatureCache(folder, cache_identity(model, processor))
    sources = distinct_pictures(rows)
    if state.is_main_process:
        logger.warning("%s (%d there already)", cache.check_disk(max(0, len(sources) - len(cache))), len(cache))
    state.wait_for_everyone()  # nobody fills the disk before its room is checked
    place = next(model.vision_tower.parameters()).device
    if place != device:
        model.vision_tower.to(device)
    bar = tqdm(total=len(sources[state.process_index :: state.num_processes]), unit="picture", desc="caching features")
    for added in fill_cache(
        cache, model, processor, sources, rank=state.process_index, num_replicas=state.num_processes
    ):
        bar.update(added)
    bar.close()
    if place != device:
        model.vision_tower.to(place)
    state.wait_for_everyone()
    cache.refresh()
    return cache
