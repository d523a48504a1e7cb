"""Pictures -> `pixel_values`, at several times the speed of transformers' own image processors.

Two ways lead to the same picture. The exact one does with Pillow what transformers' Pillow processors do, bit for bit,
without their detours through float64 numpy arrays. The fast one decodes JPEGs with simplejpeg and resizes in torch's
uint8 bicubic kernel: on photographs it differs by less than 0.05 of 255 grey levels on average. `benchmarks/dataloader.py`
measures both against transformers.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from vir_hf.images import MAX_PIXELS, ImageSource, decode_image, is_upright, read_image_bytes, to_rgb

# The classes whose steps are those below; any other image processor is simply called.
_KNOWN_CLASSES = ("CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor")
_FILTERS = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}
_PIL_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# torch resizes rows before columns, and so did Pillow until 13, which takes columns first where that is less work. Each pass
# rounds, so the order shows: 0.2 grey levels on average.
_COLUMNS_MAY_COME_FIRST = int(Image.__version__.split(".")[0]) >= 13
_JPEG_START = b"\xff\xd8\xff"


class ImagePreprocessor:
    """Turns one picture into what the vision tower sees, as a given image processor would.

    Args:
        image_processor: transformers' CLIP, SigLIP or LLaVA processor, of any backend. Others are called as they are.
        exact: bit-equal to transformers' Pillow processor; otherwise faster, with a mean difference below 0.05 of 255.
            Without simplejpeg the exact way is always taken.
        allow_urls: whether a source may be an http(s) URL.
    """

    def __init__(self, image_processor: Any, *, exact: bool = False, allow_urls: bool = False) -> None:
        self.image_processor = image_processor
        self.exact = exact or importlib.util.find_spec("simplejpeg") is None
        self.allow_urls = allow_urls
        self._does_it_here = self._read_config(image_processor)

    def __call__(self, source: ImageSource) -> torch.Tensor:
        """Return `pixel_values` of one picture, `(3, height, width)` float32.

        Args:
            source: what `open_image` takes.

        Raises:
            ImageError: the picture cannot be opened.
        """
        data = name = None
        if not isinstance(source, Image.Image):
            data, name = read_image_bytes(source, allow_urls=self.allow_urls)
        if self._does_it_here and not self.exact:
            pixels = decode_jpeg(data) if data is not None else None
            if pixels is None:
                # A copy, because torch cannot share memory it may not write to.
                pixels = np.array(self._open(source, data, name))
            return self._normalise(self._resize(torch.from_numpy(pixels).permute(2, 0, 1)))
        image = self._open(source, data, name)
        if not self._does_it_here:
            return torch.as_tensor(self.image_processor(image, return_tensors="pt")["pixel_values"][0])
        return self._normalise(torch.from_numpy(np.array(self._resize_exactly(image))).permute(2, 0, 1))

    @staticmethod
    def _open(source: ImageSource, data: bytes | None, name: str | None) -> Image.Image:
        if isinstance(source, Image.Image):
            return to_rgb(source)
        assert data is not None and name is not None
        return decode_image(data, name)

    def _read_config(self, processor: Any) -> bool:
        """Take over the processor's settings; False when they ask for something not done here."""
        class_name = type(processor).__name__.removesuffix("Pil").removesuffix("Fast")
        does_pad = bool(getattr(processor, "do_pad", False))
        if class_name not in _KNOWN_CLASSES or (does_pad and class_name != "LlavaImageProcessor"):
            return False
        resample = getattr(processor.resample, "value", processor.resample)
        if not (processor.do_resize and processor.do_rescale and processor.do_normalize and resample in _FILTERS):
            return False
        self._filter = _FILTERS[resample]
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
        self._table = torch.from_numpy(((levels[:, None] - mean) / deviation).T.copy())  # (3, 256)
        self._scale = torch.from_numpy(np.stack([mean, deviation]))[:, :, None, None]  # (2, 3, 1, 1)
        all_levels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
        self._can_divide = torch.equal(self._divide(all_levels)[:, 0], self._table)
        return True

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing."""
        if self._size is not None:
            return self._size
        if width <= height:
            return int(self._shortest_edge * height / width), self._shortest_edge
        return self._shortest_edge, int(self._shortest_edge * width / height)

    def _resize_exactly(self, image: Image.Image) -> Image.Image:
        """Return the picture padded, resized in one call (which pass Pillow does first is its own affair) and cropped."""
        width, height = image.size
        if self._pad_colour is not None and width != height:
            edge = max(width, height)
            canvas = Image.new("RGB", (edge, edge), self._pad_colour)
            canvas.paste(image, ((edge - width) // 2, (edge - height) // 2))
            image = canvas
        new_height, new_width = self._resized(image.height, image.width)
        image = image.resize((new_width, new_height), _PIL_FILTERS[self._filter])
        if self._crop is None:
            return image
        top, left = (new_height - self._crop[0]) // 2, (new_width - self._crop[1]) // 2
        return image.crop((left, top, left + self._crop[1], top + self._crop[0]))

    def _resize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return `(3, height, width)` uint8 pixels padded, resized and cropped."""
        _, height, width = pixels.shape
        pixels = pixels[None]  # its strides say channels last, for which torch has the fastest kernel
        if self._pad_colour is not None and width != height:
            edge = max(width, height)
            new_height, new_width = self._resized(edge, edge)
            colour = torch.tensor(self._pad_colour, dtype=torch.uint8).view(1, 1, 1, 3)
            start = abs(width - height) // 2
            if width > height:  # rows of padding stay what they are when rows are resized, so they are added afterwards
                pixels = self._interpolate(pixels, height, new_width)
                canvas = colour.repeat(1, edge, new_width, 1).permute(0, 3, 1, 2)
                canvas[:, :, start : start + height] = pixels
            else:
                canvas = colour.repeat(1, edge, edge, 1).permute(0, 3, 1, 2)
                canvas[:, :, :, start : start + width] = pixels
            pixels = canvas
        else:
            new_height, new_width = self._resized(height, width)
        pixels = self._interpolate(pixels, new_height, new_width)[0]
        if self._crop is None:
            return pixels
        top, left = (new_height - self._crop[0]) // 2, (new_width - self._crop[1]) // 2
        return pixels[:, top : top + self._crop[0], left : left + self._crop[1]]

    def _interpolate(self, pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
        old_height, old_width = pixels.shape[-2:]
        if _COLUMNS_MAY_COME_FIRST and old_width != width and old_height - height > max(0, 2 * (old_width - width)):
            pixels = self._interpolate(pixels, height, old_width)
        if pixels.shape[-2:] == (height, width):
            return pixels
        return functional.interpolate(pixels, size=(height, width), mode=self._filter, antialias=True)

    def _normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return `(3, height, width)` uint8 pixels as normalised float32, the bits those of transformers."""
        pixels = pixels.contiguous()
        if self._can_divide:
            return self._divide(pixels)
        return torch.stack([self._table[channel][pixels[channel].long()] for channel in range(3)])

    def _divide(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().div_(255).sub_(self._scale[0]).div_(self._scale[1])


def decode_jpeg(data: bytes) -> np.ndarray | None:
    """Return `(height, width, 3)` RGB pixels, or None for what only Pillow can open the right way.

    That is: no JPEG, a CMYK one, one that EXIF says to turn, one too large, or a damaged one.
    """
    import simplejpeg

    if not data.startswith(_JPEG_START) or not is_upright(data):
        return None
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(data)
        if colour_space not in ("RGB", "YCbCr", "Gray") or height * width > MAX_PIXELS:
            return None
        pixels: np.ndarray = simplejpeg.decode_jpeg(data)
    except ValueError:
        return None
    return pixels


def recommended_num_workers(num_local_ranks: int = 1) -> int:
    """Return how many dataloader workers to start for each process: the cores it has, less one, at most 8.

    One core decodes several hundred pictures a second, more than one GPU trains on; beyond eight workers only memory grows.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores // max(1, num_local_ranks) - 1))
