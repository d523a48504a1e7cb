"""Checkpoints of other projects: every tensor accounted for, bit-equal round trips, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from vir_hf.errors import RecipeError
from vir_hf.exporting.formats import export_run
from vir_hf.exporting.importing import import_checkpoint
from vir_hf.exporting.request import Request
from vir_hf.exporting.tensors import stored_tensors
from vir_hf.model.build import build
from vir_hf.model.for_use import load_run


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of an embedding that has room for the image token, and a tower."""
    root = tmp_path_factory.mktemp("parts")
    tiny.save_language_model(root / "lm", rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    tiny.save_vision_tower(root / "tower")
    return root


@pytest.fixture(scope="module")
def native(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model saved by stock transformers."""
    folder = tmp_path_factory.mktemp("native")
    model, processor = build(str(parts / "lm"), str(parts / "tower"), "vicuna_v1")
    model.save_pretrained(folder / "ours")
    LlavaForConditionalGeneration.from_pretrained(folder / "ours").save_pretrained(folder / "native")
    processor.save_pretrained(folder / "native")
    return folder / "native"


@pytest.fixture(scope="module")
def original(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in the original LLaVA's layout."""
    out = tmp_path_factory.mktemp("original") / "out"
    export_run(Request(run=str(native), to="llava", verify=False), out)
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


def changed(source: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a folder with another config.json."""
    shutil.copytree(source, out)
    fields = json.loads((out / "config.json").read_text(encoding="utf-8"))
    change(fields)
    (out / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return out


def test_native_ours_original_ours_native_is_bit_equal(native: Path, original: Path, tmp_path: Path) -> None:
    imported = import_checkpoint(original, tmp_path / "ours")
    assert imported.layout == "llava" and imported.counts() == {"taken": 21, "renamed": 4}
    assert imported.from_elsewhere == {"vision_tower": str(original / "vision_tower")}
    export_run(Request(run=str(tmp_path / "ours"), to="transformers", verify=False), tmp_path / "again")
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "native")
    assert_equal(tensors(native), tensors(tmp_path / "native"))
    _, before = load_run(native)
    _, after = load_run(tmp_path / "ours")
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert before.apply_chat_template(turns) == after.apply_chat_template(turns)
    assert before.tokenizer.get_vocab() == after.tokenizer.get_vocab()
    assert before.image_processor.to_dict() == after.image_processor.to_dict()


def test_the_original_layout_has_the_original_names(original: Path) -> None:
    fields = json.loads((original / "config.json").read_text(encoding="utf-8"))
    assert fields["model_type"] == "llava_llama" and fields["architectures"] == ["LlavaLlamaForCausalLM"]
    assert fields["mm_projector_type"] == "mlp2x_gelu" and fields["mm_vision_select_layer"] == -2
    assert fields["mm_vision_select_feature"] == "patch" and fields["image_aspect_ratio"] == "pad"
    assert fields["rope_theta"] == 1e6 and fields["mm_vision_tower"] == str(original.resolve() / "vision_tower")
    names = set(tensors(original))
    assert {
        "model.mm_projector.0.weight",
        "model.mm_projector.2.bias",
        "model.embed_tokens.weight",
        "lm_head.weight",
    } <= names
    assert not any("vision_tower" in name for name in names)
    assert "vision_model.embeddings.class_embedding" in tensors(original / "vision_tower")


def test_a_lora_of_the_original_is_merged_as_peft_merges_it(parts: Path, original: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(parts / "lm")
    torch.manual_seed(3)
    lora = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    folder = tmp_path / "lora"
    lora.save_pretrained(folder)
    shutil.copy(original / "config.json", folder / "config.json")
    weights = tensors(original)
    projector = {f"base_model.model.{name}": value for name, value in weights.items() if "mm_projector" in name}
    torch.save(projector, folder / "non_lora_trainables.bin")
    imported = import_checkpoint(
        folder,
        tmp_path / "out",
        base=str(parts / "lm"),
        vision_tower=str(original / "vision_tower"),
        template="vicuna_v1",
    )
    assert imported.counts() == {"renamed": 4, "merged": 8}
    merged = lora.merge_and_unload().state_dict()
    found = stored_tensors(tmp_path / "out")
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        assert torch.equal(found[f"language_model.{name}"], merged[name])
    linear = found["multi_modal_projector.linear_2.weight"]
    assert torch.equal(linear, weights["model.mm_projector.2.weight"])


def test_a_projector_alone_is_joined_with_the_parts_it_was_trained_with(
    parts: Path, original: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "projector"
    folder.mkdir()
    state = {name: value for name, value in tensors(original).items() if "mm_projector" in name}
    torch.save(state, folder / "mm_projector.bin")
    with pytest.raises(RecipeError, match="--base"):
        import_checkpoint(folder, tmp_path / "out")
    import_checkpoint(folder, tmp_path / "out", base=str(parts / "lm"), vision_tower=str(parts / "tower"))
    found = stored_tensors(tmp_path / "out")
    assert torch.equal(found["multi_modal_projector.linear_1.bias"], state["model.mm_projector.0.bias"])


def test_tinyllava_and_xtuner_layouts(parts: Path, native: Path, tmp_path: Path) -> None:
    stored = tensors(native)
    names = {
        "language_model.": "language_model.",
        "vision_tower.": "vision_tower._vision_tower.",
        "multi_modal_projector.linear_1.": "connector._connector.0.",
        "multi_modal_projector.linear_2.": "connector._connector.2.",
    }
    renamed = {
        new + name.removeprefix(old): value
        for name, value in stored.items()
        for old, new in names.items()
        if name.startswith(old)
    }
    fields = json.loads((native / "config.json").read_text(encoding="utf-8"))
    folder = tmp_path / "tinyllava"
    folder.mkdir()
    save_file(renamed, folder / "model.safetensors")
    words = {
        "model_type": "tinyllava",
        "connector_type": "mlp2x_gelu",
        "llm_model_name_or_path": "somewhere/else",
        "vision_model_name_or_path": str(parts / "tower"),
        "text_config": fields["text_config"],
        "vision_config": fields["vision_config"],
        "image_aspect_ratio": "pad",
    }
    (folder / "config.json").write_text(json.dumps(words), encoding="utf-8")
    for path in native.glob("tokenizer*"):
        shutil.copy(path, folder)
    imported = import_checkpoint(folder, tmp_path / "of_tinyllava", template="vicuna_v1")
    assert imported.layout == "tinyllava" and imported.counts()["renamed"] == len(stored)
    assert_equal(stored, tensors(tmp_path / "of_tinyllava"))

    xtuner = tmp_path / "xtuner" / "projector"
    xtuner.mkdir(parents=True)
    (xtuner / "config.json").write_text('{"model_type": "projector", "depth": 2}', encoding="utf-8")
    projector = {f"model.{2 * number}.{kind}": stored[f"multi_modal_projector.linear_{number + 1}.{kind}"]
                 for number in (0, 1) for kind in ("weight", "bias")}  # fmt: skip
    save_file(projector, xtuner / "model.safetensors")
    import_checkpoint(xtuner.parent, tmp_path / "of_xtuner", base=str(parts / "lm"), vision_tower=str(parts / "tower"))
    found = stored_tensors(tmp_path / "of_xtuner")
    assert torch.equal(found["multi_modal_projector.linear_2.weight"], projector["model.2.weight"])


def test_a_model_of_transformers_4_is_taken_as_it_is(native: Path, tmp_path: Path) -> None:
    def old(fields: dict[str, Any]) -> None:
        fields["text_config"].pop("rope_parameters", None)
        fields["text_config"]["rope_theta"] = 1e6
        fields["transformers_version"] = "4.37.0"

    imported = import_checkpoint(changed(native, tmp_path / "old", old), tmp_path / "out")
    assert imported.layout == "llava-hf" and imported.counts() == {"taken": len(tensors(native))}
    assert_equal(tensors(native), tensors(tmp_path / "out"))


def test_the_report_names_every_tensor(original: Path, tmp_path: Path) -> None:
    import_checkpoint(original, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "import.json").read_text(encoding="utf-8"))
    assert {move["source"] for move in report["moves"]} == set(tensors(original))
    move = next(move for move in report["moves"] if move["source"] == "model.mm_projector.0.weight")
    assert move == {"source": move["source"], "part": "multi_modal_projector", "target": "0.weight", "what": "renamed"}


def test_an_unknown_tensor_is_an_error_unless_it_is_dropped_by_name(original: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "more"))
    save_file({**tensors(original), "model.image_newline": torch.zeros(32)}, folder / "model.safetensors")
    with pytest.raises(RecipeError, match=r"model\.image_newline has no place .* tiles"):
        import_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    imported = import_checkpoint(folder, tmp_path / "out", drop=["model.image_newline"])
    assert imported.counts()["dropped"] == 1


class Code:
    def __reduce__(self) -> Any:
        return print, ("run",)


def spoil_shard(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def spoil_missing_layer(folder: Path) -> None:
    save_file({k: v for k, v in tensors(folder).items() if "layers.1." not in k}, folder / "model.safetensors")


def spoil_projector(folder: Path) -> None:
    save_file({k: v for k, v in tensors(folder).items() if "mm_projector" not in k}, folder / "model.safetensors")


def spoil_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Code()}))


def spoil_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def spoil_vocabulary(folder: Path) -> None:
    state = tensors(folder)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:100].clone()
    save_file(state, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**fields, "vocab_size": 100}), encoding="utf-8")


def spoil_version(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**fields, "model_type": "llava_of_2031"}), encoding="utf-8")


def spoil_tiles(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**fields, "image_aspect_ratio": "anyres"}), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_shard, "is damaged"),
        (spoil_missing_layer, "missing"),
        (spoil_projector, "no projector"),
        (spoil_pickle, "a pickle can run code"),
        (spoil_index, "which is not there"),
        (spoil_vocabulary, "do not belong together"),
        (spoil_version, "llava_of_2031"),
        (spoil_tiles, "anyres"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(
    spoil: Callable[[Path], None], words: str, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "bad"))
    spoil(folder)
    with pytest.raises(RecipeError, match=words):
        import_checkpoint(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"] and "run" not in capsys.readouterr().out


def test_a_recipe_that_names_such_a_folder_is_told_which_import_opens_it(
    original: Path, native: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=f"vir-hf import {original} OUT"):
        load_run(original)
    config = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="is no checkpoint that is known here"):
        import_checkpoint(tmp_path, tmp_path / "out")
