"""Intervals and tests of differences against what formulas and hand counts give."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vir_hf.scores.intervals import differences, intervals
from vir_hf.scores.judging import Item
from vir_hf.scores.tasks import TASKS, judge


def judged(right: list[int]) -> object:
    items = [Item(str(n), "?", ("yes",)) for n in range(len(right))]
    return judge(TASKS["exact"], items, ["yes" if one else "no" for one in right])


def test_the_interval_of_a_share_is_that_of_the_normal_approximation() -> None:
    low, high = intervals(judged([1] * 700 + [0] * 300))["exact_match"]
    half = 1.96 * math.sqrt(0.7 * 0.3 / 1000)
    assert low == pytest.approx(0.7 - half, abs=0.004) and high == pytest.approx(0.7 + half, abs=0.004)
    assert intervals(judged([1] * 700 + [0] * 300)) == intervals(judged([1] * 700 + [0] * 300))  # fixed draws
    assert intervals(judged([1] * 9))["exact_match"] == (1.0, 1.0)


def test_rows_of_one_unit_are_drawn_together() -> None:
    items = [Item(f"{n}{k}", "?", ("yes",), category="count", group=str(n)) for n in range(50) for k in range(2)]
    said = ["yes" if n % 2 else "no" for n in range(50) for _ in range(2)]  # both answers about an image, or neither
    low, high = intervals(judge(TASKS["mme"], items, said))["score, count"]
    half = 200 * 1.96 * math.sqrt(0.25 / 50)  # of 50 images, not of 100 rows
    assert high - low == pytest.approx(2 * half, rel=0.15)


def test_a_difference_of_single_answers_is_what_the_sign_test_gives() -> None:
    first = judged([0] * 9 + [1] * 11)
    second = judged([1] * 8 + [0] * 1 + [1] * 11)  # eight turn right, none wrong
    (one,) = differences(first, second)
    assert one.difference == pytest.approx(0.4) and one.low > 0
    assert one.p_value == pytest.approx(2 / 2**8, rel=0.35)


def test_equal_runs_do_not_differ() -> None:
    (one,) = differences(judged([1, 0, 1]), judged([1, 0, 1]))
    assert one.p_value == 1.0 and one.difference == one.low == one.high == 0
    with pytest.raises(ValueError, match="found 3 and 2 units"):
        differences(judged([1, 0, 1]), judged([1, 0]))


def test_two_runs_by_chance_differ_in_one_of_twenty() -> None:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(60):
        one, other = (generator.integers(0, 2, 80).tolist() for _ in range(2))
        found.append(differences(judged(one), judged(other), num_draws=50, num_swaps=300)[0].p_value < 0.05)
    assert sum(found) <= 8
