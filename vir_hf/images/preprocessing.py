"""Pictures -> `pixel_values`, bit for bit those of transformers' Pillow processors, at three times their speed.

JPEG files are decoded by simplejpeg and resized by the kernels of `resampling`, which numba compiles. Both are the extra `fast`;
without one of them Pillow does its part, with the same bits. `benchmarks/dataloader.py` measures it beside transformers.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from vir_hf.images import resampling
from vir_hf.images.opening import MAX_PIXELS, ImageSource, decode_image, is_upright, open_image, read_image_bytes
from vir_hf.images.resampling import Side

logger = logging.getLogger(__name__)

# The classes whose steps are those below; any other image processor is simply called.
_KNOWN_CLASSES = ("CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor")
_METHODS = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}
_JPEG_START = b"\xff\xd8\xff"


class Layout(NamedTuple):
    """What becomes of a picture's rows and of its columns."""

    rows: Side
    columns: Side


class ImagePreprocessor:
    """Turns one picture into what the vision tower sees, to the bit as transformers' Pillow processor does.

    Args:
        image_processor: transformers' CLIP, SigLIP or LLaVA processor, of any backend; its settings are read now. Others, and
            other settings, are called as they are.
        allow_urls: whether a source may be an http(s) URL.
    """

    def __init__(self, image_processor: Any, *, allow_urls: bool = False) -> None:
        self.image_processor = image_processor
        self.allow_urls = allow_urls
        self._does_it_here = self._read_config(image_processor)
        self.has_decoder = decoder_obstacle() is None
        self.has_kernels = self._does_it_here and resampling.obstacle() is None
        reason = what_is_slow()
        if self._does_it_here and reason:
            logger.info(reason)

    def __call__(self, source: ImageSource) -> torch.Tensor:
        """Return `pixel_values` of one picture, `(3, height, width)` float32, or `(num_views, 3, height, width)` of its views.

        Args:
            source: what `open_image` takes.

        Raises:
            ImageError: the picture cannot be opened.
        """
        picture = self._read(source)
        if hasattr(self.image_processor, "views_of"):
            image = picture if isinstance(picture, Image.Image) else Image.fromarray(np.asarray(picture)[..., :3])
            return torch.stack([self._one_view(view) for view in self.image_processor.views_of(image)])
        return self._one_view(picture)

    def _one_view(self, picture: Image.Image | np.ndarray) -> torch.Tensor:
        if not self._does_it_here:
            image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
            return torch.as_tensor(self.image_processor(image, return_tensors="pt")["pixel_values"][0])
        if self.has_kernels:
            # Four bytes a pixel, as Pillow has them in memory.
            pixels = np.array(picture.convert("RGBX")) if isinstance(picture, Image.Image) else picture
            return self._resample(pixels)
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        return self._resize_with_pillow(image)

    def _read(self, source: ImageSource) -> Image.Image | np.ndarray:
        """Return the picture upright and in RGB; where simplejpeg can, as pixels: of four bytes for the kernels, else three."""
        if isinstance(source, Image.Image):
            return open_image(source)
        data, name = read_image_bytes(source, allow_urls=self.allow_urls)
        pixels = decode_jpeg(data, with_spare_byte=self.has_kernels) if self.has_decoder else None
        return decode_image(data, name) if pixels is None else pixels

    def _read_config(self, processor: Any) -> bool:
        """Take over the processor's settings; False when they ask for something not done here, or for nothing sensible."""
        class_name = type(processor).__name__.removesuffix("Pil").removesuffix("Fast")
        does_pad = bool(getattr(processor, "do_pad", False))
        has_views = hasattr(
            processor, "views_of"
        )  # ours, which makes of each view what its parent, LLaVA's own, makes of an image
        if has_views:
            class_name = "LlavaImageProcessor"
        is_known = class_name in _KNOWN_CLASSES and (
            has_views or type(processor).__module__.startswith("transformers.")
        )
        if not is_known or (does_pad and class_name != "LlavaImageProcessor"):
            return False
        resample = getattr(processor.resample, "value", processor.resample)
        if not (processor.do_resize and processor.do_rescale and processor.do_normalize and resample in _METHODS):
            return False
        self._method = _METHODS[resample]
        size = _lengths(processor.size)
        if set(size) == {"shortest_edge"}:
            self._shortest_edge, self._size = size["shortest_edge"], None
            smallest = (self._shortest_edge, self._shortest_edge)
        elif set(size) == {"height", "width"}:
            self._size = (size["height"], size["width"])
            smallest = self._size
        else:
            return False
        self._crop = None
        if getattr(processor, "do_center_crop", False):
            crop = _lengths(processor.crop_size)
            if set(crop) != {"height", "width"}:
                return False
            self._crop = (crop["height"], crop["width"])
            if self._crop[0] > smallest[0] or self._crop[1] > smallest[1]:
                return False  # transformers pads a picture smaller than the crop with black
        means, deviations = processor.image_mean, processor.image_std
        if not all(isinstance(values, (list, tuple)) and len(values) == 3 for values in (means, deviations)):
            return False
        self._pad_colour = tuple(int(channel * 255) for channel in means) if does_pad else None
        if self._pad_colour and not all(0 <= channel <= 255 for channel in self._pad_colour):
            return False
        # float64 first, as transformers rescales; one entry for each of the 256 values a channel can have.
        levels = (np.arange(256, dtype=np.float64) * processor.rescale_factor).astype(np.float32)
        mean, deviation = (np.array(values, dtype=np.float32) for values in (means, deviations))
        self._table = ((levels[:, None] - mean) / deviation).T.copy()  # (3, 256)
        return True

    def _lay_out(self, height: int, width: int) -> Layout:
        """Return how a picture of this size is padded to a square, resized and cropped, as far as the processor asks."""
        top = left = 0
        bottom = right = 0
        if self._pad_colour is not None:
            edge = max(height, width)
            top, left = (edge - height) // 2, (edge - width) // 2
            bottom, right = edge - height - top, edge - width - left
        new_height, new_width = self._resized(top + height + bottom, left + width + right)
        crop_height, crop_width = self._crop or (new_height, new_width)
        first_row, first_column = (new_height - crop_height) // 2, (new_width - crop_width) // 2
        return Layout(
            Side(height, top, bottom, new_height, first_row, first_row + crop_height),
            Side(width, left, right, new_width, first_column, first_column + crop_width),
        )

    def place_in_view(self, size: tuple[int, int]) -> Callable[[float, float], tuple[float, float]] | None:
        """Return where a point (x, y) of an image of a size (width, height) lies in its `pixel_values`, all in pixels.

        None for a processor whose steps are not done here, since nobody says what they are.
        """
        if not self._does_it_here:
            return None
        rows, columns = self._lay_out(size[1], size[0])

        def place(x: float, y: float) -> tuple[float, float]:
            return _moved(x, columns), _moved(y, rows)

        return place

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing."""
        if self._size is not None:
            return self._size
        if width <= height:
            return int(self._shortest_edge * height / width), self._shortest_edge
        return self._shortest_edge, int(self._shortest_edge * width / height)

    def _resample(self, pixels: np.ndarray) -> torch.Tensor:
        rows, columns = self._lay_out(*pixels.shape[:2])
        values = torch.empty(3, rows.end - rows.start, columns.end - columns.start)
        resampling.resample(
            pixels,
            rows,
            columns,
            method=self._method,
            colour=self._pad_colour or (0, 0, 0),
            table=self._table,
            out=values.numpy(),
        )
        return values

    def _resize_with_pillow(self, image: Image.Image) -> torch.Tensor:
        rows, columns = self._lay_out(image.height, image.width)
        if (columns.padded, rows.padded) != image.size:
            canvas = Image.new("RGB", (columns.padded, rows.padded), self._pad_colour)
            canvas.paste(image, (columns.before, rows.before))
            image = canvas
        image = image.resize((columns.new_length, rows.new_length), Image.Resampling[self._method.upper()])
        image = image.crop((columns.start, rows.start, columns.end, rows.end))
        bands = [table[np.asarray(band)] for table, band in zip(self._table, image.split(), strict=True)]
        return torch.from_numpy(np.stack(bands))


def _moved(value: float, side: Side) -> float:
    return (value + side.before) * side.new_length / side.padded - side.start


def _lengths(size: Any) -> dict[str, int]:
    """The lengths that a processor's size or crop names; empty unless all are whole and positive."""
    try:
        found = {key: value for key, value in dict(size).items() if value is not None}
    except (TypeError, ValueError):
        return {}
    return found if all(type(value) is int and value > 0 for value in found.values()) else {}


