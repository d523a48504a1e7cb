# SPDX-License-Identifier: Apache-2.0
"""The demo: a chat about pictures with a model that vir_hf trained, in a browser or as a Space.

What it runs is said in `settings.json` beside it, or by `vir-hf demo`. The prompt is the training template's.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr

from vir_hf.errors import DataError
from vir_hf.images.opening import open_image, read_image_size
from vir_hf.inference import Answerer, Prompt, Question

logger = logging.getLogger("vir_hf.demo")

CSS = """
.gradio-container { width: 100% !important; max-width: 1100px !important; margin: 0 auto !important; }
.gradio-container main { width: 100% !important; max-width: 100% !important; padding-top: 12px !important; }
#title h1 { margin: 0; }
#box textarea { min-height: 24px; }
button[aria-label="Share"], button[title="Share"] { display: none !important; }  /* it would send pictures to another host */
@media (max-width: 640px) {
  .gradio-container main { padding: 6px !important; }
  #title p { display: none; }
}
"""


@dataclass(frozen=True)
class Settings:
    """What is shown, and the limits that keep the server alive.

    Attributes:
        model: a folder or a Hub id.
        adapter: put on top of `model`.
        base: a second model, to compare with.
        max_waiting: questions that may wait; further ones are told to come back.
        timeout_seconds: for one answer, which is cut there.
    """

    model: str
    adapter: str | None = None
    base: str | None = None
    title: str = ""
    load_in_4bit: bool = False
    device: str = "auto"
    zero_gpu: bool = False
    max_waiting: int = 20
    max_file_megabytes: int = 20
    max_megapixels: int = 40
    max_pictures: int = 6
    max_new_tokens: int = 512
    timeout_seconds: float = 120.0

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Return the settings of a JSON file; an environment variable `VIR_HF_MODEL` names another model."""
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if os.environ.get("VIR_HF_MODEL"):
            values["model"] = os.environ["VIR_HF_MODEL"]
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})


