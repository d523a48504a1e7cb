"""Questions, answers and choices in columns of their own, as VQA, TextVQA, ScienceQA, A-OKVQA, AI2D and MMMU write them."""

from __future__ import annotations

import ast
import math
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vir_hf.errors import DataError, shown
from vir_hf.rows.keys import is_given

QUESTIONS = ("question", "query")
ANSWERS = ("answer", "multiple_choice_answer", "answers", "direct_answers", "label", "response")
CHOICES = ("choices", "options")
CONTEXTS = ("hint", "context")
_INDICES = ("answer_index", "answer_idx", "correct_choice_idx")
_LETTERS = string.ascii_uppercase
# LLaVA-1.5's own words for questions with choices.
_ASK_FOR_LETTER = "Answer with the option's letter from the given choices directly."
# Where VQA, TextVQA, OK-VQA, DocVQA, SQuAD and the exports of annotation tools put the text of one answer.
_ANSWER_KEYS = ("answer", "answers", "text", "value")


def read_vqa(row: dict[str, Any]) -> tuple[str, str | None, dict[str, Any]]:
    """Return the question as it is asked, the answer that is learned (None if there is none), and the columns not read.

    Of several right answers the one given most often is learned, the first of those given equally often. A question with
    choices lists them by letter, and the letter is the answer.

    Raises:
        KeyError: no question; with the names it may have.
        DataError: an answer that is none of the choices, or columns that say different things.
    """
    rest = dict(row)
    question = _text_of(rest, QUESTIONS)
    contexts = [rest.pop(name) for name in CONTEXTS if isinstance(rest.get(name), str) and rest[name].strip()]
    for name in CONTEXTS:
        if rest.get(name) == "":
            rest.pop(name)
    choices = _choices(rest)
    text = "\n".join([*contexts, question])
    if choices:
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in choices.items())
        text = f"{text}\n{listed}\n{_ASK_FOR_LETTER}"
    answers = right_answers(row)
    for name in (*ANSWERS, *_INDICES, *CHOICES):
        rest.pop(name, None)
    return text, answers[0] if answers else None, rest


def right_answers(row: Mapping[str, Any]) -> list[str]:
    """Return the right answers of a row in columns, the commonest first, each once; a letter where there are choices.

    Raises:
        DataError: an answer in a form of which nothing says what it is, or one that is none of the choices.
    """
    choices = _choices(dict(row))
    for name in _INDICES:
        if choices and is_given(row.get(name)):
            return [_letter_of_index(row[name], name, choices)]
    given = [name for name in ANSWERS if is_given(row.get(name))]
    if choices:
        letters = [_letter(row[name], name, choices) for name in given if name != "direct_answers"]
        if len(set(letters)) > 1:
            raise _differ(given)
        return letters[:1]
    found = [(name, answers_in(row[name], name)) for name in given]
    found = [(name, texts) for name, texts in found if texts]
    if not found:
        return []
    singles = [texts[0] for _, texts in found if len(texts) == 1]
    everything = [text for _, texts in found for text in texts]
    if len(set(singles)) > 1 or (singles and any(singles[0] not in texts for _, texts in found)):
        raise _differ([name for name, _ in found])
    if singles:
        return list(dict.fromkeys([singles[0], *everything]))
    return [text for text, _ in Counter(everything).most_common()]


def _differ(names: Sequence[str]) -> DataError:
    return DataError(
        f"the row has {' and '.join(map(repr, names))}, and they differ; say with data.columns={{answer: COLUMN}} which "
        "one is the answer"
    )


