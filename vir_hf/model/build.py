"""Names -> model and processor: dtype, attention, quantisation."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionModel,
)
from transformers.image_processing_utils import BaseImageProcessor

from vir_hf import files
from vir_hf.errors import RecipeError
from vir_hf.llava.configuration_llava import has_class_token, num_image_tokens, select_strategy
from vir_hf.llava.modeling_llava import LlavaForCausalLM
from vir_hf.llava.processing_llava import LlavaProcessor
from vir_hf.llava.registration import register
from vir_hf.model.adapters import BASE_FOLDER, adapter_folder, base_of, folders_of_run
from vir_hf.model.configs import check_vision_tower, check_whole_model, read_config
from vir_hf.model.fingerprint import check_fingerprint
from vir_hf.model.language_models import judge_language_model
from vir_hf.model.projector_files import load_projector
from vir_hf.model.quantization import (
    adopt_quantization,
    bits_of,
    check_quantization,
    for_language_model,
    is_quantized,
    keep_layout,
    nf4,
    quantization_config,
)
from vir_hf.rows.encoding import encode_row

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe

logger = logging.getLogger(__name__)

# In `base/`: what it was made from, so that it is not taken for another run's.
MADE_FROM = "made_from.json"

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


def choose_precision(
    dtype: str = "auto", use_cpu: bool = False, *, bf16: bool | None = None, fp16: bool | None = None
) -> Precision:
    """bf16 where the GPU has it, fp16 with loss scaling where it does not, fp32 on a CPU; or what the recipe says.

    Args:
        dtype: `model.dtype`, of the weights that do not learn.
        use_cpu: no GPU is to be used, even if there is one.
        bf16, fp16: `training.bf16` and `training.fp16`; `None` leaves autocast to the dtype.

    Raises:
        RecipeError: fp16 without a GPU.
    """
    has_gpu = torch.cuda.is_available() and not use_cpu
    return precision_on(
        dtype,
        bf16,
        fp16,
        gpu=torch.cuda.get_device_name() if has_gpu else None,
        has_bf16=has_gpu and torch.cuda.get_device_capability()[0] >= 8,
    )


def precision_of(recipe: Recipe, *, use_cpu: bool | None = None) -> Precision:
    """Return the precision a recipe computes in on this machine: the one answer for training and all that goes with it.

    Args:
        use_cpu: in place of `training.use_cpu`.

    Raises:
        RecipeError: fp16 without a GPU.
    """
    said = recipe.training.arguments
    use_cpu = bool(recipe.training.use_cpu) if use_cpu is None else use_cpu
    return choose_precision(recipe.model.dtype, use_cpu, bf16=said.get("bf16"), fp16=said.get("fp16"))


def precision_on(dtype: str, bf16: bool | None, fp16: bool | None, *, gpu: str | None, has_bf16: bool) -> Precision:
    """Return what `choose_precision` returns on a given device.

    Args:
        gpu: its name; `None` for a CPU.
        has_bf16: whether the GPU computes in bf16.

    Raises:
        RecipeError: fp16 without a GPU.
    """
    if dtype != "auto":
        chosen, reason = getattr(torch, dtype), f"model.dtype={dtype}"
    elif bf16 or fp16:
        chosen = torch.bfloat16 if bf16 else torch.float16
        reason = f"training.{'bf16' if bf16 else 'fp16'}"
    elif gpu is None:
        chosen, reason = torch.float32, "no CUDA GPU"
    else:
        chosen = torch.bfloat16 if has_bf16 else torch.float16
        reason = f"{gpu} {'computes in bf16' if has_bf16 else 'has no bf16'}"
    by_dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(chosen)
    autocast = "bf16" if bf16 else "fp16" if fp16 else by_dtype
    if (by_dtype == "bf16" and bf16 is False) or (by_dtype == "fp16" and fp16 is False):
        chosen, autocast, reason = torch.float32, None, f"training.{by_dtype}=false"
    if autocast == "fp16" and gpu is None:
        key = "training.fp16=true" if fp16 else f"model.dtype={dtype}"
        raise RecipeError(f"{key} needs a CUDA GPU for its loss scaling; use float32 or bfloat16 on a CPU.")
    return Precision(chosen, autocast, reason)


def _precision_of_run(name: str, use_cpu: bool) -> Precision:
    """The precision a finished run was trained in, as far as its recipe says one and this machine has it."""
    folders = folders_of_run(Path(name)) if Path(name).is_dir() else []
    saved = next((folder / "recipe.yaml" for folder in folders if (folder / "recipe.yaml").is_file()), None)
    recipe: dict[str, Any] = {} if saved is None else yaml.safe_load(saved.read_text(encoding="utf-8")) or {}
    model, training = recipe.get("model") or {}, recipe.get("training") or {}
    try:
        return choose_precision(
            model.get("dtype") or "auto", use_cpu, bf16=training.get("bf16"), fp16=training.get("fp16")
        )
    except RecipeError:  # trained in fp16, which a CPU does not compute in
        return choose_precision(use_cpu=use_cpu)


def describe_precision(precision: Precision, model: torch.nn.Module, tf32: bool | None) -> str:
    """Return one line: dtype of the weights, autocast, tf32 and attention, and why."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    arithmetic = f"{precision.autocast} autocast" if precision.autocast else "no autocast"
    attention = getattr(inner.config.get_text_config(), "_attn_implementation", None) or "default"
    return (
        f"weights {str(precision.dtype).removeprefix('torch.')}, {arithmetic} ({precision.reason}), trained weights float32, "
        f"tf32 {'on' if tf32 else 'off'}, attention {attention}"
    )


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
    max_tiles: int = 0,
    pixel_shuffle: int = 1,
    dtype: torch.dtype | None = None,
    **loading_kwargs: Any,
) -> tuple[LlavaForCausalLM, LlavaProcessor]:
    """Return a model joined from parts and its processor, which agree on the image token and the vocabulary.

    Args:
        language_model: a Hub id, a folder, or a loaded causal language model.
        vision_tower: a Hub id, a folder, or a loaded CLIP or SigLIP vision model.
        template: a word of `vir_hf.rows.encoding.TEMPLATES`, or `"auto"` for the tokenizer's own chat template.
        tokenizer, image_processor: taken from the two parts by default.
        max_tiles: cut images into at most so many tiles of the tower's size, beside the view of the whole; 0 for one view.
        pixel_shuffle: blocks of so many by so many patches become one token.
        dtype: of both parts; the language model's own by default.
        loading_kwargs: passed to `from_pretrained` of the language model (`quantization_config`, `revision` ...).

    Raises:
        RecipeError: a part that cannot be loaded, or a language model without a tokenizer.
    """
    if isinstance(language_model, str):
        text_config, _ = read_config(language_model, "model.language_model", **_of_code(loading_kwargs))
    else:
        text_config = language_model.config
    judge_language_model(text_config, _shown(language_model))
    if tokenizer is None or isinstance(tokenizer, str):
        # A revision is one of the language model's repository, in which its own tokenizer lies, too.
        options = _of_code(loading_kwargs) if tokenizer in (None, language_model) else {}
        tokenizer = _load_tokenizer(tokenizer or _name_of(language_model, "tokenizer"), **options)
    if image_processor is None or isinstance(image_processor, str):
        image_processor = _load_part(
            AutoImageProcessor, image_processor or _name_of(vision_tower, "image_processor"), "model.vision_tower"
        )
    quantization = loading_kwargs.pop("quantization_config", None)
    if isinstance(language_model, str):
        if quantization is not None:
            loading_kwargs["quantization_config"] = for_language_model(quantization)
        language_model = _load_part(
            AutoModelForCausalLM, language_model, "model.language_model", dtype=dtype or "auto", **loading_kwargs
        )
    if isinstance(vision_tower, str):
        vision_tower = load_vision_tower(vision_tower, dtype or language_model.dtype)
    tower = getattr(vision_tower, "vision_model", vision_tower)
    try:
        strategy = select_strategy(tower.config, vision_feature_select_strategy)
        num_image_tokens(tower.config, strategy, pixel_shuffle)
    except ValueError as error:
        raise RecipeError(f"model.vision_tower={_shown(vision_tower)}: {error}") from error
    processor = LlavaProcessor.from_components(
        tokenizer,
        image_processor,
        template,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(has_class_token(tower.config)),
        image_aspect_ratio=image_aspect_ratio,
        max_tiles=max_tiles,
        pixel_shuffle=pixel_shuffle,
    )
    if processor.image_size != (tower.config.image_size,) * 2:
        raise RecipeError(
            f"model.vision_tower: pictures are made {processor.image_size} pixels, the tower takes "
            f"{tower.config.image_size}; name the image processor that belongs to the tower."
        )
    try:
        model = LlavaForCausalLM.from_components(
            language_model,
            tower,
            projector_type,
            image_token_id=processor.image_token_id,
            vocab_size=len(processor.tokenizer),
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=strategy,
            max_tiles=max_tiles,
            pixel_shuffle=pixel_shuffle,
        )
    except ValueError as error:
        raise RecipeError(f"model.language_model={_shown(language_model)}: {error}") from error
    if quantization is not None:
        adopt_quantization(model, language_model, quantization)
    agree_on_tokens(model, processor)
    return model, processor


