"""Reading data files: every layout of JSON gives its rows, every fault names its line."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vir_hf.errors import DataError
from vir_hf.files import as_report
from vir_hf.rows import files as row_files
from vir_hf.rows.files import find_data_files, read_rows, split_rows
from vir_hf.using.questions import answered_ids, read_questions

ROWS = [{"id": str(i), "text": 'ä€\U0001f600 "q" \\ \n' * (i % 7), "deep": [{"n": i}, None]} for i in range(57)]


def layouts() -> dict[str, str]:
    return {
        "list.json": json.dumps(ROWS),
        "pretty.json": json.dumps(ROWS, indent=2, ensure_ascii=False),
        "windows.json": json.dumps(ROWS, indent=1).replace("\n", "\r\n"),
        "lines.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n",
        "blank_lines.jsonl": "\n\n".join(json.dumps(row) for row in ROWS),
        "lines_called.json": "\n".join(json.dumps(row) for row in ROWS),
        "list_called.jsonl": json.dumps(ROWS),
        "with_mark.json": "\ufeff" + json.dumps(ROWS),
    }


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("chunk", [7, 100, 2**22])
def test_every_layout_gives_the_rows_whatever_the_window(tmp_path: Path, monkeypatch, name: str, chunk: int):
    monkeypatch.setattr(row_files, "_CHUNK_CHARACTERS", chunk)
    path = tmp_path / name
    path.write_bytes(layouts()[name].encode())
    assert list(read_rows(str(path))) == list(enumerate(ROWS))


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("num_parts", [1, 2, 5, 57, 960])
def test_parts_of_a_file_hold_every_row_once(tmp_path: Path, name: str, num_parts: int):
    path = tmp_path / name
    path.write_bytes(layouts()[name].encode())
    parts = split_rows(str(path), num_parts)
    assert len(parts) == min(num_parts, len(ROWS))
    assert [row for part in parts for row in read_rows(str(path), part)] == list(enumerate(ROWS))


def test_parquet_whole_and_in_row_groups(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=10)
    assert list(read_rows(path)) == list(enumerate(ROWS))
    parts = split_rows(path, 960)
    assert len(parts) == 6
    assert [row for part in parts for row in read_rows(path, part)] == list(enumerate(ROWS))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("  \n ", "is empty"),
        ("[]", "holds no rows"),
        ("hello", "starts with 'h'"),
        ('[{"a": 1},\n {"b": 2,}\n]', "line 2, column"),  # Python 3.13 points at the comma
        ('[\n{"a": 1},\n{"b" 2}]', "line 3, column 6: malformed JSON in row 1"),
        ('{"a": 1}\n{"b": \n', "line 2: the file ends in the middle of row 1"),
        ('{"a": 1}\n{"b":\n\n1 2}', "line 4, column 3: malformed JSON in row 1, which starts in line 2"),
        ('[{"a": "line\nbreak"}]', "line 1, column 13: malformed JSON in row 0"),
        ('[{"a": 1},\n{"b": 2}', "line 2: the file ends after row 1 without the closing ']'"),
        ('[{"a": 1},\n {"b": "cut sho', "line 2: the file ends in the middle of row 1"),
        ('[{"a": 1}]\n[]', "line 2: text after the closing"),
        ("[" * 100_000, "row 0 cannot be read"),
        ('[{"a": ' + "1" * 5_000 + "}]", "row 0 cannot be read"),
    ],
)
@pytest.mark.parametrize("chunk", [9, 2**22])
def test_malformed_files_name_the_line(tmp_path: Path, monkeypatch, text: str, message: str, chunk: int):
    monkeypatch.setattr(row_files, "_CHUNK_CHARACTERS", chunk)
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        list(read_rows(str(path)))
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_a_fault_in_a_late_row_of_a_large_file_names_its_line(tmp_path: Path):
    lines = [json.dumps({"id": i, "pad": "x" * 1_000}) for i in range(10_000)]
    lines[9_000] = lines[9_000][:-1]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match="malformed JSON in row 9000") as caught:
        list(read_rows(str(path)))
    assert "line 9002" in str(caught.value)  # where the next row begins in place of a comma or brace


def test_bytes_that_are_no_text_or_no_parquet(tmp_path: Path):
    (tmp_path / "latin.json").write_bytes('[{"a": "caf\xe9"}]'.encode("latin-1"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_rows(str(tmp_path / "latin.json")))
    with pytest.raises(DataError, match="Parquet"):
        list(read_rows(str(tmp_path / "broken.parquet")))
    with pytest.raises(DataError, match="no such file"):
        list(read_rows(str(tmp_path / "nothing.json")))


def test_a_directory_a_glob_and_a_file_are_found_in_order(tmp_path: Path):
    for name in ("b.json", "a.jsonl", "sub/c.parquet", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(pattern: str) -> list[str]:
        return [str(Path(path).relative_to(tmp_path)) for path in find_data_files(pattern)]

    assert found(str(tmp_path)) == ["a.jsonl", "b.json", "sub/c.parquet"]
    assert found(str(tmp_path / "*.json*")) == ["a.jsonl", "b.json"]
    assert found(str(tmp_path / "**/*.parquet")) == ["sub/c.parquet"]
    assert found(str(tmp_path / "b.json")) == ["b.json"]
    for nothing in ("nothing.json", "*.csv", "sub/none"):
        with pytest.raises(DataError, match="no data file found"):
            find_data_files(str(tmp_path / nothing))


class TestWhichFiles:
    def test_a_folder_gives_the_files_a_person_would_take(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        text = json.dumps(ROWS)
        for name in ("a.json", "B.JSONL", "sub/c.json", "c.ndjson"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        for name in (
            "._a.json", ".hidden.json", ".ipynb_checkpoints/a-checkpoint.json", ".cache/a.json", "__MACOSX/a.json",
            "dataset_info.json", "dataset_infos.json", "failed.json", "a.dropped.json", "notes.txt",
        ):  # fmt: skip
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        (tmp_path / "report.json").write_text(as_report({"rows": []}))
        found = [Path(name).relative_to(tmp_path).as_posix() for name in find_data_files(tmp_path)]
        assert found == ["B.JSONL", "a.json", "c.ndjson", "sub/c.json"]
        said = caplog.text
        assert all(name in said for name in ("failed.json", "a.dropped.json", "report.json"))
        assert find_data_files(tmp_path / "failed.json") == [str(tmp_path / "failed.json")]  # by its name it is read

    def test_what_comes_near_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "rows.xlsx").write_text("a,b\n")
        with pytest.raises(DataError, match=r"It holds rows\.xlsx, which is not read"):
            find_data_files(tmp_path)
        with pytest.raises(DataError, match=r"Did you mean .*rows\.xlsx"):
            find_data_files(tmp_path / "rows.xslx")

    @pytest.mark.parametrize("suffix", [".json.gz", ".jsonl.gz", ".jsonl.zst", ".JSONL.GZ"])
    def test_packed_files_are_read_as_they_would_be_unpacked(self, tmp_path: Path, suffix: str) -> None:
        is_list = suffix.startswith(".json.")
        text = json.dumps(ROWS) if is_list else "".join(json.dumps(row) + "\n" for row in ROWS)
        path = tmp_path / f"rows{suffix}"
        codec = "gzip" if suffix.lower().endswith("gz") else "zstd"
        with pa.output_stream(str(path), compression=codec) as file:
            file.write(text.encode())
        assert [row for _, row in read_rows(str(path))] == ROWS
        (part,) = split_rows(str(path), 8)
        assert [row for _, row in read_rows(str(path), part)] == ROWS
        broken = text.encode() + b'{"id": }' if not is_list else text.encode()[:-1] + b', {"id": }]'
        with pa.output_stream(str(path), compression=codec) as file:
            file.write(broken)
        with pytest.raises(DataError, match=f"line {1 if is_list else len(ROWS) + 1}, column"):
            list(read_rows(str(path)))

    def test_a_packed_file_that_was_cut_is_said_to_be(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl.gz"
        whole = gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode())
        path.write_bytes(whole[:-10])
        with pytest.raises(DataError, match="cut short"):
            list(read_rows(str(path)))

    def test_folders_of_save_to_disk_are_read(self, tmp_path: Path) -> None:
        rows = [{"id": str(number), "text": "x"} for number in range(10)]
        dataset = datasets.Dataset.from_list(rows)
        dataset.save_to_disk(tmp_path / "one", num_shards=3)
        files = find_data_files(tmp_path / "one")
        assert [row for file in files for _, row in read_rows(file)] == rows
        datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "two")
        assert [row for file in find_data_files(tmp_path / "two") for _, row in read_rows(file)] == rows
        datasets.DatasetDict({"a": dataset, "b": dataset}).save_to_disk(tmp_path / "three")
        with pytest.raises(DataError, match="splits a, b"):
            find_data_files(tmp_path / "three")


SEPARATORS = st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"])
WORDS = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(
    ["\u2028", "a\u2029b", "\x85", "\x0b\x0c\x1c"]
)


@given(st.lists(st.tuples(WORDS, SEPARATORS), min_size=1, max_size=6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_all_readers_of_json_lines_agree(lines: list[tuple[str, str]], has_mark: bool) -> None:
    rows = [{"id": str(number), "answer": word} for number, (word, _) in enumerate(lines)]
    text = "".join(json.dumps(r, ensure_ascii=False) + separator for r, (_, separator) in zip(rows, lines, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes((b"\xef\xbb\xbf" if has_mark else b"") + text.encode())
        assert [row for _, row in read_rows(str(path))] == rows
        assert [{"id": row["id"], "answer": row["answer"]} for row in read_questions(path)] == rows
        answers = Path(folder) / "answers.jsonl"
        answers.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        assert answered_ids(answers) == {row["id"] for row in rows}
