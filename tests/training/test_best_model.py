"""What is saved under `training.load_best_model_at_end` is the best step's weights, to the bit, and says which step that was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from vir_hf import DataError
from vir_hf.publishing.card import RunFacts, make_card
from vir_hf.recipe.load import Recipe, load_recipe
from vir_hf.training import checkpoints
from vir_hf.training.run import train

# What learns, and in which file of a checkpoint it lies.
KINDS: dict[str, dict[str, object]] = {
    "full": {"lora": "none", "trainable.language_model": "full", "model.dtype": "float32"},
    "projector": {"lora": "none", "trainable.language_model": "frozen", "model.dtype": "float32"},
    "lora": {},
    "lora and a tower beside it": {"trainable.vision_tower": "full", "model.dtype": "float32"},
}


class Worsen(TrainerCallback):
    """Ruins every learning weight after a step, so that the steps before it are better without doubt."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


class Judge(TrainerCallback):
    """Says how good each step is, in place of an evaluation: beside a random, frozen head every loss is about the same."""

    def __init__(self, losses: dict[int, float]) -> None:
        self.losses = losses

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics["eval_loss"] = self.losses[state.global_step]


FIRST_IS_BEST = {step: float(step) for step in range(1, 7)}
SECOND_IS_BEST = {1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0, 5: 6.0, 6: 7.0}


def recipe_for(root: Path, out: Path, **changes: object) -> Recipe:
    values: dict[str, object] = {
        "quantization": "none",
        "data.eval_path": root / "rows.json",
        "training.eval_strategy": "steps",
        "training.eval_steps": 1,
        "training.save_steps": 1,
        "training.save_total_limit": 10,
        "training.max_steps": 4,
        "training.learning_rate": 1e-3,
        "training.warmup_steps": 0,
        "training.lr_scheduler_type": "constant",
        "training.logging_steps": 1,
        "training.load_best_model_at_end": "true",
        **changes,
    }
    return load_recipe(tiny.training_overrides(root, out, **values))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    names = ("model.safetensors", "adapter_model.safetensors", "trained_weights.safetensors")
    return {
        f"{name}:{key}": tensor
        for name in names
        if (folder / name).is_file()
        for key, tensor in load_file(folder / name).items()
    }


def differing(one: Path, other: Path) -> list[str]:
    left, right = weights(one), weights(other)
    assert left and left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def test_the_best_step_is_the_one_of_the_lowest_loss(tiny_parts: Path, tmp_path: Path) -> None:
    metrics = train(recipe_for(tiny_parts, tmp_path, **KINDS["full"]), callbacks=[Worsen(3)])
    losses = {entry["step"]: entry["loss"] for entry in metrics["evaluation_history"]}
    assert len(losses) == 4 and min(losses[3], losses[4]) > max(losses[1], losses[2])
    best = min(losses, key=lambda step: losses[step])
    assert metrics["saved_step"] == best
    assert metrics["best"] == {"step": best, "metric": "loss", "value": losses[best]}
    assert differing(tmp_path, tmp_path / f"checkpoint-{best}") == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_steps_bits_are_saved(kind: str, tiny_parts: Path, tmp_path: Path) -> None:
    metrics = train(recipe_for(tiny_parts, tmp_path, **KINDS[kind]), callbacks=[Judge(SECOND_IS_BEST)])
    best = metrics["saved_step"]
    assert best == 2 and metrics["best"] == {"step": 2, "metric": "loss", "value": 1.0}
    assert differing(tmp_path, tmp_path / f"checkpoint-{best}") == []
    assert differing(tmp_path, tmp_path / "checkpoint-4") != []
    from safetensors.torch import load_file as load

    projector = load(tmp_path / "projector" / "projector.safetensors")  # what the next stage starts from
    there = weights(tmp_path)
    name = next(key for key in there if key.endswith("linear_1.weight"))
    assert torch.equal(projector["linear_1.weight"], there[name].to(projector["linear_1.weight"].dtype))
    card = str(make_card(RunFacts.read(tmp_path), "me/mine"))
    assert f"the weights of step {best} of 4" in card and f"step {best} the best: loss" in card


