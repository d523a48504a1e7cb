"""Boxes checked and drawn where the tower sees them, shapes and filters in the check, and what a mixture comes to."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from vir_hf.commands import data_check, data_inspect
from vir_hf.curation.checks import check_data
from vir_hf.curation.inspection import draw_boxes
from vir_hf.curation.mixture import Part, mixed, table, with_weights
from vir_hf.data.reading import Reading
from vir_hf.errors import DataError, RecipeError
from vir_hf.images.preprocessing import ImagePreprocessor
from vir_hf.rows.boxes import BoxForm
from vir_hf.using.boxes import change_of_answers, with_boxes_changed


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(folder: Path, answers: list[str], **columns: Any) -> Path:
    Image.new("RGB", (200, 100), "white").save(folder / "a.png")
    rows = [
        {"id": str(n), "image": "a.png", "question": "Where?", "answer": a, **columns} for n, a in enumerate(answers)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def kinds(path: Path, **keys: Any) -> list[tuple[int, str]]:
    report = check_data(path, num_workers=1, reading=Reading.of(**keys))
    return [(problem.row, problem.kind) for problem in report.problems]


class TestCheck:
    def test_boxes_outside_and_in_another_form_are_counted(self, tmp_path: Path) -> None:
        answers = ["[10, 10, 50, 50]", "[10, 10, 250, 50]", "[0.1, 0.1, 0.5, 0.5]", "[50, 10, 10, 50]", "None."]
        path = write(tmp_path, answers)
        found = kinds(path, boxes={"from": "pixel xyxy"})
        assert found == [(1, "box_outside"), (2, "box_other_form"), (3, "box_outside")]

    def test_mixed_conventions_are_seen_without_a_word_about_them(self, tmp_path: Path) -> None:
        path = write(tmp_path, ["[10, 10, 50, 50]", "[0.1, 0.1, 0.5, 0.5]", "[1, 1, 900, 900]", "[1, 2]"])
        assert kinds(path) == [(1, "box_mixed")]

    def test_shapes_and_filters_are_in_the_report(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        path = write(tmp_path, ["One.", "Two."], score=3)
        rows = json.loads(path.read_text())
        rows += [{"image": "a.png", "caption": "A wall.", "score": 5}, {"image": "a.png", "text": "A", "score": 5}]
        path.write_text(json.dumps(rows))
        assert kinds(path) == [(2, "mixed_shapes"), (3, "bad_row")]
        assert kinds(path, filter={"score": "<4"}) == []
        with pytest.raises(DataError, match="none of 4 rows has the column 'scores'"):
            kinds(path, filter={"scores": "<4"})
        assert data_check.main([str(path), "--json", str(tmp_path / "out.json"), "--ignore", "duplicate_row"]) == 1
        assert (
            "2 rows read as questions and answers (question, answer, choices), 1 rows read as captions"
            in capsys.readouterr().out
        )
        assert json.loads((tmp_path / "out.json").read_text())["shapes"] == {"vqa": 2, "caption": 1}
        assert kinds(path, format="caption") == [(0, "bad_row"), (1, "bad_row")]


@pytest.mark.parametrize("form", ["pixel xyxy", "0-1 cxcywh", "0-1000 xywh padded"])
@pytest.mark.parametrize("ratio", ["pad", "crop"])
def test_boxes_are_drawn_where_the_tower_sees_the_thing(form: str, ratio: str) -> None:
    """A green rectangle is drawn on an image, seen through the tower's eyes, and the box found around what is green there."""
    from transformers import LlavaImageProcessor

    image = Image.new("RGB", (200, 100), "white")
    image.paste((0, 255, 0), (70, 30, 120, 80))
    size: dict[str, Any] = {"size": {"shortest_edge": 128}, "crop_size": {"height": 128, "width": 128}}
    processor = LlavaImageProcessor(do_pad=True, **size) if ratio == "pad" else CLIPImageProcessor(**size)
    preprocess = ImagePreprocessor(processor)
    place = preprocess.place_in_view(image.size)
    assert place is not None
    pixels = preprocess(image).numpy()
    mean, deviation = (np.array(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    seen = pixels * deviation + mean
    is_green = (seen[1] > 0.8) & (seen[0] < 0.5)
    rows, columns = np.where(is_green)
    read = BoxForm.of(form)
    numbers = ", ".join(read.numbers((70, 30, 120, 80), image.size))
    shown = Image.new("RGB", (128, 128))
    assert draw_boxes(shown, [f"At [{numbers}]."], read, image.size, place) == f"1 boxes as {read}"
    drawn = np.where(np.asarray(shown).sum(axis=2) > 0)
    for found, wanted in zip(drawn, (rows, columns), strict=True):
        assert abs(found.min() - wanted.min()) <= 1.5 and abs(found.max() - wanted.max()) <= 1.5


def test_inspect_draws_them_on_its_page(tmp_path: Path, tiny_parts: Path) -> None:
    path = write(tmp_path, ["At [20, 10, 180, 90]."])
    page = tmp_path / "rows.html"
    arguments = [str(path), "--tokenizer", str(tiny_parts / "lm"), "--boxes", "pixel xyxy", "--html", str(page)]
    assert data_inspect.main(arguments) == 0
    text = page.read_text()
    assert "1 boxes as pixel xyxy original" in text
    data = re.search(r"data:image/jpeg;base64,([^\"]+)", text)
    assert data
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data[1]))).convert("RGB")).astype(int)
    red = np.where((shown[..., 0] > 180) & (shown[..., 1] < 120))
    assert (red[1].min(), red[0].min(), red[1].max(), red[0].max()) == pytest.approx((20, 10, 180, 90), abs=2)


