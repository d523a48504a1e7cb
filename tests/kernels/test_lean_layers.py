"""Layers that forget what is cheap to make again: the same outputs and gradients, less kept, and nobody else changed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from vir_hf.kernels import lean_layers
from vir_hf.kernels.fused_lora import fuse_lora
from vir_hf.kernels.lean_layers import make_lean

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "head_dim": 8,
    "pad_token_id": 0,
}
# Families whose norms and MLPs are of Llama's kind, and those that only share their names.
LEAN, OTHERS = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2"], ["gemma2", "gpt_neox"]


def make(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES)
    model = AutoModel.from_config(config).to(dtype).train()
    with torch.no_grad():  # scales that are not all one
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def outcome(model: nn.Module, autocast: bool = False) -> list[torch.Tensor]:
    ids = torch.arange(24).view(2, 12)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model(input_ids=ids, use_cache=False).last_hidden_state
    (hidden.float() * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def distance(ones: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return max(
        float((one.float() - other.float()).norm() / one.float().norm().clamp(min=1e-6))
        for one, other in zip(ones, others, strict=True)
    )


@contextlib.contextmanager
def kept_bytes(model: nn.Module) -> Iterator[list[int]]:
    """Collects the bytes that lean decoder layers keep for their backward pass, every storage once, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    held, total, pack = [], [0], lean_layers._Kept.pack

    def counting(self: lean_layers._Kept, tensor: torch.Tensor) -> object:
        packed = pack(self, tensor)
        if isinstance(packed, torch.Tensor) and packed.untyped_storage().data_ptr() not in weights:
            held.append(packed)
            sizes[packed.untyped_storage().data_ptr()] = packed.untyped_storage().nbytes()
            total[0] = sum(sizes.values())
        return packed

    lean_layers._Kept.pack = counting  # type: ignore[method-assign]
    try:
        yield total
    finally:
        lean_layers._Kept.pack = pack  # type: ignore[method-assign]


@pytest.mark.parametrize("family", LEAN)
def test_outputs_and_gradients_stay_what_they_were(family: str) -> None:
    stock = make(family)
    lean = copy.deepcopy(stock)
    assert make_lean(lean) == 3 and make_lean(lean) == 0
    assert distance(outcome(stock), outcome(lean)) < 1e-5


@pytest.mark.parametrize("family", OTHERS)
def test_what_only_looks_alike_is_left_alone(family: str) -> None:
    stock = make(family)
    lean = copy.deepcopy(stock)
    make_lean(lean)
    kinds = {type(module).__mro__[1] for module in lean.modules() if isinstance(module, lean_layers._Lean)}
    assert lean_layers._RmsNorm not in kinds  # Gemma's norm scales by 1 + weight
    assert distance(outcome(stock), outcome(lean)) < 1e-5


def test_a_layer_keeps_neither_norm_outputs_nor_products() -> None:
    model = make()
    make_lean(model)
    with kept_bytes(model) as total:
        outcome(model)
    norms, mlp = 2 * (32 + 1), 2 * 96  # inputs and scales; gate and up
    attention = 32 + 2 * 16 + 32 + 4  # queries, keys, values, the output, log-sum-exps
    angles = 2 * 12 * 8 * 4
    assert total[0] == pytest.approx(3 * 24 * 4 * (norms + mlp + attention) + angles, rel=0.01)


def test_a_layer_that_learns_with_lora_forgets_too() -> None:
    from peft import LoraConfig, get_peft_model

    stock = get_peft_model(make(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    lean = copy.deepcopy(stock)
    make_lean(lean.base_model.model)
    fuse_lora(lean)
    with kept_bytes(lean) as total:
        found = outcome(lean)
    assert distance(outcome(stock), found) < 1e-5
    width = 2 * 33 + 32 + 2 * 32 + 32 + 4 + 2 * 96 + 7 * 4  # norms, attention, gate and up, adapters
    assert total[0] < 3 * 24 * 4 * (width + 32)


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, True)])
def test_sixteen_bit_models_and_autocast(dtype: torch.dtype, autocast: bool) -> None:
    stock = make(dtype=dtype)
    lean = copy.deepcopy(stock)
    make_lean(lean)
    ones, others = outcome(stock, autocast), outcome(lean, autocast)
    assert [x.dtype for x in ones] == [x.dtype for x in others]
    assert distance(ones, others) < 2e-2


