"""Whether a language model can be joined with a vision tower, told from its config before its weights are fetched.

No family is known by name. A language model of the same class and the same settings, but a few thousand times smaller, is made,
joined, saved, opened with transformers' own LLaVA class and compared with itself; what differs is said, and refused.
"""

# Over 400 lines: judging a family and making a small one of it follow the same list of sizes.

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.utils import logging as transformers_logging

from vir_hf.errors import RecipeError
from vir_hf.llava.logits import logit_factor
from vir_hf.llava.modeling_llava import LlavaForCausalLM
from vir_hf.model.adapters import adapter_folder, base_of
from vir_hf.model.configs import check_whole_model, read_config

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe

logger = logging.getLogger(__name__)

# Weights of the small model; more means that a config has sizes of its own that this file does not make small.
_MOST_WEIGHTS = 60_000_000
_VOCABULARY = 128


@dataclass(frozen=True)
class LanguageModelFit:
    """What joining a language model takes.

    Attributes:
        model_type: its family.
        logit_factor: what it multiplies its logits with, which goes into the weights of its last norm.
        not_packed_because: why rows of one batch would see each other if they were packed into one; `None` if they do not.
    """

    model_type: str
    logit_factor: float
    not_packed_because: str | None


def judge_language_model(config: PreTrainedConfig, name: str, key: str = "model.language_model") -> LanguageModelFit:
    """Return what joining a language model takes.

    Args:
        config: its own config, in full size.
        name: as the recipe names it.

    Raises:
        RecipeError: it cannot be joined; the saved model would not be the one that was trained.
    """
    verdict = _judged(config)
    if isinstance(verdict, str):
        raise RecipeError(
            f"{key}={name}: {verdict[:300]} Choose another language model; docs/language-models.md lists the families that fit."
        )
    return verdict


def not_packed(config: PreTrainedConfig) -> str | None:
    """Return why rows of a whole LLaVA model, or of a language model, cannot be packed; `None` if they can.

    A family that cannot be tried is not packed.
    """
    text = config.get_text_config()
    verdict = _judged(text)
    return verdict if isinstance(verdict, str) else verdict.not_packed_because


def fit_to_language_model(recipe: Recipe) -> Recipe:
    """Return the recipe as its model can be trained: without padding-free batches where rows would see each other in them.

    Raises:
        RecipeError: a model that cannot be trained, or batches measured in tokens, which only padding-free ones are.
    """
    wanted, training = recipe.model, recipe.training
    options = {"trust_remote_code": wanted.trust_remote_code, "takes_known": True}
    if wanted.name_or_path:
        name, revision = wanted.name_or_path, wanted.revision
        folder = adapter_folder(name, revision)
        if folder is not None:
            name, revision = base_of(folder)
        config, _ = read_config(name, "model.name_or_path", revision=revision, **options)
        check_whole_model(config, name, "model.name_or_path", revision)
        reason = not_packed(config)
    elif wanted.language_model:
        config, _ = read_config(wanted.language_model, "model.language_model", revision=wanted.revision, **options)
        reason = judge_language_model(config, wanted.language_model).not_packed_because
    else:
        return recipe
    if reason is None or not training.padding_free:
        return recipe
    if training.max_tokens_per_batch:
        raise RecipeError(
            f"training.max_tokens_per_batch: needs padding-free batches, which this language model cannot take: {reason}. Set "
            "training.max_tokens_per_batch=null and training.padding_free=false."
        )
    logger.warning(
        "training.padding_free is switched off: packed into one, rows of a batch would see each other (%s); they are padded, "
        "and the loss is the same",
        reason,
    )
    return dataclasses.replace(recipe, training=dataclasses.replace(training, padding_free=False, share_prefixes=False))


# A recipe's language model is judged where it is planned for, loaded and trained.
_JUDGED: dict[tuple[type, str], LanguageModelFit | str] = {}


def _judged(config: PreTrainedConfig) -> LanguageModelFit | str:
    key = (type(config), config.to_json_string(use_diff=False))
    if key not in _JUDGED:
        _JUDGED[key] = _judge(copy.deepcopy(config))
    return _JUDGED[key]


