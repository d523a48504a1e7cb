"""Multiple choice: which letter an answer names, plain and circular accuracy.

What an answer is read as:

- `mmbench`: MMBench's rules, without a language model behind them: one option letter that stands alone, once (an "A" among more
  than three words is an article), else a letter marked as in `B.` or `(B)`, else the one option whose text is in the answer.
- `scienceqa`: LLaVA's: a letter alone, `B. ...` at the beginning, or `The answer is B`.
- `mmstar`: MMStar's own: the first character, or the one after `(`, `option ` or `the answer is `.
- `letter`: the letter alone, in any case, a full stop or brackets allowed.

What cannot be read is wrong, and counted. Circular accuracy counts a question if it is answered rightly in every rotation of its
options, as MMBench does.

Sources: MMBench's evaluator as kept in lmms-eval, tasks/mmbench/mmbench_evals.py; VLMEvalKit, utils/matching_util.py and
dataset/utils/multiple_choice.py (without a judge unparsed is a miss); LLaVA, eval_science_qa.py; lmms-eval, mmstar/utils.py.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

import numpy as np

from vir_hf.errors import DataError, shown
from vir_hf.scores.judging import Item, Judged, Scorer, by_category, mean_of, ratio
from vir_hf.scores.matching import is_empty

Reader = Callable[[str, Item], str]

LETTERS = string.ascii_uppercase
_FEWEST_WORDS_WITH_ARTICLE = 4
_MARKS = (
    ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
    (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."),
)  # fmt: skip


def letters_of(item: Item) -> str:
    """Return the letters offered; the first five where the options stand in the question's own text."""
    return LETTERS[: len(item.options)] if item.options else LETTERS[:5]


def read_mmbench(answer: str, item: Item) -> str:
    """Return the letter by MMBench's rules, or nothing."""
    letters, words = letters_of(item), answer.split()
    alone = [letter for letter in letters if letter in words]
    may_be_article = "A" in words and len(words) >= _FEWEST_WORDS_WITH_ARTICLE
    if len(alone) == 1 and not may_be_article:
        return alone[0]
    for before, after in _MARKS:
        marked = [letter for letter in letters if before + letter + after in words]
        if len(marked) == 1:
            return marked[0]
    low = answer.lower()
    named = [
        letter
        for letter, text in zip(letters, item.options, strict=False)
        if not is_empty(text) and text.lower() in low
    ]
    return named[0] if len(named) == 1 else ""


def read_scienceqa(answer: str, item: Item) -> str:
    """Return the letter by LLaVA's rules for ScienceQA, or nothing."""
    text, letters = answer.replace("\n", ". "), LETTERS[:5]
    if text.strip() in letters and len(text.strip()) == 1:
        found = text.strip()
    elif len(text) >= 3 and text[0] in letters and text[1:3] == ". ":
        found = text[0]
    else:
        match = re.search(r"The answer is ([A-E])\.", text) or re.search(r"The answer is ([A-E])", text)
        found = match.group(1) if match else ""
    return found if found in letters_of(item) else ""


def read_mmstar(answer: str, item: Item) -> str:
    """Return the letter by MMStar's rules, or nothing."""
    text = answer.lower().strip().replace("\n", " ")
    for start in ("", "(", "option ", "the answer is "):
        letter = text[len(start) : len(start) + 1].upper()
        if text.startswith(start) and letter and letter in letters_of(item):
            return letter
    return ""


def read_letter(answer: str, item: Item) -> str:
    """Return the letter if the answer is nothing else, but for case, brackets and a full stop."""
    found = answer.strip().strip("().").strip().upper()
    return found if len(found) == 1 and found in letters_of(item) else ""


def right_letter(item: Item) -> str:
    """Return the letter of the right option.

    Raises:
        DataError: the right answer is none of the letters offered.
    """
    given = item.references[0].strip() if item.references else ""
    if len(given) == 1 and given.upper() in letters_of(item):
        return given.upper()
    same = [number for number, text in enumerate(item.options) if text.strip().lower() == given.lower() != ""]
    if len(same) == 1:
        return LETTERS[same[0]]
    raise DataError(
        f"question {shown(item.id)}: found the right answer {shown(given)}, expected one of {', '.join(letters_of(item))}."
    )


def choice(read: Reader, *, over: str = "rows", category: str = "category") -> Scorer:
    """Return the scorer of multiple choice: accuracy, and circular accuracy where options are asked in rotation.

    Args:
        over: `rows` or `categories`, as `mean_of`.
        category: which categories scores are broken down by: the item's own, or one of its details.
    """

    def category_of(item: Item) -> str:
        return item.category if category == "category" else str(item.details.get(category) or item.category)

    def judge(answer: str, item: Item) -> tuple[float, str]:
        letter = read(answer, item)
        return float(letter == right_letter(item)), letter

    plain = mean_of("accuracy", judge, over=over, category_of=category_of)

    def scorer(items: Sequence[Item], answers: Sequence[str]) -> Judged:
        for item in items:
            right_letter(item)  # also where the answer is empty
        judged = plain(items, answers)
        unread = sum(
            not letter and not is_empty(answer) for letter, answer in zip(judged.read_as, answers, strict=True)
        )
        notes = [f"{unread} answers name no option and count as wrong"] if unread else []
        groups = rotations(items)
        if all(len(rows) == 1 for rows in groups):
            return Judged(judged.scores, judged.read_as, judged.units, judged.statistics, judged.metrics, notes)
        return _circular(items, judged, groups, category_of, notes)

    return scorer


def rotations(items: Sequence[Item]) -> list[list[int]]:
    """Return the rows of each question: one, or one for each rotation of its options."""
    groups: dict[str, list[int]] = {}
    for row, item in enumerate(items):
        groups.setdefault(item.group or item.id, []).append(row)
    return list(groups.values())


def _circular(
    items: Sequence[Item], judged: Judged, groups: list[list[int]], category_of: Callable[[Item], str], notes: list[str]
) -> Judged:
    """Return the same with questions as units: all rotations right, and the first one alone."""
    incomplete = [rows for rows in groups if len(rows) != len(items[rows[0]].options)]
    if incomplete:
        first = items[incomplete[0][0]]
        raise DataError(
            f"{len(incomplete)} of {len(groups)} questions are not asked once for each of their options, as circular evaluation "
            f"needs: question {shown(first.group or first.id)} has {len(first.options)} options and {len(incomplete[0])} rows."
        )
    units = np.zeros(len(items), int)
    for number, rows in enumerate(groups):
        units[rows] = number
    hits = [float(all(judged.scores[row] == 1 for row in rows)) for rows in groups]
    firsts = [judged.scores[rows[0]] for rows in groups]
    given = [category_of(items[rows[0]]) for rows in groups]
    categories = sorted(set(given) - {""})
    statistics = np.concatenate([by_category(hits, given, categories), np.array(firsts)[:, None]], axis=1)

    def metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
        found = {"circular_accuracy": ratio(sums[:, 0], sums[:, 1]), "accuracy": ratio(sums[:, -1], sums[:, 1])}
        if len(categories) > 1:
            for number, name in enumerate(categories):
                found[f"circular_accuracy, {name}"] = ratio(sums[:, 2 + 2 * number], sums[:, 3 + 2 * number])
        return found

    return Judged(judged.scores, judged.read_as, units, statistics, metrics, notes)
