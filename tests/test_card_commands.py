"""What a card tells its reader to do, done: every command and every block of every kind of card, against a Hub on loopback."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import minihub
import pytest
from tiny_run import QUESTION, pictures, train_run

from vir_hf import cli, hub

ROOT = Path(__file__).resolve().parents[1]
ADAPTER = {"lora": "default", "trainable.language_model": "lora", "training.max_steps": 4}
KINDS: dict[str, dict[str, object]] = {
    "whole": {"training.max_steps": 40},
    "adapter": ADAPTER,
    "qlora": {**ADAPTER, "quantization": "nf4", "quantization.only_on_cuda": "false"},
    "own-projector": {"training.max_steps": 4, "model.projector_type": "linear"},
    "adapter-own-projector": {**ADAPTER, "model.projector_type": "linear"},
    "adapter-of-a-whole-model": {**ADAPTER, "model.language_model": "null", "model.vision_tower": "null"},
}


@pytest.fixture(scope="module")
def runs(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kinds")
    made: dict[str, Path] = {}
    for kind, changes in KINDS.items():
        base = {"model.name_or_path": made["whole"]} if "null" in changes.values() else {}
        made[kind] = train_run(tiny_parts, folder / kind, **changes, **base)
    return made


@pytest.fixture
def server(tmp_path: Path) -> Iterator[minihub.Hub]:
    running, http = minihub.start(tmp_path / "hub")
    yield running
    http.shutdown()


def run(words: list[str], server: minihub.Hub, folder: Path, text: str = "") -> str:
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": server.token,
        "HF_HOME": str(folder / "hf-home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(words, cwd=folder, env=environment, input=text, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{shlex.join(words)[:300]}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr
    return done.stdout


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


def commands(card: str) -> list[list[str]]:
    """Every command of a card: the lines of its shell blocks, and those within its text."""
    lines = [line for block in blocks(card, "bash") for line in block.splitlines()]
    lines += re.findall(r"`((?:vir-hf|vllm|pip) [^`]+)`", card)
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_everything_a_card_says_to_do_works(
    kind: str, runs: dict[str, Path], tiny_parts: Path, server: minihub.Hub, tmp_path: Path
) -> None:
    shutil.copyfile(pictures(tiny_parts)[5], tmp_path / "photo.jpg")  # Pillow goes by the content
    if kind == "adapter-of-a-whole-model":  # its base lies on the Hub, as the recipe of such a run says
        run([sys.executable, "-m", "vir_hf.cli", "push", str(runs["whole"]), "user/base"], server, tmp_path)
        shutil.copytree(runs[kind], tmp_path / "run")
        for name in ("recipe.yaml", "adapter_config.json", "base_fingerprint.json"):
            path = tmp_path / "run" / name
            path.write_text(path.read_text().replace(str(runs["whole"]), "user/base"))
    source = tmp_path / "run" if (tmp_path / "run").exists() else runs[kind]
    run([sys.executable, "-m", "vir_hf.cli", "push", str(source), "user/tiny"], server, tmp_path)
    card = server.read(server.repositories["model", "user/tiny"], "README.md").decode()

    python = blocks(card, "python")
    assert len(python) == 2  # stock libraries' and ours
    answers = [run([sys.executable, "-c", block], server, tmp_path).strip().splitlines()[-1:] for block in python]
    if kind != "qlora":  # the card's own code loads the base in 16 bit
        assert answers[0] == answers[1]
    done = []
    for words in commands(card):
        if words[:2] == ["vllm", "serve"]:
            # Not installed here: what it is given is a folder that a command before it made, or this repository.
            served = Path(tmp_path / words[2])
            assert words[2] == "user/tiny" or (served / "config.json").is_file()
            if served.is_dir():
                assert json.loads((served / "config.json").read_text())["model_type"] == "llava"
        elif words[:2] == ["vir-hf", "demo"]:
            # It would wait for visitors: its words are read, and the model they name is loaded by the others.
            assert words == ["vir-hf", "demo", "user/tiny"] and "demo" in cli.COMMANDS
        else:
            assert words[0] == "vir-hf", words
            run([sys.executable, "-m", "vir_hf.cli", *words[1:]], server, tmp_path, text=f"{QUESTION}\n")
        done.append(words[:2])
    assert ["vir-hf", "chat"] in done and ["vir-hf", "demo"] in done
    is_stock = "own-projector" not in kind
    assert (["vllm", "serve"] in done) == is_stock
    assert (["vir-hf", "merge"] in done) == (is_stock and kind != "whole")


def test_the_commands_of_a_card_are_found() -> None:
    card = "```bash\nvir-hf merge a --out b  # first\n\nvllm serve b\n```\nIn a terminal: `vir-hf chat a`; not `model`."
    assert commands(card) == [["vir-hf", "merge", "a", "--out", "b"], ["vllm", "serve", "b"], ["vir-hf", "chat", "a"]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_merge_that_a_card_prints_is_a_call_the_command_takes(kind: str) -> None:
    """The quick half of the test above, also where slow tests are left out."""
    from vir_hf.card import RunFacts, make_card

    facts = RunFacts(recipe={"model": {"name_or_path": "a/b"}}, is_adapter="adapter" in kind or kind == "qlora")
    facts.model_type = "vir_llava" if "own-projector" in kind else "llava"
    for words in commands(str(make_card(facts, "me/mine"))):
        if words[:2] == ["vir-hf", "merge"]:
            assert words[2:] == ["me/mine", "--out", "merged"]
    assert hub.check_repo_id("me/mine") is None
