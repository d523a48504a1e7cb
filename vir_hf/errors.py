"""The errors a user can cause: a recipe that cannot be run, data that cannot be trained on, a run that could not go on.

No message is longer than `MAX_MESSAGE` characters, whatever it quotes: what is long is cut in its middle, where the data
stand, and keeps its beginning (what was found, and where) and its end (what to do).
"""

from __future__ import annotations

import re
from typing import Any

MAX_MESSAGE = 500
_MAX_SHOWN = 80
_CUT = " [...] "


def clipped(text: str, limit: int = MAX_MESSAGE) -> str:
    """Return the text in at most `limit` characters; of a longer one the beginning and the end."""
    if len(text) <= limit:
        return text
    kept = limit - len(_CUT)
    tail = kept * 2 // 5
    return text[: kept - tail] + _CUT + text[len(text) - tail :]


def shown(value: Any) -> str:
    """Return a value of the data as a message quotes it, in at most 80 characters; of bytes their number."""
    if value is None:
        return "null"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"{len(value):,} bytes"
    if isinstance(value, str) and len(value) > _MAX_SHOWN:
        kind = "a data URI" if value[:5].lower() == "data:" else "a text"
        return f"{kind} of {len(value):,} characters ({value[:16]!r}...)"
    if isinstance(value, dict):  # each value shortened by itself, so that none is written out to be cut
        inner = ", ".join(f"{clipped(repr(key), 24)}: {shown(value[key])}" for key in list(value)[:4])
        return clipped("{" + inner + (", ..." if len(value) > 4 else "") + "}", _MAX_SHOWN)
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(shown, value[:4]))
        return clipped("[" + inner + (", ..." if len(value) > 4 else "") + "]", _MAX_SHOWN)
    return clipped(repr(value), _MAX_SHOWN)


_RAISED = re.compile(r"^(?:vir_hf\.errors\.)?(?:RecipeError|DataError|ImageError|RunError): ", re.MULTILINE)


def _own_words(text: str) -> str:
    """Return the message of an error, also where torch hands it on from a data loader's worker.

    What a worker raised comes back as an error of the same class whose message is the worker's whole traceback.
    """
    if text.startswith("Caught ") and "Original Traceback" in text:
        *_, last = [None, *_RAISED.finditer(text)]
        text = text[last.end() :].strip() if last else text
    return clipped(text)


class RecipeError(ValueError):
    """A recipe (or a command's argument) that cannot be run; the message names the key and the remedy."""

    def __str__(self) -> str:
        return _own_words(super().__str__())


class DataError(ValueError):
    """A file, a row or an image that cannot be used; the message names the file, the row number or id, and the reason."""

    def __str__(self) -> str:
        return _own_words(super().__str__())


class ImageError(DataError):
    """An image that cannot be used. `kind` is the word the data check counts it under, such as `image_missing`.

    Args:
        kind: the word; where the message is missing, this is the message, and the kind `image_unusable`: so torch makes an
            error anew that a data loader's worker raised.
    """

    def __init__(self, kind: str, message: str | None = None) -> None:
        if message is None:
            kind, message = "image_unusable", kind
        super().__init__(kind, message)
        self.kind = kind
        self.message = message

    def __str__(self) -> str:
        return _own_words(self.message)


class RunError(RuntimeError):
    """A run that could not go on: a full disk, bad numbers, no memory. The message says what is left and what to do."""

    def __str__(self) -> str:
        return _own_words(super().__str__())
