# SPDX-License-Identifier: Apache-2.0
"""The LLaVA pair: `LlavaModel` (tower -> projector -> merge -> language model) and `LlavaForCausalLM`.

Both extend transformers' own classes, so weights, generation and attention back ends are theirs. What is ours is in
`LlavaModel`, because TRL calls the inner model in training: a frozen tower without autograd and without the layers after
the selected one, each distinct picture once, packed rows of segments, and hidden states at supervised positions only.
"""

# Over 400 lines: it is copied whole to the Hub, and follows the order of transformers' own modelling files.

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, LlavaForConditionalGeneration, PreTrainedModel
from transformers import LlavaConfig as NativeLlavaConfig
from transformers import LlavaModel as NativeLlavaModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast

from .attention import SegmentLayout, segment_mask_sentinel, use_segment_attention
from .configuration_llava import (
    NATIVE_PROJECTOR_TYPE,
    LlavaConfig,
    is_native,
    num_image_tokens,
    projector_type_of,
    select_strategy,
)
from .logits import absorb_logit_factor, forget_logit_words, logit_factor
from .portable import make_config_portable
from .projectors import MlpProjector, build_projector
from .views import ImageViews, views_of_config

# Prefixes of llava-hf's key names, and of the same weights in memory.
HUB_LAYOUT = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "vision_tower.vision_model.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "image_newline": "model.multi_modal_projector.image_newline",  # last, so that it is reversed before the line above
}


def name_in_memory(name: str) -> str:
    """Return the in-memory name of a weight saved in the Hub's key layout; any other name unchanged."""
    for saved, in_memory in HUB_LAYOUT.items():
        if name.startswith(saved):
            return in_memory + name[len(saved) :]
    return name


def _hub_layout() -> list[WeightRenaming]:
    """`HUB_LAYOUT` for transformers, which reverses it on saving: what vLLM and older readers expect."""
    return [
        WeightRenaming(source_patterns=f"^{re.escape(saved)}", target_patterns=in_memory)
        for saved, in_memory in HUB_LAYOUT.items()
    ]


# transformers does not apply a native class's renames to a subclass of it: a llava-hf checkpoint would load with a random
# lm_head and only a warning.
_LLAVA_LAYOUT = [
    *get_checkpoint_conversion_mapping("llava"),
    # Before transformers 5 and since: where LLaVA-NeXT keeps what is the projector's here.
    WeightRenaming(
        source_patterns=r"^(?:model\.)?image_newline$", target_patterns="model.multi_modal_projector.image_newline"
    ),
]
register_checkpoint_conversion_mapping("LlavaForCausalLM", _LLAVA_LAYOUT, overwrite=True)


