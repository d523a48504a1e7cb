"""The configuration of a LLaVA model whose projector may be any of `PROJECTORS`."""

from __future__ import annotations

from typing import ClassVar

from transformers import LlavaConfig as NativeLlavaConfig


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
