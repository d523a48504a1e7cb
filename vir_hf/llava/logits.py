# SPDX-License-Identifier: Apache-2.0
"""What a causal language model does to the logits of its head, which a LLaVA model has no place for."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# Words of a text config by which models scale or cap their logits, and TRL's head with them: the value that does nothing.
NEUTRAL_LOGIT_WORDS: dict[str, float | None] = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "output_multiplier": 1.0,
    "lm_head_multiplier": 1.0,
}


def forget_logit_words(text_config: PreTrainedConfig) -> None:
    """Make a text config say what LLaVA's head does: logits are one product, and no router loss is added.

    TRL reads these words off the config of any model. A LLaVA model applies none of them, neither transformers' class nor this
    one, so without this it would be trained with a scale and be served without it.

    Raises:
        ValueError: a family derives one of them from others.
    """
    for word, neutral in NEUTRAL_LOGIT_WORDS.items():
        if getattr(text_config, word, None) not in (None, neutral):
            try:
                setattr(text_config, word, neutral)
            except AttributeError as error:
                raise ValueError(
                    f"{text_config.model_type} scales its logits by {word}={getattr(text_config, word)}, which its config "
                    "derives from other values, so a LLaVA model, which scales nothing, cannot say so."
                ) from error
    if getattr(text_config, "router_aux_loss_coef", None):
        text_config.router_aux_loss_coef = 0.0
    if getattr(text_config, "output_router_logits", None):
        text_config.output_router_logits = False


def logit_words(text_config: PreTrainedConfig) -> str:
    """The settings by which a config scales or caps its logits, as `name=value`, for a message."""
    names = [*NEUTRAL_LOGIT_WORDS, *(name for name in vars(text_config) if "logit" in name or "soft_cap" in name)]
    found = {name: getattr(text_config, name, None) for name in names if not name.startswith(("attn", "router"))}
    return ", ".join(
        f"{name}={value}"
        for name, value in found.items()
        if isinstance(value, (int, float)) and value not in (1.0, False)
    )


def logit_factor(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> float:
    """Return the factor between what a causal language model answers and the plain product of its head: 1 for most.

    The class is built without memory, its body is replaced by given hidden states and its head by a small one, and its own
    forward is run: nothing of it is known by name.

    Raises:
        ValueError: it has no head, a bias in it, or does with the logits what no factor expresses.
    """
    name = model_class.__name__
    with torch.device("meta"):
        model: Any = model_class(copy.deepcopy(config))
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        found = (
            "no head"
            if head is None
            else "a bias in its head"
            if isinstance(head, nn.Linear)
            else "a head of another kind"
        )
        raise ValueError(
            f"{name} has {found}; a LLaVA model needs a causal language model with a linear head without bias, as Llama, "
            "Mistral, Qwen and SmolLM have."
        )
    body = model.base_model
    if body is model:
        raise ValueError(f"{name} has no body apart from its head, so nothing of it can read image features.")
    generator = torch.Generator().manual_seed(0)
    # Logits of some 100, since caps let small ones pass.
    states = torch.randn(1, 3, head.in_features, generator=generator)
    trial = nn.Linear(head.in_features, 64, bias=False)
    trial.weight.data = torch.randn(64, head.in_features, generator=generator) * 100 / math.sqrt(head.in_features)
    plain = trial(states).detach()
    found = []
    try:
        model.set_output_embeddings(trial)
        for size in (0.0, 1.0, 8.0):
            body.forward = _Answer(states * size)
            with torch.no_grad():
                found.append(model(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits.float())
        factor = float((found[1] * plain).sum() / (plain * plain).sum())
    except Exception as error:  # whatever else its forward wants of its body, or does with what it gets
        raise ValueError(f"{name}: its forward is more than a body and a head ({type(error).__name__}).") from error
    is_factor = found[1].shape == plain.shape and not found[0].any() and math.isfinite(factor) and factor > 0
    for size, logits in zip((1.0, 8.0), found[1:], strict=True):
        is_factor = is_factor and torch.allclose(logits, plain * factor * size, rtol=1e-4, atol=1e-2 * factor * size)
    if not is_factor:
        words = logit_words(config)
        raise ValueError(
            f"{name} does more with its logits than to scale them{f' ({words})' if words else ''}; a LLaVA model applies nothing "
            "after its head, so the saved model would be another one."
        )
    return 1.0 if math.isclose(factor, 1.0, rel_tol=1e-5) else factor


class _Answer:
    """A body's forward that answers with given hidden states, whatever it is asked."""

    def __init__(self, states: torch.Tensor):
        self._output = _BodyOutput({"last_hidden_state": states})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._output


class _BodyOutput(dict[str, Any]):
    """An output of any model's body, by name or by number: what is not there is `None`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return self.get(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The values in order, and then nothing."""
        return (*self.values(), *([None] * 8))


def absorb_logit_factor(language_model: PreTrainedModel, factor: float) -> None:
    """Put a factor on the logits into the weights: of the last norm, since a head is often tied to the embedding.

    Raises:
        ValueError: the body ends in no norm that a factor can be put into.
    """
    if factor == 1.0:
        return
    norm = final_norm(language_model.base_model)
    if norm is None:
        raise ValueError(
            f"{type(language_model).__name__} multiplies its logits by {factor:g} ({logit_words(language_model.config)}), "
            "which a LLaVA model does not, and its last norm has no weight that could take the factor up."
        )
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.mul_(factor)


def final_norm(body: Any) -> nn.Module | None:
    """The norm at the end of a body, if its output is proportional to its weights."""
    named = [(name, module) for name, module in body.named_children() if "norm" in name or name == "ln_f"]
    width = body.config.hidden_size
    for _, module in reversed(named):
        weights = list(module.parameters(recurse=False))
        if weights and all(weight.shape == (width,) for weight in weights) and _is_proportional(module, width):
            return module
    return None


def _is_proportional(norm: nn.Module, width: int) -> bool:
    """Whether twice the weights give twice the output; tried on a copy."""
    if any(weight.is_meta for weight in norm.parameters()):
        return False
    trial = copy.deepcopy(norm).cpu().float()
    x = torch.linspace(-1, 2, 2 * width).view(2, width)
    with torch.no_grad():
        once = trial(x)
        for weight in trial.parameters():
            weight.mul_(2)
        return bool(torch.allclose(trial(x), 2 * once, rtol=1e-4, atol=1e-5))
