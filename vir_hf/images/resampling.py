"""Pillow's resize to the bit, at a fraction of its time: pixels are padded, resized, cropped and normalised in one go.

Pillow resizes 8-bit pictures in two passes, over rows and over columns. In each, a new line is a weighted sum of old lines;
weights are whole multiples of 2**-22, and the sum is rounded to 8 bits. Whole numbers give the same sum in any order, so the
kernels below take the order that vector units like, one weight for all bytes of a line, compiled by numba for the CPU at hand.
For columns the picture is turned on its side and back, which costs less than it gains. Padding is never drawn: what it adds to a
sum is its colour times the weights that fall on it.

`obstacle` tries once whether the bits are those of this Pillow; callers take Pillow itself where they are not.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

_PILLOW_MAJOR = int(Image.__version__.split(".")[0])
_WEIGHT_BITS = 22  # weights are multiples of 2**-22: a sum of them times 255 fits into 32 bits
_HALF = 1 << (_WEIGHT_BITS - 1)
_REACH = {"bilinear": 1.0, "bicubic": 2.0}  # of a filter to either side, in pixels of the smaller picture
_BICUBIC_SLOPE = -0.5
_TILE = 8  # lines and columns turned at once


class Side(NamedTuple):
    """What becomes of one side of a picture, its rows or its columns; all in pixels."""

    length: int
    before: int  # padding
    after: int
    new_length: int  # of the padded side, resized
    start: int  # the window of the resized side that is kept
    end: int

    @property
    def padded(self) -> int:
        return self.before + self.length + self.after


class _Sums(NamedTuple):
    """One pass: new line `i` is the sum of `weights[i, tap]` times line `base[i] + tap`, `low[i] <= tap < high[i]`."""

    base: np.ndarray  # (new,) int64, counted from the first line that is read
    low: np.ndarray  # (new,) int64
    high: np.ndarray
    weights: np.ndarray  # (new, taps) int32
    outside: np.ndarray  # (new,) int32, the weight that falls on padding
    first: int  # lines of the picture that are read at all
    last: int


def resample(
    pixels: np.ndarray,
    rows: Side,
    columns: Side,
    *,
    method: str,
    colour: tuple[int, ...] = (0, 0, 0),
    table: np.ndarray,
    out: np.ndarray,
) -> None:
    """Write the picture padded, resized, cropped and looked up in `table` to `out`.

    Args:
        pixels: `(height, width, 4)` uint8, C-contiguous and writable; of each pixel the first three bytes count.
        rows, columns: what becomes of the two sides.
        method: "bicubic" or "bilinear", Pillow's filters of these names.
        colour: of the padding, three values of 0..255.
        table: `(3, 256)` float32, what each value of each channel becomes.
        out: `(3, rows.end - rows.start, columns.end - columns.start)` float32, C-contiguous.

    Raises:
        ValueError: shapes that do not go together; the kernels check no bounds.
    """
    shape = (3, rows.end - rows.start, columns.end - columns.start)
    if pixels.shape != (rows.length, columns.length, 4) or out.shape != shape or table.shape != (3, 256):
        raise ValueError(
            f"pixels {pixels.shape}, out {out.shape}, table {table.shape}; expected ({rows.length}, {columns.length}, 4), "
            f"{shape} and (3, 256)."
        )
    if not all(0 <= side.start <= side.end <= side.new_length for side in (rows, columns)) or len(colour) != 3:
        raise ValueError(
            f"{rows}, {columns}, colour {colour}: expected windows inside the new lengths, and a colour of three values."
        )
    down, across = _plan(rows, method), _plan(columns, method)
    channels = np.array([*colour, 0], dtype=np.int32)
    picture = pixels.view(np.uint32)[:, :, 0][down.first : down.last]  # (height, width), a pixel an element
    if columns_come_first((columns.padded, rows.padded), (columns.new_length, rows.new_length)):
        picture = _resize_columns(_resize_rows(picture, down, channels), across, channels)
    else:
        picture = _resize_rows(_resize_columns(picture, across, channels), down, channels)
    _, _, look_up = _kernels()
    look_up(picture.view(np.uint8).reshape(*picture.shape, 4), table, out)


def _resize_columns(picture: np.ndarray, plan: _Sums, colour: np.ndarray) -> np.ndarray:
    turn, _, _ = _kernels()
    turned = np.empty((plan.last - plan.first, len(picture)), np.uint32)
    turn(picture, plan.first, turned)
    narrow = _resize_rows(turned, plan, colour)
    upright = np.empty((len(picture), len(narrow)), np.uint32)
    turn(narrow, 0, upright)
    return upright


def _resize_rows(picture: np.ndarray, plan: _Sums, colour: np.ndarray) -> np.ndarray:
    """Return the weighted sums of the lines `plan.first` to `plan.last`, which are all that `picture` has."""
    _, add_up, _ = _kernels()
    resized = np.empty((len(plan.base), picture.shape[1]), np.uint32)
    sums = (plan.base, plan.low, plan.high, plan.weights, plan.outside)
    add_up(picture.view(np.uint8), *sums, colour, resized.view(np.uint8))
    return resized


@functools.lru_cache(maxsize=256)
def _plan(side: Side, method: str) -> _Sums:
    """The weights of one pass, by the formulas of Pillow's filters, in 64-bit floats as there."""
    scale = side.padded / side.new_length
    stretch = max(scale, 1.0)
    reach = _REACH[method] * stretch
    centres = (np.arange(side.start, side.end) + 0.5) * scale
    first = np.maximum((centres - reach + 0.5).astype(np.int64), 0)
    count = np.minimum((centres + reach + 0.5).astype(np.int64), side.padded) - first
    taps = np.arange(2 * math.ceil(reach) + 1)
    positions = first[:, None] + taps  # (new, taps), lines of the padded picture
    values = _FILTERS[method](np.abs((positions - centres[:, None] + 0.5) * (1.0 / stretch)))
    values[taps >= count[:, None]] = 0.0
    totals = np.zeros(len(values))
    for tap in taps:  # one after the other, as Pillow adds: another order may round otherwise
        totals += values[:, tap]
    scaled = values / totals[:, None] * (1 << _WEIGHT_BITS)
    weights = np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int32)
    is_padding = (positions < side.before) | (positions >= side.before + side.length)
    outside = np.where(is_padding, weights, 0).sum(axis=1, dtype=np.int32)
    base = first - side.before
    low, high = np.maximum(-base, 0), np.minimum(count, side.length - base)
    reads = low < high
    first_read = int((base + low)[reads].min(initial=side.length))
    last_read = int((base + high)[reads].max(initial=first_read))
    return _Sums(base - first_read, low, high, weights, outside, first_read, last_read)


