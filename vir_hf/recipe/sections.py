"""The typed tree of a recipe: one dataclass a section, each key with its default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vir_hf.recipe import upstream


def given_arguments(arguments: dict[str, Any], known: dict[str, upstream.Argument]) -> dict[str, Any]:
    """Return the arguments without those set to null where upstream takes no None: null there means not given."""
    return {
        name: value
        for name, value in arguments.items()
        if value is not None or not known[name].kinds or "none" in known[name].kinds
    }


@dataclass
class ExperimentSection:
    """What this run is called and meant for."""

    name: str = "custom"
    description: str = ""
    stage: Literal["pretrain", "finetune"] | None = None
    hardware: str = ""


@dataclass
class ModelSection:
    """What is loaded: a whole vision-language model, or a language model and a vision tower to join."""

    name_or_path: str | None = None
    language_model: str | None = None
    vision_tower: str | None = None
    tokenizer: str | None = None
    projector_type: str = "mlp2x_gelu"
    template: str = "vicuna_v1"
    image_aspect_ratio: Literal["pad", "crop", "resize"] = "pad"
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["auto", "default", "full"] = "auto"
    tiling: Literal["none", "tiles"] = "none"
    max_tiles: int = 4
    pixel_shuffle: int = 1
    pretrained_projector: str | None = None
    adapter: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    attn_implementation: str = "auto"
    trust_remote_code: bool = False
    revision: str | None = None
    # Short ways to say it; both are written out into quantization and trainable, and are null afterwards.
    use_qlora: bool | None = None
    load_in_4bit: bool | None = None

    @property
    def tiles(self) -> int:
        """How many tiles an image may be cut into; 0 for one view."""
        return self.max_tiles if self.tiling == "tiles" else 0

    def tokenizer_source(self) -> tuple[str | None, str | None]:
        """Name and revision of the tokenizer: `revision` is one of the model's repository, so only of a tokenizer in it."""
        main = self.name_or_path or self.language_model
        name = main if self.name_or_path else self.tokenizer or main
        return name, self.revision if name == main else None


@dataclass
class SourceSection:
    """One part of a mixture: a file, folder, glob or Hub id, and how much of it."""

    path: str
    image_folder: str | None = None
    weight: float | None = None
    num_rows: int | None = None
    name: str | None = None
    split: str | None = None
    format: str | None = None
    columns: dict[str, Any] | None = None
    filter: dict[str, Any] | None = None
    boxes: dict[str, Any] | None = None


@dataclass
class DataSection:
    """Where the rows and images are, and what happens to bad ones."""

    data_path: str | None = None
    image_folder: str | None = None
    eval_path: str | None = None
    eval_image_folder: str | None = None
    eval_fraction: float | None = None
    sources: list[SourceSection] | None = None
    name: str | None = None
    split: str | None = None
    format: str | None = None
    columns: dict[str, Any] | None = None
    filter: dict[str, Any] | None = None
    boxes: dict[str, Any] | None = None
    deduplicate: Literal["content", "looks"] | None = None
    streaming: bool = False
    max_rows: int | None = None
    on_bad_row: Literal["raise", "skip"] = "raise"
    on_bad_image: Literal["raise", "skip"] = "raise"
    max_bad_fraction: float = 0.05
    allow_urls: bool = False
    check: bool = True


@dataclass
class TrainingSection:
    """How the weights are changed. SFTConfig's arguments read like fields: `recipe.training.learning_rate`."""

    stage: Literal["pretrain", "finetune"] = "finetune"
    global_batch_size: int | None = None
    projector_learning_rate: float | None = None
    vision_learning_rate: float | None = None
    projector_weight_decay: float | None = None
    vision_weight_decay: float | None = None
    padding_free: bool = True
    share_prefixes: bool | None = None
    group_by_image: bool = False
    balance_tokens: bool = True
    supervised_positions_only: bool = True
    trim_vision_tower: bool = True
    fused_lora: bool = True
    fused_head: bool = True
    lean_layers: bool = True
    max_tokens_per_batch: int | None = None
    feature_cache: str | bool | None = None
    resume: str | None = None
    overwrite_output_dir: bool = False
    on_bad_numbers: Literal["raise", "skip"] = "raise"
    max_skipped_steps: int = 10
    on_out_of_memory: Literal["raise", "split"] = "raise"
    timeout_minutes: int = 30
    panel_size: int = 4
    early_stopping_patience: int | None = None
    report: bool = True
    arguments: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        """Return an SFTConfig argument: the recipe's value, else upstream's default."""
        if name.startswith("__") or name == "arguments":
            raise AttributeError(name)
        if name in self.arguments:
            return self.arguments[name]
        known = upstream.sft_arguments()
        if name not in known or known[name].default is upstream.MISSING:
            raise AttributeError(f"{name!r} is neither a training key of the recipe nor an SFTConfig argument")
        return known[name].default

    def sft_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for `trl.SFTConfig`; what the recipe leaves open is not among them."""
        return given_arguments(self.arguments, upstream.sft_arguments())


@dataclass
class TrainableSection:
    """Which part learns, and how. `null` follows the stage, see `load_recipe`."""

    language_model: Literal["frozen", "lora", "full"] | None = None
    projector: Literal["frozen", "full"] | None = None
    vision_tower: Literal["frozen", "lora", "full"] | None = None
    vision_from_layer: int | None = None


@dataclass
class LoraSection:
    """LoraConfig's own arguments; empty when no part is trained with LoRA."""

    arguments: dict[str, Any] = field(default_factory=dict)

    def lora_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for `peft.LoraConfig`."""
        return given_arguments(self.arguments, upstream.lora_arguments())


@dataclass
class QuantizationSection:
    """BitsAndBytesConfig's own arguments; empty when the model is not quantised.

    Args:
        only_on_cuda: load unquantised, and say so, on a machine without a CUDA GPU.
    """

    only_on_cuda: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def bits(self) -> Literal[4, 8] | None:
        """The width the language model's weights are stored in, None for its own dtype."""
        if self.arguments.get("load_in_4bit"):
            return 4
        return 8 if self.arguments.get("load_in_8bit") else None

    def bitsandbytes_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for `transformers.BitsAndBytesConfig`; null ones are the product's to choose."""
        return {name: value for name, value in self.arguments.items() if value is not None}
