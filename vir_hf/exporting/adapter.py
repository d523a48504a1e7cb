"""An adapter that opens on any machine: with its processor, and with its base where that is in a folder of this machine."""

from __future__ import annotations

from pathlib import Path

from vir_hf import files
from vir_hf.llava.portable import make_portable
from vir_hf.model.adapters import BASE_FOLDER, base_of
from vir_hf.model.fingerprint import check_fingerprint
from vir_hf.model.for_use import load_processor, processor_place
from vir_hf.publishing.repository import copy_published, lead_to_base, name_base


def write_adapter(adapter: Path, folder: Path, place: Path, base: str | None = None) -> None:
    """Write an adapter, its processor and, if it lies in a folder, its base into a staging folder.

    Args:
        place: where the folder will lie, which the adapter's config names as the base's.
        base: where the base lies now, if it has been moved.

    Raises:
        RecipeError: the base has other weights than the adapter was trained on.
    """
    name, revision = (base, None) if base else base_of(adapter)
    check_fingerprint(adapter, name, revision, key="--base")
    copy_published(adapter, folder)
    if Path(name).is_dir():
        copy_published(Path(name), folder / BASE_FOLDER)
        make_portable(folder / BASE_FOLDER)
        lead_to_base(folder)
        name_base(folder, str(place), None)
    load_processor(processor_place(adapter, name), revision=revision).save_pretrained(folder)
    make_portable(folder)
    for leftover in ("trained_weights.safetensors", "made_from.json"):
        files.discard(folder / leftover)


def adapter_base(folder: Path) -> str | None:
    """Return the base inside an exported adapter; `None` if it is on the Hub."""
    base = folder / BASE_FOLDER
    return str(base.resolve()) if (base / "config.json").is_file() else None
