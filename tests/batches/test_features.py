"""The cache of frozen-tower features."""

from __future__ import annotations

import io
import json
import multiprocessing
from pathlib import Path

import pytest
import tiny
import torch

from vir_hf import DataError, LlavaDataCollator, RecipeError, build, load_llava_dataset
from vir_hf.batches.features import FeatureCache, cache_identity, distinct_pictures, fill_cache
from vir_hf.recipe.load import load_recipe
from vir_hf.training.run import train


@pytest.fixture(scope="module")
def parts(tiny_parts: Path):
    torch.manual_seed(0)
    model, processor = build(str(tiny_parts / "lm"), str(tiny_parts / "tower"), "vicuna_v1")
    rows = load_llava_dataset(tiny_parts / "rows.json", tiny_parts / "images", decode_images=False)
    return model.model.eval(), processor, rows


def test_cached_features_are_the_towers_own(parts, tmp_path: Path) -> None:
    model, processor, rows = parts
    cache = FeatureCache(tmp_path, cache_identity(model, processor))
    sources = distinct_pictures(rows)
    assert sum(fill_cache(cache, model, processor, sources, batch_size=4)) == len(sources) == len(cache)
    collator = LlavaDataCollator(processor)
    for source in sources:
        with torch.no_grad():
            expected = model.encode_images(collator.preprocess(source).unsqueeze(0))[0]
        assert torch.allclose(cache(source), expected, atol=1e-6)
    assert list(fill_cache(cache, model, processor, sources)) == []  # nothing is encoded twice
    again = FeatureCache(tmp_path, cache_identity(model, processor))
    assert len(again) == len(sources) and torch.equal(again(sources[0]), cache(sources[0]))


def test_a_batch_with_cached_features_opens_no_picture(parts, tmp_path: Path) -> None:
    model, processor, rows = parts
    cache = FeatureCache(tmp_path, cache_identity(model, processor))
    list(fill_cache(cache, model, processor, distinct_pictures(rows)))

    def refuse(source):
        raise AssertionError("a picture was opened")

    batch = LlavaDataCollator(processor, feature_lookup=cache, preprocess=refuse)(list(rows)[:4])
    assert "pixel_values" not in batch
    plain = LlavaDataCollator(processor)(list(rows)[:4])
    batch.pop("labels"), plain.pop("labels")
    with torch.no_grad():
        ours, theirs = model(**batch).last_hidden_state, model(**plain).last_hidden_state
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_another_tower_dtype_or_preprocessing_is_refused_by_name(parts, tmp_path: Path) -> None:
    model, processor, _ = parts
    identity = cache_identity(model, processor)
    FeatureCache(tmp_path, identity)
    for key, value in (("tower", "0" * 64), ("dtype", "bfloat16"), ("image_processor", {"do_pad": False})):
        with pytest.raises(RecipeError, match=f"made with another {key}"):
            FeatureCache(tmp_path, {**identity, key: value})


def test_the_identity_follows_the_weights_that_features_depend_on(parts) -> None:
    model, processor, _ = parts
    before = cache_identity(model, processor)["tower"]
    with torch.no_grad():
        model.vision_tower.post_layernorm.weight.add_(1)  # no feature of layer -2 depends on it
        assert cache_identity(model, processor)["tower"] == before
        model.vision_tower.encoder.layers[0].mlp.fc1.bias.add_(1e-3)
        assert cache_identity(model, processor)["tower"] != before
        model.vision_tower.encoder.layers[0].mlp.fc1.bias.sub_(1e-3)
        model.vision_tower.post_layernorm.weight.sub_(1)


def _write_some(folder: str, identity: dict, sources: list, numbers: list[int]) -> None:
    cache = FeatureCache(folder, identity)
    for number in numbers:
        cache.add(sources[number], torch.full(cache.shape, float(number)))
    cache.flush()


def test_several_writers_at_once_lose_nothing(parts, tmp_path: Path) -> None:
    model, processor, rows = parts
    identity, sources = cache_identity(model, processor), distinct_pictures(rows)
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=_write_some, args=(str(tmp_path), identity, sources, list(range(rank, len(sources), 2))))
        for rank in range(2)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    cache = FeatureCache(tmp_path, identity)
    assert [float(cache(source)[0, 0]) for source in sources] == list(range(len(sources)))


