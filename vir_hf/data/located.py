"""One raw row of a file -> `{"id", "messages", "images"}` with its pictures located, or the reason why not."""

from __future__ import annotations

import dataclasses
import logging
import shlex
from collections.abc import Sequence
from typing import Any

from vir_hf.data.filters import failed_by_columns, failed_by_quantities
from vir_hf.data.reading import BY_COLUMNS, Reading, Seen
from vir_hf.errors import MAX_MESSAGE, DataError, ImageError, clipped, shown
from vir_hf.images.folder import ImageFolder
from vir_hf.images.sizes import upright_size
from vir_hf.rows.boxes import BoxChange, find_boxes
from vir_hf.rows.keys import looks_like_media, may_be_embedded, row_key_meaning, unread_keys
from vir_hf.rows.messages import FATAL_KINDS, PLACEHOLDER, PROBLEM_KINDS, examine, is_learned, why_nothing_is_learned
from vir_hf.rows.shapes import in_llava_form, with_columns

logger = logging.getLogger(__name__)

MIXTURE = "data.sources"  # what a mixture is called where one file has its path; its rows count through all sources


@dataclasses.dataclass
class BadRow:
    """A row that cannot be trained on: its number in its file (from 0), its id, the kind of fault, and the reason.

    Id and reason are kept as messages quote them, shortened.
    """

    file: str
    row: int
    id: str
    kind: str
    detail: str
    reference: str | None = None  # the picture that is missing, which may be there the next time

    def __post_init__(self) -> None:
        self.id, self.detail = clipped(self.id, 80), clipped(self.detail)

    @property
    def is_image(self) -> bool:
        """Whether `data.on_bad_image` speaks of it, rather than `data.on_bad_row`."""
        return self.kind.startswith("image_")


@dataclasses.dataclass(frozen=True)
class BadRowPolicy:
    """What happens to rows that cannot be trained on: `raise`, or `skip` while they are at most `max_bad_fraction`."""

    on_bad_row: str = "raise"
    on_bad_image: str = "raise"
    max_bad_fraction: float = 0.05

    def __post_init__(self) -> None:
        for key in ("on_bad_row", "on_bad_image"):
            if getattr(self, key) not in ("raise", "skip"):
                raise ValueError(f"{key} is 'raise' or 'skip', got {getattr(self, key)!r}")

    def enforce(self, bad_rows: Sequence[BadRow], num_rows: int, source: str) -> None:
        """Raise one `DataError` about the bad rows of a source of `num_rows` rows, or log how many are left out."""
        if not bad_rows:
            return
        refused = [bad for bad in bad_rows if (self.on_bad_image if bad.is_image else self.on_bad_row) == "raise"]
        first = (refused or bad_rows)[0]
        place = f"{first.file}: row {first.row} (id {first.id}): {first.detail}"
        count = f"{len(bad_rows)} of {num_rows} rows cannot be used"
        if refused:
            keys = sorted({"data.on_bad_image" if bad.is_image else "data.on_bad_row" for bad in refused})
            leave_out = " and ".join(f"{key}=skip" for key in keys)
            checked = "FILE, for the file of each source" if source == MIXTURE else shlex.quote(source)
            checked = checked if len(checked) <= 150 else "FILE"
            remedy = (
                f" In all, {count}. List them: vir-hf data check {checked}, with the same --image-folder. Leave them out: "
                f"{leave_out}."
            )
            raise DataError(clipped(place, MAX_MESSAGE - len(remedy)) + remedy)
        self.enforce_fraction(len(bad_rows), num_rows, f"the first is {place}")
        logger.warning("%s", clipped(f"{source}: {count} and are left out; the first is {place}"))

    def enforce_fraction(self, num_bad_rows: int, num_rows: int, where: str) -> None:
        """Raise a `DataError` when more than `max_bad_fraction` of the rows are bad; also for files that break later."""
        if num_bad_rows == num_rows or num_bad_rows > self.max_bad_fraction * num_rows:
            remedy = (
                f" In all, {num_bad_rows} of {num_rows} rows cannot be used, more than "
                f"data.max_bad_fraction={self.max_bad_fraction:g} allows. Mend the data (vir-hf data check --fix OUT.json) or "
                "raise data.max_bad_fraction."
            )
            raise DataError(clipped(where, MAX_MESSAGE - len(remedy)) + remedy)


def normalise_row(
    raw: Any,
    folder: ImageFolder | None,
    file: str,
    number: int,
    seen: Seen | None = None,
    reading: Reading = BY_COLUMNS,
) -> dict[str, Any] | BadRow | None:
    """Return a raw row as `{"id", "messages", "images"}` with its images located in `folder`, or as a `BadRow`.

    A row without an id is called by its number; one that a filter leaves out is None. `seen` is told what was noticed.
    """
    seen = Seen() if seen is None else seen
    seen.num_rows += 1
    row_id = str(number)
    reference: Any = None
    try:
        raw = with_columns(raw, reading.columns)
        row_id = _id_of(raw) or row_id
        failed = failed_by_columns(reading.conditions, raw, seen.absent) if reading.conditions else None
        if failed is None:
            shape, raw, row = _read(raw, reading.format, seen)
            seen.add_shape(shape, f"{file}: row {number}")
            row_id = _id_of(raw) or row_id
            images = []
            for reference in row["images"]:
                images.append(_locate(reference, folder))
            kind, detail = text_problem(row, row_id)
            if kind:
                return BadRow(file, number, row_id, kind, detail)
            row = {"id": row_id, "messages": row["messages"], "images": images}
            if reading.boxes is not None:
                seen.boxes += change_boxes(row, reading.boxes)
            if reading.conditions:
                failed = failed_by_quantities(reading.conditions, raw, row, upright_size)
        if failed is not None:
            seen.filtered[f"{failed.column} {failed.text}"] += 1
            return None
        return row
    except _BadRow as bad:
        return BadRow(file, number, row_id, bad.kind, str(bad))
    except ImageError as error:
        missing = reference if error.kind == "image_missing" and isinstance(reference, str) else None
        return BadRow(file, number, row_id, error.kind, str(error), missing)


