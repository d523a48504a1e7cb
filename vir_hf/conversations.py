"""One LLaVA row -> messages -> input ids and labels. Pure Python; docs/data-formats.md says what every odd row means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from vir_hf.chat_layout import ChatLayout, Piece
from vir_hf.errors import DataError
from vir_hf.templates import chat_template_for

PLACEHOLDER = "<image>"  # in the data; the tokenizer's own word for an image is processor.image_token
IGNORE = -100
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

# What row_problems can report. The first three stop to_messages, nothing_supervised stops encode_row; the others are
# rows with a documented meaning that their owner may not have intended.
PROBLEM_KINDS = {
    "bad_row": "Correct the row or leave it out.",
    "bad_role": f"Name the speaker with one of {sorted(ROLES)}.",
    "placeholder_mismatch": f"Write one {PLACEHOLDER} for each image, in the human's turns.",
    "nothing_supervised": "Give the row at least one answer that is not empty, or leave it out.",
    "no_placeholder": f"Write {PLACEHOLDER} where the image belongs; without it, images come before the first question.",
    "placeholder_in_answer": f"{PLACEHOLDER} in an answer is learned as these letters; remove it.",
    "empty_answer": "Write an answer; an empty one is kept in the conversation but not learned.",
    "bad_order": "Nothing need be done if the order is meant.",
}
FATAL_KINDS = ("bad_row", "bad_role", "placeholder_mismatch")


def to_messages(row: Any, *, where: str = "") -> dict[str, Any]:
    """Return the row as `{"id", "messages", "images"}`.

    Each message is `{"role": "user" | "assistant" | "system", "content": [...]}` with parts `{"type": "text", "text": str}`
    and `{"type": "image"}`; `images` lists the references as written, one for each image part, in reading order. Takes
    raw LLaVA rows (`conversations`) and rows that have `messages` already; what it returns, it takes unchanged.

    Args:
        row: one row of the file.
        where: put before an error, for example `"train.json row 17"`.

    Raises:
        DataError: the row is no LLaVA row, a role is unknown, or placeholders and images differ in number.
    """
    for kind, detail in row_problems(row):
        if kind in FATAL_KINDS:
            raise DataError(f"{_place(row, where)}{detail}. {PROBLEM_KINDS[kind]}")
    return sound_messages(row)


def sound_messages(row: Any) -> dict[str, Any]:
    """`to_messages` of a row in which `row_problems` has found nothing of `FATAL_KINDS`."""
    turns, images = _turns(row), _images(row)
    messages = _join_turns([(role, _parts(value, role, _reads_words(turns, images))) for role, value in turns])
    if images and not any(part["type"] == "image" for message in messages for part in message["content"]):
        _put_images_first(messages, len(images))
    for message in messages:
        message["content"] = _tidy(message["content"])
        if message["role"] == "assistant" and not _text(message["content"]).strip():
            message["content"] = [{"type": "text", "text": ""}]
    return {"id": str(row["id"]) if row.get("id") is not None else "", "messages": messages, "images": images}


def row_problems(row: Any) -> Iterator[tuple[str, str]]:
    """Yield `(kind, detail)` for everything unusual in a row, the kinds of `PROBLEM_KINDS`; nothing for a plain row."""
    try:
        turns, images = _turns(row), _images(row)
    except DataError as error:
        yield "bad_row", str(error)
        return
    unknown = [(number, role) for number, (role, _) in enumerate(turns, 1) if role not in ROLES]
    if unknown:
        yield from (("bad_role", f"turn {number} is from {role!r}") for number, role in unknown)
        return
    reads_words = _reads_words(turns, images)
    parts = [(ROLES[role], _parts(value, role, reads_words)) for role, value in turns]
    num_placeholders = sum(part["type"] == "image" for _, content in parts for part in content)
    if num_placeholders != len(images):
        kind = "placeholder_mismatch" if num_placeholders else "no_placeholder"
        yield kind, f"{num_placeholders} {PLACEHOLDER} in the human's turns and {len(images)} images"
    for number, (role, content) in enumerate(parts, 1):
        if role == "assistant" and PLACEHOLDER in _text(content):
            yield "placeholder_in_answer", f"turn {number}, an answer, contains {PLACEHOLDER}"
        if role == "assistant" and not _text(content).strip():
            yield "empty_answer", f"turn {number}, an answer, is empty"
    if not any(role == "assistant" and _text(content).strip() for role, content in parts):
        yield "nothing_supervised", "no turn is an answer with text in it"
    yield from (("bad_order", detail) for detail in _order_oddities([role for role, _ in parts]))


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


def _place(row: Any, where: str) -> str:
    name = f"id {row['id']!r}" if isinstance(row, Mapping) and row.get("id") not in (None, "") else ""
    place = ", ".join(filter(None, (where, name)))
    return f"{place}: " if place else ""


def _turns(row: Any) -> list[tuple[str, Any]]:
    """Return (speaker, value) of every turn; the value is a string or a list of parts."""
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be an object with 'conversations', found {_shown(row)}")
    turns = row.get("messages") if row.get("messages") is not None else row.get("conversations")
    if turns is None:
        raise DataError(f"the row has neither 'conversations' nor 'messages', only {sorted(map(str, row))}")
    if not isinstance(turns, (list, tuple)) or not turns:
        raise DataError(f"the conversation must be a list of turns with at least one turn, found {_shown(turns)}")
    found = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise DataError(f"turn {number} must be an object with 'from' and 'value', found {_shown(turn)}")
        role = turn.get("from") if turn.get("from") is not None else turn.get("role")
        value = turn.get("value") if turn.get("value") is not None else turn.get("content")
        if not isinstance(role, str):
            raise DataError(f"turn {number} must say who speaks in 'from', found {_shown(role)}")
        if not isinstance(value, str):
            _check_parts(value, number, role)
        found.append((role, value))
    return found


def _check_parts(value: Any, number: int, role: str) -> None:
    if not isinstance(value, (list, tuple)):
        raise DataError(f"turn {number} must have its text in 'value', found {_shown(value)}")
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and not isinstance(part.get("text"), str):
            raise DataError(f"turn {number} has a text part whose text is {_shown(part.get('text'))}")
        if kind not in ("text", "image"):
            raise DataError(f"turn {number} has a part that is neither text nor image: {_shown(part)}")
        if kind == "image" and ROLES.get(role) == "assistant":
            raise DataError(f"turn {number} is an answer with an image in it; answers are text")


def _images(row: Mapping[str, Any]) -> list[Any]:
    given = [row[key] for key in ("images", "image") if row.get(key) is not None]
    images = [list(value) if isinstance(value, (list, tuple)) else [value] for value in given]
    if len(images) == 2 and images[0] and images[1] and images[0] != images[1]:
        raise DataError("the row has both 'image' and 'images', and they differ")
    listed = next((value for value in images if value), [])
    for image in listed:
        if image is None or image == "" or isinstance(image, (bool, int, float, list, tuple)):
            raise DataError(f"an image must be the name of a file, found {_shown(image)}")
        if isinstance(image, dict) and not isinstance(image.get("bytes"), (bytes, bytearray, memoryview, type(None))):
            raise DataError(
                f"an image's bytes must be bytes, found {_shown(image['bytes'])}; JSON has none: embed pictures in Parquet"
            )
    return listed


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _reads_words(turns: list[tuple[str, Any]], images: list[Any]) -> bool:
    """Return whether `<image>` in the text of content lists is a placeholder: no list has an image part, the row has images."""
    lists = [value for _, value in turns if not isinstance(value, str)]
    return bool(images) and not any(part["type"] == "image" for value in lists for part in value)


def _parts(value: Any, role: str, reads_words: bool) -> list[dict[str, str]]:
    if not isinstance(value, str):
        parts = [{"type": "image"} if p["type"] == "image" else {"type": "text", "text": p["text"]} for p in value]
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


def _join_turns(turns: Sequence[tuple[str, list[dict[str, str]]]]) -> list[dict[str, Any]]:
    """Return messages: a late system turn belongs to the human, turns of one speaker in a row are joined by a newline."""
    messages: list[dict[str, Any]] = []
    for word, parts in turns:
        role = ROLES[word]
        if role == "system" and messages and messages[-1]["role"] != "system":
            role = "user"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += [{"type": "text", "text": "\n"}, *parts]
        else:
            messages.append({"role": role, "content": list(parts)})
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
    joined: list[dict[str, str]] = []
    for part in content:
        if part["type"] == "text" and joined and joined[-1]["type"] == "text":
            joined[-1] = {"type": "text", "text": joined[-1]["text"] + part["text"]}
        else:
            joined.append(part)
    tidy: list[dict[str, str]] = []
    for index, part in enumerate(joined):
        if part["type"] == "text":
            text = part["text"].rstrip() if index == len(joined) - 1 else part["text"]
            leads = all(earlier["type"] == "image" for earlier in tidy)
            part = {"type": "text", "text": text.lstrip() if leads else text}
        if part["type"] == "image" or part["text"]:
            tidy.append(part)
    return tidy


def encode_row(
    row: Any, processor: Any, expand_images: bool = True, *, max_length: int | None = None, where: str = ""
) -> dict[str, Any]:
    """Return `{"input_ids", "labels"}`: what the model reads and what it learns.

    Labels are -100 except at the answers' tokens and the token that ends each answer's turn. The ids before an answer are
    those of the prompt that asks for it, so training meets exactly what inference sends. Text in the data that looks like
    a special token stays text.

    Args:
        row: a raw LLaVA row, or what `to_messages` returns.
        processor: anything with `tokenizer`, `image_token`, `image_token_id`, `num_image_tokens`, `template` and
            `chat_template`.
        expand_images: write `num_image_tokens` ids for each image; otherwise one.
        max_length: drop turns from the end until at most so many ids are left; then `num_images` is in the result too:
            how many of the row's images, from the front, are still shown.
        where: put before an error, for example `"train.json row 17"`.

    Raises:
        DataError: no row of a conversation, nothing to learn in it, or its first answer does not begin before
            `max_length`.
    """
    row = to_messages(row, where=where)
    try:
        return encode_messages(row["messages"], processor, expand_images, max_length)
    except DataError as error:
        raise DataError(f"{_place(row, where)}{error}") from error


def encode_messages(
    messages: list[dict[str, Any]], processor: Any, expand_images: bool = True, max_length: int | None = None
) -> dict[str, Any]:
    """`encode_row` for the messages that `to_messages` returned, which are not looked through again."""
    encoded = _encode(messages, processor, expand_images)
    if not encoded.ends:
        raise DataError(f"nothing to learn: no answer has text in it. {PROBLEM_KINDS['nothing_supervised']}")
    if max_length is None:
        return {"input_ids": encoded.input_ids, "labels": encoded.labels}
    return _fit(messages, encoded, processor, expand_images, max_length)


def _fit(
    messages: list[dict[str, Any]], encoded: _Encoded, processor: Any, expand_images: bool, max_length: int
) -> dict[str, Any]:
    """Return the row cut to `max_length`: whole turns from the end, then the end of the first answer, never an image."""
    answered = list(encoded.ends)
    if len(encoded.input_ids) > max_length:
        fitting = [number for number in answered if encoded.ends[number] <= max_length]
        for number in dict.fromkeys([*reversed(fitting), answered[0]]):
            messages = messages[: number + 1]
            encoded = _encode(messages, processor, expand_images)
            if encoded.ends[number] <= max_length:
                break
    input_ids, labels = encoded.input_ids[:max_length], encoded.labels[:max_length]
    if all(label == IGNORE for label in labels):
        asked = next(i for i, label in enumerate(encoded.labels) if label != IGNORE)
        num_images = sum(part["type"] == "image" for message in messages for part in message["content"])
        raise DataError(
            f"the first question alone takes {asked} tokens ({num_images} images of {processor.num_image_tokens} tokens "
            f"among them) and leaves none of max_length={max_length} for its answer. "
            f"Set max_length above {asked}, shorten the question, or leave the row out."
        )
    num_images = sum(part["type"] == "image" for message in messages for part in message["content"])
    return {"input_ids": input_ids, "labels": labels, "num_images": num_images}


def encode_prompt(row: Any, processor: Any, expand_images: bool = True, *, where: str = "") -> list[int]:
    """Return the ids to send to `generate`: the conversation, then the template's invitation to answer.

    For the turns before an answer these are exactly the ids that stand before that answer in training. The images are
    `to_messages(row)["images"]`, in order. Raises `DataError` as `encode_row` does, but needs no answer.
    """
    row = to_messages(row, where=where)
    try:
        return _encode(row["messages"], processor, expand_images, prompt=True).input_ids
    except DataError as error:
        raise DataError(f"{_place(row, where)}{error}") from error


class RowLength(NamedTuple):
    """How long a row is, known without opening an image; images count as `num_image_tokens` each."""

    num_tokens: int
    num_prefix_tokens: int  # before the first supervised one
    num_supervised_tokens: int
    num_images: int


def row_length(row: Any, processor: Any, *, max_length: int | None = None, where: str = "") -> RowLength:
    """Return how many tokens `encode_row` would give. Raises `DataError` as it does."""
    encoded = encode_row(row, processor, max_length=max_length, where=where)
    spans = supervised_spans(encoded)
    num_images = encoded["input_ids"].count(processor.image_token_id) // processor.num_image_tokens
    return RowLength(
        num_tokens=len(encoded["input_ids"]),
        num_prefix_tokens=spans[0][0],
        num_supervised_tokens=sum(end - start for start, end in spans),
        num_images=num_images,
    )


def supervised_spans(encoded: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return `(start, end)` of every run of learned ids in what `encode_row` returned."""
    learned = [False, *(label != IGNORE for label in encoded["labels"]), False]
    edges = [index for index in range(len(learned) - 1) if learned[index] != learned[index + 1]]
    return list(zip(edges[0::2], edges[1::2], strict=True))


