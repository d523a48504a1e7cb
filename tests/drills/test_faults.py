"""The long fault drills, with real processes, disks and signals; `make drills` runs them and prints the figures."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import victim
from transformers import TrainerCallback

from vir_hf.training import checkpoints

pytestmark = [pytest.mark.drills, pytest.mark.timeout(1800)]
NUM_KILLS = 30
SEED = 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The drill's root and the moments of a run that nothing disturbs."""
    root = tmp_path_factory.mktemp("drill")
    parts, runs = victim.places(root)
    for name in ("first", "whole"):  # the first one also fills the caches, so that all others have the same moments
        code, moments, output = victim.run(victim.overrides(parts, runs / name), root)
        assert code == 0, output
    return root, moments


def goes_on(root: Path, name: str, *more: str) -> None:
    """The run in `name` is resumed, finishes, and ends with the undisturbed run's bits."""
    parts, runs = victim.places(root)
    code, _, output = victim.run(victim.overrides(parts, runs / name, *more), root)
    assert code == 0, output
    assert victim.same_bits(runs / "whole", runs / name)


def kind_of(moment: str) -> str:
    if moment.startswith("drill.step"):
        return "stepping"
    return "writing" if "partial" in moment or "deleted" in moment or "checkpoint-" in moment else "loading"


def test_kill_at_seeded_moments(whole: tuple[Path, list[str]]) -> None:
    root, moments = whole
    parts, runs = victim.places(root)
    choose = random.Random(SEED)
    by_kind: dict[str, list[int]] = {"loading": [], "stepping": [], "writing": []}
    for number, moment in enumerate(moments):
        by_kind[kind_of(moment)].append(number)
    shares = {"loading": 5, "stepping": 8, "writing": NUM_KILLS - 13}
    chosen = [number for kind, share in shares.items() for number in choose.sample(by_kind[kind], share)]
    figures = {"tried": 0, "resumed": 0, "bit-equal": 0, "lost": 0}
    failures = []
    for number in chosen:
        shutil.rmtree(runs / "killed", ignore_errors=True)
        figures["tried"] += 1
        code, _, _ = victim.run(victim.overrides(parts, runs / "killed"), root, kill_at=number)
        assert code == -9, moments[number]
        if figures["tried"] % 3 == 0:  # and once more while it resumes
            victim.run(victim.overrides(parts, runs / "killed"), root, kill_at=choose.randrange(number + 1))
        whole_ones = [c for c in checkpoints.list_checkpoints(runs / "killed") if checkpoints.damage(c.path) is None]
        if len(whole_ones) != len(checkpoints.list_checkpoints(runs / "killed")):
            failures.append(f"{moments[number]}: half a checkpoint under its name")
        code, _, output = victim.run(victim.overrides(parts, runs / "killed"), root)
        if code != 0:
            figures["lost"] += 1
            failures.append(f"{moments[number]}: {output[-400:]}")
            continue
        figures["resumed"] += 1
        is_equal = victim.same_bits(runs / "whole", runs / "killed")
        figures["bit-equal"] += is_equal
        print(f"{moments[number]}: {figures}", flush=True)
        if not is_equal:
            failures.append(f"{moments[number]}: other bits")
    print(f"\nkill -9, seed {SEED}, of {len(moments)} moments: {figures}")
    assert not failures, "\n".join(failures)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of a few MiB; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


class FillDisk(TrainerCallback):
    """Leaves this many bytes free on a disk before the second checkpoint."""

    def __init__(self, folder: Path, free: int):
        self.folder, self.free = folder, free

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            with open(self.folder / "filler", "wb") as file:
                file.write(b"x" * (shutil.disk_usage(self.folder).free - self.free))


@pytest.mark.parametrize("is_foreseen", [True, False])
@pytest.mark.parametrize("free_kib", [0, 30, 200])
def test_full_disk(whole: tuple[Path, list[str]], small_disk: Path, free_kib: int, is_foreseen: bool) -> None:
    root, _ = whole
    parts, runs = victim.places(root)

    def disturb() -> list[Any]:
        if not is_foreseen:  # the space goes while the checkpoint is written
            checkpoints.require_space = lambda *args: None  # type: ignore[assignment]
        return [FillDisk(small_disk, free_kib * 1024)]

    code, _, output = victim.run(victim.overrides(parts, small_disk / "run"), root, disturb=disturb)
    print(output.strip().splitlines()[-1])
    assert code == 1 and "checkpoint-2 is left as it was" in output and "--resume" in output, output
    assert checkpoints.damage(small_disk / "run" / "checkpoint-2") is None
    assert not list((small_disk / "run").glob(".checkpoint*"))
    (small_disk / "filler").unlink()
    code, _, output = victim.run(victim.overrides(parts, small_disk / "run"), root)
    assert code == 0, output
    assert victim.same_bits(runs / "whole", small_disk / "run")


