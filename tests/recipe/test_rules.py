"""What a recipe that cannot run is told: one line and exit code 2, before torch is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vir_hf.errors import RecipeError
from vir_hf.recipe import upstream
from vir_hf.recipe.load import load_recipe
from vir_hf.recipe.rules import INITIALISATIONS

ROOT = Path(__file__).resolve().parents[2]
BASE = ["experiment=local_lite", "data.data_path=rows.json"]
EVALUATED = ["data.eval_path=eval.json", "training.eval_strategy=steps"]

# Overrides, what the line begins with, what it says to do.
REFUSED: list[tuple[list[str], str, str]] = [
    (["data.streaming=true"], "data.streaming: true", "Set training.max_steps"),
    (["model.tiling=tiles", "model.image_aspect_ratio=crop"], "model.tiling: tiles show the whole image", "pad or resize"),
    (["model.tiling=tiles", "data.allow_urls=true"], "model.tiling: an image's tokens depend on its size", "data prepare"),
    (["model.tiling=mosaic"], "model.tiling: found 'mosaic'", "expected one of none, tiles"),
    (["model.max_tiles=1"], "model.max_tiles: found 1", "expected 2 or more"),
    (["model.pixel_shuffle=5"], "model.pixel_shuffle: found 5", "expected at most 4"),
    (["data.streaming=true", "training.max_steps=-1"], "data.streaming: true", "Set training.max_steps"),
    (["training.max_steps=-7"], "training.max_steps: found -7", "or -1"),
    (["training.num_train_epochs=0"], "training.num_train_epochs: found 0", "nothing would be trained"),
    (["model.attn_implementation=flash"], "model.attn_implementation: found 'flash'", "expected one of auto, eager"),
    (["model.attn_implementation=spda"], "model.attn_implementation: found 'spda'", "Did you mean sdpa?"),
    (["model.attn_implementation=paged|eager"], "model.attn_implementation: found", "expected one of"),
    (["model.attn_implementation=flash_attention_2"], "model.attn_implementation=flash_attention_2", "=auto"),
    (["lora.init_lora_weights=eva"], "lora.init_lora_weights: eva needs data", "gaussian"),
    (["lora.init_lora_weights=corda"], "lora.init_lora_weights: corda needs data", "gaussian"),
    (["lora.init_lora_weights=loftq"], "lora.init_lora_weights: loftq needs data", "gaussian"),
    (["lora.init_lora_weights=lora_ga"], "lora.init_lora_weights: lora_ga needs data", "gaussian"),
    (["lora.init_lora_weights=mica"], "lora.init_lora_weights: mica", "gaussian"),
    (["lora.init_lora_weights=pissa_niter_4"], "lora.init_lora_weights: pissa_niter_4", "pissa"),
    (["lora.init_lora_weights=gausian"], "lora.init_lora_weights: gausian", "gaussian"),
    (["lora.init_lora_weights=gaussian", "lora.lora_bias=true"], "lora.lora_bias: true", "to false"),
    (["training.eval_strategy=steps"], "training.eval_strategy: is steps", "Set data.eval_path"),
    (["training.eval_on_start=true"], "training.eval_on_start: true", "data.eval_path"),
    (["training.load_best_model_at_end=true"], "training.load_best_model_at_end: true", "training.eval_strategy=steps"),
    (
        [*EVALUATED, "training.load_best_model_at_end=true", "training.save_strategy=epoch"],
        "training.load_best_model_at_end: only a saved step",
        "Set training.save_strategy=steps",
    ),
    (
        [*EVALUATED, "training.load_best_model_at_end=true", "training.save_steps=50", "training.eval_steps=20"],
        "training.load_best_model_at_end: training.save_steps (50) is no multiple",
        "Set training.save_steps=20",
    ),
    (
        [*EVALUATED, "training.load_best_model_at_end=true", "training.save_steps=0.5", "training.eval_steps=20"],
        "training.load_best_model_at_end: training.save_steps (0.5)",
        "Set training.save_steps=20",
    ),
    (["training.save_strategy=best"], "training.save_strategy: best needs", "training.metric_for_best_model=loss"),
    ([*EVALUATED, "training.save_strategy=best"], "training.save_strategy: best needs", "metric_for_best_model"),
    (["training.logging_steps=0"], "training.logging_steps: found 0", "a whole number from 1"),
    (["training.logging_steps=2.5"], "training.logging_steps: found 2.5", "a whole number from 1"),
    (["training.save_steps=2.5"], "training.save_steps: found 2.5", "a whole number from 1"),
    ([*EVALUATED, "training.eval_steps=2.5"], "training.eval_steps: found 2.5", "a whole number from 1"),
    (["training.optim=adamw"], "training.optim: found 'adamw'", "expected one of"),
    (["training.optim=galore_adamw"], "training.optim: galore_adamw works on", "training.optim_target_modules"),
    (["training.optim=lomo"], "training.optim=lomo: the package lomo_optim is not installed", "adamw_torch"),
    (["training.lr_scheduler_type=cosin"], "training.lr_scheduler_type: found 'cosin'", "Did you mean cosine"),
    (["training.lr_scheduler_type=reduce_lr_on_plateau"], "training.lr_scheduler_type: reduce_lr", "data.eval_path"),
    (["training.lr_scheduler_type=cosine_with_min_lr"], "training.lr_scheduler_type: cosine_with_min_lr", "min_lr"),
    (["training.lr_scheduler_type=warmup_stable_decay"], "training.lr_scheduler_type: warmup", "num_decay_steps"),
    (["training.report_to=wandbb"], "training.report_to: found 'wandbb'", "Did you mean wandb?"),
    (["training.report_to=[none,wandb]"], "training.report_to: found 'none'", "expected all or none alone"),
    (["training.report_to=swanlab"], "training.report_to=swanlab: the package swanlab", "training.report_to=none"),
    (["training.dataloader_num_workers=0", "training.dataloader_prefetch_factor=2"], "training.dataloader_pre", "=null"),
    (["training.push_to_hub=true", "training.hub_model_id=a/b/c"], "training.hub_model_id: found", "OWNER/NAME"),
    (["training.bf16_full_eval=true", "training.fp16_full_eval=true"], "training.fp16_full_eval: true", "Keep one"),
    (["training.log_level=loud"], "training.log_level: found 'loud'", "expected one of passive"),
    (["training.debug=all"], "training.debug: found 'all'", "underflow_overflow"),
    (["training.torch_compile_mode=fast"], "training.torch_compile_mode: found 'fast'", "max-autotune"),
    (["quantization=nf4", "quantization.bnb_4bit_quant_type=nf5"], "quantization.bnb_4bit_quant_type", "Did you mean nf4"),
    (["training.seed=-1"], "training.seed: found -1", "0 or more"),
    (["training.adam_beta1=2"], "training.adam_beta1: found 2", "at most 1"),
    (["training.torch_empty_cache_steps=0"], "training.torch_empty_cache_steps: found 0", "1 or more"),
    (["model.vision_tower=openai/clip-vit-large-patch14-336", "training.max_length=576"], "training.max_length: 576", "2048"),
    (["model.tokenizer=x", "model.name_or_path=y", "model.language_model=null", "model.vision_tower=null"], "model.tok", "null"),
    (["model.adapter=x", "model.pretrained_projector=y"], "model.pretrained_projector: is set", "null"),
    (["trainable.vision_tower=lora", "trainable.language_model=full", "quantization=none"], "trainable.vision_tower", "full"),
    (["experiment.stage=pretrain"], "experiment.stage: is pretrain, but training.stage is finetune", "training=pretrain"),
]  # fmt: skip

EACH = """
import contextlib, io, json, sys
from vir_hf import cli
seen = []
for words in json.load(sys.stdin):
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        code = cli.main(words)
    seen.append([code, told.getvalue(), sorted({"torch", "transformers", "accelerate"} & set(sys.modules))])
