"""Random checkpoints of real architectures, in every kind a run leaves, made by real runs of two steps."""

from __future__ import annotations

import json
from pathlib import Path

import tiny
import torch
from PIL import Image, ImageDraw
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

IMAGE_SIZE, PATCH_SIZE, HIDDEN_SIZE, NUM_HEADS = 56, 14, 128, 4
# Large enough that every picture has an answer of its own, and that no two next tokens are nearly equal.
SPREAD = 0.15
KINDS = ("whole", "merged", "adapter", "own projector")
QUESTIONS = ("What is it?", "Sure?", "What is red? It is a square or a circle.", "What is it, and is it a red square?")
NUM_IMAGES = 20

# A rotary base other than 10,000, which a reader that misses it takes; SmolLM is a Llama with tied embeddings.
LANGUAGE_MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "qwen3": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "head_dim": 32},
    ),
    "smollm": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "tie_word_embeddings": True},
    ),
}
PAIRS = {"llama": "clip", "qwen2": "siglip", "qwen3": "clip", "smollm": "siglip"}


def save_language_model(folder: Path, family: str) -> Path:
    """A random language model of two layers, with its tokenizer."""
    tokenizer = tiny.save_tokenizer(folder)
    config_class, model_class, changes = LANGUAGE_MODELS[family]
    torch.manual_seed(0)
    values = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 2 * HIDDEN_SIZE,
        "num_hidden_layers": 2,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_HEADS // 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "initializer_range": SPREAD,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model_class(config_class(**{**values, **changes})).save_pretrained(folder)
    return folder


def save_vision_tower(folder: Path, family: str) -> Path:
    """A random CLIP or SigLIP tower of three layers, with its image processor."""
    torch.manual_seed(1)
    values = {
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 2 * HIDDEN_SIZE,
        "num_hidden_layers": 3,
        "num_attention_heads": NUM_HEADS,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    if family == "clip":
        CLIPVisionModel(CLIPVisionConfig(**values)).save_pretrained(folder)
        CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(folder)
    else:
        SiglipVisionModel(SiglipVisionConfig(**values)).save_pretrained(folder)
        SiglipImageProcessorPil(size=size).save_pretrained(folder)
    return folder


def save_pictures(folder: Path) -> list[str]:
    """Draw pictures of many shapes and colours."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    paths = []
    for number in range(NUM_IMAGES):
        values = torch.randint(0, 256, (40,), generator=generator).tolist()
        picture = Image.new("RGB", (60 + values[0] % 60, 60 + values[1] % 60), tuple(values[2:5]))
        draw = ImageDraw.Draw(picture)
        for start in range(5, 33, 7):
            x, y, width, height, *colour = values[start : start + 7]
            draw.rectangle((x % 60, y % 60, x % 60 + width % 40, y % 60 + height % 40), fill=tuple(colour))
        paths.append(str(folder / f"{number:02d}.png"))
        picture.save(paths[-1])
    return paths


def make(root: Path, families: tuple[str, ...] = tuple(PAIRS), kinds: tuple[str, ...] = KINDS) -> dict[str, Path]:
    """Train and save each kind for each pair below `root`; return the folders by `family/kind`, and `cases.json` for all."""
    from tiny_run import train_run

    from vir_hf.model.merging import merge_run

    folders = {}
    for family in families:
        place = root / family
        save_language_model(place / "lm", family)
        save_vision_tower(place / "tower", PAIRS[family])
        tiny.save_data(place)
        steps = {
            "model.vision_feature_select_strategy": "auto",
            "training.max_steps": 2,
            "training.learning_rate": 1e-3,
            "training.projector_learning_rate": 1e-3,
        }
        lora = {"lora": "default", "trainable.language_model": "lora"}
        wanted = {
            "whole": {},
            "adapter": lora,
            "own projector": {"model.projector_type": "mlp3x_gelu"},
        }
        for kind, changes in wanted.items():
            if kind in kinds or (kind == "adapter" and "merged" in kinds):
                folders[f"{family}/{kind}"] = train_run(place, place / kind.replace(" ", "_"), **steps, **changes)
        if "merged" in kinds:
            folders[f"{family}/merged"] = merge_run(place / "adapter", place / "merged").out
    pictures = save_pictures(root / "pictures")
    cases = [{"image": path, "question": QUESTIONS[number % 4]} for number, path in enumerate(pictures)]
    (root / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    return folders
