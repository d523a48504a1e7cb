"""What one block keeps for its backward pass, tensor by tensor, and the memory around the blocks.

The tensors are those that transformers' blocks, PEFT's LoRA and torch's attention kernels save; `tests/test_memory.py`
counts them with autograd's own hooks and compares.
"""

from __future__ import annotations

from dataclasses import dataclass

from vir_hf.budget.shapes import BlockShape, ModelShape
from vir_hf.kernels.fused_head import CHUNK_ELEMENTS

# TRL scores supervised positions in tiles of this many tokens and vocabulary entries (trl.kernels, trl.trainer.utils).
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768


@dataclass(frozen=True)
class Numerics:
    """In what types a run computes.

    Attributes:
        stream_bytes: an element of the hidden states between blocks: 4 where the weights are fp32, else 2.
        compute_bytes: an operand of a matrix multiplication: 2 under autocast.
        autocast: whether operands are cast from another type.
        is_quantised: whether the language model's linear layers are 4 or 8 bit.
        on_cpu: dropout keeps a mask as wide as its input, and the head is scored by plain torch operations.
        fuses_head: on a CPU, those of `vir_hf.kernels.fused_head`.
        is_lean: norms and gated MLPs are those of `vir_hf.kernels.lean_layers`.
        lora_dropout: whether adapters drop inputs, which costs a mask and a copy for each adapted layer.
    """

    stream_bytes: int
    compute_bytes: int
    autocast: bool
    is_quantised: bool = False
    on_cpu: bool = False
    fuses_head: bool = False
    is_lean: bool = False
    lora_dropout: bool = False


def saved_per_token(
    block: BlockShape, numerics: Numerics, rank: int = 0, *, checkpointing: bool = False
) -> dict[str, float]:
    """Return the bytes a token that a block's backward pass needs and its forward pass has to keep, by what they are.

    Args:
        rank: of the adapters.
        checkpointing: the forward pass is the one made again for the backward pass, in which nothing is forgotten.
    """
    compute, stream = numerics.compute_bytes, numerics.stream_bytes
    if numerics.is_lean and block.is_rms_norm:
        norms = 2.0 * (stream * block.hidden_size + 4)
    else:
        # Norms compute in fp32: either the stream is fp32 already and is kept as it is, or its fp32 copy is kept.
        norms = 2.0 * (4 * block.hidden_size + (4 if block.is_rms_norm else 8))
        if block.trains_norms and block.is_rms_norm:
            norms += 2 * block.hidden_size * stream  # the normalised values, for the gradient of the scale
    attention = (block.query_size + 2 * block.key_size) * compute  # queries, keys, values
    attention += block.query_size * compute + 4 * block.num_heads  # the output and each row's log-sum-exp
    num_mlp_saved = 2 if numerics.is_lean and block.is_gated else block.num_mlp_saved
    return {
        "norms": norms,
        "attention": attention,
        "mlp": num_mlp_saved * block.mlp_size * compute,
        "linear inputs": _linear_inputs(block, numerics, forgets=numerics.is_lean and not checkpointing),
        "adapters": sum(rank * compute for linear in block.linears if linear.how == "lora"),
    }


def _linear_inputs(block: BlockShape, numerics: Numerics, *, forgets: bool) -> float:
    """Bytes a token of the inputs that linear layers keep for the gradients of their weights or adapters."""
    compute, total = numerics.compute_bytes, 0.0
    for reads in {linear.reads: None for linear in block.linears}:
        readers = [linear for linear in block.linears if linear.reads == reads]
        width = readers[0].in_features
        trained = [linear for linear in readers if linear.how == "full"]
        adapted = [linear for linear in readers if linear.how == "lora"]
        # A norm's output has the stream's type; attention and MLP put out what they compute in.
        source = numerics.stream_bytes if reads.endswith("input") else compute
        # The attention kernel keeps its output anyway; norm outputs and the MLP's product may be made again.
        is_kept = reads == "attention output"
        if forgets:
            is_kept |= block.is_gated if reads == "mlp product" else block.is_rms_norm
        is_shared = False
        if trained and source == compute:
            is_shared = True
        elif trained:
            total += len(trained) * width * compute  # autocast makes a copy for each
        if adapted:
            # PEFT casts to the adapter's fp32 first; over quantised weights not under CUDA's autocast.
            widens = source != 4 and not (numerics.is_quantised and not numerics.on_cpu)
            if numerics.lora_dropout:
                mask = (4 if widens else source) if numerics.on_cpu else 1
                total += len(adapted) * width * (mask + compute)
            elif widens or source != compute:
                total += len(adapted) * width * compute
            else:
                is_shared = True
        if is_shared and not is_kept:
            total += width * source
    return total


