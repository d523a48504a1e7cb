"""Rules of evaluation during training: which rows are held out, and what stops a run early."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vir_hf.errors import RecipeError

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe


def check_held_out(recipe: Recipe) -> None:
    """Raise for rows to hold out that cannot be chosen, and for a patience that nothing is compared by."""
    data, training = recipe.data, recipe.training
    if data.eval_fraction is not None:
        if not 0 < data.eval_fraction <= 0.5:
            raise RecipeError(
                f"data.eval_fraction: {data.eval_fraction:g} of the rows; expected more than 0 and at most 0.5. Set "
                "data.eval_fraction=0.05."
            )
        if data.eval_path:
            raise RecipeError(
                "data.eval_fraction: is set, but data.eval_path names rows to evaluate on. Remove one of the two."
            )
        if data.streaming:
            raise RecipeError(
                "data.eval_fraction: a stream is not split by its images, which would have to be known beforehand. Set "
                "data.eval_path=ROWS.json, or data.streaming=false."
            )
    patience = training.early_stopping_patience
    if patience is not None and (patience < 1 or training.eval_strategy == "no"):
        raise RecipeError(
            f"training.early_stopping_patience: {patience}; expected 1 or more evaluations without a better one, and rows to "
            "evaluate on. Set data.eval_fraction=0.05 and training.early_stopping_patience=3."
        )
    if training.panel_size < 0:
        raise RecipeError(f"training.panel_size: {training.panel_size}; expected 0 (no panel) or more questions.")
