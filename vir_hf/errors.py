"""The two errors a user can cause: a recipe that cannot be run and data that cannot be trained on."""

from __future__ import annotations


class RecipeError(ValueError):
    """A recipe (or a command's argument) that cannot be run; the message names the key and the remedy."""


class DataError(ValueError):
    """A file, a row or an image that cannot be used; the message names the file, the row number or id, and the reason."""

    def __str__(self) -> str:
        # torch hands on what a data loader's worker raised with the worker's traceback as the message; its end is the message.
        text = super().__str__()
        is_handed_on = text.startswith("Caught ") and "Original Traceback" in text
        return text.rpartition("DataError: ")[2].strip() if is_handed_on else text


class ImageError(DataError):
    """A picture that cannot be used. `kind` is the word the data check counts it under, such as `image_missing`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = message

    def __str__(self) -> str:
        return self.message


class RunError(RuntimeError):
    """A run that could not go on: a full disk, bad numbers, no memory. The message says what is left and what to do."""
