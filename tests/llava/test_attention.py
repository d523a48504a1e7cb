"""Attention over packed segments against each segment alone with a plain causal softmax."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vir_hf.llava.attention import (
    BACKENDS,
    SegmentLayout,
    segment_attention,
    segment_mask_sentinel,
)

HEADS, KV_HEADS, WIDTH = 4, 2, 8


def reference(query, key, value, layout, window=None):
    """Every segment behind its prefix, one dense softmax each, written without any of the library's helpers."""
    rows = []
    for start, length, prefix in zip(layout.starts, layout.lengths, layout.prefixes, strict=True):
        tokens = list(range(start, start + length))
        seen = (
            tokens
            if prefix < 0
            else list(range(layout.starts[prefix], layout.starts[prefix] + layout.lengths[prefix])) + tokens
        )
        offset = len(seen) - len(tokens)
        k = key[:, :, seen].repeat_interleave(HEADS // KV_HEADS, dim=1)
        v = value[:, :, seen].repeat_interleave(HEADS // KV_HEADS, dim=1)
        scores = query[:, :, tokens] @ k.transpose(2, 3) / WIDTH**0.5
        for i in range(len(tokens)):
            for j in range(len(seen)):
                if j > offset + i or (window is not None and j <= offset + i - window):
                    scores[:, :, i, j] = float("-inf")
        rows.append(scores.softmax(-1) @ v)
    return torch.cat(rows, dim=2).transpose(1, 2)


def states(length, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(heads):
        return torch.randn(1, heads, length, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)

    return draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)


LAYOUTS = {
    "one segment": SegmentLayout((7,), (-1,)),
    "three rows": SegmentLayout((3, 1, 6), (-1, -1, -1)),
    "shared prefix": SegmentLayout((5, 2, 4, 3), (-1, 0, 0, -1)),
    "two prefixes": SegmentLayout((4, 1, 3, 2, 2), (-1, 0, -1, 2, 2)),
}


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_segments_equal_a_dense_softmax_per_segment(name: str, window: int | None) -> None:
    layout = LAYOUTS[name]
    query, key, value = states(layout.num_tokens)
    output, weights = segment_attention(
        nn.Module(),
        query,
        key,
        value,
        segment_mask_sentinel(query.device),
        segment_layout=layout,
        sliding_window=window,
    )
    expected = reference(query, key, value, layout, window)
    assert weights is None
    assert torch.allclose(output, expected, atol=1e-12)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = torch.autograd.grad((output * cotangent).sum(), (query, key, value))
    wanted = torch.autograd.grad((expected * cotangent).sum(), (query, key, value))
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_flex_equals_sdpa_per_segment(window: int | None) -> None:
    layout = LAYOUTS["shared prefix"]
    query, key, value = (state.detach().float() for state in states(layout.num_tokens))
    results = [BACKENDS[name](query, key, value, layout, WIDTH**-0.5, 0.0, window) for name in ("flex", "sdpa")]
    assert torch.allclose(*results, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("backend", ["varlen", "flash_attn", "flex"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_gpu_kernels_equal_sdpa_per_segment(name: str, backend: str, window: int | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if backend == "flash_attn":
        pytest.importorskip("flash_attn")
    layout = LAYOUTS[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, heads, layout.num_tokens, 64, generator=generator).to("cuda", torch.bfloat16).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    results, gradients = [], []
    for chosen in (backend, "sdpa"):
        output = BACKENDS[chosen](*inputs, layout, 64**-0.5, 0.0, window)
        results.append(output.float())
        gradients.append(torch.autograd.grad(output.float().square().sum(), inputs))
    assert torch.allclose(*results, atol=2e-2)
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours.float(), theirs.float(), atol=1e-1)


@pytest.mark.parametrize(
    ("lengths", "prefixes", "message"),
    [
        ((3, 0), (-1, -1), "at least one token"),
        ((3, 2), (-1,), "segment prefixes"),
        ((3, 2), (-1, 1), "comes earlier"),
        ((3, 2, 2), (-1, 0, 1), "no prefix itself"),
    ],
)
def test_impossible_layouts_are_refused(lengths, prefixes, message) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentLayout(lengths, prefixes)


def test_positions_continue_after_the_prefix() -> None:
    layout = SegmentLayout((3, 2, 2, 4), (-1, 0, 0, -1))
    assert layout.position_ids()[0].tolist() == [0, 1, 2, 3, 4, 3, 4, 0, 1, 2, 3]


def test_a_mask_or_a_lost_layout_raises() -> None:
    layout = LAYOUTS["three rows"]
    query, key, value = states(layout.num_tokens)
    with pytest.raises(ValueError, match="takes no attention mask"):
        segment_attention(nn.Module(), query, key, value, torch.ones(1, 1, 10, 10), segment_layout=layout)
    with pytest.raises(ValueError, match="did not pass `segment_layout`"):
        segment_attention(nn.Module(), query, key, value, segment_mask_sentinel(query.device))
    with pytest.raises(ValueError, match="segments cover"):
        segment_attention(
            nn.Module(), query[:, :, :4], key, value, segment_mask_sentinel(query.device), segment_layout=layout
        )
    with pytest.raises(ValueError, match="softcap"):
        segment_attention(
            nn.Module(), query, key, value, segment_mask_sentinel(query.device), segment_layout=layout, softcap=30.0
        )


def test_values_of_another_width_and_odd_strides() -> None:
    layout = LAYOUTS["shared prefix"]
    query, key, value = (state.detach() for state in states(layout.num_tokens))
    wide = torch.cat([value, value], dim=-1)
    both = BACKENDS["sdpa"](query, key, wide, layout, WIDTH**-0.5, 0.0, None)
    one = BACKENDS["sdpa"](query, key, value, layout, WIDTH**-0.5, 0.0, None)
    assert torch.allclose(both, torch.cat([one, one], dim=-1))
    turned = [state.transpose(2, 3).contiguous().transpose(2, 3) for state in (query, key, value)]
    assert turned[0].stride(-1) != 1
    assert torch.allclose(BACKENDS["sdpa"](*turned, layout, WIDTH**-0.5, 0.0, None), one)
