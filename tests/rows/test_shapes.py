"""The shapes in which data sets are published, each with the columns it has on the Hub, read as LLaVA rows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vir_hf.errors import DataError
from vir_hf.rows.messages import row_problems, to_messages
from vir_hf.rows.shapes import SHAPES, in_llava_form, shape_of, with_columns

PNG = {"bytes": b"\x89PNG\r\n\x1a\n", "path": None}
LETTER = "Answer with the option's letter from the given choices directly."


def said(row: Any) -> list[tuple[str, str]]:
    """A row's turns as role and text, `<image>` where an image stands."""
    return [
        (m["role"], "".join("<image>" if part["type"] == "image" else part["text"] for part in m["content"]))
        for m in to_messages(row)["messages"]
    ]


ONE = [("user", "<image>What is it?"), ("assistant", "A cat.")]
TWO = [*ONE, ("user", "Sure?"), ("assistant", "Yes.")]
PAIRS = [{"user": "What is it?", "assistant": "A cat."}, {"user": "Sure?", "assistant": "Yes."}]
RATINGS = {f"{name}_{what}": 4 for name in ("relevance", "formatting") for what in ("ratings", "min")}
LLAVA = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
CHAT = [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "A cat."}]


@pytest.mark.parametrize(
    ("name", "row", "turns", "num_images"),
    [
        ("llava", {"id": "1", "image": "a.jpg", "conversations": LLAVA}, ONE, 1),
        # LLaVA-OneVision-Data, LLaVA-NeXT-Data
        ("llava", {"id": "1", "image": PNG, "conversations": LLAVA, "data_source": "ai2d"}, ONE, 1),
        # LLaVA-OneVision-1.5-Instruct: role and content, or messages and images
        ("llava", {"id": "1", "image": PNG, "conversations": CHAT, "data_source": "x"}, ONE, 1),
        ("messages", {"id": "1", "messages": CHAT, "images": ["a.jpg"]}, ONE, 1),
        # Cambrian with system prompts, ShareGPT4V
        (
            "llava",
            {"image": "sam/1.jpg", "conversations": [{"from": "system", "value": "Be brief."}, *LLAVA]},
            [("system", "Be brief."), *ONE],
            1,
        ),
        # mix665k: turns of ShareGPT with keys of their own, rows without an image
        (
            "llava",
            {
                "id": "x",
                "model": "",
                "conversations": [
                    {"from": "human", "value": "Hi", "text": None},
                    {"from": "gpt", "value": "Hello.", "markdown": {"type": "error", "index": 1}},
                ],
            },
            [("user", "Hi"), ("assistant", "Hello.")],
            0,
        ),
        # M4-Instruct: several images
        (
            "llava",
            {
                "sample_id": 3,
                "image": ["a.jpg", "b.jpg"],
                "conversations": [
                    {"from": "human", "value": "Compare <image> with <image>."},
                    {"from": "gpt", "value": "No."},
                ],
                "metadata": {"dataset": "spot"},
            },
            [("user", "Compare <image> with <image>."), ("assistant", "No.")],
            2,
        ),
        # vsft: parts with text and index, all keys in each
        (
            "messages",
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"index": None, "text": "What is it?\n", "type": "text"},
                            {"index": 0, "text": None, "type": "image"},
                        ],
                    },
                    {"role": "assistant", "content": [{"index": None, "text": "A cat.", "type": "text"}]},
                ],
                "images": [PNG],
            },
            ONE,
            1,
        ),
        # OpenAI chat
        (
            "messages",
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "What is it?"},
                            {
                                "type": "image_url",
                                "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"},
                            },
                        ],
                    },
                    {"role": "assistant", "content": "A cat."},
                ]
            },
            ONE,
            1,
        ),
        ("finevision", {"images": [PNG], "texts": PAIRS, "source": "ai2d", **RATINGS}, TWO, 1),
        ("finevision", {"images": [PNG], "texts": [{**pair, "source": "x"} for pair in PAIRS]}, TWO, 1),  # the_cauldron
        (
            "finevision",
            {"images": [PNG, PNG], "texts": PAIRS[:1]},  # Docmatix: pages
            [("user", "<image><image>What is it?"), ("assistant", "A cat.")],
            2,
        ),
        ("finevision", {"images": [], "texts": PAIRS[:1]}, [("user", "What is it?"), ("assistant", "A cat.")], 0),
        # TIGER-Lab
        ("conversation", {"images": [PNG], "conversation": CHAT, "source": "x"}, ONE, 1),
        ("conversation", {"image": "a.jpg", "conversation": PAIRS}, TWO, 1),
        ("prompt_completion", {"images": [PNG], "prompt": "What is it?", "completion": "A cat."}, ONE, 1),
        (
            "prompt_completion",
            {"images": [PNG], "prompt": CHAT[:1], "completion": CHAT[1:]},
            ONE,
            1,
        ),
        ("vqa", {"image": PNG, "question": "What is it?", "answer": "A cat."}, ONE, 1),
        ("vqa", {"image": PNG, "question": "What is it?", "answers": ["A dog.", "A cat.", "A cat."]}, ONE, 1),
        ("vqa", {"image": PNG, "query": "What is it?", "label": ["A cat."], "human_or_machine": 0}, ONE, 1),
        (
            "vqa",
            {
                "image": PNG,
                "question": "What is it?",
                "multiple_choice_answer": "A cat.",
                "answers": [{"answer": "A cat."}],
            },
            ONE,
            1,
        ),
        ("caption", {"image": "a.jpg", "caption": "A cat."}, [("user", "<image>"), ("assistant", "A cat.")], 1),
        ("webdataset", {"__key__": "000", "__url__": "x.tar", "jpg": PNG, "json": {"conversations": LLAVA}}, ONE, 1),
        (
            "webdataset",
            {"__key__": "000", "jpg": PNG, "json": {"question": "What is it?", "answer": "A cat.", "image": "old.jpg"}},
            ONE,
            1,
        ),
        (
            "webdataset",
            {"__key__": "a", "png": PNG, "txt": "A cat."},
            [("user", "<image>"), ("assistant", "A cat.")],
            1,
        ),
    ],
)
def test_published_shapes_are_read_with_nothing_lost(
    name: str, row: dict, turns: list[tuple[str, str]], num_images: int
) -> None:
    assert shape_of(row) == name
    before = json.dumps(row, default=repr)
    assert said(row) == turns
    assert json.dumps(row, default=repr) == before, "the row is the caller's"
    assert len(to_messages(row)["images"]) == num_images
    assert [kind for kind, _ in row_problems(row)] == []
    again = to_messages(row)
    assert to_messages(again) == again


