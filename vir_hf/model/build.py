"""Names -> model and processor: dtype, attention, quantisation."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import BaseImageProcessor

from vir_hf.errors import RecipeError
from vir_hf.llava.configuration_llava import has_class_token, num_image_tokens, select_strategy
from vir_hf.llava.modeling_llava import LlavaForCausalLM
from vir_hf.llava.processing_llava import LlavaProcessor
from vir_hf.model.configs import read_config
from vir_hf.model.language_models import judge_language_model
from vir_hf.model.quantization import (
    adopt_quantization,
    for_language_model,
)
from vir_hf.rows.encoding import encode_row

if TYPE_CHECKING:
    pass
from vir_hf.model.parts import load_part, load_tokenizer, load_vision_tower, name_of, of_code, shown_part

logger = logging.getLogger(__name__)


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
        text_config, _ = read_config(language_model, "model.language_model", **of_code(loading_kwargs))
    else:
        text_config = language_model.config
    judge_language_model(text_config, shown_part(language_model))
    tokenizer, image_processor = _load_readers(
        language_model, vision_tower, tokenizer, image_processor, of_code(loading_kwargs)
    )
    quantization = loading_kwargs.pop("quantization_config", None)
    if isinstance(language_model, str):
        if quantization is not None:
            loading_kwargs["quantization_config"] = for_language_model(quantization)
        language_model = load_part(
            AutoModelForCausalLM, language_model, "model.language_model", dtype=dtype or "auto", **loading_kwargs
        )
    if isinstance(vision_tower, str):
        vision_tower = load_vision_tower(vision_tower, dtype or language_model.dtype)
    tower = getattr(vision_tower, "vision_model", vision_tower)
    try:
        strategy = select_strategy(tower.config, vision_feature_select_strategy)
        num_image_tokens(tower.config, strategy, pixel_shuffle)
    except ValueError as error:
        raise RecipeError(f"model.vision_tower={shown_part(vision_tower)}: {error}") from error
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
        raise RecipeError(f"model.language_model={shown_part(language_model)}: {error}") from error
    if quantization is not None:
        adopt_quantization(model, language_model, quantization)
    agree_on_tokens(model, processor)
    return model, processor


def _load_readers(
    language_model: str | PreTrainedModel,
    vision_tower: str | PreTrainedModel,
    tokenizer: str | PreTrainedTokenizerBase | None,
    image_processor: str | BaseImageProcessor | None,
    of_repository: dict[str, Any],
) -> tuple[PreTrainedTokenizerBase, BaseImageProcessor]:
    """Return tokenizer and image processor, where none is given those of the parts."""
    if tokenizer is None or isinstance(tokenizer, str):
        # A revision is one of the language model's repository, in which its own tokenizer lies, too.
        options = of_repository if tokenizer in (None, language_model) else {}
        tokenizer = load_tokenizer(tokenizer or name_of(language_model, "tokenizer"), **options)
    if image_processor is None or isinstance(image_processor, str):
        image_processor = load_part(
            AutoImageProcessor, image_processor or name_of(vision_tower, "image_processor"), "model.vision_tower"
        )
    return tokenizer, image_processor


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
