"""Boxes in a model's answers, written in the form that the reader asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vir_hf.data.reading import Reading
from vir_hf.errors import DataError, RecipeError
from vir_hf.images.opening import ImageSource, open_image
from vir_hf.model.adapters import folders_of_run
from vir_hf.recipe.files import read_yaml
from vir_hf.rows.boxes import BoxChange, BoxForm


def change_of_answers(model: str, wanted: str, written: str | None = None) -> BoxChange:
    """Return how boxes in the answers of a model become boxes in a form.

    Args:
        wanted: the form to write, such as `pixel xyxy`.
        written: the form the model writes; by default its run's recipe says so, in `data.boxes`.

    Raises:
        RecipeError: a form that cannot be read, or nothing says how the model writes boxes.
    """
    target = BoxForm.of(wanted, "--boxes")
    if written is not None:
        return BoxChange(BoxForm.of(written, "--model-boxes"), target)
    for folder in folders_of_run(Path(model)):
        if (folder / "recipe.yaml").is_file():
            keys = (read_yaml(folder / "recipe.yaml").get("data") or {}).get("boxes")
            trained = Reading.of(boxes=keys).boxes
            if trained is not None:
                return BoxChange(trained.written, target, trained.has_points)
    raise RecipeError(
        f"--boxes {wanted}: nothing says how {model} writes boxes (its recipe has no data.boxes). Say it with --model-boxes, "
        "such as --model-boxes '0-1000 xyxy'."
    )


def with_boxes_changed(text: str, images: Sequence[ImageSource], change: BoxChange) -> str:
    """Return an answer with its boxes in another form, by the size of its images; without an image as it is.

    Raises:
        DataError: images of several sizes, so that nothing says of which the boxes are.
    """
    if not images or change.apply(text, (1, 1))[1] == 0:
        return text
    sizes = {open_image(image).size for image in images}
    if len(sizes) > 1:
        raise DataError("the question has images of several sizes, and nothing says of which one a box is; ask of one.")
    return change.apply(text, sizes.pop())[0]
