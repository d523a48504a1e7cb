"""From rows to a plan: sizes, batch arithmetic, and rows that cannot be encoded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from PIL import Image

from vir_hf import DataError, RecipeError
from vir_hf.batches.planning import measure_rows, plan_steps
from vir_hf.data.sources import load_recipe_rows
from vir_hf.model.for_training import load_model_and_processor
from vir_hf.model.precision import choose_precision
from vir_hf.recipe.load import load_recipe
from vir_hf.recipe.rules import global_batch_size
from vir_hf.training.run import train


def measured(recipe, bad_rows=None):
    _, processor = load_model_and_processor(recipe, choose_precision())
    bad_rows = [] if bad_rows is None else bad_rows
    return *measure_rows(load_recipe_rows(recipe, bad_rows), processor, recipe, bad_rows), processor


def test_sizes_are_those_of_the_encoded_rows_and_no_picture_is_opened(
    tiny_parts: Path, tmp_path: Path, monkeypatch
) -> None:
    from vir_hf import encode_row
    from vir_hf.images import opening as images

    def refuse(*_args, **_kwargs):
        raise AssertionError("a picture was opened")

    monkeypatch.setattr(images, "decode_image", refuse)
    recipe = load_recipe(tiny.training_overrides(tiny_parts, tmp_path))
    rows, sizes, processor = measured(recipe)
    assert [size.num_tokens for size in sizes] == [len(encode_row(row, processor)["input_ids"]) for row in rows]
    assert [size.num_images for size in sizes] == [len(row["images"]) for row in rows]
    assert sizes[0].image_key == sizes[6].image_key and sizes[4].image_key is None


@pytest.mark.parametrize(
    ("changes", "world_size", "expected"),
    [
        ({"training.global_batch_size": 12}, 4, 12),
        ({"training.global_batch_size": "null", "training.gradient_accumulation_steps": 3}, 2, 12),
        ({"training.global_batch_size": 12, "training.gradient_accumulation_steps": 3}, 2, 12),
    ],
)
def test_the_global_batch_is_the_recipes(tiny_parts, tmp_path, changes, world_size, expected) -> None:
    recipe = load_recipe(tiny.training_overrides(tiny_parts, tmp_path, **changes))
    assert global_batch_size(recipe, world_size) == expected


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({"training.global_batch_size": 10}, 4, "Set it to 8 or 12"),
        (
            {"training.global_batch_size": 16, "training.gradient_accumulation_steps": 4},
            4,
            "Set training.gradient_accumulation_steps=2",
        ),
    ],
)
def test_impossible_batches_say_which_numbers_would_do(tiny_parts, tmp_path, changes, world_size, message) -> None:
    recipe = load_recipe(tiny.training_overrides(tiny_parts, tmp_path, **changes))
    with pytest.raises(RecipeError, match=message):
        global_batch_size(recipe, world_size)


@pytest.fixture
def data_with_a_long_row(tiny_parts: Path, tmp_path: Path) -> Path:
    rows = json.loads((tiny_parts / "rows.json").read_text(encoding="utf-8"))
    turns = [{"from": "human", "value": "<image>\n" + "long " * 300}, {"from": "gpt", "value": "Yes."}]
    rows.insert(3, {"id": "too-long", "image": "0000.png", "conversations": turns})
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_a_row_that_cannot_be_encoded_stops_the_run_before_the_first_step(
    tiny_parts, tmp_path, data_with_a_long_row
) -> None:
    changes = {"data.data_path": data_with_a_long_row}
    recipe = load_recipe(tiny.training_overrides(tiny_parts, tmp_path / "out", **changes))
    with pytest.raises(DataError, match=r"too-long"):
        train(recipe)


def test_a_row_that_cannot_be_encoded_is_left_out_and_counted_when_asked(
    tiny_parts, tmp_path, data_with_a_long_row
) -> None:
    changes = {
        "data.data_path": data_with_a_long_row,
        "data.on_bad_row": "skip",
        "data.max_bad_fraction": 0.1,
        "training.max_steps": 2,
    }
    metrics = train(load_recipe(tiny.training_overrides(tiny_parts, tmp_path / "out", **changes)))
    (skipped,) = metrics["skipped_rows"]
    assert skipped["id"] == "too-long" and skipped["row"] == 3


def test_a_mixture_of_sources_is_trained(tiny_parts, tmp_path) -> None:
    source = f"{{path:{tiny_parts / 'rows.json'},image_folder:{tiny_parts / 'images'},num_rows:5}}"
    changes = {"data.data_path": "null", "data.sources": f"[{source},{source}]", "training.num_train_epochs": 1}
    recipe = load_recipe(tiny.training_overrides(tiny_parts, tmp_path / "out", **changes))
    rows, sizes, processor = measured(recipe)
    assert len(rows) == len(sizes) == 10
    assert len(plan_steps(recipe, sizes, processor, 1, 0)) == 3


def save_picture(path: Path, colour: str) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 30), colour).save(path, "PNG")
    return path.read_bytes()


def turns(answer: str) -> list[dict]:
    return [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]


def groups_of(sizes) -> list[int]:
    numbers: dict = {}
    return [numbers.setdefault(size.image_key, len(numbers)) for size in sizes]


def test_sources_with_the_same_relative_names_have_pictures_of_their_own(tiny_parts, tmp_path) -> None:
    sources = []
    for name, colour in (("one", "red"), ("two", "blue")):
        rows = []
        for number in range(4):
            save_picture(tmp_path / name / "images" / f"{number % 2}.png", colour)
            rows.append({"id": f"{name}{number}", "image": f"{number % 2}.png", "conversations": turns("It is.")})
        (tmp_path / name / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        sources.append(f"{{path:{tmp_path / name / 'rows.json'},image_folder:{tmp_path / name / 'images'}}}")
    changes = {"data.data_path": "null", "data.sources": f"[{','.join(sources)}]", "training.group_by_image": "true"}
    recipe = load_recipe(tiny.training_overrides(tiny_parts, tmp_path / "out", **changes))
    rows, sizes, processor = measured(recipe)
    assert groups_of(sizes) == [0, 1, 0, 1, 2, 3, 2, 3]
    for step in plan_steps(recipe, sizes, processor, 1, 0).steps():  # four rows, about two pictures
        pictures = [rows[number]["images"][0]["path"] for number in step]
        assert sorted(pictures.count(picture) for picture in pictures) == [2, 2, 2, 2]


@pytest.mark.parametrize("name", [None, "0001.png"])
def test_embedded_pictures_are_planned_by_content(tiny_parts, tmp_path, name) -> None:
    import datasets

    rows = [
        {
            "id": str(number),
            "image": {"bytes": save_picture(tmp_path / "a.png", colour), "path": name},
            "conversations": turns("!"),
        }
        for number, colour in enumerate(["red", "blue", "red", "green"])
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    changes = {"data.data_path": tmp_path / "rows.parquet", "data.image_folder": "null"}
    _, sizes, _ = measured(load_recipe(tiny.training_overrides(tiny_parts, tmp_path / "out", **changes)))
    assert groups_of(sizes) == [0, 1, 0, 2]


def test_a_row_whose_picture_is_cut_off_with_its_turn_is_planned_as_text(tiny_parts, tmp_path) -> None:
    late = [{"from": "human", "value": "What is red?"}, {"from": "gpt", "value": "A colour."}]
    late += [{"from": "human", "value": "<image>\n" + "long " * 300}, {"from": "gpt", "value": "Yes."}]
    (tmp_path / "rows.json").write_text(json.dumps([{"id": "late", "image": "0000.png", "conversations": late}]))
    changes = {"data.data_path": tmp_path / "rows.json"}
    _, (size,), _ = measured(load_recipe(tiny.training_overrides(tiny_parts, tmp_path / "out", **changes)))
    assert size.num_images == 0 and size.image_key is None
