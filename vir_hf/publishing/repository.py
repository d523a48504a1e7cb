"""The folder that is pushed: what of a run belongs to it, without a path of this machine or a secret in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import yaml
from safetensors import safe_open

from vir_hf import files
from vir_hf.errors import RecipeError
from vir_hf.llava.portable import make_portable
from vir_hf.model.adapters import base_of
from vir_hf.model.fingerprint import FINGERPRINT_FILE
from vir_hf.model.projector_files import PROJECTOR_FILE, PROJECTOR_PLACE
from vir_hf.publishing.card import ASSETS, RunFacts, draw_loss_curve, is_hub_id, make_card

if TYPE_CHECKING:
    pass

# What a repository is made of; checkpoints, optimizer states, pickles and logs of a run are none of it.
_PUBLISHED = (
    "model*.safetensors",
    "adapter_model.safetensors",
    "trained_weights.safetensors",
    "*.json",
    "*.jinja",
    "*.py",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "recipe.yaml",
)
_REWRITTEN = ("recipe.yaml", "*.json")
_NOT_PUBLISHED = ("manifest.json", "position.json", "trainer_state.json", "samples.json")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
_ABSOLUTE = re.compile(r"(?:file://)?(?:/|~[\w-]*/|[A-Za-z]:[\\/]|\\\\)[^\s/\\][^\n]*")
_RELATIVE = re.compile(r"\.{1,2}[\\/]\S")
# A path within a sentence; an address is none.
_PATH_IN_TEXT = re.compile(r"(?<![\w:/.<>])(?:~|[A-Za-z]:)?(?:/[\w.@+~-]+){2,}/?")
_OF_THE_RUN = (
    "recipe.yaml",
    "metrics.json",
    "audit.json",
    "evaluation.json",
    FINGERPRINT_FILE,
    "adapter_config.json",
    "made_from.json",
)
_OF_THE_CACHE = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})")
_SECRETS = {
    "a Hugging Face token": re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})"),
    "an API key": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}|\bAKIA[0-9A-Z]{16}\b|\bxox[abp]-[\w-]{10,}|\bglpat-[\w-]{20,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a password or key": re.compile(
        r"""(?i)["']?(?:\w*(?:api|access|secret)_?key|password|passwd|(?:hub|auth|access)_token)["']?\s*[:=]\s*["']?(?!null|none|true|false)[^\s"',}]{8,}"""
    ),
}
_LARGEST_TEXT = 64 * 2**20


def check_run(run: Path, kind: str = "auto") -> None:
    """Raise unless the folder holds a model or an adapter, and the adapter that `kind` asks for."""
    if kind not in ("auto", "merged", "adapter"):
        raise ValueError(f"kind is auto, merged or adapter, got {kind!r}")
    if not run.is_dir():
        raise RecipeError(f"{run}: no such folder; expected the output directory of a run.")
    is_adapter = (run / "adapter_config.json").is_file()
    if not is_adapter and not (run / "config.json").is_file():
        raise RecipeError(
            f"{run}: holds neither a model nor an adapter; expected the output directory of a finished run."
        )
    if kind != "auto" and not is_adapter:
        raise RecipeError(f"{run}: is a whole model, so there is nothing to merge or leave out; drop --{kind}.")


def write_repository(
    run: Path,
    folder: Path,
    repo_id: str,
    *,
    kind: str = "auto",
    licence: str | None = None,
    samples_licence: str | None = None,
) -> RunFacts:
    """Write what will be published into a new folder, check it, and return what its card says. Opens no connection.

    Raises:
        RecipeError: as `push_run`, or a folder that is not empty.
    """
    check_run(run, kind)
    with files.folder_in_one_piece(folder) as staging:
        return _write_repository(run, staging, repo_id, kind=kind, licence=licence, samples_licence=samples_licence)


