"""Rules between the keys of a recipe: what is left open is written out, what contradicts itself is refused."""

# Over 400 lines: the rules are asked in one order, and each may rely on those before it.

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from vir_hf.errors import RecipeError
from vir_hf.recipe import files as recipe_files
from vir_hf.recipe import keys as recipe_keys
from vir_hf.recipe import upstream
from vir_hf.recipe.evaluation_rules import check_held_out
from vir_hf.recipe.view_rules import check_views

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe

# The initialisations of an adapter that need no data and that loading it repeats. The others (eva, corda, loftq, lora_ga) need
# data or a config that a recipe cannot hold, freeze what should learn (mica), or draw at random (pissa_niter_N).
INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "pissa", "olora")
_CHANGE_THE_BASE = ("pissa", "olora")
# What a schedule of transformers cannot do without, in training.lr_scheduler_kwargs; one of each is enough.
_SCHEDULE_NEEDS = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}

# The experiment whose model and data are made on the spot, so that it names neither.
SELF_CONTAINED = "quickstart"


def write_out(recipe: Recipe) -> None:
    """Fill in, in place, everything the recipe leaves to a rule, so that the saved recipe says all of it."""
    training = recipe.training
    stage = recipe.experiment.stage = recipe.experiment.stage or training.stage
    if stage != training.stage:
        raise RecipeError(
            f"experiment.stage: is {stage}, but training.stage is {training.stage}, which decides what learns. Set "
            f"training={stage}, or leave out experiment.stage."
        )
    training.arguments.setdefault("output_dir", f"outputs/{recipe.experiment.name}")
    training.arguments.setdefault("max_length", 2048)
    if (
        recipe.data.eval_path or recipe.data.eval_fraction
    ):  # rows that are named or held out are there to be evaluated on
        training.arguments.setdefault("eval_strategy", "epoch")
    if training.share_prefixes is None:
        training.share_prefixes = training.padding_free
    _write_out_checkpointing(recipe)
    _write_out_quantization(recipe)
    _write_out_trainable(recipe)


