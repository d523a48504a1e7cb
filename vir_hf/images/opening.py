"""One picture, opened safely and always the same way: `open_image` gives RGB, or an error that names the reason.

How other kinds become RGB: the EXIF orientation is applied; transparency is laid over white; the first frame of an
animation is taken; 16-bit greys are scaled to 8 bits; palette, grey, CMYK, YCbCr, LAB and HSV are converted by Pillow.
Colour profiles are ignored, as the models' own processors do.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import warnings
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

from vir_hf.errors import DataError, ImageError
from vir_hf.images.folder import ImageFolder, is_url, open_file, read_bytes, split_place

MAX_PIXELS = 89_478_485  # Pillow's own limit for a warning (a quarter of a gigabyte as RGB); we refuse there
_ORIENTATION = 0x0112
_APP1, _START_OF_SCAN = 0xE1, 0xDA  # markers of a JPEG file
_TAIL_BYTES = 2**12
_ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # what stands at or near the end of a whole file
# Pillow's words for the kinds that are opened, the frequent ones first: plain grids of pixels that Pillow decodes by itself. Its
# others start another program (EPS: Ghostscript), hand over to whatever a program registered (WMF, GRIB, HDF5, BUFR), open the
# picture inside them as any kind (IPTC) or unpack without a limit (FITS). HEIF is opened where a plugin for it is registered.
FORMATS = (
    *(
        "JPEG",
        "PNG",
        "WEBP",
        "GIF",
        "BMP",
        "TIFF",
        "MPO",
        "AVIF",
        "HEIF",
        "JPEG2000",
        "PPM",
        "DIB",
        "ICO",
        "CUR",
        "ICNS",
    ),
    *("TGA", "PSD", "PCX", "DCX", "DDS", "SGI", "QOI", "SUN", "XBM", "XPM", "MSP", "IM", "BLP", "FLI"),
)
_SAME_FORMATS = {"JPEG": ("MPO",), "PNG": ("APNG",), "TIFF": ("MPO",), "DIB": ("BMP",), "BMP": ("DIB",)}

ImageSource = str | os.PathLike[str] | bytes | dict[str, Any] | Image.Image


def open_image(
    source: ImageSource, image_folder: str | os.PathLike[str] | ImageFolder | None = None, *, allow_urls: bool = False
) -> Image.Image:
    """Return the picture as a loaded PIL image in mode RGB.

    Args:
        source: a path (relative to `image_folder`, or absolute), `zip://inner::/archive.zip`, `tar://inner::/archive.tar`,
            the file's bytes, `{"path": ..., "bytes": ...}` as `datasets` keeps an undecoded image, or a PIL image.
        image_folder: with it, a path must lie inside it, symbolic links followed.
        allow_urls: whether a path may be an http(s) URL.

    Raises:
        ImageError: a `DataError` whose `kind` is one of image_missing, image_empty, image_truncated, image_unreadable,
            image_too_large, image_outside_folder, image_url.
    """
    if isinstance(source, Image.Image):
        if not may_be_decoded(source):
            raise _unknown_kind("image", f"is a {source.format} file")
        return _load(source, "image")
    data, name = read_image_bytes(source, image_folder, allow_urls=allow_urls)
    return decode_image(data, name)


def read_image_bytes(
    source: str | os.PathLike[str] | bytes | dict[str, Any],
    image_folder: str | os.PathLike[str] | ImageFolder | None = None,
    *,
    allow_urls: bool = False,
) -> tuple[bytes, str]:
    """Return the undecoded bytes of a source and the name to call it by in errors."""
    if isinstance(source, dict):
        data, path = source.get("bytes"), source.get("path")
        if isinstance(data, (bytes, bytearray, memoryview)):
            return bytes(data), str(path or "embedded image")
        if data is not None:  # bytes() of a number would be so many zeros
            raise ImageError("image_unreadable", f"image: bytes of type {type(data).__name__}; expected bytes.")
        if not path:
            raise ImageError("image_missing", "image: has neither a path nor bytes; expected one of them.")
        source = path
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source), "image bytes"
    if not isinstance(source, (str, os.PathLike)):
        raise DataError(
            f"image: found {type(source).__name__}; expected a path, bytes, {{path, bytes}} or a PIL image."
        )
    path = os.fspath(source)
    if image_folder is not None and not (allow_urls and is_url(path)):
        folder = image_folder if isinstance(image_folder, ImageFolder) else ImageFolder(image_folder)
        path = folder.locate(path)
    return read_bytes(path, allow_urls=allow_urls), path


def decode_image(data: bytes, name: str) -> Image.Image:
    """Return the RGB image encoded in `data`; `name` stands in errors."""
    if not data:
        raise ImageError("image_empty", f"{name}: the file is empty (0 bytes). Fetch it again, or drop its rows.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damaged metadata; what is refused is decided here
        return _load(open_checked(io.BytesIO(data), name), name)


def open_lazily(file: BinaryIO) -> ImageFile.ImageFile:
    """Return Pillow's image of a file of one of `FORMATS`, undecoded. Nothing else calls `Image.open`.

    Raises:
        UnidentifiedImageError, or whatever Pillow raises at a damaged header.
    """
    return Image.open(file, formats=_registered_formats())


def may_be_decoded(image: Image.Image) -> bool:
    """Whether a PIL image that somebody else opened is of one of `FORMATS`, or was never a file."""
    return not isinstance(image, ImageFile.ImageFile) or image.format in FORMATS


@functools.cache
def _registered_formats() -> tuple[str, ...]:
    Image.init()  # for a kind it does not know Pillow would raise a KeyError
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _unknown_kind(name: str, found: str) -> ImageError:
    return ImageError(
        "image_unreadable",
        f"{name}: {found}; expected JPEG, PNG, WebP, GIF, BMP, TIFF or another raster image that Pillow {Image.__version__} "
        "decodes by itself. Fetch it again, convert it, or drop its rows.",
    )


def read_image_size(source: str | os.PathLike[str] | bytes | dict[str, Any]) -> tuple[int, int]:
    """Return width and height in pixels as the header says, before the orientation is applied; nothing is decoded.

    Raises:
        ImageError: as `open_image`.
    """
    data, name = read_image_bytes(source)
    if not data:
        decode_image(data, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return open_checked(io.BytesIO(data), name).size


def open_checked(file: BinaryIO, name: str) -> Image.Image:
    """Return Pillow's lazily opened image: its header is read, its size checked, nothing is decoded."""
    try:
        image = open_lazily(file)
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+ pixels", str(error))  # Pillow's own limit, which it goes on to name, is twice ours
        raise ImageError(
            "image_too_large",
            f"{name}: {found.group() if found else 'too many pixels'}; expected at most {MAX_PIXELS} in all. "
            "Shrink the picture.",
        ) from error
    except UnidentifiedImageError as error:
        raise _unknown_kind(name, "is no image file of a kind opened here") from error
    except Exception as error:  # damaged headers make Pillow's plugins raise almost anything
        kind = "image_too_large" if "too large" in str(error) else "image_unreadable"
        raise ImageError(
            kind, f"{name}: damaged header ({_describe(error)}). Fetch it again, or drop its rows."
        ) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            "image_too_large",
            f"{name}: {width}x{height} pixels; expected at most {MAX_PIXELS} in all. Shrink the picture.",
        )
    return image


