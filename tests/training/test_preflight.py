"""What would fail late fails at once, with the key and the remedy; what is tried leaves no trace."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from vir_hf.errors import RecipeError
from vir_hf.recipe.load import Recipe, load_recipe
from vir_hf.training import preflight
from vir_hf.training import run as training
from vir_hf.training.run import train


def recipe_for(root: Path, output_dir: Path, *more: str) -> Recipe:
    overrides = tiny.training_overrides(root, output_dir, **{"training.max_steps": 2})
    return load_recipe([*overrides, "quantization=none", "lora.lora_dropout=0.1", *more])


def test_an_output_dir_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(RecipeError, match=r"training.output_dir=.*taken/run: nothing can be written there"):
        preflight.check_output_dir(tmp_path / "taken" / "run")


def test_a_writable_output_dir_is_left_empty(tmp_path: Path) -> None:
    preflight.check_output_dir(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_a_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install trackio"):
        preflight.check_trackers(["trackio"])
    preflight.check_trackers("none")


def fake_wandb(monkeypatch: pytest.MonkeyPatch, *, netrc: dict[str, str], **settings: Any) -> None:
    """Put a wandb in place that has these settings, and a netrc file with these keys by server."""
    values = {"mode": "online", "base_url": "https://wandb.corp.example", "api_key": None, **settings}
    package, auth = ModuleType("wandb"), ModuleType("wandb.sdk.lib.wbauth")
    package.setup = lambda: SimpleNamespace(settings=SimpleNamespace(**values))  # type: ignore[attr-defined]
    auth.read_netrc_auth = lambda *, host: netrc.get(host)  # type: ignore[attr-defined]
    for name, module in (
        ("wandb", package),
        ("wandb.sdk", ModuleType("wandb.sdk")),
        ("wandb.sdk.lib", ModuleType("lib")),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, auth.__name__, auth)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "wandb" else None)


def test_wandb_is_asked_whether_it_has_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_wandb(monkeypatch, netrc={"https://api.wandb.ai": "key"})
    for report_to in ("wandb", ["wandb"], "all"):
        with pytest.raises(RecipeError, match=r"nobody is logged in at https://wandb.corp.example. Run `wandb login`"):
            preflight.check_trackers(report_to)
    for settings in ({"api_key": "key"}, {"identity_token_file": "token"}, {"mode": "offline"}, {"mode": "disabled"}):
        fake_wandb(monkeypatch, netrc={}, **settings)
        preflight.check_trackers("wandb")
    fake_wandb(monkeypatch, netrc={"https://wandb.corp.example": "key"})
    preflight.check_trackers("wandb")
    monkeypatch.setattr(sys.modules["wandb"], "setup", lambda: (_ for _ in ()).throw(ValueError("a bad\nkey " * 99)))
    with pytest.raises(RecipeError, match="wandb cannot be used as it is set up: a bad key") as error:
        preflight.check_trackers("wandb")
    assert len(str(error.value)) < 500


KEY = "0123456789" * 4


@pytest.mark.parametrize(
    ("how", "is_fine"),
    [
        ("nothing", False),
        ("key of another server", False),
        ("netrc of the server", True),
        ("NETRC", True),
        ("WANDB_API_KEY", True),
        ("WANDB_MODE", True),
        ("wandb offline", True),
    ],
)
def test_the_real_wandb_is_understood(how: str, is_fine: bool, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_") and name != "NETRC"}
    environment = {**kept, "HOME": str(tmp_path), "WANDB_BASE_URL": "https://wandb.corp.example"}

    def netrc(name: str, machine: str) -> None:
        (tmp_path / name).write_text(f"machine {machine}\n  login user\n  password {KEY}\n")
        (tmp_path / name).chmod(0o600)

    if how == "key of another server":
        netrc(".netrc", "api.wandb.ai")
    elif how == "netrc of the server":
        netrc(".netrc", "wandb.corp.example")
    elif how == "NETRC":
        netrc("elsewhere", "wandb.corp.example")
        environment["NETRC"] = str(tmp_path / "elsewhere")
    elif how == "WANDB_API_KEY":
        environment["WANDB_API_KEY"] = KEY
    elif how == "WANDB_MODE":
        environment["WANDB_MODE"] = "offline"
    elif how == "wandb offline":
        (tmp_path / "wandb").mkdir()
        offline = [sys.executable, "-m", "wandb", "offline"]
        subprocess.run(offline, cwd=tmp_path, env=environment, check=True, capture_output=True)
    code = "from vir_hf.training.preflight import check_trackers; check_trackers('wandb')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) is is_fine, done.stderr
    assert is_fine or "nobody is logged in at https://wandb.corp.example" in done.stderr


def test_pushing_offline_or_unknown_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RecipeError, match="HF_HUB_OFFLINE is set"):
        preflight.check_hub("me/model")
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def whoami(*args: Any, **kwargs: Any) -> None:
        raise OSError("401, token hf_secret")

    monkeypatch.setattr("huggingface_hub.HfApi.whoami", whoami)
    with pytest.raises(RecipeError, match="hf auth login") as error:
        preflight.check_hub("me/model")
    assert "hf_secret" not in str(error.value)


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RecipeError, match=f"port {port} on 127.0.0.1: is taken"):
            preflight.check_port("127.0.0.1", port)
        with pytest.raises(RecipeError, match="Name another: --port"):
            preflight.choose_port(port)
        assert preflight.choose_port(None, default=port) != port
    preflight.check_port("127.0.0.1", port)
    assert preflight.choose_port(None, default=port) == preflight.choose_port(port) == port


def test_splitting_is_refused_with_several_processes(tiny_parts: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_parts, tmp_path, "training.on_out_of_memory=split")
    preflight.check_machine(recipe, world_size=1)
    with pytest.raises(RecipeError, match="training.on_out_of_memory=raise"):
        preflight.check_machine(recipe, world_size=2)


def test_a_generation_config_that_cannot_be_saved_stops_at_once(
    tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = training.load_model_and_processor

    def loaded(*args: Any, **kwargs: Any) -> Any:
        model, processor = load(*args, **kwargs)
        model.generation_config.temperature = 0.2
        model.generation_config.do_sample = False
        return model, processor

    monkeypatch.setattr(training, "load_model_and_processor", loaded)
    monkeypatch.setattr(training, "keep_base", lambda *args, **kwargs: None)
    with pytest.raises(RecipeError, match="generation_config cannot be saved.*do_sample"):
        train(recipe_for(tiny_parts, tmp_path))


def test_a_disk_too_small_for_one_checkpoint_stops_at_once(
    tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("vir_hf.training.checkpoints.shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(RecipeError, match="one checkpoint needs .* but only 0.00 MiB are free"):
        train(recipe_for(tiny_parts, tmp_path))


def test_a_model_that_cannot_be_saved_stops_at_once(
    tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*args: Any, **kwargs: Any) -> None:
        raise TypeError("no JSON for this")

    monkeypatch.setattr("peft.PeftModel.save_pretrained", save)
    with pytest.raises(RecipeError, match="would fail at its first checkpoint"):
        train(recipe_for(tiny_parts, tmp_path))


def test_bad_base_weights_stop_at_once(tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = training.load_model_and_processor

    def loaded(*args: Any, **kwargs: Any) -> Any:
        model, processor = load(*args, **kwargs)
        with torch.no_grad():
            model.model.language_model.norm.weight.fill_(float("nan"))
        return model, processor

    monkeypatch.setattr(training, "load_model_and_processor", loaded)
    with pytest.raises(RecipeError, match="its loss is nan before the first step"):
        train(recipe_for(tiny_parts, tmp_path))


def test_trying_leaves_no_trace(tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout draws random numbers and TRL counts tokens: with and without the preflight a run is the same."""
    with_it = train(recipe_for(tiny_parts, tmp_path / "with"))
    monkeypatch.setattr(preflight, "check_run", lambda trainer: None)
    without = train(recipe_for(tiny_parts, tmp_path / "without"))
    mine, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert with_it["loss_history"] == without["loss_history"] and with_it["num_tokens"] == without["num_tokens"]
    assert [path.name for path in (tmp_path / "with").glob(".*")] == [".vir_hf"]
