"""The processor: tokenizer, image processor and the template the model is trained with, in one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor, LlavaImageProcessorPil, PreTrainedTokenizerBase

from .portable import keep_sentencepiece, make_processor_portable, name_processor_class
from .processing_views import TilesImageProcessor, ViewsProcessor, edge_of
from .views import AnyRes, Tiles

IMAGE_ASPECT_RATIOS = ("pad", "crop", "resize")


class LlavaProcessor(ViewsProcessor):
    """transformers' `LlavaProcessor` that also knows its template and how many tokens an image of a size takes.

    It is saved in transformers' format; `chat_template` renders what was trained, so stock `AutoProcessor` users and
    servers build the same prompts.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str | None = None,
        num_additional_image_tokens: int = 0,
        pixel_shuffle: int = 1,
        template: str = "auto",
        **kwargs: Any,
    ):
        from vir_hf.rows.templates import IMAGE_TOKEN, image_token_of

        image_token = image_token_of(tokenizer) if tokenizer is not None else image_token or IMAGE_TOKEN
        if tokenizer is not None and image_token not in tokenizer.get_vocab():
            # transformers takes the id of the first piece of "<image>" here, without a word.
            raise ValueError(
                f"the tokenizer has no {image_token!r} token; build the processor with LlavaProcessor.from_components "
                "(or vir_hf.build), which adds it."
            )
        self.template = template
        if tokenizer is not None:
            tokenizer.padding_side = "left"  # what generation needs; the collator of training pads itself
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            pixel_shuffle=pixel_shuffle,
            **kwargs,
        )

    @classmethod
    def from_components(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
        template: str = "vicuna_v1",
        *,
        patch_size: int = 14,
        vision_feature_select_strategy: str = "default",
        num_additional_image_tokens: int = 1,
        image_aspect_ratio: str = "pad",
        chat_template: str | None = None,
        max_tiles: int = 0,
        pixel_shuffle: int = 1,
    ) -> LlavaProcessor:
        """Return a processor; the image token and a padding token are added to the tokenizer where they are missing.

        Args:
            tokenizer: the language model's; changed in place.
            image_processor: the tower's; its size, mean, deviation and resampling are kept.
            template: a word of `vir_hf.rows.encoding.TEMPLATES`, or `"auto"` for the tokenizer's own chat template.
            patch_size: the tower's patch edge in pixels.
            vision_feature_select_strategy: `"default"` (the class token is dropped) or `"full"`.
            num_additional_image_tokens: 1 for a tower with a class token, else 0.
            image_aspect_ratio: `"pad"` to a square of the mean colour, centre `"crop"`, or plain `"resize"`.
            chat_template: the Jinja text to keep; made from `template` if `None`.
            max_tiles: cut images into at most so many tiles; 0 for one view.
            pixel_shuffle: blocks of so many by so many patches are one token.

        Raises:
            ValueError: an unknown template or image_aspect_ratio, or tiles of a cropped image.
        """
        from vir_hf.rows.templates import chat_template_for, prepare_tokenizer

        prepare_tokenizer(tokenizer, template)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        if chat_template is None:
            chat_template = chat_template_for(template, tokenizer)
        return cls(
            image_processor=square_image_processor(image_processor, image_aspect_ratio, max_tiles),
            tokenizer=tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            num_additional_image_tokens=num_additional_image_tokens,
            pixel_shuffle=pixel_shuffle,
            template=template,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> LlavaProcessor:
        """Load a processor saved by us or by llava-hf; without a template word of ours its chat template is `auto`."""
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save the processor in the words of transformers 4 and 5, and SentencePiece's own file where its source has one."""
        saved = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        keep_sentencepiece(self.tokenizer, Path(save_directory))
        name_processor_class(
            Path(save_directory),
            has_pinpoints=isinstance(self.views, AnyRes),
            has_tiles=isinstance(self.views, Tiles),
            has_blocks=self.pixel_shuffle > 1,
        )
        make_processor_portable(Path(save_directory))
        return saved

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of every view as the tower sees it, in pixels."""
        edge = edge_of(self.image_processor)
        return edge, edge

    @property
    def num_image_tokens(self) -> int:
        """How many tokens one image takes, where every image takes the same number.

        Raises:
            ValueError: it depends on the image's size: ask `tokens_of`.
        """
        views = self.views
        if not views.is_fixed:
            raise ValueError("an image's tokens depend on its size here; ask tokens_of((width, height)).")
        return views.most_tokens


def square_image_processor(
    image_processor: BaseImageProcessor, image_aspect_ratio: str, max_tiles: int = 0
) -> LlavaImageProcessorPil:
    """Return LLaVA's image processor with another's size, mean, deviation and resampling.

    Args:
        image_processor: CLIP's, SigLIP's or any with `size`, `image_mean`, `image_std`.
        image_aspect_ratio: one of `IMAGE_ASPECT_RATIOS`.
        max_tiles: cut images into at most so many tiles; 0 for one view.

    Raises:
        ValueError: an unknown `image_aspect_ratio`, or tiles of a cropped image.
    """
    if image_aspect_ratio not in IMAGE_ASPECT_RATIOS:
        raise ValueError(
            f"unknown image_aspect_ratio {image_aspect_ratio!r}; expected one of {IMAGE_ASPECT_RATIOS}. "
            "Set model.image_aspect_ratio in the recipe."
        )
    if max_tiles and image_aspect_ratio == "crop":
        raise ValueError(
            "image_aspect_ratio=crop cuts away what tiles would show. Set model.image_aspect_ratio=pad or resize, or "
            "model.tiling=none."
        )
    edge = edge_of(image_processor)
    square = {"height": edge, "width": edge}
    tiles = {"max_tiles": max_tiles} if max_tiles else {}
    return (TilesImageProcessor if max_tiles else LlavaImageProcessorPil)(
        do_pad=image_aspect_ratio == "pad",
        do_center_crop=image_aspect_ratio == "crop",
        size=square if image_aspect_ratio == "resize" else {"shortest_edge": edge},
        crop_size=square,
        image_mean=image_processor.image_mean,
        image_std=image_processor.image_std,
        resample=image_processor.resample,
        do_rescale=image_processor.do_rescale,
        rescale_factor=image_processor.rescale_factor,
        do_normalize=image_processor.do_normalize,
        **tiles,
    )
