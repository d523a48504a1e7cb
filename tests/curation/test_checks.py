"""The data check: every fault is found at its row, nothing else is, and no row however odd ends in a traceback."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vir_hf import cli
from vir_hf.curation.checks import ERRORS, REMEDIES, check_data
from vir_hf.curation.contamination import CONTAMINATION
from vir_hf.curation.report import pad_ratio, report_as_html, report_as_json, statistics
from vir_hf.errors import DataError


def picture(image_format: str = "JPEG", size=(64, 48), seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 60 + seed).convert("RGB").save(buffer, image_format)
    return buffer.getvalue()


def turns(question: str = "<image>\nWhat?", answer: str = "This.") -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def row(row_id: str, image: object = "good.jpg", **keys) -> dict:
    found = {"id": row_id, "image": image, "conversations": turns(f"<image>\nWhat is {row_id}?"), **keys}
    return {key: value for key, value in found.items() if value is not None}


# What `test_boxes_and_mixtures` tries, since it takes other rows than these.
OF_BOXES_AND_MIXTURES = {"box_outside", "box_other_form", "box_mixed", "mixed_shapes"}


@pytest.fixture
def faulty(tmp_path: Path) -> tuple[Path, Path, dict[int, set[str]]]:
    """A data file, its images, and which kinds are to be found at which row: one of every fault."""
    images = tmp_path / "images"
    images.mkdir()
    jpeg = picture()
    (images / "good.jpg").write_bytes(jpeg)
    (images / "empty.jpg").write_bytes(b"")
    (images / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (images / "cut.png").write_bytes(picture("PNG")[:1000])
    (images / "text.jpg").write_text("<html>404 Not Found</html>")
    (images / "really_gif.jpg").write_bytes(picture("GIF"))
    Image.new("1", (12_000, 12_000)).save(images / "bomb.png")
    Image.fromarray(np.tile(np.arange(4096, dtype=np.uint16), (2, 1))).save(images / "deep.png")  # 12 of 16 bits
    (tmp_path / "outside.jpg").write_bytes(jpeg)
    (images / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    rows_and_kinds: list[tuple[object, set[str]]] = [
        (row("fine"), set()),
        (row("text only", None, conversations=turns("Hi?")), set()),
        (row("missing", "nothing.jpg"), {"image_missing"}),
        (row("empty", "empty.jpg"), {"image_empty"}),
        (row("cut", "cut.jpg"), {"image_truncated"}),
        (row("cut png", "cut.png"), {"image_truncated"}),
        (row("text", "text.jpg"), {"image_unreadable"}),
        (row("bomb", "bomb.png"), {"image_too_large"}),
        (row("misnamed", "really_gif.jpg"), {"image_misnamed"}),
        (row("deep", "deep.png"), {"image_few_greys"}),
        (row("dots", "../outside.jpg"), {"image_outside_folder"}),
        (row("link", "link.jpg"), {"image_outside_folder"}),
        (row("url", "https://example.invalid/a.jpg"), {"image_url"}),
        (row("two", conversations=turns("<image><image> What?")), {"placeholder_mismatch"}),
        (row("none", conversations=turns("What?")), {"no_placeholder"}),
        (row("no image", None), {"placeholder_mismatch"}),
        (row("in answer", conversations=turns(answer="An <image>.")), {"placeholder_in_answer"}),
        (row("role", conversations=[{"from": "alien", "value": "<image>"}]), {"bad_role"}),
        (row("order", conversations=[*reversed(turns("<image> first?"))]), {"bad_order"}),
        (row("blank", conversations=[*turns("<image> a?"), *turns("b?", " ")]), {"empty_answer"}),
        (row("all blank", conversations=turns(answer="")), {"empty_answer", "nothing_supervised"}),
        (row("no turns", conversations=[]), {"bad_row"}),
        (row("half", conversations=turns(answer="\ud83d")), {"bad_row"}),
        ("just a string", {"bad_row"}),
        (row("fine", conversations=turns("<image> other?")), {"duplicate_id"}),
        (row("fine"), {"duplicate_row"}),
        (row("long", conversations=turns(answer="word " * 300)), {"too_long"}),
        (row("video", None, video="clip.mp4", conversations=turns("Hi?")), {"not_an_image"}),
        (row("thoughts", conversations=[*turns()[:1], {**turns()[1], "reasoning": "Hm."}]), {"not_read"}),
        (row("word", conversations=turns("<image> Is <video> a tag?")), {"media_word"}),
        (row("hopeless", conversations=turns("<image>" + "word " * 300)), {"nothing_supervised"}),
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([r for r, _ in rows_and_kinds], indent=1))
    return path, images, {number: kinds for number, (_, kinds) in enumerate(rows_and_kinds)}


@pytest.fixture(scope="module")
def processor() -> SimpleNamespace:
    """A word-level tokenizer with the template of Vicuna; a picture takes 4 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from vir_hf.rows.templates import chat_template_for, prepare_tokenizer

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    prepare_tokenizer(tokenizer, "vicuna_v1", "<image>")
    return SimpleNamespace(
        tokenizer=tokenizer,
        image_token="<image>",
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        num_image_tokens=4,
        template="vicuna_v1",
        chat_template=chat_template_for("vicuna_v1", tokenizer),
    )


