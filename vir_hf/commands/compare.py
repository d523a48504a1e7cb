"""`vir-hf compare A B`: two runs, their recipes, their curves, and their scores with a test of the difference."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from vir_hf import files
from vir_hf.commands.outputs import add_json, add_overwrite, refuse_outputs, write_json

_EPILOG = """\
examples:
  vir-hf compare outputs/lora outputs/full --html compare.html --image-folder images
  vir-hf compare scores/first scores/second

Both must have been evaluated with `vir-hf evaluate ... --task NAME` on the same questions. p is how often a difference as large
comes about when each question's two answers are swapped by chance: below 0.05 the runs differ, above nothing is shown.
"""


def main(argv: list[str]) -> int:
    """Compare; return 0, or 2 for a wrong call or evaluations that do not compare."""
    parser = argparse.ArgumentParser(
        prog="vir-hf compare",
        description="Compare two runs or two evaluations.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("first", metavar="A", help="a run that was evaluated, or a folder of `evaluate --output`")
    parser.add_argument("second", metavar="B", help="another one")
    parser.add_argument(
        "--html", metavar="FILE", help="write the comparison, with answers side by side, as one HTML page"
    )
    parser.add_argument("--image-folder", metavar="DIR", help="where the images of the questions lie, for the page")
    add_json(parser, "the comparison")
    add_overwrite(parser)
    arguments = parser.parse_args(argv)
    inputs = [arguments.first, arguments.second]
    written = [("--json", arguments.json), ("--html", arguments.html)]
    refuse_outputs(written, [], overwrite=arguments.overwrite)
    from vir_hf.using.comparison import compare, comparison_page, recipe_differences

    found = compare(arguments.first, arguments.second)
    names = _names(arguments.first, arguments.second)
    changed = recipe_differences(arguments.first, arguments.second)
    write_json(arguments.json, _document(inputs, found, changed))
    if arguments.html:
        page = comparison_page(arguments.first, arguments.second, found, names, arguments.image_folder)
        files.write_text(arguments.html, page)
    _print(found, changed, sys.stderr if arguments.json == "-" else sys.stdout)
    return 0


def _names(first: str, second: str) -> tuple[str, str]:
    one, other = Path(first).name or first, Path(second).name or second
    return (one, other) if one != other else (f"A: {one}", f"B: {other}")


def _document(inputs: list[str], found: list[Any], changed: list[tuple[str, str, str]]) -> dict[str, Any]:
    results = [
        {
            "evaluation": one.name,
            "metric": score.name,
            "first": round(score.first, 6),
            "second": round(score.second, 6),
            "difference": round(score.difference, 6),
            "low": round(score.low, 6),
            "high": round(score.high, 6),
            "p_value": round(score.p_value, 6),
        }
        for one in found
        for score in one.differences
    ]
    recipes = [{"key": key, "first": first, "second": second} for key, first, second in changed]
    notes = [f"{one.name}: {note}" for one in found for note in one.notes]
    return {"first": inputs[0], "second": inputs[1], "results": results, "recipe_differences": recipes, "notes": notes}


def _print(found: list[Any], changed: list[tuple[str, str, str]], stream: Any) -> None:
    from vir_hf.using.comparison import HEAD, difference_rows

    for one in found:
        print(f"{one.name}: {len(one.first.aligned.items):,} questions", file=stream)
        rows = [list(HEAD), *difference_rows(one)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
        for row in rows:
            print(
                "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(),
                file=stream,
            )
        for note in one.notes:
            print(f"  note: {note}", file=stream)
    for key, first, second in changed:
        print(f"{key}: {first} -> {second}", file=stream)
