"""How far a score could be from what more questions would give, and whether two runs differ by more than chance.

Both draw units (questions, images, groups of rotations) and never single rows of one, with a fixed seed: the same answers give
the same figures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vir_hf.scores.judging import Judged

NUM_DRAWS = 2000
NUM_SWAPS = 10_000
_CHUNK = 4_000_000  # drawn numbers held at once
_CONFIDENCE = 0.95


def intervals(judged: Judged, *, num_draws: int = NUM_DRAWS, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Return the 95 % interval of every score by the percentile bootstrap over units.

    Source: Efron, Tibshirani: An Introduction to the Bootstrap, 1993, section 13.3.
    """
    drawn: dict[str, list[np.ndarray]] = {}
    for sums in _resampled([judged.statistics[_order(judged.statistics)]], num_draws, seed):
        for name, values in judged.metrics(sums[0]).items():
            drawn.setdefault(name, []).append(values)
    tail = 100 * (1 - _CONFIDENCE) / 2
    return {
        name: tuple(float(value) for value in np.percentile(np.concatenate(values), [tail, 100 - tail]))  # type: ignore[misc]
        for name, values in drawn.items()
    }


def _order(*tables: np.ndarray) -> np.ndarray:
    """Return an order of units that does not depend on the one they came in, so that the draws do not either."""
    return np.lexsort(np.concatenate(tables, axis=1).T)


def _resampled(tables: list[np.ndarray], num_draws: int, seed: int) -> Iterator[list[np.ndarray]]:
    """Yield the sums of each table over units drawn with replacement, `(b, k)`; the same units in all tables."""
    generator, num_units = np.random.default_rng(seed), len(tables[0])
    rows_at_once = max(1, _CHUNK // max(1, num_units))
    for start in range(0, num_draws, rows_at_once):
        size = min(rows_at_once, num_draws - start)
        drawn = generator.integers(0, num_units, (size, num_units), dtype=np.int32)
        offsets = np.arange(size, dtype=np.int64)[:, None] * num_units
        counts = np.bincount((drawn + offsets).ravel(), minlength=size * num_units).reshape(size, num_units)
        weights = counts.astype(np.float64)
        yield [weights @ table for table in tables]


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
    order = _order(first.statistics, second.statistics)
    first, second = (dataclasses.replace(one, statistics=one.statistics[order]) for one in (first, second))
    values, others = first.values(), second.values()
    drawn: dict[str, list[np.ndarray]] = {}
    for one, other in _resampled([first.statistics, second.statistics], num_draws, seed):
        ours, theirs = first.metrics(one), first.metrics(other)
        for name in ours:
            drawn.setdefault(name, []).append(theirs[name] - ours[name])
    as_large = _swapped_as_large(first, second, {name: others[name] - values[name] for name in values}, num_swaps, seed)
    tail = 100 * (1 - _CONFIDENCE) / 2
    found = []
    for name in values:
        low, high = np.percentile(np.concatenate(drawn[name]), [tail, 100 - tail])
        p_value = (1 + as_large[name]) / (1 + num_swaps)
        found.append(Difference(name, values[name], others[name], float(low), float(high), p_value))
    return found


def _swapped_as_large(
    first: Judged, second: Judged, observed: dict[str, float], num_swaps: int, seed: int
) -> dict[str, int]:
    generator, num_units = np.random.default_rng(seed + 1), len(first.statistics)
    total, gap = first.statistics.sum(0), second.statistics - first.statistics
    as_large = dict.fromkeys(observed, 0)
    rows_at_once = max(1, _CHUNK // max(1, num_units))
    for start in range(0, num_swaps, rows_at_once):
        size = min(rows_at_once, num_swaps - start)
        swaps = generator.integers(0, 2, (size, num_units), dtype=np.int8).astype(np.float64)
        moved = swaps @ gap
        ours, theirs = first.metrics(total + moved), first.metrics(total + gap.sum(0) - moved)
        for name, difference in observed.items():
            apart = np.abs(theirs[name] - ours[name])
            as_large[name] += int((apart >= abs(difference) - 1e-12).sum())
    return as_large
