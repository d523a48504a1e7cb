"""Language models, towers, tokenizers and whole models from a folder or the Hub; what cannot be loaded is said in one line."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    CLIPVisionModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionModel,
)

from vir_hf.errors import RecipeError
from vir_hf.llava.modeling_llava import LlavaForCausalLM
from vir_hf.llava.registration import register
from vir_hf.model.configs import check_vision_tower, check_whole_model, read_config

register()  # `import vir_hf` has done it already, except in the command, which loads no model to answer --help

VISION_TOWERS: dict[str, type[PreTrainedModel]] = {
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
}


def load_vision_tower(name: str, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Return CLIP's or SigLIP's vision model from a Hub id or folder; of a full CLIP only the vision part is kept."""
    config, _ = read_config(name, "model.vision_tower")
    check_vision_tower(config, name)
    return load_part(VISION_TOWERS[config.model_type], name, "model.vision_tower", dtype=dtype)


def name_of(part: str | PreTrainedModel, wanted: str) -> str:
    """Return the name a part was loaded from.

    Raises:
        RecipeError: a model that was not loaded from a name.
    """
    name = part if isinstance(part, str) else part.config.name_or_path
    if not name:
        raise RecipeError(
            f"pass {wanted}=...: a model that was not loaded from a name does not say which one is its own."
        )
    return name


def shown_part(part: str | PreTrainedModel) -> str:
    """Return how a part is called in a message: its name, or else its class."""
    return part if isinstance(part, str) else part.config.name_or_path or type(part).__name__


def of_code(loading_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Which files of a repository are meant, and whether code in them may run: the same for all that comes from it."""
    return {name: loading_kwargs[name] for name in ("revision", "trust_remote_code") if loading_kwargs.get(name)}


def load_whole(name: str, key: str, **loading: Any) -> LlavaForCausalLM:
    """Load a whole LLaVA model, if its config says that it is one."""
    config, _ = read_config(name, key, **of_code(loading))
    check_whole_model(config, name, key, loading.get("revision"))
    model: LlavaForCausalLM = load_part(LlavaForCausalLM, name, key, **loading)
    return model


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one that cannot be read is a `RecipeError`."""
    # `legacy` moves one piece of Llama's tokenization; without it text per chunk gives LLaVA's own ids.
    try:
        return AutoTokenizer.from_pretrained(name, legacy=False, **options)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise RecipeError(
            f"model.tokenizer: no tokenizer could be loaded from {name!r} ({first_line(error)}). From the Hub it needs a "
            "connection, or an earlier download. A model trains only with its own tokenizer: a folder without one needs its "
            "files, or model.tokenizer set to a name or folder that has them."
        ) from error


def load_part(part_class: Any, name: str, key: str, **kwargs: Any) -> Any:
    """Load one part by name; what goes wrong names the recipe key and the remedy."""
    try:
        return part_class.from_pretrained(name, **kwargs)
    except ImportError as error:
        raise RecipeError(
            f"{key}={name}: {first_line(error)} 4 and 8 bit need bitsandbytes: pip install 'vir-hf[gpu]', or quantization=none."
        ) from error
    except AttributeError as error:  # transformers, of a config without the fields it looks for
        raise RecipeError(
            f"{key}={name}: is no model of the kind that is needed ({first_line(error)}). Expected a LLaVA model, a run or an "
            "adapter; as parts, a causal language model and a CLIP or SigLIP tower."
        ) from error
    except SafetensorError as error:
        raise RecipeError(f"{key}={name}: a weights file is damaged ({error}). Fetch or make it again.") from error
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(
            f"{key}={name}: could not be loaded: {first_line(error)} Expected a folder saved by save_pretrained or a Hub id "
            "(a gated one needs `hf auth login`; offline, only what is in the cache)."
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its class."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
