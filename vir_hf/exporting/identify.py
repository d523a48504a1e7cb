"""What a checkpoint is, which tools open it as it stands, and which export makes the others do so."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vir_hf import files
from vir_hf.errors import RecipeError
from vir_hf.exporting.gguf_language import check_language_model
from vir_hf.exporting.gguf_vision import check_vision
from vir_hf.exporting.original import check_original
from vir_hf.exporting.plain import Plain
from vir_hf.exporting.serving import check_for_vllm
from vir_hf.llava.configuration_llava import NATIVE_PROJECTOR_TYPE, LlavaConfig
from vir_hf.model.adapters import ADAPTER_CONFIG, base_of
from vir_hf.model.fingerprint import fingerprint_of, read_record
from vir_hf.model.foreign import LAYOUTS, layout_of_folder, read_fields
from vir_hf.model.projector_files import read_projector

TOOLS = ("transformers 5", "transformers 4.57", "PEFT", "vLLM", "llama.cpp, ollama", "original LLaVA")


@dataclass(frozen=True)
class Opening:
    """Whether a tool opens a checkpoint as it stands, and how, or what makes it do so."""

    tool: str
    opens: bool
    how: str


@dataclass
class Findings:
    """What is known of a checkpoint.

    Attributes:
        what: one sentence.
        facts: language model, tower, projector, template, dtype.
        fingerprints: of base, adapter and projector, where there are such.
    """

    checkpoint: str
    what: str
    facts: dict[str, str] = field(default_factory=dict)
    openings: list[Opening] = field(default_factory=list)
    fingerprints: dict[str, str] = field(default_factory=dict)


def identify(checkpoint: str) -> Findings:
    """Return what a folder is, from its files alone: no weights are loaded.

    Raises:
        RecipeError: it is no folder, or holds no checkpoint.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise RecipeError(
            f"doctor: {checkpoint} is no folder. Expected a checkpoint, or a recipe: experiment=NAME data.data_path=FILE. One "
            f"on the Hub is fetched by `hf download {checkpoint} --local-dir DIR`."
        )
    layout = layout_of_folder(folder)
    if layout is not None:
        return _of_another_project(checkpoint, layout)
    if list(folder.glob("*.gguf")):
        openings = [
            Opening(
                tool,
                tool.startswith("llama.cpp"),
                "" if tool.startswith("llama.cpp") else "export the run itself to it",
            )
            for tool in TOOLS
        ]
        return Findings(checkpoint, "GGUF files for llama.cpp and ollama", openings=openings)
    if (folder / ADAPTER_CONFIG).is_file():
        return _adapter(folder)
    kind = read_fields(folder).get("model_type")
    if kind not in ("llava", LlavaConfig.model_type):
        raise RecipeError(
            f"doctor: {checkpoint} holds no vision-language model that is known here (model type {kind!r}). Expected a run, an "
            "adapter, a model saved by save_pretrained, or a checkpoint that vir-hf import reads."
        )
    plain = Plain.read(folder)
    is_native = plain.projector_type == NATIVE_PROJECTOR_TYPE
    what = (
        "a whole model in llava-hf's layout"
        if is_native
        else f"a whole model with a projector of our own, {plain.projector_type}"
    )
    findings = Findings(checkpoint, what, _facts(plain), _whole(plain, is_native))
    findings.fingerprints = {"weights": str(fingerprint_of(str(folder))), "projector": projector_fingerprint(folder)}
    return findings


def _of_another_project(checkpoint: str, layout: str) -> Findings:
    remedy = f"vir-hf import {checkpoint} OUT"
    openings = [Opening(tool, False, remedy) for tool in TOOLS]
    if layout.startswith("llava"):
        openings[-1] = Opening(TOOLS[-1], True, "llava.model.builder.load_pretrained_model")
    return Findings(checkpoint, LAYOUTS[layout], openings=openings)


def _facts(plain: Plain) -> dict[str, str]:
    vision = plain.vision
    return {
        "language model": f"{plain.text['model_type']}, {plain.text['num_hidden_layers']} layers of {plain.text['hidden_size']}",
        "vision tower": f"{vision['model_type']}, {vision['image_size']} pixels, patches of {vision['patch_size']}, "
        f"layers {plain.feature_layers}",
        "projector": plain.projector_type,
        "squares": plain.image_aspect_ratio,
        "template": plain.processor.template,
        "dtype": str(plain.fields.get("dtype") or plain.fields.get("torch_dtype") or "float32"),
    }