def test_without_it_the_last_step_is_saved_and_said(tiny_parts: Path, tmp_path: Path) -> None:
    metrics = train(
        recipe_for(tiny_parts, tmp_path, **KINDS["full"], **{"training.load_best_model_at_end": "false"}),
        callbacks=[Worsen(3)],
    )
    assert metrics["saved_step"] == 4 and metrics["best"] is None
    assert differing(tmp_path, tmp_path / "checkpoint-4") == []
    assert "Which step" not in str(make_card(RunFacts.read(tmp_path), "me/mine"))


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_best_is_kept_under_any_limit_and_saved_between_two_regular_checkpoints(
    kind: str, limit: int, tiny_parts: Path, tmp_path: Path
) -> None:
    changes = {"training.save_total_limit": limit, "training.save_steps": 2, "training.max_steps": 6}
    metrics = train(recipe_for(tiny_parts, tmp_path, **KINDS[kind], **changes), callbacks=[Judge(FIRST_IS_BEST)])
    assert metrics["saved_step"] == 1  # a step that save_steps alone would not have kept
    left = {found.step for found in checkpoints.list_checkpoints(tmp_path)}
    assert {1, 6} <= left and len(left) <= limit + 1
    assert differing(tmp_path, tmp_path / "checkpoint-1") == []


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_saves_the_best_of_before_also_when_its_folder_has_moved(
    kind: str, tiny_parts: Path, tmp_path: Path
) -> None:
    judge = Judge(SECOND_IS_BEST)
    whole = train(recipe_for(tiny_parts, tmp_path / "whole", **KINDS[kind]), callbacks=[judge])
    assert whole["saved_step"] == 2
    for step in (3, 4):  # in the middle, and with nothing left to do
        moved = tmp_path / f"moved-{step}"
        shutil.copytree(tmp_path / "whole", moved, ignore=shutil.ignore_patterns("metrics.json"))
        for later in range(step + 1, 5):
            shutil.rmtree(moved / f"checkpoint-{later}")
        recipe = recipe_for(tiny_parts, moved, **KINDS[kind], **{"training.resume": "auto"})
        metrics = train(recipe, callbacks=[judge])
        assert metrics["saved_step"] == whole["saved_step"] and metrics["best"] == whole["best"]
        assert differing(moved, tmp_path / "whole" / f"checkpoint-{whole['saved_step']}") == []
    # From a checkpoint of another folder, in which the best lies.
    resumed = {"training.resume": tmp_path / "whole" / "checkpoint-3"}
    metrics = train(recipe_for(tiny_parts, tmp_path / "other", **KINDS[kind], **resumed), callbacks=[judge])
    assert metrics["saved_step"] == whole["saved_step"]
    assert differing(tmp_path / "other", tmp_path / "whole" / f"checkpoint-{whole['saved_step']}") == []


