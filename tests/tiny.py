"""Tiny real parts for tests: a language model with its tokenizer, a vision tower, drawn pictures and rows about them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

IMAGE_SIZE, PATCH_SIZE = 28, 14
COLOURS = ("red", "green", "blue", "black", "white", "yellow")
SHAPES = ("square", "circle")


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with BOS, EOS, padding and an unknown token, trained on a few lines."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lines = [f"What is it? It is a {colour} {shape}. USER: ASSISTANT:" for colour in COLOURS for shape in SHAPES]
    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    from tokenizers.decoders import ByteLevel

    tokenizer.decoder = ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.save_pretrained(folder)
    return fast


def save_language_model(folder: Path, seed: int = 0, **changes: object) -> Path:
    """A 2-layer Llama with grouped-query attention and its tokenizer, saved as one folder."""
    tokenizer = save_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
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
            **changes,
        }
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_vision_tower(folder: Path, seed: int = 1) -> Path:
    """A 3-layer CLIP vision model of 2 x 2 patches and its image processor, saved as one folder."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(folder)
    return folder


def save_data(folder: Path, num_rows: int = 12, num_images: int = 6) -> Path:
    """`rows.json` (one row in five is text only, two rows about each picture) and `images/` beside it."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(num_images):
        colour = COLOURS[number % len(COLOURS)]
        picture = Image.new("RGB", (40, 30), "grey")
        ImageDraw.Draw(picture).rectangle((5 + number, 5, 20 + number, 20), fill=colour)
        picture.save(images / f"{number:04d}.png")
    for number in range(num_rows):
        colour = COLOURS[number % num_images % len(COLOURS)]
        question, answer = ("What is it?", f"It is a {colour} square.")
        row: dict[str, object] = {"id": f"row-{number}"}
        if number % 5 == 4:
            turns = [("human", "What is red?"), ("gpt", "It is a colour.")]
        else:
            row["image"] = f"{number % num_images:04d}.png"
            turns = [("human", f"<image>\n{question}"), ("gpt", answer), ("human", "Sure?"), ("gpt", "It is.")]
        row["conversations"] = [{"from": role, "value": value} for role, value in turns]
        rows.append(row)
    path = folder / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def training_overrides(root: Path, output_dir: Path, **changes: object) -> list[str]:
    """Overrides that train tiny parts made under `root`, for `load_recipe` and the command line."""
    if not (root / "rows.json").exists():
        save_language_model(root / "lm")
        save_vision_tower(root / "tower")
        save_data(root)
    values: dict[str, object] = {
        "experiment": "local_lite",
        "data.data_path": root / "rows.json",
        "data.image_folder": root / "images",
        "model.language_model": root / "lm",
        "model.vision_tower": root / "tower",
        "training.output_dir": output_dir,
        "training.max_length": 256,
        "training.global_batch_size": 4,
        "training.per_device_train_batch_size": 2,
        "training.dataloader_num_workers": 0,
        **changes,
    }
    return [f"{key}={value}" for key, value in values.items()]
