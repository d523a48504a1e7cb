"""The command: what it lists is there, help and typos load nothing heavy, errors are one line and exit code 2."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from vir_hf import __version__, cli
from vir_hf.cli import COMMANDS
from vir_hf.errors import DataError, RecipeError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy", "PIL", "gradio"}


def run(*words: str, module: str = "vir_hf.cli") -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, in the clone."""
    return subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, cwd=ROOT, timeout=120)


def modules_loaded(*words: str, module: str = "vir_hf.cli") -> set[str]:
    """Return the names of all top-level packages a command imports before it ends."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", module, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("vir_hf.cli", ["--help"]),
        ("vir_hf.cli", ["trian"]),
        ("vir_hf.cli", ["recipes"]),
        ("vir_hf.cli", ["train", "--help"]),
        ("vir_hf.cli", ["train", "experiment=local_lite", "training.lerning_rate=1"]),
        ("vir_hf.cli", ["train", "experiment=local_lit"]),
        ("vir_hf.cli", ["train", "experiment=local_lite", "training.learning_rate=abc"]),
        ("vir_hf.train", ["experiment=local_lite", "training.lerning_rate=1"]),
        ("vir_hf.train", ["--help"]),
    ],
)
def test_help_and_typos_load_nothing_heavy(module: str, words: list[str]) -> None:
    loaded = modules_loaded(*words, module=module)
    assert "vir_hf" in loaded and not loaded & HEAVY


@pytest.mark.parametrize("module", ["vir_hf.cli", "vir_hf.train"])
def test_a_typo_in_a_recipe_is_one_line_and_exit_code_2(module: str) -> None:
    words = ["experiment=local_lite", "training.lerning_rate=1"]
    done = run(*(["train", *words] if module == "vir_hf.cli" else words), module=module)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: training.lerning_rate: unknown key. Did you mean training.learning_rate? Every key is listed in docs/recipes.md."
    ]


def test_a_flag_that_is_a_recipe_key_is_answered_with_how_to_write_it() -> None:
    done = run("train", "experiment=local_lite", "--learning_rate", "1e-4")
    assert done.returncode == 2 and "training.learning_rate=VALUE" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("trian", "`vir-hf train`"),
        ("recipe", "`vir-hf recipes`"),
        ("experiment=x", "vir-hf train experiment=x"),
        ("zzz", "one of"),
    ],
)
def test_an_unknown_command_is_answered_with_the_nearest(
    word: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([word]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: unknown command") and hint in printed.err and printed.out == ""


def test_help_lists_exactly_the_commands_that_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0] for line in lines if line.startswith("  ") and not line.startswith("  --")}
    present = {
        word
        for word, command in COMMANDS.items()
        if (ROOT / Path(*command.module.split("."))).with_suffix(".py").is_file()
        or (ROOT / Path(*command.module.split(".")) / "__init__.py").is_file()
    }
    assert listed == present and {"train", "recipes"} <= present


def test_every_command_module_can_be_reached() -> None:
    folder = ROOT / "vir_hf" / "commands"
    in_table = {command.module.rsplit(".", 1)[1] for command in COMMANDS.values()}
    for path in folder.glob("[a-z]*.py"):
        others = [other.read_text() for other in folder.glob("[a-z]*.py") if other != path]
        assert path.stem in in_table or any(path.stem in text for text in others), f"{path.name} is behind no word"


@pytest.mark.parametrize("word", COMMANDS)
def test_every_command_answers_help(word: str) -> None:
    done = run(word, "--help")
    assert done.returncode == 0 and f"vir-hf {word}" in done.stdout and done.stderr == ""


def test_no_command_at_all_is_a_wrong_call_with_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: vir-hf" in capsys.readouterr().out


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    first, _, *libraries = capsys.readouterr().out.splitlines()
    assert first == f"vir-hf {__version__}"
    assert [line.split()[0] for line in libraries] == list(cli.VERSIONED)
    assert f"transformers {metadata.version('transformers')}" in libraries


@pytest.mark.parametrize(
    "error", [RecipeError("model.x: wrong. Do this."), DataError("rows.json: row 3: wrong. Do that.")]
)
def test_what_the_user_can_mend_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(lambda: _raiser(error), []) == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: _raiser(ZeroDivisionError()), [])


def test_an_error_while_a_command_is_loaded_is_answered_too(capsys: pytest.CaptureFixture[str]) -> None:
    def load() -> None:
        raise RecipeError("no such extra")

    assert cli.run(load, []) == 2  # type: ignore[arg-type]
    assert capsys.readouterr().err == "error: no such extra\n"


@pytest.mark.parametrize(("code", "expected"), [(None, 0), (0, 0), (2, 2), ("message", 2)])
def test_the_exit_code_of_argparse_is_kept(code: object, expected: int) -> None:
    assert cli.run(lambda: _raiser(SystemExit(code)), []) == expected


def test_the_exit_codes_that_are_documented_are_those_of_the_code() -> None:
    from vir_hf.training import signals

    assert signals.STOPPED == cli.STOPPED and signals.LEFT_AT_ONCE == cli.INTERRUPTED
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    shown = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert shown == set(cli.EXIT_CODES)


def test_every_command_takes_the_options_of_all_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", "--help"]) == 0
    assert "--log-level LEVEL" in capsys.readouterr().out
    assert cli.main(["recipes", "--log-level=debug", "--quiet"]) == 0
    assert "quickstart" in capsys.readouterr().out
    assert cli.main(["recipes", "--log-level", "loud"]) == 2
    assert capsys.readouterr().err == "error: --log-level loud: expected one of debug, info, warning, error.\n"


def _raiser(error: BaseException):  # type: ignore[no-untyped-def]
    def main(argv: list[str]) -> int:
        raise error

    return main


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_ends_with_130_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "slow_command.py").write_text(
        "import time\ndef main(argv):\n    print('ready', flush=True)\n    time.sleep(60)\n    return 0\n"
    )
    script = tmp_path / "vir-hf"  # the name of the command, by which importing the package loads nothing heavy
    script.write_text(
        "import sys\nfrom vir_hf import cli\n"
        "cli.COMMANDS['slow'] = cli.Command('slow_command', '')\nsys.exit(cli.main(['slow']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # Tests started in the background ignore the signal, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors == "interrupted\n"


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_a_reader_that_goes_away_causes_no_error_message() -> None:
    writer = subprocess.Popen(
        [sys.executable, "-m", "vir_hf.cli", "recipes"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert writer.stdout is not None and writer.stderr is not None
    writer.stdout.close()
    assert writer.stderr.read() == ""
    assert writer.wait(timeout=30) == 141


def test_recipes_lists_every_experiment_with_stage_and_hardware(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {path.stem for path in (ROOT / "recipes" / "experiment").rglob("*.yaml")}
    assert {line.split()[0] for line in lines[1:]} == names
    pretrain = next(line for line in lines if line.startswith("llava15_7b_pretrain"))
    assert "pretrain" in pretrain.split()[1] and "8 GPUs of 40 GB" in pretrain and "558k captions" in pretrain

    assert cli.main(["recipes", "--json", "-"]) == 0
    listed = json.loads(capsys.readouterr().out)["experiments"]
    assert {experiment["name"] for experiment in listed} == names
    assert all({"name", "stage", "hardware", "description", "path"} == set(experiment) for experiment in listed)
    assert cli.main(["recipes", "--json", str(tmp_path / "list.json")]) == 0
    assert json.loads((tmp_path / "list.json").read_text())["experiments"] == listed


def test_recipes_of_ones_own_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nexperiment: {description: my run}\n")
    assert cli.main(["recipes", "--recipes-dir", str(tmp_path)]) == 0
    assert any(line.startswith("mine ") and line.endswith("my run") for line in capsys.readouterr().out.splitlines())
    (tmp_path / "experiment" / "broken.yaml").write_text("a: [\n")
    assert cli.main(["recipes", "--recipes-dir", str(tmp_path)]) == 2
    assert "broken.yaml: cannot be read as YAML" in capsys.readouterr().err
