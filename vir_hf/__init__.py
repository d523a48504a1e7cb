"""vir_hf: LLaVA-style visual instruction tuning, native to Hugging Face.

Importing it registers `LlavaConfig` and `LlavaForCausalLM` with transformers' Auto classes and does nothing else. Neither
torch nor transformers is imported for that: if transformers is not loaded yet, the registration waits for the moment its
Auto classes are. The public names below load their modules when first used.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "DataError": "vir_hf.errors",
    "LlavaConfig": "vir_hf.llava.configuration_llava",
    "LlavaDataCollator": "vir_hf.collator",
    "LlavaForCausalLM": "vir_hf.llava.modeling_llava",
    "LlavaProcessor": "vir_hf.llava.processing_llava",
    "RecipeError": "vir_hf.errors",
    "build": "vir_hf.loading",
    "encode_row": "vir_hf.conversations",
    "load_llava_dataset": "vir_hf.data",
    "open_image": "vir_hf.images",
    "to_messages": "vir_hf.conversations",
}
__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from vir_hf.collator import LlavaDataCollator
    from vir_hf.conversations import encode_row, to_messages
    from vir_hf.data import load_llava_dataset
    from vir_hf.errors import DataError, RecipeError
    from vir_hf.images import open_image
    from vir_hf.llava.configuration_llava import LlavaConfig
    from vir_hf.llava.modeling_llava import LlavaForCausalLM
    from vir_hf.llava.processing_llava import LlavaProcessor
    from vir_hf.loading import build


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vir_hf' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


# The last of transformers' Auto modules to be loaded: when it has run, all classes to register with exist.
_AUTO_MODULE = "transformers.models.auto.modeling_auto"


def _register() -> None:
    importlib.import_module("vir_hf.llava.registration").register()


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Runs the registration as soon as transformers' Auto classes have been imported, then removes itself."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != _AUTO_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _AUTO_MODULE in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterAfterImport())
