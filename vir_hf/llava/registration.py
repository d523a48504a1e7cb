"""Tells transformers' Auto classes about the pair."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers import LlavaConfig as NativeLlavaConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from .configuration_llava import LlavaConfig
from .modeling_llava import LlavaForCausalLM, LlavaModel
from .processing_llava import LlavaProcessor
from .processing_views import TilesImageProcessor


def register() -> None:
    """Make the Auto classes know the pair, and give native llava checkpoints a causal-LM class, which upstream lacks."""
    AutoConfig.register(LlavaConfig.model_type, LlavaConfig, exist_ok=True)
    AutoModel.register(LlavaConfig, LlavaModel, exist_ok=True)
    AutoModelForCausalLM.register(LlavaConfig, LlavaForCausalLM, exist_ok=True)
    AutoModelForImageTextToText.register(LlavaConfig, LlavaForCausalLM, exist_ok=True)
    AutoProcessor.register(LlavaConfig, LlavaProcessor, exist_ok=True)
    # Not through AutoImageProcessor, which would add the processors of transformers' config of the same class name.
    IMAGE_PROCESSOR_MAPPING.register(LlavaConfig, {"pil": TilesImageProcessor}, exist_ok=True)
    AutoModelForCausalLM.register(NativeLlavaConfig, LlavaForCausalLM, exist_ok=True)
