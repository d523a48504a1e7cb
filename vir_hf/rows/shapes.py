"""The shapes in which data sets are published, each read as a LLaVA row. docs/data-formats.md shows one row of each.

A shape is a function and a line of `SHAPES`. Rows are recognised one by one, by their columns alone, and what a shape does not
read stays in the row under its own name, so that it is reported like any key that nothing reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vir_hf.errors import DataError, shown
from vir_hf.rows.keys import PLACEHOLDER, is_given, row_key_meaning
from vir_hf.rows.vqa import QUESTIONS, read_vqa

Row = Mapping[str, Any]


class Shape(NamedTuple):
    """How one kind of data set is recognised and read.

    Attributes:
        title: what the log calls it, with its columns.
        columns: it is recognised by one column of each group; of a group nothing reads, more than one may be there.
        read: makes a LLaVA row of a row: `conversations` or `messages`, its images, and all that was not read.
    """

    title: str
    columns: tuple[tuple[str, ...], ...]
    read: Callable[[dict[str, Any]], dict[str, Any]]


def in_llava_form(row: Any, format: str | None = None) -> tuple[str, Any]:
    """Return the name of a row's shape, or "" if it is none of `SHAPES`, and the row as LLaVA would write it.

    A LLaVA row comes back as it is, and so does what is no object.

    Args:
        format: read the row in this shape whatever its columns are.

    Raises:
        DataError: a column of the shape cannot be read, or the columns are those of two shapes.
    """
    if not isinstance(row, Mapping):
        return "", row
    name = shape_of(row) if format is None else format
    if not name:
        return "", row
    try:
        return name, SHAPES[name].read(dict(row) if name not in _AS_THEY_ARE else row)  # type: ignore[arg-type]
    except KeyError as error:
        raise DataError(
            f"data.format is {name}, and the row has no {_listed(error.args[0])}, only {shown(sorted(map(str, row)))}. Leave "
            "data.format out, or say with data.columns which column it is"
        ) from None


def shape_of(row: Row) -> str:
    """Return the name of the shape that a row's columns are those of, or "".

    Raises:
        DataError: they are those of several, and none of these is a conversation.
    """
    for name in _AS_THEY_ARE:  # a conversation, which may bring any other column with it
        if row.get(SHAPES[name].columns[0][0]) is not None:
            return name
    if is_given(row.get("__key__")):  # a shard's files, one of which may be called like a column
        return "webdataset"
    fitting = [name for name, shape in SHAPES.items() if name not in _AS_THEY_ARE and _fits(row, shape)]
    if len(fitting) > 1:
        first, second = (next(c for c in SHAPES[name].columns[-1] if is_given(row.get(c))) for name in fitting[:2])
        raise DataError(
            f"the row has {first!r} and {second!r}, and could be {' or '.join(fitting)}; say which with data.format="
            f"{fitting[0]}"
        )
    return fitting[0] if fitting else ""


def _fits(row: Row, shape: Shape) -> bool:
    return all(any(is_given(row.get(column)) for column in group) for group in shape.columns)


def with_columns(row: Any, columns: Mapping[str, str]) -> Any:
    """Return the row with columns under the names that this project reads: `columns` says for each where it is found.

    Args:
        columns: our name -> theirs, with dots for what lies inside of objects: `{"question": "query.en"}`.
    """
    if not columns or not isinstance(row, Mapping):
        return row
    found: dict[str, Any] = {}
    for name, path in columns.items():
        value: Any = row
        for step in [path] if path in row else path.split("."):
            value = value.get(step) if isinstance(value, Mapping) else None
        found[name] = value
    used = set(columns.values())
    kept = {key: value for key, value in row.items() if key not in used and key not in found}
    return {**kept, **{name: value for name, value in found.items() if value is not None}}


def why_no_shape(row: Row) -> str:
    """Return words that end the message about a row of no known shape, or none."""
    if isinstance(row.get("text"), str):
        return ". Is 'text' a caption? Then set data.format=caption; a question: data.columns={question: text}"
    if is_given(row.get("chosen")):
        return ". Preferences are not learned here; to learn the chosen answers set data.columns={completion: chosen}"
    return ". Say with data.columns which column is what, such as {question: COLUMN, answer: COLUMN}" if row else ""


def _listed(columns: Sequence[str]) -> str:
    return " or ".join(map(repr, columns))


def _one_of(row: dict[str, Any], columns: Sequence[str]) -> Any:
    """Take the value of the column that is given out of the row; further ones must say the same."""
    given = [column for column in columns if is_given(row.get(column))]
    if not given:
        raise KeyError(tuple(columns))
    values = [row.pop(column) for column in given]
    if any(value != values[0] for value in values[1:]):
        raise DataError(
            f"the row has {' and '.join(map(repr, given))}, and they differ; say with data.columns which one is read"
        )
    return values[0]


def _read_llava(row: dict[str, Any]) -> dict[str, Any]:
    return _with_turns(row, "conversations")


def _read_messages(row: dict[str, Any]) -> dict[str, Any]:
    return _with_turns(row, "messages")


def _with_turns(row: dict[str, Any], column: str) -> dict[str, Any]:
    """Return the row itself, unless its turns are text (a table holds no lists) or pairs of a question and an answer."""
    turns = row.get(column)
    if isinstance(turns, str) or _are_pairs(turns):
        return {**row, column: _turns(turns, column)}
    return row


def _read_conversation(row: dict[str, Any]) -> dict[str, Any]:
    turns = _one_of(row, ("conversation", "dialogue", "dialog"))
    return _with_placeholders({**row, "conversations": _turns(turns, "conversation")})


def _read_texts(row: dict[str, Any]) -> dict[str, Any]:
    return _with_placeholders({**row, "conversations": _turns(_one_of(row, ("texts", "qa_pairs")), "texts")})


def _read_prompt_and_completion(row: dict[str, Any]) -> dict[str, Any]:
    """The prompt is read and the completion learned, so the answers of a prompt of several turns are not."""
    prompt, completion = _one_of(row, ("prompt",)), _one_of(row, ("completion",))
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _turns(prompt, "prompt")
    if isinstance(completion, str):
        answered: list[Any] = [{"role": "assistant", "content": completion}]
    else:
        answered = _turns(completion, "completion")
    read = [
        {**turn, "supervised": False} if isinstance(turn, Mapping) and turn.get("role") == "assistant" else turn
        for turn in asked
    ]
    return _with_placeholders({**row, "conversations": [*read, *answered]})


def _read_vqa(row: dict[str, Any]) -> dict[str, Any]:
    question, answer, rest = read_vqa(row)
    turns = [{"from": "human", "value": question}, *([{"from": "gpt", "value": answer}] if answer is not None else [])]
    return _with_placeholders({**rest, "conversations": turns})


_CAPTIONS = ("caption", "captions")


def _read_caption(row: dict[str, Any]) -> dict[str, Any]:
    """A caption answers no question: stage 1 with the template `plain` reads the image alone. Of several, one comes first."""
    caption = _one_of(row, _CAPTIONS if any(is_given(row.get(column)) for column in _CAPTIONS) else ("text", "txt"))
    if isinstance(caption, (list, tuple)):
        if len(caption) != 1:
            raise DataError(
                f"the row has {len(caption)} captions; a row has one: write a row for each of them, or leave the others out"
            )
        caption = caption[0]
    turns = [{"from": "human", "value": ""}, {"from": "gpt", "value": caption}]
    return _with_placeholders({**row, "conversations": turns})


_WEB_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


def _read_webdataset(row: dict[str, Any]) -> dict[str, Any]:
    """The files of one key: images under their suffixes, a row or a part of it in `json`, a caption in `txt`."""
    row.pop("__url__", None)
    key = _one_of(row, ("__key__",))
    images = [row.pop(name) for name in sorted(row) if name.lower().rpartition(".")[2] in _WEB_IMAGES]
    inner = row.pop("json", None) or {}
    if isinstance(inner, (str, bytes)):
        inner = json.loads(inner)
    if not isinstance(inner, Mapping):
        raise DataError(f"the file {key}.json holds {shown(inner)}; expected an object")
    read = {"id": key, **row, **inner}
    if images:  # the name that an image had when the shard was written goes: the shard holds the image itself
        read = {name: value for name, value in read.items() if row_key_meaning(name) not in ("image", "other_image")}
        read["images"] = images
    name = shape_of(read) or ("caption" if is_given(read.get("txt")) else "")
    if not name:
        raise DataError(f"the files of {key} hold no conversation, question or caption, only {shown(sorted(read))}")
    return SHAPES[name].read(read)


# The pairs in which sets write a question and its answer.
_PAIRS = (
    ("user", "assistant"),
    ("human", "gpt"),
    ("human", "assistant"),
    ("question", "answer"),
    ("prompt", "response"),
)


def _are_pairs(turns: Any) -> bool:
    first = turns[0] if isinstance(turns, (list, tuple)) and turns else None
    return isinstance(first, Mapping) and _pair_of(first) is not None


def _pair_of(turn: Mapping[str, Any]) -> tuple[str, str] | None:
    if "from" in turn or "role" in turn:
        return None
    return next((pair for pair in _PAIRS if pair[0] in turn and pair[1] in turn), None)


def _turns(turns: Any, column: str) -> list[Any]:
    """Return turns of `from` and `value` (or `role` and `content`) of a list of these or of pairs, or of its JSON text."""
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except ValueError as error:
            raise DataError(f"{column!r} must be a list of turns, or its JSON text, found {shown(turns)}") from error
    if not isinstance(turns, (list, tuple)):
        raise DataError(f"{column!r} must be a list of turns, found {shown(turns)}")
    found: list[Any] = []
    for number, turn in enumerate(turns, 1):
        pair = _pair_of(turn) if isinstance(turn, Mapping) else None
        if pair is None:
            found.append(turn)
            continue
        if is_given(turn.get("system")):
            found.append({"from": "system", "value": turn["system"]})
        question, answer = turn[pair[0]], turn[pair[1]]
        for name, text in zip(pair, (question, answer), strict=True):
            if not isinstance(text, str):
                raise DataError(f"{column!r} has in entry {number} the {name} {shown(text)}; expected a text")
        found += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return found


_NUMBERED = re.compile(r"<image[ _]?(\d)>")
_NUMBERED_KEY = re.compile(r"image_?(\d)", re.IGNORECASE)


def _with_placeholders(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with its images before the first question, where the shape says no other place for them.

    Images in numbered columns (`image_1`, `image_2` ...) become a list, and `<image 1>` in a text the place of the first.
    """
    row = _with_numbered_images(row)
    turns = list(row["conversations"])
    humans = [n for n, turn in enumerate(turns) if isinstance(turn, Mapping) and _speaker(turn) in ("human", "user")]
    values = [turns[n].get("value", turns[n].get("content")) for n in humans]
    if not humans or any(not isinstance(value, str) or PLACEHOLDER in value for value in values):
        return row
    num_images = _num_images(row)
    if num_images:
        name = "value" if "value" in turns[humans[0]] else "content"
        turns[humans[0]] = {**turns[humans[0]], name: f"{PLACEHOLDER}\n" * num_images + values[0]}
    return {**row, "conversations": turns}


