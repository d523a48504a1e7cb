from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import NF4, UNQUANTIZED, load, logits_of, run
from transformers import LlavaForConditionalGeneration

from vir_hf.cli import main
from vir_hf.errors import RecipeError
from vir_hf.model.fingerprint import fingerprint_of
from vir_hf.model.for_use import load_run
from vir_hf.model.merging import merge_adapter, merge_run

LEARNS_FAST: dict[str, object] = {
    "training.max_steps": 4,
    "training.learning_rate": 2e-2,
    "training.projector_learning_rate": 2e-2,
}
INT8 = {"quantization": "int8", "quantization.only_on_cuda": "false"}
WHOLE = {"model.language_model": "null", "model.vision_tower": "null"}


@pytest.fixture(scope="module")
def runs(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished LoRA runs, by what their base was stored in."""
    root = tmp_path_factory.mktemp("runs")
    for name, changes in {"fp32": {}, "nf4": NF4, "int8": INT8}.items():
        run(tiny_parts, root / name, **LEARNS_FAST, **changes)
    return {name: root / name for name in ("fp32", "nf4", "int8")}


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("stored_as", ["fp32", "nf4", "int8"])
def test_a_merged_model_is_plain_and_has_the_runs_logits(
    stored_as: str, runs: dict[str, Path], tiny_parts: Path, tmp_path: Path
):
    source = runs[stored_as]
    merged = merge_run(source, tmp_path / "merged")
    assert merged.was_quantized == (stored_as != "fp32")
    unmerged, processor = load_run(source)
    expected = logits_of(unmerged, tiny_parts, processor)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert {type(module).__name__ for module in stock.modules()}.isdisjoint(
        {"Linear4bit", "Linear8bitLt", "ParamWrapper"}
    )
    assert getattr(stock.config, "quantization_config", None) is None
    found = logits_of(stock, tiny_parts, processor)
    base, _ = load_run(source / "base")
    learned = difference(expected, logits_of(base, tiny_parts, processor))
    # int8 arithmetic rounds the activations of the unmerged model; the merged one does not.
    assert difference(found, expected) < (0.05 * learned if stored_as == "int8" else 1e-5)
    assert learned > 0.05


def test_in_bf16_a_merge_is_within_bf16_rounding(tiny_parts: Path, tmp_path: Path):
    run(tiny_parts, tmp_path / "run", **LEARNS_FAST, **NF4, **{"model.dtype": "bfloat16"})
    merged = merge_run(tmp_path / "run", tmp_path / "merged")
    assert merged.dtype == "bfloat16"
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    unmerged, processor = load_run(tmp_path / "run", dtype=torch.bfloat16)
    plain, _ = load_run(tmp_path / "merged", dtype=torch.bfloat16)
    base, _ = load_run(tmp_path / "run" / "base", dtype=torch.bfloat16)
    expected = logits_of(unmerged, tiny_parts, processor).float()
    learned = difference(expected, logits_of(base, tiny_parts, processor).float())
    found = difference(logits_of(plain, tiny_parts, processor).float(), expected)
    # Eight roundings of the largest logit: how many there are depends on the order in which a CPU adds.
    assert found < 8 * 2**-8 * float(expected.abs().max()) < learned


def test_a_base_quantised_while_loading_is_rounded_the_same_way_again(tiny_parts: Path, tmp_path: Path):
    """Merged into the unrounded weights the logits would be another model's."""
    model, processor, _ = load(tiny_parts, tmp_path)
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    captured: list[torch.Tensor] = []

    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            captured.append(logits_of(model, tiny_parts, processor))

    changes = {**NF4, **WHOLE, **LEARNS_FAST, "model.name_or_path": tmp_path / "whole"}
    run(tiny_parts, tmp_path / "run", (Keep(),), **changes)
    merged = merge_run(tmp_path / "run", tmp_path / "merged")
    assert merged.was_quantized and merged.base == str(tmp_path / "whole")
    plain, _ = load_run(tmp_path / "merged")
    assert difference(logits_of(plain, tiny_parts, processor), captured[0]) < 1e-5
    unrounded, _ = load_run(tmp_path / "run")
    assert difference(logits_of(unrounded, tiny_parts, processor), captured[0]) > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"lora.use_dora": "true"},
        {"lora.use_rslora": "true", "lora.lora_alpha": 7},
        {"lora.init_lora_weights": "pissa"},
        {"lora.init_lora_weights": "olora"},
        {"trainable.vision_tower": "lora", "trainable.vision_from_layer": 1},
        {"trainable.vision_tower": "full"},
    ],
    ids=lambda changes: ",".join(f"{key.split('.')[1]}={value}" for key, value in changes.items()),
)
def test_every_kind_of_adapter_merges_exactly(changes: dict[str, object], tiny_parts: Path, tmp_path: Path):
    run(tiny_parts, tmp_path / "run", **{**LEARNS_FAST, **changes, "training.max_steps": 2})
    merge_run(tmp_path / "run", tmp_path / "merged")
    unmerged, processor = load_run(tmp_path / "run")
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    expected = logits_of(unmerged, tiny_parts, processor)
    assert difference(logits_of(stock, tiny_parts, processor), expected) < 2e-5


