"""The demo: the Space's folder, its limits through a real client, and every control in a real browser."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import minihub
import pytest
import yaml
from hub_client import environment, vir_hf
from PIL import Image
from tiny_run import QUESTION, pictures

from vir_hf import cli
from vir_hf.errors import RecipeError
from vir_hf.publishing import space

pytest.importorskip("gradio")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_a_space_folder_says_what_it_runs_and_on_what(tmp_path: Path) -> None:
    options = space.SpaceOptions("user/tiny", base="user/base", title="Squares", load_in_4bit=True, zero_gpu=True)
    space.write_space(tmp_path / "space", options)
    front = yaml.safe_load((tmp_path / "space" / "README.md").read_text().split("---\n")[1])
    assert front["sdk"] == "gradio" and front["app_file"] == "app.py" and front["title"] == "Squares"
    assert front["models"] == ["user/tiny", "user/base"]
    pins = dict(
        line.split("==") for line in (tmp_path / "space" / "requirements.txt").read_text().split() if "==" in line
    )
    assert front["sdk_version"] == pins["gradio"] and {"torch", "transformers", "bitsandbytes"} <= set(pins)
    assert "+" not in "".join(pins.values())  # a Space finds no build of this machine
    settings = json.loads((tmp_path / "space" / "settings.json").read_text())
    assert settings["model"] == "user/tiny" and settings["load_in_4bit"] and settings["zero_gpu"]
    with pytest.raises(RecipeError, match="is not empty"):
        space.write_space(tmp_path / "space", options)


ALONE = """
import importlib.abc, importlib.metadata as metadata, re, sys
wanted, todo = set(), [line.split("==")[0] for line in open("requirements.txt").read().split()]
norm = lambda name: re.sub("[-_.]+", "-", name).lower()
while todo:
    name = norm(re.split(r"[ ;<>=!~\\[(]", todo.pop())[0])
    if name in wanted:
        continue
    try:
        needs = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        continue
    wanted.add(name)
    todo += [need for need in needs if "extra ==" not in need]
owners = metadata.packages_distributions()
foreign = {top for top, found in owners.items() if not {norm(one) for one in found} & wanted} - {"vir_hf"}  # its own copy
class OnlyRequired(importlib.abc.MetaPathFinder):
    def __init__(self, finders):
        self.finders = finders
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in foreign:
            return None
        found = (finder.find_spec(name, path, target) for finder in self.finders if hasattr(finder, "find_spec"))
        return next((spec for spec in found if spec is not None), None)
    def find_distributions(self, *context):
        finders = [finder for finder in self.finders if hasattr(finder, "find_distributions")]
        return (one for finder in finders for one in finder.find_distributions(*context))
