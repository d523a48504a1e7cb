"""mmproj: a vision tower and its projector as llama.cpp's clip.cpp reads them.

Source: load_hparams and load_tensors in tools/mtmd/clip.cpp, clip_graph_llava in tools/mtmd/models/llava.cpp of
ggml-org/llama.cpp.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from vir_hf.errors import RecipeError
from vir_hf.exporting.gguf_file import GgufFile
from vir_hf.exporting.plain import Plain

# The colour that llama.cpp pads an image to a square with, and the resampling it always uses (Pillow's number).
PADDING, BICUBIC = (122, 116, 104), 3
# Activations of the tower -> the key that says so. Its GELU is the tanh one, which exact GELU is within 1e-3 of.
_ACTIVATIONS = {
    "quick_gelu": None,
    "gelu_pytorch_tanh": "use_gelu",
    "gelu": "use_gelu",
    "silu": "use_silu",
    "swish": "use_silu",
}
_TOWER = "vision_tower.vision_model."
_TOWER_NAMES = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
# In fp32: what llama.cpp adds to, or concatenates with, fp32 activations.
_WIDE = ("v.class_embd", "v.position_embd.weight")


def check_vision(plain: Plain, accepts_padding: bool, accepts_class_token: bool = False) -> None:
    """Raise unless llama.cpp would see what this model sees.

    Args:
        accepts_padding: images may become squares in another way.
        accepts_class_token: it is a llama.cpp that puts CLIP's class token first.

    Raises:
        RecipeError: what it cannot express.
    """
    why = None
    layers, vision = plain.feature_layers, plain.vision
    if plain.projector_type != "mlp2x_gelu":
        why = f"its projector `mlp` is two layers with GELU between them; this one is {plain.projector_type}"
    elif plain.fields.get("projector_hidden_act", "gelu") not in ("gelu", "gelu_pytorch_tanh"):
        why = f"its projector applies GELU; this one {plain.fields['projector_hidden_act']}"
    elif vision["hidden_act"] not in _ACTIVATIONS:
        why = f"it has no activation {vision['hidden_act']!r} for a tower, only {sorted(_ACTIVATIONS)}"
    elif vision["model_type"] == "clip_vision_model" and plain.fields["vision_feature_select_strategy"] != "default":
        why = "it always drops CLIP's class token; this model keeps it"
    elif layers != sorted(set(layers)) or min(layers) < 1:
        why = f"it reads a tower's layers in their order, each once; this projector reads {layers}"
    if why is not None:
        raise RecipeError(
            f"--to gguf: llama.cpp cannot express this model: {why}. Export it --to transformers or vllm."
        )
    if plain.vision["model_type"] == "clip_vision_model" and not accepts_class_token:
        # https://github.com/ggml-org/llama.cpp/pull/25844, open; of 2025-05 to 2026-10 at least
        raise RecipeError(
            "--to gguf: llama.cpp misreads every CLIP tower since May 2025: it puts the class token behind the patches, so each "
            "patch has its neighbour's position and the first is lost (ggml-org/llama.cpp#25814). SigLIP towers are read right. "
            "--accept-class-token writes it all the same, for a llama.cpp with the fix of #25844."
        )
    way = how_squares_differ(plain)
    if way is not None and not accepts_padding:
        raise RecipeError(
            f"--to gguf: llama.cpp makes an image a square in its own way: {way}. Images that are squares already look the "
            "same to both. --accept-padding exports it all the same."
        )


def how_squares_differ(plain: Plain) -> str | None:
    """Return how llama.cpp makes another square of an image than this model was trained with; `None` if it does not."""
    image_processor = plain.processor.image_processor
    colour = tuple(int(value * 255) for value in image_processor.image_mean)
    if plain.image_aspect_ratio != "pad":
        return f"it pads, this model was trained with {plain.image_aspect_ratio!r}"
    if int(image_processor.resample) != BICUBIC:
        return f"it resamples by bicubic interpolation, this model with Pillow's filter {int(image_processor.resample)}"
    if colour != PADDING:
        return f"it pads with {PADDING}, this model was trained with {colour}"
    return None


def write_mmproj(plain: Plain, path: Path, quantization: str) -> None:
    """Write tower and projector; layers after the last one that is read are left out, and the last norm with them."""
    vision, image_processor = plain.vision, plain.processor.image_processor
    # Block-quantised towers gain little and lose much; the projector of a 16 bit file is 16 bit.
    file = GgufFile("clip", "f32" if quantization == "f32" else "f16")
    writer, last = file.writer, max(plain.feature_layers)
    writer.add_name("vision tower and projector")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_llava_projector", True)  # read by older versions
    writer.add_string("clip.projector_type", "mlp")
    activation = _ACTIVATIONS[vision["hidden_act"]]
    writer.add_bool("clip.use_gelu", activation == "use_gelu")
    writer.add_bool("clip.use_silu", activation == "use_silu")
    for key, value in {
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "embedding_length": vision["hidden_size"],
        "feed_forward_length": vision["intermediate_size"],
        "block_count": last,
        "projection_dim": plain.text["hidden_size"],
        "attention.head_count": vision["num_attention_heads"],
    }.items():
        writer.add_uint32(f"clip.vision.{key}", int(value))
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", float(vision["layer_norm_eps"]))
    writer.add_array("clip.vision.image_mean", [float(value) for value in image_processor.image_mean])
    writer.add_array("clip.vision.image_std", [float(value) for value in image_processor.image_std])
    # Without it one layer less than block_count would run.
    writer.add_array("clip.vision.feature_layer", plain.feature_layers)
    for name, value in mmproj_tensors(plain).items():
        kept = "f32" if name in _WIDE or value.ndim < 2 else None
        file.add(name, tuple(value.shape), lambda value=value: value, kept)  # type: ignore[misc]
    file.write(path)


def mmproj_tensors(plain: Plain) -> dict[str, torch.Tensor]:
    """Return the tensors of tower and projector under llama.cpp's names."""
    last, found = max(plain.feature_layers), {}
    # llama.cpp takes up and down for swapped, as an old script wrote them, where the width fits the down one.
    is_swapped = plain.vision["intermediate_size"] == plain.vision["hidden_size"]
    for name in plain.tensors:
        short = name.removeprefix(_TOWER)
        layer = _LAYER.fullmatch(short)
        if name.startswith(_TOWER) and short in _TOWER_NAMES:
            found[_TOWER_NAMES[short]] = plain.tensors[name]
        elif name.startswith(_TOWER) and layer and int(layer[1]) < last:
            word = _LAYER_NAMES[layer[2]]
            if is_swapped:
                word = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}.get(word, word)
            found[f"v.blk.{layer[1]}.{word}.{layer[3]}"] = plain.tensors[name]
    for ours, theirs in (("linear_1", 0), ("linear_2", 2)):
        weight = plain.tensors[f"multi_modal_projector.{ours}.weight"]
        found[f"mm.{theirs}.weight"] = weight
        bias: Any = plain.tensors.get(f"multi_modal_projector.{ours}.bias")
        found[f"mm.{theirs}.bias"] = torch.zeros(weight.shape[0]) if bias is None else bias
    return found
