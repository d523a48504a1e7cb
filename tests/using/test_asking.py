"""A model asked a benchmark: the same answers in one go, after a kill, and by two processes; blind scores beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from vir_hf import cli
from vir_hf.errors import DataError, RecipeError
from vir_hf.inference import Answerer
from vir_hf.scores.judging import Item
from vir_hf.scores.tasks import TASKS
from vir_hf.using import asking
from vir_hf.using.asking import BLANK, SEEN, SHUFFLED, Plan, ask, digest_of, shuffled_images


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    rows = []
    for number, colour in enumerate(("red", "green", "blue", "white", "black")):
        Image.new("RGB", (24, 24), colour).save(folder / f"{colour}.png")
        rows.append({"question_id": number, "image": f"{colour}.png", "question": "What is it?", "answer": colour})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def items() -> list[Item]:
    colours = ("red", "green", "blue", "white", "black")
    return [Item(str(n), f"Number {n}?", (colour,), f"{colour}.png") for n, colour in enumerate(colours)]


def plan(run: Path, folder: Path, **changes: object) -> Plan:
    given: dict = {
        "task": "exact", "model": str(run), "adapter": None, "load_in_4bit": False, "prompt": None,
        "image_folder": str(folder), "conditions": (SEEN, BLANK, SHUFFLED), "batch_size": 2,
        "generation": {"max_new_tokens": 4}, "digest": digest_of(items()), "weights": "",
    }  # fmt: skip
    return Plan(**{**given, **changes})


def test_a_stopped_evaluation_goes_on_to_the_same_answers(
    tiny_run: Path, benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer = Answerer.load(str(tiny_run), device="cpu")
    whole = ask(plan(tiny_run, benchmark), tmp_path / "whole", items(), answerer=answerer)
    real, calls = answerer.answer_prompts_and_ends, []

    def stopped(prompts: list, **generation: object) -> list:
        calls.append(len(prompts))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(prompts, **generation)

    monkeypatch.setattr(answerer, "answer_prompts_and_ends", stopped)
    with pytest.raises(KeyboardInterrupt):
        ask(plan(tiny_run, benchmark), tmp_path / "parts", items(), answerer=answerer)
    with (tmp_path / "parts" / "answers-0.jsonl").open("a") as file:
        file.write('{"id": "3", "condition": "images", "ans')  # a kill in the middle of a line
    monkeypatch.setattr(answerer, "answer_prompts_and_ends", real)
    asked: list[int] = []
    again = ask(plan(tiny_run, benchmark), tmp_path / "parts", items(), answerer=answerer, progress=asked.append)
    assert again == whole and sum(asked) == 10  # three batches of fifteen questions were there
    assert ask(plan(tiny_run, benchmark), tmp_path / "parts", items()) == whole  # no model is loaded for it


def test_answers_to_another_call_are_not_taken(tiny_run: Path, benchmark: Path, tmp_path: Path) -> None:
    answerer = Answerer.load(str(tiny_run), device="cpu")
    ask(plan(tiny_run, benchmark), tmp_path, items(), answerer=answerer)
    with pytest.raises(RecipeError, match="prompt was null, is 'Look. "):
        ask(plan(tiny_run, benchmark, prompt="Look. {question}"), tmp_path, items())


@pytest.mark.long
def test_two_processes_give_the_answers_of_one(tiny_run: Path, benchmark: Path, tmp_path: Path) -> None:
    one = ask(plan(tiny_run, benchmark), tmp_path / "one", items(), device="cpu")
    two = ask(plan(tiny_run, benchmark), tmp_path / "two", items(), num_processes=2, device="cpu")
    assert one == two and len(list((tmp_path / "two").glob("answers-*.jsonl"))) == 2


def test_every_image_takes_the_place_of_another() -> None:
    shuffled = shuffled_images(items())
    own = {item.id: item.image for item in items()}
    assert sorted(shuffled.values()) == sorted(own.values())
    assert all(shuffled[name] != image for name, image in own.items())
    assert shuffled_images(items()[:1]) == {}


def test_the_command_asks_scores_and_shows_what_is_right_without_images(
    tiny_run: Path, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("samples*", "evaluation.json"))  # of other tests
    call = ["evaluate", str(run), "--task", "exact", "--data", str(benchmark / "rows.json"), "--device", "cpu"]
    assert cli.main([*call, "--json", str(tmp_path / "s.json"), "--max-new-tokens", "3"]) == 0
    document = json.loads((tmp_path / "s.json").read_text())
    (result,) = document["results"]
    assert set(result["blind"]) == {BLANK, SHUFFLED} and document["prompt"] == TASKS["exact"].prompt
    folder = run / "evaluations" / "exact-rows"
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and sum(line["score"] for line in lines) / 5 == result["value"]
    assert document["counts"]["cut_answers"] == sum(bool(line.get("is_cut")) for line in lines)
    assert "95 % interval" in capsys.readouterr().out and "<img" in (folder / "gallery.html").read_text()
    card = json.loads((run / "evaluation.json").read_text())["results"]
    assert [row["metric"] for row in card] == ["exact_match", f"exact_match, {BLANK}", f"exact_match, {SHUFFLED}"]


def test_a_missing_image_is_named_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking.Answerer, "load", None)
    with pytest.raises(DataError, match="3 of 5 images are like this"):
        (tmp_path / "x").mkdir()
        for colour in ("red", "green"):
            Image.new("RGB", (8, 8), colour).save(tmp_path / f"{colour}.png")
        asking.check_images(items(), str(tmp_path))
