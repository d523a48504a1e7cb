"""The one way files are written and removed: whole or not at all, never over an input, never what somebody else made.

A file gets its name when it is complete. What proves that a file is ours stands in it (`made_by`, for reports) or beside it:
`.vir_hf` in a folder we write into lists every file with its size and SHA-256, so that one changed since is not ours any more.
"""

# Over 400 lines: every way of writing or removing a file, so that a test can say that there is no other.

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from vir_hf import __version__
from vir_hf.errors import RecipeError

logger = logging.getLogger(__name__)

RECORD = ".vir_hf"
MADE_BY = f"vir_hf {__version__}"
HTML_MARK = '<meta name="generator" content="vir_hf">'
_REPORT = re.compile(r'\s*\{\s*"made_by": "vir_hf ')
_CHUNK_BYTES = 1 << 22
_Place = str | os.PathLike[str]


@contextlib.contextmanager
def writing(path: _Place, *, durable: bool = False) -> Iterator[Path]:
    """Give the temporary name under which a file is written; it gets its own name when the block ends without an error.

    Folders on the way are made. What a link leads to is replaced, and not the link; into a device or a pipe is written as
    into any other.

    Args:
        durable: return when contents and name have reached the disk.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():  # /dev/null, /dev/stdout, a pipe
        yield target
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name[:200]}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        if durable:
            sync_file(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync_folder(target.parent)


def write_text(path: _Place, text: str, *, durable: bool = False) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"), durable=durable)


def write_bytes(path: _Place, data: bytes, *, durable: bool = False) -> None:
    """Write a file, whole or not at all."""
    with writing(path, durable=durable) as temporary:
        temporary.write_bytes(data)


def as_json(value: Any, *, indent: int | None = 2, ensure_ascii: bool = False) -> str:
    """Return JSON as it stands in a file, with a line end."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii) + "\n"


def write_json(path: _Place, value: Any, *, indent: int | None = 2, ensure_ascii: bool = False) -> None:
    """Write a JSON file, whole or not at all; its folder is made if it is not there."""
    write_text(path, as_json(value, indent=indent, ensure_ascii=ensure_ascii))


def as_report(value: dict[str, Any], *, indent: int = 2, ensure_ascii: bool = False) -> str:
    """Return the JSON of a report that says who made it, which is what lets the next one take its place."""
    return as_json({"made_by": MADE_BY, **value}, indent=indent, ensure_ascii=ensure_ascii)


def is_report(path: _Place) -> bool:
    """Whether a file is a JSON report or an HTML page of this project."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            head = file.read(1000)
    except OSError:
        return False
    return bool(_REPORT.match(head)) or HTML_MARK in head


@contextlib.contextmanager
def appending(path: _Place) -> Iterator[IO[str]]:
    """Give a text file to which whole lines are added; what is in it stays."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        yield file


def cut_to(path: _Place, num_bytes: int) -> None:
    """Leave only the first `num_bytes` of a file: what a killed process has half written behind them goes."""
    with open(path, "r+b") as file:
        file.truncate(num_bytes)


def claim(folder: _Place, text: str) -> bool:
    """Return whether this process is the first to say something, of all that share a folder of signs."""
    sign = Path(folder) / f"said-{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:16]}"
    try:
        with open(sign, "x", encoding="utf-8"):
            return True
    except FileExistsError:
        return False
    except OSError:  # no such folder: nobody to share with
        return True


def discard(path: _Place) -> None:
    """Remove a file of our own from a cache or a folder of signs, if it is there."""
    Path(path).unlink(missing_ok=True)


def link_or_copy(source: _Place, target: _Place) -> None:
    """Put a file in a new place without a second copy of its bytes where the disk allows it.

    Both names are then one file, which is safe because no file is ever changed in place.
    """
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, or one without links
        copy(source, target)


def copy(source: _Place, target: _Place) -> None:
    """Copy a file, with its time; it appears when it is whole."""
    with writing(target) as temporary:
        shutil.copy2(source, temporary)


