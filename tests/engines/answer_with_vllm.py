"""Greedy answers of vLLM; knows nothing of this project.

python answer_with_vllm.py CASES.json FOLDER OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

NEW_TOKENS = 12


def answer(cases: list[dict], folder: str) -> dict[str, object]:
    """Return the version and the answers of one engine to all cases at once."""
    import vllm
    from PIL import Image

    engine = vllm.LLM(folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4)
    chats = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_pil", "image_pil": Image.open(case["image"]).convert("RGB")},
                    {"type": "text", "text": case["question"]},
                ],
            }
        ]
        for case in cases
    ]
    outputs = engine.chat(chats, vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS))
    return {"version": vllm.__version__, "single": [output.outputs[0].text.strip() for output in outputs]}


if __name__ == "__main__":
    result = answer(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
    Path(sys.argv[3]).write_text(json.dumps(result, indent=1))
