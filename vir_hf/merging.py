"""Adapter and projector into a plain checkpoint, exactly: a 4 or 8 bit base is made 16 bit first, never merged into."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from vir_hf.adapters import BASE_FOLDER, adapter_folder
from vir_hf.errors import RecipeError
from vir_hf.fingerprint import fingerprint_of, read_record
from vir_hf.llava.modeling_llava import LlavaForCausalLM
from vir_hf.llava.processing_llava import LlavaProcessor
from vir_hf.loading import MADE_FROM, load_base, load_processor, made_from, processor_place
from vir_hf.quantization import bits_of, is_quantized

if TYPE_CHECKING:
    from vir_hf.recipe import Recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Merged:
    """What a merge made.

    Attributes:
        base: the model the adapter was trained on.
        was_quantized: the base was in 4 or 8 bit in training, and was made 16 bit before the merge.
        fingerprint: of the merged weights.
    """

    out: Path
    base: str
    adapter: Path
    dtype: str
    num_parameters: int
    was_quantized: bool
    fingerprint: str | None


def merge_run(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
) -> Merged:
    """Merge a run's adapter into its base and save a plain checkpoint with its processor; `out` appears whole or not at all.

    Args:
        run: an output directory, a `checkpoint-N`, or an adapter on the Hub.
        out: a folder that does not exist yet, or is empty.
        base: where the base lies now, if it has been moved; its weights must be the ones trained on.
        dtype: of the merged weights; the base's own by default.

    Raises:
        RecipeError: `run` holds no adapter, `out` is taken, or the base is another one.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RecipeError(f"--out {target}: exists already. Name a new folder.")
    model, processor, adapter, base_name = merged_model(run, base=base, dtype=dtype, revision=revision)
    was_quantized = read_record(adapter).get("quantization") is not None
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        if target.exists():
            target.rmdir()
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Merged(
        out=target,
        base=base_name,
        adapter=adapter,
        dtype=str(model.dtype).removeprefix("torch."),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        was_quantized=was_quantized,
        fingerprint=fingerprint_of(str(target)),
    )


def merged_model(
    run: str | os.PathLike[str],
    *,
    base: str | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
) -> tuple[LlavaForCausalLM, LlavaProcessor, Path, str]:
    """Return a run's merged model, its processor, the adapter's folder and the base's name; see `merge_run`."""
    adapter = adapter_folder(os.fspath(run), revision)
    if adapter is None:
        raise RecipeError(
            f"{run}: holds no adapter (adapter_config.json), so there is nothing to merge: it is a plain checkpoint already."
        )
    loading: dict[str, Any] = {"dtype": dtype}
    trained_with = read_record(adapter).get("quantization")
    if trained_with is not None:
        # The adapter learned beside rounded weights: rounded the same way, then widened, they give the same logits.
        loading["quantization_config"] = _bitsandbytes_config(trained_with)
    model, base_name = load_base(adapter, base, loading)
    widen(model)
    config = LoraConfig.from_pretrained(str(adapter))
    # Without first drawing weights that the file then replaces; PiSSA and OLoRA do need the drawing, it changes the base.
    as_stored = config.init_lora_weights not in ("pissa", "olora")
    merged = merge_adapter(PeftModel.from_pretrained(model, str(adapter), low_cpu_mem_usage=as_stored))
    return merged, load_processor(processor_place(adapter, base_name)), adapter, base_name


def merge_adapter(model: PeftModel) -> LlavaForCausalLM:
    """Return the base model with the adapter in its weights, in place: no second copy of the weights is made.

    Raises:
        RecipeError: the base is in 4 or 8 bit, where the adapter would be rounded away.
    """
    if is_quantized(model):
        raise RecipeError(
            "merge: the base is loaded in 4 or 8 bit, and merging into such weights rounds the adapter away. Use vir-hf merge, "
            "which makes them 16 bit first."
        )
    merged = model.merge_and_unload()
    merged.requires_grad_(False)
    for parameter in merged.parameters():  # PEFT keeps trained copies in fp32
        parameter.data = parameter.data.to(merged.dtype)
    return merged.eval()


def widen(model: LlavaForCausalLM) -> None:
    """Turn 4 and 8 bit layers into ordinary ones of the model's dtype, layer by layer and in place.

    Not by `model.dequantize()`: it holds every quantised layer until the last one is done, a quarter more memory.
    """
    names = [name for name, module in model.named_modules() if bits_of(module)]
    if not names:
        return
    dtype = model.get_input_embeddings().weight.dtype
    for name in names:
        layer = model.get_submodule(name)
        with torch.device("meta"):
            wide = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).to(dtype)
        wide.weight = nn.Parameter(weight, requires_grad=False)
        wide.bias = layer.bias
        model.set_submodule(name, wide)
        del layer
    model.hf_quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = False


def merged_base(recipe: Recipe, together: Callable[[Callable[[], Any]], Any], *, is_main_process: bool) -> str | None:
    """Return the base of a second adapter: `model.name_or_path` names an adapter, which is merged into `output_dir/base`.

    `None` if `model.name_or_path` is no adapter. The recipe's LoRA then trains on top of what the first one learned.

    Args:
        together: runs an action on every process and fails on all where one fails.
    """
    name = recipe.model.name_or_path
    if not name or together(lambda: adapter_folder(name, recipe.model.revision)) is None:
        return None
    folder = Path(recipe.training.output_dir) / BASE_FOLDER

    def merge() -> None:
        marker = folder / MADE_FROM
        if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == made_from(recipe):
            return
        shutil.rmtree(folder, ignore_errors=True)
        merge_run(name, folder, revision=recipe.model.revision)
        marker.write_text(json.dumps(made_from(recipe), indent=2) + "\n", encoding="utf-8")
        logger.info("%s: an adapter; merged into %s, and training goes on from there", name, folder)

    together(merge if is_main_process else lambda: None)
    return str(folder)


def _bitsandbytes_config(values: dict[str, Any]) -> BitsAndBytesConfig:
    known = {name: value for name, value in values.items() if not name.startswith("_") and name != "quant_method"}
    return BitsAndBytesConfig(**known)
