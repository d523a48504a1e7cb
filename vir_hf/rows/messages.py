"""What a row says: LLaVA's turns and the ecosystem's messages become one list of messages made of text and image parts."""

# Over 400 lines: what a row says is decided by steps that hand each other one turn.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

from vir_hf.errors import DataError, clipped, shown
from vir_hf.rows.keys import PLACEHOLDER as PLACEHOLDER
from vir_hf.rows.keys import (
    is_given,
    is_other_picture,
    picture_of,
    picture_of_part,
    row_key_meaning,
    turn_key_meaning,
    unread_keys,
)
from vir_hf.rows.shapes import in_llava_form, why_no_shape

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_MEDIA_WORDS = ("<video>", "<audio>")

_IMAGE_PARTS = ("image", "image_url", "input_image")
_NORMAL_KEYS = {"id", "messages", "images"}
_NOTHING_LEARNED = ("no turn is an answer with text in it", "every answer is marked as not to be learned")

# What row_problems can report. The first four stop to_messages, nothing_supervised stops encode_row; the others are
# rows with a documented meaning that their owner may not have intended.
PROBLEM_KINDS = {
    "bad_row": "Correct the row or leave it out.",
    "bad_role": f"Name the speaker with one of {sorted(ROLES)}.",
    "not_an_image": "The model takes images and text: leave the row out, or give its frames as images.",
    "placeholder_mismatch": f"Write one {PLACEHOLDER} for each image, in the human's turns.",
    "nothing_supervised": "Give the row at least one answer that is not empty, or leave it out.",
    "no_placeholder": f"Write {PLACEHOLDER} where the image belongs; without it, images come before the first question.",
    "placeholder_in_answer": f"{PLACEHOLDER} in an answer is learned as these letters; remove it.",
    "empty_answer": "Write an answer; an empty one is kept in the conversation but not learned.",
    "bad_order": "Nothing need be done if the order is meant.",
    "not_read": "Nothing reads this key; put what the model shall see or learn into the turns, or remove it.",
    "media_word": "The word is read as text; remove it if it stood for a video or a sound.",
}
FATAL_KINDS = ("bad_row", "bad_role", "not_an_image", "placeholder_mismatch")


def to_messages(row: Any, *, where: str = "") -> dict[str, Any]:
    """Return the row as `{"id", "messages", "images"}`.

    Each message is `{"role": "user" | "assistant" | "system", "content": [...]}` with parts `{"type": "text", "text": str}`
    and `{"type": "image"}`, and `"supervised": False` in an answer that is not to be learned; `images` lists the references,
    one for each image part, in reading order. Takes rows of every shape of `vir_hf.rows.shapes`; what it returns, it takes
    unchanged.

    Args:
        row: one row of the file.
        where: put before an error, for example `"train.json row 17"`.

    Raises:
        DataError: the row is no LLaVA row, a role is unknown, or placeholders and images differ in number.
    """
    problems, normal = examine(row)
    if normal is None:
        kind, detail = next(problem for problem in problems if problem[0] in FATAL_KINDS)
        raise DataError(f"{place_of(row, where)}{detail}. {PROBLEM_KINDS[kind]}")
    return normal


def row_problems(row: Any) -> Iterator[tuple[str, str]]:
    """Yield `(kind, detail)` for everything unusual in a row, the kinds of `PROBLEM_KINDS`; nothing for a plain row."""
    yield from examine(row)[0]