class TestAnswers:
    def test_boxes_come_back_in_the_form_that_is_asked_for(self, tmp_path: Path) -> None:
        image = Image.new("RGB", (200, 100))
        (tmp_path / "recipe.yaml").write_text("data:\n  boxes: {from: pixel, to: 0-1000 xyxy padded}\n")
        change = change_of_answers(str(tmp_path), "pixel xywh")
        assert with_boxes_changed("It is at [100, 300, 300, 500].", [image], change) == "It is at [20, 10, 40, 40]."
        assert with_boxes_changed("It is red.", [image, Image.new("RGB", (3, 3))], change) == "It is red."
        with pytest.raises(DataError, match="several sizes"):
            with_boxes_changed("[1, 2, 3, 4]", [image, Image.new("RGB", (3, 3))], change)

    def test_somebody_has_to_say_how_the_model_writes_them(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="--model-boxes"):
            change_of_answers(str(tmp_path), "pixel")
        change = change_of_answers(str(tmp_path), "pixel", "0-1")
        assert with_boxes_changed("[0.5, 0.5, 1, 1]", [Image.new("RGB", (200, 100))], change) == "[100, 50, 200, 100]"


class TestMixture:
    PARTS = (Part("a", 1000, 1000, 1.0, 100.0, 10.0, 1000), Part("b", 10000, 2000, 0.0, 50.0, 40.0, 10000))

    def test_weights_decide_how_often_each_row_is_seen(self) -> None:
        sources = [{"path": "a", "weight": 1.0}, {"path": "b", "weight": 3.0}]
        a, b = mixed(self.PARTS, sources)
        assert (a.drawn, b.drawn, a.times_seen, b.times_seen) == (1000, 3000, 1.0, 0.3)
        assert b.to_json() == {
            "name": "b",
            "num_rows": 10000,
            "num_measured": 2000,
            "rows": 3000,
            "times_seen": 0.3,
            "images": 0,
            "tokens": 150000,
            "supervised": 120000,
        }
        again = mixed(self.PARTS, with_weights(sources, "1,1"))
        assert [part.drawn for part in again] == [1000, 1000]
        text = table(mixed(self.PARTS, sources), epochs=2)
        assert re.search(
            r"^b +10,000 +3,000 +75\.0 % +0\.60x +0 +150,000 +60\.0 % +120,000 +92\.3 %$", text, re.MULTILINE
        )

    @pytest.mark.parametrize("weights", ["1", "1,0", "1,x", "1,2,3", "1,nan"])
    def test_weights_that_cannot_be_read(self, weights: str) -> None:
        with pytest.raises(RecipeError, match="expected 2 numbers above 0"):
            with_weights([{"path": "a"}, {"path": "b"}], weights)
