# SPDX-License-Identifier: Apache-2.0
"""Modules that carry vision features into the language model's embedding space: recipe word -> class."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlavaConfig as NativeLlavaConfig
from transformers.activations import ACT2FN


def _vision_width(config: NativeLlavaConfig) -> int:
    layers = config.vision_feature_layer
    num_layers = 1 if isinstance(layers, int) else len(layers)
    return int(config.vision_config.hidden_size * num_layers)


class LinearProjector(nn.Module):
    """One linear layer, as in the first LLaVA. Source: https://huggingface.co/papers/2304.08485."""

    def __init__(self, config: NativeLlavaConfig):
        super().__init__()
        self.linear_1 = nn.Linear(
            _vision_width(config), config.text_config.hidden_size, bias=config.multimodal_projector_bias
        )

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """`(num_images, num_patches, vision_hidden)` -> `(num_images, num_patches, text_hidden)`."""
        return self.linear_1(image_features)


class Mlp2xProjector(nn.Module):
    """Two linear layers with an activation between, LLaVA-1.5's. Parameter names are transformers' own."""

    def __init__(self, config: NativeLlavaConfig):
        super().__init__()
        width, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(_vision_width(config), width, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width, bias=bias)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """`(num_images, num_patches, vision_hidden)` -> `(num_images, num_patches, text_hidden)`."""
        return self.linear_2(self.act(self.linear_1(image_features)))


class Mlp3xProjector(Mlp2xProjector):
    """Three linear layers with activations between."""

    def __init__(self, config: NativeLlavaConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.linear_3 = nn.Linear(width, width, bias=config.multimodal_projector_bias)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """`(num_images, num_patches, vision_hidden)` -> `(num_images, num_patches, text_hidden)`."""
        return self.linear_3(self.act(super().forward(image_features)))


PROJECTORS: dict[str, type[nn.Module]] = {
    "linear": LinearProjector,
    "mlp2x_gelu": Mlp2xProjector,
    "mlp3x_gelu": Mlp3xProjector,
}


def build_projector(config: NativeLlavaConfig, projector_type: str) -> nn.Module:
    """Return a new projector.

    Raises:
        ValueError: `projector_type` is not a key of `PROJECTORS`.
    """
    if projector_type not in PROJECTORS:
        raise ValueError(
            f"unknown projector_type {projector_type!r}; expected one of {sorted(PROJECTORS)}. "
            "Set model.projector_type in the recipe."
        )
    return PROJECTORS[projector_type](config)
