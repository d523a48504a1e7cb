"""Rows from what people have: tables, folders of classes, images with texts; a held-out split; nothing decided in silence."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from vir_hf.commands import data_new
from vir_hf.curation.new_rows import Wishes, held_out, make_rows
from vir_hf.errors import DataError, RecipeError


def draw(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10 + number, 8), (number * 9, 0, 0)).save(path)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for n in range(10):
        draw(tmp_path / "animals" / ("red_fox" if n % 2 else "dog") / f"{n}.png", n)
    return tmp_path / "animals"


@pytest.fixture
def products(tmp_path: Path) -> Path:
    for n in range(10):
        draw(tmp_path / "photos" / f"{n}.png", n)
    lines = ["photo,sku,colour,shop,note"] + [
        f"{n}.png,A-{n},{'red' if n % 3 else 'dark blue'},X,Note {n} here" for n in range(10)
    ]
    (tmp_path / "photos" / "products.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "photos"


def turns(row: dict) -> list[str]:
    return [turn["value"] for turn in row["conversations"]]


def test_folders_are_classes(classes: Path) -> None:
    made = make_rows(classes)
    question = "<image>\nWhat does the image show? Answer with one of: dog, red fox."
    assert made.way == "classes" and turns(made.rows[-1]) == [question, "red fox"]
    assert [row["image"] for row in made.rows[:2]] == ["dog/0.png", "dog/2.png"] and made.left_out == []
    assert "2 classes" in made.notes[0] and "red_fox is called 'red fox'" in made.notes[1]
    assert (
        turns(make_rows(classes, wishes=Wishes(questions={"": "Which animal?"})).rows[0])[0] == "<image>\nWhich animal?"
    )


def test_a_table_is_asked_about_column_by_column_and_every_choice_is_said(products: Path) -> None:
    made = make_rows(products)
    assert made.way == "table" and len(made.rows) == 10
    assert turns(made.rows[0]) == ["<image>\nWhat is the colour?", "dark blue", "What is the note?", "Note 0 here"]
    said = "\n".join(made.notes)
    assert (
        "named in the column 'photo'" in said and "'colour' answers 'What is the colour?' (2 different answers)" in said
    )
    assert (
        "'sku' is not asked about: each of its cells" in said and "'shop' is not asked about: it says the same" in said
    )
    wishes = Wishes(columns=("sku",), questions={"sku": "Which number has it?"})
    assert turns(make_rows(products, wishes=wishes).rows[3]) == ["<image>\nWhich number has it?", "A-3"]


def test_what_a_table_lacks_is_left_out_and_said(products: Path) -> None:
    with (products / "products.csv").open("a") as file:
        file.write("gone.png,A-10,green,X,Note\n5.png,A-11,,,\n,A-12,green,X,Note\n")
    made = make_rows(products)
    assert len(made.rows) == 10 and [entry.partition(":")[0] for entry in made.left_out] == [
        "products.csv row 10",
        "products.csv row 11",
        "products.csv row 12",
    ]


def test_questions_and_answers_of_a_table_are_taken_as_they_are(products: Path) -> None:
    (products / "products.csv").write_text("image,question,answer\n1.png,How many?,Two.\n2.png,Why?,\n")
    made = make_rows(products)
    assert [turns(row) for row in made.rows] == [["<image>\nHow many?", "Two."]] and len(made.left_out) == 1


def test_texts_beside_images(tmp_path: Path) -> None:
    for n in range(4):
        draw(tmp_path / f"{n}.png", n)
        if n < 3:
            (tmp_path / f"{n}.txt").write_text("" if n == 2 else f"\ufeffNumber {n}.\n", "utf-8")
    made = make_rows(tmp_path)
    assert made.way == "texts" and [turns(row) for row in made.rows] == [
        ["<image>\nDescribe the image.", "Number 0."],
        ["<image>\nDescribe the image.", "Number 1."],
    ]
    assert made.left_out == ["2.png: 2.txt is empty", "3.png: no 3.txt beside it"]


def test_excel_sheets_are_read(products: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["photo", "price"])
    book.active.append(["1.png", 3.0])
    book.active.append(["2.png", 2.5])
    book.create_sheet("empty")
    book.save(products / "products.xlsx")
    (products / "products.csv").unlink()
    assert [turns(row)[1] for row in make_rows(products).rows] == ["3", "2.5"]
    book["empty"].append(["x"])
    book.save(products / "products.xlsx")
    with pytest.raises(RecipeError, match=r"2 sheets with cells .*--sheet NAME"):
        make_rows(products)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.copy(folder / "products.csv", folder / "other.csv"), "2 tables .*--table FILE"),
        (lambda folder: [(folder / f"{n}.txt").write_text("x") for n in range(9)], "fits table and texts"),
        (lambda folder: (folder / "products.csv").write_text("a,b\n1.png,2.png\n"), "2 columns name images"),
        (lambda folder: (folder / "products.csv").write_text("a,b\nx,y\n"), "no columns name images"),
        (lambda folder: (folder / "products.csv").unlink(), "has no table, no folders of classes"),
        (lambda folder: (folder / "products.csv").write_text("photo\n1.png\n"), "no column is left to ask about"),
    ],
)
def test_what_could_mean_two_things_is_asked_for(products: Path, change, message: str) -> None:
    change(products)
    with pytest.raises((RecipeError, DataError), match=message) as error:
        make_rows(products)
    assert len(str(error.value)) <= 500


def test_no_image_is_in_both_parts_whatever_its_name(classes: Path) -> None:
    for n in range(10):  # a copy of each under another name
        name = "red_fox" if n % 2 else "dog"
        shutil.copy(classes / name / f"{n}.png", classes / name / f"copy-{n}.png")
    rows = make_rows(classes).rows
    train, kept = held_out(rows, classes, 0.3, seed=1)
    contents = [{(classes / row["image"]).read_bytes() for row in part} for part in (train, kept)]
    assert len(train) == 14 and len(kept) == 6 and contents[0].isdisjoint(contents[1])
    assert held_out(rows, classes, 0.3, seed=1) == (train, kept) != held_out(rows, classes, 0.3, seed=2)
    assert held_out(rows, classes, 0.0, seed=1) == (rows, [])
    with pytest.raises(DataError, match="10 different images cannot be split with --heldout 0.01"):
        held_out(rows, classes, 0.01, seed=1)


def test_the_command_writes_rows_a_split_and_a_first_check(products: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new"
    assert data_new.main([str(products), str(out), "--heldout", "0.2"]) == 0
    train, kept = (json.loads((out / name).read_text()) for name in ("train.json", "heldout.json"))
    assert (len(train), len(kept)) == (8, 2)
    assert "the column 'colour' answers" in capsys.readouterr().out
    page = (out / "preview.html").read_text()
    assert page.count("data:image/jpeg;base64") == 8 and "dark blue" in page and (out / "check.html").is_file()
    (out / "train.json").write_text("mine")
    with pytest.raises(RecipeError, match="train.json"):
        data_new.main([str(products), str(out)])
    assert (out / "train.json").read_text() == "mine"


def test_an_image_that_is_none_is_found_by_the_first_check(products: Path, tmp_path: Path, capsys) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "PNG")
    (products / "0.png").write_bytes(buffer.getvalue()[:20])
    assert data_new.main([str(products), str(tmp_path / "new"), "--heldout", "0"]) == 1
    assert "image_" in capsys.readouterr().out
