"""Recipes: every shipped one loads, what is typed means what it says, and what is wrong is answered with the remedy."""

from __future__ import annotations

import copy
import logging
import pickle
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vir_hf.errors import RecipeError
from vir_hf.recipe import files as recipe_files
from vir_hf.recipe import upstream
from vir_hf.recipe.load import _SECTIONS, Recipe, RecipeArgumentParser, load_recipe, recipe_from, schema

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "recipes" / "experiment").rglob("*.yaml"))
GROUP_FILES = sorted(
    path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").rglob("*.yaml") if path.parent != ROOT / "recipes"
)
ACCELERATE_CONFIGS = sorted((ROOT / "accelerate_configs").rglob("*.yaml"))
LITE = ["experiment=local_lite", "data.data_path=rows.json"]


def load(*overrides: str, **keywords: object) -> Recipe:
    return load_recipe([*LITE, *overrides], **keywords)  # type: ignore[arg-type]


def refusal(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(*overrides)
    return str(caught.value)


# What ships


def test_the_promised_experiments_are_there() -> None:
    promised = "quickstart local_lite t4_qlora cloud_gpu_scale cloud_tpu_scale llava15_7b_pretrain llava15_7b_finetune"
    assert {*promised.split(), "llava15_7b_lora", "llava15_7b_qlora", "llama3_8b_qlora"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_loads_and_says_what_it_is(name: str) -> None:
    recipe = load_recipe([f"experiment={name}", "data.data_path=rows.json"])
    assert recipe.experiment.name == name
    assert recipe.training.output_dir == f"outputs/{name}"
    assert recipe.experiment.description and recipe.experiment.hardware
    written = yaml.safe_load((ROOT / "recipes" / "experiment" / f"{name}.yaml").read_text())["experiment"]["stage"]
    assert recipe.training.stage == recipe.experiment.stage == written
    assert None not in (recipe.trainable.language_model, recipe.trainable.projector, recipe.trainable.vision_tower)


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "quickstart"])
def test_an_experiment_without_data_says_what_to_type(name: str) -> None:
    with pytest.raises(
        RecipeError, match=r"data\.data_path: is not set\. Add data\.data_path=ROWS\.json \(a LLaVA JSON file\)"
    ):
        load_recipe([f"experiment={name}"])
    assert load_recipe([f"experiment={name}"], require_data=False).data.data_path is None


def test_the_quickstart_needs_neither_model_nor_data() -> None:
    recipe = load_recipe(["experiment=quickstart"])
    assert recipe.data.data_path is None and recipe.model.name_or_path is None


@pytest.mark.parametrize("path", GROUP_FILES, ids=str)
def test_every_group_file_composes_and_holds_known_keys_only(path: Path) -> None:
    group, option = path.parts[0], path.relative_to(path.parts[0]).with_suffix("").as_posix()
    tree = recipe_files.compose([f"{group}={option}"], schema())
    if group != "experiment":
        values = yaml.safe_load((ROOT / "recipes" / path).read_text()) or {}
        assert {name: tree[group][name] for name in values}.keys() == values.keys()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llava15_7b_pretrain", dict(global_batch_size=256, learning_rate=1e-3, stage="pretrain")),
        ("llava15_7b_finetune", dict(global_batch_size=128, learning_rate=2e-5, stage="finetune")),
        ("llava15_7b_lora", dict(global_batch_size=128, learning_rate=2e-4, projector_learning_rate=2e-5)),
    ],
)
def test_the_llava15_recipes_hold_the_published_values(name: str, expected: dict[str, object]) -> None:
    recipe = load_recipe([f"experiment={name}", "data.data_path=rows.json"])
    training = recipe.training
    common = dict(warmup_steps=0.03, lr_scheduler_type="cosine", weight_decay=0.0, max_length=2048, num_train_epochs=1)
    assert {key: getattr(training, key) for key in {**common, **expected}} == {**common, **expected}
    assert recipe.model.language_model == "lmsys/vicuna-7b-v1.5"
    assert recipe.model.vision_tower == "openai/clip-vit-large-patch14-336"
    assert (recipe.model.vision_feature_layer, recipe.model.image_aspect_ratio) == (-2, "pad")
    assert recipe.model.template == ("plain" if training.stage == "pretrain" else "vicuna_v1")
    if name.endswith("lora"):
        lora = recipe.lora.arguments
        assert (lora["r"], lora["lora_alpha"], lora["lora_dropout"]) == (128, 256, 0.05)
        assert recipe.trainable.language_model == "lora"
    else:
        assert recipe.trainable.language_model == ("frozen" if training.stage == "pretrain" else "full")


def test_cloud_recipes_resume_by_themselves() -> None:
    for name in ("cloud_gpu_scale", "cloud_tpu_scale"):
        assert load_recipe([f"experiment={name}", "data.data_path=rows.json"]).training.resume == "auto"


def test_local_lite_quantises_only_with_cuda() -> None:
    recipe = load()
    assert recipe.quantization.bits == 4 and recipe.quantization.only_on_cuda
    assert not load_recipe(["experiment=t4_qlora", "data.data_path=rows.json"]).quantization.only_on_cuda


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_every_accelerate_config_is_read_by_accelerate_and_says_what_for(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# For: ") and any("Models: " in line for line in lines[:3])
    hyperparameters = {"mixed_precision", "gradient_accumulation_steps", "gradient_clipping"}
    said = {**yaml.safe_load(path.read_text()), **config.deepspeed_config}
    assert all(said.get(key, "auto") == "auto" for key in hyperparameters), "hyperparameters belong to the recipe"
    if config.deepspeed_config and config.num_machines > 1:
        assert config.deepspeed_config["deepspeed_multinode_launcher"] == "standard"


def test_the_promised_accelerate_configs_are_there() -> None:
    promised = "cpu single_gpu multi_gpu zero2 zero2_offload zero3 fsdp2 multi_node_zero2 tpu"
    assert {path.stem for path in ACCELERATE_CONFIGS} == set(promised.split())


# What is typed


def test_a_learning_rate_in_scientific_notation_is_a_float() -> None:
    rate = load("training.learning_rate=5e-5").training.learning_rate
    assert rate == 5e-5 and isinstance(rate, float)


def test_scientific_notation_without_a_point_is_a_float_in_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "model: {name_or_path: m}\ndata: {data_path: d}\ntraining: {learning_rate: 5e-5}\n"
    )
    assert load_recipe(recipe_file=tmp_path / "r.yaml").training.learning_rate == 5e-5


def test_a_recipe_can_be_copied_and_sent_to_a_worker() -> None:
    recipe = load()
    assert copy.deepcopy(recipe) == recipe and pickle.loads(pickle.dumps(recipe)) == recipe


def test_a_whole_number_may_be_written_as_1e3() -> None:
    steps = load("training.max_steps=1e3").training.max_steps
    assert steps == 1000 and isinstance(steps, int)


