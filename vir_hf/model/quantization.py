"""4 and 8 bit: what bitsandbytes is told, and what it must be told afterwards."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from vir_hf.errors import RecipeError

if TYPE_CHECKING:
    from vir_hf.model.precision import Precision
    from vir_hf.recipe.load import Recipe

logger = logging.getLogger(__name__)

# What stays in 16 bit. Full names in memory: transformers ignores short ones and quantises tower, projector and head.
NOT_QUANTIZED = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
QUANTIZED_LAYERS = {"Linear4bit": 4, "Linear8bitLt": 8}


def quantization_config(recipe: Recipe, precision: Precision) -> BitsAndBytesConfig | None:
    """Return the bitsandbytes config, or `None`; on a machine without CUDA a recipe may ask to go without."""
    bits = recipe.quantization.bits
    if bits is None:
        return None
    if recipe.quantization.only_on_cuda and not torch.cuda.is_available():
        logger.warning("no CUDA GPU: loading without %s-bit quantisation (quantization.only_on_cuda)", bits)
        return None
    arguments = recipe.quantization.bitsandbytes_arguments()
    if bits == 4:
        arguments.setdefault("bnb_4bit_compute_dtype", precision.dtype)
    arguments.setdefault("llm_int8_skip_modules", list(NOT_QUANTIZED))
    return BitsAndBytesConfig(**arguments)


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return NF4 with double quantisation for the language model's linear layers alone."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(NOT_QUANTIZED),
    )


def for_language_model(config: BitsAndBytesConfig) -> BitsAndBytesConfig:
    """Return the config to load a language model alone with: its modules have shorter names there."""
    config = copy.deepcopy(config)
    skipped = config.llm_int8_skip_modules or list(NOT_QUANTIZED)
    config.llm_int8_skip_modules = [name.replace("model.language_model.", "model.", 1) for name in skipped]
    return config


def bits_of(module: nn.Module) -> int | None:
    """4 or 8 for a quantised layer, read off the layer itself; `None` for any other."""
    return QUANTIZED_LAYERS.get(type(module).__name__)


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer is stored in 4 or 8 bit."""
    return any(bits_of(module) for module in model.modules())


def check_quantization(model: PreTrainedModel, wanted: BitsAndBytesConfig | None) -> None:
    """Raise if what is quantised differs from what the recipe says; every linear layer is looked at.

    Args:
        wanted: what the model was loaded with; `None` if nothing is to be quantised.

    Raises:
        RecipeError: naming layers, what was expected of them and the remedy.
    """
    bits = None if wanted is None else 4 if wanted.load_in_4bit else 8
    skipped = [] if wanted is None else list(wanted.llm_int8_skip_modules or [])
    head = model.get_output_embeddings()
    wrong: dict[tuple[int | None, int | None], list[str]] = {}
    for name, module in model.named_modules():
        if not (isinstance(module, nn.Linear) or bits_of(module)):
            continue
        is_kept = any(f".{skip}." in f".{name}." for skip in skipped) or (module is head and "lm_head" in skipped)
        expected = None if is_kept else bits
        if bits_of(module) != expected:
            wrong.setdefault((bits_of(module), expected), []).append(name)
    for (found, expected), names in wrong.items():  # the first is enough
        raise RecipeError(
            f"quantization: {len(names)} layers ({names[0]} ...) are stored in {_bits(found)}, but the recipe says "
            f"{_bits(expected)}. {_remedy(names[0], found, expected, wanted is None)}"
        )


def _remedy(name: str, found: int | None, expected: int | None, nothing_asked: bool) -> str:
    if nothing_asked:
        return f"The checkpoint itself is quantised: set quantization={'nf4' if found == 4 else 'int8'}."
    if found is not None and expected is None:
        return (
            "Write full names of modules in memory into quantization.llm_int8_skip_modules, such as model.vision_tower, "
            "model.multi_modal_projector and lm_head, or leave it out."
        )
    if found is None:
        part = next((skip for skip in NOT_QUANTIZED if f"{name}.".startswith(f"{skip}.")), name)
        return (
            f"Of joined parts only the language model is quantised: leave quantization.llm_int8_skip_modules out, or add "
            f"{part} to it; to quantise more, name a whole model in model.name_or_path."
        )
    return "The checkpoint is quantised already: choose the quantization it was saved with."


def _bits(bits: int | None) -> str:
    return "16 or 32 bit" if bits is None else f"{bits} bit"


def keep_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in eval mode, which it does for good on CPUs with AVX512-BF16.

    After one evaluation the gradient would no longer pass through the repacked layers.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def adopt_quantization(model: PreTrainedModel, language_model: PreTrainedModel, config: BitsAndBytesConfig) -> None:
    """Mark a model joined from parts as quantised like its language model, for saving, PEFT, TRL and the Trainer.

    Args:
        model: the joined model; its tower and projector are moved to the language model's device.
        language_model: the part that was loaded in 4 or 8 bit.
        config: with the names that modules have in the joined model.
    """
    quantizer = language_model.hf_quantizer
    quantizer.quantization_config = config
    attributes: dict[str, Any] = {
        "hf_quantizer": quantizer,
        "is_quantized": True,
        "quantization_method": config.quant_method,
        "is_loaded_in_4bit": bool(config.load_in_4bit),
        "is_loaded_in_8bit": bool(config.load_in_8bit),
    }
    for name, value in attributes.items():
        setattr(model, name, value)
    for inner in (model.config.text_config, model.model.language_model.config):
        if hasattr(inner, "quantization_config"):
            del inner.quantization_config
    model.config.quantization_config = config
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True
    device = language_model.get_input_embeddings().weight.device
    model.model.vision_tower.to(device)
    model.model.multi_modal_projector.to(device)
    if getattr(language_model, "hf_device_map", None) is not None:
        model.hf_device_map = {"": device}
