"""PEFT's LoRA layers with the update added by one matrix product, where PEFT scales and adds it in two passes of its own.

With two thousand tokens a step on a CPU those passes take a sixth of it. The result is the same up to the order of rounding:
W x + (A x) B^T * scaling, the scaling inside the product; and backward W^T and the adapter write one gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.nn import functional

from vir_hf.kernels.roomy import roomy_empty


def fuse_lora(model: nn.Module) -> int:
    """Let every linear LoRA layer of a model add its update in one product; return how many do.

    Whatever is more than plain LoRA (DoRA, several active adapters, a bias of its own, a merged or disabled adapter, adapters by
    name) is left to PEFT, call by call. Names, weights and files stay what they were.
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, LoraLayer) and hasattr(layer.get_base_layer(), "out_features") and not _is_fused(layer)
    ]
    for layer in layers:
        layer.__class__ = _fused(type(layer))
    return len(layers)


def _is_fused(layer: nn.Module) -> bool:
    return isinstance(layer, _FusedForward)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _fused(original: type[nn.Module]) -> type[nn.Module]:
    if original not in _CLASSES:
        _CLASSES[original] = type(original.__name__, (_FusedForward, original), {"__module__": original.__module__})
    return _CLASSES[original]


class _FusedForward:
    """In front of a PEFT class: its forward, where the one active adapter is plain LoRA."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer: Any = self
        adapter = _plain_adapter(layer) if not args and not kwargs else None
        if adapter is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc,no-any-return]
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        if _is_one_function(layer, adapter, x, down):
            base = layer.base_layer
            rows = x.reshape(-1, base.in_features)
            updated = _LoraLinear.apply(rows, base.weight, base.bias, down, up, layer.scaling[adapter])
            return updated.view(*x.shape[:-1], base.out_features)  # type: ignore[no-any-return]
        result: torch.Tensor = layer.base_layer(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = layer._cast_input_dtype(x, down.dtype)
        inner = functional.linear(layer.lora_dropout[adapter](x), down)
        if result.dtype != inner.dtype:  # 16-bit weights without autocast
            return result + (functional.linear(inner, up) * layer.scaling[adapter]).to(result.dtype)
        rows = result.reshape(-1, result.shape[-1])
        updated = torch.addmm(rows, inner.reshape(-1, inner.shape[-1]), up.t(), alpha=layer.scaling[adapter])
        return updated.view_as(result)


def _plain_adapter(layer: Any) -> str | None:
    """The active adapter, if it is the only one and plain LoRA."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    adapter: str = layer.active_adapters[0]
    is_plain = adapter in layer.lora_A and adapter not in layer.lora_variant and layer.lora_B[adapter].bias is None
    # Weights that ZeRO-3 has taken apart are whole only inside the call of the module that owns them.
    return adapter if is_plain and not hasattr(layer.lora_A[adapter].weight, "ds_id") else None


def _is_one_function(layer: Any, adapter: str, x: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether a frozen dense layer, its input and its adapter all compute in one type, and nothing is dropped."""
    base, dropout = layer.base_layer, layer.lora_dropout[adapter]
    is_dropping = layer.training and not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 0) > 0
    return (
        type(base) is nn.Linear
        and not any(parameter.requires_grad for parameter in base.parameters())
        and x.dtype == base.weight.dtype == down.dtype
        and not is_dropping
        and not torch.is_autocast_enabled(x.device.type)
    )


class _LoraLinear(torch.autograd.Function):
    """x W^T + bias + (x A^T) B^T * scaling, with a gradient for x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """`rows` (n, in), `weight` (out, in), `down` (rank, in), `up` (out, rank) -> (n, out)."""
        inner = rows @ down.t()
        # What narrows is added to the stream and freed; what widens is kept.
        size = (rows.shape[0], weight.shape[0])
        result = roomy_empty(rows, *size) if size[1] <= rows.shape[1] else rows.new_empty(size)
        if bias is None:
            torch.mm(rows, weight.t(), out=result)
        else:
            torch.addmm(bias, rows, weight.t(), out=result)
        result.addmm_(inner, up.t(), alpha=scaling)
        ctx.save_for_backward(rows, weight, down, up, inner)
        ctx.scaling = scaling
        return result

    @staticmethod
    def backward(ctx: Any, grad_result: torch.Tensor) -> Any:
        rows, weight, down, up, inner = ctx.saved_tensors
        grad_inner = (grad_result @ up).mul_(ctx.scaling)
        grad_rows = grad_down = grad_up = None
        if ctx.needs_input_grad[0]:
            grad_rows = (grad_result @ weight).addmm_(grad_inner, down)
        if ctx.needs_input_grad[3]:
            grad_down = grad_inner.t() @ rows
        if ctx.needs_input_grad[4]:
            grad_up = (grad_result.t() @ inner).mul_(ctx.scaling)
        return grad_rows, None, None, grad_down, grad_up, None
