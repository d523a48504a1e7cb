"""A model in the original LLaVA's layout: the language model with `mm_*` words in its config, the tower beside it.

Source: llava/model/llava_arch.py, multimodal_projector/builder.py and multimodal_encoder/ of haotian-liu/LLaVA, and
llava_qwen.py of LLaVA-VL/LLaVA-NeXT.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vir_hf import files
from vir_hf.errors import RecipeError
from vir_hf.exporting.plain import Plain
from vir_hf.exporting.tensors import write_tensors
from vir_hf.llava.portable import rope_in_old_words
from vir_hf.model.projector_files import to_original

# In the exported folder; the original opens any path that exists, so config.json names it by its absolute one.
TOWER_FOLDER = "vision_tower"
# The language models that the original's repositories extend: the words of their configs.
_CLASSES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}
# How an image becomes a square; the original has no third way.
_ASPECT_RATIOS = {"pad": "pad", "crop": "square"}
_SELECT_FEATURE = {"default": "patch", "full": "cls_patch"}
_TEXT = "language_model."
_TOWER = "vision_tower."
_PROJECTOR = "multi_modal_projector."
# Numbers of a text config that transformers 4 does not know.
_NOT_KNOWN = ("rope_parameters", "layer_types", "dtype")


def check_original(plain: Plain) -> None:
    """Raise unless the original's code would compute what this model computes.

    Raises:
        RecipeError: what it has no words for.
    """
    ratio, act = plain.image_aspect_ratio, plain.fields.get("projector_hidden_act", "gelu")
    why = None
    if plain.text["model_type"] not in _CLASSES:
        why = f"it has no class for a language model of type {plain.text['model_type']!r}, only for {sorted(_CLASSES)}"
    elif plain.vision["model_type"] != "clip_vision_model":
        why = f"its towers are CLIP's; this one is of type {plain.vision['model_type']!r}"
    elif len(plain.feature_layers) > 1:
        why = f"its projector reads one layer of the tower, not {len(plain.feature_layers)}"
    elif act != "gelu":
        why = f"its projectors use GELU; this one uses {act}"
    elif not plain.fields.get("multimodal_projector_bias", True):
        why = "its projectors have biases; this one has none"
    elif ratio not in _ASPECT_RATIOS:
        why = f"it makes an image a square by padding or a centre crop; this model was trained with {ratio!r}"
    if why is not None:
        raise RecipeError(
            f"--to llava: the original LLaVA cannot express this model: {why}. Export it --to transformers."
        )


def write_original(plain: Plain, folder: Path, place: Path) -> None:
    """Write a plain model in the original's layout into a staging folder.

    Args:
        place: where the folder will lie, which its config names as the tower's.

    Raises:
        RecipeError: as `check_original`.
    """
    check_original(plain)
    write_tensors(folder, _language_model_and_projector(plain))
    tower = folder / TOWER_FOLDER
    tower.mkdir()
    write_tensors(
        tower, ((name.removeprefix(_TOWER), value) for name, value in plain.tensors.items() if name.startswith(_TOWER))
    )
    vision = {**plain.vision, "architectures": ["CLIPVisionModel"]}
    files.write_json(tower / "config.json", vision)
    files.write_json(tower / "preprocessor_config.json", _clip_preprocessing(plain.processor.image_processor))
    files.write_json(folder / "config.json", original_config(plain, place / TOWER_FOLDER))
    generation = plain.folder / "generation_config.json"
    if generation.is_file():
        files.copy(generation, folder / generation.name)
    plain.processor.save_pretrained(folder)


def _language_model_and_projector(plain: Plain) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in plain.tensors.items():
        if name.startswith(_TEXT):
            yield name.removeprefix(_TEXT), value
    names = [name for name in plain.tensors if name.startswith(_PROJECTOR)]
    yield from to_original({name.removeprefix(_PROJECTOR): plain.tensors[name] for name in names}).items()


def original_config(plain: Plain, tower: Path) -> dict[str, Any]:
    """Return the config.json of the original's layout."""
    text = plain.text
    model_type, architecture = _CLASSES[text["model_type"]]
    known = {name: value for name, value in text.items() if name not in _NOT_KNOWN}
    return {
        **known,
        **rope_in_old_words(text),
        "model_type": model_type,
        "architectures": [architecture],
        "torch_dtype": plain.fields.get("dtype") or plain.fields.get("torch_dtype") or "float32",
        "tie_word_embeddings": bool(text.get("tie_word_embeddings") or plain.fields.get("tie_word_embeddings")),
        "use_mm_proj": True,
        "mm_vision_tower": str(tower),
        "mm_projector_type": plain.projector_type,
        "mm_hidden_size": plain.vision["hidden_size"],
        "mm_vision_select_layer": plain.feature_layers[0] - plain.vision["num_hidden_layers"] - 1,
        "mm_vision_select_feature": _SELECT_FEATURE[plain.fields["vision_feature_select_strategy"]],
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_patch_merge_type": "flat",
        "image_aspect_ratio": _ASPECT_RATIOS[plain.image_aspect_ratio],
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": text.get("max_position_embeddings", 2048),
        "unfreeze_mm_vision_tower": False,
    }


def _clip_preprocessing(image_processor: Any) -> dict[str, Any]:
    """What transformers' CLIPImageProcessor reads; the original pads before it."""
    edge = int(image_processor.crop_size["height"])
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": edge},
        "resample": int(image_processor.resample),
        "do_center_crop": True,
        "crop_size": {"height": edge, "width": edge},
        "do_rescale": True,
        "rescale_factor": image_processor.rescale_factor,
        "do_normalize": True,
        "image_mean": list(image_processor.image_mean),
        "image_std": list(image_processor.image_std),
        "do_convert_rgb": True,
    }
