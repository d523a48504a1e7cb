"""Publishing, through huggingface_hub's own client in its own process, to a Hub on loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import minihub
import pytest
import yaml
from hub_client import environment, vir_hf
from PIL import Image
from tiny_run import QUESTION, pictures, train_run

from vir_hf import cli
from vir_hf.errors import RecipeError
from vir_hf.publishing.repository import write_repository

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[minihub.Hub]:
    running, http = minihub.start(tmp_path / "hub")
    yield running
    running.hold_uploads.clear()
    http.shutdown()


@pytest.fixture(scope="module")
def lora_run(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"lora": "default", "trainable.language_model": "lora", "training.max_steps": 10}
    return train_run(tiny_parts, tmp_path_factory.mktemp("lora") / "run", **changes)


def python(code: str, env: dict[str, str], cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def code_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def local_answer(run: Path, image: str) -> str:
    from vir_hf.inference import Answerer

    return Answerer.load(str(run), device="cpu").answer([image], QUESTION, max_new_tokens=100)


def test_a_pushed_model_answers_the_same_in_a_clean_process(
    tiny_run: Path, tiny_parts: Path, server: minihub.Hub, tmp_path: Path
) -> None:
    image = pictures(tiny_parts)[5]
    shutil.copyfile(image, tmp_path / "photo.jpg")  # Pillow goes by the content
    done = vir_hf(["push", str(tiny_run), "user/tiny", "--license", "apache-2.0"], environment(server, tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"{server.url}/user/tiny" in done.stdout
    repository = server.repositories["model", "user/tiny"]
    assert [commit["title"] for commit in repository.history] == ["initial commit", "Upload the model with vir_hf"]
    blocks = code_blocks(server.read(repository, "README.md").decode())
    assert len(blocks) == 2  # transformers' and ours, run as they stand in the card
    expected = local_answer(tiny_run, image)
    assert expected.startswith("It is a ")
    for block in blocks:
        reader = environment(server, tmp_path, HF_TOKEN=None)
        assert python(block, reader, tmp_path) == expected


@pytest.mark.long
def test_a_pushed_adapter_answers_the_same_with_peft_and_with_us(
    lora_run: Path, tiny_parts: Path, server: minihub.Hub, tmp_path: Path
) -> None:
    image = pictures(tiny_parts)[1]
    shutil.copyfile(image, tmp_path / "photo.jpg")
    done = vir_hf(["push", str(lora_run), "user/lora"], environment(server, tmp_path))
    assert done.returncode == 0, done.stderr
    repository = server.repositories["model", "user/lora"]
    assert {"adapter_model.safetensors", "base/model.safetensors", "recipe.yaml"} <= set(repository.files() or {})
    expected = local_answer(lora_run, image)
    for block in code_blocks(server.read(repository, "README.md").decode()):
        assert python(block, environment(server, tmp_path), tmp_path) == expected


def test_a_merged_adapter_is_a_whole_model_with_the_same_answers(
    lora_run: Path, tiny_parts: Path, tmp_path: Path
) -> None:
    facts = write_repository(lora_run, tmp_path / "merged", "user/merged", kind="merged")
    assert not facts.is_adapter and not (tmp_path / "merged" / "adapter_config.json").exists()
    image = pictures(tiny_parts)[1]
    assert local_answer(tmp_path / "merged", image) == local_answer(lora_run, image)


def test_what_lies_on_the_hub_is_the_model_and_nothing_of_the_machine(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_of(tiny_run, tmp_path)
    (run / "training_args.bin").write_bytes(b"pickle")
    (run / "optimizer.pt").write_bytes(b"pickle")
    (run / "checkpoint-10").mkdir()
    (run / "checkpoint-10" / "model.safetensors").write_bytes(b"old")
    write_repository(run, tmp_path / "out", "user/tiny")
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"README.md", "recipe.yaml", "metrics.json", "assets/loss.png", "config.json", "model.safetensors"} <= names
    assert not any(name.startswith("checkpoint") or name.endswith((".bin", ".pt")) for name in names)
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe["data"]["data_path"] == "rows.json" and recipe["model"]["language_model"] == "lm"
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert str(tmp_path.parent).encode() not in path.read_bytes(), path


def copy_of(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*")))


def test_a_dry_run_writes_the_folder_and_opens_no_connection(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError(f"a connection was opened: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    folder = tmp_path / "folder"
    assert cli.main(["push", str(tiny_run), "user/tiny", "--dry-run", "--folder", str(folder)]) == 0
    assert (folder / "model.safetensors").is_file() and "nothing was sent" in capsys.readouterr().out
    assert cli.main(["push", str(tiny_run), "user/tiny", "--dry-run", "--folder", str(folder)]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics.json", '{"note": "hf_' + "a" * 34 + '"}', "metrics.json line 1: holds a Hugging Face token"),
        ("metrics.json", '{"wandb_api_key": "0123456789abcdef"}', "holds a password or key"),
        ("chat_template.jinja", "-----BEGIN RSA PRIVATE KEY-----", "holds a private key"),
        ("modeling.py", "WEIGHTS = 'RUN/model.bin'", "names a folder of this machine"),
    ],
)
def test_a_secret_or_a_path_of_the_machine_stops_a_push(
    file: str, text: str, message: str, tiny_run: Path, tmp_path: Path
) -> None:
    run = copy_of(tiny_run, tmp_path)
    (run / file).write_text(text.replace("RUN", str(run)))
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        write_repository(run, tmp_path / "out", "user/tiny")
    assert "a" * 34 not in str(caught.value) and "0123456789abcdef" not in str(caught.value)


def test_a_secret_in_the_weights_own_header_is_found(tiny_run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run = copy_of(tiny_run, tmp_path)
    tensors = load_file(run / "model.safetensors")
    save_file(tensors, run / "model.safetensors", {"format": "pt", "token": "hf_" + "b" * 34})
    with pytest.raises(RecipeError, match="model.safetensors line 1: holds a Hugging Face token"):
        write_repository(run, tmp_path / "out", "user/tiny")


def test_sample_pictures_are_published_only_under_a_named_licence(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_of(tiny_run, tmp_path)
    (run / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(run / "samples" / "one.png")
    sample = {"image": "samples/one.png", "question": QUESTION, "before": "?", "after": "It is red."}
    (run / "samples.json").write_text(json.dumps([sample]))
    write_repository(run, tmp_path / "without", "user/tiny")
    assert not list((tmp_path / "without").rglob("one.png"))
    assert "It is red." in (tmp_path / "without" / "README.md").read_text()
    write_repository(run, tmp_path / "with", "user/tiny", samples_licence="cc-by-4.0")
    assert (tmp_path / "with" / "assets" / "samples" / "one.png").is_file()
    (run / "samples.json").write_text(json.dumps([{**sample, "image": "../elsewhere.png"}]))
    with pytest.raises(RecipeError, match="does not lie in the run's folder"):
        write_repository(run, tmp_path / "escape", "user/tiny", samples_licence="cc-by-4.0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "user/tiny"], "no such folder"),
        ([".", "user/tiny"], "holds neither a model nor an adapter"),
        ([".", "tiny"], "'tiny' is no name on the Hub"),
        ([".", "user/ti ny"], "is no name on the Hub"),
    ],
)
def test_a_wrong_call_of_push_ends_with_2(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["push", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_whole_model_cannot_be_merged(tiny_run: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["push", str(tiny_run), "user/tiny", "--merged"]) == 2
    assert "is a whole model" in capsys.readouterr().err


def no_token(server: minihub.Hub) -> dict[str, str | None]:
    return {"HF_TOKEN": None}


def wrong_token(server: minihub.Hub) -> dict[str, str | None]:
    return {"HF_TOKEN": "hf_of_somebody_else"}


def read_only(server: minihub.Hub) -> dict[str, str | None]:
    server.read_only = True
    return {}


def taken(server: minihub.Hub) -> dict[str, str | None]:
    repository = server.create("model", "user/tiny")
    server.commit(repository, "main", "mine", {"README.md": b"---\ntags: [mine]\n---\n", "config.json": b"{}"}, [])
    return {}


def public_already(server: minihub.Hub) -> dict[str, str | None]:
    server.create("model", "user/tiny")
    return {}


def full(server: minihub.Hub) -> dict[str, str | None]:
    server.quota = 1000
    return {}


def cut(server: minihub.Hub) -> dict[str, str | None]:
    server.cut_upload_after = 1000
    return {}


def nobody_there(server: minihub.Hub) -> dict[str, str | None]:
    return {"HF_ENDPOINT": "http://127.0.0.1:9"}


def offline(server: minihub.Hub) -> dict[str, str | None]:
    return {"HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize(
    ("fault", "repo", "message"),
    [
        pytest.param(no_token, "user/tiny", "not logged in. Run `hf auth login`", marks=pytest.mark.long),
        (wrong_token, "user/tiny", "does not take this token"),
        pytest.param(read_only, "user/tiny", "may not write there", marks=pytest.mark.long),
        (taken, "user/tiny", "the name is taken"),
        pytest.param(public_already, "user/tiny", "exists and is public", marks=pytest.mark.long),
        pytest.param(full, "user/tiny", "the storage of this account is used up", marks=pytest.mark.long),
        pytest.param(cut, "user/tiny", "the connection was cut", marks=pytest.mark.long),  # the client tries for 20 s
        pytest.param(nobody_there, "user/tiny", "the connection was cut", marks=pytest.mark.long),
        pytest.param(offline, "user/tiny", "HF_HUB_OFFLINE=1", marks=pytest.mark.long),
        pytest.param(None, "somebody/tiny", "may not write there", marks=pytest.mark.long),
    ],
)
def test_what_the_hub_refuses_is_said_in_words_and_leaves_nothing_visible(
    fault: object, repo: str, message: str, tiny_run: Path, server: minihub.Hub, tmp_path: Path
) -> None:
    changes = fault(server) if callable(fault) else {}
    words = ["push", str(tiny_run), repo, "--private"] if fault is not taken else ["push", str(tiny_run), repo]
    before = {key: len(found.history) for key, found in server.repositories.items()}
    done = vir_hf(words, environment(server, tmp_path, **changes))
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in done.stderr
    for key, repository in server.repositories.items():
        assert len(repository.history) == before.get(key, 1)  # no commit, or the empty first one


def uploads(server: minihub.Hub) -> list[str]:
    return [path for verb, path in server.requests if verb == "PUT" and path.startswith("/_lfs/")]


@pytest.mark.long
def test_a_killed_upload_goes_on_where_it_stopped(lora_run: Path, server: minihub.Hub, tmp_path: Path) -> None:
    server.uploads_before_cut = 2
    server.hold_uploads.set()
    command = [sys.executable, "-m", "vir_hf.cli", "push", str(lora_run), "user/lora"]
    process = subprocess.Popen(
        command, env=environment(server, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while len(uploads(server)) < 3 or len(list(server.lfs_folder.glob("*"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    arrived = {path.name for path in server.lfs_folder.glob("*")}
    repository = server.repositories["model", "user/lora"]
    assert set(repository.files() or {}) == {".gitattributes"}
    server.hold_uploads.clear()
    server.requests.clear()
    done = vir_hf(["push", str(lora_run), "user/lora"], environment(server, tmp_path))
    assert done.returncode == 0, done.stderr
    assert uploads(server) and not arrived & {path.rsplit("/", 1)[1] for path in uploads(server)}
    assert len(repository.history) == 2
    assert server.read(repository, "base/model.safetensors") == (lora_run / "base" / "model.safetensors").read_bytes()


def test_a_second_push_replaces_the_first_in_one_commit(tiny_run: Path, server: minihub.Hub, tmp_path: Path) -> None:
    env = environment(server, tmp_path)
    assert vir_hf(["push", str(tiny_run), "user/tiny"], env).returncode == 0
    repository = server.repositories["model", "user/tiny"]
    server.commit(repository, "main", "stray", {"model-00002-of-00002.safetensors": b"stray"}, [])
    assert vir_hf(["push", str(tiny_run), "user/tiny", "--license", "mit"], env).returncode == 0
    assert "model-00002-of-00002.safetensors" not in (repository.files() or {})
    assert b"license: mit" in server.read(repository, "README.md")


def test_a_push_through_xet_can_be_read_back(tiny_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("hf_xet")
    store = tmp_path / "store"
    store.mkdir()
    running, http = minihub.start(tmp_path / "hub", xet=f"local://{store}")
    try:
        env = environment(running, tmp_path, HF_HUB_DISABLE_XET=None)
        done = vir_hf(["push", str(tiny_run), "user/tiny"], env)
        assert done.returncode == 0, done.stderr
        assert not uploads(running) and any("xet-write-token" in path for _, path in running.requests)
        code = "from huggingface_hub import hf_hub_download as get; print(get('user/tiny', 'model.safetensors'))"
        fetched = python(code, env, tmp_path)
        assert Path(fetched).read_bytes() == (tiny_run / "model.safetensors").read_bytes()
    finally:
        http.shutdown()


def test_plain_push_to_hub_of_the_model_works(tiny_run: Path, server: minihub.Hub, tmp_path: Path) -> None:
    code = f"""
