"""Which rows a step holds, and how ranks and micro-batches share them."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from vir_hf import LlavaDataCollator, build
from vir_hf.batches.planning import size_of_row
from vir_hf.batches.sampling import RowSize, StepSampler, deal, fill


def sizes(num_rows: int = 100, num_images: int = 40, seed: int = 0) -> list[RowSize]:
    draw = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        image = f"{draw.randrange(num_images)}.jpg" if draw.random() < 0.8 else None
        num_image_tokens = 576 if image else 0
        num_tokens = draw.randrange(20, 400) + num_image_tokens
        rows.append(RowSize(num_tokens, int(image is not None), image, image_tokens=num_image_tokens))
    return rows


def rows_of(plans) -> list[int]:
    return [row for plan in plans for batch in plan.micro_batches for row in batch if row >= 0]


def layouts():
    for num_replicas in (1, 2, 4):
        for limits in ({"micro_batch_rows": 2}, {"micro_batch_rows": 5}, {"max_tokens_per_batch": 3000}):
            yield num_replicas, limits


@pytest.mark.parametrize("group_by", [None, "image", "modality"])
@pytest.mark.parametrize(("num_replicas", "limits"), list(layouts()))
def test_every_layout_computes_the_same_rows_in_every_step(num_replicas, limits, group_by) -> None:
    rows = sizes(103)
    reference = StepSampler(rows, 16, micro_batch_rows=16, seed=7, group_by=group_by)
    ranks = [
        StepSampler(
            rows, 16, num_replicas=num_replicas, rank=rank, seed=7, group_by=group_by, shares_images=True, **limits
        )
        for rank in range(num_replicas)
    ]
    for sampler in (reference, *ranks):
        sampler.set_epoch(3)
    seen: Counter[int] = Counter()
    steps = list(zip(reference.steps(), *ranks, strict=True))
    assert len(steps) == len(reference) == 7
    for expected, *plans in steps:
        plans = [plan for (plan,) in plans]
        assert sorted(rows_of(plans)) == sorted(expected)
        assert len({len(plan.micro_batches) for plan in plans}) == 1  # no rank waits for another's extra micro-batch
        seen.update(expected)
        for plan in plans:
            for batch in plan.micro_batches:
                assert len(batch) <= limits.get("micro_batch_rows", len(batch))
    assert seen == Counter(range(103))  # one epoch: every row once


def test_epochs_differ_and_seeds_repeat() -> None:
    rows = sizes()
    sampler = StepSampler(rows, 8, micro_batch_rows=4, seed=1)
    first = sampler.steps()
    sampler.set_epoch(1)
    assert sampler.steps() != first
    sampler.set_epoch(0)
    assert sampler.steps() == first == StepSampler(rows, 8, micro_batch_rows=2, seed=1).steps()


def test_ranks_get_even_token_counts() -> None:
    rows = sizes(640, num_images=640)
    balanced = StepSampler(rows, 64, micro_batch_rows=16, num_replicas=4, seed=0)
    plain = StepSampler(rows, 64, micro_batch_rows=16, num_replicas=4, seed=0, balance_tokens=False)

    def worst(sampler: StepSampler) -> float:
        ratios = []
        for step in sampler.steps():
            loads = [
                sum(rows[row].num_tokens for batch in plan.micro_batches for row in batch)
                for plan in sampler.plan(step)
            ]
            ratios.append(max(loads) / (sum(loads) / len(loads)))
        return max(ratios)

    assert worst(balanced) < 1.01 < worst(plain)


def test_rows_of_one_picture_stay_together() -> None:
    rows = sizes(200, num_images=50)
    sampler = StepSampler(rows, 20, micro_batch_rows=10, num_replicas=2, group_by="image", shares_images=True)
    apart = 0
    for step in sampler.steps():
        where: dict[str, set[tuple[int, int]]] = {}
        for rank, plan in enumerate(sampler.plan(step)):
            for number, batch in enumerate(plan.micro_batches):
                for row in batch:
                    if rows[row].image_key:
                        where.setdefault(rows[row].image_key, set()).add((rank, number))
        apart += sum(len(places) > 1 for places in where.values())
    assert apart <= 10  # only groups that a bin's row limit takes apart


def test_a_token_budget_is_kept_and_a_longer_row_runs_alone() -> None:
    rows = [*sizes(50), RowSize(9000, 1, "long.jpg", image_tokens=576)]
    batches = fill(range(51), rows, 2500, shares_images=True)
    assert sorted(row for batch in batches for row in batch) == list(range(51))
    for batch in batches:
        images = Counter(rows[row].image_key for row in batch if rows[row].image_key)
        tokens = sum(rows[row].num_tokens for row in batch) - 576 * sum(count - 1 for count in images.values())
        assert tokens <= 2500 or batch == [50]


def test_dealing_never_overfills_a_bin() -> None:
    rows = [RowSize(100, 1, "same.jpg")] * 7 + [RowSize(50)] * 5
    bins = deal(range(12), rows, 3, 4)
    assert sorted(row for held in bins for row in held) == list(range(12))
    assert [len(held) for held in bins] == [4, 4, 4]


def test_a_rank_without_rows_runs_a_masked_copy() -> None:
    rows = sizes(9)
    sampler = StepSampler(rows, 8, micro_batch_rows=2, num_replicas=4, seed=0)
    last = sampler.plan(sampler.steps()[-1])
    assert sum(row >= 0 for plan in last for batch in plan.micro_batches for row in batch) == 1
    assert all(len(plan.micro_batches) == 1 for plan in last)


def test_limits_must_be_one_of_two() -> None:
    with pytest.raises(ValueError, match="either micro_batch_rows or max_tokens_per_batch"):
        StepSampler(sizes(4), 2)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        StepSampler(sizes(4), 2, micro_batch_rows=1, num_replicas=2, rank=2)


def test_a_picture_counts_once_only_where_the_text_before_it_is_the_same() -> None:
    rows = [RowSize(700, 1, "same.jpg", prefix, 576) for prefix in ("a", "a", "b", None, None)]
    for bin_ in fill(range(5), rows, 1900, shares_images=True):
        shared = len([row for row in bin_ if rows[row].prefix_key is not None]) - len(
            {rows[row].prefix_key for row in bin_} - {None}
        )
        assert sum(rows[row].num_tokens for row in bin_) - max(shared, 0) * 576 <= 1900
    assert fill(range(2), rows, 900, shares_images=True) == [[0, 1]]  # the text is the same
    assert fill([0, 2], rows, 900, shares_images=True) == [[0], [2]]  # it is not
    assert fill([3, 4], rows, 900, shares_images=True) == [[3], [4]]  # nothing is shared


@pytest.mark.parametrize(
    "systems", [("Be brief.", "Be brief."), ("Be brief.", "Answer at length."), (None, "Be brief.")]
)
def test_the_tokens_that_are_planned_are_those_of_the_batch(tiny_parts: Path, systems: tuple[str | None, str]) -> None:
    processor = build(str(tiny_parts / "lm"), str(tiny_parts / "tower"), "vicuna_v1")[1]
    rows = []
    for number, system in enumerate(systems):
        turns = [
            ("user", [{"type": "image"}, {"type": "text", "text": "What is it?"}]),
            ("assistant", [{"type": "text", "text": "Red."}]),
        ]
        turns = ([("system", [{"type": "text", "text": system}])] if system else []) + turns
        messages = [{"role": role, "content": content} for role, content in turns]
        image = {"path": str(tiny_parts / "images" / "0000.png"), "bytes": None}
        rows.append({"id": str(number), "messages": messages, "images": [image]})
    batch = LlavaDataCollator(processor, max_length=512)(rows)
    sizes = [size_of_row(row, processor, 512) for row in rows]
    planned = fill(range(2), sizes, 10_000, True)
    assert planned == [[0, 1]]
    limit = batch["input_ids"].shape[1]
    # What text is shared besides the image is not planned for, so a batch is never longer than its plan.
    shares = systems[0] == systems[1]
    total = sum(size.num_tokens for size in sizes) - (processor.num_image_tokens if shares else 0)
    assert limit <= total and (limit == total or shares)
    assert fill(range(2), sizes, total, True) == [[0, 1]]
    assert len(fill(range(2), sizes, total - 1, True)) == 2
