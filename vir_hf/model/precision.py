"""In which precision a run computes and its weights are kept, decided once for training, inference and the feature cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from peft import PeftModel

from vir_hf.errors import RecipeError
from vir_hf.model.adapters import folders_of_run

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe


@dataclass(frozen=True)
class Precision:
    """In what precision a run computes.

    Attributes:
        dtype: of weights that do not learn; learning ones are kept in fp32 under autocast.
        autocast: `"bf16"`, `"fp16"` (with loss scaling) or `None`.
        reason: the machine's property that decided, for the log.
    """

    dtype: torch.dtype
    autocast: str | None
    reason: str


def choose_precision(
    dtype: str = "auto", use_cpu: bool = False, *, bf16: bool | None = None, fp16: bool | None = None
) -> Precision:
    """bf16 where the GPU has it, fp16 with loss scaling where it does not, fp32 on a CPU; or what the recipe says.

    Args:
        dtype: `model.dtype`, of the weights that do not learn.
        use_cpu: no GPU is to be used, even if there is one.
        bf16, fp16: `training.bf16` and `training.fp16`; `None` leaves autocast to the dtype.

    Raises:
        RecipeError: fp16 without a GPU.
    """
    has_gpu = torch.cuda.is_available() and not use_cpu
    return precision_on(
        dtype,
        bf16,
        fp16,
        gpu=torch.cuda.get_device_name() if has_gpu else None,
        has_bf16=has_gpu and torch.cuda.get_device_capability()[0] >= 8,
    )


def precision_of(recipe: Recipe, *, use_cpu: bool | None = None) -> Precision:
    """Return the precision a recipe computes in on this machine: the one answer for training and all that goes with it.

    Args:
        use_cpu: in place of `training.use_cpu`.

    Raises:
        RecipeError: fp16 without a GPU.
    """
    said = recipe.training.arguments
    use_cpu = bool(recipe.training.use_cpu) if use_cpu is None else use_cpu
    return choose_precision(recipe.model.dtype, use_cpu, bf16=said.get("bf16"), fp16=said.get("fp16"))


def precision_on(dtype: str, bf16: bool | None, fp16: bool | None, *, gpu: str | None, has_bf16: bool) -> Precision:
    """Return what `choose_precision` returns on a given device.

    Args:
        gpu: its name; `None` for a CPU.
        has_bf16: whether the GPU computes in bf16.

    Raises:
        RecipeError: fp16 without a GPU.
    """
    if dtype != "auto":
        chosen, reason = getattr(torch, dtype), f"model.dtype={dtype}"
    elif bf16 or fp16:
        chosen = torch.bfloat16 if bf16 else torch.float16
        reason = f"training.{'bf16' if bf16 else 'fp16'}"
    elif gpu is None:
        chosen, reason = torch.float32, "no CUDA GPU"
    else:
        chosen = torch.bfloat16 if has_bf16 else torch.float16
        reason = f"{gpu} {'computes in bf16' if has_bf16 else 'has no bf16'}"
    by_dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(chosen)
    autocast = "bf16" if bf16 else "fp16" if fp16 else by_dtype
    if (by_dtype == "bf16" and bf16 is False) or (by_dtype == "fp16" and fp16 is False):
        chosen, autocast, reason = torch.float32, None, f"training.{by_dtype}=false"
    if autocast == "fp16" and gpu is None:
        key = "training.fp16=true" if fp16 else f"model.dtype={dtype}"
        raise RecipeError(f"{key} needs a CUDA GPU for its loss scaling; use float32 or bfloat16 on a CPU.")
    return Precision(chosen, autocast, reason)


def precision_of_run(name: str, use_cpu: bool) -> Precision:
    """The precision a finished run was trained in, as far as its recipe says one and this machine has it."""
    folders = folders_of_run(Path(name)) if Path(name).is_dir() else []
    saved = next((folder / "recipe.yaml" for folder in folders if (folder / "recipe.yaml").is_file()), None)
    recipe: dict[str, Any] = {} if saved is None else yaml.safe_load(saved.read_text(encoding="utf-8")) or {}
    model, training = recipe.get("model") or {}, recipe.get("training") or {}
    try:
        return choose_precision(
            model.get("dtype") or "auto", use_cpu, bf16=training.get("bf16"), fp16=training.get("fp16")
        )
    except RecipeError:  # trained in fp16, which a CPU does not compute in
        return choose_precision(use_cpu=use_cpu)


def describe_precision(precision: Precision, model: torch.nn.Module, tf32: bool | None) -> str:
    """Return one line: dtype of the weights, autocast, tf32 and attention, and why."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    arithmetic = f"{precision.autocast} autocast" if precision.autocast else "no autocast"
    attention = getattr(inner.config.get_text_config(), "_attn_implementation", None) or "default"
    return (
        f"weights {str(precision.dtype).removeprefix('torch.')}, {arithmetic} ({precision.reason}), trained weights float32, "
        f"tf32 {'on' if tf32 else 'off'}, attention {attention}"
    )


@contextlib.contextmanager
def rounded_to(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Hold fp32 weights in `dtype` for the time of saving, and then exactly as they were.

    A checkpoint of one dtype: beside 4-bit weights transformers loads others as they are stored, so fp32 weights would
    meet 16-bit activations.
    """
    wide = [
        parameter for parameter in model.parameters() if parameter.dtype == torch.float32 and parameter.dtype != dtype
    ]
    values = [parameter.data for parameter in wide]
    try:
        for parameter in wide:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, value in zip(wide, values, strict=True):
            parameter.data = value