def _write_repository(
    run: Path, folder: Path, repo_id: str, *, kind: str, licence: str | None, samples_licence: str | None
) -> RunFacts:
    is_adapter = (run / "adapter_config.json").is_file()
    if is_adapter and kind == "merged":
        write_merged(run, folder)
        for name in ("recipe.yaml", "metrics.json", "evaluation.json"):
            if (run / name).is_file():
                files.copy(run / name, folder / name)
    else:
        base = _published_base(run, repo_id) if is_adapter else None
        copy_published(run, folder)
        _copy_projector(run, folder)
        if is_adapter and (run / "base" / "config.json").is_file():
            copy_published(run / "base", folder / "base")
            make_portable(folder / "base")
            lead_to_base(folder)
        if base is not None:
            name_base(folder, *base)
    make_portable(folder)
    _rewrite_paths(folder, run)
    facts = RunFacts.read(folder)
    facts.samples = RunFacts.read(run).samples
    if facts.metrics.get("loss_history"):
        files.write_bytes(folder / ASSETS / "loss.png", draw_loss_curve(facts.metrics["loss_history"]))
    if samples_licence is not None:
        _copy_samples(run, folder, facts)
    card = make_card(facts, repo_id, licence=licence, samples_licence=samples_licence)
    files.write_text(folder / "README.md", str(card))
    check_folder(folder, run)
    return facts


def _published_base(run: Path, repo_id: str) -> tuple[str, str | None]:
    """Return the Hub id and the revision under which an adapter's base will be found by whoever fetches the adapter.

    Raises:
        RecipeError: the base lies in a folder of this machine alone.
    """
    if (run / "base" / "config.json").is_file():
        return repo_id, None
    base, revision = base_of(run)
    cached = _OF_THE_CACHE.search(str(Path(base).absolute()))
    if cached:
        return f"{cached['owner']}/{cached['name']}", cached["commit"]
    if is_hub_id(base) or not (_ABSOLUTE.fullmatch(base) or _RELATIVE.match(base) or Path(base).exists()):
        return base, revision
    raise RecipeError(
        f"{run}: its adapter belongs to the base {Path(base).name!r}, which lies in a folder of this machine, so nobody else "
        "could open it; nothing was published. Add --merged, or train on a base that is on the Hub."
    )


def name_base(folder: Path, base: str, revision: str | None) -> None:
    """Write the base's Hub id into the files that name an adapter's base."""
    for file, key in (("adapter_config.json", "base_model_name_or_path"), (FINGERPRINT_FILE, "base")):
        path = folder / file
        if path.is_file():
            values = json.loads(path.read_text(encoding="utf-8"))
            files.write_text(path, files.as_json({**values, key: base, "revision": revision}))


def lead_to_base(folder: Path) -> None:
    """Let stock tools that look for the base beside the adapter find it in `base/`: its config, its code, and an index.

    `AutoModelForImageTextToText.from_pretrained(REPOSITORY)` loads what adapter_config.json names, which is this
    repository, and then the adapter. There is one copy of the weights.
    """
    base = folder / "base"
    for path in base.iterdir():
        if path.name in ("config.json", "generation_config.json") or path.suffix == ".py":
            files.copy(path, folder / path.name)
    index = base / "model.safetensors.index.json"
    if index.is_file():
        listing = json.loads(index.read_text(encoding="utf-8"))
    else:
        weights = base / "model.safetensors"
        with safe_open(weights, "pt") as opened:
            listing = {
                "metadata": {"total_size": weights.stat().st_size},
                "weight_map": dict.fromkeys(opened.keys(), weights.name),
            }
    listing["weight_map"] = {key: f"base/{name}" for key, name in listing["weight_map"].items()}
    files.write_text(folder / index.name, files.as_json(listing))


def write_merged(run: Path, folder: Path) -> None:
    """Write an adapter merged into its base, in the base's own precision, with its processor."""
    from vir_hf.model.merging import merge_run

    files.take_out(merge_run(run, folder / ".merged").out, folder)


def copy_published(source: Path, target: Path) -> None:
    """Put the files of a run that a repository is made of into another folder; weights without a second copy of them."""
    for pattern in _PUBLISHED:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.name not in _NOT_PUBLISHED:
                _link_or_copy(path, target / path.name)


def _copy_projector(run: Path, folder: Path) -> None:
    """Put the projector's own file where no reader takes it for weights of the model; earlier versions had it beside them."""
    source = next((run / name for name in (PROJECTOR_PLACE, PROJECTOR_FILE) if (run / name).is_file()), None)
    if source is not None:
        _link_or_copy(source, folder / PROJECTOR_PLACE)


def _link_or_copy(source: Path, target: Path) -> None:
    """Put a file there without copying gigabytes where the disk allows it; small ones are copied, to be rewritten."""
    if source.suffix == ".safetensors":
        files.link_or_copy(source, target)
    else:
        files.copy(source, target)


