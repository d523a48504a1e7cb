"""A run -> one folder fit to publish -> one commit on the Hub. The folder can be looked at first; nothing else is sent."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import huggingface_hub
import yaml
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import safe_open

from vir_hf import files
from vir_hf.errors import RecipeError
from vir_hf.llava.portable import make_portable
from vir_hf.model.adapters import base_of
from vir_hf.model.fingerprint import FINGERPRINT_FILE
from vir_hf.model.projector_files import PROJECTOR_FILE, PROJECTOR_PLACE
from vir_hf.publishing.card import ASSETS, TAG, RunFacts, draw_loss_curve, is_hub_id, make_card

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class Published:
    """Where a run lies now: `url` of the repository, `commit` on its main branch."""

    url: str
    commit: str


def push_run(
    run: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    kind: str = "auto",
    licence: str | None = None,
    samples_licence: str | None = None,
    update: bool = False,
    token: str | None = None,
) -> Published:
    """Publish a run: its weights, processor, recipe, metrics and card, in one commit.

    Until the commit the repository is empty; what was sent before a cut is not sent again.

    Args:
        kind: `auto` (what the run holds), `merged` (an adapter merged into its base) or `adapter`.
        licence: of the model, as the Hub writes it.
        samples_licence: of the run's sample pictures; without it they are left out.
        update: replace what the repository holds, even if it is no work of ours.
        token: in place of the one logged in with.

    Raises:
        RecipeError: no run, a secret or a path of this machine in it, or a Hub that does not take it; says what to do.
    """
    check_repo_id(repo_id)
    check_run(Path(run), kind)
    check_access(token)  # before minutes are spent on merging
    with tempfile.TemporaryDirectory(prefix="vir-hf-push-") as temporary:
        folder = Path(temporary) / "repository"
        write_repository(Path(run), folder, repo_id, kind=kind, licence=licence, samples_licence=samples_licence)
        return upload(folder, repo_id, private=private, update=update, token=token)


def name_for(recipe: Recipe) -> str:
    """Return where `training.push_to_hub` publishes: `training.hub_model_id`, or the output directory's name, as ours.

    Raises:
        RecipeError: not logged in, or no name the Hub takes. Asked before training, so that no run ends with it.
    """
    name = recipe.training.hub_model_id or Path(recipe.training.output_dir).resolve().name
    user = check_access()
    repo_id = name if "/" in name else f"{user}/{name}"
    check_repo_id(repo_id)
    return repo_id


def check_repo_id(repo_id: str) -> None:
    """Raise unless a name is `user/name`, as the Hub takes it."""
    try:
        huggingface_hub.utils.validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise ValueError("it has no owner")
    except ValueError as error:
        raise RecipeError(
            f"{repo_id!r} is no name on the Hub: {str(error).rstrip('.')}. Expected USER/NAME or ORGANISATION/NAME."
        ) from error


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


def check_access(token: str | None = None) -> str:
    """Return the name the Hub knows us by.

    Raises:
        RecipeError: no token, a token the Hub does not know, or a Hub that cannot be reached.
    """
    with explained("the Hub"):
        name: str = huggingface_hub.HfApi(token=token).whoami()["name"]
        return name


def upload(
    folder: Path,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool = False,
    update: bool = False,
    token: str | None = None,
    space: Mapping[str, Any] | None = None,
) -> Published:
    """Send a checked folder to the Hub in one commit, with progress bars; run again after a cut, it goes on.

    Args:
        update: replace what lies there even if it does not come from vir_hf.
        space: further arguments of `create_repo`: `space_sdk`, `space_hardware`, `space_secrets`.

    Raises:
        RecipeError: as `explained`; or a name that is taken by something else.
    """
    api = huggingface_hub.HfApi(token=token)
    with explained(repo_id):
        _check_name(api, repo_id, repo_type, private, update)
        created = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, **(space or {}))
        message = f"Upload {'the Space' if repo_type == 'space' else 'the model'} with vir_hf"
        commit = api.upload_folder(
            repo_id=repo_id, repo_type=repo_type, folder_path=folder, commit_message=message, delete_patterns=["*"]
        )
    return Published(str(created), commit.oid)


def _check_name(api: huggingface_hub.HfApi, repo_id: str, repo_type: str, private: bool, update: bool) -> None:
    try:
        info = api.repo_info(repo_id, repo_type=repo_type)
    except RepositoryNotFoundError:
        return
    if private and not info.private:
        raise RecipeError(f"{repo_id}: exists and is public; make it private on the Hub first, or leave out --private.")
    files = {file.rfilename for file in info.siblings or []}
    if update or files <= {".gitattributes"}:  # new, or left empty by a push that was cut
        return
    tags: list[str] = []
    if "README.md" in files:
        card = Path(api.hf_hub_download(repo_id, "README.md", repo_type=repo_type))
        tags = huggingface_hub.RepoCard(card.read_text(encoding="utf-8")).data.to_dict().get("tags") or []
    if TAG not in tags:
        raise RecipeError(
            f"{repo_id}: the name is taken, by a repository of {len(files)} files that vir_hf did not make. Choose another "
            "name, or add --update to replace what is there."
        )


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn what the Hub or the network answers into a `RecipeError` that says what happened, what is left, what to do."""
    nothing = "Nothing is visible there; run the same command again, and what has arrived is not sent again."
    try:
        yield
    except (HfHubHTTPError, httpx2.TransportError, OSError, RuntimeError) as error:
        cause = _cause_of(error)
        if isinstance(cause, OfflineModeIsEnabled):
            said = "the Hub is switched off (HF_HUB_OFFLINE=1); unset it to publish."
        elif isinstance(cause, LocalTokenNotFoundError):
            said = "not logged in. Run `hf auth login` or set HF_TOKEN, with a token that may write."
        elif isinstance(cause, HfHubHTTPError):
            said = _in_words(cause)
        elif isinstance(cause, (httpx2.TransportError, ConnectionError, TimeoutError)):
            said = f"the connection was cut ({type(cause).__name__}). {nothing}"
        else:
            said = f"the upload failed: {error}. {nothing}"
        raise RecipeError(f"{what}: {said}") from error


def _cause_of(error: BaseException) -> BaseException:
    """Return what lies behind the error of an upload thread, which the client wraps in its own."""
    known = (HfHubHTTPError, httpx2.TransportError, ConnectionError, LocalTokenNotFoundError)
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, known):
            return current
        current = current.__cause__ or current.__context__
    return error


def _in_words(error: HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else 0
    said = (error.server_message or str(error)).strip().splitlines()
    reason = f" (the Hub: {said[0]})" if said else ""
    words = {
        401: "the Hub does not take this token. Run `hf auth login` or set HF_TOKEN, with a token that may write",
        402: "the storage of this account is used up. Free some, or choose another account",
        403: "this token may not write there. Use one with write permission, or another owner",
        404: "no such repository, or this token may not see it. Check the owner's name and the token",
        409: "the name is taken, or a commit is being made there. Choose another name, or try again",
        412: "somebody else has just committed there. Run the same command again",
        413: "it is too large for the storage of this account. Free some, or choose another account",
        429: "the Hub asks to slow down. Run the same command again in some minutes",
        507: "the storage of this account is used up. Free some, or choose another account",
    }
    if "quota" in reason.lower() or "storage" in reason.lower():
        return f"{words[507]}{reason}. Nothing is visible there."
    if status in words:
        return f"{words[status]}{reason}. Nothing is visible there."
    return f"the Hub answered {status}{reason}. Nothing is visible there; run the same command again."
