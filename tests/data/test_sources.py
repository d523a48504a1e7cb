"""Datasets of rows: sources, located pictures, caches, mixtures, streams, and what happens to bad rows."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from vir_hf.data.located import BadRow, BadRowPolicy, _ordinary_row
from vir_hf.data.sources import _without_decoding, load_llava_dataset, load_sources, mixture_counts
from vir_hf.errors import DataError, ImageError, RecipeError
from vir_hf.images.archives import _OPENED
from vir_hf.rows.messages import to_messages


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder / "vir_hf"


def make_row(number: int, image: str | list | None = "auto", **keys) -> dict:
    image = f"{number % 10}.png" if image == "auto" else image
    placeholder = "<image>\n" * (0 if image is None else len(image) if isinstance(image, list) else 1)
    return {
        "id": f"r{number}",
        **({} if image is None else {"image": image}),
        "conversations": [
            {"from": "human", "value": f"{placeholder}Which number?"},
            {"from": "gpt", "value": f"It is {number}."},
        ],
        **keys,
    }


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(json.dumps(row) for row in rows)
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(rows))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(10):
        Image.new("RGB", (8 + number, 6), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def ids(dataset) -> list[str]:
    return [row["id"] for row in dataset]


def test_images_as_string_list_null_or_absent(folder: Path):
    rows = [make_row(0), make_row(1, ["1.png", "2.png"]), {**make_row(2, None), "image": None}, make_row(3, None)]
    dataset = load_llava_dataset(write(folder / "rows.json", rows), folder / "images")
    assert dataset.column_names == ["id", "messages", "images"]
    assert [[image.size for image in row["images"]] for row in dataset] == [[(8, 6)], [(9, 6), (10, 6)], [], []]
    assert all(image.mode == "RGB" for row in dataset for image in row["images"])
    assert dataset[0]["messages"][0]["content"] == [
        {"type": "image", "text": None},
        {"type": "text", "text": "Which number?"},
    ]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "It is 0."}], "supervised": None}
    assert dataset[0]["messages"][1] == answer


def test_undecoded_images_are_what_datasets_calls_them(folder: Path):
    dataset = load_llava_dataset(write(folder / "rows.json", [make_row(3)]), folder / "images", decode_images=False)
    assert dataset[0]["images"] == [{"bytes": None, "path": str((folder / "images" / "3.png").resolve())}]
    assert dataset.features["images"] == datasets.List(datasets.Image(decode=False))


def test_pictures_are_opened_only_when_their_row_is_read(folder: Path):
    path = write(folder / "rows.json", [make_row(0), make_row(1)])
    dataset = load_llava_dataset(path, folder / "images")
    (folder / "images" / "1.png").write_bytes(b"broken since")
    assert dataset[0]["images"][0].size == (8, 6)
    with pytest.raises(ImageError, match="id r1") as caught:
        dataset[1]
    assert caught.value.kind == "image_unreadable"
    assert dataset.select_columns("id")[1] == {"id": "r1"}


def test_by_default_images_lie_beside_the_data_file(folder: Path):
    path = write(folder / "images" / "rows.json", [make_row(4)])
    assert load_llava_dataset(path)[0]["images"][0].size == (12, 6)


def test_files_directories_globs_and_formats(folder: Path):
    rows = [make_row(number) for number in range(12)]
    write(folder / "data" / "a.json", rows[:4])
    write(folder / "data" / "b.jsonl", rows[4:8])
    datasets.Dataset.from_list(rows[8:]).to_parquet(folder / "data" / "c.parquet")
    everything = [row["id"] for row in rows]
    images = folder / "images"
    assert ids(load_llava_dataset(folder / "data", images)) == everything
    assert ids(load_llava_dataset(str(folder / "data" / "*.json*"), images)) == everything[:8]
    assert ids(load_llava_dataset(folder / "data" / "c.parquet", images)) == everything[8:]
    assert ids(load_llava_dataset(folder / "data", images, max_rows=5)) == everything[:5]


def test_parquet_with_embedded_images_needs_no_folder(folder: Path):
    data = (folder / "images" / "7.png").read_bytes()
    rows = [
        {"id": "raw", "image": {"bytes": data, "path": "7.png"}, "conversations": make_row(7)["conversations"]},
        {"id": "two", "image": {"bytes": data, "path": None}, "conversations": make_row(7)["conversations"]},
    ]
    datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    assert [row["images"][0].size for row in load_llava_dataset(folder / "rows.parquet")] == [(15, 6)] * 2
    ours = load_llava_dataset(folder / "rows.parquet", decode_images=False)
    ours.to_parquet(folder / "again.parquet")
    again = load_llava_dataset(folder / "again.parquet", decode_images=False)
    assert again.to_list() == ours.to_list()


def test_an_archive_serves_as_image_folder(folder: Path):
    shutil.make_archive(str(folder / "images"), "zip", folder, "images")
    path = write(folder / "rows.json", [make_row(5)])
    dataset = load_llava_dataset(path, folder / "images.zip", decode_images=False)
    assert dataset[0]["images"][0]["path"] == f"zip://images/5.png::{(folder / 'images.zip').resolve()}"
    _OPENED.clear()
    load_llava_dataset(path, folder / "images.zip")
    assert len(_OPENED) == 1, "read before workers are forked, so that each need not"
    assert load_llava_dataset(path, folder / "images.zip")[0]["images"][0].size == (13, 6)


class TestBadRows:
    """Bad rows stop the run with number, id and reason, or are left out and reported."""

    BAD = {
        1: ({"id": "b1", "image": "nothing.png", "conversations": make_row(1)["conversations"]}, "image_missing"),
        3: ({"id": "b3", "says": "?"}, "bad_row"),
        5: (
            {"id": "b5", "image": "../rows.json", "conversations": make_row(1)["conversations"]},
            "image_outside_folder",
        ),
        6: (
            {"id": "b6", "image": "https://example.invalid/x.png", "conversations": make_row(1)["conversations"]},
            "image_url",
        ),
        7: (make_row(7, ["1.png", "2.png"], conversations=make_row(1)["conversations"]), "placeholder_mismatch"),
        8: (make_row(8, None, conversations=[{"from": "human", "value": "Hello?"}]), "nothing_supervised"),
        9: (make_row(9, None, conversations=[{"from": "alien", "value": "Hello?"}]), "bad_role"),
        10: ("just text", "bad_row"),
        11: (
            make_row(11, None, conversations=[{"from": "human", "value": "a"}, {"from": "gpt", "value": "\ud800"}]),
            "bad_row",
        ),
    }

    @pytest.fixture
    def path(self, folder: Path) -> Path:
        rows = [make_row(number) for number in range(40)]
        for number, (row, _) in self.BAD.items():
            rows[number] = row
        return write(folder / "rows.json", rows)

    @pytest.mark.parametrize("number", BAD)
    def test_one_bad_row_is_one_clear_error(self, folder: Path, number: int):
        row, _ = self.BAD[number]
        with pytest.raises(DataError) as caught:
            load_llava_dataset(write(folder / "rows.json", [make_row(0), row]), folder / "images")
        row_id = row.get("id", "1") if isinstance(row, dict) else "1"
        assert f"rows.json: row 1 (id {row_id}): " in str(caught.value)
        assert "1 of 2 rows cannot be used" in str(caught.value)
        assert "vir-hf data check" in str(caught.value) and "=skip" in str(caught.value)

    def test_skipped_rows_are_reported(self, folder: Path, path: Path, caplog: pytest.LogCaptureFixture):
        for _ in range(2):  # read, then from the cache
            bad: list[BadRow] = []
            with caplog.at_level(logging.WARNING):
                dataset = load_llava_dataset(
                    path, folder / "images", on_bad_row="skip", on_bad_image="skip", max_bad_fraction=0.5, bad_rows=bad
                )
            assert {entry.row: entry.kind for entry in bad} == {n: kind for n, (_, kind) in self.BAD.items()}
            assert len(dataset) == 40 - len(self.BAD) == len([row["images"] for row in dataset])
            assert "9 of 40 rows cannot be used and are left out" in caplog.text

    def test_each_policy_speaks_of_its_own_kind(self, folder: Path, path: Path):
        options = {"max_bad_fraction": 0.5}
        with pytest.raises(DataError, match=r"row 3 \(id b3\).*data.on_bad_row=skip"):
            load_llava_dataset(path, folder / "images", on_bad_image="skip", **options)
        with pytest.raises(DataError, match=r"row 1 \(id b1\).*data.on_bad_image=skip"):
            load_llava_dataset(path, folder / "images", on_bad_row="skip", **options)

    def test_too_many_bad_rows_stop_the_run(self, folder: Path, path: Path):
        with pytest.raises(DataError, match="9 of 40 rows cannot be used, more than data.max_bad_fraction=0.05"):
            load_llava_dataset(path, folder / "images", on_bad_row="skip", on_bad_image="skip")
        only_bad = write(folder / "bad.json", [row for row, _ in self.BAD.values()])
        with pytest.raises(DataError, match="9 of 9 rows"):
            load_llava_dataset(only_bad, on_bad_row="skip", on_bad_image="skip", max_bad_fraction=1.0)

    def test_a_picture_that_arrives_later_is_found(self, folder: Path):
        path = write(folder / "rows.json", [make_row(n) for n in range(30)] + [make_row(30, "late.png")])
        assert len(load_llava_dataset(path, folder / "images", on_bad_image="skip")) == 30
        shutil.copy(folder / "images" / "0.png", folder / "images" / "late.png")
        assert len(load_llava_dataset(path, folder / "images")) == 31

    def test_a_stream_raises_or_skips(self, folder: Path, path: Path):
        with pytest.raises(DataError, match=r"row 1 \(id b1\)"):
            ids(load_llava_dataset(path, folder / "images", streaming=True))
        stream = load_llava_dataset(path, folder / "images", streaming=True, on_bad_row="skip", on_bad_image="skip")
        assert ids(stream) == [f"r{n}" for n in range(40) if n not in self.BAD]

    def test_the_fraction_also_counts_what_breaks_later(self):
        policy = BadRowPolicy("skip", "skip", 0.05)
        policy.enforce_fraction(5, 100, "after step 3:")
        with pytest.raises(DataError, match="after step 3.*6 of 100"):
            policy.enforce_fraction(6, 100, "after step 3:")
        with pytest.raises(ValueError, match="on_bad_row"):
            BadRowPolicy("ignore")


def test_missing_and_malformed_files_are_data_errors(folder: Path):
    with pytest.raises(DataError, match="nothing.json: no data file found"):
        load_llava_dataset(folder / "nothing.json")
    (folder / "bad.json").write_text('[{"id": 1},\n{"id": }]')
    with pytest.raises(DataError, match="bad.json: line 2, column 8"):
        load_llava_dataset(folder / "bad.json")
    with pytest.raises(DataError, match="no such folder"):
        load_llava_dataset(write(folder / "rows.json", [make_row(0)]), folder / "images2")


class TestCache:
    """A second start maps what the first wrote; anything that changes is read anew."""

    def test_the_second_start_does_not_read_the_file(self, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
        path = write(folder / "rows.json", [make_row(n) for n in range(10)])
        first = load_llava_dataset(path, folder / "images", decode_images=False).to_list()
        assert len(list(cache.glob("rows-*.arrow"))) == 1
        monkeypatch.setattr("vir_hf.data.sources.read_rows", lambda *_: pytest.fail("the file was read again"))
        assert load_llava_dataset(path, folder / "images", decode_images=False).to_list() == first

    def test_changes_are_seen(self, folder: Path):
        path = write(folder / "rows.json", [make_row(0)])
        assert len(load_llava_dataset(path, folder / "images")) == 1
        write(path, [make_row(0), make_row(1)])
        assert len(load_llava_dataset(path, folder / "images")) == 2
        shutil.copytree(folder / "images", folder / "other")
        other = load_llava_dataset(path, folder / "other", decode_images=False)
        assert other[0]["images"][0]["path"] == str((folder / "other" / "0.png").resolve())
        assert len(load_llava_dataset(path, folder / "images", max_rows=1)) == 1

    def test_a_half_written_cache_is_not_believed(self, folder: Path, cache: Path):
        path = write(folder / "rows.json", [make_row(n) for n in range(10)])
        load_llava_dataset(path, folder / "images")
        (arrow,) = cache.glob("rows-*.arrow")
        arrow.with_suffix(".json").unlink()
        arrow.write_bytes(arrow.read_bytes()[:100])
        assert len(load_llava_dataset(path, folder / "images")) == 10

    def test_processes_that_start_together_agree(self, folder: Path, cache: Path):
        path = write(folder / "rows.json", [make_row(n) for n in range(300)])
        with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
            counts = list(pool.map(count_rows, [path] * 4, [folder / "images"] * 4))
        assert counts == [300] * 4
        assert len(list(cache.glob("rows-*.arrow"))) == 1

    @pytest.mark.parametrize("packed", [False, True])
    def test_a_picture_that_is_gone_is_missed_at_the_next_start(self, folder: Path, packed: bool):
        path = write(folder / "rows.json", [make_row(n) for n in range(3)])
        source = folder / "images"
        if packed:
            source = Path(shutil.make_archive(str(folder / "pictures"), "zip", folder / "images"))
        assert len(load_llava_dataset(path, source)) == 3
        (folder / "images" / "1.png").unlink()
        if packed:
            shutil.make_archive(str(folder / "pictures"), "zip", folder / "images")
        with pytest.raises(DataError, match=r"row 1 \(id r1\): 1.png: not"):
            load_llava_dataset(path, source)
        bad: list[BadRow] = []
        kept = load_llava_dataset(path, source, on_bad_image="skip", max_bad_fraction=0.5, bad_rows=bad)
        assert len(kept) == 2 and [(b.row, b.kind) for b in bad] == [(1, "image_missing")]

    def test_other_changes_in_the_folder_cost_no_second_reading(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        path = write(folder / "rows.json", [make_row(0)])
        load_llava_dataset(path, folder / "images")
        monkeypatch.setattr("vir_hf.data.sources.read_rows", lambda *_: pytest.fail("the file was read again"))
        (folder / "images" / "9.png").unlink()
        (folder / "images" / "new.png").write_bytes(b"")
        listed: list = []
        real = os.listdir
        monkeypatch.setattr("vir_hf.data.cache.os.listdir", lambda path: listed.append(path) or real(path))
        os.utime(folder / "images", ns=(1, 1))  # long before the second start
        for _ in range(3):
            assert len(load_llava_dataset(path, folder / "images")) == 1
        assert len(listed) == 1  # looked through once, then known again by its time

    def test_processes_that_find_a_picture_arrived_agree(self, folder: Path, cache: Path):
        (folder / "images" / "3.png").rename(folder / "3.png")
        path = write(folder / "rows.json", [make_row(n) for n in range(300)])
        load_llava_dataset(path, folder / "images", on_bad_image="skip", max_bad_fraction=0.5)
        (folder / "3.png").rename(folder / "images" / "3.png")
        with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
            counts = list(pool.map(count_rows, [path] * 8, [folder / "images"] * 8))
        assert counts == [300] * 8


def count_rows(path: Path, images: Path) -> int:
    return len(load_llava_dataset(path, images, decode_images=False))


class TestMixture:
    """Sources with weights share; sources with a number of rows give so many."""

    @pytest.fixture
    def sources(self, folder: Path) -> list[dict]:
        sizes = {"a": 100, "b": 40, "c": 10}
        for name, size in sizes.items():
            write(folder / f"{name}.json", [make_row(n, id=f"{name}{n}") for n in range(size)])
        return [{"path": str(folder / f"{name}.json"), "image_folder": str(folder / "images")} for name in sizes]

    @staticmethod
    def counts(dataset) -> list[int]:
        names = [row_id[0] for row_id in ids(dataset)]
        return [names.count(name) for name in "abc"]

    def test_plain_sources_follow_one_another(self, sources: list[dict]):
        dataset = load_sources(sources)
        assert self.counts(dataset) == [100, 40, 10]
        assert dataset[105]["images"][0].size == (13, 6)

    def test_weights_are_shares_and_no_row_comes_twice(self, sources: list[dict]):
        for source, weight in zip(sources, (0.6, 0.3, 0.1), strict=True):
            source["weight"] = weight
        dataset = load_sources(sources, decode_images=False)
        assert self.counts(dataset) == [60, 30, 10]
        assert len(set(ids(dataset))) == 100
        assert mixture_counts([1000, 10], [{"weight": 3}, {"weight": 1}]) == [30, 10]

    def test_a_number_of_rows_is_drawn_by_seed(self, sources: list[dict]):
        sources[0]["num_rows"], sources[1]["num_rows"], sources[2]["num_rows"] = 20, 40, 25
        first = load_sources(sources, seed=1, decode_images=False)
        assert self.counts(first) == [20, 40, 25]
        assert ids(load_sources(sources, seed=1, decode_images=False)) == ids(first)
        assert ids(load_sources(sources, seed=2, decode_images=False)) != ids(first)
        repeats = [ids(first).count(f"c{n}") for n in range(10)]
        assert sorted(set(repeats)) == [2, 3]

    def test_wrong_sources_are_recipe_errors(self, sources: list[dict]):
        for bad in ({"weight": 1, "num_rows": 3}, {"wieght": 1}):
            with pytest.raises(RecipeError, match=r"data.sources\[0\]"):
                load_sources([{**sources[0], **bad}])
        with pytest.raises(RecipeError):
            load_sources([{"image_folder": "x"}])

    def test_streams_mix_too(self, sources: list[dict]):
        assert self.counts(load_sources(sources, streaming=True)) == [100, 40, 10]
        for source, weight in zip(sources, (0.6, 0.3, 0.1), strict=True):
            source["weight"] = weight
        counts = self.counts(load_sources(sources, streaming=True, decode_images=False, seed=3))
        assert counts[0] > counts[1] > counts[2] > 0


class TestStreaming:
    """A stream is the same rows, shared out among ranks and workers, and goes on where it stopped."""

    @pytest.fixture
    def stream(self, folder: Path):
        path = write(folder / "rows.jsonl", [make_row(n) for n in range(50)])
        return lambda **options: load_llava_dataset(path, folder / "images", streaming=True, **options)

    def test_the_same_rows_as_the_whole_data_set(self, stream, folder: Path):
        whole = load_llava_dataset(folder / "rows.jsonl", folder / "images", decode_images=False)
        assert list(stream(decode_images=False)) == whole.to_list()
        assert next(iter(stream()))["images"][0].size == (8, 6)
        assert ids(stream(max_rows=7)) == [f"r{n}" for n in range(7)]

    def test_ranks_and_workers_share_the_rows_out(self, stream):
        from datasets.distributed import split_dataset_by_node
        from torch.utils.data import DataLoader

        seen = []
        for rank in range(2):
            part = split_dataset_by_node(stream(decode_images=False).shuffle(seed=5, buffer_size=8), rank, 2)
            loader = DataLoader(part, batch_size=None, num_workers=2)
            seen += [row["id"] for row in loader]
        assert sorted(seen) == sorted(f"r{n}" for n in range(50))

    @pytest.mark.parametrize("decode_images", [True, False])
    def test_it_resumes_where_it_stopped(self, stream, decode_images: bool):
        first = stream(decode_images=decode_images)
        iterator = iter(first)
        seen = [next(iterator)["id"] for _ in range(17)]
        state = json.loads(json.dumps(first.state_dict()))
        again = stream(decode_images=decode_images)
        again.load_state_dict(state)
        assert seen + ids(again) == [f"r{n}" for n in range(50)]

    def test_a_stream_of_several_files(self, folder: Path):
        for name, start in (("a.json", 0), ("b.jsonl", 10), ("c.json", 20)):
            write(folder / "data" / name, [make_row(n) for n in range(start, start + 10)])
        stream = load_llava_dataset(folder / "data", folder / "images", streaming=True)
        assert ids(stream) == [f"r{n}" for n in range(30)]


class TestHub:
    """Data sets of the Hub, through `datasets.load_dataset` (its answer is put in place here)."""

    @pytest.fixture
    def hub(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        def serve(rows: list[dict], features: datasets.Features | None = None) -> None:
            dataset = datasets.Dataset.from_list(rows, features=features)

            def load_dataset(path: str, name: str | None, split: str, streaming: bool):
                assert (path, name, split) == ("owner/name", None, "train")
                return dataset.to_iterable_dataset(num_shards=min(2, len(dataset))) if streaming else dataset

            monkeypatch.setattr(datasets, "load_dataset", load_dataset)

        return serve

    def test_llava_columns_with_embedded_images(self, folder: Path, hub):
        rows = [
            {
                "id": f"r{n}",
                "image": {"bytes": (folder / "images" / f"{n}.png").read_bytes(), "path": None},
                "conversations": make_row(n)["conversations"],
            }
            for n in range(4)
        ]
        turns = datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")})
        hub(
            rows, datasets.Features({"id": datasets.Value("string"), "image": datasets.Image(), "conversations": turns})
        )
        for streaming in (False, True):
            found = list(load_llava_dataset("owner/name", streaming=streaming))
            assert [row["id"] for row in found] == ["r0", "r1", "r2", "r3"]
            assert [row["images"][0].size for row in found] == [(8, 6), (9, 6), (10, 6), (11, 6)]

    def test_messages_and_images_columns(self, folder: Path, hub):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": "<image>What?"},
                    {"role": "assistant", "content": "A picture."},
                ],
                "images": [{"bytes": (folder / "images" / "2.png").read_bytes(), "path": None}],
            }
        ]
        turns = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
        hub(rows, datasets.Features({"messages": turns, "images": datasets.List(datasets.Image())}))
        for streaming in (False, True):
            (row,) = load_llava_dataset("owner/name", streaming=streaming)
            assert (row["id"], row["images"][0].size) == ("0", (10, 6))

    def test_names_of_files_need_a_folder(self, folder: Path, hub):
        hub([make_row(1)])
        assert load_llava_dataset("owner/name", folder / "images")[0]["images"][0].size == (9, 6)
        with pytest.raises(DataError, match="data.image_folder"):
            load_llava_dataset("owner/name")
        with pytest.raises(DataError, match="data.image_folder"):
            ids(load_llava_dataset("owner/name", streaming=True))

    def test_a_name_that_is_neither_file_nor_data_set(self, monkeypatch: pytest.MonkeyPatch):
        with pytest.raises(DataError, match="owner/nothing.*neither a file here nor a Hub data set"):
            load_llava_dataset("owner/nothing")
        with pytest.raises(DataError, match="cannot be fetched"):
            load_llava_dataset("hf://datasets/owner/nothing/rows.json")


def test_the_short_way_for_ordinary_rows_is_the_long_way():
    """`_ordinary_row` must give what `to_messages` gives, or nothing."""
    import random

    rng = random.Random(0)
    texts = [
        "Hi",
        " <image>\nWhat? ",
        "What?\n<image>",
        "<image>",
        "",
        "  ",
        "a <image> b <image>",
        " kept as it is \n",
    ]
    num_short = 0
    for _ in range(10_000):
        turns = [
            {
                "from": ("human", "gpt")[n % 2] if rng.random() < 0.95 else rng.choice(["gpt", "system"]),
                "value": rng.choice(texts),
            }
            for n in range(rng.randint(0, 5))
        ]
        row = {"id": 1, "image": rng.choice([None, "a.jpg", "a.jpg", "", ["a.jpg"]]), "conversations": turns}
        short = _ordinary_row(row)
        if short is not None:
            num_short += 1
            expected = to_messages(row)
            assert short == {"messages": expected["messages"], "images": expected["images"]}
    assert num_short > 100


def test_memory_does_not_grow_with_the_file(folder: Path, cache: Path):
    """The rows are written and mapped batch by batch, never held."""
    import tracemalloc

    text = "word " * 400
    conversations = [{"from": "human", "value": text}, {"from": "gpt", "value": text}]
    peaks = []
    for num_rows in (4_000, 16_000):
        rows = (json.dumps(make_row(n, None, conversations=conversations)) for n in range(num_rows))
        path = folder / f"{num_rows}.jsonl"
        path.write_text("\n".join(rows))
        tracemalloc.start()
        assert len(load_llava_dataset(path, decode_images=False)) == num_rows
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0], peaks


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "images", "num_rows"),
    [
        ("coco/llava_demo.json", "coco/images", 30),
        ("coco/llava_captions.json", "coco/images", 245),
        ("coco/text_only.json", None, 200),
        ("pretrain/pretrain.json", "pretrain/images", 650),
        ("bench/instruct_on_coco.json", "coco/images", 100),
    ],
)
def test_real_rows_load_whole(shared_data: Path, name: str, images: str | None, num_rows: int):
    raw = json.loads((shared_data / name).read_text(encoding="utf-8"))
    dataset = load_llava_dataset(shared_data / name, images and shared_data / images, decode_images=False)
    assert len(dataset) == len(raw) == num_rows
    for row, ours in zip(raw, dataset, strict=True):
        spoken = " ".join(part["text"] or "" for message in ours["messages"] for part in message["content"])
        written = " ".join(turn["value"].replace("<image>", " ") for turn in row["conversations"])
        assert spoken.split() == written.split()
        assert len(ours["images"]) == ("image" in row)
    opened = load_llava_dataset(shared_data / name, images and shared_data / images)
    assert all(np.asarray(image).ndim == 3 for row in opened.select(range(0, num_rows, 29)) for image in row["images"])


@pytest.mark.parametrize("is_stream", [False, True])
def test_images_of_a_hub_data_set_are_not_opened_by_datasets_however_deep_they_lie(is_stream: bool) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    image = {"bytes": buffer.getvalue(), "path": "a.png"}
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "images": datasets.List(datasets.Image()),
            "parts": datasets.List({"image": datasets.Image(), "text": datasets.Value("string")}),
            "deep": {"image": datasets.Image()},
        }
    )
    row = {"image": image, "images": [image], "parts": [{"image": image, "text": "a"}], "deep": {"image": image}}
    dataset = datasets.Dataset.from_list([row], features=features)
    dataset = dataset.to_iterable_dataset() if is_stream else dataset
    assert next(iter(_without_decoding(dataset))) == row
