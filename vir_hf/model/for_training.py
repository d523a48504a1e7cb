"""The model and processor of a recipe, and the base that is kept beside an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from vir_hf import files
from vir_hf.errors import RecipeError
from vir_hf.llava.modeling_llava import LlavaForCausalLM
from vir_hf.llava.processing_llava import LlavaProcessor
from vir_hf.model.adapters import BASE_FOLDER, adapter_folder, base_of, folders_of_run
from vir_hf.model.projector_files import load_projector
from vir_hf.model.quantization import (
    bits_of,
    check_quantization,
    keep_layout,
    quantization_config,
)

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe
from vir_hf.model.build import agree_on_tokens, build
from vir_hf.model.for_use import load_processor
from vir_hf.model.parts import load_whole
from vir_hf.model.precision import Precision, rounded_to

# In `base/`: what it was made from, so that it is not taken for another run's.
MADE_FROM = "made_from.json"


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
        model = load_whole(name, "model.name_or_path", dtype=precision.dtype, **loading)
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


def _link_files(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.is_file() and path.name not in (MADE_FROM, files.RECORD):
            files.link_or_copy(path, target / path.name)