def _bilinear(distance: np.ndarray) -> np.ndarray:
    return np.where(distance < 1.0, 1.0 - distance, 0.0)


def _bicubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic with slope -0.5, its operations in Pillow's order, which decides the last bit."""
    a, x = _BICUBIC_SLOPE, distance
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


_FILTERS = {"bilinear": _bilinear, "bicubic": _bicubic}


def columns_come_first(size: tuple[int, int], new_size: tuple[int, int]) -> bool:
    """Whether Pillow resizes over the height before over the width; sizes are (width, height).

    Every pass rounds, so the order shows: 0.2 grey levels on average. Before Pillow 13 only pictures a hundred times taller than
    wide are shortened first.
    """
    (width, height), (new_width, new_height) = size, new_size
    if _PILLOW_MAJOR < 13:
        return height > 100 * width and new_height < height
    return height - new_height > max(0, 2 * (width - new_width))


def _turn(picture, first, out):  # type: ignore[no-untyped-def]
    """Write columns of a picture from `first` on as lines: `out[i, j] = picture[j, first + i]`."""
    num_lines, num_columns = out.shape[1], out.shape[0]
    for top in range(0, num_lines, _TILE):
        for left in range(0, num_columns, _TILE):
            if top + _TILE <= num_lines and left + _TILE <= num_columns:
                for line in range(_TILE):  # of known length, so that it is unrolled
                    for column in range(_TILE):
                        out[left + column, top + line] = picture[top + line, first + left + column]
            else:
                for line in range(top, min(top + _TILE, num_lines)):
                    for column in range(left, min(left + _TILE, num_columns)):
                        out[column, line] = picture[line, first + column]


