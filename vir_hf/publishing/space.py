"""The demo as a Space: one folder that needs nothing but its own requirements, and one commit."""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vir_hf import files
from vir_hf.errors import RecipeError
from vir_hf.publishing.hub import Published, check_access, check_repo_id, upload
from vir_hf.publishing.repository import check_folder
from vir_hf.recipe.files import packaged_directory


@dataclass(frozen=True)
class SpaceOptions:
    """What a Space shows and on what it runs; the limits stand in its `settings.json`.

    Attributes:
        model: the Hub id of a model or an adapter.
        base: a second model to compare with.
        zero_gpu: wrap the answers for ZeroGPU, and ask for its hardware.
        hardware: the Hub's word, such as `t4-small`.
    """

    model: str
    base: str | None = None
    title: str = ""
    load_in_4bit: bool = False
    zero_gpu: bool = False
    hardware: str | None = None


def write_space(folder: Path, options: SpaceOptions) -> None:
    """Write a Space that needs nothing but its own requirements: app, settings, requirements, README and our package.

    Raises:
        RecipeError: the model is no Hub id, gradio is not installed, or the folder is not empty.
    """
    for name in filter(None, (options.model, options.base)):
        if Path(name).exists() or name.count("/") != 1:
            raise RecipeError(
                f"{name!r}: a Space can only show what lies on the Hub. First: vir-hf push {name} USER/NAME"
            )
        check_repo_id(name)
    with files.folder_in_one_piece(folder) as staging:
        _write_space(staging, options)


def _write_space(folder: Path, options: SpaceOptions) -> None:
    source = packaged_directory("spaces")
    files.copy(source / "app.py", folder / "app.py")
    settings = {
        "model": options.model,
        "base": options.base,
        "title": options.title,
        "load_in_4bit": options.load_in_4bit,
        "zero_gpu": options.zero_gpu,
    }
    files.write_json(folder / "settings.json", settings)
    names = (source / "requirements.txt").read_text(encoding="utf-8").split()
    names += ["bitsandbytes"] if options.load_in_4bit else []
    pinned = [f"{name}=={installed_version(name)}" for name in sorted(names)]
    requirements = [*pinned, *(["spaces"] if options.zero_gpu else [])]
    files.write_text(folder / "requirements.txt", "\n".join(requirements) + "\n")
    readme = (
        (source / "README.md")
        .read_text(encoding="utf-8")
        .format(
            title=options.title or options.model.split("/")[-1],
            model=options.model,
            models="\n".join(f"- {name}" for name in (options.model, options.base) if name),
            gradio=installed_version("gradio"),
            python=f"{sys.version_info.major}.{sys.version_info.minor}",
        )
    )
    files.write_text(folder / "README.md", readme)
    package = Path(__file__).resolve().parents[1]
    for path in package.rglob("*.py"):
        part = path.relative_to(package)
        if part.parts[0] not in ("commands", "quickstart", "recipes", "accelerate_configs", "spaces"):
            files.copy(path, folder / "vir_hf" / part)
    check_folder(folder)


def installed_version(name: str) -> str:
    """Return the version a Space is pinned to: the one this was tried with, without the mark of a CPU build."""
    try:
        return importlib.metadata.version(name).split("+")[0]
    except importlib.metadata.PackageNotFoundError as error:
        raise RecipeError(
            f"{name}: is not installed, so no version of it can be written down: pip install {name}"
        ) from error


def push_space(
    repo_id: str,
    options: SpaceOptions,
    *,
    private: bool = False,
    update: bool = False,
    model_token: str | None = None,
    token: str | None = None,
) -> Published:
    """Create and fill a Space in one commit, and return where it is.

    Args:
        model_token: kept as the Space's secret `HF_TOKEN`, to read a private model; it is in no file.

    Raises:
        RecipeError: as `write_space` and `push_run`.
    """
    check_repo_id(repo_id)
    check_access(token)
    given: dict[str, Any] = {"space_sdk": "gradio"}
    hardware = "zero-a10g" if options.zero_gpu and not options.hardware else options.hardware
    if hardware:
        given["space_hardware"] = hardware
    if model_token:
        given["space_secrets"] = [{"key": "HF_TOKEN", "value": model_token}]
    with tempfile.TemporaryDirectory(prefix="vir-hf-space-") as temporary:
        folder = Path(temporary) / "space"
        write_space(folder, options)
        return upload(folder, repo_id, repo_type="space", private=private, update=update, token=token, space=given)
