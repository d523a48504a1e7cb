"""Recipes, models and one packed batch on tiny parts, and quiet training runs, for the tests of loading and learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch

NF4 = {"quantization": "nf4", "quantization.only_on_cuda": "false"}
UNQUANTIZED = {"quantization": "none", "quantization.only_on_cuda": "false"}


def recipe_for(root: Path, output_dir: Path, **changes: object) -> Any:
    """The typed recipe over tiny parts; nothing is quantised unless `changes` say so. `None` leaves a key out."""
    from vir_hf.recipe.load import load_recipe

    values: dict[str, object] = {
        **({} if "quantization" in changes else UNQUANTIZED),
        "training.logging_steps": 1,
        "training.save_strategy": "'no'",
        **changes,
    }
    overrides = tiny.training_overrides(root, output_dir, **values)
    return load_recipe([override for override in overrides if not override.endswith("=None")])


def load(root: Path, output_dir: Path, **changes: object) -> tuple[Any, Any, Any]:
    """Model, processor and recipe, before anything is frozen."""
    from vir_hf.model.for_training import load_model_and_processor
    from vir_hf.model.precision import choose_precision

    recipe = recipe_for(root, output_dir, **changes)
    model, processor = load_model_and_processor(recipe, choose_precision(recipe.model.dtype))
    return model, processor, recipe


def run(root: Path, output_dir: Path, callbacks: tuple[Any, ...] = (), **changes: object) -> dict[str, Any]:
    """Train and return the metrics."""
    from vir_hf.training.run import train

    return train(recipe_for(root, output_dir, **changes), callbacks=callbacks)


def packed_batch(root: Path, processor: Any, num_rows: int = 5) -> dict[str, torch.Tensor]:
    """One padding-free batch of the tiny rows, a text-only row among them."""
    from vir_hf.batches.collator import LlavaDataCollator
    from vir_hf.data.sources import load_llava_dataset

    rows = load_llava_dataset(root / "rows.json", root / "images", decode_images=False)
    batch = LlavaDataCollator(processor, max_length=256)([rows[number] for number in range(num_rows)])
    return dict(batch)


def loss_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean loss over supervised positions, from the model's own hidden states and head."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = inner.model(**inputs, use_cache=False).last_hidden_state
    logits = inner.lm_head(hidden)[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["labels"][:, 1:].flatten())


def logits_of(model: Any, root: Path, processor: Any) -> torch.Tensor:
    """Logits for one question about a picture, in eval mode."""
    from PIL import Image

    picture = Image.open(sorted((root / "images").glob("*.png"))[0]).convert("RGB")
    inputs = processor(images=[picture], text="<s> USER: <image>\nWhat is it? ASSISTANT:", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits
