"""Self-contained HTML pages by Jinja2, which escapes what it is given: no script, no request to anywhere, light and dark."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from vir_hf.files import HTML_MARK


@dataclass(frozen=True)
class Bar:
    """A rectangle of a chart, in the chart's units, with what a pointer resting on it shows."""

    x: float
    y: float
    width: float
    height: float
    title: str = ""


@dataclass(frozen=True)
class Line:
    """A line of a chart; `kind` is `axis` or `mark`."""

    kind: str
    x1: float
    x2: float
    y1: float
    y2: float


@dataclass(frozen=True)
class Label:
    """A text in a chart; `anchor` says which of its ends stands at `x`: `start`, `middle` or `end`."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    kind: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawing that `parts.html` writes as SVG, `width` by `height` units of its own."""

    title: str
    width: int
    height: int
    bars: list[Bar] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)


@dataclass(frozen=True)
class Curve:
    """A line through measured points; `points` as SVG writes them, `kind` says which colour, `last` what it ended at."""

    points: str
    kind: str
    name: str
    last: str


@dataclass(frozen=True)
class Curves:
    """Curves over the steps of a run, `width` by `height` units, with the ends of both axes."""

    title: str
    width: int
    height: int
    curves: list[Curve]
    labels: list[Label]


@functools.cache
def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "page_templates")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)


def render(template: str, **values: Any) -> str:
    """Return a page of `page_templates/`; all values are text, numbers or lists of them, and are escaped."""
    return _environment().get_template(template).render(mark=HTML_MARK, **values)


def short_number(value: float) -> str:
    """Return a number in three or four characters: 950, 12.3k, 4.5M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


def histogram(
    title: str, values: Sequence[int], *, mark: int | None = None, mark_label: str = "", num_bins: int = 40
) -> Chart:
    """Return how often values fall in each of equal bins.

    Args:
        values: at least one whole number.
        mark: a value at which a line is drawn, if it lies among the others.
        mark_label: what the line is called.
        num_bins: how many bins there are at most.
    """
    low, high = min(values), max(values)
    step = max(1, math.ceil((high - low + 1) / num_bins))
    counts = [0] * math.ceil((high - low + 1) / step)
    for value in values:
        counts[(value - low) // step] += 1
    width, height, top = 400, 120, 16
    bar, peak, bottom = width / len(counts), max(counts), top + height
    chart = Chart(title, width, bottom + 20, lines=[Line("axis", 0, width, bottom, bottom)])
    for index, count in enumerate(counts):
        first, size = low + index * step, height * count / peak
        label = f"{first:,}: {count:,}" if step == 1 else f"{first:,} to {first + step - 1:,}: {count:,}"
        if count:
            chart.bars.append(Bar(index * bar, bottom - size, max(bar - 1, 0.5), size, label))
    chart.labels.append(Label(0, bottom + 15, f"{low:,}"))
    if high > low:
        chart.labels.append(Label(width / 2, bottom + 15, f"{low + step * len(counts) // 2:,}", "middle"))
        chart.labels.append(Label(width, bottom + 15, f"{high:,}", "end"))
    if mark is not None and low <= mark <= high:
        x = (mark - low) / step * bar
        is_right = x > width / 2
        chart.lines.append(Line("mark", x, x, top, bottom))
        text, anchor = f"{mark_label} {mark:,}", "end" if is_right else "start"
        chart.labels.append(Label(x - 4 if is_right else x + 4, 11, text, anchor, "mark-label"))
    else:
        chart.labels.append(Label(width, 11, f"highest bar {peak:,}", "end"))
    return chart


def bars(title: str, counts: Mapping[str, int]) -> Chart:
    """Return one labelled horizontal bar for each count."""
    peak, total = max(counts.values(), default=0) or 1, sum(counts.values()) or 1
    chart = Chart(title, 400, max(len(counts), 1) * 24)
    for index, (name, count) in enumerate(counts.items()):
        y, length = index * 24, max(210 * count / peak, 1)
        chart.bars.append(Bar(70, y + 3, length, 16))
        chart.labels.append(Label(0, y + 15, name))
        chart.labels.append(Label(76 + length, y + 15, f"{count:,} ({count / total:.0%})"))
    return chart


def curves(title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> Curves:
    """Return lines through `(step, value)` points on common axes; each name is one colour, in their order.

    Args:
        series: up to three, each of at least one point; values that are not finite are left out.
    """
    finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    every = [point for points in finite.values() for point in points] or [(0.0, 0.0)]
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*every, strict=True))
    width, start, top, height = 400, 42, 16, 120
    across, up = (width - start) / ((right - left) or 1), height / ((high - low) or 1)
    drawn = []
    for number, (name, points) in enumerate(finite.items()):
        if points:
            places = " ".join(
                f"{start + (x - left) * across:.1f},{top + height - (y - low) * up:.1f}" for x, y in points
            )
            drawn.append(Curve(places, f"curve{number}", name, f"{points[-1][1]:.4g}"))
    labels = [
        Label(0, top + 4, f"{high:.4g}"),
        Label(0, top + height, f"{low:.4g}"),
        Label(start, top + height + 15, f"step {left:g}"),
        Label(width, top + height + 15, f"{right:g}", "end"),
    ]
    return Curves(title, width, top + height + 20, drawn, labels)
