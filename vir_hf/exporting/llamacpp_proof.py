"""The proof of GGUF files: read back on transformers' classes, and by llama.cpp itself where it is installed."""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import Any

import torch

from vir_hf.exporting.gguf_file import gguf_package, kept_as
from vir_hf.exporting.llamacpp import language_model_file, mmproj_file
from vir_hf.exporting.proof import QUESTION, Expected, Proof, expected_of, prove
from vir_hf.exporting.request import Request
from vir_hf.model.adapters import adapter_folder, base_of
from vir_hf.model.for_use import load_processor, processor_place
from vir_hf.model.merging import merge_adapter
from vir_hf.rows.templates import adds_bos

MARKER = "<__media__>"
# As the limits of `proof`. llama.cpp's GELU is the tanh one, and in a 16 bit file the tower is 16 bit.
LIMITS = {"f32": 2e-2, "f16": 5e-2}
_LIMIT_16_BIT = 1e-1
# llama.cpp keeps keys and values in 16 bit, and beside block-quantised weights rounds what they are multiplied with to 8 bit.
_LIMIT_ENGINE, _LIMIT_ENGINE_8_BIT = 1e-1, 5e-1


def prove_gguf(request: Request, folder: Path, notes: list[str]) -> list[Proof]:
    """Open GGUF files with every reader at hand and compare logits and answers with the run's, on square images.

    Raises:
        RecipeError: one of them answers otherwise.
    """
    processor = _processor(request)
    kept = request.quantization

    def prepare(model: Any) -> Any:
        return rounded(model, kept)

    options: dict[str, Any] = {"base": request.base, "revision": request.revision, "square": True}
    expected = expected_of(request.run, request.images, prepare=prepare, **options)
    if kept not in LIMITS:
        exact = expected_of(request.run, request.images, **options)
        notes.append(_cost(exact, expected, kept))
    limit = LIMITS.get(kept, _LIMIT_16_BIT)
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
    limit = _LIMIT_ENGINE if kept in ("f32", "f16", "bf16") else _LIMIT_ENGINE_8_BIT
    proofs.append(prove(folder, "llama.cpp", expected, limit, reader="llama.cpp", **{**job, "cases": cases}))
    return proofs


def rounded(model: Any, quantization: str) -> Any:
    """Return a run's model with its adapter merged and the language model's matrices rounded as a GGUF keeps them."""
    if hasattr(model, "merge_and_unload"):  # PEFT's
        model = merge_adapter(model)
    gguf = gguf_package()
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    for name, weight in model.named_parameters():
        is_kept_exactly = quantization == "f32" or weight.ndim < 2 or "vision_tower" in name or "projector" in name
        if not is_kept_exactly and not (tied and name.startswith("lm_head")):
            kept = gguf.GGMLQuantizationType[kept_as(quantization, weight.shape[-1]).upper()]
            stored = gguf.quants.quantize(weight.detach().float().cpu().numpy(), kept)
            weight.data = torch.from_numpy(gguf.quants.dequantize(stored, kept)).to(weight.data)
    return model


def _cost(exact: Expected, kept: Expected, quantization: str) -> str:
    """What rounding the weights alone does to the answers; no fault of the file, and for the user to judge."""
    distances = [
        float(((ours[0] - theirs[0]).abs().max() / ours[0].std()).nan_to_num(nan=float("inf")))
        for ours, theirs in zip(exact.logits, kept.logits, strict=True)
    ]
    equal = sum(one == other for one, other in zip(exact.answers, kept.answers, strict=True))
    return (
        f"rounding to {quantization} itself moves the first logits by up to {max(distances):.2g} of their spread and leaves "
        f"{equal} of {len(distances)} greedy answers as they were"
    )


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
