"""Fixtures shared by all tests: the real material when it lies at hand, and small pictures made on the spot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models run faster on one thread, and several test processes do not wait for each other's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs, rows and tokenizers (`VIR_HF_REAL_DATA`, else `../shared/data`); skips without it."""
    root = Path(os.environ.get("VIR_HF_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip("real data is not at hand; set VIR_HF_REAL_DATA to its folder")
    return root


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `lm/`, `tower/`, `rows.json` and `images/`, all made on the spot."""
    import tiny

    root = tmp_path_factory.mktemp("tiny")
    tiny.training_overrides(root, root / "out")
    return root


@pytest.fixture(scope="session")
def tiny_run(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on the tiny parts: model, processor, recipe.yaml, metrics.json."""
    import tiny_run

    return tiny_run.train_run(tiny_parts, tmp_path_factory.mktemp("run"))


@pytest.fixture
def http_folder(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the loopback address it is served at."""
    import functools
    import threading
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    root = tmp_path / "served"
    root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield root, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()
