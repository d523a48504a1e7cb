"""The proof of GGUF files: read back on transformers' classes, and by llama.cpp itself where it is installed."""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import Any

from vir_hf.exporting.llamacpp import language_model_file, mmproj_file
from vir_hf.exporting.proof import QUESTION, Expected, Proof, expected_of, prove
from vir_hf.exporting.request import Request
from vir_hf.model.adapters import adapter_folder, base_of
from vir_hf.model.build import load_processor, processor_place
from vir_hf.rows.templates import adds_bos

MARKER = "<__media__>"
# As the limits of `proof`, by what large weights are kept in.
LIMITS = {"f32": 2e-2, "f16": 5e-2, "bf16": 2e-1, "q8_0": 3e-1, "q5_1": 1.0, "q5_0": 1.0, "q4_1": 2.0, "q4_0": 2.0}


def prove_gguf(request: Request, folder: Path, notes: list[str]) -> list[Proof]:
    """Open GGUF files with every reader at hand and compare logits and answers with the run's, on square images.

    Raises:
        RecipeError: one of them answers otherwise.
    """
    processor = _processor(request)
    expected = expected_of(request.run, request.images, base=request.base, revision=request.revision, square=True)
    limit = LIMITS[request.quantization]
    job: dict[str, Any] = {
        "language_model": language_model_file(request.quantization),
        "mmproj": mmproj_file(request.quantization),
        "image_token_id": processor.image_token_id,
        "context": max(map(len, expected.input_ids)) + 64,
    }
    proofs = [_read_back(folder, expected, limit, job)]
    if util.find_spec("llama_cpp") is None:
        notes.append("llama-cpp-python is not installed here: the files were read back, llama.cpp itself was not asked")
        return proofs
    turns = [{"role": "user", "content": f"{MARKER}\n{QUESTION}"}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    if adds_bos(processor.tokenizer):
        prompt = prompt.removeprefix(processor.tokenizer.bos_token)
    cases = [{"prompt": prompt, "answer_ids": ids} for ids in expected.answer_ids]
    proofs.append(prove(folder, "llama.cpp", expected, limit, reader="llama.cpp", **{**job, "cases": cases}))
    return proofs


def _read_back(folder: Path, expected: Expected, limit: float, job: dict[str, Any]) -> Proof:
    cases = [
        {"prompt": ids, "answer_ids": answer}
        for ids, answer in zip(expected.input_ids, expected.answer_ids, strict=True)
    ]
    return prove(folder, "gguf", expected, limit, reader="transformers' reader of GGUF", **{**job, "cases": cases})


def _processor(request: Request) -> Any:
    adapter = adapter_folder(request.run, request.revision)
    if adapter is None:
        return load_processor(processor_place(Path(request.run), request.run), revision=request.revision)
    base, revision = (request.base, None) if request.base else base_of(adapter)
    return load_processor(processor_place(adapter, str(base)), revision=revision)
