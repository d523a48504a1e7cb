"""How far a score could be from what more questions would give, and whether two runs differ by more than chance.

Both draw units (questions, images, groups of rotations) and never single rows of one, with a fixed seed: the same answers give
the same figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vir_hf.scores.judging import Judged, Metrics

NUM_DRAWS = 2000
NUM_SWAPS = 10_000
_CHUNK = 4_000_000  # drawn numbers held at once
_CONFIDENCE = 0.95
_ROWS_PER_DRAW = 8  # drawing counts of distinct rows is faster than drawing units where these are so many more


def intervals(judged: Judged, *, num_draws: int = NUM_DRAWS, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Return the 95 % interval of every score by the percentile bootstrap over units.

    Source: Efron, Tibshirani: An Introduction to the Bootstrap, 1993, section 13.3.
    """
    drawn: dict[str, list[np.ndarray]] = {}
    table, counts = _distinct(judged.statistics)
    for weights in _drawn(counts, num_draws, seed):
        for name, values in judged.metrics(weights @ table).items():
            drawn.setdefault(name, []).append(values)
    tail = 100 * (1 - _CONFIDENCE) / 2
    return {
        name: tuple(float(value) for value in np.percentile(np.concatenate(values), [tail, 100 - tail]))  # type: ignore[misc]
        for name, values in drawn.items()
    }


def _distinct(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct rows of a table and how often each occurs: few, where answers are right or wrong.

    Their order does not depend on that of the table, so that the draws do not either.
    """
    rows, counts = np.unique(table, axis=0, return_counts=True)
    return rows, counts


def _drawn(counts: np.ndarray, num_draws: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each distinct row comes up when as many units are drawn with replacement, `(b, rows)`."""
    generator, num_units, num_rows = np.random.default_rng(seed), int(counts.sum()), len(counts)
    is_short = num_rows * _ROWS_PER_DRAW <= num_units
    at_once = max(1, _CHUNK // max(1, num_rows if is_short else num_units))
    places = None if is_short else np.repeat(np.arange(num_rows, dtype=np.int32), counts)
    for start in range(0, num_draws, at_once):
        size = min(at_once, num_draws - start)
        if places is None:
            yield generator.multinomial(num_units, counts / num_units, size).astype(np.float64)
            continue
        units = places[generator.integers(0, num_units, (size, num_units), dtype=np.int32)]
        offsets = np.arange(size, dtype=np.int64)[:, None] * num_rows
        found = np.bincount((units + offsets).ravel(), minlength=size * num_rows)
        yield found.reshape(size, num_rows).astype(np.float64)


@dataclass(frozen=True)
class Difference:
    """What one score differs by between two runs on the same questions.

    Attributes:
        first, second: the score of each.
        low, high: the 95 % interval of `second - first`.
        p_value: how often a difference as large comes about when each unit's answers are dealt to the runs by chance.
    """

    name: str
    first: float
    second: float
    low: float
    high: float
    p_value: float

    @property
    def difference(self) -> float:
        """Second minus first."""
        return self.second - self.first


def differences(
    first: Judged, second: Judged, *, num_draws: int = NUM_DRAWS, num_swaps: int = NUM_SWAPS, seed: int = 0
) -> list[Difference]:
    """Return every score's difference between two runs judged on the same units in the same order.

    The test swaps the two runs' answers to a unit or leaves them, by chance, for all units at once (approximate
    randomisation): no assumption about how scores are spread, and it holds for F1 and BLEU as for a mean.

    Raises:
        ValueError: another number of units.

    Source: Noreen: Computer-Intensive Methods for Testing Hypotheses, 1989; Yeh, https://aclanthology.org/C00-2137.
    """
    if first.statistics.shape != second.statistics.shape:
        raise ValueError(f"found {len(first.statistics)} and {len(second.statistics)} units; expected the same ones.")
    values, others = first.values(), second.values()
    num_columns = first.statistics.shape[1]
    table, counts = _distinct(np.concatenate([first.statistics, second.statistics], axis=1))
    one, other = table[:, :num_columns], table[:, num_columns:]
    drawn: dict[str, list[np.ndarray]] = {}
    for weights in _drawn(counts, num_draws, seed):
        ours, theirs = first.metrics(weights @ one), first.metrics(weights @ other)
        for name in ours:
            drawn.setdefault(name, []).append(theirs[name] - ours[name])
    observed = {name: others[name] - values[name] for name in values}
    as_large = _swapped_as_large(first.metrics, one, other, counts, observed, num_swaps, seed)
    tail = 100 * (1 - _CONFIDENCE) / 2
    found = []
    for name in values:
        low, high = np.percentile(np.concatenate(drawn[name]), [tail, 100 - tail])
        p_value = (1 + as_large[name]) / (1 + num_swaps)
        found.append(Difference(name, values[name], others[name], float(low), float(high), p_value))
    return found


def _swapped_as_large(
    metrics: Metrics,
    one: np.ndarray,
    other: np.ndarray,
    counts: np.ndarray,
    observed: dict[str, float],
    num_swaps: int,
    seed: int,
) -> dict[str, int]:
    """Return how often a difference as large comes about when units are swapped by chance."""
    generator = np.random.default_rng(seed + 1)
    ours, theirs = counts @ one, counts @ other
    as_large = dict.fromkeys(observed, 0)
    at_once = max(1, _CHUNK // max(1, len(counts)))
    for start in range(0, num_swaps, at_once):
        size = min(at_once, num_swaps - start)
        # Of equal units, only how many are swapped matters.
        moved = generator.binomial(counts, 0.5, (size, len(counts))) @ (other - one)
        first, second = metrics(ours + moved), metrics(theirs - moved)
        for name, difference in observed.items():
            as_large[name] += int((np.abs(second[name] - first[name]) >= abs(difference) - 1e-12).sum())
    return as_large
