"""Checkpoints as folders: whole or not there, verified by their manifest, pruned only when a newer one is whole."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from vir_hf.errors import RunError
from vir_hf.training import checkpoints

FILES = {"model.safetensors": b"w" * 5000, "base/config.json": b"{}", "rank_0.pt": b"r" * 100}


def write_checkpoint(output_dir: Path, step: int) -> Path:
    staging = checkpoints.stage(output_dir, f"checkpoint-{step}")
    for name, content in FILES.items():
        (staging / name).parent.mkdir(exist_ok=True)
        (staging / name).write_bytes(content)
    return checkpoints.publish(staging, step=step)


def test_nothing_is_seen_before_the_rename(tmp_path: Path) -> None:
    staging = checkpoints.stage(tmp_path, "checkpoint-7")
    (staging / "model.safetensors").write_bytes(b"half")
    assert checkpoints.list_checkpoints(tmp_path) == []
    assert checkpoints.publish(staging) == tmp_path / "checkpoint-7"
    assert [checkpoint.step for checkpoint in checkpoints.list_checkpoints(tmp_path)] == [7]
    assert not staging.exists()


def test_every_file_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def rename(source: object, target: object) -> None:
        synced.append("renamed")
        real_rename(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    write_checkpoint(tmp_path, 3)
    before, after = synced[: synced.index("renamed")], synced[synced.index("renamed") + 1 :]
    assert {"model.safetensors", "config.json", "rank_0.pt", "base"} <= set(before)
    assert any(name.startswith(".manifest.json.") for name in before)
    assert after == [tmp_path.name]


def test_the_manifest_names_every_file_with_size_and_hash(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {n: len(c) for n, c in FILES.items()}
    assert checkpoints.damage(folder) is None


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("harm", ["truncated", "bit flipped", "removed", "emptied"])
def test_any_damage_to_any_file_is_found(tmp_path: Path, name: str, harm: str) -> None:
    folder = write_checkpoint(tmp_path, 3)
    path = folder / name
    content = bytearray(path.read_bytes())
    if harm == "removed":
        path.unlink()
    elif harm == "truncated":
        path.write_bytes(content[:-1])
    elif harm == "emptied":
        path.write_bytes(b"")
    else:
        # In the manifest: a digit of the first hash, so that it stays readable.
        place = content.index(b'"sha256": "') + 11 if name == "manifest.json" else len(content) // 2
        content[place] ^= 1
        path.write_bytes(content)
    reason = checkpoints.damage(folder)
    if name == "manifest.json" and harm == "truncated":
        assert reason is None  # only the newline at its end is gone
    else:
        assert reason is not None and (name in reason or name == "manifest.json")


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 3)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    choose = random.Random(0)
    for _ in range(20):
        changed = bytearray(content)
        changed[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
        path.write_bytes(changed)
        assert "model.safetensors" in (checkpoints.damage(folder) or "")


def test_a_damaged_newest_is_passed_over_and_named(tmp_path: Path) -> None:
    older, newer = write_checkpoint(tmp_path, 9), write_checkpoint(tmp_path, 10)
    (newer / "rank_0.pt").write_bytes(b"short")
    found, passed_over = checkpoints.newest_whole(tmp_path)
    assert found == checkpoints.Checkpoint(9, older)
    assert [(bad.path, bad.reason) for bad in passed_over] == [(newer, "rank_0.pt has 5 bytes, expected 100")]


def test_step_numbers_decide_and_not_file_times(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        folder = write_checkpoint(tmp_path, step)
        os.utime(folder, (4e9 - step * 1e8,) * 2)  # a clock that jumped back between them
    found, _ = checkpoints.newest_whole(tmp_path)
    assert found is not None and found.step == 10
    checkpoints.prune(tmp_path, 2)
    assert [checkpoint.step for checkpoint in checkpoints.list_checkpoints(tmp_path)] == [10, 9]


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    folders = {step: write_checkpoint(tmp_path, step) for step in (1, 2, 3, 4)}
    checkpoints.prune(tmp_path, None)
    assert len(checkpoints.list_checkpoints(tmp_path)) == 4
    checkpoints.prune(tmp_path, 2, keep=[folders[1]])
    assert [checkpoint.step for checkpoint in checkpoints.list_checkpoints(tmp_path)] == [4, 1]
    checkpoints.prune(tmp_path, 1, keep=[folders[1]])
    assert [checkpoint.step for checkpoint in checkpoints.list_checkpoints(tmp_path)] == [4, 1]


def test_what_a_killed_run_left_is_removed_and_the_rest_stays(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5)
    checkpoints.stage(tmp_path, "checkpoint-6")
    (tmp_path / ".checkpoint-1.deleted").mkdir()
    (tmp_path / ".final.partial").mkdir()
    (tmp_path / ".mine.partial").mkdir()
    (tmp_path / "checkpoint-notes").mkdir()
    # Killed between the two renames that replace a checkpoint: the old one comes back.
    os.rename(write_checkpoint(tmp_path, 7), tmp_path / ".checkpoint-7.replaced")
    removed = checkpoints.remove_leftovers(tmp_path)
    assert removed == [".checkpoint-1.deleted", ".checkpoint-6.partial", ".final.partial"]
    assert [checkpoint.step for checkpoint in checkpoints.list_checkpoints(tmp_path)] == [7, 5]
    assert (tmp_path / ".mine.partial").exists() and (tmp_path / "checkpoint-notes").exists()


def test_a_checkpoint_is_replaced_by_one_of_the_same_step(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 5)
    (folder / "rank_0.pt").write_bytes(b"damaged")
    assert write_checkpoint(tmp_path, 5) == folder
    assert checkpoints.damage(folder) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5)
    with pytest.raises(
        RunError, match=r"checkpoint-6 needs .* GiB, but only .* are free.*checkpoint-5 is left as it was"
    ):
        checkpoints.require_space(tmp_path, 1 << 60, "checkpoint-6")
