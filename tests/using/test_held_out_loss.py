"""The loss of held-out rows against the loss that training computes of the same rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_training import loss_of

from vir_hf import cli
from vir_hf.batches.collator import LlavaDataCollator
from vir_hf.data.sources import load_llava_dataset
from vir_hf.inference import Answerer
from vir_hf.scores.losses import judged_losses
from vir_hf.using.held_out_loss import row_losses


def test_the_loss_is_that_of_training(tiny_run: Path, tiny_parts: Path) -> None:
    answerer = Answerer.load(str(tiny_run), device="cpu")
    rows = json.loads((tiny_parts / "rows.json").read_text())[:6]
    found = row_losses(answerer, rows, str(tiny_parts / "images"))
    dataset = load_llava_dataset(tiny_parts / "rows.json", tiny_parts / "images", decode_images=False)
    batch = dict(LlavaDataCollator(answerer.processor)([dataset[n] for n in range(6)]))
    with torch.no_grad():
        wanted = float(loss_of(answerer.model, batch))
    values = judged_losses(found).values()
    assert values["loss"] == pytest.approx(wanted, rel=1e-4) and 0 <= values["token_accuracy"] <= 1
    blind = judged_losses(row_losses(answerer, rows, str(tiny_parts / "images"), blank=True)).values()
    assert blind["loss"] != values["loss"]


def test_the_command_writes_it_beside_the_blind_one(tiny_run: Path, tiny_parts: Path, tmp_path: Path) -> None:
    call = ["evaluate", str(tiny_run), "--task", "loss", "--data", str(tiny_parts / "rows.json"), "--device", "cpu"]
    call += ["--image-folder", str(tiny_parts / "images"), "--max-rows", "3", "--output", str(tmp_path / "out")]
    assert cli.main([*call, "--json", str(tmp_path / "s.json")]) == 0
    results = {row["metric"]: row for row in json.loads((tmp_path / "s.json").read_text())["results"]}
    assert set(results) == {"loss", "token_accuracy", "perplexity"} and results["loss"]["blind"].keys() == {
        "blank images"
    }
    assert len((tmp_path / "out" / "questions.jsonl").read_text().splitlines()) == 3
    assert cli.main(["evaluate", "--task", "loss", "--data", str(tiny_parts / "rows.json")]) == 2
