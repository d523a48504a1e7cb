"""How engines share a run out over ranks: what one rank holds and what crosses the network, for each accelerate config.

Sizes of buckets and buffers are the defaults of DeepSpeed and PyTorch, which the packaged configs leave as they are.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from vir_hf.budget.shapes import ModelShape


@dataclass(frozen=True)
class Layout:
    """One file of accelerate_configs/, as far as memory is concerned.

    Attributes:
        shards_weights, shards_gradients, shards_optimizer: a rank holds one share in as many as there are ranks.
        is_deepspeed: all weights are held in 16 bit; fp32 masters belong to the optimizer.
        computes_in_16bit: the model is handed 16-bit weights, so autocast has nothing to cast.
        offloads_optimizer: masters, optimizer states and reduced gradients live in host memory.
        takes_quantised: 4 and 8 bit weights can be trained this way.
    """

    name: str
    shards_weights: bool = False
    shards_gradients: bool = False
    shards_optimizer: bool = False
    is_deepspeed: bool = False
    computes_in_16bit: bool = False
    offloads_optimizer: bool = False
    takes_quantised: bool = True
    is_single: bool = False


SINGLE = Layout("single_gpu", is_single=True)
DDP = Layout("multi_gpu")
# In the order in which they are preferred: each is slower than the one before it where both fit.
LAYOUTS = (
    SINGLE,
    DDP,
    Layout("zero2", shards_gradients=True, shards_optimizer=True, is_deepspeed=True, computes_in_16bit=True),
    Layout(
        "zero3",
        shards_weights=True,
        shards_gradients=True,
        shards_optimizer=True,
        is_deepspeed=True,
        computes_in_16bit=True,
        takes_quantised=False,
    ),
    Layout(
        "fsdp2",
        shards_weights=True,
        shards_gradients=True,
        shards_optimizer=True,
        computes_in_16bit=True,
        takes_quantised=False,
    ),
    Layout(
        "zero2_offload",
        shards_gradients=True,
        shards_optimizer=True,
        is_deepspeed=True,
        computes_in_16bit=True,
        offloads_optimizer=True,
    ),
)


def layout_of_this_run() -> Layout:
    """The engine that `accelerate launch` has set this process up for, read from its environment."""
    named = {layout.name: layout for layout in LAYOUTS}
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
            return named["zero3"]
        is_offloaded = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") != "none"
        return named["zero2_offload" if is_offloaded else "zero2"]
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return named["fsdp2"]
    return SINGLE if int(os.environ.get("WORLD_SIZE", "1")) == 1 else DDP


# DeepSpeed's reduce_bucket_size and stage3_max_live_parameters, in elements.
_REDUCE_BUCKET, _MAX_LIVE_PARAMETERS = 500_000_000, 1_000_000_000


def bucket_bytes(layout: Layout, num_trained: int, world_size: int) -> int:
    """Bytes of buffers through which gradients are reduced."""
    if layout.is_single or world_size == 1 and not layout.is_deepspeed:
        return 0
    if layout.name == DDP.name:
        return 4 * num_trained  # buckets are copies: gradient_as_bucket_view is off
    if layout.is_deepspeed:
        # The bucket is allocated whole; gradients wait in .grad until it is full.
        return 2 * _REDUCE_BUCKET + 2 * min(num_trained, _REDUCE_BUCKET)
    return 0


def gathered_bytes(layout: Layout, model: ModelShape) -> int:
    """Bytes of whole weights that a rank holds for a moment although they are shared out."""
    if not layout.shards_weights:
        return 0
    if layout.is_deepspeed:
        return 2 * min(model.count(), _MAX_LIVE_PARAMETERS)
    # FSDP2: the block at work and the next one; what belongs to no block (embeddings, head, projector) stays for the step.
    block = max(model.text.weight_count, model.vision.weight_count)
    in_blocks = model.text.weight_count * model.text.num_blocks + model.vision.weight_count * model.vision.num_blocks
    return 2 * (2 * block + max(model.count() - in_blocks, 0))


def communication_bytes(layout: Layout, model: ModelShape, world_size: int, num_micro_batches: int) -> int:
    """Bytes one rank sends in an optimizer step, with ring algorithms."""
    if world_size == 1 or layout.is_single:
        return 0
    share = (world_size - 1) / world_size
    trained, everything = model.count(is_trained=True), model.count()
    if layout.name == DDP.name:
        return round(2 * share * 4 * trained)  # one all-reduce a step, with the last micro-batch
    if layout.shards_weights:
        # Weights are gathered for the forward and for the backward pass of every micro-batch.
        gather = 2 * share * 2 * everything * num_micro_batches
        reduce = share * 2 * trained * num_micro_batches
        return round(gather + reduce)
    reduce = share * 2 * trained * num_micro_batches
    return round(reduce + share * 2 * trained)
