"""Text that comes from data, made safe to print: a row must not steer the terminal of whoever looks at it."""

from __future__ import annotations

import re

# C0 and C1 controls but for tab and newline; marks, embeddings, overrides and isolates of direction.
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Return the text with what steers a terminal, or turns the direction of writing, as the escapes of a Python string."""
    return _STEERING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
