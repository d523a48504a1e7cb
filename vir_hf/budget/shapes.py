"""The sizes of a recipe's model, read off the model itself on the meta device: configs are fetched, weights are not.

The weights that learn are chosen by the very functions that training uses, so the counts are training's own.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig

from vir_hf.errors import RecipeError
from vir_hf.llava.configuration_llava import LlavaConfig, select_strategy
from vir_hf.llava.configuration_llava import num_image_tokens as tokens_of_image
from vir_hf.llava.modeling_llava import LlavaForCausalLM
from vir_hf.llava.views import views_of_config
from vir_hf.model.configs import check_vision_tower, check_whole_model, read_config
from vir_hf.model.language_models import judge_language_model
from vir_hf.model.quantization import NOT_QUANTIZED
from vir_hf.model.trainable import make_trainable, part_of

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe

logger = logging.getLogger(__name__)

# What each linear layer of a block reads: layers that read the same tensor keep one copy of it for the backward pass.
_READS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "Wqkv"), "attention input"),
    **dict.fromkeys(("o_proj", "out_proj", "dense"), "attention output"),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "fc1"), "mlp input"),
    **dict.fromkeys(("down_proj", "fc2"), "mlp product"),
}


@dataclass(frozen=True)
class LinearShape:
    """One linear layer of a block: what it reads, its size and how it learns (`frozen`, `lora` or `full`)."""

    reads: str
    in_features: int
    out_features: int
    how: str = "frozen"


@dataclass(frozen=True)
class BlockShape:
    """One block of a language model or a tower, and how many of them there are.

    Attributes:
        num_blocks: all of them; `num_run` of them run (a tower stops at the selected layer).
        mlp_size: width between the two halves of the MLP; of a mixture of experts the width that one token passes.
        is_gated: the MLP multiplies an activated half with another (SwiGLU).
        num_mlp_saved: tensors of `mlp_size` that the MLP's activation keeps.
        num_trained: blocks whose weights learn; a tower may learn from one layer upwards.
    """

    num_blocks: int
    num_run: int
    hidden_size: int
    query_size: int
    key_size: int
    mlp_size: int
    num_heads: int
    is_gated: bool
    num_mlp_saved: int
    is_rms_norm: bool
    trains_norms: bool
    linears: tuple[LinearShape, ...]
    num_trained: int = 0

    @property
    def weight_count(self) -> int:
        return sum(linear.in_features * linear.out_features for linear in self.linears)

    @property
    def largest_linear(self) -> int:
        return max((linear.in_features * linear.out_features for linear in self.linears), default=0)


@dataclass(frozen=True)
class WeightGroup:
    """Weights of one part in one storage: `bits` each, `num_weights` of them, all learning or none."""

    part: str
    storage: str
    num_weights: int
    num_bytes: int
    is_trained: bool
    is_adapter: bool = False
    is_quantised: bool = False


@dataclass(frozen=True)
class ModelShape:
    """Everything the memory and time of a run depend on, of its model.

    Attributes:
        rank: of the adapters, 0 without.
        num_tower_tokens: of one view.
        num_image_tokens: of one image with as many views as it may have, `views_per_image`.
        file_dtype: of the weights on disk, where the config says it.
        sources: where each config was read.
    """

    weights: tuple[WeightGroup, ...]
    text: BlockShape
    vision: BlockShape
    vocab_size: int
    image_size: int
    num_tower_tokens: int
    num_image_tokens: int
    vision_width: int
    views_per_image: int
    head_is_trained: bool
    rank: int
    file_dtype: str | None
    sources: tuple[str, ...]

    def count(self, *, is_trained: bool | None = None, part: str | None = None) -> int:
        """Number of weights, all or those that (do not) learn."""
        return sum(group.num_weights for group in self._chosen(is_trained, part))

    def bytes(self, *, is_trained: bool | None = None, part: str | None = None) -> int:
        """Bytes of weights as loaded."""
        return sum(group.num_bytes for group in self._chosen(is_trained, part))

    def _chosen(self, is_trained: bool | None, part: str | None) -> list[WeightGroup]:
        return [
            group for group in self.weights if is_trained in (None, group.is_trained) and part in (None, group.part)
        ]


def describe(recipe: Recipe, dtype: torch.dtype) -> ModelShape:
    """Return the sizes of the recipe's model as it is before the first step.

    Args:
        dtype: of weights that do not learn and are not quantised; learning ones are fp32.

    Raises:
        RecipeError: a config that cannot be fetched, or a model family that cannot be planned for.
    """
    sections = recipe.to_dict()
    key = json.dumps([sections[name] for name in ("model", "trainable", "lora", "quantization")], sort_keys=True)
    if (key, dtype) not in _DESCRIBED:
        _DESCRIBED[key, dtype] = _describe(recipe, dtype)
    return _DESCRIBED[key, dtype]


# Looking for the smallest change asks for the same model many times.
_DESCRIBED: dict[tuple[str, torch.dtype], ModelShape] = {}


def _describe(recipe: Recipe, dtype: torch.dtype) -> ModelShape:
    config, sources = load_configs(recipe)
    with torch.device("meta"):
        model = LlavaForCausalLM(config).to(dtype)
    quantised = _quantised_weights(model, recipe)
    trained = _quietly_make_trainable(model, recipe)
    weights = _weight_groups(trained, quantised, recipe)
    plain = trained.get_base_model() if hasattr(trained, "get_base_model") else trained
    inner = plain.model
    tower = getattr(inner.vision_tower, "vision_model", inner.vision_tower)
    text, vision = config.text_config, config.vision_config
    layers = config.vision_feature_layer
    selected = [layers] if isinstance(layers, int) else list(layers)
    depths = [layer if layer >= 0 else vision.num_hidden_layers + 1 + layer for layer in selected]
    head = plain.get_output_embeddings()
    return ModelShape(
        weights=weights,
        text=_block(list(inner.language_model.layers), text, text.num_hidden_layers),
        vision=_block(list(tower.encoder.layers), vision, max(depths)),
        vocab_size=head.weight.shape[0],
        image_size=vision.image_size,
        num_tower_tokens=tokens_of_image(vision, "full"),
        num_image_tokens=views_of_config(config).most_tokens,
        vision_width=vision.hidden_size * len(selected),
        views_per_image=views_of_config(config).most_views,
        head_is_trained=bool(head.weight.requires_grad),
        file_dtype=str(text.dtype).removeprefix("torch.") if getattr(text, "dtype", None) else None,
        rank=int(recipe.lora.arguments.get("r") or 8) if recipe.lora.arguments else 0,
        sources=sources,
    )


def load_configs(recipe: Recipe) -> tuple[LlavaConfig, tuple[str, ...]]:
    """Return the config of the model the recipe would load, and where each part of it was read.

    Raises:
        RecipeError: neither fetched nor known, or not a model that can be joined.
    """
    wanted = recipe.model
    options: dict[str, Any] = {"trust_remote_code": wanted.trust_remote_code}
    if wanted.name_or_path:
        config, source = read_config(
            wanted.name_or_path, "model.name_or_path", revision=wanted.revision, **options, takes_known=True
        )
        if source.endswith("config.json"):
            check_whole_model(config, wanted.name_or_path, "model.name_or_path", wanted.revision)
        return config, (source,)
    if not wanted.language_model or not wanted.vision_tower:
        raise RecipeError(
            f"experiment {recipe.experiment.name}: names no model to plan for. Set model.name_or_path, or model.language_model "
            "and model.vision_tower."
        )
    text, text_source = read_config(
        wanted.language_model, "model.language_model", revision=wanted.revision, **options, takes_known=True
    )
    judge_language_model(text, wanted.language_model)
    text = copy.deepcopy(text)
    vision, vision_source = read_config(wanted.vision_tower, "model.vision_tower", **options, takes_known=True)
    check_vision_tower(vision, wanted.vision_tower)
    vision = getattr(vision, "vision_config", vision)
    try:
        strategy = select_strategy(vision, wanted.vision_feature_select_strategy)
        num_tokens = tokens_of_image(vision, strategy, wanted.pixel_shuffle)
    except ValueError as error:
        raise RecipeError(f"model.vision_tower={wanted.vision_tower}: {error}") from error
    # The image token is a new row, and rows are added up to a multiple of 64.
    image_token_id = text.vocab_size
    text.vocab_size = -(-(text.vocab_size + 1) // 64) * 64
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image_token_id,
        image_seq_length=num_tokens,
        vision_feature_layer=wanted.vision_feature_layer,
        vision_feature_select_strategy=strategy,
        projector_type=wanted.projector_type,
        tiling=wanted.tiling,
        max_tiles=wanted.tiles,
        pixel_shuffle=wanted.pixel_shuffle,
        tie_word_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
    )
    return config, (text_source, vision_source)


def num_image_tokens(recipe: Recipe) -> int:
    """Return how many tokens an image takes, at most where it depends on its size."""
    return views_of_config(load_configs(recipe)[0]).most_tokens


def _quantised_weights(model: LlavaForCausalLM, recipe: Recipe) -> set[int]:
    """Identities of the weights that bitsandbytes would replace: the language model's linear layers, without the head."""
    if recipe.quantization.bits is None:
        return set()
    skipped = recipe.quantization.arguments.get("llm_int8_skip_modules") or NOT_QUANTIZED
    return {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(name == word or name.startswith(f"{word}.") for word in skipped)
    }


