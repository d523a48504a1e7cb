"""Rules between the keys that say how images are cut into views."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vir_hf.errors import RecipeError

if TYPE_CHECKING:
    from vir_hf.recipe.load import DataSection, ModelSection


def check_views(model: ModelSection, data: DataSection) -> None:
    """Raise for a way of cutting that contradicts another key.

    Raises:
        RecipeError: naming the key and the remedy.
    """
    chosen = ["tiling"] * (model.tiling != "none") + ["pixel_shuffle"] * (model.pixel_shuffle != 1)
    if model.name_or_path and chosen:
        raise RecipeError(
            f"model.{chosen[0]}: is set, but a whole model (model.name_or_path) brings its own. Remove the key, or join parts "
            "with model.language_model and model.vision_tower."
        )
    if model.tiling == "none":
        return
    if model.image_aspect_ratio == "crop":
        raise RecipeError(
            "model.tiling: tiles show the whole image, but model.image_aspect_ratio=crop cuts its ends away. Set "
            "model.image_aspect_ratio=pad or resize, or model.tiling=none."
        )
    if data.allow_urls:
        raise RecipeError(
            "model.tiling: an image's tokens depend on its size, which is not known of one behind a URL. Download the images "
            "(vir-hf data prepare) and set data.allow_urls=false, or set model.tiling=none."
        )
