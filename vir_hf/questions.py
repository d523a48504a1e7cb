"""Files of questions: what each row asks, what the right answers are, and which have been answered already."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vir_hf.conversations import last_question, to_messages
from vir_hf.errors import DataError
from vir_hf.files import cut_to
from vir_hf.images import open_image
from vir_hf.inference import Question

# The beginning of a line that `vir-hf answer` was writing when it was killed.
_CUT_ANSWER = re.compile(
    rb'\{"id": "(?:[^"\\]|\\.)*(?:\\|"(?:,|, |, "a?n?s?w?e?r?|, "answer"(?::|: |: ".*)?)?)?', re.DOTALL
)


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `.jsonl` or `.json` file, each with an `id` (its number from 0 if it has none) that no other has.

    Raises:
        DataError: no such file, a line that is no object, an id that comes twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a .jsonl or .json file of questions.") from error
    is_list = text.lstrip().startswith("[")
    rows: list[Any] = json_value(text, path) if is_list else []
    if not is_list:
        lines = enumerate(text.splitlines(), 1)
        rows = [json_value(line, f"{path} line {number}") for number, line in lines if line.strip()]
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


def json_value(text: str, where: str | Path) -> Any:
    """Return what a JSON text says; what is wrong with it is said with `where` in front."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: is not JSON ({error}); expected one object a line, or a list of objects.") from error


def row_question(row: Mapping[str, Any], folder: str, system: str | None = None) -> Question:
    """Return what a row asks: its `question` (or `text`), or the last human turn of a LLaVA row after the turns before it.

    The prompt is the one that training reads before the answer to that turn; `system` replaces the row's system prompt.

    Raises:
        DataError: no question in the row, or a picture outside the folder.
    """
    given = question_messages(row)
    messages = last_question(given["messages"])
    num_images = sum(part["type"] == "image" for message in messages for part in message["content"])
    images = [open_image(image, folder) for image in given["images"][:num_images]]
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
    for number, line in enumerate(whole.decode("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            if set(row) != {"id", "answer"}:
                raise KeyError("answer")
            ids.add(str(row["id"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                f"{output} line {number}: is no answer; name another --output, or move this file."
            ) from error
    if cut and not (_CUT_ANSWER.fullmatch(cut) or b'{"id": "'.startswith(cut)):
        raise DataError(f"{output}: its last line is no answer; name another --output, or move this file.")
    if cut:
        cut_to(output, len(whole))
    return ids


def row_references(row: Mapping[str, Any]) -> list[str]:
    """Return the right answers to what a row asks: `answer`, `answers`, or what a LLaVA row says after its last question.

    Raises:
        DataError: no answer in the row.
    """
    given = row.get("answers", row.get("answer"))
    if given is None and (row.get("conversations") is not None or row.get("messages") is not None):
        last = to_messages(row)["messages"][-1]
        text = "".join(part["text"] for part in last["content"] if part["type"] == "text").strip()
        given = text if last["role"] == "assistant" and text else None
    references = [given] if isinstance(given, str | int | float) else list(given or [])
    if not references:
        raise DataError("the row has no right answer: neither 'answer', 'answers' nor an answer in 'conversations'.")
    return [str(reference) for reference in references]
