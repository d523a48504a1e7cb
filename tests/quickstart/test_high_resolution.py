"""The quickstart of small print: true rows, letters that only their shape tells apart, both models, and the panel."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vir_hf.errors import RecipeError
from vir_hf.llava.views import Tiles
from vir_hf.quickstart.high_resolution import Size, run_high_resolution, with_tiles
from vir_hf.quickstart.pages import (
    CELL,
    COLUMNS,
    LETTERS,
    Page,
    draw_blank_page,
    draw_cells,
    draw_page,
    random_page,
    write_pages,
)
from vir_hf.quickstart.run import questions_of, read_rows
from vir_hf.recipe.load import load_recipe


def read_cell(image: Image.Image, row: int, column: int) -> str:
    """The letter that a cell's dark pixels form."""
    cell = np.asarray(image.convert("L"))[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
    ys, xs = np.nonzero(cell < 150)
    shape = {(y - ys.min(), x - xs.min()) for y, x in zip(ys, xs, strict=True)}
    for letter, lines in LETTERS.items():
        dots = [(y, x) for y, line in enumerate(lines) for x, dot in enumerate(line) if dot == "1"]
        top, left = min(y for y, _ in dots), min(x for _, x in dots)
        if {(y - top, x - left) for y, x in dots} == shape:
            return letter
    raise AssertionError(f"no letter in {row}, {column}")


def test_every_answer_is_what_the_pixels_show(tmp_path: Path) -> None:
    write_pages(tmp_path / "data", num_pages=6, num_heldout=16, num_questions=5, seed=1)
    for name in ("train", "heldout"):
        for row in read_rows(tmp_path / "data" / f"{name}.json"):
            image = Image.open(tmp_path / "data" / "images" / row["image"])
            for question, answer in questions_of(row):
                cell = question.removeprefix("Cell ").rstrip("?")
                assert read_cell(image, int(cell[1]) - 1, COLUMNS.index(cell[0])) == answer
    answers = Counter(row["conversations"][1]["value"] for row in read_rows(tmp_path / "data" / "heldout.json"))
    assert set(answers.values()) == {2} and len(answers) == len(LETTERS)


def test_letters_differ_in_shape_and_not_in_how_much_ink_they_take() -> None:
    assert {sum(line.count("1") for line in lines) for lines in LETTERS.values()} == {16}
    assert len(set(LETTERS.values())) == len(LETTERS)


def test_pages_are_the_same_for_the_same_seed_and_a_blank_one_shows_nothing() -> None:
    page = random_page(random.Random(3))
    one, two = (draw_page(page, random.Random(4)) for _ in range(2))
    assert one.tobytes() == two.tobytes() and one.size == page.size
    assert np.asarray(draw_blank_page(page).convert("L")).min() > 200


def test_a_page_is_cut_into_its_cells() -> None:
    for rows in (3, 4):
        for columns in (3, 4):
            page = Page((("a",) * columns,) * rows)
            cut = Tiles(CELL, 1, 16).of(*page.size)
            assert (cut.rows, cut.columns) == (rows, columns)


def test_cells_for_the_tower_hold_the_letter_they_are_called() -> None:
    cells, targets = draw_cells(20, random.Random(0))
    for cell, target in zip(cells, targets, strict=True):
        number = target.max()
        assert (target == 0).all() if number == 0 else (target != -100).sum() == 1
        if number:
            assert read_cell(Image.fromarray(cell), 0, 0) == list(LETTERS)[number - 1]


def test_the_panel_shows_where_the_tiles_are() -> None:
    page = Page((("a",) * 4,) * 3)
    shown = with_tiles(draw_blank_page(page), Tiles(CELL, 1, 16))
    assert shown.size[0] == shown.size[1] == 2 * 4 * CELL
    blue = (np.asarray(shown) == np.array([38, 84, 214])).all(axis=-1)
    assert blue[shown.size[1] // 2].sum() >= 8  # a line at both sides of each of four tiles


def test_it_trains_both_models_and_says_what_each_reads(tmp_path: Path) -> None:
    overrides = [
        "experiment=quickstart_hd",
        f"training.output_dir={tmp_path / 'run'}",
        "training.dataloader_num_workers=0",
    ]
    recipe = load_recipe([*overrides, "training.max_steps=2"])
    size = Size(num_pages=8, num_heldout=8, num_questions=4, num_cells=16, tower_steps=2)
    metrics = run_high_resolution(recipe, size)
    assert {"heldout_accuracy", "one_view_accuracy", "blind_accuracy", "chance_accuracy"} <= set(metrics)
    assert metrics["num_heldout_questions"] == 8
    with Image.open(tmp_path / "run" / "samples.png") as panel:
        assert panel.width > 600
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["model_type"], config["tiling"], config["max_tiles"]) == ("vir_llava", "tiles", 16)
    one = json.loads((tmp_path / "run" / "one_view" / "config.json").read_text())
    assert one.get("tiling", "none") == "none" and one["pixel_shuffle"] == 4


def test_it_runs_in_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = load_recipe(["experiment=quickstart_hd", f"training.output_dir={tmp_path}"])
    with pytest.raises(
        RecipeError, match="experiment=quickstart_hd: draws and trains in one process, found WORLD_SIZE=2"
    ):
        run_high_resolution(recipe)
