"""`vir-hf data download-models`: what a recipe needs from the Hub, before the GPU is rented."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vir_hf.commands.outputs import add_json, add_overwrite, recipe_inputs, refuse_outputs, write_json
from vir_hf.errors import RecipeError
from vir_hf.recipe.load import RecipeArgumentParser, recipe_from

_EPILOG = """\
examples:
  vir-hf data download-models experiment=local_lite
  HF_HOME=/shared/cache vir-hf data download-models experiment=llava15_7b_lora

Weights come as safetensors where the repository has them. Everything goes into the Hub's own cache (HF_HOME), where
training finds it, also with HF_HUB_OFFLINE=1. Models that are folders on this machine are left alone.
"""
# What loading reads; a repository's copies for other frameworks are left out.
_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py"]


def main(argv: list[str]) -> int:
    """Download; return 0."""
    parser = RecipeArgumentParser(
        prog="vir-hf data download-models",
        description="Fetch the weights, tokenizer and processor a recipe needs.",
        epilog=_EPILOG,
    )
    add_json(parser, "what lies where")
    add_overwrite(parser)
    arguments = parser.parse_args(argv)
    recipe = recipe_from(arguments, require_data=False)
    inputs = recipe_inputs(recipe, arguments.recipe)
    refuse_outputs([("--json", arguments.json)], inputs, overwrite=arguments.overwrite)
    models = [fetch(name, revision) for name, revision in needed(recipe)]
    write_json(arguments.json, {"models": models})
    for model in models if arguments.json != "-" else ():
        print(f"{model['name']}: {model['num_bytes'] / 2**20:,.1f} MiB in {model['path']}")
    return 0


def needed(recipe: Any) -> list[tuple[str, str | None]]:
    """Return (name, revision) of every model, tokenizer and adapter the recipe loads by name."""
    model = recipe.model
    main_model = model.name_or_path or model.language_model
    names = [main_model, *([] if model.name_or_path else [model.vision_tower, model.tokenizer])]
    names += [model.adapter, model.pretrained_projector]
    found = {name: model.revision if name == main_model else None for name in names if name}
    if not found:
        raise RecipeError("model: the recipe names no model; set model.name_or_path, or the parts.")
    return list(found.items())


def fetch(name: str, revision: str | None) -> dict[str, Any]:
    """Download one repository's files that loading reads, or say that it is a folder here.

    Raises:
        RecipeError: it cannot be fetched.
    """
    if os.path.exists(name):
        return {"name": name, "path": os.path.abspath(name), "num_bytes": _num_bytes(Path(name)), "was_here": True}
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = HfApi().list_repo_files(name, revision=revision)
        weights = ["*.safetensors"] if any(file.endswith(".safetensors") for file in files) else ["*.bin"]
        path = snapshot_download(name, revision=revision, allow_patterns=[*_FILES, *weights])
    except Exception as error:  # HTTP, gating, offline mode, a full disk
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(
            f"{name}: cannot be fetched: {reason} Check the name and the connection; a gated repository needs its licence "
            "accepted on its page and `hf auth login`."
        ) from error
    return {"name": name, "path": path, "num_bytes": _num_bytes(Path(path)), "was_here": False}


def _num_bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
