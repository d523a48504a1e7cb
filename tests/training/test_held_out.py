"""Rows held out of training: no image on both sides, the same choice whatever the order, evaluated exactly, shown as it goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from test_best_model import KINDS
from transformers import TrainerCallback

from vir_hf import RecipeError
from vir_hf.data.sources import load_llava_dataset
from vir_hf.recipe.load import load_recipe
from vir_hf.training.held_out import split_by_image
from vir_hf.training.run import train


def write_rows(folder: Path, images_of_rows: list[list[int]]) -> Any:
    """Rows over drawn images; image 0 lies under two names, image 1 in two folders."""
    folder.mkdir(exist_ok=True)
    names = {}
    for number in {number for images in images_of_rows for number in images}:
        names[number] = [f"{number}.png", f"copy/{number}.png"]
        for name in names[number]:
            place = folder / name
            place.parent.mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (number * 40, 255 - number * 40, number)).save(place)
    rows = []
    for number, images in enumerate(images_of_rows):
        turn = {"from": "human", "value": "<image>" * len(images) + f"Question {number}?"}
        row = {"id": str(number), "conversations": [turn, {"from": "gpt", "value": "Answer."}]}
        if images:
            row["image"] = [names[image][number % 2] for image in images]
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows))
    return load_llava_dataset(folder / "rows.json", folder, decode_images=False)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    images=st.lists(st.lists(st.integers(0, 5), max_size=2, unique=True), min_size=4, max_size=14),
    seed=st.integers(0, 5),
    fraction=st.sampled_from([0.1, 0.25, 0.5]),
)
def test_no_image_is_on_both_sides_whatever_it_is_called(
    images: list[list[int]], seed: int, fraction: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = write_rows(tmp_path_factory.mktemp("split"), images)
    try:
        kept, held_out = split_by_image(rows, fraction, seed)
    except RecipeError as error:
        assert "data.eval_fraction" in str(error)
        return
    assert sorted([*kept, *held_out]) == list(range(len(images)))
    assert 0 < len(held_out) <= fraction * len(images)
    shown = [{image for number in part for image in images[number]} for part in (kept, held_out)]
    assert shown[0] & shown[1] == set()


def test_the_choice_follows_the_images_not_the_order_of_the_rows(tmp_path: Path) -> None:
    images = [[number % 6] for number in range(12)]
    rows = write_rows(tmp_path / "one", images)
    _, held_out = split_by_image(rows, 0.5, 3)
    other = write_rows(tmp_path / "two", images[::-1])
    _, turned = split_by_image(other, 0.5, 3)
    assert {images[number][0] for number in held_out} == {images[::-1][number][0] for number in turned}
    assert split_by_image(rows, 0.5, 4)[1] != held_out


def recipe_for(root: Path, out: Path, **changes: object) -> Any:
    values: dict[str, object] = {
        "quantization": "none",
        "training.max_steps": 3,
        "training.learning_rate": 1e-3,
        "training.warmup_steps": 0,
        "training.lr_scheduler_type": "constant",
        "training.logging_steps": 1,
        **KINDS["lora"],
        **changes,
    }
    return load_recipe(tiny.training_overrides(root, out, **values))


EVERY_STEP: dict[str, object] = {"data.eval_fraction": 0.4, "training.eval_strategy": "steps", "training.eval_steps": 1}


class TrainedOn(TrainerCallback):
    """Which rows the trainer was given."""

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        self.rows = train_dataloader.dataset.rows


def test_held_out_rows_are_evaluated_and_shown_and_not_trained_on(tiny_parts: Path, tmp_path: Path) -> None:
    seen = TrainedOn()
    metrics = train(recipe_for(tiny_parts, tmp_path, **EVERY_STEP), callbacks=[seen])
    assert [entry["step"] for entry in metrics["evaluation_history"]] == [1, 2, 3]
    panel = json.loads((tmp_path / "panel.json").read_text())
    held_out = {row["id"] for row in panel["rows"]}
    assert held_out and held_out.isdisjoint(seen.rows["id"])
    assert [entry["step"] for entry in panel["answers"]] == [1, 2, 3]
    assert all(len(entry["answers"]) == len(held_out) for entry in panel["answers"])
    page = (tmp_path / "report.html").read_text()
    for words in ("Loss a supervised token", "Right next tokens", "This run has ended", panel["rows"][0]["question"]):
        assert words in page
    assert "http" not in page.replace("http-equiv", "")


def test_looking_changes_no_bit_of_training(tiny_parts: Path, tmp_path: Path) -> None:
    shown = recipe_for(tiny_parts, tmp_path / "shown", **EVERY_STEP)
    blind = {"training.eval_steps": 3, "training.panel_size": 0, "training.report": "false"}
    hidden = recipe_for(tiny_parts, tmp_path / "hidden", **EVERY_STEP | blind)
    losses = [[entry["loss"] for entry in train(recipe)["loss_history"]] for recipe in (shown, hidden)]
    assert losses[0] == losses[1]
    left, right = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("shown", "hidden"))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert not (tmp_path / "hidden" / "report.html").exists() and not (tmp_path / "hidden" / "panel.json").exists()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_loss_is_a_mean_over_tokens_however_rows_are_batched(
    batch_size: int, tiny_parts: Path, tmp_path: Path
) -> None:
    changes = {"training.per_device_eval_batch_size": batch_size, "training.max_steps": 1, "training.panel_size": 0}
    metrics = train(recipe_for(tiny_parts, tmp_path, **EVERY_STEP | changes))
    (entry,) = metrics["evaluation_history"]
    one_by_one = train(
        recipe_for(tiny_parts, tmp_path / "one", **EVERY_STEP | changes | {"training.per_device_eval_batch_size": 1})
    )
    assert entry["loss"] == pytest.approx(one_by_one["evaluation_history"][0]["loss"], abs=1e-5)
    assert entry["token_accuracy"] == one_by_one["evaluation_history"][0]["token_accuracy"]


def test_a_run_that_gets_no_better_stops_early(tiny_parts: Path, tmp_path: Path) -> None:
    class Same(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            metrics["eval_loss"] = 1.0

    changes = {"training.max_steps": 8, "training.early_stopping_patience": 2, "training.panel_size": 0}
    recipe = recipe_for(tiny_parts, tmp_path, **EVERY_STEP | changes)
    assert train(recipe, callbacks=[Same()])["num_steps"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.eval_fraction": 0.7}, "data.eval_fraction: 0.7"),
        ({"data.eval_fraction": 0.1, "data.eval_path": "x.json"}, "Remove one of the two"),
        ({"data.eval_fraction": 0.1, "data.streaming": "true", "training.max_steps": 1}, "a stream is not split"),
        ({"training.early_stopping_patience": 2}, "training.early_stopping_patience: 2"),
        ({"training.panel_size": -1}, "training.panel_size: -1"),
    ],
)
def test_what_cannot_be_held_out_is_refused(
    changes: dict[str, object], message: str, tiny_parts: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_for(tiny_parts, tmp_path, **changes)


def test_a_panel_that_cannot_be_asked_does_not_end_the_run(
    tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vir_hf.training import panel

    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(panel, "ask", broken)
    metrics = train(recipe_for(tiny_parts, tmp_path, **EVERY_STEP | {"training.max_steps": 2}))
    assert len(metrics["evaluation_history"]) == 2 and not (tmp_path / "panel.json").exists()
    assert caplog.text.count("the panel's questions could not be answered") == 1


def test_a_question_too_long_for_the_model_is_passed_over(
    tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vir_hf.training import panel

    monkeypatch.setattr(panel, "MAX_NEW_TOKENS", 10**6)
    train(recipe_for(tiny_parts, tmp_path, **EVERY_STEP | {"training.max_steps": 1}))
    assert not (tmp_path / "panel.json").exists()
