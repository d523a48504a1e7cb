"""A language model as llama.cpp reads it, under its own architecture.

Source: conversion/llama.py and conversion/qwen.py of ggml-org/llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vir_hf.errors import RecipeError
from vir_hf.exporting.gguf_file import GgufFile
from vir_hf.exporting.gguf_tokenizer import add_tokenizer
from vir_hf.exporting.plain import Plain

# transformers' model type -> llama.cpp's architecture. Mistral is Llama with a window, SmolLM is Llama.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_TEXT = "language_model."


def check_language_model(plain: Plain) -> None:
    """Raise unless llama.cpp computes what this language model computes.

    Raises:
        RecipeError: what it cannot express.
    """
    text, why = plain.text, None
    rope = rope_of(text)
    if text["model_type"] not in ARCHITECTURES:
        why = f"this exporter writes language models of type {', '.join(ARCHITECTURES)}, this one is {text['model_type']!r}"
    elif text.get("hidden_act", "silu") != "silu":
        why = f"its {ARCHITECTURES[text['model_type']]} has SiLU, this one {text['hidden_act']}"
    elif rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        why = f"positions of kind {rope['rope_type']!r} are not written"
    elif text["model_type"] == "llama" and float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
        why = "only a part of each head is turned"
    if why is not None:
        raise RecipeError(
            f"--to gguf: llama.cpp cannot express this model: {why}. Export it --to transformers or vllm."
        )


def rope_of(text: dict[str, Any]) -> dict[str, Any]:
    """Return how positions are turned: `rope_type`, `rope_theta` and what belongs to them."""
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    rope.setdefault("rope_theta", text.get("rope_theta", 10000.0))
    return rope


def context_length(text: dict[str, Any]) -> int:
    """Return how many tokens fit: no more than a sliding window, which llama.cpp's architecture does not have."""
    length, window = int(text["max_position_embeddings"]), text.get("sliding_window")
    return min(length, int(window)) if window and text.get("use_sliding_window", True) else length


def write_language_model(plain: Plain, path: Path, quantization: str) -> None:
    """Write the language model with its tokenizer and chat template."""
    text, arch = plain.text, ARCHITECTURES[plain.text["model_type"]]
    file = GgufFile(arch, quantization)
    _add_sizes(file.writer, text)
    table = plain.tensors[f"{_TEXT}model.embed_tokens.weight"]
    add_tokenizer(file.writer, plain, table.shape[0])
    for name, (shape, read) in language_model_tensors(plain).items():
        kept = "f32" if name == "rope_freqs.weight" else None
        file.add(name, shape, read, kept)
    file.write(path)


def _add_sizes(writer: Any, text: dict[str, Any]) -> None:
    heads = int(text["num_attention_heads"])
    head_dim = int(text.get("head_dim") or text["hidden_size"] // heads)
    writer.add_name("language model of a LLaVA")
    writer.add_context_length(context_length(text))
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(text.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_vocab_size(text["vocab_size"])
    rope = rope_of(text)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope.get("rope_type") == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def language_model_tensors(plain: Plain) -> dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]]:
    """Return the language model's tensors under llama.cpp's names: each with its shape and how it is read.

    Raises:
        RecipeError: a weight that llama.cpp has no name for.
    """
    import gguf

    text = plain.text
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[ARCHITECTURES[text["model_type"]]]
    names = gguf.get_tensor_name_map(arch, text["num_hidden_layers"])
    heads = int(text["num_attention_heads"])
    kv_heads = int(text.get("num_key_value_heads") or heads)
    is_tied = bool(text.get("tie_word_embeddings") or plain.fields.get("tie_word_embeddings"))
    found: dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]] = {}
    for stored in plain.tensors:
        if not stored.startswith(_TEXT):
            continue
        name = stored.removeprefix(_TEXT)
        if name == "lm_head.weight" and is_tied:
            continue
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise RecipeError(
                f"--to gguf: llama.cpp cannot express this model: its {arch.name.lower()} has no place for {name}. Export it "
                "--to transformers or vllm."
            )
        turned = (
            {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2]) if arch == gguf.MODEL_ARCH.LLAMA else None
        )

        def read(stored: str = stored, turned: int | None = turned) -> torch.Tensor:
            value = plain.tensors[stored]
            return value if turned is None else interleave(value, turned)

        found[theirs] = (tuple(plain.tensors[stored].shape), read)
    factors = llama3_factors(text)
    if factors is not None:
        found["rope_freqs.weight"] = (tuple(factors.shape), lambda: factors)
    return found


def interleave(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return a query or key projection whose rows stand as llama.cpp's `llama` turns them: pairs side by side.

    Args:
        weight: `(num_heads * head_dim, ...)`, where transformers pairs row i of a head with row i + head_dim / 2.
    """
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def llama3_factors(text: dict[str, Any]) -> torch.Tensor | None:
    """Return `(head_dim / 2,)`: by what Llama 3 slows each frequency; `None` for other kinds of positions."""
    rope = rope_of(text)
    if rope.get("rope_type") != "llama3":
        return None
    head_dim = int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(rope["original_max_position_embeddings"])
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(wavelengths > original / low, torch.full_like(wavelengths, factor), between)
    return torch.where(wavelengths < original / high, torch.ones_like(wavelengths), factors).float()
