"""The loss of rows that were held out: how likely a model finds their answers, row by row, with and without their images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from vir_hf.errors import DataError, shown
from vir_hf.images.folder import ImageFolder
from vir_hf.images.opening import open_image
from vir_hf.inference import Answerer
from vir_hf.rows.encoding import IGNORE, encode_with_images

GREY = (127, 127, 127)


def row_losses(
    answerer: Answerer,
    rows: Sequence[Mapping[str, Any]],
    folder: str,
    *,
    blank: bool = False,
    progress: Callable[[int], None] = lambda num: None,
) -> np.ndarray:
    """Return `(rows, 3)`: the sum of the loss over a row's supervised tokens, how many there are, and how many are the likeliest.

    Each row is computed by itself, so that no batch changes a bit. A row's tokens are those of training.

    Args:
        blank: a grey image of the same size in place of each.

    Raises:
        DataError: a row that cannot be trained on, or an image that cannot be opened.
    """
    images = ImageFolder(folder)
    found = []
    for row in rows:
        try:
            found.append(_row_loss(answerer, row, images, blank))
        except DataError as error:
            raise DataError(f"row {shown(row.get('id', ''))}: {error}") from error
        progress(1)
    return np.array(found, dtype=float).reshape(-1, 3)


@torch.inference_mode()
def _row_loss(answerer: Answerer, row: Mapping[str, Any], images: ImageFolder, blank: bool) -> list[float]:
    model, processor = answerer.model, answerer.processor
    encoded, sources = encode_with_images(row, processor, max_length=answerer.context_length)
    opened = [open_image(source, images) for source in sources]
    if blank:
        opened = [Image.new("RGB", image.size, GREY) for image in opened]
    device = model.get_input_embeddings().weight.device
    inputs: dict[str, Any] = {"input_ids": torch.tensor([encoded["input_ids"]], device=device)}
    if opened:
        inputs["pixel_values"] = answerer.pixels(opened).to(device)
    logits = model(**inputs, use_cache=False).logits[0, :-1].float()
    labels = torch.tensor(encoded["labels"][1:], device=device)
    is_learned = labels != IGNORE
    logits, labels = logits[is_learned], labels[is_learned]
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return [float(loss), float(len(labels)), float((logits.argmax(-1) == labels).sum())]
