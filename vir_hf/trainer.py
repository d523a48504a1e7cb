"""`LlavaTrainer`: TRL's `SFTTrainer` fed whole optimizer steps, with the loss on supervised positions only.

The data loader hands over one optimizer step at a time, already cut into micro-batches, so that the rows of a step never
depend on how many micro-batches or ranks compute it, and so that the position in the data is the step number.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from trl import SFTConfig, SFTTrainer

from vir_hf.sampling import StepLoader, StepSampler

logger = logging.getLogger(__name__)

IGNORED = -100
# What a batch may carry beside the model's inputs.
_NOT_FOR_THE_MODEL = ("row_ids", "masked_rows")


@dataclass
class StepStatistics:
    """Counts since the last log line and since the start of the run."""

    supervised_tokens: int = 0
    computed_tokens: int = 0
    real_tokens: int = 0
    rows: int = 0
    images: int = 0
    data_seconds: float = 0.0
    masked_rows: list[str] = field(default_factory=list)
    unsupervised_micro_batches: int = 0

    def add(self, other: StepStatistics) -> None:
        for name in ("supervised_tokens", "computed_tokens", "real_tokens", "rows", "images", "data_seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.masked_rows += other.masked_rows
        self.unsupervised_micro_batches += other.unsupervised_micro_batches


def compact_supervised(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs with labels of the supervised positions only, for a packed row.

    Position p is scored against label p + 1. The model returns hidden states at the supervised p's and one more that the
    shift drops, so the usual shifted loss over the shorter row is the loss over the whole one.
    """
    labels = inputs["labels"]
    positions = (labels[0, 1:] != IGNORED).nonzero().squeeze(1)
    targets = labels[0, 1:][positions]
    if not len(positions):  # one scored position whose label is ignored: a loss of zero that still has a gradient
        positions = positions.new_zeros(1)
        targets = labels.new_full((1,), IGNORED)
    filler = positions.new_zeros(1)
    return {
        **inputs,
        "supervised_positions": torch.cat([positions, filler]),
        "labels": torch.cat([labels.new_full((1,), IGNORED), targets]).unsqueeze(0),
    }


class LlavaTrainer(SFTTrainer):
    """TRL's trainer for `LlavaForCausalLM`.

    Args:
        step_sampler: plans every optimizer step of this rank.
        parameter_groups: makes the optimizer's groups of a model; all trainable weights at one rate if `None`.
        supervised_positions_only: score only positions with a label, on the CPU too.
    """

    def __init__(
        self,
        *args: Any,
        step_sampler: StepSampler,
        parameter_groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None,
        supervised_positions_only: bool = True,
        **kwargs: Any,
    ):
        self.step_sampler = step_sampler
        self.supervised_positions_only = supervised_positions_only
        self._parameter_groups = parameter_groups
        self._since_log, self.totals = StepStatistics(), StepStatistics()
        self._log_time = time.perf_counter()
        super().__init__(*args, **kwargs)
        # TRL casts the trainable weights of a quantised model to bf16, where two thirds of small updates are lost.
        if not self.is_deepspeed_enabled:
            for parameter in self.model.parameters():
                if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                    parameter.data = parameter.data.float()

    def get_train_dataloader(self) -> StepLoader:
        """One item a step; never sharded by accelerate, since the sampler already plans for this rank."""
        workers = self.args.dataloader_num_workers
        return StepLoader(
            self.train_dataset,
            self.step_sampler,
            self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=(self.args.dataloader_prefetch_factor or 2) if workers else None,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Fetch the next step, timing how long training waits for its data."""
        start = time.perf_counter()
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._since_log.data_seconds += time.perf_counter() - start
        return samples, num_items

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        """Supervised tokens of the whole step, over all ranks."""
        local = sum(
            int((batch["labels"][..., 1:] != IGNORED).sum()) for step in batch_samples for batch in step["micro_batches"]
        )
        count = torch.tensor(local, device=device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run all micro-batches of one optimizer step; gradients are reduced across ranks with the last one."""
        micro_batches = inputs["micro_batches"]
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(micro_batches):
            is_last = number == len(micro_batches) - 1
            loss = self._micro_step(model, self._counted(batch), num_items_in_batch, is_last)
            total = total + loss
        return total

    def _micro_step(
        self, model: nn.Module, batch: dict[str, Any], num_items: torch.Tensor | int | None, is_last: bool
    ) -> torch.Tensor:
        self.accelerator.gradient_state._set_sync_gradients(is_last)
        # DeepSpeed defers its reduction by itself until the step says it is the last.
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        defer = contextlib.nullcontext() if is_last or is_deepspeed else self.accelerator.no_sync(model)
        with defer:
            return super().training_step(model, batch, num_items)

    def _counted(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The model's inputs of a batch; what else it carries goes into the statistics."""
        supervised = int((batch["labels"][..., 1:] != IGNORED).sum())
        mask = batch.get("attention_mask")
        computed = batch["input_ids"].numel()
        self._since_log.add(
            StepStatistics(
                supervised_tokens=supervised,
                computed_tokens=computed,
                real_tokens=computed if mask is None else int(mask.sum()),
                rows=len(batch.get("row_ids", ())),
                images=len(batch.get("image_indices", ())),
                masked_rows=list(batch.get("masked_rows", ())),
                unsupervised_micro_batches=int(supervised == 0),
            )
        )
        return {name: value for name, value in batch.items() if name not in _NOT_FOR_THE_MODEL}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss; over the supervised positions of a packed row if `supervised_positions_only`."""
        inputs = {name: value for name, value in inputs.items() if name not in _NOT_FOR_THE_MODEL}
        if self.supervised_positions_only and "segment_lengths" in inputs and not return_outputs:
            inputs = compact_supervised(inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Upstream's optimizer over our parameter groups."""
        if self.optimizer is None and self._parameter_groups is not None:
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(self._parameter_groups(model or self.model), **arguments)
        return super().create_optimizer(model) if self.optimizer is None else self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the run did since the last line: supervised tokens, tokens a second, waiting for data, memory."""
        if "loss" in logs:
            now = time.perf_counter()
            seconds = max(now - self._log_time, 1e-9)
            since = self._since_log
            logs["supervised_tokens"] = since.supervised_tokens
            logs["tokens_per_second"] = round(since.computed_tokens / seconds, 1)
            logs["data_seconds"] = round(since.data_seconds, 3)
            logs["memory_gib"] = round(memory_in_use() / 2**30, 2)
            if since.masked_rows:
                logs["masked_rows"] = len(since.masked_rows)
            self.totals.add(since)
            self._since_log, self._log_time = StepStatistics(), now
        super().log(logs, start_time)


def memory_in_use() -> int:
    """Peak bytes: on the GPU since the start, or resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_sft_config(arguments: dict[str, Any], **fixed: Any) -> SFTConfig:
    """Return TRL's config from the recipe's arguments, with what the product decides put over them."""
    merged = {**arguments, **fixed}
    if "gradient_checkpointing" in merged:  # upstream's new name for it; the old one warns
        merged["activation_checkpointing"] = merged.pop("gradient_checkpointing")
    return SFTConfig(**merged)
