"""Plans against what is counted or measured: saved tensors, real parameters, real overrides, a real process."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from vir_hf.budget import activations, hardware, shapes
from vir_hf.budget.changes import with_overrides
from vir_hf.budget.compute import step_compute
from vir_hf.budget.estimator import CPU_PROCESS_BYTES, Estimator
from vir_hf.budget.layouts import LAYOUTS, communication_bytes
from vir_hf.budget.plan import plan, should_checkpoint, will_it_fit
from vir_hf.commands import plan as plan_command
from vir_hf.data.statistics import DatasetStatistics, estimate_statistics
from vir_hf.errors import DataError, RecipeError
from vir_hf.kernels import lean_layers
from vir_hf.kernels.lean_layers import make_lean
from vir_hf.model.for_training import load_model_and_processor
from vir_hf.model.precision import choose_precision
from vir_hf.model.trainable import make_trainable
from vir_hf.recipe.load import Recipe, load_recipe

GB, MB = 10**9, 10**6
FULL = ("lora=none", "quantization=none", "trainable.language_model=full")
LORA = ("lora.lora_dropout=0.0", "quantization=none")
DROPOUT = ("lora.lora_dropout=0.1", "quantization=none")
FROZEN = ("lora=none", "quantization=none", "trainable.language_model=frozen")
QLORA = ("lora.lora_dropout=0.0", "quantization.only_on_cuda=false")
QLORA_DROPOUT = ("lora.lora_dropout=0.1", "quantization.only_on_cuda=false")
BF16 = ("model.dtype=bfloat16",)

WAYS = {
    "full": FULL,
    "lora": LORA,
    "dropout": DROPOUT,
    "frozen": FROZEN,
    "qlora": QLORA,
    "qlora-dropout": QLORA_DROPOUT,
}


@pytest.fixture(scope="module")
def wide_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of unequal widths, wide enough that what a formula forgets is not lost in small change."""
    root = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 8, "num_hidden_layers": 3}
    tiny.save_language_model(root / "lm", **sizes, num_key_value_heads=2)
    tiny.save_language_model(root / "lm_full_heads", **sizes, num_key_value_heads=8)
    tiny.save_vision_tower(root / "tower")
    tiny.save_data(root)
    return root


def recipe_of(parts: Path, *changes: str, language_model: str = "lm") -> Recipe:
    overrides = tiny.training_overrides(parts, parts / "out", **{"model.language_model": parts / language_model})
    return load_recipe([*overrides, *changes])


def real_model(recipe: Recipe) -> Any:
    model, _ = load_model_and_processor(recipe, choose_precision(recipe.model.dtype))
    return make_trainable(model, recipe)


def inner(model: Any) -> Any:
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).model


class SavedTensors:
    """Counts the bytes autograd saves inside one module's forward pass, every storage once, weights left out."""

    def __init__(self, module: torch.nn.Module, model: torch.nn.Module):
        self.num_bytes = 0
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
        self._kept: list[torch.Tensor] = []
        forward = module.forward

        def counting(*arguments: Any, **keywords: Any) -> Any:
            # Rotary angles come from outside and are shared by all blocks.
            for tensor in keywords.get("position_embeddings") or ():
                self._seen.add(tensor.untyped_storage().data_ptr())
            # A lean layer has hooks of its own, inside these: what it does not forget is counted there.
            with mock.patch.object(lean_layers._Kept, "pack", self._pack_what_is_kept(lean_layers._Kept.pack)):
                with saved_tensors_hooks(self._pack, lambda tensor: tensor):
                    return forward(*arguments, **keywords)

        module.forward = counting  # type: ignore[method-assign]

    def _pack_what_is_kept(self, original: Any) -> Any:
        def pack(kept: lean_layers._Kept, tensor: torch.Tensor) -> Any:
            packed = original(kept, tensor)
            return self._pack(packed) if isinstance(packed, torch.Tensor) else packed

        return pack

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self._kept.append(tensor)  # so that no other tensor gets its address
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.num_bytes += storage.nbytes()
        return tensor


