"""Checks, inspection and the memory plan of models whose images are several views."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from tiny_training import recipe_for

from vir_hf.budget.shapes import describe, num_image_tokens
from vir_hf.curation.checks import check_data
from vir_hf.curation.inspection import as_page, inspect_row
from vir_hf.model.build import build
from vir_hf.rows.encoding import row_length


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows about a wide image, a small one, one of 1 x 900 pixels and one that is missing."""
    root = tmp_path_factory.mktemp("views")
    tiny.save_language_model(root / "lm")
    tiny.save_vision_tower(root / "tower")
    (root / "images").mkdir()
    for name, size in {"wide": (100, 50), "small": (20, 20), "stripe": (1, 900)}.items():
        Image.new("RGB", size, "red").save(root / "images" / f"{name}.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "It is red."}]
    rows = [
        {"id": name, "image": f"{name}.png", "conversations": turns} for name in ("wide", "small", "stripe", "missing")
    ]
    (root / "rows.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(scope="module")
def processor(root: Path) -> Any:
    return build(str(root / "lm"), str(root / "tower"), "vicuna_v1", max_tiles=4)[1]


def located(root: Path, name: str) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is red."}]},
    ]
    return {"id": name, "messages": messages, "images": [{"path": str(root / "images" / f"{name}.png"), "bytes": None}]}


def test_the_check_counts_each_images_own_tokens(root: Path, processor: Any) -> None:
    report = check_data(root / "rows.json", root / "images", processor=processor, max_length=None, num_workers=1)
    expected = [row_length(located(root, name), processor).num_tokens for name in ("wide", "small")]
    assert sorted(report.lengths) == sorted(expected) and expected[0] > expected[1] + 5
    assert {(problem.row, problem.kind) for problem in report.problems} == {(2, "image_shape"), (3, "image_missing")}
    (stripe,) = (problem for problem in report.problems if problem.kind == "image_shape")
    assert "1 x 900 pixels" in stripe.detail and stripe.severity == "error"


def test_the_check_says_which_rows_are_too_long_for_their_image(root: Path, processor: Any) -> None:
    limit = row_length(located(root, "wide"), processor).num_tokens - 1
    report = check_data(root / "rows.json", root / "images", processor=processor, max_length=limit, num_workers=1)
    assert [(problem.row, problem.kind) for problem in report.problems if problem.kind == "too_long"] == [
        (0, "too_long")
    ]


def test_inspection_shows_every_view_as_the_tower_sees_it(root: Path, processor: Any) -> None:
    shown = inspect_row(located(root, "wide"), 0, processor)
    cut = processor.views.of(100, 50)
    assert [span.text for span in shown.spans if span.sort == "image"] == [f"<image x{cut.num_tokens}>"]
    page = as_page([shown], processor, "")
    assert page.count("data:image/jpeg") == cut.num_views
    assert f"tile 1 of {cut.num_views - 1}, 28x28 pixels" in page and "the whole, 28x28 pixels" in page


def test_the_memory_plan_counts_all_views(root: Path, tmp_path: Path) -> None:
    plain = {
        "data.data_path": root / "rows.json",
        "model.language_model": root / "lm",
        "model.vision_tower": root / "tower",
    }
    one = recipe_for(root, tmp_path, **plain)
    tiles = recipe_for(
        root, tmp_path, **plain, **{"model.tiling": "tiles", "model.max_tiles": 3, "model.pixel_shuffle": 2}
    )
    assert num_image_tokens(one) == 4 and num_image_tokens(tiles) == 4 * (1 + 1)
    shape = describe(tiles, torch.float32)
    assert (shape.views_per_image, shape.num_image_tokens, shape.num_tower_tokens) == (4, 8, 5)
    marks = (1 + 2 * 3) * 32
    widened = 3 * 32 * 32  # four patches side by side where there was one
    assert shape.count(part="projector", is_trained=True) == 2 * (32 * 32 + 32) + marks + widened
