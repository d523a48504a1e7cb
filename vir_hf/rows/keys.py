"""What a key of a row means, and which image a reference is, however either is written.

A key is read, refused, or reported: nothing that the model could see or learn from vanishes. docs/data-formats.md has the list.
"""

from __future__ import annotations

import base64
import binascii
import functools
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

from vir_hf.errors import DataError, shown

PLACEHOLDER = "<image>"  # in the data; the tokenizer's own word for an image is processor.image_token
_HOW = r"(?:[_-]?(?:paths?|files?|file_?names?|names?|ur[li]s?|bytes|data|base64|b64|list))?"
_IMAGE_KEY = re.compile(rf"(?:images?|imgs?|pictures?|pics?|photos?){_HOW}", re.IGNORECASE)
_MEDIA_KEY = re.compile(rf"(?:input_)?(?:videos?|audios?|sounds?|speech|movies?){_HOW}", re.IGNORECASE)
_OWN_IMAGE_KEYS = ("image", "images")
_TURN_LISTS = ("messages", "conversations")
_SYSTEM_KEYS = ("system", "system_prompt")
SUPERVISION_KEYS = ("loss", "weight", "train", "supervised")
# What a model could learn from, and what says how much of it: no format of this project has a place for them.
_MATTERS = re.compile(
    r"reasoning(_content)?|thinking(_content)?|thoughts?|tool_calls?|tools?|functions?|function_call|chosen|rejected"
    r"|mask(ed)?|loss_mask|ignore|training|train_detail|train_on_input",
    re.IGNORECASE,
)
_MEDIA_NAME = re.compile(
    r"[^\n]{1,1000}\.(?:jpe?g|png|gif|webp|bmp|tiff?|mp4|webm|mov|avi|mkv|wav|mp3|flac|ogg)", re.IGNORECASE
)
# How the usual formats begin, as bytes and as base64 text: PNG, JPEG, GIF, WebP, TIFF (twice).
_STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkqA", "TU0AK")
_SHORTEST_BASE64 = 48
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_DATA_URI = re.compile(r"data:(?P<type>[^;,]*)(?P<parameters>(?:;[^;,]*)*),", re.IGNORECASE)


@functools.lru_cache(maxsize=4096)
def row_key_meaning(key: str) -> str:
    """Return what a key of a row is for: `id`, `turns`, `image`, `other_image`, `system`, `media`, `not_read` or `unknown`.

    `image` is `image` and `images`, in letters of either case; `other_image` are further names of it, read where it is absent.
    """
    word = key.lower()
    if key == "id" or key in _TURN_LISTS:
        return "id" if key == "id" else "turns"
    if word in _OWN_IMAGE_KEYS:
        return "image"
    if word in _SYSTEM_KEYS:
        return "system"
    if _IMAGE_KEY.fullmatch(key):
        return "other_image"
    if _MEDIA_KEY.fullmatch(key):
        return "media"
    return "not_read" if word in SUPERVISION_KEYS or _MATTERS.fullmatch(key) else "unknown"


@functools.lru_cache(maxsize=4096)
def turn_key_meaning(key: str) -> str:
    """Return what a key of a turn is for: `turn` (who says what), `supervision`, `image`, `media`, `not_read` or `unknown`."""
    if key in ("from", "value", "role", "content"):
        return "turn"
    if key.lower() in SUPERVISION_KEYS:
        return "supervision"
    if _IMAGE_KEY.fullmatch(key):
        return "image"
    if _MEDIA_KEY.fullmatch(key):
        return "media"
    return "not_read" if _MATTERS.fullmatch(key) else "unknown"


def is_given(value: Any) -> bool:
    """Whether a key's value says anything: tables write null, and empty lists and objects, where a row has no such key."""
    return value is not None and not (isinstance(value, (list, tuple, Mapping)) and not value)


def unread_keys(row: Any) -> Iterator[tuple[str, bool]]:
    """Yield the name of each key with a value that nothing reads, and whether a model could have learned from it.

    A key of a turn is called `turn.KEY`, one of a part of its content `part.KEY`.
    """
    if not isinstance(row, Mapping):
        return
    has_image = any(is_given(row[key]) for key in row if _row_meaning(key) == "image")
    for key, value in row.items():
        meaning = _row_meaning(key)
        if meaning == "not_read" and is_given(value):
            yield str(key), True
        elif (meaning == "other_image" and has_image or meaning == "unknown") and is_given(value):
            yield str(key), not has_image and looks_like_media(value)
    for turns in (row.get(key) for key in _TURN_LISTS):
        for turn in turns if isinstance(turns, (list, tuple)) else ():
            yield from _unread_of_turn(turn)


