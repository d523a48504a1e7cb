"""Optimizer steps over a stream: rows are read as they are needed, each rank and each loader worker from shards of its own.

A stream has no length and no sizes to plan with, so a step holds the next rows of each rank rather than rows that are the
same on every layout, and a run says how long it is with `training.max_steps`. Resuming reads again what was read before, text
only up to the pictures of each step, and goes on with the row after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from vir_hf.batches.planning import shares_prefixes, size_of_row
from vir_hf.batches.sampling import RowSize, fill
from vir_hf.errors import DataError
from vir_hf.recipe.rules import global_batch_size

if TYPE_CHECKING:
    from vir_hf.llava.processing_llava import LlavaProcessor
    from vir_hf.recipe.load import Recipe

logger = logging.getLogger(__name__)

SHUFFLE_BUFFER = 10_000


@dataclass
class StreamPlan:
    """What takes a `StepSampler`'s place where there is nothing to plan with.

    Attributes:
        rows_per_step: the recipe's global batch.
        num_steps: of the whole run.
        sizes: none are known.
        shares_prefixes: rows that begin with the same picture keep its tokens once, so that more fit a token budget.
    """

    rows_per_step: int
    num_steps: int
    seed: int
    num_replicas: int = 1
    rank: int = 0
    micro_batch_rows: int | None = None
    max_tokens_per_batch: int | None = None
    on_bad_row: str = "raise"
    sizes: list[RowSize] = field(default_factory=list)
    group_by: str | None = None
    shares_prefixes: bool = True

    def __len__(self) -> int:
        return self.num_steps


def plan_stream(recipe: Recipe, world_size: int, rank: int) -> StreamPlan:
    """Return the plan of a streamed run; `recipe_rules` and `requirements` have refused what cannot be streamed."""
    training = recipe.training
    if training.group_by_image:
        logger.warning("rows are streamed: those about one picture share it where they meet, none are brought together")
    rows_per_step = global_batch_size(recipe, world_size)
    budget = training.max_tokens_per_batch
    return StreamPlan(
        rows_per_step=rows_per_step,
        num_steps=training.max_steps,
        seed=training.seed if training.data_seed is None else training.data_seed,
        num_replicas=world_size,
        rank=rank,
        micro_batch_rows=None
        if budget
        else min(training.per_device_train_batch_size or 1, rows_per_step // world_size),
        max_tokens_per_batch=budget,
        on_bad_row=recipe.data.on_bad_row,
        shares_prefixes=shares_prefixes(recipe),
    )


class StepStream(IterableDataset[list[list[dict[str, Any]]]]):
    """This rank's rows in optimizer steps, without end: when the stream is through it begins again, shuffled anew."""

    def __init__(self, rows: Any, plan: StreamPlan, processor: LlavaProcessor, max_length: int | None):
        self.rows = rows.shuffle(seed=plan.seed, buffer_size=SHUFFLE_BUFFER)
        self.plan, self.processor, self.max_length = plan, processor, max_length

    def __iter__(self) -> Iterator[list[list[dict[str, Any]]]]:
        step: list[dict[str, Any]] = []
        sizes: list[RowSize] = []
        epoch = 0
        while True:
            self.rows.set_epoch(epoch)
            found_any = False
            for row in self.rows:
                size = self._size(row)
                if size is None:
                    continue
                found_any = True
                step.append(row)
                sizes.append(size)
                if len(step) == self.plan.rows_per_step // self.plan.num_replicas:
                    yield self._cut(step, sizes)
                    step, sizes = [], []
            if not found_any:  # a worker without a shard of its own
                return
            epoch += 1

    def _size(self, row: dict[str, Any]) -> RowSize | None:
        try:
            return size_of_row(row, self.processor, self.max_length)
        except DataError as error:
            if self.plan.on_bad_row == "raise":
                raise
            logger.warning("left out: %s", error)
            return None

    def _cut(self, rows: list[dict[str, Any]], sizes: list[RowSize]) -> list[list[dict[str, Any]]]:
        if self.plan.max_tokens_per_batch is None:
            size = self.plan.micro_batch_rows or 1
            return [rows[start : start + size] for start in range(0, len(rows), size)]
        bins = fill(range(len(rows)), sizes, self.plan.max_tokens_per_batch, self.plan.shares_prefixes)
        return [[rows[number] for number in numbers] for numbers in bins]


@dataclass
class _Collate:
    """Collates each micro-batch of a step; a stream's rows have no numbers to read them again by."""

    collator: Callable[[list[Any]], dict[str, Any]]

    def __call__(self, step: list[list[dict[str, Any]]]) -> dict[str, Any]:
        return {"micro_batches": [self.collator(rows) for rows in step]}


def stream_loader(
    rows: Any,
    plan: StreamPlan,
    collator: Any,
    **kwargs: Any,
) -> DataLoader[Any]:
    """Return a loader whose items are whole optimizer steps of this rank, as `StepLoader`'s are."""
    stream = StepStream(rows, plan, collator.processor, collator.max_length)
    generator = torch.Generator().manual_seed(0)  # its own, as StepLoader's
    return DataLoader(stream, batch_size=None, collate_fn=_Collate(collator), generator=generator, **kwargs)
