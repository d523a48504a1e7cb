"""Projector files of every origin: ours, a run's, an adapter's, llava-hf's and the original LLaVA's `mm_projector.bin`."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vir_hf.errors import RecipeError
from vir_hf.files import writing

if TYPE_CHECKING:
    from torch import nn

PROJECTOR_FILE = "projector.safetensors"
# In a folder of its own: vLLM, MLX-VLM and others read every *.safetensors that lies beside a model's weights.
PROJECTOR_PLACE = f"projector/{PROJECTOR_FILE}"
ORIGINAL_PROJECTOR_FILE = "mm_projector.bin"
_KEY = "model.pretrained_projector"
_OF_WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
# Files of a run that may hold a projector, the one that holds nothing else first.
_CANDIDATES = (
    PROJECTOR_PLACE,
    PROJECTOR_FILE,  # where earlier versions put it
    ORIGINAL_PROJECTOR_FILE,
    *_OF_WEIGHTS,
    "base/model.safetensors",
    "base/model.safetensors.index.json",
)
_WORDS = ("multi_modal_projector", "mm_projector")
# The original keeps its layers in an nn.Sequential: linear, activation, linear ...
_SEQUENTIAL = re.compile(r"^(\d+)\.(weight|bias)$")


def projector_of(model: nn.Module) -> nn.Module:
    """Return the projector that is in use: under PEFT the trained copy, not the one it started from."""
    inner: Any = model
    if hasattr(model, "get_base_model"):
        inner = inner.get_base_model()
    projector: nn.Module = inner.model.projector_in_use()
    return projector


def save_projector(model: nn.Module, folder: Path) -> Path:
    """Write `projector/projector.safetensors` (keys `linear_1.weight` ...), which `model.pretrained_projector` picks up."""
    return _write(projector_of(model).state_dict(), folder)


def load_projector(model: nn.Module, source: str | Path) -> None:
    """Put the weights of a projector file into a model that is not yet wrapped by PEFT.

    Args:
        source: a file or folder, see `read_projector`.

    Raises:
        RecipeError: no projector is found, or it is of another shape.
    """
    tensors, path = read_projector(source)
    put_projector(model, tensors, source, path)


def put_projector(model: nn.Module, tensors: dict[str, torch.Tensor], source: str | Path, path: Path) -> None:
    """Put weights into a model's projector, under our names or the original's, without a prefix.

    Args:
        source, path: what was named and the file they came from, for messages.

    Raises:
        RecipeError: they are of another shape.
    """
    expected = projector_of(model).state_dict()
    found = tensors if set(tensors) == set(expected) else _in_our_names(tensors)
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    wrong = [
        f"{name} {tuple(found[name].shape)}, expected {tuple(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    wrong += [f"missing {_shortly(missing)}"] * bool(missing) + [f"unknown {_shortly(unknown)}"] * bool(unknown)
    if wrong:
        raise RecipeError(
            f"{_KEY}={source}: {path.name} does not fit this model: {'; '.join(wrong[:3])}. It takes "
            f"{_shortly(sorted(expected))}; a weight is (output width, input width): the language model's hidden size and the "
            "vision tower's. Name the projector that was trained with these two parts and this model.projector_type."
        )
    with torch.no_grad():
        for name, value in expected.items():  # buffers, too
            value.copy_(found[name])


def read_projector(source: str | Path) -> tuple[dict[str, torch.Tensor], Path]:
    """Return a projector's weights by the names they have there, without the prefix, and the file they came from.

    Args:
        source: `projector.safetensors`, LLaVA's `mm_projector.bin`, any safetensors file with a projector in it, or a folder
            (a run, a checkpoint) that holds one of them.

    Raises:
        RecipeError: there is no such file, or no projector in it.
    """
    path = Path(source)
    if path.is_dir():
        inside = [path / name for name in _CANDIDATES if (path / name).is_file()]
        if not inside:
            raise RecipeError(
                f"{_KEY}={source}: the folder holds none of {', '.join(_CANDIDATES)}. Name the output directory of a pretrain "
                "run that has ended, or a projector file."
            )
    elif path.is_file():
        inside = [path]
    else:
        raise RecipeError(
            f"{_KEY}={source}: there is no such file or folder. Run the pretrain stage first (it writes {PROJECTOR_PLACE} into "
            "its training.output_dir), or name LLaVA's mm_projector.bin."
        )
    for candidate in inside:
        state = {_without_prefix(key): value for key, value in _projector_tensors(candidate).items()}
        if state:
            return state, candidate
    seen = [key for candidate in inside for key in _keys_of(candidate)]
    raise RecipeError(
        f"{_KEY}={source}: {', '.join(candidate.name for candidate in inside)} holds no projector, only {_shortly(seen)}. "
        f"Expected keys such as linear_1.weight, 0.weight, or some with {' or '.join(_WORDS)} in front; of another file name "
        f"{PROJECTOR_FILE} if it holds a projector of your own and nothing else."
    )


def _shortly(keys: list[str]) -> str:
    """A few keys for a message."""
    shown = ", ".join(key[:60] for key in keys[:4])
    return f"{shown} and {len(keys) - 4} more" if len(keys) > 4 else shown or "nothing"


def extract_projector(folder: Path) -> None:
    """Write `projector/projector.safetensors` for saved weights that hold a projector; for an adapter without one, nothing.

    From the files, not from memory: under ZeRO-3 and FSDP no process holds the whole projector.
    """
    for name in _OF_WEIGHTS:
        state = _projector_tensors(folder / name) if (folder / name).is_file() else {}
        if state:
            _write({_without_prefix(key): value for key, value in state.items()}, folder)


def _write(state: dict[str, torch.Tensor], folder: Path) -> Path:
    path = folder / PROJECTOR_PLACE
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with writing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    return path


def to_original(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a projector's weights under the original LLaVA's names, as `torch.save`d into `mm_projector.bin`.

    Raises:
        RecipeError: a projector of other layers than linear ones, which the original has no names for.
    """
    other = sorted(name for name in state if not re.fullmatch(r"linear_\d+\.(weight|bias)", name))
    if other:
        raise RecipeError(
            f"the original LLaVA knows projectors of linear layers alone (linear_1.weight ...), found {_shortly(other)}."
        )
    if {name.split(".")[0] for name in state} == {"linear_1"}:
        return {f"model.mm_projector.{name.split('.')[1]}": value for name, value in state.items()}
    return {
        f"model.mm_projector.{2 * (int(name.split('.')[0].removeprefix('linear_')) - 1)}.{name.split('.')[1]}": value
        for name, value in state.items()
    }