class LlavaModel(NativeLlavaModel):
    """Vision tower, projector and language model without a head.

    Attributes:
        reads_vision_features: batches bring `vision_features`, so the tower runs on no rank.
        sums_gradients_as_they_come: gradients must arrive in the same order on every rank (DeepSpeed).
        trims_vision_tower: a frozen tower runs without autograd, and no layer after the selected one runs.
        views_per_chunk: so many views pass a frozen tower at once, which bounds its memory.
        views: how images are cut, see `views.py`.
    """

    reads_vision_features = False
    sums_gradients_as_they_come = False
    trims_vision_tower = True
    views_per_chunk = 64

    def __init__(self, config: NativeLlavaConfig):
        super().__init__(config)
        self.views = views_of_config(config)
        if not is_native(config) or not self.views.is_fixed:
            self.multi_modal_projector: Any = build_projector(config, projector_type_of(config))
            self.post_init()

    def is_vision_tower_frozen(self) -> bool:
        """Whether no weight of the tower, nor an adapter inside it, is trained."""
        return not any(parameter.requires_grad for parameter in self.vision_tower.parameters())

    def unused_vision_parameters(self) -> set[str]:
        """Names (within the tower) of weights no selected feature depends on: later layers, last norm, pooling head.

        They get no gradient, so a trained tower must leave them frozen: distributed training waits for every trained one.
        """
        layers = self.config.vision_feature_layer
        selected = [layers] if isinstance(layers, int) else list(layers)
        num_layers = self.vision_tower.config.num_hidden_layers
        depth = max(layer if layer >= 0 else num_layers + 1 + layer for layer in selected)
        tower: Any = getattr(self.vision_tower, "vision_model", self.vision_tower)
        if not (hasattr(tower, "embeddings") and hasattr(tower, "encoder")):
            return set()
        used = {id(p) for module in (tower.embeddings, *tower.encoder.layers[:depth]) for p in module.parameters()}
        if hasattr(tower, "pre_layrnorm"):
            used |= {id(parameter) for parameter in tower.pre_layrnorm.parameters()}
        return {name for name, parameter in self.vision_tower.named_parameters() if id(parameter) not in used}

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the tower's features at the selected layer(s), the projector's input.

        Args:
            pixel_values: `(num_images, channels, height, width)`.

        Returns:
            `(num_images, num_patches, vision_hidden)`. A frozen tower runs without autograd and `views_per_chunk` at a time;
            layers after the last selected one do not run.
        """
        if not (self.trims_vision_tower and self.is_vision_tower_frozen()):
            return self._select_features(pixel_values)
        with torch.no_grad():
            chunks = [self._select_features(chunk) for chunk in pixel_values.split(self.views_per_chunk)]
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)

    def _select_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        layers = self.config.vision_feature_layer
        selected = [layers] if isinstance(layers, int) else list(layers)
        num_layers = self.vision_tower.config.num_hidden_layers
        depths = [layer if layer >= 0 else num_layers + 1 + layer for layer in selected]
        tower: Any = getattr(self.vision_tower, "vision_model", self.vision_tower)
        pixel_values = pixel_values.to(self.vision_tower.dtype)
        if self.trims_vision_tower and hasattr(tower, "embeddings") and hasattr(tower, "encoder"):
            hidden_states = tower.embeddings(pixel_values)  # (num_images, num_patches (+ 1), vision_hidden)
            if hasattr(tower, "pre_layrnorm"):
                hidden_states = tower.pre_layrnorm(hidden_states)
            by_depth = {0: hidden_states}
            for depth, layer in enumerate(tower.encoder.layers[: max(depths)], start=1):
                hidden_states = layer(hidden_states, None)
                by_depth[depth] = hidden_states
            features = [by_depth[depth] for depth in depths]
        else:  # its own forward, with every layer: also for a tower of another shape
            outputs = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True)
            features = [outputs.hidden_states[layer] for layer in selected]
        if self.config.vision_feature_select_strategy == "default":
            features = [feature[:, 1:] for feature in features]  # without the class token
        return features[0] if len(features) == 1 else torch.cat(features, dim=-1)

    def project(self, features: torch.Tensor, images: list[ImageViews] | None = None) -> torch.Tensor:
        """`(num_views, num_patches, vision_hidden)` -> `(num_views, num_tokens, text_hidden)`, or `(all tokens, text_hidden)`.

        Args:
            images: what each image became, where images are cut into views: then the second is returned.
        """
        weight = next(self.projector_in_use().parameters(), features)
        dtype = weight.dtype if weight.is_floating_point() else features.dtype
        features = features.to(dtype)
        return self.multi_modal_projector(features) if images is None else self.multi_modal_projector(features, images)

    def projector_in_use(self) -> nn.Module:
        """The projector that runs: under PEFT the copy that is trained, which is fp32, unless adapters are switched off."""
        projector: Any = self.multi_modal_projector
        copies = getattr(projector, "modules_to_save", None)
        if not isinstance(copies, nn.ModuleDict):
            return projector  # type: ignore[no-any-return]
        active = projector.active_adapter
        name = active if isinstance(active, str) else next(iter(active), "")
        is_original = projector.disable_adapters or name not in copies
        in_use: nn.Module = projector.original_module if is_original else copies[name]
        return in_use

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        image_indices: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Return projected image features in `pooler_output`, one `(num_patches, text_hidden)` tensor an image span.

        Args:
            pixel_values: `(num_distinct_images, channels, height, width)`, or `None` with `vision_features`.
            vision_feature_layer, vision_feature_select_strategy: transformers' own overrides of the config.
            image_indices: `(num_image_spans,)`: which image each span shows; one image a span by default.
            vision_features: `(num_distinct_images, num_patches, vision_hidden)`: features computed before.

        Where images are cut into views, the first dimension of `pixel_values` and `vision_features` counts views, those of one
        image after another, and `image_sizes` `(num_distinct_images, 2)` has each image's height and width.
        """
        overridden = (
            vision_feature_layer is not None and vision_feature_layer != self.config.vision_feature_layer
        ) or (
            vision_feature_select_strategy is not None
            and vision_feature_select_strategy != self.config.vision_feature_select_strategy
        )
        is_fixed = self.views.is_fixed
        if overridden and not is_fixed:
            raise ValueError(
                "vision_feature_layer and vision_feature_select_strategy cannot be overridden where images have tiles."
            )
        if is_fixed and (image_sizes is not None or overridden):
            return super().get_image_features(
                pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                image_sizes=image_sizes,
                return_dict=True,
                **kwargs,
            )
        if vision_features is None:
            if pixel_values is None:
                raise ValueError("neither pixel_values nor vision_features: there is no picture to look at.")
            if pixel_values.ndim == 5:  # transformers' own processors pad to as many views for each image
                pixel_values = self._without_padding(pixel_values, image_sizes)
            vision_features = self.encode_images(pixel_values)
        if is_fixed:
            projected = self.project(vision_features)
            if image_indices is not None:
                projected = projected.index_select(0, image_indices)
            return BaseModelOutputWithPooling(last_hidden_state=vision_features, pooler_output=list(projected))
        spans = self._project_views(vision_features, image_sizes)
        if image_indices is not None:
            spans = [spans[index] for index in image_indices.tolist()]
        return BaseModelOutputWithPooling(last_hidden_state=vision_features, pooler_output=spans)

    def _without_padding(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None) -> torch.Tensor:
        """`(num_images, most_views, 3, height, width)` -> `(num_views, 3, height, width)`."""
        sizes = [] if image_sizes is None else image_sizes.tolist()
        counts = [self.views.of(width, height).num_views for height, width in sizes]
        return torch.cat([views[:count] for views, count in zip(pixel_values, counts, strict=True)])

    def _project_views(self, features: torch.Tensor, image_sizes: torch.Tensor | None) -> list[torch.Tensor]:
        """`(num_views, num_patches, vision_hidden)` -> one `(num_tokens, text_hidden)` an image.

        Raises:
            ValueError: views that are not those of images of these sizes.
        """
        if image_sizes is None:
            raise ValueError(
                "this model cuts images into tiles: pass image_sizes (height, width), as its processor returns them."
            )
        images = [self.views.of(width, height) for height, width in image_sizes.tolist()]
        num_views = sum(image.num_views for image in images)
        if num_views != features.shape[0]:
            raise ValueError(
                f"images of these sizes (height, width) have {num_views} views, but {features.shape[0]} were given: "
                f"{image_sizes.tolist()[:4]}. Use the processor that belongs to this model."
            )
        return list(self.project(features, images).split([image.num_tokens for image in images]))

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_indices: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        segment_lengths: torch.Tensor | None = None,
        segment_prefixes: torch.Tensor | None = None,
        supervised_positions: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        image_sizes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> LlavaModelOutputWithPast:
        """Run the model; the arguments beyond transformers' own make a padding-free batch.

        Args:
            input_ids: `(batch, sequence)`; a packed row is `(1, T)`.
            image_indices: `(num_image_spans,)`: the row of `pixel_values` (or `vision_features`) each span shows.
            vision_features: `(num_distinct_images, num_patches, vision_hidden)`, in place of `pixel_values`.
            segment_lengths: `(num_segments,)`, summing to T. With it the row is packed: no mask, no cache.
            segment_prefixes: `(num_segments,)`: an earlier segment whose tokens come first, or -1.
            supervised_positions: `(num_positions,)`: return hidden states at these positions of the packed row only.
            image_sizes: `(num_distinct_images, 2)`: height and width of each image, where images are cut into tiles.

        Raises:
            ValueError: a packed row with an attention mask, a cache, or lengths that do not add up; numbers of image
                tokens and image features that differ.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("neither input_ids nor inputs_embeds: there is no text to read.")
            inputs_embeds = self.get_input_embeddings()(input_ids)
        has_images = pixel_values is not None or vision_features is not None
        if has_images and not (mm_encoder_outputs or {}).get("image"):
            mm_encoder_outputs = {
                "image": self.get_image_features(
                    pixel_values,
                    vision_feature_layer=kwargs.pop("vision_feature_layer", None),
                    vision_feature_select_strategy=kwargs.pop("vision_feature_select_strategy", None),
                    image_sizes=image_sizes,
                    image_indices=image_indices,
                    vision_features=vision_features,
                )
            }
        image_features = None
        encoded_images = (mm_encoder_outputs or {}).get("image")
        if encoded_images is not None:
            image_features = torch.cat(list(encoded_images.pooler_output), dim=0)
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = self._merge(input_ids, inputs_embeds, image_features)
        elif (self.training and torch.is_grad_enabled()) or self._has_sharded_vision_parts():
            inputs_embeds = inputs_embeds + self._zero_from_vision_parts(inputs_embeds)

        if segment_lengths is not None:
            layout = self._layout(segment_lengths, segment_prefixes, inputs_embeds, attention_mask, kwargs)
            kwargs["segment_layout"] = layout
            attention_mask = segment_mask_sentinel(inputs_embeds.device)
            if position_ids is None:
                position_ids = layout.position_ids(inputs_embeds.device)
        outputs = self.language_model(
            attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        hidden_states = outputs.last_hidden_state
        if supervised_positions is not None:
            hidden_states = hidden_states[:, supervised_positions]
        names = {field.name for field in dataclasses.fields(LlavaModelOutputWithPast)}
        if "image_outputs" in names:  # since transformers 5.24
            rest = {"cache": outputs.cache, "image_outputs": encoded_images}
        else:
            rest = {"past_key_values": outputs.past_key_values, "image_hidden_states": image_features}
        return LlavaModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **rest,
        )

    def _merge(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """The text embeddings with image features written over the image tokens, in reading order."""
        if input_ids is None:
            placeholder = self.get_input_embeddings()(
                torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            )
            mask = (inputs_embeds == placeholder).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        num_tokens, num_features = int(mask.sum()), image_features.shape[0]
        if num_tokens != num_features:
            raise ValueError(
                f"Image features and image tokens do not match: the text holds {num_tokens} image tokens, the pictures "
                f"give {num_features} features ({self._tokens_in_words()}). Encode the text with the "
                "processor that belongs to this model, and do not cut inside an image."
            )
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1).to(inputs_embeds.device), image_features)

    def _tokens_in_words(self) -> str:
        return (
            f"{self.views.most_tokens} a picture"
            if self.views.is_fixed
            else f"at most {self.views.most_tokens} a picture"
        )

    def _layout(
        self,
        segment_lengths: torch.Tensor,
        segment_prefixes: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> SegmentLayout:
        if attention_mask is not None:
            raise ValueError(
                "a packed row (segment_lengths) takes no attention_mask: a mask of ones would let its rows see each "
                "other. Drop attention_mask from the batch."
            )
        cache = kwargs.get("past_key_values") if kwargs.get("cache") is None else kwargs["cache"]
        if cache is not None or kwargs.get("use_cache"):
            raise ValueError("a packed row (segment_lengths) runs without a key-value cache; pass use_cache=False.")
        kwargs["use_cache"] = False
        lengths = tuple(segment_lengths.tolist())
        prefixes = tuple(segment_prefixes.tolist()) if segment_prefixes is not None else (-1,) * len(lengths)
        layout = SegmentLayout(lengths, prefixes, backend=getattr(self.config, "segment_backend", "auto"))
        if inputs_embeds.shape[0] != 1 or inputs_embeds.shape[1] != layout.num_tokens:
            raise ValueError(
                f"segments cover {layout.num_tokens} tokens of one row, but the batch is "
                f"{inputs_embeds.shape[0]} x {inputs_embeds.shape[1]}."
            )
        use_segment_attention(self.language_model)
        return layout

    def _zero_from_vision_parts(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """A zero that depends on every trained weight of projector and tower, for micro-batches of text alone.

        Without it those weights have no gradient on this rank while other ranks wait for one. Where weights are sharded
        (ZeRO-3, FSDP2) every rank must also run the modules, so one blank picture passes through them. ZeRO-2 sums gradients
        in their order of arrival, so there what learns must run too: the projector, and the tower only if it learns.
        """
        zero = inputs_embeds.new_zeros(())
        is_sharded = self._has_sharded_vision_parts()
        trained = [parameter for parameter in self._vision_parameters() if parameter.requires_grad]
        if not trained and not is_sharded:
            return zero
        if not is_sharded and not self.sums_gradients_as_they_come:
            for parameter in trained:
                zero = zero + (parameter.sum() * 0).to(zero.dtype)
            return zero
        tower, device = self.vision_tower.config, inputs_embeds.device
        if self.reads_vision_features or (not is_sharded and self.is_vision_tower_frozen()):
            layers = self.config.vision_feature_layer
            width = tower.hidden_size * (1 if isinstance(layers, int) else len(layers))
            features = torch.zeros(1, 1, width, device=device)
        else:
            features = self.encode_images(
                torch.zeros(1, tower.num_channels, tower.image_size, tower.image_size, device=device)
            )
        return self.project(features).sum().to(zero.dtype) * 0

    def _vision_parameters(self) -> list[nn.Parameter]:
        return [*self.multi_modal_projector.parameters(), *self.vision_tower.parameters()]

    def _has_sharded_vision_parts(self) -> bool:
        """Whether ranks hold shares of projector and tower, so that all of them must run these modules together."""
        parts = self._vision_parameters()
        return any(hasattr(parameter, "ds_id") or hasattr(parameter, "placements") for parameter in parts)


def new_projector(config: LlavaConfig) -> nn.Module:
    """Return the projector of a config with new weights: as small as the language model's own at its start, biases zero."""
    projector = build_projector(config, config.projector_type)
    for module in projector.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=config.text_config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if isinstance(projector, MlpProjector):  # a block's patches are that many more inputs: the output stays as large
        projector.get_parameter("linear_1.weight").data /= config.pixel_shuffle
    return projector


