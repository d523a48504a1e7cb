"""Checkpoints that are whole or not there: written under another name, synced, listed in a manifest, then renamed once.

outputs/run/checkpoint-500/       manifest.json names every file with its size and SHA-256
outputs/run/.checkpoint-750.partial/   being written; never read, removed by the next start
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vir_hf.errors import RecipeError, RunError
from vir_hf.files import (
    RECORD,
    OutputFolder,
    clear_name,
    discard,
    entry_of,
    is_report,
    new_folder,
    remove_folder,
    set_aside,
    sha256,
    sync_file,
    sync_folder,
    write_text,
)

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.(checkpoint-\d+|final)\.(partial|replaced|deleted)")


# What a run and `vir-hf evaluate` write beside the checkpoints, under these names and no others.
_RESULT = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "projector/projector.safetensors",
    "projector.safetensors",  # where earlier versions put it
    "trained_weights.safetensors",
    "base_fingerprint.json",
    "README.md",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
)
METRICS, AUDIT, RECIPE = "metrics.json", "audit.json", "recipe.yaml"
OF_EVALUATION = ("evaluation.json", "samples.json", "samples")
PANEL, REPORT = "panel.json", "report.html"  # what a run shows while it goes on
BASE = "base"
OUTPUTS = (*_RESULT, METRICS, AUDIT, RECIPE, *OF_EVALUATION, BASE)
_RECIPE_HEAD = "# Every value of this run."


@dataclass(frozen=True)
class Checkpoint:
    """One `checkpoint-N` folder; N is the number of optimizer steps it holds."""

    step: int
    path: Path


@dataclass(frozen=True)
class PassedOver:
    """A checkpoint that is not whole, and why."""

    path: Path
    reason: str


def list_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """Return the checkpoints of a run, the most steps first. Names decide, never file times."""
    if not output_dir.is_dir():
        return []
    found = [
        Checkpoint(int(match[1]), path)
        for path in output_dir.iterdir()
        if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    ]
    return sorted(found, key=lambda checkpoint: -checkpoint.step)


def newest_whole(output_dir: Path) -> tuple[Checkpoint | None, list[PassedOver]]:
    """Return the whole checkpoint with the most steps, and the ones passed over on the way to it."""
    passed_over: list[PassedOver] = []
    for checkpoint in list_checkpoints(output_dir):
        reason = damage(checkpoint.path)
        if reason is None:
            return checkpoint, passed_over
        passed_over.append(PassedOver(checkpoint.path, reason))
    return None, passed_over


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or `None` if every file has the size and hash its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = manifest["files"]
        wanted = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    for name, (size, _) in wanted.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
    try:
        with ThreadPoolExecutor(4) as pool:
            found = dict(zip(wanted, pool.map(lambda name: sha256(folder / name), wanted), strict=True))
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    for name, (_, digest) in wanted.items():
        if found[name] != digest:
            return f"{name} has other contents than its manifest says"
    return None


def damaged_weights(folder: Path) -> str | None:
    """Return the name of the first weights file of a folder that is cut short, or of none at all; by headers and sizes."""
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > path.stat().st_size:
                    return path.name
                header = json.loads(file.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            if 8 + length + max(ends, default=0) != path.stat().st_size:
                return path.name
        except (OSError, ValueError, KeyError, TypeError):
            return path.name
    return None if files else "its weights file"


def stage(output_dir: Path, name: str) -> Path:
    """Return the new, empty folder in which `name` is written before it gets its name."""
    return new_folder(output_dir / f".{name}.partial")


def publish(staging: Path, **facts: Any) -> Path:
    """Sync every staged file, list them in the manifest, and give the folder its name with one rename.

    Args:
        staging: a folder that `stage` returned.
        facts: goes into the manifest beside the files.
    """
    name = staging.name.removeprefix(".").removesuffix(".partial")
    target = staging.with_name(name)
    paths = sorted(path for path in staging.rglob("*") if path.is_file() and path != staging / RECORD)
    with ThreadPoolExecutor(4) as pool:
        entries = list(pool.map(_synced_entry, paths))
    manifest = {
        "format": FORMAT,
        **facts,
        "files": {path.relative_to(staging).as_posix(): entry for path, entry in zip(paths, entries, strict=True)},
    }
    write_text(staging / MANIFEST, json.dumps(manifest, indent=2) + "\n", durable=True)
    for folder in [path for path in staging.rglob("*") if path.is_dir()] + [staging]:
        sync_folder(folder)
    replaced = staging.with_name(f".{name}.replaced")
    if target.exists() and not is_ours(target):
        set_aside(target)
    elif target.exists():  # only when a run went back to an earlier checkpoint and came here again
        clear_name(replaced, is_ours)
        os.rename(target, replaced)
    os.rename(staging, target)
    sync_folder(target.parent)
    discard(target / RECORD)  # the manifest says from here on whose it is
    if replaced.exists():
        remove_folder(replaced, is_ours)
    return target


def is_ours(folder: Path) -> bool:
    """Whether a checkpoint was written by this project, whole or not: its manifest says so."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return isinstance(manifest["files"], dict) and "format" in manifest
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _synced_entry(path: Path) -> dict[str, Any]:
    sync_file(path)
    return entry_of(path)


