"""Rows that a test is made of: its images under other names, saved again, resized; its questions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from vir_hf import cli
from vir_hf.curation.contamination import find_contamination
from vir_hf.errors import DataError
from vir_hf.images.likeness import look_alike, near_pairs, perceptual_hash, small_copy


def scene(seed: int) -> Image.Image:
    """A drawn picture with large and small shapes, another for each seed."""
    values = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((256, 192), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Six training images; of the test's five, one is a copy, three are made of others, one is new."""
    train, test = tmp_path / "train", tmp_path / "test"
    train.mkdir()
    test.mkdir()
    rows = []
    for number in range(6):
        scene(number).save(train / f"{number}.png")
        talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A scene."}]
        rows.append({"id": f"r{number}", "image": f"{number}.png", "conversations": talk})
    rows[5]["conversations"][0]["value"] = "<image>\nHow many of the small red boats lie in the harbour tonight?"
    (train / "rows.json").write_text(json.dumps(rows))
    (test / "a.png").write_bytes((train / "0.png").read_bytes())
    scene(1).save(test / "b.jpg", quality=40)
    scene(2).resize((80, 60)).save(test / "c.png")
    scene(3).resize((200, 200)).save(test / "d.webp")
    scene(99).save(test / "e.png")
    asked = [
        {"question_id": n, "image": name, "text": "Who?"}
        for n, name in enumerate(("a.png", "b.jpg", "c.png", "d.webp", "e.png"))
    ]
    asked.append({"question_id": 5, "text": "How many of the small blue boats lie in the harbour tonight?"})
    (test / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return tmp_path


def test_images_are_found_by_content_and_by_what_they_show(folders: Path) -> None:
    found = find_contamination(folders / "train" / "rows.json", None, folders / "test" / "test.jsonl", None)
    assert {(one.id, one.kind) for one in found} == {
        ("r0", "test_image"), ("r1", "test_image_alike"), ("r2", "test_image_alike"), ("r3", "test_image_alike"),
        ("r5", "test_question"),
    }  # fmt: skip
    assert "test's row 0 (id '0')" in next(one.detail for one in found if one.id == "r0")


def test_the_check_reports_them_and_fix_leaves_them_out(folders: Path) -> None:
    call = ["data", "check", str(folders / "train" / "rows.json"), "--against", str(folders / "test" / "test.jsonl")]
    fixed = folders / "clean.json"
    assert cli.main([*call, "--json", str(folders / "r.json"), "--fix", str(fixed)]) == 1
    kinds = json.loads((folders / "r.json").read_text())["kinds"]
    assert kinds == {"test_image_alike": 3, "test_image": 1, "test_question": 1}
    assert [row["id"] for row in json.loads(fixed.read_text())] == ["r4", "r5"]


def test_a_test_whose_images_are_not_found_is_no_clean_result(folders: Path) -> None:
    (folders / "other").mkdir()
    with pytest.raises(DataError, match="none of its images can be opened .*--against-image-folder"):
        find_contamination(
            folders / "train" / "rows.json", None, folders / "test" / "test.jsonl", str(folders / "other")
        )


def test_short_and_common_questions_are_no_leak(folders: Path) -> None:
    rows = [{"question_id": 0, "text": "What is it?"}, {"question_id": 1, "text": "Is there a dog in the image?"}]
    (folders / "q.json").write_text(json.dumps(rows))
    talk = [{"from": "human", "value": "Is there a cat in the image?"}, {"from": "gpt", "value": "No."}]
    (folders / "t.json").write_text(json.dumps([{"id": "1", "conversations": talk}]))
    assert find_contamination(folders / "t.json", None, folders / "q.json", None) == []


def test_flat_images_of_other_colours_are_not_alike() -> None:
    red, blue = (small_copy(Image.new("RGB", (50, 40), colour)) for colour in ("red", "blue"))
    assert perceptual_hash(red) == perceptual_hash(blue)  # all that a hash of greys can say
    assert not look_alike(red, blue) and look_alike(red, red)


def test_near_pairs_counts_bits() -> None:
    one, other = np.array([0, 2**64 - 1], dtype=np.uint64), np.array([0b111, 2**63], dtype=np.uint64)
    assert near_pairs(one, other, 3) == [(0, 0), (0, 1)] and near_pairs(one, other, 2) == [(0, 1)]
