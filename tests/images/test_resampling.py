"""Padding, resizing and cropping in one go have the bits of Pillow's resize, whatever the sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vir_hf.images import resampling
from vir_hf.images.resampling import Side, resample

LEVELS = np.tile(np.arange(256, dtype=np.float32), (3, 1))
COLOUR = (123, 117, 4)


def ours(pixels: np.ndarray, rows: Side, columns: Side, method: str = "bicubic") -> np.ndarray:
    out = np.full((3, rows.end - rows.start, columns.end - columns.start), -1, np.float32)
    resample(pixels, rows, columns, method=method, colour=COLOUR, table=LEVELS, out=out)
    return out.transpose(1, 2, 0)


def by_pillow(pixels: np.ndarray, rows: Side, columns: Side, method: str = "bicubic") -> np.ndarray:
    canvas = Image.new("RGB", (columns.padded, rows.padded), COLOUR)
    canvas.paste(Image.fromarray(np.ascontiguousarray(pixels[:, :, :3])), (columns.before, rows.before))
    resized = canvas.resize((columns.new_length, rows.new_length), Image.Resampling[method.upper()])
    return np.asarray(resized.crop((columns.start, rows.start, columns.end, rows.end)), dtype=np.float32)


def extremes(height: int, width: int, seed: int) -> np.ndarray:
    """Black, white and noise side by side: sums that overshoot, and every rounding."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
    return np.where(rng.random((height, width, 1)) < 0.5, pixels, np.where(pixels < 128, 0, 255)).astype(np.uint8)


@st.composite
def sides(draw: st.DrawFn) -> Side:
    length, new_length = draw(st.integers(1, 300)), draw(st.integers(1, 200))
    before, after = draw(st.sampled_from([(0, 0), (1, 0), (3, 4), (90, 91)]))
    start = draw(st.integers(0, new_length - 1))
    return Side(length, before, after, new_length, start, draw(st.integers(start + 1, new_length)))


@settings(max_examples=400, deadline=None)
@given(rows=sides(), columns=sides(), method=st.sampled_from(["bicubic", "bilinear"]), seed=st.integers(0, 3))
def test_every_size_padding_and_window_has_the_bits_of_pillow(
    rows: Side, columns: Side, method: str, seed: int
) -> None:
    pixels = extremes(rows.length, columns.length, seed)
    np.testing.assert_array_equal(ours(pixels, rows, columns, method), by_pillow(pixels, rows, columns, method))


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (500, 375), (640, 427), (612, 612), (3000, 71), (71, 3000)])
def test_sizes_of_photographs(size: tuple[int, int]) -> None:
    width, height = size
    pixels = extremes(height, width, 7)
    for edge in (224, 336, 384):
        rows, columns = Side(height, 0, 0, edge, 0, edge), Side(width, 0, 0, edge, 0, edge)
        np.testing.assert_array_equal(ours(pixels, rows, columns), by_pillow(pixels, rows, columns))


@pytest.mark.parametrize("size", [(2, 300), (3, 300), (3, 301), (2, 1000), (300, 2)])
@pytest.mark.parametrize("new", [(20, 48), (20, 400), (336, 336)])
def test_pictures_a_hundred_times_taller_than_wide(size: tuple[int, int], new: tuple[int, int]) -> None:
    pixels = extremes(size[1], size[0], 5)
    rows, columns = Side(size[1], 0, 0, new[1], 0, new[1]), Side(size[0], 0, 0, new[0], 0, new[0])
    np.testing.assert_array_equal(ours(pixels, rows, columns), by_pillow(pixels, rows, columns))


def test_the_order_of_the_passes_is_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other order gives other bits, and the probe sees it."""
    assert resampling._gives_the_bits_of_pillow()
    right = resampling.columns_come_first
    for wrong in (lambda *sizes: not right(*sizes), lambda *sizes: False, lambda *sizes: True):
        monkeypatch.setattr(resampling, "columns_come_first", wrong)
        assert not resampling._gives_the_bits_of_pillow()


def test_a_window_that_shows_only_padding_has_its_colour() -> None:
    pixels = extremes(4, 4, 0)
    rows = Side(4, 60, 0, 32, 0, 10)
    found = ours(pixels, rows, Side(4, 0, 0, 4, 0, 4))
    np.testing.assert_array_equal(found, np.broadcast_to(np.float32(COLOUR), (10, 4, 3)))


@settings(max_examples=1_000, deadline=None)
@given(side=sides(), method=st.sampled_from(["bicubic", "bilinear"]))
def test_what_is_outside_the_pixels_is_never_read(side: Side, method: str) -> None:
    """The compiled kernels check no bounds, so the plan must: every line read lies in the picture, every weight in the table."""
    plan = resampling._plan(side, method)
    low, high = plan.base + plan.low, plan.base + plan.high
    reads = plan.low < plan.high
    assert 0 <= plan.first <= plan.last <= side.length
    assert (low[reads] >= 0).all() and (high[reads] <= plan.last - plan.first).all()
    assert (plan.low >= 0).all() and (plan.high <= plan.weights.shape[1]).all()


def test_shapes_that_do_not_go_together_are_refused() -> None:
    pixels, side, out = extremes(10, 10, 0), Side(10, 0, 0, 5, 0, 5), np.empty((3, 5, 5), np.float32)
    rest = {"method": "bicubic", "table": LEVELS, "out": out}
    resample(pixels, side, side, **rest)
    for rows, change in (
        (side, {"out": np.empty((3, 4, 5), np.float32)}),
        (side, {"table": LEVELS[:1]}),
        (side, {"colour": (5,)}),
        (side._replace(length=100), {}),
        (side._replace(start=-2, end=3), {}),
        (side._replace(start=2, end=7), {}),
    ):
        with pytest.raises(ValueError, match="expected"):
            resample(pixels, rows, side, **{**rest, **change})


def test_kernels_work_where_nothing_can_be_kept(tmp_path: Path) -> None:
    """A read-only installation and no home: compiled anew, not an error."""
    code = (
        "import numba.core.caching as caching\n"
        "for locator in caching.CacheImpl._locator_classes: locator.from_function = classmethod(lambda *_: None)\n"
        "from vir_hf.images import resampling; assert resampling.obstacle() is None, resampling.obstacle(); print('exact')"
    )
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "exact", done.stderr


@pytest.mark.parametrize(
    "damage",
    [pytest.param(lambda data: b"", marks=pytest.mark.long), lambda data: data[: len(data) // 2]],
    ids=["empty", "half"],
)
def test_a_damaged_cache_is_compiled_around(tmp_path: Path, damage) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", "from vir_hf.images import resampling; print(resampling.obstacle())"]
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == "None", done.stderr
        kept = [path for path in tmp_path.rglob("*") if path.suffix in (".nbi", ".nbc")]
        assert kept
        for path in kept:
            path.write_bytes(damage(path.read_bytes()))


def test_without_its_compiler_numba_is_not_used() -> None:
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    command = [sys.executable, "-c", "from vir_hf.images import resampling; print(resampling.obstacle())"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert "NUMBA_DISABLE_JIT" in done.stdout, done.stderr
