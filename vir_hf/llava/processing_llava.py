"""The processor: tokenizer, image processor and the template the model is trained with, in one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor, LlavaImageProcessorPil, PreTrainedTokenizerBase
from transformers import LlavaProcessor as NativeLlavaProcessor

from .portable import keep_sentencepiece, make_processor_portable

IMAGE_ASPECT_RATIOS = ("pad", "crop", "resize")


class LlavaProcessor(NativeLlavaProcessor):
    """transformers' `LlavaProcessor` that also knows its template and how many tokens a picture takes.

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

        Raises:
            ValueError: an unknown template or image_aspect_ratio.
        """
        from vir_hf.rows.templates import chat_template_for, prepare_tokenizer

        prepare_tokenizer(tokenizer, template)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        if chat_template is None:
            chat_template = chat_template_for(template, tokenizer)
        return cls(
            image_processor=square_image_processor(image_processor, image_aspect_ratio),
            tokenizer=tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            num_additional_image_tokens=num_additional_image_tokens,
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
        make_processor_portable(Path(save_directory))
        return saved

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of every picture as the tower sees it, in pixels."""
        uses_crop = getattr(self.image_processor, "do_center_crop", False)
        edge = _edge(self.image_processor.crop_size if uses_crop else self.image_processor.size)
        return edge, edge

    @property
    def num_image_tokens(self) -> int:
        """How many tokens one picture takes; every picture takes the same number."""
        height, width = self.image_size
        num_tokens = (height // self.patch_size) * (width // self.patch_size) + self.num_additional_image_tokens
        return num_tokens - 1 if self.vision_feature_select_strategy == "default" else num_tokens


def _edge(size: Any) -> int:
    """The edge of the square a size describes, whichever way it is written."""
    for key in ("shortest_edge", "height"):
        value = size.get(key) if hasattr(size, "get") else getattr(size, key, None)
        if value is not None:
            return int(value)
    raise ValueError(f"the image processor's size {size!r} names neither shortest_edge nor height.")


def square_image_processor(image_processor: BaseImageProcessor, image_aspect_ratio: str) -> LlavaImageProcessorPil:
    """Return LLaVA's image processor with another's size, mean, deviation and resampling.

    Args:
        image_processor: CLIP's, SigLIP's or any with `size`, `image_mean`, `image_std`.
        image_aspect_ratio: one of `IMAGE_ASPECT_RATIOS`.

    Raises:
        ValueError: an unknown `image_aspect_ratio`.
    """
    if image_aspect_ratio not in IMAGE_ASPECT_RATIOS:
        raise ValueError(
            f"unknown image_aspect_ratio {image_aspect_ratio!r}; expected one of {IMAGE_ASPECT_RATIOS}. "
            "Set model.image_aspect_ratio in the recipe."
        )
    uses_crop = getattr(image_processor, "do_center_crop", False)
    edge = _edge(image_processor.crop_size if uses_crop else image_processor.size)
    square = {"height": edge, "width": edge}
    return LlavaImageProcessorPil(
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
    )
