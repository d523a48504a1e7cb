"""What a card tells its reader to do, done: every command and every block of every kind of card, against a Hub on loopback."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import minihub
import pytest
from tiny_run import QUESTION, pictures, train_run

from vir_hf import cli
from vir_hf.publishing import hub

ROOT = Path(__file__).resolve().parents[2]
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
def runs(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the run of a kind, trained when it is first asked for."""
    folder = tmp_path_factory.mktemp("kinds")
    made: dict[str, Path] = {}

    def run_of(kind: str) -> Path:
        if kind not in made:
            changes = KINDS[kind]
            base = {"model.name_or_path": run_of("whole")} if "null" in changes.values() else {}
            made[kind] = train_run(tiny_parts, folder / kind, **changes, **base)
        return made[kind]

    return run_of


# Runs Python blocks and `vir-hf` commands one after another, as a reader's interpreter and terminal would, and gives what each
# printed. The first block, which is for readers without vir_hf, runs before it is imported.
DRIVER = """
import contextlib, io, json, sys
from pathlib import Path
printed = []
for step in json.loads(Path("steps.json").read_text()):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if "code" in step:
            if not printed:
                assert "vir_hf" not in sys.modules
            exec(compile(step["code"], "card", "exec"), {"__name__": "__main__"})
        else:
            from vir_hf import cli
            sys.stdin = io.StringIO(step["typed"])
            code = cli.main(step["words"])
            assert code == 0, (step["words"], code)
    printed.append(out.getvalue())
Path("printed.json").write_text(json.dumps(printed))
"""


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
    done = subprocess.run(words, cwd=folder, env=environment, input=text, capture_output=True, text=True, timeout=600)
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
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "adapter" else pytest.mark.long) for kind in KINDS]
)
def test_everything_a_card_says_to_do_works(
    kind: str, runs: Callable[[str], Path], tiny_parts: Path, server: minihub.Hub, tmp_path: Path
) -> None:
    shutil.copyfile(pictures(tiny_parts)[5], tmp_path / "photo.jpg")  # Pillow goes by the content
    source = runs(kind)
    if kind == "adapter-of-a-whole-model":  # its base lies on the Hub, as the recipe of such a run says
        run([sys.executable, "-m", "vir_hf.cli", "push", str(runs("whole")), "user/base"], server, tmp_path)
        source = Path(shutil.copytree(source, tmp_path / "run"))
        for name in ("recipe.yaml", "adapter_config.json", "base_fingerprint.json"):
            path = source / name
            path.write_text(path.read_text().replace(str(runs("whole")), "user/base"))
    run([sys.executable, "-m", "vir_hf.cli", "push", str(source), "user/tiny"], server, tmp_path)
    card = server.read(server.repositories["model", "user/tiny"], "README.md").decode()

    python, shell = blocks(card, "python"), commands(card)
    assert len(python) == 2 and "vir_hf" not in python[0]  # stock libraries' and ours
    # A demo would wait for visitors, and vLLM is not installed here: what they are given is looked at below.
    steps = [{"code": block} for block in python]
    steps += [
        {"words": words[1:], "typed": f"{QUESTION}\n"} for words in shell if words[0] == "vir-hf" and words[1] != "demo"
    ]
    (tmp_path / "steps.json").write_text(json.dumps(steps))
    run([sys.executable, "-c", DRIVER], server, tmp_path)
    printed = json.loads((tmp_path / "printed.json").read_text())
    assert all(printed)
    if kind != "qlora":  # the card's own code loads the base in 16 bit, ours as it was trained
        assert printed[0] == printed[1]
    served = [words[2] for words in shell if words[:2] == ["vllm", "serve"]]
    is_stock, is_whole = "own-projector" not in kind, kind in ("whole", "own-projector")
    assert served == ([] if not is_stock else ["user/tiny"] if is_whole else ["merged"])
    if served == ["merged"]:
        assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "llava"
    assert ["vir-hf", "demo", "user/tiny"] in shell and "demo" in cli.COMMANDS
    assert {words[0] for words in shell} <= {"vir-hf", "vllm"} and ["vir-hf", "chat"] in [words[:2] for words in shell]


def test_the_commands_of_a_card_are_found() -> None:
    card = "```bash\nvir-hf merge a --out b  # first\n\nvllm serve b\n```\nIn a terminal: `vir-hf chat a`; not `model`."
    assert commands(card) == [["vir-hf", "merge", "a", "--out", "b"], ["vllm", "serve", "b"], ["vir-hf", "chat", "a"]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_merge_that_a_card_prints_is_a_call_the_command_takes(kind: str) -> None:
    """The quick half of the test above, also where slow tests are left out."""
    from vir_hf.publishing.card import RunFacts, make_card

    facts = RunFacts(recipe={"model": {"name_or_path": "a/b"}}, is_adapter="adapter" in kind or kind == "qlora")
    facts.model_type = "vir_llava" if "own-projector" in kind else "llava"
    for words in commands(str(make_card(facts, "me/mine"))):
        if words[:2] == ["vir-hf", "merge"]:
            assert words[2:] == ["me/mine", "--out", "merged"]
    assert hub.check_repo_id("me/mine") is None
