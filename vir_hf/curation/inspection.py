"""Rows as the model will see them: the text of their tokens, which of them are learned, and the picture the tower gets."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from rich.text import Text

from vir_hf.curation import pages as html_pages
from vir_hf.curation.terminal import printable
from vir_hf.errors import DataError, clipped
from vir_hf.images.opening import open_image
from vir_hf.images.preprocessing import ImagePreprocessor
from vir_hf.rows.boxes import BoxForm, find_boxes, is_outside
from vir_hf.rows.encoding import encode_row, encode_with_images
from vir_hf.rows.image_lengths import image_lengths
from vir_hf.rows.messages import to_messages


@dataclasses.dataclass(frozen=True)
class Span:
    """Neighbouring tokens of one sort: `image`, `learned` (they have labels) or `read` (they have none)."""

    sort: str
    text: str
    ids: list[int]
    pieces: list[str]  # one text a token, for the image span none


@dataclasses.dataclass(frozen=True)
class InspectedRow:
    """One row as it is trained on. `num_cut` tokens were dropped to keep `max_length`."""

    number: int
    id: str
    spans: list[Span]
    images: list[Any]
    num_cut: int = 0
    texts: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """All tokens, image tokens included."""
        return sum(len(span.ids) for span in self.spans)

    @property
    def num_learned(self) -> int:
        """Tokens with a label."""
        return sum(len(span.ids) for span in self.spans if span.sort == "learned")

    @property
    def title(self) -> str:
        """Number, id and counts in one line."""
        num_image_tokens = sum(len(span.ids) for span in self.spans if span.sort == "image")
        parts = [f"row {self.number}", f"id {clipped(self.id, 80)}", f"{self.num_tokens} tokens"]
        parts += [f"{num_image_tokens} of images"] if num_image_tokens else []
        parts += [f"{self.num_learned} learned"]
        parts += [f"{self.num_cut} cut off to keep max_length"] if self.num_cut else []
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain data; image spans are folded into a count."""
        spans = [
            {"sort": s.sort, "text": s.text, "num_tokens": len(s.ids), **({} if s.sort == "image" else {"ids": s.ids})}
            for s in self.spans
        ]
        images = [image.get("path") if isinstance(image, dict) else str(image) for image in self.images]
        return {
            "row": self.number,
            "id": self.id,
            "num_tokens": self.num_tokens,
            "num_supervised_tokens": self.num_learned,
            "num_cut": self.num_cut,
            "images": images,
            "spans": spans,
        }


def inspect_row(row: dict[str, Any], number: int, processor: Any, max_length: int | None = None) -> InspectedRow:
    """Return a row of `load_llava_dataset` taken apart.

    Raises:
        DataError: the row cannot be trained on.
    """
    encoded, images = encode_with_images(row, processor, max_length=max_length, where=f"row {number}")
    num_cut = 0
    if max_length is not None:
        num_cut = len(encode_row(row, processor)["input_ids"]) - len(encoded["input_ids"])
    spans = _spans(encoded["input_ids"], encoded["labels"], image_lengths(images, processor), processor)
    texts = tuple(
        part["text"] for message in to_messages(row)["messages"] for part in message["content"] if part.get("text")
    )
    return InspectedRow(number, str(row["id"]), spans, list(images), num_cut, texts)


