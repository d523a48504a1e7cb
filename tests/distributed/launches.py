"""Starts real launches for the tests: `accelerate launch` on this machine's CPU, under a time limit."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "accelerate_configs"
SCENARIOS = Path(__file__).resolve().with_name("scenarios.py")


def environment(**changes: str) -> dict[str, str]:
    """This process's environment for a launch: one thread a process, offline, nothing of a launcher above."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ACCELERATE_", "VIR_HF_ASKED", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_"))
    }
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    fixed = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": path,
    }
    return {**kept, **fixed, **changes}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accelerate_words(config: str | Path, num_processes: int) -> list[str]:
    """`accelerate launch` up to the script or module."""
    path = config if isinstance(config, Path) else CONFIGS / f"{config}.yaml"
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    return [*words, "--num_processes", str(num_processes), "--main_process_port", str(free_port())]


def kill_all(process: subprocess.Popen) -> None:
    """Kill a launch and every process below it: accelerate's workers lead sessions of their own and would go on."""
    doomed, found = [process.pid], {process.pid}
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    while True:
        more = [child for child, parent in parents.items() if parent in found and child not in found]
        if not more:
            break
        doomed += more
        found.update(more)
    for pid in doomed:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def run(words: list[str], *, timeout_seconds: int, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a command with all it starts in one process group, which ends with it; a hang is an error after the limit."""
    process = subprocess.Popen(
        words, env=environment(**changes), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        kill_all(process)
        output, _ = process.communicate()
        raise AssertionError(f"not done after {timeout_seconds} s: {' '.join(words)}\n{output[-4000:]}") from None
    return subprocess.CompletedProcess(words, process.returncode, output, "")


def run_scenarios(
    root: Path,
    output_dir: Path,
    names: list[str],
    *,
    config: str | None,
    num_processes: int = 1,
    timeout_seconds: int = 280,
) -> str:
    """Train scenarios on a layout (`config=None`: a plain process) and return what was printed."""
    words = [sys.executable] if config is None else accelerate_words(config, num_processes)
    done = run([*words, str(SCENARIOS), str(root), str(output_dir), *names], timeout_seconds=timeout_seconds)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def losses(folder: Path) -> list[float]:
    """The loss of every step of a finished run."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return [entry["loss"] for entry in metrics["loss_history"]]
