"""The blocks of tutorials and how-to guides: recipes compose, Python runs, and (long) tutorials are followed as written."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    path for name in ("tutorials", "how-to", "explanation") for path in sorted((ROOT / "docs" / name).glob("*.md"))
]
# What a reader's machine has and this one does not: published models and a GPU's patience. Everything else is as written.
PARTS = ["model.name_or_path=null", "model.language_model=lm", "model.vision_tower=tower"]
SIZES = [
    "training.max_steps=2", "training.global_batch_size=4", "training.per_device_train_batch_size=2", "training.max_length=256",
    "training.dataloader_num_workers=0",
]  # fmt: skip
SHOP = "photo,question,answer\n" + "".join(
    f"{number:04d}.jpg,What is it?,A thing of kind {number % 3}.\n{number:04d}.jpg,Is it whole?,Yes.\n"
    for number in range(20)
)


def blocks(path: Path, *languages: str) -> list[tuple[str, str]]:
    """The code blocks of a page in these languages, in order, as (language, code)."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [(language, code) for language, code in found if language in languages]


def commands(path: Path) -> list[list[str]]:
    """The commands of a page's shell blocks, in words, without comments."""
    joined = [re.sub(r"\\\n\s*", " ", code) for _, code in blocks(path, "bash")]
    return [words for code in joined for line in code.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_recipes_on_a_page_compose(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vir_hf.recipe.load import RecipeArgumentParser, load_recipe

    monkeypatch.chdir(tmp_path)
    for _, code in blocks(path, "yaml"):
        (tmp_path / re.search(r"# (\S+\.yaml)", code)[1]).write_text(code, encoding="utf-8")  # type: ignore[index]
    for words in commands(path):
        if words[:2] not in (["vir-hf", "train"], ["vir-hf", "plan"], ["vir-hf", "launch"], ["vir-hf", "doctor"]):
            continue
        if words == ["vir-hf", "doctor"]:
            continue
        parser = RecipeArgumentParser(can_resume=True)
        for option in ("--gpu", "--nodes", "--gpus-per-node"):
            parser.add_argument(option)
        options = parser.parse_args(words[2:])
        if options.recipe is None or (tmp_path / options.recipe).is_file():
            load_recipe(options.overrides, recipe_file=options.recipe, require_data=False)


def test_the_pages_show_the_notebook_and_figures_that_are_there() -> None:
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"`(notebooks/\S+\.ipynb)`", text):
            assert (ROOT / name).is_file(), name
        for name in re.findall(r"^:file: (\S+)$", text, re.MULTILINE):
            assert (path.parent / name).is_file(), name


def test_the_figures_are_what_their_script_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import figures

    for name in ("labels", "packing"):
        drawn = getattr(figures, name)()
        assert (ROOT / "docs" / "_static" / f"{name}.svg").read_text(encoding="utf-8") == drawn


def test_the_spreadsheet_becomes_rows_with_whole_photos_kept_aside(tmp_path: Path) -> None:
    from vir_hf import to_messages

    (tmp_path / "products.csv").write_text(SHOP, encoding="utf-8-sig")
    ((_, code),) = blocks(ROOT / "docs" / "tutorials" / "photos-to-hub.md", "python")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    train, heldout = (
        json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) for name in ("train", "heldout")
    )
    assert len(train) == 18 and len(heldout) == 2
    assert {row["image"] for row in train} & {row["image"] for row in heldout} == set()
    for row in [*train, *heldout]:
        assert len(to_messages(row)["messages"]) == 4


def test_the_projector_of_the_guide_has_the_right_shape() -> None:
    import torch
    from transformers import LlavaConfig

    from vir_hf.llava.projectors import PROJECTORS

    ((_, code),) = blocks(ROOT / "docs" / "how-to" / "add-a-projector.md", "python")
    try:
        exec(compile(code, "add-a-projector.md", "exec"), {"__name__": "page"})
        config = LlavaConfig()
        config.vision_config.hidden_size, config.text_config.hidden_size = 8, 12
        assert PROJECTORS["gated"](config)(torch.zeros(2, 5, 8)).shape == (2, 5, 12)
    finally:
        PROJECTORS.pop("gated", None)


@pytest.fixture
def folder(tiny_parts: Path, tmp_path: Path) -> Path:
    """Where a reader would stand: a shop's photos, rows, captions, tiny parts."""
    from PIL import Image

    for name in ("lm", "tower", "images"):
        shutil.copytree(tiny_parts / name, tmp_path / name)
    for name in ("rows.json", "heldout.json", "captions.json"):
        shutil.copy(tiny_parts / "rows.json", tmp_path / name)
    (tmp_path / "photos").mkdir()
    source = Image.open(min((tmp_path / "images").iterdir())).convert("RGB")
    source.save(tmp_path / "photo.jpg")
    for number in range(20):
        source.rotate(9 * number).save(tmp_path / "photos" / f"{number:04d}.jpg")
    (tmp_path / "products.csv").write_text(SHOP, encoding="utf-8")
    for name, file in (("pretrain", "blip_laion_cc_sbu_558k.json"), ("instruct", "llava_v1_5_mix665k.json")):
        (tmp_path / name).mkdir()
        shutil.copy(tiny_parts / "rows.json", tmp_path / name / file)
        shutil.copytree(tiny_parts / "images", tmp_path / name / "images")
    shutil.make_archive(str(tmp_path / "pretrain" / "images"), "zip", tmp_path / "pretrain" / "images")
    return tmp_path


def as_here(words: list[str]) -> list[str] | None:
    """A command with tiny stand-ins where a published model stands; `None` for what needs a network or an account."""
    if words[0] in ("pip", "hf") or (words[1:2] == ["push"] and "--dry-run" not in words) or words[1:2] == ["doctor"]:
        return None
    if words[0] == "python":
        return [sys.executable, *words[1:]]
    words = [word for word in words if not word.startswith(("model.language_model=", "model.vision_tower="))]
    if any(word.startswith("experiment=") for word in words):
        words += [*PARTS, *SIZES] if words[1] in ("train", "launch") else PARTS
    if words[1] in ("chat", "answer", "evaluate"):
        words += ["--max-new-tokens", "4"]
    return [sys.executable, "-m", "vir_hf.cli", *words[1:]]


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", ["photos-to-hub", "llava15", "join-your-own"])
def test_a_tutorial_is_followed_as_written(page: str, folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    num_run = 0
    for language, code in blocks(ROOT / "docs" / "tutorials" / f"{page}.md", "bash", "python"):
        if language == "python":
            (folder / "make_rows.py").write_text(code, encoding="utf-8")
            subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True, timeout=300)
            continue
        for line in re.sub(r"\\\n\s*", " ", code).splitlines():
            words = as_here(shlex.split(line, comments=True))
            if words is None:
                continue
            done = subprocess.run(
                words, cwd=folder, env=environment, input="What is it?\n", capture_output=True, text=True, timeout=600
            )
            can_end_with_1 = (
                "check" in words or "plan" in words
            )  # problems found, or does not fit a GPU that is not here
            assert done.returncode in ((0, 1) if can_end_with_1 else (0,)), (
                f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
            )
            assert "Traceback" not in done.stderr
            num_run += 1
    assert num_run >= 5
