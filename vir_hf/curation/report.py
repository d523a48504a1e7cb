"""A check's findings as figures, as plain data for `--json`, and as one self-contained HTML page."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vir_hf.curation import pages as html_pages
from vir_hf.curation.checks import ERRORS, REMEDIES
from vir_hf.errors import clipped

if TYPE_CHECKING:
    from vir_hf.curation.checks import CheckReport, Problem

_EXAMPLES_PER_KIND = 25


def report_as_json(report: CheckReport, batch_size: int = 16) -> dict[str, Any]:
    """Return the whole report as plain data."""
    has_several = len(report.files) > 1
    return {
        "files": report.files,
        "image_folder": report.image_folder,
        "num_rows": report.num_rows,
        "num_bad_rows": len(report.bad_rows),
        "num_untrainable_rows": len(report.untrainable_rows),
        "num_images": len(report.rows_per_image),
        "is_decoded": report.is_decoded,
        "seconds": round(report.seconds, 2),
        "kinds": report.kinds(),
        "shapes": dict(report.seen.shapes.most_common()),
        "filtered": dict(report.seen.filtered.most_common()),
        "unread_keys": dict(report.unread.most_common()),
        "statistics": statistics(report, batch_size),
        "problems": [_problem_as_json(problem, has_several) for problem in report.problems],
    }


def _problem_as_json(problem: Problem, has_several: bool) -> dict[str, Any]:
    place = {"file": problem.file} if has_several else {}
    return {
        **place,
        "row": problem.row,
        "id": problem.id,
        "kind": problem.kind,
        "severity": problem.severity,
        "detail": problem.detail,
    }


def unread_note(report: CheckReport) -> str:
    """Return the keys of no known meaning and how many rows have each, in one line."""
    listed = [f"{name} ({count:,} rows)" for name, count in report.unread.most_common(12)]
    more = f" and {len(report.unread) - len(listed)} more" if len(report.unread) > len(listed) else ""
    return clipped(f"Keys that nothing reads: {', '.join(listed)}{more}.")


def statistics(report: CheckReport, batch_size: int = 16) -> dict[str, Any]:
    """Return the figures about rows and pictures.

    `pad_ratio` is the share of padding in batches of `batch_size` rows drawn at random, as an ordinary padded collator
    makes them; `tokens_per_epoch` counts rows cut to `max_length`.
    """
    lengths = report.lengths
    limit = report.max_length if report.has_tokens and report.max_length else None
    kept = [min(length, limit) for length in lengths] if limit else lengths
    figures: dict[str, Any] = {
        "unit": "tokens" if report.has_tokens else "characters",
        "max_length": limit,
        "batch_size": batch_size,
        "pad_ratio": round(pad_ratio(kept, batch_size), 4),
        "row_lengths": _summary(lengths),
        "images_per_row": _counts(report.images_per_row),
        "rows_per_image": _counts(report.rows_per_image),
        "image_formats": dict(Counter(header.format for header in report.images).most_common()),
        "image_widths": _summary([header.width for header in report.images]),
        "image_heights": _summary([header.height for header in report.images]),
        "image_bytes": sum(header.num_bytes for header in report.images),
    }
    if report.has_tokens:
        figures["tokens_per_epoch"] = sum(kept)
        figures["supervised_tokens_per_epoch"] = sum(report.supervised)
    return figures


def _summary(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "min": ordered[0],
        "median": ordered[len(ordered) // 2],
        "mean": round(sum(ordered) / len(ordered), 1),
        "p95": ordered[int(len(ordered) * 0.95)],
        "p99": ordered[int(len(ordered) * 0.99)],
        "max": ordered[-1],
    }


def _counts(values: Iterable[int]) -> dict[str, int]:
    """Return how often each number occurs, from 5 on together."""
    counts = Counter(str(value) if value < 5 else "5+" for value in values)
    return dict(sorted(counts.items()))


def pad_ratio(lengths: Sequence[int], batch_size: int, seed: int = 0) -> float:
    """Return the share of padding when rows are batched at random and padded to the longest of their batch."""
    shuffled = list(lengths)
    random.Random(seed).shuffle(shuffled)
    batches = [shuffled[start : start + batch_size] for start in range(0, len(shuffled), batch_size)]
    padded = sum(max(batch) * len(batch) for batch in batches)
    return 1 - sum(shuffled) / padded if padded else 0.0


def report_as_html(report: CheckReport, batch_size: int = 16) -> str:
    """Return the report as one HTML page that needs nothing from outside."""
    figures = statistics(report, batch_size)
    num_bad, num_refused = len(report.bad_rows), len(report.untrainable_rows)
    verdict = "Nothing wrong was found." if not num_bad else f"{num_bad:,} of {report.num_rows:,} rows need a look."
    if num_refused:
        verdict += f" {num_refused:,} of them cannot be trained on."
    folder = report.image_folder or "the data file's own folder"
    looked = "decoded" if report.is_decoded else "looked at by header and end, not decoded"
    return html_pages.render(
        "check.html",
        title="Data check",
        lead=f"{', '.join(report.files[:3])}{' ...' if len(report.files) > 3 else ''}",
        foot=f"Images from {folder}, {looked}. Checked in {report.seconds:.1f} s."
        + (f" {unread_note(report)}" if report.unread else ""),
        verdict=verdict,
        tone="bad" if num_refused else "odd" if num_bad else "good",
        figures=_tiles(report, figures),
        kinds=_kinds(report),
        charts=_charts(report, figures),
    )


def _tiles(report: CheckReport, figures: dict[str, Any]) -> list[tuple[str, str]]:
    tiles = [("rows", f"{report.num_rows:,}"), ("distinct images", f"{len(report.rows_per_image):,}")]
    if report.rows_per_image:
        tiles.append(("rows per image", f"{sum(report.rows_per_image) / len(report.rows_per_image):.2f}"))
    if figures["row_lengths"]:
        tiles.append((f"{figures['unit']} per row, mean", f"{figures['row_lengths']['mean']:,.0f}"))
    if report.has_tokens:
        tokens, learned = figures["tokens_per_epoch"], figures["supervised_tokens_per_epoch"]
        tiles.append(("tokens per epoch", html_pages.short_number(tokens)))
        tiles.append(("of them learned", f"{learned / tokens:.1%}" if tokens else "0 %"))
    tiles.append((f"padding at batch size {figures['batch_size']}", f"{figures['pad_ratio']:.1%}"))
    return tiles


def _kinds(report: CheckReport) -> list[dict[str, Any]]:
    """Return every kind of problem with its first rows."""
    counts = report.kinds()
    examples: dict[str, list[Problem]] = {kind: [] for kind in counts}
    for problem in report.problems:
        if len(examples[problem.kind]) < _EXAMPLES_PER_KIND:
            examples[problem.kind].append(problem)
    return [
        {
            "name": kind,
            "severity": "error" if kind in ERRORS else "warning",
            "tone": "bad" if kind in ERRORS else "odd",
            "count": f"{count:,}",
            "remedy": REMEDIES[kind],
            "rows": [(problem.row, problem.id, problem.detail.partition(". ")[0]) for problem in examples[kind]],
            "more": f"{count - len(examples[kind]):,}" if count > len(examples[kind]) else "",
        }
        for kind, count in counts.items()
    ]


def _charts(report: CheckReport, figures: dict[str, Any]) -> list[html_pages.Chart]:
    charts = []
    if report.lengths:
        title, limit = f"Row length, {figures['unit']}", figures["max_length"]
        charts.append(html_pages.histogram(title, report.lengths, mark=limit, mark_label="max_length"))
    if report.supervised:
        charts.append(html_pages.histogram("Learned tokens per row", report.supervised))
    if report.images:
        charts.append(html_pages.histogram("Image width, pixels", [header.width for header in report.images]))
        charts.append(html_pages.histogram("Image height, pixels", [header.height for header in report.images]))
        charts.append(html_pages.bars("Rows per image", figures["rows_per_image"]))
        charts.append(html_pages.bars("Images per row", figures["images_per_row"]))
        charts.append(html_pages.bars("Image formats", figures["image_formats"]))
    return charts
