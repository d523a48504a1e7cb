"""POPE and MME: questions whose answer is yes or no.

POPE's variants differ in what counts as yes:

- `llava`, the official script and LLaVA's: of the first sentence, without commas, the words No, no or not make it no; anything
  else is yes. Here an answer with nothing in it is neither, and wrong.
- `lmms-eval`: the exact word, in any case. Recall passes over other answers, and the yes ratio is that of the labels.
- `vlmevalkit`: one of the two words and not the other, anywhere.

Sources: https://github.com/AoiDragon/POPE, evaluate.py; LLaVA's eval_pope.py; lmms-eval's tasks/pope/utils.py; VLMEvalKit's
yorn.py. MME: https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, eval_tool/calculation.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vir_hf.errors import DataError, shown
from vir_hf.scores.judging import Item, Judged, Scorer, ratio
from vir_hf.scores.matching import is_empty
from vir_hf.scores.vqa import without_punctuation

Reader = Callable[[str], str]

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def read_llava(answer: str) -> str:
    """Return `no` if the first sentence holds the word No, no or not, else `yes`."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def read_exact(answer: str) -> str:
    """Return `yes` or `no` if the answer is that word, else `other`."""
    word = answer.lower().strip()
    return word if word in ("yes", "no") else "other"


def read_either(answer: str) -> str:
    """Return `yes` or `no` if that word stands in the answer and the other does not, else `other`."""
    words = set(without_punctuation(answer.lower()).split()) & {"yes", "no"}
    return words.pop() if len(words) == 1 else "other"


def read_mme(answer: str) -> str:
    """Return which of the words stands in the first four characters, else `other`; the official rule."""
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def read_mme_lmms(answer: str) -> str:
    """Return the same after spaces around it and full stops are gone; `y` and `n` count."""
    answer = answer.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(answer) or read_mme(answer)


def label_of(item: Item) -> str:
    """Return `yes` or `no`.

    Raises:
        DataError: the label is another word.
    """
    label = item.references[0].lower().strip().rstrip(".") if item.references else ""
    if label not in ("yes", "no"):
        raise DataError(f"question {shown(item.id)}: found the label {shown(label)}, expected yes or no.")
    return label


def pope(read: Reader, *, passes_over_others: bool = False, ratio_of_labels: bool = False) -> Scorer:
    """Return POPE's scorer: accuracy, precision, recall and F1 of yes, and how often yes is said.

    Args:
        read: makes `yes`, `no` or `other` of an answer that is not empty.
        passes_over_others: recall leaves out answers that are neither, as lmms-eval does.
        ratio_of_labels: the yes ratio counts the labels, as lmms-eval does.
    """

    def scorer(items: Sequence[Item], answers: Sequence[str]) -> Judged:
        said = ["other" if is_empty(answer) else read(answer) for answer in answers]
        right = [label_of(item) for item in items]
        # said yes: right, wrong; label yes: said no, said neither; right at all; rows; labels that are yes
        statistics = np.array(
            [
                [
                    given == label == "yes",
                    given == "yes" != label,
                    label == "yes" and given == "no",
                    label == "yes" and given == "other",
                    given == label,
                    1,
                    label == "yes",
                ]
                for given, label in zip(said, right, strict=True)
            ],
            dtype=float,
        ).reshape(-1, 7)

        def metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
            hit, false_alarm, said_no, neither, correct, num_rows, positive = sums.T
            missed = said_no if passes_over_others else said_no + neither
            precision, recall = ratio(hit, hit + false_alarm), ratio(hit, hit + missed)
            return {
                "f1": ratio(2 * precision * recall, precision + recall),
                "accuracy": ratio(correct, num_rows),
                "precision": precision,
                "recall": recall,
                "yes_ratio": ratio(positive if ratio_of_labels else hit + false_alarm, num_rows),
            }

        return Judged(statistics[:, 4].tolist(), said, np.arange(len(items)), statistics, metrics)

    return scorer


def mme(read: Reader) -> Scorer:
    """Return MME's scorer: for each category the percentage of right answers plus that of images with both right.

    Raises (the scorer):
        DataError: an image that is not asked about exactly twice.
    """

    def scorer(items: Sequence[Item], answers: Sequence[str]) -> Judged:
        said = ["other" if is_empty(answer) else read(answer) for answer in answers]
        scores = [float(given == label_of(item)) for given, item in zip(said, items, strict=True)]
        rows_of: dict[tuple[str, str], list[int]] = {}
        for row, item in enumerate(items):
            rows_of.setdefault((item.category, item.group), []).append(row)
        for (category, group), rows in rows_of.items():
            if len(rows) != 2:
                raise DataError(
                    f"MME, {category}, image {shown(group)}: found {len(rows)} questions, expected 2: its score counts images "
                    "with both answers right."
                )
        categories = sorted({item.category for item in items})
        statistics, units = np.zeros((len(rows_of), 2 * len(categories) + len(categories))), np.zeros(len(items), int)
        for unit, ((category, _), rows) in enumerate(rows_of.items()):
            units[rows] = unit
            column = 3 * categories.index(category)
            right = sum(scores[row] for row in rows)
            statistics[unit, column : column + 3] = right, right == 2, 1
        return Judged(scores, said, units, statistics, _mme_metrics(categories), _mme_notes(categories))

    return scorer


def _mme_metrics(categories: Sequence[str]) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    def metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
        each = {}
        for number, category in enumerate(categories):
            right, both, images = sums[:, 3 * number : 3 * number + 3].T
            each[category] = 100 * ratio(right, 2 * images) + 100 * ratio(both, images)
        found = {}
        for name, wanted in (("perception", PERCEPTION), ("cognition", COGNITION)):
            present = [category for category in wanted if category in each]
            if present:
                part = "" if len(present) == len(wanted) else f" ({len(present)} of {len(wanted)} categories)"
                found[name + part] = sum((each[category] for category in present), np.zeros(len(sums)))
        return found | {f"score, {category}": value for category, value in each.items()}

    return metrics


def _mme_notes(categories: Sequence[str]) -> list[str]:
    unknown = sorted(set(categories) - set(PERCEPTION) - set(COGNITION))
    return [f"categories that MME does not have, in no sum: {', '.join(unknown)}"] if unknown else []
