"""Scores on held-out rows: the metrics by hand, the command on a run that has learned its rows, and the card made from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tiny_run import QUESTION, train_run

from vir_hf import cli
from vir_hf.card import RunFacts, make_card
from vir_hf.errors import DataError
from vir_hf.evaluation import blanked, choose_samples, exact_match, normalised, read_cases, rouge_l, write_results
from vir_hf.inference import Answerer, Question
from vir_hf.questions import row_references


def test_answers_are_compared_without_case_articles_and_punctuation() -> None:
    assert normalised("  The red-brown  Dog. ") == "red-brown dog"
    assert exact_match("A dog!", ["cat", "dog"]) == 1
    assert exact_match("dogs", ["dog"]) == 0


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    # Four of five words in order, of four in the reference: 2 * 4 / 9.
    assert rouge_l("red car stands near tree", ["red car near tree"]) == pytest.approx(8 / 9)
    assert rouge_l("tree red", ["red tree"]) == pytest.approx(0.5)
    assert rouge_l("", ["dog"]) == 0 and rouge_l("dog", ["cat", "dog"]) == 1


def test_right_answers_come_from_a_column_or_from_the_last_turn() -> None:
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    assert row_references({"id": "1", "image": "a.png", "conversations": talk}) == ["A dog."]
    assert row_references({"id": "1", "question": "?", "answers": ["a", "b"]}) == ["a", "b"]
    assert row_references({"id": "1", "question": "?", "answer": 3}) == ["3"]
    with pytest.raises(DataError, match="no right answer"):
        row_references({"id": "1", "image": "a.png", "conversations": talk[:1]})


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


def test_earlier_results_about_other_data_stay(tmp_path: Path) -> None:
    def result(dataset: str, value: float) -> dict:
        return {"dataset": dataset, "metric": "exact match", "value": value, "num_rows": 1}

    write_results(tmp_path, [result("a", 0.1)])
    write_results(tmp_path, [result("b", 0.2)])
    write_results(tmp_path, [result("a", 0.3)])
    written = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert written == [result("b", 0.2), result("a", 0.3)]


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
