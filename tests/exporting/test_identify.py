"""The doctor says what a checkpoint is, who opens it, and which export makes the others do so; its claims are tried."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file, save_file
from tiny_run import train_run
from transformers import AutoModelForImageTextToText

from vir_hf.cli import main
from vir_hf.errors import RecipeError
from vir_hf.exporting.formats import export_run
from vir_hf.exporting.identify import TOOLS, identify, projector_fingerprint
from vir_hf.exporting.request import Request
from vir_hf.model.build import build


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A native model, one with a projector of our own, an adapter, and the original's layout."""
    root = tmp_path_factory.mktemp("checkpoints")
    tiny.training_overrides(root, root / "out")
    for name, projector in (("native", "mlp2x_gelu"), ("own", "linear")):
        model, processor = build(str(root / "lm"), str(root / "tower"), "vicuna_v1", projector_type=projector)
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    lora = {"lora": "default", "trainable.language_model": "lora", "training.max_steps": 1}
    adapter = train_run(root, root / "adapter", **lora)
    export_run(Request(run=str(root / "native"), to="llava", verify=False), root / "original")
    return {"native": root / "native", "own": root / "own", "adapter": adapter, "original": root / "original"}


@pytest.mark.parametrize(
    ("name", "what", "opens"),
    [
        ("native", "a whole model in llava-hf's layout", {"transformers 5", "transformers 4.57", "vLLM"}),
        ("own", "a projector of our own, linear", {"transformers 5"}),
        ("adapter", "an adapter over", {"transformers 5", "transformers 4.57", "PEFT"}),
        ("original", "the original LLaVA's layout", {"original LLaVA"}),
    ],
)
def test_it_says_what_a_checkpoint_is_and_who_opens_it(
    name: str, what: str, opens: set[str], checkpoints: dict[str, Path]
) -> None:
    findings = identify(str(checkpoints[name]))
    assert what in findings.what
    assert {opening.tool for opening in findings.openings if opening.opens} == opens
    assert {opening.tool for opening in findings.openings} == set(TOOLS)


def test_the_export_it_names_makes_the_tool_open_it(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    findings = identify(str(checkpoints["adapter"]))
    how = {opening.tool: opening.how for opening in findings.openings}
    assert how["vLLM"] == f"vir-hf export {checkpoints['adapter']} --to vllm OUT"
    words = how["vLLM"].replace("OUT", str(tmp_path / "out")).split()[1:]
    assert main([*words, "--no-verify"]) == 0
    assert next(o for o in identify(str(tmp_path / "out")).openings if o.tool == "vLLM").opens
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out")


def test_a_reason_stands_where_no_export_helps(checkpoints: dict[str, Path]) -> None:
    how = {opening.tool: opening.how for opening in identify(str(checkpoints["own"])).openings}
    assert how["llama.cpp, ollama"].startswith("no: ") and "two layers" in how["llama.cpp, ollama"]
    assert how["original LLaVA"] == f"vir-hf export {checkpoints['own']} --to llava OUT"  # it knows linear projectors


def test_equal_projectors_have_one_fingerprint_and_others_another(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    native = checkpoints["native"]
    export_run(Request(run=str(native), to="transformers", verify=False), tmp_path / "same")
    assert projector_fingerprint(native) == projector_fingerprint(tmp_path / "same")
    other = Path(shutil.copytree(native, tmp_path / "other"))
    state = load_file(other / "model.safetensors")
    state["multi_modal_projector.linear_1.bias"] += 1e-3
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    assert projector_fingerprint(native) != projector_fingerprint(other)
    adapter = identify(str(checkpoints["adapter"])).fingerprints
    assert adapter["base, as the adapter remembers it"] == adapter["base, as it lies there now"]


def test_the_command_prints_one_block_to_paste(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(checkpoints["native"]), "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    block = printed[printed.index("```") :]
    assert block.count("```") == 2 and "transformers: " in block and "vir_hf: " in block and str(tmp_path) not in block
    report = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert report["fingerprints"]["weights"].startswith("sha256:") and len(report["openings"]) == len(TOOLS)


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no vision-language model that is known here"):
        identify(str(tmp_path))
    with pytest.raises(RecipeError, match="is no folder"):
        identify("someone/some-model")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert [opening.tool for opening in identify(str(tmp_path)).openings if opening.opens] == ["llama.cpp, ollama"]
