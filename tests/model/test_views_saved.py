"""Models of several views: equal to transformers' own classes on the same weights, trained, saved and opened by stock tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_training
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
)

from vir_hf.errors import RecipeError
from vir_hf.inference import Answerer, Question
from vir_hf.llava.processing_views import TilesImageProcessor
from vir_hf.model.build import build, check_same_views
from vir_hf.model.for_use import load_processor, load_run
from vir_hf.rows.encoding import encode_prompt
from vir_hf.rows.templates import IMAGE_TOKEN, prepare_tokenizer

PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
SIZES = [(40, 30), (30, 41), (28, 28), (97, 31), (13, 77), (200, 150)]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    tiny.save_language_model(root / "lm")
    tiny.save_vision_tower(root / "tower")
    tiny.save_data(root)
    return root


@pytest.fixture(scope="module")
def llava_next(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-NeXT checkpoint as transformers itself saves it, with its own processor."""
    folder = tmp_path_factory.mktemp("next")
    tokenizer = tiny.save_tokenizer(parts / "tokenizer")
    prepare_tokenizer(tokenizer, "vicuna_v1")
    torch.manual_seed(3)
    text = LlamaConfig.from_pretrained(parts / "lm", vocab_size=-(-len(tokenizer) // 64) * 64)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig.from_pretrained(parts / "tower"),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=4,
    )
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 28, "width": 28}
    LlavaNextProcessor(
        LlavaNextImageProcessorPil(image_grid_pinpoints=PINPOINTS, size={"shortest_edge": 28}, crop_size=size),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for m in messages %}USER: {% for p in m['content'] %}"
        "{{ '<image>\n' if p['type'] == 'image' else p['text'] }}{% endfor %} ASSISTANT:{% endfor %}",
    ).save_pretrained(folder)
    return folder


class TestLlavaNext:
    def test_logits_equal_transformers_own_for_odd_sizes_and_several_images(self, llava_next: Path) -> None:
        ours, _ = load_run(llava_next, dtype=torch.float32, device="cpu")
        native = LlavaNextForConditionalGeneration.from_pretrained(llava_next, dtype=torch.float32).eval()
        stock = LlavaNextProcessor.from_pretrained(llava_next)
        images = [picture(*size, seed) for seed, size in enumerate(SIZES)]
        for shown in ([image] for image in images), [images[:2]], [images[2:5]]:
            for some in shown:
                text = "<s> USER: " + "<image>\n" * len(some) + "What is it? ASSISTANT:"
                inputs = stock(images=some, text=text, return_tensors="pt")
                with torch.no_grad():
                    assert torch.allclose(ours(**inputs).logits, native(**inputs).logits, atol=1e-5)

    def test_our_processor_gives_the_tokens_and_views_of_transformers(self, llava_next: Path) -> None:
        stock, ours = LlavaNextProcessor.from_pretrained(llava_next), load_processor(llava_next)
        answerer = Answerer(load_run(llava_next, dtype=torch.float32, device="cpu")[0], ours)
        for seed, size in enumerate(SIZES):
            image = picture(*size, seed)
            theirs = stock(images=image, text="<image>", return_tensors="pt")
            prompt = answerer.encode(Question("What is it?", [image]))
            assert prompt.input_ids.count(ours.image_token_id) == int(
                (theirs["input_ids"] == ours.image_token_id).sum()
            )
            assert torch.equal(torch.stack(prompt.pixel_values), theirs["pixel_values"][0])
            assert prompt.image_sizes == [size]

    def test_gradients_equal_transformers_own(self, llava_next: Path) -> None:
        ours, _ = load_run(llava_next, dtype=torch.float32, device="cpu")
        native = LlavaNextForConditionalGeneration.from_pretrained(llava_next, dtype=torch.float32)
        stock = LlavaNextProcessor.from_pretrained(llava_next)
        inputs = stock(images=[picture(97, 31)], text="<s> USER: <image>\nWhat? ASSISTANT: red", return_tensors="pt")
        for model in (ours, native):
            model.requires_grad_(True)
            model(**inputs).logits.square().mean().backward()
        theirs = dict(native.named_parameters())
        for name, parameter in ours.named_parameters():
            other = theirs[name.replace("multi_modal_projector.image_newline", "image_newline")]
            if parameter.grad is None:
                assert other.grad is None or not other.grad.any(), name
            else:
                assert torch.allclose(parameter.grad, other.grad, atol=1e-6), name
        assert ours.model.multi_modal_projector.image_newline.grad.abs().max() > 0

    def test_training_learns_the_newline_and_saves_the_native_type(
        self, llava_next: Path, parts: Path, tmp_path: Path
    ) -> None:
        changes = {"model.name_or_path": llava_next, "model.language_model": "null", "model.vision_tower": "null"}
        tiny_training.run(
            parts,
            tmp_path / "run",
            **changes,
            **{"trainable.language_model": "full", "lora": "none", "training.max_steps": 3},
        )
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        assert config["model_type"] == "llava_next"
        assert config["architectures"] == ["LlavaNextForConditionalGeneration"]
        assert "auto_map" not in config and not list((tmp_path / "run").glob("*.py"))
        native, told = AutoModelForImageTextToText.from_pretrained(
            tmp_path / "run", dtype=torch.float32, output_loading_info=True
        )
        assert type(native) is LlavaNextForConditionalGeneration
        assert not told["missing_keys"] and not told["unexpected_keys"]
        before = LlavaNextForConditionalGeneration.from_pretrained(llava_next).model.image_newline
        assert not torch.equal(native.model.image_newline, before)
        processor = AutoProcessor.from_pretrained(tmp_path / "run")
        assert type(processor) is LlavaNextProcessor
        ours, own = load_run(tmp_path / "run", dtype=torch.float32, device="cpu")
        inputs = processor(images=[picture(97, 31)], text="<s> USER: <image>\nWhat? ASSISTANT:", return_tensors="pt")
        with torch.no_grad():
            assert torch.allclose(ours(**inputs).logits, native.eval()(**inputs).logits, atol=1e-5)
        said = Answerer(ours, own).answer([picture(97, 31)], "What?", max_new_tokens=6)
        prompt = encode_prompt({"messages": Question("What?", [picture(97, 31)]).messages()}, own)
        again = {
            **inputs,
            "input_ids": torch.tensor([prompt]),
            "attention_mask": torch.ones(1, len(prompt), dtype=torch.long),
        }
        output = native.generate(**again, max_new_tokens=6, do_sample=False)
        assert own.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip() == said

    def test_an_adapter_keeps_the_newline_and_merges_into_the_native_type(
        self, llava_next: Path, parts: Path, tmp_path: Path
    ) -> None:
        from vir_hf.model.merging import merge_run

        changes = {"model.name_or_path": llava_next, "model.language_model": "null", "model.vision_tower": "null"}
        tiny_training.run(
            parts, tmp_path / "run", **changes, **{"trainable.language_model": "lora", "training.max_steps": 3}
        )
        adapted, processor = load_run(tmp_path / "run", dtype=torch.float32, device="cpu")
        merge_run(tmp_path / "run", tmp_path / "merged")
        native = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        assert type(native) is LlavaNextForConditionalGeneration
        stock = AutoProcessor.from_pretrained(tmp_path / "merged")
        inputs = stock(images=[picture(97, 31)], text="<s> USER: <image>\nWhat? ASSISTANT:", return_tensors="pt")
        with torch.no_grad():
            assert torch.allclose(adapted(**inputs).logits, native(**inputs).logits, atol=1e-5)

    def test_grid_points_that_do_not_divide_are_refused_before_training(self, llava_next: Path, tmp_path: Path) -> None:
        for path in llava_next.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        config = json.loads((tmp_path / "config.json").read_text())
        config["image_grid_pinpoints"] = [[28, 60]]
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(RecipeError, match="grid point 28 x 60 is no multiple of the tiles' 28"):
            load_run(tmp_path, device="cpu")


