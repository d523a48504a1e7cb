"""Stored answers and published files brought together: by id and by content, and what does not line up is named."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from vir_hf import cli
from vir_hf.errors import DataError
from vir_hf.scores.tasks import TASKS
from vir_hf.using.benchmarks import bare_question, read_items
from vir_hf.using.results import read_scored
from vir_hf.using.stored_answers import align, asked_items, read_answers, rotate, with_rounds, without_others

SHORT = "\nAnswer the question using a single word or phrase."
CATEGORIES = ("adversarial", "random", "popular")


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pope(tmp_path: Path) -> Path:
    """POPE's three label files, LLaVA's one question file and its answers: ids of both begin at 1 and never agree."""
    questions, answers, chance = [], [], random.Random(0)
    for number, category in enumerate(CATEGORIES):
        labels = []
        for place in range(1, 61):
            label = "yes" if place % 2 else "no"
            # What is there is asked in all three, what is not differs.
            thing = f"thing {place}" if label == "yes" else f"{category} {place}"
            image = f"COCO_val2014_{place // 6:012d}.jpg"
            text = f"Is there a {thing} in the image?"
            labels.append({"question_id": place, "image": image, "text": text, "label": label})
            row = {
                "question_id": number * 10_000_000 + place,
                "image": image,
                "text": text + SHORT,
                "category": category,
            }
            questions.append(row)
            said = label if chance.random() < 0.8 else "no" if label == "yes" else "yes"
            answers.append({"question_id": row["question_id"], "prompt": row["text"], "text": said.capitalize()})
        lines(tmp_path / f"coco_pope_{category}.json", labels)
    lines(tmp_path / "llava_pope_test.jsonl", questions)
    lines(tmp_path / "answers.jsonl", answers)
    return tmp_path


def by_llava(folder: Path, category: str) -> float:
    """F1 as LLaVA's script counts it: labels and answers of a category paired by their order."""
    rows = [json.loads(line) for line in (folder / "llava_pope_test.jsonl").read_text().splitlines()]
    own = {row["question_id"] for row in rows if row["category"] == category}
    given = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    said = ["no" if row["text"] == "No" else "yes" for row in given if row["question_id"] in own]
    labels = [json.loads(line)["label"] for line in (folder / f"coco_pope_{category}.json").read_text().splitlines()]
    hit = sum(one == other == "yes" for one, other in zip(said, labels, strict=True))
    return 2 * hit / (said.count("yes") + labels.count("yes"))


def call(folder: Path, category: str = "random", *more: str) -> list[str]:
    return [
        "evaluate", "--task", "pope", "--data", str(folder / f"coco_pope_{category}.json"), "--questions",
        str(folder / "llava_pope_test.jsonl"), "--answers", str(folder / "answers.jsonl"), *more,
    ]  # fmt: skip


@pytest.mark.parametrize("category", CATEGORIES)
def test_llavas_files_are_scored_as_published(pope: Path, category: str, tmp_path: Path) -> None:
    assert cli.main(call(pope, category, "--json", str(tmp_path / "s.json"), "--output", str(tmp_path / "out"))) == 0
    document = json.loads((tmp_path / "s.json").read_text())
    results = {row["metric"]: row for row in document["results"]}
    assert results["f1"]["value"] == pytest.approx(by_llava(pope, category), abs=1e-6)
    assert results["f1"]["low"] < results["f1"]["value"] < results["f1"]["high"]
    assert document["variant"] == "llava" and document["counts"]["answers_of_other_categories"] == 120
    again = read_scored(tmp_path / "out" / "questions.jsonl", TASKS["pope"], "llava", "x")
    assert again.judged.values()["f1"] == pytest.approx(results["f1"]["value"], abs=1e-6)


def test_the_order_of_lines_does_not_matter(pope: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(call(pope)) == 0
    before = capsys.readouterr().out
    for name in ("answers.jsonl", "llava_pope_test.jsonl", "coco_pope_random.json"):
        rows = [json.loads(line) for line in (pope / name).read_text().splitlines()]
        random.Random(1).shuffle(rows)
        lines(pope / name, rows)
    assert cli.main(call(pope)) == 0
    assert capsys.readouterr().out == before


def broken(folder: Path, name: str, change: object) -> None:
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    lines(folder / name, change(rows))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("answers.jsonl", lambda rows: rows[:80] + rows[83:], "3 of 60 questions have no answer"),
        (
            "answers.jsonl",
            lambda rows: [*rows, {"question_id": 7777777, "text": "yes"}],
            r"1 of 61 answers have no question \('7777777'\)",
        ),
        (
            "answers.jsonl",
            lambda rows: [*rows, {**rows[60], "text": "Perhaps"}],
            r"1 ids come again with another answer \('10000001'\)",
        ),
        (
            "answers.jsonl",
            lambda rows: [{**row, "prompt": "Is there a unicorn?"} if n == 61 else row for n, row in enumerate(rows)],
            "1 answers were given to another question than the labels have",
        ),
        (
            "coco_pope_random.json",
            lambda rows: [{**row, "text": row["text"].replace("random 4", "zebra 4")} for row in rows],
            "do not line up: 6 of 60 labels have no question .*6 of 60 questions of category 'random' have no label",
        ),
        ("coco_pope_random.json", lambda rows: rows[:50], "10 of 60 questions of category 'random' have no label"),
        (
            "coco_pope_random.json",
            lambda rows: [{**row, "label": "maybe"} if n == 3 else row for n, row in enumerate(rows)],
            "found the label 'maybe', expected yes or no",
        ),
        ("coco_pope_random.json", lambda rows: [*rows, rows[0]], "1 ids come more than once, with the same question"),
    ],
)  # fmt: skip
def test_what_does_not_line_up_is_counted_and_named(
    pope: Path, capsys: pytest.CaptureFixture[str], name: str, change: object, message: str
) -> None:
    import re

    broken(pope, name, change)
    assert cli.main(call(pope, "random", "--json", str(pope / "s.json"))) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error) < 600
    assert not (pope / "s.json").exists()


