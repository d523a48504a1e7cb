"""Greedy answers of stock transformers, of whatever version runs this; knows nothing of this project.

python answer_with_transformers.py CASES.json FOLDER OUT.json [BASE]     BASE: load it, and FOLDER with PEFT on top
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

NEW_TOKENS, BATCH = 12, 4


def answer(cases: list[dict], folder: str, base: str | None = None) -> dict[str, object]:
    """Return the version and the answers one by one, in padded batches, and by the pipeline in batches."""
    source = Path(base or folder)
    config = source / "config.json"
    is_own = config.is_file() and json.loads(config.read_text())["model_type"] != "llava"
    trust = {"trust_remote_code": True} if is_own else {}
    processor = AutoProcessor.from_pretrained(folder, **trust)
    model = AutoModelForImageTextToText.from_pretrained(str(source), dtype=torch.float32, **trust)
    if base is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    model.eval()
    images = [Image.open(case["image"]).convert("RGB") for case in cases]

    def generate(numbers: range) -> list[str]:
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": cases[number]["question"]}]}]
            for number in numbers
        ]
        prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        inputs = processor(
            images=[images[number] for number in numbers],
            text=prompts,
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    starts = range(0, len(cases), BATCH)
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": case["question"]}]}]
        for image, case in zip(images, cases, strict=True)
    ]
    by_pipeline = pipeline("image-text-to-text", model=model, processor=processor)(
        text=chats,
        batch_size=BATCH,
        return_full_text=False,
        generate_kwargs={"max_new_tokens": NEW_TOKENS, "do_sample": False},
    )
    entries = [entry[0] if isinstance(entry, list) else entry for entry in by_pipeline]
    return {
        "version": transformers.__version__,
        "single": [generate(range(number, number + 1))[0] for number in range(len(cases))],
        "batched": [text for start in starts for text in generate(range(start, min(start + BATCH, len(cases))))],
        "pipeline": [entry["generated_text"].strip() for entry in entries],
    }


if __name__ == "__main__":
    result = answer(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2], *sys.argv[4:5])
    Path(sys.argv[3]).write_text(json.dumps(result, indent=1))
