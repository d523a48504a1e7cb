"""Sources of every shape and container as data sets: recognised, filtered, boxes written anew, cached and streamed."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vir_hf.data.filters import parse_filter, script_of
from vir_hf.data.reading import Reading
from vir_hf.data.sources import load_llava_dataset, load_sources
from vir_hf.errors import DataError, RecipeError
from vir_hf.images.opening import open_image
from vir_hf.images.sizes import upright_size


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
    return folder / "vir_hf"


def png(number: int, size: tuple[int, int] = (16, 12)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def texts(dataset: Any) -> list[str]:
    return [
        message["content"][-1]["text"]
        for row in dataset
        for message in row["messages"]
        if message["role"] == "assistant"
    ]


def colours(dataset: Any) -> list[list[int]]:
    return [[image.getpixel((0, 0))[0] for image in row["images"]] for row in dataset]


def fine_vision(path: Path, num_rows: int = 6) -> Path:
    table = {
        "images": [[{"bytes": png(n), "path": None}] for n in range(num_rows)],
        "texts": [[{"user": "What?", "assistant": f"It is {n}."}] for n in range(num_rows)],
        "source": ["ai2d" if n % 2 else "chartqa" for n in range(num_rows)],
        "relevance_min": [1 + n % 5 for n in range(num_rows - 1)] + [None],
    }
    pq.write_table(pa.table(table), path)
    return path


def shard(path: Path, numbers: range) -> Path:
    with tarfile.open(path, "w") as archive:
        for n in numbers:
            row = json.dumps({"question": "What?", "answer": f"It is {n}."}).encode()
            for name, data in ((f"{n:04}.png", png(n)), (f"{n:04}.json", row)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def test_a_source_is_read_as_its_columns_say_and_says_so_in_one_line(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(2):  # read, then from the cache
            dataset = load_llava_dataset(fine_vision(tmp_path / "a.parquet"))
            assert texts(dataset) == [f"It is {n}." for n in range(6)] and colours(dataset) == [[n] for n in range(6)]
    said = [record.getMessage() for record in caplog.records if "read as" in record.getMessage()]
    assert said == [f"{tmp_path}/a.parquet: 6 rows read as FineVision, the_cauldron or Docmatix (texts)"] * 2


def test_shards_are_read_where_they_lie_as_a_set_and_as_a_stream(tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / f"s-{number}.tar", range(4 * number, 4 * number + 4))
    wanted = [f"It is {n}." for n in range(12)]
    dataset = load_llava_dataset(tmp_path)
    assert texts(dataset) == wanted and colours(dataset) == [[n] for n in range(12)]
    stream = load_llava_dataset(str(tmp_path / "*.tar"), streaming=True)
    assert texts(stream) == wanted and colours(stream) == [[n] for n in range(12)]
    state: dict = {}
    rest = []
    for number, row in enumerate(stream):
        if number == 5:
            state = stream.state_dict()
        rest += [row["id"]] if number > 5 else []
    again = load_llava_dataset(str(tmp_path / "*.tar"), streaming=True)
    again.load_state_dict(state)
    assert [row["id"] for row in again] == rest and len(rest) == 6


def test_a_mixture_of_containers_is_one_set(tmp_path: Path) -> None:
    fine_vision(tmp_path / "a.parquet", 3)
    shard(tmp_path / "b.tar", range(10, 13))
    (tmp_path / "images").mkdir()
    for n in (20, 21):
        (tmp_path / "images" / f"{n}.png").write_bytes(png(n))
    (tmp_path / "c.csv").write_text("image,problem,solution\n20.png,What?,It is 20.\n21.png,What?,It is 21.\n")
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "It is 20."}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"image": "20.png", "conversation": turns}) + "\n")
    sources = [
        {"path": tmp_path / "a.parquet", "filter": {"source": "ai2d"}},
        {"path": str(tmp_path / "b.tar")},
        {
            "path": tmp_path / "c.csv",
            "image_folder": tmp_path / "images",
            "columns": {"question": "problem", "answer": "solution"},
        },
        {"path": tmp_path / "d.jsonl", "image_folder": tmp_path / "images"},
    ]
    dataset = load_sources(sources)
    assert texts(dataset) == [f"It is {n}." for n in (1, 10, 11, 12, 20, 21, 20)]
    assert colours(dataset) == [[n] for n in (1, 10, 11, 12, 20, 21, 20)]


class TestFilters:
    @pytest.mark.parametrize(
        ("conditions", "kept"),
        [
            ({"relevance_min": ">=3"}, [2, 3, 4]),
            ({"relevance_min": ">=3 or null"}, [2, 3, 4, 5]),
            ({"source": "ai2d"}, [1, 3, 5]),
            ({"source": ["ai2d", "x"], "relevance_min": "<3"}, [1]),
            ({"source": "!=ai2d"}, [0, 2, 4]),
            (
                {"num_images": "==1", "num_turns": "<=2", "num_characters": "<100", "script": "latin"},
                [0, 1, 2, 3, 4, 5],
            ),
            ({"image_width": ">=17"}, []),
            ({"image_height": 12, "relevance_min": 1}, [0]),
        ],
    )
    def test_rows_are_chosen_by_columns_and_by_what_they_are(
        self, tmp_path: Path, conditions: dict, kept: list
    ) -> None:
        path = fine_vision(tmp_path / "a.parquet")
        reading = Reading.of(filter=conditions)
        assert texts(load_llava_dataset(path, reading=reading)) == [f"It is {n}." for n in kept]
        assert texts(load_llava_dataset(path, reading=reading, streaming=True)) == [f"It is {n}." for n in kept]

    def test_what_is_left_out_is_counted(self, tmp_path: Path, caplog: Any) -> None:
        with caplog.at_level(logging.INFO):
            load_llava_dataset(fine_vision(tmp_path / "a.parquet"), reading=Reading.of(filter={"relevance_min": ">=3"}))
        assert "data.filter leaves out 3 of 6 rows: relevance_min >=3 (3)" in caplog.text

    def test_a_column_that_no_row_has_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"none of 6 rows has the column 'relevence_min'"):
            load_llava_dataset(fine_vision(tmp_path / "a.parquet"), reading=Reading.of(filter={"relevence_min": ">=3"}))

    @pytest.mark.parametrize("condition", ["", ">=", ">=x", [], None, {"a": 1}])
    def test_a_condition_that_cannot_be_read(self, condition: Any) -> None:
        with pytest.raises(RecipeError, match=r"data\.filter\.score: found"):
            parse_filter({"score": condition})

    @pytest.mark.parametrize(
        ("text", "script"),
        [
            ("Hello, 42", "latin"),
            ("Привет a", "cyrillic"),
            ("漢字", "han"),
            ("漢字です", "japanese"),
            ("한국", "hangul"),
            ("42!", "none"),
        ],
    )
    def test_scripts(self, text: str, script: str) -> None:
        assert script_of(text) == script


class TestBadInput:
    def test_rows_of_several_shapes_in_one_file_are_named(self, tmp_path: Path, caplog: Any) -> None:
        rows = [{"question": "What?", "answer": f"It is {n}."} for n in range(4)]
        rows.insert(2, {"texts": [{"user": "What?", "assistant": "Odd."}]})  # type: ignore[dict-item]
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        dataset = load_llava_dataset(tmp_path / "rows.json")
        assert texts(dataset)[2] == "Odd."
        assert (
            "rows of several shapes" in caplog.text
            and "rows.json: row 2 is the first read as FineVision" in caplog.text
        )
        with pytest.raises(
            DataError, match=r"rows.json: row 2 \(id 2\): data.format is vqa, and the row has no 'question'"
        ):
            load_llava_dataset(tmp_path / "rows.json", reading=Reading.of("vqa"))

    def test_a_schema_that_changes_between_files_is_read_row_by_row(self, tmp_path: Path) -> None:
        fine_vision(tmp_path / "a.parquet", 2)
        table = {"image": [{"bytes": png(9), "path": None}], "question": ["What?"], "answers": [["It is 9."]]}
        pq.write_table(pa.table(table), tmp_path / "b.parquet")
        assert texts(load_llava_dataset(tmp_path)) == ["It is 0.", "It is 1.", "It is 9."]

    @pytest.mark.parametrize("image", [{}, {"bytes": None, "path": None}, [{}]])
    def test_images_that_are_empty_objects_are_no_images(self, tmp_path: Path, image: Any) -> None:
        row = {"image": image, "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "A"}]}
        (tmp_path / "rows.json").write_text(json.dumps([row]))
        with pytest.raises(DataError, match=r"rows.json: row 0 \(id 0\): (1 <image>|image null|image \{)"):
            load_llava_dataset(tmp_path / "rows.json")

    def test_an_unknown_shape(self) -> None:
        with pytest.raises(RecipeError, match=r"data\.format: found 'coco'; expected one of llava"):
            Reading.of("coco")


def test_boxes_are_written_anew_by_the_size_of_the_upright_image(tmp_path: Path) -> None:
    image = Image.new("RGB", (200, 100))
    exif = image.getexif()
    exif[274] = 6  # a quarter turn: 100 wide and 200 high
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert upright_size(str(tmp_path / "turned.jpg")) == open_image(str(tmp_path / "turned.jpg")).size == (100, 200)
    row = {"image": "turned.jpg", "question": "Where?", "answer": "At [50, 50, 100, 200]."}
    (tmp_path / "rows.json").write_text(json.dumps([row, {**row, "image": None}]))
    reading = Reading.of(boxes={"from": "pixel", "to": "0-1000 xyxy"})
    assert texts(load_llava_dataset(tmp_path / "rows.json", reading=reading)) == [
        "At [500, 250, 1000, 1000].",
        "At [50, 50, 100, 200].",  # without an image there is nothing it could be a box of
    ]


def test_images_lie_in_packed_archives_that_no_row_names(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"shard_{number}.tar.gz", "w:gz") as archive:
            for n in range(3 * number, 3 * number + 3):
                info = tarfile.TarInfo(f"sa/{n}.png")
                info.size = len(png(n))
                archive.addfile(info, io.BytesIO(png(n)))
    rows = [{"image": f"sa/{n}.png", "question": "What?", "answer": f"It is {n}."} for n in range(6)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    dataset = load_llava_dataset(tmp_path / "rows.json", folder)
    assert colours(dataset) == [[n] for n in range(6)]
    assert len(list((cache / "unpacked").glob("*.tar"))) == 2
    assert colours(load_llava_dataset(tmp_path / "rows.json", folder / "shard_0.tar.gz", max_rows=3)) == [[0], [1], [2]]
    (folder / "shard_2.tar.gz").write_bytes((folder / "shard_1.tar.gz").read_bytes())
    (tmp_path / "again.json").write_text(json.dumps(rows[3:]))
    with pytest.raises(DataError, match=r"sa/3.png: lies in 2 archives"):
        load_llava_dataset(tmp_path / "again.json", folder)
    (folder / "shard_2.tar.gz").write_bytes(b"\x1f\x8b\x08cut")
    with pytest.raises(DataError, match="is no whole gzip file"):
        load_llava_dataset(tmp_path / "again.json", folder, max_rows=1)
