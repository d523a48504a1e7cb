"""Broken pictures are found before the first step, once, and again only where something was broken."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

from vir_hf import picture_check, row_cache
from vir_hf.data import load_llava_dataset
from vir_hf.errors import DataError
from vir_hf.picture_check import leave_out_broken_pictures
from vir_hf.rows import BadRowPolicy

SKIP = BadRowPolicy("raise", "skip", 0.5)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((40 + number, 30), 50).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> datasets.Dataset:
    """Twelve rows over six pictures, of which 2 is cut and 4 is empty; row 11 shows 0 and 2, row 12 none."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(row_cache, "_FIRST_ROWS", 5)
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(b"" if number == 4 else png(number)[: 600 if number == 2 else None])
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "!"}]
    rows = [{"id": f"r{n}", "image": f"{n % 6}.png", "conversations": turns} for n in range(11)]
    two = [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "!"}]
    rows.append({"id": "r11", "image": ["0.png", "2.png"], "conversations": two})
    rows.append({"id": "r12", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return load_llava_dataset(tmp_path / "rows.json", decode_images=False)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_rows_of_broken_pictures_are_left_out(dataset, num_workers: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vir_hf.checks._IMAGES_PER_TASK", 2)
    bad: list = []
    kept = leave_out_broken_pictures(dataset, SKIP, "rows.json", bad_rows=bad, num_workers=num_workers)
    cut, empty = "image_truncated", "image_empty"
    expected = [(2, "r2", cut), (4, "r4", empty), (8, "r8", cut), (10, "r10", empty), (11, "r11", cut)]
    assert [(b.row, b.id, b.kind) for b in bad] == expected
    assert [row["id"] for row in kept] == ["r0", "r1", "r3", "r5", "r6", "r7", "r9", "r12"]


def test_by_default_they_stop_the_run(dataset):
    with pytest.raises(DataError, match=r"rows.json: row 2 \(id r2\).*5 of 13 rows.*data.on_bad_image=skip"):
        leave_out_broken_pictures(dataset, BadRowPolicy(), "rows.json")


def test_the_next_start_looks_only_at_what_was_broken(dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    leave_out_broken_pictures(dataset, SKIP, "rows.json")
    looked: list = []
    real = picture_check.look_at_pictures

    def look(sources, *arguments):
        looked.extend(Path(source).name for source in sources)
        return real(sources, *arguments)

    monkeypatch.setattr(picture_check, "look_at_pictures", look)
    (tmp_path / "2.png").write_bytes(png(2))
    bad: list = []
    kept = leave_out_broken_pictures(dataset, SKIP, "rows.json", bad_rows=bad)
    assert sorted(looked) == ["2.png", "4.png"]
    assert [b.id for b in bad] == ["r4", "r10"] and len(kept) == 11
    looked.clear()
    leave_out_broken_pictures(dataset, SKIP, "rows.json")
    assert looked == ["4.png"]


def test_a_subset_of_the_rows_has_its_own_numbers(dataset):
    bad: list = []
    leave_out_broken_pictures(dataset.select([12, 4, 0]), SKIP, "rows.json", bad_rows=bad)
    assert [(b.row, b.id) for b in bad] == [(1, "r4")]


def test_embedded_pictures_are_looked_at(tmp_path: Path, dataset):
    rows = [
        {
            "id": str(n),
            "image": {"bytes": data, "path": None},
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "!"}],
        }
        for n, data in enumerate((png(1), b"no picture", png(1)))
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    bad: list = []
    embedded = load_llava_dataset(tmp_path / "rows.parquet", decode_images=False)
    kept = leave_out_broken_pictures(embedded, SKIP, "rows.parquet", bad_rows=bad)
    assert [(b.row, b.kind) for b in bad] == [(1, "image_unreadable")] and len(kept) == 2


def test_rows_without_pictures(dataset):
    assert len(leave_out_broken_pictures(dataset.select([12]), SKIP, "rows.json")) == 1
