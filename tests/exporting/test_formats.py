"""Each format is opened by a reader without this project and answers as the run does; a failed proof leaves nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_run import train_run
from transformers import AutoModelForImageTextToText, AutoProcessor

from vir_hf.cli import main
from vir_hf.errors import RecipeError
from vir_hf.exporting import formats, proof, serving, witness
from vir_hf.exporting.formats import export_run
from vir_hf.exporting.plain import Plain
from vir_hf.exporting.proof import Expected, compare
from vir_hf.exporting.request import Request
from vir_hf.model.for_use import load_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole run, an adapter, and a run with a projector of our own; two steps each, with answers that differ."""
    root = tmp_path_factory.mktemp("runs")
    tiny.save_language_model(root / "lm", initializer_range=0.3)
    tiny.save_vision_tower(root / "tower")
    tiny.save_data(root)
    quick = {"training.max_steps": 2}
    lora = {"lora": "default", "trainable.language_model": "lora"}
    return {
        "whole": train_run(root, root / "whole", **quick),
        "adapter": train_run(root, root / "adapter", **quick, **lora),
        "own": train_run(root, root / "own", **quick, **{"model.projector_type": "linear"}),
    }


@pytest.fixture
def witness_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The witness in this process: seconds of imports are saved, and what it does is the same."""
    monkeypatch.setattr(
        proof, "_run_witness", lambda job, reader: witness.main(json.loads(job.read_text(encoding="utf-8")))
    )


@pytest.mark.usefixtures("witness_here")
@pytest.mark.parametrize(
    ("run", "to"),
    [("whole", "transformers"), ("adapter", "transformers"), ("adapter", "vllm"), ("adapter", "adapter"), ("whole", "llava"),
     ("own", "llava")],
)  # fmt: skip
def test_a_format_answers_as_the_run_does(run: str, to: str, runs: dict[str, Path], tmp_path: Path) -> None:
    exported = export_run(Request(run=str(runs[run]), to=to), tmp_path / "out")
    (shown,) = exported.proofs
    assert shown.num_equal == shown.num_images == 3 and shown.difference < 1e-4
    assert (tmp_path / "out" / "config.json").is_file() and exported.files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert not any(path.name.startswith(".") for path in (tmp_path / "out").iterdir())


@pytest.mark.usefixtures("witness_here")
@pytest.mark.parametrize("quantization", ["f32", "f16", "q8_0", "q4_0"])
def test_gguf_answers_as_the_run_does(quantization: str, runs: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    exported = export_run(
        Request(run=str(runs["adapter"]), to="gguf", quantization=quantization, accepts_class_token=True),
        tmp_path / "out",
    )
    assert exported.proofs[0].difference < (0.02 if quantization == "f32" else 0.1)
    assert any("rounding to" in note for note in exported.notes) == (quantization in ("q8_0", "q4_0"))
    mmproj = "mmproj-f32.gguf" if quantization == "f32" else "mmproj-f16.gguf"
    assert exported.files == sorted(["Modelfile", mmproj, f"model-{quantization}.gguf"])


@pytest.mark.slow
def test_the_witness_is_a_process_of_its_own_without_this_project(runs: dict[str, Path], tmp_path: Path) -> None:
    source = Path(witness.__file__).read_text(encoding="utf-8")
    assert "vir_hf" not in source
    exported = export_run(Request(run=str(runs["whole"]), to="transformers"), tmp_path / "out")
    assert exported.proofs[0].num_equal == 3


def spoil(monkeypatch: pytest.MonkeyPatch, change: float) -> None:
    """Let the export write other weights than the run has."""
    write = formats.write_plain

    def spoilt(run: Any, folder: Path, **options: Any) -> None:
        write(run, folder, **options)
        state = load_file(folder / "model.safetensors")
        state["multi_modal_projector.linear_2.weight"] += change
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(formats, "write_plain", spoilt)


@pytest.mark.usefixtures("witness_here")
def test_a_failed_proof_says_where_and_leaves_nothing(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 0.05)
    with pytest.raises(
        RecipeError, match=r"otherwise than the run, built-in image 1 \(1 of 3\), opened by stock transformers"
    ):
        export_run(Request(run=str(runs["whole"]), to="transformers"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    export_run(Request(run=str(runs["whole"]), to="transformers", verify=False), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_export_that_does_not_open_leaves_nothing(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "WITNESS", tmp_path / "witness.py")
    (tmp_path / "witness.py").write_text("raise ValueError('no such model')", encoding="utf-8")
    with pytest.raises(RecipeError, match="does not open: stock transformers ended with: ValueError: no such model"):
        export_run(Request(run=str(runs["whole"]), to="transformers"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["witness.py"]


def test_a_disk_that_fills_leaves_nothing(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vir_hf.exporting.tensors.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export_run(Request(run=str(runs["whole"]), to="llava"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_written_over(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RecipeError, match="is not empty"):
        export_run(Request(run=str(runs["whole"]), to="transformers", verify=False), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("run", "to", "words"),
    [
        ("own", "transformers", "stock classes know one projector"),
        ("own", "vllm", "stock classes know one projector"),
        ("own", "gguf", "two layers with GELU"),
        ("whole", "adapter", "holds no adapter"),
        ("whole", "onnx", "unknown format"),
    ],
)
def test_what_a_format_cannot_express_is_refused_by_name(
    run: str, to: str, words: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    if to == "gguf":
        pytest.importorskip("gguf")
    with pytest.raises(RecipeError, match=words):
        export_run(Request(run=str(runs[run]), to=to), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_exported_adapter_opens_after_its_run_is_gone(runs: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["adapter"], tmp_path / "run"))
    export_run(Request(run=str(run), to="adapter", base=str(run / "base"), verify=False), tmp_path / "out")
    shutil.rmtree(run)
    ours, _ = load_run(tmp_path / "out", dtype="float32")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "base", dtype=torch.float32)
    stock = PeftModel.from_pretrained(stock, tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(images=[proof.built_in_images()[0]], text="USER: <image>\nWhat?", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, stock(**inputs).logits)
    by_name = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )  # by what its config names
    with torch.no_grad():
        assert torch.allclose(by_name(**inputs).logits, stock(**inputs).logits, atol=1e-5)


def test_what_vllm_takes_for_weights_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs["whole"], tmp_path / "run"))
    serving.check_for_vllm(Plain.read(folder))
    save_file({"linear_1.weight": torch.zeros(1)}, folder / "projector.safetensors")
    with pytest.raises(RecipeError, match=r"a second file of weights: projector\.safetensors"):
        serving.check_for_vllm(Plain.read(folder))


def expected(logits: torch.Tensor) -> Expected:
    answer = logits.argmax(-1).tolist()
    return Expected("float32", "cpu", ["p"], [], ["image"], [[1, 2]], [answer], ["yes"], [logits])


@pytest.mark.parametrize(
    ("found", "change", "words"),
    [
        ({"input_ids": [1, 2], "answer": "yes"}, 0.0, None),
        ({"input_ids": [], "answer": "yes"}, 1e-4, None),
        ({"input_ids": [1, 3], "answer": "yes"}, 0.0, "its prompt is other tokens"),
        ({"input_ids": [1, 2], "answer": "no"}, 0.0, "it answers 'no', the run 'yes'"),
        ({"input_ids": [1, 2], "answer": "yes"}, 1.0, "logits differ by"),
        ({"input_ids": [1, 2], "answer": "yes"}, float("nan"), "logits differ by inf"),
    ],
)
def test_a_comparison_sees_prompts_logits_and_answers(found: dict[str, Any], change: float, words: str | None) -> None:
    logits = torch.tensor([[0.0, 1.0, 5.0], [4.0, 0.0, 1.0]])
    theirs = logits.clone()
    theirs[1, 2] += change
    if words is None:
        assert compare(expected(logits), [found], [theirs], 1e-3, "a reader").num_equal == 1
        return
    with pytest.raises(RecipeError, match=words):
        compare(expected(logits), [found], [theirs], 1e-3, "a reader")


def test_answers_may_part_where_two_tokens_are_as_near_as_the_logits_may_be() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.001], [4.0, 0.0, 1.0]])
    near = compare(expected(logits), [{"answer": "no"}], [logits], 1e-2, "a reader")
    assert near.num_equal == 0


def test_the_command_says_what_was_proven(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        proof, "_run_witness", lambda job, reader: witness.main(json.loads(job.read_text(encoding="utf-8")))
    )
    image = tmp_path / "image.png"
    proof.built_in_images()[1].save(image)
    words = ["export", str(runs["whole"]), str(tmp_path / "out"), "--to", "transformers", "--images", str(image)]
    assert main([*words, "--json", str(tmp_path / "out.json")]) == 0
    assert "opened by stock transformers: 1 of 1 greedy answers are ours" in capsys.readouterr().out
    report = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert report["to"] == "transformers" and report["proofs"][0]["num_images"] == 1
    assert main([*words, "--no-verify"]) == 2 and "is not empty" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "in")]) == 0
    assert "tensors: " in capsys.readouterr().out
