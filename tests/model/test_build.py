from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_training import NF4, UNQUANTIZED, load, logits_of, recipe_for, run
from transformers import LlavaForConditionalGeneration, TrainerCallback

from vir_hf.budget import estimator, hardware
from vir_hf.errors import RecipeError
from vir_hf.llava.projectors import PROJECTORS
from vir_hf.model import for_training, precision
from vir_hf.model.adapters import base_of
from vir_hf.model.build import agree_on_tokens
from vir_hf.model.for_use import load_run
from vir_hf.model.precision import choose_precision, describe_precision
from vir_hf.model.projector_files import read_projector, save_projector, to_original
from vir_hf.model.quantization import bits_of, keep_layout
from vir_hf.recipe.load import load_recipe

WHOLE = {"model.language_model": "null", "model.vision_tower": "null"}
INT8 = {"quantization": "int8", "quantization.only_on_cuda": "false"}


@pytest.fixture(scope="module")
def whole(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision-language model saved as one folder."""
    folder = tmp_path_factory.mktemp("whole")
    model, processor, _ = load(tiny_parts, folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora_run(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run over joined parts with one checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    changes = {"training.max_steps": 4, "training.save_steps": 2, "training.save_strategy": "steps"}
    run(tiny_parts, folder, **changes, **{"training.learning_rate": 1e-2})
    return folder


def quantised_names(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if bits_of(module)}


def language_model_linears(model: Any) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if name.startswith("model.language_model.") and (isinstance(module, torch.nn.Linear) or bits_of(module))
    }


# --- precision


class FakeGpu:
    """Makes torch report a GPU of this name and compute capability."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: capability)


def test_precision_follows_the_machine(monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        FakeGpu(patch, "Tesla T4", (7, 5))
        on_t4 = choose_precision()
        assert (on_t4.dtype, on_t4.autocast) == (torch.float16, "fp16")
        assert on_t4.reason == "Tesla T4 has no bf16"
        assert choose_precision(use_cpu=True).dtype == torch.float32
    with monkeypatch.context() as patch:
        FakeGpu(patch, "A100", (8, 0))
        assert (choose_precision().dtype, choose_precision().autocast) == (torch.bfloat16, "bf16")
        assert choose_precision(bf16=False).dtype == torch.float32
        assert choose_precision("float32", bf16=True).autocast == "bf16"
        assert choose_precision(fp16=True).dtype == torch.float16


def test_precision_on_a_cpu_is_fp32_unless_asked_otherwise(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (choose_precision().dtype, choose_precision().autocast) == (torch.float32, None)
    assert choose_precision("bfloat16").autocast == "bf16"
    for arguments in ({"dtype": "float16"}, {"fp16": True}):
        with pytest.raises(RecipeError, match="needs a CUDA GPU"):
            choose_precision(**arguments)


def test_precision_and_attention_are_said_in_one_line(whole: Path):
    model, _ = load_run(whole)
    line = describe_precision(choose_precision("float32"), model, True)
    assert line == (
        "weights float32, no autocast (model.dtype=float32), trained weights float32, tf32 on, attention sdpa"
    )


def test_the_attention_asked_for_is_used(tiny_parts: Path, tmp_path: Path):
    model, _, _ = load(tiny_parts, tmp_path, **{"model.attn_implementation": "eager"})
    assert model.model.language_model.config._attn_implementation == "eager"


# --- quantised loading


@pytest.mark.parametrize("changes", [NF4, INT8], ids=["nf4", "int8"])
@pytest.mark.parametrize("route", ["parts", "whole"])
def test_only_the_language_models_linear_layers_are_quantised(
    changes: dict[str, object], route: str, whole: Path, tiny_parts: Path, tmp_path: Path
):
    names = {**WHOLE, "model.name_or_path": whole} if route == "whole" else {}
    model, _, recipe = load(tiny_parts, tmp_path, **changes, **names)
    assert quantised_names(model) == language_model_linears(model)
    assert {bits_of(module) for module in model.modules()} - {None} == {recipe.quantization.bits}


@pytest.mark.parametrize("changes", [NF4, INT8], ids=["nf4", "int8"])
def test_a_model_joined_from_quantised_parts_is_saved_and_loaded_by_stock_transformers(
    changes: dict[str, object], tiny_parts: Path, tmp_path: Path
):
    model, processor, _ = load(tiny_parts, tmp_path, **changes)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["model_type"] == "llava"
    assert "quantization_config" in config and "quantization_config" not in config["text_config"]
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    keep_layout(stock)
    assert quantised_names(stock) == language_model_linears(stock)
    torch.testing.assert_close(
        logits_of(stock, tiny_parts, processor), logits_of(model, tiny_parts, processor), rtol=0, atol=1e-5
    )


def test_short_names_that_transformers_ignores_stop_the_run(whole: Path, tiny_parts: Path, tmp_path: Path):
    changes = {**NF4, **WHOLE, "model.name_or_path": whole}
    short = {"quantization.llm_int8_skip_modules": "[vision_tower,multi_modal_projector,lm_head]"}
    with pytest.raises(RecipeError, match=r"are stored in 4 bit, but the recipe says 16 or 32 bit.*full names"):
        load(tiny_parts, tmp_path, **changes, **short)


def test_the_tower_is_quantised_when_asked_for(whole: Path, tiny_parts: Path, tmp_path: Path):
    skip = {"quantization.llm_int8_skip_modules": "[model.multi_modal_projector,lm_head]"}
    model, _, _ = load(tiny_parts, tmp_path, **NF4, **WHOLE, **skip, **{"model.name_or_path": whole})
    assert any(name.startswith("model.vision_tower.") for name in quantised_names(model))
    with pytest.raises(RecipeError, match="Of joined parts only the language model is quantised"):
        load(tiny_parts, tmp_path, **NF4, **skip)


def test_a_checkpoint_that_is_quantised_itself_is_not_taken_for_a_plain_one(tiny_parts: Path, tmp_path: Path):
    model, processor, _ = load(tiny_parts, tmp_path, **NF4)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    with pytest.raises(RecipeError, match="The checkpoint itself is quantised: set quantization=nf4"):
        load(tiny_parts, tmp_path, **WHOLE, **{"model.name_or_path": tmp_path / "saved"})


class Record(TrainerCallback):
    """Evaluates and generates every second step, if asked to."""

    def __init__(self, root: Path, evaluates: bool):
        self.root, self.evaluates = root, evaluates
        self.num_evaluations = 0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.evaluates and state.global_step % 2 == 0:
            logits_of(model, self.root, kwargs["processing_class"])
            inputs = kwargs["processing_class"].tokenizer("USER: What is it?", return_tensors="pt")
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
            model.train()
            self.num_evaluations += 1


def test_evaluation_and_sampling_between_steps_leave_4_bit_training_as_it_is(tiny_parts: Path, tmp_path: Path):
    losses = {}
    for evaluates in (False, True):
        record = Record(tiny_parts, evaluates)
        changes: dict[str, object] = {**NF4, "training.max_steps": 6, "training.learning_rate": 1e-2}
        if evaluates:
            changes |= {
                "data.eval_path": tiny_parts / "rows.json",
                "training.eval_strategy": "steps",
                "training.eval_steps": 2,
            }
        metrics = run(tiny_parts, tmp_path / f"run{evaluates}", (record,), **changes)
        losses[evaluates] = [entry["loss"] for entry in metrics["loss_history"]]
        assert record.num_evaluations == (3 if evaluates else 0)
    assert losses[True] == losses[False]
    assert losses[True][-1] < losses[True][0]


def test_no_4_bit_layer_may_be_repacked(tiny_parts: Path, tmp_path: Path):
    model, _, _ = load(tiny_parts, tmp_path, **NF4)
    layers = [module for module in model.modules() if bits_of(module) == 4]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)


# --- runs and bases


def test_any_folder_of_a_run_opens(lora_run: Path, tiny_parts: Path):
    run_model, processor = load_run(lora_run)
    last, _ = load_run(lora_run / "checkpoint-4")
    middle, _ = load_run(lora_run / "checkpoint-2")
    base, _ = load_run(lora_run / "base")
    logits = logits_of(run_model, tiny_parts, processor)
    assert not run_model.training
    assert torch.equal(logits, logits_of(last, tiny_parts, processor))
    assert not torch.equal(logits, logits_of(middle, tiny_parts, processor))
    assert not torch.equal(logits, logits_of(base, tiny_parts, processor))


def test_stock_peft_opens_a_run_on_its_saved_base(lora_run: Path, tiny_parts: Path):
    ours, processor = load_run(lora_run)
    stock = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(lora_run / "base"), lora_run)
    assert torch.equal(logits_of(stock, tiny_parts, processor), logits_of(ours, tiny_parts, processor))
    assert stock.peft_config["default"].base_model_name_or_path == str((lora_run / "base").resolve())


def test_a_run_that_was_moved_still_finds_its_base(lora_run: Path, tiny_parts: Path, tmp_path: Path):
    shutil.copytree(lora_run, tmp_path / "moved")
    assert base_of(tmp_path / "moved")[0] == str(tmp_path / "moved" / "base")
    moved, processor = load_run(tmp_path / "moved")
    ours, _ = load_run(lora_run)
    assert torch.equal(logits_of(moved, tiny_parts, processor), logits_of(ours, tiny_parts, processor))


def test_another_base_is_refused_by_its_fingerprint(lora_run: Path, whole: Path, tiny_parts: Path, tmp_path: Path):
    model, processor, _ = load(tiny_parts, tmp_path, **{"training.seed": 9})  # another projector
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(RecipeError, match="was trained on other weights"):
        load_run(lora_run, base=str(tmp_path / "other"))
    shutil.copytree(lora_run / "base", tmp_path / "same")
    load_run(lora_run, base=str(tmp_path / "same"))


def test_a_run_over_a_whole_model_names_it_and_saves_no_second_copy(whole: Path, tiny_parts: Path, tmp_path: Path):
    run(tiny_parts, tmp_path / "run", **WHOLE, **{"model.name_or_path": whole, "training.max_steps": 1})
    assert not (tmp_path / "run" / "base").exists()
    assert base_of(tmp_path / "run") == (str(whole), None)
    load_run(tmp_path / "run")


def test_joining_parts_gives_the_same_model_for_the_same_seed(tiny_parts: Path, tmp_path: Path):
    torch.manual_seed(1)
    first, processor, _ = load(tiny_parts, tmp_path)
    torch.manual_seed(2)
    second, _, _ = load(tiny_parts, tmp_path)
    other, _, _ = load(tiny_parts, tmp_path, **{"training.seed": 7})
    logits = logits_of(first, tiny_parts, processor)
    assert torch.equal(logits, logits_of(second, tiny_parts, processor))
    assert not torch.equal(logits, logits_of(other, tiny_parts, processor))


def test_a_resumed_run_takes_its_own_base_and_nobody_elses(lora_run: Path, tiny_parts: Path):
    own, _, _ = load(tiny_parts, lora_run, **{"training.resume": "auto"})
    assert own.name_or_path == str(lora_run / "base")
    changed, _, _ = load(tiny_parts, lora_run, **{"training.resume": "auto", "training.seed": 3})
    assert changed.name_or_path != str(lora_run / "base")


def test_what_is_no_model_says_so(tmp_path: Path, tiny_parts: Path):
    with pytest.raises(RecipeError, match="path=nobody/nothing: its config.json could not be read"):
        load_run("nobody/nothing")
    with pytest.raises(RecipeError, match="its config.json could not be read"):
        load_run(tmp_path)
    with pytest.raises(RecipeError, match=r"model.adapter=.*holds no adapter"):
        load(tiny_parts, tmp_path, **{"model.adapter": tiny_parts / "lm"})


def test_a_language_model_without_a_tokenizer_is_refused(tiny_parts: Path, tmp_path: Path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_parts / "lm" / name, bare)
    with pytest.raises(RecipeError, match="model.tokenizer: no tokenizer could be loaded"):
        load(tiny_parts, tmp_path, **{"model.language_model": bare})


def test_a_whole_model_without_a_tokenizer_is_refused(whole: Path, tiny_parts: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    names: dict[str, object] = {**WHOLE, "model.name_or_path": tmp_path / "bare"}
    with pytest.raises(RecipeError, match=r"model.name_or_path=.*bare: no tokenizer and image processor"):
        load(tiny_parts, tmp_path, **names)
    names |= {"model.name_or_path": whole, "model.tokenizer": tiny_parts / "lm"}
    with pytest.raises(RecipeError, match="model.tokenizer: is set, but a whole model"):
        load(tiny_parts, tmp_path, **names)


# --- stages


@pytest.fixture(scope="module")
def pretrained(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrain run: the projector alone."""
    folder = tmp_path_factory.mktemp("pretrain") / "run"
    changes = {"experiment": "local_lite_pretrain", "model.template": "plain", "training.max_steps": 3}
    run(tiny_parts, folder, **changes)
    return folder


def test_pretraining_leaves_a_projector_and_the_rest_as_it_was(pretrained: Path, tiny_parts: Path, tmp_path: Path):
    state = load_file(pretrained / "projector" / "projector.safetensors")
    assert set(state) == {f"linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
    trained, _ = load_run(pretrained)
    fresh, _, _ = load(tiny_parts, tmp_path, **{"experiment": "local_lite_pretrain", "model.template": "plain"})
    changed = {
        name
        for (name, new), (_, old) in zip(trained.named_parameters(), fresh.named_parameters(), strict=True)
        if not torch.equal(new, old)
    }
    assert changed == {name for name, _ in fresh.named_parameters() if "multi_modal_projector" in name}
    for name, value in state.items():
        assert torch.equal(trained.model.multi_modal_projector.get_parameter(name), value)


@pytest.mark.parametrize("origin", ["file", "run", "original", "original_plain", "adapter", "checkpoint"])
def test_finetuning_picks_up_a_projector_of_any_origin(
    origin: str, pretrained: Path, lora_run: Path, tiny_parts: Path, tmp_path: Path
):
    state = load_file(pretrained / "projector" / "projector.safetensors")
    source = pretrained
    if origin == "file":
        source = pretrained / "projector" / "projector.safetensors"
    elif origin.startswith("original"):
        original = to_original(state)
        assert set(original) == {f"model.mm_projector.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")}
        if origin == "original_plain":
            original = {name.removeprefix("model.mm_projector."): value for name, value in original.items()}
        source = tmp_path / "mm_projector.bin"
        torch.save(original, source)
    elif origin == "adapter":
        source = lora_run / "adapter_model.safetensors"
        state = load_file(lora_run / "projector" / "projector.safetensors")
    elif origin == "checkpoint":
        source = pretrained / "model.safetensors"
    model, _, _ = load(tiny_parts, tmp_path, **{"model.pretrained_projector": source})
    for name, value in state.items():
        assert torch.equal(model.model.multi_modal_projector.get_parameter(name), value)


def test_the_stages_follow_on_from_one_another(pretrained: Path, tiny_parts: Path, tmp_path: Path):
    changes = {"training.max_steps": 1, "training.learning_rate": 0.0, "training.projector_learning_rate": 0.0}
    run(tiny_parts, tmp_path / "run", **changes, **{"model.pretrained_projector": pretrained})
    expected, _ = read_projector(pretrained)
    for place in (tmp_path / "run", tmp_path / "run" / "base"):
        found, _ = read_projector(place)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_projector_of_other_width_is_refused(tiny_parts: Path, tmp_path: Path):
    state = {"linear_1.weight": torch.zeros(48, 32), "linear_1.bias": torch.zeros(48)}
    state |= {"linear_2.weight": torch.zeros(48, 48), "linear_2.bias": torch.zeros(48)}
    save_file(state, tmp_path / "wide.safetensors")
    message = r"model.pretrained_projector=.*linear_1.weight \(48, 32\), expected \(32, 32\)"
    with pytest.raises(RecipeError, match=message):
        load(tiny_parts, tmp_path, **{"model.pretrained_projector": tmp_path / "wide.safetensors"})


def test_a_projector_of_other_depth_is_refused(tiny_parts: Path, tmp_path: Path):
    deep, _, _ = load(tiny_parts, tmp_path, **{"model.projector_type": "mlp3x_gelu"})
    save_projector(deep, tmp_path)
    with pytest.raises(RecipeError, match=r"unknown linear_3.bias, linear_3.weight. It takes linear_1.bias"):
        load(tiny_parts, tmp_path / "x", **{"model.pretrained_projector": tmp_path})


def test_a_pickle_that_is_more_than_tensors_is_not_opened(tiny_parts: Path, tmp_path: Path):
    torch.save({"hook": Path.home}, tmp_path / "mm_projector.bin")
    with pytest.raises(RecipeError, match="not a plain file of tensors"):
        load(tiny_parts, tmp_path, **{"model.pretrained_projector": tmp_path / "mm_projector.bin"})


@pytest.mark.parametrize("content", ["nothing", "empty folder", "other weights", "torn"])
def test_a_file_without_a_projector_says_so(content: str, tiny_parts: Path, tmp_path: Path):
    source = tmp_path / "source"
    expected = "there is no such file or folder"
    if content == "empty folder":
        source.mkdir()
        expected = "the folder holds none of projector/projector.safetensors"
    elif content == "other weights":
        source = tmp_path / "x.safetensors"
        save_file({"model.layers.0.weight": torch.zeros(2)}, source)
        expected = "holds no projector"
    elif content == "torn":
        source = tmp_path / "x.safetensors"
        source.write_bytes(b"\x08\x00\x00\x00")
        expected = "cannot be read as a weights file"
    with pytest.raises(RecipeError, match=expected):
        load(tiny_parts, tmp_path / "out", **{"model.pretrained_projector": source})


@pytest.mark.parametrize("quantization", [NF4, INT8], ids=["nf4", "int8"])
def test_pretraining_beside_quantised_weights_saves_and_resumes(
    quantization: dict[str, object], tiny_parts: Path, tmp_path: Path
):
    """No adapter there: the checkpoint is the whole quantised model with its projector."""
    changes: dict[str, object] = {
        "experiment": "local_lite_pretrain",
        "model.template": "plain",
        **quantization,
        "training.save_strategy": "steps",
        "training.save_steps": 2,
        "training.learning_rate": 1e-2,
        "training.max_steps": 4,
    }
    straight = run(tiny_parts, tmp_path / "run", **changes)
    assert straight["final_loss"] < straight["first_loss"]
    model, _ = load_run(tmp_path / "run")
    assert quantised_names(model) == language_model_linears(model)
    expected = load_file(tmp_path / "run" / "projector" / "projector.safetensors")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / "metrics.json").unlink()
    run(tiny_parts, tmp_path / "run", **changes, **{"training.resume": "auto"})
    found = load_file(tmp_path / "run" / "projector" / "projector.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_training_beside_4_bit_weights_resumes_to_the_same_bits(tiny_parts: Path, tmp_path: Path):
    changes: dict[str, object] = {
        **NF4,
        "training.save_strategy": "steps",
        "training.save_steps": 2,
        "training.learning_rate": 1e-2,
        "training.max_steps": 4,
    }
    run(tiny_parts, tmp_path / "straight", **changes)
    shutil.copytree(tmp_path / "straight", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    for name in ("metrics.json", "adapter_model.safetensors"):
        (tmp_path / "again" / name).unlink()
    recipe = recipe_for(tiny_parts, tmp_path / "again", **changes, **{"training.resume": "auto"})
    from vir_hf.training.run import train

    train(recipe)
    expected = load_file(tmp_path / "straight" / "adapter_model.safetensors")
    found = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("quantization", [UNQUANTIZED, NF4], ids=["none", "nf4"])
def test_a_whole_model_is_saved_in_the_dtype_it_was_loaded_in(
    quantization: dict[str, object], tiny_parts: Path, tmp_path: Path
):
    """Trained in fp32, stored as bf16; the projector file keeps every bit for the next stage."""
    changes = {"experiment": "local_lite_pretrain", "model.template": "plain", "model.dtype": "bfloat16"}
    run(tiny_parts, tmp_path / "run", **changes, **quantization, **{"training.max_steps": 2})
    stored = {
        value.dtype for value in load_file(tmp_path / "run" / "model.safetensors").values() if value.is_floating_point()
    }
    assert stored - {torch.float32} == {torch.bfloat16}
    assert (torch.float32 in stored) == (quantization is NF4)  # the scales of 4-bit weights
    exact = load_file(tmp_path / "run" / "projector" / "projector.safetensors")
    assert any((value != value.to(torch.bfloat16).float()).any() for value in exact.values())
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "run", dtype=torch.bfloat16)
    keep_layout(stock)
    ours, processor = load_run(tmp_path / "run", dtype=torch.bfloat16)
    assert torch.equal(logits_of(stock, tiny_parts, processor), logits_of(ours, tiny_parts, processor))


def test_a_projector_file_of_other_keys_says_what_was_found(tiny_parts: Path, tmp_path: Path):
    save_file({"proj.weight": torch.zeros(32, 32), "norm.bias": torch.zeros(32)}, tmp_path / "other.safetensors")
    message = (
        r"other.safetensors holds no projector, only (norm.bias, proj.weight|proj.weight, norm.bias)\. Expected keys"
    )
    with pytest.raises(RecipeError, match=message):
        load(tiny_parts, tmp_path / "x", **{"model.pretrained_projector": tmp_path / "other.safetensors"})
    save_file({"proj.weight": torch.zeros(32, 32)}, tmp_path / "projector.safetensors")
    message = r"missing linear_1.bias, linear_1.weight, linear_2.bias, linear_2.weight; unknown proj.weight"
    with pytest.raises(RecipeError, match=message):
        load(tiny_parts, tmp_path / "x", **{"model.pretrained_projector": tmp_path / "projector.safetensors"})


def test_a_projector_of_ones_own_needs_no_layer_of_a_certain_name(
    tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Own(torch.nn.Sequential):
        def __init__(self, config: Any):
            super().__init__(torch.nn.LayerNorm(32), torch.nn.Linear(32, config.text_config.hidden_size))

    monkeypatch.setitem(PROJECTORS, "linear", Own)
    metrics = run(tiny_parts, tmp_path / "run", **{"model.projector_type": "linear", "training.max_steps": 1})
    assert metrics["num_steps"] == 1
    state = load_file(tmp_path / "run" / "projector" / "projector.safetensors")
    assert set(state) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    for source in (tmp_path / "run", tmp_path / "run" / "adapter_model.safetensors"):
        model, _, _ = load(
            tiny_parts, tmp_path / "x", **{"model.projector_type": "linear", "model.pretrained_projector": source}
        )
        for name, value in state.items():
            assert torch.equal(model.model.multi_modal_projector.get_parameter(name), value)
    opened, processor = load_run(tmp_path / "run")
    assert logits_of(opened, tiny_parts, processor).isfinite().all()
    with pytest.raises(RecipeError, match=r"linear layers alone \(linear_1.weight ...\), found 0.bias"):
        to_original(state)


DTYPES = st.sampled_from(["auto", "bfloat16", "float16", "float32"])
FLAGS = st.sampled_from([None, True, False])


@given(dtype=DTYPES, bf16=FLAGS, fp16=FLAGS, use_cpu=st.booleans(), device=st.sampled_from(["cpu", "t4", "l4"]))
def test_all_that_choose_a_precision_choose_the_same(
    dtype: str, bf16: bool | None, fp16: bool | None, use_cpu: bool, device: str
):
    """Training, the feature cache, the planner and a finished run, on every kind of device."""
    said = {} if bf16 is None else {"bf16": bf16}
    said |= {} if fp16 is None else {"fp16": fp16}
    recipe = SimpleNamespace(
        model=SimpleNamespace(dtype=dtype), training=SimpleNamespace(use_cpu=use_cpu, arguments=said)
    )
    capability = {"t4": (7, 5), "l4": (8, 9)}.get(device)
    with pytest.MonkeyPatch.context() as patched, tempfile.TemporaryDirectory() as folder:
        patched.setattr(torch.cuda, "is_available", lambda: capability is not None)
        patched.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        patched.setattr(torch.cuda, "get_device_name", lambda *_: device)
        try:
            chosen = precision.precision_of(recipe)
        except RecipeError as error:
            assert "needs a CUDA GPU" in str(error) and (use_cpu or device == "cpu")
            chosen = None
        seen_device = hardware.GPUS[device] if capability and not use_cpu else hardware.Device("cpu", "cpu", 0, 0)
        try:
            planned = estimator._precision(recipe, seen_device)
        except RecipeError:
            planned = None
        assert planned == (None if chosen is None else (chosen.dtype, chosen.autocast is not None))
        text = f"model: {{dtype: {dtype}}}\ntraining: {json.dumps(said)}\n"
        (Path(folder) / "recipe.yaml").write_text(text, encoding="utf-8")
        served = precision.precision_of_run(folder, use_cpu)
        assert served.dtype == (torch.float32 if chosen is None else chosen.dtype)


@pytest.mark.parametrize("flag", ["bf16", "fp16"])
def test_every_command_passes_the_recipes_precision_on(
    flag: str, tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What training loads its model in, `data cache-features` loads it in too."""
    from vir_hf.commands import cache_features
    from vir_hf.training import run as training

    class Seen(Exception):
        pass

    def stop(recipe: Any, precision: Any, *_: Any) -> None:
        raise Seen(precision)

    monkeypatch.setattr(precision, "precision_on", lambda *_, **__: precision.Precision(torch.float16, None, flag))
    monkeypatch.setattr(for_training, "load_model_and_processor", stop)
    monkeypatch.setattr(training, "load_model_and_processor", stop)
    overrides = tiny.training_overrides(tiny_parts, tmp_path, **{f"training.{flag}": "true"})
    with pytest.raises(Seen) as cached:
        cache_features.main(overrides)
    with pytest.raises(Seen) as trained:
        training.train(load_recipe(overrides))
    assert cached.value.args == trained.value.args


def test_a_processor_that_counts_an_images_tokens_otherwise_is_refused(tiny_parts: Path, tmp_path: Path):
    model, processor, _ = load(tiny_parts, tmp_path)
    processor.num_additional_image_tokens = 0
    with pytest.raises(RecipeError, match="its processor makes 3 tokens of an image, but the tower gives 4 features"):
        agree_on_tokens(model, processor)
