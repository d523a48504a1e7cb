"""Scores: what counts as the same answer, by hand and for whatever hypothesis finds."""

from __future__ import annotations

import random
import re
import unicodedata

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from vir_hf.scores.matching import SCORERS, exact_match, is_empty, mean_scores, normalised, rouge_l

TEXTS = st.text(max_size=30)
EMPTY = st.text(alphabet=" \t\n\u00a0\u200b\u200e\ufeff\u00ad", max_size=5)
# Words of letters and marks of any script, with no article among them.
WORDS = st.text(st.characters(categories=("L", "M", "N")), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("said", "right", "wanted"),
    [
        ("A dog!", "dog", 1),
        ("  The red-brown  Dog. ", "red-brown dog", 1),
        ("dogs", "dog", 0),
        ("", "A", 0),
        ("The", "A", 0),
        ("A", "A", 1),
        ("a.", "A", 1),
        ("", "the", 0),
        ("", "?", 0),
        ("?", "?", 1),
        ("!", "?", 0),
        ("+", "=", 0),
        ("5 + 3", "5 = 3", 0),
        ("C", "C#", 0),
        ("C++", "C", 0),
        ("5", "-5", 0),
        ("5", "5%", 0),
        ("5", "5°", 0),
        ("3.5", "35", 0),
        ("3.5", "3 5", 0),
        ("3.5.", "3.5", 1),
        ("1/2", "1 2", 0),
        ("10²", "102", 0),
        ("B", "A, B", 0),
        ("B", "A B", 0),
        ("b or c", "a or b", 0),
        ("vitamin", "vitamin A", 0),
        ("on the table", "On a table.", 1),
        ('"The dog"', "dog", 1),
        ("\u0915\u093e", "\u0915\u0940", 0),  # Hindi: kaa, kii
        ("\u0e14\u0e35", "\u0e14\u0e39", 0),  # Thai: dii, duu
        ("\u0995\u09bf", "\u0995", 0),  # Bengali, a vowel more
        ("cafe\u0301", "caf\u00e9", 1),
        ("cafe", "caf\u00e9", 0),
        ("\u1112\u1161\u11ab", "\ud55c", 1),  # Hangul, in parts and composed
        ("\u212b", "\u00e5", 1),
        ("soft\u00adware", "software", 1),
        ("👍", "👎", 0),
        ("thumb 👍", "thumb 👎", 0),
        ("a\u0331", "b", 0),
        ("a\u0331 cat", "cat", 0),  # a letter with a mark is no article
        ("l'été", "l’été", 1),
        ("犬。", "犬", 1),
    ],
)
def test_what_is_the_same_answer(said: str, right: str, wanted: float) -> None:
    assert exact_match(said, [right]) == exact_match(right, [said]) == wanted
    assert (rouge_l(said, [right]) == 1) is bool(wanted)


def test_normalised_by_hand() -> None:
    assert normalised("  The red-brown  Dog. ") == "red-brown dog"
    assert normalised("The") == "the" and normalised("...") == "..." and normalised(" \u200b ") == ""
    assert normalised("At 12:30, by 3,5 %.") == "at 12:30 by 3,5 %"


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    # Four of five words in order, of four in the reference: 2 * 4 / 9.
    assert rouge_l("red car stands near tree", ["red car near tree"]) == pytest.approx(8 / 9)
    assert rouge_l("tree red", ["red tree"]) == pytest.approx(0.5)
    assert rouge_l("", ["dog"]) == 0 and rouge_l("dog", ["cat", "dog"]) == 1


@given(EMPTY, st.lists(st.one_of(TEXTS, EMPTY), max_size=3))
def test_an_empty_answer_never_scores(answer: str, references: list[str]) -> None:
    assert is_empty(answer)
    assert {name: scorer(answer, references) for name, scorer in SCORERS.items()} == dict.fromkeys(SCORERS, 0.0)


@given(TEXTS, st.lists(TEXTS, max_size=3))
@example("the", [])
@example("_", [])
def test_the_right_answer_scores_one(answer: str, others: list[str]) -> None:
    assume(not is_empty(answer))
    for scorer in SCORERS.values():
        assert scorer(answer, [*others, answer]) == scorer(answer, [answer, *others]) == 1


@given(TEXTS, TEXTS)
def test_scores_lie_between_nothing_and_one_and_do_not_depend_on_the_side(one: str, other: str) -> None:
    for scorer in SCORERS.values():
        assert 0 <= scorer(one, [other]) <= 1
        assert scorer(one, [other]) == scorer(other, [one])


@given(st.lists(WORDS, min_size=1, max_size=3), st.lists(WORDS, min_size=1, max_size=3))
@example(["\u0915\u093e"], ["\u0915\u0940"])
@example(["x"], ["x\u0301"])
@example(["10"], ["1\u2070"])
def test_texts_that_differ_in_a_letter_or_mark_differ(one: list[str], other: list[str]) -> None:
    def spelt(words: list[str]) -> str:
        return unicodedata.normalize("NFC", unicodedata.normalize("NFC", " ".join(words)).lower())

    assume(not re.search(r"\b(a|an|the)\b", f"{spelt(one)} | {spelt(other)}"))
    assert exact_match(" ".join(one), [" ".join(other)]) == float(spelt(one) == spelt(other))


@given(TEXTS)
def test_composed_and_decomposed_text_is_the_same_answer(text: str) -> None:
    assume(not is_empty(text))
    for form in ("NFC", "NFD"):
        assert exact_match(unicodedata.normalize(form, text), [text]) == 1


@given(st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=1, max_size=12), st.randoms())
def test_the_order_of_rows_does_not_matter(rows: list[tuple[str, list[str]]], shuffler: random.Random) -> None:
    mixed = [(answer, shuffler.sample(right, len(right))) for answer, right in shuffler.sample(rows, len(rows))]
    assert mean_scores(*map(list, zip(*rows, strict=True))) == mean_scores(*map(list, zip(*mixed, strict=True)))


def test_a_mean_needs_rows_and_as_many_answers() -> None:
    assert mean_scores(["dog", ""], [["dog"], ["dog"]]) == {"exact match": 0.5, "ROUGE-L": 0.5}
    with pytest.raises(ValueError, match="no rows to score"):
        mean_scores([], [])
    with pytest.raises(ValueError, match="zip"):
        mean_scores(["dog"], [["dog"], ["cat"]])
