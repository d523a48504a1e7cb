"""The accelerate command for a recipe on this machine: which config, how many processes."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vir_hf.errors import RecipeError
from vir_hf.training.engine_check import ASKED_VARIABLE, from_config

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe


@dataclass(frozen=True)
class Launch:
    """One command to run.

    Attributes:
        words: the accelerate command.
        environment: variables put over the present ones.
        reason: why this config, in words.
    """

    words: list[str]
    environment: dict[str, str]
    reason: str

    def __str__(self) -> str:
        return shlex.join(self.words)


def configs_folder() -> Path:
    """The folder of accelerate configs that came with the package."""
    import importlib.util

    spec = importlib.util.find_spec("vir_hf.accelerate_configs")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(__file__).resolve().parents[2] / "accelerate_configs"


def find_config(name: str) -> Path:
    """Return the file of a config by name (`zero2`) or path.

    Raises:
        RecipeError: there is none; the known ones are named.
    """
    known = {path.stem: path for path in sorted(configs_folder().glob("*.yaml"))}
    if name in known:
        return known[name]
    if Path(name).is_file():
        return Path(name)
    raise RecipeError(f"--config {name}: no such accelerate config; expected a file or one of {', '.join(known)}.")


def choose_config(recipe: Recipe, num_gpus: int, gpu_bytes: int) -> tuple[str, str]:
    """Return a config's name and the reason for it, by what learns, the model's size and the number of GPUs."""
    if num_gpus == 0:
        return "cpu", "no GPU was found, so it trains on the CPU"
    if num_gpus == 1:
        return "single_gpu", "one GPU"
    if recipe.quantization.bits:
        return "multi_gpu", f"{recipe.quantization.bits}-bit weights are trained with DDP, a whole model on each GPU"
    weights = _num_parameters(recipe)
    if weights is None:
        return "zero2", "the model's size is not known without its config"
    if "full" in (recipe.trainable.language_model, recipe.trainable.vision_tower):
        # bf16 weights and gradients, fp32 master and two moments
        if 16 * weights < 0.7 * gpu_bytes:
            return "multi_gpu", f"{weights / 1e9:.1f}B parameters with their optimizer fit on each GPU"
        if (2 + 14 / num_gpus) * weights < 0.6 * gpu_bytes:
            return (
                "zero2",
                f"{weights / 1e9:.1f}B parameters fit on each GPU, their gradients and optimizer are shared out",
            )
        return "zero3", f"{weights / 1e9:.1f}B parameters in full tuning are shared out over {num_gpus} GPUs"
    if 2 * weights < 0.6 * gpu_bytes:
        return "multi_gpu", f"{weights / 1e9:.1f}B frozen parameters fit on each GPU"
    return "zero3", f"{weights / 1e9:.1f}B parameters do not fit on one GPU"


def _num_parameters(recipe: Recipe) -> int | None:
    """How many weights the recipe's model has; `None` where its config cannot be had."""
    import torch

    from vir_hf.budget.shapes import describe

    try:
        return describe(recipe, torch.bfloat16).count()
    except RecipeError:
        return None


def compose(
    recipe: Recipe,
    arguments: Sequence[str],
    *,
    config: str | None = None,
    num_gpus: int | None = None,
    found_gpus: int = 0,
    gpu_bytes: int = 0,
    port: int | None = None,
) -> Launch:
    """Return the accelerate command that trains a recipe.

    Args:
        arguments: what `vir-hf train` would get.
        config: a name or file; chosen by model and machine if `None`.
        num_gpus: processes to start; all GPUs found if `None`.
        found_gpus, gpu_bytes: what this machine has.
        port: where several processes meet; accelerate's own default if `None`.

    Raises:
        RecipeError: more GPUs asked for than there are, or a config that needs GPUs where there are none.
    """
    if num_gpus == 0:
        found_gpus = 0  # a machine's GPUs are left to others
    if num_gpus is not None and num_gpus > found_gpus:
        raise RecipeError(f"--num-gpus {num_gpus}: this machine has {found_gpus}. Leave it out to use all of them.")
    count = found_gpus if num_gpus is None else num_gpus
    name, reason = (config, "as asked for") if config else choose_config(recipe, count, gpu_bytes)
    path = find_config(name)
    settings: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    if int(settings.get("num_machines") or 1) > 1:
        raise RecipeError(
            f"--config {name}: is for {settings['num_machines']} machines, and this starts processes on this one only. Run "
            "accelerate launch on every machine; docs/clusters.md has the commands and a SLURM script."
        )
    if count == 0 and settings.get("distributed_type") == "FSDP":
        raise RecipeError(
            f"--config {name}: needs GPUs; on a CPU accelerate would run DDP in its place. Use --config cpu or zero2."
        )
    settings["num_processes"] = max(1, count)
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    words += ["--num_processes", str(settings["num_processes"])]
    if port is not None and settings["num_processes"] > 1:
        words += ["--main_process_port", str(port)]
    words += ["-m", "vir_hf.train", *arguments]
    environment = {ASKED_VARIABLE: json.dumps(asdict(from_config(settings)))}
    if count == 0:
        # Not ACCELERATE_USE_CPU: it turns DeepSpeed into DDP without a word.
        words += [] if any(word.startswith("training.use_cpu=") for word in arguments) else ["training.use_cpu=true"]
    else:
        # Not accelerate's gpu_ids: the config files name them for their own number of GPUs.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(str(number) for number in range(found_gpus))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[:count])
    return Launch(words, environment, reason)
