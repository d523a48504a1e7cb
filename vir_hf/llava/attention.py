# SPDX-License-Identifier: Apache-2.0
"""Attention over the segments of one packed row: exact, without a dense mask, linear in the number of segments.

A packed row `(1, T)` is a sequence of segments. A segment attends causally to itself and, if it names a prefix segment,
to the whole of that prefix first, as if both had stood alone in a row. The layout travels to every attention layer as the
keyword `segment_layout` behind transformers' attention interface, under the name `SEGMENTS`. In place of a mask the
layers receive `segment_mask_sentinel()`, an empty 4-D tensor: any attention function that does not know about segments
fails on its shape instead of letting tokens of different rows see each other.
"""

# Over 400 lines: it is copied whole to the Hub, beside the model, which may import its siblings alone.

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SEGMENTS = "segments"


@dataclass(frozen=True)
class SegmentLayout:
    """Which tokens of a packed row belong together.

    Attributes:
        lengths: tokens in each segment, in order; they sum to the row's length.
        prefixes: for each segment the index of an earlier segment that comes before it, or -1.
        backend: `"auto"`, or one of `BACKENDS`.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    backend: str = "auto"
    _made: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, made by the first layer that asks for it and kept for the other layers."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.prefixes):
            raise ValueError(f"{len(self.lengths)} segment lengths but {len(self.prefixes)} segment prefixes")
        if any(length < 1 for length in self.lengths):
            raise ValueError(f"a segment holds at least one token, got lengths {self.lengths}")
        for index, prefix in enumerate(self.prefixes):
            if prefix != -1 and not (0 <= prefix < index and self.prefixes[prefix] == -1):
                raise ValueError(
                    f"segment {index} names segment {prefix} as its prefix; a prefix comes earlier in the row and has "
                    "no prefix itself"
                )

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The index of each segment's first token in the packed row."""
        starts, position = [], 0
        for length in self.lengths:
            starts.append(position)
            position += length
        return tuple(starts)

    @cached_property
    def key_lengths(self) -> tuple[int, ...]:
        """How many keys each segment sees: its prefix's tokens and its own."""
        return tuple(
            length + (self.lengths[prefix] if prefix >= 0 else 0)
            for length, prefix in zip(self.lengths, self.prefixes, strict=True)
        )

    @cached_property
    def pieces(self) -> tuple[tuple[slice, slice, bool], ...]:
        """Which queries meet which keys, and whether causally: each segment on itself, then neighbours on their shared prefix."""
        spans = [slice(start, start + length) for start, length in zip(self.starts, self.lengths, strict=True)]
        own = [(span, span, True) for span in spans]
        shared: list[tuple[slice, slice, bool]] = []
        for prefix, neighbours in groupby(range(len(spans)), key=lambda index: self.prefixes[index]):
            if prefix >= 0:
                indices = list(neighbours)
                shared.append((slice(spans[indices[0]].start, spans[indices[-1]].stop), spans[prefix], False))
        return (*own, *shared)

    def position_ids(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """`(1, T)`: the position each token would have if its row stood alone."""
        spans = [
            torch.arange(keys - length, keys, device=device)
            for length, keys in zip(self.lengths, self.key_lengths, strict=True)
        ]
        return torch.cat(spans).unsqueeze(0)

    def key_index(self, device: torch.device | str) -> torch.Tensor | None:
        """For kernels that read keys from one flat tensor: the token of every key, or `None` if nothing is shared."""
        if all(prefix == -1 for prefix in self.prefixes):
            return None
        spans = []
        for start, length, prefix in zip(self.starts, self.lengths, self.prefixes, strict=True):
            if prefix >= 0:
                spans.append(torch.arange(self.starts[prefix], self.starts[prefix] + self.lengths[prefix]))
            spans.append(torch.arange(start, start + length))
        return torch.cat(spans).to(device)


def segment_mask_sentinel(device: torch.device) -> torch.Tensor:
    """An empty mask that every mask builder passes through and every attention function but ours fails on."""
    return torch.empty((1, 1, 0, 0), device=device)


def use_segment_attention(language_model: PreTrainedModel) -> None:
    """Make `language_model` understand `segment_layout`; batches without it still run on sdpa.

    Permanent, because gradient checkpointing runs the attention again in the backward pass.
    """
    config = language_model.config
    if config._attn_implementation != SEGMENTS:
        config._attn_implementation = SEGMENTS


def _is_sentinel(attention_mask: torch.Tensor | None) -> bool:
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4 and attention_mask.numel() == 0


def segment_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segment_layout: SegmentLayout | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return attention over the segments of a packed row, or plain sdpa when the batch is not packed.

    Args:
        query: `(1, heads, T, head_dim)`; key and value `(1, kv_heads, T, head_dim)`.
        attention_mask: the sentinel for a packed row; any ordinary mask otherwise.
        sliding_window: how many of the latest positions a token sees, itself included.

    Returns:
        `(1, T, heads, head_dim)` and `None`.

    Raises:
        ValueError: the layer asks for something segments cannot honour (soft caps, sinks, a key-value cache, a mask).
    """
    if segment_layout is None:
        if _is_sentinel(attention_mask):
            raise ValueError(
                f"{type(module).__name__} did not pass `segment_layout` on to its attention, so rows of this batch would "
                "see each other. Set training.padding_free=false for this language model."
            )
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            **kwargs,
        )
    for unsupported in ("softcap", "s_aux", "position_bias", "cache"):
        if kwargs.get(unsupported) is not None:
            raise ValueError(
                f"{type(module).__name__} uses `{unsupported}`, which attention on segments does not support. "
                "Set training.padding_free=false."
            )
    if not _is_sentinel(attention_mask):
        raise ValueError("a packed row takes no attention mask: its segments say who sees whom. Remove attention_mask.")
    batch, _, length, _ = query.shape
    if batch != 1 or length != segment_layout.num_tokens or key.shape[2] != length:
        raise ValueError(
            f"segments cover {segment_layout.num_tokens} tokens of one row, but queries are {tuple(query.shape)} and keys "
            f"{tuple(key.shape)}; packed rows run without a key-value cache (use_cache=False)."
        )
    scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
    name = segment_layout.backend if segment_layout.backend != "auto" else choose_backend(query)
    output = BACKENDS[name](query, key, value, segment_layout, scaling, dropout, sliding_window)
    return output, None


def choose_backend(query: torch.Tensor) -> str:
    """The fastest exact backend for this device and dtype: flash-attn, torch's varlen kernel, or sdpa per segment."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type == "cuda" and half and query.shape[-1] <= 256:
        if importlib.util.find_spec("flash_attn") is not None:
            return "flash_attn"
        if torch.cuda.get_device_capability(query.device)[0] >= 8:
            return "varlen"
        return "flex"
    return "sdpa"


def _repeat_heads(states: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`(1, kv_heads, n, d)` -> `(1, heads, n, d)` for grouped-query attention."""
    repeats = num_heads // states.shape[1]
    return states if repeats == 1 else states.repeat_interleave(repeats, dim=1)


def _lower_right_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """`(num_queries, num_keys)` bool. torch's `is_causal` aligns to the upper left; a continuation needs the lower right."""
    query_positions = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key_positions = torch.arange(num_keys, device=device)[None, :]
    mask = key_positions <= query_positions
    return mask if window is None else mask & (key_positions > query_positions - window)


def _sdpa_per_segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: SegmentLayout,
    scaling: float,
    dropout: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """One call per segment and, on a CPU, one more for all that share a prefix."""
    is_windowed = sliding_window is not None and max(layout.key_lengths) > sliding_window
    same_size = query.shape[-1] == key.shape[-1] == value.shape[-1]
    if query.device.type == "cpu" and query.is_floating_point() and same_size and not dropout and not is_windowed:
        if torch.is_autocast_enabled("cpu"):  # as sdpa itself would
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        # The kernel reads the last dimension element by element, without looking at its stride.
        states = [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value)]
        return _SegmentsOnCpu.apply(*states, layout, scaling)  # type: ignore[no-any-return]
    return _sdpa_with_masks(query, key, value, layout, scaling, dropout, sliding_window)


def _sdpa_with_masks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: SegmentLayout,
    scaling: float,
    dropout: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """`split` has one backward node, where slices would each write a whole gradient."""
    num_heads = query.shape[1]
    queries = query.split(layout.lengths, dim=2)
    keys = _repeat_heads(key, num_heads).split(layout.lengths, dim=2)
    values = _repeat_heads(value, num_heads).split(layout.lengths, dim=2)
    outputs = []
    for q, k, v, prefix, num_keys in zip(queries, keys, values, layout.prefixes, layout.key_lengths, strict=True):
        if prefix >= 0:
            k = torch.cat([keys[prefix], k], dim=2)
            v = torch.cat([values[prefix], v], dim=2)
        num_queries = q.shape[2]
        is_windowed = sliding_window is not None and num_keys > sliding_window
        mask = None
        if num_queries != num_keys or is_windowed:
            window = sliding_window if is_windowed else None
            mask = layout.once(
                ("mask", num_queries, num_keys, window, q.device),
                partial(_lower_right_mask, num_queries, num_keys, window, q.device),
            )
        output = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


_cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _SegmentsOnCpu(torch.autograd.Function):
    """torch's CPU attention kernel over pieces: a segment on itself, and all that share a prefix on that prefix.

    The two pieces of a continuation are joined by their log-sum-exps, so no mask is read and nothing that a mask would hide is
    computed. The backward kernel gets the joined output and log-sum-exp, which makes each piece's gradient its share of the
    whole. Grouped queries read their keys and values where they are, nothing is repeated.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: SegmentLayout, scaling: float
    ) -> torch.Tensor:
        """`query` (1, heads, T, d), `key` and `value` (1, kv_heads, T, d) -> (1, T, heads, d)."""
        _, num_heads, length, size = query.shape
        output = query.new_empty(1, length, num_heads, size)
        q, k, v, out = _grouped(query, key, value, output)
        precise = torch.float64 if query.dtype == torch.float64 else torch.float32
        sums = q.new_empty(q.shape[:3], dtype=precise)  # log-sum-exp of every query: (kv_heads, group, T)
        for queries, keys, is_causal in layout.pieces:
            part, part_sums = _cpu_attention(
                q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.0, is_causal, scale=scaling
            )
            if is_causal:
                out[:, :, queries], sums[:, :, queries] = part, part_sums
                continue
            before = sums[:, :, queries]
            joined = torch.logaddexp(before, part_sums)
            own = out[:, :, queries] * (before - joined).exp_().unsqueeze(-1)
            out[:, :, queries] = own.addcmul_(part, (part_sums - joined).exp_().unsqueeze(-1))
            sums[:, :, queries] = joined
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.layout, ctx.scaling = layout, scaling
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        query, key, value, output, sums = ctx.saved_tensors
        grad_query, grad_key, grad_value = (_token_major(states) for states in (query, key, value))
        q, k, v, out = _grouped(query, key, value, output)
        grad_q, grad_out = _by_group(grad_query, k.shape[0]), _by_group(grad_output.transpose(1, 2), k.shape[0])
        for queries, keys, is_causal in ctx.layout.pieces:
            parts = _cpu_attention_backward(
                grad_out[:, :, queries],
                q[:, :, queries],
                k[:, :, keys],
                v[:, :, keys],
                out[:, :, queries],
                sums[:, :, queries],
                0.0,
                is_causal,
                scale=ctx.scaling,
            )
            if is_causal:  # every token's first piece
                grad_q[:, :, queries] = parts[0]
                grad_key[0, :, keys], grad_value[0, :, keys] = parts[1].sum(1), parts[2].sum(1)
            else:
                grad_q[:, :, queries] += parts[0]
                grad_key[0, :, keys] += parts[1].sum(1)
                grad_value[0, :, keys] += parts[2].sum(1)
        return grad_query, grad_key, grad_value, None, None


def _token_major(states: torch.Tensor) -> torch.Tensor:
    """An empty `(1, heads, T, d)` whose memory runs by token, as the projections write and read it."""
    batch, heads, length, size = states.shape
    return states.new_empty(batch, length, heads, size).transpose(1, 2)


def _by_group(states: torch.Tensor, num_groups: int) -> torch.Tensor:
    """`(1, heads, T, d)` -> `(kv_heads, heads a group, T, d)`, a view: the kernel's batch is one key head."""
    return states[0].unflatten(0, (num_groups, -1))


def _grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys, values and output by key head; keys and values stand for every head of their group."""
    num_groups, size = key.shape[1], (key.shape[1], query.shape[1] // key.shape[1], *key.shape[2:])
    keys, values = (states[0].unsqueeze(1).expand(size) for states in (key, value))
    return _by_group(query, num_groups), keys, values, _by_group(output.transpose(1, 2), num_groups)


def _flat_states(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: SegmentLayout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(T, heads, d)` queries, keys and values laid out segment by segment, and their cumulative lengths."""
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    device = query.device
    key_index = layout.once(("key_index", device), lambda: layout.key_index(device))
    if key_index is not None:
        k, v = k.index_select(0, key_index), v.index_select(0, key_index)

    def cumulative(lengths: tuple[int, ...]) -> torch.Tensor:
        return layout.once(
            ("cumulative", lengths, device), lambda: torch.tensor((0, *lengths)).cumsum(0).to(device, torch.int32)
        )

    return q.contiguous(), k.contiguous(), v.contiguous(), cumulative(layout.lengths), cumulative(layout.key_lengths)


def _flash_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: SegmentLayout,
    scaling: float,
    dropout: float,
    sliding_window: int | None,
) -> torch.Tensor:
    try:  # outside one, transformers asks everybody who opens a saved model with its code to install it
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        raise

    q, k, v, cumulative_queries, cumulative_keys = _flat_states(query, key, value, layout)
    window = (sliding_window - 1, 0) if sliding_window is not None else (-1, -1)
    output = flash_attn_varlen_func(
        q,
        k,
        v,
        cumulative_queries,
        cumulative_keys,
        max(layout.lengths),
        max(layout.key_lengths),
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=window,
    )
    return output.unsqueeze(0)


