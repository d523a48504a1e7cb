"""Which rank the others wait for: every rank leaves a sign of life beside the checkpoints and reads those of the others."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vir_hf import files
from vir_hf.training.checkpoints import what_is_left

FOLDER = ".ranks"
_SILENT_BEATS = 3


@dataclass
class _Sign:
    """What was last read of a rank, and when that last changed by this process's own clock."""

    content: dict[str, Any] = field(default_factory=dict)
    changed: float = field(default_factory=time.monotonic)


class RankWatch:
    """Ends this process, naming the rank it waited for, when a step takes longer than the timeout because of another.

    Args:
        output_dir: shared by all ranks; signs of life lie in `.ranks/`.
        rank, world_size: this process's place.
        timeout_seconds: how long a rank is waited for.
        beat_seconds: between two signs of life.
    """

    def __init__(
        self, output_dir: Path, rank: int, world_size: int, timeout_seconds: float, beat_seconds: float = 2.0
    ) -> None:
        self.output_dir, self.rank, self.world_size = output_dir, rank, world_size
        self.timeout_seconds, self.beat_seconds = timeout_seconds, beat_seconds
        self._signs = {other: _Sign() for other in range(world_size) if other != rank}
        self._step, self._since, self._beats = 0, time.monotonic(), 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to give and read signs of life; does nothing for a run of one process."""
        if self.world_size == 1 or self._thread is not None:
            return
        (self.output_dir / FOLDER).mkdir(parents=True, exist_ok=True)
        self._since = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watch and take this rank's sign away."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * self.beat_seconds)
            self._thread = None
            with contextlib.suppress(OSError):
                files.discard(self._path(self.rank))
                (self.output_dir / FOLDER).rmdir()

    def arrived(self, step: int) -> None:
        """Say that this rank has the rows of a step and is ready to compute it with the others."""
        self._step, self._since = step, time.monotonic()

    def missing(self) -> list[str]:
        """Return the ranks that are silent or behind this one, each with what is known of it."""
        now = time.monotonic()
        missing = []
        for rank, sign in self._signs.items():
            silent = now - sign.changed
            where = f"rank {rank} ({sign.content.get('host', 'unknown host')}, process {sign.content.get('pid', '?')})"
            if silent > _SILENT_BEATS * self.beat_seconds:
                missing.append(f"{where} has given no sign of life for {silent:.0f} s")
            elif sign.content.get("step", 0) < self._step:
                missing.append(f"{where} has not come to step {self._step}")
        return missing

    def explain(self) -> str | None:
        """Return who is missing after a failed exchange, waiting a few beats so that a death can show; `None` if nobody."""
        if self.world_size == 1:
            return None
        deadline = time.monotonic() + (_SILENT_BEATS + 2) * self.beat_seconds
        while time.monotonic() < deadline and not any("no sign" in text for text in self.missing()):
            time.sleep(self.beat_seconds / 4)
        missing = self.missing()
        return self._message(missing) if missing else None

    def _message(self, missing: list[str]) -> str:
        return (
            f"rank {self.rank} waited at step {self._step}: {'; '.join(missing)}. {what_is_left(self.output_dir)} Look at what "
            "that process printed last, then start all processes again with --resume."
        )

    def _run(self) -> None:
        while not self._stop.wait(self.beat_seconds):
            self._beat()
            if time.monotonic() - self._since > self.timeout_seconds:
                missing = self.missing()
                if missing:
                    os.write(2, f"\nerror: {self._message(missing)}\n".encode())
                    os._exit(1)

    def _beat(self) -> None:
        self._beats += 1
        sign = {"beat": self._beats, "step": self._step, "host": socket.gethostname(), "pid": os.getpid()}
        with contextlib.suppress(OSError):  # a full disk is told by what has to be written
            files.write_text(self._path(self.rank), json.dumps(sign))
        for rank, last in self._signs.items():
            with contextlib.suppress(OSError, ValueError):
                content = json.loads(self._path(rank).read_text(encoding="utf-8"))
                if content != last.content:
                    last.content, last.changed = content, time.monotonic()

    def _path(self, rank: int) -> Path:
        return self.output_dir / FOLDER / f"rank_{rank}.json"