def test_gradient_checkpointing_forgets_more_and_is_left_alone() -> None:
    stock = make()
    lean = copy.deepcopy(stock)
    make_lean(lean)
    lean.gradient_checkpointing_enable({"use_reentrant": False})
    with kept_bytes(lean) as total:
        assert distance(outcome(stock), outcome(lean)) < 1e-5
    assert total[0] == 0


def test_a_graph_can_be_gone_through_twice() -> None:
    model = make()
    make_lean(model)
    loss = model(input_ids=torch.arange(12).view(1, 12), use_cache=False).last_hidden_state.square().sum()
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_names_files_and_generation_do_not_change() -> None:
    stock = make()
    lean = copy.deepcopy(stock)
    make_lean(lean)
    assert [(name, type(module).__name__) for name, module in lean.named_modules()] == [
        (name, type(module).__name__) for name, module in stock.named_modules()
    ]
    assert list(lean.state_dict()) == list(stock.state_dict())
    ids = torch.arange(5).view(1, 5)
    with torch.no_grad():
        assert torch.equal(lean(input_ids=ids).last_hidden_state, stock(input_ids=ids).last_hidden_state)
    assert distance(outcome(stock), outcome(copy.deepcopy(lean))) < 1e-5


def test_an_error_inside_a_layer_leaves_nothing_behind() -> None:
    model = make()
    make_lean(model)
    with pytest.raises(Exception, match="size|shape|dimension"):
        model.layers[0](torch.zeros(1, 4, 31), position_embeddings=(torch.zeros(1, 4, 8),) * 2)
    assert getattr(lean_layers._here, "kept", None) is None


class Norm(nn.Module):
    """Llama's norm, with one thing changed at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.variance_epsilon = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(x.dtype)


class CastsLast(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).to(x.dtype)


class TakesGate(Norm):
    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x if gate is None else x * gate)


class NeedsGate(Norm):
    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return super().forward(x * gate)


class Centres(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class Mlp(nn.Module):
    """Llama's MLP, with one thing changed at a time."""

    limit, rate = float("inf"), 0.0

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-self.limit, self.limit)
        return self.down_proj(nn.functional.dropout(product, self.rate, self.training))


class Clamps(Mlp):
    limit = 10.0


class Drops(Mlp):
    rate = 0.5


class LearnsToActivate(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.PReLU()


@pytest.mark.parametrize(
    ("kind", "is_known"),
    [
        (Norm, True),
        (CastsLast, False),
        (TakesGate, False),
        (NeedsGate, False),
        (Centres, False),
        (Mlp, True),
        (Clamps, False),
        (Drops, False),
        (LearnsToActivate, False),
    ],
)
def test_only_what_computes_the_same_is_changed(kind: type[nn.Module], is_known: bool) -> None:
    model = nn.Module()
    model.part = kind().eval()
    make_lean(model)
    assert isinstance(model.part, lean_layers._Lean) is is_known
    x = torch.linspace(-3, 3, 16).view(2, 8).requires_grad_()
    if kind is Norm:
        assert torch.allclose(model.part(x), Norm.forward(model.part, x))
        assert model.part(x.double()).dtype == torch.float64  # left to the original


def test_what_was_offered_is_let_go_with_its_factors() -> None:
    kept = lean_layers._Kept()
    kept.offer(torch.ones(2), lambda: torch.ones(2))
    kept.withdraw()
    assert kept._offered is None and isinstance(kept.pack(torch.ones(2)), torch.Tensor)
