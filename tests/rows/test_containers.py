"""Tables as text and tar shards: rows with errors that name the line, images as places in the shard."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from vir_hf.errors import DataError
from vir_hf.rows.containers import split_member
from vir_hf.rows.files import find_data_files, read_rows, split_rows
from vir_hf.rows.messages import to_messages


def png(size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    return path


def rows_of(path: Path) -> list:
    return [row for _, row in read_rows(str(path))]


class TestTables:
    def test_csv_and_tsv_are_rows_of_their_columns(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text(
            '\ufeffimage,question,answer\na.jpg,"What, here?","A\ncat."\nb.jpg,Why?,\n\n', "utf-8"
        )
        wanted = [
            {"image": "a.jpg", "question": "What, here?", "answer": "A\ncat."},
            {"image": "b.jpg", "question": "Why?"},
        ]
        assert rows_of(tmp_path / "a.csv") == wanted
        (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(b"image\tcaption\na.jpg\tA, b and \xc3\xbc\n"))
        assert rows_of(tmp_path / "b.tsv.gz") == [{"image": "a.jpg", "caption": "A, b and ü"}]
        assert [part[:2] for part in split_rows(str(tmp_path / "a.csv"), 8)] == [(0, 0)]

    def test_lists_in_cells_are_lists_where_images_and_turns_stand(self, tmp_path: Path) -> None:
        turns = json.dumps([{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "[1]"}])
        cells = ['["a.jpg", "b.jpg"]', turns, "[1]"]
        quoted = ",".join('"' + cell.replace('"', '""') + '"' for cell in cells)
        (tmp_path / "a.csv").write_text(f"images,conversations,score\n{quoted}\n")
        (row,) = rows_of(tmp_path / "a.csv")
        assert row["score"] == "[1]" and to_messages(row)["images"] == ["a.jpg", "b.jpg"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("image,question\na.jpg,What, here?\n", "line 2: row 0 has 3 cells, expected 2"),
            ("image,image\na,b\n", "line 1: found the columns"),
            ("image,\na,b\n", "line 1: found the columns"),
            ('image,question\na.jpg,"open\n', "line 2: unexpected end of data"),
            ("", "line 1: found the columns"),
        ],
    )
    def test_a_broken_table_names_its_line(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            rows_of(tmp_path / "a.csv")

    def test_a_table_beside_rows_is_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("image,caption\na.jpg,A\n")
        assert find_data_files(tmp_path) == [str(tmp_path / "a.csv")]
        (tmp_path / "rows.json").write_text("[]")
        assert find_data_files(tmp_path) == [str(tmp_path / "rows.json")]


class TestShards:
    def members(self, number: int) -> list[tuple[str, bytes]]:
        row = {"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": f"{number}."}]}
        return [(f"d/{number:04}.jpg", png()), (f"d/{number:04}.json", json.dumps(row).encode())]

    def test_files_called_alike_are_a_row_with_its_image_where_it_lies(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "s.tar", [*self.members(0), ("._0001.jpg", b"x"), *self.members(1)])
        rows = [to_messages(row) for row in rows_of(path)]
        assert [row["id"] for row in rows] == ["d/0000", "d/0001"]
        assert rows[1]["images"] == [f"tar://d/0001.jpg::{path}"]

    def test_captions_and_classes(self, tmp_path: Path) -> None:
        path = write_tar(
            tmp_path / "s.tar", [("1.png", png()), ("1.txt", b"A cat."), ("2.cls", b"7"), ("2.jpg", png())]
        )
        first, second = rows_of(path)
        assert to_messages(first)["messages"][1]["content"][0]["text"] == "A cat."
        with pytest.raises(DataError, match=r"files of 2 hold no conversation, question or caption, only \['cls'"):
            to_messages(second)

    def test_a_video_is_refused_by_name(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "s.tar", [("1.mp4", b"x"), ("1.json", b'{"question": "?", "answer": "x"}')])
        with pytest.raises(DataError, match="'video'"):
            to_messages(rows_of(path)[0])

    def test_files_of_a_row_apart_from_each_other(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "s.tar", [("1.png", png()), ("2.png", png()), ("1.txt", b"A")])
        with pytest.raises(DataError, match=r"files of 1 do not stand beside each other"):
            rows_of(path)

    @pytest.mark.parametrize("keep", [0.4, 0.7, 0.95])
    def test_a_shard_cut_off_is_an_error_and_not_a_short_one(self, tmp_path: Path, keep: float) -> None:
        members = [pair for number in range(40) for pair in self.members(number)]
        path = write_tar(tmp_path / "s.tar", members)
        whole = path.stat().st_size - 10240  # less the zeros at its end
        with path.open("r+b") as file:
            file.truncate(int(whole * keep))
        with pytest.raises(DataError, match="cut s"):
            rows_of(path)

    def test_keys_are_cut_at_the_first_dot_of_the_name(self) -> None:
        assert split_member("a.b/0001.left.JPG") == ("a.b/0001", "left.jpg")
