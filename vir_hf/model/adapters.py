"""Adapters on disk: where they lie, which base they belong to, and a PEFT model that writes that down when it is saved."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModelForCausalLM
from transformers.utils import cached_file

from vir_hf.errors import RecipeError
from vir_hf.llava.modeling_llava import LlavaForCausalLM
from vir_hf.model.fingerprint import base_record, write_record

ADAPTER_CONFIG = "adapter_config.json"
# Where a run over joined parts keeps the model its adapter belongs to.
BASE_FOLDER = "base"


class AdaptedLlava(PeftModelForCausalLM):
    """PEFT's model that saves, beside the adapter, the fingerprint of the base it was trained on."""

    def __init__(self, model: LlavaForCausalLM, peft_config: LoraConfig, adapter_name: str = "default", **kwargs: Any):
        peft_config.base_model_name_or_path = model.name_or_path or None
        super().__init__(model, peft_config, adapter_name, **kwargs)
        quantization = getattr(model.config, "quantization_config", None)
        self.base_record = base_record(
            model.name_or_path or None, peft_config.revision, None if quantization is None else quantization.to_dict()
        )

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the adapter as PEFT does, and `base_fingerprint.json`."""
        super().save_pretrained(str(save_directory), **kwargs)
        if kwargs.get("is_main_process", True):
            write_record(Path(save_directory), self.base_record)


def adapter_folder(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of an adapter, fetched from the Hub if need be; `None` if `name` is a whole model.

    Raises:
        RecipeError: `name` is neither a folder nor a model on the Hub or in its cache.
    """
    if Path(name).is_dir():
        return Path(name) if (Path(name) / ADAPTER_CONFIG).is_file() else None
    try:
        found = cached_file(name, ADAPTER_CONFIG, revision=revision, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[:1]
        raise RecipeError(
            f"{name}: is neither a folder nor a model that can be reached on the Hub: {' '.join(reason)} Expected a run's "
            "output directory, a folder saved by save_pretrained, or a Hub id."
        ) from error
    return None if found is None else Path(snapshot_download(name, revision=revision))


def folders_of_run(adapter: Path) -> list[Path]:
    """Return the folder itself and, for a `checkpoint-N`, the run it lies in."""
    return [adapter, adapter.resolve().parent] if adapter.resolve().name.startswith("checkpoint-") else [adapter]


def base_of(adapter: Path) -> tuple[str, str | None]:
    """Return name and revision of the base an adapter was trained on; a base saved in the run itself comes first.

    Raises:
        RecipeError: the adapter names no base.
    """
    for folder in folders_of_run(adapter):
        if (folder / BASE_FOLDER / "config.json").is_file():
            return str(folder / BASE_FOLDER), None
    config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    name = config.get("base_model_name_or_path")
    if not name:
        raise RecipeError(f"{adapter}: its {ADAPTER_CONFIG} names no base model; say which one it was trained on.")
    return name, config.get("revision")
