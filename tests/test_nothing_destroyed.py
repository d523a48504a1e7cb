"""Every command in a folder full of a user's files: each is there afterwards as it was, or the command refused before its work.

The folder is looked at before and after each command; what the command removed or replaced is listed, and must be its own.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from tiny_run import train_run

from vir_hf import cli, files
from vir_hf.training import checkpoints

MINE = b"mine, and not to be lost\n"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    }


def lost(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    """The files that a command removed or replaced; one that got another name is not lost."""
    return [name for name, data in before.items() if after.get(name) != data and after.get(f"{name}.kept") != data]


@pytest.fixture
def desk(tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user stands: lm/, tower/, rows.json, images/, a recipe of theirs, and notes."""
    here = tmp_path / "desk"
    here.mkdir()
    for name in ("lm", "tower", "images"):
        shutil.copytree(tiny_parts / name, here / name)
    shutil.copy(tiny_parts / "rows.json", here)
    (here / "mine.yaml").write_text("experiment:\n  stage: finetune\n")
    (here / "notes.json").write_bytes(MINE)
    (here / "sub").mkdir()
    (here / "sub" / "link.json").symlink_to(here / "rows.json")
    os.link(here / "rows.json", here / "sub" / "hard.json")
    (here / "sub" / "images").symlink_to(here / "images")
    monkeypatch.chdir(here)
    return here


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


