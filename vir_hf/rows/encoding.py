"""One LLaVA row -> messages -> input ids and labels. Pure Python; docs/data-formats.md says what every odd row means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from vir_hf.errors import DataError
from vir_hf.rows.chat_layout import ChatLayout, Piece
from vir_hf.rows.image_lengths import image_lengths, in_words
from vir_hf.rows.messages import is_learned, place_of, to_messages, why_nothing_is_learned
from vir_hf.rows.templates import chat_template_for

IGNORE = -100


def encode_row(
    row: Any, processor: Any, expand_images: bool = True, *, max_length: int | None = None, where: str = ""
) -> dict[str, Any]:
    """Return `{"input_ids", "labels"}`: what the model reads and what it learns.

    Labels are -100 except at the answers' tokens and the token that ends each answer's turn. The ids before an answer are
    those of the prompt that asks for it, so training meets exactly what inference sends. Text in the data that looks like
    a special token stays text.

    Args:
        row: a raw LLaVA row, or what `to_messages` returns.
        processor: anything with `tokenizer`, `image_token`, `image_token_id`, `template`, `chat_template`, and `views` or
            `num_image_tokens`. Where an image's tokens depend on its size, its header is read.
        expand_images: write as many ids for each image as it has tokens; otherwise one.
        max_length: drop turns from the end until at most so many ids are left; then `num_images` is in the result too:
            how many of the row's images, from the front, are still shown.
        where: put before an error, for example `"train.json row 17"`.

    Raises:
        DataError: no row of a conversation, nothing to learn in it, or its first answer does not begin before
            `max_length`.
    """
    return encode_with_images(row, processor, expand_images, max_length=max_length, where=where)[0]


def encode_with_images(
    row: Any, processor: Any, expand_images: bool = True, *, max_length: int | None = None, where: str = ""
) -> tuple[dict[str, Any], list[Any]]:
    """Return `encode_row` and the images that its ids show, in their order; arguments and errors are those of `encode_row`."""
    normal = to_messages(row, where=where)
    try:
        encoded = encode_messages(normal["messages"], processor, expand_images, max_length, images=normal["images"])
    except DataError as error:
        raise DataError(f"{place_of(normal, where)}{error}") from error
    return encoded, normal["images"][: encoded.get("num_images")]


def encode_messages(
    messages: list[dict[str, Any]],
    processor: Any,
    expand_images: bool = True,
    max_length: int | None = None,
    *,
    images: Sequence[Any] = (),
) -> dict[str, Any]:
    """`encode_row` for the messages and images that `to_messages` returned, which are not looked through again."""
    lengths = image_lengths(images, processor) if expand_images else [1] * len(images)
    encoded = _encode(messages, processor, lengths)
    if not encoded.ends:
        raise DataError(f"nothing to learn: {why_nothing_is_learned(messages)}")
    if max_length is None:
        return {"input_ids": encoded.input_ids, "labels": encoded.labels}
    return _fit(messages, encoded, processor, lengths, max_length)


_MAX_NEIGHBOURS_TRIED = 8


def _fit(
    messages: list[dict[str, Any]], encoded: _Encoded, processor: Any, lengths: Sequence[int], max_length: int
) -> dict[str, Any]:
    """Return the row cut to `max_length`: whole turns from the end, then the end of the first answer, never an image."""
    answered = list(encoded.ends)
    if len(encoded.input_ids) > max_length:
        whole, num_tried, margin = encoded.ends, 0, 0
        for number in reversed(answered):
            # A template may write more after the last turn than between turns, or of it, so what fits is found by trying:
            # the next turns first, then in leaps that double, for few renderings of a long conversation.
            if number != answered[0] and whole[number] + margin > max_length:
                continue
            messages = messages[: number + 1]
            encoded = _encode(messages, processor, lengths)
            if encoded.ends[number] <= max_length:
                break
            num_tried += 1
            if num_tried >= _MAX_NEIGHBOURS_TRIED:
                margin = max(2 * margin, encoded.ends[number] - whole[number], 1)
    input_ids, labels = encoded.input_ids[:max_length], encoded.labels[:max_length]
    num_images = sum(part["type"] == "image" for message in messages for part in message["content"])
    if all(label == IGNORE for label in labels):
        asked = next(i for i, label in enumerate(encoded.labels) if label != IGNORE)
        raise DataError(
            f"the first question alone takes {asked} tokens ({in_words(lengths[:num_images])} "
            f"among them) and leaves none of max_length={max_length} for its answer. "
            f"Set max_length above {asked}, shorten the question, or leave the row out."
        )
    return {"input_ids": input_ids, "labels": labels, "num_images": num_images}


def encode_prompt(row: Any, processor: Any, expand_images: bool = True, *, where: str = "") -> list[int]:
    """Return the ids to send to `generate`: the conversation, then the template's invitation to answer.

    For the turns before an answer these are exactly the ids that stand before that answer in training. The images are
    `to_messages(row)["images"]`, in order. Raises `DataError` as `encode_row` does, but needs no answer.
    """
    return encode_prompt_with_images(row, processor, expand_images, where=where)[0]


def encode_prompt_with_images(
    row: Any, processor: Any, expand_images: bool = True, *, where: str = ""
) -> tuple[list[int], list[Any]]:
    """Return `encode_prompt` and the images that its ids show, in their order."""
    normal = to_messages(row, where=where)
    images = normal["images"]
    try:
        lengths = image_lengths(images, processor) if expand_images else [1] * len(images)
        ids = _encode(normal["messages"], processor, lengths, prompt=True).input_ids
    except DataError as error:
        raise DataError(f"{place_of(normal, where)}{error}") from error
    return ids, normal["images"]


def last_question(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the messages of `to_messages` up to and including the human's last turn, to which the answer is asked.

    Raises:
        DataError: no turn is the human's.
    """
    asked = next((number for number in range(len(messages), 0, -1) if messages[number - 1]["role"] == "user"), 0)
    if not asked:
        raise DataError("the row asks nothing: no turn is the human's.")
    return list(messages[:asked])


