"""The rank that is waited for is named: silent ones and those behind; nobody is blamed when all go on."""

from __future__ import annotations

import time
from pathlib import Path

from vir_hf.training.watch import RankWatch


def watches(tmp_path: Path) -> tuple[RankWatch, RankWatch]:
    return tuple(RankWatch(tmp_path, rank, 2, timeout_seconds=60, beat_seconds=0.05) for rank in (0, 1))  # type: ignore[return-value]


def test_nobody_is_missing_while_all_go_on(tmp_path: Path) -> None:
    first, second = watches(tmp_path)
    first.start()
    second.start()
    for watch in (first, second):
        watch.arrived(3)
    time.sleep(0.3)
    assert first.missing() == [] and second.missing() == []
    first.stop()
    second.stop()
    assert list(tmp_path.iterdir()) == []


def test_a_rank_behind_is_named(tmp_path: Path) -> None:
    first, second = watches(tmp_path)
    first.start()
    second.start()
    first.arrived(3)
    second.arrived(2)
    time.sleep(0.3)
    assert [text.split(" (")[0] for text in first.missing()] == ["rank 1"]
    assert first.missing()[0].endswith("has not come to step 3")
    assert second.missing() == []
    first.stop()
    second.stop()


def test_a_silent_rank_is_named_after_a_few_beats(tmp_path: Path) -> None:
    first, second = watches(tmp_path)
    first.start()
    second.start()
    time.sleep(0.2)
    second._stop.set()  # as a killed process: it no longer writes, and cannot take its sign away
    message = first.explain()
    assert message is not None and "rank 1 (" in message and "no sign of life" in message and "--resume" in message
    first.stop()


def test_one_process_is_not_watched(tmp_path: Path) -> None:
    watch = RankWatch(tmp_path, 0, 1, timeout_seconds=60)
    watch.start()
    assert watch.explain() is None and list(tmp_path.iterdir()) == []
    watch.stop()
