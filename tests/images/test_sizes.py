"""An image's size from its header is the size it is opened with."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from vir_hf.errors import ImageError
from vir_hf.images import sizes
from vir_hf.images.opening import open_image
from vir_hf.images.sizes import upright_size

ORIENTATION = 0x0112


def encoded(kind: str, orientation: int = 0, **options: object) -> bytes:
    image = Image.new("RGB", (40, 24), "red")
    if orientation:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("orientation", [0, 1, 3, 6, 8])
def test_the_header_says_what_opening_gives(kind: str, orientation: int) -> None:
    if orientation and kind in ("GIF", "BMP", "PPM"):
        pytest.skip("holds no orientation")
    data = encoded(kind, orientation)
    expected = open_image(data).size
    assert upright_size(data) == expected == upright_size({"bytes": data, "path": None})
    assert expected == ((24, 40) if orientation in (6, 8) else (40, 24))


def test_a_png_with_its_orientation_after_the_pixels_is_turned() -> None:
    data = encoded("PNG", 6)
    start = data.index(b"eXIf") - 4
    length = int.from_bytes(data[start : start + 4], "big") + 12
    moved = data[:start] + data[start + length : -12] + data[start : start + length] + data[-12:]
    assert upright_size(moved) == open_image(moved).size == (24, 40)


def test_a_png_with_a_comment_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    comment = PngImagePlugin.PngInfo()
    comment.add_text("Software", "a program")
    data = encoded("PNG", pnginfo=comment)
    monkeypatch.setattr(sizes, "decode_image", lambda *_: pytest.fail("decoded"))
    for one in (data, encoded("JPEG", 6), encoded("WEBP", 6)):
        assert upright_size(one)


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (5, 6)).save(path)
    assert upright_size(str(path)) == (5, 6)
    Image.new("RGB", (500, 600)).save(path)
    assert upright_size({"path": str(path), "bytes": None}) == (500, 600)


def test_images_in_memory_and_what_is_no_image(tmp_path: Path) -> None:
    assert upright_size(Image.new("L", (3, 4))) == (3, 4)
    for source in (b"", b"nothing", str(tmp_path / "missing.png")):
        with pytest.raises(ImageError):
            upright_size(source)