def _with_numbered_images(row: dict[str, Any]) -> dict[str, Any]:
    numbered = sorted((match[1], key) for key in row if (match := _NUMBERED_KEY.fullmatch(key)))
    if not numbered or any(is_given(row[key]) for key in row if row_key_meaning(key) == "image"):
        return row
    given = {number: row[key] for number, key in numbered if is_given(row[key])}
    row = {key: value for key, value in row.items() if not _NUMBERED_KEY.fullmatch(key)}
    order: list[str] = []

    def place(match: re.Match[str]) -> str:
        if match[1] not in given:
            return match[0]
        order.append(match[1])
        return PLACEHOLDER

    turns = [
        {**turn, "value": _NUMBERED.sub(place, turn["value"])}
        if _speaker(turn) == "human" and isinstance(turn.get("value"), str)
        else turn
        for turn in row["conversations"]
    ]
    unnamed = [number for number in given if number not in order]
    if order and unnamed:  # images that no text names come first
        turns[0] = {**turns[0], "value": f"{PLACEHOLDER}\n" * len(unnamed) + turns[0]["value"]}
    return {**row, "images": [given[number] for number in [*unnamed, *order]], "conversations": turns}


def _speaker(turn: Mapping[str, Any]) -> Any:
    return turn.get("from") if turn.get("from") is not None else turn.get("role")


