"""Which rows share an optimizer step, which rank gets them, and which micro-batch they run in.

The rows of a step are a function of seed, epoch and the recipe's global batch alone: never of how many ranks, micro-batches
or tokens a batch may hold. Ranks then share them out so that each has about as many tokens to compute, and so that rows of
one picture stay together.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


@dataclass(frozen=True)
class RowSize:
    """What planning needs to know of a row: its tokens, and the pictures it begins with. No picture is opened for it.

    Attributes:
        num_tokens: text and image tokens.
        num_images: pictures in the row.
        image_key: the first picture's `picture_identity`, `None` for a row of text alone.
        prefix_key: which text stands before the first picture. Rows of one picture share its tokens where this is the same;
            `None`: the row shares nothing.
        image_tokens: of the first picture.
    """

    num_tokens: int
    num_images: int = 0
    image_key: str | None = None
    prefix_key: str | None = ""
    image_tokens: int = 0


@dataclass(frozen=True)
class StepPlan:
    """One rank's share of an optimizer step: row numbers by micro-batch.

    A rank with fewer micro-batches than another runs masked copies of a row, written `-row - 1`, that count for nothing.
    """

    micro_batches: tuple[tuple[int, ...], ...]


def epoch_order(sizes: Sequence[RowSize], seed: int, epoch: int, group_by: str | None = None) -> list[int]:
    """Return all row numbers in the order one epoch visits them.

    Args:
        sizes: one entry a row.
        group_by: `"image"` keeps rows about one picture together; `"modality"` keeps rows with and without pictures in
            runs of their own (shuffled among each other by `StepSampler`); `None` shuffles rows freely.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    shuffled: list[int] = torch.randperm(len(sizes), generator=generator).tolist()
    if group_by != "image":
        return shuffled
    groups: dict[Any, list[int]] = {}
    for row in shuffled:
        key = sizes[row].image_key
        groups.setdefault(("text", row) if key is None else key, []).append(row)
    return [row for rows in groups.values() for row in rows]


def split_into_steps(
    sizes: Sequence[RowSize], order: list[int], rows_per_step: int, group_by: str | None, seed: int
) -> list[list[int]]:
    """Cut an epoch's order into the rows of each optimizer step; the last step may hold fewer."""
    if group_by != "modality":
        return [order[start : start + rows_per_step] for start in range(0, len(order), rows_per_step)]
    runs = (
        [row for row in order if sizes[row].num_images],
        [row for row in order if not sizes[row].num_images],
    )
    steps, rest = [], []
    for run in runs:
        full = len(run) // rows_per_step * rows_per_step
        steps += [run[start : start + rows_per_step] for start in range(0, full, rows_per_step)]
        rest += run[full:]
    generator = torch.Generator().manual_seed(seed)
    steps = [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]
    return steps + [rest[start : start + rows_per_step] for start in range(0, len(rest), rows_per_step)]


def _units(rows: Sequence[int], sizes: Sequence[RowSize], shares_images: bool) -> list[tuple[int, list[int]]]:
    """`(tokens, rows)` for every group of rows about one picture, which counts once for those that begin with the same text."""
    groups: dict[Any, list[int]] = {}
    for row in rows:
        key = sizes[row].image_key
        groups.setdefault(("text", row) if key is None else key, []).append(row)

    def num_tokens(members: list[int]) -> int:
        prefixes = [sizes[row].prefix_key for row in members]
        num_sharing = sum(prefix is not None for prefix in prefixes) - len(set(prefixes) - {None})
        shared = num_sharing * sizes[members[0]].image_tokens if shares_images else 0
        return sum(sizes[row].num_tokens for row in members) - shared

    return [(num_tokens(members), members) for members in groups.values()]


