# SPDX-License-Identifier: Apache-2.0
"""The configuration of a LLaVA model whose projector may be any of `PROJECTORS`, and whose images may be cut into tiles."""

from __future__ import annotations

from typing import ClassVar

from transformers import LlavaConfig as NativeLlavaConfig
from transformers import PreTrainedConfig


class LlavaConfig(NativeLlavaConfig):
    """transformers' `LlavaConfig` with more choices.

    A model that makes none of them (`is_native`) is saved as plain `llava` instead, so this model type only appears on disk for
    what transformers cannot express.

    Attributes:
        projector_type: a key of `projectors.PROJECTORS`.
        tiling: `"none"`, or `"tiles"`: tiles of the tower's size and a view of the whole, see `views.Tiles`.
        max_tiles: at most so many tiles an image, the view of the whole not counted.
        pixel_shuffle: blocks of so many by so many patches become one token.
    """

    model_type = "vir_llava"
    # TRL reads the attribute from any config class that is not part of transformers.
    auto_map: ClassVar[dict[str, str]] = {}

    projector_type: str = "mlp2x_gelu"
    tiling: str = "none"
    max_tiles: int = 0
    pixel_shuffle: int = 1


NATIVE_PROJECTOR_TYPE = "mlp2x_gelu"


def projector_type_of(config: NativeLlavaConfig) -> str:
    """The projector a config asks for; a plain transformers config always means the two-layer MLP."""
    return getattr(config, "projector_type", NATIVE_PROJECTOR_TYPE)


def is_native(config: NativeLlavaConfig) -> bool:
    """Whether transformers' own LLaVA can express the model: the two-layer MLP over one view, a token for every patch."""
    has_views = getattr(config, "tiling", "none") != "none" or getattr(config, "pixel_shuffle", 1) != 1
    return projector_type_of(config) == NATIVE_PROJECTOR_TYPE and not has_views


# Model types of vision towers: whether the first of a tower's tokens stands for the whole image and not for a patch of it.
HAS_CLASS_TOKEN = {"clip": True, "clip_vision_model": True, "siglip": False, "siglip_vision_model": False}


def has_class_token(vision_config: PreTrainedConfig) -> bool:
    """Whether a tower puts a class token before its patches: CLIP's does, SigLIP's does not.

    Raises:
        ValueError: it is the config of no tower that is known.
    """
    if vision_config.model_type not in HAS_CLASS_TOKEN:
        raise ValueError(
            f"a vision tower of type {vision_config.model_type!r} is not known; expected one of {sorted(HAS_CLASS_TOKEN)}."
        )
    return HAS_CLASS_TOKEN[vision_config.model_type]


def select_strategy(vision_config: PreTrainedConfig, wanted: str | None = None) -> str:
    """Return what LLaVA's configs call the strategy: `"default"` drops the first token, `"full"` keeps all.

    Args:
        wanted: a strategy to take as it is; `None` or `"auto"` drops a class token and nothing else.

    Raises:
        ValueError: `"default"` for a tower without a class token, of which it would drop the first patch.
    """
    if wanted == "default" and not has_class_token(vision_config):
        raise ValueError(
            f"vision_feature_select_strategy=default drops a tower's first token, but {vision_config.model_type} has no class "
            "token, so the image would lose its first patch. Use full, or auto."
        )
    return wanted if wanted in ("default", "full") else "default" if has_class_token(vision_config) else "full"


def num_image_tokens(vision_config: PreTrainedConfig, strategy: str, pixel_shuffle: int = 1) -> int:
    """Return how many tokens of the language model one view takes: its patches, and a class token that is kept.

    Args:
        pixel_shuffle: blocks of so many by so many patches become one token.

    Raises:
        ValueError: blocks that do not divide the patches, or a class token that belongs to no block.
    """
    side = vision_config.image_size // vision_config.patch_size
    keeps_class_token = has_class_token(vision_config) and strategy == "full"
    if pixel_shuffle > 1 and (side % pixel_shuffle or keeps_class_token):
        fitting = ", ".join(str(size) for size in (1, 2, 3, 4) if side % size == 0)
        why = "a class token is kept, which belongs to no block" if keeps_class_token else f"{side} by {side} patches"
        raise ValueError(
            f"pixel_shuffle={pixel_shuffle} joins blocks of {pixel_shuffle} by {pixel_shuffle} patches, and the tower has {why}. "
            f"Set model.pixel_shuffle to one of {fitting}{' and drop the class token' if keeps_class_token else ''}."
        )
    return int((side // pixel_shuffle) ** 2 + keeps_class_token)
