"""The smallest change that makes a recipe fit, as the override to type."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vir_hf.budget.estimator import Estimator
from vir_hf.errors import RecipeError
from vir_hf.recipe.load import load_recipe

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe

_SLOWER = "the same result, computed in smaller pieces"


@dataclass(frozen=True)
class Change:
    """Overrides that make a recipe fit, checked by planning again with them; bytes a device then needs."""

    overrides: tuple[str, ...]
    required: int
    config: str
    note: str = ""


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Return the recipe with more keys typed after it, through the same door as the command line.

    Raises:
        RecipeError: the keys contradict the recipe.
    """
    with tempfile.TemporaryDirectory(prefix="vir_hf_recipe_") as scratch:
        path = os.path.join(scratch, "recipe.yaml")
        recipe.save(path)
        return load_recipe(overrides, recipe_file=path, require_data=False)


def smallest_change(estimator: Estimator, memory_bytes: int) -> Change | None:
    """Return the first of ever larger changes with which the recipe fits, `None` if none of them is enough."""
    for overrides, note in _candidates(estimator):
        change = _tried(estimator, list(overrides), memory_bytes)
        if change is not None:
            return replace(change, note=note)
    return None


def _tried(estimator: Estimator, overrides: list[str], memory_bytes: int) -> Change | None:
    """Return the overrides, with a smaller micro-batch if that takes it, if the recipe fits with them."""
    try:
        again = estimator.with_recipe(with_overrides(estimator.recipe, overrides))
        if again.settle(memory_bytes).estimate.required > memory_bytes:
            if again.recipe.training.max_tokens_per_batch is not None:
                return None
            rows = max(_rows_that_divide(again, again.largest_micro_batch(memory_bytes, one)) for one in again.layouts)
            if not rows:
                return None
            overrides.append(f"training.per_device_train_batch_size={rows}")
            again = estimator.with_recipe(with_overrides(estimator.recipe, overrides))
    except RecipeError:  # keys that contradict the recipe: not a change to propose
        return None
    choice = again.settle(memory_bytes)
    if choice.estimate.required > memory_bytes:
        return None
    return Change(tuple(overrides), choice.estimate.required, choice.layout.name)


def _rows_that_divide(estimator: Estimator, most: int) -> int:
    """The largest micro-batch of at most `most` rows that deals a rank's share of the step out evenly; 0 if none."""
    training = estimator.recipe.training
    accumulation = training.arguments.get("gradient_accumulation_steps") or 1
    share = max(1, estimator.rows_per_step // estimator.world_size // accumulation)
    most = min(most, int(training.per_device_train_batch_size))
    return next((rows for rows in range(most, 0, -1) if share % rows == 0), 0)


def _candidates(estimator: Estimator) -> Iterator[tuple[list[str], str]]:
    """Yield overrides from the least to the most that they change about the run."""
    recipe = estimator.recipe
    budget = recipe.training.max_tokens_per_batch
    tokens = int(recipe.training.max_length or 2048)
    pieces: list[str] = []
    if budget:
        for size in _smaller(int(budget), tokens):
            yield [f"training.max_tokens_per_batch={size}"], _SLOWER
        pieces = [f"training.max_tokens_per_batch={tokens}"]
    else:
        yield [], _SLOWER
    base: list[str] = []
    if estimator.said_checkpointing is False:
        base = ["training.activation_checkpointing=true"]
        yield [*pieces, *base], "the same result; about a third more time"
    how = recipe.trainable.language_model
    on_gpu = estimator.device.kind == "cuda"
    light_optimizer = ["training.optim=paged_adamw_8bit"]
    takes_light = how in ("full", "lora") and on_gpu and not estimator.optimizer.endswith("8bit")
    if takes_light:
        yield [*pieces, *base, *light_optimizer], "optimizer states in 8 bit"
    if how == "full":
        base = [*base, "trainable.language_model=lora"]
        yield [*pieces, *base], "an adapter learns in place of all weights"
    if recipe.quantization.bits != 4 and on_gpu:
        base = [*base, "model.load_in_4bit=true"]
        yield [*pieces, *base], "the language model's weights in 4 bit"
    if takes_light:
        base = [*base, *light_optimizer]
        yield [*pieces, *base], "and the optimizer's states in 8 bit"
    for length in _smaller(tokens, estimator.model.num_image_tokens + 128):
        pieces = [f"training.max_tokens_per_batch={length}"] if budget else []
        yield [*pieces, *base, f"training.max_length={length}"], "longer rows lose text turns from their end"


def _smaller(start: int, floor: int) -> list[int]:
    """Three quarters, half, three eighths and a quarter of `start`, down to `floor`."""
    return [size for size in (start * 3 // 4, start // 2, start * 3 // 8, start // 4) if size >= floor]
