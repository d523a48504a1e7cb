"""Going on from a checkpoint to the same bits: which one, whether this recipe may, and what is put back."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import torch
import yaml
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import distributed, nn

from vir_hf.data.cache import flat_batches
from vir_hf.errors import DataError, RecipeError, RunError
from vir_hf.files import writing
from vir_hf.images.archives import open_archive
from vir_hf.images.folder import split_place
from vir_hf.images.identity import CONTENT, Folders, picture_identities
from vir_hf.llava.modeling_llava import name_in_memory
from vir_hf.training import checkpoints

if TYPE_CHECKING:
    from vir_hf.batches.sampling import StepSampler
    from vir_hf.batches.streaming import StreamPlan
    from vir_hf.recipe.load import Recipe

logger = logging.getLogger(__name__)

POSITION = "position.json"
REST = "trained_weights.safetensors"
ADAPTER = "adapter_model.safetensors"

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
_LENGTH = ("training.max_steps", "training.num_train_epochs")


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint a run goes on from."""

    path: Path
    step: int
    position: dict[str, Any]


def together(action: Callable[[], Any]) -> Any:
    """Run an action on every rank and return its result; if it fails on one rank, it fails on all.

    Raises:
        RecipeError, RunError: what this rank's action raised, or else the message of the rank it failed on.
    """
    error: Exception | None = None
    result = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        failures: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(failures, None if error is None else (type(error).__name__, str(error)))
        if error is None:
            for rank, failure in enumerate(failures):
                if failure is not None:
                    kind = RecipeError if failure[0] == "RecipeError" else RunError
                    raise kind(f"rank {rank}: {failure[1]}")
    if error is not None:
        raise error
    return result


def broadcast(value: Any) -> Any:
    """Return what rank 0 holds, on every rank."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def choose(recipe: Recipe, *, is_main: bool) -> ResumePoint | None:
    """Return the checkpoint to go on from, or `None` to begin at the start; the same on every rank.

    Raises:
        RecipeError: no whole checkpoint where one is named; a recipe changed so that the result would be another; or
            the output directory holds checkpoints of an earlier run that nobody asked to go on from, or a finished run.
    """
    point = together(lambda: _choose(recipe) if is_main else None)
    return broadcast(point)


def _choose(recipe: Recipe) -> ResumePoint | None:
    wanted = recipe.training.resume
    output_dir = Path(recipe.training.output_dir)
    # A weights file that was cut short is made anew, and what is left of it kept under another name.
    output = checkpoints.run_folder(output_dir)
    was_finished = wanted == "auto" and output.owns(checkpoints.METRICS)
    damaged = checkpoints.damaged_weights(output_dir) if was_finished else None
    output.refuse_foreign(
        [name for name in checkpoints.OUTPUTS if name != damaged],
        f"training.output_dir={output_dir}",
        "Move it away, or name another training.output_dir.",
    )
    if wanted is None:
        _refuse_to_replace(recipe, output_dir)
        checkpoints.remove_leftovers(output_dir)
        return None
    for name in checkpoints.remove_leftovers(output_dir):
        logger.warning("%s: removed, a run ended while writing or deleting it", output_dir / name)
    if wanted == "auto":
        checkpoint, passed_over = checkpoints.newest_whole(output_dir)
        for bad in passed_over:
            logger.warning("%s: passed over: %s", bad.path, bad.reason)
        if checkpoint is None:
            if passed_over:
                raise RecipeError(
                    f"training.resume=auto: no checkpoint in {output_dir} is whole ({passed_over[0].path.name}: "
                    f"{passed_over[0].reason}). Delete them to begin again, or name another training.output_dir."
                )
            if damaged is None:  # else it is made anew
                _refuse_to_replace(recipe, output_dir)
            logger.warning("training.resume=auto: no checkpoint in %s, beginning at the start", output_dir)
            return None
        path, step = checkpoint.path, checkpoint.step
    else:
        path = Path(wanted).expanduser()
        reason = checkpoints.damage(path) if path.is_dir() else "there is no such folder"
        if reason is not None:
            raise RecipeError(
                f"training.resume={wanted}: cannot go on from it: {reason}. Name a whole checkpoint-N folder, or use "
                "training.resume=auto for the newest whole one."
            )
        if path.resolve().parent != output_dir.resolve():
            _refuse_to_replace(recipe, output_dir)
        step = int(json.loads((path / POSITION).read_text(encoding="utf-8"))["step"])
    check_recipe(recipe, path / "recipe.yaml")
    position = json.loads((path / POSITION).read_text(encoding="utf-8"))
    return ResumePoint(path, step, position)


def _refuse_to_replace(recipe: Recipe, output_dir: Path) -> None:
    """Raise if an earlier run's checkpoints or model would give way and nobody has said that they may."""
    if recipe.training.overwrite_output_dir:
        return
    found = checkpoints.list_checkpoints(output_dir)
    if found:
        raise RecipeError(
            f"training.output_dir={output_dir}: holds {found[0].path.name} of an earlier run. Add --resume "
            "(training.resume=auto) to go on from it, or name another training.output_dir, or delete it, or let this run replace "
            "it (training.overwrite_output_dir=true)."
        )
    if checkpoints.read_metrics(output_dir):
        raise RecipeError(
            f"training.output_dir={output_dir}: holds the model of a finished run, which this one would replace. Name "
            "another training.output_dir, or delete it, or let this run replace it (training.overwrite_output_dir=true); "
            "--resume (training.resume=auto) leaves a finished run as it is."
        )


