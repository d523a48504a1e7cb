from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny_training import NF4, load, run

from vir_hf.model.audit import audit_as_dict, audit_model, print_audit
from vir_hf.model.trainable import make_trainable


@pytest.mark.parametrize("changes", [{}, NF4], ids=["fp32", "nf4"])
def test_every_weight_is_counted_once_and_as_what_it_stands_for(
    changes: dict[str, object], tiny_parts: Path, tmp_path: Path
):
    plain, _, _ = load(tiny_parts, tmp_path)
    expected = sum(parameter.numel() for parameter in plain.parameters())
    model, _, recipe = load(tiny_parts, tmp_path, **changes)
    trained = make_trainable(model, recipe)
    lines = audit_model(trained, recipe)
    adapter = sum(line.num_parameters for line in lines if line.group == "adapter")
    assert sum(line.num_parameters for line in lines) - adapter == expected
    learning = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
    assert sum(line.num_trainable for line in lines) == learning


def test_bits_and_rates_are_read_off_the_modules(tiny_parts: Path, tmp_path: Path):
    changes = {"training.learning_rate": 3e-4, "training.projector_learning_rate": 4e-5, "training.weight_decay": 0.1}
    model, _, recipe = load(tiny_parts, tmp_path, **NF4, **changes)
    lines = {(line.part, line.group): line for line in audit_model(make_trainable(model, recipe), recipe)}
    assert lines["language_model", "linear"].stored_as == "nf4"
    assert lines["language_model", "linear"].learning_rate is None
    assert lines["language_model", "head"].stored_as == "float32"
    assert lines["vision_tower", "linear"].stored_as == "float32"
    assert lines["language_model", "adapter"].learning_rate == 3e-4
    assert lines["language_model", "adapter"].weight_decay == 0.1
    assert lines["projector", "linear"].learning_rate == 4e-5
    # Two 4-bit values a byte, and one scale a block of 64 on top.
    linear = lines["language_model", "linear"]
    assert linear.num_parameters / 2 < linear.num_bytes < linear.num_parameters * 0.6


def test_eight_bit_weights_take_a_byte(tiny_parts: Path, tmp_path: Path):
    changes = {"quantization": "int8", "quantization.only_on_cuda": "false"}
    model, _, recipe = load(tiny_parts, tmp_path, **changes)
    lines = {(line.part, line.group): line for line in audit_model(make_trainable(model, recipe), recipe)}
    linear = lines["language_model", "linear"]
    assert (linear.stored_as, linear.num_bytes) == ("int8", linear.num_parameters)


def test_the_table_fits_a_terminal_and_the_file_says_the_same(
    tiny_parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run(tiny_parts, tmp_path / "run", **NF4, **{"training.max_steps": 1})
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert "weights float32, no autocast" in printed and saved["precision"].startswith("weights float32")
    for group in saved["groups"]:
        shown = [
            line for line in printed.splitlines() if group["part"] in line and f"{group['num_parameters']:,}" in line
        ]
        assert shown and group["stored_as"] in shown[0]
    assert saved["num_trainable"] == sum(group["num_trainable"] for group in saved["groups"])

    model, _, recipe = load(tiny_parts, tmp_path)
    lines = audit_model(make_trainable(model, recipe), recipe)
    lines[0].num_parameters = 6_738_415_616  # a real model's size
    text = io.StringIO()
    print_audit(lines, "weights bfloat16", Console(file=text, width=80))
    assert "6,738,415,616" in text.getvalue() and "language_model" in text.getvalue()
    assert audit_as_dict(lines, "x")["num_parameters"] > 6_738_415_616