def prune(output_dir: Path, limit: int | None, keep: Sequence[Path] = ()) -> None:
    """Delete our checkpoints with the fewest steps until `limit` are left; never the newest, nor those in `keep`."""
    if limit is None or limit <= 0:
        return
    found = list_checkpoints(output_dir)
    kept = {path.resolve() for path in keep}
    spare = [
        checkpoint for checkpoint in found[1:] if checkpoint.path.resolve() not in kept and is_ours(checkpoint.path)
    ]
    excess = len(found) - max(limit, len(found) - len(spare))
    for checkpoint in spare[len(spare) - excess :] if excess > 0 else []:
        _delete(checkpoint.path)


def remove_all(output_dir: Path) -> None:
    """Delete every checkpoint of an earlier run that this project wrote; what is somebody else's gets another name."""
    for checkpoint in list_checkpoints(output_dir):
        if is_ours(checkpoint.path):
            _delete(checkpoint.path)
        else:
            set_aside(checkpoint.path)


def _delete(checkpoint: Path) -> None:
    # Renamed first: a kill while deleting must not leave half a checkpoint under its name.
    doomed = checkpoint.with_name(f".{checkpoint.name}.deleted")
    clear_name(doomed, is_ours)
    os.rename(checkpoint, doomed)
    remove_folder(doomed, is_ours)


def remove_leftovers(output_dir: Path) -> list[str]:
    """Remove what a killed run was still writing or deleting; return the names."""
    if not output_dir.is_dir():
        return []
    names = []
    for path in sorted(output_dir.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if not match:
            continue
        target = output_dir / match[1]
        if match[2] == "replaced" and not target.exists():
            os.rename(path, target)  # killed between the two renames of `publish`
            continue
        with contextlib.suppress(RecipeError):  # nothing says that it is ours
            remove_folder(path, is_ours)
            names.append(path.name)
    return names


def folder_bytes(folder: Path) -> int:
    """Return how many bytes the files of a folder take."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def require_space(output_dir: Path, needed: int, what: str) -> None:
    """Raise if the disk has no room for `needed` bytes.

    Raises:
        RunError: how much is needed, how much is free, and what to do.
    """
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise RunError(
            f"{output_dir}: {what} needs {gibibytes(needed)}, but only {gibibytes(free)} are free on its disk. "
            f"{what_is_left(output_dir)} Free some space, or lower training.save_total_limit, and add --resume."
        )


def gibibytes(count: int) -> str:
    """Return a number of bytes as people read it."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**24 else f"{count / 2**20:.2f} MiB"


def what_is_left(output_dir: Path) -> str:
    """Return a sentence that names the newest checkpoint, for errors."""
    found = list_checkpoints(output_dir)
    if not found:
        return "No checkpoint has been written yet."
    return f"{found[0].path} is left as it was."


def run_folder(output_dir: str | os.PathLike[str]) -> OutputFolder:
    """Return the output directory of a run, to be written into; what an earlier version of this project left there is ours.

    An earlier version kept no record. Its run is known by the recipe it saved together with its metrics or a checkpoint, its
    base by the file that says what it was made from.
    """
    folder = OutputFolder(output_dir)
    if folder.has_record() or not folder.path.is_dir():
        return folder
    names = []
    metrics = read_metrics(folder.path)
    if is_saved_recipe(folder.path / RECIPE) and (
        metrics or any(is_ours(it.path) for it in list_checkpoints(folder.path))
    ):
        names = [*_RESULT, RECIPE, AUDIT, *(path.name for path in folder.path.glob("model-*-of-*.safetensors"))]
        names += [*([METRICS] if metrics else []), *_of_evaluation(folder.path)]
    elif (
        any(is_ours(it.path) for it in list_checkpoints(folder.path))
        or (folder.path / BASE / "made_from.json").is_file()
    ):
        names = [AUDIT]
    if (folder.path / BASE / "made_from.json").is_file():
        names += [path.relative_to(folder.path).as_posix() for path in (folder.path / BASE).iterdir()]
    folder.adopt(names)
    return folder


def of_the_model(names: Iterable[str]) -> list[str]:
    """Return those names in a run's folder that belong to its saved model: weights, processor, and what was measured on it."""
    result = {*_RESULT, METRICS, RECIPE}
    is_shard = re.compile(r"model-\d+-of-\d+\.safetensors").fullmatch
    return [name for name in names if name in result or name.split("/")[0] in OF_EVALUATION or is_shard(name)]


def may_show(output_dir: Path, name: str) -> bool:
    """Whether a page or file that a run can do without may be written: nothing of somebody else's lies under its name."""
    path = output_dir / name
    folder = run_folder(output_dir)
    if not folder.owns(name) and is_report(path):  # of a run whose record is gone
        folder.adopt([name])
    is_free = not os.path.lexists(path) or folder.owns(name)
    if not is_free:
        logger.warning("%s: is not this project's and stays as it is; the run goes without a %s", path, name)
    return is_free


def read_metrics(output_dir: Path) -> dict[str, Any]:
    """Return what a finished run has written into `metrics.json`; nothing if there is no such file or it is another's."""
    try:
        metrics = json.loads((output_dir / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return (
        metrics if isinstance(metrics, dict) and metrics.get("is_finished") is True and "num_steps" in metrics else {}
    )


def is_saved_recipe(path: Path) -> bool:
    """Whether a recipe file was written by a run rather than by hand."""
    try:
        return path.read_text(encoding="utf-8").startswith(_RECIPE_HEAD)
    except (OSError, ValueError):
        return False


def _of_evaluation(folder: Path) -> list[str]:
    try:
        scores = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        shown = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
        names = [str(sample["image"]) for sample in shown if set(sample) == {"image", "question", "before", "after"}]
        return [
            *(["evaluation.json"] if list(scores) == ["results"] else []),
            *(["samples.json", *names] if names else []),
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []
