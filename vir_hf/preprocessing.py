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
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from vir_hf import resampling
from vir_hf.images import MAX_PIXELS, ImageSource, decode_image, is_upright, read_image_bytes, to_rgb
from vir_hf.resampling import Side

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
        image_processor: transformers' CLIP, SigLIP or LLaVA processor, of any backend. Others are called as they are.
        allow_urls: whether a source may be an http(s) URL.
    """

    def __init__(self, image_processor: Any, *, allow_urls: bool = False) -> None:
        self.image_processor = image_processor
        self.allow_urls = allow_urls
        self._does_it_here = self._read_config(image_processor)
        self.has_decoder = decodes_alike()
        self.has_kernels = self._does_it_here and resampling.is_available() and resampling.is_exact()
        reason = what_is_slow()
        if self._does_it_here and reason:
            logger.info(reason)

    def __call__(self, source: ImageSource) -> torch.Tensor:
        """Return `pixel_values` of one picture, `(3, height, width)` float32.

        Args:
            source: what `open_image` takes.

        Raises:
            ImageError: the picture cannot be opened.
        """
        picture = self._read(source)
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
            return to_rgb(source)
        data, name = read_image_bytes(source, allow_urls=self.allow_urls)
        pixels = decode_jpeg(data, with_spare_byte=self.has_kernels) if self.has_decoder else None
        return decode_image(data, name) if pixels is None else pixels

    def _read_config(self, processor: Any) -> bool:
        """Take over the processor's settings; False when they ask for something not done here."""
        class_name = type(processor).__name__.removesuffix("Pil").removesuffix("Fast")
        does_pad = bool(getattr(processor, "do_pad", False))
        if class_name not in _KNOWN_CLASSES or (does_pad and class_name != "LlavaImageProcessor"):
            return False
        resample = getattr(processor.resample, "value", processor.resample)
        if not (processor.do_resize and processor.do_rescale and processor.do_normalize and resample in _METHODS):
            return False
        self._method = _METHODS[resample]
        size = {key: value for key, value in dict(processor.size).items() if value is not None}
        crops = bool(getattr(processor, "do_center_crop", False))
        crop = (
            {key: value for key, value in dict(processor.crop_size or {}).items() if value is not None} if crops else {}
        )
        if set(size) == {"shortest_edge"}:
            self._shortest_edge, self._size = int(size["shortest_edge"]), None
            smallest = (self._shortest_edge, self._shortest_edge)
        elif set(size) == {"height", "width"}:
            self._size = (int(size["height"]), int(size["width"]))
            smallest = self._size
        else:
            return False
        self._crop = (int(crop["height"]), int(crop["width"])) if crops else None
        if self._crop and (self._crop[0] > smallest[0] or self._crop[1] > smallest[1]):
            return False  # transformers pads a picture smaller than the crop with black
        self._pad_colour = tuple(int(channel * 255) for channel in processor.image_mean) if does_pad else None
        # float64 first, as transformers rescales; one entry for each of the 256 values a channel can have.
        levels = (np.arange(256, dtype=np.float64) * processor.rescale_factor).astype(np.float32)
        mean, deviation = (np.array(values, dtype=np.float32) for values in (processor.image_mean, processor.image_std))
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
        table = torch.from_numpy(self._table)
        # Copied, because torch cannot share memory it may not write to.
        bands = [torch.from_numpy(np.array(band)).int() for band in image.split()]
        return torch.stack([table[channel][band] for channel, band in enumerate(bands)])


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
    except ValueError:
        return None
    return pixels


@functools.cache
def what_is_slow() -> str | None:
    """Why Pillow has to do what simplejpeg and numba do faster on other machines; None where it has not."""
    reasons = []
    for package, is_right in (("simplejpeg", decodes_alike), ("numba", resampling.is_exact)):
        if importlib.util.find_spec(package) is None:
            reasons.append(f"{package} is not installed (pip install 'vir-hf[fast]')")
        elif not is_right():
            reasons.append(f"with {package} pixels differ from those of Pillow {Image.__version__}")
    if not reasons:
        return None
    return f"pictures are made by Pillow, with the same bits but at a lower speed: {'; '.join(reasons)}."


@functools.cache
def decodes_alike() -> bool:
    """Whether simplejpeg is there and gives this Pillow's pixels, tried once on colour and on grey."""
    if importlib.util.find_spec("simplejpeg") is None:
        return False
    noise = Image.effect_noise((83, 61), 90)
    for image in (Image.merge("RGB", (noise, noise.rotate(180), noise.rotate(90, expand=False))), noise):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)  # with the usual halved colour planes
        pixels = decode_jpeg(buffer.getvalue())
        if pixels is None or not np.array_equal(pixels, np.asarray(decode_image(buffer.getvalue(), "probe"))):
            return False
    return True


def recommended_num_workers(num_local_ranks: int = 1) -> int:
    """Return how many dataloader workers to start for each process: the cores it has, less one, at most 8.

    One core decodes several hundred pictures a second, more than one GPU trains on; beyond eight workers only memory grows.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores // max(1, num_local_ranks) - 1))
