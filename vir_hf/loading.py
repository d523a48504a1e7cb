"""Names -> model and processor: dtype, attention, quantisation."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    CLIPVisionModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionModel,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import cached_file

from vir_hf.conversations import encode_row
from vir_hf.errors import RecipeError
from vir_hf.fingerprint import check_fingerprint
from vir_hf.llava.modeling_llava import LlavaForCausalLM
from vir_hf.llava.processing_llava import LlavaProcessor
from vir_hf.llava.registration import register

if TYPE_CHECKING:
    from vir_hf.recipe import Recipe

logger = logging.getLogger(__name__)

# Where a run over joined parts keeps the model its adapter belongs to.
BASE_FOLDER = "base"
# What stays in 16 bit. Full names in memory: transformers ignores short ones and quantises tower, projector and head.
NOT_QUANTIZED = ("model.vision_tower", "model.multi_modal_projector", "lm_head")

register()  # `import vir_hf` has done it already, except in the command, which loads no model to answer --help

VISION_TOWERS: dict[str, type[PreTrainedModel]] = {
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
}


@dataclass(frozen=True)
class Precision:
    """In what precision a run computes.

    Attributes:
        dtype: of weights that do not learn; learning ones are kept in fp32 under autocast.
        autocast: `"bf16"`, `"fp16"` (with loss scaling) or `None`.
        reason: the machine's property that decided, for the log.
    """

    dtype: torch.dtype
    autocast: str | None
    reason: str


def choose_precision(dtype: str = "auto", use_cpu: bool = False) -> Precision:
    """bf16 where the GPU has it, fp16 with loss scaling where it does not, fp32 on a CPU; or what the recipe says."""
    has_cuda = torch.cuda.is_available() and not use_cpu
    if dtype == "auto":
        if not has_cuda:
            return Precision(torch.float32, None, "no CUDA GPU")
        name = torch.cuda.get_device_name()
        if torch.cuda.get_device_capability()[0] >= 8:
            return Precision(torch.bfloat16, "bf16", f"{name} computes in bf16")
        return Precision(torch.float16, "fp16", f"{name} has no bf16")
    chosen = getattr(torch, dtype)
    autocast = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(chosen)
    if autocast == "fp16" and not has_cuda:
        raise RecipeError(
            "model.dtype=float16 needs a CUDA GPU for its loss scaling; use float32 or bfloat16 on a CPU."
        )
    return Precision(chosen, autocast, "model.dtype")


def build(
    language_model: str | PreTrainedModel,
    vision_tower: str | PreTrainedModel,
    template: str = "auto",
    *,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    image_processor: str | BaseImageProcessor | None = None,
    projector_type: str = "mlp2x_gelu",
    image_aspect_ratio: str = "pad",
    vision_feature_layer: int | list[int] = -2,
    vision_feature_select_strategy: str | None = None,
    dtype: torch.dtype | None = None,
    **loading_kwargs: Any,
) -> tuple[LlavaForCausalLM, LlavaProcessor]:
    """Return a model joined from parts and its processor, which agree on the image token and the vocabulary.

    Args:
        language_model: a Hub id, a folder, or a loaded causal language model.
        vision_tower: a Hub id, a folder, or a loaded CLIP or SigLIP vision model.
        template: a word of `vir_hf.conversations.TEMPLATES`, or `"auto"` for the tokenizer's own chat template.
        tokenizer, image_processor: taken from the two parts by default.
        dtype: of both parts; the language model's own by default.
        loading_kwargs: passed to `from_pretrained` of the language model (`quantization_config`, `revision` ...).

    Raises:
        RecipeError: a part that cannot be loaded, or a language model without a tokenizer.
    """
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = _load_tokenizer(tokenizer or _name_of(language_model, "tokenizer"))
    if image_processor is None or isinstance(image_processor, str):
        image_processor = _load_part(
            AutoImageProcessor, image_processor or _name_of(vision_tower, "image_processor"), "model.vision_tower"
        )
    if isinstance(language_model, str):
        language_model = _load_part(
            AutoModelForCausalLM, language_model, "model.language_model", dtype=dtype or "auto", **loading_kwargs
        )
    if isinstance(vision_tower, str):
        vision_tower = load_vision_tower(vision_tower, dtype or language_model.dtype)
    tower = getattr(vision_tower, "vision_model", vision_tower)
    has_class_token = hasattr(tower.embeddings, "class_embedding")
    strategy = vision_feature_select_strategy or ("default" if has_class_token else "full")
    processor = LlavaProcessor.from_components(
        tokenizer,
        image_processor,
        template,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(has_class_token),
        image_aspect_ratio=image_aspect_ratio,
    )
    if processor.image_size != (tower.config.image_size,) * 2:
        raise RecipeError(
            f"model.vision_tower: pictures are made {processor.image_size} pixels, the tower takes "
            f"{tower.config.image_size}; name the image processor that belongs to the tower."
        )
    model = LlavaForCausalLM.from_components(
        language_model,
        tower,
        projector_type,
        image_token_id=processor.image_token_id,
        vocab_size=len(processor.tokenizer),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=strategy,
    )
    agree_on_tokens(model, processor)
    return model, processor


def agree_on_tokens(model: LlavaForCausalLM, processor: LlavaProcessor) -> None:
    """Make the model stop at the token its template closes a turn with, and pad with the tokenizer's padding."""
    tokenizer = processor.tokenizer
    model.config.text_config.pad_token_id = tokenizer.pad_token_id
    model.config.image_token_id = processor.image_token_id
    generation_config = model.generation_config
    generation_config.pad_token_id = tokenizer.pad_token_id
    own = generation_config.eos_token_id
    own_ids = [] if own is None else [own] if isinstance(own, int) else list(own)
    stops = [end_of_turn_id(processor), tokenizer.eos_token_id, *own_ids]
    generation_config.eos_token_id = list(dict.fromkeys(stop for stop in stops if stop is not None)) or None
    if generation_config.bos_token_id is None:
        generation_config.bos_token_id = tokenizer.bos_token_id


