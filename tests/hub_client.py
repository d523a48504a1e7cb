"""The command as a user of the loopback Hub runs it: in a process of its own, with that Hub's address and token."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import minihub

ROOT = Path(__file__).resolve().parents[1]


def environment(server: minihub.Hub, home: Path, **changes: str | None) -> dict[str, str]:
    values = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": server.token,
        "HF_HOME": str(home / "hf-home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
        **changes,
    }
    return {key: value for key, value in values.items() if value is not None}


def vir_hf(words: list[str], env: dict[str, str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vir_hf.cli", *words]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=120)
