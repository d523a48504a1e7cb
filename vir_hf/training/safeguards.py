"""What a step may run into, bad numbers and no memory, and what then happens to it."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vir_hf import files
from vir_hf.batches.sampling import StepDataset, StepPlan, collate
from vir_hf.errors import RunError
from vir_hf.training.checkpoints import what_is_left

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
_SHOWN_ROWS = 16


@dataclass
class NumberGuard:
    """What is done with a step whose loss or gradient is not finite, before it reaches the weights.

    Args:
        policy: `"raise"`, saving the batch, or `"skip"` the step.
        max_skipped_steps: how many may be skipped in a run.
        output_dir: where the batch is saved, in `bad_numbers/`.
        skipped: the steps skipped so far, with their row ids.
    """

    policy: str
    max_skipped_steps: int
    output_dir: Path
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def handle(
        self, step: int, micro_batches: Sequence[Batch], losses: Sequence[float], grad_norm: float, rank: int
    ) -> None:
        """Skip the step, or raise.

        Args:
            step: the number of the step, from 1.
            micro_batches: this rank's share of it; empty if the bad loss is another rank's.
            losses: one a micro-batch.
            grad_norm: over all ranks.
            rank: this process's.

        Raises:
            RunError: the policy is to raise, or too many steps were skipped.
        """
        suspects = [batch for batch, loss in zip(micro_batches, losses, strict=True) if not is_finite(loss)] or list(
            micro_batches
        )
        row_ids = [row for batch in suspects for row in batch.get("row_ids", ())]
        what = f"step {step}: loss {sum(losses):.4g}, gradient norm {grad_norm:.4g}, with {name_rows(row_ids)}"
        if self.policy == "skip":
            self.skipped.append({"step": step, "rows": row_ids})
            if len(self.skipped) <= self.max_skipped_steps:
                logger.warning("%s: skipped, the weights stay as they are", what)
                return
        if not micro_batches:
            raise RunError(f"step {step}: bad numbers on another rank, which says more")
        facts = {"step": step, "rank": rank, "losses": [repr(loss) for loss in losses], "grad_norm": repr(grad_norm)}
        saved = self._save(suspects, {**facts, "row_ids": row_ids})
        after = f", after {self.max_skipped_steps} skipped steps (training.max_skipped_steps)"
        raise RunError(
            f"{what}{after if self.policy == 'skip' else ''}. The weights were not touched. {what_is_left(self.output_dir)} "
            f"The batch lies in {saved}. Look at these rows, lower training.learning_rate, or set "
            "training.on_bad_numbers=skip; then add --resume."
        )

    def _save(self, batches: Sequence[Batch], facts: dict[str, Any]) -> Path:
        """Write the batch (tensors and lists only) and what is known of it; return the first file."""
        folder = self.output_dir / "bad_numbers"
        path = folder / f"step-{facts['step']}-rank-{facts['rank']}.pt"
        if path.exists():  # of an earlier run
            path = path.with_stem(f"{path.stem}-{uuid.uuid4().hex[:6]}")
        on_cpu = [
            {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
            for batch in batches
        ]
        with files.writing(path) as temporary:
            torch.save(on_cpu, temporary)
        files.write_json(path.with_suffix(".json"), facts, ensure_ascii=True)
        return path


@dataclass
class MemoryGuard:
    """What is done when a micro-batch does not fit into memory.

    Args:
        policy: `"raise"`, naming the override that would help, or `"split"`: the step begins again with that micro-batch in
            two halves, so that nothing is counted twice; later ones as large are halved beforehand.
        rows: the data set that row numbers refer to.
        collator: makes the halves.
        smallest_failed: tokens of the smallest micro-batch that did not fit.
        num_splits: how often a micro-batch was halved.
    """

    policy: str
    rows: Any
    collator: Callable[[list[Any]], Batch]
    smallest_failed: int | None = None
    num_splits: int = 0

    def fitting(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        """Return the micro-batches, with those as large as one that failed before in halves."""
        fitting: list[Batch] = []
        waiting = list(micro_batches)
        while waiting:
            batch = waiting.pop(0)
            if self.smallest_failed is None or num_tokens(batch) < self.smallest_failed or not can_be_halved(batch):
                fitting.append(batch)
            else:
                waiting = self.halves(batch) + waiting
        return fitting

    def halves(self, batch: Batch) -> list[Batch]:
        """Return the batch's rows as two batches."""
        numbers = list(batch["row_numbers"])
        middle = len(numbers) // 2
        self.num_splits += 1
        plan = StepPlan((tuple(numbers[:middle]), tuple(numbers[middle:])))
        return [collate(rows, self.collator) for rows in StepDataset(self.rows)[plan]]

    def failed(self, batch: Batch) -> None:
        """Remember a micro-batch that did not fit."""
        self.smallest_failed = min(self.smallest_failed or num_tokens(batch), num_tokens(batch))

    def error(self, step: int, batch: Batch, settings: Any, why: str) -> RunError:
        """Return the error that names the micro-batch and the overrides that would help."""
        rows = list(batch.get("row_ids", ()))
        per_device = settings.per_device_train_batch_size
        remedies = []
        if len(rows) > 1:
            remedies.append(
                f"training.per_device_train_batch_size={max(1, min(per_device, len(rows)) // 2)} (a step keeps its rows)"
            )
            if self.policy == "raise" and settings.world_size == 1:
                remedies.append("training.on_out_of_memory=split")
        if not settings.activation_checkpointing:
            remedies.append("training.activation_checkpointing=true")
        remedies.append("quantization=nf4 with LoRA" if len(rows) > 1 else "a smaller training.max_length")
        return RunError(
            f"step {step}: out of memory in a micro-batch of {len(rows)} row(s) and {num_tokens(batch):,} tokens "
            f"({name_rows(rows)}){why}. {what_is_left(Path(settings.output_dir))} Set {', or '.join(remedies)}, and add --resume."
        )


def can_be_halved(batch: Batch) -> bool:
    """Whether the batch has two rows or more."""
    return len(batch.get("row_numbers", ())) > 1


def num_tokens(batch: Batch) -> int:
    """Return how many positions the model computes for a batch."""
    return int(batch["input_ids"].numel())


def is_finite(value: float) -> bool:
    """Whether it is a number and not infinite."""
    return value == value and abs(value) != float("inf")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on a CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def name_rows(row_ids: Sequence[str]) -> str:
    """Return row ids for a message; many are cut short."""
    shown = ", ".join(str(row) for row in row_ids[:_SHOWN_ROWS])
    more = f" and {len(row_ids) - _SHOWN_ROWS} more" if len(row_ids) > _SHOWN_ROWS else ""
    return f"rows {shown}{more}"
