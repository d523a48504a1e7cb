"""Two evaluations side by side: the same questions or none, the paired test, recipes, curves and the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from vir_hf import cli
from vir_hf.errors import DataError, RecipeError
from vir_hf.using.comparison import compare, history_of, recipe_differences


def evaluated(folder: Path, name: str, said: list[str], right: list[str] | None = None) -> Path:
    rows = [
        {"question_id": n, "question": f"Question {n}?", "image": f"{n % 3}.png", "answer": one}
        for n, one in enumerate(right or ["yes"] * len(said))
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "a.json").write_text(json.dumps([{"question_id": n, "text": one} for n, one in enumerate(said)]))
    call = ["evaluate", "--task", "exact", "--data", str(folder / "rows.json"), "--answers", str(folder / "a.json")]
    assert cli.main([*call, "--output", str(folder / name)]) == 0
    return folder / name


def test_the_page_and_the_table_say_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (30, 20), colour).save(tmp_path / f"{number}.png")
    first = evaluated(tmp_path, "first", ["yes"] * 10 + ["no"] * 20)
    second = evaluated(tmp_path, "second", ["yes"] * 28 + ["<b>no</b>"] * 2)
    for folder, rate in ((first, 1e-4), (second, 2e-4)):
        (folder / "recipe.yaml").write_text(f"training:\n  learning_rate: {rate}\n  seed: 1\n")
        history = [{"step": n, "loss": 2 / n, "learning_rate": rate} for n in (1, 2, 3)]
        (folder / "metrics.json").write_text(
            json.dumps(
                {
                    "is_finished": True,
                    "num_steps": 3,
                    "loss_history": history,
                    "evaluation_history": [{"step": 2, "loss": 1.5}],
                }
            )
        )
    page, report = tmp_path / "c.html", tmp_path / "c.json"
    call = [
        "compare",
        str(first),
        str(second),
        "--html",
        str(page),
        "--json",
        str(report),
        "--image-folder",
        str(tmp_path),
    ]
    assert cli.main(call) == 0
    document = json.loads(report.read_text())
    (score,) = document["results"]
    assert score["difference"] == pytest.approx(0.6) and score["p_value"] < 0.001 and score["low"] > 0.4
    assert document["recipe_differences"] == [{"key": "training.learning_rate", "first": "0.0001", "second": "0.0002"}]
    html = page.read_text()
    assert "second is better" in html and "&lt;b&gt;no" in html and "<b>no" not in html
    assert html.count("<polyline") == 4 and html.count("data:image/jpeg") >= 3  # two curves of two runs
    assert "differ" in capsys.readouterr().out
    assert [entry.get("eval_loss") for entry in history_of(str(first))][-1] == 1.5
    assert recipe_differences(str(first), str(tmp_path)) == []


def test_other_questions_or_other_right_answers_do_not_compare(tmp_path: Path) -> None:
    first = evaluated(tmp_path, "first", ["yes"] * 4)
    fewer = evaluated(tmp_path, "fewer", ["yes"] * 3)
    other = evaluated(tmp_path, "other", ["yes"] * 4, ["yes", "no", "yes", "yes"])
    with pytest.raises(DataError, match="1 only the first, 0 only the second"):
        compare(str(first), str(fewer))
    with pytest.raises(DataError, match="1 with other right answers"):
        compare(str(first), str(other))
    with pytest.raises(RecipeError, match="holds no evaluation"):
        compare(str(first), str(tmp_path))