def refuse_output(path: str | None, option: str, inputs: Sequence[str], *, overwrite: bool = False) -> None:
    """Raise before the work begins if a file cannot be written there, or would replace an input or somebody's file.

    Args:
        path: what the option was given; None and `-`, the terminal, are fine.
        option: as typed, such as `--json`.
        inputs: files, folders and globs that the command reads, and files that it writes for another option. Of a folder,
            every file in it that is no report of ours is an input.
        overwrite: replace a file that is no report of ours.

    Raises:
        RecipeError: what is there, and what to do.
    """
    if path is None or path == "-":
        return
    if os.path.isdir(path):
        raise RecipeError(f"{option} {path}: is a folder; expected the name of a file.")
    if any(_is_same_or_inside(path, other) for name in inputs for other in (name, *glob.glob(name, recursive=True))):
        raise RecipeError(
            f"{option} {path}: would overwrite a file that this command reads or writes. Name another file."
        )
    if os.path.exists(path) and not os.path.isfile(path):  # a device or a pipe
        return
    if os.path.lexists(path) and not overwrite and not is_report(path):
        raise RecipeError(
            f"{option} {path}: is there already, and no report of vir-hf. Name another file, or add --overwrite to replace it."
        )
    probe = os.path.join(os.path.dirname(os.path.realpath(path)), f".{uuid.uuid4().hex[:12]}.tmp")
    try:
        if os.path.exists(path):
            if not is_report(path) and _is_binary(path):
                raise RecipeError(
                    f"{option} {path}: is there, and no text file; what a command reports does not replace it, --overwrite or "
                    "not. Name another file."
                )
            with open(path, "a", encoding="utf-8"):  # one that may not be written to is not replaced either
                pass
        with open(probe, "x", encoding="utf-8"):
            pass
        discard(probe)
    except OSError as error:
        raise RecipeError(
            f"{option} {path}: cannot be written ({error.strerror}). Name a file in a folder that is there."
        ) from None


def _is_binary(path: str) -> bool:
    """Whether a file is a picture, an archive, weights: anything with a zero byte near its beginning."""
    with open(path, "rb") as file:
        return b"\0" in file.read(8192)


def is_same_file(one: _Place, other: _Place) -> bool:
    """Whether two names mean one file: by `..`, by links of either kind, or by the spelling of a file not yet there."""
    with contextlib.suppress(OSError):
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


def _is_same_or_inside(path: str, other: str) -> bool:
    if is_same_file(path, other):
        return True
    if not os.path.isdir(other) or not os.path.exists(path) or is_report(path):
        return False
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(other))


def sync_file(path: _Place) -> None:
    """Return when a file's contents have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: _Place) -> None:
    """Return when a folder's names have reached the disk, where the file system can say so."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse to sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: _Place) -> str:
    """Return a file's SHA-256, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def entry_of(path: Path) -> dict[str, Any]:
    """Return what a record keeps of a file: `bytes` and `sha256`."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def new_folder(path: Path) -> Path:
    """Return a new, empty folder of ours, marked as such; one that a killed process has left under this name goes."""
    clear_name(path)
    path.mkdir(parents=True)
    (path / RECORD).write_bytes(b"")  # an empty record: nothing in here is anybody else's
    return path


def remove_folder(path: Path, proof: Callable[[Path], bool] | None = None) -> None:
    """Remove a folder that this project made, its mark last, so that a removal cut short can be ended.

    Args:
        proof: whether the folder is ours, in place of the mark that `new_folder` sets; an empty one always is.

    Raises:
        RecipeError: nothing says that it is ours.
    """
    is_ours = path.is_dir() and not path.is_symlink()
    is_ours = is_ours and ((path / RECORD).is_file() or (proof is not None and proof(path)) or not any(path.iterdir()))
    if not is_ours:
        raise RecipeError(f"{path}: was not made by vir-hf, so it is not removed. Move it away.")
    (path / RECORD).touch()
    for inside in path.iterdir():
        if inside.is_dir() and not inside.is_symlink():
            shutil.rmtree(inside)
        elif inside.name != RECORD:
            inside.unlink()
    (path / RECORD).unlink()
    path.rmdir()