def test_read_only_directory(whole: tuple[Path, list[str]], small_disk: Path) -> None:
    root, _ = whole
    parts, runs = victim.places(root)
    remount(small_disk, "ro")
    started = time.monotonic()
    code, _, output = victim.run(victim.overrides(parts, small_disk / "run"), root)
    print(output.strip().splitlines()[-1], f"({time.monotonic() - started:.1f} s)")
    assert code == 2 and "nothing can be written there" in output and "training.output_dir" in output
    remount(small_disk, "rw")

    class MakeReadOnly(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                remount(small_disk, "ro")

    code, _, output = victim.run(victim.overrides(parts, small_disk / "run"), root, disturb=lambda: [MakeReadOnly()])
    print(output.strip().splitlines()[-1])
    assert code == 1 and "checkpoint-2 is left as it was" in output, output
    remount(small_disk, "rw")
    code, _, output = victim.run(victim.overrides(parts, small_disk / "run"), root)
    assert code == 0, output
    assert victim.same_bits(runs / "whole", small_disk / "run")


@pytest.mark.parametrize("harm", ["truncated", "bit flipped", "removed"])
def test_every_damaged_file_of_a_checkpoint(whole: tuple[Path, list[str]], harm: str) -> None:
    root, _ = whole
    _, runs = victim.places(root)
    choose = random.Random(SEED)
    names = sorted(p.relative_to(runs / "whole" / "checkpoint-6") for p in (runs / "whole" / "checkpoint-6").rglob("*"))
    harmed = runs / "harmed"
    shutil.rmtree(harmed, ignore_errors=True)
    harmed.mkdir()
    shutil.copytree(runs / "whole" / "base", harmed / "base")
    for step in (4, 6):
        shutil.copytree(runs / "whole" / f"checkpoint-{step}", harmed / f"checkpoint-{step}")
    for name in names:
        path = harmed / "checkpoint-6" / name
        content = path.read_bytes()
        if harm == "removed":
            path.unlink()
        elif harm == "truncated":
            path.write_bytes(content[: choose.randrange(len(content) - 1)])
        else:
            place = choose.randrange(len(content)) if path.name != "manifest.json" else content.index(b'"bytes": ') + 9
            changed = bytearray(content)
            changed[place] ^= 1
            path.write_bytes(changed)
        found, passed_over = checkpoints.newest_whole(harmed)
        assert found is not None and found.step == 4 and len(passed_over) == 1, name
        if name != names[-1]:
            path.write_bytes(content)
    goes_on(root, "harmed")


class SlowSteps(TrainerCallback):
    """Gives another process time to meddle, once a step; tells where it is."""

    def __init__(self, sign: Path, seconds: float = 0.5):
        self.sign, self.seconds = sign, seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sign.write_text(str(state.global_step))
        time.sleep(self.seconds)


def wait_for_step(sign: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while not sign.exists() or int(sign.read_text() or 0) < step:
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.05)


def start_ranks(root: Path, name: str, *more: str) -> list[Any]:
    """Two ranks of one run, each a process of its own, and their logs."""
    parts, runs = victim.places(root)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in (0, 1):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sign = root / f"{name}-{rank}.step"
        sign.unlink(missing_ok=True)
        started.append(
            victim.run(
                victim.overrides(parts, runs / name, "training.use_cpu=true", "training.timeout_minutes=1", *more),
                root,
                environment=environment,
                disturb=lambda sign=sign: [SlowSteps(sign)],
                log=root / f"{name}-{rank}.json",
                wait=False,
            )
        )
    return started


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_one_of_two_ranks_is_gone(whole: tuple[Path, list[str]], end: str) -> None:
    root, _ = whole
    _, runs = victim.places(root)
    if not (runs / "two").exists():
        for process, log in start_ranks(root, "two"):
            code, _, output = victim.finish(process, log)
            assert code == 0, output
    name = f"two-{end}"
    ranks = start_ranks(root, name)
    wait_for_step(root / f"{name}-1.step", 3)
    os.kill(ranks[1][0].pid, signal.SIGKILL if end == "killed" else signal.SIGSTOP)
    started = time.monotonic()
    try:
        code, _, output = victim.finish(*ranks[0], timeout=150)
    finally:
        ranks[1][0].kill()
        ranks[1][0].join()
    print(
        f"{end}: rank 0 ended after {time.monotonic() - started:.0f} s with {code}: {output.strip().splitlines()[-1:]}"
    )
    assert code == 1
    assert output or end == "stopped"  # a rank that hangs in C code is ended from beside, past its own output
    if output:
        assert re.search(r"rank 0 waited at step \d: rank 1 \(.*\) has (given no sign|not come)", output), output
    for process, log in start_ranks(root, name):
        code, _, output = victim.finish(process, log)
        assert code == 0, output
    assert victim.same_bits(runs / "two", runs / name)


ZERO_2 = """\
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
use_cpu: true
deepspeed_config:
  zero_stage: 2
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: false
  gradient_accumulation_steps: auto
  gradient_clipping: auto
num_machines: 1
num_processes: 2
machine_rank: 0
"""


def test_zero_2_resumes_to_the_same_bits(whole: tuple[Path, list[str]]) -> None:
    pytest.importorskip("deepspeed")
    root, _ = whole
    parts, runs = victim.places(root)
    (root / "zero2.yaml").write_text(ZERO_2)
    more = ["training.use_cpu=true", "training.save_total_limit=9"]

    def launch(name: str) -> None:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(root / "zero2.yaml")]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            command += ["--main_process_port", str(probe.getsockname()[1])]
        command += ["-m", "vir_hf.train", *victim.overrides(parts, runs / name, *more)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    launch("zero")
    assert (runs / "zero" / "checkpoint-2" / "global_step2").is_dir()
    (runs / "zero-again").mkdir()
    shutil.copytree(runs / "zero" / "checkpoint-2", runs / "zero-again" / "checkpoint-2")
    launch("zero-again")
    assert victim.same_bits(runs / "zero", runs / "zero-again")


def test_a_signal_to_one_of_two_ranks_stops_both(whole: tuple[Path, list[str]]) -> None:
    root, _ = whole
    _, runs = victim.places(root)
    ranks = start_ranks(root, "two-signal")
    wait_for_step(root / "two-signal-1.step", 3)
    os.kill(ranks[1][0].pid, signal.SIGUSR1)
    assert [victim.finish(*rank)[0] for rank in ranks] == [75, 75]
    newest = checkpoints.list_checkpoints(runs / "two-signal")[0]
    assert checkpoints.damage(newest.path) is None and newest.step < victim.NUM_STEPS


def test_a_second_interrupt_leaves_at_once(whole: tuple[Path, list[str]]) -> None:
    root, _ = whole
    parts, runs = victim.places(root)
    sign = root / "interrupt.step"
    process, log = victim.run(
        victim.overrides(parts, runs / "interrupt"), root, disturb=lambda: [SlowSteps(sign, 4.0)], wait=False
    )
    wait_for_step(sign, 3)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGINT)
    started = time.monotonic()
    code, _, _ = victim.finish(process, log)
    assert code == 130 and time.monotonic() - started < 3
    goes_on(root, "interrupt")


