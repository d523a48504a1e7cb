"""Opening pictures: every kind becomes RGB in the documented way, everything else is an error with a kind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import socket
import struct
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import (
    BufrStubImagePlugin,
    EpsImagePlugin,
    GribStubImagePlugin,
    Hdf5StubImagePlugin,
    Image,
    WmfImagePlugin,
)
from torch._utils import ExceptionWrapper
from transformers import CLIPImageProcessor

from vir_hf.errors import DataError, ImageError, RecipeError, RunError
from vir_hf.images.folder import ImageFolder
from vir_hf.images.identity import Itself, picture_identity
from vir_hf.images.opening import FORMATS, count_greys, is_upright, open_image, read_image_header, read_image_size
from vir_hf.images.preprocessing import ImagePreprocessor


def encode(image: Image.Image, image_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def kind_of(source, *args, **kwargs) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(source, *args, **kwargs)
    assert str(caught.value)
    return caught.value.kind


def pixels_of(data: bytes) -> list[tuple[int, ...]]:
    return [tuple(pixel) for pixel in np.asarray(open_image(data)).reshape(-1, 3).tolist()]


def half_red(size=(8, 4)) -> Image.Image:
    """Left half red, right half black."""
    image = Image.new("RGB", size)
    image.paste((255, 0, 0), (0, 0, size[0] // 2, size[1]))
    return image


def test_a_path_bytes_a_datasets_dict_and_a_pil_image_give_the_same_picture(tmp_path: Path):
    data = encode(half_red())
    (tmp_path / "a.png").write_bytes(data)
    expected = np.asarray(half_red())
    sources = ["a.png", data, {"bytes": data, "path": None}, {"bytes": None, "path": str(tmp_path / "a.png")}]
    for source in sources:
        image = open_image(source, tmp_path)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), expected)
    np.testing.assert_array_equal(np.asarray(open_image(Image.open(tmp_path / "a.png"))), expected)
    assert open_image(tmp_path / "a.png").size == (8, 4)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter clockwise to be seen
    image = open_image(encode(half_red(), exif=exif))
    assert image.size == (4, 8)
    assert image.getpixel((0, 0)) == (255, 0, 0) and image.getpixel((0, 7)) == (0, 0, 0)


def test_transparency_is_laid_over_white():
    image = Image.new("RGBA", (2, 1))
    image.putdata([(255, 0, 0, 255), (0, 0, 0, 0)])
    assert pixels_of(encode(image)) == [(255, 0, 0), (255, 255, 255)]
    grey = Image.new("LA", (2, 1))
    grey.putdata([(7, 255), (0, 0)])
    assert pixels_of(encode(grey)) == [(7, 7, 7), (255, 255, 255)]
    palette = half_red().convert("P")
    black = palette.getpixel((7, 0))
    assert open_image(encode(palette, transparency=black)).getpixel((7, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_to_eight():
    values = np.array([[0, 0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    assert [pixel[0] for pixel in pixels_of(encode(Image.fromarray(values)))] == [0, 0x12, 0x80, 0xFF]


def test_floats_are_fractions_bytes_or_sixteen_bits():
    def opened(values):
        return [p[0] for p in pixels_of(encode(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF"))]

    assert opened([0.0, 0.5, 1.0]) == [0, 128, 255]
    assert opened([0.0, 7.0, 200.0]) == [0, 7, 200]
    assert opened([0.0, 257.0, 65535.0]) == [0, 1, 255]
    assert opened([float("nan"), 0.0, 1.0]) == [0, 0, 255]


@pytest.mark.parametrize(
    ("mode", "image_format"), [("L", "PNG"), ("1", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"), ("LAB", "TIFF")]
)
def test_other_modes_become_rgb(mode: str, image_format: str):
    source = Image.new("LAB", (8, 8)) if mode == "LAB" else half_red((8, 8)).convert(mode)
    image = open_image(encode(source, image_format))
    assert (image.mode, image.size) == ("RGB", (8, 8))


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_every_fault_has_its_kind(tmp_path: Path):
    photo = encode(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
    assert kind_of("nothing.jpg", tmp_path) == "image_missing"
    assert kind_of({"bytes": None, "path": None}) == "image_missing"
    assert kind_of({"bytes": None, "path": str(tmp_path / "nothing.jpg")}) == "image_missing"
    assert kind_of(b"") == "image_empty"
    assert kind_of(b"no picture at all") == "image_unreadable"
    assert kind_of(photo[: len(photo) // 2]) == "image_truncated"
    assert kind_of("https://example.invalid/a.jpg") == "image_url"
    assert kind_of("file:///etc/hostname") == "image_url"
    assert kind_of("file:///etc/hostname", allow_urls=True) == "image_url"
    with pytest.raises(DataError, match="int"):
        open_image(7)  # type: ignore[arg-type]


def test_bombs_are_refused_before_they_are_decoded():
    huge = Image.new("1", (12_000, 12_000))
    data = encode(huge)
    assert len(data) < 100_000
    assert kind_of(data) == "image_too_large"


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 10 10 rectfill\nshowpage\n"
STRANGE = {  # kinds whose pictures other programs, or whatever a program registered, would draw
    "eps": POSTSCRIPT,
    "eps_with_preview": b"\xc5\xd0\xd3\xc6"
    + struct.pack("<IIIIIIH", 32, len(POSTSCRIPT), 0, 0, 0, 0, 0xFFFF)
    + b"\0\0"
    + POSTSCRIPT,
    "pdf": b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF\n",
    "wmf": b"\xd7\xcd\xc6\x9a\0\0"
    + struct.pack("<hhhhH", 0, 0, 100, 100, 72)
    + b"\0" * 6
    + b"\x01\0\x09\0"
    + b"\0" * 80,
    "emf": b"\x01\0\0\0" + struct.pack("<I8i", 108, 0, 0, 10, 10, 0, 0, 999, 999) + b" EMF" + b"\0" * 80,
    "grib": b"GRIB" + b"\0\0\0\x01" + b"\0" * 80,
    "hdf5": b"\x89HDF\r\n\x1a\n" + b"\0" * 80,
    "bufr": b"BUFR" + b"\0" * 80,
    "fits": b"".join(
        card.ljust(80)
        for card in (
            b"SIMPLE  =                    T",
            b"BITPIX  =                    8",
            b"NAXIS   =                    2",
        )
    )
    + b"NAXIS1  =                    4".ljust(80)
    + b"NAXIS2  =                    4".ljust(80)
    + b"END".ljust(80 * 31)
    + b"\0" * 2880,
    "mpeg": b"\x00\x00\x01\xb3" + b"\x01\x00\x10" + b"\0" * 80,
}


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears when Ghostscript is started; what a program registered to draw other kinds fails the test."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ntouch {tmp_path / "started"}\n[ "$1" = --version ] && echo 10.0\nexit 0\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)

    class Handler:
        def open(self, image: object) -> None:
            (tmp_path / "started").touch()

        load = open

    for plugin in (WmfImagePlugin, GribStubImagePlugin, Hdf5StubImagePlugin, BufrStubImagePlugin):
        monkeypatch.setattr(plugin, "_handler", Handler())
    return tmp_path / "started"


@pytest.mark.parametrize("kind", STRANGE)
def test_no_picture_starts_another_program(kind: str, started: Path, tmp_path: Path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(STRANGE[kind])
    readers = [
        open_image,
        read_image_header,
        read_image_size,
        lambda source: open_image({"bytes": path.read_bytes(), "path": None}),
        ImagePreprocessor(CLIPImageProcessor()),
    ]
    for read in readers:
        with pytest.raises(ImageError, match="is no image file of a kind opened here") as caught:
            read(str(path))
        assert caught.value.kind == "image_unreadable" and len(str(caught.value)) < 500
    assert not is_upright(b"\xff\xd8\xff\xe1" + STRANGE[kind])
    try:
        opened = Image.open(path)
    except Exception:
        opened = None  # Pillow itself knows no such kind, or not this one
    if opened is not None:
        started.unlink(missing_ok=True)  # by Pillow's own opening
        with pytest.raises(ImageError, match="image: is a .* file; expected JPEG") as caught:
            open_image(opened)
        assert isinstance(picture_identity(opened), Itself)
    assert not started.exists()


def test_a_program_would_be_started_without_the_list_of_kinds(started: Path):
    with contextlib.suppress(Exception):
        Image.open(io.BytesIO(POSTSCRIPT)).load()
    assert started.exists()


def test_every_kind_on_the_list_that_pillow_writes_is_opened():
    drawn = {}
    for name in FORMATS:
        if name in Image.SAVE:
            with contextlib.suppress(ValueError, OSError, KeyError):  # a mode or a size that the kind does not have
                drawn[name] = encode(half_red((32, 32)), name)
    assert {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "TGA", "PCX"} <= set(drawn)
    for name, data in drawn.items():
        assert open_image(data).mode == "RGB" and read_image_size(data) == open_image(data).size, name


def test_an_error_survives_the_way_back_from_a_worker_process():
    error = pickle.loads(pickle.dumps(ImageError("image_empty", "a.jpg: empty")))
    assert (error.kind, str(error)) == ("image_empty", "a.jpg: empty")


class TestFolder:
    """References never leave the image folder."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "images" / "sub").mkdir(parents=True)
        for place in ("secret.png", "images/a.png", "images/sub/b.png"):
            (tmp_path / place).write_bytes(encode(half_red()))
        return tmp_path / "images"

    def test_paths_inside_are_opened(self, folder: Path):
        for name in ("a.png", "sub/b.png", "sub/../a.png", "./a.png", str(folder / "a.png")):
            assert open_image(name, folder).size == (8, 4)

    def test_dots_and_absolute_paths_do_not_lead_out(self, folder: Path):
        for name in ("../secret.png", "sub/../../secret.png", str(folder.parent / "secret.png"), "/etc/hostname"):
            assert kind_of(name, folder) == "image_outside_folder"
        for name in ("..", "../", "sub/../.."):
            assert kind_of(name, folder) == "image_outside_folder"
        assert kind_of("sub/..", folder) == "image_missing"

    def test_only_regular_files_are_read(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        os.mkfifo(folder / "pipe.png")
        os.mkfifo(folder / "pipe.zip")
        monkeypatch.chdir(folder)  # a socket's path must be short
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("socket.png")
        for name, word in (("pipe.png", "named pipe"), ("socket.png", "socket")):
            for read in (lambda path: open_image(path, folder), read_image_header):
                with pytest.raises(ImageError, match=f"is a {word}; expected a regular file") as caught:
                    read(str(folder / name))
                assert caught.value.kind == "image_unreadable"
        assert kind_of("/dev/zero") == "image_unreadable"
        with pytest.raises(DataError, match="no regular file"):
            open_image("a.png", folder / "pipe.zip")

    def test_symbolic_links_do_not_lead_out(self, folder: Path):
        (folder / "link.png").symlink_to(folder.parent / "secret.png")
        (folder / "up").symlink_to(folder.parent)
        (folder / "inside.png").symlink_to(folder / "a.png")
        assert kind_of("link.png", folder) == "image_outside_folder"
        assert kind_of("up/secret.png", folder) == "image_outside_folder"
        assert open_image("inside.png", folder).size == (8, 4)

    def test_a_folder_that_begins_like_the_image_folder_is_outside(self, folder: Path):
        (folder.parent / "images2").mkdir()
        (folder.parent / "images2" / "c.png").write_bytes(encode(half_red()))
        assert kind_of("../images2/c.png", folder) == "image_outside_folder"

    def test_the_image_folder_itself_may_be_a_link(self, folder: Path):
        link = folder.parent / "link"
        link.symlink_to(folder)
        assert open_image("a.png", link).size == (8, 4)

    def test_odd_names_are_missing_not_crashes(self, folder: Path):
        for name in ("", "a\0.png", "sub", "a.png/b.png", "x" * 5000, "\ud800.png"):
            assert kind_of(name, folder) in ("image_missing", "image_unreadable")

    def test_a_wrong_image_folder_is_named(self, tmp_path: Path):
        with pytest.raises(DataError, match="nowhere.*no such folder"):
            open_image("a.png", tmp_path / "nowhere")

    def test_a_folder_travels_to_another_process_without_its_listings(self, folder: Path):
        known = ImageFolder(folder)
        known.locate("a.png")
        assert b"a.png" not in pickle.dumps(known)
        assert pickle.loads(pickle.dumps(known)).locate("a.png") == known.locate("a.png")

    def test_coco_names_resolve_across_editions(self, folder: Path):
        picture = encode(half_red())
        (folder / "000000000009.jpg").write_bytes(picture)
        (folder / "COCO_val2014_000000000042.jpg").write_bytes(picture)
        (folder / "train2017").mkdir()
        (folder / "train2017" / "000000000077.jpg").write_bytes(picture)
        assert open_image("COCO_train2014_000000000009.jpg", folder).size == (8, 4)
        assert open_image("000000000042.jpg", folder).size == (8, 4)
        assert open_image("train2014/COCO_train2014_000000000077.jpg", folder).size == (8, 4)
        assert kind_of("COCO_train2014_000000000010.jpg", folder) == "image_missing"
        assert open_image("000000000009.jpg\n", folder).size == (8, 4)  # white space around a name is nobody's
        assert kind_of("000000000010.jpg\n", folder) == "image_missing"
        # A place written down before the file was renamed.
        assert open_image({"bytes": None, "path": str(folder / "000000000042.jpg")}).size == (8, 4)


class TestArchives:
    """Members of .zip and .tar are read in place."""

    @pytest.fixture(params=["stored.zip", "deflated.zip", "plain.tar"])
    def archive(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        path = tmp_path / request.param
        members = {"train2017/000000000009.jpg": encode(half_red()), "train2017/broken.jpg": b""}
        if path.suffix == ".zip":
            method = zipfile.ZIP_STORED if path.stem == "stored" else zipfile.ZIP_DEFLATED
            with zipfile.ZipFile(path, "w", method) as file:
                for name, data in members.items():
                    file.writestr(name, data)
        else:
            with tarfile.open(path, "w") as file:
                for name, data in members.items():
                    info = tarfile.TarInfo(f"./{name}")
                    info.size = len(data)
                    file.addfile(info, io.BytesIO(data))
        return path

    @pytest.mark.parametrize(
        "name",
        [
            "train2017/000000000009.jpg",
            "000000000009.jpg",
            "coco/train2017/000000000009.jpg",
            "COCO_train2014_000000000009.jpg",
        ],
    )
    def test_a_member_is_found_with_more_or_less_of_its_path(self, archive: Path, name: str):
        np.testing.assert_array_equal(np.asarray(open_image(name, archive)), np.asarray(half_red()))

    def test_faults(self, archive: Path):
        assert kind_of("train2017/nothing.jpg", archive) == "image_missing"
        assert kind_of("broken.jpg", archive) == "image_empty"
        assert kind_of("../000000000009.jpg", archive) == "image_outside_folder"

    def test_an_archive_is_found_where_a_folder_was_expected(self, archive: Path):
        folder = archive.parent / "data" / "coco"
        folder.mkdir(parents=True)
        archive.rename(folder / f"train2017{archive.suffix}")
        assert open_image("coco/train2017/000000000009.jpg", folder.parent).size == (8, 4)

    def test_coco_editions_are_found_in_an_archive_in_a_folder(self, archive: Path):
        folder = archive.parent / "data" / "coco"
        folder.mkdir(parents=True)
        archive.rename(folder / f"train2017{archive.suffix}")
        for name in ("train2014/COCO_train2014_000000000009.jpg", "val2017/000000000009.jpg"):
            assert open_image(f"coco/{name}", folder.parent).size == (8, 4)
            assert open_image(name, folder).size == (8, 4)
        assert kind_of("coco/train2014/COCO_train2014_000000000010.jpg", folder.parent) == "image_missing"
        (folder / "train2014").mkdir()
        assert open_image("coco/train2014/COCO_train2014_000000000009.jpg", folder.parent).size == (8, 4)

    @pytest.mark.parametrize("name", ["coco.zip", "coco/images.zip"])
    def test_coco_editions_are_found_in_an_archive_of_several(self, tmp_path: Path, name: str):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True)
        with zipfile.ZipFile(path, "w") as file:
            for member in ("train2017/000000000009.jpg", "val2014/COCO_val2014_000000000042.jpg"):
                file.writestr(member, encode(half_red()))
        top = name.removesuffix(".zip")
        for reference in ("train2014/COCO_train2014_000000000009.jpg", "train2017/000000000042.jpg"):
            assert open_image(f"{top}/{reference}", tmp_path / "data").size == (8, 4)
            assert open_image(reference, path).size == (8, 4)

    def test_a_member_may_begin_with_a_dot_and_a_slash(self, tmp_path: Path):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
            file.writestr("./dot.png", encode(half_red()))
        assert open_image("dot.png", tmp_path / "a.zip").size == (8, 4)
        assert open_image("./dot.png", tmp_path / "a.zip").size == (8, 4)

    def test_a_hard_link_in_a_tar_is_the_file_it_links_to(self, tmp_path: Path):
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.png").write_bytes(encode(half_red()))
        os.link(tmp_path / "in" / "a.png", tmp_path / "in" / "b.png")
        with tarfile.open(tmp_path / "a.tar", "w") as file:
            for name in ("a.png", "b.png"):
                file.add(tmp_path / "in" / name, f"./{name}")
            assert file.getmember("./b.png").islnk()
        assert open_image("b.png", tmp_path / "a.tar").size == (8, 4)

    def test_the_place_of_a_member_must_lie_in_the_folder_too(self, archive: Path, tmp_path: Path):
        place = f"{archive.suffix[1:]}://train2017/000000000009.jpg::{archive}"
        assert open_image(place).size == (8, 4)
        assert open_image(place, archive).size == (8, 4)
        assert open_image(place, tmp_path).size == (8, 4)
        (tmp_path / "other").mkdir()
        assert kind_of(place, tmp_path / "other") == "image_outside_folder"

    def test_two_processes_read_one_archive(self, archive: Path):
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context

        place = ImageFolder(archive).locate("000000000009.jpg")
        open_image(place)
        with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
            assert {image.size for image in pool.map(open_image, [place] * 40)} == {(8, 4)}

    def test_a_damaged_archive_is_an_error_of_its_own(self, archive: Path):
        data = archive.read_bytes()
        archive.write_bytes(b"x" * 600 + data[600 : len(data) // 2])
        with pytest.raises(DataError, match="no readable"):
            open_image("000000000009.jpg", archive)


class TestUrls:
    """URLs are opened only when allowed."""

    def test_a_url_is_fetched_when_allowed(self, http_folder):
        root, address = http_folder
        (root / "a.png").write_bytes(encode(half_red()))
        assert open_image(f"{address}/a.png", allow_urls=True).size == (8, 4)
        assert kind_of(f"{address}/missing.png", allow_urls=True) == "image_missing"
        assert kind_of(f"{address}/a.png") == "image_url"


@pytest.mark.real_data
def test_every_odd_file_is_rgb_or_has_a_named_reason(shared_data: Path):
    """`expected.json` says what Pillow makes of each; where it opens a file, so do we."""
    folder = shared_data / "odd_images"
    entries = json.loads((folder / "expected.json").read_text())
    assert len(entries) == 35
    for entry in entries:
        opens = "rgb ok" in entry["pil"]
        try:
            image = open_image(entry["file"], folder)
        except ImageError as error:
            assert not opens, (entry, str(error))
            assert error.kind in ("image_truncated", "image_unreadable", "image_too_large", "image_empty")
            assert entry["file"] in str(error)
        else:
            assert opens and image.mode == "RGB", entry
            size = tuple(int(n) for n in entry["pil"].split("(")[1].split(")")[0].split(","))
            is_turned = "exif_orient=6" in entry["pil"]
            assert image.size == (size[::-1] if is_turned else size), entry
    assert os.environ.get("PIL_LOAD_TRUNCATED") is None


class TestNames:
    """The same name, as another system or program writes it."""

    @pytest.mark.parametrize(
        ("on_disk", "written"),
        [
            (unicodedata.normalize("NFD", "caf\u00e9/\u00fc.png"), "caf\u00e9/\u00fc.png"),
            ("caf\u00e9.png", unicodedata.normalize("NFD", "caf\u00e9.png")),
            ("a/b c.png", "a\\b c.png"),
            ("a/b c.png", "a/b%20c.png"),
            ("a.png", " a.png "),
            ("50%25.png", "50%25.png"),  # what is there as it is written is taken as it is written
        ],
    )
    def test_it_is_found(self, on_disk: str, written: str, tmp_path: Path) -> None:
        path = tmp_path / on_disk
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(half_red()))
        assert ImageFolder(tmp_path).locate(written) == str(path)
        with zipfile.ZipFile(tmp_path / "all.ZIP", "w") as archive:
            archive.write(path, on_disk)
        assert ImageFolder(tmp_path / "all.ZIP").locate(written) == f"zip://{on_disk}::{tmp_path / 'all.ZIP'}"

    def test_a_name_in_other_letters_is_told_and_not_taken(self, tmp_path: Path) -> None:
        (tmp_path / "IMG_1.JPG").write_bytes(encode(half_red()))
        with pytest.raises(ImageError, match=r"Did you mean IMG_1\.JPG\?"):
            ImageFolder(tmp_path).locate("img_1.jpg")
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
            archive.write(tmp_path / "IMG_1.JPG", "deep/IMG_1.JPG")
        with pytest.raises(ImageError, match=r"Did you mean deep/IMG_1\.JPG\?"):
            ImageFolder(tmp_path / "all.zip").locate("img_1.jpg")

    @pytest.mark.parametrize(
        "written", ["..%2Fsecret.png", "..\\secret.png", "%2e%2e/secret.png", "a\\..\\..\\secret.png"]
    )
    def test_no_spelling_leaves_the_folder(self, written: str, tmp_path: Path) -> None:
        (tmp_path / "secret.png").write_bytes(encode(half_red()))
        (tmp_path / "images" / "a").mkdir(parents=True)
        with pytest.raises(ImageError) as caught:
            ImageFolder(tmp_path / "images").locate(written)
        assert caught.value.kind in ("image_outside_folder", "image_missing")

    @pytest.mark.parametrize("codec", ["utf-8", "gbk", "cp1252", "shift_jis"])
    def test_zips_that_do_not_say_how_their_names_are_encoded(self, codec: str, tmp_path: Path) -> None:
        name = {"gbk": "\u56fe.png", "shift_jis": "\u56f3.png"}.get(codec, "\u00e9t\u00e9.png")
        path = tmp_path / "old.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(zipfile.ZipInfo("x" * len(name.encode(codec))), encode(half_red()))
        data = path.read_bytes().replace(b"x" * len(name.encode(codec)), name.encode(codec))
        path.write_bytes(data)
        assert open_image(ImageFolder(path).locate(name)).size == (8, 4)

    def test_zips_of_windows_with_backslashes(self, tmp_path: Path) -> None:
        path = tmp_path / "old.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("train/a.png", encode(half_red()))
        path.write_bytes(path.read_bytes().replace(b"train/a.png", b"train\\a.png"))
        for written in ("train/a.png", "train\\a.png"):
            assert open_image(ImageFolder(path).locate(written)).size == (8, 4)


@pytest.mark.parametrize(("bits", "left"), [(16, 256), (12, 16), (10, 4)])
def test_how_many_greys_are_left_of_a_deep_image(bits: int, left: int) -> None:
    ramp = np.tile(np.linspace(0, 2**bits - 1, 512), (4, 1)).astype(np.uint16)
    assert count_greys(encode(Image.fromarray(ramp)))[1] == left
    assert read_image_header(encode(Image.fromarray(ramp))).is_deep
    assert not read_image_header(encode(half_red())).is_deep


@pytest.mark.parametrize(
    "error",
    [ImageError("image_missing", "a.png: gone. Fetch it."), DataError("row 3: odd"), RecipeError("x"), RunError("y")],
)
def test_an_error_that_torch_hands_on_from_a_worker_is_its_own_message(error: Exception) -> None:
    try:
        raise error
    except Exception:
        handed_on = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(type(error)) as caught:
        handed_on.reraise()
    assert str(caught.value) == str(error)


def test_an_address_with_a_space_is_fetched(http_folder: tuple[Path, str]) -> None:
    root, url = http_folder
    (root / "a b.png").write_bytes(encode(half_red()))
    assert open_image(f"{url}/a b.png", allow_urls=True).size == (8, 4)
    with pytest.raises(ImageError, match="URL"):
        open_image(f"file://{root}/a b.png", allow_urls=True)
