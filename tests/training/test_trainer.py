"""What `LlavaTrainer` changes of TRL's trainer, each by what a run shows; the rest stands with resume and safeguards."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_training import recipe_for, run
from transformers import TrainerCallback

from vir_hf.batches import sampling
from vir_hf.errors import RunError
from vir_hf.kernels import fused_head
from vir_hf.training.trainer import LlavaTrainer
from vir_hf.training.watch import RankWatch

FULL = {"lora": "none", "trainable.language_model": "full", "trainable.projector": "full"}


class Lines(TrainerCallback):
    """Keeps every line that is logged."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.lines.append(dict(logs))

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "loss" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_step_is_scaled_by_the_supervised_tokens_of_all_its_micro_batches(tiny_parts: Path, tmp_path: Path) -> None:
    # The rows have answers of different length, so a mean of micro-batch means would be another number.
    losses = {}
    for size in (1, 4):
        lines = Lines()
        changes = {"training.per_device_train_batch_size": size, "training.max_steps": 2, **FULL}
        run(tiny_parts, tmp_path / str(size), (lines,), **changes)
        losses[size] = [line["loss"] for line in lines.steps]
    assert losses[1] == pytest.approx(losses[4], rel=1e-5)
    one, four = weights(tmp_path / "1"), weights(tmp_path / "4")
    assert max(float((one[name] - four[name]).abs().max()) for name in one) < 1e-4


def test_no_pickle_of_the_arguments_is_left_in_a_saved_folder(tiny_parts: Path, tmp_path: Path) -> None:
    run(tiny_parts, tmp_path, **{"training.max_steps": 1, "training.save_strategy": "steps", "training.save_steps": 1})
    assert (tmp_path / "checkpoint-1").is_dir()
    assert list(tmp_path.rglob("training_args.bin")) == []


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_checkpoint_is_unpickled_into_code(
    tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"training.max_steps": 2, "training.save_strategy": "steps", "training.save_steps": 1, **FULL}
    run(tiny_parts, tmp_path / "out", **{**changes, "training.max_steps": 2})
    (tmp_path / "out" / "metrics.json").unlink()  # so that the run is not taken for finished
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(_Evil(tmp_path / "made")))
    upstream = transformers.Trainer._load_optimizer_and_scheduler

    def as_deepspeed_does(self: Any, checkpoint: Any) -> None:
        torch.load(tmp_path / "evil.pt", weights_only=False)
        upstream(self, checkpoint)

    monkeypatch.setattr(transformers.Trainer, "_load_optimizer_and_scheduler", as_deepspeed_does)
    with pytest.raises(Exception, match="[Ww]eights.only"):
        run(tiny_parts, tmp_path / "out", **{**changes, "training.resume": tmp_path / "out" / "checkpoint-1"})
    assert not (tmp_path / "made").exists()


def test_a_line_of_the_log_says_tokens_speed_waiting_and_memory(tiny_parts: Path, tmp_path: Path) -> None:
    lines = Lines()
    metrics = run(tiny_parts, tmp_path, (lines,), **{"training.max_steps": 3})
    assert [line["step"] for line in metrics["loss_history"]] == [1, 2, 3]
    for line in lines.steps:
        assert line["supervised_tokens"] > 0 and line["tokens_per_second"] > 0 and line["memory_gib"] > 0
    assert sum(line["supervised_tokens"] for line in lines.steps) == metrics["num_supervised_tokens"]


def test_the_time_a_step_waits_for_its_data_is_logged(
    tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = sampling.StepDataset.__getitem__

    def slowly(self: Any, plan: Any) -> Any:
        time.sleep(0.3)
        return read(self, plan)

    monkeypatch.setattr(sampling.StepDataset, "__getitem__", slowly)
    lines = Lines()
    run(tiny_parts, tmp_path, (lines,), **{"training.max_steps": 2})
    assert all(line["data_seconds"] >= 0.3 for line in lines.steps)


def test_evaluating_between_steps_changes_no_bit_of_training(tiny_parts: Path, tmp_path: Path) -> None:
    changes = {"training.max_steps": 4, "lora.lora_dropout": 0.5, "training.per_device_eval_batch_size": 2}
    evaluated = {
        "data.eval_path": tiny_parts / "rows.json",
        "training.eval_strategy": "steps",
        "training.eval_steps": 1,
    }
    histories, folders = [], []
    for name, more in (("without", {}), ("with", evaluated)):
        lines = Lines()
        run(tiny_parts, tmp_path / name, (lines,), **changes, **more)
        assert any("eval_loss" in line for line in lines.lines) == (name == "with")
        histories.append([line["loss"] for line in lines.steps])
        folders.append(tmp_path / name)
    assert histories[0] == histories[1]
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("is_fused", [True, False])
def test_the_head_that_the_recipe_names_scores_the_run(
    is_fused: bool, tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    score = fused_head.score
    monkeypatch.setattr(fused_head, "score", lambda *args: calls.append(1) or score(*args))
    run(tiny_parts, tmp_path, **{"training.max_steps": 2, "training.fused_head": str(is_fused).lower()})
    assert bool(calls) == is_fused


def test_parts_learn_at_the_rates_the_recipe_gives_them(
    tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    create = LlavaTrainer.create_optimizer

    def keep(self: Any, *args: Any) -> Any:
        made.append(create(self, *args))
        return made[-1]

    monkeypatch.setattr(LlavaTrainer, "create_optimizer", keep)
    rates = {"training.learning_rate": 1e-3, "training.projector_learning_rate": 3e-3}
    changes = {"training.max_steps": 1, "training.lr_scheduler_type": "constant", "training.warmup_steps": 0}
    run(tiny_parts, tmp_path, **changes, **rates, **FULL)
    assert {group["initial_lr"] for group in made[-1].param_groups} == {1e-3, 3e-3}


def test_a_run_whose_every_step_warms_up_is_told_so(
    tiny_parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tiny_parts, tmp_path, **{"training.max_steps": 1, "training.warmup_steps": 5})
    assert "warm up" in caplog.text


def test_the_steps_of_a_run_hold_the_rows_its_sampler_planned(
    tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    step = LlavaTrainer.training_step

    def keep(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        seen.append([row for batch in inputs["micro_batches"] for row in batch["row_ids"]])
        return step(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(LlavaTrainer, "training_step", keep)
    run(tiny_parts, tmp_path, **{"training.max_steps": 3})
    rows = [row["id"] for row in json.loads((tiny_parts / "rows.json").read_text(encoding="utf-8"))]
    assert [len(ids) for ids in seen] == [4, 4, 4]
    assert sorted(sum(seen, [])) == sorted(rows)
    assert recipe_for(tiny_parts, tmp_path).training.global_batch_size == 4


@pytest.mark.parametrize("missing", [None, "rank 1 on host b: gone for 70 s"])
def test_an_error_while_another_rank_is_gone_names_that_rank(
    missing: str | None, tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("connection reset by peer")

    monkeypatch.setattr(LlavaTrainer, "training_step", broken)
    monkeypatch.setattr(RankWatch, "explain", lambda self: missing)
    with pytest.raises(RunError if missing else RuntimeError, match=missing or "connection reset by peer"):
        run(tiny_parts, tmp_path, **{"training.max_steps": 1})
