"""Answers that are in a file already, brought together with the questions they answer: by id, by content, never by luck.

What does not line up is counted and named. A score over those that do would be a score of something else, so it is refused unless
the caller says that a question without answer counts as wrong.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vir_hf.errors import DataError, clipped, shown
from vir_hf.scores.choices import LETTERS
from vir_hf.scores.judging import Item
from vir_hf.scores.matching import is_empty
from vir_hf.using.benchmark_files import KEY, is_missing, read_table
from vir_hf.using.benchmarks import bare_question, image_stem, row_id, row_image, row_question_text

_ID_KEYS = ("question_id", "questionId", "qid", "index", "id", "image_id", KEY)
_TEXT_KEYS = ("prediction", "response", "output", "pred_answer", "text", "caption", "answer")
_POPE_FILE = re.compile(r"pope_([a-z]+)", re.IGNORECASE)
_NUM_SHOWN = 3


@dataclass(frozen=True)
class Answer:
    """One stored answer: its id, `None` in files that go by order; what was asked; whether it was cut by its length."""

    id: str | None
    text: str
    prompt: str = ""
    is_cut: bool = False
    image: str = ""
    round: int = 0
    letters: tuple[str, ...] = ()


@dataclass
class Aligned:
    """Questions and the answer to each, in the order of the questions.

    Attributes:
        counts: what was found: questions, answers, and everything that is odd about them.
        notes: the same in words, for what is not as it should be.
        cut: whether each answer was cut by its greatest length.
    """

    items: list[Item]
    answers: list[str]
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    cut: list[bool] = field(default_factory=list)


def read_answers(place: str | os.PathLike[str]) -> list[Answer]:
    """Return the answers of a file: LLaVA's, this project's, VQA's, GQA's or COCO's results, a table, MME's result files.

    Raises:
        DataError: no rows, or a row without an answer.
    """
    rows = read_table(place)
    if len(rows) == 1 and len(rows[0]) > 1 and not set(rows[0]) & {*_ID_KEYS, *_TEXT_KEYS}:
        rows = [{"id": key, "answer": value} for key, value in rows[0].items()]
    answers = []
    for number, row in enumerate(rows):
        text = next((row[key] for key in _TEXT_KEYS if key in row), None)
        if not isinstance(text, (str, int, float)) and text is not None:
            raise DataError(f"{place} row {number}: found the answer {shown(text)}, expected a text.")
        if text is None and not any(key in row for key in _TEXT_KEYS):
            raise DataError(f"{place} row {number}: has no answer; expected one of the keys {', '.join(_TEXT_KEYS)}.")
        given = next((row[key] for key in _ID_KEYS if not is_missing(row.get(key))), None)
        prompt = next((row[key] for key in ("prompt", "question") if isinstance(row.get(key), str)), "")
        answers.append(
            Answer(
                None if given is None else str(given),
                "" if text is None else str(text),
                prompt,
                row.get("finish_reason") == "length" or row.get("is_cut") is True,
                image_stem(row_image(row)),
                int(row.get("round_id") or 0),
                tuple(row.get("option_char") or ()),
            )
        )
    return answers


def align(
    items: Sequence[Item],
    answers: Sequence[Answer],
    *,
    names: tuple[str, str] = ("the labels", "the answers"),
    missing_is_wrong: bool = False,
) -> Aligned:
    """Return the items, each with its answer.

    Args:
        names: the files, for messages.
        missing_is_wrong: a question without an answer is kept with an empty one, instead of refusing.

    Raises:
        DataError: questions without answers, answers without questions, several answers to one question, or answers whose
            prompt is that of another question; with their numbers and the first of each.
    """
    items = _rotated(items, answers)
    found, duplicates, strangers = _match(items, list(answers))
    counts = {
        "questions": len(items),
        "answers": len(answers),
        "questions_without_answer": sum(item.id not in found for item in items),
        "answers_without_question": len(strangers),
        "duplicate_answers": len(duplicates),
        "answers_to_another_question": len(_of_other_questions(items, found)),
        "empty_answers": sum(is_empty(answer.text) for answer in found.values()),
        "cut_answers": sum(answer.is_cut for answer in found.values()),
    }
    _refuse(items, found, counts, duplicates, strangers, names, missing_is_wrong)
    texts = [found[item.id].text if item.id in found else "" for item in items]
    cut = [item.id in found and found[item.id].is_cut for item in items]
    return Aligned(list(items), texts, counts, cut=cut)


def notes_of(counts: dict[str, int]) -> list[str]:
    """Return in words what is not as it should be, though it could be scored."""
    words = {
        "questions_without_answer": "questions have no answer and count as wrong",
        "empty_answers": "answers have nothing in them and count as wrong",
        "cut_answers": "answers were cut by their greatest length",
        "answers_of_other_categories": "answers belong to other categories and are left out",
    }
    return [f"{counts[name]:,} {said}" for name, said in words.items() if counts.get(name)]


def _match(items: Sequence[Item], answers: list[Answer]) -> tuple[dict[str, Answer], list[str], list[str]]:
    """Return the answer to each item by the item's id, ids with different answers, and answers to nothing."""
    if all(answer.id is None for answer in answers):
        return _match_without_ids(items, answers)
    by_id = {item.id: item.id for item in items}
    by_content: dict[str, str] = {}
    for item in items:
        by_content[f"{image_stem(item.image)} {bare_question(item.question)}"] = item.id
    ways = [
        (by_id, [str(answer.id) for answer in answers]),
        (by_id, [f"{answer.id} {bare_question(answer.prompt)}" for answer in answers]),
    ]
    if len(by_content) == len(items):
        ways.append(
            (by_content, [f"{image_stem(str(answer.id))} {bare_question(answer.prompt)}" for answer in answers])
        )
    known, keys = max(ways, key=lambda way: len(set(way[1]) & set(way[0])))
    found: dict[str, Answer] = {}
    duplicates, strangers = [], []
    for answer, key in zip(answers, keys, strict=True):
        if key not in known:
            strangers.append(str(answer.id))
        elif known[key] in found and found[known[key]].text != answer.text:
            duplicates.append(str(answer.id))
        else:
            found[known[key]] = answer  # the same answer twice, as an appended file holds it, is one
    return found, duplicates, strangers


