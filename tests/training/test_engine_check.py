"""What an accelerate command line asks for, what runs, and the error where they differ."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from vir_hf.errors import RecipeError
from vir_hf.training import engine_check
from vir_hf.training.engine_check import Engine

CONFIGS = Path(__file__).resolve().parents[2] / "accelerate_configs"


def accelerator(kind: str = "NO", num_processes: int = 1, **state: Any) -> Any:
    return SimpleNamespace(
        distributed_type=SimpleNamespace(value=kind),
        num_processes=num_processes,
        local_process_index=0,
        state=SimpleNamespace(**state),
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cpu", Engine("plain", 1)),
        ("single_gpu", Engine("plain", 1)),
        ("multi_gpu", Engine("plain", 8)),
        ("zero2", Engine("zero2", 8)),
        ("zero2_offload", Engine("zero2", 1)),
        ("zero3", Engine("zero3", 8)),
        ("fsdp2", Engine("fsdp2", 8)),
        ("multi_node_zero2", Engine("zero2", 16, 2)),
        ("tpu", Engine("plain", 8)),
    ],
)
def test_every_config_file_is_understood(name: str, expected: Engine) -> None:
    assert engine_check.from_words(["--config_file", str(CONFIGS / f"{name}.yaml"), "train.py"]) == expected


def test_every_config_file_is_in_the_table_above() -> None:
    marks = test_every_config_file_is_understood.pytestmark  # type: ignore[attr-defined]
    assert {case[0] for case in marks[0].args[1]} == {path.stem for path in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--num_processes", "2"], Engine("zero2", 2)),
        (["--num_processes=2", "--num-machines", "2"], Engine("zero2", 2, 2)),
        (["--zero_stage", "3"], Engine("zero3", 8)),
        (["--quiet", "--num_processes", "4"], Engine("zero2", 4)),
        (["train.py", "--num_processes", "4"], Engine("zero2", 8)),
        (["-m", "vir_hf.train", "--num_processes", "4"], Engine("zero2", 8)),
    ],
)
def test_options_before_the_script_win_over_the_file(words: list[str], expected: Engine) -> None:
    assert engine_check.from_words(["--config_file", str(CONFIGS / "zero2.yaml"), *words]) == expected


def test_the_file_of_accelerate_config_counts_where_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert engine_check.from_words(["train.py"]) is None
    (tmp_path / "accelerate").mkdir()
    config = {"distributed_type": "MULTI_GPU", "num_processes": 3}
    (tmp_path / "accelerate" / "default_config.yaml").write_text(yaml.safe_dump(config))
    assert engine_check.from_words(["train.py"]) == Engine("plain", 3)


@pytest.mark.parametrize(
    "command",
    [
        ["/usr/bin/python", "/venv/bin/accelerate", "launch", "--x", "1"],
        ["python", "-m", "accelerate.commands.launch", "--x", "1"],
        ["/venv/bin/accelerate-launch", "--x", "1"],
    ],
)
def test_the_launcher_is_known_in_every_spelling(command: list[str]) -> None:
    assert engine_check._after_launch(command) == ["--x", "1"]


@pytest.mark.parametrize("command", [["vir-hf", "launch", "--x"], ["python", "-m", "vir_hf.train"], ["bash"]])
def test_other_commands_are_no_launcher(command: list[str]) -> None:
    assert engine_check._after_launch(command) is None


def test_what_vir_hf_launch_says_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"name": "zero3", "num_processes": 4, "num_machines": 1}
    monkeypatch.setenv(engine_check.ASKED_VARIABLE, json.dumps(told))
    assert engine_check.asked_for() == Engine("zero3", 4)


def test_nothing_is_asked_of_a_plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(engine_check.ASKED_VARIABLE, raising=False)
    monkeypatch.setattr(engine_check, "_launcher_words", lambda: None)
    assert engine_check.asked_for() is None
    assert engine_check.check(accelerator(), None) == Engine("plain", 1)


@pytest.mark.parametrize(
    ("asked", "remedy"),
    [
        (Engine("fsdp2", 1), "accelerate cannot run FSDP on a CPU"),
        (Engine("zero2", 1), "Unset ACCELERATE_USE_CPU"),
        (Engine("plain", 2), "accelerate_configs/cpu.yaml"),
        (Engine("zero2", 4, 2), "deepspeed_multinode_launcher: standard"),
    ],
)
def test_a_difference_names_both_and_the_remedy(asked: Engine, remedy: str) -> None:
    with pytest.raises(RecipeError) as caught:
        engine_check.check(accelerator(), asked)
    assert str(asked) in str(caught.value) and str(Engine("plain", 1)) in str(caught.value)
    assert remedy in str(caught.value)


def test_engines_are_read_off_the_accelerator() -> None:
    zero = accelerator("DEEPSPEED", deepspeed_plugin=SimpleNamespace(zero_stage=3))
    fsdp = accelerator("FSDP", fsdp_plugin=SimpleNamespace(fsdp_version=2))
    assert engine_check.check(zero, Engine("zero3", 1)) == Engine("zero3", 1)
    assert engine_check.check(fsdp, Engine("fsdp2", 1)) == Engine("fsdp2", 1)
    with pytest.raises(RecipeError, match="asks for ZeRO-2, 1 process on 1 machine, but what runs is ZeRO-3"):
        engine_check.check(zero, Engine("zero2", 1))


def test_the_first_line_states_engine_ranks_nodes_and_global_batch() -> None:
    line = engine_check.first_line(Engine("zero2", 16, 2), 128, "cuda")
    assert line == "engine: ZeRO-2 · 16 ranks on 2 nodes · cuda · global batch 128 rows per step"
