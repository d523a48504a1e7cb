"""Which weights learn: freezing, LoRA inside the chosen part only, learning rate and weight decay per part."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from vir_hf.errors import RecipeError
from vir_hf.llava.modeling_llava import LlavaForCausalLM

if TYPE_CHECKING:
    from vir_hf.recipe import Recipe

logger = logging.getLogger(__name__)

# A part is a prefix of parameter names. The head belongs to the language model.
PARTS = {
    "language_model": ("model.language_model.", "lm_head."),
    "projector": ("model.multi_modal_projector.",),
    "vision_tower": ("model.vision_tower.",),
}
_LANGUAGE_MODEL_LINEARS = "all-linear"


def part_of(name: str) -> str:
    """The part a parameter or module belongs to; the prefixes of PEFT and of a distributed wrapper are left aside."""
    name = name.removeprefix("module.").removeprefix("base_model.model.")
    for part, prefixes in PARTS.items():
        if name.startswith(prefixes) or f"{name}." in prefixes:
            return part
    raise ValueError(f"{name!r} belongs to no part of a LLaVA model; known parts: {sorted(PARTS)}")


def make_trainable(model: LlavaForCausalLM, recipe: Recipe) -> LlavaForCausalLM | PeftModel:
    """Return the model with gradients exactly where `recipe.trainable` says; a PEFT model if a part learns by LoRA.

    Trainable weights are fp32 afterwards: under bf16 most small updates would round to nothing.

    Raises:
        RecipeError: LoRA targets that match nothing; a quantised part that should learn in full.
    """
    wanted = recipe.trainable
    how = {
        "language_model": wanted.language_model,
        "projector": wanted.projector,
        "vision_tower": wanted.vision_tower,
    }
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained: LlavaForCausalLM | PeftModel = model
    if "lora" in how.values():
        trained = get_peft_model(model, lora_config(model, recipe), autocast_adapter_dtype=True)
    for name, parameter in trained.named_parameters():
        plain = name.removeprefix("base_model.model.")
        if "original_module" in plain:
            continue
        part = part_of(plain)
        if how[part] == "full" and _is_chosen(plain, recipe) and "lora_" not in plain:
            if not parameter.is_floating_point():
                raise RecipeError(
                    f"trainable.{part}=full: {plain} is stored in {recipe.quantization.bits} bit and cannot learn; set "
                    f"trainable.{part}=lora, or quantization=none."
                )
            parameter.requires_grad_(True)
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    if not any(parameter.requires_grad for parameter in trained.parameters()):
        raise RecipeError("trainable: nothing learns; set trainable.projector=full or trainable.language_model=lora.")
    return trained


def _is_chosen(name: str, recipe: Recipe) -> bool:
    """Whether a weight of a fully trained part learns: all but the tower's layers below `vision_from_layer`."""
    start = recipe.trainable.vision_from_layer
    if start is None or not name.startswith(PARTS["vision_tower"]):
        return True
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return layer is not None and int(layer.group(1)) >= start


def lora_config(model: LlavaForCausalLM, recipe: Recipe) -> LoraConfig:
    """Return PEFT's config with targets confined to the parts that learn by LoRA; a trained projector is saved with it."""
    arguments: dict[str, Any] = dict(recipe.lora.lora_arguments())
    asked = arguments.pop("target_modules", None) or _LANGUAGE_MODEL_LINEARS
    targets: list[str] = []
    for part in ("language_model", "vision_tower"):
        if getattr(recipe.trainable, part) == "lora":
            found = [name for name in _linear_names(model, part) if _matches(name, asked) and _is_chosen(name, recipe)]
            if not found:
                raise RecipeError(
                    f"lora.target_modules={asked}: matches no linear layer of {part}, which has "
                    f"{sorted({name.rsplit('.', 1)[-1] for name in _linear_names(model, part)})}."
                )
            targets += found
    to_save = list(arguments.pop("modules_to_save", None) or [])
    if recipe.trainable.projector == "full":
        to_save.append("model.multi_modal_projector")
    return LoraConfig(task_type="CAUSAL_LM", target_modules=targets, modules_to_save=to_save or None, **arguments)


def _linear_names(model: LlavaForCausalLM, part: str) -> list[str]:
    """Full names of a part's linear layers, quantised ones included, the head excluded."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ in ("Linear4bit", "Linear8bitLt"))
        and module is not head
        and part_of(name) == part
    ]


def _matches(name: str, asked: str | Iterable[str]) -> bool:
    if asked == _LANGUAGE_MODEL_LINEARS:
        return True
    if isinstance(asked, str):
        return re.fullmatch(asked, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in asked)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the optimizer's groups: every part at its own learning rate and weight decay, norms and biases without decay.

    A part without a rate of its own takes `training.learning_rate`, and likewise for the decay.
    """
    training = recipe.training
    rates = {
        "language_model": (training.learning_rate, training.weight_decay),
        "projector": (training.projector_learning_rate, training.projector_weight_decay),
        "vision_tower": (training.vision_learning_rate, training.vision_weight_decay),
    }
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        decays = parameter.ndim >= 2
        rate, decay = rates[part]
        group = groups.setdefault(
            (part, decays),
            {
                "params": [],
                "lr": training.learning_rate if rate is None else rate,
                "weight_decay": (training.weight_decay if decay is None else decay) if decays else 0.0,
                "part": part,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
