"""`vir-hf recipes`: what can be trained, with stage, hardware and one line each."""

from __future__ import annotations

import argparse
from typing import Any

from vir_hf.commands.outputs import add_json, add_overwrite, refuse_outputs, write_json
from vir_hf.recipe import files as recipe_files


def main(argv: list[str]) -> int:
    """List the experiments; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="vir-hf recipes",
        description="List the experiments: name, stage, hardware, one line each.",
        epilog="Train one with `vir-hf train experiment=NAME data.data_path=ROWS.json`; docs/recipes.md lists every key.",
    )
    parser.add_argument("--recipes-dir", metavar="DIR", help="a folder of your own recipes, searched first")
    add_json(parser, "the list")
    add_overwrite(parser)
    arguments = parser.parse_args(argv)
    inputs = [str(path) for path in recipe_files.group_options("experiment", arguments.recipes_dir).values()]
    refuse_outputs([("--json", arguments.json)], inputs, overwrite=arguments.overwrite)
    experiments = list_experiments(arguments.recipes_dir)
    write_json(arguments.json, {"experiments": experiments})
    if arguments.json != "-":
        _print_table(experiments)
    return 0


def list_experiments(recipes_dir: str | None = None) -> list[dict[str, Any]]:
    """Return name, stage, hardware, description and file of every experiment that can be chosen."""
    found = []
    for name, path in recipe_files.group_options("experiment", recipes_dir).items():
        about = recipe_files.read_yaml(path).get("experiment") or {}
        found.append(
            {
                "name": name,
                "stage": str(about.get("stage", "finetune")),
                "hardware": str(about.get("hardware", "")),
                "description": str(about.get("description", "")),
                "path": str(path),
            }
        )
    return found


def _print_table(experiments: list[dict[str, Any]]) -> None:
    """Print one experiment a line, in columns; lines are left whole, so that they can be searched."""
    columns = ("name", "stage", "hardware", "description")
    rows = [("experiment", "stage", "hardware", "what it does"), *(tuple(e[c] for c in columns) for e in experiments)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns) - 1)]
    for row in rows:
        print("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[-1]]))
