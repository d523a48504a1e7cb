"""Every family of language model, joined with every kind of tower, against the same rows one by one and stock classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny_training import loss_of, packed_batch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlavaForConditionalGeneration,
    PhiConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import vir_hf
from vir_hf.errors import RecipeError

# Rows are some 30 to 50 tokens: a window of 8 cuts most of what a token would see.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "mistral_windowed": {"sliding_window": 8},
    "qwen2": {},
    "qwen2_windowed": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "phi3": {},
    "phi3_windowed": {"sliding_window": 8},
    "smollm3": {"no_rope_layers": [1, 0], "layer_types": None},
}
TOWERS = ("clip", "siglip")


def save_family(folder: Path, family: str) -> Path:
    """A 2-layer language model of this family with its tokenizer."""
    tokenizer = tiny.save_tokenizer(folder)
    config = AutoConfig.for_model(
        family.split("_")[0],
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **{name: value for name, value in FAMILIES[family].items() if name != "layer_types"},
        },
    )
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # wide enough for attention to matter
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def save_siglip(folder: Path) -> Path:
    torch.manual_seed(4)
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=tiny.IMAGE_SIZE,
        patch_size=tiny.PATCH_SIZE,
    )
    SiglipVisionModel(config).save_pretrained(folder)
    size = {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
    SiglipImageProcessorPil(size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parts(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    made = {family: save_family(root / family, family) for family in FAMILIES}
    return {**made, "clip": tiny_parts / "tower", "siglip": save_siglip(root / "siglip")}


@pytest.fixture(params=[(family, tower) for family in FAMILIES for tower in TOWERS], ids="-".join)
def joined(request: pytest.FixtureRequest, parts: dict[str, Path]) -> tuple[Any, Any]:
    family, tower = request.param
    torch.manual_seed(5)
    model, processor = vir_hf.build(str(parts[family]), str(parts[tower]), template="vicuna_v1", dtype=torch.float32)
    # A projector that speaks as loudly as the embeddings, so that the picture matters.
    torch.nn.init.normal_(model.model.multi_modal_projector.linear_2.weight, std=0.5)
    return model.eval(), processor


def rows_one_by_one(root: Path, processor: Any) -> list[dict[str, torch.Tensor]]:
    """The rows of `packed_batch`, each in a batch of its own without packing."""
    from vir_hf.batches.collator import LlavaDataCollator
    from vir_hf.data.sources import load_llava_dataset

    rows = load_llava_dataset(root / "rows.json", root / "images", decode_images=False)
    collate = LlavaDataCollator(processor, max_length=256, padding_free=False, share_prefixes=False)
    return [dict(collate([rows[number]])) for number in range(5)]


def test_a_packed_row_gives_the_gradients_of_its_rows_one_by_one(joined: Any, tiny_parts: Path):
    model, processor = joined
    batch = packed_batch(tiny_parts, processor)
    singles = rows_one_by_one(tiny_parts, processor)
    loss = loss_of(model, batch)
    loss.backward()
    packed = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    counts = [int((single["labels"][:, 1:] != -100).sum()) for single in singles]
    total = torch.zeros(())
    for single, count in zip(singles, counts, strict=True):
        part = loss_of(model, single) * count / sum(counts)
        part.backward()
        total += part.detach()
    torch.testing.assert_close(loss.detach(), total, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert name not in packed or not packed[name].any(), name
        else:
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-4, atol=1e-5 * max(scale, 1e-2), msg=name)


def test_a_window_shorter_than_the_row_matters(parts: dict[str, Path], tiny_parts: Path):
    """Otherwise the windowed families above would test nothing."""
    for family in ("mistral_windowed", "phi3_windowed", "qwen2_windowed"):
        model, processor = vir_hf.build(
            str(parts[family]), str(parts["clip"]), template="vicuna_v1", dtype=torch.float32
        )
        single = rows_one_by_one(tiny_parts, processor)[0]
        assert single["input_ids"].shape[1] > 3 * 8
        with torch.no_grad():
            windowed = loss_of(model, single)
            for layer in model.model.language_model.layers:
                if getattr(layer.self_attn, "sliding_window", None):
                    layer.self_attn.sliding_window = 10_000
            model.model.language_model.config.sliding_window = 10_000
            whole = loss_of(model, single)
        assert abs(float(windowed - whole)) > 1e-4, family


def test_generation_in_a_left_padded_batch_equals_one_by_one(joined: Any, tiny_parts: Path):
    from PIL import Image

    model, processor = joined
    model.generation_config.eos_token_id = None
    pictures = [Image.open(path).convert("RGB") for path in sorted((tiny_parts / "images").glob("*.png"))[:2]]
    texts = ["USER: <image>\nWhat is it? ASSISTANT:", "A red square is no blue circle. USER: <image>\nSure? ASSISTANT:"]
    processor.tokenizer.padding_side = "left"
    arguments = {"max_new_tokens": 6, "do_sample": False}
    together = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    answers = model.generate(**together, **arguments)[:, together["input_ids"].shape[1] :]
    for picture, text, answer in zip(pictures, texts, answers, strict=True):
        alone = processor(images=[picture], text=text, return_tensors="pt")
        expected = model.generate(**alone, **arguments)[0, alone["input_ids"].shape[1] :]
        assert answer.tolist() == expected.tolist()


def test_saved_it_opens_in_stock_transformers_with_the_same_logits(joined: Any, tiny_parts: Path, tmp_path: Path):
    model, processor = joined
    model.save_pretrained(tmp_path)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    single = rows_one_by_one(tiny_parts, processor)[0]
    inputs = {name: single[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        found, expected = stock(**inputs).logits, model(**inputs).logits
        other = stock(**{**inputs, "pixel_values": inputs["pixel_values"].flip(1) * 2}).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(other, expected, atol=1e-3)  # the picture is looked at


def test_a_head_with_a_bias_is_refused(parts: dict[str, Path], tmp_path: Path):
    """Phi-1 and Phi-2: llava has no place for it, and a model without it would be another one."""
    tokenizer = tiny.save_tokenizer(tmp_path)
    config = PhiConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"model.language_model=.*PhiForCausalLM has a bias in its head"):
        vir_hf.build(str(tmp_path), str(parts["clip"]), template="vicuna_v1")
