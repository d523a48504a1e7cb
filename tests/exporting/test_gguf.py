"""GGUF files hold the run's weights, bit for bit where the type can, under llama.cpp's names; what it cannot is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vir_hf.errors import RecipeError
from vir_hf.exporting import gguf_language, gguf_tokenizer, proof, witness
from vir_hf.exporting.formats import export_run
from vir_hf.exporting.gguf_file import read_gguf
from vir_hf.exporting.gguf_vision import check_vision, how_squares_differ, mmproj_tensors
from vir_hf.exporting.modelfile import modelfile
from vir_hf.exporting.plain import Plain
from vir_hf.exporting.request import Request
from vir_hf.model.build import build
from vir_hf.rows.templates import chat_template_for

gguf = pytest.importorskip("gguf")
FAMILIES = ("llama", "tied llama", "qwen2", "qwen3")


def save_language_model(folder: Path, family: str) -> None:
    if "llama" in family:
        rope = {"rope_type": "default", "rope_theta": 5e5}
        tiny.save_language_model(folder, tie_word_embeddings=family != "llama", rope_parameters=rope)
        return
    tokenizer = tiny.save_tokenizer(folder)
    config_class, model_class = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[
        family
    ]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"head_dim": 16} if family == "qwen3" else {}
    config = config_class(
        **sizes, **more, vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, eos_token_id=2, bos_token_id=1, pad_token_id=3,
    )  # fmt: skip
    model = model_class(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder)


def save_siglip(folder: Path) -> None:
    torch.manual_seed(1)
    size = {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14
    )
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessorPil(size=size).save_pretrained(folder)


@pytest.fixture(scope="module")
def models_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole model of each family, with CLIP, and one with SigLIP."""
    root = tmp_path_factory.mktemp("models")
    tiny.save_vision_tower(root / "clip")
    save_siglip(root / "siglip")
    found = {}
    for family in FAMILIES:
        save_language_model(root / family / "lm", family)
        model, processor = build(str(root / family / "lm"), str(root / "clip"), "vicuna_v1")
        model.save_pretrained(root / family / "out")
        processor.save_pretrained(root / family / "out")
        found[family] = root / family / "out"
    model, processor = build(str(root / "llama" / "lm"), str(root / "siglip"), "vicuna_v1")
    model.save_pretrained(root / "with siglip")
    processor.save_pretrained(root / "with siglip")
    return found | {"with siglip": root / "with siglip"}


