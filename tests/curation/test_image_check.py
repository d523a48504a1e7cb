"""Broken pictures are found before the first step, once, and again only where something was broken."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vir_hf.curation import image_check as picture_check
from vir_hf.curation.image_check import leave_out_broken_pictures
from vir_hf.data import cache as row_cache
from vir_hf.data.located import BadRowPolicy
from vir_hf.data.sources import load_llava_dataset
from vir_hf.errors import DataError

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
    monkeypatch.setattr("vir_hf.curation.checks._IMAGES_PER_TASK", 2)
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


def test_a_picture_that_is_cut_or_deleted_later_is_seen_at_the_next_start(dataset, tmp_path: Path):
    leave_out_broken_pictures(dataset, SKIP, "rows.json")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:600])
    (tmp_path / "3.png").unlink()
    bad: list = []
    leave_out_broken_pictures(dataset, BadRowPolicy("raise", "skip", 1.0), "rows.json", bad_rows=bad)
    kinds = {(b.row, b.kind) for b in bad}
    assert {(1, "image_truncated"), (7, "image_truncated"), (3, "image_missing"), (9, "image_missing")} <= kinds
    assert {(2, "image_truncated"), (4, "image_empty")} <= kinds and len(bad) == 9


def test_a_picture_of_the_same_size_and_another_time_is_looked_at_again(dataset, tmp_path: Path):
    leave_out_broken_pictures(dataset, SKIP, "rows.json")
    path = tmp_path / "5.png"
    path.write_bytes(bytes(path.stat().st_size))
    bad: list = []
    leave_out_broken_pictures(dataset, SKIP, "rows.json", bad_rows=bad)
    assert (5, "image_unreadable") in [(b.row, b.kind) for b in bad]


def test_members_of_an_archive_are_looked_at_again_when_it_changes(tmp_path: Path, dataset):
    def pack(cut: bool) -> None:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for number in range(3):
                archive.writestr(f"{number}.png", png(number)[: 600 if cut and number == 1 else None])

    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "!"}]
    rows = [{"id": f"r{n}", "image": f"{n}.png", "conversations": turns} for n in range(3)]
    (tmp_path / "zip.json").write_text(json.dumps(rows))
    found = []
    for cut in (False, True):
        pack(cut)
        bad: list = []
        loaded = load_llava_dataset(tmp_path / "zip.json", tmp_path / "a.zip", decode_images=False)
        leave_out_broken_pictures(loaded, SKIP, "zip.json", bad_rows=bad)
        found.append([(b.row, b.kind) for b in bad])
    assert found == [[], [(1, "image_truncated")]]


def test_memory_of_what_was_found_that_is_damaged_is_not_believed(dataset, tmp_path: Path):
    leave_out_broken_pictures(dataset, SKIP, "rows.json")
    (memory,) = (tmp_path / "cache" / "vir_hf").glob("pictures-*.parquet")
    memory.write_bytes(memory.read_bytes()[:-20])
    bad: list = []
    leave_out_broken_pictures(dataset, SKIP, "rows.json", bad_rows=bad)
    assert [b.row for b in bad] == [2, 4, 8, 10, 11]


def embedded_rows(path: Path, pictures: list[bytes], name: str | None = "0001.png") -> datasets.Dataset:
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "!"}]
    rows = [
        {"id": str(n), "image": {"bytes": data, "path": name}, "conversations": turns}
        for n, data in enumerate(pictures)
    ]
    datasets.Dataset.from_list(rows).to_parquet(path)
    return load_llava_dataset(path, decode_images=False)


def test_embedded_pictures_of_one_name_are_looked_at_each(tmp_path: Path, dataset):
    rows = embedded_rows(tmp_path / "rows.parquet", [png(1), b"no picture", png(2), b"no picture", png(1)[:600]])
    for _ in range(2):  # found, then remembered
        bad: list = []
        kept = leave_out_broken_pictures(rows, BadRowPolicy("raise", "skip", 0.7), "rows.parquet", bad_rows=bad)
        assert [(b.row, b.kind) for b in bad] == [
            (1, "image_unreadable"),
            (3, "image_unreadable"),
            (4, "image_truncated"),
        ]
        assert [row["id"] for row in kept] == ["0", "2"]


def test_embedded_pictures_are_looked_at_once(tmp_path: Path, dataset, monkeypatch: pytest.MonkeyPatch):
    looked: list = []
    real = picture_check.look_at_pictures

    def look(sources, *arguments):
        def counted():
            for source in sources:
                looked.append(source)
                yield source

        return real(counted(), *arguments)

    monkeypatch.setattr(picture_check, "look_at_pictures", look)
    one, other = png(1), png(2)
    rows = embedded_rows(tmp_path / "rows.parquet", [one, other, one])
    for _ in range(2):
        leave_out_broken_pictures(rows, BadRowPolicy(), "rows.parquet")
    assert len(looked) == 2


_PEAK = """
import resource, sys
from vir_hf.data.sources import load_llava_dataset
from vir_hf.curation.image_check import leave_out_broken_pictures
from vir_hf.data.located import BadRowPolicy
rows = load_llava_dataset(sys.argv[1], decode_images=False)
leave_out_broken_pictures(rows, BadRowPolicy(), sys.argv[1], num_workers=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.long
def test_memory_does_not_grow_with_embedded_pictures(tmp_path: Path, dataset):
    def picture(number: int) -> bytes:  # a sound file of 343 KiB whose header is all that is read
        data = png(number)
        filler = os.urandom(343 * 1024)
        crc = zlib.crc32(b"vIrx" + filler)
        return data[:-12] + struct.pack(">I", len(filler)) + b"vIrx" + filler + struct.pack(">I", crc) + data[-12:]

    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "!"}]
    peaks = []
    for count in (100, 1000):
        path = tmp_path / f"{count}.parquet"
        schema = pa.schema({"id": pa.string(), "image": pa.struct({"bytes": pa.binary(), "path": pa.string()})})
        schema = schema.append(
            pa.field("conversations", pa.list_(pa.struct({"from": pa.string(), "value": pa.string()})))
        )
        with pq.ParquetWriter(path, schema) as writer:
            for start in range(0, count, 50):
                rows = [
                    {"id": str(n), "image": {"bytes": picture(n), "path": "0001.png"}, "conversations": turns}
                    for n in range(start, start + 50)
                ]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-c", _PEAK, str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < 1.1 * peaks[0], peaks
