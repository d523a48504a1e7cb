"""The questions of a benchmark, with their right answers, whichever way its own files name them."""

from __future__ import annotations

import ast
import base64
import binascii
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from vir_hf.errors import DataError, clipped, shown
from vir_hf.scores.choices import LETTERS
from vir_hf.scores.judging import Item
from vir_hf.scores.tasks import BOX, CAPTION, LETTER, SHORT, UNANSWERABLE, Task
from vir_hf.using.benchmark_files import KEY, is_missing, read_table
from vir_hf.using.questions import question_messages, row_references

ROW = "_row"  # the row of a conversation, which is asked as it stands
_IDS = ("question_id", "questionId", "qid", "index", "id", KEY)
_QUESTIONS = ("question", "query", "text", "prompt", "sent", "sentence", "ref")
_IMAGES = ("image", "image_path", "imgname", "img_path", "image_name", "image_local_name", "file_name", "img", "images")
_CHOICE_TASKS = ("mcq", "mmbench", "scienceqa", "mmstar", "ai2d")
_INSTRUCTIONS = (SHORT, LETTER, UNANSWERABLE, CAPTION, "Please answer yes or no.", "请直接回答选项字母。")
_OCR_TOKENS = re.compile(r"^Reference OCR token:.*$", re.MULTILINE)
_ROTATION = 1_000_000  # MMBench numbers the rotations of question 7 as 7, 1000007, 2000007 ...


def read_items(task: Task, place: str | os.PathLike[str]) -> list[Item]:
    """Return the items of a file of labels, each with an id that no other has.

    Where a benchmark gives one id to several questions (TextVQA's images, MME's), the question becomes a part of it.

    Raises:
        DataError: no rows, a row without question or right answer, or the same question twice under one id.
    """
    rows = read_table(place)
    if task.name == "caption":
        return _captions(rows, place)
    items = []
    for number, row in enumerate(rows):
        try:
            items.append(item_of(task, row, number))
        except DataError as error:
            raise DataError(f"{place} row {number} (id {shown(row_id(row, number))}): {error}") from error
    return _in_groups(task, _with_own_ids(items, place))


def row_id(row: Mapping[str, Any], number: int) -> str:
    """Return the id of a row: the first of its benchmark's names for one, else its number."""
    return next((str(row[key]) for key in _IDS if not is_missing(row.get(key))), str(number))


def item_of(task: Task, row: Mapping[str, Any], number: int) -> Item:
    """Return one row as an item.

    Raises:
        DataError: no question where there has to be one, or no right answer.
    """
    details: dict[str, Any] = {}
    for key, name in (
        ("hint", "hint"),
        ("dataset_name", "dataset"),
        ("dataset", "dataset"),
        ("l2_category", "l2_category"),
        ("l2-category", "l2_category"),
    ):
        if not is_missing(row.get(key)):
            details[name] = str(row[key])
    if row.get("conversations") is not None or row.get("messages") is not None:
        details[ROW] = row
    options = _options(row) if task.name in _CHOICE_TASKS else ()
    references = _choice_reference(row, options) if task.name in _CHOICE_TASKS else _references(task, row)
    return Item(
        id=row_id(row, number),
        question=row_question_text(row),
        references=references,
        image=row_image(row),
        options=options,
        category=_category(task, row),
        group=str(row.get("g_index", "") or ""),
        details=details,
    )


def row_question_text(row: Mapping[str, Any]) -> str:
    """Return what a row asks, or nothing if it says nothing of it (VQA's annotations)."""
    if row.get("conversations") is not None or row.get("messages") is not None:
        messages = question_messages(row)["messages"]
        last = [message for message in messages if message["role"] == "user"][-1:]
        return "".join(
            part["text"] for message in last for part in message["content"] if part["type"] == "text"
        ).strip()
    return next((str(row[key]) for key in _QUESTIONS if isinstance(row.get(key), str)), "")


def row_image(row: Mapping[str, Any]) -> Any:
    """Return where a row's image lies, or its content; `None` if it has none."""
    for key in _IMAGES:
        value = row.get(key)
        if isinstance(value, (list, tuple)):
            value = value[0] if value else None
        if is_missing(value):
            continue
        return _decoded(value) if isinstance(value, str) else value
    for key, pattern in (("imageId", "{}.jpg"), ("image_id", "{}.jpg")):
        value = row.get(key)
        if isinstance(value, str):
            return pattern.format(value)
        if isinstance(value, int):
            return f"{value:012d}.jpg"  # COCO's, of which `ImageFolder` finds the other editions' names
    return None


def _decoded(value: str) -> Any:
    """Return the content of an image written as base64, as MMBench's are; a name stays one."""
    if len(value) < 256:
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (ValueError, binascii.Error):
        return value


def _options(row: Mapping[str, Any]) -> tuple[str, ...]:
    for key in ("choices", "options"):
        value = row.get(key)
        if isinstance(value, str) and value.startswith("["):
            value = ast.literal_eval(value)
        if value is not None and not isinstance(value, (str, Mapping)):
            return tuple(str(text) for text in value)
        if isinstance(value, Mapping):
            return tuple(str(value[letter]) for letter in LETTERS if not is_missing(value.get(letter)))
    texts = []
    for letter in LETTERS:
        if is_missing(row.get(letter)):
            break
        texts.append(str(row[letter]))
    return tuple(texts)