def _quietly_make_trainable(model: LlavaForCausalLM, recipe: Recipe) -> Any:
    """Apply the recipe's `trainable` and `lora` sections as training does; values are not computed, only shapes."""
    arguments = dict(recipe.lora.arguments)
    if arguments.get("init_lora_weights") not in (None, True, False, "gaussian"):
        arguments["init_lora_weights"] = True  # the others decompose the weights, which a meta tensor has none of
    # No adapter and no projector is loaded: their values would land in meta tensors.
    model_section = replace(recipe.model, adapter=None, pretrained_projector=None)
    recipe = replace(recipe, model=model_section, lora=replace(recipe.lora, arguments=arguments))
    said = logging.getLogger("vir_hf.model.trainable")
    was_disabled, said.disabled = said.disabled, True
    try:
        # The device is said again because PEFT would make (and fill) its adapters on the CPU.
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            return make_trainable(model, recipe)
    finally:
        said.disabled = was_disabled


def _weight_groups(model: nn.Module, quantised: set[int], recipe: Recipe) -> tuple[WeightGroup, ...]:
    """Count every weight once, by part, storage and whether it learns."""
    counts: dict[tuple[str, str, bool, bool, bool], list[float]] = {}
    arguments = recipe.quantization.arguments
    for name, parameter in model.named_parameters():
        part = part_of(name)
        storage, size = str(parameter.dtype).removeprefix("torch."), float(parameter.element_size())
        is_quantised = id(parameter) in quantised and not parameter.requires_grad
        if is_quantised:
            storage, size = _quantised_storage(recipe.quantization.bits, arguments)
        key = (part, storage, parameter.requires_grad, "lora_" in name, is_quantised)
        group = counts.setdefault(key, [0, 0.0])
        group[0] += parameter.numel()
        group[1] += parameter.numel() * size
    return tuple(
        WeightGroup(part, storage, int(number), round(size), *flags)
        for (part, storage, *flags), (number, size) in counts.items()
    )


