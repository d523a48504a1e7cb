"""`vir-hf chat`: talk to a model about images in the terminal."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vir_hf.commands.answer import (
    add_generation_arguments,
    add_model_arguments,
    check_pictures,
    generation_options,
    load_answerer,
)
from vir_hf.errors import DataError

if TYPE_CHECKING:
    from vir_hf.inference import Answerer

HELP = """\
/image FILE ...   show images with the next question
/system TEXT      set the system prompt, and begin anew; without TEXT: the template's own
/reset            forget the conversation and its images
/help             this list
/quit             leave (or Ctrl-D)
Ctrl-C stops an answer."""


def main(argv: list[str]) -> int:
    """Hold the conversation until `/quit` or the end of the input; return the exit code."""
    parser = argparse.ArgumentParser(prog="vir-hf chat", description="Talk to a model about images.")
    parser.add_argument("model", help="a run's folder, a checkpoint, an adapter or a Hub id")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image to begin with; repeatable"
    )
    add_model_arguments(parser)
    add_generation_arguments(parser)
    arguments = parser.parse_args(argv)
    options = generation_options(arguments)
    check_pictures(arguments.image)
    chat = Chat(load_answerer(arguments), options, arguments.system, list(arguments.image))
    print(f"{arguments.model} is ready. /help lists the commands.")
    if arguments.image:
        print(f"with the next question: {', '.join(arguments.image)}")
    while True:
        try:
            line = _read_line()
        except KeyboardInterrupt:
            print()
            continue
        if line is None or not chat.take(line.strip()):
            return 0


def _read_line() -> str | None:
    """Return the next line, or `None` at the end; on a terminal with line editing and a prompt."""
    try:
        if sys.stdin.isatty():
            try:
                import readline  # noqa: F401  arrow keys and earlier lines; not on every platform
            except ImportError:
                pass
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


@dataclass
class Chat:
    """A conversation: what was said so far, and the images waiting for the next question."""

    answerer: Answerer
    options: dict[str, Any]
    system: str | None = None
    pictures: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)

    def take(self, line: str) -> bool:
        """Carry out one line; return whether the conversation goes on. What is wrong with a line is printed."""
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit"):
            return False
        if not line.startswith("/"):
            if line:
                self._ask(line)
            else:
                print("(an empty question; write one, or /help)")
        elif word == "/help":
            print(HELP)
        elif word == "/image":
            self._attach(rest)
        elif word == "/reset":
            self.history, self.pictures = [], []
            print("(forgotten)")
        elif word == "/system":
            self.system, self.history = rest.strip() or None, []
            print("(system prompt set; a new conversation)" if self.system else "(the template's own system prompt)")
        else:
            print(f"unknown command {word}; /help lists them")
        return True

    def _attach(self, rest: str) -> None:
        try:
            paths = shlex.split(rest)
            check_pictures(paths)
        except (DataError, ValueError) as error:  # ValueError: a quote that is not closed
            print(f"error: {error}")
            return
        self.pictures += paths
        print(f"with the next question: {', '.join(self.pictures)}" if paths else "which image? /image FILE")

    def _ask(self, question: str) -> None:
        pieces: list[str] = []
        try:
            for piece in self.answerer.stream(self.pictures, question, self.system, self.history, **self.options):
                pieces.append(piece)
                print(piece, end="", flush=True)
        except DataError as error:
            print(f"error: {error}")
            return
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        print()
        shown = [{"type": "image", "image": picture} for picture in self.pictures]
        self.history += [
            {"role": "user", "content": [*shown, {"type": "text", "text": question}]},
            {"role": "assistant", "content": "".join(pieces).strip()},
        ]
        self.pictures = []
