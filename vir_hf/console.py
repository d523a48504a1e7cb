"""What a command prints, and where: bars on a terminal only, plain lines everywhere else, and a run's lines in its `train.log`.

Standard output carries what a command was asked for and how far it is; standard error carries warnings, errors and bars.
`--quiet` leaves results, warnings and errors. `--log-level` says from which level on the package's own loggers are shown.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vir_hf import __version__, files
from vir_hf.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console

LEVELS = ("debug", "info", "warning", "error")
LEVEL_VARIABLE = "VIR_HF_LOG_LEVEL"
QUIET_VARIABLE = "VIR_HF_QUIET"
# A folder into which processes of one launch put their error, for `vir-hf launch` to print once they have all ended.
ERRORS_VARIABLE = "VIR_HF_ERRORS"
LOG_MARK = "# log of vir-hf"
_LINE_SECONDS = 30.0
_LOG_COLUMNS = 120
# By which the libraries below leave out their bars; what the user has set stays as it is.
_BARS_OFF = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def take_output_options(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the words of a command line without `--quiet` and `--log-level`, and the environment that says the same.

    Raises:
        RecipeError: a level that is none.
    """
    rest: list[str] = []
    said: dict[str, str] = {}
    position = 0
    while position < len(words):
        word = words[position]
        if word == "--":
            return [*rest, *words[position:]], said
        name, has_value, value = word.partition("=")
        if word == "--quiet":
            said[QUIET_VARIABLE] = "1"
        elif name == "--log-level":
            if not has_value:
                position += 1
                value = words[position] if position < len(words) else ""
            if value.lower() not in LEVELS:
                raise RecipeError(f"--log-level {value}: expected one of {', '.join(LEVELS)}.")
            said[LEVEL_VARIABLE] = value.lower()
        else:
            rest.append(word)
        position += 1
    return rest, said


@contextlib.contextmanager
def settings(said: dict[str, str]) -> Iterator[None]:
    """Inside this block, and in processes started from it, print as `take_output_options` understood the command line."""
    wanted = {
        **({} if shows_bars(said) else {name: os.environ.get(name, off) for name, off in _BARS_OFF.items()}),
        **said,
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        with _warnings_on_stderr():
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def is_quiet(said: dict[str, str] | None = None) -> bool:
    """Whether only results, warnings and errors are printed."""
    return {**os.environ, **(said or {})}.get(QUIET_VARIABLE, "").lower() in ("1", "true", "yes")


def shows_bars(said: dict[str, str] | None = None) -> bool:
    """Whether standard error is a terminal that can redraw a line, and nobody asked for plain text."""
    plain = os.environ.get("TERM") == "dumb" or bool(os.environ.get("TQDM_DISABLE"))
    return not plain and not is_quiet(said) and sys.stderr is not None and sys.stderr.isatty()


def say(text: str) -> None:
    """Print how far the work is, above a bar if there is one, and keep it in the run's log; nothing is printed when quiet."""
    _keep(text)
    if not is_quiet():
        _print(text)


def conclude(text: str) -> None:
    """Print what the command was asked for, also when quiet, and keep it in the run's log."""
    _keep(text)
    _print(text)


def _print(text: str, stream: Any = None) -> None:
    """Print a line above the bars that are shown; standard output is looked up now, since tests and notebooks replace it."""
    if "tqdm" in sys.modules and shows_bars():
        sys.modules["tqdm"].tqdm.write(text, file=stream or sys.stdout)
    else:
        print(text, file=stream or sys.stdout, flush=True)


def rendered(print_to: Callable[[Console], None]) -> str:
    """Return what is printed to a console of rich as plain lines: as wide as the terminal, or as a log has room for."""
    import io

    from rich.console import Console

    text = io.StringIO()
    width = Console().width if sys.stdout.isatty() else _LOG_COLUMNS
    print_to(Console(file=text, width=width))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")


class Progress:
    """How far something is: a bar on a terminal; elsewhere a line every half minute, so that short work says nothing.

    Args:
        total: how many there are; `None` where nobody knows.
        what: what is being done, as a word or two.
        unit: what is counted, in the singular.
        initial: how many were done before.
        has_lines: false where the caller prints lines of its own.
    """

    def __init__(self, total: int | None, what: str, unit: str, *, initial: int = 0, has_lines: bool = True) -> None:
        self.total, self.what, self.unit, self.num_done = total, what, unit, initial
        self._initial, self._has_lines = initial, has_lines
        self._started = self._said = time.monotonic()
        self._bar: Any = None
        if shows_bars():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what or None, unit=unit, initial=initial, dynamic_ncols=True)

    def update(self, num_more: int = 1) -> None:
        """Count what was done since the last call."""
        self.num_done += num_more
        if self._bar is not None:
            self._bar.update(num_more)
        elif self._has_lines and time.monotonic() - self._said >= _LINE_SECONDS:
            self._said = time.monotonic()
            say(self.line())

    def seconds_left(self) -> float | None:
        """Return how long the rest takes at the pace so far, or `None` before anything was done."""
        done = self.num_done - self._initial
        if self.total is None or done <= 0:
            return None
        return (time.monotonic() - self._started) / done * max(0, self.total - self.num_done)

    def line(self) -> str:
        """Return how far it is as one line."""
        if self.total is None:
            return f"{self.what}: {self.num_done:,} {self.unit}s"
        left = self.seconds_left()
        end = "" if left is None else f", {duration(left)} left"
        share = 100 * self.num_done // max(1, self.total)
        return f"{self.what}: {self.num_done:,} of {self.total:,} {self.unit}s ({share} %){end}"

    def report(self, text: str) -> None:
        """Print something that went wrong on standard error, above the bar."""
        _print(text, sys.stderr)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def duration(seconds: float) -> str:
    """Return a time as people say it: `0.4 s`, `42 s`, `3 min 20 s`, `2 h 05 min`, `1 d 3 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def memory(num_bytes: float) -> str:
    """Return an amount of memory in binary units: `512 MiB`, `2.3 GiB`, `1.2 TiB`."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 2**20:.0f} MiB"


