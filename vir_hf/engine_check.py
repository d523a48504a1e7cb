"""What was asked for is what runs: engine, processes and machines against the accelerate file that started them.

accelerate turns several configs into something else without a word: one process for MULTI_CPU, DDP for FSDP2 on a CPU, one
separate run a machine for DeepSpeed's default multi-node launcher. So what was asked is read from the launcher itself.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vir_hf.errors import RecipeError

# Set by `vir-hf launch` for the processes it starts.
ASKED_VARIABLE = "VIR_HF_ASKED"
# accelerate's names for "one process a device and all-reduce".
_PLAIN = {"NO", "MULTI_GPU", "MULTI_CPU", "XLA", "MULTI_NPU", "MULTI_XPU"}


@dataclass(frozen=True)
class Engine:
    """An engine and its layout.

    Attributes:
        name: `plain` (one process, or DDP), `zero1` to `zero3`, `fsdp1` or `fsdp2`.
        num_processes, num_machines: over the whole run.
    """

    name: str
    num_processes: int
    num_machines: int = 1

    def __str__(self) -> str:
        name = self.name if self.name != "plain" else "one process" if self.num_processes == 1 else "DDP"
        processes = "process" if self.num_processes == 1 else "processes"
        machines = "machine" if self.num_machines == 1 else "machines"
        return f"{name}, {self.num_processes} {processes} on {self.num_machines} {machines}"


def asked_for() -> Engine | None:
    """What the launcher was told: by `vir-hf launch`, by an `accelerate launch` above this process, or `None`."""
    told = os.environ.get(ASKED_VARIABLE)
    if told:
        return Engine(**json.loads(told))
    words = _launcher_words()
    return None if words is None else from_words(words)


def from_words(words: list[str]) -> Engine | None:
    """Return what an `accelerate launch` command line asks for; `None` where it names no config file."""
    options = _options(words)
    path = options.get("config_file")
    if path is None:
        return None
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError):
        return None
    for name in ("num_processes", "num_machines"):
        if name in options:
            config[name] = options[name]
    return from_config(config)


def from_config(config: dict[str, Any]) -> Engine:
    """Return the engine an accelerate config describes."""
    kind = str(config.get("distributed_type", "NO"))
    if kind == "DEEPSPEED":
        name = f"zero{int(config.get('deepspeed_config', {}).get('zero_stage', 2))}"
    elif kind == "FSDP":
        name = f"fsdp{int(config.get('fsdp_config', {}).get('fsdp_version', 1))}"
    elif kind in _PLAIN:
        name = "plain"
    else:
        name = kind.lower()
    return Engine(name, int(config.get("num_processes") or 1), int(config.get("num_machines") or 1))


def running(accelerator: Any) -> Engine:
    """Return the engine that runs, as seen from inside."""
    kind = accelerator.distributed_type.value
    if kind == "DEEPSPEED":
        name = f"zero{int(accelerator.state.deepspeed_plugin.zero_stage)}"
    elif kind == "FSDP":
        name = f"fsdp{int(accelerator.state.fsdp_plugin.fsdp_version)}"
    else:
        name = "plain"
    return Engine(name, accelerator.num_processes, _num_machines(accelerator))


def check(accelerator: Any, asked: Engine | None) -> Engine:
    """Return what runs; every rank stops if it is not what was asked for.

    Raises:
        RecipeError: naming both.
    """
    found = running(accelerator)
    if asked is None:
        return found
    same_machines = asked.num_machines == found.num_machines or asked.num_machines == 1
    if (asked.name, asked.num_processes) != (found.name, found.num_processes) or not same_machines:
        raise RecipeError(
            f"the accelerate config asks for {asked}, but what runs is {found}. On a CPU use accelerate_configs/cpu.yaml "
            "(DDP) or zero2; FSDP2 needs GPUs; DeepSpeed on several machines needs deepspeed_multinode_launcher: standard. "
            "`vir-hf launch` writes a command that does what it says."
        )
    return found


def _num_machines(accelerator: Any) -> int:
    """Distinct hosts among the ranks, counted over the run's own process group."""
    if accelerator.num_processes == 1:
        return 1
    import torch

    names: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(names, _host())
    return len(set(names))


def _host() -> str:
    """This machine, told apart from another by host name and network namespace (containers may share a name)."""
    try:
        namespace = os.readlink("/proc/self/ns/net")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {namespace}"


def _launcher_words() -> list[str] | None:
    """The command line of the nearest `accelerate launch` above this process, where the system shows it."""
    process = os.getppid()
    for _ in range(6):
        try:
            words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
            status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
        except OSError:
            return None
        if "launch" in words and any(
            Path(word).name == "accelerate" or word == "accelerate.commands.launch" for word in words
        ):
            return words[words.index("launch") + 1 :]
        if "accelerate.commands.launch" in words:
            return words[words.index("accelerate.commands.launch") + 1 :]
        process = int(status.rpartition(")")[2].split()[1])
        if process <= 1:
            return None
    return None


def _options(words: list[str]) -> dict[str, str]:
    """accelerate's own options, as far as they matter here, up to the script or module."""
    found: dict[str, str] = {}
    position = 0
    while position < len(words):
        word = words[position]
        if word in ("-m", "--module") or not word.startswith("-"):
            break
        name, has_value, value = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if has_value:
            found[name] = value
        elif position + 1 < len(words) and not words[position + 1].startswith("-"):
            found[name] = words[position + 1]
            position += 1
        position += 1
    return found
