# SPDX-License-Identifier: Apache-2.0
"""A saved folder that every tool can read: transformers 4 and 5, vLLM, MLX-VLM and llama.cpp.

transformers 5 writes files that transformers 4 and the tools that pin it cannot read, or read as something else without a
word. What is written here says the same in the words of both; transformers 5 reads either. It works on files alone, so that
it can also mend a folder of an earlier version.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

# What transformers 4 calls a tokenizer that is read from tokenizer.json alone. transformers 5 takes it for its own.
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
# SentencePiece's own file, which llama.cpp reads where the embedding has more rows than the tokenizer has tokens.
SENTENCEPIECE_FILE = "tokenizer.model"
# State of the process that saved, no property of the tokenizer.
_OF_THE_PROCESS = ("is_local", "local_files_only", "name_or_path")
_OF_NO_SCALING = ("rope_theta", "partial_rotary_factor")
# Where transformers 4 looks for what is `rope_theta` and `partial_rotary_factor` elsewhere.
_ROPE_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}


def make_portable(folder: Path) -> None:
    """Make a folder that holds a model, an adapter or a processor readable for every tool; doing it twice is harmless."""
    make_config_portable(folder)
    make_processor_portable(folder)


def make_config_portable(folder: Path) -> None:
    """Write the rotary embedding and the dtype into `config.json` in transformers 4's words, too.

    Without them transformers 4 takes a `rope_theta` of 10,000 for every language model.
    """
    config = _read(folder / "config.json")
    if config is None:
        return
    if config.get("dtype"):
        config["torch_dtype"] = config["dtype"]
    text_config = config.get("text_config")
    if isinstance(text_config, dict):
        text_config.update(rope_in_old_words(text_config))
    _write(folder / "config.json", config)


def rope_in_old_words(text_config: dict[str, Any]) -> dict[str, Any]:
    """Return `rope_theta`, `rope_scaling` and their like for a language model's config that holds `rope_parameters`.

    A model whose layers turn differently (Gemma 3) has parameters for each kind of layer; transformers 4 has two names for
    their bases.
    """
    rope = text_config.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    if isinstance(rope.get("full_attention"), dict):
        names = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
        kinds = {name: rope.get(kind) for kind, name in names.items()}
        return {name: kind["rope_theta"] for name, kind in kinds.items() if kind and "rope_theta" in kind}
    names = _ROPE_NAMES.get(text_config.get("model_type", ""), {})
    old = {names.get(key, key): rope[key] for key in _OF_NO_SCALING if rope.get(key) is not None}
    if rope.get("rope_type", "default") != "default":
        old["rope_scaling"] = {key: value for key, value in rope.items() if key not in _OF_NO_SCALING}
    return old


def make_processor_portable(folder: Path) -> None:
    """Write tokenizer and image processor as transformers 4 reads them, and padding on the left, where generation needs it.

    Training does not pad with the tokenizer: the collator does.
    """
    config = _read(folder / "tokenizer_config.json")
    tokenizer = _read(folder / "tokenizer.json")
    if config is not None:
        for name in _OF_THE_PROCESS:
            config.pop(name, None)
        config["padding_side"] = "left"
        extra = config.get("extra_special_tokens")
        if isinstance(extra, list):  # transformers 4 wants a mapping under this name
            del config["extra_special_tokens"]
            config["additional_special_tokens"] = extra
        if tokenizer is not None:
            config["tokenizer_class"] = TOKENIZER_CLASS
            # transformers 4 would add token_type_ids, which no causal language model takes.
            config.setdefault("model_input_names", ["input_ids", "attention_mask"])
            config["added_tokens_decoder"] = {
                str(token["id"]): {key: value for key, value in token.items() if key != "id"}
                for token in tokenizer.get("added_tokens", [])
            }
        _write(folder / "tokenizer_config.json", config)
    processor = _read(folder / "processor_config.json")
    if processor is not None and isinstance(processor.get("image_processor"), dict):
        own = {"processor_class": processor.get("processor_class", "LlavaProcessor")}
        _write(folder / "preprocessor_config.json", {**processor["image_processor"], **own})


def name_processor_class(folder: Path, *, has_pinpoints: bool, has_tiles: bool, has_blocks: bool) -> None:
    """Name in `processor_config.json` the class that counts an image's tokens right, and put its code beside it if it is ours."""
    processor = _read(folder / "processor_config.json")
    if processor is None:
        return
    if not (has_tiles or has_blocks):
        processor.pop("pixel_shuffle", None)  # stock transformers counts right without it
        if has_pinpoints:
            processor["processor_class"] = "LlavaNextProcessor"
    else:
        processor["processor_class"] = "ViewsProcessor"
        processor["auto_map"] = {"AutoProcessor": "processing_views.ViewsProcessor"}
        if has_tiles:
            processor["image_processor"]["auto_map"] = {"AutoImageProcessor": "processing_views.TilesImageProcessor"}
        for name in ("processing_views.py", "views.py", "configuration_llava.py"):
            source = Path(__file__).with_name(name)
            (folder / name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    _write(folder / "processor_config.json", processor)


def keep_sentencepiece(tokenizer: Any, folder: Path) -> None:
    """Copy SentencePiece's own file from where a tokenizer was loaded, a folder or the Hub's cache; nothing if it has none."""
    name, target = str(getattr(tokenizer, "name_or_path", "") or ""), folder / SENTENCEPIECE_FILE
    if not name:
        return
    found: Any = Path(name) / SENTENCEPIECE_FILE
    if not Path(name).is_dir():
        found = getattr(tokenizer, "vocab_file", None)
        if not (isinstance(found, str) and Path(found).name == SENTENCEPIECE_FILE):
            found = try_to_load_from_cache(name, SENTENCEPIECE_FILE, revision=tokenizer.init_kwargs.get("_commit_hash"))
    if isinstance(found, (str, os.PathLike)) and Path(found).is_file() and not target.exists():
        shutil.copyfile(found, target)


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