def _judge(config: PreTrainedConfig) -> LanguageModelFit | str:
    config_class, kind = type(config), config.model_type
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return f"its model type is {kind!r}; expected a causal language model that transformers knows without code from the Hub."
    if config.is_encoder_decoder:
        return f"{kind} is an encoder with a decoder; expected a causal language model."
    is_whole = any(getattr(config, part, None) is not None for part in ("vision_config", "audio_config", "text_config"))
    if is_whole or config.get_text_config() is not config:
        return f"{kind} reads more than text already; expected a causal language model of text alone."
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    try:
        with _quietly():
            factor = logit_factor(model_class, config)
            return _tried(model_class, config, factor)
    except ValueError as error:
        return _one_line(error)
    except Exception as error:  # of models and configs of every kind
        return f"{model_class.__name__} cannot be joined ({type(error).__name__}: {_one_line(error)[:120]})."


def _tried(model_class: type[PreTrainedModel], config: PreTrainedConfig, factor: float) -> LanguageModelFit:
    """Join a small model of this class and compare it with itself.

    Raises:
        ValueError: what differs, or what it lacks.
    """
    name = model_class.__name__
    small = smaller_config(config)
    with torch.device("meta"):
        outline: Any = model_class(copy.deepcopy(small))
    _check_layout(outline, config)
    num_weights = sum(parameter.numel() for parameter in outline.parameters())
    if num_weights > _MOST_WEIGHTS:
        raise ValueError(f"{name} cannot be tried: made small it still has {num_weights:,} weights.")
    language_model: Any = model_class(small).float().eval()
    for parameter in language_model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.08)  # wide enough for attention to matter
        else:
            parameter.data += torch.randn_like(parameter) * 0.05
    ids = torch.randint(4, _VOCABULARY - 1, (1, 12))
    with torch.no_grad():
        own = language_model(input_ids=ids, use_cache=False).logits
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
    ).eval()
    model = LlavaForCausalLM.from_components(language_model, tower, vocab_size=_VOCABULARY).eval()
    size = max(float(own.abs().max()), 1e-6)
    with torch.no_grad():
        joined = model(input_ids=ids, use_cache=False).logits[..., : own.shape[-1]]
        if not torch.allclose(joined, own, rtol=1e-3, atol=1e-4 * size):
            raise ValueError(f"{name} answers otherwise when it is given embeddings in place of tokens.")
        inputs = {
            "input_ids": torch.cat([torch.full((1, 4), model.config.image_token_id), ids], 1),
            "pixel_values": torch.randn(1, 3, 28, 28),
        }
        seen = model(**inputs, use_cache=False).logits
        _check_rows_apart(model, ids, name)
        _check_reloads(model, inputs, seen, name, through_files=_has_own_file_layout(language_model))
        reason = _leak(model, ids, name)
    return LanguageModelFit(config.model_type, factor, reason)


def _check_layout(outline: Any, config: PreTrainedConfig) -> None:
    """Raise unless the body is the one LLaVA would build, with its blocks where LoRA, the planner and engines look for them."""
    name, body = type(outline).__name__, outline.base_model
    expected = MODEL_MAPPING.get(type(config), None)
    if type(body) is not expected:
        raise ValueError(
            f"{name} has a {type(body).__name__} inside, but from its config LLaVA would build "
            f"{getattr(expected, '__name__', 'nothing')}."
        )
    if not isinstance(getattr(body, "layers", None), nn.ModuleList) or not any(
        isinstance(module, nn.Linear) for module in body.layers.modules()
    ):
        raise ValueError(
            f"{name} does not keep blocks of linear layers in `layers`, where LLaVA's tools look for them."
        )
    if getattr(config, "tie_word_embeddings", False):
        embedding = outline.get_input_embeddings()
        if getattr(body, "embed_tokens", None) is not embedding:
            place = next((place for place, module in body.named_modules() if module is embedding), "nowhere")
            raise ValueError(f"{name} ties its head to `{place}`; LLaVA ties it to `embed_tokens` alone.")


