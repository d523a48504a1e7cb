"""An image's width and height as `open_image` would return it: from its header, without decoding, wherever that can tell."""

from __future__ import annotations

import functools
import io
import warnings
from typing import BinaryIO

from PIL import Image

from vir_hf.errors import ImageError
from vir_hf.images.folder import file_stamp, open_file, split_place
from vir_hf.images.opening import ImageSource, decode_image, open_checked, open_image, read_image_bytes

_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # orientations that exchange width and height
# Kinds whose size and orientation Pillow knows when it has read the header. Of the others the image is decoded.
_TOLD_BY_HEADER = ("JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "PPM", "TGA", "PCX", "QOI")
_PNG_START = b"\x89PNG\r\n\x1a\n"
# Where an orientation may stand in a PNG file, before its pixels or after them: a chunk, and two words that texts begin with.
_EXIF_CHUNK, _TEXT_CHUNKS = b"eXIf", (b"iTXt", b"zTXt", b"tEXt")
_TEXTS_OF_ORIENTATION = (b"Raw profile type ", b"XML:com.adobe.xmp")


def upright_size(source: ImageSource) -> tuple[int, int]:
    """Return width and height of an image in pixels, its orientation applied.

    Args:
        source: what `open_image` takes.

    Raises:
        ImageError: as `open_image`, of what the header shows.
    """
    if isinstance(source, Image.Image):
        return open_image(source).size
    path = source.get("path") if isinstance(source, dict) and source.get("bytes") is None else source
    if isinstance(path, str) and not split_place(path) and (stamp := file_stamp(path)) is not None:
        try:
            return _size_of_file_at(path, stamp)
        except ImageError:
            raise
        except (OSError, ValueError):
            pass  # what is wrong with the file is said below
    data, name = read_image_bytes(source)
    if not data:
        decode_image(data, name)
    return _size_of_file(io.BytesIO(data), name)


@functools.lru_cache(maxsize=4096)  # rows ask for one image several times: as they are measured, encoded and shown
def _size_of_file_at(path: str, stamp: tuple[int, int]) -> tuple[int, int]:
    with open_file(path) as file:
        return _size_of_file(file, path)


def _size_of_file(file: BinaryIO, name: str) -> tuple[int, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = open_checked(file, name)
        if image.format == "PNG":
            is_told = not _may_be_turned(file)
            orientation = 1
        else:
            is_told = image.format in _TOLD_BY_HEADER
            orientation = image.getexif().get(_ORIENTATION, 1) if is_told else 1
        if is_told:
            width, height = image.size
            return (height, width) if orientation in _TURNED else (width, height)
        file.seek(0)
        return decode_image(file.read(), name).size


def _may_be_turned(file: BinaryIO) -> bool:
    """Whether a PNG file holds anything that may say an orientation; its pixels are passed over."""
    file.seek(len(_PNG_START))
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind == b"IEND":
            return False
        if kind == _EXIF_CHUNK or (kind in _TEXT_CHUNKS and file.read(17).startswith(_TEXTS_OF_ORIENTATION)):
            return True
        file.seek(length + 4 - (17 if kind in _TEXT_CHUNKS else 0), io.SEEK_CUR)
    return True  # a damaged file: decoding says so
