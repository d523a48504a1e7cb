"""`vir-hf answer`: one question about images, or a file of them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vir_hf import files
from vir_hf.commands.reading import add_reading, reading_of
from vir_hf.errors import DataError, RecipeError, clipped, shown

if TYPE_CHECKING:
    from vir_hf.images.folder import ImageFolder
    from vir_hf.inference import Answerer, Prompt
    from vir_hf.rows.boxes import BoxChange

_EPILOG = """\
examples:
  vir-hf answer outputs/my-run --image photo.jpg "What is on the table?"
  vir-hf answer outputs/my-run --input rows.jsonl --image-folder images --output answers.jsonl

A row of the input is {"id", "image", "question"} or a LLaVA row; of the latter the last question is answered, after the
turns before it. Run again with the same output, it goes on where it stopped.
"""


def main(argv: list[str]) -> int:
    """Answer; return the exit code: 0 all answered, 1 some rows could not be, 2 a wrong call."""
    parser = argparse.ArgumentParser(
        prog="vir-hf answer",
        description="Answer one question, or a file of them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a run's folder, a checkpoint, an adapter or a Hub id")
    parser.add_argument("question", nargs="?", help="the question")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; repeat for several")
    parser.add_argument("--input", metavar="ROWS", help="a .jsonl or .json file of questions")
    parser.add_argument("--output", metavar="FILE", help='where to write the answers, one {"id", "answer"} a line')
    parser.add_argument("--image-folder", metavar="DIR", help="where the rows' images lie; beside the rows by default")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="questions computed together (8)")
    parser.add_argument(
        "--boxes",
        metavar="FORM",
        help="write boxes of the answers as 'pixel xyxy', '0-1 xywh', '0-1000 cxcywh padded' ...",
    )
    parser.add_argument("--model-boxes", metavar="FORM", help="how the model writes them (data.boxes of its recipe)")
    add_reading(parser)
    add_model_arguments(parser)
    add_generation_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    if arguments.input is None:
        return _answer_one(arguments)
    if arguments.question is not None or arguments.image or not arguments.output:
        raise RecipeError("answer: --input goes with --output, and with neither a question nor --image.")
    if arguments.batch_size < 1:
        raise RecipeError(f"answer: --batch-size {arguments.batch_size}; expected at least 1.")
    return _answer_file(arguments)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how the model is loaded, the same for every command that talks to one."""
    parser.add_argument("--adapter", metavar="A", help="an adapter to put on the model: a folder or a Hub id")
    parser.add_argument("--load-in-4bit", action="store_true", help="NF4 weights, through bitsandbytes")
    parser.add_argument("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda, cuda:1 ...")


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how an answer is made."""
    parser.add_argument("--system", metavar="TEXT", help="a system prompt in place of the template's own")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="the longest answer (512)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest answer")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="with a temperature (1.0)")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="cut an answer that takes longer")


def generation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments for `Answerer.answer`.

    Raises:
        RecipeError: a value out of its range.
    """
    if arguments.max_new_tokens < 1:
        raise RecipeError(f"--max-new-tokens {arguments.max_new_tokens}; expected at least 1.")
    if arguments.temperature < 0:
        raise RecipeError(f"--temperature {arguments.temperature}; expected 0 or more.")
    if not 0 < arguments.top_p <= 1:
        raise RecipeError(f"--top-p {arguments.top_p}; expected a number above 0 and at most 1.")
    return {
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "timeout_seconds": arguments.timeout,
    }


def load_answerer(arguments: argparse.Namespace) -> Answerer:
    """Return the model the arguments name, loaded; upstream's own progress bars are left out."""
    from transformers.utils import logging

    from vir_hf.inference import Answerer

    logging.disable_progress_bar()
    return Answerer.load(
        arguments.model, adapter=arguments.adapter, load_in_4bit=arguments.load_in_4bit, device=arguments.device
    )


def check_pictures(paths: Iterable[str]) -> None:
    """Open every image, so that a wrong name is answered before a model is loaded.

    Raises:
        DataError: the first that cannot be opened.
    """
    from vir_hf.images.opening import open_image

    for path in paths:
        open_image(path)


