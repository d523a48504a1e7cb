"""What a user asks an export for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Request:
    """What is to be exported, and how.

    Attributes:
        base: where an adapter's base lies now, if it has been moved.
        dtype: of the weights; `"auto"` leaves them as they are.
        verify: prove it.
        images: of the proof; built-in ones by default.
        quantization: of a GGUF's large weights, a key of `QUANTIZATIONS`.
        accepts_padding: llama.cpp may make an image a square in its own way.
        accepts_class_token: llama.cpp has the fix of its issue 25814, or what it sees of a CLIP tower does not matter.
    """

    run: str
    to: str
    base: str | None = None
    revision: str | None = None
    dtype: torch.dtype | str = "auto"
    verify: bool = True
    images: Sequence[str] = ()
    quantization: str = "f16"
    accepts_padding: bool = False
    accepts_class_token: bool = False

    @property
    def source(self) -> dict[str, Any]:
        """What names the run for `write_plain`."""
        return {"base": self.base, "dtype": self.dtype, "revision": self.revision}
