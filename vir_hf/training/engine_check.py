"""What was asked for is what runs: engine, processes and machines against the accelerate file that started them.

accelerate turns several configs into something else without a word: one process for MULTI_CPU, DDP for FSDP2 on a CPU, one
separate run a machine for DeepSpeed's default multi-node launcher. So what was asked is read from the launcher itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vir_hf.errors import RecipeError

# Set by `vir-hf launch` for the processes it starts.
ASKED_VARIABLE = "VIR_HF_ASKED"
# accelerate's names for "one process a device and all-reduce".
_PLAIN = {"NO", "MULTI_GPU", "MULTI_CPU", "XLA", "MULTI_NPU", "MULTI_XPU"}
# How many parents up the launcher is looked for: DeepSpeed's own launchers stand between it and the training process.
_MAX_ANCESTORS = 6


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
        return f"{self.title}, {_count(self.num_processes, 'process', 'es')} on {_count(self.num_machines, 'machine')}"

    @property
    def title(self) -> str:
        """The engine as people call it."""
        if self.name == "plain":
            return "single device" if self.num_processes == 1 else "DDP"
        return f"ZeRO-{self.name[-1]}" if self.name.startswith("zero") else self.name.upper()


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"


def first_line(engine: Engine, rows_per_step: int, device: Any) -> str:
    """Return the first line of a run's log: engine, ranks, nodes and global batch."""
    ranks, nodes = _count(engine.num_processes, "rank"), _count(engine.num_machines, "node")
    rows = _count(rows_per_step, "row")
    return f"engine: {engine.title} · {ranks} on {nodes} · {getattr(device, 'type', device)} · global batch {rows} per step"


def asked_for() -> Engine | None:
    """What the launcher was told: by `vir-hf launch`, by an `accelerate launch` above this process, or `None`."""
    told = os.environ.get(ASKED_VARIABLE)
    if told:
        return Engine(**json.loads(told))
    words = _launcher_words()
    return None if words is None else from_words(words)


def from_words(words: list[str]) -> Engine | None:
    """Return what an `accelerate launch` command line asks for; `None` where it neither names nor has a config file."""
    options = _options(words)
    path = options.get("config_file") or _default_config_file()
    if path is None:
        return None
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError):
        return None
    for name in ("num_processes", "num_machines"):
        if name in options:
            config[name] = options[name]
    if "zero_stage" in options:
        config["deepspeed_config"] = {**config.get("deepspeed_config", {}), "zero_stage": options["zero_stage"]}
    if "fsdp_version" in options:
        config["fsdp_config"] = {**config.get("fsdp_config", {}), "fsdp_version": options["fsdp_version"]}
    for flag, kind in (("use_deepspeed", "DEEPSPEED"), ("use_fsdp", "FSDP"), ("multi_gpu", "MULTI_GPU")):
        if flag in options:
            config["distributed_type"] = kind
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
    """Return the engine that runs, as seen from inside; every rank must ask."""
    kind = accelerator.distributed_type.value
    if kind == "DEEPSPEED":
        name = f"zero{int(accelerator.state.deepspeed_plugin.zero_stage)}"
    elif kind == "FSDP":
        name = f"fsdp{int(accelerator.state.fsdp_plugin.fsdp_version)}"
    else:
        name = "plain"
    return Engine(name, accelerator.num_processes, _num_machines(accelerator))


def check(accelerator: Any, asked: Engine | None) -> Engine:
    """Return what runs; every rank must ask, and `ranks.together` stops them all where one is told otherwise.

    Raises:
        RecipeError: what runs is not what was asked for; it names both.
    """
    found = running(accelerator)
    if asked is not None and asked != found:
        raise RecipeError(f"the accelerate config asks for {asked}, but what runs is {found}. {_remedy(asked, found)}")
    return found


def _remedy(asked: Engine, found: Engine) -> str:
    if asked.num_machines > 1 and found.num_processes < asked.num_processes:
        return (
            "Each machine trains alone: DeepSpeed on several machines needs deepspeed_multinode_launcher: standard "
            "(accelerate_configs/multi_node_zero2.yaml), and every machine its own --machine_rank."
        )
    if asked.name.startswith("fsdp"):
        return "accelerate cannot run FSDP on a CPU: use GPUs, or accelerate_configs/cpu.yaml (DDP) or zero2.yaml."
    if asked.name.startswith("zero"):
        return "Unset ACCELERATE_USE_CPU, which turns DeepSpeed off; on a CPU set training.use_cpu=true in its place."
    return (
        "On a CPU accelerate starts one process for MULTI_CPU and for NO: use accelerate_configs/cpu.yaml with "
        "--num_processes, or vir-hf launch."
    )


def avoid_compiling(*, use_cpu: bool) -> None:
    """Let DeepSpeed talk over gloo on a CPU; must come before the processes are joined.

    Its shared-memory kernels would be compiled in the first run: a minute with a compiler, a crash without one, and the
    gloo operations give the same sums.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return
    import torch

    if torch.cuda.is_available() and not use_cpu:
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise RecipeError(
            "the accelerate config asks for DeepSpeed, which is not installed: pip install 'vir-hf[gpu]'."
        )
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def load_whole_weights() -> None:
    """Let every rank load whole weights under ZeRO-3 too; DeepSpeed shares them out when training starts.

    Parts are joined, adapters put in and weights hashed before that, none of which works on a share of a weight.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def _num_machines(accelerator: Any) -> int:
    """How many launchers started the run's ranks, which is how many nodes there are."""
    if accelerator.num_processes == 1:
        return 1
    import torch

    local_ranks: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(local_ranks, int(accelerator.local_process_index))
    return local_ranks.count(0)


def _default_config_file() -> Path | None:
    """The file that `accelerate config` writes and `accelerate launch` takes where none is named."""
    cache = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "huggingface"
    )
    path = Path(cache) / "accelerate" / "default_config.yaml"
    return path if path.is_file() else None


def _launcher_words() -> list[str] | None:
    """The command line of the nearest `accelerate launch` above this process, where the system shows it."""
    process = os.getppid()
    for _ in range(_MAX_ANCESTORS):
        try:
            words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
            status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
        except OSError:
            return None
        found = _after_launch(words)
        if found is not None:
            return found
        process = int(status.rpartition(")")[2].split()[1])
        if process <= 1:
            return None
    return None


def _after_launch(words: list[str]) -> list[str] | None:
    """The words behind `accelerate launch` (or `-m accelerate.commands.launch`), `None` in any other command."""
    for number, word in enumerate(words):
        name = Path(word).name
        if word == "accelerate.commands.launch" or name == "accelerate-launch":
            return words[number + 1 :]
        is_command = name == "accelerate" or word in ("accelerate.commands.accelerate_cli", "accelerate")
        if is_command and words[number + 1 : number + 2] == ["launch"]:
            return words[number + 2 :]
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
        elif name in _FLAGS or position + 1 >= len(words) or words[position + 1].startswith("-"):
            found[name] = ""
        else:
            found[name] = words[position + 1]
            position += 1
        position += 1
    return found


# Options of accelerate that take no value: the word after them may be the script.
_FLAGS = {"quiet", "q", "cpu", "multi_gpu", "tpu", "use_deepspeed", "use_fsdp", "use_parallelism_config", "use_megatron_lm",
          "no_python", "debug", "enable_cpu_affinity", "main_process_only"}  # fmt: skip