@pytest.mark.parametrize(
    "path",
    [
        "/a b/c.json",
        "rows,(1).json",
        "it's.json",
        "C:\\rows\\",
        "[x].json",
        "a=b.json",
        "2024",
        "zip://in::/a.zip",
        "~/r.json",
    ],
)
def test_a_path_is_taken_as_it_stands(path: str) -> None:
    assert load(f"data.data_path={path}").data.data_path == path


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.text(st.characters(min_codepoint=32, exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=30)
)
def test_any_file_name_survives_the_command_line_and_the_saved_recipe(name: str, tmp_path: Path) -> None:
    path = f"rows/{name}"
    if "${" in path:
        return
    recipe = load(f"data.data_path={path}")
    assert recipe.data.data_path == path
    recipe.save(tmp_path / "recipe.yaml")
    assert load_recipe(recipe_file=tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize("word", ["null", "None", "none"])
def test_null_unsets_a_text(word: str) -> None:
    assert load("model.tokenizer=x", f"model.tokenizer={word}").model.tokenizer is None


def test_a_regular_expression_needs_no_quotes() -> None:
    assert load("lora.target_modules=.*(q|v)_proj").lora.arguments["target_modules"] == ".*(q|v)_proj"
    assert load("lora.target_modules=[q_proj,v_proj]").lora.arguments["target_modules"] == ["q_proj", "v_proj"]


def test_a_bare_no_in_yaml_means_the_word(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: {name_or_path: m}\ndata: {data_path: d}\ntraining: {save_strategy: no}\n")
    assert load_recipe(recipe_file=tmp_path / "r.yaml").training.save_strategy == "no"


def test_references_work_also_to_keys_left_at_their_default() -> None:
    recipe = load("data.data_path=${experiment.name}.json", "training.weight_decay=${data.max_bad_fraction}")
    assert recipe.data.data_path == "local_lite.json" and recipe.training.weight_decay == 0.05


def test_sources_are_typed() -> None:
    recipe = load_recipe(
        [
            "experiment=local_lite",
            "data.sources=[{path: a.json, weight: 2}, {path: b.json, num_rows: 10, name: b}, c.json]",
        ]
    )
    assert recipe.data.sources is not None
    assert [(s.path, s.weight, s.num_rows, s.name) for s in recipe.data.sources] == [
        ("a.json", 2, None, None),
        ("b.json", None, 10, "b"),
        ("c.json", None, None, None),
    ]


def test_keys_below_a_dictionary_argument_are_merged() -> None:
    recipe = load("training.lr_scheduler_kwargs.num_cycles=2", "training.lr_scheduler_kwargs.x=1")
    assert recipe.training.lr_scheduler_kwargs == {"num_cycles": 2, "x": 1}


def test_hydra_prefixes_are_understood() -> None:
    assert load("+training.seed=7").training.seed == 7
    assert load("++training.seed=7").training.seed == 7
    assert "seed" not in load("~training.seed").training.arguments


def test_upstream_defaults_read_like_fields() -> None:
    training = load().training
    assert "adam_beta2" not in training.arguments and training.adam_beta2 == 0.999
    with pytest.raises(AttributeError, match="no_such_key"):
        _ = training.no_such_key


# What is short for something


@pytest.mark.parametrize("short", ["model.use_qlora=true", "model.load_in_4bit=true"])
def test_the_short_words_for_qlora_are_written_out(short: str) -> None:
    recipe = load_recipe(["experiment=llava15_7b_finetune", "data.data_path=rows.json", short])
    assert recipe.quantization.bits == 4
    assert recipe.quantization.arguments["bnb_4bit_quant_type"] == "nf4"
    assert recipe.trainable.language_model == "lora" and recipe.lora.arguments["r"] == 16
    assert recipe.model.use_qlora is None and recipe.model.load_in_4bit is None


@pytest.mark.parametrize("short", ["model.use_qlora=false", "model.load_in_4bit=false", "quantization=none"])
def test_quantisation_can_be_switched_off_and_lora_stays(short: str) -> None:
    recipe = load(short)
    assert recipe.quantization.bits is None
    assert recipe.trainable.language_model == "lora" and recipe.lora.arguments


def test_the_deprecated_word_for_checkpointing_becomes_the_new_one() -> None:
    arguments = load("training.gradient_checkpointing=true").training.sft_arguments()
    assert arguments["activation_checkpointing"] is True and "gradient_checkpointing" not in arguments
    assert "Set only training.activation_checkpointing" in refusal(
        "training.gradient_checkpointing=true", "training.activation_checkpointing=false"
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training=pretrain", "lora=none", "quantization=none"], ("frozen", "full", "frozen")),
        (["training=finetune", "lora=none", "quantization=none"], ("full", "full", "frozen")),
        (["training=finetune", "lora=none"], ("lora", "full", "frozen")),  # loaded in 4 bit
        (["training=finetune", "quantization=none"], ("lora", "full", "frozen")),  # has a lora section
        (["trainable.vision_tower=lora", "trainable.language_model=frozen"], ("frozen", "full", "lora")),
    ],
)
def test_what_learns_follows_the_stage_and_the_loading(overrides: list[str], expected: tuple[str, str, str]) -> None:
    trainable = load(*overrides).trainable
    assert (trainable.language_model, trainable.projector, trainable.vision_tower) == expected


def test_a_token_budget_takes_the_place_of_the_row_count() -> None:
    training = load("training.max_tokens_per_batch=8192").training
    assert training.per_device_train_batch_size is None and training.global_batch_size == 16
    assert "per_device_train_batch_size" not in training.sft_arguments()


def test_sharing_follows_padding_free() -> None:
    assert load().training.share_prefixes is True
    assert load("training.padding_free=false").training.share_prefixes is False


# What is wrong


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("training.lerning_rate=1", "training.learning_rate"),
        ("lora.rr=2", "lora.r"),
        ("lora.alpha=2", "lora.lora_alpha"),
        ("data.image_floder=x", "data.image_folder"),
        ("quantization.load_in_4bits=true", "quantization.load_in_4bit"),
        ("trainable.languagemodel=full", "trainable.language_model"),
        ("model.vision_towr=x", "model.vision_tower"),
        ("experiment.nam=x", "experiment.name"),
        ("learning_rate=1", "training.learning_rate"),
        ("model.learning_rate=1", "training.learning_rate"),
        ("trainig.learning_rate=1", "training.learning_rate"),
        ("training.warmup_ratio=0.03", "training.warmup_steps"),
        ("training.mm_projector_lr=1e-3", "training.projector_learning_rate"),
        ("training.optm.x=3", "training.optim"),
        ("~training.sed", "training.seed"),
        ("experiment=local_lit", "experiment=local_lite"),
        ("quantization=nf", "quantization=nf4"),
        ("training=finetun", "training=finetune"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(override: str, nearest: str) -> None:
    message = refusal(override) if not override.startswith("experiment=") else _refused_experiment(override)
    assert override.lstrip("~").split("=")[0] in message and nearest in message


def _refused_experiment(override: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe([override])
    return str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "training.learning_rate=abc",
        "training.learning_rate=[1]",
        "training.learning_rate=true",
        "training.global_batch_size=16.5",
        "training.global_batch_size=0",
        "training.learning_rate=-1",
        "training.learning_rate=nan",
        "training.seed=true",
        "training.padding_free=maybe",
        "training.optim=adamw_trch",
        "training.lr_scheduler_type=cosin",
        "training.lr_scheduler_kwargs={a:",
        "training.seed=1,2",
        "training.output_dir=",
        "training.learning_rate=${training.foo}",
        "trainable.projector=lora",
        "trainable.language_model=fulll",
        "model.template=vicuna",
        "model.projector_type=mlp9x",
        "model.vision_feature_layer=last",
        "data.max_bad_fraction=2",
        "data.on_bad_row=ignore",
        "data.data_path.x=3",
        "data.sources=rows.json",
        "data.sources=[{weight: 1}]",
        "data.sources=[{path: a, wieght: 1}]",
        "data.sources=[{path: a, weight: x}]",
        "lora.r=0",
        "lora.lora_dropout=1.5",
    ],
)
def test_a_value_of_another_type_names_the_key(override: str) -> None:
    key = override.split("=")[0]
    message = refusal("data.data_path=null", override) if key == "data.sources" else refusal(override)
    assert key.removesuffix(".x") in message


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("training.packing=true", "padding-free"),
        ("training.assistant_only_loss=true", "assistant's tokens"),
        ("training.completion_only_loss=true", "assistant's tokens"),
        ("training.dataset_text_field=text", "id, messages and images"),
        ("training.hub_token=abc", "no place in a recipe"),
        ("training.deepspeed=ds.json", "accelerate"),
        ("training.fsdp=full_shard", "accelerate"),
        ("training.remove_unused_columns=true", "drops the images"),
        ("training.resume_from_checkpoint=x", "training.resume"),
        ("training.auto_find_batch_size=true", "on_out_of_memory"),
        ("lora.task_type=CAUSAL_LM", "sets it itself"),
        ("lora.eva_config=1", "Python object"),
    ],
)
def test_what_makes_no_sense_for_pictures_is_refused_with_the_reason(override: str, reason: str) -> None:
    message = refusal(override)
    assert override.split("=")[0] in message and reason in message


