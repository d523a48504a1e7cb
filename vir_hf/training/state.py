"""What a checkpoint holds of a process, put there and back: learning weights and random generators, read without running code."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from vir_hf.errors import RunError
from vir_hf.files import writing
from vir_hf.llava.modeling_llava import name_in_memory

if TYPE_CHECKING:
    pass
REST = "trained_weights.safetensors"
ADAPTER = "adapter_model.safetensors"


def save_rest(model: nn.Module, folder: Path) -> None:
    """Write the learning weights of a PEFT model that its adapter file does not hold."""
    if not isinstance(model, PeftModel):
        return
    held = {tensor.data_ptr() for tensor in get_peft_model_state_dict(model).values()}
    rest = {
        name: parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.data_ptr() not in held
    }
    if rest:
        with writing(folder / REST) as temporary:
            save_file(rest, temporary, metadata={"format": "pt"})


def load_weights(model: nn.Module, folder: Path) -> None:
    """Put a checkpoint's weights into a model built as the run's was; every learning weight must be there.

    Raises:
        RunError: weights that are missing or belong to nothing.
    """
    if isinstance(model, PeftModel):
        result = set_peft_model_state_dict(model, load_file(folder / ADAPTER))
        unexpected = list(getattr(result, "unexpected_keys", []))
        loaded = {tensor.data_ptr() for tensor in get_peft_model_state_dict(model).values()}
        if (folder / REST).is_file():
            loaded |= copy_in(model, load_file(folder / REST), folder)
    else:
        unexpected, loaded = [], set()
        for path in sorted(folder.glob("model*.safetensors")):
            state = {name_in_memory(name): tensor for name, tensor in load_file(path).items()}
            loaded |= copy_in(model, state, folder)
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.data_ptr() not in loaded
    ]
    if missing or unexpected:
        raise RunError(
            f"{folder}: its weights do not fit this model: missing {missing[:3]}, unexpected {unexpected[:3]}. Install the "
            "versions of vir_hf, peft and transformers it was written with."
        )


def copy_in(model: nn.Module, state: dict[str, torch.Tensor], folder: Path) -> set[int]:
    """Copy tensors into the parameters and buffers of their names; return the addresses of what was written."""
    targets = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    written = set()
    for name, tensor in state.items():
        if ".weight." in name or name.endswith((".SCB", ".weight_format")):
            continue  # the scales of 4 and 8 bit weights, which do not learn
        target = targets.get(name)
        if target is None or target.shape != tensor.shape:
            found = "no such weight" if target is None else f"{tuple(target.shape)}"
            raise RunError(f"{folder}: {name} {tuple(tensor.shape)} does not fit this model ({found}).")
        with torch.no_grad():
            target.copy_(tensor)
        written.add(target.data_ptr())
    return written


# What DeepSpeed's optimizer files name beside tensors and plain values.
_DEEPSPEED_CLASSES = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
)


@contextlib.contextmanager
def reading_no_code() -> Iterator[None]:
    """Inside this block `torch.load` runs no code a file names, even where a library asks for it, as DeepSpeed does."""
    classes = []
    for module, name in _DEEPSPEED_CLASSES:
        with contextlib.suppress(ImportError, AttributeError):
            classes.append(getattr(importlib.import_module(module), name))
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        with torch.serialization.safe_globals(classes):
            yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def random_states() -> dict[str, Any]:
    """Return the state of every random generator of this process, as tensors and plain values."""
    kind, keys, position, has_gauss, cached = np.random.get_state()  # type: ignore[misc]
    version, internal, gauss = random.getstate()
    states: dict[str, Any] = {
        "python": {"version": version, "state": torch.tensor(internal), "gauss": gauss},
        "numpy": {
            "kind": str(kind),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` returned."""
    python, numpy_state = states["python"], states["numpy"]
    random.setstate((python["version"], tuple(python["state"].tolist()), python["gauss"]))
    np.random.set_state(
        (
            numpy_state["kind"],
            numpy_state["keys"].numpy().astype(np.uint32),
            numpy_state["position"],
            numpy_state["has_gauss"],
            numpy_state["cached"],
        )
    )
    torch.random.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
