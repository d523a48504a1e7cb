"""Answers: the training prompt, batches equal to single questions, streams, and the commands `answer` and `chat`."""

from __future__ import annotations

import base64
import io
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_run import QUESTION, pictures

from vir_hf import cli
from vir_hf.errors import DataError, RecipeError
from vir_hf.inference import Answerer, Question
from vir_hf.rows.encoding import encode_row


@pytest.fixture(scope="module")
def answerer(tiny_run: Path) -> Answerer:
    return Answerer.load(str(tiny_run), device="cpu")


@pytest.fixture
def images(tiny_parts: Path) -> list[str]:
    return pictures(tiny_parts)


def turn(role: str, text: str, *shown: str) -> dict:
    return {"role": role, "content": [*({"type": "image", "image": s} for s in shown), {"type": "text", "text": text}]}


def test_a_trained_model_says_what_it_was_taught(answerer: Answerer, images: list[str]) -> None:
    answer = answerer.answer(images[:1], QUESTION)
    assert answer.startswith("It is a ") and answer.endswith(" square.")
    assert answerer.answer([], "What is red?") == "It is a colour."


def test_the_answer_is_that_of_stock_transformers(tiny_run: Path, answerer: Answerer, images: list[str]) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    from transformers import LlavaProcessor as NativeProcessor

    model = LlavaForConditionalGeneration.from_pretrained(tiny_run)
    processor = NativeProcessor.from_pretrained(tiny_run)
    assert type(AutoProcessor.from_pretrained(tiny_run)).__name__ == "LlavaProcessor"
    for image in images:
        asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
        text = processor.apply_chat_template([asked], add_generation_prompt=True)
        inputs = processor(images=Image.open(image), text=text, add_special_tokens=False, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert answerer.answer([image], QUESTION, max_new_tokens=20) == expected


def test_the_prompt_is_what_stood_before_the_answer_in_training(answerer: Answerer, images: list[str]) -> None:
    words = [("human", f"<image>\n{QUESTION}"), ("gpt", "It is red."), ("human", "Sure?"), ("gpt", "It is.")]
    row = {"id": "1", "image": "a.png", "conversations": [{"from": who, "value": value} for who, value in words]}
    encoded = encode_row(row, answerer.processor)
    first = next(i for i, label in enumerate(encoded["labels"]) if label >= 0)
    assert answerer.encode(Question(QUESTION, images[:1])).input_ids == encoded["input_ids"][:first]
    history = [turn("user", QUESTION, images[0]), turn("assistant", "It is red.")]
    prompt = answerer.encode(Question("Sure?", history=history))
    assert prompt.input_ids == encoded["input_ids"][: len(prompt.input_ids)]
    assert encoded["labels"][len(prompt.input_ids)] >= 0  # the second answer begins right there
    assert len(prompt.pixel_values) == 1


def test_text_that_looks_like_a_special_token_stays_text(answerer: Answerer, images: list[str]) -> None:
    processor = answerer.processor
    plain = answerer.encode(Question("Is it?", images[:1])).input_ids
    odd = answerer.encode(Question("Is <image> </s> it?", images[:1])).input_ids
    for token in (processor.image_token_id, processor.tokenizer.eos_token_id):
        assert odd.count(token) == plain.count(token)
    assert "<image> </s>" in processor.tokenizer.decode([i for i in odd if i != processor.image_token_id])


def test_a_batch_gives_what_single_questions_give(answerer: Answerer, images: list[str]) -> None:
    questions = [Question(QUESTION, [image]) for image in images]
    questions += [
        Question("What is red?"),
        Question("Compare them, please, in a long sentence.", images[:3]),
        Question(
            "Sure?", system="Be brief.", history=[turn("user", QUESTION, images[1]), turn("assistant", "It is red.")]
        ),
    ]
    batched = answerer.answer_batch(questions, max_new_tokens=20)
    single = [
        answerer.answer(q.images, q.text, q.system, q.history, max_new_tokens=20)  # type: ignore[arg-type]
        for q in questions
    ]
    assert batched == single
    assert len(set(batched)) > 2  # or the comparison would show nothing


def test_another_picture_changes_what_the_model_computes(answerer: Answerer, images: list[str]) -> None:
    prompts = [answerer.encode(Question(QUESTION, [image])) for image in images[:2]]
    logits = [
        answerer.model(input_ids=torch.tensor([p.input_ids]), pixel_values=torch.stack(p.pixel_values)).logits[0, -1]
        for p in prompts
    ]
    assert not torch.allclose(logits[0], logits[1], atol=1e-4)


def test_a_stream_joined_is_the_answer(answerer: Answerer, images: list[str]) -> None:
    pieces = list(answerer.stream(images[:1], QUESTION))
    assert len(pieces) > 1
    assert "".join(pieces).strip() == answerer.answer(images[:1], QUESTION)


def test_closing_a_stream_stops_the_model(answerer: Answerer, images: list[str]) -> None:
    calls: list[int] = []

    def wait(*args: object) -> None:
        calls.append(1)
        time.sleep(0.01)

    hook = answerer.model.register_forward_pre_hook(wait)
    try:
        stream = answerer.stream(images[:1], QUESTION, min_new_tokens=200, max_new_tokens=200)
        next(stream)
        stream.close()  # joins the thread: no call is made afterwards
    finally:
        hook.remove()
    assert len(calls) < 150


def test_an_error_in_the_model_reaches_the_reader_of_the_stream(answerer: Answerer) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("the GPU fell off the bus")

    hook = answerer.model.register_forward_pre_hook(broken)
    try:
        with pytest.raises(RuntimeError, match="fell off"):
            list(answerer.stream([], "Hello"))
    finally:
        hook.remove()


def test_a_timeout_ends_an_answer_after_its_current_token(answerer: Answerer) -> None:
    prompt = answerer.encode(Question("Hello"))
    output = answerer._generate([prompt], __import__("threading").Event(), None, {"timeout_seconds": 0.0})
    assert output.shape[1] == len(prompt.input_ids) + 1


def test_sampling_is_what_the_call_says_not_what_the_checkpoint_says(tiny_run: Path, images: list[str]) -> None:
    from vir_hf.model.for_use import load_run

    model, processor = load_run(str(tiny_run), device="cpu")
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    sampler = Answerer(model, processor)
    assert len({sampler.answer(images[:1], QUESTION) for _ in range(3)}) == 1
    assert len({sampler.answer(images[:1], QUESTION, temperature=3.0, max_new_tokens=20) for _ in range(4)}) > 1


def test_what_cannot_be_asked_is_said_in_words(answerer: Answerer, images: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(images[0]).read_bytes()[:60])
    with pytest.raises(DataError, match="question is empty"):
        answerer.answer([], "  ")
    with pytest.raises(DataError, match="broken.png"):
        answerer.answer([str(broken)], QUESTION)
    with pytest.raises(DataError, match="reads at most 512"):
        answerer.answer(images[:1], "word " * 600)


def test_the_view_is_the_padded_picture(answerer: Answerer, images: list[str]) -> None:
    view = answerer.view(images[0])
    assert view.size == answerer.processor.image_size
    mean = [round(255 * value) for value in answerer.processor.image_processor.image_mean]
    assert all(abs(a - b) <= 2 for a, b in zip(view.getpixel((3, 0)), mean, strict=True))  # 40 x 30: a bar on top


def test_answer_prints_one_answer(tiny_run: Path, images: list[str], capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["answer", str(tiny_run), "--image", images[0], QUESTION, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("It is a ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image", "nowhere.png", QUESTION], "nowhere.png: no such file"),
        ([""], "question is empty"),
        ([], "question is empty"),
        (["--input", "rows.jsonl"], "--input goes with --output"),
        (["--output", "a.jsonl", QUESTION], "--output goes with --input"),
        ([QUESTION, "--temperature", "-1"], "expected 0 or more"),
    ],
)
def test_a_wrong_call_of_answer_ends_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["answer", "unused", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["answer", str(tmp_path / "nothing"), QUESTION]) == 2
    assert "nothing" in capsys.readouterr().err