def _match_without_ids(items: Sequence[Item], answers: list[Answer]) -> tuple[dict[str, Answer], list[str], list[str]]:
    """Go by order, as POPE's own script does, where the number is the same; prompts are compared by the caller."""
    if len(items) != len(answers):
        raise DataError(
            f"the answers have no ids and there are {len(answers):,} of them to {len(items):,} questions; expected as many, in "
            "the same order, or a question_id in each."
        )
    return {item.id: answer for item, answer in zip(items, answers, strict=True)}, [], []


def _of_other_questions(items: Sequence[Item], found: dict[str, Answer]) -> list[str]:
    """Return the ids of answers whose prompt does not hold the question they would be taken for."""
    others = []
    for item in items:
        answer = found.get(item.id)
        if answer is None or not answer.prompt or not item.question:
            continue
        is_other_image = bool(answer.image and image_stem(item.image) and answer.image != image_stem(item.image))
        if bare_question(item.question) not in bare_question(answer.prompt) or is_other_image:
            others.append(item.id)
    return others


def _refuse(
    items: Sequence[Item],
    found: dict[str, Answer],
    counts: dict[str, int],
    duplicates: list[str],
    strangers: list[str],
    names: tuple[str, str],
    missing_is_wrong: bool,
) -> None:
    missing = [item.id for item in items if item.id not in found]
    others = _of_other_questions(items, found)
    problems = []
    if missing and (not missing_is_wrong or len(missing) == len(items)):
        problems.append(f"{len(missing):,} of {len(items):,} questions have no answer ({_first(missing)})")
    if strangers:
        problems.append(f"{len(strangers):,} of {counts['answers']:,} answers have no question ({_first(strangers)})")
    if duplicates:
        problems.append(f"{len(duplicates):,} ids come again with another answer ({_first(duplicates)})")
    if others:
        problems.append(
            f"{len(others):,} answers were given to another question than the labels have ({_first(others)})"
        )
    if problems:
        remedy = "Are they of the same edition? Name the question file with --questions if ids differ"
        if missing and not strangers and not duplicates and not others:
            remedy = "Answer them, or add --missing-as-wrong to count them as wrong"
        raise DataError(clipped(f"{names[1]} do not line up with {names[0]}: {'; '.join(problems)}. {remedy}."))


def _first(names: Sequence[str]) -> str:
    return ", ".join(shown(name) for name in names[:_NUM_SHOWN]) + (", ..." if len(names) > _NUM_SHOWN else "")


# --- questions in a file of their own, as LLaVA publishes them ---


