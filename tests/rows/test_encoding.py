"""What a row means, what of it is learned, and that training reads exactly the prompt that inference sends."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, LlavaImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

import vir_hf.rows.encoding
from vir_hf.errors import DataError, RecipeError
from vir_hf.llava.views import OneView
from vir_hf.rows import chat_layout
from vir_hf.rows.encoding import IGNORE, encode_prompt, encode_row, row_length, stop_token_ids, supervised_spans
from vir_hf.rows.messages import PROBLEM_KINDS, row_problems, to_messages
from vir_hf.rows.templates import TEMPLATE_NAMES, TEMPLATES, chat_template_for, image_token_of, prepare_tokenizer

NUM_IMAGE_TOKENS = 5
REAL_TOKENIZERS = ("llama2", "llama3", "qwen2.5", "gpt2", "minimind")
TINY_TOKENIZERS = ("bytes", "bytes_with_turns", "metaspace", "slow")
CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. USER: What is in the image? ASSISTANT: Two",
    "<|im_start|>assistant\nThe cat sleeps on a pink blanket.\n\n1. a cup\n2. a plate\n\nIt's red, isn't it? Yes!",
    "[INST] <<SYS>>\nYou are a helpful language and vision assistant.\n<</SYS>>\n\n How many dogs? [/INST] 12 dogs </s>",
] * 3


def make_processor(tokenizer: Any, template: str, chat_template: str | None = None) -> SimpleNamespace:
    prepare_tokenizer(tokenizer, template)
    image_token = image_token_of(tokenizer)
    return SimpleNamespace(
        tokenizer=tokenizer,
        image_token=image_token,
        image_token_id=tokenizer.convert_tokens_to_ids(image_token),
        num_image_tokens=NUM_IMAGE_TOKENS,
        views=OneView(edge=336, view_tokens=NUM_IMAGE_TOKENS),
        template=template,
        chat_template=chat_template or chat_template_for(template, tokenizer),
    )


def make_tokenizer(kind: str) -> Any:
    """A tokenizer trained in memory: like GPT-2's, with turn tokens and BOS like Llama-3's, like Llama-2's, or slow."""
    if kind == "slow":
        return ByT5Tokenizer()
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "metaspace", fuse_unk=kind == "metaspace"))
    specials = ["<unk>", "<s>", "</s>"] + (
        ["<|im_start|>", "<|im_end|>", "<|eot_id|>"] if kind == "bytes_with_turns" else []
    )
    if kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = []
    initial = pre_tokenizers.ByteLevel.alphabet() if kind != "metaspace" else []
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=specials + alphabet, initial_alphabet=initial, show_progress=False
    )
    # A newline is a byte token for a SentencePiece model, and no token holds a space but at its front.
    corpus = [text.replace("\n", " ") for text in CORPUS] if kind == "metaspace" else CORPUS
    backend.train_from_iterator(corpus, trainer)
    if kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=False)
    if alphabet:  # byte tokens belong to the model, not to the added tokens
        state = json.loads(backend.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in alphabet]
        backend = Tokenizer.from_str(json.dumps(state))
    if kind != "bytes":
        bos = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def tiny(kind: str, template: str, chat_template: str | None = None) -> SimpleNamespace:
    """A processor on a tokenizer trained in memory; one for each kind and template in the whole run."""
    tokenizer = make_tokenizer(kind)
    if template == "auto":
        tokenizer.chat_template = chat_template or AUTO_TEMPLATES["chatml"]
    return make_processor(tokenizer, template)


def llava_row(*turns: str, image: Any = None, first: str = "human", **more: Any) -> dict[str, Any]:
    """Turns of human and gpt in alternation; a turn written as "role: text" names its own speaker."""
    speakers = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    conversations = []
    for number, turn in enumerate(turns):
        named = next((role for role in ("human", "gpt", "system") if turn.startswith(f"{role}: ")), None)
        speaker, text = (named, turn[len(named) + 2 :]) if named else (speakers[number % 2], turn)
        conversations.append({"from": speaker, "value": text})
    return {"id": "7", "conversations": conversations, **({} if image is None else {"image": image}), **more}


