"""vir_hf: LLaVA-style visual instruction tuning, native to Hugging Face.

Importing it registers `LlavaConfig` and `LlavaForCausalLM` with transformers' Auto classes and does nothing else. In the
command itself the registration waits until a model is loaded. The public names load their modules when first used.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "DataError": "vir_hf.errors",
    "LlavaConfig": "vir_hf.llava.configuration_llava",
    "LlavaDataCollator": "vir_hf.batches.collator",
    "LlavaForCausalLM": "vir_hf.llava.modeling_llava",
    "LlavaProcessor": "vir_hf.llava.processing_llava",
    "RecipeError": "vir_hf.errors",
    "build": "vir_hf.model.build",
    "encode_row": "vir_hf.rows.encoding",
    "load_llava_dataset": "vir_hf.data.sources",
    "open_image": "vir_hf.images.opening",
    "to_messages": "vir_hf.rows.encoding",
}
__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from vir_hf.batches.collator import LlavaDataCollator
    from vir_hf.data.sources import load_llava_dataset
    from vir_hf.errors import DataError, RecipeError
    from vir_hf.images.opening import open_image
    from vir_hf.llava.configuration_llava import LlavaConfig
    from vir_hf.llava.modeling_llava import LlavaForCausalLM
    from vir_hf.llava.processing_llava import LlavaProcessor
    from vir_hf.model.build import build
    from vir_hf.rows.encoding import encode_row
    from vir_hf.rows.messages import to_messages


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vir_hf' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


def _is_command() -> bool:
    """Whether this process is `vir-hf` or `python -m vir_hf...`: it answers --help and a typo before torch is loaded."""
    words = sys.orig_argv[1:]
    if "-m" in words[:-1] and words[words.index("-m") + 1].split(".")[0] == "vir_hf":
        return True
    return any(Path(word).name in ("vir-hf", "vir-hf.exe") for word in words[:2])


importlib.import_module("vir_hf.moved").install()
if not _is_command():
    importlib.import_module("vir_hf.llava.registration").register()
