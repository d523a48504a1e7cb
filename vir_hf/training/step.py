"""One optimizer step: its micro-batches, the loss on supervised positions only, steps that do not fit or are not finite."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from trl import SFTTrainer

from vir_hf.batches.sampling import StepSampler
from vir_hf.batches.streaming import StreamPlan
from vir_hf.data.located import BadRowPolicy
from vir_hf.errors import RunError
from vir_hf.rows.encoding import IGNORE
from vir_hf.training import checkpoints, ranks
from vir_hf.training.safeguards import MemoryGuard, NumberGuard, can_be_halved, is_finite, is_out_of_memory
from vir_hf.training.signals import any_rank
from vir_hf.training.state import random_states, set_random_states
from vir_hf.training.statistics import StepStatistics
from vir_hf.training.watch import RankWatch

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe


logger = logging.getLogger(__name__)

# What a batch may carry beside the model's inputs.
_NOT_FOR_THE_MODEL = ("row_ids", "masked_rows", "row_numbers")


def compact_supervised(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs with labels of the supervised positions only, for a packed row.

    Position p is scored against label p + 1. The model returns hidden states at the supervised p's and one more that the
    shift drops, so the usual shifted loss over the shorter row is the loss over the whole one.
    """
    labels = inputs["labels"]
    positions = (labels[0, 1:] != IGNORE).nonzero().squeeze(1)
    targets = labels[0, 1:][positions]
    if not len(positions):  # one scored position whose label is ignored: a loss of zero that still has a gradient
        positions = positions.new_zeros(1)
        targets = labels.new_full((1,), IGNORE)
    filler = positions.new_zeros(1)
    return {
        **inputs,
        "supervised_positions": torch.cat([positions, filler]),
        "labels": torch.cat([labels.new_full((1,), IGNORE), targets]).unsqueeze(0),
    }


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """Return what of a batch the model takes; the rest is there to count and to name rows by."""
    return {name: value for name, value in batch.items() if name not in _NOT_FOR_THE_MODEL}


