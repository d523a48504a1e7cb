"""Batches: what is in them, what is shared, and what happens to rows that cannot be used."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from vir_hf import DataError, LlavaDataCollator, build, encode_row, load_llava_dataset
from vir_hf.batches import collator
from vir_hf.rows import encoding as conversations


@pytest.fixture(scope="module")
def parts(tiny_parts: Path):
    torch.manual_seed(0)
    model, processor = build(str(tiny_parts / "lm"), str(tiny_parts / "tower"), "vicuna_v1")
    rows = list(load_llava_dataset(tiny_parts / "rows.json", tiny_parts / "images", decode_images=False))
    return model, processor, rows


def image_row(path: Path, name: str, question: str = "What?", answer: str = "It is.") -> dict:
    turns = [
        ("user", [{"type": "image"}, {"type": "text", "text": question}]),
        ("assistant", [{"type": "text", "text": answer}]),
    ]
    return {
        "id": name,
        "images": [{"path": str(path), "bytes": None}],
        "messages": [{"role": role, "content": content} for role, content in turns],
    }


def test_a_packed_batch_holds_the_encoded_rows(parts) -> None:
    _, processor, rows = parts
    batch = LlavaDataCollator(processor, share_prefixes=False)(rows[:3])
    start = 0
    for row, length in zip(rows[:3], batch["segment_lengths"].tolist(), strict=True):
        encoding = encode_row(row, processor)
        assert batch["input_ids"][0, start : start + length].tolist() == encoding["input_ids"]
        assert batch["labels"][0, start : start + length].tolist() == encoding["labels"]
        assert batch["position_ids"][0, start : start + length].tolist() == list(range(length))
        start += length
    assert batch["segment_prefixes"].tolist() == [-1, -1, -1]
    assert "attention_mask" not in batch


def test_no_segment_begins_with_a_label(parts) -> None:
    _, processor, rows = parts
    for share in (False, True):
        batch = LlavaDataCollator(processor, share_prefixes=share)(rows)
        starts = torch.cat([torch.zeros(1, dtype=torch.long), batch["segment_lengths"].cumsum(0)[:-1]])
        assert (batch["labels"][0, starts] == -100).all()


def test_sharing_keeps_every_supervised_token_once_a_row(parts) -> None:
    _, processor, rows = parts
    plain = LlavaDataCollator(processor, share_prefixes=False)(rows)
    shared = LlavaDataCollator(processor)(rows)
    assert shared["input_ids"].numel() < plain["input_ids"].numel()
    assert sorted(shared["labels"][shared["labels"] != -100]) == sorted(plain["labels"][plain["labels"] != -100])
    assert len(shared["pixel_values"]) == len(plain["pixel_values"]) == 6  # each distinct picture once, either way
    num_image_tokens = (shared["input_ids"] == processor.image_token_id).sum()
    assert num_image_tokens == len(shared["image_indices"]) * processor.num_image_tokens


def test_the_prefix_reaches_into_the_text_that_rows_share(parts, tmp_path: Path) -> None:
    _, processor, _ = parts
    path = tmp_path / "a.png"
    Image.new("RGB", (30, 30), "red").save(path)
    rows = [image_row(path, "1", "What is it?", "It is red."), image_row(path, "2", "What is it?", "A square.")]
    batch = LlavaDataCollator(processor)(rows)
    prefix, first, second = batch["segment_lengths"].tolist()
    question = len(encode_row(rows[0], processor)["input_ids"]) - first
    assert prefix == question  # all but the token that predicts the first answer token
    supervised = [label != -100 for label in encode_row(rows[0], processor)["labels"]]
    assert supervised.index(True) == prefix + 1
    assert batch["segment_prefixes"].tolist() == [-1, 0, 0] and second > 1


def test_rows_about_different_pictures_share_nothing(parts, tmp_path: Path) -> None:
    _, processor, _ = parts
    for name in ("a", "b"):
        Image.new("RGB", (30, 30), "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
    batch = LlavaDataCollator(processor)([image_row(tmp_path / "a.png", "1"), image_row(tmp_path / "b.png", "2")])
    assert batch["segment_prefixes"].tolist() == [-1, -1] and batch["image_indices"].tolist() == [0, 1]


def test_sharing_stops_before_a_second_picture_that_differs(parts, tmp_path: Path) -> None:
    _, processor, _ = parts
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        Image.new("RGB", (30, 30), colour).save(tmp_path / f"{name}.png")
    rows = []
    for number, second in enumerate("bc"):
        row = image_row(tmp_path / "a.png", str(number))
        row["images"].append({"path": str(tmp_path / f"{second}.png"), "bytes": None})
        row["messages"][0]["content"].insert(1, {"type": "image"})
        rows.append(row)
    batch = LlavaDataCollator(processor)(rows)
    assert batch["image_indices"].tolist() == [0, 1, 2]
    prefix = batch["input_ids"][0, : batch["segment_lengths"][0]]
    assert (prefix == processor.image_token_id).sum() == processor.num_image_tokens


def test_equal_pictures_opened_twice_are_one(parts, tmp_path: Path) -> None:
    _, processor, _ = parts
    picture = Image.new("RGB", (30, 30), "red")
    rows = [image_row(tmp_path / "none.png", str(number)) | {"images": [picture.copy()]} for number in range(2)]
    batch = LlavaDataCollator(processor)(rows)
    assert len(batch["pixel_values"]) == 1 and batch["segment_prefixes"].tolist() == [-1, 0, 0]


@pytest.mark.parametrize("padding_free", [True, False])
def test_a_broken_picture_raises_with_its_row_or_masks_it(parts, tmp_path: Path, padding_free: bool) -> None:
    _, processor, rows = parts
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    bad = image_row(tmp_path / "broken.png", "the-bad-one")
    with pytest.raises(DataError, match=r"the-bad-one.*data\.on_bad_image=skip"):
        LlavaDataCollator(processor, padding_free=padding_free)([rows[0], bad])
    collator = LlavaDataCollator(processor, padding_free=padding_free, on_bad_image="skip", with_row_ids=True)
    batch = collator([rows[0], bad])
    assert [row["id"] for row in batch["masked_rows"]] == ["the-bad-one"]
    assert "broken.png" in batch["masked_rows"][0]["reason"]
    assert set(batch["row_ids"]) == {"row-0", "the-bad-one"}
    good = collator([rows[0]])
    assert (batch["labels"] != -100).sum() == (good["labels"] != -100).sum()


def test_truncation_drops_turns_and_their_pictures(parts, tmp_path: Path) -> None:
    _, processor, rows = parts
    whole = LlavaDataCollator(processor, max_length=None)([rows[0]])
    cut = LlavaDataCollator(processor, max_length=whole["input_ids"].numel() - 1)([rows[0]])
    assert 0 < (cut["labels"] != -100).sum() < (whole["labels"] != -100).sum()
    num_spans = (cut["input_ids"] == processor.image_token_id).sum() // processor.num_image_tokens
    assert num_spans == len(cut["image_indices"])


def test_an_unmodified_trl_trainer_trains_with_it(parts, tiny_parts: Path, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    model, processor = build(str(tiny_parts / "lm"), str(tiny_parts / "tower"), "vicuna_v1")
    losses = []
    for share in (True, False):
        torch.manual_seed(0)
        model, processor = build(str(tiny_parts / "lm"), str(tiny_parts / "tower"), "vicuna_v1")
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                str(tmp_path),
                max_steps=3,
                per_device_train_batch_size=4,
                learning_rate=1e-1,
                optim="sgd",  # Adam turns the rounding of a small gradient into a whole step
                report_to="none",
                save_strategy="no",
                use_cpu=True,
                max_length=None,
                logging_steps=1,
                disable_tqdm=True,
                activation_checkpointing=True,
            ),
            train_dataset=load_llava_dataset(tiny_parts / "rows.json", tiny_parts / "images"),
            data_collator=LlavaDataCollator(processor, padding_free=share, share_prefixes=share),
            processing_class=processor,
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]


def test_an_unmodified_transformers_trainer_trains_with_it(parts, tiny_parts: Path, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model, processor = build(str(tiny_parts / "lm"), str(tiny_parts / "tower"), "vicuna_v1")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            logging_steps=1,
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=load_llava_dataset(tiny_parts / "rows.json", tiny_parts / "images"),
        data_collator=LlavaDataCollator(processor),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("name", [None, "0001.png"])
def test_embedded_pictures_are_told_apart_by_content_whatever_they_are_called(parts, tmp_path: Path, name) -> None:
    _, processor, _ = parts
    rows = [image_row(tmp_path, str(number)) for number in range(4)]
    for row, colour in zip(rows, ["red", "blue", "red", "green"], strict=True):
        row["images"] = [{"bytes": png(colour), "path": name}]
    batch = LlavaDataCollator(processor)(rows)
    preprocess = LlavaDataCollator(processor).preprocess
    expected = [preprocess({"bytes": png(colour), "path": None}) for colour in ("red", "blue", "green")]
    assert torch.equal(batch["pixel_values"], torch.stack(expected))
    # The two red rows share their beginning, and with it the picture; the others stand alone.
    assert batch["image_indices"].tolist() == [0, 1, 2]
    padded = LlavaDataCollator(processor, padding_free=False)(rows)
    assert padded["image_indices"].tolist() == [0, 1, 0, 2] and len(padded["pixel_values"]) == 3


def test_one_file_under_two_names_is_one_picture(parts, tmp_path: Path) -> None:
    _, processor, _ = parts
    (tmp_path / "a.png").write_bytes(png("red"))
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    names = [tmp_path / "a.png", tmp_path / "link.png", f"{tmp_path}/./a.png"]
    batch = LlavaDataCollator(processor, padding_free=False)([image_row(name, "row") for name in names])
    assert len(batch["pixel_values"]) == 1 and batch["image_indices"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("padding_free", [True, False])
def test_a_picture_that_comes_twice_in_a_row_counts_as_two_of_the_same_content(parts, tmp_path, padding_free) -> None:
    model, processor, _ = parts
    for name in ("a.png", "copy.png", "b.png"):
        (tmp_path / name).write_bytes(png("blue" if name == "b.png" else "red"))

    def rows_with(second: str) -> list[dict]:
        rows = []
        for number, first_answer in enumerate(["It is.", "No."]):
            row = image_row(tmp_path / "a.png", str(number), answer=first_answer)
            row["images"].append({"path": str(tmp_path / second), "bytes": None})
            row["messages"][0]["content"].insert(1, {"type": "image"})
            rows.append(row)
        return rows

    collator = LlavaDataCollator(processor, padding_free=padding_free)
    losses = []
    for second in ("a.png", "copy.png", "b.png"):
        batch = collator(rows_with(second))
        assert len(batch["pixel_values"]) == (1 if second == "a.png" else 2)
        with torch.no_grad():
            losses.append(float(model(**batch).loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] != pytest.approx(losses[2], rel=1e-5)


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("num_given", [0, 2])
def test_image_tokens_never_leave_without_their_images(
    parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, padding_free: bool, num_given: int
) -> None:
    _, processor, _ = parts
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    row = image_row(tmp_path / "a.png", "row-7")
    encoded, images = conversations.encode_with_images(row, processor)
    monkeypatch.setattr(collator, "encode_with_images", lambda *_, **__: (encoded, images * num_given))
    tokens = processor.num_image_tokens
    with pytest.raises(
        DataError, match=rf"row 'row-7': {tokens} image tokens for {num_given} images of {tokens} tokens"
    ):
        LlavaDataCollator(processor, padding_free=padding_free)([row])


def test_text_that_spells_the_image_token_fills_no_image(parts, tmp_path: Path) -> None:
    _, processor, _ = parts
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    row = image_row(tmp_path / "a.png", "a", answer=f"{processor.image_token} is a word")
    batch = LlavaDataCollator(processor)([row])
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == processor.num_image_tokens
    assert len(batch["pixel_values"]) == 1