def agree_on_tokens(model: LlavaForCausalLM, processor: LlavaProcessor) -> None:
    """Make the model stop at the token its template closes a turn with, and pad with the tokenizer's padding.

    Raises:
        RecipeError: an image is another number of tokens to the processor than the model gives features for.
    """
    vision = model.config.vision_config
    check_same_views(model, processor)
    num_features = model.model.views.view_tokens
    num_tokens = processor.views.view_tokens if processor.patch_size else None
    if num_tokens != num_features:
        raise RecipeError(
            f"{model.name_or_path or 'model'}: its processor makes {num_tokens or 'no'} tokens of an image, but the "
            f"tower gives {num_features} features. Correct patch_size ({processor.patch_size}), num_additional_image_tokens "
            f"({processor.num_additional_image_tokens}) and vision_feature_select_strategy "
            f"({processor.vision_feature_select_strategy}) in processor_config.json; the model has a patch size of "
            f"{vision.patch_size}, {int(has_class_token(vision))} and {model.config.vision_feature_select_strategy}."
        )
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


def check_same_views(model: LlavaForCausalLM, processor: LlavaProcessor) -> None:
    """Raise unless model and processor cut images of every size into the same views.

    Raises:
        RecipeError: they do not; with both numbers.
    """
    ours, theirs = processor.views, model.model.views
    name = model.name_or_path or "model"
    if ours.edge != theirs.edge:
        raise RecipeError(
            f"{name}: its processor makes views of {ours.edge} x {ours.edge} pixels, its vision tower takes {theirs.edge} x "
            f"{theirs.edge}. Take the processor that was saved with the model."
        )
    for size in (*ours.sizes_to_compare(), *theirs.sizes_to_compare()):
        if ours.of(*size).num_views != theirs.of(*size).num_views:
            raise RecipeError(
                f"{name}: of an image of {size[0]} x {size[1]} pixels its processor makes {ours.of(*size).num_views} views and "
                f"the model expects {theirs.of(*size).num_views}. Take the processor that was saved with the model."
            )