def test_a_picture_vanishes_in_the_middle_of_an_epoch(whole: tuple[Path, list[str]]) -> None:
    root, _ = whole
    parts, runs = victim.places(root)
    hidden = root / "hidden"

    class Hide(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                shutil.move(parts / "images", hidden)

    code, _, output = victim.run(victim.overrides(parts, runs / "vanished"), root, disturb=lambda: [Hide()])
    shutil.move(hidden, parts / "images")
    print(output.strip().splitlines()[-1])
    assert code == 2 and re.search(r"row row-\d+", output) and ".png" in output, output
    goes_on(root, "vanished")


def test_the_clock_jumps(whole: tuple[Path, list[str]]) -> None:
    root, _ = whole
    parts, runs = victim.places(root)

    def jump() -> list[Any]:
        real, jumps = time.time, iter([86400.0, -86400.0, 3e8, -3e8] * 100000)
        time.time = lambda: real() + next(jumps)  # type: ignore[assignment]
        return []

    code, _, output = victim.run(victim.overrides(parts, runs / "clock", "training.max_steps=6"), root, disturb=jump)
    assert code == 0, output
    assert victim.same_bits(runs / "whole", runs / "clock")
    (runs / "clock" / "metrics.json").unlink()
    for checkpoint in checkpoints.list_checkpoints(runs / "clock"):
        os.utime(checkpoint.path, (4e9 - checkpoint.step * 1e8,) * 2)
    shutil.rmtree(runs / "clock" / "checkpoint-6")
    (runs / "clock" / "checkpoint-2").mkdir(exist_ok=True)  # the newest by its time, and empty
    code, _, output = victim.run(victim.overrides(parts, runs / "clock", "training.max_steps=6"), root)
    assert code == 0, output
    assert victim.same_bits(runs / "whole", runs / "clock")
