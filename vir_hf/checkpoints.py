"""What a run leaves behind: a model that opens anywhere, its processor and its recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vir_hf.recipe import Recipe


def save_run(model: Any, processor: Any, recipe: Recipe, folder: Path) -> None:
    """Write model (or adapter and projector), processor and the resolved recipe to the output directory."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    recipe.save(folder / "recipe.yaml")
