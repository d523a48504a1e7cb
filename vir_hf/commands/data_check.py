"""`vir-hf data check`: what is wrong with a data set, before a GPU is paid for."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from vir_hf import files
from vir_hf.commands.outputs import add_json, add_overwrite, data_inputs, recipe_inputs, refuse_outputs, write_json
from vir_hf.commands.reading import add_reading, reading_of, recipe_reading
from vir_hf.curation.terminal import printable
from vir_hf.errors import RecipeError
from vir_hf.recipe.load import RecipeArgumentParser, recipe_from

if TYPE_CHECKING:
    from vir_hf.curation.checks import CheckReport

_EPILOG = """\
examples:
  vir-hf data check train.json --image-folder images
  vir-hf data check train.json --image-folder coco.zip --decode --html check.html
  vir-hf data check train.json --image-folder images --tokenizer lmsys/vicuna-7b-v1.5 --max-length 2048
  vir-hf data check experiment=llava15_7b_lora data.data_path=train.json data.image_folder=images
  vir-hf data check train.json --image-folder images --fix sound.json
  vir-hf data check train.json --image-folder images --against llava_pope_test.jsonl --against-image-folder val2014

exit code: 0 nothing found, 1 problems found, 2 the data cannot be read or the call is wrong.
"""


def main(argv: list[str]) -> int:
    """Check; return 0 clean, 1 problems, 2 wrong call."""
    arguments = _parse(argv)
    from vir_hf.curation.checks import check_data, without_kinds
    from vir_hf.curation.report import report_as_html, report_as_json

    target = _target(arguments)
    if not os.path.exists(target["path"]):
        from vir_hf.data.sources import local_data

        target["path"] = local_data(target["path"])
    written = [("--json", arguments.json), ("--html", arguments.html), ("--fix", arguments.fix)]
    if arguments.fix:
        written.append(("--fix", _dropped_name(arguments.fix)))
    inputs = [*target["inputs"], *data_inputs(target["path"], target["image_folder"]), arguments.against]
    refuse_outputs(written, inputs, overwrite=arguments.overwrite)
    with _progress_bar() as progress:
        report = check_data(
            target["path"],
            target["image_folder"],
            processor=target["processor"],
            max_length=target["max_length"],
            decode=arguments.decode,
            allow_urls=target["allow_urls"],
            num_workers=arguments.num_workers,
            reading=target["reading"],
            progress=progress,
        )
    if arguments.against:
        _add_contamination(report, target, arguments)
    report = without_kinds(report, arguments.ignore)
    if arguments.json != "-":
        _print(report, Console())
    write_json(arguments.json, report_as_json(report, target["batch_size"]))
    if arguments.html:
        files.write_text(arguments.html, report_as_html(report, target["batch_size"]))
    if arguments.fix:
        _fix(report, arguments)
    return 1 if report.problems else 0


def _add_contamination(report: CheckReport, target: dict[str, Any], arguments: argparse.Namespace) -> None:
    from vir_hf.curation.checks import Problem
    from vir_hf.curation.contamination import find_contamination

    found = find_contamination(
        target["path"],
        target["image_folder"],
        arguments.against,
        arguments.against_image_folder,
        num_workers=arguments.num_workers,
    )
    report.problems += [Problem(one.file, one.row, one.id, one.kind, one.detail) for one in found]
    report.problems.sort(key=lambda problem: (report.files.index(problem.file), problem.row))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = RecipeArgumentParser(
        prog="vir-hf data check",
        description="Find what is wrong with LLaVA data: rows, placeholders, answers, lengths, images.",
        epilog=_EPILOG,
        takes_path=True,
    )
    parser.add_argument(
        "--image-folder", metavar="DIR", help="a folder, .zip or .tar; the data file's own folder by default"
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="count tokens with this tokenizer: a folder or Hub id")
    parser.add_argument("--template", default="vicuna_v1", help="the template the rows are trained with (vicuna_v1)")
    parser.add_argument("--image-tokens", type=int, default=576, metavar="N", help="tokens an image takes (576)")
    parser.add_argument("--max-length", type=int, metavar="N", help="report rows of more tokens than this")
    parser.add_argument("--batch-size", type=int, metavar="N", help="for the share of padding (16, or the recipe's)")
    parser.add_argument("--decode", action="store_true", help="decode every image, instead of its header and end")
    parser.add_argument("--allow-urls", action="store_true", help="do not report images that are URLs")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="KIND", help="do not report this kind; repeatable"
    )
    add_reading(parser, with_boxes=True)
    parser.add_argument(
        "--against", metavar="TEST", help="also find rows with an image or a question of this test, by what they show"
    )
    parser.add_argument(
        "--against-image-folder", metavar="DIR", help="where the test's images lie; beside the test file by default"
    )
    add_json(parser, "the whole report")
    parser.add_argument("--html", metavar="FILE", help="write the report as one HTML page")
    parser.add_argument("--fix", metavar="OUT.json", help="write the sound rows, and OUT.dropped.json with the others")
    parser.add_argument("--num-workers", type=int, metavar="N", help="processes (all cores)")
    add_overwrite(parser)
    arguments = parser.parse_args(argv)
    if arguments.fix == "-":
        raise RecipeError("--fix -: needs the name of a file, since a second one is written beside it.")
    for name in ("image_tokens", "max_length", "batch_size", "num_workers"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise RecipeError(f"--{name.replace('_', '-')}={getattr(arguments, name)}: expected 1 or more.")
    if arguments.max_length is not None and arguments.tokenizer is None and not is_recipe(arguments):
        raise RecipeError("data check: --max-length counts tokens; say whose with --tokenizer NAME, or name a recipe.")
    return arguments


def is_recipe(arguments: argparse.Namespace) -> bool:
    """Whether what was typed is a recipe (a file, overrides) rather than a path."""
    words = arguments.overrides
    return bool(arguments.recipe) or len(words) > 1 or ("=" in words[0] and not os.path.exists(words[0]))


def _target(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what to check, from the command line or from a recipe."""
    if len(arguments.overrides) > 1 and all(os.path.exists(word) for word in arguments.overrides):
        raise RecipeError(
            f"data check: found {len(arguments.overrides)} paths; expected one. A directory, or a quoted glob, is several files."
        )
    if not is_recipe(arguments):
        from vir_hf.model.row_processor import make_row_processor

        processor = None
        if arguments.tokenizer:
            processor = make_row_processor(arguments.tokenizer, arguments.template, arguments.image_tokens)
        return {
            "path": arguments.overrides[0],
            "image_folder": arguments.image_folder,
            "inputs": [arguments.tokenizer],
            "processor": processor,
            "max_length": arguments.max_length,
            "allow_urls": arguments.allow_urls,
            "reading": reading_of(arguments),
            "batch_size": arguments.batch_size or 16,
        }
    from vir_hf.model.row_processor import load_recipe_processor

    recipe = recipe_from(arguments)
    if recipe.data.sources:
        listed = "; ".join(
            f"vir-hf data check {source.path} --image-folder {source.image_folder or '(its own folder)'}"
            for source in recipe.data.sources
        )
        raise RecipeError(
            f"data check: a mixture is checked source by source, so that rows count as in their files: {listed}"
        )
    if recipe.data.data_path is None:
        raise RecipeError("data check: the recipe has no data.data_path; add data.data_path=ROWS.json.")
    return {
        "path": recipe.data.data_path,
        "image_folder": arguments.image_folder or recipe.data.image_folder,
        "inputs": recipe_inputs(recipe, arguments.recipe),
        "processor": load_recipe_processor(recipe),
        "max_length": arguments.max_length or recipe.training.max_length,
        "allow_urls": arguments.allow_urls or recipe.data.allow_urls,
        "reading": recipe_reading(recipe),
        "batch_size": arguments.batch_size or recipe.training.per_device_train_batch_size,
    }


