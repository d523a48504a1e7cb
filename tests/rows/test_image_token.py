"""The image token is the tokenizer's own where it names one: built, trained, saved and opened by stock transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoProcessor, AutoTokenizer

from vir_hf import LlavaDataCollator, LlavaProcessor, build, encode_row, load_llava_dataset
from vir_hf.errors import DataError
from vir_hf.rows.encoding import encode_prompt
from vir_hf.rows.messages import to_messages
from vir_hf.rows.templates import TEMPLATES

OWN = "<|image_pad|>"
CHAT = (
    "{% for m in messages %}{{ m.role + ': ' }}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
).replace("IMAGE", "{{ '%s' }}")


@pytest.fixture(scope="module")
def language_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A language model whose tokenizer names no image token, and one whose tokenizer names its own."""
    root = tmp_path_factory.mktemp("models")
    found = {}
    for name, token in (("none", None), ("own", OWN)):
        folder = tiny.save_language_model(root / name, vocab_size=420)
        tokenizer = AutoTokenizer.from_pretrained(
            folder, **({} if token is None else {"extra_special_tokens": {"image_token": token}})
        )
        tokenizer.chat_template = CHAT.replace("%s", token or "<image>")
        tokenizer.save_pretrained(folder)
        assert getattr(AutoTokenizer.from_pretrained(folder), "image_token", None) == token
        found[name] = folder
    return found


@pytest.mark.parametrize("template", [*TEMPLATES, "auto"])
@pytest.mark.parametrize("name", ["none", "own"])
def test_a_trained_model_is_opened_again_with_the_same_ids(
    language_models: dict[str, Path], tiny_parts: Path, tmp_path: Path, name: str, template: str
) -> None:
    torch.manual_seed(0)
    model, processor = build(str(language_models[name]), str(tiny_parts / "tower"), template)
    token = OWN if name == "own" else "<image>"
    assert processor.image_token == token
    assert model.config.image_token_id == processor.image_token_id == processor.tokenizer.convert_tokens_to_ids(token)
    rows = list(load_llava_dataset(tiny_parts / "rows.json", tiny_parts / "images", decode_images=False))
    batch = LlavaDataCollator(processor)(rows[:5])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)

    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    stock: Any = AutoProcessor.from_pretrained(tmp_path / "saved")
    ours = LlavaProcessor.from_pretrained(tmp_path / "saved")
    assert stock.image_token == ours.image_token == token
    for row in rows[:5]:
        encoded = encode_row(row, processor)
        assert encode_row(row, ours) == encoded
        asked = to_messages(row)["messages"][:1]
        num_images = sum(part["type"] == "image" for part in asked[0]["content"])
        text = stock.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        prompt = encode_prompt(
            {"messages": asked, "images": row["images"][:num_images]}, processor, expand_images=False
        )
        assert stock.tokenizer(text, add_special_tokens=False)["input_ids"] == prompt
        assert prompt.count(processor.image_token_id) == num_images


@pytest.mark.parametrize("template", [*TEMPLATES, "auto"])
def test_the_words_image_in_data_stay_the_data_format(
    language_models: dict[str, Path], tiny_parts: Path, template: str
) -> None:
    processor = build(str(language_models["own"]), str(tiny_parts / "tower"), template)[1]
    turns = [{"from": "human", "value": f"<image>\nIs {OWN} here?"}, {"from": "gpt", "value": f"{OWN} <image>"}]
    encoded = encode_row({"conversations": turns, "image": "a.png"}, processor)
    assert encoded["input_ids"].count(processor.image_token_id) == processor.num_image_tokens


@pytest.mark.parametrize("template", [*TEMPLATES, "auto"])
def test_no_message_advises_the_template_that_was_chosen(
    language_models: dict[str, Path], tiny_parts: Path, template: str
) -> None:
    processor = build(str(language_models["own"]), str(tiny_parts / "tower"), template)[1]
    processor.chat_template = (
        "{% for m in messages %}{{ m.role }}: {% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}</s>"
        "{% endfor %}"
    )
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    with pytest.raises(DataError, match="writes 0 of 1 images") as caught:
        encode_row({"conversations": turns, "image": "a.png"}, processor)
    advised = re.findall(r"'(\w+)'", str(caught.value).partition("one of")[2])
    assert set(advised) == set(TEMPLATES) - {template}
