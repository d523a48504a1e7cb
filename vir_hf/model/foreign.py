"""Checkpoints of other projects: whose a folder is, by the files and words in it and never by its name."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

# Whose checkpoint it is -> what `vir-hf import` makes of it.
LAYOUTS = {
    "llava": "a whole model in the original LLaVA's layout",
    "llava-lora": "an adapter of the original LLaVA, with non_lora_trainables.bin",
    "llava-projector": "a projector of the original LLaVA, mm_projector.bin",
    "tinyllava": "a whole model in TinyLLaVA's layout",
    "xtuner": "a projector of XTuner, and the adapters trained beside it",
    "llava-hf": "a model in the layout of llava-hf",
}
# `model_type` in the original's config.json -> the language model it extends. LLaVA-NeXT's repository has the same words.
ORIGINAL_MODEL_TYPES = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_mixtral": "mixtral",
    "llava_qwen": "qwen2",
    "llava_gemma": "gemma",
    "llava_mpt": "mpt",
}
NON_LORA_FILE, PROJECTOR_FILE = "non_lora_trainables.bin", "mm_projector.bin"
_OF_THE_ORIGINAL = ("mm_vision_tower", "mm_projector_type", "mm_hidden_size")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def layout_of(fields: Mapping[str, Any], names: Collection[str]) -> str | None:
    """Return the key of `LAYOUTS` that a checkpoint is in; `None` for one that these classes open, and for no checkpoint.

    Args:
        fields: its config.json, {} where there is none.
        names: its files, with `/` between folders.
    """
    has_weights = any(name in names for name in _WEIGHTS)
    if "connector_type" in fields and "llm_model_name_or_path" in fields:
        return "tinyllava"
    if any(word in fields for word in _OF_THE_ORIGINAL):
        if NON_LORA_FILE in names or "adapter_config.json" in names:
            return "llava-lora"
        return "llava-projector" if PROJECTOR_FILE in names and not has_weights else "llava"
    if PROJECTOR_FILE in names and not has_weights:
        return "llava-projector"
    if "projector/config.json" in names and not fields:
        return "xtuner"
    return None


def layout_of_folder(folder: Path) -> str | None:
    """Return `layout_of` a folder."""
    names = {path.relative_to(folder).as_posix() for path in [*folder.glob("*"), *folder.glob("*/*")]}
    return layout_of(read_fields(folder), names)


def read_fields(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Return a folder's config.json, or another JSON object in it; {} where there is none that can be read."""
    try:
        fields = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


def import_hint(name: str, fields: Mapping[str, Any] | None = None) -> str:
    """Return a sentence that says which import opens a checkpoint of another project; "" where none is needed.

    Args:
        fields: its config.json, of a name on the Hub.
    """
    layout = layout_of_folder(Path(name)) if Path(name).is_dir() else layout_of(fields or {}, ())
    if layout is None:
        return ""
    return f"It is {LAYOUTS[layout]}: `vir-hf import {name} OUT` makes a folder of it that opens here."
