"""`vir-hf plan`: memory and time of a recipe, from configs alone."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from vir_hf.commands.outputs import add_json, add_overwrite, recipe_inputs, refuse_outputs, write_json
from vir_hf.recipe.load import RecipeArgumentParser, recipe_from

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from vir_hf.budget.plan import Plan
    from vir_hf.recipe.load import Recipe

_EPILOG = """\
examples:
  vir-hf plan experiment=t4_qlora --gpu t4
  vir-hf plan experiment=llava15_7b_lora --memory 24GB data.data_path=rows.json
  vir-hf plan experiment=cloud_gpu_scale --gpu a100-80 --nodes 2 --gpus-per-node 8 --json plan.json

Without --gpu and --memory the plan is for this machine. GB are 10^9 bytes, GiB are 2^30; tables show GiB.
docs/plan.md says how every number is made.
"""


def main(argv: list[str]) -> int:
    """Plan one recipe; return 0 if it fits and 1 if not."""
    parser = RecipeArgumentParser(
        prog="vir-hf plan",
        description="What a recipe needs, before any weight is downloaded: memory by part, the largest micro-batch, steps, time.",
        epilog=_EPILOG,
    )
    parser.add_argument("--memory", metavar="SIZE", help="of one device: 24GB, 23.5GiB, 800MB")
    parser.add_argument(
        "--gpu", metavar="NAME", help="t4, v100, 3090, 4090, a10g, l4, a100-40, a100-80, h100, h200, cpu"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default 1)")
    parser.add_argument("--gpus-per-node", type=int, default=1, metavar="M", help="GPUs in each (default 1)")
    parser.add_argument(
        "--config", metavar="NAME", help="a file of accelerate_configs; by default the preferred one that fits"
    )
    parser.add_argument("--tflops", type=float, metavar="RATE", help="TFLOP/s one device reaches in training")
    parser.add_argument("--measure", action="store_true", help="measure this machine's matrix multiplications for it")
    add_json(parser, "the plan")
    add_overwrite(parser)
    arguments = parser.parse_args(argv)
    for name in ("nodes", "gpus_per_node"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: found {getattr(arguments, name)}, expected 1 or more")
    if arguments.tflops is not None and arguments.tflops <= 0:
        parser.error(f"--tflops: found {arguments.tflops:g}, expected more than 0")
    recipe = recipe_from(arguments, require_data=False)
    inputs = recipe_inputs(recipe, arguments.recipe)
    refuse_outputs([("--json", arguments.json)], inputs, overwrite=arguments.overwrite)
    made = _plan(recipe, arguments)
    if arguments.json != "-":
        print_plan(made)
    write_json(arguments.json, {"plan": made.to_dict()})
    return 0 if made.fits else 1


def _plan(recipe: Recipe, arguments: Any) -> Plan:
    from vir_hf.budget import hardware
    from vir_hf.budget import plan as memory
    from vir_hf.budget.shapes import num_image_tokens
    from vir_hf.data.statistics import estimate_statistics
    from vir_hf.model.language_models import fit_to_language_model

    recipe = fit_to_language_model(recipe)
    statistics, _ = estimate_statistics(recipe, num_image_tokens(recipe))
    tflops, source = arguments.tflops, "stated with --tflops"
    if arguments.measure and tflops is None:
        device = hardware.this_device(use_cpu=arguments.gpu == "cpu")
        ceiling = hardware.measure_tflops(device)
        tflops = ceiling * hardware.ASSUMED_UTILISATION
        source = f"{hardware.ASSUMED_UTILISATION:.0%} of the {ceiling:.3g} TFLOP/s measured on {device.label}"
    return memory.plan(
        recipe,
        memory_bytes=hardware.parse_memory(arguments.memory) if arguments.memory else None,
        gpu=arguments.gpu,
        num_nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        dataset_statistics=statistics,
        config=arguments.config,
        tflops=tflops,
        tflops_source=source,
    )


def print_plan(made: Plan, console: Console | None = None) -> None:
    """Print the tables of a plan."""
    from rich.console import Console

    # A pipe has no width; rich would take 80 columns and break lines there.
    console = console or (Console() if sys.stdout.isatty() else Console(width=1000))
    checkpointing = f"activation checkpointing {'on' if made.checkpointing else 'off'} ({made.checkpointing_reason})"
    where = made.device
    if made.num_nodes * made.gpus_per_node > 1:
        where = f"{made.num_nodes} x {made.gpus_per_node} {made.device} with accelerate_configs/{made.config}.yaml"
    console.print(f"{made.experiment} on {where}: {made.precision}, {checkpointing}", highlight=False)
    console.print(_memory_table(made))
    verdict = f"{gib(made.estimate.required)} GiB of {gib(made.memory_bytes)} GiB: " + (
        "fits" if made.fits else "does not fit"
    )
    console.print(f"[bold]{verdict}[/bold]", highlight=False)
    console.print(_batch_line(made), highlight=False)
    if made.change is not None:
        console.print(f"Smallest change that fits ({made.change.note}):", highlight=False)
        console.print(f"  {' '.join(made.change.overrides)}    # {gib(made.change.required)} GiB", highlight=False)
    elif not made.fits:
        console.print("No change of the recipe that was tried fits: a larger device or more of them is needed.")
    console.print(_time_table(made))
    rate = f"at {made.tflops:.3g} TFLOP/s a device: " if made.tflops else ""
    console.print(f"{rate}{made.tflops_source}", highlight=False)
    if made.num_nodes * made.gpus_per_node > 1:
        console.print(_layout_table(made))
        beside = "" if made.step_seconds is None else f"a step computes for {duration(made.step_seconds)}; "
        console.print(f"{beside}what is sent meanwhile costs no time", highlight=False)
    for note in made.notes:
        console.print(f"- {note}", highlight=False)


def gib(num_bytes: float) -> str:
    """Bytes as GiB, with as many digits as matter."""
    size = num_bytes / 2**30
    return f"{size:.0f}" if size >= 100 else f"{size:.1f}" if size >= 10 else f"{size:.2f}"


def _memory_table(made: Plan) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("memory of one device")
    table.add_column("GiB", justify="right")
    for name, size in made.estimate.parts.items():
        if size >= 2**20:
            table.add_row(name, gib(size))
    peak = max(made.estimate.moments, key=lambda name: made.estimate.moments[name])
    table.add_row(f"peak, at the {peak}", gib(made.estimate.peak), style="bold")
    table.add_row(
        "Python and libraries" if made.device.startswith("CPU") else "CUDA context, fragmentation",
        gib(made.estimate.overhead),
    )
    return table


def _batch_line(made: Plan) -> str:
    batch = made.batch
    largest = (
        f"at most {made.largest_micro_batch} rows per micro-batch fit"
        if made.largest_micro_batch
        else "not even one row fits"
    )
    return (
        f"A micro-batch of {_counted(batch.rows, 'row')} holds up to {batch.tokens:,} tokens and "
        f"{_counted(batch.images, 'image')}; {largest}. "
        f"A step: {_counted(made.rows_per_step, 'row')}, {_counted(batch.num_micro_batches, 'micro-batch')} a rank."
    )


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 'es' if word.endswith('ch') else 's'}"


def _time_table(made: Plan) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("time", "rows", "tokens", "PFLOP", "duration"):
        table.add_column(column, justify="left" if column == "time" else "right")
    table.add_row(
        "a step",
        f"{made.rows_per_step:,}",
        f"{made.step_tokens:,.0f}",
        f"{made.step_flops / 1e15:,.3g}",
        duration(made.step_seconds),
    )
    if made.num_steps and made.epoch_flops is not None:
        table.add_row(
            f"an epoch of {made.num_steps:,} steps",
            f"{made.num_rows:,}",
            f"{made.epoch_tokens:,.0f}",
            f"{made.epoch_flops / 1e15:,.3g}",
            duration(made.epoch_seconds),
        )
    return table


def _layout_table(made: Plan) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("accelerate config", no_wrap=True)
    for column in ("GiB per rank", "fits", "GiB on the host", "GB sent a step", "time to send"):
        table.add_column(column, justify="right", no_wrap=True)
    for layout in made.layouts:
        if layout.required is None:
            table.add_row(layout.config, "-", layout.note)
            continue
        table.add_row(
            layout.config,
            gib(layout.required),
            "yes" if layout.fits else "no",
            gib(layout.host_bytes) if layout.host_bytes else "-",
            f"{layout.communication_bytes / 1e9:.2f}",
            duration(layout.communication_seconds),
        )
    return table


def duration(seconds: float | None) -> str:
    """Seconds in the unit a person would use."""
    if seconds is None:
        return "?"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
