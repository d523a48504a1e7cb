"""Tells transformers' Auto classes about the pair."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers import LlavaConfig as NativeLlavaConfig

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
    AutoImageProcessor.register(LlavaConfig, image_processor_classes={"pil": TilesImageProcessor}, exist_ok=True)
    AutoModelForCausalLM.register(NativeLlavaConfig, LlavaForCausalLM, exist_ok=True)
