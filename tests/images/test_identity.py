"""One function decides which picture a reference means: by content, or without content by the file it leads to."""

from __future__ import annotations

import gc
import io
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vir_hf.images.folder import file_stamp
from vir_hf.images.identity import Folders, Itself, picture_identities, picture_identity

IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


@pytest.fixture(scope="module")
def spellings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Four files with all the ways to write where each of them lies."""
    root = tmp_path_factory.mktemp("spellings")
    for folder in ("red", "blue"):
        (root / folder).mkdir()
        for name in ("a.png", "b.png"):
            (root / folder / name).write_bytes(b"the same in all four")
    (root / "link").symlink_to(root / "red", target_is_directory=True)
    (root / "blue" / "linked.png").symlink_to(root / "red" / "a.png")
    found = {
        f"{folder}/{name}": [
            f"{root}/{folder}/{name}",
            f"{root}/{folder}/./{name}",
            f"{root}//{folder}/{name}",
            f"{root}/red/../{folder}/{name}",
            os.path.relpath(root / folder / name),
            *([f"{root}/link/{name}", f"{root}/link/../blue/../red/{name}"] if folder == "red" else []),
            *([f"{root}/blue/linked.png"] if (folder, name) == ("red", "a.png") else []),
        ]
        for folder, name in itertools.product(("red", "blue"), ("a.png", "b.png"))
    }
    found["zip a"] = [f"zip://a.png::{root}/{folder}/b.png" for folder in ("red", "link", "blue/../red")]
    found["zip red/a"] = [f"zip://red/a.png::{root}/red/b.png"]
    found["url"] = ["https://host/red/../a.png"]
    found["other url"] = ["https://host/a.png"]
    return found


contents = st.sampled_from([b"", b"a", b"ab", b"ba", b"/", b"a.png"])
names = st.sampled_from([None, "", "a.png", "0001.png", "bytes:a"])


@st.composite
def embedded(draw: st.DrawFn) -> tuple[Any, Any]:
    """What a picture is, and one reference to it: content under any name and in any container."""
    content = draw(contents)
    wrap = draw(st.sampled_from([bytes, bytearray, memoryview]))
    if draw(st.booleans()):
        return ("content", content), wrap(content)
    return ("content", content), {"bytes": wrap(content), "path": draw(names)}


@st.composite
def opened(draw: st.DrawFn) -> tuple[Any, Any]:
    """A PIL image with all that decides how it looks; made anew each time."""
    mode = draw(st.sampled_from(["RGB", "L", "P", "1"]))
    size = draw(st.sampled_from([(2, 1), (1, 2), (2, 2)]))
    value = draw(st.integers(0, 1))
    image = Image.new(mode, size, value)
    about: list[Any] = [mode, size, value]
    if mode == "P":
        palette = draw(st.sampled_from([[0, 0, 0, 9, 9, 9], [9, 9, 9, 0, 0, 0]]))
        image.putpalette(palette)
        about.append(tuple(palette))
    transparency = draw(st.sampled_from([None, 0, 1]))
    if transparency is not None:
        image.info["transparency"] = transparency
    orientation = draw(st.sampled_from([1, 6]))
    image.getexif()[0x0112] = orientation
    return ("opened", *about, transparency, orientation), image


@st.composite
def arrays(draw: st.DrawFn) -> tuple[Any, Any]:
    """A numpy array, contiguous or not, or a tensor."""
    shape = draw(st.sampled_from([(1, 2), (2, 1), (2, 2)]))
    dtype = draw(st.sampled_from(["uint8", "float32", "int64"]))
    first = draw(st.integers(0, 1))
    values = np.arange(first, first + shape[0] * shape[1], dtype=dtype).reshape(shape)
    kind = draw(st.sampled_from(["array", "strided", "tensor"]))
    if kind == "strided":
        return ("array", shape, dtype, first), np.repeat(values, 2, axis=1)[:, ::2]
    return (("array" if kind == "array" else "tensor"), shape, dtype, first), (
        torch.from_numpy(values) if kind == "tensor" else values
    )


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_two_identities_are_equal_if_and_only_if_the_pictures_are(data: st.DataObject, spellings) -> None:
    @st.composite
    def in_files(draw: st.DrawFn) -> tuple[Any, Any]:
        name = draw(st.sampled_from(sorted(spellings)))
        place = draw(st.sampled_from(spellings[name]))
        wrap = draw(st.sampled_from([str, lambda path: {"path": path}, lambda path: {"bytes": None, "path": path}]))
        return ("file", name), wrap(place)

    anything = st.one_of(embedded(), opened(), arrays(), in_files())
    (left, one), (right, other) = data.draw(anything), data.draw(anything)
    assert (picture_identity(one) == picture_identity(other)) == (left == right)
    assert picture_identity(one) == picture_identity(one) and hash(picture_identity(one)) == hash(picture_identity(one))


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_column_is_named_as_its_pictures_are_one_by_one(data: st.DataObject, spellings) -> None:
    places = st.sampled_from([place for group in spellings.values() for place in group])
    picture = st.one_of(
        st.fixed_dictionaries({"bytes": contents, "path": names}),
        st.fixed_dictionaries({"bytes": st.none(), "path": places}),
    )
    rows = data.draw(st.lists(st.one_of(st.none(), st.lists(picture, max_size=3)), max_size=5))
    column = pa.chunked_array([pa.array(rows[:2], IMAGES), pa.array(rows[2:], IMAGES)])
    start = data.draw(st.integers(0, len(rows)))
    expected = [picture_identity(picture) for row in rows[start:] for picture in row or []]
    folders = Folders()
    for _ in range(70):  # also once a folder has been asked about often enough to be listed
        assert picture_identities(column.slice(start), folders).to_pylist() == expected


def test_a_column_names_no_picture_that_has_neither_content_nor_place() -> None:
    column = pa.array(
        [[{"bytes": None, "path": None}, {"bytes": None, "path": ""}], [{"bytes": b"", "path": None}]], IMAGES
    )
    assert picture_identities(column).to_pylist() == [None, None, picture_identity(b"")]


def test_what_cannot_be_compared_is_never_taken_for_something_else() -> None:
    class Picture:
        pass

    # Objects that are gone leave their address to later ones.
    seen = set()
    for _ in range(200):
        seen.add(picture_identity(Picture()))
        gc.collect(0)
    assert len(seen) == 200
    one = Picture()
    assert picture_identity(one) == picture_identity(one)
    for unusable in ({}, {"path": ""}, {"bytes": 7, "path": "a.png"}, np.array([one, None]), None):
        assert isinstance(picture_identity(unusable), Itself)


def test_a_picture_that_cannot_be_decoded_has_an_identity_too(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:300])
    one, other = Image.open(tmp_path / "cut.png"), Image.open(tmp_path / "cut.png")
    assert picture_identity(one) == picture_identity(one) != picture_identity(other)


def test_text_too_long_for_a_path_is_content() -> None:
    long = "A" * 5_000
    assert picture_identity(f"{long}//B") != picture_identity(f"{long}/B")
    assert picture_identity("data:image/png;base64,A//B") != picture_identity("data:image/png;base64,A/B")
    assert picture_identity("a\0b") == picture_identity("a\0b")


def test_a_stamp_follows_the_file_or_the_archive_it_lies_in(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(b"12345")
    assert file_stamp(str(path)) == file_stamp(f"zip://x.png::{path}") == (5, path.stat().st_mtime_ns)
    for nothing in (str(tmp_path / "none"), "https://host/a.png", "zip://broken", "a\0b"):
        assert file_stamp(nothing) is None