def _copy_samples(run: Path, folder: Path, facts: RunFacts) -> None:
    if not facts.samples:
        raise RecipeError(f"{run}: has no samples.json, so there are no sample pictures to include.")
    for sample in facts.samples:
        source = run / str(sample["image"])
        if not source.resolve().is_relative_to(run.resolve()) or not source.is_file():
            raise RecipeError(f"{run}/samples.json: the picture {sample['image']!r} does not lie in the run's folder.")
        files.copy(source, folder / ASSETS / "samples" / source.name)
    listed = [{**sample, "image": Path(str(sample["image"])).name} for sample in facts.samples]
    files.write_json(folder / ASSETS / "samples" / "samples.json", listed)  # the demo's examples


def _rewrite_paths(folder: Path, run: Path) -> None:
    """Replace every path of this machine in recipe and JSON files by its last part: names are kept, folders are not."""
    places = sorted({str(place) for place in (run, run.resolve(), Path.cwd(), Path.home())}, key=len, reverse=True)
    here = [place for place in places if len(Path(place).parts) > 1 and Path(place).is_absolute()]

    def rewritten(value: Any, is_ours: bool) -> Any:
        if isinstance(value, Mapping):
            return {rewritten(key, is_ours): rewritten(item, is_ours) for key, item in value.items()}
        if isinstance(value, list):
            return [rewritten(item, is_ours) for item in value]
        if not isinstance(value, str):
            return value
        if is_ours and ": " in value:  # a message, such as "FILE: cannot be opened"
            return ": ".join(rewritten(part, is_ours) for part in value.split(": "))
        if _ABSOLUTE.fullmatch(value) or (is_ours and (_RELATIVE.match(value) or _is_path_here(value))):
            return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
        if is_ours:  # a message that names a file
            for place in here:
                value = re.sub(re.escape(place) + r"(?=/)[^\s:'\"]*/", "", value)
            value = _PATH_IN_TEXT.sub(lambda found: found[0].rstrip("/").split("/")[-1], value)
        return value

    for pattern in _REWRITTEN:
        for path in folder.rglob(pattern):
            if path.name in _VOCABULARIES or path.name.endswith(".index.json"):
                continue
            text = path.read_text(encoding="utf-8")
            is_yaml = path.suffix == ".yaml"
            value = yaml.safe_load(text) if is_yaml else json.loads(text)
            changed = rewritten(value, path.name in _OF_THE_RUN)
            if changed != value:
                head = "".join(line + "\n" for line in text.splitlines() if line.startswith("#")) if is_yaml else ""
                body = yaml.safe_dump(changed, sort_keys=False) if is_yaml else json.dumps(changed, indent=2) + "\n"
                files.write_text(path, head + body)


def _is_path_here(value: str) -> bool:
    """Whether a word with a folder in it names something on this machine, and so is none of the Hub's names."""
    return "/" in value and len(value) < 1000 and "\n" not in value and "://" not in value and Path(value).exists()


def check_folder(folder: Path, run: Path | None = None) -> None:
    """Raise if anything to be published holds a secret, or a path or the name of a folder of this machine.

    Raises:
        RecipeError: the first file and line, what was found in words (never the secret itself), and the remedy.
    """
    places = [Path.home(), Path.cwd(), folder.resolve(), *([run.resolve()] if run else [])]
    here = [f"{place}/" for place in places if len(place.parts) > 1]
    token = huggingface_hub.get_token()
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(folder)
        text = _text_of(path)
        if text is None:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            what = next((what for what, pattern in _SECRETS.items() if pattern.search(line)), None)
            if token and token in line:
                what = "your Hugging Face token"
            if what and path.name not in _VOCABULARIES:
                raise RecipeError(
                    f"{name} line {number}: holds {what}; nothing was published. Remove it from the run, and renew it."
                )
            if any(place in line for place in here):
                raise RecipeError(
                    f"{name} line {number}: names a folder of this machine; nothing was published. Take it out."
                )
        if path.suffix in (".json", ".yaml") and path.name not in _VOCABULARIES:
            value = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
            for found in _strings(value):
                if _ABSOLUTE.fullmatch(found):
                    raise RecipeError(
                        f"{name}: holds the path {found!r} of this machine; nothing was published. Take it out."
                    )


def _text_of(path: Path) -> str | None:
    """Return a text file's text, and of weights their header, which is text too; `None` for pictures."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return file.read(min(size, _LARGEST_TEXT)).decode("utf-8", "replace")
    if path.suffix in (".png", ".jpg", ".jpeg", ".model") or path.stat().st_size > _LARGEST_TEXT:
        return None
    return path.read_text(encoding="utf-8", errors="replace")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