class StepTrainer(SFTTrainer):
    """TRL's trainer with a whole optimizer step as one item: `LlavaTrainer` sets the attributes."""

    recipe: Recipe | None
    step_sampler: StepSampler | StreamPlan
    supervised_positions_only: bool
    watch: RankWatch
    number_guard: NumberGuard
    memory_guard: MemoryGuard
    totals: StepStatistics
    _since_log: StepStatistics
    _step: tuple[list[dict[str, Any]], list[torch.Tensor], torch.Tensor]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Fetch the next step, timing how long training waits for its data."""
        start = time.perf_counter()
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._since_log.data_seconds += time.perf_counter() - start
        return samples, num_items

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        """Supervised tokens of the whole step, over all ranks.

        Raises:
            DataError: on every rank, when more pictures broke since the start than `data.max_bad_fraction` allows.
        """
        self.watch.arrived(self.state.global_step + 1)
        batches = [batch for step in batch_samples for batch in step["micro_batches"]]
        supervised = sum(int((batch["labels"][..., 1:] != IGNORE).sum()) for batch in batches)
        masked = [row for batch in batches for row in batch.get("masked_rows", ())]
        num_masked = len(masked) + len(self._since_log.masked_rows) + len(self.totals.masked_rows)
        counts = torch.tensor([supervised, num_masked], device=device)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts).view(-1, 2).sum(0)
        if counts[1]:
            self._enforce_bad_fraction(int(counts[1]), masked)
        return counts[0]

    def _enforce_bad_fraction(self, num_masked: int, masked: list[dict[str, str]]) -> None:
        """Count rows masked since the start against the rows there are, or those seen where that is more."""
        if self.recipe is None:
            return
        step = self.state.global_step + 1
        num_rows = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else 0
        num_rows = max(num_rows, step * self.step_sampler.rows_per_step)
        last = f"the last is row {masked[-1]['id']}: {masked[-1]['reason']}" if masked else "see the lines above"
        policy = BadRowPolicy(max_bad_fraction=self.recipe.data.max_bad_fraction)
        policy.enforce_fraction(num_masked, num_rows, f"step {step}: pictures cannot be opened; {last}")

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run all micro-batches of one optimizer step; gradients are reduced across ranks with the last one.

        Raises:
            RunError: a micro-batch that does not fit into memory, by its rows, and what would help.
        """
        micro_batches = self.memory_guard.fitting(inputs["micro_batches"])
        before = self._before_step()
        while True:
            losses, error = self._run_micro_batches(model, micro_batches, num_items_in_batch)
            if error is None:
                break
            # Outside the handler, so that nothing of the failed attempt is held. The step begins again: a part of the
            # failed micro-batch may have reached the gradients.
            number = len(losses)
            self.memory_guard.failed(micro_batches[number])
            micro_batches[number : number + 1] = self.memory_guard.halves(micro_batches[number])
            logger.warning("step %s: %s; halved, the step begins again", self.state.global_step + 1, error)
            model.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._back_to(before)
        for batch in micro_batches:
            self._count(batch)
        self._step = (micro_batches, losses, before["loss"])
        return torch.stack(losses).sum()

    def _run_micro_batches(
        self, model: nn.Module, micro_batches: list[dict[str, Any]], num_items: torch.Tensor | int | None
    ) -> tuple[list[torch.Tensor], str | None]:
        """The losses, or those up to a micro-batch that did not fit and may be halved, and the error."""
        losses: list[torch.Tensor] = []
        try:
            for number, batch in enumerate(micro_batches):
                is_last = number == len(micro_batches) - 1
                losses.append(self._micro_step(model, model_inputs(batch), num_items, is_last))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            batch = micro_batches[len(losses)]
            why = ""
            if self.memory_guard.policy == "split":
                if self.args.world_size > 1:
                    why = "; training.on_out_of_memory=split needs one process, the others wait for this one's step"
                elif can_be_halved(batch):
                    return losses, str(error).splitlines()[0]
            raise self.memory_guard.error(self.state.global_step + 1, batch, self.args, why) from error
        return losses, None

    def _before_step(self) -> dict[str, Any]:
        """What a step changes beside gradients, to begin it again."""
        keeps = self.memory_guard.policy == "split"
        return {
            "loss": self._tr_loss.clone(),
            "random": random_states() if keeps else None,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()} if keeps else {},
            "num_tokens": self._total_train_tokens,
        }

    def _back_to(self, before: dict[str, Any]) -> None:
        set_random_states(before["random"])
        self._metrics["train"].clear()
        self._metrics["train"].update({name: list(values) for name, values in before["metrics"].items()})
        self._total_train_tokens = before["num_tokens"]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm; a step with bad numbers ends here, before the optimizer sees it."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        micro_batches, losses, loss_before = self._step
        values = torch.stack(losses).tolist()
        # fp16's loss scaling runs into infinite gradients by design and passes over such steps itself.
        norm = 0.0 if grad_norm is None or self.accelerator.scaler is not None else float(grad_norm)
        if any_rank(not (is_finite(sum(values)) and is_finite(norm)), self.args.device):
            step, rank = self.state.global_step + 1, self.args.process_index
            is_mine = not is_finite(sum(values))
            if any_rank(is_mine, self.args.device) and not is_mine:
                micro_batches, values = [], []
            ranks.together(lambda: self.number_guard.handle(step, micro_batches, values, norm, rank))
            if self.accelerator.scaler is None:
                model.zero_grad(set_to_none=True)  # the optimizer passes over weights without a gradient
            self._tr_loss.copy_(loss_before)
            self._globalstep_last_logged += 1  # the mean that is logged is over the other steps
        return grad_norm

    def _micro_step(
        self, model: nn.Module, batch: dict[str, Any], num_items: torch.Tensor | int | None, is_last: bool
    ) -> torch.Tensor:
        self.accelerator.gradient_state._set_sync_gradients(is_last)
        # DeepSpeed defers its reduction by itself until the step says it is the last.
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        defer = contextlib.nullcontext() if is_last or is_deepspeed else self.accelerator.no_sync(model)
        with defer:
            return super().training_step(model, batch, num_items)

    def _count(self, batch: dict[str, Any]) -> None:
        """Add a micro-batch to the statistics."""
        supervised = int((batch["labels"][..., 1:] != IGNORE).sum())
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

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss; over the supervised positions of a packed row if `supervised_positions_only`."""
        inputs = model_inputs(inputs)
        if self.supervised_positions_only and "segment_lengths" in inputs and not return_outputs:
            inputs = compact_supervised(inputs)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.is_deepspeed_enabled and model.training and not return_outputs:
            self._require_finite(result.detach())
        return result

    def _require_finite(self, loss: torch.Tensor) -> None:
        """Raise for a bad loss before DeepSpeed, whose backward pass ends with the optimizer's step, can use it."""
        value = float(loss.detach())
        if any_rank(not is_finite(value), self.args.device):
            raise RunError(
                f"step {self.state.global_step + 1}: loss {value:.4g} on rank {self.args.process_index}. The weights were "
                f"not touched. {checkpoints.what_is_left(Path(self.args.output_dir))} DeepSpeed cannot skip a step: lower "
                "training.learning_rate, or find the row without DeepSpeed; then add --resume."
            )