def text_batch(model: Any, num_tokens: int) -> dict[str, torch.Tensor]:
    """One packed row of two segments of text."""
    half = num_tokens // 2
    return {
        "input_ids": torch.randint(10, 100, (1, num_tokens)),
        "segment_lengths": torch.tensor([half, num_tokens - half]),
        "segment_prefixes": torch.tensor([-1, -1]),
    }


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("language_model", ["lm", "lm_full_heads"])
@pytest.mark.parametrize(
    "changes",
    [
        *(pytest.param(changes, id=name) for name, changes in WAYS.items()),
        *(pytest.param((*changes, *BF16), id=f"{name}-bf16") for name, changes in WAYS.items()),
    ],
)
def test_bytes_a_block_keeps_equal_what_autograd_saves(
    wide_parts: Path, changes: tuple[str, ...], language_model: str, lean: bool
) -> None:
    if "quantization.only_on_cuda=false" in changes:
        pytest.importorskip("bitsandbytes")
    recipe = recipe_of(wide_parts, *changes, f"training.lean_layers={lean}", language_model=language_model)
    model = real_model(recipe).train()
    if lean:
        make_lean(inner(model).language_model)
    estimator = Estimator(recipe, hardware.device_named("cpu"))
    numerics = estimator.numerics(LAYOUTS[0])
    blocks = inner(model).language_model.layers
    saved = SavedTensors(blocks[1], model)
    num_tokens = 256
    autocast = torch.autocast("cpu", torch.bfloat16) if numerics.autocast else contextlib.nullcontext()
    with autocast:
        inner(model)(**text_batch(model, num_tokens), use_cache=False)
    per_token = sum(activations.saved_per_token(estimator.model.text, numerics, estimator.model.rank).values())
    predicted = num_tokens * per_token + activations.cast_weights(estimator.model.text, numerics, estimator.model.rank)
    assert predicted == pytest.approx(saved.num_bytes, rel=0.03)


def test_checkpointing_keeps_only_the_input_of_a_block(wide_parts: Path) -> None:
    recipe = recipe_of(wide_parts, *FULL)
    model = real_model(recipe).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    saved = SavedTensors(inner(model).language_model.layers[1], model)
    inner(model)(**text_batch(model, 256), use_cache=False)
    estimator = Estimator(recipe, hardware.device_named("cpu"))
    batch = replace(estimator.batch(1), tokens=256, images=1)
    one = estimator.estimate(batch, checkpointing=True).parts["activations"]
    deeper = replace(estimator.model, text=replace(estimator.model.text, num_run=4, num_blocks=4))
    estimator.model = deeper
    assert estimator.estimate(batch, checkpointing=True).parts["activations"] - one == saved.num_bytes == 256 * 128 * 4


def test_a_trained_tower_keeps_what_autograd_saves(wide_parts: Path) -> None:
    recipe = recipe_of(wide_parts, *FROZEN, "trainable.vision_tower=full")
    model = real_model(recipe).train()
    estimator = Estimator(recipe, hardware.device_named("cpu"))
    vision = estimator.model.vision
    assert (vision.num_blocks, vision.num_run, vision.num_trained) == (3, 2, 2)
    tower = inner(model).vision_tower
    saved = SavedTensors(getattr(tower, "vision_model", tower).encoder.layers[1], model)
    images = 20
    inner(model).encode_images(torch.randn(images, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE))
    per_token = sum(activations.saved_per_token(vision, estimator.tower_numerics(LAYOUTS[0])).values())
    assert per_token * images * estimator.model.num_tower_tokens == pytest.approx(saved.num_bytes, rel=0.06)


@pytest.mark.parametrize("changes", [FULL, LORA, FROZEN, (*LORA, *BF16), (*FULL, *BF16)])
def test_weights_are_counted_as_they_are_loaded(wide_parts: Path, changes: tuple[str, ...]) -> None:
    recipe = recipe_of(wide_parts, *changes)
    parameters = list(real_model(recipe).parameters())
    counted = Estimator(recipe, hardware.device_named("cpu")).model
    assert counted.count() == sum(parameter.numel() for parameter in parameters)
    assert counted.bytes() == sum(parameter.nbytes for parameter in parameters)
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    assert counted.count(is_trained=True) == sum(parameter.numel() for parameter in learning)
    assert counted.bytes(is_trained=True) == sum(parameter.nbytes for parameter in learning)