def _check_rows_apart(model: Any, ids: torch.Tensor, name: str) -> None:
    """Raise unless a row in a padded batch is what it is alone."""
    short = ids[:, :7]
    alone = model(input_ids=short, use_cache=False).logits[0]
    padded = torch.cat([short, short.new_zeros(1, ids.shape[1] - short.shape[1])], 1)
    mask = torch.ones(2, ids.shape[1], dtype=torch.long)
    mask[1, short.shape[1] :] = 0
    both = model(input_ids=torch.cat([ids, padded]), attention_mask=mask, use_cache=False).logits[1, : short.shape[1]]
    if not torch.allclose(both, alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max())):
        raise ValueError(f"{name} answers otherwise when a row is padded to the length of another one.")


def _has_own_file_layout(language_model: PreTrainedModel) -> bool:
    """Whether transformers renames or fuses weights of this family while loading it."""
    body = language_model.base_model
    kinds = (type(language_model).__name__, type(body).__name__, language_model.config.model_type)
    return any(get_checkpoint_conversion_mapping(kind) for kind in kinds)


def _check_reloads(
    model: Any, inputs: dict[str, torch.Tensor], seen: torch.Tensor, name: str, *, through_files: bool
) -> None:
    """Raise unless what is saved opens in transformers' own class as the same model.

    Args:
        through_files: save and load; else only the weights are handed over, which is faster.
    """
    stock: Any
    if through_files:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            stock = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    else:
        stock = LlavaForConditionalGeneration(copy.deepcopy(model.config))
        try:
            stock.load_state_dict(model.state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"{name} has weights of other shapes than transformers' LLaVA class would build."
            ) from error
    again = stock.eval()(**inputs, use_cache=False).logits
    if not torch.allclose(again, seen, rtol=1e-3, atol=1e-4 * float(seen.abs().max())):
        raise ValueError(
            f"{name} inside a LLaVA model loses weights when transformers loads it again: their names do not return."
        )


def _leak(model: Any, ids: torch.Tensor, name: str) -> str | None:
    """Why packed rows are not what they are alone, or `None`; a prefix that two rows share is tried, too."""
    lengths = (4, 3, 5)
    rows = [(slice(0, 4), None), (slice(4, 7), slice(0, 4)), (slice(7, 12), None)]
    try:
        packed = model.model(
            input_ids=ids,
            segment_lengths=torch.tensor(lengths),
            segment_prefixes=torch.tensor([-1, 0, -1]),
            use_cache=False,
        ).last_hidden_state[0]
    except Exception as error:  # of attention of every kind
        text = _one_line(error).split(". Set training")[0].split(", so rows of this batch")[0]
        return text if name.removesuffix("ForCausalLM") in text else "its attention does not take segments"
    finally:
        model.model.language_model.config._attn_implementation = "sdpa"
    for own, prefix in rows:
        tokens = ids[:, own] if prefix is None else torch.cat([ids[:, prefix], ids[:, own]], 1)
        alone = model.model(input_ids=tokens, use_cache=False).last_hidden_state[0, -(own.stop - own.start) :]
        if not torch.allclose(packed[own], alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max())):
            return "its layers carry a state from one row to the next"
    return None