def _quantised_storage(bits: int | None, arguments: dict[str, Any]) -> tuple[str, float]:
    """Name and bytes a weight of bitsandbytes' formats.

    4 bit: half a byte, and a scale for every 64 weights: fp32, or with double quantisation one byte and one fp32 for
    every 256 of those. 8 bit: one byte; its scales (a row each) are too few to count.
    """
    if bits == 8:
        return "int8", 1.0
    name = str(arguments.get("bnb_4bit_quant_type") or "fp4")
    if arguments.get("bnb_4bit_use_double_quant"):
        return f"{name} (double)", 0.5 + 1 / 64 + 4 / (64 * 256)
    return name, 0.5 + 4 / 64


def _block(layers: list[nn.Module], config: PretrainedConfig, num_run: int) -> BlockShape:
    """Read the shape of a stack of blocks off the last one that runs."""
    block = layers[num_run - 1]
    wrapped = getattr(block, "modules_to_save", None)
    if wrapped is not None:  # PEFT keeps the frozen original beside the copy that learns
        block = next(iter(wrapped.children()))
    linears = tuple(_linears(block))
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    norms = [module for name, module in block.named_modules() if "norm" in name.rsplit(".", 1)[-1].lower()]
    num_trained = sum(any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers)
    experts = getattr(config, "num_experts_per_tok", None)
    mlp_size = getattr(config, "intermediate_size", 4 * config.hidden_size)
    if experts:
        mlp_size = experts * (getattr(config, "moe_intermediate_size", None) or mlp_size)
    is_gated = any(name.endswith(("gate_proj", "gate_up_proj")) for name, _ in block.named_modules())
    # A gate keeps its input, its activated value and what it is multiplied with; quick_gelu is no single operation and
    # keeps its input and a sigmoid; the others keep their input.
    is_quick = getattr(config, "hidden_act", "") == "quick_gelu"
    return BlockShape(
        num_blocks=len(layers),
        num_run=num_run,
        hidden_size=config.hidden_size,
        query_size=heads * head_size,
        key_size=key_heads * head_size,
        mlp_size=mlp_size,
        num_heads=heads,
        is_gated=is_gated,
        num_mlp_saved=3 if is_gated else 2 if is_quick else 1,
        is_rms_norm=not any(isinstance(module, nn.LayerNorm) for module in norms),
        trains_norms=any(parameter.requires_grad for norm in norms for parameter in norm.parameters()),
        linears=linears,
        num_trained=num_trained,
    )


def _linears(block: nn.Module) -> list[LinearShape]:
    """The linear layers of one block, adapters counted as how their base layer learns."""
    found = []
    for name, module in block.named_modules():
        base = getattr(module, "base_layer", None)
        is_adapted = isinstance(base, nn.Linear)
        if not is_adapted and (not isinstance(module, nn.Linear) or "lora_" in name or name.endswith("base_layer")):
            continue
        linear: Any = base if is_adapted else module
        how = "lora" if is_adapted else "full" if linear.weight.requires_grad else "frozen"
        reads = _READS.get(name.rsplit(".", 1)[-1], name)
        found.append(LinearShape(reads, linear.in_features, linear.out_features, how))
    return found
