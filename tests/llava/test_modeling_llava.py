"""The pair against transformers' own class, and packed rows against rows one by one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)
from transformers import LlavaConfig as NativeLlavaConfig

import vir_hf
from vir_hf import LlavaConfig, LlavaDataCollator, LlavaForCausalLM, LlavaProcessor, build, load_llava_dataset


@pytest.fixture(scope="module")
def pair(tiny_parts: Path):
    torch.manual_seed(0)
    return build(str(tiny_parts / "lm"), str(tiny_parts / "tower"), template="vicuna_v1")


@pytest.fixture(scope="module")
def prompt(pair):
    model, processor = pair
    ids = [1, 5, *[processor.image_token_id] * processor.num_image_tokens, 9, 11, 13]
    pixels = torch.randn(1, 3, *processor.image_size, generator=torch.Generator().manual_seed(3))
    return {"input_ids": torch.tensor([ids]), "pixel_values": pixels}


def test_import_registers_the_pair() -> None:
    assert isinstance(AutoConfig.for_model("vir_llava"), LlavaConfig)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        assert auto._model_mapping[LlavaConfig] is LlavaForCausalLM
    assert AutoModel._model_mapping[LlavaConfig].__name__ == "LlavaModel"
    assert AutoModelForCausalLM._model_mapping[NativeLlavaConfig] is LlavaForCausalLM
    assert AutoModelForImageTextToText._model_mapping[NativeLlavaConfig] is LlavaForConditionalGeneration


IMPORTS = (
    "import vir_hf, transformers",
    "import transformers.models.auto.modeling_auto, vir_hf",
    "import vir_hf; from transformers import LlavaForConditionalGeneration",
)


@pytest.mark.parametrize("order", IMPORTS)
def test_registration_does_not_depend_on_import_order(order: str) -> None:
    code = f"{order}; from transformers import AutoConfig; AutoConfig.for_model('vir_llava')"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_all_there() -> None:
    for name in vir_hf.__all__:
        assert getattr(vir_hf, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vir_hf.nothing  # noqa: B018


def test_image_token_is_in_vocabulary_and_embeddings_padded_to_64(pair) -> None:
    model, processor = pair
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id
    assert model.get_input_embeddings().weight.shape[0] % 64 == 0
    assert model.get_input_embeddings().weight.shape[0] >= len(processor.tokenizer)
    assert model.config.text_config.vocab_size == model.lm_head.weight.shape[0]


def test_saved_model_opens_in_stock_transformers_with_equal_logits(pair, prompt, tmp_path: Path) -> None:
    model, processor = pair
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == "llava" and config.architectures == ["LlavaForConditionalGeneration"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert "language_model.lm_head.weight" in keys and "multi_modal_projector.linear_1.weight" in keys
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in keys
    assert all(
        key.startswith(("language_model.", "multi_modal_projector.", "vision_tower.vision_model.")) for key in keys
    )
    native, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(native.eval()(**prompt).logits, model.eval()(**prompt).logits)
    stock = AutoProcessor.from_pretrained(tmp_path)
    assert stock.chat_template == processor.chat_template
    reloaded = LlavaProcessor.from_pretrained(tmp_path)
    assert reloaded.template == "vicuna_v1" and reloaded.num_image_tokens == processor.num_image_tokens


def test_llava_hf_checkpoint_loads_with_every_weight_in_place(pair, prompt, tmp_path: Path) -> None:
    model, _ = pair
    model.save_pretrained(tmp_path / "ours")
    native = LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    native.save_pretrained(tmp_path / "native")
    for load in (LlavaForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        ours, info = load(tmp_path / "native", output_loading_info=True)
        assert isinstance(ours, LlavaForCausalLM)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        with torch.no_grad():
            assert torch.equal(ours.eval()(**prompt).logits, native(**prompt).logits)


def test_other_projectors_are_saved_with_their_code(tiny_parts: Path, prompt, tmp_path: Path) -> None:
    model, processor = build(
        str(tiny_parts / "lm"), str(tiny_parts / "tower"), "vicuna_v1", projector_type="mlp3x_gelu"
    )
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == "vir_llava" and config.projector_type == "mlp3x_gelu"
    assert (tmp_path / "modeling_llava.py").is_file()
    with torch.no_grad():
        expected = model.eval()(**prompt).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(**prompt).logits, expected)
    code = (
        "import sys, torch; sys.modules['vir_hf'] = None\n"
        "from transformers import AutoModelForImageTextToText\n"
        f"model = AutoModelForImageTextToText.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
        "sys.exit(type(model.model.multi_modal_projector).__name__ != 'Mlp3xProjector')"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_unknown_projector_is_named_with_the_known_ones(tiny_parts: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown projector_type 'mlp9x'.*mlp2x_gelu"):
        build(str(tiny_parts / "lm"), str(tiny_parts / "tower"), "vicuna_v1", projector_type="mlp9x")


def test_frozen_tower_runs_without_autograd_and_without_its_last_layer(pair, prompt) -> None:
    model, _ = pair
    tower = model.model.vision_tower
    calls: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
        for number, layer in enumerate(tower.encoder.layers)
    ]
    for parameter in tower.parameters():
        parameter.requires_grad_(False)
    try:
        features = model.model.encode_images(prompt["pixel_values"])
        assert calls == [0, 1] and len(tower.encoder.layers) == 3
        assert not features.requires_grad
        with torch.no_grad():
            whole = tower(prompt["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        assert torch.equal(features, whole)
        next(tower.parameters()).requires_grad_(True)
        assert model.model.encode_images(prompt["pixel_values"]).requires_grad
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in tower.parameters():
            parameter.requires_grad_(True)


def test_weights_that_no_feature_depends_on_are_named(pair, prompt) -> None:
    model, _ = pair
    model.zero_grad()
    model.model.encode_images(prompt["pixel_values"]).sum().backward()
    without = {name for name, parameter in model.model.vision_tower.named_parameters() if parameter.grad is None}
    assert model.model.unused_vision_parameters() == without
    assert any(name.startswith("encoder.layers.2.") for name in without)


def test_batched_generation_equals_one_by_one(pair, tiny_parts: Path) -> None:
    model, processor = pair
    rows = load_llava_dataset(tiny_parts / "rows.json", tiny_parts / "images")
    prompts, pictures = [], []
    for number in (0, 1, 2):
        messages = [*rows[number]["messages"][: 1 if number else 3][: 3 if number == 0 else 1]]
        prompts.append(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        pictures.append(rows[number]["images"][0])
    processor.tokenizer.padding_side = "left"
    model.eval()

    def generate(texts, images):
        inputs = processor(
            text=texts, images=images, padding=True, return_tensors="pt", text_kwargs={"add_special_tokens": False}
        )
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=False)

    def bare(text):
        return text.split("</s>")[0]

    together = generate(prompts, pictures)
    alone = [generate([text], [image])[0] for text, image in zip(prompts, pictures, strict=True)]
    assert [bare(text) for text in together] == [bare(text) for text in alone]


def test_wrong_number_of_image_tokens_names_both_counts(pair, prompt) -> None:
    model, _ = pair
    short = {**prompt, "input_ids": prompt["input_ids"][:, :-4]}
    short["input_ids"] = torch.cat([short["input_ids"], torch.tensor([[7, 8]])], dim=1)[:, :5]
    with pytest.raises(ValueError, match=r"3 image tokens.*4 features"):
        model(**short)


def loss_and_gradients(model, batches):
    """Summed loss and gradients over batches, computed from logits by hand."""
    model.zero_grad()
    total, count = 0.0, 0
    for batch in batches:
        inputs = dict(batch)
        labels = inputs.pop("labels")
        logits = model(**inputs).logits[:, :-1]
        targets = labels[:, 1:]
        log_probs = logits.log_softmax(-1)
        picked = log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        loss = -(picked * (targets != -100)).sum()
        loss.backward()
        total, count = total + loss.item(), count + int((targets != -100).sum())
    return total / count, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def mixed_rows(tiny_parts: Path) -> list[dict]:
    """One-image, several-image, text-only and shared-image rows."""
    rows = list(load_llava_dataset(tiny_parts / "rows.json", tiny_parts / "images", decode_images=False))
    two = {"type": "image"}
    several = {
        "id": "two-pictures",
        "images": [rows[0]["images"][0], rows[1]["images"][0]],
        "messages": [
            {"role": "user", "content": [two, {"type": "text", "text": " or "}, two, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Neither."}]},
        ],
    }
    return [*rows[:8], several]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "options", [{"padding_free": False}, {"share_prefixes": False}, {}], ids=["padded", "free", "shared"]
)
def test_a_batch_has_the_loss_and_gradients_of_its_rows_one_by_one(
    pair, tiny_parts: Path, options, checkpointing
) -> None:
    model, processor = pair
    rows = mixed_rows(tiny_parts)
    # Rows about one picture come apart in the file (0 and 6): sharing must find them.
    alone = LlavaDataCollator(processor, padding_free=False, share_prefixes=False)
    together = LlavaDataCollator(processor, **options)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        expected_loss, expected = loss_and_gradients(model, [alone([row]) for row in rows])
        batch = together(rows)
        if not options:
            assert (batch["segment_prefixes"] >= 0).any()
        loss, gradients = loss_and_gradients(model, [batch])
    finally:
        model.gradient_checkpointing_disable()
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    # Text-only rows alone give a zero to every vision weight, also to those that no feature depends on.
    unused = {f"model.vision_tower.{name}" for name in model.model.unused_vision_parameters()}
    assert set(gradients) == set(expected) - unused
    for name, gradient in gradients.items():
        difference = (gradient - expected[name]).norm() / expected[name].norm().clamp(min=1e-12)
        if expected[name].norm() > 1e-8:
            assert difference < 1e-5, name


def test_packed_rows_refuse_masks_caches_and_wrong_lengths(pair, tiny_parts: Path) -> None:
    model, processor = pair
    batch = LlavaDataCollator(processor)(mixed_rows(tiny_parts)[:3])
    batch.pop("labels")
    with pytest.raises(ValueError, match="takes no attention_mask"):
        model(**batch, attention_mask=torch.ones_like(batch["input_ids"]))
    with pytest.raises(ValueError, match="without a key-value cache"):
        model(**batch, use_cache=True)
    with pytest.raises(ValueError, match="segments cover"):
        model(**{**batch, "segment_lengths": batch["segment_lengths"] + 1})


def test_a_text_only_micro_batch_gives_projector_zero_gradients(pair, tiny_parts: Path) -> None:
    model, processor = pair
    rows = [row for row in mixed_rows(tiny_parts) if not row["images"]]
    model.train()
    _, gradients = loss_and_gradients(model, [LlavaDataCollator(processor)(rows)])
    projector = [value for name, value in gradients.items() if "multi_modal_projector" in name]
    assert projector and all(not value.any() for value in projector)


def test_parts_of_full_clip_models_are_accepted(tiny_parts: Path) -> None:
    language_model = LlamaForCausalLM.from_pretrained(tiny_parts / "lm")
    tower = CLIPVisionModel.from_pretrained(tiny_parts / "tower")
    model = LlavaForCausalLM.from_components(language_model, tower, projector_type="linear")
    assert model.config.image_token_id < model.config.text_config.vocab_size
    assert not any(parameter.is_meta for parameter in model.parameters())
