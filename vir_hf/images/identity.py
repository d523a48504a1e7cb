"""Which picture is this? Decided here and nowhere else: by content where there is content, else by the place of the file.

A name that an embedded picture carries says nothing: `datasets` keeps only the last part of a path, so that `red/0001.png` and
`blue/0001.png` are both called `0001.png`. Shared prefixes, rows brought together by image, the feature cache, the check before
the first step, what a resumed run is compared by, and held-out splits all ask `picture_identity`, or `picture_identities` for
whole columns.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from vir_hf.errors import ImageError
from vir_hf.images.folder import is_url, split_place
from vir_hf.images.opening import may_be_decoded

CONTENT = "bytes:"  # what the identity of undecoded content begins with; a place never does
_ORIENTATION = 0x0112
_ASKED_BEFORE_LISTED = 64
_MAX_PATH = 4096  # characters; a longer text is no place but content


class Itself:
    """The identity of something that cannot be compared: equal to itself alone, which it keeps alive."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Itself) and other.source is self.source

    def __hash__(self) -> int:
        return id(self.source)  # of no other object while this one is held


def picture_identity(source: Any) -> Hashable:
    """Return what two references to one picture have in common, and two different pictures do not.

    Args:
        source: what `open_image` takes: a place, undecoded content, `{"path", "bytes"}` or a PIL image; or an array or tensor.

    Returns:
        `bytes:` and a digest for undecoded content; `pixels:` or `array:` and a digest for what is opened, which covers size,
        mode, palette, transparency and orientation; for a place without content the real path, whatever its spelling, or the
        URL. Anything else is an `Itself`. A file and its own content embedded elsewhere are told apart: no file is read.
    """
    if isinstance(source, Mapping):
        content = source.get("bytes")
        if content is None:
            place = source.get("path")
            return Itself(source) if place is None or place == "" else picture_identity(place)
        return CONTENT + _digest(content) if isinstance(content, (bytes, bytearray, memoryview)) else Itself(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return CONTENT + _digest(source)
    if isinstance(source, (str, os.PathLike)):
        return _identity_of_place(os.fspath(source))
    if isinstance(source, Image.Image):
        return _identity_of_image(source)
    if isinstance(source, np.ndarray):
        return _identity_of_array(source)
    torch = sys.modules.get("torch")  # where it is not loaded there are no tensors
    if torch is not None and isinstance(source, torch.Tensor):
        return _identity_of_tensor(source)
    return Itself(source)


class Folders:
    """Where folders lead, for one pass over a data set: each is followed once, and listed if it is asked about often."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, list[int], set[str]]] = {}

    def real_path(self, path: str) -> str:
        """Return `os.path.realpath` of a path."""
        folder, separator, name = path.rpartition(os.sep)
        if not separator or name in ("", os.curdir, os.pardir):
            return os.path.realpath(path)
        if folder not in self._known:
            self._known[folder] = (os.path.realpath(folder or os.sep), [0], set())
        real, num_asked, links = self._known[folder]
        num_asked[0] += 1
        if num_asked[0] == _ASKED_BEFORE_LISTED:
            with contextlib.suppress(OSError), os.scandir(real) as entries:
                links |= {entry.name for entry in entries if entry.is_symlink()}
        place = path if real == folder else os.path.join(real, name)
        is_link = name in links if num_asked[0] >= _ASKED_BEFORE_LISTED else os.path.islink(place)
        return os.path.realpath(place) if is_link else place


def picture_identities(images: pa.Array | pa.ChunkedArray, folders: Folders | None = None) -> pa.Array:
    """Return `picture_identity` of every picture of a column of lists of `{"bytes", "path"}`, flattened; null for neither.

    Args:
        folders: one for all parts of a data set, which spares following its folders again for each.
    """
    pictures = _as_array(images).flatten()
    places, contents = pictures.field("path"), pictures.field("bytes")
    if contents.null_count == len(contents):
        return place_identities(places, folders)
    digests = [CONTENT + _digest(content.as_buffer()) if content.is_valid else None for content in contents]
    return pc.coalesce(pa.array(digests, pa.string()), place_identities(places, folders))


def place_identities(places: pa.Array, folders: Folders | None = None) -> pa.Array:
    """Return `picture_identity` of every place of a column; each distinct one is followed once."""
    encoded = places.dictionary_encode()
    folders = folders or Folders()
    names = [_identity_of_place(place, folders) if place else None for place in encoded.dictionary.to_pylist()]
    return pa.array(names, pa.string()).take(encoded.indices)


def _as_array(images: pa.Array | pa.ChunkedArray) -> pa.Array:
    if not isinstance(images, pa.ChunkedArray):
        return images
    return images.chunk(0) if images.num_chunks == 1 else images.combine_chunks()


def _digest(content: Any, *about: object) -> str:
    digest = hashlib.blake2b(repr(about).encode() if about else b"", digest_size=16)
    if isinstance(content, memoryview) and not content.contiguous:
        content = content.tobytes()
    digest.update(content)
    return digest.hexdigest()


def _identity_of_place(place: str, folders: Folders | None = None) -> str:
    in_archive = None
    if "://" in place:
        try:
            in_archive = split_place(place)
        except ImageError:
            return place
        if not in_archive and is_url(place):
            return place
    elif place.startswith("data:") or len(place) > _MAX_PATH:
        return "text:" + _digest(place.encode("utf-8", "surrogatepass"))
    try:
        real = (folders.real_path if folders else os.path.realpath)(in_archive[0] if in_archive else place)
    except (OSError, ValueError):  # no path: a zero byte, half a character
        return place
    return f"{place[:6]}{in_archive[1]}::{real}" if in_archive else real


def _identity_of_image(image: Image.Image) -> Hashable:
    if not may_be_decoded(image):
        return Itself(image)
    try:
        content = image.tobytes()
        palette = image.getpalette(None)
        palette_mode = None if palette is None else image.im.getpalettemode()
    except Exception:  # a file that is cut or damaged: whatever its decoder raises, and opening it will say so
        return Itself(image)
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block, which opening passes over as well
        orientation = 1
    about = (image.mode, image.size, palette_mode, palette, image.info.get("transparency"), orientation)
    return "pixels:" + _digest(content, *about)


def _identity_of_array(array: np.ndarray) -> Hashable:
    if array.dtype.hasobject or isinstance(array, np.ma.MaskedArray):
        return Itself(array)
    return "array:" + _digest(array.tobytes(), array.dtype.descr, array.shape)


def _identity_of_tensor(tensor: Any) -> Hashable:
    torch = sys.modules["torch"]
    try:
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    except (RuntimeError, TypeError, NotImplementedError):  # sparse, quantised, without data
        return Itself(tensor)
    return "array:" + _digest(content.tobytes(), str(tensor.dtype), tuple(tensor.shape))
