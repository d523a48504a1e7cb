"""The training page: a recipe goes in; a model, its processor, the recipe and the metrics lie in the output directory."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import os
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import PrinterCallback, TrainerCallback, set_seed

from vir_hf.batches.collator import LlavaDataCollator
from vir_hf.batches.features import cache_for_training
from vir_hf.batches.planning import measure_rows, plan_steps
from vir_hf.batches.sampling import RowSize, StepSampler
from vir_hf.batches.streaming import StreamPlan, plan_stream
from vir_hf.budget import plan as memory
from vir_hf.console import RunLog, conclude, duration, rendered, say
from vir_hf.curation.image_check import leave_out_broken_pictures
from vir_hf.data.located import MIXTURE, BadRow, BadRowPolicy
from vir_hf.data.sources import load_recipe_rows, share_of_stream
from vir_hf.errors import RecipeError
from vir_hf.images.preprocessing import ImagePreprocessor, recommended_num_workers
from vir_hf.kernels.fused_lora import fuse_lora
from vir_hf.kernels.lean_layers import make_lean
from vir_hf.llava.processing_llava import LlavaProcessor
from vir_hf.model.audit import audit_as_dict, audit_model, print_audit
from vir_hf.model.build import Precision, describe_precision, keep_base, load_model_and_processor, precision_of
from vir_hf.model.language_models import fit_to_language_model
from vir_hf.model.merging import merged_base
from vir_hf.model.trainable import check_trainable, make_trainable, parameter_groups
from vir_hf.training import checkpoints, consolidated, engine_check, preflight, resume
from vir_hf.training.progress import StepLines
from vir_hf.training.signals import RunStopped, StopOnSignal
from vir_hf.training.trainer import LlavaTrainer, make_sft_config

if TYPE_CHECKING:
    from datasets import Dataset

    from vir_hf.recipe.load import Recipe

logger = logging.getLogger(__name__)


def train(recipe: Recipe, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Run a recipe from its data to its saved model and return what `metrics.json` holds.

    Raises:
        RecipeError: a recipe that cannot be run on this machine or on this layout.
        DataError: rows or pictures that cannot be trained on, by number and id.
        RunError: a run that could not go on; what is left on disk and what to do.
        RunStopped: a signal ended it after a checkpoint; `training.resume=auto` goes on.
    """
    from vir_hf.publishing import hub
    from vir_hf.recipe import rules

    rules.check(recipe)  # one made or changed in Python has not been through `load_recipe`
    repo_id = hub.name_for(recipe) if recipe.training.push_to_hub else None
    signals = StopOnSignal()
    with signals.installed(), RunLog() as log:
        metrics = _train(recipe, signals, callbacks, log)
    if repo_id is not None and os.environ.get("RANK", "0") == "0":
        private = bool(recipe.training.hub_private_repo)
        conclude(hub.push_run(recipe.training.output_dir, repo_id, private=private).url)
    return metrics


def _train(recipe: Recipe, signals: StopOnSignal, callbacks: Sequence[TrainerCallback], log: RunLog) -> dict[str, Any]:
    engine_check.avoid_compiling(use_cpu=bool(recipe.training.use_cpu))
    recipe = fit_to_language_model(recipe)
    precision = precision_of(recipe)
    arguments = training_arguments(recipe, precision)
    if arguments.process_index == 0:
        warn_if_too_large(recipe)
    engine_check.load_whole_weights()
    finished = resume.broadcast(resume.is_finished(recipe))
    if finished is not None:
        logger.warning("%s: this run is finished, nothing is left to do", arguments.output_dir)
        return dict(finished)
    is_main = arguments.process_index == 0
    resume.together(lambda: preflight.check_machine(recipe, world_size=arguments.world_size))
    point = resume.choose(recipe, is_main=is_main)
    set_seed(arguments.seed)
    model, processor = load_model_and_processor(
        recipe, precision, merged_base(recipe, resume.together, is_main_process=is_main)
    )
    bad_rows: list[BadRow] = []
    bad_eval_rows: list[BadRow] = []
    rows, sampler = rows_and_plan(recipe, processor, bad_rows, arguments.world_size, arguments.process_index)
    eval_rows = load_eval_rows(recipe, processor, bad_eval_rows)
    check_trainable(model, recipe)
    resume.together(lambda: keep_base(model, processor, recipe, is_main_process=is_main))
    collator = make_collator(recipe, processor)
    collator.feature_lookup = cache_for_training(recipe, model.model, processor, rows, arguments.device)
    inner = model.model
    inner.trims_vision_tower = recipe.training.trim_vision_tower
    inner.reads_vision_features = collator.feature_lookup is not None
    inner.sums_gradients_as_they_come = arguments.deepspeed_plugin is not None
    model = make_trainable(model, recipe)
    if recipe.training.fused_lora:
        fuse_lora(model)
    if recipe.training.lean_layers and not keeps_elsewhere(arguments):
        make_lean(inner.language_model)
    if is_main:
        report_audit(model, recipe, describe_precision(precision, model, arguments.tf32))
    identity = resume.broadcast(
        resume.together(
            lambda: (
                resume.identify(
                    rows, sampler, model, world_size=arguments.world_size, feature_lookup=collator.feature_lookup
                )
                if is_main
                else None
            )
        )
    )
    starts_anew = False
    if point is not None:
        is_deepspeed = arguments.deepspeed_plugin is not None
        resume.check_identity(point, identity)
        starts_anew = consolidated.load_if_needed(model, point, arguments.world_size, is_deepspeed=is_deepspeed)
    trainer = LlavaTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        data_collator=collator,
        step_sampler=sampler,
        parameter_groups=lambda wrapped: parameter_groups(wrapped, recipe),
        supervised_positions_only=recipe.training.supervised_positions_only,
        fused_head=recipe.training.fused_head,
        recipe=to_be_saved(recipe),
        identity=identity,
        callbacks=[StepLines(), signals, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    engine = resume.together(lambda: engine_check.check(trainer.accelerator, engine_check.asked_for()))
    if is_main:
        say(engine_check.first_line(engine, sampler.rows_per_step, trainer.args.device))
    resume.together(lambda: preflight.check_run(trainer))
    resume.together(lambda: resume.let_go_of_earlier_run(recipe, point) if is_main else None)
    if is_main:
        log.open(Path(arguments.output_dir) / "train.log")
    with consolidated.optimizer_starts_anew() if starts_anew else contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=None if point is None else str(point.path))
    if signals.received is not None and trainer.state.global_step < trainer.state.max_steps:
        raise RunStopped(signals.received, trainer.state.global_step)
    metrics = summarise(trainer, recipe)
    metrics["skipped_rows"] = [dataclasses.asdict(bad) for bad in bad_rows]
    metrics["skipped_eval_rows"] = [dataclasses.asdict(bad) for bad in bad_eval_rows]
    metrics["dropped_rows"] = dict(Counter(bad.kind for bad in bad_rows))  # what the model card says of them
    trainer.save_final(precision.dtype)
    if trainer.is_world_process_zero():
        checkpoints.run_folder(arguments.output_dir).write_json(checkpoints.METRICS, metrics)
    log.add(f"done: {metrics['num_steps']} steps in {duration(metrics['seconds'])}")
    return metrics


