"""Decoder layers that keep for the backward pass only what is dear to make again.

A norm's output is one multiplication away from its input, a gated MLP's product one from its two factors; yet each is kept
for the layers that read it, which makes them about half of what a block keeps. Here they are forgotten and made again when
the backward pass asks, which costs a pass over memory and no matrix product. Norm and product have a backward pass of their
own, of fewer steps than autograd's. Nothing changes under gradient checkpointing, which forgets more.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from vir_hf.kernels.roomy import roomy_empty

_here = threading.local()  # .kept: the `_Kept` of the decoder layer that is running, if it forgets


def make_lean(language_model: nn.Module) -> int:
    """Let the decoder layers of `language_model` forget what is cheap to make again; return how many do.

    RMS norms and gated MLPs are known by what they compute, each tried on its own, not by their names; others stay as they are.
    Names, weights and files do not change.
    """
    layers = [layer for layer in getattr(language_model, "layers", ()) if not isinstance(layer, _Lean)]
    of_layers = {id(module) for layer in layers for module in layer.children()}
    for module in language_model.modules():
        if isinstance(module, _Lean):
            continue
        if _is_rms_norm(module):  # those inside an attention are read by nothing that keeps what it reads
            _become(module, _LayerNorm if id(module) in of_layers else _RmsNorm)
        elif _is_gated_mlp(module):
            _become(module, _GatedMlp)
    lean = [layer for layer in layers if any(isinstance(module, _Lean) for module in layer.modules())]
    for layer in lean:
        _become(layer, _DecoderLayer)
    return len(lean)


class _Lean:
    """A module whose class this file has changed."""


_CLASSES: dict[tuple[type, type], type] = {}


def _become(module: nn.Module, mixin: type) -> None:
    original = type(module)
    if (mixin, original) not in _CLASSES:
        members = {"__module__": original.__module__}
        _CLASSES[mixin, original] = type(original.__name__, (mixin, original), members)
    module.__class__ = _CLASSES[mixin, original]


def _is_rms_norm(module: Any) -> bool:
    """Whether a module computes weight * (x / sqrt(mean(x^2) + eps)) and nothing else, tried on one input in two types."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or not isinstance(eps, float) or weight.is_meta:
        return False
    if not _takes_one_argument(module) or len(list(module.parameters())) != 1 or weight.dtype == torch.float64:
        return False
    other = torch.bfloat16 if weight.dtype == torch.float32 else torch.float32
    for dtype in (weight.dtype, other):  # some norms cast before they scale, and some after
        # Not drawn: random numbers belong to the run. Two rows of different size tell eps and scale apart.
        x = torch.linspace(-1, 2, 2 * len(weight), dtype=dtype, device=weight.device).view(2, -1)
        x[1] *= eps**0.5
        with torch.no_grad():
            found = _try(module, x)
            expected = _normalised(x, _scale_of(x, eps), weight)
        rtol = 1e-5 if dtype == weight.dtype == torch.float32 else 2e-2
        if found is None or found.dtype != expected.dtype or not torch.allclose(found, expected, rtol=rtol):
            return False
    return True


def _is_gated_mlp(module: Any) -> bool:
    """Whether a module computes down(act(gate(x)) * up(x)) and nothing else, tried with functions in place of the layers."""
    layers = {"gate_proj", "up_proj", "down_proj"}
    modules = dict(module.named_children())
    if not layers <= set(modules) <= {*layers, "act_fn"} or not callable(getattr(module, "act_fn", None)):
        return False
    act = modules.get("act_fn", nn.Identity())
    if list(module.parameters(recurse=False)) or list(act.parameters()) or not _takes_one_argument(module):
        return False
    gate, up, down = _Times(2.0), _Times(-3.0), _Times(0.5)
    trial = object.__new__(type(module))
    trial.__dict__.update(module.__dict__, training=True)
    trial._modules = {**module._modules, "gate_proj": gate, "up_proj": up, "down_proj": down}
    x = torch.cat([torch.linspace(-2, 2, 9), torch.linspace(-1e3, 1e3, 9)])  # wide, since some clamp
    with torch.no_grad():
        found = _try(trial, x)
        return found is not None and torch.allclose(found, down(module.act_fn(gate(x)) * up(x)))


def _takes_one_argument(module: nn.Module) -> bool:
    return len(inspect.signature(module.forward).parameters) == 1


def _try(module: Any, x: torch.Tensor) -> torch.Tensor | None:
    """What a module makes of x, or `None` where it wants something else."""
    try:
        found = module(x)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None
    return found if isinstance(found, torch.Tensor) and found.shape == x.shape else None