class LlavaForCausalLM(LlavaForConditionalGeneration):
    """A LLaVA model with its language-model head.

    Loads llava-hf checkpoints and our own; saves whatever plain `llava` can express as plain `llava`.
    """

    if TYPE_CHECKING:  # transformers reads a class's own annotation of it, so at run time there is none
        config: Any

    def __init__(self, config: NativeLlavaConfig):
        # Not the parent's own __init__, which would build and drop a whole model of the native class first.
        super(LlavaForConditionalGeneration, self).__init__(config)
        forget_logit_words(config.text_config)
        self.model = LlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Load a model; the config class follows the checkpoint's own model type."""
        if kwargs.get("config") is None:
            hub_words = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            hub_kwargs = {word: kwargs[word] for word in hub_words if word in kwargs}
            kwargs["config"] = AutoConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_components(
        cls,
        language_model: PreTrainedModel,
        vision_tower: PreTrainedModel,
        projector_type: str = NATIVE_PROJECTOR_TYPE,
        *,
        image_token_id: int | None = None,
        vision_feature_layer: int | list[int] = -2,
        vision_feature_select_strategy: str | None = None,
        vocab_size: int | None = None,
        max_tiles: int = 0,
        pixel_shuffle: int = 1,
    ) -> LlavaForCausalLM:
        """Return a model made of a causal language model and a vision tower; only the projector is new.

        Args:
            language_model: any causal LM of transformers with an inner base model and a linear head without bias; a factor
                on its logits goes into the weights of its last norm.
            vision_tower: CLIP's or SigLIP's vision model (a full CLIP or SigLIP model gives its vision part).
            projector_type: a key of `PROJECTORS`.
            image_token_id: the tokenizer's id of `<image>`; the first id past the vocabulary by default.
            vision_feature_layer: the tower's hidden state(s) that the projector reads.
            vision_feature_select_strategy: `"default"` drops the class token, `"full"` keeps all; by the tower if `None`.
            vocab_size: rows of the embedding afterwards, padded to a multiple of 64; grown only as needed if `None`.
            max_tiles: cut images into at most so many tiles; 0 for one view.
            pixel_shuffle: blocks of so many by so many patches become one token.

        Raises:
            ValueError: a language model whose logits are more than a factor times a head without bias; an unknown projector.
        """
        absorb_logit_factor(language_model, logit_factor(type(language_model), language_model.config))
        vision_tower = getattr(vision_tower, "vision_model", vision_tower)
        text_config = copy.deepcopy(language_model.config)
        embeddings = language_model.get_input_embeddings()
        old_size = embeddings.weight.shape[0]
        image_token_id = old_size if image_token_id is None else image_token_id
        if max(vocab_size or 0, image_token_id + 1) > old_size:
            # New rows are drawn around the mean of the old ones: rows of another scale would disturb the softmax.
            language_model.resize_token_embeddings(
                max(vocab_size or 0, image_token_id + 1), pad_to_multiple_of=64, mean_resizing=True
            )
        text_config.vocab_size = language_model.get_input_embeddings().weight.shape[0]
        strategy = select_strategy(vision_tower.config, vision_feature_select_strategy)
        config = LlavaConfig(
            vision_config=vision_tower.config,
            text_config=text_config,
            image_token_index=image_token_id,
            image_seq_length=num_image_tokens(vision_tower.config, strategy, pixel_shuffle),
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=strategy,
            projector_type=projector_type,
            tiling="tiles" if max_tiles else "none",
            max_tiles=max_tiles,
            pixel_shuffle=pixel_shuffle,
            tie_word_embeddings=bool(getattr(text_config, "tie_word_embeddings", False)),
        )
        dtype = language_model.dtype
        with torch.device("meta"):
            model = cls(config)
        model.model.language_model = language_model.base_model
        model.lm_head = language_model.get_output_embeddings()
        model.model.vision_tower = vision_tower
        projector = new_projector(config)
        model.model.multi_modal_projector = projector.to(device=embeddings.weight.device, dtype=dtype)
        model.tie_weights()
        generation_config = copy.deepcopy(language_model.generation_config)
        if generation_config is not None:
            model.generation_config = generation_config
        return model

    def floating_point_ops(self, input_dict: dict[str, Any], exclude_embeddings: bool = True) -> int:
        """Zero: FLOPs are reported from real token counts by the trainer, not from padded shapes."""
        return 0

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the model: as plain `llava` in the Hub's key layout if that can express it, else with its code."""
        conversions = getattr(self, "_weight_conversions", None)
        self._weight_conversions = _hub_layout()
        config, is_main_process = self.config, kwargs.get("is_main_process", True)
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            if conversions is None:
                del self._weight_conversions
            else:
                self._weight_conversions = conversions
            self.config = config
        if is_main_process:
            _finish_config(Path(save_directory), is_native(self.config))


def _finish_config(folder: Path, is_plain: bool) -> None:
    """Rewrite `config.json` to the model type it is read under, and add the code files where it is our own type."""
    path = folder / "config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("segment_backend", None)
    if config["model_type"] == "llava_next":
        config["architectures"] = ["LlavaNextForConditionalGeneration"]
    elif is_plain:
        for name in ("projector_type", "tiling", "max_tiles", "pixel_shuffle", "auto_map"):
            config.pop(name, None)
        config["model_type"] = "llava"
        config["architectures"] = ["LlavaForConditionalGeneration"]
    else:
        config["architectures"] = ["LlavaForCausalLM"]
        config["auto_map"] = {
            "AutoConfig": "configuration_llava.LlavaConfig",
            "AutoModel": "modeling_llava.LlavaModel",
            "AutoModelForCausalLM": "modeling_llava.LlavaForCausalLM",
            "AutoModelForImageTextToText": "modeling_llava.LlavaForCausalLM",
        }
        for name in (
            "configuration_llava.py",
            "projectors.py",
            "attention.py",
            "logits.py",
            "portable.py",
            "views.py",
            "modeling_llava.py",
        ):
            source = Path(__file__).with_name(name)
            (folder / name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    make_config_portable(folder)
