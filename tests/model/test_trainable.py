from __future__ import annotations

import copy
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import NF4, load, logits_of, loss_of, packed_batch, recipe_for, run
from transformers import TrainerCallback

from vir_hf.errors import RecipeError
from vir_hf.model.for_use import load_run
from vir_hf.model.projector_files import save_projector
from vir_hf.model.trainable import make_trainable, parameter_groups

PREFIXES = {
    "language_model": ("model.language_model.", "lm_head."),
    "projector": ("model.multi_modal_projector.",),
    "vision_tower": ("model.vision_tower.",),
}
# Layer -2 of 3 is read, so the tower's last layer and what follows it never run.
NEVER_RUN = ("model.vision_tower.encoder.layers.2.", "model.vision_tower.post_layernorm.")
COMBINATIONS = [
    how
    for how in itertools.product(("frozen", "lora", "full"), ("frozen", "full"), ("frozen", "lora", "full"))
    if how != ("frozen", "frozen", "frozen") and (how[0], how[2]) != ("full", "lora")
]


@pytest.fixture(scope="module")
def joined(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    model, processor, _ = load(tiny_parts, tmp_path_factory.mktemp("out"))
    return model, processor, packed_batch(tiny_parts, processor)


def how_changes(language_model: str, projector: str, vision_tower: str) -> dict[str, object]:
    changes: dict[str, object] = {
        "trainable.language_model": language_model,
        "trainable.projector": projector,
        "trainable.vision_tower": vision_tower,
        "training.projector_learning_rate": "null" if projector == "frozen" else 1e-3,
    }
    # B is not zero then, so that A has a gradient from the first step.
    has_lora = "lora" in (language_model, vision_tower)
    return {**changes, **({"lora.init_lora_weights": "false"} if has_lora else {"lora": "none"})}


def plain(name: str) -> str:
    """A parameter's name in the unwrapped model; LoRA's weights keep their word."""
    name = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
    return name.replace(".modules_to_save.default", "")


@pytest.mark.parametrize("how", COMBINATIONS, ids="-".join)
def test_gradients_are_exactly_on_the_chosen_parts(
    how: tuple[str, str, str], joined: Any, tiny_parts: Path, tmp_path: Path
):
    model, _, batch = joined
    recipe = recipe_for(tiny_parts, tmp_path, **how_changes(*how))
    trained = make_trainable(copy.deepcopy(model), recipe).train()
    loss_of(trained, batch).backward()
    found = {name for name, parameter in trained.named_parameters() if parameter.grad is not None}
    expected: set[str] = set()
    for part, wanted in zip(PREFIXES, how, strict=True):
        weights = [name for name, _ in model.named_parameters() if name.startswith(PREFIXES[part])]
        weights = [name for name in weights if not name.startswith(NEVER_RUN)]
        if wanted == "full":
            expected |= set(weights)
        elif wanted == "lora":
            linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
            targets = [f"{name}." for name in linears if f"{name}.weight" in weights and name != "lm_head"]
            expected |= {f"{target}lora_{side}.default.weight" for target in targets for side in "AB"}
    assert {plain(name) for name in found} == expected
    assert all("original_module" not in name for name in found)
    # A key's bias shifts all scores of a query alike, so its gradient is zero whatever the loss.
    dead = [
        name
        for name, parameter in trained.named_parameters()
        if name in found and not name.endswith("k_proj.bias") and not parameter.grad.abs().sum() > 0
    ]
    assert not dead
    in_groups = {id(parameter) for group in parameter_groups(trained, recipe) for parameter in group["params"]}
    assert in_groups == {id(parameter) for name, parameter in trained.named_parameters() if name in found}


@pytest.mark.parametrize("projector", ["frozen", "full"])
def test_lora_in_the_tower_of_a_fully_trained_language_model_is_refused(
    projector: str, tiny_parts: Path, tmp_path: Path
):
    with pytest.raises(RecipeError, match="trainable.vision_tower=full, or trainable.language_model=lora"):
        recipe_for(tiny_parts, tmp_path, **how_changes("full", projector, "lora"))


@pytest.mark.parametrize("how", ["lora", "full"])
@pytest.mark.parametrize("language_model", ["frozen", "lora"])
def test_the_tower_learns_from_the_layer_asked_for(
    how: str, language_model: str, joined: Any, tiny_parts: Path, tmp_path: Path
):
    changes = how_changes(language_model, "frozen", how)
    recipe = recipe_for(tiny_parts, tmp_path, **changes, **{"trainable.vision_from_layer": 1})
    trained = make_trainable(copy.deepcopy(joined[0]), recipe)
    learning = {plain(name) for name, parameter in trained.named_parameters() if parameter.requires_grad}
    in_tower = {name for name in learning if "vision_tower" in name}
    assert in_tower and all(name.startswith("model.vision_tower.encoder.layers.1.") for name in in_tower)


@pytest.mark.parametrize("start", [2, 7])
def test_a_tower_layer_that_never_runs_cannot_be_the_first_to_learn(
    start: int, joined: Any, tiny_parts: Path, tmp_path: Path
):
    recipe = recipe_for(
        tiny_parts, tmp_path, **how_changes("frozen", "full", "full"), **{"trainable.vision_from_layer": start}
    )
    with pytest.raises(RecipeError, match=f"trainable.vision_from_layer: found {start}, expected 0 to 1"):
        make_trainable(copy.deepcopy(joined[0]), recipe)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lora.target_modules": "[q_proj,v_proj]"}, {"q_proj", "v_proj"}),
        ({"lora.target_modules": "'.*mlp.down_proj'"}, {"down_proj"}),
        ({"lora.target_modules": "[q_proj]", "lora.layers_to_transform": "[1]"}, {"q_proj"}),
    ],
)
def test_targets_are_matched_inside_the_language_model_alone(
    changes: dict[str, object], expected: set[str], joined: Any, tiny_parts: Path, tmp_path: Path
):
    recipe = recipe_for(tiny_parts, tmp_path, **{"trainable.language_model": "lora"}, **changes)
    trained = make_trainable(copy.deepcopy(joined[0]), recipe)
    adapted = [plain(name).split(".lora_")[0] for name, _ in trained.named_parameters() if "lora_A" in name]
    assert {name.rsplit(".", 1)[-1] for name in adapted} == expected
    assert all(name.startswith("model.language_model.") for name in adapted)
    if "lora.layers_to_transform" in changes:
        assert all(".layers.1." in name for name in adapted)