def _load(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
    except Exception as error:  # the same: whatever broken data leads a decoder to
        kind = "image_truncated" if "truncated" in str(error).lower() else "image_unreadable"
        raise ImageError(
            kind, f"{name}: cannot be decoded ({_describe(error)}). Fetch it again, or drop its rows."
        ) from error
    return to_rgb(image, name)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


class ImageHeader(NamedTuple):
    """What the first bytes of an image file say: size in pixels, Pillow's word for the format, size of the file.

    `is_deep` says that its greys have more than 8 bits, which become 8.
    """

    width: int
    height: int
    format: str
    num_bytes: int
    is_deep: bool = False


def read_image_header(source: str | bytes | dict[str, Any]) -> ImageHeader:
    """Return the header of an image file at a place (or of its bytes) after making sure that its end is there.

    Nothing is decoded, unless the end looks unusual; then decoding decides. So damage in the middle of a file is not seen.

    Raises:
        ImageError: as `open_image`.
    """
    if isinstance(source, str) and not split_place(source):
        try:
            with open_file(source) as file:
                return _read_header(file, source)
        except ImageError:
            raise
        except (OSError, ValueError):
            pass  # what is wrong with the file is said below
    data, name = read_image_bytes(source)
    return _read_header(io.BytesIO(data), name)


def _read_header(file: BinaryIO, name: str) -> ImageHeader:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        num_bytes = file.seek(0, os.SEEK_END)
        if num_bytes == 0:
            decode_image(b"", name)
        file.seek(max(0, num_bytes - _TAIL_BYTES))
        tail = file.read()
        file.seek(0)
        image = open_checked(file, name)
        header = ImageHeader(*image.size, image.format or "", num_bytes, image.mode.startswith(("I", "F")))
        ending = _ENDINGS.get(header.format)
        if ending is None or ending not in tail:
            _load(image, name)
    return header


def count_greys(source: str | bytes | dict[str, Any]) -> tuple[int, int]:
    """Return how many greys a deep image has, and how many of the 256 are left of them in what the model is shown.

    Raises:
        ImageError: as `open_image`.
    """
    data, name = read_image_bytes(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = open_checked(io.BytesIO(data), name)
        shown = _load(image, name)
        return len(np.unique(np.asarray(image))), len(np.unique(np.asarray(shown)[..., 0]))


def is_misnamed(name: str, image_format: str) -> bool:
    """Whether a file's suffix promises another format than it has."""
    promised = Image.registered_extensions().get(os.path.splitext(name)[1].lower())
    return promised is not None and image_format not in (promised, *_SAME_FORMATS.get(promised, ()))


def is_upright(data: bytes) -> bool:
    """Whether a JPEG file records no orientation other than upright."""
    if not _may_have_orientation(data):
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bool(open_lazily(io.BytesIO(data)).getexif().get(_ORIENTATION, 1) == 1)
    except Exception:  # a damaged header: Pillow shall say so
        return False


def _may_have_orientation(data: bytes) -> bool:
    """Whether a JPEG file has the segment (APP1) that EXIF and XMP lie in, or segments that cannot be followed."""
    position = 2
    while data[position : position + 1] == b"\xff" and len(data) > position + 4:
        marker = data[position + 1]
        if marker == _START_OF_SCAN:
            return False
        if marker == _APP1:
            return True
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return True


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """Return the picture upright and in mode RGB, by the rules this module's docstring states."""
    with contextlib.suppress(Exception):  # a damaged EXIF block says nothing about the pixels, which stay as they are
        image = ImageOps.exif_transpose(image)
    try:
        return _to_rgb(image)
    except (ValueError, OSError, ImageCms.PyCMSError) as error:
        raise ImageError(
            "image_unreadable", f"{name}: colour mode {image.mode} cannot become RGB ({error})."
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_scale_to_bytes(np.asarray(image), is_fraction=image.mode == "F")).convert("RGB")
    if image.mode == "LAB":
        lab_to_rgb = ImageCms.buildTransform(
            ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB"
        )
        converted = ImageCms.applyTransform(image, lab_to_rgb)
        if converted is None:
            raise ValueError("no LAB conversion")
        return converted
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def _scale_to_bytes(values: np.ndarray, is_fraction: bool) -> np.ndarray:
    """Return 32-bit grey values as 0..255: floats up to 1 times 255, up to 255 as they are, anything larger as 16-bit."""
    values = np.nan_to_num(values.astype(np.float64))
    largest = float(values.max(initial=0.0))
    if is_fraction and largest <= 1.0:
        values = values * 255
    elif largest > 255:
        values = values / 257
    return np.clip(np.round(values), 0, 255).astype(np.uint8)