@pytest.mark.parametrize(
    ("overrides", "key", "remedy"),
    [
        (["trainable.language_model=full", "lora=none"], "trainable.language_model", "quantization=none"),
        (["trainable.language_model=full", "quantization=none"], "lora.r", "lora=none"),
        (["training=pretrain"], "lora.r", "lora=none"),
        (["training=pretrain", "trainable.language_model=lora"], "trainable.language_model", "=frozen"),
        (["trainable.projector=frozen"], "training.projector_learning_rate", "trainable.projector=full"),
        (["training.vision_learning_rate=1e-6"], "training.vision_learning_rate", "trainable.vision_tower=full"),
        (["training.vision_weight_decay=0.1"], "training.vision_weight_decay", "trainable.vision_tower=full"),
        (["trainable.vision_from_layer=12"], "trainable.vision_from_layer", "trainable.vision_tower=full"),
        (["trainable.vision_tower=full", "training.feature_cache=true"], "training.feature_cache", "=null"),
        (["quantization.load_in_8bit=true"], "quantization.load_in_8bit", "quantization=int8"),
        (["quantization=none", "quantization.bnb_4bit_quant_type=nf4"], "bnb_4bit_quant_type", "load_in_4bit=true"),
        (["quantization=int8", "model.use_qlora=true"], "model.use_qlora", "quantization=nf4"),
        (["model.use_qlora=false", "model.load_in_4bit=true"], "model.load_in_4bit", "Remove one"),
        (["model.use_qlora=true", "trainable.language_model=full"], "model.use_qlora", "Remove one"),
        (["model.name_or_path=m"], "model.name_or_path", "model.language_model=null"),
        (["model.vision_tower=null"], "model.vision_tower", "model.vision_tower=NAME"),
        (["data.sources=[a.json]"], "data.data_path", "Keep one"),
        (["data.data_path=null", "data.sources=[]"], "data.sources", "path: rows.json"),
        (["data.data_path=null", "data.sources=[{path: a, weight: 1, num_rows: 2}]"], "data.sources[0]", "Keep one"),
        (["data.data_path=null", "data.sources=[{path: a, weight: 0}]"], "data.sources[0].weight", "more than 0"),
        (["data.eval_image_folder=x"], "data.eval_image_folder", "data.eval_path="),
        (["training.eval_strategy=steps"], "training.eval_strategy", "data.eval_path="),
        (["training.per_device_train_batch_size=3"], "training.global_batch_size", "per_device_train_batch_size=2"),
        (["training.gradient_accumulation_steps=3"], "training.global_batch_size", "gradient_accumulation_steps=null"),
        (
            ["training.max_tokens_per_batch=8192", "training.per_device_train_batch_size=2"],
            "training.max_tokens_per_batch",
            "to null",
        ),
        (["training.max_tokens_per_batch=100"], "training.max_tokens_per_batch", "training.max_length"),
        (
            ["training.max_tokens_per_batch=8192", "training.padding_free=false"],
            "max_tokens_per_batch",
            "padding_free=true",
        ),
        (["training.padding_free=false", "training.share_prefixes=true"], "training.share_prefixes", "=false"),
        (["training.bf16=true", "training.fp16=true"], "training.fp16", "Keep one"),
        (["training.max_steps=0"], "training.max_steps", "-1"),
        (["lora=none", "trainable.language_model=frozen", "model.adapter=a"], "model.adapter", "language_model=lora"),
        (["experiment=quickstart"], "experiment=quickstart", "Choose one"),
        (["hydra.run.dir=x"], "hydra.run.dir=x", "training.output_dir"),
        (["rows.json"], "rows.json", "key=value"),
    ],
)
def test_contradictions_name_the_key_and_the_remedy(overrides: list[str], key: str, remedy: str) -> None:
    message = refusal(*overrides)
    assert key in message and remedy in message