def _unread_of_turn(turn: Any) -> Iterator[tuple[str, bool]]:
    if not isinstance(turn, Mapping):
        return
    role = turn.get("from") if turn.get("from") is not None else turn.get("role")
    for key, value in turn.items():
        meaning = turn_key_meaning(key) if isinstance(key, str) else "unknown"
        if meaning in ("not_read", "unknown") and is_given(value) and value != "":
            yield f"turn.{key}", meaning == "not_read" or looks_like_media(value)
        elif meaning == "supervision" and role not in ("gpt", "assistant") and value not in (None, False, 0):
            yield f"turn.{key}", True  # of a question, which is never learned
    content = turn.get("value") if turn.get("value") is not None else turn.get("content")
    for part in content if isinstance(content, (list, tuple)) else ():
        for key, value in part.items() if isinstance(part, Mapping) else ():
            is_read = key in ("type", "text", "index") or isinstance(key, str) and is_picture_key(key)
            if not is_read and is_given(value):
                yield f"part.{key}", isinstance(key, str) and bool(_MATTERS.fullmatch(key) or _MEDIA_KEY.fullmatch(key))


def _row_meaning(key: Any) -> str:
    return row_key_meaning(key) if isinstance(key, str) else "unknown"


def looks_like_media(value: Any) -> bool:
    """Whether a value that nothing reads is an image, a video or a sound, or names one."""
    if isinstance(value, (list, tuple)):
        return bool(value) and looks_like_media(value[0])
    if isinstance(value, (bytes, bytearray)):
        return bytes(value[:8]).startswith(_STARTS)
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), (bytes, bytearray)) or looks_like_media(value.get("path"))
    return isinstance(value, str) and bool(_MEDIA_NAME.fullmatch(value))


@functools.lru_cache(maxsize=4096)
def is_picture_key(key: str) -> bool:
    """Whether a part of a content brings its own image under this key."""
    return key in ("path", "url", "file", "source", "data", "base64", "bytes") or bool(_IMAGE_KEY.fullmatch(key))


def picture_of_part(part: Mapping[str, Any]) -> Any:
    """Return the image that an image part brings, or None if it stands for the next image of the row.

    Raises:
        DataError: it brings several, which differ.
    """
    found = [picture_of(value) for key, value in part.items() if is_picture_key(key) and is_given(value)]
    if any(is_other_picture(found[0], other) for other in found[1:]):
        raise DataError(f"an image part names several images: {shown(dict(part))}")
    return found[0] if found else None


def is_other_picture(one: Any, other: Any) -> bool:
    """Whether two references name different images, as far as they themselves say."""
    from vir_hf.images.identity import picture_identity  # brings NumPy and Arrow, which few rows need

    return one is not other and picture_identity(one) != picture_identity(other)


def picture_of(value: Any) -> Any:
    """Return an image as the rest of the package refers to it: a file's name, `{"bytes", "path"}`, or what was given.

    Takes a name, a URL, a data URI, the base64 text of an image file, its bytes, and objects that hold one of these under
    `bytes`, `path`, `url`, `image_url`, `image` or `data`. What it returns, it takes unchanged.

    Raises:
        DataError: a data URI, or a text in the place of bytes, that cannot be decoded.
    """
    if isinstance(value, str):
        data = _embedded(value)
        return value if data is None else {"bytes": data, "path": None}
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"bytes": bytes(value), "path": None}
    if not isinstance(value, Mapping):
        return value
    content = value.get("bytes")
    if isinstance(content, str):
        data = _embedded(content)
        if data is None:
            raise DataError(
                f"an image's bytes must be bytes, found {shown(content)}; JSON has none: write them as base64, or embed "
                "pictures in Parquet"
            )
        return {"bytes": data, "path": value.get("path")}
    if content is None and value.get("path") is None:
        inner = next((value[key] for key in ("url", "image_url", "image", "data") if value.get(key) is not None), None)
        return value if inner is None else picture_of(inner)
    if content is None and isinstance(value["path"], str) and _embedded(value["path"]) is not None:
        return picture_of(value["path"])
    return value


def may_be_embedded(text: str) -> bool:
    """Whether a text may be an image itself rather than its name, from its first characters."""
    return text[:5].lower() == "data:" or text.startswith(_BASE64_STARTS)


def _embedded(text: str) -> bytes | None:
    """Return the file that a data URI or a base64 text holds, or None for any other text."""
    uri = _DATA_URI.match(text[:200]) if text[:5].lower() == "data:" else None
    if uri is None:
        return _bare_base64(text)
    kind = uri["type"].lower()
    if kind.startswith(("video/", "audio/", "text/")):
        raise DataError(f"an image is {shown(text)} of type {kind[:30]}; expected an image")
    content = text[uri.end() :]
    if "base64" not in uri["parameters"].lower():
        return urllib.parse.unquote_to_bytes(content)
    data = _decoded(urllib.parse.unquote(content) if "%" in content else content)
    if data is None:
        raise DataError(f"an image is {shown(text)} whose base64 text cannot be decoded")
    return data


def _bare_base64(text: str) -> bytes | None:
    if len(text) < _SHORTEST_BASE64 or not text.startswith(_BASE64_STARTS) or not _BASE64.fullmatch(text):
        return None
    data = _decoded(text)
    return data if data is not None and data.startswith(_STARTS) else None


def _decoded(text: str) -> bytes | None:
    try:
        text = "".join(text.split())
        altchars = b"-_" if "-" in text or "_" in text else None
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=altchars, validate=True)
    except (binascii.Error, ValueError):
        return None
