"""The fingerprint of a checkpoint's weights: an adapter remembers the base it was trained on, and refuses another.

A few values of every tensor are read, at fixed places, so 14 GB take about a second. Values are compared as bf16: the same
weights saved again in another shard size or float dtype have the same fingerprint, weights that were trained on have not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file

from vir_hf import files
from vir_hf.errors import RecipeError

logger = logging.getLogger(__name__)

FINGERPRINT_FILE = "base_fingerprint.json"
_VALUES_PER_TENSOR = 32


def fingerprint_of(name: str, revision: str | None = None) -> str | None:
    """Return `"sha256:..."` of a checkpoint's weights, or `None` where no weight files can be found.

    Args:
        name: a folder saved by `save_pretrained`, or a Hub id.
        revision: of a Hub id.
    """
    files = weight_files(name, revision)
    if not files:
        return None
    lines: list[str] = []
    with torch.device("cpu"):  # also where a model is being made without weights, on the meta device
        for file in files:
            lines += _safetensors_lines(file) if file.suffix == ".safetensors" else _torch_lines(file)
    return "sha256:" + hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def weight_files(name: str, revision: str | None = None) -> list[Path]:
    """Return the weight files of a folder or Hub id, in order; [] where there are none."""
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        found = _find(name, index, revision)
        if found is not None:
            shards = sorted(set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()))
            paths = [_find(name, shard, revision) for shard in shards]
            return [path for path in paths if path is not None]
        found = _find(name, single, revision)
        if found is not None:
            return [found]
    return []


def _find(name: str, file: str, revision: str | None) -> Path | None:
    if Path(name).is_dir():
        return Path(name) / file if (Path(name) / file).is_file() else None
    try:
        path = cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):
        return None
    return None if path is None else Path(path)


def _safetensors_lines(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return [_line(key, opened.get_slice(key).get_shape(), opened.get_slice(key)) for key in opened.keys()]


def _torch_lines(file: Path) -> list[str]:
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return [_line(key, list(tensor.shape), tensor) for key, tensor in state.items()]


def _line(key: str, shape: list[int], stored: Any) -> str:
    """One tensor's name, shape and a few values; of a large matrix only a few rows in its middle are read."""
    if len(shape) < 2:
        flat = stored[:] if shape else stored[...]
        flat = flat.reshape(-1)
        values = flat[:: max(1, flat.numel() // _VALUES_PER_TENSOR)]
    else:
        num_rows = -(-_VALUES_PER_TENSOR // max(1, math.prod(shape[1:])))
        start = max(0, shape[0] // 2 - num_rows // 2)
        values = stored[start : start + num_rows].reshape(-1)
    values = values[:_VALUES_PER_TENSOR]
    if values.is_floating_point():
        values = values.to(torch.bfloat16).contiguous().view(torch.int16)
    return f"{key} {shape} {values.tolist()}"


def base_record(
    base: str | None, revision: str | None = None, quantization: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return what an adapter remembers of its base: name, revision, fingerprint, and how it was quantised when trained."""
    fingerprint = None if base is None else fingerprint_of(base, revision)
    return {"base": base, "revision": revision, "fingerprint": fingerprint, "quantization": quantization}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write a base record into an adapter's folder."""
    text = json.dumps(record, indent=2, default=str) + "\n"
    files.write_text(folder / FINGERPRINT_FILE, text)


def read_record(adapter: Path) -> dict[str, Any]:
    """Return the base record of an adapter; {} of one that was not saved by us."""
    path = adapter / FINGERPRINT_FILE
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return record


def check_fingerprint(
    adapter: Path, base: str, revision: str | None = None, *, key: str = "model.name_or_path"
) -> None:
    """Raise if an adapter says it was trained on other weights than these; one that says nothing is taken with a warning.

    Raises:
        RecipeError: naming `key` and both bases.
    """
    record = read_record(adapter)
    expected = record.get("fingerprint")
    if expected is None:
        logger.warning(
            "%s: says nothing about its base's weights, so whether it belongs to %s is not checked", adapter, base
        )
        return
    found = fingerprint_of(base, revision)
    if found is not None and expected != found:
        raise RecipeError(
            f"{key}={base}: the adapter {adapter} was trained on other weights: on {record.get('base')} with fingerprint "
            f"{expected[:19]}, these have {found[:19]}. Set {key} to the base it was trained on."
        )