def test_without_a_model_the_message_says_how_to_choose_one() -> None:
    with pytest.raises(RecipeError, match=r"experiment=NAME \(`vir-hf recipes` lists them\)"):
        load_recipe([])


# Nothing in YAML names Python code


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ("model: {_target_: os.system, name_or_path: m}", "model._target_"),
        ("training: {lr_scheduler_kwargs: {_target_: os.system}}", "lr_scheduler_kwargs._target_"),
        ("data: {data_path: '${oc.env:HOME}'}", "data.data_path"),
        ("data: {sources: [{path: '${now:%Y}'}]}", "data.sources"),
        ("model: {name_or_path: '${a${oc.env:HOME}}'}", "model.name_or_path"),
        ("hydra: {searchpath: ['pkg://antigravity']}", "hydra"),
        ("model: {name_or_path: m, trust_remote_code: true}", "model.trust_remote_code"),
    ],
)
@pytest.mark.parametrize("kind", ["standalone", "experiment"])
def test_a_recipe_file_cannot_run_code(content: str, key: str, kind: str, tmp_path: Path) -> None:
    defaults = "defaults: [{override /training: finetune}]\n" if kind == "experiment" else ""
    (tmp_path / "recipe.yaml").write_text(f"{defaults}{content}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(["data.max_rows=1"], recipe_file=tmp_path / "recipe.yaml")
    assert key in str(caught.value)


def test_remote_code_is_accepted_from_the_command_line_alone(tmp_path: Path) -> None:
    recipe = load("model.trust_remote_code=true")
    assert recipe.model.trust_remote_code
    recipe.save(tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError, match=r"add model\.trust_remote_code=true to the command"):
        load_recipe(recipe_file=tmp_path / "recipe.yaml")
    again = load_recipe(["model.trust_remote_code=true"], recipe_file=tmp_path / "recipe.yaml")
    assert again == recipe


# Saved and run again; recipes of one's own


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_saved_recipe_loads_to_the_same(name: str, tmp_path: Path) -> None:
    recipe = load_recipe([f"experiment={name}", "data.data_path=rows.json", "training.seed=7"])
    recipe.save(tmp_path / "deep" / "recipe.yaml")
    assert load_recipe(recipe_file=tmp_path / "deep" / "recipe.yaml") == recipe
    assert load_recipe([f"recipe={tmp_path / 'deep'}"]) == recipe
    assert load_recipe([f"experiment={tmp_path / 'deep' / 'recipe.yaml'}"]) == recipe
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "recipe.yaml"]


