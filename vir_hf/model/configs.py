"""A model's `config.json`, read and judged before any of its weights is fetched."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import huggingface_hub
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from vir_hf.errors import RecipeError
from vir_hf.llava.configuration_llava import HAS_CLASS_TOKEN, LlavaConfig
from vir_hf.llava.projectors import PROJECTORS
from vir_hf.llava.views import views_of_config
from vir_hf.model.foreign import import_hint
from vir_hf.model.known_configs import KNOWN_CONFIGS

logger = logging.getLogger(__name__)

WHOLE_MODEL_TYPES = ("llava", "llava_next", LlavaConfig.model_type)


def read_config(
    name: str, key: str, *, revision: str | None = None, trust_remote_code: bool = False, takes_known: bool = False
) -> tuple[PreTrainedConfig, str]:
    """Return a model's config from a folder, the cache or the Hub, and where it was read.

    Args:
        key: the recipe's key that names the model, for messages.
        takes_known: take a published model that cannot be fetched from our own table of sizes.

    Raises:
        RecipeError: it cannot be read.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        try:
            return AutoConfig.from_pretrained(name, local_files_only=True, **options), f"{name}: its config.json"
        except OSError:
            if Path(name).is_dir() or not (is_hub_reachable() if takes_known else _may_ask_hub()):
                raise
            return AutoConfig.from_pretrained(name, **options), f"{name}: its config.json"
    except Exception as error:  # a config may hold anything: what transformers raises of it is no fixed set
        if takes_known and name in KNOWN_CONFIGS and not Path(name).is_dir():
            fields = dict(KNOWN_CONFIGS[name])
            return (
                AutoConfig.for_model(fields.pop("model_type"), **fields),
                f"{name}: vir_hf's table of published sizes, because its config.json could not be fetched",
            )
        hint = import_hint(name, _fields_at_hand(name, revision))
        if hint:
            raise RecipeError(f"{key}={name}: is a checkpoint of another project. {hint}") from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        known = f"; without either, plan for one of the known models: {', '.join(KNOWN_CONFIGS)}" if takes_known else ""
        raise RecipeError(
            f"{key}={name}: its config.json could not be read: {reason} Expected a folder with a config.json or a Hub id. "
            "Offline, download it once with `hf download NAME config.json`; a gated model needs access and `hf auth login`"
            f"{known}."
        ) from error
    finally:
        transformers_logging.set_verbosity(level)


def _may_ask_hub() -> bool:
    return not huggingface_hub.constants.HF_HUB_OFFLINE


@lru_cache
def is_hub_reachable() -> bool:
    """Whether the Hub answers within seconds; its client would try for half a minute before it gives up."""
    if not _may_ask_hub():
        return False
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=3)
    except Exception as error:  # whichever HTTP client huggingface_hub is built on raises errors of its own
        logger.info("the Hub does not answer (%s): using configs of the cache and our own table", error)
        return False
    return True


def check_whole_model(config: PreTrainedConfig, name: str, key: str, revision: str | None = None) -> None:
    """Raise unless a config is that of a LLaVA model which these classes load with every weight it has.

    Raises:
        RecipeError: another family, an original LLaVA checkpoint, a projector or a tower of another kind.
    """
    kind = config.model_type
    given = {} if kind not in WHOLE_MODEL_TYPES else _fields_of(name, revision)
    if kind not in WHOLE_MODEL_TYPES:
        why = f"its model type is {kind!r}; expected {' or '.join(WHOLE_MODEL_TYPES)}"
        if kind.startswith("llava"):
            why += ". This one has weights or ways of seeing that would be lost"
        remedy = "For a language model alone set model.language_model and model.vision_tower."
    elif not given.get("text_config") or not given.get("vision_config"):
        missing = " and ".join(part for part in ("text_config", "vision_config") if not given.get(part))
        why = f"its config.json has no {missing}, as with the original LLaVA's: a model of default size would be built"
        remedy = import_hint(name, given) or "Fetch its config.json again."
    elif config.vision_config.model_type not in HAS_CLASS_TOKEN:
        why = f"its vision tower is of type {config.vision_config.model_type!r}; expected one of {sorted(HAS_CLASS_TOKEN)}"
        remedy = "Take a model with a CLIP or SigLIP tower."
    elif reason := _why_no_views(config):
        why = reason
        remedy = "Correct its config.json."
    elif getattr(config, "projector_type", "mlp2x_gelu") not in PROJECTORS:
        why = f"its projector_type is {config.projector_type!r}; expected one of {sorted(PROJECTORS)}"
        remedy = "Add its class to PROJECTORS, see CONTRIBUTING.md."
    else:
        return
    raise RecipeError(f"{key}={name}: {why}. {remedy}")


def _why_no_views(config: PreTrainedConfig) -> str:
    """Why images cannot be cut as a config says; empty where they can."""
    try:
        views_of_config(config)
    except ValueError as error:
        return str(error).rstrip(".")
    return ""


def _fields_at_hand(name: str, revision: str | None) -> dict[str, Any]:
    """What a config.json says itself, {} where none is at hand."""
    try:
        return _fields_of(name, revision)
    except Exception:  # whatever made its reading fail before; there is then nothing to say of it
        return {}


def _fields_of(name: str, revision: str | None) -> dict[str, Any]:
    """What a config.json that `read_config` has found says itself, without what its class would fill in."""
    try:
        return dict(PreTrainedConfig.get_config_dict(name, revision=revision, local_files_only=True)[0])
    except OSError:  # planned for from our own table of published sizes
        if name not in KNOWN_CONFIGS:
            raise
        return dict(KNOWN_CONFIGS[name])


def check_vision_tower(config: PreTrainedConfig, name: str) -> None:
    """Raise unless a config is that of a CLIP or SigLIP vision model, or of a whole CLIP or SigLIP.

    Raises:
        RecipeError: it is another one.
    """
    if config.model_type not in HAS_CLASS_TOKEN:
        raise RecipeError(
            f"model.vision_tower={name}: its model type is {config.model_type!r}; expected one of {sorted(HAS_CLASS_TOKEN)}."
        )
