"""Will it fit, and how long will it take: memory and time of a recipe, before any weight is downloaded.

`plan` answers in full; `will_it_fit` and `should_checkpoint` are the training page's two questions. Weights are counted on
a meta-device model with training's own code (`shapes`), activations by the tensors a block keeps (`activations`), and the
memory is the largest moment of a step (`estimator`); docs/plan.md derives every part.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vir_hf.budget import hardware
from vir_hf.budget.changes import Change, smallest_change
from vir_hf.budget.estimator import Batch, Choice, Estimate, Estimator
from vir_hf.budget.hardware import GIB, Device
from vir_hf.budget.layouts import LAYOUTS, communication_bytes, layout_of_this_run
from vir_hf.data.statistics import DatasetStatistics
from vir_hf.errors import RecipeError

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe


@dataclass(frozen=True)
class RankPlan:
    """One accelerate config: bytes a rank needs, and what crosses the network in a step."""

    config: str
    required: int | None
    fits: bool | None
    host_bytes: int = 0
    communication_bytes: int = 0
    communication_seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What a recipe needs; bytes, seconds, floating-point operations. Steps and epochs are over all devices."""

    experiment: str
    device: str
    memory_bytes: int
    precision: str
    config: str
    checkpointing: bool
    checkpointing_reason: str
    num_nodes: int
    gpus_per_node: int
    weights: tuple[dict[str, Any], ...]
    estimate: Estimate
    batch: Batch
    rows_per_step: int
    largest_micro_batch: int
    step_tokens: float
    step_flops: float
    model_flops: float
    step_seconds: float | None
    tflops: float | None
    tflops_source: str
    num_rows: int | None
    num_steps: int | None
    epoch_tokens: float | None
    epoch_flops: float | None
    epoch_seconds: float | None
    layouts: tuple[RankPlan, ...]
    change: Change | None
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.estimate.required <= self.memory_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        values = asdict(self)
        values["estimate"].update(peak=self.estimate.peak, required=self.estimate.required)
        values["fits"] = self.fits
        return values


def plan(
    recipe: Recipe,
    *,
    memory_bytes: int | None = None,
    gpu: str | None = None,
    num_nodes: int = 1,
    gpus_per_node: int = 1,
    dataset_statistics: DatasetStatistics | None = None,
    config: str | None = None,
    tflops: float | None = None,
    tflops_source: str = "stated",
) -> Plan:
    """Return what the recipe needs and whether it fits.

    Args:
        memory_bytes: of one device; by default what the device has in all.
        gpu: a name of `hardware.GPUS` or `cpu`; by default a bf16 GPU if `memory_bytes` is given, else this machine.
        dataset_statistics: lengths of the rows; without them every row is taken to have `training.max_length` tokens.
        config: a name of accelerate_configs/; by default the preferred one that fits.
        tflops: the rate one device reaches in training; by default a share of the data sheet's.

    Raises:
        RecipeError: a config that cannot be fetched, an unknown GPU, a batch the layout cannot deal out.
    """
    device = device_for(gpu, memory_bytes)
    estimator = Estimator(recipe, device, num_nodes, gpus_per_node, dataset_statistics, config)
    memory = memory_bytes or device.memory_bytes
    if not memory:
        raise RecipeError("plan: this machine does not say how much memory it has. Add --memory 24GB, or --gpu NAME.")
    choice = estimator.settle(memory)
    batch = estimator.batch()
    step = estimator.step_compute(batch, choice.checkpointing)
    rate, source = (tflops, tflops_source) if tflops else estimator.rate()
    seconds = step.computed / (rate * 1e12) if rate else None
    rows = dataset_statistics.num_rows if dataset_statistics else None
    steps = math.ceil(rows / estimator.rows_per_step) if rows else None
    epochs = rows / estimator.rows_per_step if rows else None  # the last step may hold fewer rows
    ranks = estimator.world_size
    return Plan(
        experiment=recipe.experiment.name,
        device=device.label,
        memory_bytes=memory,
        precision=estimator.precision,
        config=choice.layout.name,
        checkpointing=choice.checkpointing,
        checkpointing_reason=choice.reason,
        num_nodes=num_nodes,
        gpus_per_node=gpus_per_node,
        weights=tuple(asdict(group) for group in estimator.model.weights),
        estimate=choice.estimate,
        batch=batch,
        rows_per_step=estimator.rows_per_step,
        largest_micro_batch=estimator.largest_micro_batch(memory, choice.layout),
        step_tokens=step.tokens * ranks,
        step_flops=step.computed * ranks,
        model_flops=step.useful * ranks,
        step_seconds=seconds,
        tflops=rate,
        tflops_source=source,
        num_rows=rows,
        num_steps=steps,
        epoch_tokens=step.tokens * ranks * epochs if epochs else None,
        epoch_flops=step.computed * ranks * epochs if epochs else None,
        epoch_seconds=seconds * epochs if epochs and seconds else None,
        layouts=tuple(_rank_plans(estimator, memory, choice)),
        change=smallest_change(estimator, memory) if choice.estimate.required > memory else None,
        notes=tuple(estimator.notes()),
    )


