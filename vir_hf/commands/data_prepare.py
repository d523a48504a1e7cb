"""`vir-hf data prepare`: a subset of LLaVA data with its images."""

from __future__ import annotations

import argparse
import math
import sys
import urllib.parse
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vir_hf.commands.outputs import add_json, add_overwrite, refuse_outputs, write_json
from vir_hf.errors import RecipeError

_EPILOG = """\
examples:
  vir-hf data prepare llava_instruct_150k.json subset --num-rows 1000 --download
  vir-hf data prepare train.json subset --num-rows 500 --image-folder images --link
  vir-hf data prepare hf://datasets/liuhaotian/LLaVA-Instruct-150K/llava_instruct_150k.json subset --num-rows 1000 --download
  vir-hf data prepare train.json subset --download --base-url https://example.org/pictures

Writes DIR/rows.json, DIR/images/ and DIR/failed.json. Run again, it fetches only what is missing. Then:
  vir-hf train experiment=local_lite data.data_path=DIR/rows.json data.image_folder=DIR/images

exit code: 0 complete, 1 some images could not be had, 2 the data cannot be read or the call is wrong.
"""


def main(argv: list[str]) -> int:
    """Prepare; return 0 complete, 1 with failures."""
    arguments = _parse(argv)
    outputs = [str(Path(arguments.out) / name) for name in ("rows.json", "failed.json")]
    inputs = [arguments.source, arguments.image_folder, *outputs, str(Path(arguments.out) / "images")]
    refuse_outputs([("--json", arguments.json)], inputs, overwrite=arguments.overwrite)
    from vir_hf.cli import INTERRUPTED
    from vir_hf.curation.prepare import Fetching, prepare_data
    from vir_hf.data.sources import local_path

    mode = "download" if arguments.download else "link" if arguments.link else "copy"
    fetching = Fetching(
        mode=mode,
        image_folder=arguments.image_folder,
        **({"base_url": arguments.base_url} if arguments.base_url else {}),
        num_workers=arguments.num_workers,
        retries=arguments.retries,
        timeout_seconds=arguments.timeout,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("images", total=None)
        try:
            prepared = prepare_data(
                local_path(arguments.source),
                arguments.out,
                num_rows=arguments.num_rows,
                seed=arguments.seed,
                match=arguments.match,
                fetching=fetching,
                overwrite=arguments.overwrite,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        except KeyboardInterrupt:
            bar.stop()
            print("interrupted; run the same command again to go on", file=sys.stderr)
            return INTERRUPTED
    write_json(arguments.json, prepared.to_json())
    if arguments.json == "-":
        return 1 if prepared.failed else 0
    print(f"{prepared.rows_file}: {prepared.num_rows:,} rows")
    fetched = prepared.num_images - prepared.num_present - len(prepared.failed)
    print(f"{arguments.out}/images: {prepared.num_images - len(prepared.failed):,} images, {fetched:,} of them new")
    if prepared.failed:
        first = prepared.failed[0]
        print(
            f"{arguments.out}/failed.json: {len(prepared.failed):,} images could not be had, and {prepared.num_left_out:,} rows "
            f"are left out; the first: {first['image']}: {first['reason']}"
        )
    return 1 if prepared.failed else 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vir-hf data prepare",
        description="Take a subset of LLaVA data and gather its images, each verified by decoding it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="a LLaVA .json, .jsonl or .parquet file, or hf://datasets/owner/name/file.json")
    parser.add_argument("out", metavar="DIR", help="where rows.json, images/ and failed.json go")
    parser.add_argument("--num-rows", type=int, metavar="N", help="draw so many rows (all)")
    parser.add_argument("--seed", type=int, default=0, help="for --num-rows (0)")
    parser.add_argument("--match", metavar="TEXT", help="only rows whose image path contains this, such as coco/")
    parser.add_argument("--image-folder", metavar="DIR", help="where the images are: a folder, .zip or .tar")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--link", action="store_true", help="hard-link the images instead of copying them")
    how.add_argument("--download", action="store_true", help="download the images, COCO's by default")
    parser.add_argument("--base-url", metavar="URL", help="download from URL/reference instead of COCO's servers")
    parser.add_argument("--num-workers", type=int, default=16, metavar="N", help="at the same time (16)")
    parser.add_argument(
        "--retries", type=int, default=4, metavar="N", help="tries after the first, later and later (4)"
    )
    parser.add_argument(
        "--timeout", type=float, default=30.0, metavar="SECONDS", help="of one try, to its last byte (30)"
    )
    add_json(parser, "what was done")
    add_overwrite(parser)
    arguments = parser.parse_args(argv)
    if arguments.num_rows is not None and arguments.num_rows < 1:
        raise RecipeError(f"--num-rows {arguments.num_rows}: expected 1 or more.")
    if arguments.num_workers < 1 or arguments.retries < 0:
        raise RecipeError("--num-workers must be at least 1 and --retries at least 0.")
    if arguments.base_url and not arguments.download:
        raise RecipeError("--base-url goes with --download.")
    if arguments.base_url and not _is_web_address(arguments.base_url):
        raise RecipeError(f"--base-url {arguments.base_url}: expected an http or https address.")
    if not 0 < arguments.timeout < math.inf:
        raise RecipeError(f"--timeout {arguments.timeout:g}: expected more than 0 seconds.")
    return arguments


def _is_web_address(text: str) -> bool:
    try:
        return text.startswith(("http://", "https://")) and bool(urllib.parse.urlsplit(text).hostname)
    except ValueError:  # a bracket that is never closed
        return False
