"""A tokenizer as llama.cpp reads it: its tokens, how they are joined, and how a text is cut before.

llama.cpp knows a byte-level tokenizer's way of cutting by a name; what a tokenizer.json says decides which, and one that
no name stands for is refused, since a text would become other tokens than in training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vir_hf.errors import RecipeError
from vir_hf.exporting.plain import Plain
from vir_hf.llava.portable import SENTENCEPIECE_FILE
from vir_hf.rows.templates import adds_bos

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a tokenizer.json cuts a text -> llama.cpp's name for it.
_CUTS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (rf"(?i:{_WORDS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}", "bytes"): "llama-bpe",
    (rf"(?i:{_WORDS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_REST}", "bytes"): "qwen2",
}
# The same cut as llama-bpe's; that one takes a word that is a token whole, before any merge.
_WITH_MERGES = {"llama-bpe": "smaug-bpe"}
_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0


def add_tokenizer(writer: Any, plain: Plain, num_rows: int) -> None:
    """Add the keys of a tokenizer to a GGUF writer.

    Args:
        num_rows: of the embedding table; rows without a token are filled with unused ones.

    Raises:
        RecipeError: more tokens than rows, or a tokenizer that llama.cpp has no words for.
    """
    tokenizer = plain.processor.tokenizer
    if len(tokenizer) > num_rows:
        raise RecipeError(
            f"{plain.folder}: its tokenizer has {len(tokenizer)} tokens and its embedding {num_rows} rows, so they do not belong "
            "together. Put the tokenizer there that the model was trained with."
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = state["model"].get("type")
    if kind == "BPE" and _is_sentencepiece(state):
        _add_sentencepiece(writer, plain, state, num_rows)
    elif kind == "BPE":
        _add_byte_level(writer, state, tokenizer, num_rows)
    else:
        raise _refused(f"its tokenizer is of the kind {kind}, not BPE")
    for name in ("bos", "eos", "unk", "pad"):
        token_id = getattr(tokenizer, f"{name}_token_id")
        if token_id is not None:
            getattr(writer, f"add_{name}_token_id")(int(token_id))
    end = _end_of_turn(plain)
    if end is not None:
        writer.add_eot_token_id(end)
    # llama.cpp takes away a BOS that a template writes, and puts one there itself where this says so.
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(False)
    if plain.processor.chat_template:
        writer.add_chat_template(plain.processor.chat_template)


def _refused(why: str) -> RecipeError:
    return RecipeError(f"--to gguf: llama.cpp cannot express this model: {why}. Export it --to transformers or vllm.")


def _end_of_turn(plain: Plain) -> int | None:
    path = plain.folder / "generation_config.json"
    stops = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    stops = [stops] if isinstance(stops, int) else stops or []
    own = plain.processor.tokenizer.eos_token_id
    return next((int(stop) for stop in stops if stop != own), None)


def _tokens(state: dict[str, Any], num_rows: int) -> tuple[list[str], list[int]]:
    """Tokens by id and llama.cpp's types of them."""
    from gguf import TokenType

    texts, kinds = [f"[PAD{number}]" for number in range(num_rows)], [int(TokenType.UNUSED)] * num_rows
    for text, number in state["model"]["vocab"].items():
        texts[number], kinds[number] = text, int(TokenType.NORMAL)
    for added in state["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        texts[added["id"]], kinds[added["id"]] = added["content"], int(kind)
    return texts, kinds


def cut_of(state: dict[str, Any]) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer.json cuts a text.

    Raises:
        RecipeError: it has none.
    """
    step = state.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    words: list[str] = []
    for number, part in enumerate(steps):
        kind = part.get("type")
        if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            words.append(part["pattern"].get("Regex", ""))
        elif kind == "Digits" and part.get("individual_digits"):
            words.append("Digits")
        elif kind == "ByteLevel" and not part.get("add_prefix_space") and number == len(steps) - 1:
            words.append("ByteLevel" if part.get("use_regex", True) else "bytes")
        else:
            words.append(f"{kind} with other settings")
    normalizer = (state.get("normalizer") or {}).get("type")
    name = _CUTS.get(tuple(words))
    # llama.cpp leaves a text as it is: composed letters (NFC) are what nearly every text holds already.
    if name is None or normalizer not in (None, "NFC"):
        raise _refused(f"it has no name for how its tokenizer cuts a text ({' then '.join(words)[:120]}, {normalizer})")
    return _WITH_MERGES.get(name, name) if name == "llama-bpe" and not state["model"].get("ignore_merges") else name


def _add_byte_level(writer: Any, state: dict[str, Any], tokenizer: Any, num_rows: int) -> None:
    texts, kinds = _tokens(state, num_rows)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut_of(state))
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)


def _is_sentencepiece(state: dict[str, Any]) -> bool:
    """Whether a BPE model works on `▁` and byte tokens, as Llama 2's does."""
    return bool(state["model"].get("byte_fallback"))


def _add_sentencepiece(writer: Any, plain: Plain, state: dict[str, Any], num_rows: int) -> None:
    from gguf import TokenType

    texts, kinds = _tokens(state, num_rows)
    scores = _scores(plain.folder / SENTENCEPIECE_FILE, state, texts)
    unknown = state["model"].get("unk_token")
    for number, text in enumerate(texts):
        if kinds[number] == TokenType.NORMAL and text.startswith("<0x") and len(text) == 6:
            kinds[number] = int(TokenType.BYTE)
        elif text == unknown:
            kinds[number] = int(TokenType.UNKNOWN)
        elif kinds[number] in (TokenType.CONTROL, TokenType.USER_DEFINED):
            scores[number] = _ADDED_SCORE
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(True)


def _scores(model_file: Path, state: dict[str, Any], texts: list[str]) -> list[float]:
    """Scores by id: SentencePiece's own, or by the order of merges, which is the order of scores."""
    scores = [_UNUSED_SCORE] * len(texts)
    if model_file.is_file():
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=str(model_file))
        for number in range(min(pieces.get_piece_size(), len(texts))):
            scores[number] = float(pieces.get_score(number))
        return scores
    vocabulary = state["model"]["vocab"]
    for number in vocabulary.values():
        scores[number] = 0.0
    for rank, pair in enumerate(state["model"]["merges"]):
        number = vocabulary["".join(pair.split(" ") if isinstance(pair, str) else pair)]
        if scores[number] == 0.0:
            scores[number] = -float(rank + 1)
    return scores
