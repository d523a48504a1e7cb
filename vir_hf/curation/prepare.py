"""A subset of LLaVA data with its pictures, copied, linked or downloaded into one folder, verified by decoding."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import http.client
import io
import logging
import os
import random
import re
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vir_hf.errors import DataError, ImageError, RecipeError
from vir_hf.files import OutputFolder, is_same_file, link_or_copy, write_bytes
from vir_hf.images.folder import MAX_DOWNLOAD_BYTES, ImageFolder, is_url, quoted_url, read_bytes, split_place
from vir_hf.images.opening import decode_image
from vir_hf.rows.files import read_rows

logger = logging.getLogger(__name__)

ROWS, FAILED = "rows.json", "failed.json"
COCO_URL = "http://images.cocodataset.org"
_COCO = re.compile(
    r"(?:(?P<folder>(?:train|val|test)20\d\d)/)?(?:COCO_(?P<prefix>(?:train|val|test)20\d\d)_)?\d{12}\.jpg\Z"
)
_WORTH_RETRYING = (408, 425, 429, 500, 502, 503, 504)
_MAX_WAIT_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Fetching:
    """How pictures are fetched.

    Attributes:
        mode: `copy` or `link` (a hard link) from `image_folder`, or `download`.
        base_url: a picture's address is this and its reference; COCO's own scheme by default.
        retries: how often a failed download is tried again, after `backoff_seconds`, twice that, four times that ...
        timeout_seconds: how long one try may take, from connecting to the last byte.
    """

    mode: str = "copy"
    image_folder: str | None = None
    base_url: str = COCO_URL
    num_workers: int = 16
    retries: int = 4
    backoff_seconds: float = 0.5
    timeout_seconds: float = 30.0


@dataclasses.dataclass
class Prepared:
    """What was done. `failed` says which pictures could not be had, why, and which rows are left out for it."""

    rows_file: Path
    num_rows: int = 0
    num_images: int = 0
    num_present: int = 0
    failed: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    num_left_out: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**dataclasses.asdict(self), "rows_file": str(self.rows_file)}


def prepare_data(
    source: str,
    out: str | os.PathLike[str],
    *,
    num_rows: int | None = None,
    seed: int = 0,
    match: str | None = None,
    fetching: Fetching | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """Write `out/rows.json` and `out/images/`, and return what was done.

    Run again, it fetches only what is missing: a picture appears in its place when it has been decoded, never before.
    Rows with a picture that failed are left out, and the pictures are listed in `out/failed.json`.

    Args:
        source: a LLaVA JSON, JSON Lines or Parquet file of references.
        num_rows: how many rows to draw with `seed`; all by default. Their order stays.
        match: only rows with an image whose reference contains this.
        overwrite: let the new `rows.json` and `failed.json` take the place of ones that are not ours, or were changed.

    Raises:
        RecipeError: the source would be written over, or a file that is not ours.
        DataError: the source cannot be read, the image folder does not exist, or no row is left.
    """
    fetching = fetching or Fetching()
    if fetching.mode not in ("copy", "link", "download"):
        raise ValueError(f"mode is 'copy', 'link' or 'download', got {fetching.mode!r}")
    folder = None
    if fetching.mode != "download":
        folder = ImageFolder(fetching.image_folder or os.path.dirname(os.path.abspath(source)))
    check_place(source, out, overwrite=overwrite)
    rows = list(choose_rows(source, num_rows, seed, match))
    if not rows:
        raise DataError(
            f"{source}: no row{' with ' + repr(match) + ' in its image' if match else ''}; nothing to prepare."
        )
    out = Path(out)
    output = OutputFolder(out)
    images = out / "images"
    try:
        images.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{images}: cannot be made ({error.strerror}). Expected a folder, or a place where one can be made."
        ) from error
    users: dict[str, list[str]] = {}
    for row in rows:
        for reference in references_of(row):
            users.setdefault(reference, []).append(str(row.get("id", "")))
    prepared = Prepared(out / ROWS, num_images=len(users))
    reasons = _fetch_all(list(users), images, folder, fetching, prepared, progress)
    prepared.failed = [{"image": name, "reason": reason, "rows": users[name]} for name, reason in reasons.items()]
    sound = [with_local_names(row) for row in rows if not any(name in reasons for name in references_of(row))]
    prepared.num_rows, prepared.num_left_out = len(sound), len(rows) - len(sound)
    output.write_json(FAILED, prepared.failed, indent=1, ensure_ascii=True)
    output.write_json(ROWS, sound, indent=1, ensure_ascii=True)
    return prepared


def check_place(source: str, out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise before the work begins if what is written would take the place of the source or of somebody's file.

    Raises:
        RecipeError: which file, and what to do.
    """
    output = OutputFolder(out)
    names = (ROWS, FAILED)
    for name in names:
        if is_same_file(output.path / name, source):
            raise RecipeError(
                f"{output.path}: its {name} is the source, which would be written over. Name another folder."
            )
    if overwrite:
        output.adopt(names)
    remedy = "Name another folder, or add --overwrite to replace it."
    output.refuse_foreign(names, str(output.path), remedy)


