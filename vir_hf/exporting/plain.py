"""Any model that opens here as one plain folder: adapter merged, the Hub's key layout, processor beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vir_hf import files
from vir_hf.errors import RecipeError
from vir_hf.exporting.tensors import StoredTensors, stored_tensors
from vir_hf.llava.configuration_llava import NATIVE_PROJECTOR_TYPE
from vir_hf.llava.processing_llava import LlavaProcessor
from vir_hf.model.adapters import adapter_folder
from vir_hf.model.configs import read_config
from vir_hf.model.for_use import load_processor, load_run
from vir_hf.model.foreign import read_fields
from vir_hf.model.merging import merge_run


@dataclass(frozen=True)
class Plain:
    """A plain folder, read without building the model.

    Attributes:
        fields: its config.json; `text` and `vision` those of its parts.
        tensors: in the Hub's key layout: `language_model.model.*`, `vision_tower.vision_model.*`, `multi_modal_projector.*`.
    """

    folder: Path
    fields: Mapping[str, Any]
    tensors: StoredTensors
    processor: LlavaProcessor

    @classmethod
    def read(cls, folder: Path) -> Plain:
        """Return what a plain folder holds."""
        return cls(folder, read_fields(folder), stored_tensors(folder), load_processor(folder))

    @property
    def text(self) -> dict[str, Any]:
        """The language model's config."""
        return dict(self.fields["text_config"])

    @property
    def vision(self) -> dict[str, Any]:
        """The vision tower's config."""
        return dict(self.fields["vision_config"])

    @property
    def projector_type(self) -> str:
        """A key of `PROJECTORS`."""
        return str(self.fields.get("projector_type", NATIVE_PROJECTOR_TYPE))

    @property
    def feature_layers(self) -> list[int]:
        """The tower's hidden states that the projector reads, counted from 0, which is the embeddings."""
        layers = self.fields["vision_feature_layer"]
        num_layers = self.vision["num_hidden_layers"]
        wanted = [layers] if isinstance(layers, int) else list(layers)
        return [layer if layer >= 0 else num_layers + 1 + layer for layer in wanted]

    @property
    def image_aspect_ratio(self) -> str:
        """How an image becomes a square: `"pad"`, `"crop"` or `"resize"`."""
        image_processor = self.processor.image_processor
        if getattr(image_processor, "do_pad", False):
            return "pad"
        return "crop" if getattr(image_processor, "do_center_crop", False) else "resize"


def write_plain(
    run: str | os.PathLike[str],
    folder: Path,
    *,
    base: str | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
) -> None:
    """Write a run, a checkpoint, an adapter or a model on the Hub into a staging folder as a plain model.

    Args:
        dtype: of the weights; `"auto"` leaves them as they are.

    Raises:
        RecipeError: nothing that opens here lies there.
    """
    name = os.fspath(run)
    if adapter_folder(name, revision) is not None:
        files.take_out(merge_run(name, folder / ".merged", base=base, dtype=dtype, revision=revision).out, folder)
        return
    if base is not None:
        raise RecipeError(f"--base {base}: {run} is a whole model and has no base. Drop --base.")
    if isinstance(dtype, str):
        dtype = saved_dtype(name, revision)
    model, processor = load_run(name, dtype=dtype, device="cpu", revision=revision)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def saved_dtype(name: str, revision: str | None = None) -> torch.dtype:
    """Return the dtype that a model's config says its weights have; fp32 if it says none."""
    config, _ = read_config(name, "run", revision=revision)
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


@contextmanager
def plain_folder(staging: Path, run: str | os.PathLike[str], **options: Any) -> Iterator[Plain]:
    """Give a plain copy of a model below a staging folder; it is gone when the block ends."""
    folder = files.new_folder(staging / ".plain")
    try:
        write_plain(run, folder, **options)
        yield Plain.read(folder)
    finally:
        files.remove_folder(folder)