@pytest.fixture(scope="module")
def exports(models_of: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("exports")
    for family, model in models_of.items():
        request = Request(
            run=str(model),
            to="gguf",
            verify=False,
            quantization="f32",
            accepts_padding=family == "with siglip",
            accepts_class_token=True,
        )
        export_run(request, place / family)
    return {family: place / family for family in models_of}


@pytest.mark.parametrize("family", FAMILIES)
def test_another_reader_finds_every_weight_of_the_language_model(
    family: str, models_of: dict[str, Path], exports: dict[str, Path]
) -> None:
    folder = exports[family]
    keys, _ = read_gguf(folder / "model-f32.gguf")
    assert keys["general.architecture"] == family.split()[-1]
    config = AutoConfig.from_pretrained(folder, gguf_file="model-f32.gguf")
    if family == "qwen3":  # the width of a head is not read
        config.head_dim = keys["qwen3.attention.key_length"]
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model-f32.gguf", config=config)
    plain = Plain.read(models_of[family])
    state, compared = model.state_dict(), 0
    for name, value in plain.tensors.items():
        if name.startswith("language_model."):
            compared += 1
            assert torch.equal(state[name.removeprefix("language_model.")], value), name
    assert compared >= 20
    assert model.config.rope_parameters["rope_theta"] == plain.text["rope_parameters"]["rope_theta"]
    assert ("output.weight" in read_gguf(folder / "model-f32.gguf")[1]) == (family != "tied llama")


@pytest.mark.parametrize("family", ["llama", "with siglip"])
def test_mmproj_holds_the_layers_that_are_read_and_says_what_clip_cpp_needs(
    family: str, models_of: dict[str, Path], exports: dict[str, Path]
) -> None:
    keys, tensors = read_gguf(exports[family] / "mmproj-f32.gguf")
    plain = Plain.read(models_of[family])
    tower = "vision_tower.vision_model."
    pairs = {
        "v.position_embd.weight": f"{tower}embeddings.position_embedding.weight",
        "v.patch_embd.weight": f"{tower}embeddings.patch_embedding.weight",
        "v.blk.1.attn_out.bias": f"{tower}encoder.layers.1.self_attn.out_proj.bias",
        "v.blk.0.ffn_up.weight": f"{tower}encoder.layers.0.mlp.fc1.weight",
        "v.blk.0.ffn_down.weight": f"{tower}encoder.layers.0.mlp.fc2.weight",
        "v.blk.1.ln2.weight": f"{tower}encoder.layers.1.layer_norm2.weight",
        "mm.0.weight": "multi_modal_projector.linear_1.weight",
        "mm.2.bias": "multi_modal_projector.linear_2.bias",
    }
    for theirs, ours in pairs.items():
        assert torch.equal(tensors[theirs], plain.tensors[ours]), theirs
    assert set(tensors) == set(mmproj_tensors(plain))
    assert not any(
        name.startswith(("v.blk.2.", "v.post_ln")) for name in tensors
    )  # the layer that is not read, and its norm
    assert ("v.class_embd" in tensors) == ("v.pre_ln.weight" in tensors) == (family == "llama")
    assert keys["clip.projector_type"] == "mlp" and keys["clip.vision.block_count"] == 2
    assert keys["clip.vision.feature_layer"] == [2] and keys["clip.vision.projection_dim"] == 32
    assert keys["clip.use_gelu"] == (family == "with siglip") and not keys["clip.use_silu"]
    assert keys["clip.vision.image_mean"] == pytest.approx(plain.processor.image_processor.image_mean)


def test_large_weights_are_rounded_and_small_ones_are_not(models_of: dict[str, Path], tmp_path: Path) -> None:
    export_run(
        Request(run=str(models_of["llama"]), to="gguf", verify=False, quantization="q8_0", accepts_class_token=True),
        tmp_path / "out",
    )
    kinds = {
        tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out" / "model-q8_0.gguf").tensors
    }
    assert (
        kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == "Q8_0"
        and kinds["blk.0.attn_norm.weight"] == "F32"
    )
    _, found = read_gguf(tmp_path / "out" / "model-q8_0.gguf")
    weight = Plain.read(models_of["llama"]).tensors["language_model.model.layers.0.mlp.up_proj.weight"]
    step = weight.reshape(-1, 32).abs().amax(1, keepdim=True) / 127
    error = (found["blk.0.ffn_up.weight"] - weight).reshape(-1, 32).abs()
    assert 0 < float(error.max()) and bool((error <= 0.57 * step).all())


def test_the_tokenizer_is_written_whole(models_of: dict[str, Path], exports: dict[str, Path]) -> None:
    keys, tensors = read_gguf(exports["llama"] / "model-f32.gguf")
    plain = Plain.read(models_of["llama"])
    tokenizer = plain.processor.tokenizer
    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == "gpt-2"
    tokens = keys["tokenizer.ggml.tokens"]
    assert len(tokens) == tensors["token_embd.weight"].shape[0] > len(tokenizer)
    assert all(tokens[number] == text for text, number in tokenizer.get_vocab().items())
    assert keys["tokenizer.ggml.token_type"][tokenizer.convert_tokens_to_ids("<image>")] == gguf.TokenType.CONTROL
    assert keys["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED
    assert (
        keys["tokenizer.ggml.add_bos_token"] is True and keys["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    )
    assert keys["tokenizer.chat_template"] == plain.processor.chat_template


LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(*steps: Any) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    return state


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
        ([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
        (
            [pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)],
            "smaug-bpe",
        ),
        (
            [
                pre_tokenizers.Split(Regex(LLAMA_3.replace("{1,3}", "")), "isolated"),
                pre_tokenizers.ByteLevel(False, use_regex=False),
            ],
            "qwen2",
        ),
        ([pre_tokenizers.Split(Regex(r"\d+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)], None),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], None),
        ([pre_tokenizers.Whitespace()], None),
    ],
)
def test_the_way_a_text_is_cut_has_llama_cpps_name_or_is_refused(steps: list[Any], name: str | None) -> None:
    state = byte_level(*steps)
    if name is None:
        with pytest.raises(RecipeError, match="no name for how its tokenizer cuts"):
            gguf_tokenizer.cut_of(state)
        return
    assert gguf_tokenizer.cut_of(state) == name
    if name == "smaug-bpe":
        assert gguf_tokenizer.cut_of({**state, "model": {**state["model"], "ignore_merges": True}}) == "llama-bpe"
    lowercase = {"type": json.loads(normalizers.Lowercase().__getstate__())["type"]}
    with pytest.raises(RecipeError, match="Lowercase"):
        gguf_tokenizer.cut_of({**state, "normalizer": lowercase})


def test_merges_of_a_sentencepiece_tokenizer_become_scores_in_their_order(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "aba": 4}
    state = {"model": {"vocab": vocabulary, "merges": [["a", "b"], ["ab", "a"]]}}
    scores = gguf_tokenizer._scores(tmp_path / "tokenizer.model", state, ["<unk>", "a", "b", "ab", "aba", "[PAD5]"])
    assert scores == [0.0, 0.0, 0.0, -1.0, -2.0, -10000.0]


def test_llama_3_factors_are_those_of_transformers() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=rope, max_position_embeddings=512)
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / (5e5 ** (torch.arange(0, 32, 2, dtype=torch.float64) / 32))
    factors = gguf_language.llama3_factors({"hidden_size": 64, "num_attention_heads": 2, "rope_parameters": rope})
    assert factors is not None and torch.allclose((plain / factors).float(), slowed, rtol=1e-5)
    assert float(factors.max()) == 8.0 and float(factors.min()) == 1.0


def test_a_window_bounds_the_context() -> None:
    assert gguf_language.context_length({"max_position_embeddings": 100, "sliding_window": None}) == 100
    assert gguf_language.context_length({"max_position_embeddings": 100, "sliding_window": 40}) == 40
    text = {"max_position_embeddings": 100, "sliding_window": 40, "use_sliding_window": False}
    assert gguf_language.context_length(text) == 100


def with_fields(plain: Plain, **changes: Any) -> Plain:
    fields = json.loads(json.dumps(dict(plain.fields)))
    for place, value in changes.items():
        part, _, key = place.partition("__")
        if key:
            fields[part][key] = value
        else:
            fields[part] = value
    return Plain(plain.folder, fields, plain.tensors, plain.processor)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"projector_type": "linear"}, "two layers with GELU between them; this one is linear"),
        ({"projector_type": "mlp3x_gelu"}, "this one is mlp3x_gelu"),
        ({"projector_hidden_act": "relu"}, "this one relu"),
        ({"vision_config__hidden_act": "relu"}, "no activation 'relu'"),
        ({"vision_feature_select_strategy": "full"}, "always drops CLIP's class token"),
        ({"vision_feature_layer": [-1, -2]}, "reads a tower's layers in their order"),
        ({"text_config__model_type": "gemma2"}, "this one is 'gemma2'"),
        ({"text_config__hidden_act": "gelu"}, "this one gelu"),
        ({"text_config__rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn'"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused_by_name(
    changes: dict[str, Any], words: str, models_of: dict[str, Path]
) -> None:
    plain = with_fields(Plain.read(models_of["llama"]), **changes)
    with pytest.raises(RecipeError, match=words):
        gguf_language.check_language_model(plain)
        check_vision(plain, accepts_padding=True, accepts_class_token=True)


def test_a_clip_tower_is_refused_for_todays_llama_cpp(models_of: dict[str, Path]) -> None:
    plain = Plain.read(models_of["llama"])
    with pytest.raises(RecipeError, match="misreads every CLIP tower"):
        check_vision(plain, accepts_padding=True)
    check_vision(plain, accepts_padding=False, accepts_class_token=True)


def test_how_it_pads_is_refused_unless_it_is_accepted(models_of: dict[str, Path]) -> None:
    plain = Plain.read(models_of["with siglip"])
    with pytest.raises(
        RecipeError, match=r"it pads with \(122, 116, 104\), this model was trained with \(127, 127, 127\)"
    ):
        check_vision(plain, accepts_padding=False)
    check_vision(plain, accepts_padding=True)
    assert how_squares_differ(Plain.read(models_of["llama"])) is None
    plain.processor.image_processor.do_pad = False
    assert "trained with 'crop'" in str(how_squares_differ(plain)) or "trained with 'resize'" in str(
        how_squares_differ(plain)
    )


def test_the_modelfile_says_what_the_chat_template_writes(tmp_path: Path) -> None:
    tokenizer = tiny.save_tokenizer(tmp_path)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    text = modelfile(
        tokenizer, chat_template_for("vicuna_v1", tokenizer), "model.gguf", "mmproj.gguf", ["</s>", "</s>"]
    )
    assert text.splitlines()[:3] == [
        "FROM ./model.gguf",
        "FROM ./mmproj.gguf",
        'TEMPLATE """{{ if .System }}{{ .System }} {{ end }}USER: {{ .Prompt }} ASSISTANT:{{ .Response }}</s>"""',
    ]
    assert text.count('PARAMETER stop "</s>"') == 1 and 'SYSTEM """A chat between a curious user' in text
    chatml = modelfile(tokenizer, chat_template_for("chatml", tokenizer), "m", "p", [])
    assert (
        "{{ .System }}</s>\n{{ end }}<|im_start|>user\n{{ .Prompt }}</s>\n<|im_start|>assistant\n{{ .Response }}</s>"
        in chatml
    )
    with pytest.raises(RecipeError, match="a second turn otherwise than a first one"):
        modelfile(tokenizer, chat_template_for("llama_2", tokenizer), "m", "p", [])


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("family", ["with siglip"])
def test_llama_cpp_answers_as_the_run_does(
    family: str, quantization: str, models_of: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr(
        proof, "_run_witness", lambda job, reader: witness.main(json.loads(job.read_text(encoding="utf-8")))
    )
    request = Request(run=str(models_of[family]), to="gguf", quantization=quantization, accepts_padding=True)
    read_back, asked = export_run(request, tmp_path / "out").proofs
    assert asked.reader == "llama.cpp" and asked.num_images == 3
    assert asked.difference < (0.02 if quantization == "f32" else 0.1) and read_back.difference < 0.1


def test_without_the_package_it_says_how_to_install_it(
    models_of: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RecipeError, match=r"vir-hf\[export\]"):
        export_run(Request(run=str(models_of["llama"]), to="gguf"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
