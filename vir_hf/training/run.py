"""The training page: a recipe goes in; a model, its processor, the recipe and the metrics lie in the output directory."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, TrainerCallback, set_seed

from vir_hf.batches.features import cache_for_training
from vir_hf.console import RunLog, conclude, duration, say
from vir_hf.data.located import BadRow
from vir_hf.kernels.fused_lora import fuse_lora
from vir_hf.kernels.lean_layers import make_lean
from vir_hf.model.for_training import keep_base, load_model_and_processor
from vir_hf.model.language_models import fit_to_language_model
from vir_hf.model.merging import merged_base
from vir_hf.model.precision import describe_precision, precision_of
from vir_hf.model.trainable import check_trainable, make_trainable, parameter_groups
from vir_hf.training import checkpoints, compatibility, consolidated, engine_check, preflight, ranks, resume
from vir_hf.training.arguments import keeps_elsewhere, training_arguments, warn_if_too_large
from vir_hf.training.inputs import make_collator, rows_and_plan
from vir_hf.training.progress import StepLines
from vir_hf.training.report import watchers
from vir_hf.training.signals import RunStopped, StopOnSignal
from vir_hf.training.summary import report_audit, summarise, summarise_left_out
from vir_hf.training.trainer import LlavaTrainer

if TYPE_CHECKING:
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
    is_main = arguments.process_index == 0
    if is_main:
        warn_if_too_large(recipe)
    engine_check.load_whole_weights()
    finished = ranks.broadcast(resume.is_finished(recipe))
    if finished is not None:
        logger.warning("%s: this run is finished, nothing is left to do", arguments.output_dir)
        return dict(finished)
    ranks.together(lambda: preflight.check_machine(recipe, world_size=arguments.world_size))
    point = resume.choose(recipe, is_main=is_main)
    set_seed(arguments.seed)
    model, processor = load_model_and_processor(
        recipe, precision, merged_base(recipe, ranks.together, is_main_process=is_main)
    )
    bad_rows, bad_eval_rows = list[BadRow](), list[BadRow]()
    rows, sampler, eval_rows = rows_and_plan(
        recipe, processor, bad_rows, bad_eval_rows, arguments.world_size, arguments.process_index
    )
    check_trainable(model, recipe)
    ranks.together(lambda: keep_base(model, processor, recipe, is_main_process=is_main))
    collator = make_collator(recipe, processor)
    collator.feature_lookup = cache_for_training(recipe, model.model, processor, rows, arguments.device)
    model = _ready_to_learn(model, recipe, arguments, reads_features=collator.feature_lookup is not None)
    if is_main:
        report_audit(model, recipe, describe_precision(precision, model, arguments.tf32))
    identity = ranks.rank_0(
        lambda: compatibility.identify(
            rows, sampler, model, world_size=arguments.world_size, feature_lookup=collator.feature_lookup
        ),
        is_main=is_main,
    )
    starts_anew = _continue_from(point, model, identity, arguments)
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
    _fit(trainer, recipe, point, log, optimizer_starts_anew=starts_anew)
    if signals.received is not None and trainer.state.global_step < trainer.state.max_steps:
        raise RunStopped(signals.received, trainer.state.global_step)
    metrics = summarise(trainer, recipe) | summarise_left_out(bad_rows, bad_eval_rows)
    trainer.save_final(precision.dtype)
    if is_main:
        checkpoints.run_folder(arguments.output_dir).write_json(checkpoints.METRICS, metrics)
    log.add(f"done: {metrics['num_steps']} steps in {duration(metrics['seconds'])}")
    return metrics


def _continue_from(point: resume.ResumePoint | None, model: Any, identity: dict[str, Any], arguments: Any) -> bool:
    """Hold a run to the checkpoint it goes on from, and load what only we can; return whether the optimizer starts anew."""
    if point is None:
        return False
    compatibility.check_identity(point, identity)
    is_deepspeed = arguments.deepspeed_plugin is not None
    return consolidated.load_if_needed(model, point, arguments.world_size, is_deepspeed=is_deepspeed)


def _fit(
    trainer: LlavaTrainer, recipe: Recipe, point: resume.ResumePoint | None, log: RunLog, *, optimizer_starts_anew: bool
) -> None:
    """Train, once the engine is the one asked for and the disk has room; an earlier run gives way only now."""
    is_main = trainer.args.process_index == 0
    trainer.remove_callback(PrinterCallback)
    for callback in watchers(trainer, recipe):
        trainer.add_callback(callback)
    engine = ranks.together(lambda: engine_check.check(trainer.accelerator, engine_check.asked_for()))
    if is_main:
        say(engine_check.first_line(engine, trainer.step_sampler.rows_per_step, trainer.args.device))
    ranks.together(lambda: preflight.check_run(trainer))
    ranks.together(lambda: resume.let_go_of_earlier_run(recipe, point) if is_main else None)
    if is_main:
        log.open(Path(trainer.args.output_dir) / "train.log")
    with consolidated.optimizer_starts_anew() if optimizer_starts_anew else contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=None if point is None else str(point.path))


def _ready_to_learn(model: Any, recipe: Recipe, arguments: Any, *, reads_features: bool) -> Any:
    """Return the model with its adapters on and its fast layers in; what learns is chosen here and nowhere later."""
    inner = model.model
    inner.trims_vision_tower = recipe.training.trim_vision_tower
    inner.reads_vision_features = reads_features
    inner.sums_gradients_as_they_come = arguments.deepspeed_plugin is not None
    model = make_trainable(model, recipe)
    if recipe.training.fused_lora:
        fuse_lora(model)
    if recipe.training.lean_layers and not keeps_elsewhere(arguments):
        make_lean(inner.language_model)
    return model


def to_be_saved(recipe: Recipe) -> Recipe:
    """Return the recipe without the leave to replace an earlier run, which was given once and not for running it again."""
    saved = copy.deepcopy(recipe)
    saved.training.overwrite_output_dir = False
    return saved
