"""The published architectures of the models that the packaged recipes name, for planning where no config can be fetched.

Numbers of the models' public `config.json`; they are used by `vir-hf plan` alone, and it says so.
"""

from __future__ import annotations

from typing import Any

_VICUNA_7B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
_LLAMA_3_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
_TINYLLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
_SMOLLM_135M: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
_CLIP_L_336: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_SIGLIP_SO400M_384: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
_LLAVA_15_7B: dict[str, Any] = {
    "model_type": "llava",
    "text_config": {**_VICUNA_7B, "vocab_size": 32064},
    "vision_config": _CLIP_L_336,
    "image_token_id": 32000,
    "image_seq_length": 576,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}

KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "lmsys/vicuna-7b-v1.5": _VICUNA_7B,
    "meta-llama/Llama-2-7b-hf": _VICUNA_7B,
    "meta-llama/Meta-Llama-3-8B": _LLAMA_3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA_3_8B,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _TINYLLAMA,
    "HuggingFaceTB/SmolLM-135M": _SMOLLM_135M,
    "HuggingFaceTB/SmolLM-135M-Instruct": _SMOLLM_135M,
    "openai/clip-vit-large-patch14-336": _CLIP_L_336,
    "google/siglip-so400m-patch14-384": _SIGLIP_SO400M_384,
    "llava-hf/llava-1.5-7b-hf": _LLAVA_15_7B,
}
