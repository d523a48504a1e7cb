"""A `config.json` is judged before weights: no folder here has any, so whatever is loaded beside it would be seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vir_hf.cli import main
from vir_hf.errors import RecipeError
from vir_hf.llava.configuration_llava import HAS_CLASS_TOKEN, has_class_token, num_image_tokens, select_strategy
from vir_hf.model.configs import check_whole_model, read_config
from vir_hf.model.for_use import load_run
from vir_hf.model.parts import VISION_TOWERS

PART = {"model.language_model": "null", "model.vision_tower": "null"}
# As liuhaotian/llava-v1.5-7b has it: the language model's fields at the top, and the tower by name.
ORIGINAL = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
}


def write_config(folder: Path, fields: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (AutoConfig.for_model("llava_onevision").to_dict(), "its model type is 'llava_onevision'"),
        (ORIGINAL, "its config.json has no text_config and vision_config"),
        ({**LlavaConfig().to_dict(), "text_config": None}, "its config.json has no text_config"),
        (AutoConfig.for_model("llama").to_dict(), "its model type is 'llama'"),
        (AutoConfig.for_model("paligemma").to_dict(), "its model type is 'paligemma'"),
        (
            {**LlavaConfig().to_dict(), "vision_config": AutoConfig.for_model("dinov2").to_dict()},
            "its vision tower is of type 'dinov2'",
        ),
        (
            {**LlavaConfig().to_dict(), "model_type": "vir_llava", "projector_type": "resampler"},
            "its projector_type is 'resampler'",
        ),
    ],
    ids=["llava_onevision", "original", "no_text", "llama", "paligemma", "dinov2", "projector"],
)
def test_a_model_that_is_none_of_ours_is_refused_by_its_config(
    fields: dict[str, Any], message: str, tiny_parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_config(tmp_path / "whole", fields)
    tiny.save_tokenizer(folder)
    overrides = tiny.training_overrides(tiny_parts, tmp_path / "out", **PART, **{"model.name_or_path": folder})
    for command in ("train", "plan"):
        assert main([command, *overrides]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert f"model.name_or_path={folder}: {message}" in line and len(line) <= 500
    with pytest.raises(RecipeError, match=message):
        load_run(folder)


def test_a_llava_of_stock_transformers_is_taken(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "whole", LlavaConfig().to_dict())
    config, source = read_config(str(folder), "model.name_or_path")
    check_whole_model(config, str(folder), "model.name_or_path")
    assert source == f"{folder}: its config.json"


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    (write_config(tmp_path / "broken", {}) / "config.json").write_text("{", encoding="utf-8")
    for folder in (tmp_path / "broken", tmp_path / "nothing"):
        with pytest.raises(RecipeError, match=r"model.language_model=.*its config.json could not be read") as caught:
            read_config(str(folder), "model.language_model")
        assert len(str(caught.value)) <= 500 + len(str(folder))


def test_every_tower_that_loads_is_known_to_have_a_class_token_or_not() -> None:
    assert set(VISION_TOWERS) == set(HAS_CLASS_TOKEN)
    with pytest.raises(ValueError, match="'dinov2' is not known"):
        has_class_token(AutoConfig.for_model("dinov2"))


@given(
    is_clip=st.booleans(),
    patch_size=st.sampled_from([7, 14]),
    num_patches=st.integers(1, 4),
    wanted=st.sampled_from([None, "auto", "default", "full"]),
)
def test_tokens_of_an_image_are_what_the_tower_makes_of_it(
    is_clip: bool, patch_size: int, num_patches: int, wanted: str | None
) -> None:
    import torch

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes |= {"patch_size": patch_size, "image_size": patch_size * num_patches}
    tower: Any = (
        CLIPVisionModel(CLIPVisionConfig(**sizes)) if is_clip else SiglipVisionModel(SiglipVisionConfig(**sizes))
    )
    inner = getattr(tower, "vision_model", tower)
    assert has_class_token(tower.config) == hasattr(inner.embeddings, "class_embedding") == is_clip
    if wanted == "default" and not is_clip:
        with pytest.raises(ValueError, match="the image would lose its first patch"):
            select_strategy(tower.config, wanted)
        return
    strategy = select_strategy(tower.config, wanted)
    with torch.no_grad():
        image = torch.zeros(1, 3, patch_size * num_patches, patch_size * num_patches)
        made = tower(image, output_hidden_states=True).hidden_states[-1].shape[1]
    assert num_image_tokens(tower.config, strategy) == made - (strategy == "default")