def _write_out_checkpointing(recipe: Recipe) -> None:
    """Move transformers' deprecated word for activation checkpointing to the one that stays."""
    arguments = recipe.training.arguments
    for old, new in (
        ("gradient_checkpointing", "activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ):
        value = arguments.pop(old, None)
        if value is None:
            continue
        if arguments.get(new) not in (None, value):
            raise RecipeError(
                f"training.{old}: found {value}, but training.{new} is {arguments[new]}; both mean the same. "
                f"Set only training.{new}."
            )
        arguments[new] = value


def _write_out_quantization(recipe: Recipe) -> None:
    """Turn model.use_qlora and model.load_in_4bit into quantization and trainable keys."""
    model, quantization, trainable = recipe.model, recipe.quantization, recipe.trainable
    for key, value in (("use_qlora", model.use_qlora), ("load_in_4bit", model.load_in_4bit)):
        if value is None:
            continue
        if value and quantization.bits == 8:
            raise RecipeError(f"model.{key}: true means 4 bit, but quantization says 8 bit. Add quantization=nf4.")
        if value and model.use_qlora is False:
            raise RecipeError("model.load_in_4bit: true, but model.use_qlora is false. Remove one of the two.")
        if value:
            quantization.arguments = {
                **recipe_files.packaged_values("quantization", "nf4"),
                **quantization.arguments,
                "load_in_4bit": True,
            }
        else:
            kept = {name: v for name, v in quantization.arguments.items() if "4bit" not in name}
            quantization.arguments = kept if kept.get("load_in_8bit") else {}
    if model.use_qlora:
        if trainable.language_model not in (None, "lora"):
            raise RecipeError(
                f"model.use_qlora: true trains the language model with LoRA, but trainable.language_model is "
                f"{trainable.language_model}. Remove one of the two."
            )
        trainable.language_model = "lora"
    model.use_qlora = model.load_in_4bit = None


def _write_out_trainable(recipe: Recipe) -> None:
    """Say for every part how it learns, and with which LoRA settings."""
    trainable, lora = recipe.trainable, recipe.lora
    is_finetune = recipe.training.stage == "finetune"
    if trainable.language_model is None:
        with_lora = bool(lora.arguments) or recipe.quantization.bits is not None or recipe.model.adapter is not None
        trainable.language_model = ("lora" if with_lora else "full") if is_finetune else "frozen"
    if trainable.projector is None:
        trainable.projector = "full"
    if trainable.vision_tower is None:
        trainable.vision_tower = "frozen"
    if "lora" in (trainable.language_model, trainable.vision_tower) and not lora.arguments:
        lora.arguments = recipe_files.packaged_values("lora", "default")


def check(recipe: Recipe, *, require_data: bool = True) -> None:
    """Raise for keys that contradict each other; nothing here needs a model or a file.

    Raises:
        RecipeError: naming the key and the remedy.
    """
    _check_model(recipe)
    _check_data(recipe, require_data)
    _check_quantization(recipe)
    _check_trainable(recipe)
    _check_batches(recipe)
    _check_training(recipe)
    _check_streaming(recipe)
    _check_strategies(recipe)
    _check_schedule(recipe)
    check_initialisation(recipe)
    _check_length(recipe)


def _check_model(recipe: Recipe) -> None:
    model = recipe.model
    check_views(model, recipe.data)
    if recipe.experiment.name == SELF_CONTAINED:
        return
    parts = [name for name in ("language_model", "vision_tower") if getattr(model, name)]
    if model.name_or_path and parts:
        raise RecipeError(
            f"model.name_or_path: names a whole model, but model.{parts[0]} is set too. Set model.{parts[0]}=null, or "
            "model.name_or_path=null to join parts."
        )
    if not model.name_or_path and not parts:
        raise RecipeError(
            "model: no model is named. Choose experiment=NAME (`vir-hf recipes` lists them), or set model.name_or_path, or "
            "model.language_model and model.vision_tower."
        )
    if len(parts) == 1:
        other = "vision_tower" if parts == ["language_model"] else "language_model"
        raise RecipeError(f"model.{other}: is not set, but model.{parts[0]} is. Set model.{other}=NAME_OR_FOLDER.")
    if model.tokenizer and model.name_or_path:
        raise RecipeError(
            "model.tokenizer: is set, but a whole model (model.name_or_path) brings its own. Set model.tokenizer=null."
        )
    if model.adapter and model.pretrained_projector:
        raise RecipeError(
            "model.pretrained_projector: is set, but model.adapter brings the projector it was trained with. Set one of the two "
            "to null."
        )
    attention, known = model.attn_implementation, ("auto", "eager", *upstream.attention_words())
    if attention not in known and not re.fullmatch(
        r"[\w.-]+/[\w.-]+(@[\w.-]+)?(:\w+)?", attention
    ):  # a kernel on the Hub
        near = recipe_keys.nearest_word(attention, known)
        raise RecipeError(
            f"model.attn_implementation: found {attention!r}, expected one of {', '.join(known)}, or a kernel's OWNER/NAME on "
            f"the Hub.{f' Did you mean {near}?' if near else ''}"
        )


def _check_data(recipe: Recipe, require_data: bool) -> None:
    data = recipe.data
    if data.data_path and data.sources:
        raise RecipeError("data.data_path: is set, but data.sources too. Keep one; a path can be one of the sources.")
    if data.sources is not None and not data.sources:
        raise RecipeError(
            "data.sources: the list is empty. Write 'data.sources=[{path: rows.json, image_folder: images}]'."
        )
    for number, source in enumerate(data.sources or []):
        if source.weight is not None and source.num_rows is not None:
            raise RecipeError(
                f"data.sources[{number}]: has weight and num_rows. Keep one: a share, or a number of rows."
            )
        if source.weight is not None and source.weight <= 0:
            raise RecipeError(f"data.sources[{number}].weight: found {source.weight:g}, expected more than 0.")
        if source.num_rows is not None and source.num_rows < 1:
            raise RecipeError(f"data.sources[{number}].num_rows: found {source.num_rows}, expected 1 or more.")
    if require_data and not data.data_path and not data.sources and recipe.experiment.name != SELF_CONTAINED:
        raise RecipeError(
            "data.data_path: is not set. Add data.data_path=ROWS.json (a LLaVA JSON file) and, when its images lie elsewhere, "
            "data.image_folder=FOLDER."
        )
    if data.eval_image_folder and not data.eval_path:
        raise RecipeError("data.eval_image_folder: is set, but data.eval_path is not. Set data.eval_path=ROWS.json.")
    check_held_out(recipe)
    strategy = recipe.training.eval_strategy
    has_rows = data.eval_path or data.eval_fraction or recipe.experiment.name == SELF_CONTAINED
    if strategy != "no" and not has_rows:
        raise RecipeError(
            f"training.eval_strategy: is {strategy}, but there are no rows to evaluate on. Set data.eval_path=ROWS.json or "
            "data.eval_fraction=0.05, or training.eval_strategy=no."
        )


def _check_trainable(recipe: Recipe) -> None:
    trainable, training = recipe.trainable, recipe.training
    if training.stage == "pretrain":
        for part, wanted in (("language_model", "frozen"), ("projector", "full"), ("vision_tower", "frozen")):
            found = getattr(trainable, part)
            if found != wanted:
                raise RecipeError(
                    f"trainable.{part}: is {found}, but stage pretrain trains the projector only. Set trainable.{part}={wanted}, "
                    "or training=finetune."
                )
    if (trainable.language_model, trainable.projector, trainable.vision_tower) == ("frozen",) * 3:
        raise RecipeError("trainable: every part is frozen, nothing would be learned. Set trainable.projector=full.")
    for part, short in (("projector", "projector"), ("vision_tower", "vision")):
        for quantity in ("learning_rate", "weight_decay"):
            key = f"{short}_{quantity}"
            if getattr(training, key) is not None and getattr(trainable, part) == "frozen":
                raise RecipeError(
                    f"training.{key}: is set, but trainable.{part} is frozen. Set training.{key}=null, or trainable.{part}=full."
                )
    if trainable.vision_from_layer is not None and trainable.vision_tower == "frozen":
        raise RecipeError(
            "trainable.vision_from_layer: is set, but trainable.vision_tower is frozen. Set trainable.vision_tower=full, or "
            "trainable.vision_from_layer=null."
        )
    if trainable.vision_tower == "lora" and trainable.language_model == "full":
        raise RecipeError(
            "trainable.vision_tower: is lora, but trainable.language_model is full: an adapter does not hold a whole language "
            "model, so what it learned would be lost. Set trainable.vision_tower=full, or trainable.language_model=lora."
        )
    has_lora = "lora" in (trainable.language_model, trainable.vision_tower)
    if recipe.lora.arguments and not has_lora:
        other = "" if training.stage == "pretrain" else ", or trainable.language_model=lora"
        raise RecipeError(
            f"lora.{next(iter(recipe.lora.arguments))}: is set, but no part is trained with LoRA (trainable.language_model is "
            f"{trainable.language_model}). Add lora=none{other}."
        )
    if recipe.model.adapter and not has_lora:
        raise RecipeError("model.adapter: is set, but no part is trained with LoRA. Set trainable.language_model=lora.")
    if training.feature_cache and trainable.vision_tower != "frozen":
        raise RecipeError(
            f"training.feature_cache: is set, but trainable.vision_tower is {trainable.vision_tower}, so features change with "
            "every step. Set training.feature_cache=null, or trainable.vision_tower=frozen."
        )


def _check_quantization(recipe: Recipe) -> None:
    arguments = recipe.quantization.arguments
    if arguments.get("load_in_4bit") and arguments.get("load_in_8bit"):
        raise RecipeError(
            "quantization.load_in_8bit: true, but quantization.load_in_4bit too. Choose quantization=nf4 or quantization=int8."
        )
    bits = recipe.quantization.bits
    if bits and recipe.trainable.language_model == "full":
        raise RecipeError(
            f"trainable.language_model: is full, but its weights are loaded in {bits} bit and cannot learn. Set "
            "trainable.language_model=lora, or quantization=none."
        )
    set_without_effect = [
        name for name, value in arguments.items() if value is not None and not name.startswith("load_in_")
    ]
    if not bits and set_without_effect:
        raise RecipeError(
            f"quantization.{set_without_effect[0]}: is set, but nothing is quantised. Add quantization.load_in_4bit=true, or "
            "quantization=none."
        )


def _check_batches(recipe: Recipe) -> None:
    training = recipe.training
    arguments = training.arguments
    rows = arguments.get("per_device_train_batch_size")
    if training.max_tokens_per_batch is not None:
        if rows is not None:
            raise RecipeError(
                "training.max_tokens_per_batch: is set, but training.per_device_train_batch_size too; tokens or rows bound a "
                "micro-batch, not both. Set one of the two to null."
            )
        if arguments.get("gradient_accumulation_steps") is not None:
            raise RecipeError(
                "training.gradient_accumulation_steps: is set, but under training.max_tokens_per_batch it follows from the rows. "
                "Set training.gradient_accumulation_steps=null."
            )
        if not training.padding_free:
            raise RecipeError(
                "training.max_tokens_per_batch: needs padding-free batches. Set training.padding_free=true."
            )
        if training.max_tokens_per_batch < (training.max_length or 0):
            raise RecipeError(
                f"training.max_tokens_per_batch: {training.max_tokens_per_batch} is less than one row may have "
                f"(training.max_length={training.max_length}). Raise the first or lower the second."
            )
    if training.global_batch_size is None:
        return
    rows = rows or 1
    steps = arguments.get("gradient_accumulation_steps") or 1
    if training.global_batch_size % (rows * steps):
        lower = next(n for n in range(rows, 0, -1) if training.global_batch_size % (n * steps) == 0 or n == 1)
        raise RecipeError(
            f"training.global_batch_size: {training.global_batch_size} rows a step cannot be dealt out as {rows} rows a "
            f"micro-batch (training.per_device_train_batch_size) in {steps} accumulation step(s). Set "
            f"training.per_device_train_batch_size={lower}"
            + (", training.gradient_accumulation_steps=null." if training.global_batch_size % (lower * steps) else ".")
        )


def _check_training(recipe: Recipe) -> None:
    training = recipe.training
    if not training.padding_free and training.share_prefixes:
        raise RecipeError(
            "training.share_prefixes: true needs training.padding_free=true. Set training.share_prefixes=false."
        )
    if training.bf16 and training.fp16:
        raise RecipeError("training.fp16: true, but training.bf16 too. Keep one, or neither: the machine then decides.")
    if training.max_steps == 0:
        raise RecipeError("training.max_steps: found 0, expected 1 or more, or -1 for training.num_train_epochs.")
    if not str(training.output_dir or "").strip():
        raise RecipeError("training.output_dir: is not set. Set training.output_dir=FOLDER.")
    if training.max_steps < -1:
        raise RecipeError(
            f"training.max_steps: found {training.max_steps}, expected 1 or more, or -1 for training.num_train_epochs."
        )
    if training.num_train_epochs == 0 and training.max_steps < 1:
        raise RecipeError("training.num_train_epochs: found 0, expected more than 0; nothing would be trained.")
    if training.bf16_full_eval and training.fp16_full_eval:
        raise RecipeError("training.fp16_full_eval: true, but training.bf16_full_eval too. Keep one, or neither.")
    if training.dataloader_prefetch_factor is not None and training.dataloader_num_workers == 0:
        raise RecipeError(
            "training.dataloader_prefetch_factor: is set, but training.dataloader_num_workers is 0, so nothing is fetched ahead. "
            "Set training.dataloader_num_workers=2, or training.dataloader_prefetch_factor=null."
        )
    name = training.hub_model_id
    if training.push_to_hub and name and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise RecipeError(f"training.hub_model_id: found {name!r}, expected OWNER/NAME or NAME. Correct it.")


def _check_streaming(recipe: Recipe) -> None:
    if recipe.data.streaming and recipe.data.deduplicate:
        raise RecipeError(
            "data.deduplicate: is set, but data.streaming is true, and a stream does not keep what it has read. Set one of the "
            "two to null."
        )
    if recipe.data.streaming and (not recipe.training.max_steps or recipe.training.max_steps < 1):
        raise RecipeError(
            "data.streaming: true, but training.max_steps is not set; a stream does not know its length. Set "
            "training.max_steps to rows x epochs / training.global_batch_size."
        )


def _check_strategies(recipe: Recipe) -> None:
    """When is logged, evaluated and saved; transformers says the same, after its own names and after torch is loaded."""
    training = recipe.training
    evaluates = training.eval_strategy != "no"
    eval_steps = training.eval_steps or training.logging_steps
    for what, steps in (("logging", training.logging_steps), ("eval", eval_steps), ("save", training.save_steps)):
        if getattr(training, f"{what}_strategy") != "steps":
            continue
        if steps < 0 or (steps > 1 and steps != int(steps)) or (steps == 0 and what != "save"):
            raise RecipeError(
                f"training.{what}_steps: found {steps:g}, expected a whole number from 1, or a share of all steps below 1."
            )
    for key in ("eval_on_start", "load_best_model_at_end"):
        if getattr(training, key) and not evaluates:
            raise RecipeError(
                f"training.{key}: true, but nothing is evaluated. Set data.eval_path=ROWS.json and training.eval_strategy=steps, "
                f"or training.{key}=false."
            )
    if training.save_strategy == "best":
        if not evaluates or not (training.metric_for_best_model or training.load_best_model_at_end):
            raise RecipeError(
                "training.save_strategy: best needs an evaluation and a metric to tell which is. Set "
                "training.eval_strategy=steps and training.metric_for_best_model=loss, or training.save_strategy=steps."
            )
    elif training.load_best_model_at_end:
        if training.save_strategy != training.eval_strategy:
            raise RecipeError(
                f"training.load_best_model_at_end: only a saved step can be loaded, but training.save_strategy is "
                f"{training.save_strategy} and training.eval_strategy is {training.eval_strategy}. Set "
                f"training.save_strategy={training.eval_strategy}."
            )
        parts = 1_000_000 if eval_steps < 1 and training.save_steps < 1 else 1  # shares, compared in whole numbers
        if training.eval_strategy == "steps" and (
            (eval_steps < 1) != (training.save_steps < 1)
            or training.save_steps == 0
            or round(training.save_steps * parts) % round(eval_steps * parts)
        ):
            raise RecipeError(
                f"training.load_best_model_at_end: training.save_steps ({training.save_steps:g}) is no multiple of "
                f"training.eval_steps ({eval_steps:g}), so the best may not be saved. Set training.save_steps={eval_steps:g}."
            )


def _check_schedule(recipe: Recipe) -> None:
    training = recipe.training
    schedule = training.arguments.get("lr_scheduler_type", "linear")
    if schedule in ("reduce_lr_on_plateau", "greedy") and training.eval_strategy == "no":
        raise RecipeError(
            f"training.lr_scheduler_type: {schedule} follows the loss of evaluations, but nothing is evaluated. Set "
            "data.eval_path=ROWS.json and training.eval_strategy=steps, or training.lr_scheduler_type=cosine."
        )
    given, needed = training.lr_scheduler_kwargs or {}, _SCHEDULE_NEEDS.get(schedule, ())
    if needed and isinstance(given, dict) and all(given.get(name) is None for name in needed):
        raise RecipeError(
            f"training.lr_scheduler_type: {schedule} needs {' or '.join(needed)}. Set "
            f"'training.lr_scheduler_kwargs={{{needed[-1]}:VALUE}}'."
        )
    trackers = training.report_to if isinstance(training.report_to, list) else [training.report_to or "none"]
    known = ("all", "none", *upstream.tracker_words())
    for name in trackers:
        if name not in known or (name in ("all", "none") and len(trackers) > 1):
            near = recipe_keys.nearest_word(str(name), known)
            hint = f" Did you mean {near}?" if near and near != name else ""
            raise RecipeError(
                f"training.report_to: found {name!r}, expected all or none alone, or of {', '.join(known[2:])}.{hint}"
            )
    optimizer = training.arguments.get("optim", "")
    if optimizer.startswith(("galore", "apollo")) and not training.optim_target_modules:
        raise RecipeError(
            f"training.optim: {optimizer} works on the layers of training.optim_target_modules, which is not set. Set "
            "training.optim_target_modules=all-linear, or training.optim=adamw_torch."
        )


def check_initialisation(recipe: Recipe) -> None:
    """Raise for an initialisation of the adapter that needs data, that loading cannot repeat, or that the base cannot take."""
    init = recipe.lora.arguments.get("init_lora_weights", True)
    if init not in INITIALISATIONS:
        raise RecipeError(
            f"lora.init_lora_weights: {init} needs data or draws at random what loading the adapter has to draw again; expected "
            "true, false, gaussian, orthogonal, pissa or olora."
        )
    if init in _CHANGE_THE_BASE and recipe.quantization.bits and not recipe.quantization.only_on_cuda:
        raise RecipeError(
            f"lora.init_lora_weights: {init} changes the base's weights, which are stored in {recipe.quantization.bits} bit. Set "
            "lora.init_lora_weights=true, or quantization=none."
        )
    if recipe.lora.arguments.get("lora_bias") and init not in (True, False, None):
        raise RecipeError(
            f"lora.lora_bias: true cannot go with lora.init_lora_weights={init}. Set one of the two to false."
        )


def _check_length(recipe: Recipe) -> None:
    """Raise if not even one image fits into a row, where the recipe or a config beside it says how long an image is."""
    max_length, num_patches = recipe.training.max_length, _num_patches(recipe)
    if num_patches:  # of the smallest image; a larger one that does not fit is found when rows are measured
        num_patches = num_patches // recipe.model.pixel_shuffle**2 + (recipe.model.tiling != "none")
    if num_patches and max_length and max_length <= num_patches:
        raise RecipeError(
            f"training.max_length: {max_length} tokens a row, but one image of {recipe.model.vision_tower} takes {num_patches}, "
            f"and images are never cut. Set training.max_length={max(512, 2 ** (2 * num_patches - 1).bit_length())}."
        )


def _num_patches(recipe: Recipe) -> int | None:
    """Return how many patches the vision tower makes of an image: by its config if that lies on this disk, else by its name."""
    name = recipe.model.vision_tower
    if not name:
        return None
    try:
        config = json.loads((Path(name).expanduser() / "config.json").read_text(encoding="utf-8"))
        config = config.get("vision_config") or config
        return (int(config["image_size"]) // int(config["patch_size"])) ** 2
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        found = re.search(r"-patch(\d+)-(\d{3})(?:-|$)", name)  # CLIP's and SigLIP's way to name their towers
        return (int(found[2]) // int(found[1])) ** 2 if found else None


def global_batch_size(recipe: Recipe, world_size: int) -> int:
    """Return how many rows an optimizer step holds on this layout.

    Raises:
        RecipeError: rows a micro-batch, micro-batches and processes do not multiply to `training.global_batch_size`.
    """
    training = recipe.training
    per_device, wanted = training.per_device_train_batch_size or 1, training.global_batch_size
    accumulation = training.arguments.get("gradient_accumulation_steps")
    if wanted is None:
        return int(per_device * (accumulation or 1) * world_size)
    if accumulation is not None and per_device * accumulation * world_size != wanted:
        fitting = [a for a in range(1, wanted + 1) if per_device * a * world_size == wanted]
        raise RecipeError(
            f"training.global_batch_size={wanted} rows a step, but training.per_device_train_batch_size={per_device} x "
            f"training.gradient_accumulation_steps={accumulation} x {world_size} processes = "
            f"{per_device * accumulation * world_size}. "
            + (f"Set training.gradient_accumulation_steps={fitting[0]}, " if fitting else "Change one of the numbers, ")
            + "or leave it out."
        )
    if wanted % world_size:
        above = -(-wanted // world_size) * world_size
        raise RecipeError(
            f"training.global_batch_size={wanted} cannot be shared evenly by {world_size} processes. Set it to "
            f"{above if above == world_size else f'{above - world_size} or {above}'}, or start another number of processes."
        )
    return int(wanted)
