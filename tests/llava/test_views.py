"""How images are cut: token counts against transformers' own processors, and what no way of cutting may do."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
)
from transformers.image_processing_utils import select_best_resolution

from vir_hf.llava.configuration_llava import LlavaConfig, num_image_tokens
from vir_hf.llava.projectors import shuffle_patches
from vir_hf.llava.views import AnyRes, OneView, Tiles, best_resolution, views_of_config

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def sizes(number: int) -> list[tuple[int, int]]:
    """Widths and heights: common ones, and drawn ones of every shape."""
    rng = random.Random(0)
    common = [
        (336, 336),
        (640, 480),
        (480, 640),
        (1, 1),
        (1, 150),
        (150, 1),
        (1920, 1080),
        (335, 337),
        (672, 336),
        (1008, 335),
    ]
    return common + [(rng.randint(20, 3000), rng.randint(20, 3000)) for _ in range(number - len(common))]


def next_processor(edge: int, patch: int, pinpoints: tuple[tuple[int, int], ...]) -> LlavaNextProcessor:
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)  # counting needs no tokenizer
    processor.patch_size, processor.num_additional_image_tokens = patch, 1
    processor.vision_feature_select_strategy = "default"
    processor.image_processor = LlavaNextImageProcessorPil(
        image_grid_pinpoints=[list(point) for point in pinpoints],
        size={"shortest_edge": edge},
        crop_size={"height": edge, "width": edge},
    )
    return processor


@pytest.mark.parametrize(("edge", "patch"), [(336, 14), (336, 16)])
def test_llava_next_counts_as_transformers_does_for_200_sizes(edge: int, patch: int) -> None:
    processor = next_processor(edge, patch, PINPOINTS)
    views = AnyRes(edge, (edge // patch) ** 2, PINPOINTS)
    for width, height in sizes(200):
        theirs = processor._get_number_of_features(height, width, edge, edge) - 1  # without the class token
        assert views.of(width, height).num_tokens == theirs, (width, height)
        best = select_best_resolution((height, width), [list(point) for point in PINPOINTS])
        assert (views.of(width, height).rows, views.of(width, height).columns) == (best[0] // edge, best[1] // edge)


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(2, 9))
def test_tiles_are_few_enough_and_count_what_they_are(width: int, height: int, max_tiles: int) -> None:
    views = Tiles(64, 16, max_tiles)
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(ValueError, match=f"{width} x {height} pixels.*factor of 200"):
            views.of(width, height)
        return
    cut = views.of(width, height)
    assert cut.rows * cut.columns <= max_tiles
    assert cut.rows * cut.columns != 1  # one tile would be the view of the whole once more
    assert cut.num_tokens == cut.num_views * 17 <= views.most_tokens
    assert cut.num_views <= views.most_views
    if max(width, height) <= 64:
        assert cut.num_views == 1


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_the_grid_keeps_no_fewer_pixels_than_any_other(width: int, height: int) -> None:
    grids = [(64 * rows, 64 * columns) for rows in range(1, 5) for columns in range(1, 4 // rows + 1)]

    def kept(size: tuple[int, int]) -> int:
        scale = min(size[1] / width, size[0] / height)
        return min(int(width * scale) * int(height * scale), width * height)

    best = best_resolution(width, height, grids)
    assert kept(best) == max(kept(size) for size in grids)


def test_one_view_takes_the_same_for_every_size() -> None:
    views = OneView(336, 576)
    assert {views.of(*size).num_tokens for size in sizes(30)} == {576} == {views.most_tokens}
    assert views.of(1, 5000).num_views == 1


def test_grid_points_that_do_not_divide_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="grid point 336 x 600 is no multiple of the tiles' 336 pixels"):
        AnyRes(336, 576, ((336, 600),))


@pytest.mark.parametrize(("shuffle", "num_tokens"), [(1, 576), (2, 144), (3, 64), (4, 36)])
def test_pixel_shuffle_divides_the_tokens_of_a_view(shuffle: int, num_tokens: int) -> None:
    vision = CLIPVisionConfig(image_size=336, patch_size=14)
    assert num_image_tokens(vision, "default", shuffle) == num_tokens


def test_pixel_shuffle_that_does_not_divide_says_both_numbers_and_what_does() -> None:
    vision = CLIPVisionConfig(image_size=378, patch_size=14)  # 27 patches a side
    with pytest.raises(ValueError, match=r"pixel_shuffle=2 joins blocks of 2 by 2 .* 27 by 27 patches.*one of 1, 3"):
        num_image_tokens(vision, "default", 2)
    with pytest.raises(ValueError, match="a class token is kept"):
        num_image_tokens(CLIPVisionConfig(image_size=336, patch_size=14), "full", 2)


@settings(deadline=None)
@given(st.sampled_from([1, 2, 3, 4]), st.integers(1, 3), st.integers(1, 4))
def test_a_shuffled_token_holds_exactly_its_block(block: int, blocks_a_side: int, width: int) -> None:
    side = block * blocks_a_side
    features = torch.arange(side * side * width).view(1, side * side, width)
    shuffled = shuffle_patches(features, block)
    assert shuffled.shape == (1, blocks_a_side**2, width * block**2)
    patches = features.view(side, side, width)
    for token, (row, column) in enumerate((r, c) for r in range(blocks_a_side) for c in range(blocks_a_side)):
        expected = patches[row * block : (row + 1) * block, column * block : (column + 1) * block].reshape(-1)
        assert torch.equal(shuffled[0, token], expected)


def test_the_config_says_how_images_are_cut() -> None:
    vision = CLIPVisionConfig(image_size=28, patch_size=14)
    text = LlamaConfig()
    own = LlavaConfig(vision_config=vision, text_config=text, tiling="tiles", max_tiles=3, pixel_shuffle=2)
    assert views_of_config(own) == Tiles(28, 1, 3)
    assert views_of_config(LlavaConfig(vision_config=vision, text_config=text)) == OneView(28, 4)
    next_config = LlavaNextConfig(vision_config=vision, text_config=text, image_grid_pinpoints=[[28, 56]])
    assert views_of_config(next_config) == AnyRes(28, 4, ((28, 56),))
    assert math.isqrt(views_of_config(next_config).view_tokens) == 2
