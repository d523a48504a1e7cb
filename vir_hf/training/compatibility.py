"""Whether a run may go on from a checkpoint: recipe, rows, images, plan and frozen weights are those it was made with."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import torch
import yaml
from torch import nn

from vir_hf.data.cache import flat_batches
from vir_hf.errors import DataError, RecipeError
from vir_hf.images.archives import open_archive
from vir_hf.images.folder import split_place
from vir_hf.images.identity import CONTENT, Folders, picture_identities

if TYPE_CHECKING:
    from vir_hf.batches.sampling import StepSampler
    from vir_hf.batches.streaming import StreamPlan
    from vir_hf.recipe.load import Recipe
    from vir_hf.training.resume import ResumePoint

logger = logging.getLogger(__name__)


# Keys that change nothing a run computes.
_FREE = (
    "experiment.name",
    "experiment.description",
    "experiment.hardware",
    "model.trust_remote_code",
    # Compared by what the rows say and by the size of some pictures, so that data may move.
    "data.data_path",
    "data.image_folder",
    "data.eval_path",
    "data.eval_image_folder",
    "data.check",
    "training.output_dir",
    "training.resume",
    "training.overwrite_output_dir",
    "training.run_name",
    "training.project",
    "training.on_bad_numbers",
    "training.max_skipped_steps",
    "training.on_out_of_memory",
    "training.timeout_minutes",
    "training.panel_size",
    "training.report",
    "training.disable_tqdm",
    "training.report_to",
    "training.push_to_hub",
    "training.per_device_eval_batch_size",
    "training.load_best_model_at_end",
    "training.metric_for_best_model",
    "training.greater_is_better",
    "training.skip_memory_metrics",
    "training.torch_empty_cache_steps",
)
_FREE_PREFIXES = ("training.logging_", "training.save_", "training.eval_", "training.dataloader_", "training.hub_",
                  "training.log_", "training.trackio_")  # fmt: skip
_NOT_FREE = ("training.dataloader_drop_last",)
# The same rows, the same mean, other rounding: allowed, and said.
_ROUNDING = (
    "model.attn_implementation",
    "training.per_device_train_batch_size",
    "training.gradient_accumulation_steps",
    "training.max_tokens_per_batch",
    "training.balance_tokens",
    "training.padding_free",
    "training.share_prefixes",
    "training.supervised_positions_only",
    "training.trim_vision_tower",
    "training.fused_lora",
    "training.fused_head",
    "training.lean_layers",
    "training.activation_checkpointing",
    "training.activation_checkpointing_kwargs",
)
LENGTH_KEYS = ("training.max_steps", "training.num_train_epochs")


def recipe_changes(recipe: Recipe, saved: Path) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which a saved recipe and this one differ: `key -> (saved, now)`."""
    try:
        before = yaml.safe_load(saved.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(
            f"{saved}: the checkpoint's recipe cannot be read: {error}. Use another checkpoint."
        ) from error
    if not isinstance(before, dict) or not all(isinstance(section or {}, dict) for section in before.values()):
        raise RecipeError(f"{saved}: is no recipe that a run has saved. Use another checkpoint.")
    now = yaml.safe_load(recipe.to_yaml())
    changes: dict[str, tuple[Any, Any]] = {}
    for section in sorted(set(before) | set(now)):
        old, new = before.get(section) or {}, now.get(section) or {}
        for name in sorted(set(old) | set(new)):
            if old.get(name) != new.get(name):
                changes[f"{section}.{name}"] = (old.get(name), new.get(name))
    return changes


def kind_of_change(key: str, recipe: Recipe) -> str:
    """Return what a changed key means for a run that goes on: `free`, `rounding` or `refused`."""
    if key in LENGTH_KEYS and _has_constant_rate(recipe):
        return "free"
    if key in _ROUNDING:
        return "rounding"
    if key in _FREE or (key.startswith(_FREE_PREFIXES) and key not in _NOT_FREE):
        return "free"
    return "refused"


def _has_constant_rate(recipe: Recipe) -> bool:
    """Whether the learning rate does not depend on how long the run is."""
    kind, warmup = str(recipe.training.lr_scheduler_type), recipe.training.warmup_steps or 0
    return kind == "constant" or (kind == "constant_with_warmup" and (warmup >= 1 or warmup == 0))


def check_recipe(recipe: Recipe, saved: Path) -> None:
    """Raise if the recipe differs from a checkpoint's in a key that alters the result; say where only rounding differs."""
    changes = recipe_changes(recipe, saved)
    refused = {key: change for key, change in changes.items() if kind_of_change(key, recipe) == "refused"}
    if refused:
        listed = "; ".join(f"{key}: was {old!r}, is {new!r}" for key, (old, new) in refused.items())
        raise RecipeError(
            f"{saved.parent}: this recipe would give another result than the run that is to go on: {listed}. Put the old "
            f"values back (--recipe {saved}), or begin a new run in another training.output_dir."
        )
    for key, (old, new) in changes.items():
        if kind_of_change(key, recipe) == "rounding":
            logger.warning("%s was %r, is %r: the same rows and the same mean, but not the same bits", key, old, new)


def identify(
    rows: Any, sampler: StepSampler | StreamPlan, model: nn.Module, *, world_size: int, feature_lookup: Any = None
) -> dict[str, Any]:
    """Return what makes a run this run: its rows, its plan of steps, its frozen weights and its layout."""
    from transformers import __version__ as transformers_version

    return {
        "data": data_fingerprint(rows),
        "plan": plan_fingerprint(sampler),
        "frozen_weights": frozen_fingerprint(model),
        "feature_cache": getattr(feature_lookup, "identity", None),
        "world_size": world_size,
        "versions": {"torch": torch.__version__, "transformers": transformers_version},
    }


def check_identity(point: ResumePoint, identity: dict[str, Any]) -> None:
    """Raise if rows, plan or base weights are others than those the checkpoint was made with."""
    before, identity = point.position, json.loads(json.dumps(identity))
    if before["data"]["rows"] != identity["data"]["rows"]:
        raise RecipeError(
            f"{point.path}: data.data_path holds other rows than when this run began ({before['data']['num_rows']} rows then, "
            f"{identity['data']['num_rows']} now). Put the old file back, or begin a new run in another training.output_dir."
        )
    if before["data"]["pictures"] != identity["data"]["pictures"]:
        raise RecipeError(
            f"{point.path}: pictures in data.image_folder have other sizes than when this run began. Put them back, or begin a "
            "new run in another training.output_dir."
        )
    if before["plan"] != identity["plan"]:
        differs = [name for name, value in identity["plan"].items() if before["plan"].get(name) != value]
        raise RecipeError(
            f"{point.path}: the steps of this run would hold other rows than before ({', '.join(differs)} changed). Put the "
            "tokenizer, processor and batch settings back, or begin a new run in another training.output_dir."
        )
    if before["frozen_weights"] != identity["frozen_weights"]:
        raise RecipeError(
            f"{point.path}: the frozen weights are not those this run began with; a model was replaced under its old name. Put "
            "it back (or pin model.revision), or begin a new run in another training.output_dir."
        )
    if before["feature_cache"] != identity["feature_cache"]:
        raise RecipeError(
            f"{point.path}: training.feature_cache holds other features than when this run began. Build it again, or set "
            "the old folder."
        )
    if before["world_size"] != identity["world_size"]:
        logger.warning(
            "%s: written by %s processes, going on with %s: the same rows a step, but not the same bits",
            point.path,
            before["world_size"],
            identity["world_size"],
        )
    for name, version in identity["versions"].items():
        if before["versions"].get(name) != version:
            logger.warning(
                "%s: written with %s %s, found %s: the bits may differ",
                point.path, name, before["versions"].get(name), version,
            )  # fmt: skip


def data_fingerprint(rows: Any) -> dict[str, Any]:
    """Return a hash of what the rows say and which pictures they show, and the sizes of some files; `None`s for a stream.

    Embedded pictures count by their content. Files count by name, and by which of them share a folder: data may move.
    """
    if not hasattr(rows, "__len__"):
        return {"num_rows": None, "rows": None, "pictures": []}
    num_rows, digest, pictures = len(rows), hashlib.sha256(), []
    holders: dict[str, int] = {}
    folders = Folders()
    for start, table in flat_batches(rows, ["id", "messages", "images"]):
        images = table.column("images").combine_chunks()
        names = iter([_movable_name(name, holders) for name in picture_identities(images, folders).to_pylist()])
        sizes = iter(pc.binary_length(images.flatten().field("bytes")).to_pylist())
        places = iter(images.flatten().field("path").to_pylist())
        for number, (row_id, messages, count) in enumerate(
            zip(
                table.column("id").to_pylist(),
                table.column("messages").to_pylist(),
                pc.list_value_length(images).to_pylist(),
                strict=True,
            ),
            start,
        ):
            row_names, row_sizes, row_places = (list(islice(part, count or 0)) for part in (names, sizes, places))
            row = [row_id, messages, row_names]
            digest.update(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace"))
            if row_names and number % max(1, num_rows // 64) == 0:
                pictures.append([number, _file_bytes(row_places[0]) if row_sizes[0] is None else row_sizes[0]])
    return {"num_rows": num_rows, "rows": digest.hexdigest(), "pictures": pictures}


def _movable_name(identity: str | None, holders: dict[str, int]) -> str:
    """Return an identity without where its folder or archive lies: the how manieth of those the rows name it is."""
    if identity is None or identity.startswith(CONTENT):
        return str(identity)
    in_archive = split_place(identity)
    folder, name = os.path.split(in_archive[1] if in_archive else identity)
    holder = f"{in_archive[0]}::{folder}" if in_archive else folder
    return f"{holders.setdefault(holder, len(holders))}/{name}"


def _file_bytes(place: str | None) -> int | None:
    try:
        in_archive = split_place(place or "")
        if in_archive:
            return open_archive(in_archive[0]).members[in_archive[1]].num_bytes
        return os.path.getsize(place or "")
    except (DataError, KeyError, OSError, ValueError):
        return None


def plan_fingerprint(sampler: StepSampler | StreamPlan) -> dict[str, Any]:
    """Return what decides the rows of every step."""
    digest = hashlib.sha256()
    pictures: dict[str | None, int] = {}
    for size in sampler.sizes:
        # Paths may move with their data; which rows share a picture does not change.
        picture = pictures.setdefault(size.image_key, len(pictures))
        digest.update(f"{size.num_tokens},{size.num_images},{picture};".encode())
    return {
        "seed": sampler.seed,
        "rows_per_step": sampler.rows_per_step,
        "steps_per_epoch": len(sampler),
        "group_by": sampler.group_by,
        "sizes": digest.hexdigest(),
    }


def frozen_fingerprint(model: nn.Module) -> str:
    """Return a hash over the beginning of every weight that does not learn."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            head = parameter.detach().reshape(-1)[:256].contiguous().view(torch.uint8).cpu()
            digest.update(f"{name},{tuple(parameter.shape)},{parameter.dtype};".encode())
            digest.update(head.numpy().tobytes())
    return digest.hexdigest()
