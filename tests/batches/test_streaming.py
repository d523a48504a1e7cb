"""Training from a stream: whole steps, every row, resumable."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import tiny

from vir_hf.batches.planning import measure_rows
from vir_hf.batches.streaming import StepStream, plan_stream
from vir_hf.data.sources import load_recipe_rows, share_of_stream
from vir_hf.model.for_training import load_model_and_processor
from vir_hf.model.precision import choose_precision
from vir_hf.recipe.load import load_recipe
from vir_hf.training.inputs import make_collator
from vir_hf.training.run import train

STREAMED = {"data.streaming": "true", "training.max_steps": 4}


def stream_of(recipe, world_size: int = 1, rank: int = 0) -> StepStream:
    _, processor = load_model_and_processor(recipe, choose_precision())
    rows = share_of_stream(load_recipe_rows(recipe), rank, world_size)
    return StepStream(rows, plan_stream(recipe, world_size, rank), processor, recipe.training.max_length)


def test_a_stream_gives_every_row_once_before_any_twice(tiny_parts: Path, tmp_path: Path) -> None:
    stream = stream_of(load_recipe(tiny.training_overrides(tiny_parts, tmp_path, **STREAMED)))
    steps = list(islice(stream, 6))  # 12 rows, 4 a step: two passes
    assert all(sum(len(batch) for batch in step) == 4 and len(step) == 2 for step in steps)
    passes = [[row["id"] for step in part for batch in step for row in batch] for part in (steps[:3], steps[3:])]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(f"row-{n}" for n in range(12))
    assert passes[0] != passes[1]


def test_two_ranks_read_different_rows(tiny_parts: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny.training_overrides(tiny_parts, tmp_path, **STREAMED))
    seen = [
        [row["id"] for step in islice(stream_of(recipe, 2, rank), 3) for batch in step for row in batch]
        for rank in (0, 1)
    ]
    assert len(seen[0]) == len(seen[1]) == 6 and not set(seen[0]) & set(seen[1])


def test_a_streamed_run_trains_and_resumes_to_the_same_losses(tiny_parts: Path, tmp_path: Path) -> None:
    whole = train(load_recipe(tiny.training_overrides(tiny_parts, tmp_path / "whole", **STREAMED)))
    assert whole["num_steps"] == 4 and whole["num_rows"] == 16
    changes = {**STREAMED, "training.save_strategy": "steps", "training.save_steps": 2, "training.resume": "auto"}
    overrides = tiny.training_overrides(tiny_parts, tmp_path / "resumed", **changes)
    train(load_recipe(overrides))
    import shutil

    for left in ("metrics.json", "checkpoint-4"):
        path = tmp_path / "resumed" / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = train(load_recipe(overrides))
    assert [entry["loss"] for entry in resumed["loss_history"]] == [entry["loss"] for entry in whole["loss_history"]]


BUDGET = {"training.max_tokens_per_batch": 300, "training.per_device_train_batch_size": "null"}


def test_a_token_budget_cuts_the_steps_of_one_process(tiny_parts: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny.training_overrides(tiny_parts, tmp_path, **STREAMED, **BUDGET))
    for step in islice(stream_of(recipe), 3):
        assert sum(len(batch) for batch in step) == 4


def test_shared_pictures_are_planned_as_they_are_without_streaming(tiny_parts: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny.training_overrides(tiny_parts, tmp_path / "out", **STREAMED))
    stream = stream_of(recipe)
    recipe.data.streaming = False
    rows, sizes = measure_rows(load_recipe_rows(recipe), stream.processor, recipe, [])
    assert [stream._size(row) for row in rows] == sizes


@pytest.mark.parametrize(("change", "rows_a_batch"), [({}, 2), ({"training.share_prefixes": "false"}, 1)])
def test_a_batch_holds_two_rows_only_if_they_share_their_picture(
    tiny_parts: Path, tmp_path: Path, change: dict, rows_a_batch: int
) -> None:
    rows = json.loads((tiny_parts / "rows.json").read_text(encoding="utf-8"))
    for row in rows:
        row |= {"image": "0000.png", "conversations": rows[0]["conversations"]}
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    changes = {
        **STREAMED,
        **BUDGET,
        **change,
        "data.data_path": tmp_path / "rows.json",
        "training.global_batch_size": 2,
    }
    recipe = load_recipe(tiny.training_overrides(tiny_parts, tmp_path / "out", **changes))
    size = stream_of(recipe)._size(next(iter(load_recipe_rows(recipe))))
    budget = recipe.training.max_tokens_per_batch = 2 * size.num_tokens - 1  # two rows, but not their picture twice
    stream = stream_of(recipe)
    collator = make_collator(recipe, stream.processor)
    for step in islice(stream, 3):
        assert [len(batch) for batch in step] == [rows_a_batch] * (2 // rows_a_batch)
        assert all(collator(batch)["input_ids"].numel() <= budget for batch in step)