def _whole(plain: Plain, is_native: bool) -> list[Opening]:
    place = plain.folder
    by_code = "trust_remote_code=True"
    openings = [Opening(TOOLS[0], True, "AutoModelForImageTextToText" + ("" if is_native else f" with {by_code}"))]
    tokenizer = read_fields(place, "tokenizer_config.json").get("tokenizer_class")
    has_old_words = "rope_theta" in plain.text or "rotary_emb_base" in plain.text or "rope_parameters" not in plain.text
    is_portable = is_native and has_old_words and tokenizer != "TokenizersBackend"
    old = "AutoModelForImageTextToText" if is_portable else f"vir-hf export {place} --to transformers OUT"
    openings.append(Opening(TOOLS[1], is_portable, old if is_native else "no: its code needs transformers 5"))
    openings.append(Opening(TOOLS[2], False, "it holds no adapter"))
    try:
        check_for_vllm(plain)
        openings.append(Opening(TOOLS[3], True, "vllm serve"))
    except RecipeError:
        remedy = f"vir-hf export {place} --to vllm OUT" if is_native else "no: it knows the two-layer projector alone"
        openings.append(Opening(TOOLS[3], False, remedy))
    return [*openings, *_by_export(plain, str(place))]


def _by_export(plain: Plain, run: str) -> list[Opening]:
    """Tools that read another format than ours: whether they can be given it."""
    found = []
    for tool, to in ((TOOLS[4], "gguf"), (TOOLS[5], "llava")):
        try:
            if to == "llava":
                check_original(plain)
            else:
                check_language_model(plain)
                check_vision(plain, accepts_padding=False)
            found.append(Opening(tool, False, f"vir-hf export {run} --to {to} OUT"))
        except RecipeError as error:
            found.append(Opening(tool, False, f"no: {str(error).partition(': ')[2]}"))
    return found


def _adapter(folder: Path) -> Findings:
    base, revision = base_of(folder)
    findings = Findings(str(folder), f"an adapter over {base}")
    record = read_record(folder)
    findings.fingerprints["base, as the adapter remembers it"] = str(record.get("fingerprint"))
    findings.fingerprints["base, as it lies there now"] = str(fingerprint_of(base, revision))
    weights = [path for path in folder.glob("adapter_model.*") if path.is_file()]
    findings.fingerprints["adapter"] = ", ".join(f"sha256:{files.sha256(path)}" for path in weights)
    findings.fingerprints["projector"] = projector_fingerprint(folder)
    by_export = f"vir-hf export {folder} --to"
    plain = Plain.read(Path(base)) if (Path(base) / "config.json").is_file() else None
    is_native = plain is None or plain.projector_type == NATIVE_PROJECTOR_TYPE
    merged = f"{by_export} transformers OUT" if is_native else f"vir-hf merge {folder} --out OUT"
    findings.openings = [
        Opening(TOOLS[0], True, "AutoModelForImageTextToText of the base, then PEFT"),
        Opening(TOOLS[1], is_native, "AutoModelForImageTextToText of the base, then PEFT" if is_native else merged),
        Opening(TOOLS[2], True, "PeftModel.from_pretrained(base, FOLDER)"),
        Opening(
            TOOLS[3], False, f"{by_export} vllm OUT" if is_native else "no: it knows the two-layer projector alone"
        ),
    ]
    if plain is None:
        findings.openings += [
            Opening(tool, False, f"{by_export} {to} OUT") for tool, to in zip(TOOLS[4:], ("gguf", "llava"), strict=True)
        ]
    else:
        findings.facts = _facts(plain)
        findings.openings += _by_export(plain, str(folder))
    return findings


def projector_fingerprint(folder: Path) -> str:
    """Return `"sha256:..."` of a projector's weights, wherever in a folder they lie; equal weights have the same."""
    try:
        tensors, _ = read_projector(folder)
    except RecipeError:
        return "none"
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].float().contiguous()
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(value.numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def as_block(versions: dict[str, Any]) -> str:
    """Return versions and hardware as one block to paste into a report."""
    lines = [f"{name}: {value}" for name, value in versions.items() if value is not None]
    return "\n".join(["```", *lines, "```"])
