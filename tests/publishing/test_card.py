"""The card says what was measured, and its metadata is what the Hub expects."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from vir_hf.publishing.card import RunFacts, draw_loss_curve, duration, is_hub_id, make_card


@pytest.fixture
def facts() -> RunFacts:
    return RunFacts(
        recipe={
            "experiment": {"name": "mine", "description": "not to be repeated"},
            "model": {"language_model": "lmsys/vicuna-7b-v1.5", "vision_tower": "openai/clip-vit-large-patch14-336"},
            "data": {"data_path": "/home/me/rows.json", "sources": [{"path": "liuhaotian/LLaVA-Instruct-150K"}]},
            "training": {"learning_rate": 2e-5, "stage": "finetune"},
            "trainable": {"language_model": "full", "projector": "full"},
        },
        metrics={
            "num_rows": 1200,
            "num_images": 900,
            "num_tokens": 1000,
            "num_supervised_tokens": 250,
            "masked_rows": [{"id": "a", "reason": "gone"}],
            "seconds": 7300,
            "device": "NVIDIA H200",
            "world_size": 2,
            "versions": {"torch": "2.13.0"},
            "loss_history": [{"step": 10, "loss": 5.0}, {"step": 20, "loss": 1.25}],
        },
    )


def metadata(card: ModelCard) -> dict:
    return yaml.safe_load(str(card).split("---\n")[1])


def test_metadata_names_task_parts_data_and_licence(facts: RunFacts) -> None:
    data = metadata(make_card(facts, "me/mine", licence="apache-2.0"))
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["library_name"] == "transformers"
    assert data["base_model"] == ["lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336"]
    assert data["datasets"] == ["liuhaotian/LLaVA-Instruct-150K"]
    assert data["license"] == "apache-2.0"
    assert "vir-hf" in data["tags"]
    assert "model-index" not in data  # nothing was measured


def test_a_licence_that_nobody_stated_is_not_made_up(facts: RunFacts) -> None:
    card = make_card(facts, "me/mine")
    assert metadata(card)["license"] == "other" and metadata(card)["license_name"] == "not-stated"
    assert "has not stated a licence" in card.text


def test_measured_scores_and_only_those_stand_in_the_model_index(facts: RunFacts) -> None:
    facts.evaluation = {"results": [{"dataset": "My rows", "metric": "exact match", "value": 0.75, "num_rows": 40}]}
    card = make_card(facts, "me/mine")
    result = metadata(card)["model-index"][0]["results"][0]
    assert result["dataset"] == {"name": "My rows", "type": "my-rows"}
    assert result["metrics"] == [{"type": "exact_match", "value": 0.75, "name": "exact match"}]
    assert "| My rows | exact match | 0.75 | 40 |" in card.text
    assert ModelCard(str(card)).data.eval_results[0].metric_value == 0.75  # huggingface_hub reads it back


def test_the_text_gives_data_loss_machine_and_limits(facts: RunFacts) -> None:
    text = make_card(facts, "me/mine").text
    for expected in (
        "| rows seen | 1,200 |",
        "250 (25.0%)",
        "From 5 at step 10 to 1.25 at step 20",
        "2 x NVIDIA H200",
        "2.0 h",
    ):
        assert expected in text
    assert "Nothing was measured" in text
    assert "not to be repeated" not in text and "/home/me" not in text


def test_sample_pictures_are_shown_only_with_their_licence(facts: RunFacts) -> None:
    facts.samples = [{"image": "samples/a.png", "question": "What | is it?", "before": "?", "after": "A cat."}]
    without = make_card(facts, "me/mine").text
    assert "The pictures are not published." in without and "a.png" not in without
    with_pictures = make_card(facts, "me/mine", samples_licence="cc-by-4.0").text
    assert (
        "| ![](assets/samples/a.png) | What \\| is it? | ? | A cat. |" in with_pictures and "cc-by-4.0" in with_pictures
    )


def test_an_adapter_says_on_what_it_goes(facts: RunFacts) -> None:
    facts.is_adapter, facts.recipe["model"] = True, {"name_or_path": "llava-hf/llava-1.5-7b-hf"}
    card = make_card(facts, "me/mine")
    data = metadata(card)
    assert data["library_name"] == "peft" and data["base_model_relation"] == "adapter"
    assert (
        'from_pretrained("llava-hf/llava-1.5-7b-hf")' in card.text and "vir-hf merge me/mine --out merged" in card.text
    )


def test_a_projector_of_ours_is_loaded_with_its_code_and_not_promised_to_vllm(facts: RunFacts) -> None:
    facts.model_type = "vir_llava"
    text = make_card(facts, "me/mine").text
    assert "trust_remote_code=True" in text and "vllm serve" not in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("user/model", True),
        ("user/rows.json", False),
        ("/abs/path", False),
        ("a/b/c", False),
        (None, False),
        ("tests", False),
    ],
)
def test_only_what_can_be_a_hub_id_is_taken_for_one(name: str | None, expected: bool) -> None:
    assert is_hub_id(name) is expected


def test_a_folder_here_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("out/run")


def test_the_loss_curve_falls_where_the_loss_falls() -> None:
    picture = Image.open(io.BytesIO(draw_loss_curve([{"step": 0, "loss": 4.0}, {"step": 100, "loss": 1.0}])))
    assert picture.size == (800, 400)
    blue = [
        [y for y in range(400) if picture.getpixel((x, y))[2] - picture.getpixel((x, y))[0] > 100] for x in (80, 760)
    ]
    assert min(blue[0]) < 60 and min(blue[1]) > 240


@pytest.mark.parametrize("history", [[{"step": 1, "loss": 2.0}], [{"step": 1, "loss": 0.0}, {"step": 2, "loss": 0.0}]])
def test_a_curve_of_one_point_or_no_height_is_drawn(history: list[dict]) -> None:
    assert Image.open(io.BytesIO(draw_loss_curve(history))).size == (800, 400)


def test_a_time_is_told_in_its_own_unit() -> None:
    assert [duration(seconds) for seconds in (7, 600, 36000)] == ["7 s", "10 min", "10.0 h"]
