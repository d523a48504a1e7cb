"""Tensors in files: read one at a time from whatever a checkpoint keeps them in, and written in shards."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from vir_hf import files
from vir_hf.errors import RecipeError

_SHARD_BYTES = 4 * 2**30


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors of some weight files by name; each is read when it is asked for, and nothing in a file is run.

    Raises:
        RecipeError: a file that is missing, damaged, or a pickle of anything but tensors.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._readers: dict[str, Callable[[], torch.Tensor]] = {}
        self.paths = list(paths)
        for path in self.paths:
            self._readers |= _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def stored_tensors(folder: Path, stem: str = "") -> StoredTensors:
    """Return the tensors of a model saved in a folder, in one file or in shards.

    Args:
        stem: `"adapter_model"` for an adapter's.

    Raises:
        RecipeError: no weights, or a shard that the index names and that is not there.
    """
    singles = [f"{stem}.safetensors", f"{stem}.bin"] if stem else [SAFE_WEIGHTS_NAME, WEIGHTS_NAME]
    for single, index in zip(singles, [SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME], strict=True):
        if (folder / index).is_file() and not stem:
            try:
                shards = sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise RecipeError(f"{folder / index}: is no index of shards ({error}). Fetch it again.") from error
            missing = [name for name in shards if not (folder / name).is_file()]
            if missing:
                raise RecipeError(
                    f"{folder}: {index} names {missing[0]}, which is not there. Fetch the missing shards, or all of it again."
                )
            return StoredTensors(folder / name for name in shards)
        if (folder / single).is_file():
            return StoredTensors([folder / single])
    raise RecipeError(
        f"{folder}: holds no weights; expected {' or '.join(singles)}, or shards with their index. Name the folder that has them."
    )


def _safetensors(path: Path) -> dict[str, Callable[[], torch.Tensor]]:
    try:
        opened = safe_open(path, framework="pt")
        return {name: partial(opened.get_tensor, name) for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise RecipeError(f"{path}: a weights file is damaged ({error}). Fetch or make it again.") from error


def _pickled(path: Path) -> dict[str, Callable[[], torch.Tensor]]:
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the older kind of file, which cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RecipeError(
            f"{path}: is not a plain file of tensors, and only such are loaded, since a pickle can run code. Save its state "
            "dict alone, best as safetensors."
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise RecipeError(f"{path}: a weights file is damaged ({error}). Fetch or make it again.") from error
    if not isinstance(state, dict):
        raise RecipeError(f"{path}: holds a {type(state).__name__}, expected a dictionary of tensors.")
    tensors = {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return {name: partial(tensors.__getitem__, name) for name in tensors}


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], *, shard_bytes: int = _SHARD_BYTES
) -> None:
    """Write tensors as `model.safetensors`, or in shards with their index; no more than one shard lies in memory.

    Args:
        folder: a staging folder.
        tensors: names and values, read as they come.
    """
    parts: list[list[str]] = []
    waiting: dict[str, torch.Tensor] = {}
    num_bytes = total = 0

    def write() -> None:
        save_file(waiting, folder / f"part-{len(parts)}", metadata={"format": "pt"})
        parts.append(list(waiting))
        waiting.clear()

    for name, value in tensors:
        size = value.numel() * value.element_size()
        if waiting and num_bytes + size > shard_bytes:
            write()
            num_bytes = 0
        waiting[name] = value.contiguous().clone()  # tensors that share memory cannot be saved together
        num_bytes, total = num_bytes + size, total + size
    write()
    if len(parts) == 1:
        os.replace(folder / "part-0", folder / SAFE_WEIGHTS_NAME)
        return
    index: dict[str, str] = {}
    for number, names in enumerate(parts):
        shard = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        os.replace(folder / f"part-{number}", folder / shard)
        index |= dict.fromkeys(names, shard)
    files.write_json(
        folder / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    )
