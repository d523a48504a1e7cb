"""The two parts to join, made on the spot: a vision tower that knows the shapes and a language model that knows the words.

Both are saved as ordinary Hugging Face folders, so that the run that follows loads them as it loads any other parts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.nn import functional
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from vir_hf.console import Progress
from vir_hf.images.opening import open_image
from vir_hf.quickstart.drawing import COLOURS, PICTURE_SIZE, PLACES, SHAPES, Scene

PATCH_SIZE = 16
HIDDEN_SIZE = 128
TOWER_LAYERS = 4
LANGUAGE_LAYERS = 3
TOWER_BATCH = 64
TOWER_LEARNING_RATE = 2e-3

_WORDS = r"[\w-]+|[^\w\s]"  # "top-left" is one word, a full stop is another
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else '' }}"
)


def make_vision_tower(folder: Path, images: list[Path], scenes: list[Scene], *, num_steps: int, seed: int) -> float:
    """Return the final loss of a small CLIP tower trained to see what stands where, and save it with its image processor.

    A real tower comes trained on millions of pictures. This one learns, for each patch, the colour, shape and place of the
    object in its quarter of the picture. No question and no answer is shown to it.
    """
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=4,
        image_size=PICTURE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
    )
    tower = CLIPVisionModel(config)
    size = {"height": PICTURE_SIZE, "width": PICTURE_SIZE}
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": PICTURE_SIZE}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    pixels = torch.from_numpy(np.stack([np.array(open_image(path)) for path in images]))
    pixels = pixels.permute(0, 3, 1, 2)  # (num_images, 3, height, width), 8 bit
    colours, shapes, places = patch_attributes(scenes)
    head = nn.Linear(HIDDEN_SIZE, len(COLOURS) + 1 + len(SHAPES) + 1 + len(PLACES))
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=TOWER_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, TOWER_LEARNING_RATE, total_steps=num_steps, pct_start=0.15
    )
    chooser = torch.Generator().manual_seed(seed)
    loss = torch.tensor(math.nan)
    progress = Progress(num_steps, "vision tower", "step")
    for _ in range(num_steps):
        chosen = torch.randint(len(images), (TOWER_BATCH,), generator=chooser)
        batch = (pixels[chosen].float() / 255 - 0.5) / 0.25
        features = tower(pixel_values=batch).last_hidden_state[:, 1:]  # (batch, num_patches, hidden)
        parts = head(features).flatten(0, 1).split([len(COLOURS) + 1, len(SHAPES) + 1, len(PLACES)], dim=-1)
        targets = colours[chosen], shapes[chosen], places[chosen]
        loss = torch.stack(
            [functional.cross_entropy(part, target.flatten()) for part, target in zip(parts, targets, strict=True)]
        ).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.update()
    progress.close()
    tower.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return float(loss.detach())


def patch_attributes(scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return colour, shape and place numbers `(num_scenes, num_patches)`; colour and shape 0 mean nothing stands there."""
    edge = PICTURE_SIZE // PATCH_SIZE
    quarter_of = torch.tensor(
        [2 * (row * 2 // edge) + column * 2 // edge for row in range(edge) for column in range(edge)]
    )
    colours = torch.zeros(len(scenes), len(PLACES), dtype=torch.long)
    shapes = torch.zeros_like(colours)
    for number, scene in enumerate(scenes):
        for thing in scene:
            place = PLACES.index(thing.place)
            colours[number, place] = list(COLOURS).index(thing.colour) + 1
            shapes[number, place] = SHAPES.index(thing.shape) + 1
    return colours[:, quarter_of], shapes[:, quarter_of], quarter_of.expand(len(scenes), -1)


def make_language_model(folder: Path, texts: Iterable[str], *, seed: int) -> None:
    """Save a small Llama and its tokenizer, whose vocabulary is the words of `texts`."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=LANGUAGE_LAYERS,
        num_attention_heads=2,
        max_position_embeddings=512,
        # At the usual 0.02 so narrow a model takes three times the steps before it looks at the picture.
        initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words in small letters, with a chat template of its own."""
    words = sorted({word for text in texts for word in re.findall(_WORDS, text.lower())})
    vocabulary = {word: number for number, word in enumerate([*_SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=_CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
