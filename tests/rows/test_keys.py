"""What every key of a row, a turn and a part means: read, refused or reported, and the same for every reader of rows."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_encoding as texts
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vir_hf.curation.checks import check_data
from vir_hf.curation.inspection import InspectedRow
from vir_hf.data.located import BadRow, BadRowPolicy, _ordinary_row, normalise_row
from vir_hf.data.statistics import _row_length
from vir_hf.errors import MAX_MESSAGE, DataError
from vir_hf.images.folder import ImageFolder
from vir_hf.images.identity import picture_identity
from vir_hf.images.opening import open_image
from vir_hf.inference import Answerer, Question
from vir_hf.rows.encoding import IGNORE, encode_prompt, encode_row, supervised_spans
from vir_hf.rows.keys import unread_keys
from vir_hf.rows.messages import FATAL_KINDS, examine, row_problems, to_messages
from vir_hf.using.questions import question_messages


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), colour).save(file, "PNG")
    return file.getvalue()


PNG = png()
BASE64 = base64.b64encode(PNG).decode()
DATA_URI = f"data:image/png;base64,{BASE64}"


def row(question: str = "<image>\nWhat?", answer: str = "Red.", **keys: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **keys}


def marked(**mark: Any) -> dict[str, Any]:
    """Two exchanges, the first answer with a mark."""
    first = {"from": "gpt", "value": "Blue.", **mark}
    turns = [{"from": "human", "value": "What?"}, first, {"from": "human", "value": "Sure?"}]
    return {"conversations": [*turns, {"from": "gpt", "value": "It is red."}]}


IMAGE_KEYS = [
    "image", "images", "Image", "IMAGES", "image_path", "image_file", "image_url", "imageUrl", "image-path", "image_bytes",
    "image_base64", "img", "img_path", "pictures", "photo",
]  # fmt: skip


class TestKeysOfARow:
    @pytest.mark.parametrize("key", IMAGE_KEYS)
    @pytest.mark.parametrize("value", ["a.png", ["a.png"], DATA_URI, BASE64, PNG, {"bytes": PNG}, {"url": DATA_URI}])
    def test_an_image_under_any_usual_name_is_the_rows_image(self, key: str, value: Any) -> None:
        found = to_messages(row(**{key: value}))["images"]
        (image,) = found
        assert image == "a.png" if value in ("a.png", ["a.png"]) else image["bytes"] == PNG
        assert list(row_problems(row(**{key: value}))) == []

    def test_a_further_name_beside_image_is_not_read(self) -> None:
        given_row = row(image="a.png", image_url="https://example.org/b.png")
        assert to_messages(given_row)["images"] == ["a.png"]
        assert ("image_url", False) in list(unread_keys(given_row))

    @pytest.mark.parametrize(
        "more",
        [{"images": ["b.png"]}, {"images": ["a.png", "b.png"]}, {"Image": "b.png"}, {"images": [{"bytes": PNG}]}],
    )
    def test_two_names_of_the_image_must_agree(self, more: dict[str, Any]) -> None:
        with pytest.raises(DataError, match="and they differ"):
            to_messages(row(image="a.png", **more))

    @pytest.mark.parametrize(
        "other", ["a.png", "./a.png", "x/../a.png", {"path": "a.png"}, {"path": "a.png", "bytes": None}]
    )
    def test_one_image_in_two_spellings_is_one(self, other: Any) -> None:
        assert to_messages(row(image="a.png", images=[other]))["images"]

    def test_embedded_images_are_compared_by_content(self) -> None:
        one = {"bytes": PNG, "path": "0001.png"}
        assert to_messages(row(image=one, images=[{"bytes": PNG, "path": "other.png"}]))["images"] == [one]
        with pytest.raises(DataError, match="and they differ"):
            to_messages(row(image=one, images=[{"bytes": png("blue"), "path": "0001.png"}]))

    @pytest.mark.parametrize("key", ["system", "system_prompt", "System"])
    def test_a_system_prompt_is_a_system_turn(self, key: str) -> None:
        first = to_messages(row("What?", **{key: "Be brief."}))["messages"][0]
        assert first == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}

    def test_a_system_prompt_that_is_said_twice_must_agree(self) -> None:
        turns = [{"from": "system", "value": "Be brief."}, *row("What?")["conversations"]]
        assert len(to_messages({"conversations": turns, "system": "Be brief."})["messages"]) == 3
        with pytest.raises(DataError, match="more than once"):
            to_messages({"conversations": turns, "system": "Be long."})
        with pytest.raises(DataError, match="must be the text of a system prompt"):
            to_messages(row("What?", system={"a": 1}))

    @pytest.mark.parametrize("key", ["video", "videos", "audio", "video_path", "sound", "speech", "Video", "audio_url"])
    def test_videos_and_sounds_are_refused(self, key: str) -> None:
        assert next(iter(row_problems(row("What?", **{key: "a.mp4"}))))[0] == "not_an_image"
        assert not list(row_problems(row("What?", **{key: None})))

    @pytest.mark.parametrize(
        "key", ["reasoning_content", "tools", "tool_calls", "chosen", "rejected", "mask", "loss", "weight"]
    )
    def test_what_a_model_could_learn_from_is_reported(self, key: str) -> None:
        assert ("not_read", f"{key} is not read") in list(row_problems(row("What?", **{key: "x"})))

    @pytest.mark.parametrize("key", ["source", "score", "dataset", "difficulty", "model"])
    def test_a_label_of_the_row_is_nothing_unusual(self, key: str) -> None:
        assert not list(row_problems(row("What?", **{key: "x"})))
        assert list(unread_keys(row("What?", **{key: "x"}))) == [(key, False)]

    def test_a_value_that_names_an_image_under_an_unknown_key_is_reported(self) -> None:
        assert ("not_read", "scene is not read") in list(row_problems(row("What?", scene="a.png")))
        assert not list(row_problems(row(image="b.png", scene="a.png")))

    def test_both_conversations_must_agree(self) -> None:
        same = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Red."}]
        assert to_messages(row("What?", messages=same))["messages"]
        with pytest.raises(DataError, match="'messages' and 'conversations', and they differ"):
            to_messages(row("What?", messages=[same[0], {"role": "assistant", "content": "Blue."}]))


class TestKeysOfATurn:
    @pytest.mark.parametrize("key", ["loss", "weight", "train", "supervised"])
    @pytest.mark.parametrize("value", [False, 0, 0.0, True, 1, 1.0, None])
    def test_a_marked_answer_is_learned_or_has_no_label(self, key: str, value: Any) -> None:
        processor = texts.tiny("bytes_with_turns", "chatml")
        encoded = encode_row(marked(**{key: value}), processor)
        is_learned = value is None or bool(value)
        assert texts.learned_texts(encoded, processor) == ["Blue.<|im_end|>"] * is_learned + ["It is red.<|im_end|>"]
        unmarked = encode_row(marked(), processor)
        assert encoded["input_ids"] == unmarked["input_ids"]
        if not is_learned:
            start, end = supervised_spans(unmarked)[0]
            assert set(encoded["labels"][start:end]) == {IGNORE}

    @pytest.mark.parametrize("value", [0.5, 2, -1, "0", "false", [0]])
    def test_an_answer_is_learned_or_not_and_nothing_between(self, value: Any) -> None:
        with pytest.raises(DataError, match="an answer is learned .1, true. or not"):
            to_messages(marked(weight=value))

    def test_marks_that_disagree_are_refused(self) -> None:
        with pytest.raises(DataError, match="is to be learned by 'train' and not by 'loss'"):
            to_messages(marked(loss=0, train=True))
        turns = [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a", "loss": 0},
            {"from": "gpt", "value": "b"},
        ]
        with pytest.raises(DataError, match="are one answer, and only one of them"):
            to_messages({"conversations": turns})

    def test_a_row_of_which_nothing_is_learned_is_refused(self) -> None:
        given_row = row("What?")
        given_row["conversations"][1]["loss"] = False
        with pytest.raises(DataError, match="every answer is marked as not to be learned"):
            encode_row(given_row, texts.tiny("bytes", "vicuna_v1"))
        assert normalise_row(given_row, None, "f", 3).kind == "nothing_supervised"

    def test_a_mark_on_a_question_is_reported_if_it_asks_to_learn_it(self) -> None:
        for value, expected in ((1, ["turn.loss is not read"]), (0, []), (False, [])):
            given_row = row("What?")
            given_row["conversations"][0]["loss"] = value
            assert [detail for kind, detail in row_problems(given_row) if kind == "not_read"] == expected

    @pytest.mark.parametrize(
        ("key", "kind"),
        [("image", "bad_row"), ("image_url", "bad_row"), ("video", "not_an_image"), ("audio", "not_an_image")],
    )
    def test_an_image_of_a_turn_is_refused(self, key: str, kind: str) -> None:
        given_row = row("What?")
        given_row["conversations"][0][key] = "a.png"
        assert next(iter(row_problems(given_row)))[0] == kind

    @pytest.mark.parametrize("key", ["reasoning_content", "thinking", "tool_calls", "mask"])
    def test_what_a_turn_could_teach_is_reported(self, key: str) -> None:
        given_row = row("What?")
        given_row["conversations"][1][key] = "so"
        assert ("not_read", f"turn.{key} is not read") in list(row_problems(given_row))

    def test_two_names_of_speaker_or_text_must_agree(self) -> None:
        turn = {"from": "human", "role": "user", "value": "q", "content": "q"}
        answer = {"from": "gpt", "value": "a"}
        assert to_messages({"conversations": [turn, answer]})["messages"][0]["content"][0]["text"] == "q"
        for more in ({"role": "assistant"}, {"content": "p"}):
            with pytest.raises(DataError, match="and they differ"):
                to_messages({"conversations": [{**turn, **more}, answer]})


def of_parts(*parts: dict[str, Any], **keys: Any) -> dict[str, Any]:
    asked = {"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}
    return {"messages": [asked, {"role": "assistant", "content": "Red."}], **keys}


class TestKeysOfAPart:
    @pytest.mark.parametrize("kind", ["image", "image_url", "input_image"])
    @pytest.mark.parametrize("key", ["image", "image_url", "path", "url", "file", "source", "data", "base64", "bytes"])
    @pytest.mark.parametrize("value", [DATA_URI, {"url": DATA_URI}, BASE64])
    def test_a_part_brings_its_own_image(self, kind: str, key: str, value: Any) -> None:
        assert to_messages(of_parts({"type": kind, key: value}))["images"] == [{"bytes": PNG, "path": None}]

    def test_a_part_that_names_another_image_than_the_row_is_refused(self) -> None:
        assert to_messages(of_parts({"type": "image", "image": "./a.png"}, images=["a.png"]))["images"] == ["a.png"]
        with pytest.raises(DataError, match="a part names the image 'b.png', and the row 'a.png' in its place"):
            to_messages(of_parts({"type": "image", "image": "b.png"}, images=["a.png"]))
        with pytest.raises(DataError, match="an image part names several images"):
            to_messages(of_parts({"type": "image", "image": "b.png", "url": "c.png"}))

    def test_an_index_says_which_image_of_the_row_is_meant(self) -> None:
        parts = [{"type": "image", "index": 1}, {"type": "image", "index": 0}]
        assert to_messages(of_parts(*parts, images=["a.png", "b.png"]))["images"] == ["b.png", "a.png"]
        for wrong in (0, 2, "1"):
            with pytest.raises(DataError, match="the image parts have the indices"):
                to_messages(of_parts({"type": "image", "index": wrong}, parts[1], images=["a.png", "b.png"]))

    @pytest.mark.parametrize("kind", ["video", "audio", "input_audio"])
    def test_a_part_of_another_medium_is_refused(self, kind: str) -> None:
        assert next(iter(row_problems(of_parts({"type": kind, kind: "a"}))))[0] == "not_an_image"

    def test_a_text_part_with_an_image_in_it_is_refused(self) -> None:
        with pytest.raises(DataError, match="has a text part with an image in it"):
            to_messages(of_parts({"type": "text", "text": "a", "image": "a.png"}))


class TestDataUris:
    @pytest.mark.parametrize(
        ("uri", "message"),
        [
            ("data:video/mp4;base64,AAAA", "of type video/mp4; expected an image"),
            ("data:text/plain,hello", "of type text/plain; expected an image"),
            ("data:image/png;base64,@@@@", "whose base64 text cannot be decoded"),
        ],
    )
    def test_what_holds_no_image_is_refused(self, uri: str, message: str) -> None:
        with pytest.raises(DataError, match=message):
            to_messages(row(image=uri))

    def test_any_way_of_writing_one_is_read(self) -> None:
        percent = "data:image/png;charset=utf-8;base64," + BASE64.replace("+", "%2B").replace("/", "%2F")
        url_safe = "data:image/png;base64," + BASE64.replace("+", "-").replace("/", "_").rstrip("=")
        for uri in (DATA_URI, DATA_URI.upper()[:5] + DATA_URI[5:], percent, url_safe, f"data:;base64,{BASE64}"):
            assert to_messages(row(image=uri))["images"] == [{"bytes": PNG, "path": None}]


# (1) Any row, read by training and by inference.


@st.composite
def any_rows(draw: Callable[..., Any]) -> dict[str, Any]:
    """Rows of `texts.conversations` in every way of writing them, some of their answers not to be learned."""
    drawn = draw(texts.conversations())
    if draw(st.booleans()):
        drawn["conversations"].insert(0, {"from": "system", "value": draw(st.sampled_from(["", "Be brief.", " "]))})
    if draw(st.booleans()):
        drawn = to_messages(drawn)
    answers = [turn for turn in drawn.get("conversations", ()) if turn["from"] == "gpt"]
    if len(answers) > 1 and draw(st.booleans()):
        answers[0]["loss"] = 0
    return drawn


def encoder(processor: Any) -> Answerer:
    """An `Answerer` that encodes and has no model; images stay what they are."""
    answerer: Any = object.__new__(Answerer)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    answerer.processor, answerer.model, answerer._preprocess = (
        processor,
        SimpleNamespace(config=config),
        lambda image: image,
    )
    return answerer


@pytest.mark.parametrize("template", ["vicuna_v1", "chatml", "llama_2", "llama_3", "auto"])
@pytest.mark.parametrize("kind", ["bytes_with_turns", "metaspace"])
@given(drawn=any_rows())
@texts.FAST
def test_inference_sends_what_training_reads_before_each_answer(
    kind: str, template: str, drawn: dict[str, Any]
) -> None:
    processor = texts.tiny(kind, template)
    try:
        normal = to_messages(drawn)
        encoded = encode_row(drawn, processor)
    except DataError as error:  # marks of answers that are joined, or nothing left to learn
        assert "learned" in str(error)
        return
    messages, starts = normal["messages"], {start for start, _ in supervised_spans(encoded)}
    for number in range(1, len(messages)):
        if messages[number]["role"] != "assistant" or messages[number - 1]["role"] != "user":
            continue
        asked = messages[:number]
        num_images = sum(part["type"] == "image" for message in asked for part in message["content"])
        question = Question.of_messages(asked, normal["images"][:num_images])
        if not question.text.strip() and not question.images:
            continue  # inference refuses to ask nothing
        prompt = encoder(processor).encode(question)
        assert prompt.input_ids == encode_prompt(
            {"messages": asked, "images": normal["images"][:num_images]}, processor
        )
        assert prompt.pixel_values == normal["images"][:num_images]
        assert encoded["input_ids"][: len(prompt.input_ids)] == prompt.input_ids
        has_text = bool(messages[number]["content"][0]["text"])
        assert (len(prompt.input_ids) in starts) == (has_text and messages[number].get("supervised", True))


# (2) Every reader of rows says the same.

values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.sampled_from(
        ["", "a.png", "b.jpg", DATA_URI, BASE64, "x" * 10_000, "<image>", "data:image/png;base64,@", "a.mp4"]
    ),
    st.text(max_size=8),
    st.binary(max_size=8),
    st.sampled_from([PNG, b"\xff\xd8\xff" * 4000]),
)
junk = st.recursive(
    values,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
keys = st.sampled_from(
    [
        "id",
        "image",
        "images",
        "Image",
        "img",
        "image_url",
        "system",
        "video",
        "audio",
        "loss",
        "tools",
        "source",
        "messages",
    ]
) | st.text(max_size=12)


@st.composite
def plain_rows(draw: Callable[..., Any]) -> dict[str, Any]:
    """Rows that are ordinary or nearly so, in the words on which the fast reader decides."""
    words = st.sampled_from(
        [
            "What?",
            "<image>",
            "<image>\nWhat?",
            "What <image> is?",
            " a ",
            "",
            " ",
            "<video>",
            "a <audio>",
            "<image><image>",
            "\u2003",
        ]
    )
    turns = []
    for number in range(draw(st.integers(0, 5))):
        speaker = "gpt" if number % 2 else "human"
        turn = {"from": speaker if draw(st.integers(0, 9)) else draw(st.sampled_from(["user", "system", "gpt"]))}
        turn["value"] = draw(words) if draw(st.integers(0, 9)) else draw(junk)
        if not draw(st.integers(0, 9)):
            turn[draw(st.sampled_from(["loss", "role", "reasoning", "image", "x"]))] = draw(junk)
        turns.append(turn)
    drawn: dict[str, Any] = {"conversations": turns}
    if draw(st.booleans()):
        drawn["image"] = draw(st.sampled_from(["a.png", "", None, DATA_URI, BASE64, ["a.png"], "data:x"]))
    for _ in range(draw(st.integers(0, 2))):
        drawn[draw(keys)] = draw(junk)
    return drawn


@given(plain_rows())
@settings(max_examples=600, deadline=None)
def test_the_fast_reader_says_what_to_messages_says(drawn: dict[str, Any]) -> None:
    fast = _ordinary_row(drawn)
    if fast is None:
        return
    problems, normal = examine(drawn)
    assert problems == []
    assert normal == {**fast, "id": normal["id"]}
    assert not any(matters for _, matters in unread_keys(drawn))


def test_the_fast_reader_reads_ordinary_rows() -> None:
    assert _ordinary_row(row(image="a.png", source="x", id=4)) is not None
    assert _ordinary_row(row("What?")) is not None


@given(plain_rows())
@settings(max_examples=200, deadline=None)
def test_statistics_read_rows_as_training_does(drawn: dict[str, Any]) -> None:
    measured = _row_length(drawn, len)
    problems, normal = examine(drawn)
    assert (measured is None) == (normal is None) == any(kind in FATAL_KINDS for kind, _ in problems)
    if normal is not None:
        assert measured[3] == len(normal["images"])


def test_evaluation_names_the_first_image_however_it_is_written() -> None:
    def first(raw: dict[str, Any]) -> Any:
        images = question_messages(raw)["images"]
        return picture_identity(images[0]) if images else None

    assert first(row(image="a.png")) == first(row(img="./a.png")) is not None
    assert first({"question": "What?", "image": {"bytes": PNG}}) == first(row(image_url=DATA_URI))
    assert first(of_parts({"type": "image", "image": BASE64})) == first(row(image=PNG))
    assert first(row("What?")) is None


# (3) No message is longer than MAX_MESSAGE characters.

roles = st.one_of(st.sampled_from(["human", "gpt", "system", "user", "x" * 10_000]), junk)
value = st.sampled_from(["<image> q", "a"]) | junk
junk_turns = st.fixed_dictionaries(
    {},
    optional={
        "from": roles,
        "value": st.sampled_from(["<image> q", "a"]) | junk,
        "role": roles,
        "content": junk,
        "loss": junk,
    },
)
turn_lists = st.lists(junk_turns, max_size=4) | junk
junk_rows = st.one_of(
    junk,
    plain_rows(),
    st.fixed_dictionaries(
        {},
        optional={
            "id": junk,
            "conversations": turn_lists,
            "image": junk,
            "images": junk,
            "system": junk,
        },
    ),
)


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except DataError as error:
        return str(error)
    return ""


@given(drawn=junk_rows)
@settings(max_examples=500, deadline=None)
def test_no_message_about_a_row_is_long(drawn: Any) -> None:
    processor = texts.tiny("bytes", "vicuna_v1")
    for message in (
        message_of(lambda: to_messages(drawn, where="train.json row 17")),
        message_of(lambda: encode_row(drawn, processor, where="train.json row 17")),
        message_of(lambda: encode_row(drawn, processor, max_length=4)),
        message_of(lambda: encode_prompt(drawn, processor)),
        *(detail for _, detail in row_problems(drawn)),
    ):
        assert len(message) <= MAX_MESSAGE
    bad = normalise_row(drawn, ImageFolder(tempfile.gettempdir()), "f" * 50, 17)
    if isinstance(bad, BadRow):
        assert len(bad.detail) <= MAX_MESSAGE
        assert len(bad.id) <= 80
        for policy in (BadRowPolicy(), BadRowPolicy("skip", "skip", 0.0)):
            message = message_of(lambda policy=policy: policy.enforce([bad], 10, "s" * 1000))  # type: ignore[misc]
            assert 0 < len(message) <= MAX_MESSAGE
            assert "data." in message


@given(drawn=junk)
@settings(max_examples=200, deadline=None)
def test_no_message_about_an_image_is_long(drawn: Any) -> None:
    assert len(message_of(lambda: open_image(drawn))) <= MAX_MESSAGE
    if isinstance(drawn, str):
        assert len(message_of(lambda: ImageFolder(tempfile.gettempdir()).locate(drawn))) <= MAX_MESSAGE


@pytest.mark.parametrize(
    "reference",
    ["x" * 10_000, "../" * 3000 + "x", "https://e.org/" + "y" * 9000, DATA_URI * 100, "a\0b" * 2000, "/" * 9000],
)
def test_a_long_reference_is_cut_in_messages(reference: str, tmp_path: Path) -> None:
    folder = ImageFolder(str(tmp_path))
    for call in (
        lambda: folder.locate(reference),
        lambda: open_image(reference),
        lambda: open_image(reference, str(tmp_path)),
    ):
        assert 0 < len(message_of(call)) <= MAX_MESSAGE


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=lambda bytes_: f"{len(bytes_)} bytes"))


@given(rows=st.lists(junk_rows, min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_no_problem_that_the_check_reports_is_long(rows: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        path.write_text(json.dumps(as_json(rows)), encoding="utf-8")
        try:
            report = check_data(path, folder, num_workers=1)
        except DataError as error:
            assert len(str(error)) <= MAX_MESSAGE
            return
        for problem in report.problems:
            assert len(problem.detail) <= MAX_MESSAGE


def test_a_long_id_is_cut_where_rows_are_shown() -> None:
    assert len(InspectedRow(3, "i" * 10_000, [], []).title) <= 200
