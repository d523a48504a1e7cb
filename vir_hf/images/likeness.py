"""Which images look alike though their content differs: saved again, resized, in another format.

A hash of 64 bits finds candidates, and small copies of both images decide: drawn images and screenshots share hashes easily.

Source of the hash: Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010, section 3.1 (DCT).
"""

from __future__ import annotations

import numpy as np
from PIL import Image

NEAR_BITS = 10  # of 64; JPEG at quality 30 and a quarter of the size stay below it on photographs
NEAR_LEVELS = 10.0  # of 255, the mean difference of two copies of 32 by 32
_SIDE = 32
_KEPT = 8
_CHUNK = 2**22


def _cosines() -> np.ndarray:
    places = np.arange(_SIDE)
    return np.cos(np.pi * np.outer(np.arange(_KEPT), 2 * places + 1) / (2 * _SIDE))


_COSINES = _cosines()


def small_copy(image: Image.Image) -> np.ndarray:
    """Return `(32, 32, 3)` of an RGB image, whatever its shape, as 8-bit levels."""
    return np.asarray(image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.uint8)


def perceptual_hash(copy: np.ndarray) -> int:
    """Return 64 bits of a `small_copy`: whether each low frequency of its greys is above their median."""
    greys = copy.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    low = _COSINES @ greys @ _COSINES.T
    values = np.round(low.ravel(), 6)  # so that a flat image has one hash, and not that of rounding
    values[0] = 0.0  # the mean level says nothing of what is shown
    bits = values > np.median(values)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_pairs(hashes: np.ndarray, others: np.ndarray, most: int = NEAR_BITS) -> list[tuple[int, int]]:
    """Return the places of every pair of hashes, one of each array, that differ in at most so many bits.

    Args:
        hashes, others: `(n,)` and `(m,)` of uint64.
    """
    pairs: list[tuple[int, int]] = []
    rows = max(1, _CHUNK // max(1, len(others)))
    for start in range(0, len(hashes), rows):
        apart = np.bitwise_count(hashes[start : start + rows, None] ^ others[None, :])
        pairs += [(start + int(row), int(column)) for row, column in zip(*np.nonzero(apart <= most), strict=True)]
    return pairs


def look_alike(copy: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two small copies show the same, in their colours too."""
    return float(np.abs(copy.astype(np.int16) - other).mean()) <= NEAR_LEVELS
