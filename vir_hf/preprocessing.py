"""Pictures -> `pixel_values`, at several times the speed of transformers' own image processors.

Two ways lead to the same picture. The exact one resizes with Pillow, as transformers' Pillow processors do, bit for bit, but
computes no pixel that padding or cropping makes needless and takes no detour through float64 numpy arrays. The fast one
resizes in torch's uint8 bicubic kernel: on photographs it differs by less than 0.05 of 255 grey levels on average.
`benchmarks/dataloader.py` measures both against transformers.
"""

from __future__ import annotations

import functools
import importlib.util
import io
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
_PILLOW_MAJOR = int(Image.__version__.split(".")[0])
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
        has_decoder = importlib.util.find_spec("simplejpeg") is not None
        self.exact = exact or not has_decoder
        self.allow_urls = allow_urls
        self._does_it_here = self._read_config(image_processor)
        must_agree = self.exact or not self._does_it_here
        self._has_fast_decoder = has_decoder and (not must_agree or decoders_agree())

    def __call__(self, source: ImageSource) -> torch.Tensor:
        """Return `pixel_values` of one picture, `(3, height, width)` float32.

        Args:
            source: what `open_image` takes.

        Raises:
            ImageError: the picture cannot be opened.
        """
        picture = self._read(source)
        if not self._does_it_here:
            image = picture if isinstance(picture, Image.Image) else as_image(picture)
            return torch.as_tensor(self.image_processor(image, return_tensors="pt")["pixel_values"][0])
        if self.exact:
            image = self._resize_exactly(picture if isinstance(picture, Image.Image) else as_image(picture))
            # Copied, because torch cannot share memory it may not write to.
            return self._normalise(torch.stack([torch.from_numpy(np.array(band)) for band in image.split()]))
        pixels = np.array(picture) if isinstance(picture, Image.Image) else picture
        return self._normalise(self._resize(torch.from_numpy(pixels).permute(2, 0, 1)))

    def _read(self, source: ImageSource) -> Image.Image | np.ndarray:
        """Return the picture upright and in RGB, as `(height, width, 3)` pixels where the fast decoder can."""
        if isinstance(source, Image.Image):
            return to_rgb(source)
        data, name = read_image_bytes(source, allow_urls=self.allow_urls)
        as_it_is = (self.exact or not self._does_it_here) and pixels_can_be_shared()
        pixels = decode_jpeg(data, with_spare_byte=as_it_is) if self._has_fast_decoder else None
        return decode_image(data, name) if pixels is None else pixels

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
        """Return the picture padded, resized and cropped, with the bits of doing it in one go."""
        width, height = image.size
        if self._pad_colour is not None and width != height:
            edge = max(width, height)
            new_height, new_width = self._resized(edge, edge)
            if width > height and passes_are_known() and not columns_come_first((edge, edge), (new_width, new_height)):
                # Rows of padding stay what they are when rows are resized, so they are added afterwards.
                image = image.resize((new_width, height), _PIL_FILTERS[self._filter])
            canvas = Image.new("RGB", (image.width if image.width != width else edge, edge), self._pad_colour)
            canvas.paste(image, ((canvas.width - image.width) // 2, (edge - height) // 2))
            image = canvas
        else:
            new_height, new_width = self._resized(height, width)
        crop_height, crop_width = self._crop or (new_height, new_width)
        top, left = (new_height - crop_height) // 2, (new_width - crop_width) // 2
        box = (left, top, left + crop_width, top + crop_height)
        return resize_and_crop(image, (new_width, new_height), box, _PIL_FILTERS[self._filter])

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
        if old_width != width and columns_come_first((old_width, old_height), (width, height)):
            pixels = self._interpolate(pixels, height, old_width)  # torch by itself takes rows first
        if pixels.shape[-2:] == (height, width):
            return pixels
        return functional.interpolate(pixels, size=(height, width), mode=self._filter, antialias=True)

    def _normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return `(3, height, width)` uint8 pixels as normalised float32, the bits those of transformers."""
        if self._can_divide:
            return self._divide(pixels)
        return torch.stack([self._table[channel][pixels[channel].long()] for channel in range(3)])

    def _divide(self, pixels: torch.Tensor) -> torch.Tensor:
        values = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return values.div_(255).sub_(self._scale[0]).div_(self._scale[1])


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
def decoders_agree() -> bool:
    """Whether simplejpeg and this Pillow decode a JPEG to the same pixels, tried once on colour and on grey."""
    noise = Image.effect_noise((83, 61), 90)
    for image in (Image.merge("RGB", (noise, noise.rotate(180), noise.rotate(90, expand=False))), noise):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)  # with the usual halved colour planes
        pixels = decode_jpeg(buffer.getvalue())
        if pixels is None or not np.array_equal(pixels, np.asarray(decode_image(buffer.getvalue(), "probe"))):
            return False
    return True


def as_image(pixels: np.ndarray) -> Image.Image:
    """Return `(height, width, 3)` or, with a byte to spare, `(height, width, 4)` pixels as an RGB image.

    Pillow stores RGB in four bytes a pixel, so the second kind is taken as it is, where Pillow lets it be called RGB.
    """
    if pixels.shape[2] == 3:
        return Image.fromarray(pixels)
    height, width, _ = pixels.shape
    image = Image.frombuffer("RGBX", (width, height), pixels, "raw", "RGBX", 0, 1)
    image.im.setmode("RGB")  # the core's own, without a copy
    image._mode = "RGB"
    return image


@functools.cache
def pixels_can_be_shared() -> bool:
    """Whether `as_image` works with this Pillow for pixels of four bytes, tried once."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    try:
        image = as_image(pixels)
        expected = Image.fromarray(np.ascontiguousarray(pixels[:, :, :3]))
        is_same = np.array_equal(np.asarray(image), np.asarray(expected))
        return is_same and image.resize((3, 4)).tobytes() == expected.resize((3, 4)).tobytes()
    except (AttributeError, ValueError, TypeError):
        return False


def columns_come_first(size: tuple[int, int], new_size: tuple[int, int]) -> bool:
    """Whether Pillow resizes columns before rows; sizes are (width, height).

    Every pass rounds, so the order shows: 0.2 grey levels on average. Until Pillow 13 rows always come first.
    """
    (width, height), (new_width, new_height) = size, new_size
    return _PILLOW_MAJOR >= 13 and height - new_height > max(0, 2 * (width - new_width))


@functools.cache
def passes_are_known() -> bool:
    """Whether `columns_come_first` is right about this Pillow, tried once on wide, tall, small and large pictures."""
    noise = np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)
    for width, height in ((160, 90), (90, 160), (60, 160), (40, 30), (30, 44), (100, 100)):
        image = Image.fromarray(noise[:height, :width])
        for new_size in ((48, 48), (90, 48), (48, 80)):
            whole = image.resize(new_size, Image.Resampling.BICUBIC)
            if (
                whole.tobytes()
                != _resize_in_passes(image, new_size, (0, 0, *new_size), Image.Resampling.BICUBIC).tobytes()
            ):
                return False
    return True


def resize_and_crop(
    image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int], method: Image.Resampling
) -> Image.Image:
    """Return what `image.resize(size, method).crop(box)` returns, without resizing twice what the crop drops."""
    if box == (0, 0, *size):
        return image.resize(size, method)
    if passes_are_known():
        return _resize_in_passes(image, size, box, method)
    return image.resize(size, method).crop(box)


