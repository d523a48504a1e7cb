"""Reading single members of a `.zip` or `.tar` where they lie, from any process, without unpacking anything.

The table of contents is read once per process; a member is then one seek and one read of a file opened for it, so that
forked dataloader workers and threads never share a file position.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from typing import NamedTuple

from vir_hf.errors import DataError, ImageError
from vir_hf.images.unpacked import PACKED_SUFFIXES, unpacked

ARCHIVE_SUFFIXES = (".zip", ".tar", *PACKED_SUFFIXES)
MAX_MEMBER_BYTES = 2**30
_ZIP_LOCAL_HEADER_BYTES = 30
# In which encodings names of zip and tar members are found, where nothing says so.
_NAME_ENCODINGS = ("utf-8", "cp1252", "gbk", "shift_jis", "euc_kr", "big5", "cp1251")


class Member(NamedTuple):
    """Where a member lies: `offset` of its header (zip) or data (tar), stored and real size in bytes, zip method."""

    offset: int
    stored_bytes: int
    num_bytes: int
    method: int


class Archive:
    """The table of contents of one archive and the reading of its members."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.scheme = "zip" if path.lower().endswith(".zip") else "tar"
        self._file = unpacked(path)
        try:
            self.members = _zip_members(path) if self.scheme == "zip" else _tar_members(self._file)
        except (zipfile.BadZipFile, tarfile.TarError, struct.error, EOFError) as error:
            raise DataError(
                f"{path}: is no readable {self.scheme} archive ({error}). An archive that was cut short must be "
                "fetched again."
            ) from error
        tops = {name.partition("/")[0] for name in self.members if "/" in name}
        flat = any("/" not in name for name in self.members)
        self.top_folder = tops.pop() if len(tops) == 1 and not flat else None

    def readings(self, name: str) -> list[str]:
        """Return a name as members may be called whose archive does not say in which encoding their names are.

        A zip file without the flag for UTF-8 is read as code page 437; programs write the encoding of their machine all the
        same. The bytes are compared, so what is found is the member with exactly these bytes.
        """
        if name.isascii():
            return []
        codec, errors = ("cp437", "strict") if self.scheme == "zip" else ("utf-8", "surrogateescape")
        found = []
        for written in _NAME_ENCODINGS:
            with contextlib.suppress(UnicodeError):
                found.append(name.encode(written).decode(codec, errors))
        return [reading for reading in dict.fromkeys(found) if reading != name]

    @functools.cached_property
    def by_case(self) -> dict[str, str]:
        """Members by their names in letters of one case, for messages about names that nearly fit."""
        return {name.casefold(): name for name in self.members}

    def read(self, name: str) -> bytes:
        """Return the bytes of a member; `ImageError` when it is not there or damaged."""
        member = self.members.get(name)
        if member is None:
            raise ImageError("image_missing", f"{name}: not in the archive {self.path}.")
        if member.num_bytes > MAX_MEMBER_BYTES:
            raise ImageError(
                "image_too_large", f"{name} in {self.path}: {member.num_bytes} bytes; expected below 1 GiB."
            )
        try:
            with open(self._file, "rb") as file:
                file.seek(member.offset)
                if self.scheme == "zip":
                    header = file.read(_ZIP_LOCAL_HEADER_BYTES)
                    name_length, extra_length = struct.unpack("<HH", header[26:30])
                    file.seek(name_length + extra_length, os.SEEK_CUR)
                data = file.read(member.stored_bytes)
            if member.method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-15).decompress(data, member.num_bytes)
        except (OSError, struct.error, zlib.error) as error:
            raise ImageError("image_unreadable", f"{name} in {self.path}: cannot be read ({error}).") from error
        if len(data) != member.num_bytes:
            raise ImageError(
                "image_truncated",
                f"{name} in {self.path}: {len(data)} of {member.num_bytes} bytes. Fetch the archive again.",
            )
        return data


def _zip_members(path: str) -> dict[str, Member]:
    members = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise zipfile.BadZipFile(f"{info.filename} is encrypted or compressed other than by deflate")
            name = info.filename.replace("\\", "/").removeprefix("./")  # some programs of Windows write backslashes
            members[name] = Member(info.header_offset, info.compress_size, info.file_size, info.compress_type)
    return members


def _tar_members(path: str) -> dict[str, Member]:
    members = {}
    with tarfile.open(path, "r:") as archive:
        for info in archive:
            name = info.name.removeprefix("./")
            if info.isreg():
                members[name] = Member(info.offset_data, info.size, info.size, zipfile.ZIP_STORED)
            elif info.islnk() and info.linkname.removeprefix("./") in members:  # what it links to comes before it
                members[name] = members[info.linkname.removeprefix("./")]
            archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise: 1 KiB a picture
    return members


def open_archive(path: str) -> Archive:
    """Return the archive at a path; its table of contents is kept for this process until the file changes."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: no such archive ({error.strerror}). Check image_folder.") from error
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
        raise DataError(f"{path}: is no readable {path[-3:]} archive (no regular file). Check image_folder.")
    return _open_archive(path, status.st_size, status.st_mtime_ns)


# Tables of contents by path, size and time; the least recently used go when there are many members in all. A name with its
# place takes some 250 bytes, so that these are 125 MB at most, or a single archive that has more.
_MOST_MEMBERS = 500_000
_OPENED: collections.OrderedDict[tuple[str, int, int], Archive] = collections.OrderedDict()
_OPENING = threading.Lock()


def _open_archive(path: str, num_bytes: int, modified: int) -> Archive:
    key = (path, num_bytes, modified)
    with _OPENING:
        if key in _OPENED:
            _OPENED.move_to_end(key)
            return _OPENED[key]
        archive = _OPENED[key] = Archive(path)
        while len(_OPENED) > 1 and sum(len(opened.members) for opened in _OPENED.values()) > _MOST_MEMBERS:
            _OPENED.popitem(last=False)
    return archive
