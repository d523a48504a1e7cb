"""A run that goes on from any checkpoint ends with the same bits; one that would not is refused."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from vir_hf.data.sources import load_llava_dataset
from vir_hf.errors import RecipeError, RunError
from vir_hf.recipe.load import Recipe, load_recipe
from vir_hf.training import checkpoints, compatibility
from vir_hf.training import run as training
from vir_hf.training.run import train
from vir_hf.training.signals import RunStopped
from vir_hf.training.state import reading_no_code

KINDS = {
    "full": ["lora=none", "quantization=none", "trainable.language_model=full"],
    "lora": ["quantization=none", "lora.lora_dropout=0.1"],
    "qlora": ["quantization.only_on_cuda=false", "lora.lora_dropout=0.1"],
    "tiles": [
        "quantization=none",
        "model.tiling=tiles",
        "model.pixel_shuffle=2",
        "trainable.language_model=full",
        "lora=none",
    ],
}
MEASURED = ("tokens_per_second", "data_seconds", "memory_gib", "train_runtime", "train_samples_per_second")


def recipe_for(root: Path, output_dir: Path, kind: str, *more: str) -> Recipe:
    """Two epochs of three steps, a checkpoint every two, a log line every three: nothing coincides."""
    overrides = tiny.training_overrides(root, output_dir)
    schedule = ["training.num_train_epochs=2", "training.save_steps=2", "training.logging_steps=3"]
    return load_recipe([*overrides, *schedule, "training.save_total_limit=10", *KINDS[kind], *more])


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(
        next(folder / name for name in ("adapter_model.safetensors", "model.safetensors") if (folder / name).exists())
    )


def assert_same_run(left: Path, right: Path) -> None:
    """The same weights, optimizer, scheduler and log, to the bit."""
    for one, other in ((left, right), (left / "checkpoint-6", right / "checkpoint-6")):
        mine, theirs = weights_of(one), weights_of(other)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    states = [torch.load(path / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"] for path in (left, right)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        assert all(torch.equal(value, states[1][number][name]) for name, value in state.items())
    logs = [
        json.loads((path / "checkpoint-6" / "trainer_state.json").read_text())["log_history"] for path in (left, right)
    ]
    for line, other_line in zip(*logs, strict=True):
        assert {k: v for k, v in line.items() if k not in MEASURED} == {
            k: v for k, v in other_line.items() if k not in MEASURED
        }
    metrics = [json.loads((path / "metrics.json").read_text()) for path in (left, right)]
    assert {k: v for k, v in metrics[0].items() if k != "seconds"} == {
        k: v for k, v in metrics[1].items() if k != "seconds"
    }


@pytest.fixture(scope="module")
def runs(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Undisturbed runs, made when first asked for; each keeps its checkpoints 2, 4 and 6."""
    made: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "run"
            train(recipe_for(tiny_parts, made[kind], kind))
        return made[kind]

    return run


def interrupted(source: Path, output_dir: Path, *steps: int) -> Path:
    """An output directory as a run leaves it that ended after these checkpoints."""
    for step in steps:
        shutil.copytree(source / f"checkpoint-{step}", output_dir / f"checkpoint-{step}")
    if (source / "base").exists():
        shutil.copytree(source / "base", output_dir / "base")
    return output_dir


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_same_bits(kind: str, runs: Any, tiny_parts: Path, tmp_path: Path) -> None:
    undisturbed = runs(kind)
    output_dir = interrupted(undisturbed, tmp_path / "run", 2)  # in the middle of an epoch and of a log interval
    train(recipe_for(tiny_parts, output_dir, kind, "training.resume=auto"))
    assert_same_run(undisturbed, output_dir)


@pytest.mark.parametrize("step", [4, 6])
def test_any_checkpoint_will_do_also_the_last(step: int, runs: Any, tiny_parts: Path, tmp_path: Path) -> None:
    output_dir = interrupted(runs("lora"), tmp_path / "run", step)
    path = output_dir / f"checkpoint-{step}"
    train(recipe_for(tiny_parts, output_dir, "lora", f"training.resume={path}"))
    assert_same_run(runs("lora"), output_dir)