def test_an_entry_cut_short_is_not_seen(parts, tmp_path: Path) -> None:
    model, processor, rows = parts
    identity, sources = cache_identity(model, processor), distinct_pictures(rows)
    _write_some(str(tmp_path), identity, sources, [0, 1])
    (index,) = tmp_path.glob("*.index")
    whole = index.read_bytes()
    index.write_bytes(whole[:-3])  # killed in the middle of the second line
    cache = FeatureCache(tmp_path, identity)
    assert len(cache) == 1 and cache(sources[1]) is None and cache(sources[0]) is not None


def test_a_picture_that_changes_is_encoded_anew(parts, tmp_path: Path) -> None:
    from PIL import Image

    model, processor, _ = parts
    cache = FeatureCache(tmp_path / "cache", cache_identity(model, processor))
    path = tmp_path / "a.png"
    Image.new("RGB", (30, 30), "red").save(path)
    source = {"path": str(path), "bytes": None}
    list(fill_cache(cache, model, processor, [source]))
    assert source in cache
    Image.new("RGB", (31, 30), "blue").save(path)
    assert source not in cache


def test_a_full_disk_is_seen_before_the_first_picture(parts, tmp_path: Path) -> None:
    model, processor, _ = parts
    cache = FeatureCache(tmp_path, cache_identity(model, processor))
    assert "6 pictures" in cache.check_disk(6)
    with pytest.raises(RecipeError, match="GB free"):
        cache.check_disk(10**12)


