"""Images of many views: packed with shared prefixes or padded or one by one, losses and gradients are the same."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vir_hf.batches.collator import LlavaDataCollator
from vir_hf.batches.planning import size_of_row
from vir_hf.batches.sampling import fill
from vir_hf.errors import DataError
from vir_hf.model.build import build
from vir_hf.rows.encoding import IGNORE, encode_row, row_length

KINDS = {"tiles": {"max_tiles": 4}, "tiles, shuffled": {"max_tiles": 6, "pixel_shuffle": 2}, "one view": {}}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    tiny.save_language_model(root / "lm")
    tiny.save_vision_tower(root / "tower")
    return root


class Pairs(dict[str, tuple[Any, Any]]):
    """Model and processor of each kind; hypothesis would print them whole, which takes minutes."""

    def __repr__(self) -> str:
        return "pairs"


@pytest.fixture(scope="module")
def pairs(parts: Path) -> Pairs:
    return Pairs(
        {name: build(str(parts / "lm"), str(parts / "tower"), "vicuna_v1", **kind) for name, kind in KINDS.items()}
    )


def picture(width: int, height: int, seed: int = 0) -> dict[str, Any]:
    """A noisy image of a size, as a row of a data set holds it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def row(number: int, images: Sequence[dict[str, Any]], question: str = "What is it?") -> dict[str, Any]:
    first = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    turns = [("user", first), ("assistant", f"It is a {tiny.COLOURS[number % 6]} square.")]
    turns += [("user", "Sure?"), ("assistant", "It is.")] * (number % 2)
    messages = [
        {"role": role, "content": content if isinstance(content, list) else [{"type": "text", "text": content}]}
        for role, content in turns
    ]
    return {"id": str(number), "messages": messages, "images": list(images)}


def loss_and_gradients(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[float, dict[str, torch.Tensor]]:
    """The summed loss of some batches over supervised tokens, and every weight's gradient."""
    model.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model.lm_head(model.model(**inputs, use_cache=False).last_hidden_state)[:, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
        )
    total.backward()
    return total.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: tuple[float, dict[str, torch.Tensor]], other: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    for name in one[1].keys() | other[1].keys():  # what nothing depends on has a gradient of zero, or none
        left, right = (gradients.get(name, torch.zeros(())) for _, gradients in (one, other))
        assert float((left - right).abs().max()) <= 1e-5 * max(float(right.abs().max()), 1e-3), name


SIDE = st.integers(8, 120)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(KINDS)),
    pictures=st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=3),
    shown=st.lists(st.lists(st.integers(0, 2), max_size=2), min_size=1, max_size=4),
)
def test_packed_equals_one_by_one(
    pairs: Pairs, kind: str, pictures: list[tuple[int, int]], shown: list[list[int]]
) -> None:
    model, processor = pairs[kind]
    drawn = [picture(*size, seed) for seed, size in enumerate(pictures)]
    rows = [row(number, [drawn[i % len(drawn)] for i in which]) for number, which in enumerate(shown)]
    packed = LlavaDataCollator(processor, max_length=None)
    padded = LlavaDataCollator(processor, max_length=None, padding_free=False)
    alone = loss_and_gradients(model, [padded([one]) for one in rows])
    assert_same(loss_and_gradients(model, [packed(rows)]), alone)
    assert_same(loss_and_gradients(model, [padded(rows)]), alone)


def test_rows_of_one_image_share_all_of_its_views(pairs: Pairs) -> None:
    model, processor = pairs["tiles"]
    image = picture(100, 50)
    rows = [row(0, [image]), row(1, [image], "What colour?")]
    batch = LlavaDataCollator(processor, max_length=None)(rows)
    cut = processor.views.of(100, 50)
    assert cut.num_views > 2
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == cut.num_tokens
    assert batch["pixel_values"].shape == (cut.num_views, 3, 28, 28)
    assert batch["image_sizes"].tolist() == [[50, 100]]
    apart = LlavaDataCollator(processor, max_length=None, share_prefixes=False)
    assert_same(loss_and_gradients(model, [batch]), loss_and_gradients(model, [apart(rows)]))


