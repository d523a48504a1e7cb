# SPDX-License-Identifier: Apache-2.0
"""The configuration of a LLaVA model whose projector may be any of `PROJECTORS`."""

from __future__ import annotations

from typing import ClassVar

from transformers import LlavaConfig as NativeLlavaConfig
from transformers import PreTrainedConfig


class LlavaConfig(NativeLlavaConfig):
    """transformers' `LlavaConfig` with one more choice, the projector.

    `projector_type` is a key of `projectors.PROJECTORS`. A model whose projector is the two-layer MLP is saved as
    plain `llava` instead, so this model type only appears on disk for projectors that transformers cannot express.
    """

    model_type = "vir_llava"
    # TRL reads the attribute from any config class that is not part of transformers.
    auto_map: ClassVar[dict[str, str]] = {}

    projector_type: str = "mlp2x_gelu"


NATIVE_PROJECTOR_TYPE = "mlp2x_gelu"


def projector_type_of(config: NativeLlavaConfig) -> str:
    """The projector a config asks for; a plain transformers config always means the two-layer MLP."""
    return getattr(config, "projector_type", NATIVE_PROJECTOR_TYPE)


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


def num_image_tokens(vision_config: PreTrainedConfig, strategy: str) -> int:
    """Return how many tokens of the language model an image takes: its patches, and a class token that is kept."""
    num_patches = (vision_config.image_size // vision_config.patch_size) ** 2
    return int(num_patches + (has_class_token(vision_config) and strategy == "full"))