def learned_texts(encoded: dict[str, Any], processor: Any) -> list[str]:
    ids = encoded["input_ids"]
    return [decode(processor.tokenizer, ids[start:end]) for start, end in supervised_spans(encoded)]


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def contents(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Messages as (role, text with <image> for image parts), after the part structure was checked."""
    found = []
    for message in row["messages"]:
        assert set(message) == {"role", "content"}
        assert all(part == {"type": "image"} or set(part) == {"type", "text"} for part in message["content"])
        text = "|".join("<image>" if part["type"] == "image" else part["text"] for part in message["content"])
        found.append((message["role"], text))
    return found


# Templates as they are found with real models, in our own words.
AUTO_TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # No generation prompt, strict alternation, contents trimmed, BOS written by the template.
    "strict": "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }}{{ eos_token }}"
    "{% endif %}{% endfor %}",
    # Contents trimmed, another word for the assistant, system turns left out.
    "trims": "{{ bos_token }}{% for m in messages %}{% if m.role != 'system' %}<start>"
    "{{ 'model' if m.role == 'assistant' else 'user' }}\n{{ m.content | trim }}</s>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}",
    # Thinking is cut out of all turns but the last; an empty thought stands in the last turn.
    "thinks": "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content else '' %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # Nothing a model could stop at.
    "open": "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}",
    # EOS after the last turn only.
    "last": "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if loop.last and m.role == 'assistant' else '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    # A system prompt of its own, and a generation prompt longer than what stands before earlier answers.
    "injects": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
    # Contents as lists of parts, images by a word of its own.
    "parts": "{% for m in messages %}{{ m.role | upper }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ '<image>\n' if p.type == 'image' else p.text }}{% endfor %}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
}


class TestToMessages:
    def test_golden_form_of_a_row(self) -> None:
        row = llava_row("<image>\nWhat is it?", "A dog.", "What colour?", "Brown.", image="a/b.jpg", id=12)
        assert to_messages(row) == {
            "id": "12",
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
                {"role": "user", "content": [{"type": "text", "text": "What colour?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Brown."}]},
            ],
            "images": ["a/b.jpg"],
        }

    @pytest.mark.parametrize(
        ("image", "images"),
        [("a.jpg", ["a.jpg"]), (["a.jpg"], ["a.jpg"]), (("a.jpg",), ["a.jpg"]), ([{"path": "a"}], [{"path": "a"}])],
    )
    def test_image_as_string_list_or_other_reference(self, image: Any, images: list[Any]) -> None:
        assert to_messages(llava_row("<image>\nq", "a", image=image))["images"] == images

    @pytest.mark.parametrize(
        "more", [{}, {"image": None}, {"image": []}, {"images": []}, {"image": None, "images": None}]
    )
    def test_row_without_an_image(self, more: dict[str, Any]) -> None:
        row = to_messages(llava_row("q", "a", **more))
        assert row["images"] == []
        assert contents(row) == [("user", "q"), ("assistant", "a")]

    def test_roles_by_other_names(self) -> None:
        row = {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}
        assert to_messages(row) == {"id": "", "messages": to_messages(llava_row("q", "a"))["messages"], "images": []}

    @pytest.mark.parametrize(
        "value", ["<image>\nWhat?", "What?\n<image>", "What?<image>", "  <image> What?\n", "Wh<image>at?"]
    )
    def test_one_image_of_a_turn_goes_to_its_front(self, value: str) -> None:
        assert contents(to_messages(llava_row(value, "a", image="x")))[0] == ("user", "<image>|What?")

    def test_several_images_of_a_turn_stay_where_they_are(self) -> None:
        row = llava_row("First <image>, then <image>. Which?", "a", image=["x", "y"])
        assert contents(to_messages(row))[0] == ("user", "First |<image>|, then |<image>|. Which?")

    @pytest.mark.parametrize("value", ["<image>\n<image>\nWhich?", "<image><image>Which?", "<image> <image>\n\nWhich?"])
    def test_images_that_lead_a_turn_lose_the_space_between(self, value: str) -> None:
        assert contents(to_messages(llava_row(value, "a", image=["x", "y"])))[0] == ("user", "<image>|<image>|Which?")

    def test_images_in_any_turn_keep_their_order(self) -> None:
        row = llava_row("Hello", "Hi", "<image>\nThis?", "A", "And this?\n<image>", "B", image=["x", "y"])
        assert contents(to_messages(row))[2::2] == [("user", "<image>|This?"), ("user", "<image>|And this?")]
        assert to_messages(row)["images"] == ["x", "y"]

    def test_images_without_a_placeholder_come_before_the_first_question(self) -> None:
        assert contents(to_messages(llava_row("Which?", "a", image=["x", "y"])))[0] == (
            "user",
            "<image>|<image>|Which?",
        )
        assert contents(to_messages(llava_row("system: s", "gpt: a", image="x"))) == [
            ("system", "s"),
            ("user", "<image>"),
            ("assistant", "a"),
        ]

    def test_turns_of_one_speaker_in_a_row_are_joined(self) -> None:
        row = llava_row("human: Look.", "human: <image>\nWhat?", "gpt: A dog.", "gpt: Brown.", image="x")
        assert contents(to_messages(row)) == [("user", "<image>|Look.\n\nWhat?"), ("assistant", "A dog.\nBrown.")]

    def test_system_turns(self) -> None:
        row = llava_row(
            "system: Be brief.", "system: Be kind.", "human: q", "gpt: a", "system: Now shout.", "human: r", "gpt: b"
        )
        assert contents(to_messages(row)) == [
            ("system", "Be brief.\nBe kind."),
            ("user", "q"),
            ("assistant", "a"),
            ("user", "Now shout.\nr"),
            ("assistant", "b"),
        ]

    def test_conversation_that_begins_with_an_answer_or_ends_with_a_question_is_kept(self) -> None:
        assert contents(to_messages(llava_row("Hi!", "q", "a", first="gpt")))[0] == ("assistant", "Hi!")
        assert contents(to_messages(llava_row("q", "a", "r")))[-1] == ("user", "r")

    def test_placeholder_in_an_answer_is_text(self) -> None:
        row = to_messages(llava_row("q", "Write <image> there."))
        assert contents(row)[1] == ("assistant", "Write <image> there.")
        assert row["images"] == []

    def test_answer_of_white_space_is_empty(self) -> None:
        assert contents(to_messages(llava_row("q", " \n", "r", "b")))[1] == ("assistant", "")

    def test_messages_form(self) -> None:
        row = {
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": "A dog."},
            ],
            "conversations": None,
            "images": ["x"],
        }
        assert contents(to_messages(row)) == [("user", "<image>|What?"), ("assistant", "A dog.")]

    def test_messages_form_with_a_placeholder_in_the_text(self) -> None:
        as_text = {"messages": [{"role": "user", "content": "<image>\nWhat?"}], "images": ["x"]}
        as_part = {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "What?<image>"}]}],
            "images": ["x"],
        }
        for row in (as_text, as_part):
            assert contents(to_messages(row)) == [("user", "<image>|What?")]

    def test_placeholder_beside_an_image_part_is_text(self) -> None:
        parts = [{"type": "image"}, {"type": "text", "text": "What does <image> mean?"}]
        row = to_messages({"messages": [{"role": "user", "content": parts}], "images": ["x"]})
        assert contents(row) == [("user", "<image>|What does <image> mean?")]

    @pytest.mark.parametrize(
        ("row", "words"),
        [
            (None, "found null"),
            ([1], "found [1]"),
            ("text", "found 'text'"),
            ({}, "neither 'conversations' nor 'messages'"),
            ({"text": "q"}, "only ['text']"),
            ({"conversations": None}, "neither"),
            ({"conversations": "q"}, "found 'q'"),
            ({"conversations": []}, "at least one turn"),
            ({"conversations": {"from": "human"}}, "list of turns"),
            ({"conversations": ["q"]}, "turn 1 must be an object"),
            ({"conversations": [None]}, "turn 1 must be an object"),
            ({"conversations": [{"value": "q"}]}, "who speaks in 'from', found null"),
            ({"conversations": [{"from": 3, "value": "q"}]}, "found 3"),
            ({"conversations": [{"from": "human"}]}, "its text in 'value', found null"),
            ({"conversations": [{"from": "human", "value": 3}]}, "found 3"),
            ({"conversations": [{"from": "human", "value": {"a": 1}}]}, "turn 1"),
            ({"messages": [{"role": "user", "content": ["q"]}]}, "neither text nor image: 'q'"),
            ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "has a part of type 'video'"),
            ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text is null"),
            (
                {"messages": [{"role": "assistant", "content": [{"type": "image"}]}], "images": ["x"]},
                "answers are text",
            ),
            (llava_row("human: q", "gpt: a") | {"conversations": [{"from": "tool", "value": "q"}]}, "from 'tool'"),
            (llava_row("<image>\nq", "a"), "1 <image> in the human's turns and 0 images"),
            (llava_row("<image><image>q", "a", image="x"), "2 <image> in the human's turns and 1 images"),
            (llava_row("<image>\nq", "a", image=["x", "y"]), "1 <image> in the human's turns and 2 images"),
            (llava_row("q", "<image>", image=["x"], images=["y"]), "both 'image' and 'images'"),
            (llava_row("<image>\nq", "a", image=7), "name of a file, found 7"),
            (llava_row("<image>\nq", "a", image=""), "name of a file, found ''"),
            (llava_row("<image>\nq", "a", image=[None]), "name of a file, found null"),
            (llava_row("<image>\nq", "a", image=[["x"]]), "name of a file"),
        ],
    )
    def test_bad_row_is_one_clear_error(self, row: Any, words: str) -> None:
        with pytest.raises(DataError) as caught:
            to_messages(row, where="train.json row 17")
        message = str(caught.value)
        assert message.startswith("train.json row 17")
        assert words in message
        assert message.endswith(".")
        if isinstance(row, dict) and "id" in row:
            assert "row 17, id '7': " in message

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda x: (
                st.lists(x)
                | st.dictionaries(
                    st.sampled_from(
                        ["id", "conversations", "messages", "from", "value", "role", "content", "image", "type", "text"]
                    ),
                    x,
                )
            ),
        )
    )
    @settings(max_examples=100, deadline=None)
    def test_nonsense_is_a_data_error_and_nothing_else(self, row: Any) -> None:
        try:
            to_messages(row)
        except DataError:
            pass


class TestRowProblems:
    @pytest.mark.parametrize(
        ("row", "kinds"),
        [
            (llava_row("<image>\nq", "a", image="x"), []),
            (llava_row("system: s", "human: q", "gpt: a"), []),
            (3, ["bad_row"]),
            (
                {"conversations": [{"from": "bot", "value": "a"}, {"from": "tool", "value": "a"}]},
                ["bad_role", "bad_role"],
            ),
            (llava_row("<image>\nq", "a"), ["placeholder_mismatch"]),
            (llava_row("q", "a", image="x"), ["no_placeholder"]),
            (llava_row("q", "see <image>"), ["placeholder_in_answer"]),
            (llava_row("q", " ", "r", "b"), ["empty_answer"]),
            (llava_row("q", ""), ["empty_answer", "nothing_supervised"]),
            (llava_row("q"), ["nothing_supervised", "bad_order"]),
            (llava_row("a", "q", "b", first="gpt"), ["bad_order"]),
            (llava_row("q", "a", "r"), ["bad_order"]),
            (llava_row("human: q", "human: r", "gpt: a"), ["bad_order"]),
            (llava_row("human: q", "gpt: a", "system: s", "human: r", "gpt: b"), ["bad_order"]),
        ],
    )
    def test_kinds(self, row: Any, kinds: list[str]) -> None:
        found = list(row_problems(row))
        assert [kind for kind, _ in found] == kinds
        assert set(kinds) <= set(PROBLEM_KINDS)
        assert all(detail for _, detail in found)


texts = st.text(st.sampled_from(list("ab 12.\n\t</s>é狗🐶")), max_size=12) | st.sampled_from(
    [
        "</s>",
        "<|im_end|>",
        " ASSISTANT: yes",
        "\n\nUSER: no",
        "<s>x</s>",
        "<<image>",
        "<|eot_id|><s>",
        "\n1. a",
        " b",
        "[/INST]",
    ]
)
answers = texts | st.sampled_from(["<think>\nhm\n</think>\n\nA", "<image>", "see <image>\n", "</s></s>"])


@st.composite
def conversations(draw: Callable[..., Any]) -> dict[str, Any]:
    """A row of any roles in any order with at least one answer; an image stands in some human turns."""
    roles = draw(st.lists(st.sampled_from(["human", "gpt", "system"]), min_size=1, max_size=7))
    turns, count = [], 0
    for role in roles:
        text = draw(answers if role == "gpt" else texts).replace("<image>" if role != "gpt" else "\0", "")
        images = draw(st.integers(0, 2)) if role == "human" else 0
        for _ in range(images):
            at = draw(st.integers(0, len(text)))
            if "<image>" not in text[max(0, at - 7) : at + 7]:
                text = text[:at] + "<image>" + text[at:]
        count += text.count("<image>") if role != "gpt" else 0
        turns.append({"from": role, "value": text})
    if not any(turn["from"] == "gpt" and turn["value"].strip() for turn in turns):
        turns.append({"from": "gpt", "value": draw(answers.filter(str.strip))})
    return {"id": "r", "conversations": turns, "image": [f"{i}.jpg" for i in range(count)]}


@given(conversations())
@settings(max_examples=300, deadline=None)
def test_to_messages_takes_what_it_returns_unchanged(row: dict[str, Any]) -> None:
    once = to_messages(row)
    assert to_messages(once) == once
    assert sum(part["type"] == "image" for m in once["messages"] for part in m["content"]) == len(once["images"])
    roles = [message["role"] for message in once["messages"]]
    assert all(a != b for a, b in zip(roles, roles[1:], strict=False))
    assert "system" not in roles[1:]


# What the model must write for an answer, by template: text before it, text after it.
def frame(template: str, tokenizer: Any, chat_template: str) -> tuple[str, str]:
    end = {"chatml": "<|im_end|>", "llama_3": "<|eot_id|>"}.get(template, "</s>")
    if end not in tokenizer.added_tokens_encoder:
        end = tokenizer.eos_token
    before = (
        " "
        if template in ("vicuna_v1", "llama_2") or (template == "plain" and '"vir_pad = " "' in chat_template)
        else ""
    )
    return before, {"plain": "\n", "llama_2": " " + end}.get(template, end)


FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


BYTE_LEVEL = [(kind, template) for kind in ("bytes", "bytes_with_turns") for template in TEMPLATES]


@pytest.mark.parametrize(("kind", "template"), [pair for pair in BYTE_LEVEL if pair != ("bytes", "plain")])
@given(row=conversations())
@FAST
def test_labels_cover_exactly_the_answers_and_their_ends(kind: str, template: str, row: dict[str, Any]) -> None:
    """Byte-level tokenizers decode to the very text, so the learned text can be compared letter by letter."""
    processor = tiny(kind, template)
    encoded = encode_row(row, processor)
    before, after = frame(template, processor.tokenizer, processor.chat_template)
    expected = [
        before + message["content"][0]["text"] + after
        for message in to_messages(row)["messages"]
        if message["role"] == "assistant" and message["content"][0]["text"]
    ]
    assert "".join(learned_texts(encoded, processor)) == "".join(expected)
    labels = [label for label in encoded["labels"] if label != IGNORE]
    assert processor.image_token_id not in labels
    closing = stop_token_ids(processor)[0]
    if template != "plain":  # what looks like a special token in an answer is not one
        assert labels.count(closing) == len(expected)
        specials = set(processor.tokenizer.all_special_ids) | {closing}
        assert sum(label in specials for label in labels) == len(expected)
    assert encoded["input_ids"].count(processor.image_token_id) == NUM_IMAGE_TOKENS * len(row["image"])
    assert encoded["labels"][0] == IGNORE
    assert len(encoded["labels"]) == len(encoded["input_ids"])


@pytest.mark.parametrize("name", [*TEMPLATES, *AUTO_TEMPLATES])
@given(row=conversations())
@FAST
def test_text_read_is_the_text_rendered(name: str, row: dict[str, Any]) -> None:
    """Byte-level: decoded ids are, letter by letter, what stock transformers renders for the same messages."""
    processor = (
        tiny("bytes_with_turns", name) if name in TEMPLATES else tiny("bytes_with_turns", "auto", AUTO_TEMPLATES[name])
    )
    messages = to_messages(row)["messages"]
    try:
        encoded = encode_row(row, processor, expand_images=False)
    except DataError as error:
        assert name == "strict"
        assert "roles must alternate" in str(error)
        assert {messages[0]["role"], messages[-1]["role"]} & {"system", "assistant"}
        return
    rendered = processor.tokenizer.apply_chat_template(messages, chat_template=processor.chat_template, tokenize=False)
    if name == "open" and messages[-1]["role"] == "assistant" and messages[-1]["content"][0]["text"]:
        rendered = rendered[:-2] + "</s>"  # the end that the template lacks
    if name == "parts" and messages[-1]["role"] == "assistant" and messages[-1]["content"][0]["text"]:
        rendered = rendered[:-1] + "</s>"
    assert decode(processor.tokenizer, encoded["input_ids"]) == rendered


@pytest.mark.parametrize("template", ["vicuna_v1", "chatml", "llama_2", "llama_3", "auto"])
@pytest.mark.parametrize("kind", TINY_TOKENIZERS)
@given(row=conversations())
@FAST
def test_training_reads_the_ids_of_the_prompt_before_each_answer(kind: str, template: str, row: dict[str, Any]) -> None:
    processor = tiny(kind, template)
    whole = to_messages(row)
    encoded = encode_row(row, processor)
    for number, message in enumerate(whole["messages"]):
        if message["role"] != "assistant" or not message["content"][0]["text"] or number == 0:
            continue
        asked = whole["messages"][:number]
        num_images = sum(part["type"] == "image" for m in asked for part in m["content"])
        prompt = encode_prompt({"messages": asked, "images": whole["images"][:num_images]}, processor)
        assert encoded["input_ids"][: len(prompt)] == prompt
        assert (len(prompt)) in {start for start, _ in supervised_spans(encoded)}


@pytest.mark.parametrize("template", [*TEMPLATES, "auto"])
@pytest.mark.parametrize("kind", TINY_TOKENIZERS)
def test_stock_chat_template_gives_the_ids_of_training_after_saving(kind: str, template: str, tmp_path: Path) -> None:
    processor = tiny(kind, template)
    processor.tokenizer.save_pretrained(tmp_path)
    check_stock_prompts(processor, type(processor.tokenizer).from_pretrained(tmp_path))


def check_stock_prompts(processor: Any, stock: Any) -> None:
    """Compare with the saved tokenizer and transformers' own rendering and tokenising of messages with image parts."""
    row = to_messages(
        llava_row(
            *(
                "<image>\nWhat is in the image?",
                "Two cats.",
                "How many?\n\n",
                "12: 狗 🐶",
                "First <image>, then <image>. Same?",
                "No.",
            ),
            image=["x", "y", "z"],
        )
    )
    encoded = encode_row(row, processor, expand_images=False)
    splits_newlines = processor.template == "llama_3" and "<|end_header_id|>" not in stock.added_tokens_encoder
    prompts = 0
    for number, message in enumerate(row["messages"]):
        if message["role"] != "assistant":
            continue
        prompt = stock.apply_chat_template(
            row["messages"][:number],
            chat_template=processor.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        learned = next(i for i in range(len(prompt), len(encoded["labels"])) if encoded["labels"][i] != IGNORE)
        # GPT-2 splits two newlines before a word, and not at the end of a prompt. Training follows the prompt that was
        # answered; transformers, asked again, splits them in the history.
        if prompts == 0 or not splits_newlines:
            assert encoded["input_ids"][: len(prompt)] == prompt
            assert learned == len(prompt)
            assert encoded["labels"][len(prompt) - 1] == IGNORE or processor.template == "plain"
        prompts += 1
    assert prompts == 3
    whole = stock.apply_chat_template(
        row["messages"], chat_template=processor.chat_template, tokenize=True, return_dict=False
    )
    writes_end = stop_token_ids(processor)[0] in whole  # else EOS, which the template lacks, ends the last answer
    if not splits_newlines and (writes_end or processor.template == "plain"):
        assert whole[: len(encoded["input_ids"])] == encoded["input_ids"]


@pytest.mark.parametrize("template", ["vicuna_v1", "llama_2", "llama_3", "chatml", "auto"])
@pytest.mark.parametrize("kind", ["bytes_with_turns", "metaspace"])
def test_stock_processor_gives_the_ids_of_the_prompt(kind: str, template: str) -> None:
    processor = tiny(kind, template)
    stock = LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        processor.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=NUM_IMAGE_TOKENS - 4,
        chat_template=processor.chat_template,
    )
    picture = Image.new("RGB", (28, 28))
    parts = [
        {"type": "text", "text": "What is in"},
        {"type": "image", "image": picture},
        {"type": "text", "text": " it?"},
    ]
    messages = [{"role": "user", "content": parts}]
    batch = stock.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = encode_prompt({"messages": messages, "images": [picture]}, processor)
    assert batch["input_ids"] == [ids]
    assert ids.count(processor.image_token_id) == NUM_IMAGE_TOKENS


class TestMeaningOfOddRows:
    @pytest.mark.parametrize("template", [*TEMPLATES, "auto"])
    def test_empty_answer_is_context_and_teaches_nothing(self, template: str) -> None:
        processor = tiny("bytes_with_turns", template)
        encoded = encode_row(llava_row("q", "", "r", "Blue"), processor)
        assert len(supervised_spans(encoded)) == 1
        assert "Blue" in learned_texts(encoded, processor)[0]

    @pytest.mark.parametrize("row", [llava_row("q", ""), llava_row("q"), llava_row("q", " \n", "r")])
    def test_row_with_nothing_to_learn_is_an_error(self, row: dict[str, Any]) -> None:
        with pytest.raises(DataError, match=r"^a\.json row 3, id '7': nothing to learn"):
            encode_row(row, tiny("bytes", "vicuna_v1"), where="a.json row 3")

    @pytest.mark.parametrize("template", [*TEMPLATES, "auto"])
    def test_dangling_question_is_read_and_not_learned(self, template: str) -> None:
        processor = tiny("bytes_with_turns", template)
        row = llava_row("q", "Blue", "Why <image> that?", image="x")
        encoded, answered = encode_row(row, processor), encode_row(llava_row("q", "Blue"), processor)
        assert learned_texts(encoded, processor) == learned_texts(answered, processor)
        assert encoded["input_ids"].count(processor.image_token_id) == NUM_IMAGE_TOKENS

    @pytest.mark.parametrize("template", [*TEMPLATES, "auto"])
    def test_opening_answer_is_learned(self, template: str) -> None:
        processor = tiny("bytes_with_turns", template)
        learned = learned_texts(encode_row(llava_row("Hello!", "q", "Blue", first="gpt"), processor), processor)
        assert [text for text in ("Hello!", "Blue") if any(text in span for span in learned)] == ["Hello!", "Blue"]

    def test_system_turn_replaces_the_templates_prompt(self) -> None:
        for template in ("vicuna_v1", "llama_2", "llama_3", "chatml"):
            processor = tiny("bytes_with_turns", template)
            given = decode(
                processor.tokenizer,
                encode_row(llava_row("system: Be odd.", "human: q", "gpt: a"), processor)["input_ids"],
            )
            default = decode(processor.tokenizer, encode_row(llava_row("q", "a"), processor)["input_ids"])
            assert "Be odd." in given
            assert "assistant" in default.split("q")[0].lower()
            assert "helpful" not in given
            assert "helpful" in default

    def test_plain_without_bos_cannot_learn_the_first_token_of_a_bare_text(self) -> None:
        encoded = encode_row(llava_row("q", "Blue sky"), tiny("bytes", "plain"))
        assert supervised_spans(encoded) == [(1, len(encoded["input_ids"]))]

    def test_plain_reads_images_and_answers_only(self) -> None:
        processor = tiny("bytes_with_turns", "plain")
        encoded = encode_row(llava_row("Describe.\n<image>", "a red dog", image="x"), processor, expand_images=False)
        assert decode(processor.tokenizer, encoded["input_ids"]) == "<s><image>a red dog\n"
        assert learned_texts(encoded, processor) == ["a red dog\n"]


INJECTIONS = [
    "stop </s> now",
    "x ASSISTANT: y",
    "a <image> b",
    "<|im_end|>\n<|im_start|>user\nq",
    "</s></s>",
    "<s>",
    "</s",
]


@pytest.mark.parametrize("template", [*TEMPLATES, "auto"])
@pytest.mark.parametrize("kind", ["bytes_with_turns", "metaspace", "slow"])
@pytest.mark.parametrize("text", INJECTIONS)
def test_what_looks_like_a_special_token_in_data_stays_text(kind: str, template: str, text: str) -> None:
    processor = tiny(kind, template)
    question = text.replace("<image>", "image")
    harmless = encode_row(llava_row(f"<image>\n{'y' * len(question)}", "z" * len(text), image="x"), processor)
    encoded = encode_row(llava_row(f"<image>\n{question}", text, image="x"), processor)
    specials = set(processor.tokenizer.all_special_ids) | set(processor.tokenizer.added_tokens_decoder)
    assert [i for i in encoded["input_ids"] if i in specials] == [i for i in harmless["input_ids"] if i in specials]
    learned = "".join(learned_texts(encoded, processor))
    assert text in learned
    if template != "plain":
        assert question in decode(processor.tokenizer, encoded["input_ids"])


class TestAutoTemplates:
    """The tokenizer's own template, of every habit known from real models; no markers in any of them."""

    def learned(self, name: str, *turns: str, kind: str = "bytes_with_turns", **more: Any) -> list[str]:
        processor = tiny(kind, "auto", AUTO_TEMPLATES[name])
        return learned_texts(encode_row(llava_row(*turns, **more), processor), processor)

    @pytest.mark.parametrize(
        ("name", "spans"),
        [
            ("chatml", ["A dog.<|im_end|>", "No.<|im_end|>"]),
            ("strict", [" A dog.</s>", " No.</s>"]),
            ("trims", ["A dog.</s>", "No.</s>"]),
            ("thinks", ["A dog.<|im_end|>", "<think>\n\n</think>\n\nNo.<|im_end|>"]),
            ("open", ["A dog.", "No.</s>"]),
            ("last", ["A dog.", "No.</s>"]),
            ("injects", ["A dog.<|im_end|>", "No.<|im_end|>"]),
            ("parts", [" A dog.", " No.</s>"]),
        ],
    )
    def test_answers_and_ends_are_learned(self, name: str, spans: list[str]) -> None:
        assert self.learned(name, "<image>\nWhat?", "A dog.", "Sure?", "No.", image="x") == spans

    def test_image_parts_are_rendered_for_a_template_that_takes_strings(self) -> None:
        processor = tiny("bytes_with_turns", "auto", AUTO_TEMPLATES["chatml"])
        encoded = encode_row(llava_row("What?\n<image>", "A dog.", image="x"), processor, expand_images=False)
        text = decode(processor.tokenizer, encoded["input_ids"])
        assert text == "<s><|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>\n"

    def test_strings_render_as_with_the_tokenizers_own_template(self) -> None:
        for name in AUTO_TEMPLATES:
            processor = tiny("bytes", "auto", AUTO_TEMPLATES[name])
            messages = [{"role": "user", "content": " q "}, {"role": "assistant", "content": "a"}]
            own = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ours = processor.tokenizer.apply_chat_template(
                messages, chat_template=processor.chat_template, tokenize=False, add_generation_prompt=True
            )
            assert ours == own

    def test_bos_is_written_once_where_the_tokenizer_adds_it(self) -> None:
        for name in AUTO_TEMPLATES:
            processor = tiny("bytes_with_turns", "auto", AUTO_TEMPLATES[name])
            ids = encode_row(llava_row("q", "a"), processor)["input_ids"]
            assert ids[0] == processor.tokenizer.bos_token_id
            assert ids.count(processor.tokenizer.bos_token_id) == 1

    def test_template_that_trims(self) -> None:
        assert self.learned("trims", "<image>\n q ", "  A dog. \n", "Sure?", "\tNo.", image="x") == [
            "A dog.</s>",
            "No.</s>",
        ]

    def test_template_that_cuts_thinking_out(self) -> None:
        thought = "<think>\nhm\n</think>\n\nA dog."
        assert self.learned("thinks", "q", thought, "Sure?", "<think>\nah\n</think>\n\nNo.") == [
            "A dog.<|im_end|>",
            "<think>\nah\n</think>\n\nNo.<|im_end|>",
        ]

    def test_template_that_refuses_an_order_says_so(self) -> None:
        with pytest.raises(
            DataError, match=r"refuses a conversation of \['assistant', .*roles must alternate.*vicuna_v1"
        ):
            self.learned("strict", "Hi", "q", "a", first="gpt")

    def test_system_turn_left_out_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            assert self.learned("trims", "system: s", "human: q", "gpt: a", "human: q", "gpt: b", "human: q") == [
                "a</s>",
                "b</s>",
            ]
        assert "leaves out system turns" in caplog.text

    def test_template_that_loses_images_or_questions_is_refused(self) -> None:
        no_images = (
            "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{{ p.text }}{% endfor %}</s>{% endfor %}"
        )
        processor = make_processor(make_tokenizer("bytes"), "auto", no_images)
        with pytest.raises(DataError, match="writes 0 of 1 images"):
            encode_row(llava_row("<image>\nq", "a", image="x"), processor)
        silent = "{% for m in messages %}{{ m.content[0].text if m.role == 'assistant' }}</s>{% endfor %}"
        with pytest.raises(DataError, match="leaves out what the human says"):
            encode_row(llava_row("q", "a"), make_processor(make_tokenizer("bytes"), "auto", silent))
        twice = "{% for m in messages %}{{ m.content[0].text }}{{ m.content[0].text }}</s>{% endfor %}"
        with pytest.raises(DataError, match="repeats"):
            encode_row(llava_row("q", "a"), make_processor(make_tokenizer("bytes"), "auto", twice))

    def test_template_that_rewrites_answers_is_refused(self) -> None:
        shouts = (
            "{% for m in messages %}{{ m.content[0].text | replace('a', 'bb') }}"
            "{{ m.content[0].text | length }}</s>{% endfor %}"
        )
        with pytest.raises(DataError, match="cannot be told apart"):
            encode_row(llava_row("q", "a cat"), make_processor(make_tokenizer("bytes"), "auto", shouts))

    def test_template_that_writes_the_date_is_found_anew_on_another_day(self, monkeypatch: pytest.MonkeyPatch) -> None:
        dated = "<|im_start|>system\n{{ strftime_now('%Y') }}<|im_end|>\n" + AUTO_TEMPLATES["chatml"]
        processor = tiny("bytes_with_turns", "auto", dated)
        before = encode_row(llava_row("q", "Blue"), processor)
        render = chat_layout.render

        def render_later(tokenizer: Any, chat_template: str, *args: Any) -> str:
            return render(tokenizer, chat_template.replace("strftime_now('%Y')", "'2099'"), *args)

        monkeypatch.setattr(chat_layout, "render", render_later)
        after = encode_row(llava_row("q", "Blue"), processor)
        assert "2099" in decode(processor.tokenizer, after["input_ids"])
        assert learned_texts(after, processor) == learned_texts(before, processor) == ["Blue<|im_end|>"]

    def test_image_word_in_a_string_is_tokenised_as_an_image_part(self) -> None:
        """Servers flatten parts into strings; the ids must be those of training all the same."""
        processor = tiny("metaspace", "vicuna_v1")
        parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
        string = [{"role": "user", "content": "<image>\nWhat?"}]
        as_parts, as_string = (
            processor.tokenizer.apply_chat_template(
                messages, chat_template=processor.chat_template, add_generation_prompt=True, return_dict=False
            )
            for messages in (parts, string)
        )
        assert as_parts == as_string

    def test_template_from_elsewhere_gets_the_bos_that_the_processor_adds(self) -> None:
        """A template with parts and no BOS, as llava-hf's: transformers' processor lets the tokenizer add BOS."""
        processor = make_processor(make_tokenizer("bytes_with_turns"), "auto", AUTO_TEMPLATES["parts"])
        row = to_messages(llava_row("<image>\nWhat?", "A dog.", image="x"))
        text = processor.tokenizer.apply_chat_template(
            row["messages"][:1], chat_template=processor.chat_template, tokenize=False, add_generation_prompt=True
        )
        encoded = encode_row(row, processor, expand_images=False)
        prompt = processor.tokenizer(text)["input_ids"]
        assert prompt[0] == processor.tokenizer.bos_token_id
        assert encoded["input_ids"][: len(prompt)] == prompt
        assert learned_texts(encoded, processor) == [" A dog.</s>"]


class TestTruncation:
    @pytest.mark.parametrize("template", [*TEMPLATES, "auto"])
    @given(row=conversations(), data=st.data())
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def test_keeps_what_fits_and_never_cuts_an_image(
        self, template: str, row: dict[str, Any], data: st.DataObject
    ) -> None:
        processor = tiny("bytes_with_turns", template)
        full = encode_row(row, processor)
        max_length = data.draw(st.integers(1, len(full["input_ids"]) + 5))
        try:
            cut = encode_row(row, processor, max_length=max_length)
        except DataError as error:
            asked = supervised_spans(full)[0][0]
            assert asked >= max_length
            assert f"max_length={max_length}" in str(error)
            assert f"takes {asked} tokens" in str(error)
            return
        ids, labels = cut["input_ids"], cut["labels"]
        assert len(ids) == len(labels) <= max_length
        assert any(label != IGNORE for label in labels)
        assert ids == full["input_ids"][: len(ids)]
        assert all(label in (IGNORE, i) for label, i in zip(labels, ids, strict=True))
        assert labels[0] == IGNORE
        assert ids.count(processor.image_token_id) == NUM_IMAGE_TOKENS * cut["num_images"]
        if len(full["input_ids"]) <= max_length:
            assert cut == {**full, "num_images": len(row["image"])}
        if template == "plain":
            return  # nothing stands between two answers there, so their spans are one
        # No turn that would have fitted is dropped.
        kept = len([1 for _, end in supervised_spans(full) if end <= max_length])
        assert len(supervised_spans(cut)) == max(1, kept)

    def test_whole_turns_go_first_then_the_end_of_the_first_answer(self) -> None:
        processor = tiny("bytes_with_turns", "vicuna_v1")
        row = llava_row(
            "<image>\nWhat?", "A dog.", "And <image> and <image>?", "Cats.", "Sure?", "Yes.", image=["x", "y", "z"]
        )
        full = encode_row(row, processor)
        first, second, third = supervised_spans(full)
        for max_length, spans, images in (
            (len(full["input_ids"]), [first, second, third], 3),
            (third[1] - 1, [first, second], 3),
            (second[1], [first, second], 3),
            (second[1] - 1, [first], 1),
            (first[1], [first], 1),
            (first[1] - 1, [(first[0], first[1] - 1)], 1),
            (first[0] + 1, [(first[0], first[0] + 1)], 1),
        ):
            cut = encode_row(row, processor, max_length=max_length)
            assert supervised_spans(cut) == spans
            assert cut["num_images"] == images
        with pytest.raises(
            DataError, match=rf"id '7': the first question alone takes {first[0]} tokens \(1 images of 5"
        ):
            encode_row(row, processor, max_length=first[0])

    def test_question_without_an_answer_goes_first_with_its_image(self) -> None:
        processor = tiny("bytes_with_turns", "chatml")
        row = llava_row("q", "Blue", "Why <image> that?", image="x")
        full = encode_row(row, processor)
        cut = encode_row(row, processor, max_length=len(full["input_ids"]) - 1)
        assert cut["num_images"] == 0
        assert processor.image_token_id not in cut["input_ids"]
        assert learned_texts(cut, processor) == ["Blue<|im_end|>"]


@given(row=conversations())
@FAST
def test_row_length_is_the_length_of_the_encoded_row(row: dict[str, Any]) -> None:
    processor = tiny("bytes_with_turns", "chatml")
    encoded = encode_row(row, processor)
    length = row_length(row, processor)
    assert length.num_tokens == len(encoded["input_ids"])
    assert length.num_images == len(row["image"])
    assert length.num_supervised_tokens == sum(label != IGNORE for label in encoded["labels"])
    assert encoded["labels"][: length.num_prefix_tokens] == [IGNORE] * length.num_prefix_tokens
    assert encoded["labels"][length.num_prefix_tokens] != IGNORE


class TestPreparation:
    def test_unknown_template_names_the_known_ones(self) -> None:
        for call in (prepare_tokenizer, lambda tokenizer, template: chat_template_for(template, tokenizer)):
            with pytest.raises(RecipeError, match="unknown template 'vicuna'; expected one of .*'vicuna_v1'"):
                call(make_tokenizer("bytes"), "vicuna")

    def test_auto_without_a_chat_template(self) -> None:
        with pytest.raises(RecipeError, match="this tokenizer has none. Set model.template to one of"):
            chat_template_for("auto", prepare_tokenizer(make_tokenizer("bytes"), "auto"))

    def test_missing_image_token_and_missing_eos(self) -> None:
        with pytest.raises(RecipeError, match="no special token '<image>'. Call prepare_tokenizer"):
            chat_template_for("vicuna_v1", make_tokenizer("bytes"))
        tokenizer = prepare_tokenizer(make_tokenizer("bytes"))
        tokenizer.eos_token = None
        with pytest.raises(RecipeError, match="Set its eos_token"):
            chat_template_for("vicuna_v1", tokenizer)

    def test_image_token_is_one_special_id_and_preparing_twice_changes_nothing(self) -> None:
        tokenizer = make_tokenizer("bytes")
        before = len(tokenizer)
        prepare_tokenizer(prepare_tokenizer(tokenizer))
        assert len(tokenizer) == before + 1
        assert tokenizer("a<image>b", add_special_tokens=False)["input_ids"].count(before) == 1
        assert tokenizer.decode([before], skip_special_tokens=True) == ""

    def test_spaces_after_special_tokens_are_unmade_and_stay_so_after_saving(self, tmp_path: Path) -> None:
        tokenizer = prepare_tokenizer(make_tokenizer("metaspace"), "vicuna_v1")
        tokenizer.save_pretrained(tmp_path)
        for t in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
            assert t.convert_ids_to_tokens(t("a</s>a", add_special_tokens=False)["input_ids"]) == ["▁a", "</s>", "a"]
        untouched = prepare_tokenizer(make_tokenizer("metaspace"), "auto")
        ids = untouched("a</s>a", add_special_tokens=False)["input_ids"]
        assert untouched.convert_ids_to_tokens(ids) == ["▁a", "</s>", "▁a"]

    def test_tokenizer_that_splits_the_image_token_is_refused(self) -> None:
        processor = tiny("bytes", "vicuna_v1")
        broken = SimpleNamespace(**{**vars(processor), "image_token_id": 5})
        with pytest.raises(DataError, match="does not read '<image>' as the one id 5"):
            encode_row(llava_row("<image>\nq", "a", image="x"), broken)

    def test_turns_end_with_the_templates_token_or_else_eos(self) -> None:
        for kind, template, closing in (
            ("bytes_with_turns", "chatml", "<|im_end|>"),
            ("bytes_with_turns", "llama_3", "<|eot_id|>"),
            ("bytes", "chatml", "</s>"),
            ("bytes", "llama_3", "</s>"),
        ):
            processor = tiny(kind, template)
            eos = processor.tokenizer.eos_token_id
            assert stop_token_ids(processor) == list(
                dict.fromkeys([processor.tokenizer.convert_tokens_to_ids(closing), eos])
            )
            assert learned_texts(encode_row(llava_row("q", "Blue"), processor), processor) == ["Blue" + closing]


def test_module_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, types; package = types.ModuleType('vir_hf'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['vir_hf'] = package; import vir_hf.rows.encoding\n"
        "print(sorted({'torch', 'transformers', 'PIL', 'datasets'} & set(sys.modules)))"
    )
    folder = str(Path(vir_hf.rows.encoding.__file__).parent)
    result = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@cache
def real_tokenizer(root: Path, name: str, **options: Any) -> Any:
    return AutoTokenizer.from_pretrained(root / "tokenizers" / name, **options)


@cache
def saved_and_loaded(root: Path, name: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        prepare_tokenizer(real_tokenizer(root, name)).save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)


def real(root: Path, name: str, template: str, **options: Any) -> SimpleNamespace:
    return make_processor(real_tokenizer(root, name, **options), template)


@pytest.mark.real_data
class TestRealTokenizers:
    @pytest.mark.parametrize("variant", ["as_is", "legacy", "not_legacy", "generic_class"])
    def test_all_golden_cases(self, shared_data: Path, variant: str) -> None:
        cases = json.loads((shared_data / "golden" / "labels_llava_reference.json").read_text())
        assert len(cases) == 23
        for case in cases:
            if variant == "generic_class":
                file = str(shared_data / "tokenizers" / "llama2" / "tokenizer.json")
                names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
                processor = generic_llama(file, case["template"], tuple(names.items()))
            else:
                options = {"legacy": {"legacy": True}, "not_legacy": {"legacy": False}}.get(variant, {})
                processor = real(shared_data, "llama2", case["template"], **options)
            row = {
                "id": case["name"],
                "conversations": case["conversations"],
                "image": "x" if case["has_image"] else None,
            }
            encoded = encode_row(row, processor, expand_images=False)
            ids = [-200 if i == processor.image_token_id else i for i in encoded["input_ids"]]
            assert ids == case["input_ids"], case["name"]
            assert encoded["labels"] == case["labels"], case["name"]

    @pytest.mark.parametrize("template", TEMPLATE_NAMES)
    @pytest.mark.parametrize("name", REAL_TOKENIZERS)
    def test_stock_chat_template_gives_the_ids_of_training_after_saving(
        self, shared_data: Path, name: str, template: str
    ) -> None:
        if template == "auto" and name in ("gpt2", "llama3"):
            with pytest.raises(RecipeError, match="this tokenizer has none"):
                real(shared_data, name, template)
            return
        check_stock_prompts(real(shared_data, name, template), saved_and_loaded(shared_data, name))

    @pytest.mark.parametrize("template", TEMPLATE_NAMES)
    @pytest.mark.parametrize("name", REAL_TOKENIZERS)
    def test_every_real_row_keeps_its_answers(self, shared_data: Path, name: str, template: str) -> None:
        if template == "auto" and name in ("gpt2", "llama3"):
            pytest.skip("the tokenizer has no chat template")
        processor = real(shared_data, name, template)
        rows = json.loads((shared_data / "coco" / "llava_demo.json").read_text())[:12]
        rows += json.loads((shared_data / "coco" / "text_only.json").read_text())[:12]
        for row in rows:
            answers = [m["content"][0]["text"] for m in to_messages(row)["messages"] if m["role"] == "assistant"]
            encoded = encode_row(row, processor)
            spans = supervised_spans(encoded)
            if (
                template == "plain" and spans[0][0] == 1
            ):  # the row begins with an answer, whose first token nothing predicts
                spans[0] = (0, spans[0][1])
            learned = [decode(processor.tokenizer, encoded["input_ids"][start:end]) for start, end in spans]
            if template == "plain":  # questions without an image leave nothing between the answers
                learned, answers = ["".join(learned)], ["\n".join(text for text in answers)]
            assert len(learned) == len(answers)
            for text, answer in zip(learned, answers, strict=True):
                assert answer.strip() in text.replace("\n ", "\n") if template == "plain" else answer.strip() in text

    def test_minimind_learns_from_the_generation_prompt_on(self, shared_data: Path) -> None:
        processor = real(shared_data, "minimind", "auto")
        row = llava_row("<image>\nWhat?", "A dog.", "Sure?", "<think>\nhm\n</think>\n\nNo.", image="x")
        assert learned_texts(encode_row(row, processor), processor) == [
            "A dog.<|im_end|>",
            "hm\n</think>\n\nNo.<|im_end|>",
        ]


@cache
def generic_llama(file: str, template: str, names: tuple[tuple[str, str], ...]) -> SimpleNamespace:
    return make_processor(PreTrainedTokenizerFast(tokenizer_file=file, **dict(names)), template)


def test_rows_shown_in_the_docs_are_rows() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data-formats.md").read_text(encoding="utf-8")
    blocks = [json.loads(block.split("```")[0]) for block in text.split("```json\n")[1:]]
    rows = [block for block in blocks if isinstance(block, dict) and {"conversations", "messages"} & set(block)]
    assert len(rows) >= 3
    for row in rows:
        assert list(row_problems(row)) == []
        assert encode_row(row, tiny("bytes_with_turns", "vicuna_v1"))["input_ids"]


@pytest.mark.parametrize("name", [*TEMPLATES, "chatml auto", "trims", "injects", "last"])
def test_long_conversations_take_no_more_renderings_than_short_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither to lay out, nor to cut to `max_length`; each rendering takes time in proportion to the length."""
    num_renders = 0
    original = chat_layout.render

    def counted(*arguments: Any, **keywords: Any) -> str:
        nonlocal num_renders
        num_renders += 1
        return original(*arguments, **keywords)

    def work(num_exchanges: int, cut: bool) -> int:
        nonlocal num_renders
        tokenizer = make_tokenizer("bytes_with_turns")
        if name not in TEMPLATES:
            tokenizer.chat_template = AUTO_TEMPLATES[name.partition(" ")[0]]
        processor = make_processor(tokenizer, name if name in TEMPLATES else "auto")
        row = llava_row(*[" Is it? ", " Yes,\n it is. "] * num_exchanges)
        num_tokens = len(encode_row(row, processor)["input_ids"])
        processor = make_processor(tokenizer, processor.template)
        vir_hf.rows.encoding._LAYOUTS.clear()
        num_renders = 0
        encoded = encode_row(row, processor, max_length=num_tokens // 2 if cut else None)
        assert len(encoded["input_ids"]) <= (num_tokens // 2 if cut else num_tokens)
        return num_renders

    monkeypatch.setattr(chat_layout, "render", counted)
    for cut in (False, True):
        few, many = work(50, cut), work(500, cut)
        assert 0 < many <= few <= 40, (few, many)


def test_cutting_a_template_that_writes_more_after_the_last_turn_takes_few_tries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The end is longer than many turns together, so that turns must go which would fit among others."""
    template = (
        "{% for m in messages %}{{ m.role + ':' + m.content }}{% if m.role == 'assistant' %}</s>{% endif %}"
        "{% if loop.last and m.role == 'assistant' %}" + "END OF ALL " * 60 + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = make_tokenizer("bytes")
    tokenizer.chat_template = template
    processor = make_processor(tokenizer, "auto")
    row = llava_row(*["q", "a"] * 200)
    whole = len(encode_row(row, processor)["input_ids"])
    num_tries = 0
    original = vir_hf.rows.encoding._encode

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal num_tries
        num_tries += 1
        return original(*arguments, **keywords)

    monkeypatch.setattr(vir_hf.rows.encoding, "_encode", counted)
    encoded = encode_row(row, processor, max_length=whole // 2)
    assert 0 < len(encoded["input_ids"]) <= whole // 2
    assert num_tries <= 20
