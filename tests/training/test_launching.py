"""Which accelerate command `vir-hf launch` runs: by model, GPUs and what was asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_training

from vir_hf.errors import RecipeError
from vir_hf.training import launching

GIB = 2**30


@pytest.fixture(scope="module")
def recipe(tiny_parts: Path) -> Any:
    full = {"lora": "none", "trainable.language_model": "full"}
    return tiny_training.recipe_for(tiny_parts, tiny_parts / "out", **full)


def test_without_a_gpu_it_trains_on_the_cpu_and_says_so(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = launching.compose(recipe, ["experiment=local_lite"])
    assert "no GPU was found" in launch.reason and "CPU" in launch.reason
    assert "cpu.yaml" in str(launch) and launch.words[-1] == "training.use_cpu=true"
    assert launch.words[-3:-1] == ["vir_hf.train", "experiment=local_lite"]
    assert "ACCELERATE_USE_CPU" not in launch.environment


@pytest.mark.parametrize(
    ("billions", "num_gpus", "gib", "expected"),
    [
        (7.0, 1, 80, "single_gpu"),
        (1.0, 8, 80, "multi_gpu"),
        (7.0, 8, 80, "zero2"),
        (7.0, 8, 24, "zero3"),
        (13.0, 8, 40, "zero3"),
        (None, 4, 80, "zero2"),
    ],
)
def test_the_config_follows_model_size_and_gpus(
    billions: float | None, num_gpus: int, gib: int, expected: str, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = None if billions is None else int(billions * 1e9)
    monkeypatch.setattr(launching, "_num_parameters", lambda recipe: count)
    assert launching.choose_config(recipe, num_gpus, gib * GIB)[0] == expected


def test_four_bit_weights_are_trained_with_ddp(tiny_parts: Path) -> None:
    recipe = tiny_training.recipe_for(tiny_parts, tiny_parts / "out", **tiny_training.NF4)
    assert launching.choose_config(recipe, 8, 24 * GIB)[0] == "multi_gpu"


def test_a_tiny_model_is_counted_from_its_parts(recipe: Any) -> None:
    count = launching._num_parameters(recipe)
    assert count is not None and 10_000 < count < 1_000_000


def test_num_gpus_takes_so_many_of_those_found(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    launch = launching.compose(recipe, [], config="zero2", num_gpus=2, found_gpus=4, gpu_bytes=80 * GIB)
    assert launch.environment["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert launch.words[launch.words.index("--num_processes") + 1] == "2"
    asked = json.loads(launch.environment["VIR_HF_ASKED"])
    assert asked == {"name": "zero2", "num_processes": 2, "num_machines": 1}
    assert "training.use_cpu=true" not in launch.words


def test_no_gpus_on_a_machine_with_gpus_is_the_cpu(recipe: Any) -> None:
    launch = launching.compose(recipe, [], num_gpus=0, found_gpus=4, gpu_bytes=80 * GIB)
    assert "cpu.yaml" in str(launch) and "training.use_cpu=true" in launch.words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_gpus": 8, "found_gpus": 2}, "--num-gpus 8: this machine has 2"),
        ({"config": "zero9"}, "--config zero9: no such accelerate config; expected a file or one of cpu, fsdp2"),
        ({"config": "fsdp2"}, "--config fsdp2: needs GPUs"),
        ({"config": "multi_node_zero2", "found_gpus": 8}, "is for 2 machines"),
    ],
)
def test_what_cannot_be_launched_is_refused(options: dict[str, Any], message: str, recipe: Any) -> None:
    with pytest.raises(RecipeError, match=message):
        launching.compose(recipe, [], **options)


def test_a_config_of_ones_own_is_taken_by_path(recipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("distributed_type: MULTI_GPU\nnum_processes: 8\n", encoding="utf-8")
    launch = launching.compose(recipe, [], config=str(path), num_gpus=2, found_gpus=4, gpu_bytes=GIB)
    assert str(path) in launch.words and json.loads(launch.environment["VIR_HF_ASKED"])["num_processes"] == 2


def test_the_command_prints_what_it_runs(tiny_parts: Path) -> None:
    import tiny

    overrides = tiny.training_overrides(tiny_parts, tiny_parts / "out")
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "vir_hf.cli", "launch", "--dry-run", *overrides],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reason, command = done.stdout.strip().splitlines()[-2:]
    assert "no GPU was found" in reason
    assert "accelerate.commands.launch --config_file" in command and "training.use_cpu=true" in command
