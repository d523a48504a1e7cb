"""Everything that would fail late, tried first: in seconds, before the first step."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vir_hf import files
from vir_hf.errors import RecipeError
from vir_hf.recipe.requirements import check_requirements, check_tracker_packages, trackers_of
from vir_hf.training import checkpoints
from vir_hf.training.state import random_states, set_random_states

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe
    from vir_hf.training.trainer import LlavaTrainer

logger = logging.getLogger(__name__)


def check_machine(recipe: Recipe, *, world_size: int) -> None:
    """Try what needs no model: the output directory, trackers, the Hub, the port. Seconds at most.

    Raises:
        RecipeError: what would fail, and the remedy.
    """
    check_requirements(recipe, world_size=world_size)
    check_output_dir(Path(recipe.training.output_dir))
    check_trackers(recipe.training.report_to)
    if recipe.training.push_to_hub:
        check_hub(recipe.training.hub_model_id)


def check_output_dir(output_dir: Path) -> None:
    """Raise unless a file can be written, synced and renamed in the output directory."""
    probe = output_dir / f".probe-{uuid.uuid4().hex}"
    try:
        files.write_text(probe, "probe", durable=True)
        files.discard(probe)
    except OSError as error:
        raise RecipeError(
            f"training.output_dir={output_dir}: nothing can be written there ({error.strerror or error}). Name a folder on a "
            "writable disk with space, or change its permissions."
        ) from error


def check_trackers(report_to: Any) -> None:
    """Raise for a tracker that is not installed or would stop the run for want of a login."""
    check_tracker_packages(report_to)
    if "wandb" in trackers_of(report_to):
        _check_wandb()


def _check_wandb() -> None:
    """Raise where `wandb.init` would stop to ask who logs in; wandb itself says so, about its own server, files and mode."""
    import wandb

    try:
        # WANDB_* variables, wandb/settings of this folder (`wandb offline` writes it), and the user's own settings.
        settings = wandb.setup().settings
        if settings.mode in ("offline", "dryrun", "disabled") or _has_wandb_login(settings):
            return
    except Exception as error:  # a key in a wrong format, two logins at once, a damaged settings file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RecipeError(
            f"training.report_to=wandb: wandb cannot be used as it is set up: {reason} Correct that, or set WANDB_MODE=offline, "
            "or training.report_to=none."
        ) from error
    raise RecipeError(
        f"training.report_to=wandb: nobody is logged in at {settings.base_url}. Run `wandb login`, or set WANDB_MODE=offline, "
        "or training.report_to=none."
    )


def _has_wandb_login(settings: Any) -> bool:
    """Return whether wandb finds a key or an identity token for the server it is to report to."""
    if settings.api_key or getattr(settings, "identity_token_file", None):
        return True
    try:
        from wandb.sdk.lib.wbauth import read_netrc_auth
    except ImportError:
        try:
            from wandb.sdk.lib.apikey import api_key  # before wandb 0.22
        except ImportError:
            logger.info("this wandb does not tell whether somebody is logged in; the run will show it")
            return True
        return bool(api_key(settings))
    return bool(read_netrc_auth(host=settings.base_url))


def check_hub(repo_id: str | None) -> None:
    """Raise unless a push at the end of the run would be let in."""
    import huggingface_hub

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise RecipeError(
            "training.push_to_hub=true: HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it, or set "
            "training.push_to_hub=false and push later with `vir-hf push`."
        )
    try:
        name = huggingface_hub.HfApi().whoami()["name"]
    except Exception as error:
        raise RecipeError(
            f"training.push_to_hub=true: the Hub does not know you ({type(error).__name__}). Run `hf auth login` with a token "
            "that may write, or set training.push_to_hub=false and push later with `vir-hf push`."
        ) from error
    logger.info("pushing as %s to %s", name, repo_id or "a repository named like the output directory")


def check_port(host: str, port: int) -> None:
    """Raise if another program listens on the port that the processes of a run are to meet at."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise RecipeError(
                f"port {port} on {host}: is taken ({error.strerror}). Name another: --port with vir-hf launch, "
                "--main_process_port with accelerate launch."
            ) from error