def to_be_saved(recipe: Recipe) -> Recipe:
    """Return the recipe without the leave to replace an earlier run, which was given once and not for running it again."""
    saved = copy.deepcopy(recipe)
    saved.training.overwrite_output_dir = False
    return saved


def keeps_elsewhere(arguments: Any) -> bool:
    """Whether something else decides what is kept for the backward pass: sharded weights, or offloaded activations."""
    plugin = arguments.deepspeed_plugin
    is_sharded = bool(arguments.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    return is_sharded or bool(arguments.activation_offloading) or (plugin is not None and plugin.zero_stage == 3)


def report_audit(model: Any, recipe: Recipe, precision: str) -> None:
    """Print what is loaded and what learns, and save it as `audit.json`."""
    lines = audit_model(model, recipe)
    say(rendered(lambda console: print_audit(lines, precision, console)))
    output = checkpoints.run_folder(recipe.training.output_dir)
    output.write_json(checkpoints.AUDIT, audit_as_dict(lines, precision))


def rows_and_plan(
    recipe: Recipe, processor: LlavaProcessor, bad_rows: list[BadRow], world_size: int, rank: int
) -> tuple[Any, StepSampler | StreamPlan]:
    """Return the training rows, pictures as references, and this rank's plan of the steps over them."""
    rows = load_recipe_rows(recipe, bad_rows)
    if recipe.data.streaming:
        return share_of_stream(rows, rank, world_size), plan_stream(recipe, world_size, rank)
    rows, sizes = usable_rows(rows, recipe, processor, bad_rows)
    return rows, plan_steps(recipe, sizes, processor, world_size, rank)


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


def warn_if_too_large(recipe: Recipe) -> None:
    """Say before anything is loaded that the run is not expected to fit, and what to change."""
    try:
        warning = memory.will_it_fit(recipe)
    except RecipeError as error:
        logger.info("memory was not estimated: %s", error)
        return
    if warning is not None:
        logger.warning("%s", warning)


def checkpoints_activations(recipe: Recipe) -> bool:
    """Whether activations are computed again in the backward pass: as the recipe says, else unless memory is to spare."""
    try:
        return memory.should_checkpoint(recipe)
    except RecipeError as error:
        logger.info("memory was not estimated, so activations are recomputed: %s", error)
        return True


def training_arguments(recipe: Recipe, precision: Precision) -> Any:
    """Return TRL's config: the recipe's arguments, and what the machine and the data path decide."""
    training = recipe.training
    use_cpu = not torch.cuda.is_available() or bool(training.use_cpu)
    has_tf32 = True if not use_cpu and torch.cuda.get_device_capability()[0] >= 8 else None
    arguments = training.sft_arguments()
    arguments.setdefault("report_to", "none")
    arguments.setdefault("logging_steps", 1)
    arguments.setdefault("save_strategy", "no")
    # Upstream would replace a bad loss by the mean of the others and go on; ours is to see it.
    arguments["logging_nan_inf_filter"] = False
    arguments["activation_checkpointing"] = checkpoints_activations(recipe)
    arguments["push_to_hub"] = False  # the whole run is published once, at its end
    arguments["ddp_timeout"] = 60 * training.timeout_minutes
    if arguments.get("dataloader_num_workers") is None:
        arguments["dataloader_num_workers"] = recommended_num_workers(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if recipe.data.eval_path is None:
        arguments.pop("eval_strategy", None)
    if use_cpu and arguments.get("optim", "").startswith("paged_"):
        arguments["optim"] = "adamw_torch"
    return make_sft_config(
        arguments,
        use_cpu=use_cpu,
        bf16=precision.autocast == "bf16",
        fp16=precision.autocast == "fp16",
        tf32=arguments.pop("tf32", None) if "tf32" in arguments else has_tf32,
        # A step is one item of our loader; the micro-batches are inside it.
        gradient_accumulation_steps=1,
        per_device_train_batch_size=training.per_device_train_batch_size or 1,
        remove_unused_columns=False,
        max_length=None,
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
    )


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
            {"step": entry["step"], "loss": entry["eval_loss"]}
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
