"""Scores on held-out rows: the metrics by hand, the command on a run that has learned its rows, and the card made from it."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageFile
from tiny_run import QUESTION, train_run

from vir_hf import cli
from vir_hf.errors import DataError
from vir_hf.inference import Answerer, Question
from vir_hf.publishing.card import RunFacts, make_card
from vir_hf.using.evaluation import answer_cases, blanked, choose_samples, read_cases, write_results
from vir_hf.using.questions import row_references

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]


@pytest.mark.parametrize(
    ("columns", "references"),
    [
        ({"image": "a.png", "conversations": TALK}, ["A dog."]),
        ({"answers": ["a", "b", "a"]}, ["a", "b"]),
        ({"answer": 3}, ["3"]),
        ({"answer": True}, ["true"]),
        ({"answers": "a"}, ["a"]),
        # VQAv2, TextVQA and OK-VQA as they are published, and as `datasets` keeps a sequence of dictionaries
        (
            {"answers": [{"answer": "red", "answer_id": 1}, {"answer": "bright red", "answer_id": 2}]},
            ["red", "bright red"],
        ),
        ({"answers": {"answer": ["a", "b"], "answer_confidence": ["yes", "no"]}}, ["a", "b"]),
        ({"answers": {"text": ["a"], "answer_start": [0]}}, ["a"]),  # SQuAD
        ({"answer": {"text": "a"}}, ["a"]),
        ({"answer": {"value": ["a", ""]}}, ["a"]),
        # What is empty leaves the word to what stands beside it.
        ({"answers": [], "answer": "b"}, ["b"]),
        ({"answers": None, "answer": "b"}, ["b"]),
        ({"answers": [{"answer": ""}, None], "answer": "b"}, ["b"]),
        ({"image": "a.png", "answers": "", "answer": " ", "conversations": TALK}, ["A dog."]),
        ({"image": "a.png", "answer": float("nan"), "conversations": TALK}, ["A dog."]),
    ],
)
def test_right_answers_come_from_a_column_or_from_the_last_turn(columns: dict, references: list[str]) -> None:
    assert row_references({"id": "1", "question": "?", **columns}) == references


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": "a.png", "conversations": TALK[:1]}, "no right answer"),
        ({"answer": ""}, "no right answer"),
        ({"answers": [{"label": "a"}]}, r"'answers': found \{'label': 'a'\}; expected a text"),
        ({"answer": b"a" * 10_000}, "'answer': found 10,000 bytes"),
    ],
)
def test_what_is_no_answer_is_never_compared_as_text_of_python(columns: dict, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        row_references({"id": "1", "question": "?", **columns})
    assert len(str(error.value)) < 500


def test_blanking_replaces_every_picture_and_leaves_the_text() -> None:
    red = Image.new("RGB", (8, 6), "red")
    history = [{"role": "user", "content": [{"type": "image", "image": red}, {"type": "text", "text": "Hi"}]}]
    asked = blanked(Question("And this?", [red], history=[*history, {"role": "assistant", "content": "Hello"}]))
    grey = asked.images[0]
    assert isinstance(grey, Image.Image) and grey.size == (8, 6) and grey.getcolors() == [(48, (127, 127, 127))]
    assert asked.history[0]["content"][0]["image"].getpixel((0, 0)) == (127, 127, 127)
    assert asked.history[0]["content"][1] == {"type": "text", "text": "Hi"} and asked.text == "And this?"


def test_samples_show_every_picture_once(tmp_path: Path) -> None:
    rows = []
    for number in range(4):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
        rows += [
            {"id": f"{number}{k}", "image": f"{number}.png", "question": "<image>\n?", "answer": "!"} for k in "ab"
        ]
    rows.append({"id": "text", "question": "?", "answer": "!"})
    cases = read_cases(rows, str(tmp_path))
    chosen = choose_samples(cases, 6)
    assert sorted(cases[number].id[0] for number in chosen) == ["0", "1", "2", "3"]
    assert len(choose_samples(cases, 2)) == 2


def test_a_picture_is_shown_once_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, colour in (("a.png", "red"), ("sub/a.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    data = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    images = ["a.png", "./a.png", "sub/../a.png", "sub/a.png", f"data:image/png;base64,{data}", data]
    keys = ["image", "images", "img", "image", "image", "image_path"]
    rows = [
        {"id": str(number), key: [image] if key == "images" else image, "question": "?", "answer": "!"}
        for number, (key, image) in enumerate(zip(keys, images, strict=True))
    ]
    cases = read_cases(rows, str(tmp_path))
    shown = choose_samples(cases, 6)
    assert len(shown) == 3 and 3 in shown and sum(number < 3 for number in shown) == 1


def earlier_turn_rows(folder: Path) -> Path:
    """Write two rows whose image stands in the first of two turns, one text-only row, and the images."""
    rows = []
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (32, 32), colour).save(folder / f"{colour}.png")
        turns = ["<image>\nWhich colour?", colour, "Is it bright?", "yes"]
        roles = ("human", "gpt") * 2
        talk = [{"from": role, "value": value} for role, value in zip(roles, turns, strict=True)]
        rows.append({"id": str(number), "image": f"{colour}.png", "conversations": talk})
    rows.append({"id": "text", "question": "?", "answer": "!"})
    (folder / "earlier.json").write_text(json.dumps(rows))
    return folder / "earlier.json"


def test_rows_whose_picture_is_in_an_earlier_turn_are_asked_with_it_and_shown(tiny_run: Path, tmp_path: Path) -> None:
    data, run = earlier_turn_rows(tmp_path), tmp_path / "run"
    shutil.copytree(tiny_run, run)
    call = [
        "evaluate",
        str(run),
        "--data",
        str(data),
        "--blind",
        "--before",
        "--max-new-tokens",
        "4",
        "--device",
        "cpu",
    ]
    assert cli.main(call) == 0
    samples = json.loads((run / "samples.json").read_text())
    assert {sample["question"] for sample in samples} == {"Is it bright?"} and len(samples) == 2
    colours = {Image.open(run / sample["image"]).convert("RGB").resize((1, 1)).getpixel((0, 0)) for sample in samples}
    assert {max(range(3), key=colour.__getitem__) for colour in colours} == {0, 2}  # one red, one blue
    assert {it["num_rows"] for it in json.loads((run / "evaluation.json").read_text())["results"]} == {3}
    cases = read_cases(json.loads(data.read_text()), str(tmp_path))
    answerer = Answerer.load(str(run), device="cpu")
    assert len(answerer.encode(cases[0].open()).pixel_values) == 1
    grey = blanked(cases[0].open()).all_images()[0]
    assert isinstance(grey, Image.Image) and grey.getpixel((0, 0)) == (127, 127, 127)


def test_a_file_of_questions_whose_picture_is_in_an_earlier_turn_is_answered(tiny_run: Path, tmp_path: Path) -> None:
    data, output = earlier_turn_rows(tmp_path), tmp_path / "answers.jsonl"
    call = ["answer", str(tiny_run), "--input", str(data), "--output", str(output), "--max-new-tokens", "4"]
    assert cli.main([*call, "--device", "cpu"]) == 0
    given = {row["id"]: row["answer"] for row in map(json.loads, output.read_text().splitlines())}
    cases = read_cases(json.loads(data.read_text()), str(tmp_path))
    answerer = Answerer.load(str(tiny_run), device="cpu")
    assert given == {case.id: answerer.answer_batch([case.open()], max_new_tokens=4)[0] for case in cases}


def test_earlier_results_about_other_data_stay(tmp_path: Path) -> None:
    def result(dataset: str, value: float) -> dict:
        return {"dataset": dataset, "metric": "exact match", "value": value, "num_rows": 1}

    write_results(tmp_path, [result("a", 0.1)])
    write_results(tmp_path, [result("b", 0.2)])
    write_results(tmp_path, [result("a", 0.3)])
    written = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert written == [result("b", 0.2), result("a", 0.3)]


def test_a_picture_is_opened_when_its_row_is_asked_and_not_before(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    rows = [{"id": str(number), "image": "a.png", "question": "?", "answer": "!"} for number in range(5)]
    rows.append({"id": "text", "question": "?", "answer": "!"})
    opened: list[int] = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: (opened.append(1), load(image))[1])
    cases = read_cases(rows, str(tmp_path))
    assert opened == [] and [case.picture is not None for case in cases] == [True] * 5 + [False]
    answerer = Answerer.load(str(tiny_run), device="cpu")
    whole = answer_cases(answerer, cases, batch_size=2, max_new_tokens=5)
    assert len(opened) >= 5
    assert whole == answerer.answer_batch([case.open() for case in cases], max_new_tokens=5)


def test_a_broken_picture_is_named_by_its_row(tiny_run: Path, tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "cut.jpg")
    data = (tmp_path / "cut.jpg").read_bytes()
    row = {"id": "seven", "image": "cut.jpg", "question": "?", "answer": "!"}
    (tmp_path / "cut.jpg").write_bytes(data[:600])
    with pytest.raises(DataError, match="row with id seven: .*cut.jpg"):
        read_cases([row], str(tmp_path))
    (tmp_path / "cut.jpg").write_bytes(data)
    cases = read_cases([row], str(tmp_path))
    (tmp_path / "cut.jpg").unlink()
    with pytest.raises(DataError, match="row with id seven: .*cut.jpg"):
        answer_cases(Answerer.load(str(tiny_run), device="cpu"), cases, max_new_tokens=1)


PEAK = """
import sys
from vir_hf import cli
code = cli.main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's count of a process's peak memory")
@pytest.mark.long
@pytest.mark.parametrize("command", ["evaluate", "answer"])
def test_memory_does_not_grow_with_the_rows(command: str, tiny_run: Path, tmp_path: Path) -> None:
    """Kept decoded, 100 pictures of this size are 72 MiB and 1,000 are 715."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    Image.new("RGB", (500, 500), "red").save(tmp_path / "red.jpg", quality=50)
    peaks = []
    for num_rows in (100, 1000):
        rows = [{"id": n, "image": "red.jpg", "question": "What?", "answer": "red"} for n in range(num_rows)]
        (tmp_path / f"{num_rows}.json").write_text(json.dumps(rows))
        more = ["--input", f"{num_rows}.json", "--output", f"{num_rows}.jsonl"]
        if command == "evaluate":
            more = [
                "--data",
                f"{num_rows}.json",
                "--samples",
                "2",
                *(["--blind", "--before"] if num_rows > 100 else []),
            ]
        call = [sys.executable, "-c", PEAK, command, "run", *more, "--max-new-tokens", "1", "--device", "cpu"]
        call += ["--batch-size", "20"]
        done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] < 1.1 * peaks[0], f"MiB at 100 and 1,000 pictures: {peaks}"


@pytest.fixture
def heldout(tiny_parts: Path, tmp_path: Path) -> Path:
    """The rows that the tiny run has learned, under another name, so that what it should score is known."""
    rows = json.loads((tiny_parts / "rows.json").read_text())
    rows = [{**row, "conversations": row["conversations"][:2]} for row in rows if "image" in row]
    path = tmp_path / "heldout.json"
    path.write_text(json.dumps(rows))
    return path


def test_a_run_is_scored_before_and_after_and_the_card_says_so(
    tiny_run: Path, tiny_parts: Path, heldout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    images = str(tiny_parts / "images")
    call = ["evaluate", str(run), "--data", str(heldout), "--image-folder", images, "--max-new-tokens", "20"]
    assert cli.main([*call, "--name", "squares", "--blind", "--before", "--samples", "3", "--device", "cpu"]) == 0
    scores = {it["metric"]: it for it in json.loads((run / "evaluation.json").read_text())["results"]}
    rows = json.loads(heldout.read_text())
    assert all(it["num_rows"] == len(rows) and it["dataset"] == "squares" for it in scores.values())
    answerer = Answerer.load(str(run), device="cpu")
    given = [answerer.answer([f"{images}/{row['image']}"], QUESTION, max_new_tokens=20) for row in rows]
    num_right = sum(said == row["conversations"][1]["value"] for said, row in zip(given, rows, strict=True))
    assert scores["exact match"]["value"] == num_right / len(rows) > 0.3
    assert scores["exact match, before tuning"]["value"] == 0
    assert scores["exact match, blank pictures"]["value"] < scores["exact match"]["value"]
    assert scores["ROUGE-L"]["value"] >= scores["exact match"]["value"]
    samples = json.loads((run / "samples.json").read_text())
    assert len(samples) == 3 and all((run / it["image"]).is_file() for it in samples)
    assert all(it["after"] and it["before"] != it["after"] for it in samples)
    card = make_card(RunFacts.read(run), "user/tiny", samples_licence="cc0-1.0")
    assert card.data.eval_results[0].metric_value == scores["exact match"]["value"]
    assert samples[0]["after"] in str(card) and "Nothing was measured" not in str(card)
    assert "trained on" not in capsys.readouterr().err


def test_an_adapters_base_is_the_model_before(tiny_parts: Path, heldout: Path, tmp_path: Path) -> None:
    values = {"lora": "default", "trainable.language_model": "lora", "training.learning_rate": 1e-2}
    run = train_run(tiny_parts, tmp_path / "run", **values)
    call = ["evaluate", str(run), "--data", str(heldout), "--image-folder", str(tiny_parts / "images")]
    assert cli.main([*call, "--before", "--max-new-tokens", "20", "--device", "cpu"]) == 0
    scores = {it["metric"]: it["value"] for it in json.loads((run / "evaluation.json").read_text())["results"]}
    assert scores["ROUGE-L, before tuning"] < 0.5 < scores["ROUGE-L"]


def test_rows_that_were_trained_on_are_called_so(
    tiny_run: Path, tiny_parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    data = str(tiny_parts / "rows.json")
    call = ["evaluate", str(run), "--data", data, "--image-folder", str(tiny_parts / "images"), "--max-rows", "1"]
    assert cli.main([*call, "--device", "cpu"]) == 0
    assert "is what this run was trained on" in capsys.readouterr().err
    results = json.loads((run / "evaluation.json").read_text())["results"]
    assert {result["dataset"] for result in results} == {"rows (trained on)"} and not (run / "samples.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "--data", "rows.json"], "missing: no such folder"),
        ([".", "--data", "rows.json"], "rows.json: cannot be read"),
        ([".", "--data", "empty.json"], "holds no rows"),
        ([".", "--data", "unanswered.json"], "row with id 1: the row has no right answer"),
        (["none", "--data", "rows.json"], "none: holds neither a model nor an adapter"),
        ([".", "--data", "rows.json", "--max-rows", "0"], "--max-rows 0"),
        ([".", "--data", "rows.json", "--samples", "-1"], "--samples -1"),
    ],
)
def test_wrong_calls_are_answered_before_a_model_is_loaded(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "none").mkdir()
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "unanswered.json").write_text(json.dumps([{"id": "1", "question": QUESTION}]))
    assert cli.main(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err