@pytest.mark.parametrize("double", ["true", "false"])
def test_nf4_weights_are_counted_with_their_scales(tmp_path: Path, double: str) -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
    tiny.save_language_model(tmp_path / "lm", **sizes)
    tiny.save_vision_tower(tmp_path / "tower")
    tiny.save_data(tmp_path)
    changes = ("quantization.only_on_cuda=false", f"quantization.bnb_4bit_use_double_quant={double}")
    recipe = recipe_of(tmp_path, *changes)
    real = 0
    for name, module in real_model(recipe).named_modules():
        if type(module).__name__ == "Linear4bit" and name.endswith("base_layer"):
            state = module.weight.quant_state
            real += module.weight.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    groups = Estimator(recipe, hardware.device_named("cpu")).model.weights
    counted = [group for group in groups if group.storage.startswith("nf4")]
    assert {group.part for group in counted} == {"language_model"}
    assert sum(group.num_bytes for group in counted) == pytest.approx(real, rel=0.002)


def test_seven_billion_weights_in_nf4_need_less_than_12_gib() -> None:
    # By hand: 32 blocks of 4 x 4096^2 + 3 x 4096 x 11008 weights at half a byte, 1/64 and 4/(64 x 256) for scales.
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    overrides = ["experiment=llava15_7b_qlora", "training.per_device_train_batch_size=1", "training.max_length=2048"]
    made = plan(load_recipe(overrides, require_data=False), memory_bytes=24 * GB)
    nf4 = [group for group in made.weights if group["storage"].startswith("nf4")]
    assert [(group["num_weights"], group["num_bytes"]) for group in nf4] == [
        (linear, round(linear * (0.5 + 1 / 64 + 4 / 16384)))
    ]
    stored = {(group["part"], group["storage"]) for group in made.weights}
    assert stored >= {("vision_tower", "bfloat16"), ("language_model", "bfloat16"), ("projector", "float32")}
    assert sum(group["num_bytes"] for group in made.weights) <= 8 * GB
    assert made.estimate.required <= 12 * 2**30
    assert made.estimate.peak <= 12 * GB
    light = plan(load_recipe(["experiment=t4_qlora"], require_data=False), gpu="t4")
    assert light.fits and light.precision.startswith("float16") and light.estimate.required < 9 * GB


def test_published_sizes_stand_in_for_configs_and_the_plan_says_so(tiny_parts: Path) -> None:
    made = plan(load_recipe(["experiment=llava15_7b_lora"], require_data=False), gpu="a100-80")
    assert sum("table of published sizes" in note for note in made.notes) == 2
    # LLaVA-1.5-7B is published with 7.06e9 weights: 6.74 of Vicuna, 0.30 of CLIP, 0.02 of the projector.
    plain = [
        g["num_weights"]
        for g in made.weights
        if not g["is_adapter"] and not (g["part"] == "projector" and g["is_trained"])
    ]
    assert sum(plain) == pytest.approx(7.06e9, rel=0.005)
    local = plan(recipe_of(tiny_parts), gpu="cpu")
    assert not any("published" in note for note in local.notes)
    assert any(str(tiny_parts / "lm") in note for note in local.notes)


def test_a_config_that_cannot_be_had_names_the_key_and_the_remedy(tiny_parts: Path) -> None:
    for key in ("model.language_model", "model.vision_tower"):
        recipe = recipe_of(tiny_parts, f"{key}=nobody/no-such-model")
        with pytest.raises(RecipeError, match=rf"{key}=nobody/no-such-model.*hf download"):
            plan(recipe, gpu="cpu")


@pytest.mark.parametrize(
    ("overrides", "gpu", "gigabytes"),
    [
        (["experiment=llava15_7b_qlora"], "3090", 12),
        (["experiment=llava15_7b_qlora", "training.activation_checkpointing=false"], "3090", 24),
        (["experiment=llava15_7b_lora"], "3090", 24),
        (["experiment=llava15_7b_lora"], "t4", 15),
        (["experiment=llava15_7b_finetune"], "a100-80", 80),
        (["experiment=llava15_7b_finetune"], "3090", 24),
        (["experiment=llama3_8b_pretrain"], "t4", 12),
        (
            [
                "experiment=llava15_7b_lora",
                "training.per_device_train_batch_size=null",
                "training.max_tokens_per_batch=65536",
            ],
            "a100-40",
            40,
        ),
    ],
)
def test_the_suggested_override_makes_it_fit(overrides: list[str], gpu: str, gigabytes: int) -> None:
    made = plan(load_recipe(overrides, require_data=False), gpu=gpu, memory_bytes=gigabytes * GB)
    assert not made.fits and made.change is not None and made.change.overrides
    changed = load_recipe([*overrides, *made.change.overrides], require_data=False)
    again = plan(changed, gpu=gpu, memory_bytes=gigabytes * GB)
    assert again.fits and again.estimate.required == made.change.required
    assert again.rows_per_step == made.rows_per_step  # never at the cost of the global batch


