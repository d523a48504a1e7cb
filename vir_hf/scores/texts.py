"""Short answers: exact, relaxed, ANLS, GQA and OCRBench.

Sources: https://github.com/google-research/pix2struct, metrics.py (exact, relaxed); the evaluation scripts of DocVQA and
InfographicVQA, https://rrc.cvc.uab.es (ANLS); https://cs.stanford.edu/people/dorarad/gqa, eval.py; LLaVA's
convert_gqa_for_eval.py; https://github.com/Yuliang-Liu/MultimodalOCR, example.py (OCRBench).
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

import numpy as np

from vir_hf.scores.judging import Item, Judge, Judged, mean_of
from vir_hf.scores.matching import exact_match, is_empty

_TOLERANCE = 0.05
_ANLS_THRESHOLD = 0.5


def _best(compare: Callable[[str, str], float]) -> Judge:
    """The best over all right answers, leaving out those with nothing in them."""

    def judge(answer: str, item: Item) -> tuple[float, str]:
        scores = [compare(answer, reference) for reference in item.references if not is_empty(reference)]
        return float(max(scores, default=0.0)), ""

    return judge


exact_as_written = _best(lambda answer, reference: answer == reference)
exact_normalised = _best(lambda answer, reference: exact_match(answer, [reference]))
exact_ignoring_case = _best(lambda answer, reference: answer.strip().lower() == reference.strip().lower())


def as_number(text: str) -> float | None:
    """Return the number a text is, with a percentage as its hundredth; `None` for anything else."""
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value


def relaxed_correctness(answer: str, reference: str) -> bool:
    """Return whether a number is within 5 % of the right one, or a text equals it but for case."""
    given, right = as_number(answer), as_number(reference)
    if given is not None and right:
        return abs(given - right) / abs(right) <= _TOLERANCE
    return answer.lower() == reference.lower()


relaxed = _best(relaxed_correctness)
relaxed_stripped = _best(lambda answer, reference: relaxed_correctness(answer.strip(), reference))


def edit_distance(one: str, other: str) -> int:
    """Return how many characters have to be put in, left out or replaced to make one text of the other."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        diagonal, row[0] = row[0], number
        for place, against in enumerate(other, 1):
            diagonal, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, diagonal + (letter != against))
    return row[-1]


def _similarity(answer: str, reference: str, length: int) -> float:
    similarity = 1 - edit_distance(reference, answer) / length if length else 1.0
    return similarity if similarity >= _ANLS_THRESHOLD else 0.0  # exactly half is kept


def _collapsed(text: str) -> str:
    return " ".join(text.strip().lower().split())


# The official script compares texts with single spaces and divides by the length they had before.
anls = _best(lambda given, right: _similarity(_collapsed(given), _collapsed(right), max(len(given), len(right))))
anls_collapsed = _best(
    lambda given, right: _similarity(
        _collapsed(given), _collapsed(right), max(len(_collapsed(given)), len(_collapsed(right)))
    )
)
anls_as_written = _best(lambda given, right: _similarity(given.lower(), right.lower(), max(len(given), len(right))))

gqa = _best(lambda answer, reference: answer.rstrip(".").lower() == reference)
gqa_strict = _best(lambda answer, reference: answer == reference)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
gqa_lmms = _best(
    lambda answer, reference: answer.lower().translate(_NO_PUNCTUATION) == reference.lower().translate(_NO_PUNCTUATION)
)

_FORMULAS = "HME100k"  # handwritten formulas, compared without spaces and with their case


def _holds(answer: str, item: Item, *, lower_first: bool) -> tuple[float, str]:
    answer = answer.lower() if lower_first else answer
    for reference in item.references:
        if is_empty(reference):
            continue
        if item.details.get("dataset") == _FORMULAS:
            given, right = (re.sub(r"[\n ]", "", text.strip()) for text in (answer, reference))
        else:
            given, right = (text.lower().strip().replace("\n", " ") for text in (answer, reference))
        if right in given:
            return 1.0, ""
    return 0.0, ""


def ocrbench(*, lower_first: bool) -> Callable[[Sequence[Item], Sequence[str]], Judged]:
    """Return OCRBench's scorer: the number of answers that hold a right one, and their share.

    Args:
        lower_first: as lmms-eval, which makes every answer lower-case first, so that no formula with a capital is ever right.
    """
    share = mean_of("accuracy", lambda answer, item: _holds(answer, item, lower_first=lower_first))

    def scorer(items: Sequence[Item], answers: Sequence[str]) -> Judged:
        judged = share(items, answers)

        def metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
            return {"score": sums[:, 0], **judged.metrics(sums)}

        return Judged(judged.scores, judged.read_as, judged.units, judged.statistics, metrics)

    return scorer