def answer_file(tiny_run: Path, rows: Path, output: Path, folder: Path) -> int:
    words = ["--input", str(rows), "--output", str(output), "--image-folder", str(folder), "--batch-size", "4"]
    return cli.main(["answer", str(tiny_run), *words, "--device", "cpu", "--max-new-tokens", "20"])


def test_a_file_of_rows_is_answered_and_a_cut_one_goes_on(
    tiny_run: Path, tiny_parts: Path, tmp_path: Path, answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, output, folder = tiny_parts / "rows.json", tmp_path / "answers.jsonl", tiny_parts / "images"
    assert answer_file(tiny_run, rows, output, folder) == 0
    whole = output.read_bytes()
    answers = [json.loads(line) for line in whole.splitlines()]
    assert [a["id"] for a in answers] == [row["id"] for row in json.loads(rows.read_text())]
    assert all(a["answer"] for a in answers)
    output.write_bytes(whole[: len(whole) // 2])  # killed in the middle of a line
    assert answer_file(tiny_run, rows, output, folder) == 0
    assert output.read_bytes() == whole
    monkeypatch.setattr(Answerer, "load", None)  # all is there: nothing is loaded
    assert answer_file(tiny_run, rows, output, folder) == 0


def test_a_row_that_cannot_be_answered_does_not_stop_the_others(
    tiny_run: Path, tiny_parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    given = [
        {"question_id": 1, "image": "0000.png", "text": QUESTION},
        {"id": "gone", "image": "gone.png", "question": QUESTION},
        {"id": "empty", "question": ""},
        {"id": "last", "image": ["0001.png", "0002.png"], "question": "Compare."},
    ]
    rows.write_text("\n".join(map(json.dumps, given)))
    assert answer_file(tiny_run, rows, output, tiny_parts / "images") == 1
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == ["1", "last"]
    said = capsys.readouterr().err
    assert "id 'gone'" in said and "id 'empty'" in said and "2 of 4 answered" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1}\n{"id": 1}', "row 0 and of row 1"),
        ("{", "line 1: the file ends in the middle"),
        ("[1]", "row 0: found int"),
    ],
)
def test_a_file_that_is_no_list_of_questions_ends_with_2(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    assert answer_file(tmp_path, tmp_path / "rows.jsonl", tmp_path / "out.jsonl", tmp_path) == 2
    assert message in capsys.readouterr().err


def test_chat_keeps_pictures_and_history(
    tiny_run: Path,
    images: list[str],
    answerer: Answerer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    typed = [
        QUESTION,
        f"/image '{images[1]}'",
        QUESTION,
        "",
        "/image nowhere.png",
        "/what",
        "/help",
        "/quit",
        "never read",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed)))
    words = ["chat", str(tiny_run), "--image", images[0], "--device", "cpu", "--max-new-tokens", "20"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    first = answerer.answer(images[:1], QUESTION, max_new_tokens=20)
    history = [turn("user", QUESTION, images[0]), turn("assistant", first)]
    second = answerer.answer(images[1:2], QUESTION, history=history, max_new_tokens=20)
    assert f"\n{first}\n" in out and f"\n{second}\n" in out
    for expected in ("an empty question", "nowhere.png: no such file", "unknown command /what", "/reset"):
        assert expected in out


def test_chat_begins_anew_after_reset_and_system(answerer: Answerer, capsys: pytest.CaptureFixture) -> None:
    from vir_hf.commands.chat import Chat

    chat = Chat(answerer, {"max_new_tokens": 10})
    assert chat.take("What is red?") and len(chat.history) == 2
    assert chat.take("/system Be brief.") and chat.history == [] and chat.system == "Be brief."
    assert chat.take("What is red?") and chat.take("/reset") and chat.history == []
    assert chat.take("/system") and chat.system is None
    assert not chat.take("/quit")


def test_a_model_without_a_tower_is_refused() -> None:
    from vir_hf.inference import _tower_name

    with pytest.raises(RecipeError, match="no vision_tower"):
        _tower_name(torch.nn.Linear(1, 1))


@pytest.mark.slow
def test_transformers_serve_answers_the_same_over_the_openai_protocol(
    tiny_run: Path, answerer: Answerer, images: list[str]
) -> None:
    for module in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(module)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = shutil.which("transformers", path=str(Path(sys.executable).parent))
    assert program is not None
    command = [program, "serve", str(tiny_run), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        data = "data:image/png;base64," + base64.b64encode(Path(images[5]).read_bytes()).decode()
        asked = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": QUESTION}]
        body = {
            "model": str(tiny_run),
            "max_tokens": 20,
            "temperature": 0,
            "messages": [{"role": "user", "content": asked}],
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        deadline = time.monotonic() + 120
        while True:
            try:
                reply = json.load(urllib.request.urlopen(request, timeout=60))
                break
            except urllib.error.URLError:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.5)
    finally:
        server.terminate()
        server.wait(timeout=30)
    assert reply["choices"][0]["message"]["content"].strip() == answerer.answer(
        images[5:6], QUESTION, max_new_tokens=20
    )
