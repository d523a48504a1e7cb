"""Files of questions: what each row asks, what the right answers are, and which have been answered already."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from vir_hf.data.reading import BY_COLUMNS, Reading
from vir_hf.errors import DataError
from vir_hf.files import cut_to
from vir_hf.images.folder import ImageFolder
from vir_hf.images.opening import ImageSource, open_image, read_image_header
from vir_hf.inference import Question
from vir_hf.rows.encoding import last_question
from vir_hf.rows.files import lines_of, read_rows
from vir_hf.rows.keys import is_given
from vir_hf.rows.messages import to_messages
from vir_hf.rows.shapes import in_llava_form, shape_of, with_columns
from vir_hf.rows.vqa import ANSWERS, CHOICES, answers_in, right_answers
from vir_hf.scores.matching import is_empty

# The beginning of a line that `vir-hf answer` was writing when it was killed.
_CUT_ANSWER = re.compile(
    rb'\{"id": "(?:[^"\\]|\\.)*(?:\\|"(?:,|, |, "a?n?s?w?e?r?|, "answer"(?::|: |: ".*)?)?)?', re.DOTALL
)


def read_questions(path: Path, reading: Reading = BY_COLUMNS) -> list[dict[str, Any]]:
    """Return the rows of a data file, each with an `id` (its number from 0 if it has none) that no other has.

    A row is of any shape of `vir_hf.rows.shapes`; one that `reading` forces into a shape comes as a LLaVA row.

    Raises:
        DataError: no such file, malformed JSON (with its line), a row that is no object, an id that comes twice.
    """
    if not path.is_file():
        raise DataError(f"{path}: cannot be read (no such file); expected a .jsonl or .json file of questions.")
    rows = [_as_read(row, reading, f"{path} row {number}") for number, row in read_rows(os.fspath(path))]
    seen: dict[str, int] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path} row {number}: found {type(row).__name__}, expected an object with a question.")
        given = next((row[key] for key in ("id", "question_id", "__key__") if row.get(key) not in (None, "")), number)
        row["id"] = str(given)
        if row["id"] in seen:
            raise DataError(
                f"{path}: id {row['id']!r} is that of row {seen[row['id']]} and of row {number}; answers are kept by id, so "
                "give each row its own."
            )
        seen[row["id"]] = number
    return rows


def _as_read(raw: Any, reading: Reading, place: str) -> Any:
    row = with_columns(raw, reading.columns)
    if reading.format is None or not isinstance(row, Mapping):
        return row
    try:
        asked = in_llava_form(row, reading.format)[1]
    except DataError as error:
        raise DataError(f"{place}: {error}.") from error
    return {**asked, **{key: row[key] for key in _REFERENCES if key in row}}


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
    if not shape_of(row):
        text = row.get("text")
        if not isinstance(text, str):
            raise DataError("the row has neither 'question' nor 'conversations'.")
        row = {**row, "question": text}
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
    if any(is_given(row.get(key)) for key in CHOICES):
        return right_answers(row)
    for key in _REFERENCES:
        found = dict.fromkeys(answers_in(row.get(key), key))
        references = [text for text in found if not is_empty(text)]
        if references:
            return references
    if shape_of(row) not in ("", "vqa"):
        last = to_messages(row)["messages"][-1]
        text = "".join(part["text"] for part in last["content"] if part["type"] == "text").strip()
        if last["role"] == "assistant" and text:
            return [text]
    raise DataError("the row has no right answer: neither 'answer', 'answers' nor an answer in 'conversations'.")


# In this order: where several are right, all of them count.
_REFERENCES = ("answers", *(key for key in ANSWERS if key != "answers"))
