"""The memory of one rank at every moment of a step, and the choices that follow from it."""

# Over 400 lines: one estimate in one place: every term of the sum reads the same shapes.

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from vir_hf.budget import activations, compute, hardware
from vir_hf.budget.activations import Numerics
from vir_hf.budget.hardware import GIB, Device
from vir_hf.budget.layouts import LAYOUTS, Layout, bucket_bytes, gathered_bytes
from vir_hf.budget.shapes import describe
from vir_hf.data.statistics import DatasetStatistics
from vir_hf.errors import RecipeError
from vir_hf.llava.modeling_llava import LlavaModel
from vir_hf.model.precision import precision_on
from vir_hf.recipe.rules import global_batch_size

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe

# What a process takes before it holds a tensor: CUDA's context on a GPU; Python with torch, transformers and TRL on a CPU.
CUDA_CONTEXT_BYTES = GIB // 2
CPU_PROCESS_BYTES = 600 * 2**20
# cuBLAS keeps a workspace inside what torch counts as allocated.
_CUBLAS_WORKSPACE_BYTES = 32 * 2**20
# The caching allocator rounds and fragments: this share of what comes and goes within a step.
_FRAGMENTATION = 0.05
# Checkpointing is left off only if that much of the memory stays free.
SPARE = 0.10

# Bytes an optimizer keeps for a trained weight.
_OPTIMIZER_BYTES = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "adamw_anyprecision": 8.0,
    "adamw_torch_8bit": 2.06,
    "adamw_torch_4bit": 1.06,
    "adamw_8bit": 2.03,
    "adamw_bnb_8bit": 2.03,
    "paged_adamw_32bit": 8.0,
    "paged_adamw_8bit": 2.03,
    "lion_32bit": 4.0,
    "paged_lion_32bit": 4.0,
    "lion_8bit": 1.02,
    "paged_lion_8bit": 1.02,
    "ademamix": 12.0,
    "adafactor": 0.05,
    "sgd": 0.0,
    "adagrad": 4.0,
    "rmsprop": 4.0,
}
_ADAM_BYTES = 8.0


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, and the optimizer step it belongs to."""

    rows: int
    tokens: int
    supervised: int
    images: int
    step_images: int
    num_micro_batches: int


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device (GPU, or process on a CPU).

    Attributes:
        parts: every part at its own largest.
        moments: sums of the parts that live at once; the largest is the peak.
        overhead: what the device loses besides: context or process, and fragmentation.
        host: bytes in host memory for each rank, where the optimizer is offloaded.
    """

    parts: dict[str, int]
    moments: dict[str, int]
    overhead: int
    host: int = 0

    @property
    def peak(self) -> int:
        """The largest moment: what `torch.cuda.max_memory_allocated` would show on a GPU."""
        return max(self.moments.values())

    @property
    def required(self) -> int:
        """What the device has to have free; on a CPU this is the resident memory."""
        return self.peak + self.overhead


@dataclass(frozen=True)
class _Flow:
    """Bytes of a micro-batch: held until the backward pass, one block's, autocast's copies, gradients in a block, ..."""

    held: float
    one_block: float
    casts: float
    backward: float
    head: float
    tower: float
    features: float


@dataclass(frozen=True)
class Choice:
    """An accelerate config, whether activations are recomputed and why, and what one rank then needs."""

    layout: Layout
    checkpointing: bool
    reason: str
    estimate: Estimate


