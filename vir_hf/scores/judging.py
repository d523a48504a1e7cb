"""What every scorer takes and gives: questions with their right answers in, one row of sums for each unit out.

A score is a function of sums over units (questions, images, groups of rotated options), so that one interval, one test between
two runs and one rule about empty answers hold for all of them, F1 and BLEU as well as a mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vir_hf.scores.matching import is_empty

Metrics = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Attributes:
        id: the question's; no other item has it.
        question: what is asked, without an instruction about the form of the answer.
        references: the right answers as they are published; where options are offered, the letter of the right one.
        image: where the image lies or its content, as `open_image` takes it; `None` if there is none.
        options: the texts offered as A, B, C ..., in this order.
        category: what scores are also broken down by; may be empty.
        group: rows of one group belong together (the rotations of one question, the two questions about an image of MME).
        details: what single benchmarks add: `dataset`, `l2_category`, `hint`, `size`.
    """

    id: str
    question: str = ""
    references: tuple[str, ...] = ()
    image: Any = None
    options: tuple[str, ...] = ()
    category: str = ""
    group: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """What a scorer makes of all answers.

    Attributes:
        scores: one for each row, 0 to 1, for the file of questions and the gallery.
        read_as: what each answer was taken for, such as `yes` or `B`; empty where nothing was read into it.
        units: `(num_rows,)`, the number of the unit a row belongs to.
        statistics: `(num_units, k)`, what is summed over units.
        metrics: makes scores, each `(b,)`, of sums `(b, k)`.
        notes: what whoever reads the scores has to know of them.
    """

    scores: list[float]
    read_as: list[str]
    units: np.ndarray
    statistics: np.ndarray
    metrics: Metrics
    notes: list[str] = field(default_factory=list)

    def values(self) -> dict[str, float]:
        """Return every score; sums are exact, so that the order of rows does not matter."""
        sums = np.array([[math.fsum(column) for column in self.statistics.T]])
        return {name: float(value[0]) for name, value in self.metrics(sums).items()}


Scorer = Callable[[Sequence[Item], Sequence[str]], Judged]
Judge = Callable[[str, Item], "tuple[float, str]"]


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return `above / below`, and 0 where nothing is below."""
    return np.divide(above, below, out=np.zeros_like(above, dtype=float), where=below != 0)


def mean_of(
    name: str, judge: Judge, *, over: str = "rows", category_of: Callable[[Item], str] = lambda item: item.category
) -> Scorer:
    """Return a scorer whose score is the mean of what `judge` gives each answer; an empty answer gets 0 without being judged.

    Args:
        name: of the score; each category gives one more, `NAME, CATEGORY`, where there are several.
        judge: takes an answer and its item, gives a score between 0 and 1 and what the answer was taken for.
        over: `rows`, or `categories` for the mean of the categories' means.
    """

    def scorer(items: Sequence[Item], answers: Sequence[str]) -> Judged:
        judged = [
            (0.0, "") if is_empty(answer) else judge(answer, item) for item, answer in zip(items, answers, strict=True)
        ]
        scores = [score for score, _ in judged]
        categories = sorted({category_of(item) for item in items} - {""})
        statistics = by_category(scores, [category_of(item) for item in items], categories)
        metrics = _means(name, categories, over)
        return Judged(scores, [read for _, read in judged], np.arange(len(items)), statistics, metrics)

    return scorer


def by_category(scores: Sequence[float], given: Sequence[str], categories: Sequence[str]) -> np.ndarray:
    """Return `(rows, 2 + 2 * categories)`: the score and a 1, and both again in the columns of the row's category."""
    statistics = np.zeros((len(scores), 2 + 2 * len(categories)))
    statistics[:, 0], statistics[:, 1] = scores, 1
    column = {category: 2 + 2 * number for number, category in enumerate(categories)}
    for row, (score, category) in enumerate(zip(scores, given, strict=True)):
        if category in column:
            statistics[row, column[category] : column[category] + 2] = score, 1
    return statistics


def _means(name: str, categories: Sequence[str], over: str) -> Metrics:
    def metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
        overall = ratio(sums[:, 0], sums[:, 1])
        each = {
            category: ratio(sums[:, 2 + 2 * number], sums[:, 3 + 2 * number])
            for number, category in enumerate(categories)
        }
        if over == "categories" and each:
            present = np.stack([sums[:, 3 + 2 * number] > 0 for number in range(len(categories))])
            mean = ratio((np.stack(list(each.values())) * present).sum(0), present.sum(0).astype(float))
            found = {name: mean, f"{name} over all rows": overall}
        else:
            found = {name: overall}
        if len(categories) > 1:
            found |= {f"{name}, {category}": value for category, value in each.items()}
        return found

    return metrics
