"""Which weights learn: freezing, LoRA inside the chosen part only, learning rate and weight decay per part."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from torch import nn

from vir_hf.errors import RecipeError
from vir_hf.llava.modeling_llava import LlavaForCausalLM
from vir_hf.model.adapters import AdaptedLlava, adapter_folder
from vir_hf.model.fingerprint import check_fingerprint
from vir_hf.model.quantization import bits_of

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe

logger = logging.getLogger(__name__)

# A part is a prefix of parameter names. The head belongs to the language model.
PARTS = {
    "language_model": ("model.language_model.", "lm_head."),
    "projector": ("model.multi_modal_projector.",),
    "vision_tower": ("model.vision_tower.",),
}
_ALL_LINEAR = "all-linear"
# Keys of LoraConfig that an adapter on disk decides when training goes on with it.
_SHAPE_KEYS = ("r", "lora_alpha", "use_rslora", "use_dora")


def part_of(name: str) -> str:
    """The part a parameter or module belongs to; the prefixes of PEFT and of a distributed wrapper are left aside."""
    name = name.removeprefix("module.").removeprefix("base_model.model.")
    for part, prefixes in PARTS.items():
        if name.startswith(prefixes) or f"{name}." in prefixes:
            return part
    raise ValueError(f"{name!r} belongs to no part of a LLaVA model; known parts: {sorted(PARTS)}")


def make_trainable(model: LlavaForCausalLM, recipe: Recipe) -> LlavaForCausalLM | AdaptedLlava:
    """Return the model with gradients exactly where `recipe.trainable` says; a PEFT model if a part learns by LoRA.

    A vision tower learns up to the layer the projector reads: the layers after it do not run. Trainable weights are fp32
    afterwards: under bf16 most small updates would round to nothing. With `model.adapter` that adapter is trained on.

    Raises:
        RecipeError: LoRA targets that match nothing; a quantised part that should learn in full; a combination that
            no checkpoint can hold; an adapter that does not fit.
    """
    check_trainable(model, recipe)
    how = {part: getattr(recipe.trainable, part) for part in PARTS}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    modules = fully_trained_modules(model, recipe)
    trained: LlavaForCausalLM | AdaptedLlava = model
    if "lora" in how.values():
        trained = _with_adapter(model, recipe, modules)
        for name, parameter in trained.named_parameters():
            parameter.requires_grad_(_learns_with_adapter(name, parameter, how, tuple(modules)))
    else:
        for module in modules.values():
            module.requires_grad_(True)
    for parameter in trained.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    if not any(parameter.requires_grad for parameter in trained.parameters()):
        raise RecipeError("trainable: nothing learns; set trainable.projector=full or trainable.language_model=lora.")
    return trained


def check_trainable(model: LlavaForCausalLM, recipe: Recipe) -> None:
    """Raise what `make_trainable` would raise of the recipe's own making, and change nothing: before a base is written to disk.

    Raises:
        RecipeError: as `make_trainable`.
    """
    for name, module in fully_trained_modules(model, recipe).items():
        _check_learnable(name, module, recipe)
    if "lora" in (getattr(recipe.trainable, part) for part in PARTS) and not recipe.model.adapter:
        lora_config(model, recipe)


def fully_trained_modules(model: LlavaForCausalLM, recipe: Recipe) -> dict[str, nn.Module]:
    """Return the modules whose every weight learns, by name; of the tower only those that run and are chosen.

    Raises:
        RecipeError: `trainable.vision_from_layer` leaves no layer.
    """
    wanted = recipe.trainable
    chosen: dict[str, nn.Module] = {}
    if wanted.language_model == "full":
        chosen["model.language_model"] = model.model.language_model
        chosen["lm_head"] = model.lm_head
    if wanted.projector == "full":
        chosen["model.multi_modal_projector"] = model.model.multi_modal_projector
    if wanted.vision_tower == "full":
        layers = _vision_layers(model, recipe)
        for name, module in model.model.vision_tower.named_modules(prefix="model.vision_tower"):
            layer = _layer_index(name)
            is_layer = layer is not None and name.endswith(f".layers.{layer}")
            is_before = name.rsplit(".", 1)[-1] in ("embeddings", "pre_layrnorm") and layer is None
            if (is_layer and layer in layers) or (is_before and wanted.vision_from_layer is None):
                chosen[name] = module
    return chosen


def lora_config(model: LlavaForCausalLM, recipe: Recipe) -> LoraConfig:
    """Return PEFT's config: targets confined to the parts that learn by LoRA, fully trained modules saved beside them.

    Raises:
        RecipeError: targets that match nothing, or an initialisation that changes weights of few bits.
    """
    arguments: dict[str, Any] = dict(recipe.lora.lora_arguments())
    asked = arguments.pop("target_modules", None) or _ALL_LINEAR
    only_layers = arguments.pop("layers_to_transform", None)  # PEFT ignores it for targets by full name
    arguments.pop("layers_pattern", None)
    init = arguments.get("init_lora_weights", True)
    targets: list[str] = []
    for part in ("language_model", "vision_tower"):
        if getattr(recipe.trainable, part) == "lora":
            names = _linear_names(model, part)
            if part == "vision_tower":
                names = [name for name in names if _layer_index(name) in _vision_layers(model, recipe)]
            elif only_layers is not None:
                kept = [only_layers] if isinstance(only_layers, int) else list(only_layers)
                names = [name for name in names if _layer_index(name) in kept]
            found = [name for name in names if _matches(name, asked)]
            if not found:
                within = "" if only_layers is None else f" in the layers lora.layers_to_transform={only_layers}"
                if not names:
                    raise RecipeError(
                        f"lora.layers_to_transform={only_layers}: {part} has no such layer; expected numbers from 0 to "
                        f"{max(_layer_index(name) or 0 for name in _linear_names(model, part))}."
                    )
                raise RecipeError(
                    f"lora.target_modules={asked}: matches no linear layer of {part}{within}; expected among "
                    f"{sorted({name.rsplit('.', 1)[-1] for name in _linear_names(model, part)})}. Leave lora.target_modules out "
                    "for all of them."
                )
            targets += found
    if str(init) in ("pissa", "olora") and any(bits_of(module) for module in model.modules()):
        raise RecipeError(
            f"lora.init_lora_weights: {init} changes the base's weights, which are stored in {recipe.quantization.bits} bit. Set "
            "lora.init_lora_weights=true, or quantization=none."
        )
    to_save = [*(arguments.pop("modules_to_save", None) or []), *fully_trained_modules(model, recipe)]
    return LoraConfig(task_type="CAUSAL_LM", target_modules=targets, modules_to_save=to_save or None, **arguments)


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


def _check_learnable(name: str, module: nn.Module, recipe: Recipe) -> None:
    quantized = next((inner for inner, child in module.named_modules(prefix=name) if bits_of(child)), None)
    if quantized is not None:
        part, bits = part_of(name), bits_of(module.get_submodule(quantized[len(name) + 1 :]))
        remedy = "" if part == "projector" else f"trainable.{part}=lora, or "
        raise RecipeError(
            f"trainable.{part}: is full, but {quantized} is stored in {bits} bit and cannot learn. Set {remedy}quantization=none."
        )


def _learns_with_adapter(name: str, parameter: nn.Parameter, how: dict[str, str], modules: tuple[str, ...]) -> bool:
    """Whether a weight of a PEFT model learns."""
    plain = name.removeprefix("base_model.model.")
    part = part_of(plain)
    if ".modules_to_save." in plain:
        module = plain.split(".modules_to_save.")[0]
        return how[part] == "lora" or module in modules
    if "lora_" in plain or "trainable_tokens_" in plain:
        return how[part] == "lora"
    return parameter.requires_grad and how[part] == "lora" and plain.endswith("bias")  # LoraConfig's bias=all|lora_only


def _with_adapter(model: LlavaForCausalLM, recipe: Recipe, modules: dict[str, nn.Module]) -> AdaptedLlava:
    """A new adapter, or the one `model.adapter` names; fully trained modules are copied into it in fp32."""
    for module in modules.values():
        module.float()  # so that nothing is rounded on the way into the copy
    with torch.random.fork_rng():
        torch.manual_seed(recipe.training.seed)
        if recipe.model.adapter:
            return _continued_adapter(model, recipe, tuple(modules))
        return AdaptedLlava(model, lora_config(model, recipe))


def _continued_adapter(model: LlavaForCausalLM, recipe: Recipe, modules: tuple[str, ...]) -> AdaptedLlava:
    """The adapter of an earlier run, to be trained further.

    Raises:
        RecipeError: it belongs to another base, or was not trained on the parts that should learn now.
    """
    source = str(recipe.model.adapter)
    folder = adapter_folder(source)
    if folder is None:
        raise RecipeError(
            f"model.adapter={source}: holds no adapter (adapter_config.json). Name a run that trained with LoRA; a whole model "
            "goes into model.name_or_path."
        )
    check_fingerprint(folder, model.name_or_path, recipe.model.revision)
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False
    _warn_of_other_shape(config, recipe, folder)
    missing = [name for name in modules if name not in (config.modules_to_save or [])]
    config.modules_to_save = [*(config.modules_to_save or []), *missing] or None
    adapted = AdaptedLlava(model, config)
    for part in ("language_model", "vision_tower"):
        has_lora = any("lora_" in name and part_of(name) == part for name, _ in adapted.named_parameters())
        found, wanted = "lora" if has_lora else "frozen", getattr(recipe.trainable, part)
        if has_lora != (wanted == "lora"):
            raise RecipeError(
                f"model.adapter={source}: has {'' if has_lora else 'no '}LoRA weights in the {part}, but trainable.{part} is "
                f"{wanted}. Set trainable.{part}={found} to go on with it, or model.name_or_path={source} to merge it and train "
                "a second adapter."
            )
    try:
        adapted.load_adapter(str(folder), "default", is_trainable=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise RecipeError(
            f"model.adapter={source}: does not fit the model: {reason} Name the base it was trained on."
        ) from error
    return adapted


def _warn_of_other_shape(config: LoraConfig, recipe: Recipe, folder: Path) -> None:
    """An adapter keeps its own shape; where the recipe says another one, that is said."""
    asked = recipe.lora.lora_arguments()
    for key in _SHAPE_KEYS:
        if key in asked and asked[key] != getattr(config, key):
            logger.warning(
                "model.adapter=%s was made with lora.%s=%s, which stays; the recipe's %s has no effect",
                folder,
                key,
                getattr(config, key),
                asked[key],
            )


def _vision_layers(model: LlavaForCausalLM, recipe: Recipe) -> range:
    """The tower's layers that learn: from `vision_from_layer` to the last one whose output is read."""
    selected = model.config.vision_feature_layer
    num_layers = model.config.vision_config.num_hidden_layers
    depth = max(
        layer if layer >= 0 else num_layers + 1 + layer
        for layer in ([selected] if isinstance(selected, int) else selected)
    )
    start = recipe.trainable.vision_from_layer or 0
    if not 0 <= start < depth:
        raise RecipeError(
            f"trainable.vision_from_layer: found {start}, expected 0 to {depth - 1}: the projector reads the output of layer "
            f"{depth - 1} (model.vision_feature_layer={selected} of {num_layers} layers), so later ones do not run."
        )
    return range(start, depth)


def _layer_index(name: str) -> int | None:
    found = re.search(r"\.layers\.(\d+)(?:\.|$)", name)
    return None if found is None else int(found[1])


def _linear_names(model: LlavaForCausalLM, part: str) -> list[str]:
    """Full names of a part's linear layers, quantised ones included, the head excluded."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or bits_of(module)) and module is not head and part_of(name) == part
    ]


def _matches(name: str, asked: str | Iterable[str]) -> bool:
    if asked == _ALL_LINEAR:
        return True
    if isinstance(asked, str):
        return re.fullmatch(asked, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in asked)