def _spans(input_ids: list[int], labels: list[int], lengths: list[int], processor: Any) -> list[Span]:
    sorts = [
        "image" if token == processor.image_token_id else "read" if label < 0 else "learned"
        for token, label in zip(input_ids, labels, strict=True)
    ]
    spans: list[Span] = []
    remaining = iter(lengths)
    whole = next(remaining, 0)
    start = segment = 0  # a segment is the text between images, which is decoded as a whole
    for end in range(1, len(sorts) + 1):
        is_image, length = sorts[start] == "image", end - start
        is_whole = is_image and length == whole
        if end < len(sorts) and sorts[end] == sorts[start] and not is_whole:
            continue
        ids = input_ids[start:end]
        if is_image:
            spans.append(Span("image", f"<image x{length}>", ids, []))
            segment, whole = end, next(remaining, 0)
        else:
            pieces = _pieces(processor.tokenizer, input_ids[segment:end])[start - segment :]
            spans.append(Span(sorts[start], "".join(pieces), ids, pieces))
        start = end
    return spans


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """Return the text each token adds to those before it; a character of several tokens comes with its last one."""

    def decode(first: int, last: int) -> str:
        text: str = tokenizer.decode(ids[first:last], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    pieces: list[str] = []
    # Decoded anew are the last whole piece, which decides how the next one begins, and all since.
    before = start = 0
    for end in range(1, len(ids) + 1):
        text, known = decode(before, end), decode(before, start)
        # A character has at most four bytes, and so at most four tokens: after more, the sign for a broken one is meant.
        is_whole = not text.endswith("\ufffd") or end == len(ids) or end - start > 4
        pieces.append(text[len(known) :] if is_whole else "")
        if is_whole:
            before, start = start, end
    return pieces


def as_terminal_text(row: InspectedRow, with_ids: bool = False) -> Text:
    """Return a row for the terminal: learned text is green and stands between `«` and `»`, images are folded."""
    text = Text()
    for span in row.spans:
        if span.sort == "image":
            text.append(span.text, style="cyan")
            continue
        body = (
            "".join(f"{piece}[{token}]" for piece, token in zip(span.pieces, span.ids, strict=True))
            if with_ids
            else span.text
        )
        body = printable(body).replace("\n", "\u21b5\n")
        text.append(
            f"\u00ab{body}\u00bb" if span.sort == "learned" else body, style="green" if span.sort == "learned" else ""
        )
    return text


def as_page(
    rows: Sequence[InspectedRow],
    processor: Any,
    lead: str,
    with_ids: bool = False,
    boxes: BoxForm | None = None,
) -> str:
    """Return rows as one self-contained HTML page, each with its images as the vision tower sees them.

    Args:
        rows: what `inspect_row` returned.
        processor: its `image_processor` says how the tower gets an image; without one, images are shown as they are.
        lead: the line below the title.
        with_ids: put each token's id behind it.
        boxes: how boxes in the texts are written; they are drawn on the images, where the tower sees them.
    """
    preprocess = None
    if getattr(processor, "image_processor", None) is not None:
        preprocess = ImagePreprocessor(processor.image_processor)
    about_images = (
        "Images are as they lie in their files: a tokenizer alone does not say how the vision tower gets them."
        if preprocess is None
        else "Images are what the vision tower gets, with the normalisation taken back."
    )
    shown = [
        {
            "title": row.title,
            "images": [
                view
                for image in row.images
                for view in _shown_views(image, preprocess, processor, row.texts if boxes else (), boxes)
            ],
            "spans": [{"sort": s.sort, "text": s.text, "pieces": _shown_pieces(s, with_ids)} for s in row.spans],
        }
        for row in rows
    ]
    title = "Rows as the model sees them"
    return html_pages.render("rows.html", title=title, lead=lead, foot="", about_images=about_images, rows=shown)


def _shown_pieces(span: Span, with_ids: bool) -> list[tuple[str, int | None]]:
    """Return (text, token id) of a span's tokens, or the whole text and no id."""
    if not with_ids:
        return [(_visible(span.text), None)]
    return [(_visible(piece), token) for piece, token in zip(span.pieces, span.ids, strict=False)]


def _visible(text: str) -> str:
    return text.replace("\n", "\u21b5\n")


def _shown_views(
    image: Any, preprocess: ImagePreprocessor | None, processor: Any, texts: Sequence[str], boxes: BoxForm | None
) -> list[dict[str, str]]:
    """Return every view of an image as base64 and its label, or why it cannot be shown; boxes are drawn on the whole."""
    name = os.path.basename(image.get("path") or "embedded image") if isinstance(image, dict) else str(image)
    place: _Place | None
    try:
        original = open_image(image)
        size = original.size
        if preprocess is None:
            shown = original
            shown.thumbnail((600, 600))
            pictures, place = [shown], _scaled(size, shown.size)
        else:
            pixels = preprocess(image)
            views = list(pixels) if pixels.ndim == 4 else [pixels]
            pictures = [denormalise(view, preprocess.image_processor) for view in views]
            place = preprocess.place_in_view(size)
    except DataError as error:
        return [{"error": str(error)}]
    places = [f"tile {number} of {len(pictures) - 1}, " for number in range(1, len(pictures))]
    whole = 0 if not places or processor.views.shows_whole_first else len(places)
    places.insert(whole, "the whole, " if places else "")
    labels = [
        name if preprocess is None else f"{which}{picture.width}x{picture.height} pixels, {name}"
        for which, picture in zip(places, pictures, strict=True)
    ]
    if boxes is not None:
        labels[whole] += f", {draw_boxes(pictures[whole], texts, boxes, size, place)}"
    return [_shown(picture, label) for picture, label in zip(pictures, labels, strict=True)]


def _shown(picture: Image.Image, label: str) -> dict[str, str]:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return {"error": "", "data": base64.b64encode(buffer.getvalue()).decode(), "label": label}


def shown_file(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return an image file as the pages show it: as base64 with its label, or why it cannot be shown."""
    return _shown_views({"bytes": None, "path": os.fspath(path)}, None, None, (), None)[0]


_Place = Callable[[float, float], tuple[float, float]]  # where a point of an image lies in a view of it


def _scaled(before: tuple[int, int], after: tuple[int, int]) -> _Place:
    return lambda x, y: (x * after[0] / before[0], y * after[1] / before[1])


def draw_boxes(
    shown: Image.Image,
    texts: Sequence[str],
    form: BoxForm,
    size: tuple[int, int],
    place: _Place | None,
) -> str:
    """Draw the boxes of texts on a view of an image, in place, and return words about how many were drawn.

    Args:
        form: how the boxes are written.
        size: width and height of the original image.
        place: where a point of the original image lies in the view; None if nobody knows.
    """
    if place is None:
        return "boxes cannot be drawn: this image processor does not say where a point of the image goes"
    found = [box for text in texts for box in find_boxes(text, form, size, has_points=False)]
    pen = ImageDraw.Draw(shown)
    for number, box in enumerate(found):
        left, top = place(*box.corners[:2])
        right, bottom = place(*box.corners[2:])
        outline = _BOX_COLOURS[number % len(_BOX_COLOURS)]
        pen.rectangle(_upright(left, right, top, bottom), outline=outline, width=2)
    num_outside = sum(is_outside(box, form, size) for box in found)
    outside = f", {num_outside} of them outside of the image" if num_outside else ""
    return f"{len(found)} boxes as {form}{outside}"


def _upright(left: float, right: float, top: float, bottom: float) -> tuple[float, float, float, float]:
    """Return the sides of a rectangle as Pillow wants them, whichever way round they were given."""
    return min(left, right), min(top, bottom), max(left, right), max(top, bottom)


_BOX_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")


def denormalise(pixel_values: torch.Tensor, image_processor: Any) -> Image.Image:
    """Return `(3, height, width)` pixel values as the picture they show."""
    mean = torch.tensor(image_processor.image_mean).view(3, 1, 1)
    deviation = torch.tensor(image_processor.image_std).view(3, 1, 1)
    levels = (pixel_values * deviation + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())