def test_a_best_checkpoint_that_is_gone_or_damaged_is_said_and_the_last_saved(
    tiny_parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    judge = Judge(SECOND_IS_BEST)
    train(recipe_for(tiny_parts, tmp_path / "run", **KINDS["full"]), callbacks=[judge])
    for damage in ("cut", "gone"):
        run = tmp_path / damage
        shutil.copytree(tmp_path / "run", run, ignore=shutil.ignore_patterns("metrics.json"))
        if damage == "gone":
            shutil.rmtree(run / "checkpoint-2")
            shutil.rmtree(tmp_path / "run")  # where the resumed state would look for it
        else:
            (run / "checkpoint-2" / "model.safetensors").write_bytes(b"cut")
        caplog.clear()
        metrics = train(recipe_for(tiny_parts, run, **KINDS["full"], **{"training.resume": "auto"}), callbacks=[judge])
        assert metrics["saved_step"] == 4 and metrics["best"]["step"] == 2
        assert "the best weights cannot be loaded" in caplog.text
        assert differing(run, run / "checkpoint-4") == []
        card = str(make_card(RunFacts.read(run), "me/mine"))
        assert "the weights of step 4 of 4. Evaluation during training found step 2 the best" in card


def test_the_evaluation_loss_is_the_saved_models_own(tiny_parts: Path, tmp_path: Path) -> None:
    """Over one batch of all rows, padded, with the loss of the model's own forward pass."""
    from vir_hf import LlavaDataCollator, LlavaForCausalLM
    from vir_hf.data.sources import load_llava_dataset
    from vir_hf.model.for_use import load_processor

    changes = {"training.max_steps": 2, "training.per_device_eval_batch_size": 12}
    metrics = train(recipe_for(tiny_parts, tmp_path, **KINDS["full"], **changes))
    rows = list(load_llava_dataset(tiny_parts / "rows.json", tiny_parts / "images", decode_images=False))
    batch = LlavaDataCollator(load_processor(tmp_path), padding_free=False)(rows)
    model = LlavaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(**batch).loss.item()
    found = {entry["step"]: entry["loss"] for entry in metrics["evaluation_history"]}[metrics["saved_step"]]
    assert found == pytest.approx(expected, rel=1e-4)


def rows_with_faults(root: Path, folder: Path) -> Path:
    rows = json.loads((root / "rows.json").read_text())
    (folder / "broken.png").write_bytes(b"<html>not found</html>")
    shutil.copytree(root / "images", folder, dirs_exist_ok=True)
    rows[0]["image"] = "broken.png"
    rows[1]["image"] = "missing.png"
    rows[2]["conversations"] = [{"from": "human", "value": "<image>\nWhat?"}]
    path = folder / "heldout.json"
    path.write_text(json.dumps(rows))
    return path


def test_evaluation_rows_are_read_like_training_rows(tiny_parts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "heldout"
    folder.mkdir()
    path = rows_with_faults(tiny_parts, folder)
    where = {"data.eval_path": path, "data.eval_image_folder": folder, "training.max_steps": 1, **KINDS["full"]}
    for policy, message in (
        ({}, "rows cannot be used"),
        ({"data.on_bad_row": "skip"}, "data.on_bad_image=skip"),
        ({"data.on_bad_row": "skip", "data.on_bad_image": "skip"}, "data.max_bad_fraction"),
    ):
        with pytest.raises(DataError, match=message):
            train(recipe_for(tiny_parts, tmp_path / "refused", **where, **policy))
    skip = {"data.on_bad_row": "skip", "data.on_bad_image": "skip", "data.max_bad_fraction": 0.5}
    metrics = train(recipe_for(tiny_parts, tmp_path / "run", **where, **skip))
    assert {bad["id"] for bad in metrics["skipped_eval_rows"]} == {"row-0", "row-1", "row-2"}
    assert metrics["skipped_rows"] == [] and metrics["evaluation_history"]


def test_evaluation_pictures_may_be_addresses_if_training_pictures_may(
    tiny_parts: Path, tmp_path: Path, http_folder: tuple[Path, str]
) -> None:
    served, address = http_folder
    shutil.copytree(tiny_parts / "images", served, dirs_exist_ok=True)
    rows = json.loads((tiny_parts / "rows.json").read_text())
    for row in rows:
        if "image" in row:
            row["image"] = f"{address}/{row['image']}"
    path = tmp_path / "heldout.json"
    path.write_text(json.dumps(rows))
    changes = {"data.eval_path": path, "training.max_steps": 1, **KINDS["full"]}
    with pytest.raises(DataError, match="allow_urls"):
        train(recipe_for(tiny_parts, tmp_path / "refused", **changes))
    metrics = train(recipe_for(tiny_parts, tmp_path / "run", **changes, **{"data.allow_urls": "true"}))
    plain = train(recipe_for(tiny_parts, tmp_path / "plain", **KINDS["full"], **{"training.max_steps": 1}))
    assert metrics["evaluation_history"] == plain["evaluation_history"]
