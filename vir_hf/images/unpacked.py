"""Tar archives below a layer of gzip: the layer is taken off once, into the cache, since nothing can be found below it.

Members then lie in a plain tar, read in place like any other. The files may be deleted at any time.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
import shutil
import zlib
from pathlib import Path

from filelock import FileLock

from vir_hf import files
from vir_hf.errors import DataError

logger = logging.getLogger(__name__)

PACKED_SUFFIXES = (".tar.gz", ".tgz")
_CHUNK_BYTES = 2**20


def unpacked(path: str) -> str:
    """Return the plain tar that a `.tar.gz` holds, unpacked into the cache where it is not there yet; any other path as it is.

    Raises:
        DataError: the archive is cut short, or the disk is full.
    """
    if not path.lower().endswith(PACKED_SUFFIXES):
        return path
    status = os.stat(path)
    about = f"{os.path.realpath(path)}|{status.st_size}|{status.st_mtime_ns}"
    target = _folder() / f"{hashlib.sha256(about.encode()).hexdigest()[:24]}.tar"
    with FileLock(f"{target}.lock"):  # other processes wait for the first
        if not target.exists():
            logger.info("%s: its gzip layer is taken off once, into %s", path, target)
            try:
                with gzip.open(path, "rb") as packed, files.writing(target) as temporary, open(temporary, "wb") as tar:
                    shutil.copyfileobj(packed, tar, _CHUNK_BYTES)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise DataError(f"{path}: is no whole gzip file ({error}). Fetch it again.") from error
            except OSError as error:
                raise DataError(
                    f"{path}: cannot be unpacked into {target.parent} ({error.strerror or error}). Free some space there, set "
                    "HF_DATASETS_CACHE to a larger disk, or unpack it yourself."
                ) from error
    return str(target)


def _folder() -> Path:
    """Return where unpacked archives lie: beside the cached rows."""
    home = os.environ.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "huggingface")
    folder = Path(os.environ.get("HF_DATASETS_CACHE") or os.path.join(home, "datasets")) / "vir_hf" / "unpacked"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
