"""A whole run on tiny parts: trained until it has learned its rows, with recipe, metrics and processor beside the model."""

from __future__ import annotations

from pathlib import Path

import tiny

QUESTION = "What is it?"


def train_run(root: Path, output_dir: Path, **changes: object) -> Path:
    """Train every weight but the tower's on the rows under `root`, a few seconds, and return the run's folder."""
    from vir_hf.recipe.load import load_recipe
    from vir_hf.training.run import train

    values: dict[str, object] = {
        "lora": "none",
        "quantization": "none",
        "trainable.language_model": "full",
        "trainable.projector": "full",
        "training.max_steps": 80,
        "training.global_batch_size": 12,
        "training.per_device_train_batch_size": 12,
        "training.learning_rate": 5e-3,
        "training.projector_learning_rate": 5e-3,
        "training.logging_steps": 10,
        "training.save_strategy": "'no'",
        **changes,
    }
    train(load_recipe(tiny.training_overrides(root, output_dir, **values)))
    return output_dir


def pictures(root: Path) -> list[str]:
    """Return the drawn pictures' paths."""
    return [str(path) for path in sorted((root / "images").glob("*.png"))]