sys.meta_path[:] = [OnlyRequired(list(sys.meta_path))]
assert {"trl", "datasets", "hydra"} <= foreign, "nothing is kept out"
import app, vir_hf
page = app.build(app.Settings.read(__import__("pathlib").Path("settings.json")))
print(vir_hf.__file__)
"""


def test_a_space_starts_with_only_its_own_requirements(tiny_run: Path, tmp_path: Path) -> None:
    space.write_space(tmp_path / "space", space.SpaceOptions("user/tiny"))
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"VIR_HF_MODEL": str(tiny_run), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=tmp_path / "space", env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert Path(done.stdout.strip().splitlines()[-1]).is_relative_to(tmp_path / "space")


def test_a_space_is_created_and_filled_in_one_commit_with_the_token_as_a_secret(tmp_path: Path) -> None:
    hub, http = minihub.start(tmp_path / "hub")
    try:
        env = environment(hub, tmp_path, MY_TOKEN="hf_" + "r" * 34)
        words = ["space", "user/tiny", "user/demo", "--hardware", "t4-small", "--model-token-from", "MY_TOKEN"]
        done = vir_hf(words, env)
        assert done.returncode == 0, done.stderr
        made = hub.repositories["space", "user/demo"]
        assert made.meta["sdk"] == "gradio" and made.meta["hardware"] == "t4-small"
        assert made.meta["secrets"] == [{"key": "HF_TOKEN", "value": "hf_" + "r" * 34}]
        assert {"app.py", "requirements.txt", "README.md", "settings.json", "vir_hf/inference.py"} <= set(
            made.files() or {}
        )
        assert len(made.history) == 2
        assert not any(b"r" * 34 in hub.read(made, path) for path in made.files() or {})
        again = vir_hf(["space", "user/tiny", "user/demo"], env)
        assert again.returncode == 0, again.stderr  # ours, so it may be replaced
    finally:
        http.shutdown()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["outputs/run/x", "user/demo"], "can only show what lies on the Hub"),
        (["user/tiny", "demo"], "is no name on the Hub"),
        (["user/tiny", "user/demo", "--model-token-from", "NOT_SET_ANYWHERE"], "is not set"),
    ],
)
def test_a_wrong_call_of_space_ends_with_2(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    dry_run = [] if "--model-token-from" in words else ["--dry-run"]
    assert cli.main(["space", *words, *dry_run]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def app() -> Any:
    from vir_hf.commands.demo import load_app

    return load_app()


@pytest.mark.parametrize(
    "head", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 10 10 rectfill\n"]
)
def test_an_upload_starts_no_other_program(
    app: Any, head: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gradio
    from PIL import EpsImagePlugin

    from vir_hf.errors import DataError

    program = tmp_path / "gs"
    program.write_text(f'#!/bin/sh\ntouch {tmp_path / "started"}\n[ "$1" = --version ] && echo 10.0\nexit 0\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    upload = tmp_path / "photo.jpg"
    upload.write_bytes(head)
    with pytest.raises(DataError, match="is no image file of a kind opened here"):
        app.check_picture(str(upload), 40)
    camera = gradio.Image(
        sources=["webcam"], type="filepath", image_mode=None
    )  # as the page has it, see test_structure
    payload = gradio.data_classes.ImageData(path=str(upload), orig_name="photo.jpg")
    assert camera.preprocess(payload) == str(upload)
    assert not (tmp_path / "started").exists()


class Served:
    """A demo running in this process."""

    def __init__(self, app: Any, run: Path, **settings: Any) -> None:
        base = {"model": str(run), "device": "cpu", "base": str(run), "timeout_seconds": 20.0}
        self.settings = app.Settings(**{**base, **settings})
        self.page = app.build(self.settings)
        _, self.url, _ = app.launch(self.page, self.settings, prevent_thread_lock=True, quiet=True)


@pytest.fixture(scope="module")
def served(app: Any, tiny_run: Path) -> Iterator[Served]:
    (tiny_run / "samples").mkdir(exist_ok=True)
    Image.new("RGB", (40, 30), "green").save(tiny_run / "samples" / "green.png")
    sample = {"image": "samples/green.png", "question": "What colour?", "before": "", "after": "green"}
    (tiny_run / "samples.json").write_text(json.dumps([sample]))
    demo = Served(app, tiny_run, max_waiting=8, max_megapixels=1, max_pictures=2)
    yield demo
    demo.page.close()
    (tiny_run / "samples.json").unlink()


def client_of(served: Served) -> Any:
    from gradio_client import Client

    return Client(served.url, verbose=False, analytics_enabled=False)


def test_the_demo_serves_this_machine_alone(served: Served) -> None:
    assert served.url.startswith("http://127.0.0.1:") and not served.page.share
    assert served.page.server_name == "127.0.0.1"


def test_a_program_gets_the_answer_that_the_library_gives(served: Served, tiny_run: Path, tiny_parts: Path) -> None:
    from gradio_client import handle_file

    from vir_hf.inference import Answerer

    image = pictures(tiny_parts)[5]
    expected = Answerer.load(str(tiny_run), device="cpu").answer([image], QUESTION, max_new_tokens=128)
    assert client_of(served).predict(QUESTION, handle_file(image), api_name="/answer") == expected


def test_bad_input_is_answered_in_words_and_the_server_stays(served: Served, tiny_parts: Path, tmp_path: Path) -> None:
    from gradio_client import handle_file

    (tmp_path / "broken.png").write_bytes(Path(pictures(tiny_parts)[0]).read_bytes()[:70])
    (tmp_path / "words.png").write_text("this is no picture")
    Image.new("1", (9_000, 9_000)).save(tmp_path / "huge.png")  # 81 megapixels in a few kilobytes
    client = client_of(served)
    for name, expected in (
        ("broken.png", "broken.png"),
        ("words.png", "no image file"),
        ("huge.png", "9000 x 9000 pixels; this demo takes at most 1 megapixels"),
    ):
        with pytest.raises(Exception, match=expected):
            client.predict(QUESTION, handle_file(str(tmp_path / name)), api_name="/answer")
    with pytest.raises(Exception, match="Write a question"):
        client.predict("  ", None, api_name="/answer")
    with pytest.raises(Exception, match="reads at most"):
        client.predict("word " * 3000, None, api_name="/answer")
    assert client.predict("What is red?", None, api_name="/answer") == "It is a colour."


def test_fifty_clients_at_once_are_served_or_told_to_wait(served: Served) -> None:
    started = threading.Barrier(50)

    def ask(_: int) -> str:
        client = client_of(served)
        with contextlib.suppress(threading.BrokenBarrierError):
            started.wait(timeout=60)
        try:
            return str(client.predict("What is red?", None, api_name="/answer"))
        except Exception as error:
            return f"error: {error}"

    with ThreadPoolExecutor(50) as pool:
        said = list(pool.map(ask, range(50)))
    answered = [text for text in said if text == "It is a colour."]
    refused = [text for text in said if "queue" in text.lower()]
    assert len(answered) >= 8 and len(answered) + len(refused) == 50, sorted(set(said))
    assert client_of(served).predict("What is red?", None, api_name="/answer") == "It is a colour."


def test_the_page_turns_into_the_conversation_the_model_is_asked(app: Any) -> None:
    def file(name: str) -> dict[str, Any]:
        return {"role": "user", "content": [{"type": "file", "file": {"path": name}}]}

    def text(role: str, said: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": said}]}

    history = [
        file("a.png"),
        text("user", "Red?"),
        text("assistant", "Yes."),
        file("b.png"),
        file("c.png"),
        text("user", "And?"),
    ]
    question = app.question_of(history, " Be brief. ")
    assert question.text == "And?" and question.images == ["b.png", "c.png"] and question.system == "Be brief."
    assert question.history[0]["content"] == [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Red?"}]
    assert [turn["role"] for turn in question.history] == ["user", "assistant"]
    assert app.question_of([text("user", "Hi")], None).system is None
    _, before = app.Demo.undo(history)
    assert before == history[:3]
    assert app.up_to_question(history, 2) == history[:2]


def test_a_failing_model_is_told_in_words_and_the_question_comes_back(served: Served, app: Any) -> None:
    demo = app.Demo(served.settings)

    def broken(*_: object) -> Iterator[tuple[str, str]]:
        raise RuntimeError("CUDA error: an illegal memory access")
        yield "", ""

    demo.answer_all = broken
    history = [{"role": "user", "content": "What is red?"}]
    steps = list(demo.respond(history, None, 0, 1, 10, False))
    assert steps[-1][0] == [] and steps[-1][3].value["text"] == "What is red?"
    assert "RuntimeError" in app.in_words(RuntimeError("x")) and "memory" in app.in_words(
        RuntimeError("CUDA out of memory")
    )


def test_examples_come_from_the_model(served: Served, app: Any) -> None:
    (example,) = app.load_examples(served.settings)
    assert example["text"] == "What colour?" and example["files"][0].endswith("green.png")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


class Page:
    """The demo's page in a browser, by what a person does with it."""

    def __init__(self, browser: Any, url: str, **context: Any) -> None:
        self.context = browser.new_context(permissions=["camera", "clipboard-read", "clipboard-write"], **context)
        self.context.set_default_timeout(20_000)
        self.page = self.context.new_page()
        self.hosts: set[str] = set()
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        self.page.goto(url)
        self.page.wait_for_selector("#box textarea")

    def attach(self, *files: str) -> None:
        self.page.set_input_files("#box input[type=file]", list(files))
        self.page.wait_for_function(f"document.querySelectorAll('#box .thumbnail-item').length == {len(files)}")

    def send(self, text: str) -> None:
        self.page.focus("#box textarea")
        self.page.keyboard.type(text)
        self.page.keyboard.press("Enter")

    def said(self, who: str = "bot", where: str = "#chat") -> list[str]:
        texts = self.page.locator(f"{where} .message.{who}").all_inner_texts()
        return [text.strip() for text in texts if text.strip()]

    def wait_for(self, number: int, last: str = ".", where: str = "#chat") -> list[str]:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            said = self.said(where=where)
            if len(said) == number and said[-1].endswith(last) and not self.page.locator("#box .stop-button").count():
                return said
            time.sleep(0.1)
        raise AssertionError(f"waited for {number} answers, found {self.said(where=where)}")

    def press(self, label: str) -> None:
        self.page.locator(f'#chat button[aria-label="{label}"], #chat button[title="{label}"]').last.click()

    def toast(self) -> str:
        shown = self.page.locator("[data-testid=toast-body]").last
        shown.wait_for()
        return str(shown.inner_text())


