# SPDX-License-Identifier: Apache-2.0
"""Which views an image of a size is cut into, and how many tokens it takes: from its width and height alone.

Asked by the processor, by labels and truncation, planning, shared prefixes, the feature cache, the memory plan, the data checks,
the model and inference. One class for each way of cutting; LLaVA's one view of a fixed size is the first of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Sides that differ by more leave less than a pixel of the shorter one in a tile.
MAX_ASPECT_RATIO = 200


@dataclass(frozen=True)
class ImageViews:
    """What an image becomes.

    Attributes:
        rows, columns: of its tiles; 0 and 0 for an image of one view.
        num_tokens: of the language model, marks and newlines included.
        kept: of the patches of all tiles together, what is no padding: top, bottom, left and right. Only of `AnyRes`.
        pooled: height and width in patches that what is kept is pooled to, where it has too many. Only of `AnyRes`.
    """

    num_tokens: int
    rows: int = 0
    columns: int = 0
    kept: tuple[int, int, int, int] = (0, 0, 0, 0)
    pooled: tuple[int, int] | None = None

    @property
    def num_views(self) -> int:
        """Its tiles and the view of the whole."""
        return self.rows * self.columns + 1


@dataclass(frozen=True)
class OneView:
    """LLaVA's: every image is one square.

    Args:
        edge: of a view, in pixels.
        view_tokens: what one view gives.
    """

    edge: int
    view_tokens: int
    is_fixed = True
    shows_whole_first = True

    def of(self, width: int, height: int) -> ImageViews:
        """Return the views of an image of any size."""
        return ImageViews(self.view_tokens)

    @property
    def most_tokens(self) -> int:
        """What the largest image takes."""
        return self.view_tokens

    @property
    def most_views(self) -> int:
        """How many views the largest image has."""
        return 1

    def sizes_to_compare(self) -> list[tuple[int, int]]:
        """Return widths and heights that tell two ways of cutting apart."""
        return [(self.edge, self.edge)]


@dataclass(frozen=True)
class Tiles:
    """Tiles of the tower's size in reading order, then a view of the whole; before each of them one learned mark.

    The grid is the one that keeps most of the image's own pixels, of these the one with the fewest tiles. An image that fits into
    one tile has only the view of the whole.

    Args:
        edge: of a tile and of the view of the whole, in pixels.
        view_tokens: what one view gives, without its mark.
        max_tiles: in a grid, the view of the whole not counted.
    """

    edge: int
    view_tokens: int
    max_tiles: int
    is_fixed = False
    shows_whole_first = False

    def of(self, width: int, height: int) -> ImageViews:
        """Return the views of an image.

        Raises:
            ValueError: its sides differ by a factor of more than `MAX_ASPECT_RATIO`.
        """
        refuse_stripes(width, height)
        grids = [
            (rows, columns) for rows in range(1, self.max_tiles + 1) for columns in range(1, self.max_tiles // rows + 1)
        ]
        height_of_best, width_of_best = best_resolution(
            width, height, [(rows * self.edge, columns * self.edge) for rows, columns in grids]
        )
        rows, columns = height_of_best // self.edge, width_of_best // self.edge
        if rows * columns == 1:
            return ImageViews(self.view_tokens + 1)
        return ImageViews((rows * columns + 1) * (self.view_tokens + 1), rows, columns)

    @property
    def most_tokens(self) -> int:
        """What the largest image takes."""
        return self.most_views * (self.view_tokens + 1)

    @property
    def most_views(self) -> int:
        """How many views the largest image has."""
        return 1 + (self.max_tiles if self.max_tiles > 1 else 0)

    def sizes_to_compare(self) -> list[tuple[int, int]]:
        """Return widths and heights that tell two ways of cutting apart."""
        edge = self.edge
        return [(edge, edge), *((edge * n, edge * m) for n in range(1, self.max_tiles + 2) for m in (1, 2, 3))]


@dataclass(frozen=True)
class AnyRes:
    """LLaVA-NeXT's and LLaVA-OneVision's: a view of the whole, then the tiles of a grid as one large map of patches.

    The map loses the patches that are padding and gains a learned newline at the end of each of its rows.

    Args:
        edge: of a tile and of the view of the whole, in pixels.
        view_tokens: what one view gives: the square of an even number of patches a side.
        grid_pinpoints: `(height, width)` of each grid there is, in pixels.
        max_patches: a map of more tiles' worth of patches is pooled to about so many; `None` for never.
        Source: https://llava-vl.github.io/blog/2024-01-30-llava-next/ and https://huggingface.co/papers/2408.03326.
    """

    edge: int
    view_tokens: int
    grid_pinpoints: tuple[tuple[int, int], ...]
    max_patches: int | None = None
    is_fixed = False
    shows_whole_first = True

    def __post_init__(self) -> None:
        for height, width in self.grid_pinpoints:
            if height % self.edge or width % self.edge or not height or not width:
                raise ValueError(
                    f"the grid point {height} x {width} is no multiple of the tiles' {self.edge} pixels. Correct "
                    "image_grid_pinpoints."
                )
        if math.isqrt(self.view_tokens) ** 2 != self.view_tokens:
            raise ValueError(f"a view gives {self.view_tokens} tokens, which form no square: drop the class token.")

    def of(self, width: int, height: int) -> ImageViews:
        """Return the views of an image.

        Raises:
            ValueError: its sides differ by a factor of more than `MAX_ASPECT_RATIO`.
        """
        refuse_stripes(width, height)
        side = math.isqrt(self.view_tokens)
        best_height, best_width = best_resolution(width, height, self.grid_pinpoints)
        rows, columns = best_height // self.edge, best_width // self.edge
        all_rows, all_columns = rows * side, columns * side
        top = left = 0
        if width / height > all_columns / all_rows:
            top = (all_rows - int(round(height * (all_columns / width), 7))) // 2
        else:
            left = (all_columns - int(round(width * (all_rows / height), 7))) // 2
        kept_rows, kept_columns = all_rows - 2 * top, all_columns - 2 * left
        pooled = self._pooled(kept_rows, kept_columns)
        lines, length = pooled or (kept_rows, kept_columns)
        num_tokens = self.view_tokens + lines * (length + 1)
        return ImageViews(num_tokens, rows, columns, (top, all_rows - top, left, all_columns - left), pooled)

    def _pooled(self, rows: int, columns: int) -> tuple[int, int] | None:
        if self.max_patches is None:
            return None
        ratio = math.sqrt(rows * columns / (self.max_patches * self.view_tokens))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else None

    @property
    def most_tokens(self) -> int:
        """What the largest image takes."""
        return max(self.of(width, height).num_tokens for height, width in self.grid_pinpoints)

    @property
    def most_views(self) -> int:
        """How many views the largest image has."""
        return max(self.of(width, height).num_views for height, width in self.grid_pinpoints)

    def sizes_to_compare(self) -> list[tuple[int, int]]:
        """Return widths and heights that tell two ways of cutting apart."""
        return [(width + more, height) for height, width in self.grid_pinpoints for more in (0, 7, 100)]


Views = OneView | Tiles | AnyRes


def refuse_stripes(width: int, height: int) -> None:
    """Raise for an image of which tiles would show less than a pixel across.

    Raises:
        ValueError: its sides differ by a factor of more than `MAX_ASPECT_RATIO`.
    """
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f"an image of {width} x {height} pixels: cut into tiles its sides may differ by a factor of {MAX_ASPECT_RATIO}, and "
            f"they differ by {max(width, height) / max(1, min(width, height)):.0f}. Crop it, or leave its rows out."
        )


def best_resolution(width: int, height: int, resolutions: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return the `(height, width)` among `resolutions` that keeps most pixels of an image, of these the smallest.

    Source: LLaVA-NeXT's `select_best_resolution`, https://llava-vl.github.io/blog/2024-01-30-llava-next/.
    """
    best, most, least_wasted = (0, 0), 0, math.inf
    for candidate_height, candidate_width in resolutions:
        scale = min(candidate_width / width, candidate_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = candidate_width * candidate_height - kept
        if kept > most or (kept == most and wasted < least_wasted):
            best, most, least_wasted = (candidate_height, candidate_width), kept, wasted
    return best


def views_of_config(config: Any) -> Views:
    """Return how a model of this config takes its images.

    Raises:
        ValueError: patches that pixel shuffle does not divide, or grid points that are no multiples of the tiles.
    """
    from .configuration_llava import num_image_tokens

    vision = config.vision_config
    shuffle = int(getattr(config, "pixel_shuffle", 1))
    view_tokens = num_image_tokens(vision, config.vision_feature_select_strategy, shuffle)
    if config.model_type == "llava_next":
        return AnyRes(vision.image_size, view_tokens, as_pinpoints(config.image_grid_pinpoints))
    if getattr(config, "tiling", "none") == "tiles":
        return Tiles(vision.image_size, view_tokens, config.max_tiles)
    return OneView(vision.image_size, view_tokens)


def as_pinpoints(pinpoints: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """Return grid points `(height, width)` as a config lists them, in a form that can be compared."""
    return tuple((int(height), int(width)) for height, width in pinpoints)


def fitted(width: int, height: int, target_width: int, target_height: int) -> tuple[int, int]:
    """Return width and height of an image scaled to fit into a target, its proportions kept."""
    scale = min(target_width / width, target_height / height)
    return max(1, min(target_width, round(width * scale))), max(1, min(target_height, round(height * scale)))
