"""`pixel_values`: the bits of transformers' Pillow processors, whichever way they are made."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil

from vir_hf.errors import ImageError
from vir_hf.images import preprocessing, resampling
from vir_hf.images.opening import open_image
from vir_hf.images.preprocessing import ImagePreprocessor, decode_jpeg, recommended_num_workers, what_is_slow

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


def four_lines_of_light_to_one_of_colour(image: Image.Image) -> bytes:
    """A JPEG of subsampling 4:4:1, which libjpeg reads and simplejpeg has no word for."""
    data = bytearray(jpeg(image, subsampling="4:2:2"))
    data[data.index(b"\xff\xc0") + 11] = 0x14
    return bytes(data)


def by_transformers(processor, image: Image.Image) -> torch.Tensor:
    return processor(image, return_tensors="pt")["pixel_values"][0]


PILLOW_DOES = {
    "nothing": (),
    "the decoding": ("simplejpeg",),
    "the resizing": ("numba",),
    "all": ("simplejpeg", "numba"),
}


OBSTACLES = (preprocessing.decoder_obstacle, resampling.obstacle)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch):
    """A function that hides packages of the extra `fast`."""

    def hide(*packages: str) -> None:
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name in packages else find_spec(name, *rest)
        )
        for probe in OBSTACLES:
            probe.cache_clear()

    yield hide
    monkeypatch.undo()
    for probe in OBSTACLES:
        probe.cache_clear()


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(640, 480), (427, 640), (333, 333), (101, 900), (60, 40), (1200, 337)])
def test_a_picture_has_the_bits_of_transformers(name: str, size: tuple[int, int]):
    processor = PROCESSORS[name]
    image = noise(*size)
    preprocessor = ImagePreprocessor(processor)
    ours = preprocessor(image)
    expected = by_transformers(processor, image)
    assert preprocessor.has_kernels
    assert ours.dtype == expected.dtype and ours.is_contiguous()
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("missing", PILLOW_DOES.values(), ids=PILLOW_DOES)
def test_whatever_is_missing_the_bits_are_the_same(name: str, missing: tuple[str, ...], without):
    without(*missing)
    processor = PROCESSORS[name]
    preprocessor = ImagePreprocessor(processor)
    assert preprocessor.has_decoder == ("simplejpeg" not in missing)
    assert preprocessor.has_kernels == ("numba" not in missing)
    for size in ((640, 480), (427, 640), (333, 333)):
        data = jpeg(noise(*size))
        assert torch.equal(preprocessor(data), by_transformers(processor, open_image(data)))


@pytest.mark.parametrize("probe", OBSTACLES)
def test_what_differs_from_this_pillow_is_not_used(probe, without, monkeypatch: pytest.MonkeyPatch):
    without()
    if probe is resampling.obstacle:
        monkeypatch.setattr(resampling, "_gives_the_bits_of_pillow", lambda: False)
    else:
        monkeypatch.setattr(preprocessing, "decode_jpeg", lambda data, **_: np.zeros((61, 83, 3), np.uint8))
    data = jpeg(noise(640, 480))
    preprocessor = ImagePreprocessor(PROCESSORS["llava-pad"])
    assert preprocessor.has_decoder != preprocessor.has_kernels
    assert torch.equal(preprocessor(data), by_transformers(PROCESSORS["llava-pad"], open_image(data)))
    assert "differ from those of Pillow" in str(what_is_slow())


@pytest.mark.parametrize("package", ["numba", "simplejpeg"])
def test_a_package_that_cannot_be_imported_is_done_without(package: str, without, tmp_path: Path, monkeypatch):
    without()
    (tmp_path / f"{package}.py").write_text("raise ImportError('needs another numpy')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package, raising=False)
    data = jpeg(noise(64, 48))
    preprocessor = ImagePreprocessor(PROCESSORS["llava-pad"])
    assert torch.equal(preprocessor(data), by_transformers(PROCESSORS["llava-pad"], open_image(data)))
    assert f"{package} does not work here (ImportError: needs another numpy)" in str(what_is_slow())


def test_what_is_missing_is_said_with_the_remedy(without, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", logger="vir_hf"):
        ImagePreprocessor(PROCESSORS["llava-pad"])
        assert what_is_slow() is None and caplog.messages == []
        without("numba")
        ImagePreprocessor(PROCESSORS["llava-pad"])
    assert len(caplog.messages) == 1
    assert "numba is not installed (pip install 'vir-hf[fast]')" in caplog.messages[0]


def test_the_other_processors_are_called_as_they_are():
    shrunk = LlavaImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 32, "width": 32})
    image = noise(50, 40)
    assert torch.equal(ImagePreprocessor(shrunk)(image), by_transformers(shrunk, image))


class CLIPImageProcessor(CLIPImageProcessorPil):
    """Somebody's own, of a name that is known."""

    def rescale(self, image, scale, **kwargs):
        return super().rescale(image, scale / 2, **kwargs)


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessorPil(do_normalize=False),
        CLIPImageProcessorPil(do_rescale=False),
        CLIPImageProcessorPil(do_resize=False),
        CLIPImageProcessorPil(image_mean=0.5, image_std=0.5),
        SiglipImageProcessorPil(image_mean=0.5, image_std=[0.2, 0.3, 0.4]),
        CLIPImageProcessorPil(resample=1),
        CLIPImageProcessorPil(size={"shortest_edge": 300, "longest_edge": 310}, do_center_crop=False),
        CLIPImageProcessor(),
    ],
    ids=str,
)
def test_settings_that_are_not_ours_are_transformers(processor):
    image = noise(300, 240)
    preprocessor = ImagePreprocessor(processor)
    assert not preprocessor.has_kernels
    assert torch.equal(preprocessor(image), by_transformers(processor, image))