def choose_rows(source: str, num_rows: int | None, seed: int, match: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield rows of a file, all or so many drawn with a seed, in the file's order."""

    def is_wanted(row: Any) -> bool:
        return isinstance(row, dict) and (match is None or any(match in name for name in references_of(row)))

    wanted = [number for number, row in read_rows(source) if is_wanted(row)]
    if num_rows is not None and num_rows < len(wanted):
        wanted = random.Random(seed).sample(wanted, num_rows)
    chosen = set(wanted)
    yield from (row for number, row in read_rows(source) if number in chosen)


def references_of(row: dict[str, Any]) -> list[str]:
    """Return the names of files (or URLs) a raw row shows."""
    found = []
    for key in ("image", "images"):
        value = row.get(key)
        for entry in value if isinstance(value, list) else [value]:
            name = entry.get("path") if isinstance(entry, dict) else entry
            if isinstance(name, str) and name:
                found.append(name)
    return found


def with_local_names(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with every reference as it lies below `images/`."""
    row = dict(row)
    for key in ("image", "images"):
        value = row.get(key)
        if isinstance(value, str) and value:
            row[key] = local_name(value)
        elif isinstance(value, list):
            row[key] = [local_name(name) for name in references_of({key: value})]
    return row


def local_name(reference: str) -> str:
    """Return the path below `images/` of a reference; of a URL its host and path.

    Raises:
        ImageError: the reference leaves its folder.
    """
    if is_url(reference):
        parts = urllib.parse.urlsplit(reference)
        query = f"_{parts.query}" if parts.query else ""
        reference = re.sub(r"[^\w./-]", "_", f"{parts.netloc}{parts.path}{query}")
    name = os.path.normpath(reference.lstrip("/")).replace(os.sep, "/")
    if name.startswith("../") or name in ("..", ".") or "\0" in name:
        raise ImageError("image_outside_folder", f"{reference}: leaves the image folder.")
    return name


def _fetch_all(
    references: list[str],
    images: Path,
    folder: ImageFolder | None,
    fetching: Fetching,
    prepared: Prepared,
    progress: Callable[[int, int], None],
) -> dict[str, str]:
    """Fetch every picture; return the reason of each that could not be had."""
    reasons = {}
    with concurrent.futures.ThreadPoolExecutor(fetching.num_workers) as pool:
        futures = {pool.submit(_fetch_one, name, images, folder, fetching): name for name in references}
        try:
            for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                try:
                    prepared.num_present += not future.result()
                except (ImageError, OSError) as error:
                    reasons[futures[future]] = str(error)
                progress(done, len(references))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return {name: reasons[name] for name in references if name in reasons}


def _fetch_one(reference: str, images: Path, folder: ImageFolder | None, fetching: Fetching) -> bool:
    """Put one picture in its place; False when it is there already. It gets its name only when it has been decoded."""
    target = images / local_name(reference)
    if folder is None:
        if not target.exists():
            write_bytes(target, _download(reference, fetching))
            return True
        return False
    place = folder.locate(reference)
    data = read_bytes(place)
    if target.exists():
        if target.read_bytes() != data:
            raise ImageError("image_missing", f"{target}: is there already, and another picture than {reference}.")
        return False
    decode_image(data, reference)
    if fetching.mode == "link" and not split_place(place):
        link_or_copy(place, target)
    else:
        write_bytes(target, data)
    return True


def addresses(reference: str, base_url: str) -> list[str]:
    """Return where a picture may be downloaded from, the likeliest first."""
    if is_url(reference):
        return [reference]
    base_url = base_url.rstrip("/")
    match = _COCO.search(reference)
    if base_url == COCO_URL and match:
        name = reference.rsplit("/", 1)[-1]
        edition = match["prefix"] or match["folder"]
        # A name without an edition is of 2017, whose two parts LLaVA's data mixes.
        return [f"{base_url}/{folder}/{name}" for folder in ([edition] if edition else ["train2017", "val2017"])]
    return [f"{base_url}/{urllib.parse.quote(reference.lstrip('/'))}"]


def _download(reference: str, fetching: Fetching) -> bytes:
    """Return the bytes of a picture that decodes; what may pass is tried again, later and later.

    Raises:
        ImageError: it could not be had.
    """
    reason = ""
    for attempt in range(fetching.retries + 1):
        wait = fetching.backoff_seconds * 2**attempt * random.uniform(0.75, 1.25)
        for address in addresses(reference, fetching.base_url):
            try:
                data = _read_url(address, fetching.timeout_seconds)
                decode_image(data, address)
                return data
            except urllib.error.HTTPError as error:
                reason = f"{address}: HTTP {error.code} {error.reason}"
                if error.code not in _WORTH_RETRYING:
                    continue  # the next address may have it
                wait = max(wait, _retry_after(error))
                break
            except (OSError, http.client.HTTPException, ImageError, ValueError) as error:
                reason = str(error) if isinstance(error, ImageError) else f"{address}: {error}"
                break
        else:
            raise ImageError("image_missing", reason)
        if attempt < fetching.retries:
            time.sleep(min(wait, _MAX_WAIT_SECONDS))
    raise ImageError("image_missing", f"{reason} (tried {fetching.retries + 1} times)")


def _read_url(address: str, timeout_seconds: float) -> bytes:
    if not address.startswith(("http://", "https://")):
        raise ImageError("image_url", f"{address}: expected an http or https address.")
    request = urllib.request.Request(quoted_url(address), headers={"User-Agent": "vir-hf"})
    opener = urllib.request.build_opener(*_deadline_handlers(time.monotonic() + timeout_seconds))
    with opener.open(request, timeout=timeout_seconds) as response:
        data: bytes = response.read(MAX_DOWNLOAD_BYTES + 1)
    if len(data) > MAX_DOWNLOAD_BYTES:
        raise ImageError("image_too_large", f"{address}: larger than {MAX_DOWNLOAD_BYTES >> 20} MiB.")
    return data


class _DeadlineReader(io.RawIOBase):
    """What a socket receives until a moment of `time.monotonic`. A socket's own timeout begins anew with every byte."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase, deadline: float) -> None:
        super().__init__()
        self._sock, self._raw, self._deadline = sock, raw, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _deadline_handlers(deadline: float) -> list[urllib.request.BaseHandler]:
    """Return what lets urllib wait for an answer, headers and all, and the answers it redirects to, until `deadline`."""

    class Response(http.client.HTTPResponse):
        def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
            super().__init__(sock, *args, **kwargs)
            self.fp = io.BufferedReader(_DeadlineReader(sock, self.fp.detach(), deadline))

    class Connection(http.client.HTTPConnection):
        response_class = Response

    class SecureConnection(http.client.HTTPSConnection):
        response_class = Response

    class Handler(urllib.request.HTTPHandler):
        def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Connection, request)

    class SecureHandler(urllib.request.HTTPSHandler):
        def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(SecureConnection, request)

    return [Handler(), SecureHandler()]


def _retry_after(error: urllib.error.HTTPError) -> float:
    value = error.headers.get("Retry-After", "") if error.headers else ""
    return float(value) if value.isdigit() else 0.0