def stop_token_ids(processor: Any) -> list[int]:
    """Return the ids at which generation must stop: what closes an answer in training, and EOS."""
    tokenizer, closing = processor.tokenizer, _layout(processor).closing
    ids = [tokenizer.convert_tokens_to_ids(closing)] if closing else []
    return list(dict.fromkeys(i for i in [*ids, tokenizer.eos_token_id] if i is not None))


class _Encoded(NamedTuple):
    input_ids: list[int]
    labels: list[int]
    ends: dict[int, int]  # number of an answered message -> how many ids there are up to the end of its turn


class _Chunk(NamedTuple):
    """Text that is tokenised on its own, so that no token reaches across its ends."""

    text: str
    answer: int  # the number of the message that learns it, or -1
    is_closed: bool = False  # the answer ends inside, at the end-of-turn token; what follows is not learned
    shows_image: bool = False  # an image stands before it


def _encode(messages: list[dict[str, Any]], processor: Any, expand_images: bool, prompt: bool = False) -> _Encoded:
    tokenizer, separator = processor.tokenizer, processor.image_token_id
    layout = _layout(processor)
    chunks = _chunks(layout, layout.pieces(tokenizer, messages, prompt))
    # The image token stands between all chunks: at images, and as a cut where tokens must not grow together. A special
    # token keeps its neighbours apart, and no text begins anew after it, so one call tokenises the whole row.
    guards = [bool(layout.guard) and _needs_guard(layout, before, chunk) for before, chunk in pairwise(chunks)]
    text = chunks[0].text + "".join(
        layout.image_token + ("\n" if guard else "") + chunk.text
        for guard, chunk in zip(guards, chunks[1:], strict=True)
    )
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    if ids.count(separator) != len(chunks) - 1:
        raise DataError(
            f"the tokenizer does not read {layout.image_token!r} as the one id {separator}. "
            "Call vir_hf.templates.prepare_tokenizer on it."
        )
    image_ids = [separator] * (processor.num_image_tokens if expand_images else 1)
    input_ids: list[int] = [tokenizer.bos_token_id] if layout.prepends_bos else []
    labels = [IGNORE] * len(input_ids)
    ends: dict[int, int] = {}
    start = 0
    for chunk, guard in zip(chunks, [False, *guards], strict=True):
        if chunk.shows_image:
            input_ids += image_ids
            labels += [IGNORE] * len(image_ids)
        start += len(layout.guard) if guard else 0
        end = ids.index(separator, start) if chunk is not chunks[-1] else len(ids)
        input_ids += ids[start:end]
        if chunk.answer >= 0:
            closed = ids.index(layout.end_id, start, end) + 1 if chunk.is_closed else end
            labels += ids[start:closed]
            ends[chunk.answer] = len(labels)
        labels += [IGNORE] * (len(input_ids) - len(labels))
        start = end + 1
    labels[:1] = [IGNORE] * len(labels[:1])  # nothing predicts the first token
    return _Encoded(input_ids, labels, ends)


