"""Boxes and points in texts: in which form they are written, and the same ones in another.

A form says what the numbers count (pixels, 0-1, 0-999 or 0-1000 of each side), in which order they stand (two corners, a corner
and a size, a centre and a size), and of what: the original image, or the one that is padded to a square, as
`model.image_aspect_ratio=pad` shows it to the tower. Pure Python; sizes are `(width, height)` in pixels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vir_hf.errors import RecipeError

Size = tuple[int, int]
Corners = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the original image
SCALES = {"pixel": None, "0-1": 1, "0-999": 999, "0-1000": 1000}
ORDERS = ("xyxy", "xywh", "cxcywh")
FRAMES = ("original", "padded")
_NUMBER = r"(-?\d+(?:\.\d+)?)"
_SEPARATOR = r"\s*,\s*"
_QUAD = r"[\[(]\s*" + _SEPARATOR.join([_NUMBER] * 4) + r"\s*[\])]"
_PAIR = rf"\(\s*{_NUMBER}{_SEPARATOR}{_NUMBER}\s*\)\s*,?\s*\(\s*{_NUMBER}{_SEPARATOR}{_NUMBER}\s*\)"
_POINT = rf"[\[(]\s*{_NUMBER}{_SEPARATOR}{_NUMBER}\s*[\])]"
_BOXES = re.compile(f"(?P<quad>{_QUAD})|(?P<pair>{_PAIR})")
_BOXES_AND_POINTS = re.compile(f"(?P<quad>{_QUAD})|(?P<pair>{_PAIR})|(?P<point>{_POINT})")


class BoxForm(NamedTuple):
    """How boxes are written: `0-1000 xyxy original`."""

    scale: str = "pixel"
    order: str = "xyxy"
    frame: str = "original"

    @classmethod
    def of(cls, text: Any, key: str = "data.boxes") -> BoxForm:
        """Return the form that words say: one of `SCALES`, and optionally one of `ORDERS` and one of `FRAMES`.

        Raises:
            RecipeError: other words, or no scale.
        """
        words = str(text).replace(",", " ").split()
        scales = [word for word in words if word in SCALES]
        orders = [word for word in words if word in ORDERS]
        frames = [word for word in words if word in FRAMES]
        is_clear = len(scales) == 1 and len(orders) < 2 and len(frames) < 2
        if not is_clear or len(words) != len(scales) + len(orders) + len(frames):
            raise RecipeError(
                f"{key}: found {text!r}; expected what the numbers count ({', '.join(SCALES)}), their order "
                f"({', '.join(ORDERS)}; xyxy if it is left out) and of what ({', '.join(FRAMES)}; original if it is left out), "
                "such as '0-1000 xyxy original'."
            )
        return cls(scales[0], (orders or ["xyxy"])[0], (frames or ["original"])[0])

    def __str__(self) -> str:
        return f"{self.scale} {self.order} {self.frame}"

    def corners(self, numbers: tuple[float, ...], size: Size, order: str | None = None) -> Corners:
        """Return the corners of four numbers in this form, in pixels of the original image of a size."""
        x, y, third, fourth = numbers
        order = order or self.order
        if order == "xywh":
            third, fourth = x + third, y + fourth
        elif order == "cxcywh":
            x, y, third, fourth = x - third / 2, y - fourth / 2, x + third / 2, y + fourth / 2
        left, top, step_x, step_y = self._frame(size)
        return x * step_x - left, y * step_y - top, third * step_x - left, fourth * step_y - top

    def numbers(self, corners: Corners, size: Size, order: str | None = None) -> list[str]:
        """Return the four numbers of a box in this form, as they are written.

        Corners are rounded to whole pixels, to whole 999ths and 1000ths, or to as many digits of 0-1 as a pixel needs; what
        follows from them, such as a centre, is written in full. So a box is back within half of such a step.
        """
        left, top, step_x, step_y = self._frame(size)
        digits = self._digits(size)
        grid = 10**digits
        x1, x2 = (round((value + left) / step_x * grid) for value in (corners[0], corners[2]))
        y1, y2 = (round((value + top) / step_y * grid) for value in (corners[1], corners[3]))
        order = order or self.order
        if order == "xyxy":
            whole: tuple[float, ...] = (x1, y1, x2, y2)
        elif order == "xywh":
            whole = (x1, y1, x2 - x1, y2 - y1)
        else:
            whole = ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)
        return [_written(value, digits) for value in whole]

    def point(self, numbers: tuple[float, ...], size: Size) -> tuple[float, float]:
        """Return a point in pixels of the original image."""
        left, top, step_x, step_y = self._frame(size)
        return numbers[0] * step_x - left, numbers[1] * step_y - top

    def point_numbers(self, point: tuple[float, float], size: Size) -> list[str]:
        """Return the two numbers of a point in this form, as they are written."""
        return self.numbers((*point, *point), size, "xyxy")[:2]

    def step(self, size: Size) -> float:
        """Return how many pixels of the original image the numbers are apart at most."""
        _, _, step_x, step_y = self._frame(size)
        return max(step_x, step_y) / 10 ** self._digits(size)

    def _frame(self, size: Size) -> tuple[int, int, float, float]:
        """Return the padding at the left and the top, and how many pixels 1 is, across and down."""
        width, height = size
        left = top = 0
        if self.frame == "padded":  # as `ImagePreprocessor` pads
            edge = max(size)
            left, top = (edge - width) // 2, (edge - height) // 2
            width = height = edge
        divisor = SCALES[self.scale]
        return (left, top, 1.0, 1.0) if divisor is None else (left, top, width / divisor, height / divisor)

    def _digits(self, size: Size) -> int:
        return max(3, len(str(max(size)))) if self.scale == "0-1" else 0


def _written(value: float, digits: int) -> str:
    """Return a number of steps of `10**-digits` as text; half a step takes a digit more."""
    is_half = value != int(value)
    if not digits:
        return f"{value:.1f}" if is_half else str(int(value))
    return f"{value / 10**digits:.{digits + is_half}f}"


class BoxChange(NamedTuple):
    """What becomes of boxes in texts: they are found in one form and written in another."""

    found: BoxForm
    written: BoxForm
    has_points: bool = False

    @classmethod
    def of(cls, keys: Mapping[str, Any]) -> BoxChange:
        """Return the change that `data.boxes` asks for: `{from: 'pixel xywh', to: '0-1000 xyxy padded', points: true}`.

        Raises:
            RecipeError: another key, or a form that cannot be read.
        """
        unknown = set(keys) - {"from", "to", "points"}
        if unknown or not keys.get("from") or not isinstance(keys.get("points") or False, bool):
            raise RecipeError(
                f"data.boxes: found {dict(keys)}; expected {{from: FORM, to: FORM}} and optionally points: true, with forms "
                "such as 'pixel xywh' or '0-1000 xyxy padded'."
            )
        found = BoxForm.of(keys["from"], "data.boxes.from")
        written = BoxForm.of(keys["to"], "data.boxes.to") if keys.get("to") else found
        return cls(found, written, bool(keys.get("points")))

    @property
    def back(self) -> BoxChange:
        """The change that undoes this one."""
        return BoxChange(self.written, self.found, self.has_points)

    def apply(self, text: str, size: Size) -> tuple[str, int]:
        """Return the text with its boxes in the form that is written, and how many there are."""
        count = 0

        def rewrite(match: re.Match[str]) -> str:
            nonlocal count
            count += 1
            kind, numbers = _numbers(match)
            if kind == "point":
                words = self.written.point_numbers(self.found.point(numbers, size), size)
            else:  # of two points in brackets, both are corners whatever the order of four numbers is
                order = "xyxy" if kind == "pair" else None
                words = self.written.numbers(self.found.corners(numbers, size, order), size, order)
            return _with_numbers(match, words)

        if self.found == self.written:
            return text, sum(1 for _ in _pattern(self.has_points).finditer(text))
        return _pattern(self.has_points).sub(rewrite, text), count


class FoundBox(NamedTuple):
    """A box (or point: corners that are equal) in a text: its words, its corners, and whether its numbers have decimals."""

    text: str
    corners: Corners
    numbers: tuple[float, ...]
    has_decimals: bool


def find_boxes(text: str, form: BoxForm, size: Size, has_points: bool = False) -> Iterator[FoundBox]:
    """Yield the boxes of a text, read in a form."""
    for match in _pattern(has_points).finditer(text):
        kind, numbers = _numbers(match)
        if kind == "point":
            point = form.point(numbers, size)
            corners = (*point, *point)
        else:
            corners = form.corners(numbers, size, "xyxy" if kind == "pair" else None)
        yield FoundBox(match[0], corners, numbers, "." in match[0])


def is_outside(box: FoundBox, form: BoxForm, size: Size) -> bool:
    """Whether a box leaves the original image by more than a step of its form, or has its corners the wrong way round."""
    left, top, right, bottom = box.corners
    step = form.step(size)
    leaves = left < -step or top < -step or right > size[0] + step or bottom > size[1] + step
    return leaves or right < left or bottom < top


def is_of_other_scale(box: FoundBox, form: BoxForm) -> bool:
    """Whether a box's numbers are plainly of another scale: fractions where whole numbers are meant, or numbers above 1."""
    largest = max(box.numbers)
    if form.scale == "0-1":
        return largest > 1.5
    return box.has_decimals and 0 < largest <= 1


def _pattern(has_points: bool) -> re.Pattern[str]:
    return _BOXES_AND_POINTS if has_points else _BOXES


def _numbers(match: re.Match[str]) -> tuple[str, tuple[float, ...]]:
    kind = match.lastgroup or next(name for name, value in match.groupdict().items() if value is not None)
    return kind, tuple(float(number) for number in re.findall(_NUMBER, match[0]))


def _with_numbers(match: re.Match[str], words: list[str]) -> str:
    """Return the matched text with other numbers, its brackets, commas and spaces as they were."""
    left = iter(words)
    return re.sub(_NUMBER, lambda _: next(left), match[0])