class _BadRow(Exception):
    """A row that cannot be read, with the kind of problem it is."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{detail}. {PROBLEM_KINDS[kind]}")
        self.kind = kind


def _id_of(raw: Any) -> str:
    return str(raw["id"]) if isinstance(raw, dict) and raw.get("id") not in (None, "") else ""


def _read(raw: Any, format: str | None, seen: Seen) -> tuple[str, Any, dict[str, Any]]:
    """Return a row's shape, the row as LLaVA writes it, and what `to_messages` makes of that."""
    row = _ordinary_row(raw) if format in (None, "llava") else None
    if row is not None:
        return "llava", raw, row
    try:
        shape, raw = in_llava_form(raw, format)
    except DataError as error:
        raise _BadRow("bad_row", str(error)) from error
    problems, row = examine(raw)
    if row is None:
        raise _BadRow(*next(problem for problem in problems if problem[0] in FATAL_KINDS))
    seen.unread.update({name for name, matters in unread_keys(raw) if matters})
    return shape, raw, row


def change_boxes(row: dict[str, Any], change: BoxChange) -> int:
    """Write the boxes in a row's texts in another form, in place, and return how many there are; without an image none.

    Raises:
        _BadRow: the row has boxes and images of several sizes, so that nothing says of which image they are.
        ImageError: its image cannot be read.
    """
    sizes: set[tuple[int, int]] = set()
    count = 0
    for part in (part for message in row["messages"] for part in message["content"]):
        if (
            not row["images"]
            or not part.get("text")
            or not any(find_boxes(part["text"], change.found, (1, 1), change.has_points))
        ):
            continue
        sizes = sizes or {upright_size(image) for image in row["images"]}
        if len(sizes) > 1:
            raise _BadRow("bad_row", "the row has boxes and images of several sizes, and nothing says of which image")
        part["text"], found = change.apply(part["text"], next(iter(sizes)))
        count += found
    return count


_ORDINARY_KEYS = {"id", "image", "conversations"}


def _ordinary_row(raw: Any) -> dict[str, Any] | None:
    """Return what `to_messages` returns for a row with nothing unusual about it, at a fifth of the time; else None.

    Ordinary: questions and answers in turn, no answer empty, for an image one `<image>` in one of the questions, and no key
    that means more than that.
    """
    if type(raw) is not dict or not all(key in _ORDINARY_KEYS or _means_nothing(key, raw[key]) for key in raw):
        return None
    turns, image = raw.get("conversations"), raw.get("image")
    if type(turns) is not list or not turns or len(turns) % 2 or not (image is None or (type(image) is str and image)):
        return None
    if image is not None and may_be_embedded(image):
        return None
    num_placeholders = 0
    messages = []
    for number, turn in enumerate(turns):
        speaker, role = ("gpt", "assistant") if number % 2 else ("human", "user")
        if type(turn) is not dict or len(turn) != 2 or turn.get("from") != speaker:
            return None
        text = turn.get("value")
        if type(text) is not str or (role == "user" and ("<video>" in text or "<audio>" in text)):
            return None
        content = [{"type": "text", "text": text}]
        if PLACEHOLDER in text:
            before, _, after = text.partition(PLACEHOLDER)
            num_placeholders += 1
            if role == "assistant" or PLACEHOLDER in after:
                return None
            text = (before + after).strip()
            content = [{"type": "image"}, {"type": "text", "text": text}] if text else [{"type": "image"}]
        elif role == "assistant" and (not text or text.isspace()):
            return None
        messages.append({"role": role, "content": content})
    if num_placeholders != (image is not None):
        return None
    return {"messages": messages, "images": [] if image is None else [image]}


def _means_nothing(key: Any, value: Any) -> bool:
    """Whether a key of a row is one that no reader knows and whose value is plainly no image."""
    return isinstance(key, str) and row_key_meaning(key) == "unknown" and not looks_like_media(value)


def text_problem(row: dict[str, Any], row_id: str) -> tuple[str, str]:
    """Return what keeps a row from being written or learned from as `(kind, detail)`, or two empty strings."""
    is_supervised = False
    try:
        row_id.encode()
        for message in row["messages"]:
            for part in message["content"]:
                if part.get("text"):
                    part["text"].encode()
            is_supervised = is_supervised or is_learned(message)
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        return "bad_row", f"the text holds half a character ({half!r}, one of a pair of surrogates). Remove it."
    return ("", "") if is_supervised else ("nothing_supervised", why_nothing_is_learned(row["messages"]))


def _locate(reference: Any, folder: ImageFolder | None) -> dict[str, Any]:
    if isinstance(reference, dict) and reference.get("bytes") is not None:
        return {"bytes": reference["bytes"], "path": reference.get("path")}
    if isinstance(reference, dict):
        reference = reference.get("path")
    if not isinstance(reference, str):
        raise ImageError("image_missing", f"image {shown(reference)}: expected a file name.")
    if folder is None:
        raise ImageError(
            "image_missing",
            f"{clipped(reference, 200)}: the row names a file, but the data set brings no folder of them. Set data.image_folder.",
        )
    return {"bytes": None, "path": folder.locate(reference)}
