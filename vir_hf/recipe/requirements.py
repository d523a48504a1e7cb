"""What a recipe asks of the place it runs in, as far as that is seen without loading torch: packages, number of processes."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from vir_hf.errors import RecipeError
from vir_hf.recipe.rules import global_batch_size

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe

_TRACKER_PACKAGES = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
# By how the name of an optimizer begins or ends; the first that fits.
_OPTIMIZER_PACKAGES = (
    ("galore_", "galore_torch"),
    ("apollo_", "apollo_torch"),
    ("schedule_free_", "schedulefree"),
    ("lomo", "lomo_optim"),
    ("adalomo", "lomo_optim"),
    ("grokadamw", "grokadamw"),
    ("stable_adamw", "optimi"),
    ("adamw_anyprecision", "torchdistx"),
    ("adamw_torch_xla", "torch_xla"),
    ("adamw_torch_npu", "torch_npu"),
    ("adamw_torch_4bit", "torchao"),
    ("adamw_torch_8bit", "torchao"),
    ("paged_", "bitsandbytes"),
    ("ademamix", "bitsandbytes"),
    ("lion_", "bitsandbytes"),
    ("rmsprop_bnb", "bitsandbytes"),
    ("adamw_8bit", "bitsandbytes"),
    ("adamw_bnb_8bit", "bitsandbytes"),
)
# transformers takes the kernels package's build where the attention's own package is missing.
_ATTENTION_PACKAGES = {
    "flash_attention_2": ("flash_attn", "kernels"),
    "flash_attention_3": ("flash_attn_interface", "flash_attn_3", "kernels"),
    "flash_attention_4": ("flash_attn", "kernels"),
}


def check_requirements(recipe: Recipe, *, world_size: int) -> None:
    """Raise for what this machine lacks, or what several processes cannot do; milliseconds.

    Raises:
        RecipeError: a global batch that these processes cannot share; else naming the key, the package and the remedy.
    """
    training = recipe.training
    if training.on_out_of_memory == "split" and world_size > 1:
        raise RecipeError(
            f"training.on_out_of_memory=split: works with one process, found {world_size}: while one begins its step again, the "
            "others wait for it in the middle of theirs. Set training.on_out_of_memory=raise."
        )
    if recipe.data.streaming and training.max_tokens_per_batch and world_size > 1:
        raise RecipeError(
            "training.max_tokens_per_batch: gives each process another number of micro-batches where rows are streamed. Set "
            "training.per_device_train_batch_size instead, or data.streaming=false."
        )
    global_batch_size(recipe, world_size)
    check_tracker_packages(training.report_to)
    optimizer = training.arguments.get("optim", "")
    package = next((package for start, package in _OPTIMIZER_PACKAGES if optimizer.startswith(start)), None)
    if package and not is_installed(package):
        raise RecipeError(
            f"training.optim={optimizer}: the package {package} is not installed. Install it, or set "
            "training.optim=adamw_torch."
        )
    attention = recipe.model.attn_implementation
    packages = _ATTENTION_PACKAGES.get(attention, ())
    if packages and not any(map(is_installed, packages)):
        raise RecipeError(
            f"model.attn_implementation={attention}: none of the packages {', '.join(packages)} is installed. Install one, or "
            "set model.attn_implementation=auto."
        )
    if training.use_liger_kernel and not is_installed("liger_kernel"):
        raise RecipeError(
            "training.use_liger_kernel=true: the package liger_kernel is not installed. pip install liger-kernel, or set "
            "training.use_liger_kernel=false."
        )


def trackers_of(report_to: Any) -> list[str]:
    """Return the trackers that a value of training.report_to names; of `all`, upstream takes those that are installed."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    if names == ["all"]:
        return [name for name, packages in _TRACKER_PACKAGES.items() if any(map(is_installed, packages))]
    return [name for name in names if name != "none"]


def check_tracker_packages(report_to: Any) -> None:
    """Raise for a tracker whose package is not installed."""
    for name in trackers_of(report_to):
        packages = _TRACKER_PACKAGES.get(name, ())
        if packages and not any(map(is_installed, packages)):
            raise RecipeError(
                f"training.report_to={name}: the package {packages[0]} is not installed. pip install {packages[0]}, or set "
                "training.report_to=none."
            )


def is_installed(package: str) -> bool:
    """Return whether a package is there; it is not imported to find out."""
    return importlib.util.find_spec(package) is not None