def answers_in(value: Any, key: str) -> list[str]:
    """Return every text that an answer column holds, as often as it is there, without empty ones.

    Takes texts, numbers, lists of them, VQA's `[{"answer": ...}, ...]`, the dictionary of lists that `datasets` makes of that,
    and SQuAD's `{"text": [...]}`.

    Raises:
        DataError: a form of which nothing says what the answer is.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):  # an empty cell of a table
        return []
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, bool):
        return [str(value).lower()]
    if isinstance(value, (int, float)):
        return [str(value)]
    if isinstance(value, Mapping):
        named = next((name for name in _ANSWER_KEYS if name in value), None)
        if named is not None:
            return answers_in(value[named], f"{key}.{named}")
    elif isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray)):
        return [text for one in value for text in answers_in(one, key)]
    raise DataError(
        f"{key!r}: found {shown(value)}; expected a text, a number, a list of them, or VQA's [{{'answer': TEXT}}, ...]."
    )


def _text_of(row: dict[str, Any], names: Sequence[str]) -> str:
    given = [name for name in names if is_given(row.get(name))]
    if not given:
        raise KeyError(tuple(names))
    values = [row.pop(name) for name in given]
    if any(value != values[0] for value in values[1:]):
        raise DataError(
            f"the row has {' and '.join(map(repr, given))}, and they differ; say with data.columns={{question: COLUMN}} "
            "which one is the question"
        )
    if not isinstance(values[0], str):
        inner = f", such as {given[0]}.{next(iter(values[0]))}" if isinstance(values[0], Mapping) and values[0] else ""
        raise DataError(
            f"{given[0]!r} must be the text of a question, found {shown(values[0])}; say with data.columns={{question: "
            f"COLUMN}} where it is{inner}"
        )
    return values[0]


def _choices(row: dict[str, Any]) -> dict[str, str]:
    """Return a row's choices by their letters; none if it has none. Columns `A`, `B` ... are taken out of the row."""
    given = [name for name in CHOICES if is_given(row.get(name)) and row[name] != ""]
    if not given:
        letters = [letter for letter in _LETTERS[:10] if is_given(row.get(letter)) and str(row[letter]).strip()]
        if letters[:2] != ["A", "B"]:
            return {}
        return {letter: str(row.pop(letter)) for letter in letters}
    value = row[given[0]]
    if isinstance(value, str):  # MMMU writes a list as Python would
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise DataError(f"{given[0]!r} must be a list of choices, found {shown(value)}") from error
    if isinstance(value, Mapping):
        if isinstance(value.get("text"), (list, tuple)) and isinstance(value.get("label"), (list, tuple)):
            return {str(letter): str(text) for letter, text in zip(value["label"], value["text"], strict=True)}
        return {str(letter): str(text) for letter, text in value.items() if text is not None}
    if not isinstance(value, (list, tuple)) or len(value) > len(_LETTERS):
        raise DataError(f"{given[0]!r} must be a list of choices, found {shown(value)}")
    return {letter: str(text) for letter, text in zip(_LETTERS, value, strict=False)}


def _letter(answer: Any, name: str, choices: Mapping[str, str]) -> str:
    """Return the letter of the choice that an answer names: by number from 0, by letter, or in its own words.

    Raises:
        DataError: it names none, or different ones by what it may mean.
    """
    if isinstance(answer, (list, tuple)) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, int) and not isinstance(answer, bool):
        return _letter_of_index(answer, name, choices)
    text = str(answer).strip()
    bare = text.strip("().: ")
    meant = {letter for letter, choice in choices.items() if choice.strip() == text}
    if len(bare) <= 2 and bare in choices:
        meant.add(bare)
    if text.isdigit() and int(text) < len(choices):
        meant.add(list(choices)[int(text)])
    if len(meant) == 1:
        return meant.pop()
    if meant:
        raise DataError(
            f"{name!r} is {shown(answer)}, which may be {' or '.join(sorted(meant))} of the choices {shown(dict(choices))}; "
            f"if it counts them from 0, set data.columns={{answer_index: {name}}}"
        )
    raise DataError(f"{name!r} is {shown(answer)}, which is none of the choices {shown(dict(choices))}")


def _letter_of_index(index: Any, name: str, choices: Mapping[str, str]) -> str:
    try:
        return list(choices)[_natural(index)]
    except (ValueError, TypeError, IndexError):
        raise DataError(
            f"{name!r} is {shown(index)}; expected the number of one of {len(choices)} choices, counted from 0"
        ) from None


def _natural(value: Any) -> int:
    number = int(value)
    if number < 0:
        raise ValueError
    return number
