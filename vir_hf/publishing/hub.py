"""A run -> one folder fit to publish -> one commit on the Hub. The folder can be looked at first; nothing else is sent."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from vir_hf.errors import RecipeError
from vir_hf.publishing.card import TAG

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe
from vir_hf.publishing.repository import check_run, write_repository

logger = logging.getLogger(__name__)


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