def _rank_plans(estimator: Estimator, memory_bytes: int, choice: Choice) -> Iterator[RankPlan]:
    """One entry for each accelerate config that this many ranks can use."""
    batch = estimator.batch()
    link = estimator.device.link_gbps
    if estimator.num_nodes > 1:
        link = min(link, hardware.NODE_LINK_GBPS)
    for layout in LAYOUTS:
        if layout.is_single != (estimator.world_size == 1) and not layout.offloads_optimizer:
            continue
        if estimator.is_quantised and not layout.takes_quantised:
            bits = estimator.recipe.quantization.bits
            yield RankPlan(layout.name, None, None, note=f"not for {bits}-bit weights")
            continue
        checkpointing = estimator.choose_checkpointing(memory_bytes, layout)[0]
        estimate = estimator.estimate(batch, checkpointing, layout)
        sent = communication_bytes(layout, estimator.model, estimator.world_size, batch.num_micro_batches)
        yield RankPlan(
            layout.name,
            estimate.required,
            estimate.required <= memory_bytes,
            estimate.host,
            sent,
            sent / (link * 1e9),
        )


def will_it_fit(
    recipe: Recipe,
    *,
    dataset_statistics: DatasetStatistics | None = None,
    memory_bytes: int | None = None,
) -> str | None:
    """Return a warning that says what is too much and what to type, or `None` if there is room for this run.

    Meant for the moment before training loads its weights; ranks and engine are this process's own, and `memory_bytes`
    is by default what is free now.
    """
    device, memory, num_nodes, gpus_per_node, config = _this_run(recipe, memory_bytes)
    made = plan(
        recipe,
        memory_bytes=memory,
        gpu="cpu" if device.kind == "cpu" else None,
        num_nodes=num_nodes,
        gpus_per_node=gpus_per_node,
        dataset_statistics=dataset_statistics,
        config=config,
    )
    if made.fits:
        return None
    remedy = "No change of the recipe that was tried fits."
    if made.change is not None:
        remedy = f"This fits: {' '.join(made.change.overrides)} ({made.change.note})."
    return (
        f"this run needs about {made.estimate.required / GIB:.1f} GiB on {device.label}, {memory / GIB:.1f} GiB are free. "
        f"{remedy} `vir-hf plan experiment={recipe.experiment.name}` shows where the memory goes."
    )


def should_checkpoint(
    recipe: Recipe,
    *,
    dataset_statistics: DatasetStatistics | None = None,
    memory_bytes: int | None = None,
) -> bool:
    """Whether to recompute activations: what `training.activation_checkpointing` says, else unless memory is to spare.

    Every rank has to get the same answer, so it follows from the memory a device has in all, not from what is free.
    """
    said = recipe.training.arguments.get("activation_checkpointing")
    if said is not None:
        return bool(said)
    device, _, num_nodes, gpus_per_node, config = _this_run(recipe, memory_bytes)
    estimator = Estimator(recipe, device, num_nodes, gpus_per_node, dataset_statistics, config)
    return estimator.choose_checkpointing(memory_bytes or device.memory_bytes)[0]


def _this_run(recipe: Recipe, memory_bytes: int | None) -> tuple[Device, int, int, int, str]:
    """Device, memory to go by, nodes, ranks on each, and accelerate config of the process that asks.

    Several processes on one CPU share its memory.
    """
    device = hardware.this_device(use_cpu=bool(recipe.training.use_cpu))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = min(int(os.environ.get("LOCAL_WORLD_SIZE", str(world))), world)
    memory = memory_bytes or hardware.free_memory(device)
    if device.kind == "cpu" and memory_bytes is None:
        memory //= local
    return device, memory, world // local, local, layout_of_this_run().name


def device_for(gpu: str | None, memory_bytes: int | None) -> Device:
    """The device a plan is for: the one named, a bf16 GPU of the memory given, or this machine's."""
    if gpu is not None:
        return hardware.device_named(gpu)
    device = hardware.this_device()
    if memory_bytes is not None and device.kind == "cpu":
        return Device(f"a GPU of {memory_bytes / GIB:.1f} GiB", "cuda", memory_bytes, 0.0)
    return device
