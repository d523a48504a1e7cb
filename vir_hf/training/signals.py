"""SIGTERM, SIGUSR1 and Ctrl-C: the step is finished, a checkpoint written, and the run ends so that it can go on later."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vir_hf.console import print_error

STOPPED = 75  # EX_TEMPFAIL: start the same command again to go on
LEFT_AT_ONCE = 130


class RunStopped(Exception):
    """A run that ended early because it was asked to; `signal_name` says by what."""

    def __init__(self, signal_name: str, step: int | None = None):
        super().__init__(f"stopped by {signal_name}")
        self.signal_name, self.step = signal_name, step


class StopOnSignal(TrainerCallback):
    """Saves and stops after the step in which a signal arrived on any rank; a second Ctrl-C leaves at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.is_training = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals inside this block; as before behind it. Does nothing outside the main thread."""
        before: dict[int, Any] = {}
        try:
            for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
                number = getattr(signal, name, None)
                if number is not None:
                    with contextlib.suppress(ValueError):  # another thread than the main one
                        before[number] = signal.signal(number, self._handle)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and self.received is not None:
            os.write(2, b"\nleaving at once; the checkpoints on disk are whole\n")
            os._exit(LEFT_AT_ONCE)
        self.received = name
        if not self.is_training:  # nothing is lost: no step has been taken since the last checkpoint
            raise RunStopped(name)
        again = " (Ctrl-C again leaves at once)" if name == "SIGINT" else ""
        os.write(2, f"\n{name}: finishing this step, then saving a checkpoint{again}\n".encode())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.is_training = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if any_rank(self.received is not None, args.device):
            self.received = self.received or "a signal to another rank"
            control.should_save = True
            control.should_training_stop = True


def any_rank(value: bool, device: torch.device) -> bool:
    """Return whether it is true on any rank."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return value
    flag = torch.tensor(int(value), device=device)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag.item())


class WorkerSignals:
    """What a data loader's worker does with signals meant for the run: it goes on, and ends when the run does.

    A terminal and a cluster send them to every process. A second SIGTERM ends the worker, so that it can be stopped. The run
    itself, where an error ends it, ends its workers first: Python's own way at exit is one SIGTERM, and to wait for them.
    """

    def __init__(self) -> None:
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)

    def __call__(self, worker_id: int) -> None:
        for name in ("SIGINT", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._ignore_once)

    def _ignore_once(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_workers() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def say_stopped(stopped: RunStopped, output_dir: str, newest: str | None) -> int:
    """Print what is on disk and how to go on; return the exit code."""
    lies = f"{newest} is whole" if newest else f"{output_dir} holds no checkpoint yet"
    print_error(f"stopped by {stopped.signal_name}: {lies}. Go on: the same command with --resume", STOPPED)
    return STOPPED
