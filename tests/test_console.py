"""What is printed and where: lines without a terminal, bars on one, a log beside a run, an error once."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vir_hf import console
from vir_hf.console import LOG_MARK, Progress, RunLog, duration, memory, say
from vir_hf.errors import RecipeError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
from vir_hf import console
with console.settings({}):
    with console.Progress(3, "sorting", "image") as progress:
        for number in range(3):
            progress.update()
            console.say(f"line {number}")
"""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (86_399, "1 d 0 h"),
        (97_200, "1 d 3 h"),
    ],
)
def test_a_time_is_written_as_people_say_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(st.floats(0, 1e7))
def test_a_time_is_right_to_its_last_unit(seconds: float) -> None:
    units = {"s": 1, "min": 60, "h": 3600, "d": 86400}
    words = duration(seconds).split()
    pairs = list(zip(map(float, words[::2]), words[1::2], strict=True))
    said = sum(number * units[unit] for number, unit in pairs)
    smallest = units[pairs[-1][1]] * (0.1 if "." in words[-2] else 1)
    assert abs(said - seconds) <= smallest / 2 + 1e-6
    assert all(number < 60 for number, unit in pairs if unit in ("s", "min"))


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 MiB"), (2**29, "512 MiB"), (2.25 * 2**30, "2.2 GiB"), (3 * 2**40, "3.0 TiB")]
)
def test_memory_is_in_binary_units(num_bytes: float, text: str) -> None:
    assert memory(num_bytes) == text


def test_without_a_terminal_there_is_no_bar_and_no_carriage_return() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, cwd=ROOT, timeout=60)
    assert done.stdout == b"line 0\nline 1\nline 2\n" and done.stderr == b""


def on_a_terminal(**environment: str) -> str:
    """What the script shows on a terminal of its own."""
    main, other = pty.openpty()
    termios.tcsetwinsize(other, (24, 80))  # a new one is no column wide
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=other,
        stderr=other,
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm", **environment},
    )
    os.close(other)
    shown = b""
    try:
        while piece := os.read(main, 4096):
            shown += piece
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(main)
    assert process.wait(timeout=60) == 0
    return shown.decode()


def test_on_a_terminal_there_is_a_bar() -> None:
    shown = on_a_terminal()
    assert "sorting: " in shown and "3/3" in shown and "line 2" in shown


@pytest.mark.long
@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TQDM_DISABLE": "1"}])
def test_a_terminal_that_cannot_redraw_or_a_screen_reader_gets_lines(environment: dict[str, str]) -> None:
    assert on_a_terminal(**environment).replace("\r\n", "\n") == "line 0\nline 1\nline 2\n"


def test_long_work_says_how_far_it_is_every_half_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    progress = Progress(40, "answering", "row", initial=20)
    for _ in range(20):
        now += 10
        progress.update()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[0] == "answering: 23 of 40 rows (57 %), 2 min 50 s left"


def test_quiet_leaves_results_and_warnings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with console.settings({console.QUIET_VARIABLE: "1"}):
        say("how far")
        console.conclude("the answer")
        logging.getLogger("vir_hf.somewhere").warning("look at %s", "this")
        logging.getLogger("vir_hf.somewhere").info("by the way")
    assert capsys.readouterr() == ("the answer\n", "warning: look at this\n")
    assert console.QUIET_VARIABLE not in os.environ


@pytest.mark.parametrize(("level", "shown"), [("debug", 3), ("info", 2), ("warning", 1), ("error", 0)])
def test_messages_are_shown_from_the_level_on(level: str, shown: int, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("vir_hf.somewhere")
    with console.settings({console.LEVEL_VARIABLE: level}):
        logger.debug("a")
        logger.info("b")
        logger.warning("c")
    assert len(capsys.readouterr().err.splitlines()) == shown


def test_the_options_may_stand_anywhere_and_end_at_two_dashes() -> None:
    words, said = console.take_output_options(["train", "--quiet", "a=b", "--log-level", "INFO", "--", "--quiet"])
    assert words == ["train", "a=b", "--", "--quiet"]
    assert said == {console.QUIET_VARIABLE: "1", console.LEVEL_VARIABLE: "info"}
    with pytest.raises(RecipeError, match="expected one of debug, info"):
        console.take_output_options(["train", "--log-level"])


def test_a_log_keeps_what_was_said_and_warned_and_what_ended_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("vir_hf.somewhere")
    path = tmp_path / "out" / "train.log"
    with pytest.raises(RecipeError), RunLog() as log:
        say("before it is open")
        assert not path.exists()
        log.open(path)
        logger.warning("careful")
        logger.info("for the log alone")
        assert path.read_text(encoding="utf-8").splitlines()[-1].endswith("  info: for the log alone")
        raise RecipeError("no such key")
    with RunLog() as log:
        log.open(path)
        say("two\nlines")
    lines = [line.partition("  ")[2] for line in path.read_text(encoding="utf-8").splitlines()]
    ended = "ended by RecipeError: no such key"
    assert lines == ["", "before it is open", "warning: careful", "info: for the log alone", ended, "", "two", "lines"]
    assert path.read_text(encoding="utf-8").count(LOG_MARK) == 2
    assert capsys.readouterr().err == "warning: careful\n"


def test_somebody_elses_train_log_is_kept(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text("mine\n", encoding="utf-8")
    with RunLog() as log:
        log.open(tmp_path / "train.log")
        say("ours")
    assert (tmp_path / "train.log.kept").read_text(encoding="utf-8") == "mine\n"
    assert "ours" in (tmp_path / "train.log").read_text(encoding="utf-8")


def test_processes_of_one_launch_say_an_error_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, message in enumerate(["error: rank 1: no room", "error: no room", "error: another"]):
        (tmp_path / "attempt_0" / str(rank)).mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / str(rank) / "error.json"))
        console.print_error(message, 1)
    assert capsys.readouterr().err == "error: rank 1: no room\nerror: another\n"


def test_under_our_own_launch_the_error_is_left_for_the_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(console.ERRORS_VARIABLE, str(tmp_path))
    for rank in range(12):
        monkeypatch.setenv("RANK", str(rank))
        console.print_error("error: no room" if rank == 1 else "error: rank 1: no room", 2)
    assert capsys.readouterr().err == "" and json.loads((tmp_path / "0.json").read_text())["code"] == 2
    assert console.collected_errors(str(tmp_path)) == [("error: rank 1: no room", 2)]