def test_the_smallest_change_comes_first() -> None:
    """Smaller pieces before recomputing, recomputing before 8-bit states, those before another way to learn."""

    def change(overrides: list[str], gigabytes: float) -> tuple[str, ...]:
        recipe = load_recipe(["experiment=llava15_7b_lora", *overrides], require_data=False)
        found = plan(recipe, memory_bytes=int(gigabytes * GB), gpu="a100-80").change
        assert found is not None
        return found.overrides

    assert change([], 24) == ("training.per_device_train_batch_size=2",)
    without = ["training.activation_checkpointing=false"]
    assert all("activation_checkpointing" not in word for word in change(without, 60))
    assert "training.activation_checkpointing=true" in change(without, 24)
    assert "model.load_in_4bit=true" in change([], 12)


def test_nothing_fits_into_a_gigabyte() -> None:
    made = plan(load_recipe(["experiment=llava15_7b_lora"], require_data=False), memory_bytes=GB)
    assert not made.fits and made.change is None and made.largest_micro_batch == 0


def test_checkpointing_is_left_off_when_memory_is_to_spare(tiny_parts: Path) -> None:
    recipe = recipe_of(tiny_parts)
    assert recipe.training.arguments["activation_checkpointing"] is None
    assert should_checkpoint(recipe, memory_bytes=64 * GB) is False
    assert should_checkpoint(recipe, memory_bytes=600 * MB) is True
    assert should_checkpoint(with_overrides(recipe, ["training.activation_checkpointing=true"]), memory_bytes=64 * GB)
    said_off = with_overrides(recipe, ["training.activation_checkpointing=false"])
    assert should_checkpoint(said_off, memory_bytes=600 * MB) is False


def test_the_warning_says_what_to_type() -> None:
    recipe = load_recipe(["experiment=llava15_7b_lora", "training.use_cpu=true"], require_data=False)
    assert will_it_fit(recipe, memory_bytes=400 * GB) is None
    warning = will_it_fit(recipe, memory_bytes=40 * GB)
    assert warning is not None and "training.per_device_train_batch_size=" in warning and "37.3 GiB are free" in warning


def test_sharing_out_lowers_what_a_rank_holds() -> None:
    overrides = ["experiment=llava15_7b_finetune", "training.activation_checkpointing=true"]
    recipe = load_recipe(overrides, require_data=False)
    made = plan(recipe, gpu="a100-80", gpus_per_node=8)
    needed = {layout.config: layout.required for layout in made.layouts}
    assert list(needed) == ["multi_gpu", "zero2", "zero3", "fsdp2", "zero2_offload"]
    assert needed["multi_gpu"] > needed["zero2"] > needed["zero2_offload"]
    assert needed["zero2"] > needed["zero3"]
    # The plan takes the first config that fits; the recipe stays as it is.
    assert made.fits and made.change is None and made.config == next(one.config for one in made.layouts if one.fits)
    named = plan(recipe, gpu="a100-80", gpus_per_node=8, config="multi_gpu")
    assert not named.fits and named.change is not None
    more = plan(recipe, gpu="a100-80", num_nodes=4, gpus_per_node=8)
    assert {layout.config: layout.required for layout in more.layouts}["zero3"] < needed["zero3"]
    quantised = plan(load_recipe(["experiment=llava15_7b_qlora"], require_data=False), gpu="3090", gpus_per_node=4)
    assert [layout.config for layout in quantised.layouts if layout.required is None] == ["zero3", "fsdp2"]