def deal(
    rows: Sequence[int], sizes: Sequence[RowSize], num_bins: int, max_rows: int, shares_images: bool = False
) -> list[list[int]]:
    """Share rows out over bins of at most `max_rows` rows with about equal token counts, rows of one picture together.

    Longest first, each to the bin with the fewest tokens that has room; a group that fits nowhere is taken apart.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    units = _units(rows, sizes, shares_images)
    units = [
        (tokens * len(part) // len(members), part)
        for tokens, members in units
        for part in (members[i : i + max_rows] for i in range(0, len(members), max_rows))
    ]
    heap = [(0, number) for number in range(num_bins)]
    for tokens, members in sorted(units, key=lambda unit: (-unit[0], unit[1])):
        parts = [members]
        while parts:
            part = parts.pop(0)
            taken, passed = None, []
            while heap:
                load, number = heapq.heappop(heap)
                if len(bins[number]) + len(part) <= max_rows:
                    taken = (load, number)
                    break
                passed.append((load, number))
            for entry in passed:
                heapq.heappush(heap, entry)
            if taken is None:
                parts = [[row] for row in part] + parts
                continue
            load, number = taken
            bins[number].extend(part)
            heapq.heappush(heap, (load + tokens * len(part) // len(members), number))
    return bins


def fill(
    rows: Sequence[int], sizes: Sequence[RowSize], max_tokens: int, shares_images: bool = False
) -> list[list[int]]:
    """Share rows out over as few bins as it takes for none to exceed `max_tokens` (a longer row has a bin of its own)."""
    bins: list[tuple[int, list[int]]] = []
    pieces: list[tuple[int, list[int]]] = []
    for tokens, members in _units(rows, sizes, shares_images):
        if tokens <= max_tokens:
            pieces.append((tokens, members))
        else:
            pieces += [(sizes[row].num_tokens, [row]) for row in members]
    for tokens, members in sorted(pieces, key=lambda unit: (-unit[0], unit[1])):
        for number, (load, held) in enumerate(bins):
            if load + tokens <= max_tokens:
                bins[number] = (load + tokens, held + members)
                break
        else:
            bins.append((tokens, list(members)))
    return [held for _, held in bins]


class StepSampler(Sampler[list[StepPlan]]):
    """Yields one rank's plan for each optimizer step of an epoch.

    Args:
        sizes: one entry a row.
        rows_per_step: the recipe's global batch.
        micro_batch_rows: rows a micro-batch may hold, on each rank.
        max_tokens_per_batch: tokens a micro-batch may hold, instead of a number of rows.
        shares_images: rows that begin with one picture keep its tokens once.
        group_by: see `epoch_order`.
        balance_tokens: share rows out by token count; otherwise in their order.

    Raises:
        ValueError: both or neither of `micro_batch_rows` and `max_tokens_per_batch`; an impossible rank.
    """

    def __init__(
        self,
        sizes: Sequence[RowSize],
        rows_per_step: int,
        *,
        micro_batch_rows: int | None = None,
        max_tokens_per_batch: int | None = None,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        group_by: str | None = None,
        balance_tokens: bool = True,
        shares_images: bool = False,
        drop_last: bool = False,
    ):
        if (micro_batch_rows is None) == (max_tokens_per_batch is None):
            raise ValueError("give either micro_batch_rows or max_tokens_per_batch")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank {rank} of {num_replicas} replicas")
        self.sizes, self.rows_per_step = sizes, rows_per_step
        self.micro_batch_rows, self.max_tokens_per_batch = micro_batch_rows, max_tokens_per_batch
        self.num_replicas, self.rank = num_replicas, rank
        self.seed, self.epoch, self.group_by = seed, 0, group_by
        self.balance_tokens, self.shares_images, self.drop_last = balance_tokens, shares_images, drop_last

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration visits."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.sizes), self.rows_per_step)
        return full + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[list[StepPlan]]:
        for rows in self.steps():
            yield [self.plan(rows)[self.rank]]

    def steps(self) -> list[list[int]]:
        """The rows of every optimizer step of this epoch, the same on any layout."""
        order = epoch_order(self.sizes, self.seed, self.epoch, self.group_by)
        steps = split_into_steps(self.sizes, order, self.rows_per_step, self.group_by, self.seed + self.epoch)
        return steps[: len(self)]

    def plan(self, rows: Sequence[int]) -> list[StepPlan]:
        """Share one step's rows out over all ranks; every rank runs the same number of micro-batches."""
        max_rows = -(-len(rows) // self.num_replicas)
        if self.balance_tokens:
            shares = deal(rows, self.sizes, self.num_replicas, max_rows, self.shares_images)
        else:
            shares = [list(rows[rank * max_rows : (rank + 1) * max_rows]) for rank in range(self.num_replicas)]
        if self.max_tokens_per_batch is not None:
            batches = [fill(share, self.sizes, self.max_tokens_per_batch, self.shares_images) for share in shares]
            num_batches = max(len(share) for share in batches)
        else:
            size = self.micro_batch_rows or 1
            num_batches = max(-(-len(share) // size) for share in shares)
            batches = [self._cut(share, num_batches, size) for share in shares]
        return [self._complete(share, num_batches, rows[0]) for share in batches]

    def _cut(self, share: list[int], num_batches: int, size: int) -> list[list[int]]:
        if self.balance_tokens:
            dealt = deal(share, self.sizes, num_batches, size, self.shares_images)
            return [rows for rows in dealt if rows]
        return [share[start : start + size] for start in range(0, len(share), size)]

    @staticmethod
    def _complete(batches: list[list[int]], num_batches: int, spare: int) -> StepPlan:
        """Fill up with masked copies of one row where a rank has fewer micro-batches than another."""
        missing = num_batches - len(batches)
        if not missing:
            return StepPlan(tuple(tuple(rows) for rows in batches))
        return StepPlan(tuple(tuple(rows) for rows in batches) + ((-spare - 1,),) * missing)


class StepDataset(Dataset[list[list[Any]]]):
    """Reads all rows of a step's plan: a list of rows for every micro-batch. Negative numbers are masked copies."""

    def __init__(self, rows: Any):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, plan: StepPlan) -> list[list[Any]]:  # type: ignore[override]
        return [[self._read(number) for number in micro_batch] for micro_batch in plan.micro_batches]

    def _read(self, number: int) -> dict[str, Any]:
        if number >= 0:
            return {**self.rows[number], "row_number": number}
        return {**self.rows[-number - 1], "row_number": number, "is_masked": True}


class StepLoader(DataLoader[Any]):
    """A data loader whose items are whole optimizer steps: `{"micro_batches": [batch, ...]}`."""

    def __init__(self, rows: Any, sampler: StepSampler, collator: Callable[[list[Any]], dict[str, Any]], **kwargs: Any):
        super().__init__(
            StepDataset(rows),
            batch_sampler=sampler,  # type: ignore[arg-type]
            collate_fn=StepCollator(collator),
            # Its own: a loader draws a number whenever it starts, and a resumed run starts it at other times.
            generator=torch.Generator().manual_seed(0),
            **kwargs,
        )

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the sampler; transformers' trainer calls it."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


@dataclass
class StepCollator:
    """Collates each micro-batch of a step."""

    collator: Callable[[list[Any]], dict[str, Any]]

    def __call__(self, steps: list[list[list[Any]]]) -> dict[str, Any]:
        (step,) = steps
        return {"micro_batches": [collate(rows, self.collator) for rows in step]}


def collate(rows: list[Any], collator: Callable[[list[Any]], dict[str, Any]]) -> dict[str, Any]:
    """Return one batch that also says, in `row_numbers`, which rows of the data set it holds."""
    return {**collator(rows), "row_numbers": [row["row_number"] for row in rows]}