class Estimator:
    """One recipe on one kind of device; answers for any micro-batch, with and without checkpointing, on any layout."""

    def __init__(
        self,
        recipe: Recipe,
        device: Device,
        num_nodes: int = 1,
        gpus_per_node: int = 1,
        dataset_statistics: DatasetStatistics | None = None,
        config: str | None = None,
    ):
        self.recipe, self.device = recipe, device
        self.num_nodes, self.gpus_per_node = num_nodes, gpus_per_node
        self.statistics, self.config = dataset_statistics, config
        self.world_size = num_nodes * gpus_per_node
        dtype, self.has_autocast = _precision(recipe, device)
        self.precision = str(dtype).removeprefix("torch.") + (" autocast" if self.has_autocast else "")
        if recipe.quantization.bits and recipe.quantization.only_on_cuda and device.kind == "cpu":
            recipe = _without_quantisation(recipe)
        self.is_quantised = recipe.quantization.bits is not None
        self.model = describe(recipe, dtype)
        self.element_bytes = dtype.itemsize
        self.rows_per_step = global_batch_size(recipe, self.world_size)
        self.layouts = tuple(self._layouts(config))

    def with_recipe(self, recipe: Recipe) -> Estimator:
        """The same machines and rows with another recipe."""
        return Estimator(recipe, self.device, self.num_nodes, self.gpus_per_node, self.statistics, self.config)

    def _layouts(self, config: str | None) -> Iterator[Layout]:
        """The accelerate configs to choose from, the preferred one first: the one named, or all that this many ranks use."""
        if config is not None:
            if config not in {layout.name for layout in LAYOUTS}:
                names = ", ".join(layout.name for layout in LAYOUTS)
                raise RecipeError(f"--config {config}: unknown; expected one of {names}.")
            yield next(layout for layout in LAYOUTS if layout.name == config)
            return
        for layout in LAYOUTS:
            if layout.is_single == (self.world_size == 1) and (layout.takes_quantised or not self.is_quantised):
                yield layout

    def numerics(self, layout: Layout) -> Numerics:
        """The types a run computes in; DeepSpeed and FSDP2 hand the model 16-bit weights, so that nothing is cast."""
        trains_fully = any(linear.how == "full" for linear in self.model.text.linears)
        has_autocast = self.has_autocast and not layout.computes_in_16bit
        stream = 4 if has_autocast and trains_fully else self.element_bytes
        return Numerics(
            stream_bytes=stream,
            compute_bytes=self.element_bytes,
            autocast=has_autocast,
            is_quantised=self.is_quantised,
            on_cpu=self.device.kind == "cpu",
            fuses_head=self.device.kind == "cpu" and self.recipe.training.fused_head,
            is_lean=self.recipe.training.lean_layers and not layout.shards_weights,
            lora_dropout=bool(self.recipe.lora.arguments.get("lora_dropout")),
        )

    def tower_numerics(self, layout: Layout) -> Numerics:
        """The same for the tower, which is never quantised and whose blocks are transformers' own."""
        return replace(self.numerics(layout), is_quantised=False, is_lean=False)

    def batch(self, num_rows: int | None = None) -> Batch:
        """The largest micro-batch to expect; by default of as many rows (or tokens) as the recipe says."""
        training, statistics = self.recipe.training, self.statistics
        rank_rows = max(1, self.rows_per_step // self.world_size)
        max_length = int(training.max_length or 2048)
        row_tokens = statistics.max_tokens if statistics else max_length
        budget = training.max_tokens_per_batch
        if num_rows is None and budget:
            tokens = int(budget)
            mean = statistics.mean_tokens if statistics else max_length
            rows = max(1, min(rank_rows, round(tokens / mean)))
        else:
            rows = min(num_rows or int(training.per_device_train_batch_size), rank_rows)
            tokens = statistics.longest(rows) if statistics and training.padding_free else rows * row_tokens
        images = math.ceil(rows * (max(1.0, statistics.images_per_row) if statistics else 1))
        most_images = tokens // self.model.num_image_tokens
        text = max(tokens - images * self.model.num_image_tokens, rows)
        supervised = text
        if statistics and statistics.mean_supervised_tokens is not None:
            supervised = min(text, math.ceil(tokens * statistics.mean_supervised_tokens / statistics.mean_tokens))
        return Batch(
            rows=rows,
            tokens=tokens,
            supervised=supervised,
            images=min(images, max(most_images, 1)),
            step_images=math.ceil(rank_rows * (statistics.images_per_row if statistics else 1)),
            num_micro_batches=math.ceil(rank_rows / rows),
        )

    def estimate(self, batch: Batch, checkpointing: bool, layout: Layout | None = None) -> Estimate:
        """Return the memory of one rank; of the preferred accelerate config if none is given."""
        layout = layout or self.layouts[0]
        kept, gradients = self._persistent(layout), self._gradients(layout)
        buckets = bucket_bytes(layout, self.model.count(is_trained=True), self._ranks(layout))
        num_views = batch.step_images * self.model.views_per_image
        pixels = num_views * 3 * self.model.image_size**2 * 4  # a step's pictures arrive together, in fp32
        flow = self._flow(batch, checkpointing, layout)
        at_work = flow.one_block if checkpointing else 0.0
        parts = {
            **kept,
            "gradients": gradients,
            "gradient buckets": buckets,
            "pixel values of the step": pixels,
            "vision tower at work": flow.tower,
            "activations": flow.held + at_work,
            "inside the backward pass": flow.backward,
            "logits": flow.head,
        }
        base = sum(kept.values()) + buckets + pixels
        carried = gradients if batch.num_micro_batches > 1 else 0.0
        moments = {
            "tower": base + carried + flow.tower,
            "loss": base + carried + flow.held + flow.casts + flow.head,
            "start of the backward pass": base + carried + flow.held + at_work + flow.backward,
            "end of the backward pass": base + gradients + flow.features + flow.one_block + flow.backward,
            "optimizer step": base + gradients + self._optimizer_scratch(layout),
        }
        overhead = CPU_PROCESS_BYTES
        if self.device.kind == "cuda":
            overhead = CUDA_CONTEXT_BYTES + round(_FRAGMENTATION * (max(moments.values()) - base))
        return Estimate(
            {name: round(size) for name, size in parts.items()},
            {name: round(size) for name, size in moments.items()},
            overhead,
            self._host(layout),
        )

    def _flow(self, batch: Batch, checkpointing: bool, layout: Layout) -> _Flow:
        """What comes and goes within a micro-batch."""
        model, numerics = self.model, self.numerics(layout)
        text, vision = model.text, model.vision
        casts = activations.cast_weights(text, numerics, model.rank)
        saved = activations.saved_per_token(text, numerics, model.rank, checkpointing=checkpointing)
        one_block = casts + batch.tokens * sum(saved.values())
        num_views = batch.images * model.views_per_image
        tower_tokens = num_views * model.num_tower_tokens
        features = batch.images * activations.features_per_image(model, numerics)
        held = features + activations.outside_blocks(model, numerics, batch.tokens, batch.supervised)
        if checkpointing:  # the blocks' inputs alone
            held += text.num_run * batch.tokens * text.hidden_size * numerics.stream_bytes
            held += vision.num_trained * tower_tokens * vision.hidden_size * numerics.compute_bytes
        else:
            saved_in_tower = activations.saved_per_token(vision, self.tower_numerics(layout), model.rank)
            held += text.num_run * one_block + vision.num_trained * tower_tokens * sum(saved_in_tower.values())
        dequantised = text.largest_linear * numerics.compute_bytes if self.is_quantised else 0
        is_cached = bool(self.recipe.training.feature_cache)
        return _Flow(
            held=held,
            one_block=one_block,
            # Autocast keeps its copies of all blocks until the loss is there; without checkpointing they are held anyway.
            casts=text.num_run * casts if checkpointing else 0.0,
            backward=batch.tokens * activations.backward_per_token(text, numerics) + dequantised,
            head=activations.head_bytes(model, numerics, batch.supervised),
            tower=0.0 if is_cached else self._views_at_once(num_views) * activations.tower_per_view(model, numerics),
            features=features,
        )

    def _views_at_once(self, num_views: int) -> int:
        """Views that pass the tower together: all of a micro-batch, or a chunk of them if it is frozen."""
        return num_views if self.model.vision.num_trained else min(num_views, LlavaModel.views_per_chunk)

    def _ranks(self, layout: Layout) -> int:
        return 1 if layout.is_single else self.world_size

    def _persistent(self, layout: Layout) -> dict[str, float]:
        """Bytes that stay from step to step: weights by kind, the optimizer's states, gathered weights, workspace."""
        model, ranks = self.model, self._ranks(layout)
        weights: dict[str, float] = {}
        for group in model.weights:
            name = "adapter" if group.is_adapter else f"{group.part.replace('_', ' ')}, {group.storage}"
            size = group.num_bytes
            if layout.is_deepspeed and group.storage == "float32":
                size = group.num_weights * self.element_bytes
                name = name.replace("float32", self.precision.split()[0])
            weights[name] = weights.get(name, 0.0) + size / (ranks if layout.shards_weights else 1)
        trained = model.count(is_trained=True)
        states = trained * (self.optimizer_bytes() + (4 if layout.is_deepspeed else 0))
        if layout.offloads_optimizer:
            states = 0.0
        kept = {**weights, "optimizer": states / (ranks if layout.shards_optimizer else 1)}
        if layout.shards_weights and ranks > 1:
            kept["gathered weights"] = gathered_bytes(layout, model)
        if self.device.kind == "cuda":
            kept["cuBLAS workspace"] = _CUBLAS_WORKSPACE_BYTES
        elif self.is_quantised and model.file_dtype == self.precision.split()[0]:
            # Weights of the file's own type stay mapped, and with them the pages that quantising read.
            read = sum(group.num_weights for group in model.weights if group.is_quantised)
            kept["file pages of quantised weights"] = read * self.element_bytes
        return kept

    def _gradients(self, layout: Layout) -> float:
        trained = self.model.count(is_trained=True)
        if layout.offloads_optimizer:
            return 0.0
        element = 2 if layout.is_deepspeed and self.element_bytes == 2 else 4
        return trained * element / (self._ranks(layout) if layout.shards_gradients else 1)

    def _optimizer_scratch(self, layout: Layout) -> float:
        trained = self.model.count(is_trained=True)
        if layout.offloads_optimizer:
            return 0.0
        if layout.is_deepspeed:
            return 4.0 * trained / self._ranks(layout)  # the gradients of this rank's share in fp32
        if self.optimizer == "adamw_torch" and self.device.kind == "cuda":
            return 4.0 * trained  # torch's foreach variant keeps one temporary for every weight; the fused one none
        return 0.0

    def _host(self, layout: Layout) -> int:
        if not layout.offloads_optimizer:
            return 0
        return round(self.model.count(is_trained=True) * (4 + 4 + self.optimizer_bytes()) / self._ranks(layout))

    @property
    def optimizer(self) -> str:
        """The optimizer's word; paged ones need a GPU and become plain AdamW on a CPU, as in training."""
        name = str(self.recipe.training.arguments.get("optim") or "adamw_torch_fused")
        return "adamw_torch" if self.device.kind == "cpu" and name.startswith("paged_") else name

    def optimizer_bytes(self) -> float:
        """Bytes of optimizer states for a trained weight."""
        return _OPTIMIZER_BYTES.get(self.optimizer, _ADAM_BYTES)

    def settle(self, memory_bytes: int) -> Choice:
        """The first accelerate config in which the recipe's micro-batch fits, else the one that comes nearest."""
        choices = []
        for layout in self.layouts:
            batch = self.batch()
            checkpointing, reason = self.choose_checkpointing(memory_bytes, layout)
            choices.append(Choice(layout, checkpointing, reason, self.estimate(batch, checkpointing, layout)))
            if choices[-1].estimate.required <= memory_bytes:
                return choices[-1]
        return min(choices, key=lambda choice: choice.estimate.required)

    def choose_checkpointing(self, memory_bytes: int, layout: Layout | None = None) -> tuple[bool, str]:
        """Whether activations are recomputed, and why: the recipe's word, else off if a tenth of the memory stays free."""
        said = self.said_checkpointing
        if said is not None:
            return said, "as the recipe says"
        without = self.estimate(self.batch(), checkpointing=False, layout=layout).required
        if without <= memory_bytes * (1 - SPARE):
            return False, "memory to spare"
        return True, f"without it {without / GIB:.1f} GiB"

    @property
    def said_checkpointing(self) -> bool | None:
        """`training.activation_checkpointing`; `None` leaves it to the memory there is."""
        said = self.recipe.training.arguments.get("activation_checkpointing")
        return None if said is None else bool(said)

    def largest_micro_batch(self, memory_bytes: int, layout: Layout | None = None) -> int:
        """The most rows of a micro-batch that fit, at most the rank's share of a step; 0 if one row does not."""
        checkpointing = self.said_checkpointing is not False
        low, high = 0, max(1, self.rows_per_step // self.world_size)
        while low < high:
            middle = (low + high + 1) // 2
            if self.estimate(self.batch(middle), checkpointing, layout).required <= memory_bytes:
                low = middle
            else:
                high = middle - 1
        return low

    def step_compute(self, batch: Batch, checkpointing: bool) -> compute.StepCompute:
        """Tokens and floating-point operations of one rank's share of a step, with rows of mean length."""
        statistics, training = self.statistics, self.recipe.training
        rows = self.rows_per_step / self.world_size
        row_tokens = statistics.mean_tokens if statistics else float(training.max_length or 2048)
        images = rows * (statistics.images_per_row if statistics else 1.0)
        computed = row_tokens
        if not training.padding_free:
            computed = float(statistics.max_tokens if statistics else row_tokens)  # padded to the longest
        supervised = rows * (batch.supervised / batch.tokens) * row_tokens
        return compute.step_compute(
            self.model,
            rows=rows,
            row_tokens=computed,
            supervised=supervised,
            images=0.0 if training.feature_cache else images,
            projected_images=images,
            checkpointing=checkpointing,
        )

    def rate(self) -> tuple[float | None, str]:
        """TFLOP/s that training is taken to reach on this device, if it is known, and where the number comes from."""
        share, peak = hardware.ASSUMED_UTILISATION, self.device.tflops
        if not peak:
            return None, "the device's rate is not known: add --gpu NAME, --tflops RATE or --measure"
        return peak * share, f"{share:.0%} of {peak:g} TFLOP/s ({self.device.label})"

    def notes(self) -> Iterator[str]:
        """What the reader has to know about how the numbers came about."""
        yield from (f"sizes from {source}" for source in self.model.sources)
        if self.statistics is None:
            yield (
                f"no rows were counted: every row is taken to have training.max_length={self.recipe.training.max_length} "
                "tokens and one picture, all its text supervised"
            )
        else:
            yield f"rows: {self.statistics.source}"
        if self.model.views_per_image > 1:
            views, tokens = self.model.views_per_image, self.model.num_image_tokens
            yield f"every image is taken to have all of its {views} views, {tokens} tokens"
        if self.optimizer not in _OPTIMIZER_BYTES:
            yield f"training.optim={self.optimizer} is not in the planner's table; counted as AdamW, 8 bytes a weight"
        if self.recipe.model.adapter:
            yield "model.adapter: counted with the recipe's lora section, its own rank is not read"
        if self.recipe.lora.arguments.get("use_dora"):
            yield "DoRA keeps more activations than LoRA; the estimate does not count them"
        if self.recipe.quantization.only_on_cuda and self.recipe.quantization.bits and self.device.kind == "cpu":
            yield "no quantisation on a CPU (quantization.only_on_cuda)"


def _precision(recipe: Recipe, device: Device) -> tuple[torch.dtype, bool]:
    """The dtype of weights that do not learn, and whether computation is cast."""
    said = recipe.training.arguments
    chosen = precision_on(
        recipe.model.dtype,
        said.get("bf16"),
        said.get("fp16"),
        gpu=None if device.kind == "cpu" else device.label,
        has_bf16=device.has_bf16,
    )
    return chosen.dtype, chosen.autocast is not None


def _without_quantisation(recipe: Recipe) -> Recipe:
    return replace(recipe, quantization=replace(recipe.quantization, arguments={}))
