"""Floating-point operations of an optimizer step, from the sizes of its matrices."""

from __future__ import annotations

from dataclasses import dataclass

from vir_hf.budget.shapes import BlockShape, LinearShape, ModelShape


@dataclass(frozen=True)
class StepCompute:
    """One rank's share of a step.

    Attributes:
        tokens: that pass the language model.
        useful: operations the gradients need; model FLOP utilisation divides these by the time.
        computed: those, and what checkpointing computes again.
    """

    tokens: float
    useful: float
    computed: float


def step_compute(
    model: ModelShape,
    *,
    rows: float,
    row_tokens: float,
    supervised: float,
    images: float,
    projected_images: float,
    checkpointing: bool,
) -> StepCompute:
    """Return the operations of `rows` rows: a multiplication and an addition are two.

    Args:
        supervised: positions that reach the head.
        images: pictures that pass the tower; 0 with cached features.
        projected_images: pictures that pass the projector.
    """
    tokens = rows * row_tokens
    # Causal attention: half of all pairs, twice (scores and values).
    pairs = 2 * 2 * row_tokens / 2 * model.text.query_size
    forward, backward = _linear_passes(model.text, model.rank)
    blocks_forward = model.text.num_run * tokens * (forward + pairs)
    blocks_backward = model.text.num_run * tokens * (backward + 2 * pairs)
    head = 2 * supervised * model.text.hidden_size * model.vocab_size
    head_passes = 1 + 1 + (1 if model.head_is_trained else 0)
    projector = 2 * projected_images * model.num_image_tokens * model.count(part="projector", is_trained=True)
    tower_pairs = 2 * 2 * model.num_tower_tokens * model.vision.query_size
    tower_tokens = images * model.views_per_image * model.num_tower_tokens
    tower_forward, tower_backward = _linear_passes(model.vision, model.rank)
    trained_tower = model.vision.num_trained
    tower = model.vision.num_run * tower_tokens * (2 * model.vision.weight_count + tower_pairs)
    tower += trained_tower * tower_tokens * (tower_backward + 2 * tower_pairs)
    useful = blocks_forward + blocks_backward + head * head_passes + 3 * projector + tower
    again = blocks_forward if checkpointing else 0.0
    if checkpointing and trained_tower:
        again += trained_tower * tower_tokens * (tower_forward + tower_pairs)
    # TRL's fused head computes its logits a second time in the backward pass.
    return StepCompute(tokens, useful, useful + again + head)


def _linear_passes(block: BlockShape, rank: int) -> tuple[float, float]:
    """Operations a token of one block's linear layers, forward and backward."""
    forward = sum(2 * _weights(linear, rank) for linear in block.linears)
    inputs = forward
    weights = sum(
        2 * (_weights(linear, rank) if linear.how == "full" else rank * (linear.in_features + linear.out_features))
        for linear in block.linears
        if linear.how != "frozen"
    )
    return forward, inputs + weights


def _weights(linear: LinearShape, rank: int) -> int:
    adapter = rank * (linear.in_features + linear.out_features) if linear.how == "lora" else 0
    return linear.in_features * linear.out_features + adapter
