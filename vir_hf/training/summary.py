"""What a run says of itself: what learns, before it starts; what was counted and measured, when it has ended."""

from __future__ import annotations

import dataclasses
import logging
import platform
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers

from vir_hf.console import rendered, say
from vir_hf.model.audit import audit_as_dict, audit_model, print_audit
from vir_hf.training import checkpoints
from vir_hf.training.trainer import LlavaTrainer

if TYPE_CHECKING:
    from vir_hf.data.located import BadRow
    from vir_hf.recipe.load import Recipe


logger = logging.getLogger(__name__)


def report_audit(model: Any, recipe: Recipe, precision: str) -> None:
    """Print what is loaded and what learns, and save it as `audit.json`."""
    lines = audit_model(model, recipe)
    say(rendered(lambda console: print_audit(lines, precision, console)))
    output = checkpoints.run_folder(recipe.training.output_dir)
    output.write_json(checkpoints.AUDIT, audit_as_dict(lines, precision))


def summarise(trainer: LlavaTrainer, recipe: Recipe) -> dict[str, Any]:
    """Return the figures of the whole run, before and after every resume; only what was counted or measured."""
    totals = trainer.all_totals()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "experiment": recipe.experiment.name,
        "stage": recipe.training.stage,
        "num_steps": trainer.state.global_step,
        "num_epochs": trainer.state.epoch,
        "saved_step": trainer.saved_step,
        "best": best_of(trainer),
        "final_loss": history[-1]["loss"] if history else None,
        "first_loss": history[0]["loss"] if history else None,
        "num_rows": totals.rows,
        "num_images": totals.images,
        "num_tokens": totals.computed_tokens,
        "num_supervised_tokens": totals.supervised_tokens,
        "packing_efficiency": totals.real_tokens / totals.computed_tokens if totals.computed_tokens else None,
        "masked_rows": totals.masked_rows,
        "unsupervised_micro_batches": totals.unsupervised_micro_batches,
        "skipped_steps": trainer.number_guard.skipped,
        "split_micro_batches": trainer.memory_guard.num_splits,
        "seconds": round(trainer.seconds_so_far(), 1),
        "world_size": trainer.args.world_size,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "is_finished": True,
        "loss_history": [
            {"step": entry["step"], "loss": entry["loss"], "learning_rate": entry.get("learning_rate")}
            for entry in history
        ],
        "evaluation_history": [
            {
                "step": entry["step"],
                "loss": entry["eval_loss"],
                "token_accuracy": entry.get("eval_token_accuracy"),
            }
            for entry in trainer.state.log_history
            if "eval_loss" in entry
        ],
    }


def best_of(trainer: LlavaTrainer) -> dict[str, Any] | None:
    """Return the step that evaluation found best, by which figure, and its value; `None` where nothing was compared."""
    state = trainer.state
    if not state.best_global_step:
        return None
    return {"step": state.best_global_step, "metric": trainer.args.metric_for_best_model, "value": state.best_metric}


def summarise_left_out(bad_rows: Sequence[BadRow], bad_eval_rows: Sequence[BadRow]) -> dict[str, Any]:
    """Return the rows that were not trained on or not evaluated, each with its reason, and how many of which kind."""
    return {
        "skipped_rows": [dataclasses.asdict(bad) for bad in bad_rows],
        "skipped_eval_rows": [dataclasses.asdict(bad) for bad in bad_eval_rows],
        "dropped_rows": dict(Counter(bad.kind for bad in bad_rows)),  # what the model card says of them
    }