print(json.dumps(seen))
"""


def told(calls: list[list[str]], folder: Path, **environment: str) -> list[tuple[int, str, list[str]]]:
    """Return code, what stands on stderr and the heavy modules loaded, for each call, made in one process."""
    script = folder / "vir-hf"  # by this name the package knows that it is the command
    script.write_text(EACH)
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        cwd=folder,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    seen: list[tuple[int, str, list[str]]] = json.loads(done.stdout)
    return seen


def is_missing(line: str) -> bool:
    """Whether what the line finds missing is missing here, too."""
    from vir_hf.recipe.requirements import is_installed

    packages = {"flash_attention_2": ("flash_attn", "kernels"), "lomo": ("lomo_optim",), "swanlab": ("swanlab",)}
    return not any(map(is_installed, next((names for word, names in packages.items() if f"={word}" in line), ())))


def test_a_recipe_that_cannot_run_is_told_so_before_torch_is_loaded(tmp_path: Path) -> None:
    rows = [row for row in REFUSED if is_missing(row[1])]
    seen = told([["train", *BASE, *overrides] for overrides, _, _ in rows], tmp_path)
    for (overrides, begins, says), (code, line, heavy) in zip(rows, seen, strict=True):
        assert (code, heavy, line.count("\n")) == (2, [], 1), (overrides, line)
        assert line.startswith(f"error: {begins}") and says in line and len(line) < 510, (overrides, line)


def test_several_processes_are_counted_before_torch_is_loaded(tmp_path: Path) -> None:
    split = [*BASE, "training.on_out_of_memory=split"]
    stream = [*BASE, "data.streaming=true", "training.max_steps=1", "training.max_tokens_per_batch=4096"]
    stream += ["training.gradient_accumulation_steps=null"]
    odd = [*BASE, "training.global_batch_size=3", "training.per_device_train_batch_size=1"]
    odd += ["training.gradient_accumulation_steps=null"]
    calls = [["train", *split], ["train", *stream], ["launch", "--num-gpus", "2", *split], ["train", *odd]]
    seen = told(calls, tmp_path, WORLD_SIZE="2")
    lines = [line for _, line, _ in seen]
    assert "works with one process, found 2" in lines[0] and "works with one process, found 2" in lines[2]
    assert "gives each process another number of micro-batches" in lines[1]
    assert [(code, heavy) for code, _, heavy in seen] == [(2, [])] * 4
    assert "cannot be shared evenly by 2 processes" in lines[3]


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.streaming=true", "training.max_steps=5"],
        ["model.attn_implementation=sdpa"],
        ["model.attn_implementation=kernels-community/flash-attn2"],
        [*EVALUATED, "training.load_best_model_at_end=true", "training.save_steps=40", "training.eval_steps=20"],
        [*EVALUATED, "training.load_best_model_at_end=true", "training.save_steps=0.3", "training.eval_steps=0.1"],
        [*EVALUATED, "training.save_strategy=best", "training.metric_for_best_model=loss"],
        ["training.lr_scheduler_type=cosine_with_min_lr", "training.lr_scheduler_kwargs={min_lr_rate:0.1}"],
        ["training.report_to=[wandb,tensorboard]"],
        ["training.report_to=none"],
        ["model.vision_tower=openai/clip-vit-large-patch14-336", "training.max_length=577"],
        ["training.save_steps=0"],
    ],
    ids=" ".join,
)
def test_what_can_run_is_let_through(overrides: list[str]) -> None:
    load_recipe([*BASE, *overrides])


def test_the_length_of_an_image_is_read_from_a_config_on_disk(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"image_size": 32, "patch_size": 8}}))
    words = [*BASE, f"model.vision_tower={tmp_path}"]
    load_recipe([*words, "training.max_length=17"])
    with pytest.raises(RecipeError, match=r"max_length: 16 tokens a row, but one image of .* takes 16, .*=512\."):
        load_recipe([*words, "training.max_length=16"])
    (tmp_path / "config.json").write_text("[]")
    load_recipe([*words, "training.max_length=16"])


def test_a_stage_that_a_file_states_yields_to_the_training_that_is_asked_for(tmp_path: Path) -> None:
    recipe = load_recipe([*BASE, "training=pretrain", "lora=none", "quantization=none"])
    assert recipe.experiment.stage == recipe.training.stage == "pretrain"
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml().replace("  stage: pretrain", "  stage: finetune", 1))
    with pytest.raises(RecipeError, match="experiment.stage: is finetune, but training.stage is pretrain"):
        load_recipe(recipe_file=tmp_path / "recipe.yaml")


def test_every_initialisation_of_the_installed_peft_is_known_to_work_or_to_be_refused() -> None:
    import ast
    import inspect

    from peft import LoraConfig

    annotation = ast.parse(inspect.getsource(LoraConfig))
    words = {
        node.value
        for statement in ast.walk(annotation)
        if isinstance(statement, ast.AnnAssign) and getattr(statement.target, "id", "") == "init_lora_weights"
        for node in ast.walk(statement.annotation)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    refused = {"eva", "corda", "loftq", "mica", "lora_ga", "pissa_niter_[number of iters]"}
    assert words - refused <= set(INITIALISATIONS) and {"gaussian", "pissa", "eva"} <= words


def test_words_read_from_the_source_of_transformers_are_its_own() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.modeling_utils import AttentionInterface

    assert set(upstream.tracker_words()) == set(INTEGRATION_TO_CALLBACK)
    own = {word for word in AttentionInterface._global_mapping if "|" not in word}
    assert set(upstream.attention_words()) <= own and "sdpa" in upstream.attention_words()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty, expected a mapping of sections"),
        ("# nothing but a remark\n", "is empty, expected a mapping of sections"),
        ("- model: a\n", "expected a mapping of sections"),
        ("just text\n", "just text: unknown key"),
        ("model:\n\tname_or_path: a\n", "cannot be read as YAML"),
        ("model: {name_or_path: a}\nmodel: {name_or_path: b}\n", "duplicate key"),
        ("model:\n  name_or_path: a\n  name_or_path: b\n", "duplicate key"),
        ("training:\n- 1\n", "training: found [1], expected a mapping"),
        ("model: {name_or_path: m\n", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_answered_in_one_line(
    content: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vir_hf import cli

    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    for named in (path, tmp_path):
        assert cli.main(["train", "--recipe", str(named), "data.data_path=rows.json"]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and says in line, line


def test_a_folder_named_like_a_recipe_is_called_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vir_hf import cli

    (tmp_path / "recipe.yaml").mkdir()
    assert cli.main(["train", "--recipe", str(tmp_path)]) == 2
    assert "recipe.yaml: is a folder, expected a recipe file" in capsys.readouterr().err


OVER_RECIPES = (
    "train",
    "launch",
    "plan",
    "doctor",
    "data cache-features",
    "data check",
    "data inspect",
    "data download-models",
)


@pytest.mark.parametrize("command", OVER_RECIPES)
def test_keys_may_stand_after_options_in_every_command_over_recipes(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vir_hf import cli

    (tmp_path / "own" / "experiment").mkdir(parents=True)
    for call in (
        ["experiment=local_lite", "--recipes-dir", str(tmp_path / "own"), "training.lerning_rate=1"],
        ["--recipes-dir", str(tmp_path / "own"), "experiment=local_lite", "training.lerning_rate=1"],
    ):
        assert cli.main([*command.split(), *call]) == 2
        assert "Did you mean training.learning_rate?" in capsys.readouterr().err
    saved = load_recipe(BASE)
    saved.save(tmp_path / "recipe.yaml")
    assert cli.main([*command.split(), "--recipe", str(tmp_path / "recipe.yaml"), "training.lerning_rate=1"]) == 2
    assert "Did you mean training.learning_rate?" in capsys.readouterr().err
