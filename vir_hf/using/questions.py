"""Files of questions: what each row asks, what the right answers are, and which have been answered already."""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from vir_hf.errors import DataError
from vir_hf.files import cut_to
from vir_hf.images.folder import ImageFolder
from vir_hf.images.opening import ImageSource, open_image, read_image_header
from vir_hf.inference import Question
from vir_hf.rows.encoding import last_question
from vir_hf.rows.files import lines_of, read_rows
from vir_hf.rows.messages import to_messages
from vir_hf.using.scoring import is_empty

# The beginning of a line that `vir-hf answer` was writing when it was killed.
_CUT_ANSWER = re.compile(
    rb'\{"id": "(?:[^"\\]|\\.)*(?:\\|"(?:,|, |, "a?n?s?w?e?r?|, "answer"(?::|: |: ".*)?)?)?', re.DOTALL
)


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a data file, each with an `id` (its number from 0 if it has none) that no other has.

    Raises:
        DataError: no such file, malformed JSON (with its line), a row that is no object, an id that comes twice.
    """
    if not path.is_file():
        raise DataError(f"{path}: cannot be read (no such file); expected a .jsonl or .json file of questions.")
    rows = [row for _, row in read_rows(os.fspath(path))]
    seen: dict[str, int] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path} row {number}: found {type(row).__name__}, expected an object with a question.")
        given = next((row[key] for key in ("id", "question_id") if row.get(key) not in (None, "")), number)
        row["id"] = str(given)
        if row["id"] in seen:
            raise DataError(
                f"{path}: id {row['id']!r} is that of row {seen[row['id']]} and of row {number}; answers are kept by id, so "
                "give each row its own."
            )
        seen[row["id"]] = number
    return rows


def look_at_picture(source: ImageSource, folder: str | ImageFolder) -> ImageSource:
    """Return the place or the content of an image that is whole by its header and end; nothing is decoded or kept.

    Raises:
        ImageError: as `open_image`.
    """
    if isinstance(source, dict) and source.get("bytes") is None and source.get("path"):
        source = str(source["path"])
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, (str, os.PathLike)):
        images = folder if isinstance(folder, ImageFolder) else ImageFolder(folder)
        place = images.locate(os.fspath(source))
        read_image_header(place)
        return place
    read_image_header(source)
    return source


def row_question(
    row: Mapping[str, Any],
    folder: str | ImageFolder,
    system: str | None = None,
    *,
    open_picture: Callable[[ImageSource, str | ImageFolder], ImageSource] = open_image,
) -> Question:
    """Return what a row asks: its `question` (or `text`), or the last human turn of a LLaVA row after the turns before it.

    The prompt is the one that training reads before the answer to that turn; `system` replaces the row's system prompt.

    Args:
        open_picture: makes the question's images of the row's; `look_at_picture` to find broken ones without decoding.

    Raises:
        DataError: no question in the row, or a picture outside the folder.
    """
    given = question_messages(row)
    messages = last_question(given["messages"])
    num_images = sum(part["type"] == "image" for message in messages for part in message["content"])
    images = [open_picture(image, folder) for image in given["images"][:num_images]]
    question = Question.of_messages(messages, images)
    return question if system is None else replace(question, system=system)


def question_messages(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return `to_messages` of a row, which may have a `question` (or `text`) in place of a conversation.

    Raises:
        DataError: as `to_messages`, or no question in the row.
    """
    if row.get("conversations") is None and row.get("messages") is None:
        text = row.get("question", row.get("text"))
        if not isinstance(text, str):
            raise DataError("the row has neither 'question' nor 'conversations'.")
        row = {**row, "conversations": [{"from": "human", "value": text}]}
    return to_messages(row)


def answered_ids(output: Path) -> set[str]:
    """Return the ids an output file holds; a last line that was cut off in writing is removed from it.

    Raises:
        DataError: the file holds something else than answers.
    """
    if not output.exists():
        return set()
    data = output.read_bytes()
    whole, cut = data[: data.rfind(b"\n") + 1], data[data.rfind(b"\n") + 1 :]
    ids = set()
    for number, line in enumerate(lines_of(whole), 1):
        try:
            row = json.loads(line)
            if set(row) != {"id", "answer"}:
                raise KeyError("answer")
            ids.add(str(row["id"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{output} line {number}: is no answer; name another --output, or move this file."
            ) from error
    if cut and not (_CUT_ANSWER.fullmatch(cut) or b'{"id": "'.startswith(cut)):
        raise DataError(f"{output}: its last line is no answer; name another --output, or move this file.")
    if cut:
        cut_to(output, len(whole))
    return ids


def row_references(row: Mapping[str, Any]) -> list[str]:
    """Return the right answers to what a row asks: `answers`, `answer`, or what a LLaVA row says after its last question.

    The first of these that holds an answer counts, so an empty or null `answers` leaves the word to `answer`. Answers may be
    texts, numbers, lists of them, VQA's `[{"answer": ...}, ...]`, the dictionary of lists that `datasets` makes of that,
    or SQuAD's `{"text": [...]}`.

    Raises:
        DataError: no answer in the row, or one in a form of which nothing says what the answer is.
    """
    for key in ("answers", "answer"):
        references = _answers_in(row.get(key), key)
        if references:
            return references
    if row.get("conversations") is not None or row.get("messages") is not None:
        last = to_messages(row)["messages"][-1]
        text = "".join(part["text"] for part in last["content"] if part["type"] == "text").strip()
        if last["role"] == "assistant" and text:
            return [text]
    raise DataError("the row has no right answer: neither 'answer', 'answers' nor an answer in 'conversations'.")


# Where VQA, TextVQA, OK-VQA, DocVQA, SQuAD and the exports of annotation tools put the text of one answer.
_ANSWER_KEYS = ("answer", "answers", "text", "value")


def _answers_in(value: Any, key: str) -> list[str]:
    """Return every text that an answer column holds, each once, without empty ones."""
    if value is None or (isinstance(value, float) and math.isnan(value)):  # an empty cell of a table
        return []
    if isinstance(value, str):
        return [] if is_empty(value) else [value]
    if isinstance(value, bool):
        return [str(value).lower()]
    if isinstance(value, (int, float)):
        return [str(value)]
    if isinstance(value, Mapping):
        named = next((name for name in _ANSWER_KEYS if name in value), None)
        if named is not None:
            return _answers_in(value[named], f"{key}.{named}")
    elif isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray)):
        found = [text for one in value for text in _answers_in(one, key)]
        return list(dict.fromkeys(found))
    raise DataError(
        f"{key!r}: found {reprlib.repr(value)}; expected a text, a number, a list of them, or VQA's [{{'answer': TEXT}}, ...]."
    )
