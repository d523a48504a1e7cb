"""Trains named scenarios one after the other in the processes a launcher has started: imports are paid for once.

    accelerate launch --config_file CONFIG --num_processes N tests/distributed/scenarios.py ROOT OUT NAME [NAME ...]

Each writes its ordinary results into OUT/NAME. ROOT holds the tiny parts (see `make_parts`).
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny

_FULL = {
    "lora": "none",
    "quantization": "none",
    "trainable.language_model": "full",
    "trainable.projector": "full",
}
_LORA = {"quantization": "none", "lora.r": 4, "lora.lora_dropout": 0.0}

# Global batch 4. The rows of `make_parts` are mostly text, so that some ranks and micro-batches see no picture at all.
SCENARIOS: dict[str, dict[str, object]] = {
    "full": _FULL,
    "grouped": {**_FULL, "training.group_by_image": True, "training.global_batch_size": 8},
    "budget": {
        **_FULL,
        "training.global_batch_size": 8,
        "training.max_tokens_per_batch": 400,
        "training.per_device_train_batch_size": "null",
    },
    "padded": {**_FULL, "training.padding_free": False},
    "tower": {**_FULL, "trainable.vision_tower": "full", "training.per_device_train_batch_size": 1},
    "lora": {**_LORA, "training.per_device_train_batch_size": 1},
    "tower_lora": {**_LORA, "trainable.vision_tower": "lora", "training.per_device_train_batch_size": 1},
    "qlora": {
        "quantization": "nf4",
        "quantization.only_on_cuda": False,
        "lora.r": 4,
        "lora.lora_dropout": 0.0,
    },
}


def make_parts(root: Path) -> Path:
    """Tiny parts under `root` and 24 rows, of which nine have a picture and fifteen are text of several lengths."""
    tiny.save_language_model(root / "lm")
    tiny.save_vision_tower(root / "tower")
    path = tiny.save_data(root, num_rows=24)
    rows = json.loads(path.read_text(encoding="utf-8"))
    for number, row in enumerate(rows):
        if number % 8 not in (0, 1, 3) and "image" in row:
            del row["image"]
            question = "What is red? " * (1 + number % 3)
            row["conversations"] = [
                {"from": "human", "value": question.strip()},
                {"from": "gpt", "value": "It is a colour." if number % 2 else "It is."},
            ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return root


def overrides(root: Path, output_dir: Path, name: str, **changes: object) -> list[str]:
    """The command-line overrides of a scenario."""
    values: dict[str, object] = {
        "training.use_cpu": True,
        "training.max_steps": 5,
        "training.learning_rate": 2e-3,
        "model.dtype": "float32",
        "training.save_strategy": "'no'",
        **SCENARIOS[name],
        **changes,
    }
    return tiny.training_overrides(root, output_dir, **values)


def main(root: Path, output_dir: Path, names: list[str]) -> None:
    from accelerate.state import AcceleratorState, GradientState

    from vir_hf.recipe.load import load_recipe
    from vir_hf.training.run import train

    for name in names:
        train(load_recipe(overrides(root, output_dir / name, name)))
        gc.collect()
        # The processes stay joined; engine and settings are those of the next scenario.
        AcceleratorState._reset_state()
        GradientState._reset_state()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