def test_missing_answers_can_be_counted_as_wrong_and_the_same_line_twice_is_one(
    pope: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(pope, "answers.jsonl", lambda rows: [*rows[:80], *rows[83:], rows[100]])
    assert cli.main(call(pope, "random", "--missing-as-wrong", "--json", str(pope / "s.json"))) == 0
    document = json.loads((pope / "s.json").read_text())
    assert document["counts"]["questions_without_answer"] == 3
    assert "3 questions have no answer and count as wrong" in document["notes"]
    assert "note: 3 questions" in capsys.readouterr().out


def test_empty_and_cut_answers_are_counted(pope: Path) -> None:
    broken(
        pope,
        "answers.jsonl",
        lambda rows: [
            {**row, **({"text": " "} if n in (60, 61) else {}), **({"finish_reason": "length"} if n == 62 else {})}
            for n, row in enumerate(rows)
        ],
    )
    assert cli.main(call(pope, "random", "--json", str(pope / "s.json"))) == 0
    counts = json.loads((pope / "s.json").read_text())["counts"]
    assert (counts["empty_answers"], counts["cut_answers"]) == (2, 1)


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


TEN = [{"answer": "red", "answer_id": n} for n in range(1, 11)]


@pytest.mark.parametrize(
    ("task", "labels", "questions", "answers", "wanted"),
    [
        (
            "vqa",
            {
                "annotations": [
                    {"question_id": n, "image_id": 5, "answers": TEN, "answer_type": "other"} for n in (1, 2)
                ]
            },
            {"questions": [{"question_id": n, "image_id": 5, "question": "Which colour?"} for n in (1, 2)]},
            [{"question_id": 2, "answer": "red"}, {"question_id": 1, "answer": "blue"}],
            {"accuracy": 0.5},
        ),
        (
            "textvqa",
            {
                "data": [
                    {"question_id": 34 + n, "image_id": "ab", "question": q, "answers": ["red"] * 10}
                    for n, q in enumerate(("What?", "Who?"))
                ]
            },
            None,
            [
                {"question_id": "ab", "prompt": "who?\nReference OCR token: X, Y" + SHORT, "text": "red"},
                {"question_id": "ab", "prompt": "What?" + SHORT, "text": "green"},
            ],
            {"accuracy": 0.5},
        ),
        (
            "vizwiz",
            [{"image": "VizWiz_val_00000000.jpg", "question": "Colour?", "answers": TEN, "answer_type": "other"}],
            None,
            [{"question_id": "VizWiz_val_00000000.jpg", "prompt": "Colour?", "text": "red"}],
            {"accuracy": 1.0},
        ),
        (
            "gqa",
            {
                "201": {"question": "Is it red?", "answer": "yes", "imageId": "n1"},
                "202": {"question": "Who?", "answer": "man", "imageId": "n1"},
            },
            None,
            [{"questionId": "202", "prediction": "woman"}, {"questionId": "201", "prediction": "yes"}],
            {"accuracy": 0.5},
        ),
        (
            "anls",
            {
                "data": [
                    {"questionId": 9, "question": "Date?", "answers": ["1 May", "May 1"], "image": "documents/a.png"}
                ]
            },
            None,
            [{"questionId": 9, "answer": "may 1"}],
            {"anls": 1.0},
        ),
        (
            "relaxed",
            [{"imgname": "1.png", "query": "How many?", "label": "14"}],
            None,
            [{"id": "0", "answer": "14.5"}],
            {"relaxed_accuracy": 1.0},
        ),
        (
            "scienceqa",
            {
                "4": {
                    "question": "Which?",
                    "choices": ["x", "y"],
                    "answer": 1,
                    "hint": "",
                    "image": None,
                    "split": "test",
                },
                "5": {"question": "What?", "choices": ["x", "y"], "answer": 0, "image": "image.png", "split": "test"},
                "6": {"question": "Not asked", "choices": ["x", "y"], "answer": 0, "image": None, "split": "train"},
            },
            None,
            [
                {"question_id": "4", "prompt": "Which?\nA. x\nB. y", "text": "B"},
                {"question_id": "5", "text": "The answer is B."},
            ],
            {"accuracy": 0.5, "accuracy, with image": 0.0, "accuracy, without image": 1.0},
        ),
        (
            "caption",
            {
                "images": [{"id": 1, "file_name": "1.jpg"}],
                "annotations": [
                    {"image_id": 1, "id": 7, "caption": "a red dog"},
                    {"image_id": 1, "id": 8, "caption": "dog"},
                ],
            },
            None,
            [{"image_id": 1, "caption": "a red dog"}],
            {"rouge_l": 1.0},
        ),
        (
            "ocrbench",
            [
                {
                    "dataset_name": "IIIT5K",
                    "type": "Regular Text Recognition",
                    "question": "what is written?",
                    "image_path": "a.png",
                    "answers": ["CENTRE"],
                }
            ],
            None,
            [{"id": 0, "predict": "x", "answer": "the word centre"}],
            {"score": 1.0},
        ),
        (
            "mme",
            [
                {
                    "question_id": "count/1.png",
                    "category": "count",
                    "question": f"{q} Please answer yes or no.",
                    "answer": a,
                }
                for q, a in (("One?", "Yes"), ("Two?", "No"))
            ],
            None,
            [{"question_id": "count/1.png", "prompt": q + SHORT, "text": "Yes"} for q in ("Two?", "One?")],
            {"score, count": 50.0},
        ),
        (
            "exact",
            [
                {
                    "id": "a",
                    "image": "a.png",
                    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}],
                }
            ],
            None,
            {"a": "A dog.", "b": "not asked"},
            None,
        ),
    ],
)
def test_published_forms_are_read(
    tmp_path: Path, task: str, labels: object, questions: object, answers: object, wanted: dict | None
) -> None:
    found = read_items(TASKS[task], write(tmp_path / "labels.json", labels))
    if questions is not None:
        found, _ = asked_items(found, write(tmp_path / "q.json", questions), tmp_path / "labels.json")
        assert found[0].question == "Which colour?"
    given = read_answers(write(tmp_path / "answers.json", answers))
    if wanted is None:
        with pytest.raises(DataError, match="1 of 2 answers have no question"):
            align(found, given)
        return
    from vir_hf.scores.tasks import judge

    aligned = align(found, given)
    values = judge(TASKS[task], aligned.items, aligned.answers).values()
    assert {name: values[name] for name in wanted} == pytest.approx(wanted)


