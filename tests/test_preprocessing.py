"""`pixel_values`: bit-equal to transformers' Pillow processors where exact, within 0.05 of 255 where fast."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil

from vir_hf import preprocessing
from vir_hf.images import open_image
from vir_hf.preprocessing import ImagePreprocessor, decode_jpeg, recommended_num_workers

SQUARE = {"height": 336, "width": 336}
PROCESSORS = {
    "clip-224": CLIPImageProcessorPil(),
    "clip-336": CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=SQUARE),
    "siglip-384": SiglipImageProcessorPil(size={"height": 384, "width": 384}),
    "llava-pad": LlavaImageProcessorPil(do_pad=True, do_center_crop=False, size={"shortest_edge": 336}),
    "llava-pad-crop": LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 336}, crop_size=SQUARE),
    "llava-crop": LlavaImageProcessorPil(size={"shortest_edge": 336}, crop_size=SQUARE),
    "llava-resize": LlavaImageProcessorPil(do_center_crop=False, size=SQUARE),
    "odd-crop": LlavaImageProcessorPil(size={"shortest_edge": 250}, crop_size={"height": 225, "width": 199}),
    "bilinear": CLIPImageProcessorPil(resample=2),
}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth blobs with noise on them: a picture with edges, flats and texture."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    grain = rng.integers(-12, 13, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def by_transformers(processor, image: Image.Image) -> torch.Tensor:
    return processor(image, return_tensors="pt")["pixel_values"][0]


def grey_levels(processor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return ((first - second).abs() * torch.tensor(processor.image_std).view(3, 1, 1)) * 255


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(640, 480), (427, 640), (333, 333), (101, 900), (60, 40), (1200, 337)])
def test_exact_is_bit_equal_to_transformers(name: str, size: tuple[int, int]):
    processor = PROCESSORS[name]
    image = noise(*size)
    ours = ImagePreprocessor(processor, exact=True)(image)
    expected = by_transformers(processor, image)
    assert ours.dtype == expected.dtype and ours.is_contiguous()
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(640, 480), (427, 640), (333, 333)])
def test_fast_differs_by_less_than_a_twentieth_of_a_grey_level(name: str, size: tuple[int, int]):
    pytest.importorskip("simplejpeg")
    processor = PROCESSORS[name]
    data = jpeg(noise(*size))
    preprocessor = ImagePreprocessor(processor)
    assert not preprocessor.exact
    difference = grey_levels(processor, preprocessor(data), by_transformers(processor, open_image(data)))
    assert difference.mean() < 0.05
    assert difference.max() < 3.5


@pytest.mark.parametrize("name", ["clip-336", "llava-pad", "odd-crop"])
def test_exact_stays_exact_where_pillow_or_the_decoder_surprises(name: str, monkeypatch: pytest.MonkeyPatch):
    for probe in ("passes_are_known", "decoders_agree"):
        monkeypatch.setattr(preprocessing, probe, lambda: False)
    for size in ((640, 480), (427, 640)):
        data = jpeg(noise(*size))
        expected = by_transformers(PROCESSORS[name], open_image(data))
        assert torch.equal(ImagePreprocessor(PROCESSORS[name], exact=True)(data), expected)


def test_the_probes_know_this_machine():
    pytest.importorskip("simplejpeg")
    assert preprocessing.passes_are_known() and preprocessing.decoders_agree()


def test_the_other_processors_are_called_as_they_are():
    shrunk = LlavaImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 32, "width": 32})
    image = noise(50, 40)
    assert torch.equal(ImagePreprocessor(shrunk)(image), by_transformers(shrunk, image))
    raw = CLIPImageProcessorPil(do_normalize=False)
    assert torch.equal(ImagePreprocessor(raw)(image), by_transformers(raw, image))


def test_without_simplejpeg_the_exact_way_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preprocessing.importlib.util, "find_spec", lambda name: None)
    processor = PROCESSORS["llava-pad"]
    image = noise(64, 48)
    assert torch.equal(ImagePreprocessor(processor)(image), by_transformers(processor, image))


def test_what_only_pillow_opens_right_is_left_to_pillow():
    pytest.importorskip("simplejpeg")
    image = noise(64, 48)
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.Exif()
    upright[0x0112] = 1
    assert decode_jpeg(jpeg(image)) is not None
    assert decode_jpeg(jpeg(image, exif=upright)) is not None
    assert decode_jpeg(jpeg(image, comment=b"Exif Orientation")) is not None
    assert decode_jpeg(jpeg(image.convert("L"))) is not None
    assert decode_jpeg(jpeg(image, exif=exif)) is None
    assert decode_jpeg(jpeg(image.convert("CMYK"))) is None
    assert decode_jpeg(jpeg(image)[:500]) is None
    assert decode_jpeg(b"\xff\xd8\xff no jpeg") is None
    processor = PROCESSORS["llava-pad"]
    turned = ImagePreprocessor(processor)(jpeg(image, exif=exif))
    upright = by_transformers(processor, open_image(jpeg(image, exif=exif)))
    assert grey_levels(processor, turned, upright).mean() < 0.05


def test_a_broken_picture_is_an_image_error():
    from vir_hf.errors import ImageError

    for exact in (True, False):
        with pytest.raises(ImageError) as caught:
            ImagePreprocessor(PROCESSORS["llava-pad"], exact=exact)(
                {"bytes": jpeg(noise(64, 48))[:700], "path": "a.jpg"}
            )
        assert caught.value.kind == "image_truncated" and "a.jpg" in str(caught.value)


def test_workers_leave_a_core_for_training():
    assert 0 <= recommended_num_workers() <= 8
    assert recommended_num_workers(1_000) == 0


@pytest.mark.real_data
def test_photographs_bit_equal_and_fast(shared_data: Path):
    pytest.importorskip("simplejpeg")
    files = sorted((shared_data / "coco" / "images").glob("*.jpg"))[::12]
    for name in ("llava-pad", "clip-336", "siglip-384"):
        processor = PROCESSORS[name]
        exact, fast = ImagePreprocessor(processor, exact=True), ImagePreprocessor(processor)
        for file in files:
            expected = by_transformers(processor, open_image(file))
            assert torch.equal(exact(file), expected), (name, file)
            assert grey_levels(processor, fast(file), expected).mean() < 0.05, (name, file)


@pytest.mark.parametrize("method", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR], ids=["bicubic", "bilinear"])
@pytest.mark.parametrize(
    "size",
    [(640, 480), (480, 640), (500, 375), (375, 500), (640, 427), (427, 640), (612, 612), (101, 900), (900, 101)],
    ids=str,
)
def test_windows_of_a_resized_picture_have_its_bits(size: tuple[int, int], method: Image.Resampling) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    shorter = min(size)
    for edge in (336, 77, 13):
        new = (int(edge * size[0] / shorter), int(edge * size[1] / shorter))
        left, top = (new[0] - edge) // 2, (new[1] - edge) // 2
        for box in ((left, top, left + edge, top + edge), (0, 0, edge, edge), (left, 0, *new)):
            found = preprocessing.resize_and_crop(image, new, box, method)
            assert found.size == (box[2] - box[0], box[3] - box[1])
            assert found.tobytes() == image.resize(new, method).crop(box).tobytes(), (new, box)


def test_edges_that_a_float_cannot_hold_are_not_exact() -> None:
    assert preprocessing._is_exact(56 * 640, 448) and not preprocessing._is_exact(56 * 640, 503)
    assert not preprocessing._is_exact(22_705 * 1024 + 729, 1024)  # ten binary places, but 15 bits before them
    noise = np.random.default_rng(3).integers(0, 256, (12, 45_715, 3), dtype=np.uint8)
    image, new = Image.fromarray(noise), (1_828, 12)
    found = preprocessing.resize_and_crop(image, new, (908, 0, 920, 12), Image.Resampling.BICUBIC)
    assert found.tobytes() == image.resize(new, Image.Resampling.BICUBIC).crop((908, 0, 920, 12)).tobytes()


def test_pixels_with_a_spare_byte_make_the_same_picture() -> None:
    assert preprocessing.pixels_can_be_shared()  # with the Pillow that the tests run with
    pixels = np.random.default_rng(2).integers(0, 256, (9, 11, 4), dtype=np.uint8)
    shared = preprocessing.as_image(pixels)
    expected = Image.fromarray(np.ascontiguousarray(pixels[:, :, :3]))
    assert shared.mode == "RGB" and shared.tobytes() == expected.tobytes()
    assert shared.rotate(90).tobytes() == expected.rotate(90).tobytes()
    assert shared.crop((1, 2, 9, 12)).tobytes() == expected.crop((1, 2, 9, 12)).tobytes()