def cast_weights(block: BlockShape, numerics: Numerics, rank: int = 0) -> int:
    """Bytes of the 16-bit copies autocast makes of one block's fp32 weights; they live until the forward pass ends."""
    if not numerics.autocast:
        return 0
    return numerics.compute_bytes * _trained_per_block(block, rank)


def _trained_per_block(block: BlockShape, rank: int) -> int:
    return sum(
        linear.in_features * linear.out_features
        if linear.how == "full"
        else rank * (linear.in_features + linear.out_features)
        for linear in block.linears
        if linear.how != "frozen"
    )


def backward_per_token(block: BlockShape, numerics: Numerics) -> float:
    """Bytes a token of the gradients alive at once inside one block's backward pass, at its peak in the MLP."""
    widest = 3 if block.is_gated else 2
    total = widest * block.mlp_size * numerics.compute_bytes + 2 * block.hidden_size * numerics.stream_bytes
    adapted = [linear for linear in block.linears if linear.how == "lora" and linear.reads == "mlp product"]
    if adapted and numerics.autocast and not numerics.is_quantised:
        total += 4 * block.mlp_size  # the adapter's gradient comes back in fp32
    return total


def tower_per_view(model: ModelShape, numerics: Numerics) -> float:
    """Bytes a view takes while it passes a frozen tower without autograd: one block's tensors, freed at once."""
    vision, element = model.vision, numerics.compute_bytes
    mlp = 3 * vision.mlp_size + 2 * vision.hidden_size
    attention = 5 * vision.query_size + vision.hidden_size
    return model.num_tower_tokens * element * max(mlp, attention)


def features_per_image(model: ModelShape, numerics: Numerics) -> float:
    """Bytes an image's features keep through the step: the tower's, and what the projector keeps for its backward."""
    tower = model.vision_width * (numerics.compute_bytes + (4 if numerics.autocast else 0))
    projector = 3 * model.text.hidden_size * numerics.compute_bytes
    return model.views_per_image * model.num_tower_tokens * tower + model.num_image_tokens * projector


def outside_blocks(model: ModelShape, numerics: Numerics, tokens: int, supervised: int) -> float:
    """Bytes kept before and after the blocks: embeddings with the images merged in, the last norm, scored positions."""
    hidden = model.text.hidden_size
    merged = 2 * hidden * numerics.stream_bytes + hidden  # embeddings, merged, and the mask of what was overwritten
    last_norm = 4 * hidden + hidden * numerics.stream_bytes
    return tokens * (merged + last_norm) + supervised * hidden * numerics.stream_bytes


def head_bytes(model: ModelShape, numerics: Numerics, supervised: int) -> float:
    """Bytes the language-model head takes at its peak: one tile of logits, never all of them, and the gradients."""
    tile = min(supervised, TILE_TOKENS) * min(model.vocab_size, TILE_VOCABULARY)
    if numerics.fuses_head:  # logits and probabilities in fp32, and those in 16 bit
        logits = min(supervised * model.vocab_size, CHUNK_ELEMENTS) * (2 * 4 + numerics.compute_bytes % 4)
    elif numerics.on_cpu:  # TRL's plain torch path holds seven fp32 tensors of a tile's size beside it, and a mask
        logits = tile * (numerics.compute_bytes + 7 * 4 + 1)
    else:  # Triton turns the tile into its gradient in place
        logits = tile * numerics.compute_bytes
    gradient = supervised * model.text.hidden_size * 4
    if model.head_is_trained:
        gradient += 4 * model.vocab_size * model.text.hidden_size
    return logits + gradient