def test_every_shape_of_the_registry_is_among_those_tried() -> None:
    tried = {
        mark.args[1][n][0]
        for mark in test_published_shapes_are_read_with_nothing_lost.pytestmark
        for n in range(len(mark.args[1]))
    }
    assert tried == set(SHAPES)


def test_the_answers_of_a_prompt_are_not_learned() -> None:
    row = {"prompt": [*CHAT, {"role": "user", "content": "Sure?"}], "completion": "Yes.", "image": "a.jpg"}
    marks = [m.get("supervised", True) for m in to_messages(row)["messages"] if m["role"] == "assistant"]
    assert marks == [False, True]


class TestChoices:
    def asked(self, **columns: Any) -> list[tuple[str, str]]:
        return said({"image": "a.jpg", "question": "What is it?", **columns})

    @pytest.mark.parametrize(
        "columns",
        [
            {"choices": ["dog", "cat"], "answer": 1},  # ScienceQA
            {"options": ["dog", "cat"], "answer": "1"},  # AI2D
            {"options": "['dog', 'cat']", "answer": "B"},  # MMMU
            {"A": "dog", "B": "cat", "C": None, "D": "", "answer": "B"},  # MMBench
            {"choices": ["dog", "cat"], "correct_choice_idx": 1, "direct_answers": "['cat', 'cats']"},  # A-OKVQA
            {"choices": {"label": ["A", "B"], "text": ["dog", "cat"]}, "answer": "(B)"},
            {"choices": ["dog", "cat"], "answer": "cat"},
        ],
    )
    def test_the_letter_is_learned_however_the_answer_is_named(self, columns: dict) -> None:
        assert self.asked(**columns) == [
            ("user", f"<image>What is it?\nA. dog\nB. cat\n{LETTER}"),
            ("assistant", "B"),
        ]

    def test_a_hint_comes_before_the_question(self) -> None:
        assert self.asked(hint="It barks.", choices=["dog", "cat"], answer=0)[0][1].startswith("<image>It barks.\nWhat")

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"choices": ["1", "2", "3"], "answer": "2"}, "may be B or C"),
            ({"choices": ["dog", "cat"], "answer": "cow"}, "none of the choices"),
            ({"choices": ["dog", "cat"], "answer": 2}, "one of 2 choices"),
            ({"choices": ["dog", "cat"], "answer": -1}, "one of 2 choices"),
            ({"choices": "dog, cat", "answer": "cat"}, "must be a list of choices"),
        ],
    )
    def test_what_names_no_choice_or_two_is_an_error(self, columns: dict, message: str) -> None:
        with pytest.raises(DataError, match=message):
            self.asked(**columns)

    def test_an_answer_that_counts_is_said_to_by_its_column(self) -> None:
        row = {"image": "a", "question": "?", "choices": ["1", "2", "3"], "answer": "2"}
        assert said(with_columns(row, {"answer_index": "answer"}))[1] == ("assistant", "C")


