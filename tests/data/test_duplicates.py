"""Rows that are there twice: by content, and by what their images look like."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import datasets
import pytest
from PIL import Image, ImageDraw

from vir_hf.data.duplicates import MAX_DISTANCE, Duplicates, distance, look_of
from vir_hf.data.sources import load_llava_dataset, load_sources


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def scene(seed: int, size: int = 160) -> Image.Image:
    rng = random.Random(seed)
    image = Image.new("RGB", (size, size), tuple(rng.randrange(256) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, side = (rng.randrange(size) for _ in range(3))
        pen.rectangle((x, y, x + side // 2, y + side // 2), fill=tuple(rng.randrange(256) for _ in range(3)))
    return image


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def test_compression_and_size_leave_the_look_and_other_scenes_have_another() -> None:
    scenes = [scene(seed) for seed in range(40)]
    looks = [look_of(image) for image in scenes]
    for image, look in zip(scenes, looks, strict=True):
        for quality in (95, 60):
            small = as_jpeg(image, quality).resize((100, 100), Image.Resampling.LANCZOS)
            assert look.is_like(look_of(small)), distance(look.bits, look_of(small).bits)
    pairs = [(a, b) for n, a in enumerate(looks) for b in looks[:n]]
    assert not any(a.is_like(b) for a, b in pairs)
    assert min(distance(a.bits, b.bits) for a, b in pairs) > 2 * MAX_DISTANCE


def test_plain_images_of_two_colours_are_two_images() -> None:
    red, blue = (look_of(Image.new("RGB", (20, 20), colour)) for colour in ("red", "blue"))
    assert red.is_like(red) and not red.is_like(blue)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    scene(1).save(tmp_path / "a.png")
    scene(1).save(tmp_path / "a-again.jpg", quality=80)
    scene(2).save(tmp_path / "b.png")
    rows = [
        {"id": str(n), "image": image, "question": "What?", "answer": answer}
        for n, (image, answer) in enumerate(
            [
                ("a.png", "X"),
                ("a.png", "Y"),
                ("a.png", "X"),
                ("a-again.jpg", "X"),
                ("b.png", "X"),
                (None, "X"),
                (None, "X"),
            ]
        )
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path


def ids(rows) -> list[str]:
    return rows["id"][:]


@pytest.mark.parametrize(("way", "kept"), [("content", "01345"), ("looks", "0145")])
def test_the_first_of_equal_rows_is_kept(folder: Path, way: str, kept: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        rows = load_llava_dataset(folder / "rows.json", decode_images=False, duplicates=Duplicates(way))
    assert list(ids(rows)) == list(kept)
    assert f"data.deduplicate={way} leaves out {7 - len(kept)} of 7 rows" in caplog.text


def test_rows_of_one_source_are_not_taken_again_from_another(folder: Path) -> None:
    source = {"path": folder / "rows.json"}
    rows = load_sources([source, source], decode_images=False, duplicates=Duplicates("content"))
    assert len(rows) == 5