def _num_images(row: Row) -> int:
    """Return how many images a row has under the keys that are read as images."""
    keys = [key for key in row if isinstance(key, str) and is_given(row[key]) and row[key] != ""]
    for meaning in ("image", "other_image"):
        for key in keys:
            if row_key_meaning(key) == meaning:
                value = row[key]
                return len(value) if isinstance(value, (list, tuple)) else 1
    return 0


SHAPES: dict[str, Shape] = {
    "llava": Shape("LLaVA (conversations)", (("conversations",),), _read_llava),
    "messages": Shape("a chat (messages)", (("messages",),), _read_messages),
    "conversation": Shape(
        "a conversation (conversation)", (("conversation", "dialogue", "dialog"),), _read_conversation
    ),
    "finevision": Shape("FineVision, the_cauldron or Docmatix (texts)", (("texts", "qa_pairs"),), _read_texts),
    "prompt_completion": Shape(
        "prompt and completion (prompt, completion)", (("prompt",), ("completion",)), _read_prompt_and_completion
    ),
    "webdataset": Shape("WebDataset (__key__ and files)", (("__key__",),), _read_webdataset),
    "vqa": Shape("questions and answers (question, answer, choices)", (QUESTIONS,), _read_vqa),
    "caption": Shape("captions (caption)", (_CAPTIONS,), _read_caption),
}
_AS_THEY_ARE = ("llava", "messages")
