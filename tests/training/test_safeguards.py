"""Bad numbers and lost memory end, skip or split a step; the weights see none of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from vir_hf.errors import DataError, RunError
from vir_hf.recipe.load import Recipe, load_recipe
from vir_hf.training import run as training
from vir_hf.training.run import train


def recipe_for(root: Path, output_dir: Path, *more: str) -> Recipe:
    kind = ["lora=none", "quantization=none", "trainable.language_model=full"]
    overrides = tiny.training_overrides(root, output_dir, **{"training.max_steps": 3})
    return load_recipe([*overrides, *kind, "training.save_steps=1", "training.save_total_limit=10", *more])


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


class Trainer(training.LlavaTrainer):
    """A trainer whose second step is disturbed."""

    disturb: Any = None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return self.disturb(self, loss, inputs)


def disturbing(monkeypatch: pytest.MonkeyPatch, disturb: Any) -> None:
    monkeypatch.setattr(training, "LlavaTrainer", type("Disturbed", (Trainer,), {"disturb": staticmethod(disturb)}))


def test_a_bad_loss_stops_before_the_weights_and_saves_the_batch(
    tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def disturb(trainer: Any, loss: torch.Tensor, inputs: Any) -> torch.Tensor:
        calls.append(trainer.state.global_step)
        return loss * float("nan") if calls.count(1) == 1 and calls[-1] == 1 else loss

    disturbing(monkeypatch, disturb)
    with pytest.raises(
        RunError, match=r"step 2: loss nan.*with rows row-.*weights were not touched.*checkpoint-1 is left"
    ):
        train(recipe_for(tiny_parts, tmp_path))
    saved = torch.load(tmp_path / "bad_numbers" / "step-2-rank-0.pt", weights_only=True)
    facts = json.loads((tmp_path / "bad_numbers" / "step-2-rank-0.json").read_text())
    assert len(saved) == 1 and saved[0]["row_ids"] == facts["row_ids"] and len(facts["row_ids"]) == 2
    assert {"input_ids", "labels", "pixel_values"} <= set(saved[0])
    assert facts["losses"][0] == "nan" and facts["losses"][1] != "nan"


class BreakGradient(TrainerCallback):
    """Puts an infinity into one gradient, once."""

    def __init__(self, step: int):
        self.step = step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        weight = next(p for p in kwargs["model"].parameters() if p.requires_grad)
        weight.register_hook(lambda grad: grad * float("inf") if state.global_step == self.step - 1 else grad)


def test_a_bad_gradient_with_a_good_loss_is_seen(tiny_parts: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"step 2: loss \d.*gradient norm (nan|inf)"):
        train(recipe_for(tiny_parts, tmp_path), [BreakGradient(2)])
    facts = json.loads((tmp_path / "bad_numbers" / "step-2-rank-0.json").read_text())
    assert len(facts["row_ids"]) == 4  # which one it was, the loss does not say


def test_a_skipped_step_changes_no_weight_and_is_counted(
    tiny_parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = ("training.on_bad_numbers=skip", "training.max_skipped_steps=1")
    with caplog.at_level(logging.WARNING):
        metrics = train(recipe_for(tiny_parts, tmp_path, *more), [BreakGradient(2)])
    assert "step 2: loss" in caplog.text and "skipped" in caplog.text
    first, second, third = (weights_of(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in second)
    assert [skipped["step"] for skipped in metrics["skipped_steps"]] == [2]
    assert len(metrics["skipped_steps"][0]["rows"]) == 4
    assert [entry["step"] for entry in metrics["loss_history"]] == [1, 3]
    assert all(entry["loss"] == entry["loss"] for entry in metrics["loss_history"])


def test_too_many_skipped_steps_end_the_run(tiny_parts: Path, tmp_path: Path) -> None:
    more = ("training.on_bad_numbers=skip", "training.max_skipped_steps=0")
    with pytest.raises(RunError, match=r"after 0 skipped steps \(training.max_skipped_steps\)"):
        train(recipe_for(tiny_parts, tmp_path, *more), [BreakGradient(2)])


def test_micro_batches_with_nothing_supervised_are_counted_and_harmless(tiny_parts: Path, tmp_path: Path) -> None:
    rows = json.loads((tiny_parts / "rows.json").read_text())
    (tmp_path / "images").mkdir()
    for path in (tiny_parts / "images").iterdir():
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    for row in rows[:4]:
        row["image"] = "0005.png"
    (tmp_path / "images" / "0005.png").write_bytes(b"no picture")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = [f"data.data_path={tmp_path / 'rows.json'}", f"data.image_folder={tmp_path / 'images'}"]
    # As if it had broken after the check.
    more = [*data, "data.on_bad_image=skip", "data.check=false", "training.per_device_train_batch_size=1"]
    with pytest.raises(
        DataError, match=r"step 1: pictures cannot be opened; the last is row .*data.max_bad_fraction=0.05"
    ):
        train(recipe_for(tiny_parts, tmp_path / "stopped", *more))
    metrics = train(recipe_for(tiny_parts, tmp_path / "run", *more, "data.max_bad_fraction=0.99"))
    assert metrics["unsupervised_micro_batches"] == len(metrics["masked_rows"]) > 0
    assert all("0005.png" in row["reason"] for row in metrics["masked_rows"])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights_of(tmp_path / "run").values())


def fail_once(after: str) -> Any:
    """A disturbance that runs out of memory once, in the second step: behind the forward pass or inside the backward."""
    state = {"calls": 0, "failed": False}

    def disturb(trainer: Any, loss: torch.Tensor, inputs: Any) -> torch.Tensor:
        if trainer.state.global_step != 1 or state["failed"]:
            return loss
        state["calls"] += 1
        if state["calls"] == 2:  # its second micro-batch, so that gradients of the first are there already
            state["failed"] = True
            if after == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            weight = trainer.model.model.language_model.layers[0].self_attn.q_proj.weight

            def fail(grad: torch.Tensor) -> None:
                handle.remove()
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

            handle = weight.register_post_accumulate_grad_hook(fail)
        return loss

    return disturb


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_split_micro_batch_gives_the_same_gradients(
    where: str, tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = ("training.learning_rate=0.1", "training.optim=sgd", "training.max_grad_norm=0", "model.dtype=float32")
    undisturbed = train(recipe_for(tiny_parts, tmp_path / "whole", *rates, "training.max_steps=2"))
    disturbing(monkeypatch, fail_once(where))
    more = (*rates, "training.max_steps=2", "training.on_out_of_memory=split")
    metrics = train(recipe_for(tiny_parts, tmp_path / "split", *more))
    assert metrics["split_micro_batches"] == 1
    mine, theirs = weights_of(tmp_path / "split"), weights_of(tmp_path / "whole")
    before = weights_of(tmp_path / "whole" / "checkpoint-1")
    for name, tensor in theirs.items():
        # SGD: the weights differ by as much as the gradients do, against the size of the step.
        torch.testing.assert_close(mine[name] - before[name], tensor - before[name], rtol=1e-4, atol=2e-7)
    for name in ("num_rows", "num_supervised_tokens", "num_images"):
        assert metrics[name] == undisturbed[name]


def test_later_micro_batches_as_large_are_halved_beforehand(
    tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturbing(monkeypatch, fail_once("forward"))
    metrics = train(recipe_for(tiny_parts, tmp_path, "training.on_out_of_memory=split"))
    state = torch.load(tmp_path / "checkpoint-3" / "rank_0.pt", weights_only=True)["counters"]
    assert state["num_splits"] == metrics["split_micro_batches"] >= 1
    assert state["smallest_failed"] > 0


def test_out_of_memory_names_rows_tokens_and_remedy(
    tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturbing(monkeypatch, fail_once("forward"))
    with pytest.raises(RunError) as error:
        train(recipe_for(tiny_parts, tmp_path))
    message = str(error.value)
    assert "step 2: out of memory in a micro-batch of 2 row(s) and " in message and "rows row-" in message
    assert "training.per_device_train_batch_size=1" in message and "training.on_out_of_memory=split" in message
    assert "checkpoint-1 is left as it was" in message


def test_one_row_that_does_not_fit_cannot_be_split(
    tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturbing(monkeypatch, fail_once("forward"))
    more = ("training.on_out_of_memory=split", "training.per_device_train_batch_size=1")
    with pytest.raises(RunError, match=r"micro-batch of 1 row\(s\).*a smaller training.max_length"):
        train(recipe_for(tiny_parts, tmp_path, *more))


def test_other_errors_are_not_taken_for_lost_memory(
    tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturb(trainer: Any, loss: torch.Tensor, inputs: Any) -> torch.Tensor:
        raise RuntimeError("shapes do not fit")

    disturbing(monkeypatch, disturb)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(recipe_for(tiny_parts, tmp_path, "training.on_out_of_memory=split"))
