"""What `encode_row` needs, made from names alone: tokenizer, template and the size of a picture, but no weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vir_hf.errors import RecipeError

if TYPE_CHECKING:
    from vir_hf.llava.processing_llava import LlavaProcessor
    from vir_hf.recipe.load import Recipe


def make_row_processor(tokenizer_name: str, template: str = "vicuna_v1", num_image_tokens: int = 576) -> Any:
    """Return a tokenizer with a template, which is enough for `encode_row` (it has no image processor).

    Raises:
        RecipeError: the tokenizer cannot be loaded, or the template is unknown.
    """
    from vir_hf.llava.views import OneView
    from vir_hf.rows.templates import chat_template_for, image_token_of, prepare_tokenizer

    tokenizer = _load(_auto("AutoTokenizer"), tokenizer_name, "--tokenizer", legacy=False)
    prepare_tokenizer(tokenizer, template)
    image_token = image_token_of(tokenizer)
    return SimpleNamespace(
        tokenizer=tokenizer,
        image_token=image_token,
        image_token_id=tokenizer.convert_tokens_to_ids(image_token),
        num_image_tokens=num_image_tokens,
        views=OneView(0, num_image_tokens),
        template=template,
        chat_template=chat_template_for(template, tokenizer),
    )


def load_recipe_processor(recipe: Recipe) -> LlavaProcessor:
    """Return the processor a recipe trains with, without loading its model.

    Raises:
        RecipeError: a part that cannot be loaded.
    """
    from vir_hf.llava.processing_llava import LlavaProcessor

    wanted = recipe.model
    if wanted.name_or_path:
        from vir_hf.model.for_use import load_processor

        return load_processor(wanted.name_or_path, wanted.template, wanted.revision)
    if not (wanted.language_model and wanted.vision_tower):
        raise RecipeError(
            "model: nothing says how rows are tokenised. Set model.name_or_path, or model.language_model and "
            "model.vision_tower."
        )
    from vir_hf.llava.configuration_llava import has_class_token, select_strategy
    from vir_hf.model.configs import check_vision_tower, read_config

    name, revision = wanted.tokenizer_source()
    options = {"legacy": False, "revision": revision, "trust_remote_code": wanted.trust_remote_code}
    tokenizer = _load(_auto("AutoTokenizer"), str(name), "model.tokenizer", **options)
    image_processor = _load(_auto("AutoImageProcessor"), wanted.vision_tower, "model.vision_tower")
    config, _ = read_config(wanted.vision_tower, "model.vision_tower")
    check_vision_tower(config, wanted.vision_tower)
    config = getattr(config, "vision_config", config)
    return LlavaProcessor.from_components(
        tokenizer,
        image_processor,
        wanted.template,
        patch_size=config.patch_size,
        vision_feature_select_strategy=select_strategy(config, wanted.vision_feature_select_strategy),
        num_additional_image_tokens=int(has_class_token(config)),
        image_aspect_ratio=wanted.image_aspect_ratio,
        max_tiles=wanted.tiles,
        pixel_shuffle=wanted.pixel_shuffle,
    )


def _auto(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def _load(auto_class: Any, name: str, key: str, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(
            f"{key}={name}: could not be loaded: {reason} Expected a folder saved by save_pretrained or a Hub id (a gated one "
            "needs `hf auth login`; offline, only what is in the cache)."
        ) from error
