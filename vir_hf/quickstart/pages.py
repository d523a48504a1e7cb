"""Pages with small print: a table of single letters, too small to be read once the whole page is one view.

The same pages for the same seed on every machine: letters are drawn from the patterns below, not from a font.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from vir_hf.files import write_json

CELL = 64  # pixels of a cell's side, which is a tile's
SPOT = 16  # pixels of the places in a cell where a letter may stand, which are a tower's patches
COLUMNS = "ABCD"
SIDES = (3, 4)  # rows or columns of a page
PAPER = (250, 248, 242)
LINE = (222, 220, 212)
# Every letter has 16 dots, so that its darkness does not betray it when it is shrunk to a speck.
LETTERS = {
    "a": ("01110", "10001", "11111", "10001", "10001", "10001", "00000"),
    "c": ("01111", "11000", "11000", "10000", "10000", "11000", "01111"),
    "e": ("11111", "10000", "11110", "10000", "11111", "00000", "00000"),
    "h": ("10001", "10001", "10001", "11111", "10001", "10001", "10000"),
    "k": ("10001", "10010", "11100", "11000", "11100", "10010", "10001"),
    "n": ("10001", "11001", "10101", "10101", "10011", "10001", "00000"),
    "t": ("11111", "11111", "00100", "00100", "00100", "00100", "00110"),
    "z": ("11111", "00011", "00110", "01100", "11111", "00000", "00000"),
}


@dataclass(frozen=True)
class Page:
    """A table of letters, row by row."""

    rows: tuple[tuple[str, ...], ...]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return CELL * len(self.rows[0]), CELL * len(self.rows)


def random_page(rng: random.Random) -> Page:
    """Return a page of three or four rows and columns."""
    num_rows, num_columns = rng.choice(SIDES), rng.choice(SIDES)
    letters = list(LETTERS)
    return Page(tuple(tuple(rng.choice(letters) for _ in range(num_columns)) for _ in range(num_rows)))


def draw_page(page: Page, rng: random.Random) -> Image.Image:
    """Return the page's image: ruled cells with one letter each, somewhere in the cell and of some darkness."""
    image = draw_blank_page(page)
    pixels = np.asarray(image).copy()
    for row, letters in enumerate(page.rows):
        for column, letter in enumerate(letters):
            _print(pixels, letter, column * CELL, row * CELL, rng)
    return Image.fromarray(pixels)


def draw_blank_page(page: Page) -> Image.Image:
    """Return the page with nothing printed on it, which shows what can be guessed from a question alone."""
    image = Image.new("RGB", page.size, PAPER)
    pen = ImageDraw.Draw(image)
    for row in range(len(page.rows)):
        for column in range(len(page.rows[0])):
            left, top = column * CELL, row * CELL
            pen.rectangle((left, top, left + CELL - 1, top + CELL - 1), outline=LINE)
    return image


def draw_cells(num_cells: int, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Return single cells for a tower to learn from, and what each of their patches shows.

    Returns:
        `(num_cells, 64, 64, 3)` pixels, and `(num_cells, 16)`: 0 for the patches of an empty cell; in another the letter's number
        for its own patch and -100, which is not learned, for the others.
    """
    page = Page((("",),))
    cells, targets = [], []
    for _ in range(num_cells):
        pixels = np.asarray(draw_blank_page(page)).copy()
        number = rng.randrange(len(LETTERS) + 1)
        shown = np.zeros((CELL // SPOT, CELL // SPOT), dtype=np.int64)
        if number:
            shown[:] = -100
            shown[_print(pixels, list(LETTERS)[number - 1], 0, 0, rng)] = number
        cells.append(pixels)
        targets.append(shown.reshape(-1))
    return np.stack(cells), np.stack(targets)


def _print(pixels: np.ndarray, letter: str, left: int, top: int, rng: random.Random) -> tuple[int, int]:
    """Put a letter of 5 by 7 pixels into the middle of one of a cell's four inner spots; return the spot's row and column."""
    row, column = rng.randint(1, 2), rng.randint(1, 2)
    x, y = left + column * SPOT + 5 + rng.randint(-1, 1), top + row * SPOT + 4 + rng.randint(-1, 1)
    ink = rng.randint(0, 110)
    dots = np.array([[dot == "1" for dot in line] for line in LETTERS[letter]])
    height, width = dots.shape
    pixels[y : y + height, x : x + width][dots] = ink
    return row, column


def question_about(row: int, column: int) -> str:
    """Return the question for a letter's place, counted from 0: cells are named as in a spreadsheet."""
    return f"Cell {COLUMNS[column]}{row + 1}?"


def write_pages(folder: Path, *, num_pages: int, num_heldout: int, num_questions: int, seed: int) -> list[Page]:
    """Return the held-out pages after writing all images and rows into an empty `folder`.

    `images/`, `train.json` (one conversation of at most `num_questions` questions a page), `heldout.json` (one question a row,
    every letter equally often the answer).
    """
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True)
    train = []
    for number in range(num_pages):
        page = random_page(rng)
        name = _save(draw_page(page, rng), folder, f"train_{number:05d}.png")
        places = [(row, column) for row in range(len(page.rows)) for column in range(len(page.rows[0]))]
        asked = rng.sample(places, min(num_questions, len(places)))
        train.append(_to_row(f"page-{number:05d}", name, page, asked))
    heldout, pages = [], []
    for number in range(num_heldout):
        wanted = list(LETTERS)[number % len(LETTERS)]
        page = random_page(rng)
        row, column = rng.randrange(len(page.rows)), rng.randrange(len(page.rows[0]))
        page = _with_letter(page, row, column, wanted)
        name = _save(draw_page(page, rng), folder, f"heldout_{number:05d}.png")
        heldout.append(_to_row(f"heldout-{number:05d}", name, page, [(row, column)]))
        pages.append(page)
    write_json(folder / "train.json", train, indent=1, ensure_ascii=True)
    write_json(folder / "heldout.json", heldout, indent=1, ensure_ascii=True)
    return pages


def _with_letter(page: Page, row: int, column: int, letter: str) -> Page:
    rows = [list(letters) for letters in page.rows]
    rows[row][column] = letter
    return Page(tuple(map(tuple, rows)))


def _save(image: Image.Image, folder: Path, name: str) -> str:
    image.save(folder / "images" / name, compress_level=1)
    return name


def _to_row(row_id: str, image: str, page: Page, asked: list[tuple[int, int]]) -> dict[str, object]:
    turns = []
    for number, (row, column) in enumerate(asked):
        text = question_about(row, column)
        turns.append({"from": "human", "value": f"<image>\n{text}" if number == 0 else text})
        turns.append({"from": "gpt", "value": page.rows[row][column]})
    return {"id": row_id, "image": image, "conversations": turns}
