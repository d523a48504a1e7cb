"""What the trainer writes and reads: checkpoints whole or not at all, the final model, the best one."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState

from vir_hf.errors import RunError
from vir_hf.files import discard, new_folder, write_json
from vir_hf.model.precision import rounded_to
from vir_hf.model.projector_files import extract_projector, save_projector
from vir_hf.training import checkpoints, ranks, resume
from vir_hf.training.evaluating import EvaluatingTrainer
from vir_hf.training.state import load_weights, random_states, reading_no_code, save_rest, set_random_states
from vir_hf.training.statistics import StepStatistics

if TYPE_CHECKING:
    pass


logger = logging.getLogger(__name__)


class CheckpointingTrainer(EvaluatingTrainer):
    """The steps of a run, and what of them lies on disk: `LlavaTrainer` sets the attributes."""

    identity: dict[str, Any]
    saved_step: int
    seconds_before: float
    _log_time: float
    _not_yet_restored: str | None

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
            ranks.together(lambda: self._begin_checkpoint(output_dir, name) if is_writer else None)
            ranks.together(lambda: self._write_checkpoint(staging))
            ranks.together(lambda: self._finish_checkpoint(staging) if is_writer else None)
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
        ranks.together(lambda: new_folder(staging) if self.args.should_save else None)
        model = self.accelerator.unwrap_model(self.model)
        is_sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        as_loaded = None if is_sharded or hasattr(model, "peft_config") else dtype
        with contextlib.nullcontext() if as_loaded is None else rounded_to(model, as_loaded):
            ranks.together(lambda: self.save_model(str(staging), _internal_call=True))
        if self.args.should_save:
            extract_projector(staging) if is_sharded else save_projector(model, staging)
        ranks.together(lambda: self._finish_final(staging) if self.args.should_save else None)

    def _finish_final(self, staging: Path) -> None:
        save_rest(self.accelerator.unwrap_model(self.model), staging)
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
        state = {"random": random_states(), "counters": self._counters()}
        torch.save(state, folder / f"rank_{self.args.process_index}.pt")

    def _finish_checkpoint(self, staging: Path) -> None:
        """Write what one rank writes, publish the folder, and let go of checkpoints over the limit."""
        state = self.state
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                state.stateful_callbacks[type(callback).__name__] = callback.state()
        state.save_to_json(str(staging / TRAINER_STATE_NAME))
        save_rest(self.accelerator.unwrap_model(self.model), staging)
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
            load_weights(self.model if model is None else model, Path(resume_from_checkpoint))

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
        set_random_states(state["random"])

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        with reading_no_code():
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
            load_weights(self.model, Path(str(self.state.best_model_checkpoint)))
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
        reason = ranks.broadcast(reason)
        self.state.best_model_checkpoint = None if reason or best is None else str(best)
        if self.state.best_model_checkpoint is None:
            logger.warning(
                "training.load_best_model_at_end: the best weights cannot be loaded (%s); those of the last step, %d, are saved",
                reason,
                self.state.global_step,
            )
