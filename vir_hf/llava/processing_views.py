# SPDX-License-Identifier: Apache-2.0
"""The processor of a model whose images are several views, and the cutting itself; both travel with a checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature, LlavaImageProcessorPil, LlavaProcessor
from transformers.processing_utils import ImagesKwargs, MultiModalData

from .views import AnyRes, OneView, Tiles, Views, as_pinpoints, fitted


class TilesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """What `TilesImageProcessor` takes beside transformers' own arguments."""

    max_tiles: int


class TilesImageProcessor(LlavaImageProcessorPil):
    """LLaVA's image processor over tiles of an image and, last, the image as a whole.

    Each view is what the parent class makes of it. The image is scaled to fit its grid of tiles and centred on the mean colour
    (`do_pad`), or stretched over the grid.
    """

    model_input_names = ["pixel_values", "image_sizes"]
    valid_kwargs = TilesKwargs
    max_tiles = 4

    def _preprocess(
        self, images: list[np.ndarray], *, max_tiles: int, return_tensors: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """Return `pixel_values` `(num_views, 3, edge, edge)` of all images and `image_sizes` `(num_images, 2)`."""
        pixels: list[np.ndarray] = []
        for image in images:
            picture = Image.fromarray(np.ascontiguousarray(np.moveaxis(image, 0, -1)))
            views = [np.moveaxis(np.asarray(view), -1, 0) for view in self.views_of(picture, max_tiles)]
            pixels += super()._preprocess(views, return_tensors=None, **kwargs)["pixel_values"]
        sizes = [image.shape[-2:] for image in images]
        return BatchFeature(
            {"pixel_values": np.stack(pixels), "image_sizes": np.array(sizes)}, tensor_type=return_tensors
        )

    def views_of(self, picture: Image.Image, max_tiles: int | None = None) -> list[Image.Image]:
        """Return an RGB image's tiles in reading order, then the image itself."""
        edge = edge_of(self)
        views = Tiles(edge, 0, self.max_tiles if max_tiles is None else max_tiles).of(*picture.size)
        if not views.rows:
            return [picture]
        width, height = views.columns * edge, views.rows * edge
        resample = Image.Resampling(int(self.resample))
        if self.do_pad:
            size = fitted(*picture.size, width, height)
            colour = tuple(int(channel * 255) for channel in self.image_mean)
            canvas = Image.new("RGB", (width, height), colour)
            canvas.paste(picture.resize(size, resample), ((width - size[0]) // 2, (height - size[1]) // 2))
        else:
            canvas = picture.resize((width, height), resample)
        corners = [(column * edge, row * edge) for row in range(views.rows) for column in range(views.columns)]
        return [*(canvas.crop((left, top, left + edge, top + edge)) for left, top in corners), picture]


def edge_of(image_processor: Any) -> int:
    """Return the edge of the square that an image processor makes of an image, in pixels."""
    uses_crop = getattr(image_processor, "do_center_crop", False)
    size = image_processor.crop_size if uses_crop else image_processor.size
    for key in ("shortest_edge", "height"):
        value = size.get(key) if hasattr(size, "get") else getattr(size, key, None)
        if value is not None:
            return int(value)
    raise ValueError(f"the image processor's size {size!r} names neither shortest_edge nor height.")


class ViewsProcessor(LlavaProcessor):
    """transformers' `LlavaProcessor` that writes as many image tokens as an image's views give.

    Args:
        pixel_shuffle: blocks of so many by so many patches are one token.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        pixel_shuffle: int = 1,
        **kwargs: Any,
    ):
        self.pixel_shuffle = pixel_shuffle
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )

    @property
    def views(self) -> Views:
        """How images are cut, and how many tokens that is."""
        edge = edge_of(self.image_processor)
        tokens = (edge // (self.patch_size or edge) // self.pixel_shuffle) ** 2 + self.num_additional_image_tokens
        tokens -= self.vision_feature_select_strategy == "default"
        pinpoints = getattr(self.image_processor, "image_grid_pinpoints", None)
        if pinpoints:
            return AnyRes(edge, tokens, as_pinpoints(pinpoints))
        max_tiles = getattr(self.image_processor, "max_tiles", 0)
        return Tiles(edge, tokens, max_tiles) if max_tiles else OneView(edge, tokens)

    def tokens_of(self, size: tuple[int, int]) -> int:
        """Return how many tokens an image of a width and height takes."""
        return self.views.of(*size).num_tokens

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Return the image tokens of one image, for transformers' `__call__`."""
        width = height = edge_of(self.image_processor)
        if not self.views.is_fixed:
            height, width = (int(length) for length in image_inputs["image_sizes"][image_idx])
        return str(self.image_token * self.tokens_of((width, height)))

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """What servers ask: the tokens and views of images of given heights and widths."""
        if image_sizes is None:
            return MultiModalData()
        images = [self.views.of(width, height) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[image.num_tokens for image in images],
            num_image_patches=[image.num_views for image in images],
        )
