"""Grounding: how well a box that an answer names covers the right one.

Source: the accuracy at an intersection over union of 0.5 of RefCOCO, https://arxiv.org/abs/1608.00272.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from vir_hf.errors import DataError, shown
from vir_hf.scores.judging import Item, Judged, Scorer, ratio
from vir_hf.scores.matching import is_empty

Box = tuple[float, float, float, float]

_NUMBER = r"-?\d+(?:\.\d+)?|-?\.\d+"
_BOX = re.compile(rf"({_NUMBER})\s*,\s*({_NUMBER})\s*\)?\s*,\s*\(?\s*({_NUMBER})\s*,\s*({_NUMBER})")
_ENOUGH = 0.5


def read_box(text: str) -> Box | None:
    """Return the first four numbers between commas, `left, top, right, bottom`; `None` if the text has no box."""
    found = _BOX.search(text)
    if not found:
        return None
    left, top, right, bottom = (float(number) for number in found.groups())
    return left, top, right, bottom


def overlap(one: Box, other: Box) -> float:
    """Return the intersection over union of two boxes; a box without area overlaps nothing but itself."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(0.0, width) * max(0.0, height)
    areas = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (one, other)]
    return common / (sum(areas) - common) if common else float(one == other)


def grounding(scale: float = 1.0) -> Scorer:
    """Return the scorer of boxes: accuracy at 0.5 and the mean intersection over union.

    Args:
        scale: what the numbers of an answer are divided by to be in the unit of the right boxes: 1, or 1000 for models that
            count in thousandths of the side.
    """

    def scorer(items: Sequence[Item], answers: Sequence[str]) -> Judged:
        overlaps, read_as, no_box = [], [], 0
        for item, answer in zip(items, answers, strict=True):
            right = [box for box in map(read_box, item.references) if box]
            if not right:
                raise DataError(
                    f"question {shown(item.id)}: found {shown(list(item.references))}, expected a box: left, top, right, bottom."
                )
            given = None if is_empty(answer) else read_box(answer)
            no_box += given is None and not is_empty(answer)
            box = given and tuple(number / scale for number in given)
            overlaps.append(max(overlap(box, other) for other in right) if box else 0.0)  # type: ignore[arg-type]
            read_as.append(str(list(box)) if box else "")
        statistics = np.array([[value >= _ENOUGH, value, 1] for value in overlaps], dtype=float).reshape(-1, 3)

        def metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
            return {
                "accuracy_at_0.5": ratio(sums[:, 0], sums[:, 2]),
                "mean_iou": ratio(sums[:, 1], sums[:, 2]),
            }

        notes = [f"{no_box} answers hold no box and count as wrong"] if no_box else []
        return Judged(overlaps, read_as, np.arange(len(items)), statistics, metrics, notes)

    return scorer