def test_merging_into_4_bit_weights_is_refused(runs: dict[str, Path]):
    model, _ = load_run(runs["nf4"])
    with pytest.raises(RecipeError, match="rounds the adapter away"):
        merge_adapter(model)


def test_another_base_is_refused(runs: dict[str, Path], tiny_parts: Path, tmp_path: Path):
    other, processor, _ = load(tiny_parts, tmp_path, **{"training.seed": 11})
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(RecipeError, match=r"base=.*other: the adapter .* was trained on other weights"):
        merge_run(runs["fp32"], tmp_path / "merged", base=str(tmp_path / "other"))
    assert not (tmp_path / "merged").exists()
    # Exchanged behind the run's back, at the same place.
    shutil.copytree(runs["fp32"], tmp_path / "run")
    other.save_pretrained(tmp_path / "run" / "base")
    with pytest.raises(RecipeError, match="was trained on other weights"):
        merge_run(tmp_path / "run", tmp_path / "merged")


def test_a_plain_model_and_a_taken_folder_are_refused(runs: dict[str, Path], tmp_path: Path):
    with pytest.raises(RecipeError, match="it is a plain checkpoint already"):
        merge_run(runs["fp32"] / "base", tmp_path / "merged")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(RecipeError, match="exists already"):
        merge_run(runs["fp32"], tmp_path / "taken")
    assert (tmp_path / "taken" / "file").read_text() == "mine"


def test_the_command_merges_and_reports(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["merge", str(runs["nf4"]), "--out", str(tmp_path / "merged"), "--json", str(tmp_path / "m.json")]) == 0
    assert "made 16 bit first" in capsys.readouterr().out
    report = json.loads((tmp_path / "m.json").read_text())
    assert report["fingerprint"] == fingerprint_of(str(tmp_path / "merged"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.json", "merged"]
    assert main(["merge", str(runs["nf4"]), "--out", str(tmp_path / "merged")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_checkpoint_of_a_run_merges_too(tiny_parts: Path, tmp_path: Path):
    changes = {"training.save_strategy": "steps", "training.save_steps": 2}
    run(tiny_parts, tmp_path / "run", **LEARNS_FAST, **changes)
    merge_run(tmp_path / "run" / "checkpoint-2", tmp_path / "two")
    merge_run(tmp_path / "run" / "checkpoint-4", tmp_path / "four")
    merge_run(tmp_path / "run", tmp_path / "last")
    assert fingerprint_of(str(tmp_path / "four")) == fingerprint_of(str(tmp_path / "last"))
    assert fingerprint_of(str(tmp_path / "two")) != fingerprint_of(str(tmp_path / "last"))


def test_the_fingerprint_follows_the_weights_not_the_files(tiny_parts: Path, tmp_path: Path):
    model, _, _ = load(tiny_parts, tmp_path, **UNQUANTIZED)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    expected = fingerprint_of(str(tmp_path / "one"))
    assert expected is not None and expected.startswith("sha256:")
    assert fingerprint_of(str(tmp_path / "shards")) == expected
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    assert fingerprint_of(str(tmp_path / "bf16")) == expected
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight.mul_(1.05)
    model.save_pretrained(tmp_path / "changed")
    assert fingerprint_of(str(tmp_path / "changed")) != expected