def _add_up(lines, base, low, high, weights, outside, colour, out):  # type: ignore[no-untyped-def]
    """Write the weighted sums of lines; every fourth byte of a line is the same channel."""
    width = lines.shape[1]
    padding = np.empty(width, np.int32)
    for i in range(width):
        padding[i] = colour[i % 4]
    total = np.empty(width, np.int32)
    for new in range(out.shape[0]):
        padding_weight = outside[new]
        for i in range(width):
            total[i] = _HALF + padding_weight * padding[i]
        for tap in range(low[new], high[new]):
            weight = weights[new, tap]
            line = lines[base[new] + tap]
            for i in range(width):
                total[i] += weight * np.int32(line[i])
        for i in range(width):
            out[new, i] = min(max(total[i] >> _WEIGHT_BITS, 0), 255)


def _look_up(pixels, table, out):  # type: ignore[no-untyped-def]
    """Write `table[channel, value]` of every pixel, channel by channel."""
    for row in range(pixels.shape[0]):
        for column in range(pixels.shape[1]):
            for channel in range(3):
                out[channel, row, column] = table[channel, pixels[row, column, channel]]


_SIGNATURES: dict[Callable[..., None], str] = {
    _turn: "void(uint32[:, ::1], int64, uint32[:, ::1])",
    _add_up: "void(uint8[:, ::1], int64[::1], int64[::1], int64[::1], int32[:, ::1], int32[::1], int32[::1], uint8[:, ::1])",
    _look_up: "void(uint8[:, :, ::1], float32[:, ::1], float32[:, :, ::1])",
}


@functools.cache
def _kernels() -> tuple[Callable[..., None], ...]:
    """The compiled kernels: seconds the first time on a machine, then from numba's cache on disk."""
    return tuple(_compile(function, signature) for function, signature in _SIGNATURES.items())


def _compile(function: Callable[..., None], signature: str) -> Any:
    import numba

    try:
        return numba.njit(signature, nogil=True, cache=True)(function)
    except Exception:  # nowhere to keep it, a full disk, what is kept is damaged: numba raises whatever it meets
        return numba.njit(signature, nogil=True)(function)


@functools.cache
def obstacle() -> str | None:
    """Why Pillow has to resize here; None where the kernels run and give its bits. Found out once for a process."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install 'vir-hf[fast]')"
    try:
        import numba

        if getattr(numba.config, "DISABLE_JIT", False):
            return "numba's compiler is switched off (NUMBA_DISABLE_JIT)"
        return (
            None
            if _gives_the_bits_of_pillow()
            else f"with numba pixels differ from those of Pillow {Image.__version__}"
        )
    except Exception as error:  # built for another numpy, no LLVM for this CPU: whatever it is, Pillow works
        return f"numba does not work here ({type(error).__name__}: {error})"


def _gives_the_bits_of_pillow() -> bool:
    """Try wide, tall, very tall, small and large pictures, padded and cropped, with both filters."""
    noise = np.random.default_rng(0).integers(0, 256, (360, 160, 4), dtype=np.uint8)
    table = np.tile(np.arange(256, dtype=np.float32), (3, 1))
    for width, height in ((160, 90), (90, 160), (60, 160), (3, 301), (3, 300), (40, 30), (30, 44), (100, 100)):
        padding = (0, 0) if height > 2 * width else (7, 0) if width < height else (0, 7)
        for new_width, new_height in ((48, 48), (90, 48), (48, 80), (30, 330)):
            pixels = np.ascontiguousarray(noise[:height, :width])
            canvas = Image.new("RGB", (width + 2 * padding[0], height + 2 * padding[1]), (9, 99, 200))
            canvas.paste(Image.fromarray(np.ascontiguousarray(pixels[:, :, :3])), padding)
            columns = Side(width, padding[0], padding[0], new_width, 3, new_width - 2)
            rows = Side(height, padding[1], padding[1], new_height, 1, new_height)
            out = np.empty((3, rows.end - rows.start, columns.end - columns.start), np.float32)
            for method in _FILTERS:
                resample(pixels, rows, columns, method=method, colour=(9, 99, 200), table=table, out=out)
                resized = canvas.resize((new_width, new_height), Image.Resampling[method.upper()])
                expected = resized.crop((columns.start, rows.start, columns.end, rows.end))
                if not np.array_equal(out.transpose(1, 2, 0), np.asarray(expected)):
                    return False
    return True
