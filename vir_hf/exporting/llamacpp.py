"""A model for llama.cpp and ollama: `model-TYPE.gguf`, `mmproj-TYPE.gguf` and a Modelfile."""

from __future__ import annotations

from pathlib import Path

from vir_hf import files
from vir_hf.errors import RecipeError
from vir_hf.exporting.gguf_file import gguf_package
from vir_hf.exporting.gguf_language import check_language_model, write_language_model
from vir_hf.exporting.gguf_vision import check_vision, how_squares_differ, write_mmproj
from vir_hf.exporting.modelfile import modelfile
from vir_hf.exporting.plain import Plain
from vir_hf.exporting.request import Request


def language_model_file(quantization: str) -> str:
    """Return the name of a language model's file."""
    return f"model-{quantization}.gguf"


def mmproj_file(quantization: str) -> str:
    """Return the name of the file of tower and projector, which is never smaller than 16 bit."""
    return f"mmproj-{'f32' if quantization == 'f32' else 'f16'}.gguf"


def write_gguf(plain: Plain, folder: Path, request: Request, notes: list[str]) -> None:
    """Write a plain model for llama.cpp into a staging folder.

    Args:
        notes: what a reader must know is added here.

    Raises:
        RecipeError: what llama.cpp cannot express, by name.
    """
    gguf_package()
    quantization = request.quantization
    check_language_model(plain)
    check_vision(plain, request.accepts_padding, request.accepts_class_token)
    write_language_model(plain, folder / language_model_file(quantization), quantization)
    write_mmproj(plain, folder / mmproj_file(quantization), quantization)
    tokenizer = plain.processor.tokenizer
    stops = [tokenizer.decode([stop]) for stop in _stop_ids(plain)]
    try:
        text = modelfile(
            tokenizer,
            plain.processor.chat_template,
            language_model_file(quantization),
            mmproj_file(quantization),
            stops,
        )
        files.write_text(folder / "Modelfile", text)
    except RecipeError as error:
        notes.append(f"no Modelfile for ollama: {error}")
    way = how_squares_differ(plain)
    if way is not None:
        notes.append(f"images that are no squares look different to llama.cpp: {way}")


def _stop_ids(plain: Plain) -> list[int]:
    from vir_hf.model.foreign import read_fields

    stops = read_fields(plain.folder, "generation_config.json").get("eos_token_id") or []
    own = plain.processor.tokenizer.eos_token_id
    return [stop for stop in ([stops] if isinstance(stops, int) else [*stops, own]) if stop is not None]