def test_mmbench_tables_and_llavas_rounds(tmp_path: Path) -> None:
    head = "index\tquestion\thint\tA\tB\tC\tanswer\tcategory\timage\n"
    table = tmp_path / "mmbench.tsv"
    table.write_text(head + "3\tWhich?\tnan\tp\tq\tr\tB\tlogic\t" + "x" * 20 + "\n")
    (item,) = read_items(TASKS["mmbench"], table)
    assert item.options == ("p", "q", "r") and item.references == ("B",) and "hint" not in item.details
    turned = rotate([item])
    assert [(one.options[0], one.references[0]) for one in turned] == [("p", "B"), ("q", "A"), ("r", "C")]
    rows = [{"question_id": 3, "round_id": turn, "text": said, "prompt": "Which?"} for turn, said in enumerate("BAC")]
    aligned = align([item], with_rounds(read_answers(lines(tmp_path / "a.jsonl", rows))))
    from vir_hf.scores.tasks import judge

    assert judge(TASKS["mmbench"], aligned.items, aligned.answers).values()["circular_accuracy"] == 1.0
    table.write_text(head + "3\tWhich?\tnan\tp\tq\tnan\tB\tlogic\tx\n1000003\tWhich?\tnan\tq\tp\tnan\tA\tlogic\tx\n")
    assert {one.group for one in read_items(TASKS["mmbench"], table)} == {"3"}


def test_mmes_folder(tmp_path: Path) -> None:
    for category, inner in (("count", ""), ("scene", "questions_answers_YN/")):
        folder = tmp_path / category / inner
        folder.mkdir(parents=True)
        (folder / "0001.txt").write_text("One? Please answer yes or no.\tYes\nTwo? Please answer yes or no.\tNo\n")
    found = read_items(TASKS["mme"], tmp_path)
    assert [(one.category, one.references) for one in found] == [
        ("count", ("Yes",)),
        ("count", ("No",)),
        ("scene", ("Yes",)),
        ("scene", ("No",)),
    ]


def test_a_question_is_the_same_without_the_words_of_its_prompt() -> None:
    assert bare_question("<image>\nIs there an orange in the imange?" + SHORT) == "is there an orange in the image?"


def test_answers_of_other_categories_are_told_apart(pope: Path) -> None:
    items = read_items(TASKS["pope"], pope / "coco_pope_popular.json")
    asked, others = asked_items(items, pope / "llava_pope_test.jsonl", pope / "coco_pope_popular.json")
    kept, left_out = without_others(read_answers(pope / "answers.jsonl"), others)
    assert len(asked) == len(kept) == 60 and left_out == 120 and asked[0].id == "20000001"