def smaller_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config of the same family and settings with few layers, heads, experts and tokens.

    What decides how a model computes stays: a head's size, the kinds of layers, norms, windows, positions and factors.
    """
    fields = config.to_dict()
    names = {word: config.attribute_map.get(word, word) for word in _SIZE_WORDS}
    layers, heads, key_heads, width = (fields.get(names[word]) for word in _SIZE_WORDS)
    changes: dict[str, Any] = {}
    if isinstance(layers, int):
        kept = _kinds_of_layers(fields, layers)
        changes[names["num_hidden_layers"]] = len(kept)
        for key, value in fields.items():
            if isinstance(value, list) and len(value) == layers > 1:
                changes[key] = [value[index] for index in kept]
        if isinstance(fields.get("per_layer_config"), dict):
            by_layer = {int(key): value for key, value in fields["per_layer_config"].items()}
            changes["per_layer_config"] = {
                number: by_layer[index] for number, index in enumerate(kept) if index in by_layer
            }
        for key in ("first_k_dense_replace", "num_dense_layers", "max_window_layers"):
            if isinstance(fields.get(key), int):
                changes[key] = min(fields[key], 1)
        for key in ("moe_layer_end_index", "num_kv_shared_layers"):
            if isinstance(fields.get(key), int):
                changes[key] = min(fields[key], len(kept) - 1 if key.startswith("moe") else 0)
    if isinstance(heads, int) and isinstance(width, int):
        is_shared = isinstance(key_heads, int) and key_heads != heads
        few_keys = 1 if key_heads == 1 else 2
        few = few_keys * 2 if is_shared else 2
        changes[names["num_attention_heads"]] = few
        if isinstance(key_heads, int):
            changes[names["num_key_value_heads"]] = few_keys if is_shared else few
        changes[names["hidden_size"]] = few * (fields.get("head_dim") or width // heads)
    for key, value in fields.items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if key.endswith(("intermediate_size", "ffn_hidden_size")) or key in ("intermediate_size_mlp", "ffn_dim"):
            changes[key] = min(value, 64)
        elif key in ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "zero_expert_num"):
            changes[key] = min(value, 8)
        elif key in ("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k"):
            changes[key] = min(value, 2)
        elif key in ("n_group", "topk_group", "num_expert_group"):
            changes[key] = 1
        elif key.startswith("linear_num_") and value >= 8:
            changes[key] = value // 8
        elif key in ("mamba_chunk_size", "chunk_size"):
            changes[key] = min(value, 16)
        elif "vocab_size" in key:
            changes[key] = _VOCABULARY
        elif key.endswith("token_id") and value >= _VOCABULARY:
            changes[key] = 0
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(fields.get(key), list):
            changes[key] = 0
    fields.update(changes)
    _agree_on_mamba(fields, names["hidden_size"])
    for key in ("dtype", "torch_dtype", "quantization_config", "auto_map", "_attn_implementation"):
        fields.pop(key, None)
    return type(config).from_dict(fields)


def _agree_on_mamba(fields: dict[str, Any], hidden_size: str) -> None:
    """Let the sizes of Mamba layers follow the width; a config names some of them twice."""
    if isinstance(fields.get("mamba_n_heads"), int) and isinstance(fields.get("mamba_d_head"), int):
        fields["mamba_n_heads"] = fields["mamba_expand"] * fields[hidden_size] // fields["mamba_d_head"]
        if "mamba_d_ssm" in fields:
            fields["mamba_d_ssm"] = fields["mamba_n_heads"] * fields["mamba_d_head"]


_SIZE_WORDS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size")


def _kinds_of_layers(fields: dict[str, Any], num_layers: int) -> list[int]:
    """Indices of at least two layers, one of each kind that the lists of a config tell apart."""
    lists = [value for value in fields.values() if isinstance(value, list) and len(value) == num_layers]
    by_layer = fields.get("per_layer_config")
    if isinstance(by_layer, dict):
        described = {int(key): repr(value) for key, value in by_layer.items()}
        lists.append([described.get(index) for index in range(num_layers)])
    first: dict[str, int] = {}
    for index in range(num_layers):
        first.setdefault(repr([values[index] for values in lists]), index)
    periods = [v for k, v in fields.items() if k.endswith(("_period", "_interval")) and isinstance(v, int) and v > 1]
    at_least = min(num_layers, max([2, *(period for period in periods if period <= 8 and not lists)]))
    kept = sorted(first.values())[:8]
    kept += [index for index in range(num_layers) if index not in kept][: max(0, at_least - len(kept))]
    return sorted(kept)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Random numbers of the run, and the logs of transformers, stay as they are."""
    level, has_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if has_bar:
            transformers_logging.enable_progress_bar()
