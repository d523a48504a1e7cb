"""What a saved folder says in the words of transformers 4 as well as 5, and how stock tools batch with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from tiny_run import train_run

from vir_hf.errors import RecipeError
from vir_hf.llava.portable import make_portable, rope_in_old_words
from vir_hf.model.for_use import load_processor, load_run
from vir_hf.model.merging import merge_run
from vir_hf.model.projector_files import read_projector
from vir_hf.publishing.repository import write_repository

WEIGHTS = ("model.safetensors", "adapter_model.safetensors")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts whose language model turns otherwise than by default, whose answers differ, and with a tokenizer.model."""
    root = tmp_path_factory.mktemp("parts")
    rope = {"rope_type": "default", "rope_theta": 1e6}
    tiny.save_language_model(root / "lm", rope_parameters=rope, initializer_range=0.3)
    (root / "lm" / "tokenizer.model").write_bytes(b"sentencepiece")
    tiny.save_vision_tower(root / "tower")
    tiny.save_data(root)
    return root


@pytest.fixture(scope="module")
def outputs(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kind of folder that training, merging and pushing leave."""
    place = tmp_path_factory.mktemp("outputs")
    quick = {"training.max_steps": 2, "training.save_strategy": "steps", "training.save_steps": 1}
    lora = {"lora": "default", "trainable.language_model": "lora"}
    whole = train_run(parts, place / "whole", **quick)
    adapter = train_run(parts, place / "adapter", **quick, **lora)
    own = train_run(parts, place / "own", **quick, **{"model.projector_type": "mlp3x_gelu"})
    merged = merge_run(adapter, place / "merged").out
    old = Path(shutil.copytree(whole, place / "old"))
    shutil.move(old / "projector" / "projector.safetensors", old / "projector.safetensors")
    (old / "projector").rmdir()
    folders = {"whole": whole, "adapter": adapter, "own": own, "merged": merged, "base": adapter / "base"}
    folders |= {f"checkpoint of {name}": folders[name] / "checkpoint-1" for name in ("whole", "adapter", "own")}
    for name, run in {"whole": whole, "adapter": adapter, "own": own, "merged": merged, "old": old}.items():
        write_repository(run, place / f"push-{name}", "user/name")
        folders[f"pushed {name}"] = place / f"push-{name}"
    write_repository(adapter, place / "push-to-merge", "user/name", kind="merged")
    folders["pushed adapter, merged"] = place / "push-to-merge"
    folders["old"] = old
    return folders


def test_weights_have_no_other_weights_beside_them(outputs: dict[str, Path]) -> None:
    checked = 0
    for name, folder in outputs.items():
        if name == "old":
            continue
        for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            found = {path.name for path in place.glob("*.safetensors")}
            if found & {*WEIGHTS} or (place / "config.json").is_file():
                checked += 1
                assert len(found) == 1 and found <= {*WEIGHTS}, f"{name}: {found}"
    assert checked >= 16


@pytest.mark.parametrize("kind", ["whole", "adapter", "own", "old", "pushed whole", "pushed adapter", "pushed old"])
def test_a_projector_is_found_wherever_a_run_has_it(kind: str, outputs: dict[str, Path]) -> None:
    state, path = read_projector(outputs[kind])
    assert path.name == "projector.safetensors"
    assert state.keys() == load_file(path).keys() and all(value.dtype == torch.float32 for value in state.values())


def test_every_saved_config_is_read_alike_by_transformers_4(outputs: dict[str, Path]) -> None:
    for name, folder in outputs.items():
        if (folder / "config.json").is_file():
            config = read(folder / "config.json")
            assert config["text_config"]["rope_theta"] == 1e6, name
            assert config["torch_dtype"] == config["dtype"] == "float32"
        tokenizer = read(folder / "tokenizer_config.json")
        assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast", name
        assert not isinstance(tokenizer.get("extra_special_tokens"), list)
        assert tokenizer["padding_side"] == "left" and tokenizer["model_input_names"] == ["input_ids", "attention_mask"]
        assert "<image>" in [token["content"] for token in tokenizer["added_tokens_decoder"].values()]
        image_processor = read(folder / "preprocessor_config.json")
        assert image_processor["image_processor_type"] == "LlavaImageProcessor"
        assert (folder / "tokenizer.model").read_bytes() == b"sentencepiece", name


def test_special_tokens_of_a_tokenizer_are_a_list_for_one_major_and_no_mapping_for_the_other(tmp_path: Path) -> None:
    tokenizer = tiny.save_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<one>", "<two>"]})
    tokenizer.save_pretrained(tmp_path)
    assert read(tmp_path / "tokenizer_config.json")["extra_special_tokens"] == ["<one>", "<two>"]
    make_portable(tmp_path)
    make_portable(tmp_path)  # twice is harmless
    written = read(tmp_path / "tokenizer_config.json")
    assert written["additional_special_tokens"] == ["<one>", "<two>"] and "extra_special_tokens" not in written
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.extra_special_tokens == ["<one>", "<two>"] and again.get_vocab() == tokenizer.get_vocab()
    assert again("a <one>")["input_ids"] == tokenizer("a <one>")["input_ids"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), {"rope_theta": 5e5}),
        (
            transformers.Qwen2Config(
                rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6},
                max_position_embeddings=64,
            ),
            {
                "rope_theta": 1e6,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            },
        ),
        (transformers.PhiConfig(), {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
        (transformers.GPTNeoXConfig(), {"rotary_emb_base": 10000, "rotary_pct": 0.25}),
        (transformers.Gemma3TextConfig(), {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0}),
        (transformers.OPTConfig(), {}),
    ],
)
def test_a_rotary_embedding_is_said_in_the_words_of_both_majors(config: Any, expected: dict[str, Any]) -> None:
    values = config.to_dict()
    old = rope_in_old_words(values)
    assert old == expected
    again = type(config)(**{**values, **old})
    assert getattr(again, "rope_parameters", None) == getattr(config, "rope_parameters", None)


def test_stock_batches_and_the_pipeline_answer_as_one_by_one(outputs: dict[str, Path], parts: Path) -> None:
    folder = outputs["whole"]
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert processor.tokenizer.padding_side == "left"
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    images = [Image.open(path).convert("RGB") for path in sorted((parts / "images").glob("*.png"))] * 2
    questions = ["What is it?", "Sure?", "What is red? It is a square or a circle.", "Is it?"] * 3

    def answer(numbers: list[int]) -> list[str]:
        turns = [[{"type": "image"}, {"type": "text", "text": questions[number]}] for number in numbers]
        prompts = [
            processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
            for turn in turns
        ]
        shown = [images[number] for number in numbers]
        inputs = processor(images=shown, text=prompts, add_special_tokens=False, padding=True, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    single = [answer([number])[0] for number in range(12)]
    assert len(set(single)) > 4
    assert [text for start in (0, 4, 8) for text in answer(list(range(start, start + 4)))] == single
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in zip(images, questions, strict=True)
    ]
    by_pipeline = transformers.pipeline("image-text-to-text", model=model, processor=processor)(
        text=chats,
        batch_size=4,
        return_full_text=False,
        generate_kwargs={"max_new_tokens": 8, "do_sample": False},
    )
    texts = [(entry[0] if isinstance(entry, list) else entry)["generated_text"] for entry in by_pipeline]
    assert [text.strip() for text in texts] == [text.strip() for text in single]


def test_the_side_a_tokenizer_pads_on_does_not_change_what_is_trained(outputs: dict[str, Path], parts: Path) -> None:
    from vir_hf.batches.collator import LlavaDataCollator
    from vir_hf.data.sources import load_llava_dataset

    rows = load_llava_dataset(parts / "rows.json", parts / "images", decode_images=False)
    batches: list[dict[str, Any]] = []
    for padding_free in (True, False):
        for side in ("left", "right"):
            processor = load_processor(outputs["whole"])
            processor.tokenizer.padding_side = side
            collator = LlavaDataCollator(processor, max_length=256, padding_free=padding_free)
            batches.append(dict(collator([rows[number] for number in range(5)])))
        one, other = batches[-2:]
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


def test_a_pushed_adapter_over_parts_opens_as_one_model(
    outputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(outputs["pushed adapter"], tmp_path / "user" / "name"))
    monkeypatch.chdir(tmp_path)  # its adapter_config.json names the repository, here a folder of that name
    assert read(folder / "adapter_config.json")["base_model_name_or_path"] == "user/name"
    stock = transformers.AutoModelForImageTextToText.from_pretrained("user/name").eval()
    ours, processor = load_run(outputs["adapter"], device="cpu")
    prompt = "USER: <image>\nWhat is it? ASSISTANT:"
    inputs = processor(images=[Image.new("RGB", (30, 40), "red")], text=prompt, return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(stock(**inputs).logits, ours(**inputs).logits, atol=1e-5)
        base = transformers.AutoModelForImageTextToText.from_pretrained(outputs["base"]).eval()
        assert not torch.allclose(stock(**inputs).logits, base(**inputs).logits, atol=1e-5)


@pytest.fixture(scope="module")
def over_whole(parts: Path, outputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose base is a whole model in a folder elsewhere."""
    changes = {
        "lora": "default",
        "trainable.language_model": "lora",
        "training.max_steps": 1,
        "model.name_or_path": outputs["merged"],
        "model.language_model": "null",
        "model.vision_tower": "null",
    }
    return train_run(parts, tmp_path_factory.mktemp("over") / "run", **changes)


def test_an_adapter_over_a_base_of_this_machine_is_published_merged_or_not_at_all(
    over_whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="'merged', which lies in a folder of this machine.*Add --merged"):
        write_repository(over_whole, tmp_path / "out", "user/name")
    write_repository(over_whole, tmp_path / "whole", "user/name", kind="merged")
    assert not (tmp_path / "whole" / "adapter_config.json").exists()


def test_a_base_in_the_cache_of_the_hub_is_named_by_its_repository(over_whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(over_whole, tmp_path / "run"))
    snapshot = tmp_path / "hub" / "models--user--base" / "snapshots" / ("0" * 40)
    config = read(run / "adapter_config.json")
    (run / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(snapshot)}))
    write_repository(run, tmp_path / "out", "user/name")
    written = read(tmp_path / "out" / "adapter_config.json")
    assert (written["base_model_name_or_path"], written["revision"]) == ("user/base", "0" * 40)
    assert read(tmp_path / "out" / "base_fingerprint.json")["base"] == "user/base"
    assert 'from_pretrained("user/base")' in (tmp_path / "out" / "README.md").read_text()


