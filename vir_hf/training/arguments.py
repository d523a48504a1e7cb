"""Upstream's arguments: the recipe's own, and what the machine and the data path decide."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch

from vir_hf.budget import plan as memory
from vir_hf.errors import RecipeError
from vir_hf.images.preprocessing import recommended_num_workers
from vir_hf.model.precision import Precision

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe


import warnings

from trl import SFTConfig

logger = logging.getLogger(__name__)


def training_arguments(recipe: Recipe, precision: Precision) -> Any:
    """Return TRL's config: the recipe's arguments, and what the machine and the data path decide."""
    training = recipe.training
    use_cpu = not torch.cuda.is_available() or bool(training.use_cpu)
    has_tf32 = True if not use_cpu and torch.cuda.get_device_capability()[0] >= 8 else None
    arguments = training.sft_arguments()
    arguments.setdefault("report_to", "none")
    arguments.setdefault("logging_steps", 1)
    arguments.setdefault("save_strategy", "no")
    # Upstream would replace a bad loss by the mean of the others and go on; ours is to see it.
    arguments["logging_nan_inf_filter"] = False
    arguments["activation_checkpointing"] = checkpoints_activations(recipe)
    arguments["push_to_hub"] = False  # the whole run is published once, at its end
    arguments["ddp_timeout"] = 60 * training.timeout_minutes
    if arguments.get("dataloader_num_workers") is None:
        arguments["dataloader_num_workers"] = recommended_num_workers(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if recipe.data.eval_path is None and recipe.data.eval_fraction is None:
        arguments.pop("eval_strategy", None)
    if training.early_stopping_patience is not None:
        arguments.setdefault("metric_for_best_model", "loss")
    if use_cpu and arguments.get("optim", "").startswith("paged_"):
        arguments["optim"] = "adamw_torch"
    return make_sft_config(
        arguments,
        use_cpu=use_cpu,
        bf16=precision.autocast == "bf16",
        fp16=precision.autocast == "fp16",
        tf32=arguments.pop("tf32", None) if "tf32" in arguments else has_tf32,
        # A step is one item of our loader; the micro-batches are inside it.
        gradient_accumulation_steps=1,
        per_device_train_batch_size=training.per_device_train_batch_size or 1,
        remove_unused_columns=False,
        max_length=None,
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
    )


def make_sft_config(arguments: dict[str, Any], **fixed: Any) -> SFTConfig:
    """Return TRL's config from the recipe's arguments, with what the product decides put over them."""
    merged = {**arguments, **fixed}
    if "gradient_checkpointing" in merged:  # upstream's new name for it; the old one warns
        merged["activation_checkpointing"] = merged.pop("gradient_checkpointing")
    with warnings.catch_warnings():
        # TRL 1.16 sets the old name itself, whatever it is given.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
        return SFTConfig(**merged)


def checkpoints_activations(recipe: Recipe) -> bool:
    """Whether activations are computed again in the backward pass: as the recipe says, else unless memory is to spare."""
    try:
        return memory.should_checkpoint(recipe)
    except RecipeError as error:
        logger.info("memory was not estimated, so activations are recomputed: %s", error)
        return True


def keeps_elsewhere(arguments: Any) -> bool:
    """Whether something else decides what is kept for the backward pass: sharded weights, or offloaded activations."""
    plugin = arguments.deepspeed_plugin
    is_sharded = bool(arguments.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    return is_sharded or bool(arguments.activation_offloading) or (plugin is not None and plugin.zero_stage == 3)


def warn_if_too_large(recipe: Recipe) -> None:
    """Say before anything is loaded that the run is not expected to fit, and what to change."""
    try:
        warning = memory.will_it_fit(recipe)
    except RecipeError as error:
        logger.info("memory was not estimated: %s", error)
        return
    if warning is not None:
        logger.warning("%s", warning)