def test_a_saved_recipe_takes_keys_but_no_groups(tmp_path: Path) -> None:
    load().save(tmp_path / "recipe.yaml")
    changed = load_recipe(
        ["training.learning_rate=1e-4", "model.load_in_4bit=false"], recipe_file=tmp_path / "recipe.yaml"
    )
    assert changed.training.learning_rate == 1e-4 and changed.quantization.bits is None
    with pytest.raises(RecipeError, match=r"quantization=none: .* stands alone"):
        load_recipe(["quantization=none"], recipe_file=tmp_path / "recipe.yaml")


@pytest.mark.parametrize("content", ["a: [", "- 1\n", "", "model: 3\n", "modle: {}\n", "\xff"])
def test_a_file_that_is_no_recipe_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(content, encoding="latin-1")
    with pytest.raises(RecipeError):
        load_recipe(recipe_file=tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError, match="no such recipe file"):
        load_recipe(recipe_file=tmp_path / "absent.yaml")


def test_an_experiment_file_anywhere_builds_on_the_groups(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults:\n  - override /model: smollm_135m_clip_l\n  - override /lora: default\ntraining: {learning_rate: 3.0e-4}\n"
    )
    recipe = load_recipe(["data.data_path=rows.json", "lora.r=4"], recipe_file=tmp_path / "mine.yaml")
    assert recipe.experiment.name == "mine" and recipe.training.output_dir == "outputs/mine"
    assert (recipe.model.language_model, recipe.training.learning_rate) == ("HuggingFaceTB/SmolLM-135M", 3e-4)
    assert (recipe.lora.arguments["r"], recipe.lora.arguments["lora_alpha"]) == (4, 32)


def test_recipes_of_ones_own_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in (tmp_path / "with space", tmp_path / "recipes"):
        (folder / "experiment" / "team").mkdir(parents=True)
        (folder / "experiment" / "team" / "ours.yaml").write_text(
            "# @package _global_\ndefaults:\n  - override /model: tiny\nexperiment: {description: ours}\n"
        )
        (folder / "model").mkdir()
        (folder / "model" / "tiny.yaml").write_text("name_or_path: ./tiny\n")
    own = tmp_path / "with space"
    recipe = load_recipe(["experiment=team/ours", "data.data_path=d"], recipes_dir=own)
    assert (recipe.experiment.name, recipe.model.name_or_path) == ("ours", "./tiny")
    monkeypatch.chdir(tmp_path)
    assert load_recipe(["experiment=team/ours", "data.data_path=d"]) == recipe
    (tmp_path / "recipes" / "model" / "llava15_7b.yaml").write_text("name_or_path: ./other\n")
    with caplog.at_level(logging.WARNING):
        assert load_recipe(["model=llava15_7b", "data.data_path=d"]).model.name_or_path == "./other"
    assert "differs from the package's own" in caplog.text
    with pytest.raises(RecipeError, match="--recipes-dir"):
        load_recipe([], recipes_dir=tmp_path / "absent")


def test_a_mistake_in_a_recipe_of_ones_own_is_found(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "typo.yaml").write_text("# @package _global_\ntraining: {lerning_rate: 1}\n")
    with pytest.raises(
        RecipeError, match=r"training\.lerning_rate: unknown key\. Did you mean training\.learning_rate"
    ):
        load_recipe(["experiment=typo"], recipes_dir=tmp_path)


