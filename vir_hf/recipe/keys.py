"""What may be written in a recipe: the names, their types, and the words people type instead."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from vir_hf.errors import RecipeError
from vir_hf.recipe.upstream import Argument

Schema = Mapping[str, Mapping[str, Argument]]

_VISION = "TRL ignores or refuses it for rows with images"
_HARDWARE = (
    "the hardware belongs to the accelerate config: accelerate launch --config_file accelerate_configs/NAME.yaml"
)
_BY_US = "vir_hf sets it itself"

# Upstream arguments that would do nothing, or break what the product promises, and what to write instead.
REFUSED: dict[str, str] = {
    "training.packing": f"{_VISION}; padding-free batches already waste nothing (training.padding_free)",
    "training.packing_strategy": f"{_VISION}; padding-free batches already waste nothing (training.padding_free)",
    "training.eval_packing": f"{_VISION}; padding-free batches already waste nothing (training.padding_free)",
    "training.assistant_only_loss": "the labels always cover the assistant's tokens and the end of turn, nothing else",
    "training.completion_only_loss": "the labels always cover the assistant's tokens and the end of turn, nothing else",
    "training.dataset_text_field": f"{_VISION}; rows hold id, messages and images",
    "training.dataset_kwargs": f"{_VISION}; say how the data is read in the data section",
    "training.dataset_num_proc": f"{_VISION}; use training.dataloader_num_workers",
    "training.shuffle_dataset": f"{_VISION}; the sampler shuffles, seeded by training.data_seed",
    "training.truncation_mode": f"{_VISION}; rows over training.max_length lose text turns from the end, never an image",
    "training.chat_template_path": "the prompt format is model.template",
    "training.eos_token": "the end of turn comes from model.template",
    "training.pad_token": "it comes from the tokenizer",
    "training.pad_to_multiple_of": f"{_BY_US}: padding-free batches hold no padding",
    "training.model_init_kwargs": "how the model is loaded is said in the model section",
    "training.trust_remote_code": "write model.trust_remote_code",
    "training.remove_unused_columns": f"{_BY_US}: without it TRL drops the images",
    "training.label_names": _BY_US,
    "training.use_cache": f"{_BY_US}: a cache leaks between the rows of one batch",
    "training.train_sampling_strategy": "which rows share a batch is training.group_by_image and training.balance_tokens",
    "training.length_column_name": "lengths come from the encoded rows (training.balance_tokens)",
    "training.auto_find_batch_size": "it would change the rows of a step; use training.on_out_of_memory=split",
    "training.resume_from_checkpoint": "write training.resume=auto, or training.resume=PATH",
    "training.ignore_data_skip": "a resumed run would see other rows; training.resume goes on exactly where it stopped",
    "training.save_only_model": "such a checkpoint cannot be resumed",
    "training.router_aux_loss_coef": "a LLaVA model returns no router logits, so there is no loss of a router to weight",
    "training.enable_jit_checkpoint": f"{_BY_US}: SIGTERM and SIGUSR1 already save before the run ends",
    "training.hub_token": "a token has no place in a recipe; log in with `hf auth login` or set HF_TOKEN",
    "training.deepspeed": _HARDWARE,
    "training.fsdp": _HARDWARE,
    "training.fsdp_config": _HARDWARE,
    "training.parallelism_config": _HARDWARE,
    "training.accelerator_config": _HARDWARE,
    "training.local_rank": _HARDWARE,
    "training.ddp_timeout": "write training.timeout_minutes",
    "training.do_train": "vir-hf train trains; leave it out",
    "training.do_eval": "evaluation is data.eval_path with training.eval_strategy",
    "training.do_predict": "answers come from `vir-hf answer`",
    "lora.task_type": _BY_US,
    "lora.peft_type": _BY_US,
    "lora.auto_mapping": _BY_US,
    "lora.peft_version": _BY_US,
    "lora.base_model_name_or_path": f"{_BY_US} from the model section",
    "lora.revision": "write model.revision",
    "lora.inference_mode": _BY_US,
}

# Words of other trainers and of earlier releases: the original LLaVA's flags, older transformers and TRL.
RENAMED: dict[str, str] = {
    "warmup_ratio": "training.warmup_steps (a number below 1 is a share of all steps: 0.03)",
    "evaluation_strategy": "training.eval_strategy",
    "max_seq_length": "training.max_length",
    "model_max_length": "training.max_length",
    "torch_dtype": "model.dtype",
    "model_name_or_path": "model.name_or_path (a whole model) or model.language_model and model.vision_tower",
    "use_flash_attention_2": "model.attn_implementation",
    "version": "model.template",
    "mm_projector_type": "model.projector_type",
    "mm_vision_select_layer": "model.vision_feature_layer",
    "pretrain_mm_mlp_adapter": "model.pretrained_projector",
    "mm_projector_lr": "training.projector_learning_rate",
    "mm_vision_tower_lr": "training.vision_learning_rate",
    "tune_mm_mlp_adapter": "training=pretrain",
    "group_by_modality_length": "training.group_by_image (batches hold no padding, so lengths need no grouping)",
    "group_by_length": "training.group_by_image (batches hold no padding, so lengths need no grouping)",
    "lora_enable": "trainable.language_model=lora",
    "lora_r": "lora.r",
    "bits": "quantization=nf4 or quantization=int8",
    "lazy_preprocess": "nothing: images are always opened only when a row is read",
    "is_multimodal": "nothing: text-only rows are recognised by themselves",
    "freeze_backbone": "trainable.language_model=frozen",
    "batch_size": "training.per_device_train_batch_size (rows at a time) or training.global_batch_size (rows per step)",
    "per_gpu_train_batch_size": "training.per_device_train_batch_size",
    "epochs": "training.num_train_epochs",
    "lr": "training.learning_rate",
    "logging_dir": "nothing: trackers write under training.output_dir",
    "bf16_compute": "model.dtype",
}

# The words of upstream arguments whose type says only that they are texts; another one fails late, in a traceback.
WORDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("training.log_level", "training.log_level_replica"),
        ("passive", "detail", "debug", "info", "warning", "error", "critical"),
    ),
    "training.debug": ("", "underflow_overflow", "tpu_metrics_debug"),
    "training.include_num_input_tokens_seen": ("no", "all", "non_padding"),
    "training.torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "quantization.bnb_4bit_quant_type": ("fp4", "nf4"),
}

_LOWEST: dict[str, float] = {
    "training.learning_rate": 0,
    "training.weight_decay": 0,
    "training.warmup_steps": 0,
    "training.num_train_epochs": 0,
    "training.max_grad_norm": 0,
    "training.per_device_train_batch_size": 1,
    "training.per_device_eval_batch_size": 1,
    "training.gradient_accumulation_steps": 1,
    "training.max_length": 1,
    "training.dataloader_num_workers": 0,
    "training.global_batch_size": 1,
    "training.projector_learning_rate": 0,
    "training.vision_learning_rate": 0,
    "training.projector_weight_decay": 0,
    "training.vision_weight_decay": 0,
    "training.max_tokens_per_batch": 1,
    "training.max_skipped_steps": 0,
    "training.timeout_minutes": 1,
    "trainable.vision_from_layer": 0,
    "data.max_rows": 1,
    "data.max_bad_fraction": 0,
    "lora.r": 1,
    "lora.lora_alpha": 1,
    "lora.lora_dropout": 0,
    "training.adam_beta1": 0,
    "training.adam_beta2": 0,
    "training.adam_epsilon": 0,
    "training.label_smoothing_factor": 0,
    "training.torch_empty_cache_steps": 1,
    "training.dataloader_prefetch_factor": 1,
    "training.eval_accumulation_steps": 1,
    "training.save_total_limit": 1,
    "training.seed": 0,
    "training.data_seed": 0,
    "model.max_tiles": 2,
    "model.pixel_shuffle": 1,
}
_HIGHEST: dict[str, float] = {
    "data.max_bad_fraction": 1,
    "lora.lora_dropout": 1,
    "training.label_smoothing_factor": 1,
    "training.adam_beta1": 1,
    "training.adam_beta2": 1,
    "training.seed": 2**32 - 1,  # NumPy's
    "training.data_seed": 2**32 - 1,
    "model.max_tiles": 64,
    "model.pixel_shuffle": 4,
}


def find_argument(key: str, schema: Schema) -> Argument:
    """Return the argument a dotted key stands for; keys below a dictionary-valued argument stand for that argument.

    Raises:
        RecipeError: no such key (naming the nearest one), or one that has no place in a recipe (saying why).
    """
    section, _, rest = key.partition(".")
    name, _, below = rest.partition(".")
    if any(part.startswith("_") and part.endswith("_") for part in key.split(".")):
        raise RecipeError(f"{key}: a recipe cannot name Python code. Remove the key.")
    if section not in schema or (name and name not in schema[section]):
        raise RecipeError(unknown_key(key, schema))
    if not name:
        raise RecipeError(f"{key}: is a section, not a key. Write {key}.NAME=VALUE.")
    full = f"{section}.{name}"
    argument = schema[section][name]
    if full in REFUSED:
        raise RecipeError(f"{full}: is not accepted: {REFUSED[full]}. Remove the key.")
    if not argument.is_writable:
        raise RecipeError(f"{full}: takes a Python object, which a recipe cannot hold. Remove the key.")
    if below and argument.kinds and "dict" not in argument.kinds:
        if "list" in argument.kinds:
            raise RecipeError(f"{key}: parts of a list cannot be set alone. Write the whole list: '{full}=[...]'.")
        raise RecipeError(f"{key}: {full} holds one value, so there is nothing below it. Write {full}=VALUE.")
    return argument


def unknown_key(key: str, schema: Schema) -> str:
    """Return the message for a key that does not exist, with the nearest one that does."""
    leaf = key.rsplit(".", 1)[-1]
    if leaf in RENAMED:
        return f"{key}: unknown key. Here it is {RENAMED[leaf]}."
    nearest = nearest_key(key, schema)
    hint = f" Did you mean {nearest}?" if nearest else f" Sections are {', '.join(schema)}."
    return f"{key}: unknown key.{hint} Every key is listed in docs/recipes.md."


def nearest_key(key: str, schema: Schema) -> str | None:
    """Return the known key that looks most like this one: same section first, then the same name in another."""
    section, _, rest = key.partition(".")
    name = (rest or section).split(".")[0]
    known = {f"{s}.{n}": n for s, names in schema.items() for n in names if f"{s}.{n}" not in REFUSED}
    if section in schema:
        near = nearest_word(name, [n for full, n in known.items() if full.startswith(f"{section}.")], cutoff=0.7)
        if near:
            return f"{section}.{near}"
    for full, other in known.items():
        if other == name:
            return full
    near_section = nearest_word(section, list(schema)) if rest else None
    if near_section and f"{near_section}.{name}" in known:
        return f"{near_section}.{name}"
    near_full = nearest_word(key, list(known)) if rest else None
    if near_full:
        return near_full
    near_name = nearest_word(name, list(known.values()))
    return next((full for full, other in known.items() if other == near_name), None)


def nearest_word(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known word that looks most like this one, or None when nothing does."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def checked_value(key: str, value: Any, argument: Argument) -> Any:
    """Return a value in the type its argument wants: 1e3 for a whole number becomes 1000, 2024 for a text becomes "2024".

    Raises:
        RecipeError: another type, a word that is not among the choices, or a number out of range.
    """
    if value is None:
        return None
    if value is False and "no" in argument.choices:
        value = "no"  # YAML reads a bare no as false
    value = _converted(value, argument.kinds)
    kind = type(value).__name__
    is_number = kind == "int" and "float" in argument.kinds
    if argument.kinds and kind not in argument.kinds and not is_number:
        expected = " or ".join(_KIND_NAMES[k] for k in sorted(argument.kinds) if k != "none")
        words = f", one of {', '.join(argument.choices)}" if argument.choices else ""
        raise RecipeError(
            f"{key}: found {value!r} ({_KIND_NAMES.get(kind, kind)}), expected {expected}{words}. "
            f"Write {key}={_EXAMPLES[next(k for k in _EXAMPLES if k in argument.kinds)]}."
        )
    if argument.choices and isinstance(value, str) and value not in argument.choices:
        near = nearest_word(value, argument.choices)
        hint = f" Did you mean {near}?" if near else ""
        raise RecipeError(f"{key}: found {value!r}, expected one of {', '.join(argument.choices)}.{hint}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_range(key, value)
    return value


_KIND_NAMES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "list": "a list",
    "dict": "a mapping",
}
_EXAMPLES = {"bool": "true", "int": "8", "float": "5e-5", "str": "TEXT", "list": "'[A,B]'", "dict": "'{NAME:VALUE}'"}


def _converted(value: Any, kinds: frozenset[str]) -> Any:
    """Return a number in the kind that is wanted, where nothing is lost; anything else unchanged."""
    if isinstance(value, bool) or not kinds:
        return value
    if isinstance(value, float) and value.is_integer() and "float" not in kinds and "int" in kinds:
        return int(value)
    if isinstance(value, (int, float)) and not kinds & {"int", "float"} and "str" in kinds:
        return str(value)
    return value


def _check_range(key: str, value: float) -> None:
    """Raise when a number lies outside what its key allows; upstream would fail late, or train on nothing."""
    low, high = _LOWEST.get(key), _HIGHEST.get(key)
    if value != value or value in (float("inf"), float("-inf")):
        raise RecipeError(f"{key}: found {value}, expected a finite number.")
    if low is not None and value < low:
        raise RecipeError(f"{key}: found {value:g}, expected {low:g} or more.")
    if high is not None and value > high:
        raise RecipeError(f"{key}: found {value:g}, expected at most {high:g}.")


def refuse_code(key: str, value: Any) -> None:
    """Raise when a value, or anything inside it, would run code: an instantiation key or an OmegaConf resolver."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            inner_key = f"{key}.{name}" if key else str(name)
            if str(name).startswith("_") and str(name).endswith("_"):
                raise RecipeError(f"{inner_key}: a recipe cannot name Python code. Remove the key.")
            refuse_code(inner_key, inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            refuse_code(key, inner)
    elif isinstance(value, str) and re.search(r"\$\{[^{}]*:", value):
        raise RecipeError(
            f"{key}: found {value!r}; only references to other keys (${{experiment.name}}) are allowed, no resolvers. "
            f"For a value from the environment write {key}=$VARIABLE on the command line."
        )
