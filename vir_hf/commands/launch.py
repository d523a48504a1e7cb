"""`vir-hf launch`: train on this machine's GPUs through accelerate, or on the CPU where there are none."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

from vir_hf import console
from vir_hf.recipe.load import RecipeArgumentParser, recipe_from
from vir_hf.recipe.requirements import check_requirements


def main(argv: Sequence[str] | None = None) -> int:
    """Print the accelerate command and run it; returns its exit code."""
    parser = RecipeArgumentParser(
        prog="vir-hf launch",
        description="Find the GPUs, choose an accelerate config by model and machine where none is named, print the command "
        "and run it. Recipe and overrides are as for vir-hf train.",
        can_resume=True,
    )
    parser.add_argument("--config", help="a config of accelerate_configs (zero2, multi_gpu, ...) or a file")
    parser.add_argument("--num-gpus", default="all", help="how many GPUs, or all (default); 0 trains on the CPU")
    parser.add_argument("--port", type=int, help="where the processes meet (29500, or a free one if that is taken)")
    parser.add_argument("--dry-run", action="store_true", help="print the command only")
    options = parser.parse_args(argv)
    if options.num_gpus != "all" and not options.num_gpus.isdigit():
        parser.error(f"--num-gpus {options.num_gpus}: expected a number or all")

    recipe = recipe_from(options)
    num_gpus = None if options.num_gpus == "all" else int(options.num_gpus)
    check_requirements(recipe, world_size=num_gpus or 1)
    from vir_hf.training.launching import compose
    from vir_hf.training.preflight import choose_port

    found, gpu_bytes = gpus()
    if num_gpus is None:
        check_requirements(recipe, world_size=max(1, found))
    arguments = list(options.overrides)
    for name in ("recipe", "recipes_dir"):
        value = getattr(options, name)
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", value]
    launch = compose(
        recipe,
        arguments,
        config=options.config,
        num_gpus=num_gpus,
        found_gpus=found,
        gpu_bytes=gpu_bytes,
        port=choose_port(options.port),
    )
    print(f"{launch.reason}\n{launch}", flush=True)
    if options.dry_run:
        return 0
    with tempfile.TemporaryDirectory(prefix="vir_hf_launch_") as left:
        environment = {**os.environ, **launch.environment, console.ERRORS_VARIABLE: left}
        process = subprocess.Popen(launch.words, env=environment)
        with _passed_on(process):
            code = process.wait()
        errors = console.collected_errors(left)
    for message, _ in errors:  # behind what the launchers say of processes that have failed
        console.print_error(message, code)
    return errors[0][1] if errors and code else code


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
