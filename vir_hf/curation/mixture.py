"""What a mixture of sources comes to before it is trained on: rows, images and tokens of each, and how often a row is seen."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from vir_hf.data.sources import mixture_counts
from vir_hf.errors import DataError, RecipeError
from vir_hf.rows.encoding import IGNORE, encode_row

_SAMPLE_ROWS = 2_000


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of a mixture; images and tokens are means of a row, measured on `num_measured` of its rows.

    Attributes:
        num_rows: rows it has.
        drawn: rows it gives in an epoch.
    """

    name: str
    num_rows: int
    num_measured: int
    images: float
    tokens: float
    supervised: float
    drawn: int

    @property
    def times_seen(self) -> float:
        """How often each of its rows is seen in an epoch, on average."""
        return self.drawn / self.num_rows if self.num_rows else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the part as plain data, with the totals of an epoch."""
        totals = {name: round(getattr(self, name) * self.drawn) for name in ("images", "tokens", "supervised")}
        return {
            "name": self.name,
            "num_rows": self.num_rows,
            "num_measured": self.num_measured,
            "rows": self.drawn,
            "times_seen": round(self.times_seen, 4),
            **totals,
        }


def measure_part(name: str, rows: Any, processor: Any, max_length: int | None, seed: int = 0) -> Part:
    """Return what one source holds; of a large one, 2,000 rows drawn with a seed are encoded.

    Args:
        rows: what `load_llava_dataset(..., decode_images=False)` returns.
    """
    numbers: Sequence[int] = range(len(rows))
    if len(rows) > _SAMPLE_ROWS:
        numbers = sorted(random.Random(seed).sample(numbers, _SAMPLE_ROWS))
    images = tokens = supervised = measured = 0
    for number in numbers:
        row = rows[number]
        try:
            encoded = encode_row(row, processor, max_length=max_length)
        except DataError:
            continue  # training leaves it out, or stops and says why
        measured += 1
        images += encoded.get("num_images", len(row["images"]))
        tokens += len(encoded["input_ids"])
        supervised += sum(label != IGNORE for label in encoded["labels"])
    if not measured:
        raise DataError(f"{name}: none of its rows can be trained on. See `vir-hf data check`.")
    per_row = (images / measured, tokens / measured, supervised / measured)
    return Part(name, len(rows), measured, *per_row, drawn=len(rows))


def mixed(parts: Sequence[Part], sources: Sequence[dict[str, Any]]) -> list[Part]:
    """Return the parts with what each gives in an epoch by the weights and numbers of rows of `sources`."""
    counts = mixture_counts([part.num_rows for part in parts], sources)
    return [dataclasses.replace(part, drawn=count) for part, count in zip(parts, counts, strict=True)]


def with_weights(sources: Sequence[dict[str, Any]], weights: str) -> list[dict[str, Any]]:
    """Return the sources with other weights, written as `0.5,0.3,0.2` in their order.

    Raises:
        RecipeError: another number of weights than sources, or a weight that is not above 0.
    """
    try:
        values = [float(word) for word in weights.split(",")]
    except ValueError:
        values = []
    if len(values) != len(sources) or not all(0 < value < float("inf") for value in values):
        raise RecipeError(
            f"--weights {weights}: expected {len(sources)} numbers above 0, one for each source, such as "
            f"{','.join(['1'] * len(sources))}."
        )
    return [{**source, "weight": value, "num_rows": None} for source, value in zip(sources, values, strict=True)]


def table(parts: Sequence[Part], epochs: float) -> str:
    """Return the mixture as a table, one source a line and the sum below."""
    head = (
        "source",
        "has rows",
        "gives rows",
        "share",
        "each seen",
        "images",
        "tokens",
        "share",
        "supervised",
        "share",
    )
    total_rows = sum(part.drawn for part in parts)
    totals = {
        name: sum(getattr(part, name) * part.drawn for part in parts) for name in ("images", "tokens", "supervised")
    }
    lines = [head]
    for part in parts:
        sums = {name: getattr(part, name) * part.drawn for name in totals}
        lines.append(
            (
                part.name,
                f"{part.num_rows:,}",
                f"{part.drawn:,}",
                _share(part.drawn, total_rows),
                f"{part.times_seen * epochs:.2f}x",
                f"{sums['images']:,.0f}",
                f"{sums['tokens']:,.0f}",
                _share(sums["tokens"], totals["tokens"]),
                f"{sums['supervised']:,.0f}",
                _share(sums["supervised"], totals["supervised"]),
            )
        )
    has = sum(part.num_rows for part in parts)
    numbers = [f"{totals[name]:,.0f}" for name in ("images", "tokens", "supervised")]
    lines.append(("an epoch", f"{has:,}", f"{total_rows:,}", "", "", numbers[0], numbers[1], "", numbers[2], ""))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _share(value: float, total: float) -> str:
    return f"{100 * value / total:.1f} %" if total else "0 %"