class _Times(nn.Module):
    """A stand-in for a linear layer."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class _Forgotten:
    """A tensor that is made again when it is asked for, and kept from the first to the last of its readers."""

    def __init__(self, make: Callable[[], torch.Tensor]):
        self.make = make
        self.readers = 0
        self._again: torch.Tensor | None = None

    def read(self) -> torch.Tensor:
        self.readers -= 1
        again = self._again
        if again is None:
            with torch.no_grad():
                again = self.make()
        self._again = again if self.readers > 0 else None
        return again


@dataclass(frozen=True)
class _View:
    """How one reader saw a forgotten tensor."""

    source: _Forgotten
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any  # an int; torch's type says it may be symbolic


class _Kept:
    """What autograd may forget while one decoder layer runs: the last tensor that was offered.

    One at a time, because by the next offer the readers of the last one are through; a late one would keep it as usual.
    """

    def __init__(self) -> None:
        self._offered: tuple[torch.Tensor, _Forgotten] | None = None

    def offer(self, tensor: torch.Tensor, make: Callable[[], torch.Tensor]) -> None:
        """Let readers of `tensor` forget it; `make` returns the same values in the same layout."""
        self._offered = tensor, _Forgotten(make)  # held, so that its memory cannot become another's

    def withdraw(self) -> None:
        """Let go of what was offered; its readers know how to make it."""
        self._offered = None

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _View:
        if self._offered is not None:
            offered, forgotten = self._offered
            if (
                tensor.dtype == offered.dtype
                and tensor.untyped_storage().data_ptr() == offered.untyped_storage().data_ptr()
            ):
                forgotten.readers += 1
                return _View(forgotten, tensor.size(), tensor.stride(), tensor.storage_offset())
        return tensor.detach()

    @staticmethod
    def unpack(packed: torch.Tensor | _View) -> torch.Tensor:
        if isinstance(packed, _View):
            return packed.source.read().as_strided(packed.size, packed.stride, packed.offset)
        return packed


def _kept_here() -> _Kept | None:
    return getattr(_here, "kept", None)


class _DecoderLayer(_Lean):
    """In front of a decoder layer: what its norms and its MLP offer is not kept."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self
        is_checkpointed = getattr(layer, "gradient_checkpointing", False) and layer.training
        if is_checkpointed or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        outer, kept = getattr(_here, "kept", None), _Kept()
        _here.kept = kept
        try:
            with saved_tensors_hooks(kept.pack, kept.unpack):
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            _here.kept = outer
            kept.withdraw()


class _RmsNorm(_Lean):
    """In front of an RMS norm: `_Normalised`."""

    offers = False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        module: Any = self
        weight = module.weight
        is_plain = isinstance(weight, nn.Parameter) and not hasattr(weight, "ds_id")
        if not is_plain or not torch.is_grad_enabled() or hidden_states.dtype == torch.float64:
            return super().forward(hidden_states)  # type: ignore[misc,no-any-return]
        output, scale = _Normalised.apply(hidden_states, weight, module.variance_epsilon)
        kept = _kept_here()
        if self.offers and kept is not None:
            x, gain = hidden_states.detach(), weight.detach()
            kept.offer(output, lambda: _normalised(x, scale, gain))
        return output  # type: ignore[no-any-return]


class _LayerNorm(_RmsNorm):
    """In front of a decoder layer's own RMS norms: their outputs are offered."""

    offers = True


def _scale_of(x: torch.Tensor, eps: float) -> torch.Tensor:
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
    return torch.rsqrt_(squares.div_(x.shape[-1]).add_(eps))


def _normalised(x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if x.dtype == weight.dtype == torch.float32:
        return torch.mul(x, scale, out=roomy_empty(x, *x.shape)).mul_(weight)
    return weight * (x.float() * scale).to(x.dtype)


class _Normalised(torch.autograd.Function):
    """weight * (x * scale), with scale = 1 / sqrt(mean(x^2) + eps) in fp32; returns the scale (..., 1) too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        scale = _scale_of(x, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.mark_non_differentiable(scale)
        ctx.set_materialize_grads(False)
        return _normalised(x, scale, weight), scale

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor | None, _: Any) -> Any:
        if grad_output is None:
            return None, None, None
        x, weight, scale = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            along = grad_output.float() * weight
            share = (along * x).sum(-1, keepdim=True).mul_(scale**3 / x.shape[-1])
            grad_x = along.mul_(scale).addcmul_(x.float(), share, value=-1).to(x.dtype)
        if ctx.needs_input_grad[1]:
            products = grad_output.float() * (x.float() * scale).to(x.dtype)
            grad_weight = products.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        return grad_x, grad_weight, None


class _GatedMlp(_Lean):
    """In front of a gated MLP: the product that the last layer reads is offered."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        module: Any = self
        if not torch.is_grad_enabled():
            return super().forward(x)  # type: ignore[misc,no-any-return]
        gate, up = module.gate_proj(x), module.up_proj(x)
        product = _Gated.apply(gate, up, module.act_fn)
        kept = _kept_here()
        if kept is None:
            return module.down_proj(product)  # type: ignore[no-any-return]
        known_gate, known_up, act = gate.detach(), up.detach(), module.act_fn
        kept.offer(product, lambda: _gated(known_gate, known_up, act))
        output = module.down_proj(product)
        kept.withdraw()
        return output  # type: ignore[no-any-return]


def _gated(gate: torch.Tensor, up: torch.Tensor, act: Callable[..., Any]) -> torch.Tensor:
    if isinstance(act, nn.SiLU):
        product = roomy_empty(gate, *gate.shape)
        return torch.ops.aten.silu.out(gate, out=product).mul_(up)  # type: ignore[no-any-return]
    opened: torch.Tensor = act(gate)
    return opened * up


class _Gated(torch.autograd.Function):
    """act(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, act: Callable[..., Any]) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return _gated(gate, up, act)

    @staticmethod
    def backward(ctx: Any, grad_product: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        if isinstance(ctx.act, nn.SiLU):
            grad_gate = torch.ops.aten.silu_backward(grad_product * up, gate)
            return grad_gate, functional.silu(gate).mul_(grad_product), None
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            opened = ctx.act(leaf)
        (grad_gate,) = torch.autograd.grad(opened, leaf, grad_product * up)
        return grad_gate, opened.detach() * grad_product, None
