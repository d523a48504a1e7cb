"""The command `vir-hf`: looks up what a word means and hands over. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vir_hf import __version__, console
from vir_hf.errors import DataError, RecipeError
from vir_hf.waiting import bound_spinning

WRONG_CALL = 2
STOPPED = 75  # EX_TEMPFAIL, as `training.signals` ends a run
INTERRUPTED = 130
CLOSED_PIPE = 141  # what a shell reports of any program whose reader has gone

# Every exit code and what it means; the reference of the documentation is made from this.
EXIT_CODES = {
    0: "Done.",
    1: "Done, and problems were found: bad rows, unanswered rows, batches that differ, an installation that cannot work. Of "
    "`train`: the run could not go on; its last line says what is left on disk.",
    WRONG_CALL: "The command line, the recipe or the data cannot be used. Nothing was trained, or a row broke during an epoch.",
    STOPPED: "A signal stopped training after a checkpoint. The same command with `--resume` continues it.",
    INTERRUPTED: "Ctrl-C; while training, a second Ctrl-C.",
    CLOSED_PIPE: "The reader of the output has gone, as in `vir-hf recipes | head -1`.",
}
# Options of every command, taken out of the command line before the command sees it.
OUTPUT_OPTIONS = {
    "--quiet": "print results, warnings and errors only",
    "--log-level LEVEL": "print messages from LEVEL on: debug, info, warning (default) or error",
}
VERSIONED = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "deepspeed")


@dataclass(frozen=True)
class Command:
    """A word of the command line: where it is carried out, and one line of help."""

    module: str
    help: str

    def load(self) -> Callable[[list[str]], int]:
        """Return the function that carries it out: arguments in, exit code out."""
        main: Callable[[list[str]], int] = importlib.import_module(self.module).main
        return main


COMMANDS = {
    "train": Command("vir_hf.train", "train from a recipe: experiment=NAME section.key=value ..."),
    "launch": Command("vir_hf.commands.launch", "train on several GPUs through accelerate"),
    "plan": Command("vir_hf.commands.plan", "memory and time a recipe needs, before any download"),
    "recipes": Command("vir_hf.commands.recipes", "list the experiments, with stage and hardware"),
    "data": Command("vir_hf.commands.data", "check, inspect, prepare and cache a data set"),
    "chat": Command("vir_hf.commands.chat", "talk to a model about images in the terminal"),
    "answer": Command("vir_hf.commands.answer", "answer one question, or a file of them"),
    "demo": Command("vir_hf.commands.demo", "open the demo in a browser, on this machine"),
    "evaluate": Command("vir_hf.commands.evaluate", "measure a run on held-out rows, before and after tuning"),
    "compare": Command("vir_hf.commands.compare", "two runs: recipes, curves, scores with significance, answers"),
    "merge": Command("vir_hf.commands.merge", "write adapter and projector into a plain checkpoint"),
    "export": Command("vir_hf.commands.export", "write a run in another tool's format, proven by opening it"),
    "import": Command("vir_hf.commands.importing", "open a checkpoint of another project, every tensor accounted for"),
    "push": Command("vir_hf.commands.push", "publish a run on the Hub with its card"),
    "space": Command("vir_hf.commands.space", "publish the demo as a Space"),
    "doctor": Command("vir_hf.commands.doctor", "check this machine, and that fast batches equal single rows"),
    "completion": Command(
        "vir_hf.commands.completion", "print the script that completes commands in bash, zsh or fish"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one command line and return its exit code: 0 ok, 1 problems found, 2 wrong call or bad recipe or data."""
    bound_spinning()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else WRONG_CALL
    if words[0] in ("-V", "--version"):
        print(versions())
        return 0
    said: dict[str, str] = {}
    try:
        if words[0] != "completion":  # whose words are another command line
            words, said = console.take_output_options(words)
    except RecipeError as error:
        return fail(str(error))
    command = COMMANDS.get(words[0]) if words else None
    if command is None:
        return fail(_unknown_command(words[0]) if words else "no command; `vir-hf --help` lists them.")
    with console.settings(said):
        code = run(command.load, words[1:])
    if code == 0 and words[0] != "completion" and {"-h", "--help"} & set(words[1:]):
        print("\noptions of every command:\n" + _listed(OUTPUT_OPTIONS, 22))
    return code


def run(load: Callable[[], Callable[[list[str]], int]], argv: list[str]) -> int:
    """Call a command's function; what the user can mend becomes one line on stderr, without a traceback."""
    # It advises a package for faster 4-bit arithmetic on a CPU, in commands that have none.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        code = load()(argv)
        sys.stdout.flush()  # so that a reader who has gone away is noticed here, not while Python shuts down
        return code
    except (RecipeError, DataError) as error:
        return fail(str(error))
    except KeyboardInterrupt:
        console.print_error("interrupted", INTERRUPTED)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `vir-hf recipes | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except SystemExit as stop:  # argparse ends this way, having printed help or what was wrong
        return stop.code if isinstance(stop.code, int) else WRONG_CALL if stop.code else 0


def fail(message: str) -> int:
    """Print an error the user can mend and return the exit code that goes with it."""
    console.print_error(f"error: {message}", WRONG_CALL)
    return WRONG_CALL


def usage() -> str:
    """Return the help text: every command with its line."""
    return "\n".join(
        [
            "usage: vir-hf COMMAND [arguments]",
            "",
            "LLaVA-style visual instruction tuning, native to Hugging Face.",
            "",
            "commands:",
            _listed({word: command.help for word, command in COMMANDS.items()}, 12),
            "",
            "options of every command:",
            _listed(OUTPUT_OPTIONS, 22),
            "",
            "`vir-hf COMMAND --help` explains one command, `vir-hf --version` lists versions, `vir-hf doctor` checks the",
            "installation. Documentation: README.md and docs/.",
        ]
    )


def _listed(entries: dict[str, str], width: int) -> str:
    return "\n".join(f"  {name:<{width}}{text}" for name, text in entries.items())


def versions() -> str:
    """Return `vir-hf VERSION`, and a line for each library below it that decides what is computed."""
    from importlib import metadata

    lines = [f"vir-hf {__version__}", f"python {platform.python_version()} ({platform.platform()})"]
    for name in VERSIONED:
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name} not installed")
    return "\n".join(lines)


def _unknown_command(word: str) -> str:
    """Return the message for a word that is no command, with the nearest one that is."""
    near = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.5)
    hint = f" Did you mean `vir-hf {near[0]}`?" if near else ""
    if "=" in word:
        hint = f" To train: vir-hf train {word}"
    return f"unknown command {word!r}, expected one of {', '.join(COMMANDS)}.{hint}"


if __name__ == "__main__":
    sys.exit(main())
