"""Every causal language model of transformers: it trains, is saved and served as one model, or is refused in one line."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import language_model_families as families
import pytest
import tiny
import torch
import transformers
from tiny_training import recipe_for, run
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import vir_hf
from vir_hf.cli import main
from vir_hf.errors import RecipeError
from vir_hf.model.language_models import fit_to_language_model, judge_language_model

# The kinds of what decides: a factor, tied and not; experts; a state; an attention without segments; scaled embeddings; names.
TRAINED = (
    "llama",
    "granite",
    "cohere",
    "hyperclovax",
    "mixtral",
    "qwen2_moe",
    "lfm2",
    "stablelm",
    "gemma3_text",
    "gpt_neox",
)
JUDGED = (
    *TRAINED, "axk1", "bert", "bloom", "falcon", "falcon_h1", "gemma2", "gemma3", "gpt2", "gpt_oss", "granitemoehybrid", "laguna",
    "minicpm3", "mpt", "nemotron", "opt", "phi", "qwen3_next", "t5gemma" if "t5gemma" in families.FAMILIES else "bart",
)  # fmt: skip

IN_TOKENS = {"training.max_tokens_per_batch": 512, "training.per_device_train_batch_size": "null"}


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    """What the documentation says of each family."""
    return families.read_table(families.DOCUMENT.read_text(encoding="utf-8"))[1]


def made_with_this_version() -> bool:
    return families.read_table(families.DOCUMENT.read_text(encoding="utf-8"))[0] == transformers.__version__


def test_the_table_names_every_family_of_the_mapping(written: dict[str, str]) -> None:
    if made_with_this_version():
        assert sorted(written) == families.FAMILIES
    else:  # another release has other families; those that both have must still be there
        assert len(set(written) & set(families.FAMILIES)) > 100
    assert all(said.split(":")[0] in ("packed", "padded", "refused") for said in written.values())


@pytest.mark.parametrize("name", JUDGED)
def test_the_table_says_what_is_judged(name: str, written: dict[str, str]) -> None:
    if made_with_this_version():
        assert families.verdict(name) == written[name]
    else:
        assert families.verdict(name).split(":")[0] == written[name].split(":")[0]


@pytest.mark.parametrize("name", TRAINED)
def test_it_trains_and_is_served_as_one_model(name: str, tiny_parts: Path, tmp_path: Path) -> None:
    check_family(name, tiny_parts, tmp_path)


@pytest.mark.families
@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_is_judged_as_the_table_says_and_trains_unless_refused(
    name: str, written: dict[str, str], tiny_parts: Path, tmp_path: Path
) -> None:
    assert families.verdict(name) == written[name]
    if not written[name].startswith("refused"):
        check_family(name, tiny_parts, tmp_path)


def check_family(name: str, root: Path, folder: Path) -> None:
    """Train one step, whose loss is of the weights before it; the saved model gives that loss to the rows one by one."""
    own = AutoModelForCausalLM.from_pretrained(families.save_family(folder / "lm", name), dtype=torch.float32).eval()
    changes: dict[str, Any] = {
        "model.language_model": folder / "lm",
        "lora": "none",
        "trainable.language_model": "full",
        "training.max_steps": 1,
        "training.learning_rate": 0.0,
        "training.projector_learning_rate": 0.0,
        "training.global_batch_size": 6,
        "training.per_device_train_batch_size": 6,
        "data.max_rows": 6,
    }
    metrics = run(root, folder / "run", **changes)
    stock = AutoModelForImageTextToText.from_pretrained(folder / "run", dtype=torch.float32).eval()
    assert type(stock).__name__ == "LlavaForConditionalGeneration"
    ids = torch.tensor([[5, 9, 7, 30, 31, 32, 33, 40]])
    with torch.no_grad():
        alone = own(input_ids=ids, use_cache=False).logits
        inside = stock(input_ids=ids, use_cache=False).logits[..., : alone.shape[-1]]
    torch.testing.assert_close(inside, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))
    processor = vir_hf.model.for_use.load_processor(folder / "run")
    rows = vir_hf.load_llava_dataset(root / "rows.json", root / "images", decode_images=False)
    collate = vir_hf.LlavaDataCollator(processor, max_length=256, padding_free=False, share_prefixes=False)
    total, count = 0.0, 0
    for number in range(6):
        batch = dict(collate([rows[number]]))
        labels = batch.pop("labels")[:, 1:]
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values") if key in batch}
        with torch.no_grad():
            logits = stock(**inputs, use_cache=False).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        count += int((labels != -100).sum())
    assert metrics["num_supervised_tokens"] == count
    assert metrics["first_loss"] == pytest.approx(total / count, rel=2e-4)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "bert"])
def test_a_refusal_is_one_line_with_exit_code_2_before_weights_are_read(
    name: str, tiny_parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "lm"
    families.family_config(name).save_pretrained(folder)  # and no weights at all
    tiny.save_tokenizer(folder)
    overrides = tiny.training_overrides(tiny_parts, tmp_path / "out", **{"model.language_model": folder})
    for command in ("train", "plan"):
        assert main([command, *overrides]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert f"model.language_model={folder}: " in line and len(line) <= 500
    with pytest.raises(RecipeError, match="docs/language-models.md"):
        vir_hf.build(str(folder), str(tiny_parts / "tower"))


def test_what_cannot_be_packed_is_padded_and_said(
    tiny_parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"model.language_model": families.save_family(tmp_path / "lm", "stablelm")}
    recipe = recipe_for(tiny_parts, tmp_path, **changes)
    with caplog.at_level(logging.WARNING):
        fitted = fit_to_language_model(recipe)
    assert recipe.training.padding_free and not fitted.training.padding_free and not fitted.training.share_prefixes
    (said,) = [record.message for record in caplog.records if "padding_free" in record.message]
    assert "StableLmAttention" in said
    assert fit_to_language_model(fitted) is fitted
    in_tokens = recipe_for(tiny_parts, tmp_path, **changes, **IN_TOKENS)
    with pytest.raises(RecipeError, match="training.max_tokens_per_batch: needs padding-free"):
        fit_to_language_model(in_tokens)


def test_a_factor_goes_into_the_last_norm_and_a_tied_head_stays_tied(tiny_parts: Path, tmp_path: Path) -> None:
    folder = families.save_family(tmp_path / "lm", "cohere")
    own = AutoModelForCausalLM.from_pretrained(folder)
    assert own.config.tie_word_embeddings and own.config.logit_scale == 0.0625
    model, _ = vir_hf.build(str(folder), str(tiny_parts / "tower"), "vicuna_v1")
    assert torch.equal(model.model.language_model.norm.weight, own.model.norm.weight * 0.0625)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    model.save_pretrained(tmp_path / "saved")
    text = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))["text_config"]
    assert text["logit_scale"] == 1.0


def test_a_whole_model_of_another_maker_is_trained_as_it_is_served(tiny_parts: Path, tmp_path: Path) -> None:
    """A llava whose text config still has a scale: transformers applies none, so TRL must not either."""
    folder = families.save_family(tmp_path / "lm", "granite")
    model, processor = vir_hf.build(str(folder), str(tiny_parts / "tower"), "vicuna_v1")
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    path = tmp_path / "whole" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["text_config"]["logits_scaling"] = 8.0
    path.write_text(json.dumps(config), encoding="utf-8")
    whole = {
        "model.name_or_path": tmp_path / "whole",
        "model.language_model": "null",
        "model.vision_tower": "null",
        "training.max_steps": 1,
    }
    losses = [run(tiny_parts, tmp_path / "a", **whole)["first_loss"]]
    config["text_config"]["logits_scaling"] = 1.0
    path.write_text(json.dumps(config), encoding="utf-8")
    losses.append(run(tiny_parts, tmp_path / "b", **whole)["first_loss"])
    assert losses[0] == losses[1]


def test_a_setting_of_ones_own_is_judged_not_the_family(tmp_path: Path) -> None:
    plain = AutoConfig.for_model("gemma2", final_logit_softcapping=None, attn_logit_softcapping=None)
    assert judge_language_model(plain, "NAME").not_packed_because is None
    inside = AutoConfig.for_model("gemma2", final_logit_softcapping=None, attn_logit_softcapping=50.0)
    assert "softcap" in str(judge_language_model(inside, "NAME").not_packed_because)


def test_judging_leaves_random_numbers_as_they_are() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    judge_language_model(AutoConfig.for_model("qwen3", rms_norm_eps=3e-6), "NAME")
    assert torch.equal(torch.rand(2), expected)
