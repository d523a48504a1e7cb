"""The proof that fast batches change nothing: loss and every gradient against the same rows one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vir_hf.batches.collator import LlavaDataCollator
from vir_hf.kernels.fused_head import score
from vir_hf.kernels.fused_lora import fuse_lora
from vir_hf.kernels.lean_layers import make_lean
from vir_hf.rows.encoding import IGNORE
from vir_hf.training.step import compact_supervised

TOLERANCE = 1e-5
OUR_LAYERS = "the same with fused LoRA, lean layers and the fused head"


@dataclass(frozen=True)
class Comparison:
    """How far one way to make batches is from rows one at a time.

    Attributes:
        name: of the way.
        loss: mean over supervised tokens.
        loss_difference: relative.
        gradient_difference: the largest relative difference (L2 norm) over all trained weights.
        worst_weight: the weight it was found at.
        num_tokens: tokens computed, padding included.
    """

    name: str
    loss: float
    loss_difference: float
    gradient_difference: float
    worst_weight: str
    num_tokens: int

    @property
    def is_exact(self) -> bool:
        return self.loss_difference <= TOLERANCE and self.gradient_difference <= TOLERANCE


def compare_ways(
    model: nn.Module,
    processor: Any,
    rows: Sequence[dict[str, Any]],
    max_length: int | None = None,
    *,
    padding_free: bool = True,
) -> list[Comparison]:
    """Return one comparison a way: padded, padding-free, with shared prefixes, cut into micro-batches, with our layers.

    The last way puts our layers into the model, where they stay.

    Args:
        model: a `LlavaForCausalLM` or a PEFT model around one, in fp32, with the weights trained that a run would train.
        rows: what `load_llava_dataset` gives; the more kinds among them, the more is proved.
        padding_free: `False` leaves out the packed ways, for a language model that cannot take them.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # two runs with dropout differ by chance
    alone = LlavaDataCollator(processor, max_length, padding_free=False, share_prefixes=False)
    reference = _loss_and_gradients(model, [alone([row]) for row in rows])
    packed = LlavaDataCollator(processor, max_length)
    half = -(-len(rows) // 2)
    ways = {"padded": [LlavaDataCollator(processor, max_length, padding_free=False, share_prefixes=False)(rows)]}
    fastest = "padded"
    if padding_free:
        fastest = "shared prefixes, supervised positions only"
        ways |= {
            "padding-free": [LlavaDataCollator(processor, max_length, share_prefixes=False)(rows)],
            "shared prefixes": [packed(rows)],
            fastest: [compact_supervised(packed(rows))],
            "the same in two micro-batches": [
                compact_supervised(packed(part)) for part in (rows[:half], rows[half:]) if part
            ],
        }
    comparisons = [
        Comparison(
            "one row at a time", reference[0], 0.0, 0.0, "", sum(len(alone([row])["input_ids"][0]) for row in rows)
        )
    ]
    ways[OUR_LAYERS] = ways[fastest]
    for name, batches in ways.items():
        if name == OUR_LAYERS:
            fuse_lora(model)
            make_lean(_whole(model).model.language_model)
        loss, gradients = _loss_and_gradients(model, batches, with_head=name == OUR_LAYERS)
        difference, worst = _largest_difference(gradients, reference[1])
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        comparisons.append(
            Comparison(name, loss, abs(loss - reference[0]) / max(abs(reference[0]), 1e-12), difference, worst, tokens)
        )
    return comparisons


def _whole(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _loss_and_gradients(
    model: nn.Module, batches: Sequence[dict[str, Any]], *, with_head: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed over batches; `with_head`: scored as in training on a CPU, not from the logits."""
    device = next(model.parameters()).device
    whole = _whole(model)
    model.zero_grad(set_to_none=True)
    total, count = 0.0, 0
    for batch in batches:
        inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
        labels = inputs.pop("labels")
        targets = labels[:, 1:]
        if with_head and device.type == "cpu":
            hidden = whole.model(**inputs, use_cache=False).last_hidden_state
            loss = -score(hidden, whole.lm_head.weight, labels).log_probs.sum()
        else:
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            loss = nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1), ignore_index=IGNORE, reduction="sum"
            )
        loss.backward()
        total, count = total + loss.item(), count + int((targets != IGNORE).sum())
    gradients = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    return total / max(count, 1), gradients


def _largest_difference(gradients: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> tuple[float, str]:
    # A weight that only adds a constant to every score (a key's bias) has a gradient of rounding noise alone.
    floor = 1e-7 * max((float(value.norm()) for value in reference.values()), default=0.0)
    worst, where = 0.0, ""
    for name in sorted({*gradients, *reference}):
        ours, theirs = gradients.get(name), reference.get(name)
        if ours is None or theirs is None:
            value = ours if ours is not None else theirs
            difference = 0.0 if value is None or not value.any() else float("inf")
        else:
            difference = float((ours - theirs).norm() / max(float(theirs.norm()), floor, 1e-30))
        if difference > worst:
            worst, where = difference, name
    return worst, where