def test_numbered_images_stand_where_the_text_names_them() -> None:
    row = {
        "image_1": "a.png",
        "image_2": "b.png",
        "image_3": None,
        "question": "Is <image 2> left of <image 1>?",
        "answer": "No",
    }
    assert said(row)[0] == ("user", "Is <image> left of <image>?")
    assert to_messages(row)["images"] == ["b.png", "a.png"]
    row["question"] = "Which is <image 2>?"
    assert said(row)[0] == ("user", "<image>Which is <image>?") and to_messages(row)["images"] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "a", "text": "A cat."}, r"Is 'text' a caption\? Then set data.format=caption"),
        (
            {"image": "a", "question": "?", "caption": "A cat."},
            "could be vqa or caption; say which with data.format=vqa",
        ),
        ({"image": "a", "question": "?", "query": "!", "answer": "x"}, "'question' and 'query', and they differ"),
        (
            {"image": "a", "question": "?", "answer": "x", "answers": ["y", "z"]},
            "'answer' and 'answers', and they differ",
        ),
        ({"image": "a", "question": {"en": "?", "de": "?"}, "answers": ["y"]}, "such as question.en"),
        ({"images": ["a"], "prompt": "p", "chosen": "c", "rejected": "r"}, "Preferences are not learned"),
        ({"video": "a.mp4", "question": "?", "answer": "x"}, "'video'"),
        ({"video": "a.mp4", "conversations": LLAVA}, "'video'"),
        ({"image": "a", "conversations": "not json"}, "must be a list of turns, or its JSON text"),
        ({"images": ["a"], "texts": [{"user": "?", "assistant": None}]}, "entry 1 the assistant null"),
        ({"image": "a", "captions": ["one", "two"]}, "2 captions; a row has one"),
        ({"a": 1}, r"Say with data.columns which column is what"),
    ],
)
def test_what_could_mean_two_things_is_named_with_what_to_set(row: dict, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        to_messages(row)
    assert len(str(error.value)) <= 500


def test_a_format_can_be_forced_and_columns_named() -> None:
    row = {"image": "a.jpg", "text": "A cat."}
    assert said(in_llava_form(row, "caption")[1]) == [("user", "<image>"), ("assistant", "A cat.")]
    mapped = with_columns(
        {"image": "a", "problem": {"en": "What is it?"}, "solution": "A cat."},
        {"question": "problem.en", "answer": "solution"},
    )
    assert said(mapped) == ONE
    both = {"image": "a", "question": "What is it?", "answer": "A cat.", "caption": "C"}
    assert said(in_llava_form(both, "vqa")[1]) == ONE
    with pytest.raises(DataError, match="data.format is vqa, and the row has no 'question' or 'query', only"):
        in_llava_form(row, "vqa")


def test_what_a_shape_does_not_read_is_reported_like_any_key() -> None:
    row = {"image": "a", "question": "?", "answer": "x", "reasoning_content": "Because."}
    assert [kind for kind, _ in row_problems(row)] == ["not_read"]