def test_loading_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra.core.global_hydra import GlobalHydra

    monkeypatch.chdir(tmp_path)
    handlers = list(logging.getLogger().handlers)
    load()
    assert not list(tmp_path.iterdir()) and Path.cwd() == tmp_path
    assert logging.getLogger().handlers == handlers
    assert not GlobalHydra.instance().is_initialized()


def test_flags_and_overrides_stand_in_any_order(tmp_path: Path) -> None:
    load().save(tmp_path / "recipe.yaml")
    parser = RecipeArgumentParser(prog="vir-hf train")
    arguments = parser.parse_args(
        ["training.seed=1", "--recipe", str(tmp_path / "recipe.yaml"), "training.max_steps=2"]
    )
    recipe = recipe_from(arguments)
    assert (recipe.training.seed, recipe.training.max_steps) == (1, 2)


# The documentation


def test_the_documentation_names_every_key_option_and_config() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    ours = {f"{section}.{f.name}" for section, kind in _SECTIONS.items() for f in fields(kind) if f.name != "arguments"}
    assert {key for key in ours if f"`{key}`" not in text and f"`{key}=" not in text} == set()
    documented = set(re.findall(r"^\| `((?:experiment|model|data|training|trainable)\.\w+)`", text, re.MULTILINE))
    assert {key for key in documented if key.split(".")[1] not in schema()[key.split(".")[0]]} == set()
    options = {path.stem for path in (ROOT / "recipes").rglob("*.yaml")} - {"config"}
    assert {name for name in options if f"`{name}`" not in text} == set()
    assert {path.name for path in ACCELERATE_CONFIGS if f"`{path.name}`" not in text} == set()


def test_the_commands_in_the_documentation_make_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    (yaml_block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml_block)
    load().save("outputs/local_lite/recipe.yaml")
    commands = re.findall(r"^vir-hf train (.*)$", text, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        parser = RecipeArgumentParser(prog="vir-hf train")
        assert recipe_from(parser.parse_args(shlex.split(command))).training.output_dir
    mentioned = re.findall(r"`(training\.lr_scheduler_kwargs\.\S+?|training\.run_name=\S+?)`", text)
    assert load(*shlex.split(" ".join(mentioned))).training.run_name == "local_lite-a"


# What upstream accepts


def test_names_and_defaults_equal_those_of_the_imported_classes() -> None:
    import dataclasses
    import inspect

    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    for read, real in ((upstream.sft_arguments(), SFTConfig), (upstream.lora_arguments(), LoraConfig)):
        fields = {f.name: f for f in dataclasses.fields(real) if f.init}
        assert {*read} == {*fields} | {f.name for f in dataclasses.fields(real)}
        for name, argument in read.items():
            if argument.default is not upstream.MISSING:
                assert argument.default == fields[name].default, name
    parameters = set(inspect.signature(BitsAndBytesConfig.__init__).parameters) - {"self", "kwargs"}
    assert {*upstream.quantization_arguments()} == parameters


def test_where_upstream_moved_a_class_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {*upstream.sft_arguments()}, {*upstream.quantization_arguments()}
    monkeypatch.setattr(upstream, "_class_body", lambda *_: [])
    moved = {*upstream.sft_arguments.__wrapped__()}, {*upstream.quantization_arguments.__wrapped__()}
    assert moved == expected


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_upstream_takes_what_the_recipe_hands_over(name: str, tmp_path: Path) -> None:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    recipe = load_recipe([f"experiment={name}", "data.data_path=rows.json"])
    given = {**recipe.training.sft_arguments(), "output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    given["activation_checkpointing"] = bool(given.get("activation_checkpointing"))
    config = SFTConfig(**given)
    assert config.learning_rate == recipe.training.learning_rate
    assert config.warmup_steps == recipe.training.warmup_steps
    if recipe.lora.arguments:
        assert LoraConfig(**recipe.lora.lora_arguments()).r == recipe.lora.arguments["r"]
    if recipe.quantization.bits == 4:
        quantization = BitsAndBytesConfig(**recipe.quantization.bitsandbytes_arguments())
        assert quantization.load_in_4bit and quantization.bnb_4bit_quant_type == "nf4"


def test_words_for_projectors_and_templates_are_the_modules_own() -> None:
    from vir_hf.llava.projectors import PROJECTORS
    from vir_hf.rows.templates import TEMPLATE_NAMES

    assert set(schema()["model"]["projector_type"].choices) == set(PROJECTORS)
    assert set(schema()["model"]["template"].choices) == set(TEMPLATE_NAMES)
