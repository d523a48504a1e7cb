"""Small self-contained HTML pages: no script, no request to anywhere, light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from vir_hf.files import HTML_MARK

_STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1c2330; --soft: #5b6577; --page: #f6f7f9; --card: #ffffff; --line: #dfe3ea; --bar: #3b76d6;
  --bad: #b3261e; --bad-back: #fbe9e7; --odd: #8a5a00; --odd-back: #fdf1d8; --good: #1b6e3c; --good-back: #e3f4e9;
}
@media (prefers-color-scheme: dark) { :root {
  --ink: #e7eaf0; --soft: #9ba5b7; --page: #12151b; --card: #1b2029; --line: #313947; --bar: #6ea2f5;
  --bad: #ffb4ab; --bad-back: #4a1f1c; --odd: #f3c86b; --odd-back: #40320f; --good: #8fdcab; --good-back: #17361f;
} }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0; }
h2 { font-size: 18px; margin: 36px 0 8px; }
h3 { font-size: 14px; margin: 0 0 10px; }
.lead, .note, footer { color: var(--soft); overflow-wrap: anywhere; }
.lead { margin: 2px 0 18px; }
.note { margin: 0 0 12px; }
footer { margin-top: 40px; font-size: 13px; }
.verdict { padding: 12px 16px; border-radius: 8px; font-size: 17px; font-weight: 600; }
.bad { color: var(--bad); background: var(--bad-back); }
.odd { color: var(--odd); background: var(--odd-back); }
.good { color: var(--good); background: var(--good-back); }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0; }
.tile, .card, details { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: 10px 16px; min-width: 130px; }
.tile b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.card, details { margin: 0 0 10px; padding: 10px 14px; }
summary { cursor: pointer; }
.badge { border-radius: 4px; padding: 1px 7px; font-size: 12px; }
.count { font-variant-numeric: tabular-nums; margin: 0 10px 0 4px; }
.remedy, .more { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: 10px 0 4px; font-size: 13px; }
th { text-align: left; color: var(--soft); font-weight: 500; }
th, td { padding: 4px 14px 4px 0; vertical-align: top; border-top: 1px solid var(--line); }
td { overflow-wrap: anywhere; }
td:first-child { white-space: nowrap; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 14px; }
.charts .card { margin: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg rect { fill: var(--bar); }
svg .axis { stroke: var(--line); }
svg .mark { stroke: var(--bad); stroke-dasharray: 4 3; }
svg .mark-label { fill: var(--bad); }
"""


def page(title: str, lead: str, body: str, foot: str = "", style: str = "") -> str:
    """Return a whole page; `body` is HTML, the rest is text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"{HTML_MARK}"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>{body}'
        f"<footer>{escape(foot)}</footer></main></body></html>\n"
    )


def element(tag: str, content: str, cls: str = "", *, is_html: bool = False) -> str:
    """Return one element around text, or around HTML."""
    attribute = f' class="{escape(cls)}"' if cls else ""
    return f"<{tag}{attribute}>{content if is_html else escape(content)}</{tag}>"


def section(title: str, body: str, note: str = "") -> str:
    """Return a heading, an optional note, and HTML below it."""
    return f"<section>{element('h2', title)}{element('p', note, 'note') if note else ''}{body}</section>"


def tiles(figures: Sequence[tuple[str, str]]) -> str:
    """Return a row of figures with what they count below them."""
    inner = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in figures
    )
    return f'<div class="tiles">{inner}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of texts."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def short_number(value: float) -> str:
    """Return a number in three or four characters: 950, 12.3k, 4.5M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


def histogram(
    title: str, values: Sequence[int], *, mark: int | None = None, mark_label: str = "", num_bins: int = 40
) -> str:
    """Return a card with how often values fall in each of equal bins; `mark` draws a line at one value."""
    low, high = min(values), max(values)
    step = max(1, math.ceil((high - low + 1) / num_bins))
    counts = [0] * math.ceil((high - low + 1) / step)
    for value in values:
        counts[(value - low) // step] += 1
    width, height, top = 400.0, 120.0, 16.0
    bar, peak, bottom = width / len(counts), max(counts), top + height
    parts = []
    for index, count in enumerate(counts):
        first, size = low + index * step, height * count / peak
        label = f"{first:,}: {count:,}" if step == 1 else f"{first:,} to {first + step - 1:,}: {count:,}"
        if count:
            parts.append(
                f'<rect x="{index * bar:.1f}" y="{bottom - size:.1f}" width="{max(bar - 1, 0.5):.1f}" height="{size:.1f}">'
                f"<title>{label}</title></rect>"
            )
    parts.append(f'<line class="axis" x1="0" x2="{width}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(_label(0, bottom + 15, f"{low:,}"))
    if high > low:
        parts.append(_label(width / 2, bottom + 15, f"{low + step * len(counts) // 2:,}", "middle"))
        parts.append(_label(width, bottom + 15, f"{high:,}", "end"))
    if mark is not None and low <= mark <= high:
        x = (mark - low) / step * bar
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        is_right = x > width / 2
        parts.append(
            _label(
                x - 4 if is_right else x + 4, 11, f"{mark_label} {mark:,}", "end" if is_right else "start", "mark-label"
            )
        )
    else:
        parts.append(_label(width, 11, f"highest bar {peak:,}", "end"))
    return _chart(title, 400, bottom + 20, parts)


def _label(x: float, y: float, text: str, anchor: str = "start", cls: str = "") -> str:
    return f'<text class="{cls}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _chart(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    svg = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return element("div", element("h3", title) + svg, "card", is_html=True)


def bars(title: str, counts: Mapping[str, int]) -> str:
    """Return a card with one labelled horizontal bar a count."""
    peak, total = max(counts.values(), default=0) or 1, sum(counts.values()) or 1
    parts = []
    for index, (name, count) in enumerate(counts.items()):
        y, length = index * 24, max(210 * count / peak, 1)
        parts.append(_label(0, y + 15, name))
        parts.append(f'<rect x="70" y="{y + 3}" width="{length:.1f}" height="16"/>')
        parts.append(_label(76 + length, y + 15, f"{count:,} ({count / total:.0%})"))
    return _chart(title, 400, max(len(counts), 1) * 24, parts)