def decode_jpeg(data: bytes, *, with_spare_byte: bool = False) -> np.ndarray | None:
    """Return `(height, width, 3)` RGB pixels (4 with a spare byte), or None for what only Pillow can open the right way.

    That is: no JPEG, a CMYK one, one that EXIF says to turn, one too large, or a damaged one.
    """
    import simplejpeg

    if not data.startswith(_JPEG_START) or not is_upright(data):
        return None
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(data)
        if colour_space not in ("RGB", "YCbCr", "Gray") or height * width > MAX_PIXELS:
            return None
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGBA" if with_spare_byte else "RGB")
    except (ValueError, KeyError):  # KeyError: of colour planes in proportions it does not know
        return None
    return pixels


@functools.cache
def decoder_obstacle() -> str | None:
    """Why Pillow has to decode JPEG files here; None where simplejpeg gives its pixels, tried once on colour and on grey."""
    if importlib.util.find_spec("simplejpeg") is None:
        return "simplejpeg is not installed (pip install 'vir-hf[fast]')"
    noise = Image.effect_noise((83, 61), 90)
    for image in (Image.merge("RGB", (noise, noise.rotate(180), noise.rotate(90, expand=False))), noise):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)  # with the usual halved colour planes
        try:
            pixels = decode_jpeg(buffer.getvalue())
        except Exception as error:  # whatever keeps it from being imported
            return f"simplejpeg does not work here ({type(error).__name__}: {error})"
        if pixels is None or not np.array_equal(pixels, np.asarray(decode_image(buffer.getvalue(), "probe"))):
            return f"with simplejpeg pixels differ from those of Pillow {Image.__version__}"
    return None


def what_is_slow() -> str | None:
    """Why Pillow has to do what simplejpeg and numba do faster on other machines; None where it has not."""
    reasons = [reason for reason in (decoder_obstacle(), resampling.obstacle()) if reason]
    if not reasons:
        return None
    return f"pictures are made by Pillow, with the same bits but at a lower speed: {'; '.join(reasons)}."


def recommended_num_workers(num_local_ranks: int = 1) -> int:
    """Return how many dataloader workers to start for each process: the cores it has, less one, at most 8.

    One core decodes several hundred pictures a second, more than one GPU trains on; beyond eight workers only memory grows.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores // max(1, num_local_ranks) - 1))
