"""The same loss curve and the same weights on any layout, from real `accelerate launch` runs; a hang fails by its time limit.

Most rows of the data are text alone, so ranks without a picture, and whole micro-batches without one, are in every run.
"""

from __future__ import annotations

from pathlib import Path

import launches
import pytest
import scenarios
from safetensors.torch import load_file

ALL = list(scenarios.SCENARIOS)
UNQUANTIZED = [name for name in ALL if name != "qlora"]


def compare(reference: Path, folder: Path, name: str) -> None:
    """Losses within fp32 rounding, and trained weights too."""
    expected, found = launches.losses(reference / name), launches.losses(folder / name)
    assert found == pytest.approx(expected, rel=2e-6) and len(set(expected)) == len(expected)
    file = "model.safetensors" if (reference / name / "model.safetensors").is_file() else "adapter_model.safetensors"
    weights, others = load_file(reference / name / file), load_file(folder / name / file)
    assert weights.keys() == others.keys()
    for key, weight in weights.items():
        # Attention does not depend on a key's bias: its gradient is rounding noise, which Adam makes as large as any.
        if not key.endswith("k_proj.bias"):
            assert (weight - others[key]).abs().max() <= 2e-4, key


def test_two_processes_train_as_one(tmp_path: Path, parts: Path) -> None:
    """The one launch that always runs: the real module, DDP over gloo."""
    run = scenarios.overrides(parts, tmp_path / "two", "tower", **{"training.max_steps": 3})
    done = launches.run([*launches.accelerate_words("cpu", 2), "-m", "vir_hf.train", *run], timeout_seconds=200)
    assert done.returncode == 0, done.stdout[-4000:]
    lines = done.stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("engine: "))
    assert lines[first] == "engine: DDP · 2 ranks on 1 node · cpu · global batch 4 rows per step"
    assert not any("loss" in line for line in lines[:first]), "the line comes before the first step"
    assert done.stdout.count("done: 3 steps") == 1, "one rank speaks"
    import tiny_training

    alone = dict(override.split("=", 1) for override in scenarios.overrides(parts, tmp_path / "one", "tower"))
    alone["training.max_steps"] = "3"
    metrics = tiny_training.run(parts, tmp_path / "one", **alone)
    expected = [entry["loss"] for entry in metrics["loss_history"]]
    assert launches.losses(tmp_path / "two") == pytest.approx(expected, rel=2e-6)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("config", "num_processes", "names"),
    [
        ("cpu", 1, ["full"]),
        ("cpu", 2, ALL),
        ("cpu", 4, ["full", "grouped", "budget", "tower", "tower_lora"]),
        ("zero2", 2, ALL),
        ("zero3", 2, UNQUANTIZED),
    ],
    ids=["one", "ddp-2", "ddp-4", "zero2-2", "zero3-2"],
)
def test_loss_curves_are_those_of_one_process(
    config: str, num_processes: int, names: list[str], parts: Path, reference: Path, tmp_path: Path
) -> None:
    if config.startswith("zero"):
        pytest.importorskip("deepspeed")
    launches.run_scenarios(parts, tmp_path, names, config=config, num_processes=num_processes)
    for name in names:
        compare(reference, tmp_path, name)