def test_a_plan_counts_what_the_collator_packs(pairs: Pairs) -> None:
    _, processor = pairs["tiles"]
    large, small = picture(100, 50), picture(20, 20)
    rows = [row(0, [large]), row(1, [large]), row(2, [small])]
    measured = [size_of_row(one, processor, None) for one in rows]
    assert [size.image_tokens for size in measured] == [processor.tokens_of((100, 50))] * 2 + [5]
    for members in ([0, 1], [0, 2], [0, 1, 2]):
        packed = LlavaDataCollator(processor, max_length=None)([rows[i] for i in members])
        one_image = sum(measured[i].num_tokens for i in members)
        one_image -= measured[0].image_tokens if {0, 1} <= set(members) else 0
        assert fill(members, measured, one_image, True) == [sorted(members, key=lambda i: -measured[i].num_tokens)] or (
            len(fill(members, measured, one_image, True)) == 1
        )
        assert packed["input_ids"].shape[1] <= one_image


def test_a_row_is_cut_before_an_image_and_never_inside_one(pairs: Pairs) -> None:
    _, processor = pairs["tiles"]
    images = [picture(20, 20), picture(100, 50)]
    talk = row(0, images[:1])
    second = [{"type": "image"}, {"type": "text", "text": "And this?"}]
    talk["messages"] += [
        {"role": "user", "content": second},
        {"role": "assistant", "content": [{"type": "text", "text": "It is a circle."}]},
    ]
    talk["images"] = images
    whole = row_length(talk, processor)
    assert whole.num_images == 2
    for limit in range(whole.num_prefix_tokens + 1, whole.num_tokens + 1):
        ids = encode_row(talk, processor, max_length=limit)["input_ids"]
        assert ids.count(processor.image_token_id) in (5, 5 + processor.tokens_of((100, 50)))


def test_a_row_too_long_for_its_image_says_the_tokens(pairs: Pairs) -> None:
    _, processor = pairs["tiles"]
    tokens = processor.tokens_of((100, 50))
    with pytest.raises(DataError, match=rf"1 images of {tokens} tokens among them.*max_length={tokens}"):
        encode_row(row(0, [picture(100, 50)]), processor, max_length=tokens)


def test_an_image_of_one_by_thousands_is_refused_by_its_row(pairs: Pairs) -> None:
    _, processor = pairs["tiles"]
    with pytest.raises(DataError, match="id '0'.*1 x 5000 pixels.*factor of 200.*5000"):
        encode_row(row(0, [picture(1, 5000)]), processor)


def test_a_broken_image_masks_its_row_where_the_recipe_says_so(pairs: Pairs) -> None:
    _, processor = pairs["tiles"]
    rows = [row(0, [picture(100, 50)]), row(1, [{"bytes": b"no image", "path": "x.png"}])]
    with pytest.raises(DataError, match=r"x\.png"):
        LlavaDataCollator(processor)(rows)
    batch = LlavaDataCollator(processor, on_bad_image="skip", with_row_ids=True)(rows)
    assert [masked["id"] for masked in batch["masked_rows"]] == ["1"]
    assert len(batch["pixel_values"]) == processor.views.of(100, 50).num_views + 1
    alone = LlavaDataCollator(processor, with_row_ids=True)(rows[:1])
    assert (batch["labels"] != IGNORE).sum() == (alone["labels"] != IGNORE).sum()


def test_the_tower_runs_once_for_each_distinct_view_in_chunks(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = pairs["tiles"]
    image, other = picture(100, 50), picture(60, 60, 1)
    batch = LlavaDataCollator(processor, max_length=None)([row(0, [image]), row(1, [other, image]), row(2, [image])])
    expected = processor.views.of(100, 50).num_views + processor.views.of(60, 60).num_views
    seen: list[int] = []
    select = type(model.model)._select_features

    def counted(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return select(self, pixels)

    monkeypatch.setattr(type(model.model), "_select_features", counted)
    monkeypatch.setattr(model.model, "views_per_chunk", 3)
    model.model.vision_tower.requires_grad_(False)
    whole = model.model.encode_images(batch["pixel_values"])
    model.model.vision_tower.requires_grad_(True)
    assert sum(seen) == expected == len(whole) and max(seen) <= 3


def test_views_of_another_size_are_refused_with_both_numbers(pairs: Pairs) -> None:
    model, processor = pairs["tiles"]
    batch = LlavaDataCollator(processor, max_length=None)([row(0, [picture(100, 50)])])
    num_views = len(batch["pixel_values"])
    batch["pixel_values"] = batch["pixel_values"][:-1]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with pytest.raises(ValueError, match=f"have {num_views} views, but {num_views - 1} were given"):
        model.model(**inputs, use_cache=False)
