"""What a run is fed: its rows, checked, the plan of its steps over them, and the collator."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

from vir_hf.batches.collator import LlavaDataCollator
from vir_hf.batches.planning import measure_rows, plan_steps
from vir_hf.batches.sampling import RowSize, StepSampler
from vir_hf.batches.streaming import StreamPlan, plan_stream
from vir_hf.curation.image_check import leave_out_broken_pictures
from vir_hf.data.located import MIXTURE, BadRow, BadRowPolicy
from vir_hf.data.sources import load_recipe_rows, share_of_stream
from vir_hf.images.preprocessing import ImagePreprocessor
from vir_hf.llava.processing_llava import LlavaProcessor
from vir_hf.training import ranks
from vir_hf.training.held_out import split_by_image

if TYPE_CHECKING:
    from datasets import Dataset

    from vir_hf.recipe.load import Recipe


logger = logging.getLogger(__name__)


def rows_and_plan(
    recipe: Recipe,
    processor: LlavaProcessor,
    bad_rows: list[BadRow],
    bad_eval_rows: list[BadRow],
    world_size: int,
    rank: int,
) -> tuple[Any, StepSampler | StreamPlan, Dataset | None]:
    """Return the training rows, images as references, this rank's plan of the steps over them, and the rows to evaluate on.

    Args:
        bad_rows, bad_eval_rows: receive the rows left out.
    """
    rows = load_recipe_rows(recipe, bad_rows, tell=print if rank == 0 else logger.info)
    if recipe.data.streaming:
        plan = plan_stream(recipe, world_size, rank)
        return share_of_stream(rows, rank, world_size), plan, load_eval_rows(recipe, processor, bad_eval_rows)
    rows, sizes = usable_rows(rows, recipe, processor, bad_rows)
    if recipe.data.eval_fraction is None:
        eval_rows = load_eval_rows(recipe, processor, bad_eval_rows)
    else:
        rows, sizes, eval_rows = hold_out(rows, sizes, recipe, is_main=rank == 0)
    return rows, plan_steps(recipe, sizes, processor, world_size, rank), eval_rows


def hold_out(
    rows: Dataset, sizes: list[RowSize], recipe: Recipe, *, is_main: bool
) -> tuple[Dataset, list[RowSize], Dataset]:
    """Return the rows to train on, their sizes, and `data.eval_fraction` of the rows, with other images, to evaluate on."""
    fraction, seed = float(recipe.data.eval_fraction or 0), int(recipe.training.seed)
    kept, held_out = ranks.rank_0(
        lambda: split_by_image(rows, fraction, seed, allow_urls=recipe.data.allow_urls), is_main=is_main
    )
    if is_main:
        logger.info(
            "%d of %d rows are held out to be evaluated on; no image is on both sides", len(held_out), len(rows)
        )
    return rows.select(kept), [sizes[number] for number in kept], rows.select(held_out)


def usable_rows(
    rows: Dataset, recipe: Recipe, processor: LlavaProcessor, bad_rows: list[BadRow]
) -> tuple[Dataset, list[RowSize]]:
    """Return the rows whose pictures open and that can be encoded, and their sizes; the others as the recipe says."""
    if recipe.data.check:
        policy = BadRowPolicy(recipe.data.on_bad_row, recipe.data.on_bad_image, recipe.data.max_bad_fraction)
        rows = leave_out_broken_pictures(rows, policy, recipe.data.data_path or MIXTURE, bad_rows=bad_rows)
    return measure_rows(rows, processor, recipe, bad_rows)


def load_eval_rows(recipe: Recipe, processor: LlavaProcessor, bad_rows: list[BadRow]) -> Dataset | None:
    """Return the rows of `data.eval_path`, checked and left out like training rows, or `None`.

    Args:
        bad_rows: receives the rows left out.
    """
    if recipe.data.eval_path is None:
        return None
    like_training = evaluation_recipe(recipe)
    rows = load_recipe_rows(like_training, bad_rows)
    return usable_rows(rows, like_training, processor, bad_rows)[0]


def evaluation_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with the evaluation rows where the training rows are named, so that both are read in one way."""
    changed = copy.deepcopy(recipe)
    changed.data.data_path, changed.data.sources = recipe.data.eval_path, None
    changed.data.image_folder = recipe.data.eval_image_folder or recipe.data.image_folder
    changed.data.max_rows, changed.data.streaming = None, False
    # What chooses among the training rows; how rows are written (format, columns, boxes) is the same for both.
    changed.data.name = changed.data.split = changed.data.filter = changed.data.deduplicate = None
    return changed


def make_collator(recipe: Recipe, processor: LlavaProcessor) -> LlavaDataCollator:
    """Return the collator the recipe describes."""
    training = recipe.training
    return LlavaDataCollator(
        processor,
        max_length=training.max_length,
        padding_free=training.padding_free,
        share_prefixes=training.padding_free if training.share_prefixes is None else training.share_prefixes,
        on_bad_image=recipe.data.on_bad_image,
        preprocess=ImagePreprocessor(processor.image_processor, allow_urls=recipe.data.allow_urls),
        with_row_ids=True,
    )
