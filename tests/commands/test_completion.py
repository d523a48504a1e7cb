"""Completion: what is offered, what it loads, and the words that real shells make of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import HEAVY, modules_loaded

from vir_hf import cli
from vir_hf.commands import completion
from vir_hf.commands.completion import FILES, complete
from vir_hf.recipe.keys import REFUSED
from vir_hf.recipe.load import schema

ROOT = Path(__file__).resolve().parents[2]


def offered(*words: str) -> list[str]:
    """What the last word may become, without help."""
    return [line.partition("\t")[0] for line in complete(["vir-hf", *words])]


def test_commands_are_offered_with_their_help() -> None:
    installed = {word for word, command in cli.COMMANDS.items()}
    assert set(offered("")) == installed | {"--help", "--version"}
    assert offered("rec") == ["recipes"]
    assert list(complete(["vir-hf", "rec"])) == [f"recipes\t{cli.COMMANDS['recipes'].help}"]
    assert set(offered("data", "c")) == {"check", "cache-features"}


@pytest.mark.parametrize(
    "words",
    [
        *([word] for word in cli.COMMANDS if word != "data"),
        *(["data", word] for word in ("check", "inspect", "prepare", "cache-features", "download-models")),
    ],
    ids=" ".join,
)
def test_every_command_has_its_own_options_offered(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words, "--help"]) == 0
    help_text = capsys.readouterr().out
    found = offered(*words, "--")
    assert "--help" in found and all(option in help_text for option in found)
    listed = {line.split()[0].rstrip(",") for line in help_text.splitlines() if line.startswith("  --")}
    assert listed <= set(found)
    assert capsys.readouterr().out == ""  # asking for completion carries nothing out


def test_experiments_groups_and_recipes_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {path.stem for path in (ROOT / "recipes" / "experiment").glob("*.yaml")}
    monkeypatch.chdir(tmp_path)
    assert set(offered("train", "experiment=")) == {f"experiment={name}" for name in names}
    assert offered("plan", "quantization=n") == ["quantization=nf4", "quantization=none"]
    assert {"experiment=", "training=", "training.", "trainable.", "recipe="} <= set(offered("train", ""))
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "my_photos.yaml").touch()
    assert offered("train", "experiment=my") == [FILES]  # a file may be named, too
    assert offered("train", "--recipes-dir", "mine", "experiment=my") == ["experiment=my_photos"]
    assert offered("train", "--recipes-dir=mine", "experiment=my") == ["experiment=my_photos"]


def test_recipe_keys_are_those_that_a_recipe_takes() -> None:
    assert offered("train", "training.learn") == ["training.learning_rate="]
    assert "++training.learning_rate=" in offered("train", "++training.l")
    for section, known in schema().items():
        keys = set(offered("train", f"{section}."))
        refused = {f"{section}.{name}=" for name in known if f"{section}.{name}" in REFUSED}
        assert keys and not keys & refused
        assert keys | refused >= {f"{section}.{name}=" for name, argument in known.items() if argument.is_writable}


def test_values_are_the_choices_a_key_has() -> None:
    assert offered("train", "model.projector_type=lin") == ["model.projector_type=linear"]
    assert "model.template=vicuna_v1" in offered("train", "model.template=")
    assert offered("train", "training.padding_free=") == ["training.padding_free=true", "training.padding_free=false"]
    assert offered("train", "training.learning_rate=") == []
    assert offered("train", "data.data_path=ro") == [FILES]
    assert offered("train", "nothing.of=") == [] and offered("train", "training.nothing=") == []


def test_values_of_options() -> None:
    assert offered("merge", "run", "--dtype", "fl") == ["float16", "float32"]
    assert offered("merge", "run", "--dtype=fl") == ["--dtype=float16", "--dtype=float32"]
    assert offered("merge", "--out", "") == offered("merge", "") == offered("merge", "--out=o") == [FILES]
    assert offered("launch", "--config", "zero3") == ["zero3"]
    assert offered("launch", "--config", "./mine") == [FILES]
    assert offered("data", "check", "rows.json", "--template", "chat") == ["chatml"]
    assert offered("demo", "run", "--port", "") == []
    assert offered("completion", "") == ["bash", "zsh", "fish"]


def test_data_check_takes_files_and_overrides() -> None:
    assert offered("data", "check", "") == offered("data", "check", "rows") == [FILES]
    assert offered("data", "check", "experiment=local_lite_") == ["experiment=local_lite_pretrain"]


@pytest.mark.parametrize("words", [["nothing", ""], ["data", "nothing", "--"], ["train", "--recipes-dir=x", "model="]])
def test_a_wrong_call_is_offered_nothing_and_no_message(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "--words", "vir-hf", *words]) == 0
    assert capsys.readouterr() == ("", "")


def test_argparse_is_left_as_it_was() -> None:
    import argparse

    before = argparse.ArgumentParser.parse_args
    offered("train", "--")
    assert argparse.ArgumentParser.parse_args is before


@pytest.mark.parametrize(
    "words", [["tr"], ["train", "experiment="], ["train", "training.learn"], ["answer", "--"], ["data", "check", "--"]]
)
def test_completing_loads_nothing_heavy(words: list[str]) -> None:
    loaded = modules_loaded("completion", "--words", "vir-hf", *words)
    assert "vir_hf" in loaded and not loaded & (HEAVY | {"hydra", "omegaconf", "yaml"})


# What is typed before TAB, and the line after it.
TYPED = {
    "vir-hf rec": "vir-hf recipes ",
    "vir-hf data ins": "vir-hf data inspect ",
    "vir-hf train --recipes-": "vir-hf train --recipes-dir ",
    "vir-hf train experiment=local_lite_": "vir-hf train experiment=local_lite_pretrain ",
    "vir-hf train experiment=quickstart training.learn": "vir-hf train experiment=quickstart training.learning_rate=",
    "vir-hf train data.data_path=my_ro": "vir-hf train data.data_path=my_rows.json ",
    "vir-hf train data.data_path=my_rows.json model.projector_type=lin": (
        "vir-hf train data.data_path=my_rows.json model.projector_type=linear "
    ),
    "vir-hf merge run --dtype bfl": "vir-hf merge run --dtype bfloat16 ",
    "vir-hf merge run --dtype=bfl": "vir-hf merge run --dtype=bfloat16 ",
    "vir-hf data check my_f": "vir-hf data check my_folder/",
    "vir-hf data check my_folder/with": "vir-hf data check my_folder/with\\ space.json ",
    "vir-hf chat --device c my_f": "vir-hf chat --device c my_folder/",
}
# Several words are possible and have no letter in common: the line stays as it is.
UNCHANGED = ["vir-hf train quantization=", "vir-hf train experiment=quickstart model.projector_type=", "vir-hf d"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to complete in, with the command on its own PATH."""
    folder = tmp_path_factory.mktemp("complete")
    (folder / "my_folder").mkdir()
    (folder / "my_folder" / "with space.json").touch()
    (folder / "my_rows.json").touch()
    (folder / "bin").mkdir()
    command = folder / "bin" / "vir-hf"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vir_hf.cli "$@"\n')
    command.chmod(0o755)
    return folder