def asked_items(
    items: Sequence[Item], questions: str | os.PathLike[str], labels: str | os.PathLike[str]
) -> tuple[list[Item], set[str]]:
    """Return the items under the ids of a question file, and the ids of its questions of other categories.

    Where both files say what is asked, image and question decide which label belongs to which question, within the category
    of the labels (POPE's three label files belong to one question file); else the id does (VQA's annotations).

    Raises:
        DataError: labels without question or questions without label: the files are of different editions.
    """
    rows = read_table(questions)
    if not any(item.question for item in items):
        return _joined_by_id(items, rows, questions, labels), set()
    by_content: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        by_content.setdefault((image_stem(item.image), bare_question(item.question)), []).append(item)
    category = _category_of(labels, rows, by_content)
    asked, unknown, others, used = [], [], set(), Counter[tuple[str, str]]()
    ids = Counter(row_id(row, number) for number, row in enumerate(rows))
    for number, row in enumerate(rows):
        name, text = row_id(row, number), row_question_text(row)
        own_id = name if ids[name] == 1 else f"{name} {bare_question(text)}"
        if category is not None and row.get("category") != category:
            others.add(own_id)
            continue
        key = (image_stem(row_image(row)), bare_question(text))
        place = used[key]
        if place >= len(by_content.get(key, [])):
            unknown.append(name)
            continue
        used[key] += 1
        asked.append(replace(by_content[key][place], id=own_id))
    left = [item.id for key, same in by_content.items() for item in same[used[key] :]]
    if unknown or left:
        raise DataError(
            clipped(
                f"{labels} and {questions} do not line up: {len(left):,} of {len(items):,} labels have no question"
                + (f" ({_first(left)})" if left else "")
                + f", {len(unknown):,} of {len(asked) + len(unknown):,} questions"
                + (f" of category {category!r}" if category else "")
                + " have no label"
                + (f" ({_first(unknown)})" if unknown else "")
                + ". They are of different editions; take both from the same one."
            )
        )
    return asked, others


def _joined_by_id(items: Sequence[Item], rows: list[dict[str, Any]], questions: Any, labels: Any) -> list[Item]:
    texts = {row_id(row, number): row for number, row in enumerate(rows)}
    missing = [item.id for item in items if item.id not in texts]
    extra = set(texts) - {item.id for item in items}
    if missing or extra:
        raise DataError(
            clipped(
                f"{labels} and {questions} do not line up: {len(missing):,} of {len(items):,} labels have no question "
                f"({_first(missing)}), {len(extra):,} of {len(texts):,} questions have no label ({_first(sorted(extra))}). They "
                "are of different editions or splits; take both from the same one."
            )
        )
    return [
        replace(item, question=row_question_text(texts[item.id]), image=item.image or row_image(texts[item.id]))
        for item in items
    ]


def _category_of(labels: Any, rows: list[dict[str, Any]], wanted: dict[tuple[str, str], list[Item]]) -> str | None:
    """Return which category of the questions the labels are for: by the file's name, else that with the most of them."""
    categories = Counter(str(row["category"]) for row in rows if not is_missing(row.get("category")))
    if len(categories) < 2:
        return None
    named = _POPE_FILE.search(Path(labels).name)
    if named and named.group(1).lower() in categories:
        return named.group(1).lower()
    shared = Counter[str]()
    for row in rows:
        if (image_stem(row_image(row)), bare_question(row_question_text(row))) in wanted:
            shared[str(row.get("category"))] += 1
    num_items = sum(map(len, wanted.values()))
    if sum(shared.values()) <= num_items:  # the labels are those of all categories
        return None
    return shared.most_common(1)[0][0]


def without_others(answers: Sequence[Answer], others: set[str]) -> tuple[list[Answer], int]:
    """Return the answers without those to questions of other categories, and the number of these."""
    kept = [
        answer
        for answer in answers
        if answer.id not in others and f"{answer.id} {bare_question(answer.prompt)}" not in others
    ]
    return kept, len(answers) - len(kept)


# --- rotations that a file of answers holds and the labels do not ---


def _rotated(items: Sequence[Item], answers: Sequence[Answer]) -> Sequence[Item]:
    return items if all(answer.round == 0 for answer in answers) else rotate(items)


def rotate(items: Sequence[Item]) -> list[Item]:
    """Return each question once for each of its options, the first of them moved to the end each time.

    Source: circular evaluation of MMBench, https://arxiv.org/abs/2307.06281, section 3.3, in the order of LLaVA's --all-rounds.
    """
    found = []
    for item in items:
        right = item.references[0].strip().upper()
        place = (
            LETTERS.index(right) if len(right) == 1 else [text.lower() for text in item.options].index(right.lower())
        )
        for turn in range(len(item.options)):
            options = item.options[turn:] + item.options[:turn]
            letter = LETTERS[(place - turn) % len(options)]
            found.append(
                replace(
                    item,
                    id=f"{item.id} round {turn}",
                    options=options,
                    references=(letter,),
                    group=item.group or item.id,
                )
            )
    return found


def with_rounds(answers: Sequence[Answer]) -> list[Answer]:
    """Return LLaVA's answers to rotated options under the ids that `rotate` gives."""
    if all(answer.round == 0 for answer in answers):
        return list(answers)
    return [replace(answer, id=f"{answer.id} round {answer.round}") for answer in answers]