def clear_name(path: Path, proof: Callable[[Path], bool] | None = None) -> None:
    """Free a name: what this project made under it is removed, as by `remove_folder`, and anything else set aside."""
    if os.path.lexists(path):
        try:
            remove_folder(path, proof)
        except RecipeError:
            set_aside(path)


def set_aside(path: Path) -> Path:
    """Give what lies under a name that is needed another name, `NAME.kept`, say so, and return it."""
    for number in range(1, 10_000):
        kept = path.with_name(f"{path.name}.kept{'' if number == 1 else f'-{number}'}")
        if not os.path.lexists(kept):
            os.rename(path, kept)
            logger.warning("%s: was not made by vir-hf, or was changed since; it is kept as %s", path, kept)
            return kept
    raise RecipeError(f"{path}: there are too many {path.name}.kept beside it. Remove some.")


@contextlib.contextmanager
def folder_in_one_piece(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside a new one, which gets its name when the block ends without an error.

    Raises:
        RecipeError: there is something under that name already.
    """
    place = Path(os.path.realpath(target))
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise RecipeError(f"{target}: is not empty; name a new folder, or remove it.")
    staging = new_folder(place.with_name(f".{place.name}.partial"))
    try:
        yield staging
        if place.exists():
            place.rmdir()
        os.replace(staging, place)
    except BaseException:
        if staging.exists():
            remove_folder(staging)
        raise
    discard(place / RECORD)


def take_out(source: Path, target: Path) -> None:
    """Move everything out of a folder of ours into another on the same disk, and remove the folder."""
    for path in source.iterdir():
        if path.name != RECORD:
            os.replace(path, target / path.name)
    discard(source / RECORD)
    source.rmdir()


class OutputFolder:
    """A folder we write into beside a user's files, with the record `.vir_hf` of what in it is ours.

    A file is ours if it has a size and digest that we wrote under its name. One process at a time writes into a folder.
    """

    def __init__(self, path: _Place) -> None:
        self.path = Path(path)

    def has_record(self) -> bool:
        """Whether anything was written here by this version of the project or a later one."""
        return (self.path / RECORD).is_file()

    def owns(self, name: str) -> bool:
        """Whether a file is as we wrote it."""
        return self._is_as_recorded(name, self._entries())

    def foreign(self, names: Iterable[str]) -> list[str]:
        """Return those of the names (of files, or folders with all in them) under which something lies that is not ours."""
        entries = self._entries()
        found = []
        for name in names:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                inside = [p.relative_to(self.path).as_posix() for p in sorted(path.rglob("*")) if not p.is_dir()]
                found += [inner for inner in inside if not self._is_as_recorded(inner, entries)]
            elif os.path.lexists(path) and not self._is_as_recorded(name, entries):
                found.append(name)
        return found

    def refuse_foreign(self, names: Iterable[str], what: str, remedy: str) -> None:
        """Raise before the work begins if a file that is not ours would have to give way.

        Args:
            what: the key or argument that names this folder.
            remedy: what to do about it.
        """
        found = self.foreign(names)
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise RecipeError(
                f"{what}: holds {found[0]}{more}, which vir-hf did not write or which was changed since, under a name that "
                f"is needed. {remedy}"
            )

    def adopt(self, names: Iterable[str]) -> None:
        """Record files that are there as ours: those of an earlier version, known by their contents."""
        there = [name for name in names if (self.path / name).is_file()]
        if there:
            self._record({name: self.path / name for name in there})

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Like `writing`, and recorded; what is not ours under that name is kept under another."""
        with writing(self.path / name) as temporary:
            yield temporary
            self._make_way(name)
            self._record({name: temporary})

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, whole or not at all."""
        with self.writing(name) as temporary:
            temporary.write_bytes(text.encode("utf-8"))

    def write_json(self, name: str, value: Any, *, indent: int | None = 2, ensure_ascii: bool = False) -> None:
        """Write a JSON file, whole or not at all."""
        self.write_text(name, as_json(value, indent=indent, ensure_ascii=ensure_ascii))

    def stage(self, name: str) -> Path:
        """Return a new, empty folder `.NAME.partial` in here, for `move_in`."""
        return new_folder(self.path / f".{name}.partial")

    def move_in(self, staging: Path, into: str = "") -> None:
        """Give the files of a staging folder their places below `into`, each by one rename, when all have reached the disk."""
        paths = [path for path in sorted(staging.rglob("*")) if path.is_file() and path != staging / RECORD]
        for path in paths:
            sync_file(path)
        places = {(Path(into) / path.relative_to(staging)).as_posix(): path for path in paths}
        for name in places:
            self._make_way(name)
        self._record(places)  # before the first rename: a kill in between leaves nothing that is not known as ours
        for name, path in places.items():
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, self.path / name)
        remove_folder(staging)
        sync_folder(self.path)

    def replace_folder(self, name: str, staging: Path) -> None:
        """Put a staging folder in the place of a whole folder of ours; files in it that are not ours stay where they are."""
        self.remove(name)
        if os.path.lexists(self.path / name):
            self.move_in(staging, name)
            return
        paths = [path for path in sorted(staging.rglob("*")) if path.is_file() and path != staging / RECORD]
        for path in paths:
            sync_file(path)
        self._record({f"{name}/{path.relative_to(staging).as_posix()}": path for path in paths})
        os.replace(staging, self.path / name)
        discard(self.path / name / RECORD)
        sync_folder(self.path)

    def remove(self, name: str) -> None:
        """Remove a file of ours, or all of ours in a folder; what is not ours stays."""
        entries = self._entries()
        owned = [key for key in entries if key == name or key.startswith(f"{name}/")]
        for key in owned:
            if self._is_as_recorded(key, entries):
                (self.path / key).unlink()
        folders = {parent for key in owned for parent in Path(key).parents if parent.as_posix() != "."}
        for folder in sorted(folders, key=lambda it: -len(it.parts)):
            with contextlib.suppress(OSError):  # not empty, or not there
                (self.path / folder).rmdir()
        if owned:
            self._save({key: value for key, value in entries.items() if key not in owned})

    def names(self) -> list[str]:
        """Return the names of the files that are there as we wrote them."""
        entries = self._entries()
        return [name for name in entries if self._is_as_recorded(name, entries)]

    def _make_way(self, name: str) -> None:
        for parent in reversed(Path(name).parents):
            if parent.as_posix() != "." and os.path.lexists(self.path / parent) and not (self.path / parent).is_dir():
                set_aside(self.path / parent)
        if os.path.lexists(self.path / name) and not self.owns(name):
            set_aside(self.path / name)

    def _entries(self) -> dict[str, list[dict[str, Any]]]:
        try:
            entries = json.loads((self.path / RECORD).read_text(encoding="utf-8"))["files"]
            return entries if isinstance(entries, dict) else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # nothing is ours then, and nothing is replaced

    def _is_as_recorded(self, name: str, entries: dict[str, list[dict[str, Any]]]) -> bool:
        path = self.path / name
        known = entries.get(name)
        if not known or path.is_symlink() or not path.is_file():
            return False
        found = path.stat()
        known = [entry for entry in known if entry["bytes"] == found.st_size]
        # The time spares reading gigabytes at every start; a copied folder has other times, and the digest decides.
        return any(entry["modified_ns"] == found.st_mtime_ns for entry in known) or (
            bool(known) and sha256(path) in [entry["sha256"] for entry in known]
        )

    def _record(self, files: dict[str, Path]) -> None:
        entries = self._entries()
        with ThreadPoolExecutor(4) as pool:
            digests = dict(zip(files, pool.map(entry_of, files.values()), strict=True))
        for name, path in files.items():
            entry = {**digests[name], "modified_ns": path.stat().st_mtime_ns}
            # The one before it too: a kill between record and rename leaves that file, and it is ours as well.
            entries[name] = [entry, *entries.get(name, [])][:2]
        self._save(entries)

    def _save(self, entries: dict[str, list[dict[str, Any]]]) -> None:
        write_json(self.path / RECORD, {"made_by": MADE_BY, "files": entries}, indent=1)
