"""`vir-hf push`: publish a run on the Hub with its card."""

from __future__ import annotations

import argparse
from pathlib import Path

_EPILOG = """\
examples:
  vir-hf push outputs/my-run you/my-model --dry-run     look at what would be published, in outputs/my-run-hub
  vir-hf push outputs/my-run you/my-model --private
  vir-hf push outputs/my-lora you/my-model --merged

Only weights, processor, recipe, metrics and the card are published, in one commit. After a cut, run it again.
"""


def main(argv: list[str]) -> int:
    """Publish, or write the folder that would be; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="vir-hf push",
        description="Publish a run on the Hub, with a card.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="the output directory of a run")
    parser.add_argument("repo", help="USER/NAME on the Hub")
    parser.add_argument("--private", action="store_true", help="visible to its owner alone")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--merged", action="store_true", help="an adapter merged into its base: a whole model")
    kinds.add_argument("--adapter", action="store_true", help="the adapter alone (the default for a run that has one)")
    parser.add_argument(
        "--license", metavar="ID", help="the model's licence, as the Hub writes it: apache-2.0, llama2 ..."
    )
    parser.add_argument(
        "--include-samples", metavar="LICENCE", help="publish the run's sample images too, naming their licence"
    )
    parser.add_argument("--update", action="store_true", help="replace what the repository holds, whatever it is")
    parser.add_argument("--dry-run", action="store_true", help="write the folder and open no connection")
    parser.add_argument("--folder", metavar="DIR", help="where --dry-run writes (RUN-hub)")
    arguments = parser.parse_args(argv)
    kind = "merged" if arguments.merged else "adapter" if arguments.adapter else "auto"

    from vir_hf.publishing import hub
    from vir_hf.publishing.repository import write_repository

    hub.check_repo_id(arguments.repo)
    about = {"kind": kind, "licence": arguments.license, "samples_licence": arguments.include_samples}
    if arguments.dry_run:
        run = Path(arguments.run)
        folder = Path(arguments.folder) if arguments.folder else run.with_name(f"{run.resolve().name}-hub")
        write_repository(run, folder, arguments.repo, **about)
        print_folder(folder)
        print(f"nothing was sent. To publish: vir-hf push {arguments.run} {arguments.repo}")
        return 0
    published = hub.push_run(arguments.run, arguments.repo, private=arguments.private, update=arguments.update, **about)
    print(f"{published.url}\nnext:\n  vir-hf space {arguments.repo} {arguments.repo}-demo")
    return 0


def print_folder(folder: Path) -> None:
    """Print every file of a folder with its size."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        print(f"  {path.stat().st_size:>14,}  {path.relative_to(folder)}")
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files):,} bytes in {folder}")
