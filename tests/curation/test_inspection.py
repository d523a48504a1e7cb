"""Inspecting rows: what is shown is what `encode_row` and the image processor make."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from vir_hf import cli
from vir_hf.curation.inspection import _pieces, as_page, as_terminal_text, denormalise, inspect_row
from vir_hf.llava.processing_llava import LlavaProcessor
from vir_hf.rows.encoding import encode_row


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> LlavaProcessor:
    tokenizer = tiny.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return LlavaProcessor.from_components(tokenizer, image_processor, patch_size=14)


def make_row(path: Path | None = None, answer: str = "It is réd 🙂.\nYes.") -> dict:
    user = [{"type": "text", "text": "What <b>is</b> it?"}]
    if path:
        Image.new("RGB", (56, 28), (200, 30, 60)).save(path)
        user.insert(0, {"type": "image"})
    messages = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
    ]
    return {"id": "r1", "messages": messages, "images": [{"path": str(path), "bytes": None}] if path else []}


def test_spans_hold_every_token_once_with_its_label(processor: LlavaProcessor, tmp_path: Path):
    row = make_row(tmp_path / "a.png")
    encoded = encode_row(row, processor)
    shown = inspect_row(row, 7, processor)
    assert [token for span in shown.spans for token in span.ids] == encoded["input_ids"]
    learned = [span.sort == "learned" for span in shown.spans for _ in span.ids]
    assert learned == [label >= 0 for label in encoded["labels"]]
    assert shown.num_tokens == len(encoded["input_ids"])
    assert [span.text for span in shown.spans if span.sort == "image"] == [f"<image x{processor.num_image_tokens}>"]
    answers = [span.text.strip() for span in shown.spans if span.sort == "learned"]
    assert answers == ["It is réd 🙂.\nYes.</s>", "That.</s>"]
    assert all("".join(span.pieces) == span.text for span in shown.spans if span.sort != "image")
    assert "row 7" in shown.title and "r1" in shown.title


def test_two_images_side_by_side_are_two_spans(processor: LlavaProcessor):
    row = make_row()
    row["messages"][0]["content"] = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]
    row["images"] = [{"path": "a", "bytes": None}] * 2
    assert [s.sort for s in inspect_row(row, 0, processor).spans].count("image") == 2


def test_pieces_are_those_of_decoding_all_that_came_before(processor: LlavaProcessor):
    """Each in a window of its own, since decoding everything anew for every token never ends on a long row."""
    text = "<b>réd</b> 🙂🙂 \ufffd\ufffd\ufffd\ufffd\ufffd\ufffd ok  two\n\nlines 漢字 end."
    ids = processor.tokenizer(text)["input_ids"]
    pieces = _pieces(processor.tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    shown = inspect_row(make_row(answer="word " * 20_000), 0, processor)
    assert shown.num_tokens > 20_000


def test_cut_rows_say_so(processor: LlavaProcessor):
    row = make_row()
    whole = inspect_row(row, 0, processor)
    cut = inspect_row(row, 0, processor, max_length=whole.num_tokens - 1)
    assert cut.num_cut == whole.num_tokens - cut.num_tokens > 0
    assert "cut off" in cut.title and "cut off" not in whole.title


def test_the_terminal_marks_what_is_learned_with_and_without_colour(processor: LlavaProcessor, tmp_path: Path):
    shown = inspect_row(make_row(tmp_path / "a.png"), 0, processor)
    text = as_terminal_text(shown)
    assert re.findall("\u00ab(.*?)\u00bb", text.plain, re.DOTALL) == [
        s.text.replace("\n", "\u21b5\n") for s in shown.spans if s.sort == "learned"
    ]
    green = "".join(text.plain[s.start : s.end] for s in text.spans if s.style == "green")
    assert "réd" in green and "What" not in green
    with_ids = as_terminal_text(shown, with_ids=True).plain
    numbers = [int(n) for n in re.findall(r"\[(\d+)\]", with_ids)]
    assert numbers == [token for span in shown.spans if span.sort != "image" for token in span.ids]


def test_the_page_shows_the_picture_the_tower_gets(processor: LlavaProcessor, tmp_path: Path):
    row = make_row(tmp_path / "a.png")
    page = as_page([inspect_row(row, 0, processor)], processor, "lead", with_ids=True)
    (data,) = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert picture.size == (28, 28)
    pixels = np.asarray(picture).astype(int)
    assert abs(pixels[14, 14] - [200, 30, 60]).max() < 12
    grey = [int(m * 255) for m in processor.image_processor.image_mean]
    assert abs(pixels[1, 14] - grey).max() < 12, "padded to square with the mean colour"
    assert "What &lt;b&gt;is" in re.sub("<[^>]*>|\\d", "", page).replace("&#x27;", "'")
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")


def test_taking_the_normalisation_back_is_exact(processor: LlavaProcessor):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8))
    pixel_values = torch.as_tensor(np.array(processor.image_processor(image, return_tensors="pt")["pixel_values"][0]))
    np.testing.assert_array_equal(np.asarray(denormalise(pixel_values, processor.image_processor)), np.asarray(image))


class TestCommand:
    """`vir-hf data inspect` as it is typed."""

    @pytest.fixture
    def files(self, tmp_path: Path, processor: LlavaProcessor, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        rows = []
        for number in range(6):
            Image.new("RGB", (40, 20), (number, 0, 0)).save(tmp_path / f"{number}.png")
            turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": f"Number {number}."}]
            rows.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns})
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        processor.save_pretrained(tmp_path / "processor")
        return str(tmp_path / "rows.json"), str(tmp_path / "processor")

    def test_rows_of_a_file(self, files, capsys: pytest.CaptureFixture[str], tmp_path: Path):
        rows, processor = files
        page = tmp_path / "page.html"
        command = ["data", "inspect", rows, "--processor", processor, "--rows", "1-2,5", "--html", str(page)]
        assert cli.main(command) == 0
        out = capsys.readouterr().out
        assert [n for n in range(6) if f"Number {n}." in out] == [1, 2, 5]
        assert page.read_text().count("data:image/jpeg") == 3
        assert cli.main([*command[:5], "--id", "r4", "--json", "-"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        assert row["id"] == "r4" and row["num_supervised_tokens"] > 0
        assert cli.main([*command[:5], "--random", "2", "--seed", "1"]) == 0

    def test_a_broken_picture_is_told_by_its_row(self, files, capsys: pytest.CaptureFixture[str], tmp_path: Path):
        rows, processor = files
        (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:-40])
        assert cli.main(["data", "inspect", rows, "--processor", processor]) == 1
        shown = capsys.readouterr()
        assert [n for n in range(6) if f"Number {n}." in shown.out] == [0, 1, 2]
        assert "error: row 1: " in shown.err and "1.png" in shown.err and "row 0" not in shown.err

    def test_rows_count_as_in_the_file_whatever_is_left_out(
        self, files, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ):
        rows, processor = files
        (tmp_path / "0.png").unlink()
        (tmp_path / "3.png").unlink()
        command = ["data", "inspect", rows, "--processor", processor]
        assert cli.main(command) == 0
        assert re.findall(r"Number (\d)", capsys.readouterr().out) == ["1", "2", "4"]
        assert cli.main([*command, "--rows", "0-999999999"]) == 1
        shown = capsys.readouterr()
        assert re.findall(r"row (\d), id r(\d)", shown.out) == [(str(n), str(n)) for n in (1, 2, 4, 5)]
        assert "row 0 (id r0): training leaves it out: " in shown.err and "row 3 (id r3)" in shown.err
        assert cli.main([*command, "--id", "r3"]) == 1
        assert "3.png" in capsys.readouterr().err

    def test_what_steers_a_terminal_is_shown_as_an_escape(
        self, files, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ):
        rows, processor = files
        talk = [{"from": "human", "value": "a\x1b[31m \u202eb"}, {"from": "gpt", "value": "c\x07"}]
        Path(rows).write_text(json.dumps([{"id": "i\x1b]0;title", "conversations": talk}]))
        assert cli.main(["data", "inspect", rows, "--processor", processor]) == 0
        out = capsys.readouterr().out
        assert not set(out) & {"\x1b", "\u202e", "\x07"} and r"i\x1b]0;title" in out

    def test_a_tokenizer_is_enough_for_text(self, files, capsys: pytest.CaptureFixture[str]):
        rows, processor = files
        command = ["data", "inspect", rows, "--tokenizer", processor, "--image-tokens", "9", "--template", "plain"]
        page = Path(rows).with_name("page.html")
        assert cli.main([*command, "--html", str(page)]) == 0
        assert "<image x9>" in capsys.readouterr().out
        assert page.read_text().count("data:image/jpeg") == 3 and "as they lie in their files" in page.read_text()

    def test_a_recipe_shows_what_it_trains(self, tiny_parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        recipe = [
            f"model.language_model={tiny_parts / 'lm'}",
            f"model.vision_tower={tiny_parts / 'tower'}",
            f"data.data_path={tiny_parts / 'rows.json'}",
            f"data.image_folder={tiny_parts / 'images'}",
        ]
        assert cli.main(["data", "inspect", *recipe, "--rows", "0", "--json", "-"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        from vir_hf.data.sources import load_llava_dataset
        from vir_hf.model.build import build

        _, processor = build(str(tiny_parts / "lm"), str(tiny_parts / "tower"), "vicuna_v1")
        trained = load_llava_dataset(tiny_parts / "rows.json", tiny_parts / "images", decode_images=False)[0]
        encoded = encode_row(trained, processor)
        assert row["num_tokens"] == len(encoded["input_ids"])
        assert row["num_supervised_tokens"] == sum(label >= 0 for label in encoded["labels"])
        assert cli.main(["data", "check", *recipe, "--json", "-"]) in (0, 1)
        figures = json.loads(capsys.readouterr().out)["statistics"]
        assert figures["unit"] == "tokens" and figures["max_length"]

    def test_the_data_of_a_recipe_is_never_written_over(self, tiny_parts: Path, tmp_path: Path, capsys):
        shutil.copytree(tiny_parts / "images", tmp_path / "images")
        shutil.copy(tiny_parts / "rows.json", tmp_path / "rows.json")
        before = (tmp_path / "rows.json").read_bytes()
        recipe = ["experiment=local_lite", f"model.language_model={tiny_parts / 'lm'}"]
        recipe += [f"model.vision_tower={tiny_parts / 'tower'}", f"data.image_folder={tmp_path / 'images'}"]
        for named in (f"data.data_path={tmp_path / 'rows.json'}", f"data.sources=[{{path: {tmp_path / '*.json'}}}]"):
            assert cli.main(["data", "inspect", *recipe, named, "--json", str(tmp_path / "rows.json")]) == 2
            assert "would overwrite a file" in capsys.readouterr().err
        assert (tmp_path / "rows.json").read_bytes() == before

    def test_wrong_calls(self, files, capsys: pytest.CaptureFixture[str]):
        rows, processor = files
        for wrong in (
            [rows],
            [rows, "--processor", processor, "--rows", "a-b"],
            [rows, "--processor", processor, "--rows", "99"],
            [rows, "--processor", processor, "--id", "nobody"],
            [rows, "--tokenizer", "/nowhere"],
            ["data.data_path=/nowhere.json"],
            [rows, "--processor", processor, "--random", "-2"],
            [rows, "--processor", processor, "--json", rows],
            [rows, "--processor", processor, "--html", "/nowhere/page.html"],
        ):
            assert cli.main(["data", "inspect", *wrong]) == 2, wrong
        assert "error:" in capsys.readouterr().err


@pytest.mark.real_data
def test_real_rows_with_real_tokenizers(shared_data: Path):
    from vir_hf.model.row_processor import make_row_processor

    for name, template in (("llama2", "vicuna_v1"), ("qwen2.5", "chatml"), ("llama3", "llama_3")):
        processor = make_row_processor(str(shared_data / "tokenizers" / name), template)
        for number, row in enumerate(json.loads((shared_data / "coco" / "llava_demo.json").read_text())[:8]):
            shown = inspect_row({**row, "images": [row["image"]]} | {"image": None}, number, processor)
            answers = [turn["value"].strip() for turn in row["conversations"] if turn["from"] == "gpt"]
            learned = [span.text for span in shown.spans if span.sort == "learned"]
            assert len(learned) == len(answers)
            assert all(answer in text for answer, text in zip(answers, learned, strict=True)), (name, number)