class TestTiles:
    CHANGES = {
        "model.tiling": "tiles",
        "model.max_tiles": 4,
        "model.pixel_shuffle": 2,
        "trainable.language_model": "full",
        "lora": "none",
    }

    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("run") / "run"
        metrics = tiny_training.run(parts, folder, **cls.CHANGES, **{"training.max_steps": 4})
        assert metrics["final_loss"] < metrics["first_loss"]
        return folder

    def test_stock_transformers_gives_the_same_answer_with_the_code_saved_beside(self, run: Path) -> None:
        model, processor = load_run(run, dtype=torch.float32, device="cpu")
        assert isinstance(processor.image_processor, TilesImageProcessor)
        image = picture(100, 50)
        image.save(run.parent / "image.png")
        said = Answerer(model, processor).answer([image], "What is it?", max_new_tokens=6)
        prompt = encode_prompt({"messages": Question("What is it?", [image]).messages()}, processor)
        answered = subprocess.run(
            [sys.executable, "-c", _STOCK, str(run), str(run.parent / "image.png")],
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            capture_output=True,
            text=True,
            cwd=run.parent,
        )
        assert answered.returncode == 0, answered.stderr[-2000:]
        found = json.loads(answered.stdout.splitlines()[-1])
        assert found["ids"] == prompt
        assert found["text"] == said

    def test_features_on_disk_change_nothing(self, parts: Path, run: Path, tmp_path: Path) -> None:
        metrics = tiny_training.run(
            parts, tmp_path / "cached", **self.CHANGES, **{"training.max_steps": 4, "training.feature_cache": "true"}
        )
        before = json.loads((run / "metrics.json").read_text())
        assert metrics["final_loss"] == pytest.approx(before["final_loss"], rel=1e-5)

    def test_a_processor_that_cuts_otherwise_is_refused_with_both_numbers(self, parts: Path) -> None:
        model, _ = build(str(parts / "lm"), str(parts / "tower"), "vicuna_v1", max_tiles=4)
        _, other = build(str(parts / "lm"), str(parts / "tower"), "vicuna_v1", max_tiles=2)
        with pytest.raises(RecipeError, match=r"its processor makes \d+ views and the model expects \d+"):
            check_same_views(model, other)
        other.image_processor.size = {"shortest_edge": 56}
        other.image_processor.crop_size = {"height": 56, "width": 56}
        with pytest.raises(RecipeError, match="views of 56 x 56 pixels, its vision tower takes 28 x 28"):
            check_same_views(model, other)


_STOCK = """
import json, sys
sys.modules["vir_hf"] = None  # as where it is not installed
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, image = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=[Image.open(image).convert("RGB")], text=text, add_special_tokens=False, return_tensors="pt")
ids = inputs["input_ids"][0].tolist()
output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
said = processor.tokenizer.decode(output[0, len(ids):], skip_special_tokens=True).strip()
print(json.dumps({"ids": ids, "text": said}))
"""