class RowLength(NamedTuple):
    """How long a row is, known without decoding an image."""

    num_tokens: int
    num_prefix_tokens: int  # before the first supervised one
    num_supervised_tokens: int
    num_images: int


def row_length(row: Any, processor: Any, *, max_length: int | None = None, where: str = "") -> RowLength:
    """Return how many tokens `encode_row` would give. Raises `DataError` as it does."""
    encoded, images = encode_with_images(row, processor, max_length=max_length, where=where)
    spans = supervised_spans(encoded)
    return RowLength(
        num_tokens=len(encoded["input_ids"]),
        num_prefix_tokens=spans[0][0],
        num_supervised_tokens=sum(end - start for start, end in spans),
        num_images=len(images),
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


def _encode(messages: list[dict[str, Any]], processor: Any, lengths: Sequence[int], prompt: bool = False) -> _Encoded:
    """Encode messages; `lengths` says for each of their images, in order, how many ids it takes."""
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
    learned = [is_learned(message) for message in messages]
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    if ids.count(separator) != len(chunks) - 1:
        raise DataError(
            f"the tokenizer does not read {layout.image_token!r} as the one id {separator}. "
            "Call vir_hf.rows.templates.prepare_tokenizer on it."
        )
    remaining = iter(lengths)
    input_ids: list[int] = [tokenizer.bos_token_id] if layout.prepends_bos else []
    labels = [IGNORE] * len(input_ids)
    ends: dict[int, int] = {}
    start = 0
    for chunk, guard in zip(chunks, [False, *guards], strict=True):
        if chunk.shows_image:
            length = next(remaining)
            input_ids += [separator] * length
            labels += [IGNORE] * length
        start += len(layout.guard) if guard else 0
        end = ids.index(separator, start) if chunk is not chunks[-1] else len(ids)
        input_ids += ids[start:end]
        if chunk.answer >= 0 and learned[chunk.answer]:
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
