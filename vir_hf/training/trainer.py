"""`LlavaTrainer`: TRL's `SFTTrainer` fed whole optimizer steps, with the loss on supervised positions only.

The data loader hands over one optimizer step at a time, already cut into micro-batches, so that the rows of a step never
depend on how many micro-batches or ranks compute it, and so that the position in the data is the step number.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from vir_hf.batches.sampling import StepLoader, StepSampler
from vir_hf.batches.streaming import StreamPlan, stream_loader
from vir_hf.errors import RunError
from vir_hf.kernels.fused_head import fuse_head
from vir_hf.training.checkpointing import CheckpointingTrainer
from vir_hf.training.safeguards import MemoryGuard, NumberGuard
from vir_hf.training.signals import WorkerSignals
from vir_hf.training.statistics import StepStatistics, memory_in_use
from vir_hf.training.watch import RankWatch

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe


logger = logging.getLogger(__name__)


class LlavaTrainer(CheckpointingTrainer):
    """TRL's trainer for `LlavaForCausalLM`.

    Args:
        step_sampler: plans every optimizer step of this rank.
        parameter_groups: makes the optimizer's groups of a model; all trainable weights at one rate if `None`.
        supervised_positions_only: score only positions with a label, on the CPU too.
        fused_head: on a CPU, score with `vir_hf.kernels.fused_head` in place of TRL's tiles.
        recipe: written into every checkpoint.
        identity: what `compatibility.identify` returned, written into every checkpoint.
    """

    def __init__(
        self,
        *args: Any,
        step_sampler: StepSampler | StreamPlan,
        parameter_groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None,
        supervised_positions_only: bool = True,
        fused_head: bool = True,
        recipe: Recipe | None = None,
        identity: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.step_sampler = step_sampler
        self.recipe, self.identity = recipe, identity or {}
        self.seconds_before = 0.0
        self._not_yet_restored: str | None = None
        self.saved_step = 0  # the step whose weights the model holds when training has ended
        self._start_time = time.perf_counter()
        self.supervised_positions_only = supervised_positions_only
        self._parameter_groups = parameter_groups
        self.optimizer: Any
        self._step: tuple[list[dict[str, Any]], list[torch.Tensor], torch.Tensor]
        self._since_log, self.totals = StepStatistics(), StepStatistics()
        self._log_time = time.perf_counter()
        model = kwargs["model"] if "model" in kwargs else args[0]
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        values = [parameter.data for parameter in learning]
        # Upstream refuses a quantised model without an adapter; a projector beside 4-bit weights learns without one.
        stands_in = bool(getattr(model, "is_quantized", False)) and not hasattr(model, "peft_config")
        if stands_in:
            model._hf_peft_config_loaded = True
        try:
            super().__init__(*args, **kwargs)
        finally:
            if stands_in:
                model._hf_peft_config_loaded = False
        if fused_head:
            fuse_head(self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model)
        # TRL casts the trainable weights of a quantised model to bf16, where two thirds of small updates are lost.
        for parameter, value in zip(learning, values, strict=True):
            if parameter.dtype != value.dtype and parameter.shape == value.shape:
                parameter.data = value.to(parameter.device)

        settings = recipe.training if recipe is not None else None
        self.watch = RankWatch(
            Path(self.args.output_dir),
            self.args.process_index,
            self.args.world_size,
            timeout_seconds=60 * settings.timeout_minutes if settings else self.args.ddp_timeout,
        )
        self.number_guard = NumberGuard(
            policy=settings.on_bad_numbers if settings else "raise",
            max_skipped_steps=settings.max_skipped_steps if settings else 0,
            output_dir=Path(self.args.output_dir),
        )
        self.memory_guard = MemoryGuard(
            policy=settings.on_out_of_memory if settings else "raise",
            rows=self.train_dataset,
            collator=self.data_collator,
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Upstream's training, watched: a rank that dies or hangs is named.

        Raises:
            RunError: an exchange between ranks failed because of another rank.
        """
        self.watch.start()
        try:
            return super().train(*args, **kwargs)
        except RunError:
            raise
        except (RuntimeError, OSError) as error:
            missing = self.watch.explain()
            if missing is None:
                raise
            raise RunError(missing) from error
        finally:
            self.watch.stop()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """One item a step; never sharded by accelerate, since the sampler already plans for this rank."""
        workers = self.args.dataloader_num_workers
        options: dict[str, Any] = {
            "num_workers": workers,
            "pin_memory": self.args.dataloader_pin_memory and torch.cuda.is_available(),
            "persistent_workers": self.args.dataloader_persistent_workers and workers > 0,
            "prefetch_factor": (self.args.dataloader_prefetch_factor or 2) if workers else None,
            "worker_init_fn": WorkerSignals(),
        }
        if isinstance(self.step_sampler, StreamPlan):
            return stream_loader(self.train_dataset, self.step_sampler, self.data_collator, **options)
        return StepLoader(self.train_dataset, self.step_sampler, self.data_collator, **options)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Upstream's optimizer over our parameter groups."""
        if self.optimizer is None and self._parameter_groups is not None:
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(self._parameter_groups(model or self.model), **arguments)
        return super().create_optimizer(model) if self.optimizer is None else self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        num_warmup_steps = self.args.get_warmup_steps(num_training_steps)
        if self.args.lr_scheduler_type != "constant" and num_warmup_steps >= num_training_steps:
            logger.warning(
                "all %d steps of this run warm up, the first at a learning rate of 0; a run this short learns with "
                "training.warmup_steps=0",
                num_training_steps,
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def all_totals(self) -> StepStatistics:
        """What all ranks have counted, together; every rank must ask."""
        totals = StepStatistics()
        totals.add(self.totals)
        totals.add(self._since_log)
        if self.args.world_size > 1:
            others: list[Any] = [None] * self.args.world_size
            torch.distributed.all_gather_object(others, dataclasses.asdict(totals))
            totals = StepStatistics()
            for counts in others:
                totals.add(StepStatistics(**counts))
        return totals

    def seconds_so_far(self) -> float:
        """Seconds of training, over all resumes, saving included."""
        return self.seconds_before + time.perf_counter() - self._start_time

    def _run_epoch(self, **kwargs: Any) -> None:
        """One epoch; nothing where the checkpoint already holds the last step, which upstream would exceed by one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        self._load_rng_state(self._not_yet_restored)  # of a checkpoint that holds the last step
        self.saved_step = self.state.global_step
        if self.args.load_best_model_at_end:
            self._choose_best()
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # or upstream prunes by names alone
        try:
            return super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit

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
