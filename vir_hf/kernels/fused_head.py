"""The language-model head on a CPU, scored in chunks of tokens that stay in the cache, with the gradient made on the way.

TRL's head computes tiles of logits in the forward pass and again in the backward pass, each read by a dozen element-wise
operations. Here a chunk's logits are computed once; their softmax gives the log-probability, the entropy and, where the
head itself is frozen, the gradient of the hidden states. On a GPU, TRL's Triton kernels stay in charge.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from vir_hf.llava.logits import NEUTRAL_LOGIT_WORDS
from vir_hf.rows.encoding import IGNORE

# Elements of a chunk's logits, 64 MiB in fp32: fewer rows make slow products, more leave the cache.
CHUNK_ELEMENTS = 2**24


@dataclass
class ScoredOutput(ModelOutput):
    """What TRL's trainer reads of a fused head; every tensor is `(batch, positions)` and zero where no label is.

    Attributes:
        log_probs: of the label after each position.
        entropy: of the predicted distribution, without a gradient.
        is_top1: whether the label is the most probable token.
        label_mask: where a label is.
    """

    log_probs: Any = None
    entropy: Any = None
    is_top1: Any = None
    label_mask: Any = None
    aux_loss: torch.Tensor | None = None


def fuse_head(model: Any) -> bool:
    """Score with this head wherever TRL asks for its fused one on a CPU; return whether this model's head can be.

    Call it after TRL's trainer has put its own head on the model. Heads that scale, cap or bias their logits, calls that
    ask for router losses, and sharded weights stay with TRL's.
    """
    config = model.config.get_text_config()
    words = NEUTRAL_LOGIT_WORDS.items()
    if any(getattr(config, word, None) not in (None, neutral) for word, neutral in words):
        return False
    upstream = model.forward

    @functools.wraps(upstream)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        head = self.get_output_embeddings()
        is_ours = fused_lm_head and labels is not None and kwargs.get("shift_labels") is None and _is_plain(head)
        if not is_ours or kwargs.get("output_router_logits"):
            return upstream(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        kwargs.pop("num_items_in_batch", None)
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        return score(hidden, head.weight, labels)

    model.forward = types.MethodType(forward, model)
    return True


def _is_plain(head: Any) -> bool:
    """Whether the head is a whole, dense, unbiased matrix on a CPU."""
    weight = getattr(head, "weight", None)
    return (
        type(head) is nn.Linear
        and head.bias is None
        and type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.is_floating_point()
        and not hasattr(weight, "ds_id")
    )


def score(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> ScoredOutput:
    """Score every position that has a label after it.

    Args:
        hidden: `(batch, length, hidden_size)`.
        weight: `(vocabulary, hidden_size)`.
        labels: `(batch, length)`; position p is scored against label p + 1, -100 is ignored.

    Returns:
        Tensors of `(batch, length - 1)`.
    """
    targets = labels[:, 1:]
    mask = targets != IGNORE
    scored = _ScoredTokens.apply(hidden[:, :-1][mask], weight, targets[mask])
    # `masked_scatter` keeps a batch without labels connected to the model: a loss of zero with a gradient of zeros.
    log_probs, entropy, is_top1 = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in scored)
    return ScoredOutput(log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask)


class _ScoredTokens(torch.autograd.Function):
    """Log-probability, entropy and top-1 hit of `targets` (n,) under softmax(hidden (n, h) @ weight (v, h)^T)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        is_autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if is_autocast else hidden.dtype
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        slopes = torch.empty_like(hidden, dtype=torch.float32) if needs_hidden and not needs_weight else None
        log_probs, entropy = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2))
        is_top1 = torch.empty(len(hidden), dtype=torch.bool)
        with torch.autocast("cpu", enabled=False):
            matrix = weight.to(dtype)
            for chunk in _chunks(len(hidden), len(weight)):
                states, wanted = hidden[chunk].to(dtype), targets[chunk].unsqueeze(1)
                logits = (states @ matrix.t()).float()
                greatest, likeliest = logits.max(1, keepdim=True)
                target = logits.gather(1, wanted)
                probs = torch.softmax(logits, 1)
                log_sum = greatest - probs.gather(1, likeliest).log_()  # the likeliest token's share never vanishes
                log_probs[chunk] = (target - log_sum).squeeze(1)
                is_top1[chunk] = (likeliest == wanted).squeeze(1)
                is_exact = slopes is not None and dtype == torch.float32
                mean_logit = None if is_exact else (probs * logits).sum(1)
                del logits
                if slopes is not None:
                    # The target is taken off before anything is rounded: where it is nearly certain, little is left.
                    probs.scatter_add_(1, wanted, torch.full_like(target, -1.0))
                    slopes[chunk] = (probs.to(dtype) @ matrix).float().neg_()
                if (
                    mean_logit is None
                ):  # hidden . (row of the target - mean row) is target - mean: no pass over the logits
                    mean_logit = target.squeeze(1) - (states * slopes[chunk]).sum(1)  # type: ignore[index]
                entropy[chunk] = log_sum.squeeze(1) - mean_logit
        ctx.dtype, ctx.hidden_dtype = dtype, hidden.dtype
        ctx.save_for_backward(slopes, *((hidden, weight, targets) if needs_weight else ()))
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, grad_log_probs: torch.Tensor | None, *_: Any) -> Any:
        if grad_log_probs is None:
            return None, None, None
        slopes, *learning = ctx.saved_tensors
        if learning:
            hidden, weight, targets = learning
            return _trained_head_gradients(hidden, weight, targets, grad_log_probs, ctx.dtype)
        if slopes is None:
            return None, None, None
        return (slopes * grad_log_probs.unsqueeze(1)).to(ctx.hidden_dtype), None, None


def _trained_head_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, grad_log_probs: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """The gradient of a head that learns needs each token's factor first, so its logits are computed a second time."""
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    matrix = weight.to(dtype)
    for chunk in _chunks(len(hidden), len(weight)):
        states, factors = hidden[chunk].to(dtype), grad_log_probs[chunk].unsqueeze(1)
        slopes = torch.softmax((states @ matrix.t()).float(), 1).neg_()
        slopes.scatter_add_(1, targets[chunk].unsqueeze(1), torch.ones_like(factors))
        slopes = slopes.mul_(factors).to(dtype)
        grad_hidden[chunk] = (slopes @ matrix).to(hidden.dtype)
        if dtype == torch.float32:
            grad_weight.addmm_(slopes.t(), states)
        else:
            grad_weight += slopes.t() @ states
    return grad_hidden, grad_weight.to(weight.dtype), None


def _chunks(num_tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]