def choose_port(wanted: int | None, default: int = 29500) -> int:
    """Return the port that the processes of one machine meet at: the one asked for, else the default or any free one.

    Raises:
        RecipeError: the one asked for is taken.
    """
    if wanted is not None:
        check_port("127.0.0.1", wanted)
        return wanted
    try:
        check_port("127.0.0.1", default)
    except RecipeError:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])
    return default


def check_run(trainer: LlavaTrainer) -> None:
    """Try one row through encoding, forward, backward and saving, and leave no trace of it.

    The weights, their gradients and the random states are afterwards what they were. Sharded models (ZeRO, FSDP) are tried
    in their first step instead.

    Raises:
        RecipeError: what fails, and where.
    """
    output_dir = Path(trainer.args.output_dir)
    if trainer.args.save_strategy != "no" and trainer.args.should_save:
        try:
            checkpoints.require_space(output_dir, trainer.checkpoint_bytes(), "one checkpoint")
        except Exception as error:
            raise RecipeError(str(error)) from error
    check_generation_config(trainer.model)
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return
    states = random_states()
    try:
        _try_backward(trainer)
        if trainer.args.should_save:
            _try_saving(trainer)
    finally:
        set_random_states(states)


def check_generation_config(model: Any) -> None:
    """Raise for a generation config that saving refuses; upstream notices after the last step."""
    unwrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(unwrapped, "generation_config", None)
    if config is None:
        return
    with tempfile.TemporaryDirectory(prefix="vir_hf_preflight_") as folder:
        try:
            config.save_pretrained(folder)
        except ValueError as error:
            raise RecipeError(
                f"model: its generation_config cannot be saved, so the run would fail at its end: {str(error).splitlines()[0]} "
                "Correct generation_config.json beside the model (a temperature needs do_sample: true)."
            ) from error


def _try_backward(trainer: LlavaTrainer) -> None:
    """One row through encoding, forward and backward."""
    sizes = trainer.step_sampler.sizes
    # The shortest with a picture, so that trying takes no more memory than training.
    if sizes:
        number = min(range(len(sizes)), key=lambda row: (not sizes[row].num_images, sizes[row].num_tokens))
        row = trainer.train_dataset[number]
    else:  # of a stream, the first
        row = next(iter(trainer.train_dataset))
    batch = trainer.data_collator([row])
    was_training = trainer.model.training
    inputs = {
        name: value.to(trainer.model.device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name not in ("row_ids", "masked_rows", "row_numbers")
    }
    counted = {name: list(values) for name, values in trainer._metrics["train"].items()}
    num_tokens = trainer._total_train_tokens
    trainer.model.train()
    try:
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
    finally:
        trainer.model.zero_grad(set_to_none=True)
        trainer.model.train(was_training)
        trainer._metrics["train"].clear()
        trainer._metrics["train"].update(counted)
        trainer._total_train_tokens = num_tokens
    if not torch.isfinite(loss.detach()):
        raise RecipeError(
            f"row {row.get('id')!r}: its loss is {float(loss.detach()):.4g} before the first step. The base weights may hold "
            "bad numbers, or overflow in this dtype: try model.dtype=float32."
        )


def _try_saving(trainer: LlavaTrainer) -> None:
    """The small files of a checkpoint: configs, processor and recipe; the weights of an adapter too."""
    staging = files.new_folder(Path(trainer.args.output_dir) / ".final.partial")
    try:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if hasattr(model, "peft_config"):
            model.save_pretrained(str(staging))
        else:
            model.config.save_pretrained(str(staging))
        trainer.processing_class.save_pretrained(str(staging))
        if trainer.recipe is not None:
            trainer.recipe.save(staging / "recipe.yaml")
    except Exception as error:
        raise RecipeError(
            f"{trainer.args.output_dir}: model or processor cannot be saved ({type(error).__name__}: {error}), so the run would "
            "fail at its first checkpoint. Mend this first."
        ) from error
    finally:
        files.remove_folder(staging)
