"""LoRA in one product: PEFT's own outputs and gradients, and PEFT's own code where it is more than plain LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from vir_hf.kernels.fused_lora import fuse_lora


def make(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.SiLU(), nn.Linear(20, 6, bias=False))
    values = {"r": 4, "lora_alpha": 7, "lora_dropout": 0.0, "target_modules": ["0", "2"], "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(**{**values, **changes}))


def outcome(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    out = model(x)
    out.float().square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [out.detach(), x.grad, *grads]


@pytest.mark.parametrize(
    "changes",
    [{}, {"bias": "all"}, {"use_rslora": True}, {"lora_dropout": 0.3}, {"use_dora": True}, {"lora_bias": True}],
    ids=["plain", "base biases", "rslora", "dropout", "dora", "bias"],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_and_gradients_are_pefts(changes: dict, autocast: bool) -> None:
    stock = make(**changes).train()
    fused = copy.deepcopy(stock)
    assert fuse_lora(fused) == 2 and fuse_lora(fused) == 0
    x = torch.randn(2, 5, 12)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, found = outcome(stock, x), outcome(fused, x)
    assert len(expected) == len(found) >= 6
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype
        bound = 2e-2 if autocast else 1e-6
        assert float((one - other).abs().max()) <= bound * float(one.abs().max())


def test_names_files_and_merging_stay_what_they_were() -> None:
    stock = make()
    fused = copy.deepcopy(stock)
    fuse_lora(fused)
    assert list(fused.state_dict()) == list(stock.state_dict())
    assert [type(module).__name__ for module in fused.modules()] == [
        type(module).__name__ for module in stock.modules()
    ]
    x = torch.randn(3, 12)
    with fused.disable_adapter(), stock.disable_adapter():
        assert torch.equal(fused(x), stock(x))
    assert torch.allclose(fused.merge_and_unload()(x), stock(x), atol=1e-6)


def test_16_bit_weights_without_autocast_keep_their_type() -> None:
    stock = make().to(torch.bfloat16)
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    fused = copy.deepcopy(stock)
    fuse_lora(fused)
    x = torch.randn(3, 12, dtype=torch.bfloat16)
    assert fused(x).dtype == torch.bfloat16
    assert torch.allclose(fused(x), stock(x), atol=2e-2)


def test_the_output_may_be_changed_in_place_and_be_empty() -> None:
    stock = make()
    fused = copy.deepcopy(stock)
    fuse_lora(fused)
    results = []
    for model in (stock, fused):
        out = model.base_model.model[0](torch.ones(2, 12)).clamp_(-0.1, 0.1)  # as OLMo clips its queries
        out.sum().backward()
        results.append(model.base_model.model[0].lora_B["default"].weight.grad)
    assert torch.allclose(*results)
    assert fused(torch.ones(0, 12)).shape == (0, 6)
