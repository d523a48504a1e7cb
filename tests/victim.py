"""A training run in a process of its own that can be killed at any numbered moment, or disturbed, for the fault drills.

A moment is a thing the process does: opening a file under the drill's folder, renaming, making or removing one (Python's
audit events), or reaching a point of a step. They come in the same order in every run, so a seeded number names the same one.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
from transformers import TrainerCallback

_FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link")
NUM_STEPS = 6


class _StepMoments(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sys.audit("drill.step", f"begin {state.global_step}")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sys.audit("drill.step", f"gradients {state.global_step}")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sys.audit("drill.step", f"weights {state.global_step}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sys.audit("drill.step", f"end {state.global_step}")


def overrides(root: Path, output_dir: Path, *more: str) -> list[str]:
    """A LoRA run of two epochs of three steps with dropout and a checkpoint every two steps, of which two are kept."""
    values = tiny.training_overrides(root, output_dir)
    schedule = ["training.num_train_epochs=2", "training.save_steps=2", "training.save_total_limit=2"]
    return [*values, *schedule, "quantization=none", "lora.lora_dropout=0.1", "training.resume=auto", *more]


def _run(
    arguments: list[str], watched: Path, kill_at: int | str | None, log: Path, disturb: Callable[[], Any] | None
) -> None:
    moments: list[str] = []

    def hook(event: str, values: tuple[Any, ...]) -> None:
        if event == "drill.step" or (
            event in _FILE_EVENTS
            and isinstance(values[0], (str, os.PathLike))
            and str(values[0]).startswith(str(watched))
        ):
            moments.append(f"{event} {str(values[0]).removeprefix(str(watched))}")
            if kill_at == len(moments) - 1 or (isinstance(kill_at, str) and kill_at in moments[-1]):
                os.kill(os.getpid(), signal.SIGKILL)

    from vir_hf.train import main

    callbacks = disturb() if disturb is not None else None
    output = io.StringIO()
    sys.addaudithook(hook)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        import vir_hf.training.run as training
        from vir_hf.cli import run

        original = training.train
        training.train = lambda recipe: original(recipe, [_StepMoments(), *(callbacks or [])])
        try:
            code = run(lambda: main, arguments)
        except BaseException:
            traceback.print_exc()
            code = 99
    log.write_text(json.dumps({"code": code, "moments": moments, "output": output.getvalue()}))
    os._exit(code)


def run(
    arguments: list[str],
    watched: Path,
    *,
    kill_at: int | str | None = None,
    disturb: Callable[[], Any] | None = None,
    environment: dict[str, str] | None = None,
    log: Path | None = None,
    wait: bool = True,
) -> Any:
    """Run `vir-hf train` in a forked process and return `(exit code, moments, output)`; -9 is a kill.

    `kill_at` is a moment's number, or a part of its name.
    """
    log = log or watched / "victim.json"
    log.unlink(missing_ok=True)

    def child() -> None:
        os.environ.update(environment or {})
        _run(arguments, watched, kill_at, log, disturb)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    if not wait:
        return process, log
    return finish(process, log)


def finish(process: Any, log: Path, timeout: float = 240) -> tuple[int, list[str], str]:
    """Wait for a process that `run(wait=False)` started."""
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError("the run hangs")
    told = json.loads(log.read_text()) if log.exists() else {"moments": [], "output": ""}
    return process.exitcode, told["moments"], told["output"]


def same_bits(left: Path, right: Path) -> bool:
    """Whether two finished runs hold the same weights, to the bit."""
    name = "adapter_model.safetensors"
    return (left / name).read_bytes() == (right / name).read_bytes()


def places(root: Path) -> tuple[Path, Path]:
    """`(parts and data, where runs write)` of a drill; the parts are made if they are not there."""
    parts = root / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    tiny.training_overrides(parts, root / "unused")
    return parts, root / "runs"
