"""How many tokens each image of a row takes: asked here by everything that writes, cuts, counts or packs rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vir_hf.errors import DataError, ImageError


def image_lengths(images: Sequence[Any], processor: Any) -> list[int]:
    """Return the tokens of each image, in order; its header is read only where they depend on its size.

    Args:
        images: what `open_image` takes.
        processor: with `views`, or with `num_image_tokens` for images that all take the same number.

    Raises:
        DataError: an image whose header cannot be read, or of a shape that cannot be cut into views.
    """
    views = getattr(processor, "views", None)
    if views is None or views.is_fixed:
        return [processor.num_image_tokens] * len(images)
    return [views_of_image(image, processor).num_tokens for image in images]


def views_of_image(image: Any, processor: Any) -> Any:
    """Return the `ImageViews` of one image, from its header.

    Raises:
        DataError: as `image_lengths`.
    """
    from vir_hf.images.sizes import upright_size

    if processor.views.is_fixed:
        return processor.views.of(0, 0)
    try:
        return processor.views.of(*upright_size(image))
    except ImageError:
        raise
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"image: {error}") from error


def in_words(lengths: Sequence[int]) -> str:
    """Return what a message says of some images' tokens."""
    if len(set(lengths)) == 1:
        return f"{len(lengths)} images of {lengths[0]} tokens"
    return f"{len(lengths)} images of {sum(lengths)} tokens in all"
