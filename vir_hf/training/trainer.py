"""`LlavaTrainer`: TRL's `SFTTrainer` fed whole optimizer steps, with the loss on supervised positions only.

The data loader hands over one optimizer step at a time, already cut into micro-batches, so that the rows of a step never
depend on how many micro-batches or ranks compute it, and so that the position in the data is the step number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from trl import SFTConfig, SFTTrainer

from vir_hf.batches.sampling import StepLoader, StepSampler
from vir_hf.batches.streaming import StreamPlan, stream_loader
from vir_hf.data.located import BadRowPolicy
from vir_hf.errors import RunError
from vir_hf.files import discard, new_folder, write_json
from vir_hf.kernels.fused_head import fuse_head
from vir_hf.model.build import rounded_to
from vir_hf.model.projector_files import extract_projector, save_projector
from vir_hf.rows.encoding import IGNORE
from vir_hf.training import checkpoints, resume
from vir_hf.training.safeguards import MemoryGuard, NumberGuard, can_be_halved, is_finite, is_out_of_memory
from vir_hf.training.signals import WorkerSignals, any_rank
from vir_hf.training.watch import RankWatch

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe

logger = logging.getLogger(__name__)

# What a batch may carry beside the model's inputs.
_NOT_FOR_THE_MODEL = ("row_ids", "masked_rows", "row_numbers")


@dataclass
class StepStatistics:
    """Counts since the last log line and since the start of the run."""

    supervised_tokens: int = 0
    computed_tokens: int = 0
    real_tokens: int = 0
    rows: int = 0
    images: int = 0
    data_seconds: float = 0.0
    masked_rows: list[dict[str, str]] = field(default_factory=list)
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


def _model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in _NOT_FOR_THE_MODEL}


class LlavaTrainer(SFTTrainer):
    """TRL's trainer for `LlavaForCausalLM`.

    Args:
        step_sampler: plans every optimizer step of this rank.
        parameter_groups: makes the optimizer's groups of a model; all trainable weights at one rate if `None`.
        supervised_positions_only: score only positions with a label, on the CPU too.
        fused_head: on a CPU, score with `vir_hf.kernels.fused_head` in place of TRL's tiles.
        recipe: written into every checkpoint.
        identity: what `resume.identify` returned, written into every checkpoint.
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
                losses.append(self._micro_step(model, _model_inputs(batch), num_items, is_last))
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
            "random": resume.random_states() if keeps else None,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()} if keeps else {},
            "num_tokens": self._total_train_tokens,
        }

    def _back_to(self, before: dict[str, Any]) -> None:
        resume.set_random_states(before["random"])
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
            resume.together(lambda: self.number_guard.handle(step, micro_batches, values, norm, rank))
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
        inputs = _model_inputs(inputs)
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

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Upstream's evaluation, which leaves training's random numbers as they were."""
        with torch.random.fork_rng():
            return super().evaluate(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle of a Python object; recipe.yaml says the same.
        discard(Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write `checkpoint-N` whole or not at all; older ones go only after that.

        Raises:
            RunError: on every rank, if one could not write its part. What was there before is left as it was.
        """
        self.store_flos()
        output_dir, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        is_best = self.state.best_global_step == self.state.global_step
        best = output_dir / name if is_best else self.best_checkpoint()
        self.state.best_model_checkpoint = None if best is None else str(best)
        is_writer = self.args.should_save
        staging = output_dir / f".{name}.partial"
        try:
            resume.together(lambda: self._begin_checkpoint(output_dir, name) if is_writer else None)
            resume.together(lambda: self._write_checkpoint(staging))
            resume.together(lambda: self._finish_checkpoint(staging) if is_writer else None)
        except Exception as error:
            if is_writer:
                checkpoints.remove_leftovers(output_dir)
            if isinstance(error, RunError):
                raise
            raise RunError(
                f"{output_dir / name}: could not be written: {type(error).__name__}: {error} "
                f"{checkpoints.what_is_left(output_dir)} Make room or mend the disk, and add --resume."
            ) from error

    def save_final(self, dtype: torch.dtype | None = None) -> None:
        """Write model (or adapter), projector, processor and recipe into the output directory; every rank must ask.

        Args:
            dtype: of a whole model's weights in the file; an adapter and the projector's own file stay fp32.
        """
        output_dir = Path(self.args.output_dir)
        staging = output_dir / ".final.partial"
        resume.together(lambda: new_folder(staging) if self.args.should_save else None)
        model = self.accelerator.unwrap_model(self.model)
        is_sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        as_loaded = None if is_sharded or hasattr(model, "peft_config") else dtype
        with contextlib.nullcontext() if as_loaded is None else rounded_to(model, as_loaded):
            resume.together(lambda: self.save_model(str(staging), _internal_call=True))
        if self.args.should_save:
            extract_projector(staging) if is_sharded else save_projector(model, staging)
        resume.together(lambda: self._finish_final(staging) if self.args.should_save else None)

    def _finish_final(self, staging: Path) -> None:
        resume.save_rest(self.accelerator.unwrap_model(self.model), staging)
        if self.recipe is not None:
            self.recipe.save(staging / "recipe.yaml")
        output = checkpoints.run_folder(staging.parent)
        new = {path.relative_to(staging).as_posix() for path in staging.rglob("*")}
        output.move_in(staging)
        for name in checkpoints.of_the_model(output.names()):
            if name not in new:  # of the model before: its scores, an adapter where this one is whole, shards
                output.remove(name)

    def _begin_checkpoint(self, output_dir: Path, name: str) -> None:
        checkpoints.require_space(output_dir, self.checkpoint_bytes(), name)
        checkpoints.stage(output_dir, name)

    def checkpoint_bytes(self) -> int:
        """About how much a checkpoint takes: as much as the last one, or else weights and optimizer."""
        written = checkpoints.list_checkpoints(Path(self.args.output_dir))
        if written:
            return checkpoints.folder_bytes(written[0].path)
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        saved = learning if hasattr(self.model, "peft_config") else list(self.model.parameters())
        optimizer = sum(8 * parameter.numel() for parameter in learning)
        return sum(parameter.numel() * parameter.element_size() for parameter in saved) + optimizer + 2**20

    def _write_checkpoint(self, folder: Path) -> None:
        """Write every rank's part; ZeRO and FSDP gather here."""
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        state = {"random": resume.random_states(), "counters": self._counters()}
        torch.save(state, folder / f"rank_{self.args.process_index}.pt")

    def _finish_checkpoint(self, staging: Path) -> None:
        """Write what one rank writes, publish the folder, and let go of checkpoints over the limit."""
        state = self.state
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                state.stateful_callbacks[type(callback).__name__] = callback.state()
        state.save_to_json(str(staging / TRAINER_STATE_NAME))
        resume.save_rest(self.accelerator.unwrap_model(self.model), staging)
        if self.recipe is not None:
            self.recipe.save(staging / "recipe.yaml")
        position = {"step": state.global_step, "epoch": state.epoch, "seed": self.step_sampler.seed, **self.identity}
        write_json(staging / resume.POSITION, position, ensure_ascii=True)
        checkpoints.publish(staging, step=state.global_step)
        best = self.best_checkpoint()
        checkpoints.prune(staging.parent, self.args.save_total_limit, keep=[] if best is None else [best])

    def _counters(self) -> dict[str, Any]:
        """What this rank has counted and not yet logged, so that a resumed run logs the same."""
        now = time.perf_counter()
        return {
            "since_log": dataclasses.asdict(self._since_log),
            "totals": dataclasses.asdict(self.totals),
            "seconds_since_log": now - self._log_time,
            "seconds": self.seconds_so_far(),
            "loss": float(self._tr_loss),
            "last_logged_step": self._globalstep_last_logged,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "num_tokens": self._total_train_tokens,
            "skipped_steps": self.number_guard.skipped,
            "smallest_failed": self.memory_guard.smallest_failed,
            "num_splits": self.memory_guard.num_splits,
        }

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

    def _set_counters(self, counters: dict[str, Any]) -> None:
        self._since_log = StepStatistics(**counters["since_log"])
        self.totals = StepStatistics(**counters["totals"])
        self._log_time = time.perf_counter() - counters["seconds_since_log"]
        self.seconds_before = counters["seconds"]
        self._tr_loss.fill_(counters["loss"])
        self._total_loss_scalar = -counters["loss"]  # upstream's mean at the end is over this session's steps
        self._globalstep_last_logged = counters["last_logged_step"]
        self._metrics["train"].clear()
        self._metrics["train"].update(counters["metrics"])
        self._total_train_tokens = counters["num_tokens"]
        self.number_guard.skipped = counters["skipped_steps"]
        self.memory_guard.smallest_failed = counters["smallest_failed"]
        self.memory_guard.num_splits = counters["num_splits"]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif not any(Path(resume_from_checkpoint).glob("global_step*")):  # else `consolidated` has loaded them in fp32
            resume.load_weights(self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Put back random states and counters; upstream calls this once, where the resumed epoch begins."""
        if checkpoint is None:
            return
        self._not_yet_restored = None
        path = Path(checkpoint) / f"rank_{self.args.process_index}.pt"
        if not path.is_file():  # more processes than before; said when the checkpoint was chosen
            path = Path(checkpoint) / "rank_0.pt"
        state = torch.load(path, map_location="cpu", weights_only=True)
        self._set_counters(state["counters"])
        resume.set_random_states(state["random"])

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        with resume.reading_no_code():
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and not self.is_deepspeed_enabled and any(Path(checkpoint).glob("global_step*")):
            # Of DeepSpeed, whose optimizer state stays behind; upstream reads the schedule only together with it.
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
        self._not_yet_restored = checkpoint

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Upstream's; a new best is saved at once where the best is wanted, also between two regular checkpoints."""
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return bool(is_best)

    def best_checkpoint(self) -> Path | None:
        """Return the checkpoint of the best step, in this run's folder or in that of the checkpoint it went on from."""
        step = self.state.best_global_step
        if not step:
            return None
        places = [Path(self.args.output_dir)]
        if self.state.best_model_checkpoint:
            places.append(Path(self.state.best_model_checkpoint).parent)
        found = (place / f"checkpoint-{step}" for place in places)
        return next((path for path in found if path.is_dir()), None)

    def _load_best_model(self) -> None:
        """Put the best checkpoint's weights into the model, those beside an adapter too."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            resume.load_weights(self.model, Path(str(self.state.best_model_checkpoint)))
        self.saved_step = int(self.state.best_global_step)

    def _choose_best(self) -> None:
        """Say which checkpoint is the best for upstream to load, the same on every rank; warn where there is none."""
        best, reason = self.best_checkpoint(), None
        if self.args.should_save:
            reason = (
                checkpoints.damage(best) if best is not None else f"checkpoint-{self.state.best_global_step} is gone"
            )
            if self.state.best_global_step in (None, 0):
                reason = f"no {self.args.metric_for_best_model} was better than none"
        reason = resume.broadcast(reason)
        self.state.best_model_checkpoint = None if reason or best is None else str(best)
        if self.state.best_model_checkpoint is None:
            logger.warning(
                "training.load_best_model_at_end: the best weights cannot be loaded (%s); those of the last step, %d, are saved",
                reason,
                self.state.global_step,
            )

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
    with warnings.catch_warnings():
        # TRL 1.16 sets the old name itself, whatever it is given.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
        return SFTConfig(**merged)
