# SPDX-License-Identifier: Apache-2.0
"""Modules that carry vision features into the language model's embedding space: recipe word -> class."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import LlavaConfig as NativeLlavaConfig
from transformers.activations import ACT2FN

from .views import ImageViews


def _vision_width(config: NativeLlavaConfig) -> int:
    layers = config.vision_feature_layer
    num_layers = 1 if isinstance(layers, int) else len(layers)
    return int(config.vision_config.hidden_size * num_layers)


class MlpProjector(nn.Module):
    """Linear layers with activations between; the parameter names are those of transformers' projector.

    A model with `pixel_shuffle` joins blocks of patches first. One that cuts images into tiles has a learned mark for every view:
    that of the whole, or the sum of its row's and its column's. It stands before the view's tokens, and is added to each of them,
    so that one attention finds what is at a place.
    """

    num_layers = 2

    def __init__(self, config: NativeLlavaConfig):
        super().__init__()
        self.shuffle = int(getattr(config, "pixel_shuffle", 1))
        self.max_tiles = int(config.max_tiles) if getattr(config, "tiling", "none") == "tiles" else 0
        width, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        in_width = _vision_width(config) * self.shuffle**2
        for number in range(1, self.num_layers + 1):
            self.add_module(f"linear_{number}", nn.Linear(in_width if number == 1 else width, width, bias=bias))
        if self.num_layers > 1:
            self.act = ACT2FN[config.projector_hidden_act]
        if self.max_tiles:
            # About as large as what the layers put out at first, so that neither drowns the other.
            scale = 0.5 * config.text_config.initializer_range * math.sqrt(width)
            self.marks = nn.Parameter(torch.randn(1 + 2 * self.max_tiles, width) * scale)

    def forward(self, image_features: torch.Tensor, images: Sequence[ImageViews] | None = None) -> torch.Tensor:
        """`(num_views, num_patches, vision_hidden)` -> `(num_views, num_tokens, text_hidden)`, or `(all tokens, text_hidden)`.

        Args:
            images: what each image became, in order, where images are cut into views: then the second is returned, with marks.
        """
        hidden_states = self._project(image_features)
        if self.max_tiles:
            images = images or [ImageViews(0)] * len(hidden_states)
            marks = self._marks_of(images).to(hidden_states.dtype)
            hidden_states = torch.cat([marks, hidden_states + marks], dim=1)
        return hidden_states if images is None else hidden_states.flatten(0, 1)

    def _project(self, image_features: torch.Tensor) -> torch.Tensor:
        layers: list[nn.Module] = [getattr(self, f"linear_{number}") for number in range(1, self.num_layers + 1)]
        hidden_states: torch.Tensor = layers[0](shuffle_patches(image_features, self.shuffle))
        for layer in layers[1:]:
            hidden_states = layer(self.act(hidden_states))
        return hidden_states

    def _marks_of(self, images: Sequence[ImageViews]) -> torch.Tensor:
        """`(num_views, 1, text_hidden)`; one lookup in one table, so that whatever is shown, all of it has a gradient."""
        device, first, second = self.marks.device, [], []
        for image in images:
            rows, columns = image.rows, image.columns
            first += [1 + row for row in range(rows) for _ in range(columns)] + [0]
            second += [1 + self.max_tiles + column for _ in range(rows) for column in range(columns)] + [0]
        rows_of, columns_of = torch.tensor(first, device=device), torch.tensor(second, device=device)
        is_tile = (rows_of > 0).to(self.marks.dtype).unsqueeze(-1)
        return (self.marks[rows_of] + is_tile * self.marks[columns_of]).unsqueeze(1)


def shuffle_patches(features: torch.Tensor, block: int) -> torch.Tensor:
    """`(n, side * side, width)` -> `(n, (side / block) ** 2, width * block ** 2)`: a block's patches side by side.

    Source: pixel shuffle as in Idefics3, https://huggingface.co/papers/2408.12637.
    """
    if block == 1:
        return features
    num_views, num_patches, width = features.shape
    side = math.isqrt(num_patches)
    new = side // block
    features = features.view(num_views, new, block, new, block, width).transpose(2, 3)
    return features.reshape(num_views, new * new, block * block * width)


class LinearProjector(MlpProjector):
    """One linear layer, as in the first LLaVA. Source: https://huggingface.co/papers/2304.08485."""

    num_layers = 1


class Mlp2xProjector(MlpProjector):
    """Two linear layers, LLaVA-1.5's. Source: https://huggingface.co/papers/2310.03744."""


class Mlp3xProjector(MlpProjector):
    """Three linear layers."""

    num_layers = 3


class Mlp4xProjector(MlpProjector):
    """Four linear layers."""

    num_layers = 4


class AnyResProjector(MlpProjector):
    """LLaVA-NeXT's: the two-layer MLP, and a learned newline behind every row of the patches of an image's tiles.

    In transformers the newline lies beside the projector; here inside, since it learns and is saved with it.
    """

    def __init__(self, config: NativeLlavaConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.image_newline = nn.Parameter(torch.randn(width) / math.sqrt(width))

    def forward(self, image_features: torch.Tensor, images: Sequence[ImageViews] | None = None) -> torch.Tensor:
        """`(num_views, num_patches, vision_hidden)` -> `(all tokens, text_hidden)`; without `images` as the parent class."""
        hidden_states = self._project(image_features)
        if images is None:
            return hidden_states + 0 * self.image_newline  # which has a gradient on every rank
        views = hidden_states.split([image.num_views for image in images])
        return torch.cat([self._pack(*pair) for pair in zip(views, images, strict=True)])

    def _pack(self, views: torch.Tensor, image: ImageViews) -> torch.Tensor:
        """`(num_views, side * side, text_hidden)` -> `(num_tokens, text_hidden)`: the whole, then the map of the tiles."""
        side, width = math.isqrt(views.shape[1]), views.shape[2]
        tiles = views[1:].view(image.rows, image.columns, side, side, width).permute(4, 0, 2, 1, 3)
        patches = tiles.reshape(
            width, image.rows * side, image.columns * side
        )  # (text_hidden, rows, columns) of patches
        top, bottom, left, right = image.kept
        patches = patches[:, top:bottom, left:right]
        if image.pooled is not None:
            patches = nn.functional.interpolate(patches[None], list(image.pooled), mode="bilinear")[0]
        newline = self.image_newline.to(patches.dtype)[:, None, None].expand(-1, patches.shape[1], 1)
        return torch.cat([views[0], torch.cat([patches, newline], dim=-1).flatten(1).T])


PROJECTORS: dict[str, type[nn.Module]] = {
    "linear": LinearProjector,
    "mlp2x_gelu": Mlp2xProjector,
    "mlp3x_gelu": Mlp3xProjector,
    "mlp4x_gelu": Mlp4xProjector,
}


def build_projector(config: NativeLlavaConfig, projector_type: str) -> nn.Module:
    """Return a new projector; of LLaVA-NeXT there is one.

    Raises:
        ValueError: `projector_type` is not a key of `PROJECTORS`.
    """
    if config.model_type == "llava_next":
        return AnyResProjector(config)
    if projector_type not in PROJECTORS:
        raise ValueError(
            f"unknown projector_type {projector_type!r}; expected one of {sorted(PROJECTORS)}. "
            "Set model.projector_type in the recipe."
        )
    return PROJECTORS[projector_type](config)