class Demo:
    """The functions behind the page. A conversation lives in the page alone; the server keeps nothing of it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        options: dict[str, Any] = {"load_in_4bit": settings.load_in_4bit, "device": settings.device}
        self.tuned = Answerer.load(settings.model, adapter=settings.adapter, **options)
        self.base = Answerer.load(settings.base, **options) if settings.base else None
        self.stops: dict[str, threading.Event] = {}  # by visitor: what ends the answer being made for them
        self.answer_all = self._answer_all
        if settings.zero_gpu:
            import spaces

            self.answer_all = spaces.GPU(duration=int(settings.timeout_seconds) + 10)(self._answer_all)

    def take(self, message: dict[str, Any], history: list[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
        """Return the emptied box and the conversation with the question; a bad one stays in the box, with the reason."""
        text, files = message.get("text") or "", list(message.get("files") or [])
        self.check(text, files)
        asked: list[Any] = [*({"path": path} for path in files), *([text] if text.strip() else [])]
        return self.working_box(), [*history, *({"role": "user", "content": part} for part in asked)]

    def check(self, text: str, files: list[str]) -> None:
        """Raise what the page shows in words."""
        if not text.strip() and not files:
            raise gr.Error("Write a question, or attach a picture.", title="Nothing to answer", print_exception=False)
        if len(files) > self.settings.max_pictures:
            raise gr.Error(f"At most {self.settings.max_pictures} pictures a question.", print_exception=False)
        for path in files:
            try:
                check_picture(path, self.settings.max_megapixels)
            except DataError as error:
                raise gr.Error(str(error).replace(path, Path(path).name), print_exception=False) from error

    def respond(
        self,
        history: list[dict[str, Any]],
        system: str,
        temperature: float,
        top_p: float,
        max_new_tokens: float,
        is_compared: bool,
        request: gr.Request | None = None,
    ) -> Iterator[tuple[Any, Any, Any, Any]]:
        """Yield conversation, base's answer, what the model saw and the box, as the answers grow."""
        if not history or history[-1]["role"] != "user":
            yield gr.skip(), gr.skip(), gr.skip(), self.ready_box()
            return
        generation = {
            "temperature": temperature,
            "top_p": top_p,
            "max_new_tokens": int(max_new_tokens),
            "timeout_seconds": self.settings.timeout_seconds,
        }
        start = start_of_question(history)
        try:
            question = question_of(history, system)
            views = [self.tuned.view(image) for image in question.images]
            with_base = bool(is_compared and self.base)
            began = time.monotonic()
            # Gradio cancels the event, not the model; on ZeroGPU the answer is made in another process.
            visitor = getattr(request, "session_hash", None)
            if visitor and not self.settings.zero_gpu:
                generation["stop"] = self.stops[visitor] = threading.Event()
            for tuned, base in self.answer_all(question, generation, with_base):
                compared = [*history[start:], {"role": "assistant", "content": base}] if with_base else []
                yield [*history, {"role": "assistant", "content": tuned}], compared, views, gr.skip()
            if time.monotonic() - began > self.settings.timeout_seconds:
                gr.Info(f"The answer was cut after {self.settings.timeout_seconds:.0f} s.")
            yield gr.skip(), gr.skip(), gr.skip(), self.ready_box()
        except Exception as error:  # the server stays, the question goes back into the box, the reason is shown
            if not isinstance(error, DataError):
                logger.exception("an answer failed")
            gr.Warning(in_words(error), title="No answer")
            yield history[:start], gr.skip(), gr.skip(), self.ready_box(as_message(history[start:]))

    def halt(self, request: gr.Request) -> None:
        """End the answer that is being made for a visitor after its current token."""
        stop = self.stops.pop(str(request.session_hash), None)
        if stop is not None:
            stop.set()

    def _answer_all(self, question: Question, generation: dict[str, Any], with_base: bool) -> Iterator[tuple[str, str]]:
        """Yield the tuned model's answer so far and the base model's, in turns."""
        answerers = [self.tuned, *([self.base] if with_base and self.base else [])]
        prompts: list[tuple[Answerer, Prompt]] = [(answerer, answerer.encode(question)) for answerer in answerers]
        streams = [answerer.stream_prompt(prompt, **generation) for answerer, prompt in prompts]
        texts = [""] * len(streams)
        try:
            for pieces in zip_longest(*streams, fillvalue=""):
                texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
                yield texts[0], texts[-1]
            if not texts[0]:
                yield "(an empty answer)", texts[-1]
        finally:
            for stream in streams:
                stream.close()

    def ask(self, question: str, picture: str | None = None) -> str:
        """Return one answer, for `gradio_client` and other programs; `picture` is an uploaded file."""
        self.check(question, [picture] if picture else [])
        try:
            return self.tuned.answer(
                [picture] if picture else [],
                question,
                timeout_seconds=self.settings.timeout_seconds,
                max_new_tokens=128,
            )
        except DataError as error:
            raise gr.Error(str(error), print_exception=False) from error

    @staticmethod
    def retry(history: list[dict[str, Any]], event: gr.RetryData) -> tuple[Any, list[dict[str, Any]]]:
        """Return the conversation up to the question whose answer is to be made again."""
        return Demo.working_box(), up_to_question(history, message_index(event.index))

    @staticmethod
    def edit(history: list[dict[str, Any]], event: gr.EditData) -> tuple[Any, list[dict[str, Any]]]:
        """Return the conversation up to an edited question, with its new text; its pictures stay."""
        index = message_index(event.index)
        if as_message([history[index]])["files"]:  # a picture has no text to change: it is asked again as it is
            return Demo.working_box(), up_to_question(history, index)
        return Demo.working_box(), [*history[:index], {"role": "user", "content": str(event.value)}]

    @staticmethod
    def undo(history: list[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
        """Return the box with the last question in it, and the conversation before it."""
        while history and history[-1]["role"] != "user":
            history = history[:-1]
        if not history:
            return gr.skip(), history
        start = start_of_question(history)
        return Demo.ready_box(as_message(history[start:])), history[:start]

    @staticmethod
    def attach(message: dict[str, Any] | None, picture: str | None) -> tuple[Any, Any]:
        """Return the box with a webcam picture added to it."""
        if picture is None:
            return gr.skip(), gr.skip()
        message = message or {}
        return {"text": message.get("text") or "", "files": [*(message.get("files") or []), picture]}, None

    @staticmethod
    def working_box() -> Any:
        return gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)

    @staticmethod
    def ready_box(value: dict[str, Any] | None = None) -> Any:
        buttons: dict[str, Any] = {"submit_btn": True, "stop_btn": False, "interactive": True}
        return gr.MultimodalTextbox(**buttons) if value is None else gr.MultimodalTextbox(value=value, **buttons)


def check_picture(path: str, max_megapixels: int) -> None:
    """Raise a `DataError` for a picture that is too large or cannot be decoded."""
    width, height = read_image_size(path)
    if width * height > max_megapixels * 1_000_000:
        raise DataError(
            f"{Path(path).name}: {width} x {height} pixels; this demo takes at most {max_megapixels} megapixels. Make it smaller."
        )
    open_image(path)


def parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a message's content as parts, whichever way the page writes it."""
    content = message["content"]
    found: list[dict[str, Any]] = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            found.append({"type": "text", "text": part})
        elif part.get("type") in ("text", "file"):
            found.append(part)
        elif part.get("path"):
            found.append({"type": "file", "file": part})
    return found


def as_message(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the messages of one turn as the box holds them: its text and the files of its pictures."""
    parts = [part for message in messages for part in parts_of(message)]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    return {"text": "\n".join(texts), "files": [part["file"]["path"] for part in parts if part["type"] == "file"]}


def start_of_question(history: list[dict[str, Any]]) -> int:
    """Return where the last question begins; each of its pictures and its text are messages of their own."""
    start = len(history)
    while start > 0 and history[start - 1]["role"] == "user":
        start -= 1
    return start


def question_of(history: list[dict[str, Any]], system: str | None) -> Question:
    """Return the page's conversation as the model is asked it."""
    start = start_of_question(history)
    earlier = []
    for role, messages in groupby(history[:start], key=lambda message: message["role"]):
        turn = as_message(list(messages))
        shown = [{"type": "image", "image": path} for path in turn["files"]]
        earlier.append({"role": role, "content": [*shown, {"type": "text", "text": turn["text"]}]})
    last = as_message(history[start:])
    return Question(last["text"], last["files"], (system or "").strip() or None, earlier)


def message_index(index: int | tuple[int, ...] | list[int]) -> int:
    return index if isinstance(index, int) else index[0]


def up_to_question(history: list[dict[str, Any]], index: int) -> list[dict[str, Any]]:
    """Return the conversation up to and including the question at or before a message."""
    while index >= 0 and history[index]["role"] != "user":
        index -= 1
    return history[: index + 1]


def in_words(error: Exception) -> str:
    if isinstance(error, DataError):
        return str(error)
    if "out of memory" in str(error).lower():
        return "The model ran out of memory. Send fewer or shorter questions, or try again later."
    return f"The model failed ({type(error).__name__}). The server goes on; try again, or ask something else."


def load_examples(settings: Settings) -> list[dict[str, Any]]:
    """Return the example questions that lie in the model's repository or run, with the files of their pictures."""
    name = settings.adapter or settings.model
    try:
        folder, given = _find_examples(name)
    except Exception as error:  # a repository without examples, or one that cannot be reached
        logger.info("no examples from %s: %s", name, error)
        return []
    examples = []
    for sample in given[:6]:
        picture = folder / str(sample["image"])
        if picture.is_file():
            examples.append({"text": sample["question"], "files": [str(picture)]})
    return examples


def _find_examples(name: str) -> tuple[Path, list[dict[str, Any]]]:
    if Path(name).is_dir():
        places = [Path(name) / "assets" / "samples" / "samples.json", Path(name) / "samples.json"]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            return Path(name), []
        return found.parent, json.loads(found.read_text(encoding="utf-8"))
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, allow_patterns="assets/samples/*")) / "assets" / "samples"
    listing = folder / "samples.json"
    return folder, json.loads(listing.read_text(encoding="utf-8")) if listing.is_file() else []