def _choice_reference(row: Mapping[str, Any], options: Sequence[str]) -> tuple[str, ...]:
    given = row.get("answer")
    if isinstance(given, bool) or is_missing(given):
        raise DataError(f"found the right answer {shown(given)}, expected the letter or the number of an option.")
    text = str(int(given)) if isinstance(given, float) and given.is_integer() else str(given).strip()
    if text.isdigit() and options and text not in options:
        if int(text) >= len(options):
            raise DataError(
                f"found the right answer {text}, expected a number below {len(options)}, that of its options."
            )
        return (LETTERS[int(text)],)
    return (text.strip("().") if len(text) <= 3 else text,)


def _references(task: Task, row: Mapping[str, Any]) -> tuple[str, ...]:
    if task.name in ("vqa", "textvqa", "vizwiz"):
        return _ten(row)
    if task.name == "grounding":
        for key in ("bbox", "box", "boxes"):
            if not is_missing(row.get(key)):
                return (str([float(number) for number in row[key]]),)
    for key in ("label", "answers", "answer"):
        if not is_missing(row.get(key)) and row[key] != []:
            try:
                return tuple(row_references({"answers": row[key]}))
            except DataError:
                raise DataError(
                    f"{key!r}: found {shown(row[key])}, expected the right answer, or a list of them."
                ) from None
    return tuple(row_references(row))


def _ten(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what each person answered: the same answer as often as it was given, empty ones too."""
    given = row.get("answers", row.get("direct_answers"))
    if isinstance(given, Mapping) and "answer" in given:  # as `datasets` keeps a list of objects
        given = given["answer"]
    if isinstance(given, str) and given.startswith("["):
        given = ast.literal_eval(given)
    if not isinstance(given, str) and hasattr(given, "__iter__"):
        return tuple(str(one["answer"]) if isinstance(one, Mapping) else str(one) for one in given)
    return tuple(row_references(row))


def _category(task: Task, row: Mapping[str, Any]) -> str:
    if task.name == "scienceqa":
        return "with image" if row_image(row) is not None else "without image"
    if task.name == "gqa":
        types = row.get("types")
        return str(types.get("structural", "")) if isinstance(types, Mapping) else ""
    keys = {
        "mme": ("category",), "ocrbench": ("type", "question_type"), "vqa": ("answer_type",), "vizwiz": ("answer_type",),
        "relaxed": ("type", "split"), "exact": ("category",), "grounding": ("split",),
    }.get(task.name, ("category",))  # fmt: skip
    if task.name in ("textvqa", "anls"):
        return ""
    found = next((str(row[key]) for key in keys if not is_missing(row.get(key))), "")
    if task.name == "mme" and not found:
        found = row_id(row, 0).split("/")[0]
    return found


def _captions(rows: Sequence[Mapping[str, Any]], place: Any) -> list[Item]:
    """Return one item for each image, with all its captions."""
    found: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows):
        key = next(
            (str(row[name]) for name in ("image_id", "question_id", "id") if not is_missing(row.get(name))), str(number)
        )
        one = found.setdefault(key, {"image": row_image(row), "texts": []})
        texts = row.get("caption", row.get("captions", row.get("references")))
        if texts is None:
            texts = row_references(row)
        one["texts"] += [texts] if isinstance(texts, str) else [str(text) for text in texts]
    for key, one in found.items():
        if not any(text.strip() for text in one["texts"]):
            raise DataError(f"{place}: image {shown(key)} has no right caption.")
    return [Item(id=key, references=tuple(one["texts"]), image=one["image"]) for key, one in found.items()]


def _with_own_ids(items: list[Item], place: Any) -> list[Item]:
    """Return the items with the question in the id where several have the same one."""
    times = Counter(item.id for item in items)
    items = [
        replace(item, id=f"{item.id} {bare_question(item.question)}", group=item.group or item.id)
        if times[item.id] > 1
        else item
        for item in items
    ]
    again = [name for name, count in Counter(item.id for item in items).items() if count > 1]
    if again:
        raise DataError(
            clipped(
                f"{place}: {len(again)} ids come more than once, with the same question; the first is {shown(again[0])}. Answers "
                "are matched by id, so give each question its own."
            )
        )
    return items


def _in_groups(task: Task, items: list[Item]) -> list[Item]:
    """Return the items with the rows marked that belong together."""
    if task.name == "mme":
        return [replace(item, group=image_stem(item.image) or item.group or item.id) for item in items]
    if task.name in ("mcq", "mmbench") and any(item.id.isdigit() and int(item.id) >= _ROTATION for item in items):
        if all(item.id.isdigit() for item in items):
            return [replace(item, group=item.group or str(int(item.id) % _ROTATION)) for item in items]
    return [replace(item, group=item.group if task.name in _CHOICE_TASKS and item.group else "") for item in items]


def bare_question(text: str) -> str:
    """Return a question without the instructions that a prompt adds to it, in lower case, with single spaces."""
    text = _OCR_TOKENS.sub("", text.replace("<image>", ""))
    text = text.replace("in the imange?", "in the image?")  # so misspelt in one edition of POPE, and only there
    for instruction in _INSTRUCTIONS:
        text = text.replace(instruction, "")
    before, _, after = BOX.partition("{question}")
    return " ".join(text.removeprefix(before).removesuffix(after).lower().split())


def image_stem(image: Any) -> str:
    """Return the name of an image without folder and ending; nothing for content."""
    if isinstance(image, Mapping):
        image = image.get("path")
    return PurePath(image).stem if isinstance(image, str) and len(image) < 1024 else ""