def test_no_folder_of_the_machine_is_in_what_is_published(
    outputs: dict[str, Path], parts: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(outputs["whole"], tmp_path / "run"))
    metrics = read(run / "metrics.json")
    metrics["skipped_rows"] = [
        {"id": "1", "reason": "/data/secret/images/1.jpg: cannot be opened, see https://a.b/c/d"}
    ]
    metrics["masked_rows"] = {f"{parts}/images/2.jpg": 1}
    (run / "metrics.json").write_text(json.dumps(metrics))
    write_repository(run, tmp_path / "out", "user/name")
    written = read(tmp_path / "out" / "metrics.json")
    assert written["skipped_rows"][0]["reason"] == "1.jpg: cannot be opened, see https://a.b/c/d"
    assert written["masked_rows"] == {"2.jpg": 1}
    secret = [str(parts), str(tmp_path), "/data/secret"]
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert not [word for word in secret if word.encode() in path.read_bytes()], path


def test_the_card_of_a_projector_of_our_own_trusts_its_code_in_both_lines(outputs: dict[str, Path]) -> None:
    card = (outputs["pushed own"] / "README.md").read_text()
    assert 'AutoProcessor.from_pretrained("user/name", trust_remote_code=True)' in card
    assert 'AutoModelForImageTextToText.from_pretrained("user/name", trust_remote_code=True)' in card
