"""The README, run: its commands with its own words on tiny parts, and its Python block as it stands."""

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
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, section: str = "") -> list[str]:
    """The code blocks of a language, in all of the README or in one section of it."""
    text = README.partition(f"\n## {section}\n")[2].partition("\n## ")[0] if section else README
    assert text, f"the README has no section {section}"
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(section: str) -> list[list[str]]:
    """The `vir-hf` lines of a section's shell blocks, in words, without comments."""
    lines = [line for block in blocks("bash", section) for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("vir-hf ")]


@pytest.fixture(scope="module")
def folder(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader would stand: lm/, tower/, rows.json, images/ and photo.jpg."""
    here = tmp_path_factory.mktemp("readme")
    for name in ("lm", "tower", "images"):
        shutil.copytree(tiny_parts / name, here / name)
    shutil.copy(tiny_parts / "rows.json", here)
    shutil.copy(tiny_parts / "rows.json", here / "heldout.json")
    from PIL import Image

    Image.open(min((here / "images").iterdir())).convert("RGB").save(here / "photo.jpg")
    return here


def run(words: list[str], folder: Path, text: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=folder, env=environment, input=text, capture_output=True, text=True, timeout=240)


def vir_hf(words: list[str], folder: Path, text: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    assert words[0] == "vir-hf"
    done = run([sys.executable, "-m", "vir_hf.cli", *words[1:]], folder, text)
    assert done.returncode == code, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done


# What a reader's machine has and this one does not: the published model and a GPU's patience. Everything else is as written.
TINY_MODEL = ["model.name_or_path=null", "model.language_model=lm", "model.vision_tower=tower"]
TINY_SIZES = ["training.max_steps=2", "training.global_batch_size=4", "training.per_device_train_batch_size=2"]


def test_it_opens_with_the_two_commands() -> None:
    first = blocks("")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make quickstart", "make test"]
    assert README.index("make quickstart") < README.index("\n## ")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("target", "runs"), [("quickstart", "vir-hf train experiment=quickstart"), ("test", "-m pytest")]
)
def test_the_two_commands_are_in_the_makefile(target: str, runs: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "--dry-run", target, f"VENV={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert runs in done.stdout


def test_the_section_shows_every_step_of_a_run() -> None:
    words = [line[1] for line in commands("A real run")]
    assert words == ["doctor", "data", "plan", "train", "chat", "evaluate", "push"]


def test_data_check_as_written(folder: Path) -> None:
    (line,) = [line for line in commands("A real run") if line[1] == "data"]
    found = vir_hf(line, folder, code=1).stdout  # the tiny rows repeat, which the check says
    assert "12 rows, 6 distinct images" in found and "duplicate_row" in found and "training refuses 0" in found


def test_plan_as_written(folder: Path) -> None:
    (line,) = [line for line in commands("A real run") if line[1] == "plan"]
    assert "GiB" in vir_hf(line, folder).stdout
    assert "GiB" in vir_hf([*line, *TINY_MODEL, "data.data_path=rows.json"], folder).stdout


@pytest.mark.slow
def test_train_chat_evaluate_and_push_as_written(folder: Path) -> None:
    lines = {line[1]: line for line in commands("A real run")}
    done = vir_hf([*lines["train"], *TINY_MODEL, *TINY_SIZES, "training.max_length=256"], folder)
    output = folder / lines["chat"][2]
    assert (output / "metrics.json").is_file(), done.stdout
    assert json.loads((output / "metrics.json").read_text(encoding="utf-8"))["num_steps"] == 2
    assert f"vir-hf chat {lines['chat'][2]}" in done.stdout
    chat = vir_hf([*lines["chat"], "--max-new-tokens", "4"], folder, text="What is it?\n")
    assert "Traceback" not in chat.stderr
    scores = vir_hf([*lines["evaluate"], "--max-new-tokens", "4"], folder).stdout
    assert "exact match, before tuning" in scores and (output / "evaluation.json").is_file()
    push = vir_hf(lines["push"], folder)
    assert "README.md" in push.stdout and "nothing was sent" in push.stdout


def test_launch_on_several_gpus_names_what_is_there() -> None:
    (line,) = [
        shlex.split(line)
        for block in blocks("bash", "A real run")
        for line in block.splitlines()
        if line.startswith("accelerate launch")
    ]
    assert (ROOT / line[line.index("--config_file") + 1]).is_file()
    from vir_hf.recipe.load import load_recipe

    recipe = load_recipe(line[line.index("vir_hf.train") + 1 :])
    assert recipe.experiment.name == "cloud_gpu_scale"


def test_overrides_in_the_text_are_recipe_keys() -> None:
    from vir_hf.recipe.load import load_recipe

    found = re.search(r"\(`(training\.learning_rate=\S+ lora\.r=\S+)`\)", README)
    assert found
    recipe = load_recipe(["experiment=t4_qlora", "data.data_path=rows.json", *found[1].split()])
    assert recipe.lora.arguments["r"] == 64


def test_the_rows_shown_are_rows() -> None:
    from vir_hf import to_messages

    (text,) = blocks("json")
    (row,) = json.loads(text)
    messages = to_messages(row)
    assert messages["images"] == ["photo.jpg"] and [turn["role"] for turn in messages["messages"]] == [
        "user",
        "assistant",
    ]


def test_the_recipe_shown_is_one(tmp_path: Path) -> None:
    from vir_hf.recipe.load import load_recipe

    (text,) = blocks("yaml")
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    recipe = load_recipe([], recipe_file=tmp_path / "mine.yaml")
    assert recipe.quantization.bits == 4 and recipe.trainable.language_model == "lora"


@pytest.mark.slow
def test_the_python_block_trains_a_model_that_stock_transformers_opens(folder: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "train-in-python.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[0]
    done = run([sys.executable, "-c", code], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    check = "from transformers import AutoModelForImageTextToText as M; print(type(M.from_pretrained('out/model')).__name__)"
    assert run([sys.executable, "-c", check], folder).stdout.split()[-1] == "LlavaForConditionalGeneration"


def test_every_command_named_is_a_command() -> None:
    from vir_hf.cli import COMMANDS

    for word in re.findall(r"`?vir-hf ([a-z]+)", README):
        assert word in COMMANDS, word


def test_every_linked_file_exists() -> None:
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in target]
    assert targets and [target for target in targets if not (ROOT / target).exists()] == []
    benchmarks = re.findall(r"python (benchmarks/\w+\.py)", README)
    assert benchmarks and [name for name in benchmarks if not (ROOT / name).is_file()] == []