def test_bytes_sent_follow_the_algorithms(tiny_parts: Path) -> None:
    model = Estimator(recipe_of(tiny_parts, *FULL), hardware.device_named("cpu")).model
    trained, everything = model.count(is_trained=True), model.count()
    sent = {layout.name: communication_bytes(layout, model, 4, num_micro_batches=3) for layout in LAYOUTS}
    assert sent["single_gpu"] == 0
    assert sent["multi_gpu"] == round(2 * 3 / 4 * 4 * trained)  # ring all-reduce of fp32 gradients, once a step
    assert sent["zero2"] == round(3 / 4 * 2 * trained * 3 + 3 / 4 * 2 * trained)
    assert sent["zero3"] == round(3 / 4 * (2 * 2 * everything + 2 * trained) * 3)


def test_operations_equal_torchs_count(wide_parts: Path) -> None:
    recipe = recipe_of(wide_parts, *FULL, language_model="lm_full_heads")
    model = real_model(recipe).train()
    estimator = Estimator(recipe, hardware.device_named("cpu"))
    num_tokens = 128
    batch = text_batch(model, num_tokens)
    with FlopCounterMode(display=False) as counter:
        hidden = inner(model)(**batch, use_cache=False).last_hidden_state
        model.lm_head(hidden).sum().backward()
    counted = step_compute(
        estimator.model,
        rows=2,
        row_tokens=num_tokens / 2,
        supervised=num_tokens,
        images=0,
        projected_images=0,
        checkpointing=False,
    )
    matrices = {"aten.mm", "aten.addmm", "aten.bmm"}
    in_torch = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in matrices)
    pairs = 3 * 2 * 2 * (num_tokens / 4) * 128 * num_tokens * 3  # causal scores and values, forward and twice backward
    assert counted.useful - pairs == pytest.approx(in_torch, rel=0.01)
    again = step_compute(
        estimator.model, rows=2, row_tokens=64, supervised=128, images=0, projected_images=0, checkpointing=True
    )
    assert again.useful == counted.useful and again.computed > counted.computed


def test_a_bigger_micro_batch_never_needs_less(tiny_parts: Path) -> None:
    estimator = Estimator(recipe_of(tiny_parts, "training.global_batch_size=64"), hardware.GPUS["t4"])
    sizes = [
        estimator.estimate(estimator.batch(rows), checkpointing=True).required for rows in (1, 2, 4, 8, 16, 32, 64)
    ]
    assert sizes == sorted(sizes)
    largest = estimator.largest_micro_batch(sizes[3])
    assert 8 <= largest < 16
    assert estimator.estimate(estimator.batch(largest + 1), checkpointing=True).required > sizes[3]


def test_statistics_of_a_file_give_steps_and_time(tiny_parts: Path) -> None:
    recipe = recipe_of(tiny_parts)
    statistics, source = estimate_statistics(recipe, tokens_per_image=4)
    assert statistics is not None and statistics.num_rows == 12 and "tokenizer" in source
    assert statistics.images_per_row == pytest.approx(10 / 12)
    made = plan(recipe, gpu="t4", dataset_statistics=statistics)
    assert made.num_steps == 3 and made.epoch_seconds == pytest.approx(3 * made.step_seconds)
    assert made.epoch_tokens == pytest.approx(12 * statistics.mean_tokens)
    without, reason = estimate_statistics(load_recipe(["experiment=t4_qlora"], require_data=False), 576)
    assert without is None and "data.data_path" in reason


def test_statistics_know_the_longest_micro_batch() -> None:
    statistics = DatasetStatistics.of_lengths([(100, 1, 10)] * 99 + [(3000, 2, None)], max_length=2048)
    assert (statistics.max_tokens, statistics.max_images, statistics.mean_supervised_tokens) == (2048, 2, None)
    assert statistics.longest(1) >= 2048 and statistics.longest(4) <= 4 * 2048
    with pytest.raises(DataError, match="no rows"):
        DatasetStatistics.of_lengths([], source="rows.json")


def test_amounts_of_memory_and_gpus_are_read_or_refused() -> None:
    assert hardware.parse_memory("24GB") == 24 * GB
    assert hardware.parse_memory("23.5 GiB") == int(23.5 * 2**30)
    assert hardware.parse_memory("800mb") == 800 * MB
    for wrong in ("lots", "24 apples", "-3GB", "0GB", ""):
        with pytest.raises(RecipeError, match="24GB"):
            hardware.parse_memory(wrong)
    assert hardware.device_named("RTX 3090") is hardware.GPUS["3090"]
    with pytest.raises(RecipeError, match="a100-80"):
        hardware.device_named("a9000")


