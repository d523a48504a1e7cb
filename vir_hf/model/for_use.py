"""A finished run, opened to answer: whole, merged, or an adapter on its base."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors import SafetensorError

from vir_hf.errors import RecipeError
from vir_hf.llava.modeling_llava import LlavaForCausalLM
from vir_hf.llava.processing_llava import LlavaProcessor
from vir_hf.model.adapters import adapter_folder, base_of, folders_of_run
from vir_hf.model.fingerprint import check_fingerprint
from vir_hf.model.quantization import (
    is_quantized,
    keep_layout,
    nf4,
)

if TYPE_CHECKING:
    pass
from vir_hf.model.parts import first_line, load_whole
from vir_hf.model.precision import choose_precision, precision_of_run


def load_processor(
    name: str | os.PathLike[str], template: str | None = None, revision: str | None = None
) -> LlavaProcessor:
    """Return the processor saved beside a model; `template` replaces the one it was saved with."""
    from vir_hf.rows.templates import chat_template_for

    try:
        processor = LlavaProcessor.from_pretrained(os.fspath(name), **({"revision": revision} if revision else {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"model.name_or_path={name}: no tokenizer and image processor could be loaded from it. A model works only "
            "with its own: put tokenizer.json, tokenizer_config.json and processor_config.json beside its weights, as "
            f"processor.save_pretrained writes them. ({first_line(error)})"
        ) from error
    if template is not None and template != processor.template:
        processor.template = template
        processor.chat_template = chat_template_for(template, processor.tokenizer)
    return processor


def load_run(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    base: str | None = None,
    load_in_4bit: bool = False,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[LlavaForCausalLM | PeftModel, LlavaProcessor]:
    """Return a model in eval mode and its processor from a run, a checkpoint of it, an adapter, or any LLaVA model.

    Args:
        path: a run's output directory, a `checkpoint-N` in it, a folder saved by `save_pretrained`, or a Hub id. An
            adapter is put on the base it was trained on.
        dtype: `"auto"` is what the run was trained in where its recipe says it, else what suits the machine.
        device: the first GPU if there is one, else the CPU.
        base: the base model of an adapter, where it is not the one the adapter names.
        load_in_4bit: quantise the language model to NF4 while loading.

    Raises:
        RecipeError: nothing can be loaded from `path`, or the adapter belongs to another base.
    """
    name = os.fspath(path)
    if isinstance(dtype, str):
        use_cpu = str(device or "").startswith("cpu")
        dtype = (precision_of_run(name, use_cpu) if dtype == "auto" else choose_precision(dtype, use_cpu)).dtype
    loading: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        loading["attn_implementation"] = attn_implementation
    if load_in_4bit:
        loading["quantization_config"] = nf4(dtype)
    adapter = adapter_folder(name, revision)
    if adapter is None:
        if revision is not None:
            loading["revision"] = revision
        model = load_whole(name, "path", **loading)
        processor = load_processor(processor_place(Path(name), name), revision=revision)
    else:
        model, base_name, base_revision = load_base(adapter, base, loading)
        try:
            model = PeftModel.from_pretrained(model, str(adapter))
        except SafetensorError as error:
            raise RecipeError(f"{adapter}: a weights file is damaged ({error}). Fetch or make it again.") from error
        for name, parameter in model.named_parameters():
            if "lora_" in name or ".modules_to_save." in name:  # PEFT loads them in fp32, for training
                parameter.data = parameter.data.to(dtype)
        processor = load_processor(processor_place(adapter, base_name), revision=base_revision)
    keep_layout(model)
    if device is None and torch.cuda.is_available():
        device = "cuda"
    if device is not None and not is_quantized(model):
        model = model.to(device)
    return model.eval(), processor


def load_base(adapter: Path, base: str | None, loading: dict[str, Any]) -> tuple[LlavaForCausalLM, str, str | None]:
    """Return the model an adapter was trained on, its name and its revision.

    Args:
        base: in place of the one the adapter names; its weights must be the same.
        loading: arguments of `from_pretrained`.

    Raises:
        RecipeError: it cannot be loaded, or has other weights than the adapter was trained on.
    """
    name, revision = (base, None) if base else base_of(adapter)
    check_fingerprint(adapter, name, revision, key="base")
    if revision is not None:
        loading = {**loading, "revision": revision}
    model = load_whole(name, "base", **loading)
    keep_layout(model)
    return model, name, revision


def processor_place(folder: Path, otherwise: str) -> str:
    """The run's own processor, also for a `checkpoint-N` in it."""
    files = ("processor_config.json", "preprocessor_config.json")
    for place in folders_of_run(folder) if folder.is_dir() else []:
        if any((place / file).is_file() for file in files):
            return str(place)
    return otherwise