def test_training_with_the_cache_has_the_losses_of_training_without(tiny_parts: Path, tmp_path: Path) -> None:
    changes = {"training.max_steps": 4, "training.seed": 3}
    losses = []
    for name, extra in (("plain", {}), ("cached", {"training.feature_cache": "true"})):
        overrides = tiny.training_overrides(tiny_parts, tmp_path / name, **changes, **extra)
        losses.append([entry["loss"] for entry in train(load_recipe(overrides))["loss_history"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert list((tmp_path / "cached" / "feature_cache").glob("*.features"))


def test_the_command_fills_the_cache(tiny_parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vir_hf.commands.cache_features import main

    overrides = tiny.training_overrides(
        tiny_parts, tmp_path / "out", **{"training.feature_cache": tmp_path / "features"}
    )
    assert main([*overrides, "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["num_pictures"] == 6 and figures["bytes_per_picture"] == 4 * 32 * 4


def test_a_trained_tower_and_a_cache_exclude_each_other(tiny_parts: Path, tmp_path: Path) -> None:
    overrides = tiny.training_overrides(
        tiny_parts, tmp_path, **{"training.feature_cache": "true", "trainable.vision_tower": "full"}
    )
    with pytest.raises(RecipeError, match="feature_cache"):
        load_recipe(overrides)


def test_a_shard_cut_in_mid_write_keeps_what_is_whole(parts, tmp_path: Path) -> None:
    model, processor, rows = parts
    identity, sources = cache_identity(model, processor), distinct_pictures(rows)
    _write_some(str(tmp_path), identity, sources, list(range(len(sources))))
    (features,) = tmp_path.glob("*.features")
    size = FeatureCache(tmp_path, identity).bytes_per_image
    features.write_bytes(features.read_bytes()[: 3 * size + size // 2])
    cache = FeatureCache(tmp_path, identity)
    assert [source in cache for source in sources] == [True] * 3 + [False] * 3
    assert [float(cache(source)[0, 0]) for source in list(sources)[:3]] == [0, 1, 2] and cache(sources[3]) is None
    assert sum(fill_cache(cache, model, processor, sources)) == 3  # and only the rest is computed again
    again = FeatureCache(tmp_path, identity)
    assert all(source in again for source in sources) and float(again(sources[2])[0, 0]) == 2


def test_a_shard_that_is_gone_is_computed_again(parts, tmp_path: Path) -> None:
    model, processor, rows = parts
    identity, sources = cache_identity(model, processor), distinct_pictures(rows)
    _write_some(str(tmp_path), identity, sources, [0, 1])
    next(tmp_path.glob("*.features")).unlink()
    cache = FeatureCache(tmp_path, identity)
    assert cache(sources[0]) is None
    assert sum(fill_cache(cache, model, processor, sources)) == len(sources)


def test_a_damaged_entry_is_never_used_and_computed_again_when_asked(parts, tmp_path: Path, caplog) -> None:
    model, processor, rows = parts
    identity, sources = cache_identity(model, processor), distinct_pictures(rows)
    _write_some(str(tmp_path), identity, sources, list(range(len(sources))))
    (features,) = tmp_path.glob("*.features")
    size = FeatureCache(tmp_path, identity).bytes_per_image
    content = bytearray(features.read_bytes())
    content[size : 2 * size] = bytes(size)  # a block that the disk has lost
    features.write_bytes(content)
    cache = FeatureCache(tmp_path, identity)
    assert cache(sources[1]) is None and "damaged" in caplog.text and float(cache(sources[2])[0, 0]) == 2
    assert sum(fill_cache(cache, model, processor, sources, verify=True)) == 1
    with torch.no_grad():
        pixels = LlavaDataCollator(processor).preprocess(sources[1]).unsqueeze(0)
        expected = model.encode_images(pixels)[0]
    for reader in (cache, FeatureCache(tmp_path, identity)):
        assert torch.allclose(reader(sources[1]), expected, atol=1e-6)


def test_lines_of_an_index_that_make_no_sense_are_passed_over(parts, tmp_path: Path) -> None:
    model, processor, rows = parts
    identity, sources = cache_identity(model, processor), distinct_pictures(rows)
    _write_some(str(tmp_path), identity, sources, [0])
    (index,) = tmp_path.glob("*.index")
    index.write_bytes(b"\0\0\xff\nfour words in one\nabc -7 1\n" + index.read_bytes())
    cache = FeatureCache(tmp_path, identity)
    assert float(cache(sources[0])[0, 0]) == 0


def test_a_cache_written_before_there_were_checksums_is_read(parts, tmp_path: Path) -> None:
    model, processor, rows = parts
    identity, sources = cache_identity(model, processor), distinct_pictures(rows)
    _write_some(str(tmp_path), identity, sources, [0, 1])
    (index,) = tmp_path.glob("*.index")
    index.write_text("".join(" ".join(line.split()[:2]) + "\n" for line in index.read_text().splitlines()))
    cache = FeatureCache(tmp_path, identity)
    assert float(cache(sources[1])[0, 0]) == 1 and cache.verify(sources[1])


def test_a_picture_that_vanished_masks_its_row_also_where_its_features_are_cached(parts, tmp_path: Path) -> None:
    from PIL import Image

    model, processor, _ = parts
    rows = []
    for name in ("a", "b"):
        Image.new("RGB", (30, 30), {"a": "red", "b": "blue"}[name]).save(tmp_path / f"{name}.png")
        content = [{"type": "image"}, {"type": "text", "text": "What?"}]
        answer = {"role": "assistant", "content": [{"type": "text", "text": "It is."}]}
        picture = {"bytes": None, "path": str(tmp_path / f"{name}.png")}
        rows.append({"id": name, "messages": [{"role": "user", "content": content}, answer], "images": [picture]})
    cache = FeatureCache(tmp_path / "cache", cache_identity(model, processor))
    list(fill_cache(cache, model, processor, distinct_pictures(rows)))
    (tmp_path / "b.png").unlink()
    options = {"feature_lookup": cache, "with_row_ids": True}
    batch = LlavaDataCollator(processor, on_bad_image="skip", **options)(rows)
    assert [row["id"] for row in batch["masked_rows"]] == ["b"]
    with pytest.raises(DataError, match="row b: .*on_bad_image=skip"):
        LlavaDataCollator(processor, **options)(rows)


def test_embedded_pictures_of_one_name_have_features_of_their_own(parts, tmp_path: Path) -> None:
    import datasets
    from PIL import Image

    model, processor, _ = parts
    rows = []
    for number, colour in enumerate(["red", "blue", "red"]):
        buffer = io.BytesIO()
        Image.new("RGB", (30, 30), colour).save(buffer, "PNG")
        rows.append({"id": str(number), "images": [{"bytes": buffer.getvalue(), "path": "0001.png"}]})
    sources = distinct_pictures(datasets.Dataset.from_list(rows))
    assert len(sources) == len(distinct_pictures(iter(rows))) == 2
    assert [source["bytes"] for source in sources] == [row["images"][0]["bytes"] for row in rows[:2]]
    cache = FeatureCache(tmp_path, cache_identity(model, processor))
    assert sum(fill_cache(cache, model, processor, sources)) == 2
    assert not torch.equal(cache(sources[0]), cache(sources[1]))
    assert torch.equal(cache(rows[0]["images"][0]), cache(rows[2]["images"][0]))


def test_opened_pictures_of_equal_pixels_and_other_shapes_are_two(parts, tmp_path: Path) -> None:
    from PIL import Image

    model, processor, _ = parts
    cache = FeatureCache(tmp_path, cache_identity(model, processor))
    wide, high = Image.new("RGB", (40, 20), "red"), Image.new("RGB", (20, 40), "red")
    cache.add(wide, torch.zeros(cache.shape))
    assert wide in cache and high not in cache