def kinds_by_row(report) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for problem in report.problems:
        found.setdefault(problem.row, set()).add(problem.kind)
    return found


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("decode", [False, True])
def test_every_fault_is_reported_at_its_row(faulty, processor, num_workers: int, decode: bool, monkeypatch):
    monkeypatch.setattr("vir_hf.curation.checks._ROWS_PER_PART", 5)
    monkeypatch.setattr("vir_hf.curation.checks._IMAGES_PER_TASK", 2)
    path, images, expected = faulty
    seen = []
    report = check_data(
        path,
        images,
        processor=processor,
        max_length=200,
        decode=decode,
        num_workers=num_workers,
        progress=lambda stage, done, total: seen.append((stage, done == total)),
    )
    assert kinds_by_row(report) == {number: kinds for number, kinds in expected.items() if kinds}
    assert report.num_rows == len(expected)
    assert {kind for kinds in expected.values() for kind in kinds} == set(REMEDIES) - set(
        CONTAMINATION
    ) - OF_BOXES_AND_MIXTURES - {"image_shape"}  # of a model of several views: test_views
    assert all(problem.detail for problem in report.problems)
    assert ("rows", True) in seen and ("images", True) in seen
    details = {problem.kind: problem.detail for problem in report.problems}
    assert "row 0" in details["duplicate_row"] and "row 0" in details["duplicate_id"]
    assert "GIF" in details["image_misnamed"]


