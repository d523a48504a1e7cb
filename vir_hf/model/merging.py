"""Adapter and projector into a plain checkpoint, exactly: a 4 or 8 bit base is made 16 bit first, never merged into."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from vir_hf import files
from vir_hf.errors import RecipeError
from vir_hf.llava.modeling_llava import LlavaForCausalLM
from vir_hf.model.adapters import BASE_FOLDER, adapter_folder
from vir_hf.model.fingerprint import fingerprint_of, read_record
from vir_hf.model.for_training import MADE_FROM, made_from
from vir_hf.model.for_use import load_base, load_processor, processor_place
from vir_hf.model.quantization import bits_of, is_quantized

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe

logger = logging.getLogger(__name__)

_SMALLEST_SHARD, _LARGEST_SHARD = 2**26, 4 * 2**30


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
    adapter = adapter_folder(os.fspath(run), revision)
    if adapter is None:
        raise RecipeError(
            f"{run}: holds no adapter (adapter_config.json), so there is nothing to merge: it is a plain checkpoint already."
        )
    trained_with = read_record(adapter).get("quantization")
    loading: dict[str, Any] = {"dtype": dtype}
    if trained_with is not None:
        # The adapter learned beside rounded weights: rounded the same way, then widened, they give the same logits.
        loading["quantization_config"] = _bitsandbytes_config(trained_with)
    plain, base_name, base_revision = load_base(adapter, base, loading)
    processor = load_processor(processor_place(adapter, base_name), revision=base_revision)
    quantized = _take_quantized_layers(plain)
    saved_dtype, num_parameters = plain.dtype, sum(parameter.numel() for parameter in plain.parameters())
    model = _put_adapter(plain, adapter, quantized)
    with files.folder_in_one_piece(target) as partial:
        _save_merged(model, partial, quantized)
        processor.save_pretrained(partial)
    return Merged(
        out=target,
        base=base_name,
        adapter=adapter,
        dtype=str(saved_dtype).removeprefix("torch."),
        num_parameters=num_parameters,
        was_quantized=trained_with is not None,
        fingerprint=fingerprint_of(str(target)),
    )


def _put_adapter(plain: LlavaForCausalLM, adapter: Path, quantized: dict[str, nn.Module]) -> PeftModel:
    """Return the base with the adapter on it."""
    config = LoraConfig.from_pretrained(str(adapter))
    # PiSSA and OLoRA change the base when they are put on it, so they need its weights; all others read their own file only.
    changes_base = config.init_lora_weights in ("pissa", "olora")
    if changes_base:
        for name in list(quantized):
            _widen(plain.get_submodule(name), quantized.pop(name))
    try:
        return PeftModel.from_pretrained(plain, str(adapter), low_cpu_mem_usage=not changes_base)
    except SafetensorError as error:
        raise RecipeError(f"{adapter}: a weights file is damaged ({error}). Fetch or make it again.") from error


def _save_merged(model: PeftModel, folder: Path, quantized: dict[str, nn.Module]) -> None:
    """Merge, save and let go of one group of layers after the other, so that never all new weights lie in memory.

    Args:
        quantized: the base's 4 and 8 bit layers by name, emptied on the way.
    """
    plain: LlavaForCausalLM = model.get_base_model()
    dtype, shards = plain.dtype, _Shards(plain, folder)
    for group in _groups(plain):
        for name, layer in list(plain.named_modules()):
            if not f"{name}.".startswith(group):
                continue
            if name in quantized:
                _widen(layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer, quantized.pop(name))
            if isinstance(layer, BaseTunerLayer):
                wide = layer.get_base_layer()
                # A copy: pages of the file that are written to would stay in memory until the last of the file is let go.
                wide.weight.data = wide.weight.data.clone()
                layer.merge()
                plain.set_submodule(name, wide)
            elif isinstance(layer, AuxiliaryTrainingWrapper):  # trained whole beside the adapter, such as the projector
                plain.set_submodule(name, layer.unload_and_optionally_merge_module(True, False, None))
        for parameter in (p for name, p in plain.named_parameters() if name.startswith(group)):
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)  # PEFT keeps trained copies in fp32
        shards.add(name for name in plain.state_dict() if name.startswith(group))
    shards.finish()


def _groups(model: nn.Module) -> list[str]:
    """The prefixes of what is merged together: each layer of every stack, and in the end, as the empty one, all the rest."""
    modules = dict(model.named_modules())
    wrapped = [f"{name}." for name, module in modules.items() if isinstance(module, AuxiliaryTrainingWrapper)]
    stacks = [f"{name}." for name, module in modules.items() if isinstance(module, nn.ModuleList) and len(module)]
    outermost = [
        name for name in stacks if not any(name != other and name.startswith(other) for other in stacks + wrapped)
    ]
    return [f"{name}{number}." for name in outermost for number in range(len(modules[name[:-1]]))] + [""]


class _Shards:
    """Writes a model's tensors as they become ready, in shards of an eighth of it, and frees them."""

    def __init__(self, model: LlavaForCausalLM, folder: Path) -> None:
        self._model, self._folder = model, folder
        total = sum(parameter.numel() for parameter in model.parameters()) * model.dtype.itemsize
        self._limit = max(_SMALLEST_SHARD, min(_LARGEST_SHARD, total // 8))
        self._waiting: list[str] = []
        self._done: set[str] = set()
        self._parts: list[Path] = []

    def add(self, names: Iterable[str]) -> None:
        """Take the tensors of these names that were not taken before; write what has gathered if it is enough."""
        new = [name for name in names if name not in self._done]
        self._done.update(new)
        self._waiting += new
        tensors = self._model.state_dict()
        if sum(tensors[name].numel() * tensors[name].element_size() for name in self._waiting) >= self._limit:
            self._write()

    def _write(self) -> None:
        tensors = self._model.state_dict()
        part = self._folder / f"part-{len(self._parts)}"
        self._model.save_pretrained(
            part, state_dict={name: tensors[name] for name in self._waiting}, max_shard_size="1TB"
        )
        self._parts.append(part)
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        for name in self._waiting:
            if name in parameters:
                parameters[name].data = parameters[name].data.new_empty(0)
        self._waiting.clear()
        del tensors, parameters
        _give_memory_back()

    def finish(self) -> None:
        """Write the rest and bring all shards together, with their index, beside the configuration."""
        if self._waiting:
            self._write()
        index: dict[str, str] = {}
        num_bytes = 0
        for number, part in enumerate(self._parts, 1):
            name = "model.safetensors"
            if len(self._parts) > 1:
                name = f"model-{number:05d}-of-{len(self._parts):05d}.safetensors"
            os.replace(part / "model.safetensors", self._folder / name)  # both of them ours, and not yet seen
            with safe_open(self._folder / name, "pt") as file:
                index |= dict.fromkeys(file.keys(), name)
            num_bytes += (self._folder / name).stat().st_size
            if number == len(self._parts):
                for path in part.iterdir():
                    os.replace(path, self._folder / path.name)
            files.remove_folder(part, lambda folder: True)
        if len(self._parts) > 1:
            listing = {"metadata": {"total_size": num_bytes}, "weight_map": index}
            files.write_json(self._folder / "model.safetensors.index.json", listing)


def _give_memory_back() -> None:
    """Return freed memory to the system; glibc keeps blocks of some megabytes, here as much as half the model."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


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


def _take_quantized_layers(model: LlavaForCausalLM) -> dict[str, nn.Module]:
    """Return the 4 and 8 bit layers by name, with ordinary ones in their places whose weights take no memory yet."""
    names = [name for name, module in model.named_modules() if bits_of(module)]
    dtype = model.get_input_embeddings().weight.dtype
    taken = {}
    for name in names:
        layer = taken[name] = model.get_submodule(name)
        with torch.device("meta"):
            wide = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        unfilled = torch.zeros((), dtype=dtype).expand(layer.out_features, layer.in_features)
        wide.weight = nn.Parameter(unfilled, requires_grad=False)
        wide.bias = layer.bias
        model.set_submodule(name, wide)
    if names:
        model.hf_quantizer.remove_quantization_config(model)
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
    return taken


def _widen(wide: nn.Module, quantized: nn.Module) -> None:
    """Fill an ordinary layer with the weights of a 4 or 8 bit one."""
    weight = dequantize_bnb_weight(quantized.weight, getattr(quantized, "state", None))
    wide.weight = nn.Parameter(weight.to(wide.weight.dtype), requires_grad=False)


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
        output = files.OutputFolder(folder.parent)
        staging = output.stage(BASE_FOLDER)
        merge_run(name, staging / "merged", revision=recipe.model.revision)
        files.take_out(staging / "merged", staging)
        files.write_json(staging / MADE_FROM, made_from(recipe))
        output.replace_folder(BASE_FOLDER, staging)
        logger.info("%s: an adapter; merged into %s, and training goes on from there", name, folder)

    together(merge if is_main_process else lambda: None)
    return str(folder)


def _bitsandbytes_config(values: dict[str, Any]) -> BitsAndBytesConfig:
    known = {name: value for name, value in values.items() if not name.startswith("_") and name != "quant_method"}
    return BitsAndBytesConfig(**known)
