"""`vir-hf doctor`: it finds equality where there is, and a difference where there is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch

from vir_hf import build, load_llava_dataset
from vir_hf.commands import doctor
from vir_hf.training.exactness import compare_ways


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_the_proof_holds(tiny_parts: Path, tmp_path: Path, capsys, trainable: str, checkpointing: str) -> None:
    changes = {"training.gradient_checkpointing": checkpointing, "trainable.language_model": trainable}
    if trainable == "full":
        changes |= {"quantization": "none", "lora": "none"}
    overrides = tiny.training_overrides(tiny_parts, tmp_path, **changes)
    assert doctor.main([*overrides, "--json", "-"]) == 0
    findings = json.loads(capsys.readouterr().out)
    ways = {entry["name"]: entry for entry in findings["comparisons"]}
    assert len(ways) == 7 and all(entry["is_exact"] for entry in ways.values())
    assert ways["shared prefixes"]["num_tokens"] < ways["padding-free"]["num_tokens"] < ways["padded"]["num_tokens"]


def test_a_leak_between_rows_is_seen(tiny_parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, processor = build(str(tiny_parts / "lm"), str(tiny_parts / "tower"), "vicuna_v1")
    model.model.vision_tower.requires_grad_(False)  # its gradients are so small here that rounding shows
    rows = list(load_llava_dataset(tiny_parts / "rows.json", tiny_parts / "images", decode_images=False))[:4]

    def leaky(query, key, value, layout, scaling, dropout, window):
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), is_causal=True, scale=scaling
        )
        return output.transpose(1, 2)

    from vir_hf.llava import attention

    monkeypatch.setitem(attention.BACKENDS, "sdpa", leaky)
    found = {entry.name: entry.is_exact for entry in compare_ways(model, processor, rows)}
    assert found["one row at a time"] and found["padded"] and not found["padding-free"]


def test_without_a_recipe_the_machine_is_shown(capsys) -> None:
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    assert "transformers" in shown and torch.__version__ in shown