def _answer_one(arguments: argparse.Namespace) -> int:
    if arguments.output:
        raise RecipeError("answer: --output goes with --input; a single answer is printed.")
    if not (arguments.question or "").strip():
        raise DataError(
            'the question is empty; write it after the options: vir-hf answer MODEL --image F "What is this?"'
        )
    options = generation_options(arguments)
    check_pictures(arguments.image)
    change = _change_of_boxes(arguments)
    answerer = load_answerer(arguments)
    if change is not None:  # a box is known when all of it is
        from vir_hf.using.boxes import with_boxes_changed

        text = answerer.answer(arguments.image, arguments.question, arguments.system, **options)
        print(with_boxes_changed(text, arguments.image, change))
        return 0
    for piece in answerer.stream(arguments.image, arguments.question, arguments.system, **options):
        print(piece, end="", flush=True)
    print()
    return 0


def _change_of_boxes(arguments: argparse.Namespace) -> BoxChange | None:
    if arguments.boxes is None:
        if arguments.model_boxes is not None:
            raise RecipeError("answer: --model-boxes goes with --boxes, which says how boxes are to be written.")
        return None
    from vir_hf.using.boxes import change_of_answers

    return change_of_answers(arguments.adapter or arguments.model, arguments.boxes, arguments.model_boxes)


def _answer_file(arguments: argparse.Namespace) -> int:
    from vir_hf.console import Progress
    from vir_hf.images.folder import ImageFolder
    from vir_hf.using.questions import answered_ids, read_questions

    options = generation_options(arguments)
    rows = read_questions(Path(arguments.input), reading_of(arguments))
    output = Path(arguments.output)
    inputs = [name for name in (arguments.input, arguments.image_folder, arguments.model, arguments.adapter) if name]
    # One that is there is gone on with, if it holds answers and nothing else.
    files.refuse_output(arguments.output, "--output", inputs, overwrite=True)
    done = answered_ids(output)
    pending = [row for row in rows if row["id"] not in done]
    if done:
        print(f"{len(rows) - len(pending)} of {len(rows)} are answered in {output} already", file=sys.stderr)
    num_failed = 0
    change = _change_of_boxes(arguments)
    if pending:
        folder = ImageFolder(arguments.image_folder or str(Path(arguments.input).resolve().parent))  # listed once
        answerer = load_answerer(arguments)
        progress = Progress(len(rows), "answering", "row", initial=len(rows) - len(pending))
        with progress, files.appending(output) as file:
            for batch in _batches(pending, arguments.batch_size):
                prompts, failures = _encode(answerer, batch, folder, arguments.system)
                for failure in failures:
                    progress.report(failure)
                num_failed += len(failures)
                texts = answerer.answer_prompts([prompt for _, prompt in prompts], **options) if prompts else []
                for (row, _), text in zip(prompts, texts, strict=True):
                    text = text if change is None else _changed(text, row, folder, change)
                    file.write(json.dumps({"id": row["id"], "answer": text}, ensure_ascii=False) + "\n")
                file.flush()
                progress.update(len(batch))
    print(f"{len(rows) - num_failed} of {len(rows)} answered, in {output}", file=sys.stderr)
    if num_failed:
        print(f"{num_failed} could not be; mend them and run the same command again", file=sys.stderr)
    return 1 if num_failed else 0


def _changed(text: str, row: dict[str, Any], folder: ImageFolder, change: BoxChange) -> str:
    from vir_hf.using.boxes import with_boxes_changed
    from vir_hf.using.questions import row_question

    return with_boxes_changed(text, row_question(row, folder).all_images(), change)


def _batches(rows: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _encode(
    answerer: Answerer, rows: list[dict[str, Any]], folder: ImageFolder, system: str | None
) -> tuple[list[tuple[dict[str, Any], Prompt]], list[str]]:
    """Return the rows that can be asked, and a line for each that cannot."""
    from vir_hf.using.questions import row_question

    prompts, failures = [], []
    for row in rows:
        try:
            prompts.append((row, answerer.encode(row_question(row, folder, system))))
        except DataError as error:
            failures.append(clipped(f"error: id {shown(row['id'])}: {error}"))
    return prompts, failures