def examine(row: Any) -> tuple[list[tuple[str, str]], dict[str, Any] | None]:
    """Return `row_problems(row)` and `to_messages(row)`, the latter None where a problem is of `FATAL_KINDS`."""
    try:
        row = in_llava_form(row)[1]
        turns, images = _read(row)
    except _Refused as error:
        return [(error.kind, str(error))], None
    except DataError as error:
        return [("bad_row", str(error))], None
    unknown = [
        ("bad_role", f"turn {n} is from {shown(turn.role)}")
        for n, turn in enumerate(turns, 1)
        if turn.role not in ROLES
    ]
    if unknown:
        return unknown, None
    reads_words = _reads_words(turns, images)
    spoken = [(turn, _parts(turn.value, turn.role, reads_words)) for turn in turns]
    problems = list(_oddities(row, spoken, images))
    if any(kind in FATAL_KINDS for kind, _ in problems):
        return problems, None
    try:
        messages = _join_turns(spoken)
    except DataError as error:
        return [*problems, ("bad_row", str(error))], None
    if images and not any(part["type"] == "image" for message in messages for part in message["content"]):
        _put_images_first(messages, len(images))
    for message in messages:
        message["content"] = _tidy(message["content"])
        if message["role"] == "assistant" and not _text(message["content"]).strip():
            message["content"] = [{"type": "text", "text": ""}]
    return problems, {
        "id": str(row["id"]) if row.get("id") is not None else "",
        "messages": messages,
        "images": images,
    }


def is_learned(message: Mapping[str, Any]) -> bool:
    """Whether a message of `to_messages` is an answer that is learned."""
    return message["role"] == "assistant" and message.get("supervised") is not False and bool(_text(message["content"]))