def test_targets_that_match_nothing_name_what_there_is(joined: Any, tiny_parts: Path, tmp_path: Path):
    recipe = recipe_for(tiny_parts, tmp_path, **{"lora.target_modules": "[query_key_value]"})
    with pytest.raises(RecipeError, match=r"lora.target_modules=.*matches no linear layer of language_model.*q_proj"):
        make_trainable(copy.deepcopy(joined[0]), recipe)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora.use_dora": "true"},
        {"lora.use_rslora": "true"},
        {"lora.init_lora_weights": "gaussian"},
        {"lora.init_lora_weights": "pissa"},
        {"lora.init_lora_weights": "olora"},
        {"lora.bias": "lora_only"},
        {"trainable.vision_tower": "lora"},
        {"trainable.vision_tower": "full"},
        {"trainable.vision_tower": "full", "trainable.vision_from_layer": 1},
    ],
    ids=lambda changes: ",".join(f"{key.split('.')[1]}={value}" for key, value in changes.items()),
)
def test_what_an_adapter_learned_is_in_its_files(changes: dict[str, object], tiny_parts: Path, tmp_path: Path):
    """Saved, and put by stock PEFT on the saved base, it gives the logits it had in training."""
    in_training: list[torch.Tensor] = []

    class Keep(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            in_training.append(logits_of(model, tiny_parts, kwargs["processing_class"]))

    values = {"training.max_steps": 2, "training.learning_rate": 1e-2, "lora.lora_dropout": 0, **changes}
    run(tiny_parts, tmp_path / "run", (Keep(),), **values)
    reopened, processor = load_run(tmp_path / "run")
    torch.testing.assert_close(logits_of(reopened, tiny_parts, processor), in_training[0], rtol=0, atol=2e-5)
    base, _ = load_run(tmp_path / "run" / "base")
    assert (logits_of(base, tiny_parts, processor) - in_training[0]).abs().max() > 1e-3


class Watch(TrainerCallback):
    """Keeps the learning weights as they were at the beginning and at the end, and every weight's dtype."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.learning = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
        self.frozen = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
        self.start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.end = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_small_updates_reach_the_projector_beside_4_bit_weights(tiny_parts: Path, tmp_path: Path):
    """20 steps at 2e-5 under bf16: held in bf16 two thirds of the weights would not have moved."""
    model, _, _ = load(tiny_parts, tmp_path, **{"training.seed": 5})
    projector = save_projector(model, tmp_path)
    watch = Watch()
    run(
        tiny_parts,
        tmp_path / "run",
        (watch,),
        **NF4,
        **{
            "model.dtype": "bfloat16",
            "model.pretrained_projector": projector,
            "training.max_steps": 20,
            "training.learning_rate": 2e-5,
            "training.projector_learning_rate": 2e-5,
            "training.lr_scheduler_type": "constant",
        },
    )
    assert watch.learning == {torch.float32}
    assert torch.bfloat16 in watch.frozen
    names = [name for name in watch.start if "projector" in name]
    same = sum(int((watch.start[name] == watch.end[name]).sum()) for name in names)
    assert same / sum(watch.start[name].numel() for name in names) < 0.01
    # Nothing was rounded on the way in, neither by the model's dtype nor by TRL's cast of quantised models.
    saved = load_file(projector)
    for name in names:
        assert torch.equal(watch.start[name], saved[name.split("default.")[1]])


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_trainable_weights_are_fp32_whatever_they_are_loaded_in(quantization: str, tiny_parts: Path, tmp_path: Path):
    watch = Watch()
    changes = {"quantization": quantization, "quantization.only_on_cuda": "false", "training.max_steps": 2}
    run(tiny_parts, tmp_path / "run", (watch,), **changes, **{"model.dtype": "bfloat16"})
    assert watch.learning == {torch.float32}
    assert torch.bfloat16 in watch.frozen
    assert any((watch.start[name] != watch.end[name]).any() for name in watch.start)


def test_every_part_has_its_own_rate_and_decay(joined: Any, tiny_parts: Path, tmp_path: Path):
    recipe = recipe_for(
        tiny_parts,
        tmp_path,
        **how_changes("full", "full", "full"),
        **{
            "training.learning_rate": 1e-5,
            "training.vision_learning_rate": 2e-6,
            "training.weight_decay": 0.1,
            "training.projector_weight_decay": 0.0,
            "training.vision_weight_decay": 0.05,
        },
    )
    trained = make_trainable(copy.deepcopy(joined[0]), recipe)
    groups = parameter_groups(trained, recipe)
    found = {(group["part"], group["lr"], group["weight_decay"]) for group in groups}
    assert found == {
        ("language_model", 1e-5, 0.1),
        ("language_model", 1e-5, 0.0),
        ("projector", 1e-3, 0.0),
        ("vision_tower", 2e-6, 0.05),
        ("vision_tower", 2e-6, 0.0),
    }


@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_a_quantised_part_cannot_learn_in_full(part: str, tiny_parts: Path, tmp_path: Path):
    changes = {**NF4, f"trainable.{part}": "full"}
    if part == "language_model":  # refused before anything is loaded
        with pytest.raises(RecipeError, match="trainable.language_model=lora, or quantization=none"):
            recipe_for(tiny_parts, tmp_path, **changes)
        return
    whole, processor, _ = load(tiny_parts, tmp_path)
    whole.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    changes |= {
        "model.name_or_path": tmp_path / "whole",
        "model.language_model": "null",
        "model.vision_tower": "null",
        "quantization.llm_int8_skip_modules": "[lm_head,model.multi_modal_projector]",
    }
    model, _, recipe = load(tiny_parts, tmp_path, **changes)
    with pytest.raises(RecipeError, match=r"trainable.vision_tower: is full, but .* is stored in 4 bit"):
        make_trainable(model, recipe)


def test_training_goes_on_with_an_adapter(tiny_parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    first = run(tiny_parts, tmp_path / "one", **{"training.max_steps": 6, "training.learning_rate": 1e-2})
    before, processor = load_run(tmp_path / "one")
    start: list[torch.Tensor] = []

    class Keep(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            start.append(logits_of(model, tiny_parts, processor))
            model.train()

    changes = {"training.max_steps": 4, "training.learning_rate": 1e-2, "model.adapter": tmp_path / "one"}
    with caplog.at_level(logging.WARNING):
        second = run(tiny_parts, tmp_path / "two", (Keep(),), **changes, **{"lora.r": 4})
    assert "lora.r=16, which stays" in caplog.text
    torch.testing.assert_close(start[0], logits_of(before, tiny_parts, processor), rtol=0, atol=1e-5)
    assert second["first_loss"] < first["first_loss"]
    after, _ = load_run(tmp_path / "two")
    assert (logits_of(after, tiny_parts, processor) - start[0]).abs().max() > 1e-3
    assert Path(after.peft_config["default"].base_model_name_or_path) == tmp_path / "two" / "base"


def test_a_second_adapter_is_trained_on_the_first_one_merged(tiny_parts: Path, tmp_path: Path):
    changes = {"training.max_steps": 4, "training.learning_rate": 1e-2}
    run(tiny_parts, tmp_path / "one", **changes)
    run(
        tiny_parts,
        tmp_path / "two",
        **changes,
        **{
            "model.name_or_path": tmp_path / "one",
            "model.language_model": "null",
            "model.vision_tower": "null",
            "lora.r": 4,
        },
    )
    one, processor = load_run(tmp_path / "one")
    base, _ = load_run(tmp_path / "two" / "base")
    torch.testing.assert_close(
        logits_of(base, tiny_parts, processor), logits_of(one, tiny_parts, processor), rtol=0, atol=1e-5
    )
    two, _ = load_run(tmp_path / "two")
    assert two.peft_config["default"].r == 4
    assert (logits_of(two, tiny_parts, processor) - logits_of(base, tiny_parts, processor)).abs().max() > 1e-3


def test_an_adapter_of_other_parts_or_of_another_base_is_refused(tiny_parts: Path, tmp_path: Path):
    import tiny

    run(tiny_parts, tmp_path / "one", **{"training.max_steps": 1})
    other = tiny.save_language_model(tmp_path / "other_lm", seed=9)
    with pytest.raises(RecipeError, match=r"model.language_model=.*other_lm: the adapter .* was trained with .*lm"):
        load(tiny_parts, tmp_path / "x", **{"model.adapter": tmp_path / "one", "model.language_model": other})
    model, processor, _ = load(tiny_parts, tmp_path / "y", **{"model.language_model": other})
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    whole = {"model.name_or_path": tmp_path / "whole", "model.language_model": "null", "model.vision_tower": "null"}
    model, _, recipe = load(tiny_parts, tmp_path / "z", **whole, **{"model.adapter": tmp_path / "one"})
    with pytest.raises(RecipeError, match=r"model.name_or_path=.*whole: the adapter .* was trained on other weights"):
        make_trainable(model, recipe)


def test_an_adapter_without_the_part_that_should_learn_is_refused(tiny_parts: Path, tmp_path: Path):
    run(tiny_parts, tmp_path / "one", **{"training.max_steps": 1})
    changes = {"model.adapter": tmp_path / "one", "trainable.vision_tower": "lora"}
    model, _, recipe = load(tiny_parts, tmp_path / "two", **changes)
    with pytest.raises(RecipeError, match=r"no LoRA weights in the vision_tower.*trainable.vision_tower=frozen"):
        make_trainable(model, recipe)
