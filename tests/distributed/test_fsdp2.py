"""FSDP2's wrapping of our model; accelerate cannot run FSDP2 on a CPU, so torch's own `fully_shard` on two gloo ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import launches
import pytest

WORKER = Path(__file__).resolve().with_name("fsdp2_worker.py")


@pytest.mark.distributed
@pytest.mark.parametrize("tower", ["frozen", "full"])
def test_loss_and_gradients_equal_one_process_with_a_text_only_rank(tower: str, parts: Path) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words += ["--master-addr", "127.0.0.1", "--master-port", str(launches.free_port()), str(WORKER), str(parts), tower]
    done = launches.run(words, timeout_seconds=200)
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"fsdp2 {tower}: loss" in done.stdout and "gradients equal" in done.stdout