def test_what_training_refuses_is_what_loading_refuses(faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Errors of the check that show without decoding and the bad rows of the loader are the same rows."""
    import datasets

    from vir_hf.data.sources import load_llava_dataset

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path, images, _ = faulty
    report = check_data(path, images)
    bad: list = []
    options = {"on_bad_row": "skip", "on_bad_image": "skip", "max_bad_fraction": 0.9}
    load_llava_dataset(path, images, bad_rows=bad, **options)
    contents = {"image_empty", "image_truncated", "image_unreadable", "image_too_large"}
    assert {(entry.row, entry.kind) for entry in bad} == {
        (problem.row, problem.kind) for problem in report.problems if problem.kind in ERRORS - contents
    }


def test_damage_in_the_middle_is_found_by_decoding(tmp_path: Path):
    data = bytearray(picture("PNG"))
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(400)
    (tmp_path / "a.png").write_bytes(bytes(data))
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row("a", "a.png")]))
    assert kinds_by_row(check_data(path)) == {}
    assert set(kinds_by_row(check_data(path, decode=True))[0]) <= {"image_unreadable", "image_truncated"}
    assert len(check_data(path, decode=True).problems) == 1


def test_figures(tmp_path: Path, processor):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(picture(size=(40 + number, 30)))
    rows = [row(str(n), f"{n % 3}.jpg") for n in range(7)] + [
        row("text", None, conversations=turns("One two", "three"))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows))
    report = check_data(path)
    figures = statistics(report, batch_size=4)
    assert not report.problems and report.num_rows == 8
    assert figures["unit"] == "characters" and figures["row_lengths"]["max"] == len("\nWhat is 6?This.".strip())
    assert figures["rows_per_image"] == {"2": 2, "3": 1} and figures["images_per_row"] == {"0": 1, "1": 7}
    assert figures["image_widths"] == {"min": 40, "median": 41, "mean": 41.0, "p95": 42, "p99": 42, "max": 42}
    assert figures["image_formats"] == {"JPEG": 3}
    counted = statistics(check_data(path, processor=processor, max_length=60), batch_size=4)
    from vir_hf.rows.encoding import encode_row

    encoded = [encode_row(r, processor) for r in rows]
    assert counted["unit"] == "tokens"
    assert counted["tokens_per_epoch"] == sum(len(e["input_ids"]) for e in encoded)
    assert counted["supervised_tokens_per_epoch"] == sum(label >= 0 for e in encoded for label in e["labels"])


def test_the_share_of_padding():
    assert pad_ratio([10, 10, 10], 2) == 0
    assert pad_ratio([10, 5], 2) == pytest.approx(0.25)
    assert pad_ratio([], 2) == 0


def test_rows_of_several_files_are_told_apart(tmp_path: Path):
    (tmp_path / "good.jpg").write_bytes(picture())
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps([row("same"), row(name, "nothing.jpg")]))
    report = check_data(tmp_path)
    found = [(Path(p.file).name, p.row, p.kind) for p in report.problems]
    assert found == [("a.json", 1, "image_missing"), ("b.json", 0, "duplicate_row"), ("b.json", 1, "image_missing")]
    problems = report_as_json(report)["problems"]
    assert [Path(problem["file"]).name for problem in problems] == ["a.json", "b.json", "b.json"]


def test_embedded_pictures_are_looked_at(tmp_path: Path):
    import datasets

    good, cut = picture(), picture()[:1500]
    rows = [
        {"id": str(n), "image": {"bytes": data, "path": None}, "conversations": turns()}
        for n, data in enumerate((good, cut))
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    report = check_data(tmp_path / "rows.parquet")
    assert [(p.row, p.kind) for p in report.problems if p.kind != "duplicate_row"] == [(1, "image_truncated")]
    assert len(report.images) == 1


def mutate(value, rng: random.Random, depth: int = 0):
    """Return the value with something in it changed, removed, repeated or replaced."""
    junk = [
        None,
        True,
        0,
        -1.5,
        10**30,
        "",
        " ",
        "<image>",
        "\ud800",
        "\x00",
        "../x",
        "https://a/b",
        "x" * 3000,
        [],
        {},
        [[]],
        {"a": 1},
    ]
    junk += [
        "<image>" * 40,
        "gpt",
        "human",
        "system",
        {"from": "gpt"},
        {"type": "image"},
        {"bytes": None, "path": None},
        {"bytes": "abc"},
        {"bytes": [300], "path": "good.jpg"},
        {"bytes": 10**14},
        {"bytes": {"a": 1}},
    ]
    if depth > 4 or rng.random() < 0.2:
        return rng.choice(junk)
    if isinstance(value, dict) and value:
        value = dict(value)
        key = rng.choice(list(value))
        action = rng.randrange(4)
        if action == 0:
            del value[key]
        elif action == 1:
            value[rng.choice(["messages", "images", "image", "from", "value", "id", "content", "role", "?"])] = (
                rng.choice(junk)
            )
        else:
            value[key] = mutate(value[key], rng, depth + 1)
        return value
    if isinstance(value, list) and value:
        value = list(value)
        index = rng.randrange(len(value))
        action = rng.randrange(4)
        if action == 0:
            del value[index]
        elif action == 1:
            value.insert(index, rng.choice([*junk, value[index]]))
        else:
            value[index] = mutate(value[index], rng, depth + 1)
        return value
    if isinstance(value, str) and value and rng.random() < 0.7:
        cut = rng.randrange(len(value))
        return (
            value[:cut]
            + rng.choice(["", "<image>", "\ud800", "</s>", "ASSISTANT:", "\n"])
            + value[rng.randrange(len(value)) :]
        )
    return rng.choice(junk)


def test_ten_thousand_mutated_rows_give_a_report(tmp_path: Path, processor):
    (tmp_path / "good.jpg").write_bytes(picture())
    rng = random.Random(20)
    seeds = [
        row("one"),
        row("list", ["good.jpg", "good.jpg"], conversations=turns("<image> <image> a?")),
        row("long", conversations=turns() + turns("b?") + turns("c?")),
        {
            "id": 1,
            "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}],
            "images": ["good.jpg"],
        },
        row("text", None, conversations=[{"from": "system", "value": "Be brief."}, *turns("Hi?")]),
    ]
    rows = []
    for _ in range(10_000):
        mutated = rng.choice(seeds)
        for _ in range(rng.choice([1, 1, 1, 2, 3, 5])):
            mutated = mutate(mutated, rng)
        rows.append(mutated)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    report = check_data(path, tmp_path, processor=processor, max_length=100)
    assert report.num_rows == 10_000
    assert len(report.kinds()) > 10
    json.dumps(report_as_json(report)).encode()
    report_as_html(report).encode()


class TestCommand:
    """`vir-hf data check` as it is typed."""

    def test_exit_codes(self, faulty, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        path, images, _ = faulty
        assert cli.main(["data", "check", str(path), "--image-folder", str(images)]) == 1
        out = capsys.readouterr().out
        assert "image_truncated" in out and "row 4 (id cut)" in out
        (tmp_path / "clean.json").write_text(json.dumps([row("a")]))
        assert cli.main(["data", "check", str(tmp_path / "clean.json"), "--image-folder", str(images)]) == 0
        assert "nothing wrong was found" in capsys.readouterr().out
        (tmp_path / "broken.json").write_text('[{"id": 1},\n{"id": }]')
        wrong_calls = (
            ["nothing.json"],
            [str(tmp_path / "broken.json")],
            [str(path), "--image-folder", str(tmp_path / "nowhere")],
            [str(path), "--no-such-option"],
            [str(path), "--max-length", "100"],
            [str(path), "--ignore", "no_such_kind"],
            [str(path), "--tokenizer", str(tmp_path)],
            [],
        )
        for wrong in wrong_calls:
            assert cli.main(["data", "check", *wrong]) == 2, wrong
        assert "line 2" in capsys.readouterr().err
        assert cli.main(["data", "chekc"]) == 2
        assert "vir-hf data check" in capsys.readouterr().err

    def test_json_on_the_terminal_is_only_json(self, faulty, capsys: pytest.CaptureFixture[str]):
        path, images, expected = faulty
        assert cli.main(["data", "check", str(path), "--image-folder", str(images), "--json", "-"]) == 1
        report = json.loads(capsys.readouterr().out)
        assert report["num_rows"] == len(expected)
        assert report["num_bad_rows"] == len({problem["row"] for problem in report["problems"]})
        assert {"row", "id", "kind", "detail"} <= set(report["problems"][0])

    def test_output_never_takes_the_place_of_what_is_read_or_written(self, faulty, tmp_path: Path, capsys, monkeypatch):
        path, folder, _ = faulty
        monkeypatch.chdir(tmp_path)
        before = path.read_bytes()
        (tmp_path / "link.json").symlink_to(path)
        (tmp_path / "folder").mkdir()
        for options in (
            ["--json", str(path)],
            ["--html", "link.json"],
            ["--json", "same", "--html", "same"],
            ["--json", "same.dropped.json", "--fix", "same.json"],
            ["--json", "no/folder/report.json"],
            ["--html", "folder"],
            ["--fix", "-"],
            ["--fix", str(path)],
            ["--json", "/proc/report.json"],
        ):
            assert cli.main(["data", "check", str(path), "--image-folder", str(folder), *options]) == 2, options
            assert options[-2] in capsys.readouterr().err
        glob = str(path.with_name("*" + path.suffix))
        assert cli.main(["data", "check", glob, "--image-folder", str(folder), "--json", str(path)]) == 2
        assert path.read_bytes() == before and not (tmp_path / "same").exists()

    def test_calls_without_sense_are_refused(self, faulty, capsys: pytest.CaptureFixture[str]):
        path, folder, _ = faulty
        for option in ("--batch-size=0", "--num-workers=-3", "--image-tokens=0", "--max-length=-1"):
            assert cli.main(["data", "check", str(path), option]) == 2
            assert "expected 1 or more" in capsys.readouterr().err
        assert cli.main(["data", "check", str(path), str(path)]) == 2
        assert "found 2 paths; expected one" in capsys.readouterr().err
        sources = f"data.sources=[{{path: {path}, image_folder: {folder}}}]"
        assert cli.main(["data", "check", "experiment=local_lite", sources]) == 2
        assert f"vir-hf data check {path} --image-folder {folder}" in capsys.readouterr().err

    def test_kinds_can_be_ignored(self, tmp_path: Path):
        (tmp_path / "good.jpg").write_bytes(picture())
        path = tmp_path / "rows.json"
        path.write_text(json.dumps([row("a"), row("a", conversations=turns("<image> b?"))]))
        assert cli.main(["data", "check", str(path)]) == 1
        assert cli.main(["data", "check", str(path), "--ignore", "duplicate_id"]) == 0

    def test_what_is_fixed_is_clean(self, faulty, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        path, images, expected = faulty
        out = tmp_path / "sound.json"
        assert cli.main(["data", "check", str(path), "--image-folder", str(images), "--fix", str(out)]) == 1
        kept = json.loads(out.read_text())
        dropped = json.loads((tmp_path / "sound.dropped.json").read_text())
        drop = (ERRORS | {"duplicate_row"}) - {"too_long"}
        # Without a tokenizer, the row whose question alone is too long is not known to be hopeless.
        expected_drops = [n for n, kinds in expected.items() if kinds & drop and n != len(expected) - 1]
        assert [entry["row"] for entry in dropped] == expected_drops
        assert len(kept) == len(expected) - len(dropped)
        assert all(entry["problems"][0]["kind"] for entry in dropped)
        report = check_data(out, images)
        assert (
            not report.untrainable_rows
            and "duplicate_id" not in report.kinds()
            and "duplicate_row" not in report.kinds()
        )
        assert cli.main(["data", "check", str(path), "--image-folder", str(images), "--fix", str(path)]) == 2

    def test_the_page_stands_alone(self, faulty, tmp_path: Path):
        path, images, _ = faulty
        page = tmp_path / "check.html"
        cli.main(["data", "check", str(path), "--image-folder", str(images), "--html", str(page)])
        text = page.read_text(encoding="utf-8")
        assert "image_truncated" in text and "<svg" in text and "prefers-color-scheme: dark" in text
        assert "<script" not in text and 'src="http' not in text and 'href="http' not in text and "url(" not in text
        assert "&lt;image&gt;" in text  # what rows say is text, never markup

    def test_archives_serve_as_image_folder(self, tmp_path: Path):
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures" / "good.jpg").write_bytes(picture())
        shutil.make_archive(str(tmp_path / "pictures"), "zip", tmp_path, "pictures")
        path = tmp_path / "rows.json"
        path.write_text(json.dumps([row("a"), row("b", "nothing.jpg")]))
        report = check_data(path, tmp_path / "pictures.zip")
        assert [(p.row, p.kind) for p in report.problems] == [(1, "image_missing")]


def test_a_file_that_cannot_be_read_is_a_data_error(tmp_path: Path):
    with pytest.raises(DataError):
        check_data(tmp_path / "nothing.json")


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("coco/llava_demo.json", "coco/images"),
        ("coco/llava_captions.json", "coco/images"),
        ("coco/text_only.json", None),
        ("pretrain/pretrain.json", "pretrain/images"),
        ("bench/instruct_on_coco.json", "coco/images"),
    ],
)
def test_real_data_is_sound(shared_data: Path, name: str, images: str | None):
    report = check_data(shared_data / name, images and shared_data / images, decode=images == "coco/images")
    assert report.problems == []
    assert bool(report.images) == bool(images)


@pytest.mark.real_data
def test_odd_files_are_judged_by_header_as_by_opening(shared_data: Path):
    from vir_hf.errors import ImageError
    from vir_hf.images.opening import open_image, read_image_header

    def outcome(look, place: str) -> str:
        try:
            look(place)
        except ImageError as error:
            return error.kind
        return "opens"

    for entry in json.loads((shared_data / "odd_images" / "expected.json").read_text()):
        place = str(shared_data / "odd_images" / entry["file"])
        assert outcome(read_image_header, place) == outcome(open_image, place), entry


def test_the_documentation_names_every_kind():
    text = (Path(__file__).resolve().parents[2] / "docs" / "data-checks.md").read_text(encoding="utf-8")
    for kind in REMEDIES:
        severity = "error" if kind in ERRORS else "warning"
        assert f"| `{kind}` | {severity} |" in text, kind