@pytest.mark.browser
@pytest.mark.slow
class TestBrowser:
    def test_pictures_questions_retry_edit_undo_and_a_new_conversation(
        self, browser: Any, served: Served, tiny_parts: Path
    ) -> None:
        page = Page(browser, served.url)
        page.attach(pictures(tiny_parts)[5])
        page.send(QUESTION)
        (first,) = page.wait_for(1)
        assert first.startswith("It is a ")
        assert page.page.locator("#chat .message.user img").count() == 1
        page.press("Retry")
        time.sleep(1)
        assert page.wait_for(1) == [first]
        page.press("Edit")
        page.page.locator("#chat textarea").last.fill("Sure?")
        page.press("Submit")
        time.sleep(1)
        page.wait_for(1)
        assert page.said("user") == ["Sure?"]
        page.send("What is red?")
        page.wait_for(2)
        page.page.click("#undo")
        page.page.wait_for_function("document.querySelector('#box textarea').value == 'What is red?'")
        page.wait_for(1)
        page.page.click("#clear")
        page.page.wait_for_function("document.querySelectorAll('#chat .message').length == 0")
        assert page.hosts == {served.url.split("/")[2]}

    def test_stop_ends_an_answer(self, browser: Any, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers import LlavaForConditionalGeneration

        from vir_hf.inference import Answerer

        calls: list[int] = []
        prepare, stream = LlavaForConditionalGeneration.prepare_inputs_for_generation, Answerer.stream_prompt

        def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            time.sleep(0.1)
            return prepare(self, *args, **kwargs)

        def endless(self: Any, prompt: Any, **generation: Any) -> Any:
            return stream(self, prompt, min_new_tokens=250, **generation)

        monkeypatch.setattr(LlavaForConditionalGeneration, "prepare_inputs_for_generation", slow)
        monkeypatch.setattr(Answerer, "stream_prompt", endless)
        page = Page(browser, served.url)
        page.send("Tell me a story.")
        page.page.locator("#box .stop-button").wait_for()
        page.page.locator("#chat .message.bot").first.wait_for()
        page.page.locator("#box .stop-button").click()
        page.page.locator("#box .submit-button").wait_for()
        time.sleep(1)
        num_calls = len(calls)
        time.sleep(1)
        assert 0 < len(calls) == num_calls < 200  # the model itself has stopped

    def test_settings_reach_the_model(self, browser: Any, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        from vir_hf.inference import Answerer

        seen: list[dict[str, Any]] = []
        stream = Answerer.stream_prompt

        def watched(self: Any, prompt: Any, **generation: Any) -> Any:
            text = self.processor.tokenizer.decode(prompt.input_ids)
            seen.append({**generation, "has_system": "Answer with one word." in text})
            return stream(self, prompt, **generation)

        monkeypatch.setattr(Answerer, "stream_prompt", watched)
        page = Page(browser, served.url)
        page.page.click("#settings > button")
        page.page.get_by_label("System prompt").fill("Answer with one word.")
        for label, value in (("Temperature", "0.5"), ("Top-p", "0.6"), ("Max new tokens", "2")):
            field = page.page.get_by_label(f"number input for {label}")
            field.fill(value)
            field.press("Tab")
        page.send("What is red?")
        (short,) = page.wait_for(1, last="")
        assert seen[0]["has_system"] and len(short.split()) <= 2
        assert (seen[0]["temperature"], seen[0]["top_p"], seen[0]["max_new_tokens"]) == (0.5, 0.6, 2)

    def test_a_pasted_picture_and_the_webcam_go_into_the_box(
        self, browser: Any, served: Served, tiny_parts: Path
    ) -> None:
        page = Page(browser, served.url)
        data = list(Path(pictures(tiny_parts)[0]).read_bytes())
        page.page.evaluate(
            """bytes => {
                const file = new File([new Uint8Array(bytes)], "pasted.png", {type: "image/png"});
                const data = new DataTransfer(); data.items.add(file);
                const box = document.querySelector("#box textarea"); box.focus();
                box.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true}));
            }""",
            data,
        )
        page.page.wait_for_function("document.querySelectorAll('#box .thumbnail-item').length == 1")
        page.page.click("#webcam > button")
        page.page.locator("#webcam").get_by_text("Click to Access Webcam").click()
        capture = page.page.locator(
            '#webcam button[aria-label="capture photo"], #webcam button[title="grant webcam access"]'
        )
        capture.last.wait_for()
        time.sleep(1)
        capture.last.click()
        page.page.wait_for_function("document.querySelectorAll('#box .thumbnail-item').length == 2")

    def test_base_and_tuned_answer_side_by_side_and_the_view_is_shown(
        self, browser: Any, served: Served, tiny_parts: Path
    ) -> None:
        page = Page(browser, served.url)
        page.page.click("#compare input")
        page.page.locator("#base").wait_for()
        page.attach(pictures(tiny_parts)[1])
        page.send(QUESTION)
        (tuned,) = page.wait_for(1)
        assert page.said(where="#base") == [tuned]  # the same model on both sides here
        left, right = (page.page.locator(name).bounding_box() for name in ("#chat", "#base"))
        assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"] + 1
        page.page.click("#seen > button")
        page.page.locator("#views img").first.wait_for()

    def test_an_example_fills_the_box(self, browser: Any, served: Served) -> None:
        page = Page(browser, served.url)
        page.page.get_by_text("What colour?").click()
        page.page.wait_for_function("document.querySelector('#box textarea').value == 'What colour?'")

    def test_bad_input_is_said_in_words(self, browser: Any, served: Served, tiny_parts: Path, tmp_path: Path) -> None:
        page = Page(browser, served.url)
        page.page.focus("#box textarea")
        page.page.keyboard.press("Enter")
        assert "Write a question" in page.toast()
        Image.new("1", (9_000, 9_000)).save(tmp_path / "huge.png")
        page.attach(str(tmp_path / "huge.png"))
        page.send("What is it?")
        page.page.get_by_text("at most 1 megapixels").wait_for()
        assert page.page.input_value("#box textarea") == "What is it?"  # nothing is lost

    @pytest.mark.parametrize(
        "context",
        [
            {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
            {"viewport": {"width": 1200, "height": 900}, "color_scheme": "dark"},
        ],
        ids=["phone", "dark"],
    )
    def test_it_fits_a_phone_and_a_dark_room(self, browser: Any, served: Served, context: dict[str, Any]) -> None:
        page = Page(browser, served.url, **context)
        page.send("What is red?")
        page.wait_for(1)
        width = page.page.evaluate("document.documentElement.scrollWidth")
        assert width <= context["viewport"]["width"]
        box = page.page.locator("#box").bounding_box()
        assert box["y"] + box["height"] <= context["viewport"]["height"] and box["width"] >= width * 0.75
        if context.get("color_scheme") == "dark":
            colours = page.page.evaluate(
                "['backgroundColor', 'color'].map(n => getComputedStyle(document.querySelector('#chat .message.bot'))[n])"
            )
            background, text = (sum(map(float, c[c.index("(") + 1 : -1].split(",")[:3])) for c in colours)
            assert text - background > 250

    def test_the_keyboard_reaches_every_control(self, browser: Any, served: Served) -> None:
        page = Page(browser, served.url)
        page.page.focus("#box textarea")
        reached = set()
        for _ in range(12):
            page.page.keyboard.press("Tab")
            reached.add(page.page.evaluate("(document.activeElement.closest('[id]') || {}).id"))
        assert {"undo", "clear"} <= reached