def let_go_of_earlier_run(recipe: Recipe, point: ResumePoint | None) -> None:
    """Remove what says that an earlier run in the output directory is whole, and its checkpoints: this one takes its place.

    Its model stays until this run's own is saved. Nothing is removed when a run goes on, or before all was checked.
    """
    output_dir = Path(recipe.training.output_dir)
    if point is None or point.path.resolve().parent != output_dir.resolve():
        checkpoints.run_folder(output_dir).remove(checkpoints.METRICS)
        checkpoints.remove_all(output_dir)


def is_finished(recipe: Recipe) -> dict[str, Any] | None:
    """Return the metrics of this recipe's finished run in its output directory, if going on by itself was asked for.

    A run whose saved weights are damaged is not finished: it is made whole again from its newest checkpoint.
    """
    if recipe.training.resume != "auto":
        return None
    output_dir = Path(recipe.training.output_dir)
    try:
        metrics = checkpoints.read_metrics(output_dir)
        if not metrics:
            return None
        changes = recipe_changes(recipe, output_dir / "recipe.yaml")
    except (OSError, ValueError, RecipeError):
        return None
    is_same = not any(_kind_of(key, recipe) == "refused" or key in _LENGTH for key in changes)
    if not is_same:
        return None
    damaged = checkpoints.damaged_weights(output_dir)
    if damaged is not None:
        logger.warning(
            "%s: this run was finished, but %s cannot be read any more; going on from its checkpoint",
            output_dir,
            damaged,
        )
        return None
    for checkpoint in checkpoints.list_checkpoints(output_dir):
        reason = checkpoints.damage(checkpoint.path)
        if reason is not None:
            logger.warning("%s: this checkpoint of the finished run is damaged: %s", checkpoint.path, reason)
    return metrics


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


def _kind_of(key: str, recipe: Recipe) -> str:
    if key in _LENGTH and _has_constant_rate(recipe):
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
    refused = {key: change for key, change in changes.items() if _kind_of(key, recipe) == "refused"}
    if refused:
        listed = "; ".join(f"{key}: was {old!r}, is {new!r}" for key, (old, new) in refused.items())
        raise RecipeError(
            f"{saved.parent}: this recipe would give another result than the run that is to go on: {listed}. Put the old "
            f"values back (--recipe {saved}), or begin a new run in another training.output_dir."
        )
    for key, (old, new) in changes.items():
        if _kind_of(key, recipe) == "rounding":
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