@contextmanager
def _progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show how far rows and images are, on stderr and only to a person."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(f"{stage}, in blocks", total=total)
            bar.update(tasks[stage], completed=done)

        yield update


def _print(report: CheckReport, console: Console) -> None:
    from vir_hf.curation.checks import ERRORS
    from vir_hf.curation.report import statistics, unread_note

    num_bad, num_refused = len(report.bad_rows), len(report.untrainable_rows)
    console.print(f"{report.num_rows:,} rows, {len(report.rows_per_image):,} distinct images, {report.seconds:.1f} s")
    if report.seen.shapes:
        console.print(Text(report.seen.shapes_line()), soft_wrap=True)
    for condition, count in report.seen.filtered.most_common():
        console.print(Text(printable(f"data.filter: {count:,} rows left out by {condition}")), soft_wrap=True)
    figures = statistics(report)
    if figures["row_lengths"]:
        lengths = figures["row_lengths"]
        console.print(
            f"{figures['unit']} a row: median {lengths['median']:,}, mean {lengths['mean']:,}, 99 % below {lengths['p99']:,}, "
            f"longest {lengths['max']:,}"
        )
    if report.unread:
        console.print(Text(printable(f"note: {unread_note(report)}")), soft_wrap=True)
    if not num_bad:
        console.print("nothing wrong was found", style="green")
        return
    kinds = report.kinds()
    width = max(map(len, kinds))
    for kind, count in kinds.items():
        first = next(problem for problem in report.problems if problem.kind == kind)
        place = f"row {first.row}" + (f" (id {first.id})" if first.id else "")
        what = first.detail.partition(". ")[0]  # the remedy stands in the JSON and HTML reports
        line = Text(f"  {first.severity:<8}{count:>8,}  ")
        line.append(kind.ljust(width), style="red" if kind in ERRORS else "yellow")
        console.print(line.append(printable(f"  {place}: {what}")), soft_wrap=True)
    console.print(f"{num_bad:,} rows with a problem; training refuses {num_refused:,} of them (errors)")


def _fix(report: CheckReport, arguments: argparse.Namespace) -> None:
    from vir_hf.curation.fix import write_sound_rows

    kept, dropped = write_sound_rows(report, arguments.fix)
    print(
        f"{arguments.fix}: {kept:,} sound rows; {dropped:,} dropped, listed in {_dropped_name(arguments.fix)}",
        file=sys.stderr,
    )


def _dropped_name(out: str) -> str:
    from vir_hf.curation.fix import dropped_path

    return str(dropped_path(out))
