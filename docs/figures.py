"""Draws the figures of `docs/explanation/`, from the lengths below: `python docs/figures.py`.

They are written into the pages as they are, so their text takes the colour of the page, in dark mode too.
"""

from __future__ import annotations

from pathlib import Path

OUT = Path(__file__).resolve().parent / "_static"
CELL, GAP, ROW = 13, 2, 22
COLOURS = {"image": "#3b82f6", "prompt": "#9ca3af", "answer": "#16a34a", "padding": "none"}
# Three rows about one image: (what, how many tokens), in miniature.
SHARED = [("prompt", 4), ("image", 12)]
ROWS = [
    [*SHARED, ("prompt", 5), ("answer", 7)],
    [*SHARED, ("prompt", 4), ("answer", 2)],
    [*SHARED, ("prompt", 6), ("answer", 12)],
]


def main() -> None:
    """Write both figures."""
    (OUT / "labels.svg").write_text(labels(), encoding="utf-8")
    (OUT / "packing.svg").write_text(packing(), encoding="utf-8")


def tokens(parts: list[tuple[str, int]]) -> list[str]:
    """Return one word for each token."""
    return [what for what, count in parts for _ in range(count)]


def cells(row: list[str], x: int, y: int) -> str:
    """Return a row of tokens as squares; padding is an outline."""
    drawn = []
    for number, what in enumerate(row):
        outline = ' stroke="currentColor" stroke-opacity="0.4"' if what == "padding" else ""
        left = x + number * (CELL + GAP)
        drawn.append(
            f'<rect x="{left}" y="{y}" width="{CELL}" height="{CELL}" rx="2" fill="{COLOURS[what]}"{outline}/>'
        )
    return "".join(drawn)


def words(text: str, x: int, y: int) -> str:
    """Return a line of text."""
    return f'<text x="{x}" y="{y}" font-size="13" fill="currentColor">{text}</text>'


def figure(title: str, width: int, height: int, inner: str) -> str:
    """Return a figure that fits into a narrow page and says to a screen reader what it shows."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" style="max-width:100%;height:auto" '
        f'width="{width}" font-family="sans-serif"><title>{title}</title>{inner}</svg>\n'
    )


def legend(names: list[str], y: int) -> str:
    """Return what each colour stands for."""
    drawn, x = "", 0
    for name in names:
        drawn += cells([name], x, y) + words(name, x + CELL + 5, y + 11)
        x += 85
    return drawn


def labels() -> str:
    """Return one row of tokens and, below it, which of them have a label."""
    row = tokens([("prompt", 4), ("image", 12), ("prompt", 5), ("answer", 6), ("prompt", 4), ("answer", 5)])
    learned = [what if what == "answer" else "padding" for what in row]
    inner = (
        words("tokens of the row", 0, 12)
        + cells(row, 0, 18)
        + words("tokens with a label", 0, 56)
        + cells(learned, 0, 62)
    )
    width = len(row) * (CELL + GAP)
    return figure(
        "Of a row's tokens only those of answers have a label",
        width,
        104,
        inner + legend(["prompt", "image", "answer"], 88),
    )


def packing() -> str:
    """Return the same rows padded, packed, and with their beginning shared, with the number of tokens that are computed."""
    rows = [tokens(row) for row in ROWS]
    longest = max(map(len, rows))
    shared = sum(count for _, count in SHARED)
    computed = {
        "padded": longest * len(rows),
        "packed": sum(map(len, rows)),
        "beginning shared": shared + sum(len(row) - shared for row in rows),
    }
    y, inner = 12, ""
    inner += words(f"padded: {computed['padded']} tokens are computed", 0, y)
    for row in rows:
        inner += cells(row + ["padding"] * (longest - len(row)), 0, y + 6)
        y += ROW - 6
    y += 30
    inner += words(f"packed: {computed['packed']}", 0, y)
    x = 0
    for number, row in enumerate(rows):
        if number == 2:  # the figure is no wider than a page: the third row stands below
            x, y = 0, y + ROW - 6
        inner += cells(row, x, y + 6)
        x += len(row) * (CELL + GAP) + 6
    y += 50
    inner += words(f"beginning shared: {computed['beginning shared']}", 0, y)
    inner += cells(rows[0][:shared], 0, y + 6)
    x = shared * (CELL + GAP) + 6
    for row in rows:
        inner += cells(row[shared:], x, y + 6)
        x += (len(row) - shared) * (CELL + GAP) + 6
    width = max(x, (len(rows[0]) + len(rows[1])) * (CELL + GAP) + 12)
    names = ["prompt", "image", "answer", "padding"]
    return figure(
        "Three rows about one image, padded, packed, and with their beginning computed once",
        width,
        y + 56,
        inner + legend(names, y + 36),
    )


if __name__ == "__main__":
    main()