def end_of_turn_id(processor: LlavaProcessor) -> int:
    """The token that ends an answer in training, and so must end generation."""
    turns = [("user", "a"), ("assistant", "a")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    encoding = encode_row({"id": "", "messages": messages, "images": []}, processor)
    return [token for token, label in zip(encoding["input_ids"], encoding["labels"], strict=True) if label >= 0][-1]


def load_vision_tower(name: str, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Return CLIP's or SigLIP's vision model from a Hub id or folder; of a full CLIP only the vision part is kept."""
    config, _ = read_config(name, "model.vision_tower")
    check_vision_tower(config, name)
    return _load_part(VISION_TOWERS[config.model_type], name, "model.vision_tower", dtype=dtype)


def load_model_and_processor(
    recipe: Recipe, precision: Precision, source: str | None = None
) -> tuple[LlavaForCausalLM, LlavaProcessor]:
    """Return the recipe's model and processor, on the CPU or (quantised) on this process's GPU.

    What is quantised is read off the loaded modules and compared with the recipe.

    Args:
        source: a checkpoint to load in place of what `recipe.model` names.

    Raises:
        RecipeError: a part that cannot be loaded or does not fit; layers that are quantised against the recipe.
    """
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
    source = source or _base_to_continue(recipe)
    if source is not None:
        loading.pop("revision", None)
    name = source or wanted.name_or_path
    if name:
        model = _load_whole(name, "model.name_or_path", dtype=precision.dtype, **loading)
        processor = load_processor(name, wanted.template, None if source else wanted.revision)
        agree_on_tokens(model, processor)
    elif wanted.language_model and wanted.vision_tower:
        strategy = wanted.vision_feature_select_strategy
        with torch.random.fork_rng():
            torch.manual_seed(recipe.training.seed)  # the projector and new embedding rows: the same in every process
            model, processor = build(
                wanted.language_model,
                wanted.vision_tower,
                wanted.template,
                tokenizer=wanted.tokenizer,
                projector_type=wanted.projector_type,
                image_aspect_ratio=wanted.image_aspect_ratio,
                vision_feature_layer=wanted.vision_feature_layer,
                vision_feature_select_strategy=None if strategy == "auto" else strategy,
                max_tiles=wanted.tiles,
                pixel_shuffle=wanted.pixel_shuffle,
                dtype=precision.dtype,
                **loading,
            )
    else:
        raise RecipeError(
            "model: nothing to load. Set model.name_or_path to a vision-language model, or model.language_model and "
            "model.vision_tower to the parts to join."
        )
    check_quantization(model, quantization)
    keep_layout(model)
    if recipe.trainable.projector == "full" and not any(map(bits_of, model.model.multi_modal_projector.modules())):
        model.model.multi_modal_projector.float()  # before its weights come in, so that none is rounded
    if wanted.pretrained_projector and not _is_own_base(recipe, source):
        load_projector(model, wanted.pretrained_projector)
    return model, processor


def _base_to_continue(recipe: Recipe) -> str | None:
    """The base that a run has saved and this one goes on from: its own when resumed, `model.adapter`'s; else `None`."""
    wanted = recipe.model
    own = Path(recipe.training.output_dir or "") / BASE_FOLDER
    if recipe.training.resume and _read_json(own / MADE_FROM) == made_from(recipe):
        return str(own)
    if wanted.adapter and not wanted.name_or_path:
        folder = adapter_folder(wanted.adapter)
        if folder is None:
            raise RecipeError(
                f"model.adapter={wanted.adapter}: holds no adapter (adapter_config.json). Name a run that trained with LoRA; a "
                "whole model goes into model.name_or_path."
            )
        base, _ = base_of(folder)
        _check_same_parts(recipe, folder, base)
        return base
    return None


def _is_own_base(recipe: Recipe, source: str | None) -> bool:
    """Whether `source` is this run's own base, whose projector is the right one already."""
    own = Path(recipe.training.output_dir or "") / BASE_FOLDER
    return source is not None and Path(source).resolve() == own.resolve() and (own / MADE_FROM).is_file()


def made_from(recipe: Recipe) -> dict[str, Any]:
    """Return everything that decides the weights of `output_dir/base`."""
    keys = (
        "name_or_path",
        "revision",
        "language_model",
        "vision_tower",
        "tokenizer",
        "projector_type",
        "tiling",
        "max_tiles",
        "pixel_shuffle",
        "template",
        "pretrained_projector",
        "adapter",
    )
    values = {key: getattr(recipe.model, key) for key in keys}
    return {**values, "seed": recipe.training.seed, "quantization": recipe.quantization.bits}


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _check_same_parts(recipe: Recipe, adapter: Path, base: str) -> None:
    """Raise unless the adapter's run joined the parts this recipe names."""
    saved = next(
        (folder / "recipe.yaml" for folder in folders_of_run(adapter) if (folder / "recipe.yaml").is_file()), None
    )
    before = {} if saved is None else (yaml.safe_load(saved.read_text(encoding="utf-8")) or {}).get("model", {})
    for key in ("language_model", "vision_tower", "projector_type", "tiling", "pixel_shuffle"):
        if before.get(key) and before[key] != getattr(recipe.model, key):
            raise RecipeError(
                f"model.{key}={getattr(recipe.model, key)}: the adapter {adapter} was trained with {before[key]}. Set "
                f"model.{key}={before[key]} to go on with it."
            )
    if not before.get("language_model"):
        raise RecipeError(
            f"model.adapter={recipe.model.adapter}: was trained on the whole model {base}, not on joined parts. Set "
            f"model.name_or_path={base}, model.language_model=null and model.vision_tower=null."
        )


def keep_base(
    model: LlavaForCausalLM, processor: LlavaProcessor, recipe: Recipe, *, is_main_process: bool = True
) -> None:
    """Save the model that an adapter will be trained on as `output_dir/base`, where it exists nowhere else.

    Joined parts have a projector and embedding rows that were drawn at random, so their adapter would be worth nothing
    without them. The adapter's config names this folder. Nothing is saved for a base that lies on disk or on the Hub.
    """
    if "lora" not in (recipe.trainable.language_model, recipe.trainable.vision_tower):
        return
    folder = Path(recipe.training.output_dir) / BASE_FOLDER
    source = Path(model.name_or_path) if model.name_or_path else None
    is_own = source is not None and source.resolve() == folder.resolve()
    is_changed = bool(recipe.model.pretrained_projector) and not is_own
    if recipe.model.name_or_path and not is_changed and not is_own:
        return
    if is_main_process and not is_own:
        output = files.OutputFolder(folder.parent)
        temporary = output.stage(BASE_FOLDER)
        if source is not None and source.is_dir() and not is_changed:
            _link_files(source, temporary)  # the base of the run this one goes on from, without a second copy
        else:
            with rounded_to(model, model.dtype):
                model.save_pretrained(temporary)
            processor.save_pretrained(temporary)
        files.write_json(temporary / MADE_FROM, made_from(recipe))
        output.replace_folder(BASE_FOLDER, temporary)
    model.name_or_path = model.config.name_or_path = str(folder.resolve())


@contextlib.contextmanager
def rounded_to(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Hold fp32 weights in `dtype` for the time of saving, and then exactly as they were.

    A checkpoint of one dtype: beside 4-bit weights transformers loads others as they are stored, so fp32 weights would
    meet 16-bit activations.
    """
    wide = [
        parameter for parameter in model.parameters() if parameter.dtype == torch.float32 and parameter.dtype != dtype
    ]
    values = [parameter.data for parameter in wide]
    try:
        for parameter in wide:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, value in zip(wide, values, strict=True):
            parameter.data = value


def _link_files(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.is_file() and path.name not in (MADE_FROM, files.RECORD):
            files.link_or_copy(path, target / path.name)


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
            f"processor.save_pretrained writes them. ({_first_line(error)})"
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
        dtype = (_precision_of_run(name, use_cpu) if dtype == "auto" else choose_precision(dtype, use_cpu)).dtype
    loading: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        loading["attn_implementation"] = attn_implementation
    if load_in_4bit:
        loading["quantization_config"] = nf4(dtype)
    adapter = adapter_folder(name, revision)
    if adapter is None:
        if revision is not None:
            loading["revision"] = revision
        model = _load_whole(name, "path", **loading)
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
    model = _load_whole(name, "base", **loading)
    keep_layout(model)
    return model, name, revision


def processor_place(folder: Path, otherwise: str) -> str:
    """The run's own processor, also for a `checkpoint-N` in it."""
    files = ("processor_config.json", "preprocessor_config.json")
    for place in folders_of_run(folder) if folder.is_dir() else []:
        if any((place / file).is_file() for file in files):
            return str(place)
    return otherwise


def _name_of(part: str | PreTrainedModel, wanted: str) -> str:
    name = part if isinstance(part, str) else part.config.name_or_path
    if not name:
        raise RecipeError(
            f"pass {wanted}=...: a model that was not loaded from a name does not say which one is its own."
        )
    return name


def _shown(part: str | PreTrainedModel) -> str:
    return part if isinstance(part, str) else part.config.name_or_path or type(part).__name__


def _of_code(loading_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Which files of a repository are meant, and whether code in them may run: the same for all that comes from it."""
    return {name: loading_kwargs[name] for name in ("revision", "trust_remote_code") if loading_kwargs.get(name)}


def _load_whole(name: str, key: str, **loading: Any) -> LlavaForCausalLM:
    """Load a whole LLaVA model, if its config says that it is one."""
    config, _ = read_config(name, key, **_of_code(loading))
    check_whole_model(config, name, key, loading.get("revision"))
    model: LlavaForCausalLM = _load_part(LlavaForCausalLM, name, key, **loading)
    return model


def _load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    # `legacy` moves one piece of Llama's tokenization; without it text per chunk gives LLaVA's own ids.
    try:
        return AutoTokenizer.from_pretrained(name, legacy=False, **options)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise RecipeError(
            f"model.tokenizer: no tokenizer could be loaded from {name!r} ({_first_line(error)}). From the Hub it needs a "
            "connection, or an earlier download. A model trains only with its own tokenizer: a folder without one needs its "
            "files, or model.tokenizer set to a name or folder that has them."
        ) from error


def _load_part(part_class: Any, name: str, key: str, **kwargs: Any) -> Any:
    """Load one part by name; what goes wrong names the recipe key and the remedy."""
    try:
        return part_class.from_pretrained(name, **kwargs)
    except ImportError as error:
        raise RecipeError(
            f"{key}={name}: {_first_line(error)} 4 and 8 bit need bitsandbytes: pip install 'vir-hf[gpu]', or quantization=none."
        ) from error
    except AttributeError as error:  # transformers, of a config without the fields it looks for
        raise RecipeError(
            f"{key}={name}: is no model of the kind that is needed ({_first_line(error)}). Expected a LLaVA model, a run or an "
            "adapter; as parts, a causal language model and a CLIP or SigLIP tower."
        ) from error
    except SafetensorError as error:
        raise RecipeError(f"{key}={name}: a weights file is damaged ({error}). Fetch or make it again.") from error
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(
            f"{key}={name}: could not be loaded: {_first_line(error)} Expected a folder saved by save_pretrained or a Hub id "
            "(a gated one needs `hf auth login`; offline, only what is in the cache)."
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