def test_the_command_prints_and_writes_the_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    assert plan_command.main(["experiment=t4_qlora", "--gpu", "t4", "--json", str(target)]) == 0
    printed = capsys.readouterr().out
    assert "nf4 (double)" in printed and "fits" in printed and "published sizes" in printed
    written = json.loads(target.read_text())["plan"]
    assert written["fits"] is True and written["estimate"]["required"] < written["memory_bytes"]
    assert plan_command.main(["experiment=llava15_7b_lora", "--memory", "24GB", "--json", "-"]) == 1
    change = json.loads(capsys.readouterr().out)["plan"]["change"]
    assert change["overrides"] == ["training.per_device_train_batch_size=2"]


def test_the_command_shows_ranks_and_communication(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["experiment=cloud_gpu_scale", "--gpu", "a100-80", "--nodes", "2", "--gpus-per-node", "8"]
    assert plan_command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(layout.name in printed for layout in LAYOUTS if not layout.is_single)
    assert "2 x 8 A100 80 GB with accelerate_configs/zero2.yaml" in printed and "time to send" in printed


@pytest.mark.parametrize("wrong", [["--nodes", "0"], ["--tflops", "-1"], ["--memory", "much"], ["--gpu", "gtx"]])
def test_a_wrong_call_says_what_was_expected(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, RecipeError)) as caught:
        plan_command.main(["experiment=t4_qlora", *wrong])
    message = str(caught.value) + capsys.readouterr().err
    assert "expected" in message and wrong[1] in message


def run_benchmark(*arguments: str) -> dict[str, Any]:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "memory.py"
    done = subprocess.run(
        [sys.executable, str(script), *arguments, "--json", "-"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = json.loads(done.stdout[done.stdout.index("{") :])["results"]
    return dict(result)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the CPU's resident memory is predicted on machines without a GPU"
)
def test_resident_memory_on_a_cpu_is_predicted() -> None:
    result = run_benchmark("--cases", "tiny/lora", "--steps", "2")
    assert result["predicted"] == pytest.approx(result["measured"], rel=0.15)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("case", ["smollm135m/lora", "smollm135m/lora+ckpt"])
def test_allocated_memory_on_a_gpu_is_predicted(case: str) -> None:
    result = run_benchmark("--cases", case, "--steps", "2")
    assert result["predicted"] == pytest.approx(result["measured"], rel=0.10)


def test_freed_tensors_go_back_to_the_system() -> None:
    """In a process of its own: with the setting, freeing many middling tensors lowers what is resident."""
    script = """
import torch
from vir_hf.budget import hardware
def resident():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmRSS"))
print(int(hardware.return_freed_tensors()))
big = torch.ones(8 << 20); del big  # glibc would now keep anything smaller
before = resident()
kept = [torch.ones(1 << 18) for _ in range(64)]
small = kept[-1]
del kept
print((resident() - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    is_set, grown = map(int, done.stdout.split())
    if not is_set:
        pytest.skip("this C library has no mallopt")
    assert grown < 8  # MiB, of 64 that were made and freed


def test_the_heads_tiles_are_trls_own() -> None:
    from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    assert (activations.TILE_TOKENS, activations.TILE_VOCABULARY) == (TOKEN_CHUNK_SIZE, _CHUNKED_LOGPROB_CHUNK_SIZE)


def test_every_packaged_experiment_can_be_planned() -> None:
    from vir_hf.recipe import files as recipe_files

    for name in recipe_files.group_options("experiment", None):
        recipe = load_recipe([f"experiment={name}"], require_data=False)
        if not (recipe.model.name_or_path or recipe.model.language_model):
            with pytest.raises(RecipeError, match="names no model to plan for"):
                plan(recipe, gpu="a100-80")
            continue
        made = plan(recipe, gpu="a100-80")
        assert made.estimate.peak == max(made.estimate.moments.values()) > sum(g["num_bytes"] for g in made.weights)
        assert made.step_flops >= made.model_flops > 0
    assert shapes.num_image_tokens(load_recipe(["experiment=llama3_8b_qlora"], require_data=False)) == 729
    assert CPU_PROCESS_BYTES > 0