def lines_after_tab(shell: str, place: Path, typed: list[str]) -> list[str]:
    """Type each line and TAB into a real interactive shell on a terminal; return what the lines become."""
    import pty
    import select
    import time

    variables = {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "TERM": "dumb"}
    environment = {**os.environ, **variables, "PS1": "> ", "HOME": str(place), "INPUTRC": "/dev/null"}
    flags = {"bash": ["--norc", "--noprofile", "-i"], "zsh": ["-f", "-i"]}[shell]
    main, child = pty.openpty()
    process = subprocess.Popen(
        [shell, *flags], stdin=child, stdout=child, stderr=child, cwd=place, env=environment, start_new_session=True
    )
    os.close(child)
    kept = place / f"{shell}.lines"

    def wait_for(count: int) -> None:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            if select.select([main], [], [], 0.05)[0]:
                os.read(main, 65536)
            if kept.exists() and kept.read_text().count("\n") >= count:
                return
        raise AssertionError(f"{shell} wrote {kept.read_text() if kept.exists() else 'nothing'!r}")

    # A key of its own writes the line as it stands to a file, and empties it.
    if shell == "bash":
        setup = (
            "source <(vir-hf completion bash); bind 'set enable-bracketed-paste off'; "
            f"keep() {{ printf '%s\\n' \"$READLINE_LINE\" >> '{kept}'; READLINE_LINE=; }}; bind -x '\"\\C-x\": keep'; "
        )
    else:
        setup = (
            "unsetopt zle_bracketed_paste beep; autoload -Uz compinit; compinit -u -D; source <(vir-hf completion zsh); "
            f"keep() {{ print -r -- \"$BUFFER\" >> '{kept}'; BUFFER= }}; zle -N keep; bindkey '^X' keep; "
        )
    try:
        os.write(main, f"{setup}echo ready >> '{kept}'\n".encode())
        wait_for(1)
        for number, line in enumerate(typed):
            os.write(main, f"{line}\t\x18".encode())
            wait_for(number + 2)
    finally:
        process.kill()
        process.wait()
        os.close(main)
    return kept.read_text().splitlines()[1:]


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_real_shell_completes(shell: str, place: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    found = lines_after_tab(shell, place, [*TYPED, *UNCHANGED])
    expected = [*TYPED.values(), *UNCHANGED]
    assert [line.rstrip() for line in found] == [line.rstrip() for line in expected]
    # zsh keeps a space that it would take back again; whether a value can follow at once is what counts.
    assert [line.endswith(("=", "/")) for line in found] == [line.endswith(("=", "/")) for line in expected]


@pytest.mark.slow
def test_fish_completes(place: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    environment = {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= {"HOME": str(place), "XDG_CONFIG_HOME": str(place / "config")}
    for typed, line in TYPED.items():
        script = f"vir-hf completion fish | source; complete -C '{typed}'"
        done = subprocess.run(
            ["fish", "--no-config", "-c", script],
            capture_output=True, text=True, cwd=place, env=environment, timeout=60,
        )  # fmt: skip
        words = [answer.partition("\t")[0] for answer in done.stdout.splitlines()]
        expected = line.replace("\\ ", "\0").split()[-1].replace("\0", " ")
        assert expected in words, (typed, done.stdout, done.stderr)


def test_the_scripts_are_valid_in_their_shells() -> None:
    for shell, script in completion.SCRIPTS.items():
        if shutil.which(shell):
            subprocess.run([shell, "-n"], input=script, text=True, check=True, capture_output=True)
