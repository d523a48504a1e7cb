"""Where the bytes of a picture come from: a folder, a `.zip` or `.tar` read in place, or (when allowed) a URL.

A reference is what a row says (`coco/train2017/000000000009.jpg`). `ImageFolder.locate` turns it into a place
(`/data/coco/train2017/000000000009.jpg`, or `zip://train2017/000000000009.jpg::/data/coco.zip`) and never leaves the
folder, neither by `..` nor by a symbolic link. `read_bytes` gives what lies at a place.
"""

from __future__ import annotations

import functools
import http.client
import os
import re
import stat
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vir_hf.errors import DataError, ImageError
from vir_hf.images.archives import ARCHIVE_SUFFIXES, open_archive

MAX_DOWNLOAD_BYTES = 64 * 2**20
_COCO_NAME = re.compile(r"^(?:COCO_(?:train|val|test)\d{4}_)?(\d{12}\.\w+)\Z")
_COCO_EDITION = re.compile(r"^(?:train|val|test)20(?:14|15|17)\Z")
_COCO_PREFIXES = ("", "COCO_train2014_", "COCO_val2014_", "COCO_test2014_", "COCO_test2015_")
_COCO_FOLDERS = ("train2017", "val2017", "train2014", "val2014")
_SPECIAL_FILES = (
    (stat.S_ISFIFO, "named pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "character device"),
    (stat.S_ISBLK, "block device"),
)
_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(reference: str) -> bool:
    """Whether a reference is a URL. Our own places in archives (`zip://`, `tar://`) are none."""
    return bool(_URL.match(reference)) and not reference.startswith(("zip://", "tar://"))


class ImageFolder:
    """A folder or archive of pictures that knows where each reference lies.

    A folder is listed once, when first asked about, so that 665,000 references cost no more than the listing.
    """

    def __init__(self, path: str | os.PathLike[str], *, allow_urls: bool = False) -> None:
        self.path = str(path)
        self.allow_urls = allow_urls
        self.is_archive = self.path.lower().endswith(ARCHIVE_SUFFIXES) and not os.path.isdir(self.path)
        if not os.path.exists(self.path):
            raise DataError(
                f"image folder {self.path}: no such folder or archive (looked in {os.getcwd()}); expected a directory, a .zip "
                "or a .tar. Set data.image_folder (or --image-folder) to the place the rows' image paths start from."
            )
        if not self.is_archive and not os.path.isdir(self.path):
            raise DataError(
                f"image folder {self.path}: is a file; expected a directory, a .zip, a .tar or a .tar.gz. Unpack any other "
                "archive first."
            )
        self._root = os.path.realpath(self.path)
        self._places: dict[str, _Listing | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Listings stay behind: another process reads its own, and only those it needs."""
        return {**self.__dict__, "_places": {}}

    @property
    def identity(self) -> str:
        """What a cache of located places depends on."""
        return f"{self._root}|{self.allow_urls}"

    def open(self) -> None:
        """Read the table of contents of an archive now, so that dataloader workers forked later have it already."""
        if self.is_archive:
            open_archive(self._root)

    def locate(self, reference: str) -> str:
        """Return the place of a reference.

        Raises:
            ImageError: `image_missing`, `image_outside_folder` or `image_url`.
        """
        if is_url(reference):
            if self.allow_urls and reference.startswith(("http://", "https://")):
                return reference
            raise ImageError(
                "image_url",
                f"{reference}: is a URL, and URLs are not opened. Download the pictures first "
                "(vir-hf data prepare), or set data.allow_urls=true.",
            )
        in_archive = split_place(reference)
        if in_archive:  # a place already, as `locate` gives it
            self._refuse_outside(os.path.realpath(in_archive[0]), reference)
            return reference
        if not reference or "\0" in reference:
            raise ImageError("image_missing", f"{reference!r}: is no file name; expected a path below {self.path}.")
        find = functools.partial(_locate_in_archive, self._root) if self.is_archive else self._locate_in_directory
        place = find(reference) or next(filter(None, map(find, _other_editions(reference))), None)
        # Only where nothing is called so: the same name as another program writes it. Each is looked for below this folder.
        place = place or next(filter(None, map(find, _other_spellings(reference))), None)
        if place is None:
            near = self._near_miss(reference)
            raise ImageError(
                "image_missing",
                f"{reference}: not found in {self.path}.{f' Did you mean {near}?' if near else ''} Check image_folder (the rows' "
                "paths start from it) or fetch the image (vir-hf data prepare).",
            )
        return place

    def _near_miss(self, reference: str) -> str | None:
        """Return the name of an image that differs from a reference in the case of its letters alone."""
        wanted = reference.replace("\\", "/").strip().removeprefix("./")
        if self.is_archive:
            archive = open_archive(self._root)
            tops = ("", f"{archive.top_folder}/") if archive.top_folder else ("",)
            return next(filter(None, (archive.by_case.get((top + wanted).casefold()) for top in tops)), None)
        directory, name = os.path.split(wanted)
        listing = None if ".." in wanted.split("/") else self._list(os.path.join(self._root, directory))
        near = listing.by_case.get(name.casefold()) if listing else None
        return os.path.join(directory, near) if near else None

    def _locate_in_directory(self, reference: str) -> str | None:
        directory, name = os.path.split(os.path.join(self._root, reference))
        if name == "..":
            self._refuse_outside(os.path.realpath(os.path.join(directory, name)), reference)
        listing = self._list(directory)
        place = self._find(listing, name) if listing else self._locate_in_nested_archive(reference)
        return place or self._locate_in_shards(reference)

    def _locate_in_shards(self, reference: str) -> str | None:
        """Return the place in one of the archives at the folder's top, which a reference need not name (`shard_0.tar.gz`).

        Raises:
            ImageError: several of them hold a member of this name.
        """
        listing = self._list(self._root)
        names = [name for name in listing.names if name.lower().endswith(ARCHIVE_SUFFIXES)] if listing else []
        found = []
        for name in sorted(names):
            if listing and name not in listing.links:
                try:
                    archive = open_archive(os.path.join(self._root, name))
                except DataError as error:  # which may be the one that holds the image
                    raise ImageError("image_missing", f"{reference}: not found in {self.path}, and {error}") from error
                wanted = reference.replace("\\", "/").removeprefix("./")
                inner = next((n for n in (wanted, f"{archive.top_folder}/{wanted}") if n in archive.members), None)
                found += [f"{archive.scheme}://{inner}::{archive.path}"] if inner else []
        if len(found) > 1:
            raise ImageError(
                "image_missing",
                f"{reference}: lies in {len(found)} archives of {self.path}, such as {found[0].rpartition('::')[2]} and "
                f"{found[1].rpartition('::')[2]}, and nothing says which is meant. Give each source its own image_folder.",
            )
        return found[0] if found else None

    def _find(self, listing: _Listing, name: str) -> str | None:
        for candidate in (name,) if name in listing.names else _coco_names(name):
            if candidate in listing.names:
                place = os.path.join(listing.directory, candidate)
                if candidate in listing.links:
                    self._refuse_outside(os.path.realpath(place), name)
                return place
        return None

    def _locate_in_nested_archive(self, reference: str) -> str | None:
        # coco/train2017/x.jpg is also found in coco/train2017.zip or coco.zip, so that archives can stay packed.
        parts = reference.split("/")
        for depth in range(len(parts) - 1, 0, -1):
            listing = self._list(os.path.join(self._root, *parts[: depth - 1]))
            for suffix in ARCHIVE_SUFFIXES:
                archive = parts[depth - 1] + suffix
                if listing and archive in listing.names and archive not in listing.links:
                    place = _locate_in_archive(os.path.join(listing.directory, archive), reference)
                    if place:
                        return place
        return None

    def _list(self, directory: str) -> _Listing | None:
        """Return the listing of a directory below the root, or None when there is no such directory."""
        if directory not in self._places:
            real = os.path.realpath(directory)
            self._refuse_outside(real, directory)
            try:
                self._places[directory] = _Listing(real)
            except OSError:
                self._places[directory] = None
        return self._places[directory]

    def _refuse_outside(self, real: str, reference: str) -> None:
        if real != self._root and not real.startswith(self._root.rstrip(os.sep) + os.sep):
            raise ImageError(
                "image_outside_folder",
                f"{reference}: leads to {real}, outside the image folder {self._root}. Expected a picture below it; neither "
                "`..` nor a symbolic link may leave it. Point image_folder at the folder that holds the pictures.",
            )


class _Listing:
    """The names in a directory and which of them are symbolic links."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.names: set[str] = set()
        self.links: set[str] = set()
        with os.scandir(directory) as entries:
            for entry in entries:
                self.names.add(entry.name)
                if entry.is_symlink():
                    self.links.add(entry.name)

    @functools.cached_property
    def by_case(self) -> dict[str, str]:
        """Names by their letters in one case, for messages about names that nearly fit."""
        return {name.casefold(): name for name in self.names}


def _coco_names(name: str) -> list[str]:
    """Return a file name, followed by the names the same COCO picture has in other editions."""
    match = _COCO_NAME.match(name)
    if not match:
        return [name]
    return [name, *(prefix + match.group(1) for prefix in _COCO_PREFIXES if prefix + match.group(1) != name)]


def _other_editions(reference: str) -> Iterator[str]:
    """Yield a reference as it would be with the folder of another COCO edition."""
    folder, name = os.path.split(reference)
    parent, edition = os.path.split(folder)
    if _COCO_EDITION.match(edition) and _COCO_NAME.match(name):
        yield from (os.path.join(parent, other, name) for other in _COCO_FOLDERS if other != edition)


def _other_spellings(reference: str) -> Iterator[str]:
    """Yield a reference as another system or program writes the same name.

    Accents composed or decomposed (macOS), backslashes (Windows), characters escaped as in a URL, white space around it.
    """
    spellings = [reference, reference.strip()]
    if "\\" in reference:
        spellings.append(reference.replace("\\", "/").strip())
    if "%" in reference:
        spellings += [urllib.parse.unquote(spelling) for spelling in spellings]
    if not reference.isascii() or "%" in reference:
        spellings += [unicodedata.normalize(form, spelling) for form in ("NFC", "NFD") for spelling in spellings]
    for spelling in dict.fromkeys(spellings):
        if spelling and spelling != reference and "\0" not in spelling and not is_url(spelling):
            yield spelling


def _locate_in_archive(archive_path: str, reference: str) -> str | None:
    parts = reference.replace("\\", "/").split("/")
    if ".." in parts or reference.startswith("/"):
        raise ImageError(
            "image_outside_folder",
            f"{reference}: leaves the archive {archive_path}; expected a path inside it, without `..` or a leading slash.",
        )
    archive = open_archive(archive_path)
    parts = [part for part in parts if part not in ("", ".")]
    # The archive of train2017/ may be asked for coco/train2017/x.jpg, train2017/x.jpg or x.jpg.
    candidates = ["/".join(parts[start:]) for start in range(len(parts))]
    if archive.top_folder:
        candidates.append(f"{archive.top_folder}/{parts[-1] if parts else ''}")
    for candidate in candidates:
        folder, _, name = candidate.rpartition("/")
        for alias in _coco_names(name):
            inner = f"{folder}/{alias}" if folder else alias
            for reading in (inner, *archive.readings(inner)):
                if reading in archive.members:
                    return f"{archive.scheme}://{reading}::{archive_path}"
    return None


def split_place(place: str) -> tuple[str, str] | None:
    """Return (archive path, inner name) of a place in an archive, or None for an ordinary path."""
    if not place.startswith(("zip://", "tar://")):
        return None
    inner, separator, archive_path = place[6:].rpartition("::")
    if not separator:
        raise ImageError("image_missing", f"{place}: expected {place[:6]}name-inside::/path/to/archive.")
    return archive_path, inner


def open_file(path: str) -> BinaryIO:
    """Open an image file for reading. A pipe, which would be waited for, a socket or a device is an `ImageError`."""
    mode = os.stat(path).st_mode
    for is_such, word in _SPECIAL_FILES:
        if is_such(mode):
            raise ImageError(
                "image_unreadable", f"{path}: is a {word}; expected a regular file. Remove it or its rows."
            )
    return open(path, "rb")


def read_bytes(place: str, *, allow_urls: bool = False) -> bytes:
    """Return the bytes at a place: a path, `zip://inner::/archive.zip`, `tar://inner::/archive.tar`, or a URL if allowed.

    Raises:
        ImageError: `image_missing`, `image_unreadable` or `image_url`.
    """
    in_archive = split_place(place)
    if in_archive:
        return open_archive(in_archive[0]).read(in_archive[1])
    if is_url(place):
        return _download(place, allow_urls)
    try:
        with open_file(place) as file:
            return file.read()
    except ImageError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        found = next(
            (name for name in _coco_names(os.path.basename(place))[1:] if Path(place).with_name(name).exists()), None
        )
        if found:
            return read_bytes(str(Path(place).with_name(found)))
        raise ImageError(
            "image_missing", f"{place}: no such file. Check image_folder, or fetch the picture (vir-hf data prepare)."
        ) from None
    except (OSError, ValueError) as error:
        raise ImageError(
            "image_unreadable", f"{place}: cannot be read ({error}). Check its permissions and the disk."
        ) from error


def quoted_url(url: str) -> str:
    """Return a URL with its spaces and accents escaped, as a browser sends it; what is escaped already stays."""
    return urllib.parse.quote(url.strip(), safe="%/:=&?~#+!$,;'@()*[]")


def _download(url: str, allow_urls: bool) -> bytes:
    if not allow_urls or urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ImageError(
            "image_url",
            f"{url}: is a URL, and URLs are not opened. Download the pictures first (vir-hf data prepare), or allow http(s) "
            "URLs with data.allow_urls=true.",
        )
    try:
        with urllib.request.urlopen(quoted_url(url), timeout=30) as response:
            data: bytes = response.read(MAX_DOWNLOAD_BYTES + 1)
    except (OSError, ValueError, http.client.HTTPException, urllib.error.URLError) as error:
        raise ImageError("image_missing", f"{url}: download failed ({error}). Try the address in a browser.") from error
    if len(data) > MAX_DOWNLOAD_BYTES:
        raise ImageError("image_too_large", f"{url}: larger than {MAX_DOWNLOAD_BYTES >> 20} MiB; download it yourself.")
    return data


def file_stamp(place: str) -> tuple[int, int] | None:
    """Return size in bytes and time of change in nanoseconds of the file at a place, or of the archive it lies in.

    `None` where there is no such file, and for a URL.
    """
    try:
        in_archive = split_place(place)
        if not in_archive and is_url(place):
            return None
        status = os.stat(in_archive[0] if in_archive else place)
    except (OSError, ValueError, ImageError):
        return None
    return status.st_size, status.st_mtime_ns