def why_nothing_is_learned(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the reason, and the remedy, for messages of which none `is_learned`."""
    has_answer = any(message["role"] == "assistant" and _text(message["content"]) for message in messages)
    return f"{_NOTHING_LEARNED[has_answer]}. {PROBLEM_KINDS['nothing_supervised']}"


def _oddities(
    row: Mapping[str, Any], spoken: Sequence[tuple[_Turn, list[dict[str, str]]]], images: list[Any]
) -> Iterator[tuple[str, str]]:
    num_placeholders = sum(part["type"] == "image" for _, content in spoken for part in content)
    if num_placeholders != len(images):
        kind = "placeholder_mismatch" if num_placeholders else "no_placeholder"
        yield kind, f"{num_placeholders} {PLACEHOLDER} in the human's turns and {len(images)} images"
    has_answer = is_supervised = False
    for number, (turn, content) in enumerate(spoken, 1):
        text = _text(content)
        if ROLES[turn.role] != "assistant":
            yield from _media_words(text, number)
            continue
        if PLACEHOLDER in text:
            yield "placeholder_in_answer", f"turn {number}, an answer, contains {PLACEHOLDER}"
        if not text.strip():
            yield "empty_answer", f"turn {number}, an answer, is empty"
        else:
            has_answer, is_supervised = True, is_supervised or turn.supervised
    if not is_supervised:
        yield "nothing_supervised", _NOTHING_LEARNED[has_answer]
    yield from (("bad_order", detail) for detail in _order_oddities([ROLES[turn.role] for turn, _ in spoken]))
    lost = dict.fromkeys(name for name, matters in unread_keys(row) if matters)
    yield from (("not_read", f"{clipped(name, 60)} is not read") for name in lost)


def _media_words(text: str, number: int) -> Iterator[tuple[str, str]]:
    """Yield what a human's turn says of videos and sounds: a word on a line of its own, or at either end, stands for one."""
    for word in _MEDIA_WORDS:
        if word not in text:
            continue
        bare = text.replace(PLACEHOLDER, "").strip()
        stands_for_one = bare.startswith(word) or bare.endswith(word) or word in map(str.strip, bare.splitlines())
        yield "not_an_image" if stands_for_one else "media_word", f"turn {number} contains {word}"


def _order_oddities(roles: list[str]) -> Iterator[str]:
    spoken = [role for role in roles if role != "system"]
    opening = next((i for i, role in enumerate(roles) if role != "system"), len(roles))
    if spoken[:1] == ["assistant"]:
        yield "the conversation begins with an answer"
    if spoken[-1:] == ["user"]:
        yield "the conversation ends with a question that nobody answers"
    if "system" in roles[opening:]:
        yield "a system turn comes after the conversation began; it is read as part of the human's turn"
    for number in range(1, len(roles)):
        if roles[number] == roles[number - 1] != "system":
            yield f"turns {number} and {number + 1} are of the same speaker; they are joined by a newline"


def place_of(row: Any, where: str) -> str:
    """Return where a row stands, for a message: its id, or what the caller calls it."""
    name = f"id {shown(row['id'])}" if isinstance(row, Mapping) and row.get("id") not in (None, "") else ""
    place = ", ".join(filter(None, (where, name)))
    return f"{place}: " if place else ""


class _Refused(DataError):
    """A row that cannot be read, with the kind of problem it is counted as."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _Turn(NamedTuple):
    role: str  # as written
    value: Any  # a string or a list of parts
    supervised: bool = True


def _read(row: Any) -> tuple[list[_Turn], list[Any]]:
    """Return the turns and the images of a row, after every key was given its meaning."""
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be an object with 'conversations', found {shown(row)}")
    turns = _turns(row)
    images: list[Any] = []
    if row.keys() <= _NORMAL_KEYS:
        images = _images(row, ("images",))
    else:
        keys: dict[str, list[str]] = {}
        for key in row:
            if isinstance(key, str) and is_given(row[key]):
                keys.setdefault(row_key_meaning(key), []).append(key)
        if media := [key for key in keys.get("media", []) if not isinstance(row[key], str) or row[key]]:
            raise _Refused("not_an_image", f"the row has {shown(media[0])}: {shown(row[media[0]])}")
        turns = _with_system(turns, row, keys.get("system", []))
        images = _images(row, keys.get("image") or keys.get("other_image", []))
    return turns, _with_pictures_of_parts(turns, images)


def _turns(row: Mapping[str, Any]) -> list[_Turn]:
    given = [row[key] for key in ("messages", "conversations") if row.get(key) is not None]
    if not given:
        found = shown(sorted(map(str, row)))
        raise DataError(f"the row has neither 'conversations' nor 'messages', only {found}{why_no_shape(row)}")
    read = [_turns_of(turns) for turns in given if turns or len(given) == 1 or not any(given)]
    if len(read) == 2 and _said(read[0]) != _said(read[1]):
        raise DataError("the row has both 'messages' and 'conversations', and they differ")
    return read[0]


def _turns_of(turns: Any) -> list[_Turn]:
    if not isinstance(turns, (list, tuple)) or not turns:
        raise DataError(f"the conversation must be a list of turns with at least one turn, found {shown(turns)}")
    found = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise DataError(f"turn {number} must be an object with 'from' and 'value', found {shown(turn)}")
        role, value = _either(turn, "from", "role", number), _either(turn, "value", "content", number)
        if not isinstance(role, str):
            raise DataError(f"turn {number} must say who speaks in 'from', found {shown(role)}")
        if not isinstance(value, str):
            _check_parts(value, number, role)
        found.append(_Turn(role, value, _supervision(turn, number, role) if len(turn) > 2 else True))
    return found


def _either(turn: Mapping[str, Any], one: str, other: str, number: int) -> Any:
    """Return what a turn has under one of two keys of the same meaning."""
    first, second = turn.get(one), turn.get(other)
    if first is None or second is None:
        return second if first is None else first
    are_roles = one == "from" and isinstance(first, str) and isinstance(second, str)
    if first != second and not (are_roles and ROLES.get(first, first) == ROLES.get(second, second)):
        raise DataError(f"turn {number} has both {one!r} and {other!r}, and they differ")
    return first


def _supervision(turn: Mapping[str, Any], number: int, role: str) -> bool:
    """Return whether a turn may be learned, by its keys `loss`, `weight`, `train` and `supervised`."""
    said: dict[bool, str] = {}
    for key, value in turn.items():
        meaning = turn_key_meaning(key) if isinstance(key, str) else "unknown"
        if meaning in ("image", "media") and is_given(value):
            remedy = "an image stands in the row's 'image', with <image> in the turn's text"
            raise _Refused(
                "bad_row" if meaning == "image" else "not_an_image", f"turn {number} has {shown(key)}; {remedy}"
            )
        if meaning != "supervision" or value is None or ROLES.get(role) != "assistant":
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise DataError(
                f"turn {number} has {shown(key)}: {shown(value)}; an answer is learned (1, true) or not (0, false)"
            )
        said[bool(value)] = key
    if len(said) == 2:
        raise DataError(f"turn {number} is to be learned by {shown(said[True])} and not by {shown(said[False])}")
    return False not in said


def _said(turns: Sequence[_Turn]) -> list[tuple[Any, ...]]:
    """Return what turns say, in one form for all ways of writing it."""
    return [
        (ROLES.get(turn.role, turn.role), turn.supervised, _tidy(_parts(turn.value, turn.role, True))) for turn in turns
    ]


def _with_system(turns: list[_Turn], row: Mapping[str, Any], keys: Sequence[str]) -> list[_Turn]:
    """Return the turns after the system prompt that the row has under a key of its own."""
    prompts = []
    for key in keys:
        if not isinstance(row[key], str):
            raise DataError(f"{key!r} must be the text of a system prompt, found {shown(row[key])}")
        prompts.append(_Turn("system", row[key]))
    if turns[0].role == "system":
        prompts.append(turns[0])
    if not prompts:
        return turns
    if any(_said([prompt]) != _said(prompts[:1]) for prompt in prompts[1:]):
        raise DataError(f"the row says its system prompt more than once ({shown(list(keys))}), and differently")
    return [prompts[0], *turns[turns[0].role == "system" :]]


def _check_parts(value: Any, number: int, role: str) -> None:
    if not isinstance(value, (list, tuple)):
        raise DataError(f"turn {number} must have its text in 'value', found {shown(value)}")
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and not isinstance(part.get("text"), str):
            raise DataError(f"turn {number} has a text part whose text is {shown(part.get('text'))}")
        if isinstance(kind, str) and kind not in _IMAGE_PARTS and turn_key_meaning(kind) == "media":
            raise _Refused("not_an_image", f"turn {number} has a part of type {shown(kind)}")
        if kind != "text" and kind not in _IMAGE_PARTS:
            raise DataError(f"turn {number} has a part that is neither text nor image: {shown(part)}")
        if kind == "text" and len(part) > 2 and picture_of_part(part) is not None:
            raise DataError(f"turn {number} has a text part with an image in it: {shown(part)}")
        if kind != "text" and ROLES.get(role) == "assistant":
            raise DataError(f"turn {number} is an answer with an image in it; answers are text")


def _images(row: Mapping[str, Any], keys: Sequence[str]) -> list[Any]:
    """Return the images that a row lists under these keys, which must agree."""
    given = [row[key] for key in keys if row.get(key) is not None]
    lists = [
        [picture_of(image) for image in (value if isinstance(value, (list, tuple)) else [value])] for value in given
    ]
    lists = [images for images in lists if images]
    for images in lists[1:]:
        if len(images) != len(lists[0]) or any(map(is_other_picture, images, lists[0])):
            raise DataError(f"the row has both {' and '.join(map(repr, sorted(keys)))}, and they differ")
    listed = lists[0] if lists else []
    for image in listed:
        if image is None or image == "" or isinstance(image, (bool, int, float, list, tuple)):
            raise DataError(f"an image must be the name of a file, found {shown(image)}")
        if isinstance(image, dict) and not isinstance(image.get("bytes"), (bytes, bytearray, memoryview, type(None))):
            raise DataError(f"an image's bytes must be bytes, found {shown(image['bytes'])}")
    return listed


def _with_pictures_of_parts(turns: Sequence[_Turn], listed: list[Any]) -> list[Any]:
    """Return the row's images, those that image parts bring or number themselves among them.

    Raises:
        DataError: a part names another image than the row does in its place.
    """
    lists = [turn.value for turn in turns if not isinstance(turn.value, str) and ROLES.get(turn.role) != "assistant"]
    parts = [part for value in lists for part in value if part["type"] != "text"]
    if all(len(part) == 1 for part in parts):
        return listed
    own = [picture_of_part(part) for part in parts]
    numbers = [part.get("index") for part in parts]
    if listed and any(number is not None for number in numbers) and len(parts) == len(listed):
        if sorted(number if isinstance(number, int) else -1 for number in numbers) != list(range(len(listed))):
            raise DataError(
                f"the image parts have the indices {shown(numbers)}, not those of the row's {len(listed)} images"
            )
        listed = [listed[number] for number in numbers]
    if not any(picture is not None for picture in own):
        return listed
    if not listed:
        return _images({"images": [picture for picture in own if picture is not None]}, ("images",))
    if len(own) == len(listed):
        for picture, image in zip(own, listed, strict=True):
            if picture is not None and is_other_picture(picture, image):
                raise DataError(f"a part names the image {shown(picture)}, and the row {shown(image)} in its place")
    return listed


def _reads_words(turns: Sequence[_Turn], images: list[Any]) -> bool:
    """Return whether `<image>` in the text of content lists is a placeholder: no list has an image part, the row has images."""
    lists = [turn.value for turn in turns if not isinstance(turn.value, str)]
    return bool(images) and not any(part["type"] != "text" for value in lists for part in value)


def _parts(value: Any, role: str, reads_words: bool) -> list[dict[str, str]]:
    if not isinstance(value, str):
        parts = [{"type": "text", "text": p["text"]} if p["type"] == "text" else {"type": "image"} for p in value]
    else:
        parts = [{"type": "text", "text": value}]
    if ROLES.get(role) == "assistant" or not (reads_words or isinstance(value, str)):
        return parts
    split: list[dict[str, str]] = []
    for part in parts:
        if part["type"] == "image":
            split.append(part)
            continue
        first, *others = part["text"].split(PLACEHOLDER)
        split.append({"type": "text", "text": first})
        for text in others:
            split += [{"type": "image"}, {"type": "text", "text": text}]
    return split


def _join_turns(spoken: Sequence[tuple[_Turn, list[dict[str, str]]]]) -> list[dict[str, Any]]:
    """Return messages: a late system turn belongs to the human, turns of one speaker in a row are joined by a newline."""
    messages: list[dict[str, Any]] = []
    for number, (turn, parts) in enumerate(spoken, 1):
        role = ROLES[turn.role]
        if role == "system" and messages and messages[-1]["role"] != "system":
            role = "user"
        if not messages or messages[-1]["role"] != role:
            messages.append({"role": role, "content": list(parts)})
            if not turn.supervised:
                messages[-1]["supervised"] = False
            continue
        if messages[-1].get("supervised", True) != turn.supervised:
            raise DataError(
                f"turns {number - 1} and {number} are one answer, and only one of them is to be learned; mark both alike"
            )
        messages[-1]["content"] += [{"type": "text", "text": "\n"}, *parts]
    return messages


def _put_images_first(messages: list[dict[str, Any]], count: int) -> None:
    images = [{"type": "image"} for _ in range(count)]
    for message in messages:
        if message["role"] == "user":
            message["content"] = [*images, *message["content"]]
            return
    messages.insert(int(messages[0]["role"] == "system"), {"role": "user", "content": images})


def _text(content: list[dict[str, str]]) -> str:
    return "".join(part["text"] for part in content if part["type"] == "text")


def _tidy(content: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the parts in normal form: LLaVA's rule for one image, neighbouring texts joined, no empty text beside others.

    One image goes to the front and the text loses its outer white space. Of several images each stays where it is; those
    that lead the turn lose the white space between them, because the templates put each on a line of its own.
    """
    num_images = sum(part["type"] == "image" for part in content)
    if num_images == 0:
        return [{"type": "text", "text": _text(content)}]
    if num_images == 1:
        text = _text(content).strip()
        return [{"type": "image"}, {"type": "text", "text": text}] if text else [{"type": "image"}]
    tidy: list[dict[str, str]] = []
    leads = True
    runs = [(kind, list(run)) for kind, run in groupby(content, key=itemgetter("type"))]
    for index, (kind, run) in enumerate(runs):
        if kind == "image":
            tidy += run
            continue
        text = _text(run)
        text = text.rstrip() if index == len(runs) - 1 else text
        text = text.lstrip() if leads else text
        if text:
            tidy.append({"type": "text", "text": text})
            leads = False
    return tidy