from vir_hf import LlavaForCausalLM, LlavaProcessor
model = LlavaForCausalLM.from_pretrained({str(tiny_run)!r})
model.push_to_hub("user/plain")
LlavaProcessor.from_pretrained({str(tiny_run)!r}).push_to_hub("user/plain")
again = LlavaForCausalLM.from_pretrained("user/plain")
print(all((a == b).all() for a, b in zip(model.parameters(), again.parameters(), strict=True)))
"""
    assert python(code, environment(server, tmp_path), tmp_path) == "True"
    config = json.loads(server.read(server.repositories["model", "user/plain"], "config.json"))
    assert config["architectures"] == ["LlavaForConditionalGeneration"]


def test_training_pushes_at_its_end_when_asked(tiny_parts: Path, server: minihub.Hub, tmp_path: Path) -> None:
    import tiny

    changes = {"training.max_steps": 1, "training.push_to_hub": "true", "training.hub_model_id": "user/trained"}
    words = ["train", *tiny.training_overrides(tiny_parts, tmp_path / "run", **changes), "quantization=none"]
    done = vir_hf(words, environment(server, tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    repository = server.repositories["model", "user/trained"]
    assert len(repository.history) == 2 and "adapter_model.safetensors" in (repository.files() or {})
    assert f"{server.url}/user/trained" in done.stdout