def _projector_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of the projector in a file, by the names they have there."""
    try:
        if path.suffix == ".json":
            shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            files = sorted({shard for key, shard in shards.items() if _is_projector(key)})
            return {key: value for file in files for key, value in _projector_tensors(path.with_name(file)).items()}
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as opened:
                keys = list(opened.keys())
                is_whole = path.name == PROJECTOR_FILE or _is_plain(keys)
                chosen = [key for key in keys if is_whole or _is_projector(key)]
                return {key: opened.get_tensor(key) for key in chosen}
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise RecipeError(f"{_KEY}: {path} cannot be read as a weights file: {error}") from error
    except pickle.UnpicklingError as error:
        raise RecipeError(
            f"{_KEY}: {path} is not a plain file of tensors, and only such are loaded, since a pickle can run code. Save the "
            "projector's state dict alone, best as safetensors."
        ) from error
    if not isinstance(state, dict):
        raise RecipeError(f"{_KEY}: {path} holds a {type(state).__name__}, expected a dictionary of tensors.")
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return {key: value for key, value in tensors.items() if _is_projector(key) or _is_plain(list(tensors))}


def _is_projector(key: str) -> bool:
    return any(word in key.split(".") for word in _WORDS)


def _is_plain(keys: list[str]) -> bool:
    """Whether a file holds nothing but the layers of one projector, without a prefix."""
    return all(re.fullmatch(r"(linear_\d\.|\d\.|)(weight|bias)", key) for key in keys)


def _without_prefix(key: str) -> str:
    """The name of a weight within its projector."""
    words = key.split(".")
    for word in _WORDS:
        if word in words:
            words = words[words.index(word) + 1 :]
    if words[:1] == ["modules_to_save"]:
        words = words[2:]  # modules_to_save.<adapter>
    return ".".join(words)


def _in_our_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The original's names, `0.weight`, `2.weight` ... or a bare `weight`, as `linear_1.weight` ...; others unchanged."""
    named = {}
    for name, value in state.items():
        numbered = _SEQUENTIAL.match(name)
        if numbered:
            name = f"linear_{int(numbered[1]) // 2 + 1}.{numbered[2]}"
        named[f"linear_1.{name}" if name in ("weight", "bias") else name] = value
    return named


def _keys_of(path: Path) -> list[str]:
    """The names of all tensors in a weights file that could be read."""
    if path.suffix == ".json":
        return list(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as opened:
            return list(opened.keys())
    return [str(key) for key in torch.load(path, map_location="cpu", weights_only=True)]
