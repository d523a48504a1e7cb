"""JSON files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vir_hf.errors import RecipeError


def refuse_output(path: str | None, option: str, inputs: Sequence[str]) -> None:
    """Raise a `RecipeError` before the work begins if a file cannot be written there, or would replace what is read.

    Args:
        path: what the option was given; None and `-`, the terminal, are fine.
        option: as typed, such as `--json`.
        inputs: files that the command reads, or writes for another option.
    """
    if path is None or path == "-":
        return
    if os.path.isdir(path):
        raise RecipeError(f"{option} {path}: is a folder; expected the name of a file.")
    if any(os.path.realpath(path) == os.path.realpath(other) for other in inputs):
        raise RecipeError(
            f"{option} {path}: would overwrite a file that this command reads or writes. Name another file."
        )
    was_there = os.path.exists(path)
    try:
        with open(path, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise RecipeError(
            f"{option} {path}: cannot be written ({error.strerror}). Name a file in a folder that is there."
        ) from None
    if not was_there:
        os.remove(path)


def write_json(path: Path, value: Any, *, indent: int = 2, ensure_ascii: bool = False) -> None:
    """Write JSON under a temporary name and rename it; the folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=indent, ensure_ascii=ensure_ascii) + "\n", encoding="utf-8")
    os.replace(temporary, path)