def build(settings: Settings) -> gr.Blocks:
    """Return the page, its queue set; the model is loaded."""
    demo = Demo(settings)
    name = settings.title or (settings.adapter or settings.model).rstrip("/").split("/")[-1]
    system = gr.Textbox(label="System prompt", info="Empty: the one the model was trained with.", lines=2, render=False)
    temperature = gr.Slider(0.0, 2.0, 0.0, step=0.1, label="Temperature", info="0: the likeliest answer.", render=False)
    top_p = gr.Slider(0.05, 1.0, 1.0, step=0.05, label="Top-p", render=False)
    longest = gr.Slider(
        1, settings.max_new_tokens, min(256, settings.max_new_tokens), step=1, label="Max new tokens", render=False
    )
    compare = gr.Checkbox(
        value=False,
        label="Compare with the base model",
        visible=demo.base is not None,
        elem_id="compare",
        container=False,
        render=False,
    )
    with gr.Blocks(title=name, analytics_enabled=False, fill_height=True) as page:
        gr.Markdown(f"# {name}\nAsk about pictures. Answers can be wrong.", elem_id="title")
        with gr.Row(equal_height=True):
            chat = gr.Chatbot(
                label="Conversation",
                elem_id="chat",
                height="54vh",
                min_height=260,
                editable="user",
                group_consecutive_messages=False,  # Gradio cannot edit a text that is grouped with a picture
                feedback_options=None,
                buttons=["copy"],
                placeholder="Attach or paste pictures, write a question, press Enter.",
                allow_file_downloads=False,
            )
            base_chat = gr.Chatbot(
                label="The base model, before tuning",
                elem_id="base",
                height="54vh",
                visible=False,
                feedback_options=None,
                buttons=["copy"],
            )
        box = gr.MultimodalTextbox(
            label="Question",
            show_label=False,
            placeholder="Your question; paste or attach pictures",
            sources=["upload"],
            file_types=["image"],
            file_count="multiple",
            autofocus=True,
            elem_id="box",
            max_plain_text_length=20_000,
        )
        with gr.Row():
            undo = gr.Button("Undo", size="sm", min_width=100, elem_id="undo")
            clear = gr.Button("New conversation", size="sm", min_width=100, elem_id="clear")
        compare.render()
        with gr.Accordion("What the model saw", open=False, elem_id="seen"):
            views = gr.Gallery(
                label="The pictures of the last question, as the model read them",
                columns=4,
                height=240,
                elem_id="views",
            )
        with gr.Accordion("Webcam", open=False, elem_id="webcam"):
            # Without image_mode Gradio hands on the file as it came. It would open and decode it, of whatever kind it is.
            camera = gr.Image(sources=["webcam"], type="filepath", image_mode=None, label="Webcam", height=280)
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            system.render()
            with gr.Row():
                temperature.render()
                top_p.render()
                longest.render()
        examples = load_examples(settings)
        if examples:
            gr.Examples([[example] for example in examples], [box], label="Examples")

        outputs = [chat, base_chat, views, box]
        inputs = [chat, system, temperature, top_p, longest, compare]
        model: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        quick: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
        starts = [
            box.submit(demo.take, [box, chat], [box, chat], **quick),
            chat.retry(demo.retry, [chat], [box, chat], **quick),
            chat.edit(demo.edit, [chat], [box, chat], **quick),
        ]
        answers = [start.success(demo.respond, inputs, outputs, show_progress="minimal", **model) for start in starts]
        box.stop(demo.ready_box, None, [box], cancels=answers, **quick)
        undo.click(demo.undo, [chat], [box, chat], cancels=answers, **quick)
        clear.click(lambda: ([], [], None, demo.ready_box()), None, outputs, cancels=answers, **quick)
        chat.clear(lambda: ([], None, demo.ready_box()), None, outputs[1:], cancels=answers, **quick)
        for event in (box.stop, undo.click, clear.click, chat.clear):
            event(demo.halt, None, None, **quick)
        page.unload(demo.halt)
        compare.change(lambda is_on: gr.Chatbot(visible=is_on), [compare], [base_chat], **quick)
        camera.change(demo.attach, [box, camera], [box, camera], **quick)
        question, picture, answer = (
            gr.Textbox(visible=False),
            gr.File(visible=False, type="filepath"),
            gr.Textbox(visible=False),
        )
        question.submit(
            demo.ask, [question, picture], answer, api_name="answer", concurrency_id="model", concurrency_limit=1
        )
    page.queue(max_size=settings.max_waiting)
    return page


def launch(page: gr.Blocks, settings: Settings, **options: Any) -> Any:
    """Serve the page; on this machine alone unless `server_name` or `share` say otherwise."""
    fonts = ["ui-sans-serif", "system-ui", "sans-serif"]  # the visitor's own: nothing is fetched
    theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    values = {
        "server_name": "127.0.0.1",
        "share": False,
        "footer_links": [],
        "ssr_mode": False,
        "theme": theme,
        "css": CSS,
    }
    return page.launch(max_file_size=f"{settings.max_file_megabytes}mb", **{**values, **options})


if __name__ == "__main__":
    found = Settings.read(Path(__file__).with_name("settings.json"))
    # In a Space the proxy in front reaches the app from outside its container.
    launch(build(found), found, server_name="0.0.0.0" if os.environ.get("SPACE_ID") else "127.0.0.1")