def test_a_last_step_inside_an_epoch_is_not_exceeded(tiny_parts: Path, tmp_path: Path) -> None:
    more = ("training.max_steps=4", "training.resume=auto")
    train(recipe_for(tiny_parts, tmp_path / "run", "full", *more))
    (tmp_path / "run" / "metrics.json").unlink()
    before = weights_of(tmp_path / "run")
    metrics = train(recipe_for(tiny_parts, tmp_path / "run", "full", *more))
    assert metrics["num_steps"] == 4
    after = weights_of(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_finished_run_is_not_redone(
    runs: Any, tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output_dir = shutil.copytree(runs("full"), tmp_path / "run")

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was loaded again")

    monkeypatch.setattr(training, "load_model_and_processor", load)
    metrics = train(recipe_for(tiny_parts, output_dir, "full", "training.resume=auto"))
    assert metrics == json.loads((output_dir / "metrics.json").read_text())


def test_a_finished_run_whose_weights_are_cut_short_is_made_whole(
    runs: Any, tiny_parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output_dir = shutil.copytree(runs("full"), tmp_path / "run")
    weights = output_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        train(recipe_for(tiny_parts, output_dir, "full", "training.resume=auto"))
    assert "this run was finished, but model.safetensors cannot be read any more" in caplog.text
    assert_same_run(runs("full"), output_dir)


def test_a_checkpoint_that_is_named_is_looked_for_beside_a_finished_run_too(
    runs: Any, tiny_parts: Path, tmp_path: Path
) -> None:
    output_dir = shutil.copytree(runs("full"), tmp_path / "run")
    with pytest.raises(RecipeError, match="there is no such folder"):
        train(recipe_for(tiny_parts, output_dir, "full", f"training.resume={tmp_path / 'nowhere'}"))


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(
    runs: Any, tiny_parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output_dir = interrupted(runs("full"), tmp_path / "run", 2, 4)
    optimizer = output_dir / "checkpoint-4" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        train(recipe_for(tiny_parts, output_dir, "full", "training.resume=auto"))
    assert "checkpoint-4: passed over: optimizer.pt has" in caplog.text
    assert_same_run(runs("full"), output_dir)


def test_a_changed_recipe_is_refused_by_key(runs: Any, tiny_parts: Path, tmp_path: Path) -> None:
    output_dir = interrupted(runs("full"), tmp_path / "run", 2)
    changes = ["training.learning_rate=1e-5", "training.num_train_epochs=3", "training.save_steps=5"]
    with pytest.raises(RecipeError) as error:
        train(recipe_for(tiny_parts, output_dir, "full", "training.resume=auto", *changes))
    message = str(error.value)
    assert "training.learning_rate: was 0.0002, is 1e-05" in message and "training.num_train_epochs: was 2" in message
    assert "save_steps" not in message


def test_a_longer_run_may_go_on_where_the_rate_is_constant(tiny_parts: Path, tmp_path: Path) -> None:
    constant = ("training.lr_scheduler_type=constant", "training.warmup_steps=0", "training.resume=auto")
    long = tmp_path / "long"
    train(recipe_for(tiny_parts, long, "full", *constant, "training.num_train_epochs=3"))
    short = tmp_path / "short"
    train(recipe_for(tiny_parts, short, "full", *constant))
    train(recipe_for(tiny_parts, short, "full", *constant, "training.num_train_epochs=3"))
    mine, theirs = weights_of(short), weights_of(long)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_every_recipe_key_is_free_rounding_or_refused(tiny_parts: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_parts, tmp_path, "full")
    kinds = {
        key: compatibility.kind_of_change(key, recipe)
        for key in (
            "training.output_dir",
            "training.dataloader_num_workers",
            "training.dataloader_drop_last",
            "training.per_device_train_batch_size",
            "training.global_batch_size",
            "training.seed",
            "trainable.projector",
            "model.dtype",
        )
    }
    assert list(kinds.values()) == ["free", "free", "refused", "rounding", "refused", "refused", "refused", "refused"]


def test_changed_rows_are_refused(runs: Any, tiny_parts: Path, tmp_path: Path) -> None:
    output_dir = interrupted(runs("full"), tmp_path / "run", 2)
    rows = json.loads((tiny_parts / "rows.json").read_text())
    rows[3]["conversations"][1]["value"] = "It is a round one"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(RecipeError, match="holds other rows than when this run began"):
        train(
            recipe_for(
                tiny_parts, output_dir, "full", "training.resume=auto", f"data.data_path={tmp_path / 'rows.json'}"
            )
        )


def test_data_may_move(runs: Any, tiny_parts: Path, tmp_path: Path) -> None:
    output_dir = interrupted(runs("full"), tmp_path / "run", 2)
    shutil.copytree(tiny_parts / "images", tmp_path / "elsewhere")
    shutil.copy(tiny_parts / "rows.json", tmp_path / "same.json")
    moved = [f"data.data_path={tmp_path / 'same.json'}", f"data.image_folder={tmp_path / 'elsewhere'}"]
    train(recipe_for(tiny_parts, output_dir, "full", "training.resume=auto", *moved))
    assert_same_run(runs("full"), output_dir)


def fingerprint_of(root: Path, names: list[str], contents: dict[str, bytes] | None = None) -> dict[str, Any]:
    """The fingerprint of one row a picture; `names` below `root`, or names of `contents`, which is embedded."""
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "!"}]
    if contents is None:
        rows = [{"id": str(n), "image": name, "conversations": turns} for n, name in enumerate(names)]
        path = root / "rows.json"
        path.write_text(json.dumps(rows))
    else:
        pictures = [{"bytes": contents[name], "path": "0001.png"} for name in names]
        rows = [{"id": str(n), "image": picture, "conversations": turns} for n, picture in enumerate(pictures)]
        path = root / "rows.parquet"
        datasets.Dataset.from_list(rows).to_parquet(path)
    return compatibility.data_fingerprint(load_llava_dataset(path, decode_images=False))


def test_rows_that_show_another_picture_of_the_same_name_are_other_rows(tmp_path: Path) -> None:
    for name in ("red/0001.png", "blue/0001.png", "red/0002.png"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(path)
    names = ["red/0001.png", "red/0002.png", "blue/0001.png"]
    before = fingerprint_of(tmp_path / "data", names)
    assert fingerprint_of(tmp_path / "data", ["red/0001.png", "red/0002.png", "red/0001.png"]) != before
    (tmp_path / "data").rename(tmp_path / "moved")
    assert fingerprint_of(tmp_path / "moved", names) == before
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for name in names:
            archive.write(tmp_path / "moved" / name, name)
    packed = load_llava_dataset(tmp_path / "moved" / "rows.json", tmp_path / "pictures.zip", decode_images=False)
    assert compatibility.data_fingerprint(packed) == before  # moved into an archive
    other = [names[0], names[2], names[1]]
    assert fingerprint_of(tmp_path / "moved", other) != before


def test_embedded_pictures_are_compared_by_content(tmp_path: Path) -> None:
    contents = {"one": b"1111", "two": b"2222"}
    before = fingerprint_of(tmp_path, ["one", "two"], contents)
    assert fingerprint_of(tmp_path, ["one", "two"], contents) == before
    assert fingerprint_of(tmp_path, ["two", "one"], contents) != before
    assert before["pictures"] == [[0, 4], [1, 4]]


def test_a_replaced_base_model_is_refused(runs: Any, tiny_parts: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tiny_parts, tmp_path / "parts")
    output_dir = tmp_path / "run"
    train(recipe_for(root, output_dir, "full", "training.max_steps=2", "trainable.vision_tower=frozen"))
    (output_dir / "metrics.json").unlink()
    path = root / "tower" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="the frozen weights are not those this run began with"):
        train(recipe_for(root, output_dir, "full", "training.max_steps=2", "training.resume=auto"))


def test_checkpoints_of_an_earlier_run_are_never_run_over(runs: Any, tiny_parts: Path, tmp_path: Path) -> None:
    output_dir = interrupted(runs("full"), tmp_path / "run", 2)
    with pytest.raises(RecipeError, match=r"holds checkpoint-2 of an earlier run. Add --resume"):
        train(recipe_for(tiny_parts, output_dir, "full"))


def test_a_finished_model_is_never_run_over(runs: Any, tiny_parts: Path, tmp_path: Path) -> None:
    output_dir = tmp_path / "run"
    shutil.copytree(runs("full"), output_dir, ignore=shutil.ignore_patterns("checkpoint-*"))
    with pytest.raises(RecipeError, match="holds the model of a finished run, which this one would replace"):
        train(recipe_for(tiny_parts, output_dir, "full"))
    for more in (("training.save_strategy='no'",), ("training.resume=auto", "training.learning_rate=1e-3")):
        before = {path.name: path.read_bytes() for path in output_dir.iterdir() if path.is_file()}
        with pytest.raises(RecipeError, match=r"training\.overwrite_output_dir=true"):
            train(recipe_for(tiny_parts, output_dir, "full", "training.max_steps=1", *more))
        assert before == {path.name: path.read_bytes() for path in output_dir.iterdir() if path.is_file()}
    elsewhere = runs("full") / "checkpoint-2"
    with pytest.raises(RecipeError, match=r"training\.overwrite_output_dir=true"):
        train(recipe_for(tiny_parts, output_dir, "full", f"training.resume={elsewhere}"))


def test_an_earlier_run_gives_way_when_that_was_said(runs: Any, tiny_parts: Path, tmp_path: Path) -> None:
    output_dir = tmp_path / "run"
    shutil.copytree(runs("lora"), output_dir)
    (output_dir / "notes.txt").write_text("mine")
    (output_dir / "checkpoint-9").mkdir()
    (output_dir / "checkpoint-9" / "mine.txt").write_text("mine")
    given = recipe_for(tiny_parts, output_dir, "full", "training.max_steps=3", "training.overwrite_output_dir=true")
    assert train(given)["num_steps"] == 3
    assert [found.step for found in checkpoints.list_checkpoints(output_dir)] == [3, 2]
    assert not (output_dir / "adapter_config.json").exists()  # beside a whole model it would be what is loaded
    assert (output_dir / "notes.txt").read_text() == "mine"
    assert (output_dir / "checkpoint-9.kept" / "mine.txt").read_text() == "mine"
    # The leave was given once: the saved recipe does not carry it on.
    saved = load_recipe(recipe_file=output_dir / "recipe.yaml")
    assert not saved.training.overwrite_output_dir
    with pytest.raises(RecipeError, match="holds checkpoint-3 of an earlier run"):
        train(saved)


def test_a_run_of_an_earlier_version_is_known_without_a_record(runs: Any, tiny_parts: Path, tmp_path: Path) -> None:
    """Nothing said then what was ours; what a run leaves says it: its recipe, its metrics, its checkpoints."""
    for kind in ("full", "lora"):
        output_dir = tmp_path / kind
        shutil.copytree(runs(kind), output_dir)
        (output_dir / ".vir_hf").unlink()
        (output_dir / "metrics.json").unlink()  # killed before its end
        shutil.rmtree(output_dir / "checkpoint-6")
        train(recipe_for(tiny_parts, output_dir, kind, "training.resume=auto"))
        assert_same_run(runs(kind), output_dir)
        assert not list(output_dir.glob("*.kept*"))


def test_no_whole_checkpoint_says_what_to_do(runs: Any, tiny_parts: Path, tmp_path: Path) -> None:
    output_dir = interrupted(runs("full"), tmp_path / "run", 2)
    (output_dir / "checkpoint-2" / "manifest.json").unlink()
    with pytest.raises(RecipeError, match=r"no checkpoint in .* is whole \(checkpoint-2: it has no manifest.json\)"):
        train(recipe_for(tiny_parts, output_dir, "full", "training.resume=auto"))
    with pytest.raises(RecipeError, match=r"cannot go on from it: it has no manifest.json"):
        train(recipe_for(tiny_parts, output_dir, "full", f"training.resume={output_dir / 'checkpoint-2'}"))


def test_without_a_checkpoint_auto_begins_at_the_start(tiny_parts: Path, tmp_path: Path) -> None:
    metrics = train(recipe_for(tiny_parts, tmp_path / "run", "full", "training.resume=auto", "training.max_steps=1"))
    assert metrics["num_steps"] == 1


class SendSignal(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number: int, step: int):
        self.number, self.step = number, step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_finishes_the_step_saves_and_the_run_goes_on(
    name: str, runs: Any, tiny_parts: Path, tmp_path: Path
) -> None:
    output_dir = tmp_path / "run"
    with pytest.raises(RunStopped, match=name):
        train(recipe_for(tiny_parts, output_dir, "full"), [SendSignal(getattr(signal, name), step=3)])
    assert [checkpoint.step for checkpoint in checkpoints.list_checkpoints(output_dir)] == [3, 2]
    assert not (output_dir / "metrics.json").exists()
    if name == "SIGTERM":
        train(recipe_for(tiny_parts, output_dir, "full", "training.resume=auto"))
        assert_same_run(runs("full"), output_dir)


def test_handlers_are_put_back(tiny_parts: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    train(recipe_for(tiny_parts, tmp_path / "run", "full", "training.max_steps=1", "training.save_strategy='no'"))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_failed_write_leaves_the_older_checkpoint_and_says_so(
    tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output_dir = tmp_path / "run"
    real = torch.save

    def save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if ".checkpoint-4" in str(path) and str(path).endswith("scheduler.pt"):
            raise OSError(28, "No space left on device")
        real(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(RunError, match=r"checkpoint-4: could not be written: .*No space left.*checkpoint-2 is left"):
        train(recipe_for(tiny_parts, output_dir, "full"))
    assert [path.name for path in output_dir.glob("*checkpoint*")] == ["checkpoint-2"]
    assert checkpoints.damage(output_dir / "checkpoint-2") is None


def test_checkpoints_hold_no_pickles_and_no_token(
    runs: Any, tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "hf_" + "Secret" * 6
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("WANDB_API_KEY", token)
    train(recipe_for(tiny_parts, tmp_path / "run", "lora", "training.max_steps=2"))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        assert token.encode() not in path.read_bytes(), path
        assert path.suffix not in (".bin", ".pkl", ".pickle", ".pth"), path
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)


class RunsCode:
    """What a hostile pickle holds."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("code-was-run",))


def test_a_pickle_that_runs_code_is_not_read(
    runs: Any, tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output_dir = interrupted(runs("full"), tmp_path / "run", 2)
    folder = output_dir / "checkpoint-2"
    for name in ("optimizer.pt", "rank_0.pt"):
        whole = (folder / name).read_bytes()
        torch.save(RunsCode(), folder / name)
        # Whoever puts it there can also write the manifest.
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": checkpoints.sha256(folder / name)}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(pickle.UnpicklingError, match="[Ww]eights.only"):
            train(recipe_for(tiny_parts, output_dir, "full", "training.resume=auto"))
        (folder / name).write_bytes(whole)
        manifest["files"][name] = {"bytes": len(whole), "sha256": checkpoints.sha256(folder / name)}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    with reading_no_code():  # as DeepSpeed reads its own
        torch.save(RunsCode(), tmp_path / "engine.pt")
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "engine.pt", weights_only=False)
    assert not (tmp_path / "code-was-run").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["experiment=local_lite", "data.data_path=x.json", "--resume"], "auto"),
        (["--resume", "experiment=local_lite", "data.data_path=x.json"], "auto"),
        (
            ["experiment=local_lite", "data.data_path=x.json", "--resume", "outputs/x/checkpoint-5"],
            "outputs/x/checkpoint-5",
        ),
        (["experiment=local_lite", "data.data_path=x.json"], None),
    ],
)
def test_the_flag_is_the_recipe_key(
    arguments: list[str], wanted: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vir_hf.train import main

    asked: list[Recipe] = []

    def stop(recipe: Recipe, *args: Any, **kwargs: Any) -> None:
        asked.append(recipe)
        raise RunStopped("SIGTERM", 3)

    monkeypatch.setattr(training, "train", stop)
    code = main(arguments)
    assert code == 75 and "the same command with --resume" in capsys.readouterr().err
    assert asked[0].training.resume == wanted


def test_a_checkpoint_opens_as_it_is(runs: Any) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = runs("full") / "checkpoint-4"
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.image_token_id == AutoProcessor.from_pretrained(folder).image_token_id
    adapter = json.loads((runs("lora") / "checkpoint-4" / "adapter_config.json").read_text())
    assert (Path(adapter["base_model_name_or_path"]) / "model.safetensors").is_file()


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_resume_to_the_same_bits(tiny_parts: Path, tmp_path: Path) -> None:
    def run(output_dir: Path) -> None:
        recipe = tmp_path / "recipe.yaml"
        recipe_for(tiny_parts, output_dir, "lora", "training.resume=auto", "training.use_cpu=true").save(recipe)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        subprocess.run([*command, "-m", "vir_hf.train", "--recipe", str(recipe)], check=True, timeout=240)

    run(tmp_path / "whole")
    assert (tmp_path / "whole" / "checkpoint-2" / "rank_1.pt").is_file()
    run(interrupted(tmp_path / "whole", tmp_path / "again", 2))
    assert_same_run(tmp_path / "whole", tmp_path / "again")


def test_a_run_without_checkpoints_may_be_tried_again_and_no_other_model_gives_way(
    tiny_parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one_step = ("training.max_steps=1",)
    recipe = recipe_for(tiny_parts, tmp_path, "lora", *one_step, "training.save_strategy=no")
    train(recipe)
    train(recipe)
    assert caplog.text.count("the model of an earlier run gives way") == 1
    kept = recipe_for(tiny_parts, tmp_path / "kept", "lora", *one_step)
    train(kept)
    shutil.rmtree(tmp_path / "kept" / "checkpoint-1", ignore_errors=True)
    before = (tmp_path / "kept" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(RecipeError, match="holds the model of a finished run"):
        train(recipe_for(tiny_parts, tmp_path / "kept", "lora", *one_step, "training.save_strategy=no"))
    assert (tmp_path / "kept" / "adapter_model.safetensors").read_bytes() == before
