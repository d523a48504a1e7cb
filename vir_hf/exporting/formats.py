"""`vir-hf export`: a run in the words of another tool, written in one piece and proven before it gets its name."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vir_hf import files
from vir_hf.errors import RecipeError
from vir_hf.exporting.adapter import adapter_base, write_adapter
from vir_hf.exporting.llamacpp import write_gguf
from vir_hf.exporting.llamacpp_proof import prove_gguf
from vir_hf.exporting.original import write_original
from vir_hf.exporting.plain import Plain, plain_folder, saved_dtype, write_plain
from vir_hf.exporting.proof import LIMITS, QUESTION, Expected, Proof, expected_of, prove
from vir_hf.exporting.request import Request
from vir_hf.exporting.serving import check_for_vllm, vllm_version
from vir_hf.llava.configuration_llava import NATIVE_PROJECTOR_TYPE
from vir_hf.model.adapters import adapter_folder, base_of

FORMATS = {
    "transformers": "one plain model that stock transformers opens, an adapter merged into it",
    "adapter": "the adapter with its base and processor, opened by PEFT",
    "vllm": "a plain model, with what vLLM needs of it checked",
    "gguf": "language model and mmproj for llama.cpp, and a Modelfile for ollama",
    "llava": "the original LLaVA's layout",
}


@dataclass
class Exported:
    """What an export made: its files, the proofs it passed, and what a reader must know of it."""

    out: Path
    to: str
    files: list[str] = field(default_factory=list)
    proofs: list[Proof] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def export_run(request: Request, out: str | os.PathLike[str]) -> Exported:
    """Write a run in another tool's format; `out` appears whole and proven, or not at all.

    Raises:
        RecipeError: the format cannot express the run, the export does not answer as the run does, or `out` is taken.
    """
    if request.to not in FORMATS:
        raise RecipeError(f"--to {request.to}: unknown format; expected one of {', '.join(FORMATS)}.")
    target = Path(out)
    exported = Exported(target, request.to)
    with files.folder_in_one_piece(target) as staging:
        if request.to == "adapter":
            _adapter(request, staging, exported)
        elif request.to in ("transformers", "vllm"):
            _plain(request, staging, exported)
        else:
            _other(request, staging, exported)
    exported.files = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    return exported


def _other(request: Request, staging: Path, exported: Exported) -> None:
    """Formats that are written from a plain copy, which is gone before the proof."""
    with plain_folder(staging, request.run, **request.source) as plain:
        size, limit = _size(plain.folder), _limit(plain)
        if request.to == "llava":
            write_original(plain, staging, exported.out.resolve())
        else:
            write_gguf(plain, staging, request, exported.notes)
    if request.verify and request.to == "llava":
        reader = "the original LLaVA's sums on transformers' classes"
        exported.proofs.append(prove(staging, "llava", _expected(request, size), limit, reader=reader))
    elif request.verify:
        exported.proofs += prove_gguf(request, staging, exported.notes)


def _plain(request: Request, staging: Path, exported: Exported) -> None:
    write_plain(request.run, staging, **request.source)
    plain = Plain.read(staging)
    if plain.projector_type != NATIVE_PROJECTOR_TYPE:
        raise RecipeError(
            f"--to {request.to}: stock classes know one projector, {NATIVE_PROJECTOR_TYPE}; this model has "
            f"{plain.projector_type}, whose code goes with it. `vir-hf merge` and the run's own folder open with "
            "trust_remote_code=True."
        )
    if request.to == "vllm":
        check_for_vllm(plain)
    if not request.verify:
        return
    expected = _expected(request, _size(staging))
    exported.proofs.append(prove(staging, "transformers", expected, _limit(plain), reader="stock transformers"))
    if request.to == "vllm":
        version = vllm_version()
        if version is None:
            exported.notes.append("vLLM is not installed here: what it needs was checked, vLLM itself was not asked")
        else:
            more: dict[str, Any] = {"context": max(map(len, expected.input_ids)) + 64, "question": QUESTION}
            exported.proofs.append(prove(staging, "vllm", expected, _limit(plain), reader=f"vLLM {version}", **more))


def _adapter(request: Request, staging: Path, exported: Exported) -> None:
    adapter = adapter_folder(request.run, request.revision)
    if adapter is None:
        raise RecipeError(
            f"--to adapter: {request.run} is a whole model and holds no adapter. Export it --to transformers."
        )
    write_adapter(adapter, staging, exported.out.resolve(), request.base)
    base = adapter_base(staging) or base_of(adapter)[0]
    if request.verify:
        expected = _expected(request, _size(Path(base)) if Path(base).is_dir() else {})
        limit = LIMITS[expected.dtype]
        proof = prove(staging, "adapter", expected, limit, reader="stock transformers and PEFT", base=base)
        exported.proofs.append(proof)


def _expected(request: Request, size: dict[str, Any]) -> Expected:
    """What the run itself answers."""
    return expected_of(request.run, request.images, base=request.base, revision=request.revision, **size)


def _size(folder: Path) -> dict[str, Any]:
    """Number and dtype of a plain folder's weights, which decide in which dtype they are compared."""
    dtype = saved_dtype(str(folder))
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return {"num_parameters": num_bytes // dtype.itemsize, "dtype": dtype}


def _limit(plain: Plain) -> float:
    """By the dtype the weights are kept in: merging an adapter rounds to it."""
    dtype = json.loads((plain.folder / "config.json").read_text(encoding="utf-8")).get("dtype") or "float32"
    return LIMITS[str(dtype)]