def save_rest(model: nn.Module, folder: Path) -> None:
    """Write the learning weights of a PEFT model that its adapter file does not hold."""
    if not isinstance(model, PeftModel):
        return
    held = {tensor.data_ptr() for tensor in get_peft_model_state_dict(model).values()}
    rest = {
        name: parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.data_ptr() not in held
    }
    if rest:
        with writing(folder / REST) as temporary:
            save_file(rest, temporary, metadata={"format": "pt"})


def load_weights(model: nn.Module, folder: Path) -> None:
    """Put a checkpoint's weights into a model built as the run's was; every learning weight must be there.

    Raises:
        RunError: weights that are missing or belong to nothing.
    """
    if isinstance(model, PeftModel):
        result = set_peft_model_state_dict(model, load_file(folder / ADAPTER))
        unexpected = list(getattr(result, "unexpected_keys", []))
        loaded = {tensor.data_ptr() for tensor in get_peft_model_state_dict(model).values()}
        if (folder / REST).is_file():
            loaded |= copy_in(model, load_file(folder / REST), folder)
    else:
        unexpected, loaded = [], set()
        for path in sorted(folder.glob("model*.safetensors")):
            state = {name_in_memory(name): tensor for name, tensor in load_file(path).items()}
            loaded |= copy_in(model, state, folder)
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.data_ptr() not in loaded
    ]
    if missing or unexpected:
        raise RunError(
            f"{folder}: its weights do not fit this model: missing {missing[:3]}, unexpected {unexpected[:3]}. Install the "
            "versions of vir_hf, peft and transformers it was written with."
        )


def copy_in(model: nn.Module, state: dict[str, torch.Tensor], folder: Path) -> set[int]:
    """Copy tensors into the parameters and buffers of their names; return the addresses of what was written."""
    targets = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    written = set()
    for name, tensor in state.items():
        if ".weight." in name or name.endswith((".SCB", ".weight_format")):
            continue  # the scales of 4 and 8 bit weights, which do not learn
        target = targets.get(name)
        if target is None or target.shape != tensor.shape:
            found = "no such weight" if target is None else f"{tuple(target.shape)}"
            raise RunError(f"{folder}: {name} {tuple(tensor.shape)} does not fit this model ({found}).")
        with torch.no_grad():
            target.copy_(tensor)
        written.add(target.data_ptr())
    return written


# What DeepSpeed's optimizer files name beside tensors and plain values.
_DEEPSPEED_CLASSES = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
)


@contextlib.contextmanager
def reading_no_code() -> Iterator[None]:
    """Inside this block `torch.load` runs no code a file names, even where a library asks for it, as DeepSpeed does."""
    classes = []
    for module, name in _DEEPSPEED_CLASSES:
        with contextlib.suppress(ImportError, AttributeError):
            classes.append(getattr(importlib.import_module(module), name))
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        with torch.serialization.safe_globals(classes):
            yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def random_states() -> dict[str, Any]:
    """Return the state of every random generator of this process, as tensors and plain values."""
    kind, keys, position, has_gauss, cached = np.random.get_state()  # type: ignore[misc]
    version, internal, gauss = random.getstate()
    states: dict[str, Any] = {
        "python": {"version": version, "state": torch.tensor(internal), "gauss": gauss},
        "numpy": {
            "kind": str(kind),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` returned."""
    python, numpy_state = states["python"], states["numpy"]
    random.setstate((python["version"], tuple(python["state"].tolist()), python["gauss"]))
    np.random.set_state(
        (
            numpy_state["kind"],
            numpy_state["keys"].numpy().astype(np.uint32),
            numpy_state["position"],
            numpy_state["has_gauss"],
            numpy_state["cached"],
        )
    )
    torch.random.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
