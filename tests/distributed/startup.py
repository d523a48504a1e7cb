"""Many ranks of one node start a run at once; each notes which files of the data and of the caches it opened, and how.

    python tests/distributed/startup.py ROOT OUT NUM_PROCESSES PORT

The processes are forked after the imports, so that sixteen of them start in seconds on two cores.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import scenarios

import vir_hf.training.run  # noqa: F401  everything heavy, before the fork


def run_rank(root: Path, output_dir: Path, rank: int, world_size: int, port: str) -> None:
    """Train one step as one rank and write `opened-RANK.json`: data file reads, files written below the cache."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    data_file, cache = str(root / "rows.json"), os.environ["HF_DATASETS_CACHE"]
    opened: dict[str, list[str]] = {"data_file": [], "written": []}

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str):
            return
        path, flags = arguments[0], arguments[2] or 0
        if path == data_file:
            opened["data_file"].append(path)
        # Lock files are opened by everybody, which is how the others wait; a folder is opened to see whether it can be written.
        elif (
            path.startswith(cache)
            and not path.endswith(".lock")
            and not os.path.isdir(path)
            and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            opened["written"].append(os.path.relpath(path, cache))

    sys.addaudithook(note)
    from vir_hf.recipe.load import load_recipe
    from vir_hf.training.run import train

    changes = {"training.max_steps": 1, "training.global_batch_size": world_size}
    train(load_recipe(scenarios.overrides(root, output_dir, "full", **changes)))
    (output_dir / f"opened-{rank}.json").write_text(json.dumps(opened), encoding="utf-8")


def main(root: Path, output_dir: Path, world_size: int, port: str) -> int:
    output_dir.mkdir(parents=True, exist_ok=True)
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run_rank(root, output_dir, rank, world_size, port)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
