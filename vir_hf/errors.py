"""The two errors a user can cause: a recipe that cannot be run and data that cannot be trained on."""

from __future__ import annotations


class RecipeError(ValueError):
    """A recipe (or a command's argument) that cannot be run; the message names the key and the remedy."""


class DataError(ValueError):
    """A file, a row or an image that cannot be used; the message names the file, the row number or id, and the reason."""