class _Stderr(logging.Handler):
    """Warnings as `warning: ...` on standard error as it is now, above a bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < _shown_level():
            return
        _print(f"{record.levelname.lower()}: {record.getMessage()}", sys.stderr)


def _shown_level() -> int:
    """The level from which on the package's loggers are shown: as asked, else warnings."""
    return getattr(logging, os.environ.get(LEVEL_VARIABLE, "").upper(), None) or logging.WARNING


@contextlib.contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Show the package's loggers on standard error inside this block; once, however deep."""
    ours = logging.getLogger("vir_hf")
    if any(isinstance(handler, _Stderr) for handler in ours.handlers):
        yield
        return
    handler, level = _Stderr(), ours.level
    ours.addHandler(handler)
    ours.setLevel(min(_shown_level(), logging.WARNING))
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)


_logs: list[RunLog] = []


def _keep(text: str) -> None:
    for log in _logs:
        log.add(text)


class RunLog(logging.Handler):
    """A run's lines with their times in `train.log`: what is said, and the package's own messages from `info` on.

    Nothing is written before `open`, so that a run that is refused leaves nothing behind; from then on each line is on the
    disk when it was said. A run that goes on adds to what is there.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._path: Path | None = None
        self._waiting: list[str] = []
        self._inner = contextlib.ExitStack()

    def __enter__(self) -> RunLog:
        self._inner.enter_context(_warnings_on_stderr())
        ours = logging.getLogger("vir_hf")
        self._inner.callback(ours.setLevel, ours.level)
        ours.setLevel(min(ours.getEffectiveLevel(), logging.INFO))
        ours.addHandler(self)
        _logs.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.add(f"ended by {type(error).__name__}: {error}")
        _logs.remove(self)
        logging.getLogger("vir_hf").removeHandler(self)
        self._inner.close()

    def open(self, path: Path) -> None:
        """Begin to write into a file: at its end if it is a log of ours, else beside it; see `files.set_aside`."""
        if os.path.lexists(path) and not _is_log(path):
            files.set_aside(path)
        self._path = path
        waiting, self._waiting = self._waiting, []
        self._write([f"{LOG_MARK} {__version__}, {time.strftime('%Y-%m-%d %H:%M:%S %z')}", *waiting])

    def add(self, text: str) -> None:
        """Keep a text, each of its lines with the time of day."""
        now = time.strftime("%H:%M:%S")
        lines = [f"{now}  {line.rstrip()}" for line in text.splitlines() if line.strip()]
        if self._path is None:
            self._waiting += lines
        else:
            self._write(lines)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message of the package's loggers."""
        self.add(f"{record.levelname.lower()}: {record.getMessage()}")

    def _write(self, lines: list[str]) -> None:
        if self._path is None:
            return
        try:
            with files.appending(self._path) as file:
                file.writelines(f"{line}\n" for line in lines)
        except OSError as error:  # a full disk must not end a run for its log
            self._path = None
            print(f"warning: train.log is not written any more: {error}", file=sys.stderr)


def _is_log(path: Path) -> bool:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return path.is_file() and not path.is_symlink() and file.read(len(LOG_MARK)) == LOG_MARK
    except OSError:
        return False


def print_error(message: str, code: int) -> None:
    """Print an error, or whatever ends the command, on standard error: once, however many processes of a launch say the same.

    Under `vir-hf launch` it is left for the launch to print, last. Under torchrun and `accelerate launch` the first process
    of a machine that comes to say it prints it.
    """
    told = os.environ.get(ERRORS_VARIABLE)
    if told:
        files.write_json(Path(told) / f"{os.environ.get('RANK', '0')}.json", {"message": message, "code": code})
        return
    attempt = os.environ.get("TORCHELASTIC_ERROR_FILE")  # LOGS/attempt_0/RANK/error.json, one folder a launch
    if attempt and not files.claim(Path(attempt).parents[1], _without_rank(message)):
        return
    print(message, file=sys.stderr, flush=True)


def collected_errors(folder: str) -> list[tuple[str, int]]:
    """Return the messages that processes of a launch have left, each once, with the exit code that goes with it."""
    found: dict[str, tuple[str, int]] = {}
    for path in sorted(Path(folder).glob("*.json"), key=lambda it: int(it.stem)):
        left = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(_without_rank(left["message"]), (left["message"], int(left["code"])))
    return list(found.values())


def _without_rank(message: str) -> str:
    """What `ranks.together` tells the other ranks, as the rank it failed on says it."""
    head, _, rest = message.partition("error: rank ")
    number, colon, text = rest.partition(": ")
    return f"error: {text}" if not head and colon and number.isdigit() else message
