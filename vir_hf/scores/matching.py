"""How answers are scored: pure functions of an answer and the right ones, without a model, a file or a row.

`SCORERS` names them; a new one is a function and a line there. What all of them keep: an answer with nothing in it scores
0, an answer that is one of the right ones scores 1, and neither the order of the rows nor that of the references matters.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence

Scorer = Callable[[str, Sequence[str]], float]

# What `normalised` does, in words: written beside every score that was made with it.
NORMALISATION = (
    "Unicode NFC, lower case, without punctuation between words and without a, an, the before a word; where nothing is left, "
    "the text as it is"
)
_ARTICLES = frozenset({"a", "an", "the"})
# Punctuation that says something where it stands: "-5", "50%", "C#", "R&D", "me@home".
_SIGNS = frozenset("-%#&@")
_IN_NUMBER = re.compile(r"(?<=\d)[.,:/](?=\d)")
# Soft hyphens, zero-width spaces, marks of direction, byte order marks: nothing that is read. Joiners stay, they spell.
_INVISIBLE = re.compile(r"[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")


def is_empty(answer: str) -> bool:
    """Return whether an answer has nothing in it: no character, or spaces and invisible ones alone."""
    return not _readable(answer)


def normalised(text: str) -> str:
    """Return a text as answers are compared: `NORMALISATION` says how, and "" stands only for an empty one.

    NFC and not NFKC, which makes 10² and 102 the same number. Letters, marks (the vowels of Hindi and Thai are some), digits
    and symbols (+, =, °, emoji) all count. An article is left out only in front of a word: "the" alone and the letters of
    "A, B", of "A or B" and of "vitamin A" are answers. Punctuation inside a number stays: 3.5 is not 35, nor 1/2 12.
    """
    readable = _readable(text).lower()
    given = readable.split()
    kept: list[str] = []  # from the end, so that each word knows what follows it
    for raw in reversed(given):
        words = _without_punctuation(raw).split()
        is_article = len(words) == 1 and words[0] in _ARTICLES and raw.endswith(words[0])
        if is_article and kept and len(kept[-1]) > 1:
            continue
        kept += reversed(words)
    return unicodedata.normalize("NFC", " ".join(reversed(kept))) or readable


def _readable(text: str) -> str:
    """Return the text in composed form, without what nobody sees."""
    return unicodedata.normalize("NFC", _INVISIBLE.sub("", unicodedata.normalize("NFC", text))).strip()


def _without_punctuation(word: str) -> str:
    inside = {found.start() for found in _IN_NUMBER.finditer(word)}
    return "".join(
        " " if place not in inside and character not in _SIGNS and _is_punctuation(character) else character
        for place, character in enumerate(word)
    )


def _is_punctuation(character: str) -> bool:
    category = unicodedata.category(character)
    # Pc holds the underscore, a part of names; Cc what steers a terminal.
    return (category[0] == "P" and category != "Pc") or category == "Cc"


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Return 1 if the answer is one of the right ones, both `normalised`, else 0."""
    given = normalised(answer)
    return float(bool(given) and any(given == normalised(reference) for reference in references))


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Return ROUGE-L, the F1 over the words of both that stand in the same order, the best over all references.

    A word is what stands between spaces, `normalised`: a Thai or Chinese sentence is one.

    Source: Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004, section 3.
    """
    words = normalised(answer).split()
    return max((_f1(words, normalised(reference).split()) for reference in references), default=0.0)


def _f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    if not answer or not reference:
        return 0.0
    row = [0] * (len(reference) + 1)
    for word in answer:
        diagonal = 0
        for number, other in enumerate(reference, 1):
            diagonal, row[number] = row[number], diagonal + 1 if word == other else max(row[number], row[number - 1])
    return 2 * row[-1] / (len(answer) + len(reference))


SCORERS: Mapping[str, Scorer] = {"exact match": exact_match, "ROUGE-L": rouge_l}


def mean_scores(
    answers: Sequence[str], references: Sequence[Sequence[str]], scorers: Mapping[str, Scorer] = SCORERS
) -> dict[str, float]:
    """Return the mean of every scorer over the rows, by its name, between 0 and 1.

    Args:
        answers: one a row.
        references: the right answers of each row, in the same order.

    Raises:
        ValueError: no rows, or another number of answers than of references.
    """
    if not answers:
        raise ValueError("no rows to score; expected at least one answer.")
    return {
        # fsum is exact, so that rows in another order give the same bits.
        name: math.fsum(scorer(answer, right) for answer, right in zip(answers, references, strict=True)) / len(answers)
        for name, scorer in scorers.items()
    }