def _torch_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: SegmentLayout,
    scaling: float,
    dropout: float,
    sliding_window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise ValueError("torch's varlen attention has no dropout; set attention_dropout to 0 in the language model.")
    q, k, v, cumulative_queries, cumulative_keys = _flat_states(query, key, value, layout)
    output: Any = varlen_attn(  # a tensor; a tuple only where its log-sum-exp is asked for
        q,
        k,
        v,
        cumulative_queries,
        cumulative_keys,
        max(layout.lengths),
        max(layout.key_lengths),
        scale=scaling,
        window_size=(sliding_window - 1, 0) if sliding_window is not None else (-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output.unsqueeze(0)


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: SegmentLayout,
    scaling: float,
    dropout: float,
    sliding_window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if dropout:
        raise ValueError("flex attention has no dropout; set attention_dropout to 0 in the language model.")
    device = query.device
    lengths = torch.tensor(layout.lengths, device=device)
    segments = torch.repeat_interleave(torch.arange(len(layout.lengths), device=device), lengths)
    prefixes = torch.tensor(layout.prefixes, device=device)[segments]
    positions = layout.position_ids(device)[0]

    def sees(_batch: torch.Tensor, _head: torch.Tensor, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
        same_row = (segments[q_index] == segments[k_index]) | (prefixes[q_index] == segments[k_index])
        seen = same_row & (positions[k_index] <= positions[q_index])
        if sliding_window is not None:
            seen = seen & (positions[k_index] > positions[q_index] - sliding_window)
        return seen

    num_tokens = layout.num_tokens
    block_mask = layout.once(
        ("block_mask", sliding_window, device),
        lambda: create_block_mask(sees, None, None, num_tokens, num_tokens, device=device),
    )
    compiled: Any = torch.compile(flex_attention) if device.type == "cuda" else flex_attention
    output = compiled(
        query, key, value, block_mask=block_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2).contiguous()


BACKENDS: dict[str, Callable[..., torch.Tensor]] = {
    "flash_attn": _flash_attn,
    "varlen": _torch_varlen,
    "flex": _flex,
    "sdpa": _sdpa_per_segment,
}

AttentionInterface.register(SEGMENTS, segment_attention)
AttentionMaskInterface.register(SEGMENTS, sdpa_mask)
