"""Files appear whole or not at all; what is not ours is never replaced or removed, whatever a crash left."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vir_hf import files
from vir_hf.errors import RecipeError
from vir_hf.files import OutputFolder


def names_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def test_a_write_cut_short_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "rows.json"
    target.write_text("before")
    with pytest.raises(KeyboardInterrupt), files.writing(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "before" and names_in(tmp_path) == ["rows.json"]
    with files.writing(tmp_path / "new" / "rows.json") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "new" / "rows.json").read_text() == "whole"


def test_a_link_is_followed_and_a_device_is_left_a_device(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("before")
    link.symlink_to(real)
    files.write_text(link, "after")
    assert link.is_symlink() and real.read_text() == "after"
    twin = tmp_path / "twin.json"
    os.link(real, twin)
    files.write_text(twin, "apart")
    assert real.read_text() == "after" and twin.read_text() == "apart"
    files.write_text(os.devnull, "nowhere")
    assert Path(os.devnull).is_char_device()


SPELLINGS = {
    "itself": lambda path: str(path),
    "through a parent": lambda path: str(path.parent / "sub" / ".." / path.name),
    "a dot": lambda path: f"{path.parent}/./{path.name}",
    "a symbolic link": lambda path: str(linked(path, path.parent / "sub" / "symbolic.json", os.symlink)),
    "a hard link": lambda path: str(linked(path, path.parent / "sub" / "hard.json", os.link)),
    "a linked folder": lambda path: str(linked(path.parent, path.parent / "sub" / "folder", os.symlink) / path.name),
}


def linked(path: Path, place: Path, how) -> Path:
    if not os.path.lexists(place):
        how(path, place)
    return place


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(one=st.sampled_from(sorted(SPELLINGS)), other=st.sampled_from(sorted(SPELLINGS)), overwrite=st.booleans())
def test_two_spellings_of_one_file_are_one_file(tmp_path: Path, one: str, other: str, overwrite: bool) -> None:
    path = tmp_path / "rows.json"
    (tmp_path / "sub").mkdir(exist_ok=True)
    if not path.exists():
        path.write_text("[]")
    with pytest.raises(RecipeError, match="would overwrite a file that this command reads"):
        files.refuse_output(SPELLINGS[one](path), "--json", [SPELLINGS[other](path)], overwrite=overwrite)
    assert path.read_text() == "[]"


def test_every_file_of_a_folder_or_glob_that_is_read_is_an_input(tmp_path: Path) -> None:
    for name in ("a/one.jsonl", "a/deep/picture.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    for given_input in (tmp_path / "a", tmp_path / "**" / "*.*"):
        for name in ("a/one.jsonl", "a/deep/picture.txt"):
            with pytest.raises(RecipeError, match="would overwrite"):
                files.refuse_output(str(tmp_path / name), "--json", [str(given_input)], overwrite=True)
    files.refuse_output(str(tmp_path / "a" / "new.json"), "--json", [str(tmp_path / "a")])
    assert names_in(tmp_path) == ["a/deep/picture.txt", "a/one.jsonl"]


def test_a_report_takes_the_place_of_a_report_and_of_nothing_else(tmp_path: Path) -> None:
    report, page, mine, picture = (tmp_path / name for name in ("r.json", "r.html", "mine.json", "x.png"))
    report.write_text(files.as_report({"plan": 1}))
    page.write_text(f"<html><head>{files.HTML_MARK}")
    mine.write_text('{"plan": 1}')
    picture.write_bytes(b"\x89PNG\0\0")
    for ours in (report, page):
        files.refuse_output(str(ours), "--json", [])
    with pytest.raises(RecipeError, match="is there already"):
        files.refuse_output(str(mine), "--json", [])
    files.refuse_output(str(mine), "--json", [], overwrite=True)
    with pytest.raises(RecipeError, match="no text file"):
        files.refuse_output(str(picture), "--json", [], overwrite=True)


def test_a_folder_is_removed_only_with_its_mark_and_the_mark_goes_last(tmp_path: Path, monkeypatch) -> None:
    ours, theirs = files.new_folder(tmp_path / "ours"), tmp_path / "theirs"
    (ours / "deep").mkdir()
    (ours / "deep" / "file").write_text("x")
    theirs.mkdir()
    (theirs / "file").write_text("x")
    with pytest.raises(RecipeError, match="was not made by vir-hf"):
        files.remove_folder(theirs)

    def broken(path: Path) -> None:
        raise OSError(28, "cut")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="cut"):
        patched.setattr(shutil, "rmtree", broken)
        files.remove_folder(ours)
    files.remove_folder(ours)  # the removal that was cut short can be ended
    assert not ours.exists() and names_in(tmp_path) == ["theirs/file"]


def test_a_link_to_a_folder_is_never_removed_for_it(tmp_path: Path) -> None:
    real = files.new_folder(tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    with pytest.raises(RecipeError):
        files.remove_folder(tmp_path / "link")
    made = files.new_folder(tmp_path / "link")
    assert made.is_dir() and not made.is_symlink() and (tmp_path / "link.kept").is_symlink() and real.is_dir()


def test_a_file_is_ours_until_somebody_changes_it(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path)
    output.write_text("metrics.json", "one")
    assert output.foreign(["metrics.json", "samples", "nothing"]) == []
    output.write_text("metrics.json", "two")  # ours over ours
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "mine.jpg").write_text("mine")
    (tmp_path / "metrics.json").write_text("changed by hand")
    assert output.foreign(["metrics.json", "samples"]) == ["metrics.json", "samples/mine.jpg"]
    with pytest.raises(RecipeError, match=r"holds metrics\.json and 1 more, which vir-hf did not write"):
        output.refuse_foreign(["metrics.json", "samples"], "output_dir", "Move it away.")
    output.write_text("metrics.json", "three")
    assert (tmp_path / "metrics.json.kept").read_text() == "changed by hand"
    output.remove("samples")
    assert (tmp_path / "samples" / "mine.jpg").read_text() == "mine"


def test_a_copied_folder_is_still_ours(tmp_path: Path) -> None:
    OutputFolder(tmp_path / "one").write_text("a.json", "x" * 100)
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    os.utime(tmp_path / "two" / "a.json", (1, 1))
    assert OutputFolder(tmp_path / "two").owns("a.json")
    (tmp_path / "two" / "a.json").write_text("y" * 100)
    assert not OutputFolder(tmp_path / "two").owns("a.json")


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"files": []}', '{"files": {"a.json": 3}}'.replace("3", "[]")])
def test_a_damaged_record_makes_nothing_ours(damage: str, tmp_path: Path) -> None:
    output = OutputFolder(tmp_path)
    output.write_text("a.json", "x")
    (tmp_path / files.RECORD).write_text(damage)
    assert output.foreign(["a.json"]) == ["a.json"]


def test_a_kill_at_any_moment_leaves_nothing_of_ours_unknown(tmp_path: Path, monkeypatch) -> None:
    """Cut after each rename of a file: what is under every name is the old or the new one, and known as ours."""
    real = os.replace
    for cut in range(1, 8):
        folder = tmp_path / str(cut)
        output = OutputFolder(folder)
        for name in ("a.json", "b.json"):
            output.write_text(name, "old")
        staging = output.stage("final")
        for name in ("a.json", "b.json", "c.json"):
            (staging / name).write_text("new")
        left = [cut]

        def replace(source, target, left=left) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            real(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", replace)
            try:
                output.move_in(staging)
            except KeyboardInterrupt:
                pass
        assert output.foreign(["a.json", "b.json", "c.json"]) == []
        assert {(folder / name).read_text() for name in ("a.json", "b.json")} <= {"old", "new"}
        again = output.stage("final")  # the next start clears what was left and ends the work
        for name in ("a.json", "b.json", "c.json"):
            (again / name).write_text("newer")
        output.move_in(again)
        assert names_in(folder) == [files.RECORD, "a.json", "b.json", "c.json"]


def test_a_whole_folder_takes_the_place_of_ours_and_keeps_what_is_not(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path)
    for text in ("old", "new"):
        staging = output.stage("base")
        (staging / "deep").mkdir()
        for name in ("config.json", f"deep/{text}.bin"):
            (staging / name).write_text(text)
        output.replace_folder("base", staging)
        assert names_in(tmp_path / "base") == ["config.json", f"deep/{text}.bin"]
    (tmp_path / "base" / "mine.txt").write_text("mine")
    staging = output.stage("base")
    (staging / "config.json").write_text("third")
    output.replace_folder("base", staging)
    assert names_in(tmp_path / "base") == ["config.json", "mine.txt"]
    assert json.loads((tmp_path / files.RECORD).read_text())["files"].keys() == {"base/config.json"}


def test_a_new_folder_appears_in_one_piece_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="halfway"), files.folder_in_one_piece(tmp_path / "out") as staging:
        (staging / "half").write_text("x")
        raise ValueError("halfway")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "mine").write_text("mine")
    with files.folder_in_one_piece(tmp_path / "out") as staging:
        (staging / "whole").write_text("x")
    assert names_in(tmp_path) == [".out.partial.kept/mine", "out/whole"]
    with pytest.raises(RecipeError, match="is not empty"), files.folder_in_one_piece(tmp_path / "out"):
        pass
