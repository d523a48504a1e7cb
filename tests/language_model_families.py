"""Every causal language model of the installed transformers: its config made small, and the table of which fit.

python tests/language_model_families.py     # judges all of them and writes docs/language-models.md; some minutes
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "language-models.md"
BEGIN, END = "<!-- made by tests/language_model_families.py -->", "<!-- end -->"

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# What a config lacks as transformers fills it in, without which its class cannot be built.
_NEEDED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "hunyuan_v1_dense": {"head_dim": 64, "num_key_value_heads": 8},
    "hunyuan_v1_moe": {"head_dim": 64, "num_key_value_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 10 + ["conv", "conv"]},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
}
# Settings that published models of a family have and its default config has not: such ones decide.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "granitemoe": {"logits_scaling": 6.0, "embedding_multiplier": 12.0},
    "granitemoeshared": {"logits_scaling": 6.0, "embedding_multiplier": 12.0},
    "granitemoehybrid": {"logits_scaling": 6.0, "embedding_multiplier": 12.0},
    "hyperclovax": {"logits_scaling": 0.5},
    "falcon_h1": {"lm_head_multiplier": 0.04, "embedding_multiplier": 5.6},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * 10 + ["conv", "conv"], "full_attn_idxs": None},
    "gemma4_text": {"final_logit_softcapping": 30.0},
    "gemma4_unified_text": {"final_logit_softcapping": 30.0},
    "olmo2": {"tie_word_embeddings": False},
}


def family_config(model_type: str) -> PretrainedConfig:
    """A family's config in full size."""
    return AutoConfig.for_model(model_type, **_NEEDED.get(model_type, {}), **_PUBLISHED.get(model_type, {}))


def verdict(model_type: str) -> str:
    """What the table says of a family: `packed`, `padded: WHY` or `refused: WHY`."""
    from vir_hf.errors import RecipeError
    from vir_hf.model.language_models import judge_language_model

    try:
        config = family_config(model_type)
    except Exception as error:
        return f"refused: its config cannot be made ({type(error).__name__})"
    try:
        fit = judge_language_model(config, "NAME")
    except RecipeError as error:
        reason = str(error).removeprefix("model.language_model=NAME: ").split(" Choose another language model;")[0]
        return f"refused: {reason.rstrip('.')}"
    return "packed" if fit.not_packed_because is None else f"padded: {fit.not_packed_because.rstrip('.')}"


def save_family(folder: Path, model_type: str) -> Path:
    """A small language model of this family, with the settings that decide, and its tokenizer."""
    from vir_hf.model.language_models import smaller_config

    tokenizer = tiny.save_tokenizer(folder)
    fields = smaller_config(family_config(model_type)).to_dict()
    fields = {
        name: 0.0 if "drop" in name and isinstance(value, float) else value  # two passes with dropout differ by chance
        for name, value in fields.items()
        if name != "model_type"
    }
    fields |= {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if "vocab_size_per_layer_input" in fields:
        fields["vocab_size_per_layer_input"] = len(tokenizer)
    config = type(family_config(model_type)).from_dict(fields)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():  # wide enough for attention to matter
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.08)
        elif parameter.ndim == 1:
            parameter.data += torch.randn_like(parameter) * 0.05
    model.save_pretrained(folder)
    return folder


def read_table(text: str) -> tuple[str, dict[str, str]]:
    """The version of transformers a table was made with, and what it says of each family."""
    body = text.split(BEGIN)[1].split(END)[0]
    version = re.search(r"transformers (\S+):", body)
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", body, re.MULTILINE)
    return (version[1] if version else ""), {name: said.strip() for name, said in rows}


def table(verdicts: dict[str, str]) -> str:
    """The table in Markdown."""
    kinds = [said.split(":")[0] for said in verdicts.values()]
    counts = {kind: kinds.count(kind) for kind in ("packed", "padded", "refused")}
    lines = [
        BEGIN,
        f"Of the {len(verdicts)} families in transformers {transformers.__version__}: {counts['packed']} packed, "
        f"{counts['padded']} padded, {counts['refused']} refused.",
        "",
        "| family (`model_type`) | |",
        "|---|---|",
        *(f"| `{name}` | {said.replace('|', '/')} |" for name, said in sorted(verdicts.items())),
        END,
    ]
    return "\n".join(lines)


def main() -> int:
    """Judge every family and write the table."""
    verdicts = {}
    for name in FAMILIES:
        verdicts[name] = verdict(name)
        print(name, verdicts[name][:120], flush=True)
    text = DOCUMENT.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    DOCUMENT.write_text(before + table(verdicts) + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
