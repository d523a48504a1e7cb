"""The training page: what a run computes, prints and leaves behind."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from vir_hf import DataError, LlavaDataCollator, RecipeError, build
from vir_hf.data.sources import load_recipe_rows
from vir_hf.recipe.load import load_recipe
from vir_hf.training.run import train
from vir_hf.training.step import compact_supervised

FULL = {"quantization": "none", "lora": "none", "trainable.language_model": "full", "model.dtype": "float32"}


def run(tiny_parts: Path, out: Path, **changes):
    return train(load_recipe(tiny.training_overrides(tiny_parts, out, **changes)))


def losses_of(metrics) -> list[float]:
    return [entry["loss"] for entry in metrics["loss_history"]]


def test_the_first_loss_is_the_hand_computed_one(tiny_parts: Path, tmp_path: Path) -> None:
    overrides = tiny.training_overrides(
        tiny_parts, tmp_path, **FULL, **{"training.max_steps": 1, "training.global_batch_size": 12, "training.seed": 4}
    )
    recipe = load_recipe(overrides)
    metrics = train(recipe)
    from vir_hf.model.for_training import load_model_and_processor
    from vir_hf.model.precision import choose_precision

    torch.manual_seed(4)
    import transformers

    transformers.set_seed(4)
    model, processor = load_model_and_processor(recipe, choose_precision("float32"))
    batch = LlavaDataCollator(processor, padding_free=False)(list(load_recipe_rows(recipe)))
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = model.eval()(**batch).logits[:, :-1]
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    by_hand = -(picked * (labels != -100)).sum() / (labels != -100).sum()
    assert metrics["first_loss"] == pytest.approx(by_hand.item(), rel=1e-5)
    assert metrics["num_supervised_tokens"] == int((labels != -100).sum())


@pytest.mark.parametrize(
    "changes",
    [
        {"training.padding_free": "false"},
        {"training.share_prefixes": "false"},
        {"training.supervised_positions_only": "false"},
        {"training.per_device_train_batch_size": 1},
        {"training.max_tokens_per_batch": 300, "training.per_device_train_batch_size": "null"},
        {"training.balance_tokens": "false"},
        {"training.activation_checkpointing": "false"},
        {"training.trim_vision_tower": "false"},
        {"training.fused_head": "false"},
        {"training.activation_checkpointing": "false", "training.lean_layers": "false"},
    ],
    ids=lambda changes: list(changes)[-1].removeprefix("training."),
)
def test_no_switch_changes_the_losses(tiny_parts: Path, tmp_path: Path, changes) -> None:
    common = {**FULL, "training.max_steps": 4, "training.seed": 1, "training.activation_checkpointing": "true"}
    plain = run(tiny_parts, tmp_path / "plain", **common)
    switched = run(tiny_parts, tmp_path / "switched", **{**common, **changes})
    assert losses_of(switched) == pytest.approx(losses_of(plain), rel=1e-5)


def test_scoring_supervised_positions_only_is_the_loss_over_all(tiny_parts: Path) -> None:
    torch.manual_seed(0)
    model, processor = build(str(tiny_parts / "lm"), str(tiny_parts / "tower"), "vicuna_v1")
    from vir_hf import load_llava_dataset

    rows = list(load_llava_dataset(tiny_parts / "rows.json", tiny_parts / "images", decode_images=False))
    batch = LlavaDataCollator(processor)(rows[:5])
    compact = compact_supervised(batch)
    assert compact["labels"].shape[1] == int((batch["labels"] != -100).sum()) + 1
    with torch.no_grad():
        assert model(**compact).loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)
    masked = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert compact_supervised(masked)["labels"].tolist() == [[-100, -100]]


@pytest.mark.parametrize(("warmup", "is_said"), [(0.03, True), (0, False)])
def test_a_run_that_only_warms_up_is_told(
    tiny_parts: Path, tmp_path: Path, caplog, warmup: float, is_said: bool
) -> None:
    metrics = run(tiny_parts, tmp_path, **FULL, **{"training.max_steps": 1, "training.warmup_steps": warmup})
    assert ("all 1 steps of this run warm up" in caplog.text) == is_said
    assert (metrics["loss_history"][0]["learning_rate"] == 0) == is_said


def test_pretrain_moves_the_projector_alone(tiny_parts: Path, tmp_path: Path) -> None:
    changes = {
        "experiment": "local_lite_pretrain",
        "training.max_steps": 3,
        "quantization": "none",
        "model.template": "plain",
    }
    run(tiny_parts, tmp_path / "a", **{**changes, "training.max_steps": 1, "training.learning_rate": 1e-12})
    run(tiny_parts, tmp_path / "b", **changes)
    models = [LlavaForConditionalGeneration.from_pretrained(tmp_path / name).state_dict() for name in "ab"]
    moved = {name for name in models[0] if (models[0][name] - models[1][name]).abs().max() > 1e-6}
    assert moved and all("multi_modal_projector" in name for name in moved)


def test_a_full_run_leaves_a_model_that_opens_in_stock_transformers(tiny_parts: Path, tmp_path: Path) -> None:
    metrics = run(tiny_parts, tmp_path, **FULL, **{"training.max_steps": 3})
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(model, LlavaForConditionalGeneration)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id
    saved = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert saved["num_steps"] == 3 and saved["loss_history"] == metrics["loss_history"]


def test_the_saved_recipe_runs_again_to_the_same_losses(tiny_parts: Path, tmp_path: Path) -> None:
    first = run(tiny_parts, tmp_path / "a", **{"training.max_steps": 3})
    again = load_recipe([f"training.output_dir={tmp_path / 'b'}"], recipe_file=tmp_path / "a" / "recipe.yaml")
    assert losses_of(train(again)) == losses_of(first)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data.data_path": "/no/such.json"}, DataError, r"such\.json"),
        ({"model.language_model": "/no/such/model"}, RecipeError, r"model\.language_model|model\.tokenizer|tokenizer"),
        ({"model.vision_tower": "/no/such/tower"}, RecipeError, r"model\.vision_tower"),
        ({"model.template": "auto"}, RecipeError, "chat template"),
    ],
)
def test_what_cannot_run_is_said_before_training(tiny_parts: Path, tmp_path: Path, changes, error, message) -> None:
    with pytest.raises(error, match=message):
        run(tiny_parts, tmp_path, **changes)


def test_a_recipe_changed_in_python_is_held_to_the_same_rules(tiny_parts: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny.training_overrides(tiny_parts, tmp_path))
    recipe.trainable.language_model, recipe.trainable.vision_tower = "full", "lora"
    with pytest.raises(RecipeError, match="trainable.language_model: is full, but its weights are loaded in 4 bit"):
        train(recipe)
    recipe = load_recipe(tiny.training_overrides(tiny_parts, tmp_path))
    recipe.data.streaming = True
    with pytest.raises(RecipeError, match="max_steps"):
        train(recipe)


def test_a_model_without_a_tokenizer_is_refused_kindly(tiny_parts: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(tiny_parts / "lm").save_pretrained(tmp_path / "bare")
    with pytest.raises(RecipeError, match="tokenizer"):
        run(tiny_parts, tmp_path / "out", **{"model.language_model": tmp_path / "bare"})


def test_a_malformed_file_a_wrong_row_and_a_missing_image_exit_with_2(tiny_parts: Path, tmp_path: Path) -> None:
    cases = {
        "malformed": ('[{"id": 1,', "line 1"),
        "no row": (json.dumps([{"id": "a-row", "text": "hello"}]), "a-row"),
        "missing image": (
            json.dumps(
                [
                    {
                        "id": "r",
                        "image": "none.jpg",
                        "conversations": [{"from": "human", "value": "<image>\na"}, {"from": "gpt", "value": "b"}],
                    }
                ]
            ),
            "none.jpg",
        ),
    }
    for name, (content, expected) in cases.items():
        path = tmp_path / f"{name}.json"
        path.write_text(content, encoding="utf-8")
        overrides = tiny.training_overrides(tiny_parts, tmp_path / "out", **{"data.data_path": f"'{path}'"})
        with pytest.raises(DataError) as caught:
            train(load_recipe(overrides))
        assert expected in str(caught.value), name
    command = [sys.executable, "-m", "vir_hf.train", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "none.jpg" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_picture_that_breaks_in_training_ends_the_run_with_one_line(
    tiny_parts: Path, tmp_path: Path, num_workers: int
) -> None:
    """Damaged in the middle, where no header shows it; met by a worker, which must not keep the run from ending."""
    tiny.training_overrides(tiny_parts, tmp_path / "out")
    buffer = io.BytesIO()
    Image.effect_noise((300, 200), 80).convert("RGB").save(buffer, "JPEG")
    (tmp_path / "good.jpg").write_bytes(buffer.getvalue())
    data = bytearray(buffer.getvalue())
    data[len(data) // 2 : len(data) // 2 + 40] = b"\xff\xd8" * 20
    (tmp_path / "broken.jpg").write_bytes(data)
    talk = [{"from": "human", "value": "<image>\na"}, {"from": "gpt", "value": "b"}]
    pictures = ["broken.jpg" if number == 3 else "good.jpg" for number in range(40)]
    rows = [{"id": f"r{number}", "image": name, "conversations": talk} for number, name in enumerate(pictures)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    changes = {
        "data.data_path": tmp_path / "rows.json",
        "data.image_folder": tmp_path,
        "training.num_train_epochs": 1,
        "training.dataloader_num_workers": num_workers,
    }
    overrides = tiny.training_overrides(tiny_parts, tmp_path / "out", **FULL, **changes)
    command = [sys.executable, "-m", "vir_hf.train", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    error = done.stderr.partition("error: row r3: ")[2].partition("\n")[0]
    assert "broken.jpg" in error and "data.on_bad_image=skip" in error and "Traceback" not in done.stderr


@pytest.mark.real_data
def test_loss_falls_on_real_photographs_and_rows(shared_data: Path, tmp_path: Path) -> None:
    changes = {
        "data.data_path": shared_data / "coco" / "llava_captions.json",
        "data.image_folder": shared_data / "coco" / "images",
        "model.language_model": shared_data / "weights" / "stories260K",
        "model.vision_tower": shared_data / "weights" / "clip_tiny_random",
        "training.max_length": 512,
        "training.max_steps": 25,
        "training.learning_rate": 2e-3,
        "training.global_batch_size": 8,
        "training.per_device_train_batch_size": 8,
        "training.group_by_image": "true",
        **FULL,
    }
    recipe = load_recipe(
        [
            f"{key}={value}"
            for key, value in {"experiment": "local_lite", "training.output_dir": tmp_path, **changes}.items()
        ]
    )
    losses = losses_of(train(recipe))
    assert sum(losses[-5:]) / 5 < 0.8 * sum(losses[:3]) / 3