def _needs_guard(layout: ChatLayout, before: _Chunk, chunk: _Chunk) -> bool:
    """Return whether the tokenizer would put a space before this chunk that the whole text has not."""
    return not chunk.shows_image and bool(before.text) and not before.text.endswith(tuple(layout.specials))


_LAYOUTS: WeakKeyDictionary[Any, dict[tuple[Any, ...], ChatLayout]] = WeakKeyDictionary()


def _layout(processor: Any) -> ChatLayout:
    tokenizer, image_token = processor.tokenizer, processor.image_token
    chat_template = getattr(processor, "chat_template", None)
    key = (processor.template, chat_template, image_token, tokenizer.eos_token, tokenizer.bos_token, len(tokenizer))
    layouts = _LAYOUTS.setdefault(tokenizer, {})
    if key not in layouts:
        text = chat_template or chat_template_for(processor.template, tokenizer, image_token)
        layouts[key] = ChatLayout.of(tokenizer, processor.template, text, image_token)
    return layouts[key]


def _chunks(layout: ChatLayout, pieces: list[Piece]) -> list[_Chunk]:
    chunks = [_Chunk("", -1)]
    pattern, end_token = layout.specials_pattern, layout.closing or layout.eos_token
    for piece in pieces:
        last = chunks[-1]
        texts = [piece.text]
        if piece.is_data and pattern is not None and pattern.search(piece.text):
            # What the tokenizer would take for a special token is broken after its first letter, so that it stays text.
            cuts = [match.start() + 1 for match in pattern.finditer(piece.text)]
            texts = [piece.text[start:end] for start, end in zip([0, *cuts], [*cuts, None], strict=True)]
        if piece.is_image:
            chunks.append(_Chunk("", -1, shows_image=True))
        elif last.answer == piece.answer or last.is_closed and piece.answer < 0:
            chunks[-1] = last._replace(text=last.text + texts[0])
        elif piece.answer < 0 and layout.end_id is not None and end_token and last.text.endswith(end_token):
            # What follows the end of a turn is tokenised with it: some tokens take the white space after them.
            chunks[-1] = last._replace(text=last.text + texts[0], is_closed=True)
        else:
            chunks.append(_Chunk(texts[0], piece.answer))
        chunks += [_Chunk(text, piece.answer) for text in texts[1:]]
    return chunks
