"""`vir-hf launch`: train on this machine's GPUs through accelerate, or on the CPU where there are none."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Print the accelerate command and run it; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="vir-hf launch",
        description="Find the GPUs, choose an accelerate config by model and machine where none is named, print the command "
        "and run it. Everything after the options is as for vir-hf train.",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="experiment=NAME and section.key=value")
    parser.add_argument("--config", help="a config of accelerate_configs (zero2, multi_gpu, ...) or a file")
    parser.add_argument("--num-gpus", default="all", help="how many GPUs, or all (default); 0 trains on the CPU")
    parser.add_argument("--port", type=int, help="where the processes meet (29500, or a free one if that is taken)")
    parser.add_argument("--recipe", help="a recipe.yaml that a run has written")
    parser.add_argument("--recipes-dir", help="a folder of your own recipes")
    parser.add_argument(
        "--resume", nargs="?", const="auto", help="go on from the newest whole checkpoint, or from this one"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command only")
    options = parser.parse_args(argv)
    if options.num_gpus != "all" and not options.num_gpus.isdigit():
        parser.error(f"--num-gpus {options.num_gpus}: expected a number or all")

    from vir_hf.recipe import load_recipe

    recipe = load_recipe(options.overrides, recipe_file=options.recipe, recipes_dir=options.recipes_dir)
    from vir_hf.launching import compose
    from vir_hf.preflight import choose_port

    found, gpu_bytes = gpus()
    arguments = list(options.overrides)
    for name in ("recipe", "recipes_dir", "resume"):
        value = getattr(options, name)
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", value]
    launch = compose(
        recipe,
        arguments,
        config=options.config,
        num_gpus=None if options.num_gpus == "all" else int(options.num_gpus),
        found_gpus=found,
        gpu_bytes=gpu_bytes,
        port=choose_port(options.port),
    )
    print(f"{launch.reason}\n{launch}", flush=True)
    if options.dry_run:
        return 0
    process = subprocess.Popen(launch.words, env={**os.environ, **launch.environment})
    with _passed_on(process):
        return process.wait()


@contextlib.contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """SIGTERM to this command goes to the launch; Ctrl-C reaches both through the terminal, and the launch decides."""

    def pass_on(number: int, frame: object) -> None:
        process.send_signal(number)

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def gpus() -> tuple[int, int]:
    """How many CUDA GPUs there are, and the memory of the smallest in bytes."""
    import torch

    count = torch.cuda.device_count()
    return count, min((torch.cuda.get_device_properties(i).total_memory for i in range(count)), default=0)


if __name__ == "__main__":
    sys.exit(main())
