"""Where a chat template puts texts and images, and which of what it renders an answer's author writes.

Found by rendering, not by markers: a sentinel stands in for each text of the conversation, so the template's own writing
and the texts' places come apart. Nothing is searched in real texts, so no text can be mistaken for a template's.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jinja2.exceptions import TemplateError

from vir_hf.errors import DataError, RecipeError
from vir_hf.rows.templates import TEMPLATES, adds_bos, chat_template_for, is_ours, render, special_tokens

logger = logging.getLogger(__name__)

# A conversation's shape: its roles and the kinds of its content parts (text, image, or nothing for an empty text). Two
# conversations of one shape differ only in their texts, so most templates write the same around them.
Shape = tuple[tuple[str, tuple[str, ...]], ...]
_SENTINEL = re.compile("\ue000([0-9]+)\ue001")
_RENDER_ERRORS = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)
# More messages than this are not rendered once for each of their texts, which takes a square of the time.
_MAX_RENDERED_ONE_BY_ONE = 64


@dataclass(frozen=True)
class Piece:
    """One stretch of a rendered conversation: text, or an image."""

    text: str = ""
    is_data: bool = False  # the text is the row's, not the template's
    slot: int = -1  # before the row's texts are filled in: which of them stands here
    answer: int = -1  # the number of the message that learns this text, or -1
    is_image: bool = False


@dataclass(frozen=True)
class _Skeleton:
    """A shape, rendered with sentinels: `literals[0] slots[0] literals[1] slots[1] ... literals[-1]`."""

    shape: Shape
    prompt: bool
    literals: list[str]
    slots: list[int]
    starts: dict[int, int]  # slot of an answer -> where, in the literal before it, its author begins to write
    pieces: list[Piece] = field(default_factory=list)


@dataclass
class ChatLayout:
    """How one chat template lays out conversations with one tokenizer; keeps what it found for each shape."""

    template: str
    chat_template: str
    image_token: str
    eos_token: str | None
    specials: list[str]
    reads_contents: bool  # the template may look at texts (trim them, cut thinking out), so each row is rendered too
    prepends_bos: bool  # transformers' processor puts BOS before what this template renders
    generation_prompt: str = ""
    closing: str | None = None  # the special token after an answer
    end_id: int | None = None  # the id that ends an answer: of `closing`, else EOS
    specials_pattern: re.Pattern[str] | None = None
    guard: list[int] = field(default_factory=list)  # ids of a newline put before a cut text, to be dropped again
    _skeletons: dict[tuple[Shape, bool], _Skeleton] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Any, template: str, chat_template: str, image_token: str) -> ChatLayout:
        """Return the layout of `chat_template`.

        Raises:
            RecipeError: the template cannot render a question and its answer.
        """
        specials = special_tokens(tokenizer)
        layout = cls(
            template,
            chat_template,
            image_token,
            tokenizer.eos_token,
            specials,
            reads_contents=template not in TEMPLATES
            or chat_template != chat_template_for(template, tokenizer, image_token),
            prepends_bos=adds_bos(tokenizer) and not is_ours(chat_template),
        )
        # A look-ahead, so that specials which overlap are all found. One letter cannot be broken.
        words = "|".join(re.escape(token) for token in specials if len(token) > 1)
        layout.specials_pattern = re.compile(f"(?=({words}))") if words else None
        layout.guard = _guard(tokenizer, image_token)
        turn: Shape = (("user", ("text",)), ("assistant", ("text",)))
        try:
            asked, answered = layout._render(tokenizer, turn[:1]), layout._render(tokenizer, turn)
            prompted = layout._render(tokenizer, turn[:1], prompt=True)
        except _RENDER_ERRORS as error:
            raise RecipeError(
                f"the chat template cannot render a question and its answer: {error}. {_other_than(template)}."
            ) from error
        if layout.prepends_bos and prompted.startswith(tokenizer.bos_token):
            layout.prepends_bos = False
        layout.generation_prompt = prompted[len(asked) :] if prompted.startswith(asked) else ""
        layout.closing = layout._special_at(_SENTINEL.split(answered)[-1])[1]
        end = layout.closing or layout.eos_token
        layout.end_id = tokenizer.convert_tokens_to_ids(end) if end and template != "plain" else None
        return layout

    def pieces(self, tokenizer: Any, messages: list[dict[str, Any]], prompt: bool = False) -> list[Piece]:
        """Return the rendered conversation in pieces.

        Args:
            tokenizer: the one the layout was made for.
            messages: from `to_messages`.
            prompt: add the generation prompt; nothing follows the last message then.

        Raises:
            DataError: the template refuses the conversation, or changes it so that answers cannot be told apart.
        """
        shape = _shape_of(messages)
        texts = [part["text"] for message in messages for part in message["content"] if part.get("text")]
        skeleton = self._skeletons.get((shape, prompt))
        if skeleton is None:
            if len(self._skeletons) >= 4096:
                self._skeletons.clear()
            skeleton = self._skeletons[shape, prompt] = self._skeleton(tokenizer, shape, prompt)
        pieces = skeleton.pieces
        if self.reads_contents:
            rendered = self._render_messages(tokenizer, messages, prompt)
            if rendered != _join(skeleton.literals, [texts[slot] for slot in skeleton.slots]):
                # Found anew, because some templates write the date.
                skeleton = self._skeletons[shape, prompt] = self._skeleton(tokenizer, shape, prompt)
                pieces, texts = self._read_again(tokenizer, skeleton, texts, rendered)
        return [
            Piece(texts[piece.slot], is_data=True, answer=piece.answer) if piece.slot >= 0 else piece
            for piece in pieces
        ]

    def _render(self, tokenizer: Any, shape: Shape, prompt: bool = False) -> str:
        return render(tokenizer, self.chat_template, _with_sentinels(shape), prompt)

    def _render_messages(self, tokenizer: Any, messages: list[dict[str, Any]], prompt: bool) -> str:
        try:
            return render(tokenizer, self.chat_template, messages, prompt)
        except _RENDER_ERRORS as error:
            roles = [message["role"] for message in messages]
            raise DataError(
                f"the chat template refuses a conversation of {roles}: {error}. "
                f"{_other_than(self.template)} or change the order of the turns."
            ) from error

    def _skeleton(self, tokenizer: Any, shape: Shape, prompt: bool) -> _Skeleton:
        parts = _SENTINEL.split(self._render_messages(tokenizer, _with_sentinels(shape), prompt))
        literals, slots = parts[0::2], [int(slot) for slot in parts[1::2]]
        owners = _owners(shape)
        if [slot for slot in slots if shape[owners[slot]][0] == "assistant"] != [
            slot for slot, number in enumerate(owners) if shape[number][0] == "assistant"
        ]:
            raise DataError(f"the chat template leaves out, repeats or reorders answers. {_other_than(self.template)}.")
        num_images = sum(kinds.count("image") for _, kinds in shape)
        num_written = sum(literal.count(self.image_token) for literal in literals)
        if num_written != num_images:
            raise DataError(
                f"the chat template writes {num_written} of {num_images} images. {_other_than(self.template)}."
            )
        left_out = {shape[owners[slot]][0] for slot in set(range(len(owners))) - set(slots)}
        if left_out and self.template != "plain":
            if left_out != {"system"}:
                raise DataError(f"the chat template leaves out what the human says. {_other_than(self.template)}.")
            logger.warning(
                "the chat template leaves out system turns; %s to keep them", _other_than(self.template).lower()
            )
        skeleton = _Skeleton(shape, prompt, literals, slots, self._answer_starts(tokenizer, shape, slots, literals))
        return replace(skeleton, pieces=self._cut(skeleton, literals))

    def _answer_starts(self, tokenizer: Any, shape: Shape, slots: list[int], literals: list[str]) -> dict[int, int]:
        """Return, for the slot of each answer, where its author begins to write in the literal before it.

        A template writes the same between a question and its answer wherever they stand, so of all places with the same
        literal the first two and the last are looked at, and the others only where those differ. Looking at one renders the
        conversation up to there: at each of n places that would take n squared.
        """
        owners = _owners(shape)
        alike: dict[tuple[str, Any], list[int]] = {}
        for slot, literal in zip(slots, literals, strict=False):
            number = owners[slot]
            if shape[number][0] == "assistant":
                alike.setdefault((literal, shape[number - 1] if number else None), []).append(slot)
        starts: dict[int, int] = {}
        for (literal, _), found in alike.items():
            looked_at = dict.fromkeys((*found[:2], found[-1]), 0)
            for slot in looked_at:
                looked_at[slot] = self._answer_start(tokenizer, shape[: owners[slot]], literal)
            if len(set(looked_at.values())) == 1:
                starts.update(dict.fromkeys(found, looked_at[found[0]]))
            else:
                starts.update({slot: self._answer_start(tokenizer, shape[: owners[slot]], literal) for slot in found})
        return starts

    def _answer_start(self, tokenizer: Any, asked: Shape, literal: str) -> int:
        """Return where, in the text before an answer, the prompt of inference ends and the model begins to write."""
        bare = len(literal.rstrip())
        try:
            tail = _SENTINEL.split(self._render(tokenizer, asked, prompt=True))[-1]
        except _RENDER_ERRORS:  # nothing was asked: the conversation begins with an answer
            found = literal.rfind(self.generation_prompt) if self.generation_prompt else -1
            return found + len(self.generation_prompt) if found >= 0 else bare
        same = len(os.path.commonprefix([tail, literal]))
        return same if self.generation_prompt else max(same, bare)

    def _cut(self, skeleton: _Skeleton, literals: list[str]) -> list[Piece]:
        slots, starts, owners = skeleton.slots, skeleton.starts, _owners(skeleton.shape)
        last = -1 if skeleton.prompt else len(skeleton.shape) - 1
        pieces: list[Piece] = []
        for index, literal in enumerate(literals):
            closed, before, after = 0, slots[index - 1] if index else -1, slots[index] if index < len(slots) else -1
            if before in starts:
                closed = self._closing_length(literal)
                if not closed and self.closing is None and owners[before] == last and self.eos_token:
                    # The template ends a turn with nothing a model could stop at, so the last turn ends with EOS.
                    pieces.append(Piece(self.eos_token, answer=owners[before]))
                    break
                pieces.append(Piece(literal[:closed], answer=owners[before]))
            opened = max(closed, min(starts.get(after, len(literal)), len(literal)))
            for number, text in enumerate(literal[closed:opened].split(self.image_token)):
                pieces += [Piece(is_image=True), Piece(text)] if number else [Piece(text)]
            if after >= 0:
                answer = owners[after] if after in starts else -1
                pieces += [Piece(literal[opened:], answer=answer), Piece(slot=after, answer=answer)]
        return [piece for piece in pieces if piece.text or piece.slot >= 0 or piece.is_image]

    def _closing_length(self, literal: str) -> int:
        """Return how much of the text after an answer the model must write to end its turn."""
        if self.template == "plain":
            return 1 if literal.startswith("\n") else 0
        length, token = self._special_at(literal)
        return length if token == self.closing else 0

    def _special_at(self, text: str) -> tuple[int, str | None]:
        """Return where the special token ends that `text` begins with, after white space, and the token."""
        bare = text.lstrip()
        token = next((token for token in self.specials if bare.startswith(token)), None)
        return (len(text) - len(bare) + len(token), token) if token else (0, None)

    def _read_again(
        self, tokenizer: Any, skeleton: _Skeleton, texts: list[str], rendered: str
    ) -> tuple[list[Piece], list[str]]:
        """Return pieces and texts as a template that looks at texts writes them: texts are rendered among sentinels.

        Every second text stands in its place while its neighbours are sentinels, then the others do: two renderings for
        any number of texts. Where that does not give the whole, each text is rendered alone.
        """
        slots = skeleton.slots
        ways = [[slots[0::2], slots[1::2]]]
        if len(slots) <= _MAX_RENDERED_ONE_BY_ONE:
            ways.append([[slot] for slot in slots])
        for groups in ways:
            found = self._written(tokenizer, skeleton, texts, groups)
            if found is not None and rendered == _join(found[0], [found[1][slot] for slot in slots]):
                return self._cut(skeleton, found[0]), found[1]
        raise DataError(
            "the chat template rewrites this conversation so that its answers cannot be told apart. "
            f"{_other_than(self.template)}."
        )

    def _written(
        self, tokenizer: Any, skeleton: _Skeleton, texts: list[str], groups: list[list[int]]
    ) -> tuple[list[str], list[str]] | None:
        """Return literals and texts as they are written when the texts of one group after another are rendered.

        Args:
            groups: slots, no two of them neighbours. Together they are all slots.
        """
        slots = skeleton.slots
        literals, written = list(skeleton.literals), list(texts)
        for group in groups:
            if not group:
                continue
            is_real = set(group)
            alone = _with_sentinels(skeleton.shape, real={slot: texts[slot] for slot in group})
            parts = _SENTINEL.split(self._render_messages(tokenizer, alone, skeleton.prompt))
            others = [slot for slot in slots if slot not in is_real]
            if [int(other) for other in parts[1::2]] != others:
                return None
            between = iter(parts[0::2])
            stretch, is_new = next(between), True
            for index, slot in enumerate(slots):
                if slot not in is_real:
                    stretch, is_new = next(between), True
                    continue
                before, after = skeleton.literals[index], skeleton.literals[index + 1]
                if not is_new or not stretch.endswith(after):
                    return None
                is_new = False
                own = stretch[: len(stretch) - len(after)]
                same = len(os.path.commonprefix([own, before]))
                literals[index], written[slot] = before[:same], own[same:]
                if self._num_specials(written[slot]) > self._num_specials(texts[slot]):
                    return None  # the template's own words are among them
        return literals, written

    def _num_specials(self, text: str) -> int:
        return len(self.specials_pattern.findall(text)) if self.specials_pattern else 0


def _other_than(template: str) -> str:
    """Return the advice to choose another template than the one that does not work here."""
    others = [name for name in TEMPLATES if name != template]
    return f"Choose another template (model.template, one of {others})"


def _guard(tokenizer: Any, image_token: str) -> list[int]:
    """Return the ids of a newline if the tokenizer puts a space before any text that follows a special token.

    A newline before the text takes that space upon itself. Elsewhere nothing is returned, and none is needed.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(image_token + text, add_special_tokens=False)["input_ids"][1:])

    newline = ids("\n")
    adds_space = ids("\na") != newline + ids("a")
    stands_alone = all(ids("\n" + text)[: len(newline)] == newline for text in ("a", "\n", " ", "1", "."))
    return newline if adds_space and stands_alone else []


def _shape_of(messages: Sequence[dict[str, Any]]) -> Shape:
    return tuple((message["role"], tuple(map(_kind, message["content"]))) for message in messages)


def _kind(part: dict[str, str]) -> str:
    return "image" if part["type"] == "image" else "text" if part["text"] else "nothing"


def _owners(shape: Shape) -> list[int]:
    """Return, for each text slot, the number of its message."""
    return [number for number, (_, kinds) in enumerate(shape) for kind in kinds if kind == "text"]


def _with_sentinels(shape: Shape, real: dict[int, str] | None = None) -> list[dict[str, Any]]:
    """Return messages of this shape with a sentinel for each text, but the `real` ones."""
    messages, slot = [], 0
    for role, kinds in shape:
        content: list[dict[str, str]] = []
        for kind in kinds:
            if kind == "image":
                content.append({"type": "image"})
                continue
            text = (real or {}).get(slot, f"\ue000{slot}\ue001") if kind == "text" else ""
            content.append({"type": "text", "text": text})
            slot += kind == "text"
        messages.append({"role": role, "content": content})
    return messages


def _join(literals: list[str], texts: list[str]) -> str:
    return "".join(part for pair in zip(literals, [*texts, ""], strict=True) for part in pair)
