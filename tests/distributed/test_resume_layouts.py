"""Save, kill, and go on: on as many processes, on another number, and from ZeRO without its optimizer's state."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import launches
import pytest
import scenarios

SAVING = {"training.save_strategy": "steps", "training.save_steps": 2, "training.max_steps": 6}


def words_for(parts: Path, output_dir: Path, layout: tuple[str, int], *more: str) -> list[str]:
    run = scenarios.overrides(parts, output_dir, "full", **SAVING)
    return [*launches.accelerate_words(*layout), "-m", "vir_hf.train", *run, *more]


def kill_after_checkpoint(words: list[str], checkpoint: Path, timeout_seconds: int = 200) -> None:
    """Start a run and kill all of it as soon as a checkpoint is there."""
    process = subprocess.Popen(
        words, env=launches.environment(), cwd=launches.ROOT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + timeout_seconds
    while not (checkpoint / "manifest.json").is_file() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    launches.kill_all(process)
    process.wait()
    assert (checkpoint / "manifest.json").is_file()
    for later in checkpoint.parent.glob("checkpoint-*"):  # a fast run may have come further
        if later != checkpoint:
            shutil.rmtree(later)
    (checkpoint.parent / "metrics.json").unlink(missing_ok=True)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("first", "second", "keeps_optimizer"),
    [
        (("cpu", 2), ("cpu", 1), True),
        (("zero2", 2), ("zero2", 2), True),
        (("zero2", 2), ("zero2", 1), False),
        (("zero3", 2), ("cpu", 2), False),
    ],
    ids=["ddp-2-to-1", "zero2-same", "zero2-2-to-1", "zero3-to-ddp"],
)
def test_a_killed_run_goes_on_elsewhere(
    first: tuple[str, int], second: tuple[str, int], keeps_optimizer: bool, parts: Path, tmp_path: Path
) -> None:
    if "zero" in first[0]:
        pytest.importorskip("deepspeed")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = launches.run(words_for(parts, whole, ("cpu", 1)), timeout_seconds=200)
    assert done.returncode == 0, done.stdout[-4000:]
    kill_after_checkpoint(words_for(parts, cut, first), cut / "checkpoint-2")
    done = launches.run(words_for(parts, cut, second, "--resume"), timeout_seconds=200)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "\nengine: " in done.stdout, "nothing was left to do: the first run was not killed"
    expected, found = launches.losses(whole), launches.losses(cut)
    assert len(found) == 6
    # Step 3 is computed from the checkpoint's weights on the rows of step 3: weights, step and position in the data.
    assert found[:3] == pytest.approx(expected[:3], rel=2e-6)
    if keeps_optimizer:
        assert found == pytest.approx(expected, rel=2e-6)
    else:
        assert "optimizer's state starts anew" in " ".join(done.stdout.split())
        rates = [json.loads((run / "metrics.json").read_text())["loss_history"] for run in (whole, cut)]
        assert [entry["learning_rate"] for entry in rates[0]] == [entry["learning_rate"] for entry in rates[1]]
