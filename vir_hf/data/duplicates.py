"""Rows that say the same about the same image, or about images that look the same: the first of them is kept."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from vir_hf.errors import ImageError
from vir_hf.images.identity import picture_identity
from vir_hf.images.opening import open_image

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

WAYS = ("content", "looks")
# Of 128 bits, in how many two images of the same picture differ at most after JPEG and a change of size; measured in the tests.
MAX_DISTANCE = 8
MAX_COLOUR_DISTANCE = 8
_SIDE = 8


class Duplicates:
    """Rows that were met, of one source after the other.

    Args:
        way: `content`: the same turns and the same images, by content where there is any, else by place. `looks`: the same
            turns and images that look alike, which are decoded for it.
    """

    def __init__(self, way: str) -> None:
        self.way = way
        self._contents: set[bytes] = set()
        self._looks: dict[bytes, list[list[Look | None]]] = {}

    def left_out_of(self, rows: Dataset, source: str) -> Dataset:
        """Return the data set without rows that repeat one that was met, and log how many there were.

        Args:
            rows: what `load_llava_dataset(..., decode_images=False)` returns.
            source: what the log calls it.
        """
        kept = [number for number, row in enumerate(rows) if self._is_new(row)]
        if len(kept) == len(rows):
            return rows
        num_left_out = len(rows) - len(kept)
        logger.info("%s: data.deduplicate=%s leaves out %d of %d rows", source, self.way, num_left_out, len(rows))
        return rows.select(kept)

    def _is_new(self, row: dict[str, Any]) -> bool:
        turns = _digest_of_turns(row)
        if self.way == "content":
            images = repr([picture_identity(image) for image in row["images"]])
            digest = hashlib.blake2b(turns + images.encode()).digest()
            is_new = digest not in self._contents
            self._contents.add(digest)
            return is_new
        looks = [_look(image) for image in row["images"]]
        earlier = self._looks.setdefault(turns, [])
        is_new = not any(_are_alike(looks, others) for others in earlier)
        if is_new:
            earlier.append(looks)
        return is_new


class Look(NamedTuple):
    """What an image looks like: a difference hash of 128 bits, and its mean colour (red, green, blue)."""

    bits: int
    colour: tuple[int, int, int]

    def is_like(self, other: Look) -> bool:
        """Whether two images look the same."""
        return distance(self.bits, other.bits) <= MAX_DISTANCE and all(
            abs(one - another) <= MAX_COLOUR_DISTANCE for one, another in zip(self.colour, other.colour, strict=True)
        )


def _digest_of_turns(row: dict[str, Any]) -> bytes:
    turns = [
        (message["role"], message.get("supervised"), [(part["type"], part.get("text")) for part in message["content"]])
        for message in row["messages"]
    ]
    return hashlib.blake2b(json.dumps(turns).encode()).digest()


def _look(image: Any) -> Look | None:
    """Return the look of an image, or None for one that cannot be opened, which the check of images tells of."""
    try:
        return look_of(open_image(image))
    except ImageError:
        return None


def _are_alike(looks: list[Look | None], others: list[Look | None]) -> bool:
    return len(looks) == len(others) and all(
        one is not None and other is not None and one.is_like(other) for one, other in zip(looks, others, strict=True)
    )


def look_of(image: Image.Image) -> Look:
    """Return what an RGB image looks like: how its brightness changes across and down, and its mean colour.

    Source: difference hashes, https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html.
    """
    grey = image.convert("L")
    across = np.asarray(grey.resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), dtype=np.int16)
    down = np.asarray(grey.resize((_SIDE, _SIDE + 1), Image.Resampling.BOX), dtype=np.int16)
    # A step of less than 3 of 256 is no edge: compression makes and takes such.
    bits = np.concatenate([(np.diff(across, axis=1) > 2).ravel(), (np.diff(down, axis=0) > 2).ravel()])
    colour = image.convert("RGB").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    return Look(int.from_bytes(np.packbits(bits).tobytes(), "big"), tuple(colour))  # type: ignore[arg-type]


def distance(one: int, other: int) -> int:
    """Return in how many bits two hashes differ."""
    return (one ^ other).bit_count()
