"""Boxes in a row's texts, looked at before training: those outside of their image, and those in another form than said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from vir_hf.errors import ImageError, clipped
from vir_hf.rows.boxes import BoxChange, BoxForm, find_boxes, is_of_other_scale, is_outside

_ANY = BoxForm("0-1")  # to find boxes by: which form it is does not matter


class BoxScale(NamedTuple):
    """A row with boxes of which nothing says how they are written, and whether their numbers are fractions of 1."""

    row: int
    id: str
    is_fraction: bool
    text: str


def _texts(row: Mapping[str, Any]) -> Iterator[str]:
    return (p["text"] for m in row["messages"] for p in m["content"] if p.get("text") and row["images"])


def box_problems(
    row: Mapping[str, Any], change: BoxChange, read_size: Callable[[Any], tuple[int, int]]
) -> Iterator[tuple[str, str]]:
    """Yield kind and detail of what is odd about a row's boxes, read in the form that `data.boxes` says.

    Args:
        row: what `to_messages` returns.
        read_size: gives width and height of an image, or raises `ImageError`, which is told elsewhere.
    """
    if not any(any(find_boxes(text, change.found, (1, 1), change.has_points)) for text in _texts(row)):
        return
    try:
        sizes = {read_size(image) for image in row["images"]}
    except ImageError:
        return
    if len(sizes) > 1:
        yield "bad_row", "the row has boxes and images of several sizes, and nothing says of which image"
        return
    size = next(iter(sizes))
    for text in _texts(row):
        for box in find_boxes(text, change.found, size, change.has_points):
            if is_of_other_scale(box, change.found):
                yield "box_other_form", f"{clipped(box.text, 80)} is not written as {change.found}"
            elif is_outside(box, change.found, size):
                yield (
                    "box_outside",
                    f"{clipped(box.text, 80)}, read as {change.found}, is outside of {size[0]}x{size[1]}",
                )


def box_scale(row: Mapping[str, Any], number: int, row_id: str) -> BoxScale | None:
    """Return what the numbers of a row's boxes look like, or None if it has none with a number above 0."""
    for text in _texts(row):
        for box in find_boxes(text, _ANY, (1, 1)):
            if max(box.numbers) > 0:
                return BoxScale(number, row_id, box.has_decimals and max(box.numbers) <= 1, box.text)
    return None


def mixed_scales(scales: Mapping[str, list[BoxScale]]) -> Iterator[tuple[str, BoxScale, str]]:
    """Yield file, row and detail of each row whose boxes are of another scale than those of most rows."""
    everything = [scale for found in scales.values() for scale in found]
    num_fractions = sum(scale.is_fraction for scale in everything)
    is_usual_fraction = 2 * num_fractions > len(everything)
    words = {True: "fractions of 1", False: "whole numbers"}
    for file, found in scales.items():
        for scale in found:
            if scale.is_fraction != is_usual_fraction:
                what = f"{clipped(scale.text, 80)} is written in {words[scale.is_fraction]}"
                yield file, scale, f"{what}, most boxes in {words[is_usual_fraction]}"