def _resize_in_passes(
    image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int], method: Image.Resampling
) -> Image.Image:
    (width, height), (new_width, new_height), (left, top, right, bottom) = image.size, size, box
    if columns_come_first(image.size, size):
        image = _resize_rows_or_columns(image, (width, new_height), (0, top, width, bottom), method)
        return _resize_rows_or_columns(image, (new_width, image.height), (left, 0, right, image.height), method)
    # Only the rows that the second pass will read; the others stay black and are never looked at.
    first, last = _lines_read(height, new_height, top, bottom)
    rows = image if (first, last) == (0, height) else image.crop((0, first, width, last))
    rows = _resize_rows_or_columns(rows, (new_width, last - first), (left, 0, right, last - first), method)
    if rows.height != height:
        canvas = Image.new("RGB", (rows.width, height))
        canvas.paste(rows, (0, first))
        rows = canvas
    return _resize_rows_or_columns(rows, (rows.width, new_height), (0, top, rows.width, bottom), method)


def _resize_rows_or_columns(
    image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int], method: Image.Resampling
) -> Image.Image:
    """`image.resize(size, method).crop(box)`, where either width or height stays what it was."""
    across = size[0] != image.width
    old, new = (image.width, size[0]) if across else (image.height, size[1])
    first, last = (box[0], box[2]) if across else (box[1], box[3])
    if old == new:
        return image.crop(box)
    # Pillow reads a box as 32-bit floats. Where its edges are exact in those, weights inside it are those of the whole; so the
    # window grows to the next edges that are.
    start = next(line for line in range(first, -1, -1) if _is_exact(line * old, new))
    end = next((line for line in range(last, new + 1) if _is_exact(line * old, new)), new)
    if (start, end) == (0, new):
        return image.resize(size, method).crop(box)
    edges = (start * old / new, end * old / new)
    if across:
        part = image.resize((end - start, image.height), method, box=(edges[0], 0, edges[1], image.height))
        return part.crop((first - start, box[1], last - start, box[3]))
    part = image.resize((image.width, end - start), method, box=(0, edges[0], image.width, edges[1]))
    return part.crop((box[0], first - start, box[2], last - start))


def _is_exact(numerator: int, denominator: int) -> bool:
    """Whether a quotient of pixels is below 2^14 and has no more than ten binary places, which fits into a 32-bit float."""
    return (numerator << 10) % denominator == 0 and numerator < denominator << 14


def _lines_read(old: int, new: int, first: int, last: int) -> tuple[int, int]:
    """The first and past the last of `old` lines that lines `first` to `last` of `new` are made of, and a little more."""
    scale = old / new
    reach = 2 * max(scale, 1.0) + 2  # of the bicubic filter, the wider of the two
    return max(0, int(first * scale - reach)), min(old, int(last * scale + reach) + 1)


def recommended_num_workers(num_local_ranks: int = 1) -> int:
    """Return how many dataloader workers to start for each process: the cores it has, less one, at most 8.

    One core decodes several hundred pictures a second, more than one GPU trains on; beyond eight workers only memory grows.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores // max(1, num_local_ranks) - 1))
