"""Sixteen ranks on one machine: the data file is parsed once, and one rank writes the caches that all of them map."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import launches
import pytest


@pytest.mark.distributed
def test_sixteen_ranks_parse_the_data_once(parts: Path, tmp_path: Path) -> None:
    script = Path(__file__).resolve().with_name("startup.py")
    words = [sys.executable, str(script), str(parts), str(tmp_path / "out"), "16", str(launches.free_port())]
    done = launches.run(words, timeout_seconds=280, HF_DATASETS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stdout[-6000:]
    assert "engine: DDP · 16 ranks on 1 node · cpu · global batch 16 rows per step" in done.stdout
    notes = [json.loads((tmp_path / "out" / f"opened-{rank}.json").read_text()) for rank in range(16)]
    readers = [rank for rank, note in enumerate(notes) if note["data_file"]]
    assert len(readers) == 1, f"ranks {readers} opened the data file"
    rows_written = [
        rank for rank, note in enumerate(notes) if any(name.startswith("vir_hf/.rows-") for name in note["written"])
    ]
    assert rows_written == readers
    # The rows are written by whichever rank came first, their sizes by the node's first; nobody else writes anything.
    writers = [rank for rank, note in enumerate(notes) if note["written"]]
    assert set(writers) <= {0, *readers}, f"ranks {writers} wrote: {[notes[rank]['written'][:4] for rank in writers]}"