def end_of_turn_id(processor: LlavaProcessor) -> int:
    """The token that ends an answer in training, and so must end generation."""
    turns = [("user", "a"), ("assistant", "a")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    encoding = encode_row({"id": "", "messages": messages, "images": []}, processor)
    return [token for token, label in zip(encoding["input_ids"], encoding["labels"], strict=True) if label >= 0][-1]


def load_vision_tower(name: str, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Return CLIP's or SigLIP's vision model from a Hub id or folder; of a full CLIP only the vision part is kept."""
    config = _load_part(AutoConfig, name, "model.vision_tower")
    if config.model_type not in VISION_TOWERS:
        raise RecipeError(
            f"model.vision_tower={name}: its model type is {config.model_type!r}; expected one of {sorted(VISION_TOWERS)}."
        )
    return _load_part(VISION_TOWERS[config.model_type], name, "model.vision_tower", dtype=dtype)


def load_model_and_processor(recipe: Recipe, precision: Precision) -> tuple[LlavaForCausalLM, LlavaProcessor]:
    """Return the recipe's model and processor, on the CPU or (quantised) on this process's GPU."""
    wanted = recipe.model
    quantization = quantization_config(recipe, precision)
    loading: dict[str, Any] = {"trust_remote_code": wanted.trust_remote_code}
    if wanted.revision:
        loading["revision"] = wanted.revision
    if quantization is not None:
        loading["quantization_config"] = quantization
        if torch.cuda.is_available():
            loading["device_map"] = {"": torch.cuda.current_device()}
    if wanted.attn_implementation != "auto":
        loading["attn_implementation"] = wanted.attn_implementation
    if wanted.name_or_path:
        model = _load_part(
            LlavaForCausalLM, wanted.name_or_path, "model.name_or_path", dtype=precision.dtype, **loading
        )
        processor = load_processor(wanted.name_or_path, template=wanted.template)
        agree_on_tokens(model, processor)
        return model, processor
    if not wanted.language_model or not wanted.vision_tower:
        raise RecipeError(
            "model: nothing to load. Set model.name_or_path to a vision-language model, or model.language_model and "
            "model.vision_tower to the parts to join."
        )
    strategy = wanted.vision_feature_select_strategy
    return build(
        wanted.language_model,
        wanted.vision_tower,
        wanted.template,
        tokenizer=wanted.tokenizer,
        projector_type=wanted.projector_type,
        image_aspect_ratio=wanted.image_aspect_ratio,
        vision_feature_layer=wanted.vision_feature_layer,
        vision_feature_select_strategy=None if strategy == "auto" else strategy,
        dtype=precision.dtype,
        **loading,
    )


def load_processor(
    name: str | os.PathLike[str], template: str | None = None, revision: str | None = None
) -> LlavaProcessor:
    """Return the processor saved beside a model; `template` replaces the one it was saved with."""
    from vir_hf.templates import chat_template_for

    processor = _load_part(
        LlavaProcessor, os.fspath(name), "model.name_or_path", **({"revision": revision} if revision else {})
    )
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
        dtype: `"auto"` follows the machine (see `choose_precision`).
        device: the first GPU if there is one, else the CPU.
        base: the base model of an adapter, where it is not the one the adapter names.
        load_in_4bit: quantise the language model to NF4 while loading.

    Raises:
        RecipeError: nothing can be loaded from `path`, or the adapter belongs to another base.
    """
    name = os.fspath(path)
    if isinstance(dtype, str):
        dtype = choose_precision(dtype, use_cpu=str(device or "").startswith("cpu")).dtype
    loading: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        loading["attn_implementation"] = attn_implementation
    if load_in_4bit:
        loading["quantization_config"] = default_nf4(dtype)
    adapter = adapter_folder(name, revision)
    if adapter is None:
        if revision is not None:
            loading["revision"] = revision
        model = _load_part(LlavaForCausalLM, name, "path", **loading)
        processor = load_processor(name, revision=revision)
    else:
        base_name, base_revision = (base, None) if base else base_of(adapter)
        check_fingerprint(adapter, base_name, base_revision, key="base")
        if base_revision is not None:
            loading["revision"] = base_revision
        plain = _load_part(LlavaForCausalLM, base_name, "base", **loading)
        keep_linear4bit_layout(plain)
        model = PeftModel.from_pretrained(plain, str(adapter))
        processor = load_processor(
            next((folder for folder in _folders_of_run(adapter) if _has_processor(folder)), base_name)
        )
    keep_linear4bit_layout(model)
    if device is None and torch.cuda.is_available():
        device = "cuda"
    if device is not None and not is_quantized(model):
        model = model.to(device)
    return model.eval(), processor


def keep_base(
    model: LlavaForCausalLM, processor: LlavaProcessor, recipe: Recipe, *, is_main_process: bool = True
) -> None:
    """Save the model that an adapter will be trained on as `output_dir/base`, where it exists nowhere else.

    Joined parts have a projector and embedding rows that were drawn at random, so their adapter would be worth nothing
    without them. The adapter's config names this folder. Nothing is saved for a base that lies on disk or on the Hub.
    """
    if "lora" not in (recipe.trainable.language_model, recipe.trainable.vision_tower):
        return
    if recipe.model.name_or_path and not recipe.model.pretrained_projector:
        return
    folder = Path(recipe.training.output_dir) / BASE_FOLDER
    source = Path(model.name_or_path) if model.name_or_path else None
    is_there = source is not None and source.is_dir() and source.resolve() == folder.resolve()
    if is_main_process and not is_there:
        temporary = folder.with_name(f"{BASE_FOLDER}.{os.getpid()}.tmp")
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    model.name_or_path = model.config._name_or_path = str(folder.resolve())


def adapter_folder(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of an adapter, fetched from the Hub if need be; `None` if `name` is a whole model."""
    if Path(name).is_dir():
        return Path(name) if (Path(name) / "adapter_config.json").is_file() else None
    try:
        found = cached_file(name, "adapter_config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{name}: is neither a folder nor a model that can be reached on the Hub: {_first_line(error)} Expected a run's "
            "output directory, a folder saved by save_pretrained, or a Hub id."
        ) from error
    return None if found is None else Path(snapshot_download(name, revision=revision))


def base_of(adapter: Path) -> tuple[str, str | None]:
    """Return name and revision of the base an adapter was trained on; a base saved in the run itself comes first."""
    for folder in _folders_of_run(adapter):
        if (folder / BASE_FOLDER / "config.json").is_file():
            return str(folder / BASE_FOLDER), None
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    name = config.get("base_model_name_or_path")
    if not name:
        raise RecipeError(f"{adapter}: its adapter_config.json names no base model; pass base=NAME_OR_FOLDER.")
    return name, config.get("revision")


def _folders_of_run(adapter: Path) -> list[Path]:
    """The folder itself and, for a checkpoint, the run it lies in."""
    return [adapter, adapter.parent] if adapter.name.startswith("checkpoint-") else [adapter]


def _has_processor(folder: Path) -> bool:
    return (folder / "processor_config.json").is_file() or (folder / "preprocessor_config.json").is_file()


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether any layer is stored in 4 or 8 bit."""
    return any(type(module).__name__ in ("Linear4bit", "Linear8bitLt") for module in model.modules())


def keep_linear4bit_layout(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in eval mode, which it does for good on CPUs with AVX512-BF16.

    After one evaluation the gradient would no longer pass through the repacked layers.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def default_nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantisation of the language model's linear layers alone."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(NOT_QUANTIZED),
    )


def quantization_config(recipe: Recipe, precision: Precision) -> BitsAndBytesConfig | None:
    """Return the bitsandbytes config, or `None`; on a machine without CUDA a recipe may ask to go without."""
    if recipe.quantization.bits is None:
        return None
    if recipe.quantization.only_on_cuda and not torch.cuda.is_available():
        logger.warning(
            "no CUDA GPU: loading without %s-bit quantisation (quantization.only_on_cuda)", recipe.quantization.bits
        )
        return None
    arguments = recipe.quantization.bitsandbytes_arguments()
    if recipe.quantization.bits == 4:
        arguments.setdefault("bnb_4bit_compute_dtype", precision.dtype)
    # The full names: transformers ignores the short ones and quantises tower, projector and head.
    arguments.setdefault("llm_int8_skip_modules", list(NOT_QUANTIZED))
    return BitsAndBytesConfig(**arguments)


def _name_of(part: str | PreTrainedModel, wanted: str) -> str:
    name = part if isinstance(part, str) else part.config._name_or_path
    if not name:
        raise RecipeError(
            f"pass {wanted}=...: a model that was not loaded from a name does not say which one is its own."
        )
    return name


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    # `legacy` moves one piece of Llama's tokenization; without it text per chunk gives LLaVA's own ids.
    try:
        return AutoTokenizer.from_pretrained(name, legacy=False)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise RecipeError(
            f"model.tokenizer: no tokenizer could be loaded from {name!r}. A model trains only with its own tokenizer: put "
            f"its files beside the model, or set model.tokenizer to a name or folder that has them. ({_first_line(error)})"
        ) from error


def _load_part(part_class: Any, name: str, key: str, **kwargs: Any) -> Any:
    """Load one part by name; what goes wrong names the recipe key and the remedy."""
    try:
        return part_class.from_pretrained(name, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(
            f"{key}={name}: could not be loaded: {_first_line(error)} Expected a folder saved by save_pretrained or a Hub id "
            "(a gated one needs `hf auth login`; offline, only what is in the cache)."
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
