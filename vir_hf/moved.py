"""Where modules lay in 0.1.0, before the package had rooms: scripts that import from there still find them, and are told."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old module -> where its contents are now, several where it was split.
MOVED = {
    "activations": "budget.activations",
    "adapters": "model.adapters",
    "archives": "images.archives",
    "audit": "model.audit",
    "card": "publishing.card",
    "changes": "budget.changes",
    "chat_layout": "rows.chat_layout",
    "check_fix": "curation.fix",
    "check_report": "curation.report",
    "checkpoints": "training.checkpoints",
    "checks": "curation.checks",
    "collator": "batches.collator",
    "compute": "budget.compute",
    "consolidated": "training.consolidated",
    "conversations": "rows.encoding rows.messages",
    "dataset_statistics": "data.statistics",
    "engine_check": "training.engine_check",
    "estimator": "budget.estimator",
    "evaluation": "using.evaluation",
    "exactness": "training.exactness",
    "features": "batches.features",
    "fingerprint": "model.fingerprint",
    "fused_head": "kernels.fused_head",
    "fused_lora": "kernels.fused_lora",
    "hardware": "budget.hardware",
    "html_pages": "curation.pages",
    "hub": "publishing.hub publishing.repository",
    "identity": "images.identity",
    "image_folder": "images.folder",
    "inspection": "curation.inspection",
    "interop": "model.projector_files",
    "known_configs": "model.known_configs",
    "language_models": "model.language_models",
    "launching": "training.launching",
    "layouts": "budget.layouts",
    "lean_layers": "kernels.lean_layers",
    "loading": "model.build model.for_use model.for_training model.precision model.parts",
    "memory": "budget.plan",
    "merging": "model.merging",
    "model_configs": "model.configs",
    "picture_check": "curation.image_check",
    "planning": "batches.planning",
    "preflight": "training.preflight",
    "prepare": "curation.prepare",
    "preprocessing": "images.preprocessing",
    "progress": "training.progress",
    "quantization": "model.quantization",
    "questions": "using.questions",
    "recipe_files": "recipe.files",
    "recipe_keys": "recipe.keys",
    "recipe_rules": "recipe.rules",
    "requirements": "recipe.requirements",
    "resampling": "images.resampling",
    "resume": "training.resume training.compatibility training.state training.ranks",
    "roomy": "kernels.roomy",
    "row_cache": "data.cache",
    "row_files": "rows.files",
    "row_keys": "rows.keys",
    "row_processor": "model.row_processor",
    "safeguards": "training.safeguards",
    "sampling": "batches.sampling",
    "scoring": "scores.matching",
    "shapes": "budget.shapes",
    "signals": "training.signals",
    "space": "publishing.space",
    "streaming": "batches.streaming",
    "templates": "rows.templates",
    "terminal": "curation.terminal",
    "trainable": "model.trainable",
    "trainer": "training.trainer training.step training.statistics training.arguments",
    "upstream": "recipe.upstream",
    "watch": "training.watch",
}


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `vir_hf.OLD` as the module that holds its contents now. Asked last: only where nothing else has the name."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return importlib.util.spec_from_loader(fullname, self) if package == "vir_hf" and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        names = [f"vir_hf.{name}" for name in MOVED[spec.name.rpartition(".")[2]].split()]
        warnings.warn(f"{spec.name} is now {' and '.join(names)}", DeprecationWarning, stacklevel=2)
        if len(names) > 1:
            parts = ModuleType(spec.name)
            parts.__getattr__ = _name_in(names)  # type: ignore[method-assign]
            return parts
        module = importlib.import_module(names[0])
        spec.loader_state = module.__spec__  # the import machinery is about to write `spec` over it
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to run: the module was imported under its own name."""
        if module.__spec__ is not None and module.__spec__.loader is self and module.__spec__.loader_state is not None:
            module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Let the old names be imported in this process."""
    sys.meta_path.append(_Moved())


def _name_in(modules: Sequence[str]) -> Callable[[str], Any]:
    """A `__getattr__` that looks into several modules, one after the other."""

    def lookup(name: str) -> Any:
        for module in () if name.startswith("__") else modules:
            found = vars(importlib.import_module(module)).get(name)
            if found is not None:
                return found
        raise AttributeError(f"{name!r} is in none of {', '.join(modules)}")

    return lookup


def names_of(*modules: str) -> Callable[[str], Any]:
    """The `__getattr__` of a room with the name of an old module: its names are looked up in those that took its place.

    Python asks here before it looks for a module of the room; those come first, or `modules` would be imported for each.
    """
    room, in_modules = modules[0].rpartition(".")[0], _name_in(modules)

    def lookup(name: str) -> Any:
        if name.startswith("__") or importlib.util.find_spec(f"{room}.{name}") is not None:
            raise AttributeError(f"{name!r} is no name of an old module")
        return in_modules(name)

    return lookup
