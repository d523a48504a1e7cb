"""The head on a CPU: scores and gradients against those of the whole logits, and TRL's head where it must stay."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from vir_hf.kernels import fused_head
from vir_hf.kernels.fused_head import fuse_head, score
from vir_hf.rows.encoding import IGNORE

VOCABULARY = 37


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 6, 8, generator=generator, dtype=dtype).requires_grad_()
    weight = (3 * torch.randn(VOCABULARY, 8, generator=generator, dtype=dtype)).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (2, 6), generator=generator)
    labels[0, :3] = labels[1, 4] = IGNORE
    return hidden, weight, labels


@pytest.mark.parametrize("head_learns", [False, True])
@pytest.mark.parametrize("chunk", [1, 2 * VOCABULARY, 2**20])
def test_scores_and_gradients_are_those_of_the_whole_logits(
    head_learns: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_head, "CHUNK_ELEMENTS", chunk)
    hidden, weight, labels = inputs()
    weight.requires_grad_(head_learns)
    factors = torch.rand(2, 5)
    found = score(hidden, weight, labels)
    (found.log_probs * factors).sum().backward()
    grads = hidden.grad, weight.grad
    hidden.grad = weight.grad = None

    logits = hidden[:, :-1] @ weight.t()
    targets = labels[:, 1:]
    mask = targets != IGNORE
    expected = -functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE, reduction="none")
    (expected * factors).sum().backward()
    entropy = torch.distributions.Categorical(logits=logits).entropy() * mask
    assert torch.equal(found.label_mask, mask)
    assert torch.allclose(found.log_probs, expected, atol=1e-5)
    assert torch.allclose(found.entropy, entropy, atol=1e-5)
    assert torch.equal(found.is_top1, (logits.argmax(-1) == targets) & mask)
    assert torch.allclose(grads[0], hidden.grad, rtol=1e-5, atol=1e-6)
    if head_learns:
        assert torch.allclose(grads[1], weight.grad, rtol=1e-5, atol=1e-6)
    else:
        assert grads[1] is None


def test_a_token_of_no_probability_has_a_finite_score() -> None:
    hidden, weight, labels = inputs()
    found = score(hidden * 1e4, weight, labels)
    assert torch.isfinite(found.log_probs).all() and float(found.log_probs.detach().min()) < -1e3


def test_a_batch_without_labels_gives_a_zero_that_has_a_gradient() -> None:
    hidden, weight, labels = inputs()
    weight.requires_grad_(False)
    loss = score(hidden, weight, torch.full_like(labels, IGNORE)).log_probs.sum()
    loss.backward()
    assert float(loss.detach()) == 0 and torch.equal(hidden.grad, torch.zeros_like(hidden))


@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits_are_as_close_as_sixteen_bits_are(autocast: bool) -> None:
    hidden, weight, labels = inputs(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = score(hidden, weight, labels)
    found.log_probs.sum().backward()
    assert found.log_probs.dtype == torch.float32 and hidden.grad.dtype == hidden.dtype
    grad, hidden.grad = hidden.grad.float(), None
    exact = score(hidden.float(), weight.float(), labels)
    exact.log_probs.sum().backward()
    assert torch.allclose(found.log_probs, exact.log_probs, atol=0.2)
    assert float((grad - hidden.grad).norm() / hidden.grad.norm()) < 2e-2


def make_model(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCABULARY, **changes))
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return model


def test_a_model_scores_as_with_trls_head() -> None:
    stock = make_model()
    ours = copy.deepcopy(stock)
    add_fused_lm_head(ours, outputs=("log_probs", "entropy", "is_top1"))
    assert fuse_head(ours)
    ids = torch.arange(14).view(2, 7)
    labels = torch.where(ids % 3 == 0, IGNORE, ids)
    results = [model(input_ids=ids, labels=labels, fused_lm_head=True) for model in (stock, ours)]
    for name in ("log_probs", "entropy", "is_top1", "label_mask"):
        one, other = (getattr(result, name).float() for result in results)
        assert torch.allclose(one, other, atol=1e-6), name
    for result in results:
        result.log_probs.sum().backward()
    for one, other in zip(stock.parameters(), ours.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-5)
    assert torch.equal(ours(input_ids=ids).logits, stock(input_ids=ids).logits)  # without the word: as it was


@pytest.mark.parametrize(
    "config",
    [{"final_logit_softcapping": 30.0}, {"logit_scale": 2.0}, {"logits_scaling": 4.0}],
    ids=lambda config: next(iter(config)),
)
def test_heads_that_do_more_stay_with_trl(config: dict[str, float]) -> None:
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(**config)), forward=print)
    assert not fuse_head(model) and model.forward is print


def test_a_head_with_a_bias_is_scored_by_trl() -> None:
    model = make_model()
    model.lm_head = nn.Linear(16, VOCABULARY, bias=True)
    assert fuse_head(model)
    ids = torch.arange(7).view(1, 7)
    scored = model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert not isinstance(scored, fused_head.ScoredOutput)
    expected = torch.log_softmax(model(input_ids=ids).logits, -1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    assert torch.allclose(scored.log_probs, expected, atol=1e-5)


def test_in_sixteen_bits_a_nearly_certain_token_keeps_its_small_gradient() -> None:
    hidden, weight, labels = (x.detach() for x in inputs(torch.bfloat16))
    certain = torch.nn.functional.normalize(weight[labels.clamp(min=0)].float(), dim=-1)
    scale = 3.0
    hidden[:, :-1] = (scale * certain[:, 1:]).to(torch.bfloat16)
    states = [hidden.clone().requires_grad_(), hidden.double().requires_grad_()]
    found, exact = (score(state, weight.to(state.dtype), labels) for state in states)
    assert float(exact.log_probs.exp().max()) > 0.99
    for scored in (found, exact):
        scored.log_probs.sum().backward()
    grad, expected = (state.grad.double() for state in states)
    rows = exact.label_mask & (exact.log_probs > -0.2)
    error = (grad - expected)[:, :-1][rows].norm(dim=-1) / expected[:, :-1][rows].norm(dim=-1)
    assert rows.any() and float(error.max()) < 0.15
    assert torch.allclose(found.entropy, exact.entropy.float(), atol=0.1) and float(found.entropy.min()) > -1e-3