@pytest.mark.parametrize(
    "settings",
    [
        {"image_mean": [0.5]},
        {"image_mean": [0.5] * 4, "image_std": [0.5] * 4},
        {"size": {"shortest_edge": 32.7}},
        {"size": {"shortest_edge": -3}},
        {"crop_size": {"height": 0, "width": 20}},
        {"do_pad": True, "image_mean": [1.5, 0.5, 0.5]},
    ],
    ids=str,
)
def test_settings_without_sense_are_left_to_transformers_errors(settings):
    assert not ImagePreprocessor(LlavaImageProcessorPil(**settings)).has_kernels


def test_what_only_pillow_opens_right_is_left_to_pillow():
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
    assert decode_jpeg(four_lines_of_light_to_one_of_colour(image)) is None
    assert decode_jpeg(b"\xff\xd8\xff no jpeg") is None
    processor = PROCESSORS["llava-pad"]
    turned = ImagePreprocessor(processor)(jpeg(image, exif=exif))
    assert torch.equal(turned, by_transformers(processor, open_image(jpeg(image, exif=exif))))


@pytest.mark.parametrize("missing", PILLOW_DOES.values(), ids=PILLOW_DOES)
def test_a_broken_picture_is_an_image_error(missing: tuple[str, ...], without):
    without(*missing)
    with pytest.raises(ImageError):
        ImagePreprocessor(PROCESSORS["llava-pad"])(Image.open(io.BytesIO(jpeg(noise(64, 48))[:700])))
    with pytest.raises(ImageError) as caught:
        ImagePreprocessor(PROCESSORS["llava-pad"])({"bytes": jpeg(noise(64, 48))[:700], "path": "a.jpg"})
    assert caught.value.kind == "image_truncated" and "a.jpg" in str(caught.value)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch):
    data = jpeg(noise(64, 48))
    monkeypatch.setattr("vir_hf.images.opening.MAX_PIXELS", 3_000)
    monkeypatch.setattr(preprocessing, "MAX_PIXELS", 3_000)
    with pytest.raises(ImageError) as caught:
        ImagePreprocessor(PROCESSORS["llava-pad"])(data)
    assert caught.value.kind == "image_too_large"


def test_workers_leave_a_core_for_training():
    assert 0 <= recommended_num_workers() <= 8
    assert recommended_num_workers(1_000) == 0


@pytest.mark.real_data
def test_photographs_have_the_bits_of_transformers(shared_data: Path):
    files = sorted((shared_data / "coco" / "images").glob("*.jpg"))[::12]
    for name in ("llava-pad", "clip-336", "siglip-384"):
        processor = PROCESSORS[name]
        preprocess = ImagePreprocessor(processor)
        for file in files:
            assert torch.equal(preprocess(file), by_transformers(processor, open_image(file))), (name, file)


@pytest.mark.real_data
def test_odd_files_have_the_bits_of_transformers_or_are_image_errors(shared_data: Path):
    """Grey, palette, CMYK, alpha, 16-bit, animated, turned, damaged: the same whichever way they are opened."""
    processor = PROCESSORS["llava-pad"]
    preprocess = ImagePreprocessor(processor)
    num_opened = 0
    for file in sorted((shared_data / "odd_images").rglob("*")):
        if not file.is_file():
            continue
        try:
            expected = by_transformers(processor, open_image(file))
        except ImageError as error:
            with pytest.raises(ImageError) as caught:
                preprocess(file)
            assert caught.value.kind == error.kind
        else:
            num_opened += 1
            assert torch.equal(preprocess(file), expected), file
    assert num_opened > 5