RECIPE = (
    "experiment=local_lite",
    "quantization=none",
    "data.data_path=rows.json",
    "data.image_folder=images",
    "model.language_model=lm",
    "model.vision_tower=tower",
    "training.max_length=256",
    "training.global_batch_size=4",
    "training.per_device_train_batch_size=2",
    "training.dataloader_num_workers=0",
    "training.max_steps=2",
    "training.logging_steps=1",
)
FULL = ("lora=none", "trainable.language_model=full", "model.dtype=float32")
# Each writes a file where the option says, and reads rows.json, images/ and the parts where it has a recipe.
REPORTING: dict[str, tuple[str, ...]] = {
    "plan --json": ("plan", *RECIPE),
    "data check --json": ("data", "check", "rows.json", "--image-folder", "images"),
    "data check --html": ("data", "check", "rows.json", "--image-folder", "images"),
    "data check --fix": ("data", "check", "rows.json", "--image-folder", "images"),
    "data check a recipe --json": ("data", "check", *RECIPE),
    "data check a folder --json": ("data", "check", ".", "--image-folder", "images"),
    "data check a glob --html": ("data", "check", "*s.json", "--image-folder", "images"),
    "data inspect --json": ("data", "inspect", "rows.json", "--image-folder", "images", "--tokenizer", "lm"),
    "data inspect a recipe --html": ("data", "inspect", *RECIPE),
    "data prepare --json": ("data", "prepare", "rows.json", "subset", "--image-folder", "images"),
    "data cache-features --json": ("data", "cache-features", *RECIPE),
    "data download-models --json": ("data", "download-models", *RECIPE),
    "doctor --json": ("doctor", *RECIPE),
}
INPUTS = {
    "the rows": "rows.json",
    "the rows through ..": "sub/../rows.json",
    "a symbolic link to them": "sub/link.json",
    "a hard link to them": "sub/hard.json",
    "a folder": "images",
    "a picture": "images/0001.png",
    "a picture through a linked folder": "sub/images/0001.png",
}


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=["", "--overwrite"])
@pytest.mark.parametrize("command", REPORTING)
def test_no_report_is_written_over_what_a_command_reads(
    command: str, overwrite: tuple[str, ...], desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    option = command.split()[-1]
    # How a file is spelled is one function's work, tried in tests/test_files.py too; composing a recipe takes its time.
    tried = ("the rows", "a hard link to them", "a picture") if RECIPE[0] in REPORTING[command] else tuple(INPUTS)
    for what, name in ((what, INPUTS[what]) for what in tried):
        before = snapshot(desk)
        assert run(*REPORTING[command], option, name, *overwrite) == 2, what
        assert snapshot(desk) == before, what
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and f"{option} {name}" in errors[0] and len(errors[0]) <= 500, what


@pytest.mark.parametrize("command", [name for name, words in REPORTING.items() if RECIPE[0] in words])
def test_the_parts_of_a_recipe_are_read_too(command: str, desk: Path) -> None:
    before = snapshot(desk)
    for name in ("lm/config.json", "tower/config.json", "lm/model.safetensors"):
        assert run(*REPORTING[command], command.split()[-1], name, "--overwrite") == 2
    assert snapshot(desk) == before


def test_a_recipe_file_is_read_too(desk: Path) -> None:
    before = snapshot(desk)
    for words in (("plan",), ("doctor",), ("data", "cache-features")):
        assert run(*words, "--recipe", "mine.yaml", *RECIPE[1:], "--json", "mine.yaml", "--overwrite") == 2
    assert snapshot(desk) == before


@pytest.mark.parametrize(
    "command", [*(it for it in REPORTING if "folder" not in it and "glob" not in it), "recipes --json"]
)
def test_a_file_of_the_user_is_asked_about_and_a_report_is_not(command: str, desk: Path) -> None:
    words, option = REPORTING.get(command, ("recipes",)), command.split()[-1]
    before = snapshot(desk)
    assert run(*words, option, "notes.json") == 2
    assert snapshot(desk) == before
    codes = (0, 1)
    assert run(*words, option, "notes.json", "--overwrite") in codes
    assert (desk / "notes.json").read_bytes() != MINE
    assert lost({name: data for name, data in before.items() if name != "notes.json"}, snapshot(desk)) == []
    if option != "--fix":  # a file of rows says nothing of who made it
        assert files.is_report("notes.json")
        assert run(*words, option, "notes.json") in codes


# --- folders -----------------------------------------------------------------------------------------------------


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(MINE)


def inside(name: str) -> str:
    return f"{name}/mine.txt" if name in ("base", "samples") else name


@pytest.mark.parametrize("name", checkpoints.OUTPUTS)
def test_training_refuses_at_once_where_a_file_of_the_user_would_give_way(
    name: str, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(desk / "out", inside(name), "rows.json")
    before = snapshot(desk)
    for more in ((), ("training.resume=auto",), ("training.overwrite_output_dir=true",), FULL):
        assert run("train", *RECIPE, "training.output_dir=out", *more) == 2
        assert inside(name) in capsys.readouterr().err.splitlines()[-1]
        assert snapshot(desk) == before


# Beside these a run finds its place: names it does not need, and hidden ones that it moves out of its way.
HARMLESS = (
    "rows.json",
    "failed.json",
    "report.html",
    "plan.json",
    "notes/model.safetensors",
    "checkpoint-notes/mine.txt",
    ".final.partial/mine.txt",
    ".base.partial/mine.txt",
    ".checkpoint-2.partial/mine.txt",
    ".checkpoint-1.deleted/mine.txt",
    ".ranks/mine.txt",
    "bad_numbers/mine.txt",
    "training_args.bin",
    "runs/events.txt",
)


def kept_anywhere(folder: Path) -> int:
    return sum(data == MINE for data in snapshot(folder).values())


@pytest.mark.parametrize("more", [(), FULL], ids=["lora", "full"])
def test_a_run_resumed_and_done_again_leaves_every_other_file(more: tuple[str, ...], desk: Path) -> None:
    put(desk / "out", *HARMLESS)
    before = snapshot(desk)
    words = ("train", *RECIPE, "training.output_dir=out", "training.save_steps=1", "training.save_total_limit=1", *more)

    def check() -> None:
        after = snapshot(desk)
        moved = [name for name in lost(before, after) if "/." not in name]
        assert moved == [], "only a hidden name may be given another"
        assert kept_anywhere(desk) == len(HARMLESS) + 1

    assert run(*words) == 0
    check()
    (desk / "out" / "metrics.json").unlink()  # as if killed before the end
    (desk / "out" / "checkpoint-7").mkdir()
    assert run(*words, "training.resume=auto") == 0
    check()
    assert run(*words) == 2 and run(*words, "training.resume=auto") == 0
    assert run(*words, "training.overwrite_output_dir=true") == 0
    check()


def test_what_somebody_changed_in_a_finished_run_is_theirs(desk: Path) -> None:
    words = ("train", *RECIPE, *FULL, "training.output_dir=out", "training.save_strategy='no'")
    assert run(*words) == 0
    recipe = desk / "out" / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "# a note of mine\n")
    before = snapshot(desk)
    assert run(*words, "training.overwrite_output_dir=true") == 2
    assert snapshot(desk) == before


def test_preparing_never_replaces_its_source_or_a_file_of_the_user(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare = ("data", "prepare")
    # Into the source's own folder, however that is spelled: 12 rows became 3 here.
    (desk / "alias").symlink_to(desk)
    for out in (".", "sub/..", "alias", str(desk)):
        for overwrite in ((), ("--overwrite",)):
            before = snapshot(desk)
            assert run(*prepare, "rows.json", out, "--image-folder", "images", "--num-rows", "3", *overwrite) == 2
            assert snapshot(desk) == before
    for source in ("sub/link.json", "sub/hard.json"):
        assert run(*prepare, source, ".", "--image-folder", "images", "--overwrite") == 2
        assert snapshot(desk) == before
    assert "is the source, which would be written over" in capsys.readouterr().err
    # Beside files of the user.
    picture = b"\x89PNG another picture"
    for name in ("rows.json", "failed.json"):
        put(desk / name.removesuffix(".json"), name)
        before = snapshot(desk)
        assert run(*prepare, "rows.json", name.removesuffix(".json"), "--image-folder", "images") == 2
        assert snapshot(desk) == before
    put(desk / "subset", "notes.txt", "images/mine.png")
    (desk / "subset" / "images" / "0001.png").write_bytes(picture)
    before = snapshot(desk)
    assert (
        run(*prepare, "rows.json", "subset", "--image-folder", "images") == 1
    )  # a picture of another is not taken for it
    assert lost(before, snapshot(desk)) == []
    assert not any(row.get("image") == "0001.png" for row in json.loads((desk / "subset" / "rows.json").read_text()))
    # Again and smaller: its own files give way without a question, unless they were changed.
    assert run(*prepare, "rows.json", "subset", "--image-folder", "images", "--num-rows", "2") in (0, 1)
    (desk / "subset" / "rows.json").write_bytes(MINE)
    assert run(*prepare, "rows.json", "subset", "--image-folder", "images") == 2
    assert (desk / "subset" / "rows.json").read_bytes() == MINE
    assert run(*prepare, "rows.json", "subset", "--image-folder", "images", "--overwrite") == 1
    # A model trained into the same folder takes away none of it.
    before = snapshot(desk)
    assert run("train", *RECIPE, *FULL, "training.output_dir=subset", "training.save_strategy='no'") == 0
    after = snapshot(desk)
    assert [name for name in lost(before, after) if name != f"subset/{files.RECORD}"] == []


@pytest.fixture(scope="module")
def finished(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("finished")
    lora = {"lora": "default", "trainable.language_model": "lora"}
    return {
        "whole": train_run(tiny_parts, folder / "whole", **{"training.max_steps": 2}),
        "adapter": train_run(tiny_parts, folder / "adapter", **{"training.max_steps": 2, **lora}),
    }


@pytest.fixture
def runs(desk: Path, finished: dict[str, Path]) -> Path:
    for name, path in finished.items():
        shutil.copytree(path, desk / name)
    return desk


NEW_FOLDERS: dict[str, Callable[[str], tuple[str, ...]]] = {
    "merge": lambda out: ("merge", "adapter", "--out", out),
    "push --dry-run": lambda out: ("push", "adapter", "me/mine", "--dry-run", "--folder", out),
    "push --merged --dry-run": lambda out: ("push", "adapter", "me/mine", "--merged", "--dry-run", "--folder", out),
    "space --dry-run": lambda out: ("space", "me/mine", "me/demo", "--dry-run", "--folder", out),
}


@pytest.mark.parametrize("command", NEW_FOLDERS)
def test_a_new_folder_is_new_or_refused(command: str, runs: Path) -> None:
    if command.startswith("space"):
        pytest.importorskip("gradio")
    put(runs / "taken", "config.json")
    put(runs, "taken-file", ".new.partial/mine.txt")
    before = snapshot(runs)
    for out in ("taken", "taken-file", "adapter", "."):
        assert run(*NEW_FOLDERS[command](out)) == 2
        assert snapshot(runs) == before
    assert run(*NEW_FOLDERS[command]("new")) == 0
    after = snapshot(runs)
    assert [name for name in lost(before, after) if not name.startswith(".new.partial/")] == []
    assert after[".new.partial.kept/mine.txt"] == MINE
    assert not any(Path(name).name == files.RECORD for name in after if name.startswith("new/"))
    assert run(*NEW_FOLDERS[command]("new")) == 2


@pytest.mark.parametrize("name", checkpoints.OF_EVALUATION)
def test_evaluating_refuses_where_a_file_of_the_user_would_give_way(name: str, runs: Path) -> None:
    put(runs / "whole", inside(name))
    before = snapshot(runs)
    assert run("evaluate", "whole", "--data", "rows.json", "--image-folder", "images", "--max-new-tokens", "2") == 2
    assert snapshot(runs) == before


def test_evaluating_twice_replaces_its_own_results_and_nothing_else(runs: Path) -> None:
    asked = {"question": "What is it?", "answer": "It is red."}
    held_out = [{"id": str(number), "image": f"000{number}.png", **asked} for number in range(3)]
    (runs / "heldout.json").write_text(json.dumps(held_out))
    words = ("evaluate", "whole", "--data", "heldout.json", "--image-folder", "images", "--max-new-tokens", "2")
    before = snapshot(runs)
    for samples in ("2", "1"):
        assert run(*words, "--samples", samples) == 0
    after = snapshot(runs)
    assert [name for name in lost(before, after) if name != f"whole/{files.RECORD}"] == []
    assert [name for name in after if name.startswith("whole/samples/")] == ["whole/samples/1.jpg"]
    put(runs / "whole", "samples/mine.jpg")
    assert run(*words) == 2 and (runs / "whole" / "samples" / "mine.jpg").read_bytes() == MINE


def test_answers_are_added_to_answers_only(runs: Path) -> None:
    rows = [{"id": str(number), "image": f"000{number}.png", "question": "What is it?"} for number in range(3)]
    (runs / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.link(runs / "questions.jsonl", runs / "questions2.jsonl")
    (runs / "others.jsonl").write_text('{"id": "9", "text": "a row of mine"}\n')
    (runs / "note.txt").write_text("a line without an end")
    (runs / "one.json").write_text('{"id": "9", "text": "a row without an end"}')
    before = snapshot(runs)
    words = ("answer", "whole", "--input", "questions.jsonl", "--image-folder", "images", "--max-new-tokens", "2")
    for output in (
        "questions.jsonl",
        "questions2.jsonl",
        "images/0001.png",
        "whole/config.json",
        "rows.json",
        "images",
    ):
        assert run(*words, "--output", output) == 2, output
        assert snapshot(runs) == before, output
    for output in ("others.jsonl", "note.txt", "one.json", "notes.json"):
        assert run(*words, "--output", output) == 2, output
        assert snapshot(runs) == before, output
    assert run(*words, "--output", "answers.jsonl") == 0
    whole = (runs / "answers.jsonl").read_bytes()
    assert len(whole.splitlines()) == 3
    for cut in (1, 5, 12, len(whole) - 2):  # killed while writing: the half line goes, and is answered again
        (runs / "answers.jsonl").write_bytes(whole[:cut])
        assert run(*words, "--output", "answers.jsonl") == 0
        assert (runs / "answers.jsonl").read_bytes() == whole
    assert lost(before, snapshot(runs)) == []


def test_the_base_of_an_adapter_is_put_beside_files_never_over_them(runs: Path, tiny_parts: Path) -> None:
    """`model.name_or_path` names an adapter, whose merge goes into `base/`; `model.adapter` links to the base of another run."""
    second = ("model.language_model=null", "model.vision_tower=null", "model.name_or_path=adapter")
    third = (
        "model.adapter=adapter",
        f"model.language_model={tiny_parts / 'lm'}",
        f"model.vision_tower={tiny_parts / 'tower'}",
    )
    for more in (second, third):
        put(runs / "out", "base/mine.txt")
        before = snapshot(runs)
        assert run("train", *RECIPE, *more, "model.template=vicuna_v1", "training.output_dir=out") == 2
        assert snapshot(runs) == before
        shutil.rmtree(runs / "out")
        before = snapshot(runs)
        assert run("train", *RECIPE, *more, "training.save_strategy='no'", "training.output_dir=out") == 0
        assert lost(before, snapshot(runs)) == [] and (runs / "out" / "base" / "config.json").is_file()
        shutil.rmtree(runs / "out")


OF_THE_QUICKSTART = (
    "data/pretrain.json",
    "data/images/train_00001.png",
    "parts/vision_tower/config.json",
    "samples.png",
    "pretrain/model.safetensors",
    "metrics.json",
)


@pytest.mark.parametrize("name", OF_THE_QUICKSTART)
def test_the_quickstart_refuses_where_a_file_of_the_user_would_give_way(name: str, tmp_path: Path) -> None:
    from vir_hf.errors import RecipeError
    from vir_hf.quickstart.run import Size, run_quickstart
    from vir_hf.recipe.load import load_recipe

    put(tmp_path / "out", name)
    before = snapshot(tmp_path)
    recipe = load_recipe(["experiment=quickstart", f"training.output_dir={tmp_path / 'out'}"])
    with pytest.raises(RecipeError, match="which vir-hf did not write"):
        run_quickstart(recipe, Size(num_pictures=40, num_questions=72, tower_steps=1, pretrain_rows=32))
    assert snapshot(tmp_path) == before


def test_the_overrides_used_here_train(tiny_parts: Path) -> None:
    """The recipe above is tiny's own, so that what is refused is refused for the reason given."""
    keys = {word.partition("=")[0] for word in tiny.training_overrides(tiny_parts, tiny_parts / "out")}
    assert keys - {word.partition("=")[0] for word in RECIPE} == {"training.output_dir"}
