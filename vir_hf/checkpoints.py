"""Checkpoints that are whole or not there: written under another name, synced, listed in a manifest, then renamed once.

outputs/run/checkpoint-500/       manifest.json names every file with its size and SHA-256
outputs/run/.checkpoint-750.partial/   being written; never read, removed by the next start
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vir_hf.errors import RunError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.(checkpoint-\d+|final)\.(partial|replaced|deleted)")
_CHUNK_BYTES = 1 << 22


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


def sha256(path: Path) -> str:
    """Return a file's SHA-256, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def stage(output_dir: Path, name: str) -> Path:
    """Return the new, empty folder in which `name` is written before it gets its name."""
    staging = output_dir / f".{name}.partial"
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging


def publish(staging: Path, **facts: Any) -> Path:
    """Sync every staged file, list them in the manifest, and give the folder its name with one rename.

    Args:
        staging: a folder that `stage` returned.
        facts: goes into the manifest beside the files.
    """
    name = staging.name.removeprefix(".").removesuffix(".partial")
    target = staging.with_name(name)
    paths = sorted(path for path in staging.rglob("*") if path.is_file())
    with ThreadPoolExecutor(4) as pool:
        entries = list(pool.map(_synced_entry, paths))
    manifest = {
        "format": FORMAT,
        **facts,
        "files": {path.relative_to(staging).as_posix(): entry for path, entry in zip(paths, entries, strict=True)},
    }
    write_synced(staging / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    for folder in [path for path in staging.rglob("*") if path.is_dir()] + [staging]:
        sync_folder(folder)
    replaced = staging.with_name(f".{name}.replaced")
    if target.exists():  # only when a run went back to an earlier checkpoint and came here again
        if replaced.exists():
            shutil.rmtree(replaced)
        os.rename(target, replaced)
    os.rename(staging, target)
    sync_folder(target.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
    return target


def _synced_entry(path: Path) -> dict[str, Any]:
    sync_file(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sync_file(path: Path) -> None:
    """Return when a file's contents have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Return when a folder's names have reached the disk, where the file system can say so."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse to sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, text: str) -> None:
    """Write a text file and return when it has reached the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def prune(output_dir: Path, limit: int | None, keep: Sequence[Path] = ()) -> None:
    """Delete the checkpoints with the fewest steps until `limit` are left; never the newest nor those in `keep`."""
    if limit is None or limit <= 0:
        return
    found = list_checkpoints(output_dir)
    kept = {path.resolve() for path in keep}
    spare = [checkpoint for checkpoint in found[1:] if checkpoint.path.resolve() not in kept]
    excess = len(found) - max(limit, len(found) - len(spare))
    for checkpoint in spare[len(spare) - excess :] if excess > 0 else []:
        # Renamed first: a kill while deleting must not leave half a checkpoint under its name.
        doomed = checkpoint.path.with_name(f".{checkpoint.path.name}.deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(checkpoint.path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


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
        shutil.rmtree(path, ignore_errors=True)
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


def move_in(staging: Path) -> None:
    """Sync a staging folder's files and move them, each by one rename, into the folder it lies in."""
    for path in sorted(path for path in staging.rglob("*") if path.is_file()):
        sync_file(path)
    for path in sorted(staging.iterdir()):
        target = staging.parent / path.name
        if path.is_dir() and target.exists():
            shutil.rmtree(target)
        os.replace(path, target)
    staging.rmdir()
    sync_folder(staging.parent)
