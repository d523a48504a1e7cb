"""Going on from a checkpoint to the same bits: which one, whether this recipe may, and what is put back."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vir_hf.errors import RecipeError
from vir_hf.training import checkpoints

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe
from vir_hf.training.compatibility import LENGTH_KEYS, check_recipe, kind_of_change, recipe_changes
from vir_hf.training.ranks import rank_0

logger = logging.getLogger(__name__)

POSITION = "position.json"


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint a run goes on from."""

    path: Path
    step: int
    position: dict[str, Any]


def choose(recipe: Recipe, *, is_main: bool) -> ResumePoint | None:
    """Return the checkpoint to go on from, or `None` to begin at the start; the same on every rank.

    Raises:
        RecipeError: no whole checkpoint where one is named; a recipe changed so that the result would be another; or
            the output directory holds checkpoints of an earlier run that nobody asked to go on from, or a finished run.
    """
    point: ResumePoint | None = rank_0(lambda: _choose(recipe), is_main=is_main)
    return point


def _choose(recipe: Recipe) -> ResumePoint | None:
    wanted = recipe.training.resume
    output_dir = Path(recipe.training.output_dir)
    # A weights file that was cut short is made anew, and what is left of it kept under another name.
    output = checkpoints.run_folder(output_dir)
    was_finished = wanted == "auto" and output.owns(checkpoints.METRICS)
    damaged = checkpoints.damaged_weights(output_dir) if was_finished else None
    output.refuse_foreign(
        [name for name in checkpoints.OUTPUTS if name != damaged],
        f"training.output_dir={output_dir}",
        "Move it away, or name another training.output_dir.",
    )
    if wanted is None:
        _refuse_to_replace(recipe, output_dir)
        checkpoints.remove_leftovers(output_dir)
        return None
    for name in checkpoints.remove_leftovers(output_dir):
        logger.warning("%s: removed, a run ended while writing or deleting it", output_dir / name)
    if wanted == "auto":
        checkpoint, passed_over = checkpoints.newest_whole(output_dir)
        for bad in passed_over:
            logger.warning("%s: passed over: %s", bad.path, bad.reason)
        if checkpoint is None:
            if passed_over:
                raise RecipeError(
                    f"training.resume=auto: no checkpoint in {output_dir} is whole ({passed_over[0].path.name}: "
                    f"{passed_over[0].reason}). Delete them to begin again, or name another training.output_dir."
                )
            if damaged is None:  # else it is made anew
                _refuse_to_replace(recipe, output_dir)
            logger.warning("training.resume=auto: no checkpoint in %s, beginning at the start", output_dir)
            return None
        path, step = checkpoint.path, checkpoint.step
    else:
        path = Path(wanted).expanduser()
        reason = checkpoints.damage(path) if path.is_dir() else "there is no such folder"
        if reason is not None:
            raise RecipeError(
                f"training.resume={wanted}: cannot go on from it: {reason}. Name a whole checkpoint-N folder, or use "
                "training.resume=auto for the newest whole one."
            )
        if path.resolve().parent != output_dir.resolve():
            _refuse_to_replace(recipe, output_dir)
        step = int(json.loads((path / POSITION).read_text(encoding="utf-8"))["step"])
    check_recipe(recipe, path / "recipe.yaml")
    position = json.loads((path / POSITION).read_text(encoding="utf-8"))
    return ResumePoint(path, step, position)


def _refuse_to_replace(recipe: Recipe, output_dir: Path) -> None:
    """Raise if an earlier run's checkpoints or model would give way and nobody has said that they may."""
    if recipe.training.overwrite_output_dir:
        return
    found = checkpoints.list_checkpoints(output_dir)
    if found:
        raise RecipeError(
            f"training.output_dir={output_dir}: holds {found[0].path.name} of an earlier run. Add --resume "
            "(training.resume=auto) to go on from it, or name another training.output_dir, or delete it, or let this run replace "
            "it (training.overwrite_output_dir=true)."
        )
    if checkpoints.read_metrics(output_dir):
        if _both_are_tries(recipe, output_dir):
            logger.warning("%s: the model of an earlier run gives way; both have training.save_strategy=no", output_dir)
            return
        raise RecipeError(
            f"training.output_dir={output_dir}: holds the model of a finished run, which this one would replace. Name "
            "another training.output_dir, or delete it, or let this run replace it (training.overwrite_output_dir=true); "
            "--resume (training.resume=auto) leaves a finished run as it is."
        )


def _both_are_tries(recipe: Recipe, output_dir: Path) -> bool:
    """Whether this run and the finished one before it keep no checkpoints: a command tried again, as with the quickstart."""
    try:
        saved = yaml.safe_load((output_dir / checkpoints.RECIPE).read_text(encoding="utf-8"))
        before = saved["training"].get("save_strategy")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return False
    return str(before) == str(recipe.training.save_strategy) == "no"


def let_go_of_earlier_run(recipe: Recipe, point: ResumePoint | None) -> None:
    """Remove what says that an earlier run in the output directory is whole, and its checkpoints: this one takes its place.

    Its model stays until this run's own is saved. Nothing is removed when a run goes on, or before all was checked.
    """
    output_dir = Path(recipe.training.output_dir)
    if point is None or point.path.resolve().parent != output_dir.resolve():
        checkpoints.run_folder(output_dir).remove(checkpoints.METRICS)
        checkpoints.remove_all(output_dir)


def is_finished(recipe: Recipe) -> dict[str, Any] | None:
    """Return the metrics of this recipe's finished run in its output directory, if going on by itself was asked for.

    A run whose saved weights are damaged is not finished: it is made whole again from its newest checkpoint.
    """
    if recipe.training.resume != "auto":
        return None
    output_dir = Path(recipe.training.output_dir)
    try:
        metrics = checkpoints.read_metrics(output_dir)
        if not metrics:
            return None
        changes = recipe_changes(recipe, output_dir / "recipe.yaml")
    except (OSError, ValueError, RecipeError):
        return None
    is_same = not any(kind_of_change(key, recipe) == "refused" or key in LENGTH_KEYS for key in changes)
    if not is_same:
        return None
    damaged = checkpoints.damaged_weights(output_dir)
    if damaged is not None:
        logger.warning(
            "%s: this run was finished, but %s cannot be read any more; going on from its checkpoint",
            output_dir,
            damaged,
        )
        return None
    for checkpoint in checkpoints.list_checkpoints(output_dir):
        reason = checkpoints.damage(checkpoint.path)
        if reason is not None:
            logger.warning("%s: this checkpoint of the finished run is damaged: %s", checkpoint.path, reason)
    return metrics
