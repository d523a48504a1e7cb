"""lmms-eval: our model behind its interface, and its results believed only where they are written."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from vir_hf import cli
from vir_hf.errors import RunError
from vir_hf.inference import Answerer, Question
from vir_hf.using.harness import read_results, run_harness

RESULTS = {
    "results": {
        "pope": {
            "alias": "pope",
            "pope_accuracy,none": 0.85,
            "pope_accuracy_stderr,none": "N/A",
            "pope_f1_score,none": 0.84,
        },
        "mine": {"exact_match,none": 0.5, "exact_match_stderr,none": 0.1},
    },
    "n-samples": {"pope": {"original": 9000, "effective": 100}, "mine": {"original": 4, "effective": 4}},
}


def test_scores_are_read_and_a_task_without_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(RESULTS))
    found = read_results(tmp_path / "r.json", ["pope", "mine"])
    assert [(row["dataset"], row["metric"], row["value"], row["num_rows"]) for row in found] == [
        ("pope", "pope_accuracy", 0.85, 100), ("pope", "pope_f1_score", 0.84, 100), ("mine", "exact_match", 0.5, 4),
    ]  # fmt: skip
    with pytest.raises(RunError, match="gave no score for gqa"):
        read_results(tmp_path / "r.json", ["pope", "gqa"])


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `lmms_eval` that does what the file `main.py` says."""
    package = tmp_path / "site" / "lmms_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return package / "__main__.py"


def test_an_exit_status_of_0_without_results_is_a_failure(stand_in: Path, tmp_path: Path) -> None:
    stand_in.write_text("print('Error during evaluation: no such task')\n")
    with pytest.raises(RunError, match="wrote no results .*exit code 0.*no such task"):
        run_harness("run", ["mine"], tmp_path / "out")


def test_the_command_hands_on_the_call_and_keeps_the_scores(
    stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.write_text(
        "import json, pathlib, sys\nplace = pathlib.Path(sys.argv[sys.argv.index('--output_path') + 1]) / 'm'\n"
        "place.mkdir(parents=True)\n(place / 'call.json').write_text(json.dumps(sys.argv[1:]))\n"
        f"(place / '1_results.json').write_text({json.dumps(json.dumps(RESULTS))})\n"
    )
    out = tmp_path / "out"
    call = ["evaluate", "some/model", "--harness", "lmms-eval", "--task", "pope,mine", "--output", str(out)]
    assert cli.main([*call, "--max-rows", "4", "--adapter", "a/b"]) == 0
    words = json.loads((out / "m" / "call.json").read_text())
    assert words[words.index("--model_args") + 1] == "pretrained=some/model,adapter=a/b,device=auto"
    assert words[words.index("--tasks") + 1] == "pope,mine" and words[words.index("--limit") + 1] == "4"
    assert "0.8500" in capsys.readouterr().out


def test_a_failed_evaluation_is_one_line_and_not_a_success(
    stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.write_text("raise SystemExit('no memory')\n")
    call = ["evaluate", "some/model", "--harness", "lmms-eval", "--task", "x", "--output", str(tmp_path / "out")]
    assert cli.main(call) == 1
    assert "no memory" in capsys.readouterr().err


def test_our_model_answers_behind_its_interface(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = types.ModuleType("lmms_eval.api.model")
    api.lmms = type("lmms", (), {"__init__": lambda self: setattr(self, "task_dict", {})})  # type: ignore[attr-defined]
    for name in ("lmms_eval", "lmms_eval.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lmms_eval.api.model", api)
    monkeypatch.delitem(sys.modules, "vir_hf.using.lmms_eval_model", raising=False)
    from vir_hf.using.lmms_eval_model import VirHf

    model = VirHf(str(tiny_run), device="cpu", batch_size=2)
    pictures = [Image.new("RGB", (24, 24), colour) for colour in ("red", "green", "blue")]
    model.task_dict = {"t": {"test": pictures}}
    asked = [
        ("What is it?", {"max_new_tokens": 5}),
        ("What?", {"max_new_tokens": 3, "until": ["\n\n"]}),
        ("Who?", {"max_new_tokens": 5}),
    ]
    requests = [
        SimpleNamespace(args=(text, options, lambda doc: [doc], n, "t", "test"))
        for n, (text, options) in enumerate(asked)
    ]
    answerer = Answerer.load(str(tiny_run), device="cpu")
    wanted = [
        answerer.answer_batch([Question(text, [picture])], max_new_tokens=options["max_new_tokens"])[0]
        for (text, options), picture in zip(asked, pictures, strict=True)
    ]
    assert model.generate_until(requests) == wanted
    with pytest.raises(RunError, match="likelihoods"):
        model.loglikelihood([])
