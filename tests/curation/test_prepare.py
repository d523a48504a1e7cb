"""Preparing a subset: drawn by seed, fetched, verified, resumed, and honest about what failed."""

from __future__ import annotations

import io
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from vir_hf import cli
from vir_hf.curation.checks import check_data
from vir_hf.curation.prepare import COCO_URL, Fetching, addresses, local_name, prepare_data, references_of
from vir_hf.errors import DataError, ImageError


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16 + number, 16), (number, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def row(number: int, image: object) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": str(number)}]
    return {"id": f"r{number}", "image": image, "conversations": turns}


class PictureServer:
    """Serves pictures on loopback and misbehaves as told: `faults[path]` lists what the next requests get."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[object]] = {}
        self.asked: Counter[str] = Counter()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                outer.asked[self.path] += 1
                data = outer.files.get(self.path)
                fault = outer.faults.get(self.path, [])
                fault = fault.pop(0) if fault else None
                if fault in ("drip", "drip headers"):
                    self.drip(data, fault == "drip headers")
                elif isinstance(fault, int):
                    self.send_response(fault)
                    self.send_header("Retry-After", "0")
                    self.end_headers()
                elif data is None:
                    self.send_error(404)
                else:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    if fault == "drop":
                        data = data[: len(data) // 2]
                    elif fault == "garble":
                        data = b"x" * len(data)
                    self.wfile.write(data)

            def drip(self, data: bytes, has_slow_headers: bool) -> None:
                self.wfile.write(b"HTTP/1.0 200 OK\r\n" if has_slow_headers else b"HTTP/1.0 200 OK\r\n\r\n")
                for byte in b"X-Slow: " + b"x" * 200 if has_slow_headers else data:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[PictureServer]:
    running = PictureServer()
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture
def source(tmp_path: Path, server: PictureServer) -> Path:
    """Twenty rows over ten pictures, which lie in a folder and on the server."""
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    for number in range(10):
        (tmp_path / "pictures" / "a" / f"{number}.jpg").write_bytes(jpeg(number))
        server.files[f"/a/{number}.jpg"] = jpeg(number)
    path = tmp_path / "source.json"
    path.write_text(json.dumps([row(number, f"a/{number % 10}.jpg") for number in range(20)]))
    return path


def downloading(server: PictureServer, **options: object) -> Fetching:
    return Fetching("download", base_url=server.url, backoff_seconds=0.01, **{"timeout_seconds": 5.0, **options})


def test_a_seeded_subset_with_its_pictures(source: Path, tmp_path: Path):
    fetching = Fetching(image_folder=str(tmp_path / "pictures"))
    first = prepare_data(str(source), tmp_path / "one", num_rows=6, seed=3, fetching=fetching)
    prepare_data(str(source), tmp_path / "two", num_rows=6, seed=3, fetching=fetching)
    other = prepare_data(str(source), tmp_path / "three", num_rows=6, seed=4, fetching=fetching)
    rows = json.loads(first.rows_file.read_text())
    assert len(rows) == 6 and not first.failed
    assert rows == json.loads((tmp_path / "two" / "rows.json").read_text()) != json.loads(other.rows_file.read_text())
    numbers = [int(r["id"][1:]) for r in rows]
    assert numbers == sorted(numbers)
    assert check_data(first.rows_file, tmp_path / "one" / "images", decode=True).problems == []
    assert len(list((tmp_path / "one" / "images").rglob("*.jpg"))) == len({r["image"] for r in rows})


def test_links_share_the_file_and_archives_are_copied(source: Path, tmp_path: Path):
    import shutil

    linked = Fetching("link", image_folder=str(tmp_path / "pictures"))
    prepare_data(str(source), tmp_path / "out", fetching=linked)
    assert (tmp_path / "out" / "images" / "a" / "1.jpg").samefile(tmp_path / "pictures" / "a" / "1.jpg")
    shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "pictures")
    packed = Fetching("link", image_folder=str(tmp_path / "packed.zip"))
    assert not prepare_data(str(source), tmp_path / "unpacked", fetching=packed).failed


def test_downloads_are_retried_until_they_decode(source: Path, tmp_path: Path, server: PictureServer):
    server.faults = {"/a/1.jpg": [503, 429, 500], "/a/2.jpg": ["drop", "drop"], "/a/3.jpg": ["garble"]}
    prepared = prepare_data(str(source), tmp_path / "out", fetching=downloading(server))
    assert not prepared.failed and prepared.num_rows == 20
    assert (server.asked["/a/1.jpg"], server.asked["/a/2.jpg"], server.asked["/a/3.jpg"]) == (4, 3, 2)
    assert check_data(prepared.rows_file, tmp_path / "out" / "images", decode=True).problems == []


@pytest.mark.parametrize("fault", ["drip", "drip headers"])
def test_a_try_ends_in_time_although_bytes_keep_coming(tmp_path: Path, server: PictureServer, fault: str):
    server.files["/a/1.jpg"] = jpeg(1)
    server.faults["/a/1.jpg"] = [fault, fault]
    (tmp_path / "rows.json").write_text(json.dumps([row(1, "a/1.jpg")]))
    fetching = downloading(server, retries=1, timeout_seconds=0.4)
    start = time.monotonic()
    prepared = prepare_data(str(tmp_path / "rows.json"), tmp_path / "out", fetching=fetching)
    assert time.monotonic() - start < 5
    assert "timed out" in prepared.failed[0]["reason"] and server.asked["/a/1.jpg"] == 2
    assert not prepare_data(str(tmp_path / "rows.json"), tmp_path / "out", fetching=downloading(server)).failed


def test_what_failed_is_listed_and_its_rows_left_out(source: Path, tmp_path: Path, server: PictureServer):
    del server.files["/a/4.jpg"]
    server.files["/a/5.jpg"] = b"<html>not a picture</html>"
    server.faults = {"/a/6.jpg": [503] * 9}
    prepared = prepare_data(str(source), tmp_path / "out", fetching=downloading(server, retries=2))
    failed = {entry["image"]: entry for entry in json.loads((tmp_path / "out" / "failed.json").read_text())}
    assert set(failed) == {"a/4.jpg", "a/5.jpg", "a/6.jpg"}
    assert "404" in failed["a/4.jpg"]["reason"] and failed["a/4.jpg"]["rows"] == ["r4", "r14"]
    assert "no image file" in failed["a/5.jpg"]["reason"] and "503" in failed["a/6.jpg"]["reason"]
    assert server.asked["/a/4.jpg"] == 1, "a file that is not there is not asked for again"
    assert server.asked["/a/6.jpg"] == 3
    assert prepared.num_rows == 14 and prepared.num_left_out == 6
    images = tmp_path / "out" / "images"
    assert check_data(prepared.rows_file, images, decode=True).problems == []
    assert not list(images.rglob("*.incomplete")) and not (images / "a" / "5.jpg").exists()


def test_run_again_it_fetches_only_what_is_missing(source: Path, tmp_path: Path, server: PictureServer):
    server.faults = {"/a/7.jpg": [404]}
    first = prepare_data(str(source), tmp_path / "out", fetching=downloading(server))
    assert [entry["image"] for entry in first.failed] == ["a/7.jpg"]
    (tmp_path / "out" / "images" / "a" / "2.jpg").unlink()
    server.asked.clear()
    again = prepare_data(str(source), tmp_path / "out", fetching=downloading(server))
    assert set(server.asked) == {"/a/7.jpg", "/a/2.jpg"}
    assert (again.num_present, again.num_rows, again.failed) == (8, 20, [])


def test_urls_in_rows_become_files(tmp_path: Path, server: PictureServer):
    server.files["/x/p.jpg?size=1"] = jpeg(1)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row(0, f"{server.url}/x/p.jpg?size=1"), row(1, [f"{server.url}/gone.jpg"])]))
    prepared = prepare_data(str(path), tmp_path / "out", fetching=downloading(server))
    (kept,) = json.loads(prepared.rows_file.read_text())
    assert kept["image"].startswith("127.0.0.1") and "://" not in kept["image"]
    assert check_data(prepared.rows_file, tmp_path / "out" / "images").problems == []
    assert len(prepared.failed) == 1


def test_coco_addresses():
    year = "http://images.cocodataset.org/train2014/COCO_train2014_000000000009.jpg"
    assert addresses("COCO_train2014_000000000009.jpg", COCO_URL) == [year]
    assert addresses("coco/val2017/000000000009.jpg", COCO_URL) == [f"{COCO_URL}/val2017/000000000009.jpg"]
    bare = [f"{COCO_URL}/train2017/000000000009.jpg", f"{COCO_URL}/val2017/000000000009.jpg"]
    assert addresses("000000000009.jpg", COCO_URL) == bare
    assert addresses("gqa/images/1 2.jpg", COCO_URL) == [f"{COCO_URL}/gqa/images/1%202.jpg"]
    assert addresses("000000000009.jpg", "https://mirror.example/c/") == ["https://mirror.example/c/000000000009.jpg"]
    assert addresses("https://a.example/b.jpg", COCO_URL) == ["https://a.example/b.jpg"]


def test_references_never_leave_the_folder(source: Path, tmp_path: Path):
    for bad in ("../a.jpg", "a/../../b.jpg", "..", "a\0.jpg", "https://a.example/../../x.jpg"):
        with pytest.raises(ImageError):
            local_name(bad)
    assert local_name("/absolute/a.jpg") == "absolute/a.jpg"
    assert local_name("https://a.example/x y.jpg?a=1") == "a.example/x_y.jpg_a_1"
    source.write_text(json.dumps([row(0, "a/0.jpg"), row(1, "../source.json")]))
    prepared = prepare_data(str(source), tmp_path / "out", fetching=Fetching(image_folder=str(tmp_path / "pictures")))
    assert prepared.num_rows == 1 and "leaves" in prepared.failed[0]["reason"]


def test_references_of_every_shape():
    assert references_of({"image": "a"}) == ["a"]
    assert references_of({"image": ["a", "b"], "images": [{"path": "c", "bytes": None}]}) == ["a", "b", "c"]
    assert references_of({"image": None, "images": [3, "", {"bytes": b""}]}) == []


def test_the_command(source: Path, tmp_path: Path, server: PictureServer, capsys: pytest.CaptureFixture[str]):
    download = ["--download", "--base-url", server.url, "--retries", "0"]
    assert cli.main(["data", "prepare", str(source), str(tmp_path / "out"), "--num-rows", "5", *download]) == 0
    assert "5 rows" in capsys.readouterr().out
    server.files.clear()
    assert cli.main(["data", "prepare", str(source), str(tmp_path / "out"), *download, "--json", "-"]) == 1
    done = json.loads(capsys.readouterr().out)
    assert done["num_rows"] == 20 - done["num_left_out"] and done["failed"]
    assert (
        cli.main(
            [
                "data",
                "prepare",
                str(source),
                str(tmp_path / "m"),
                "--match",
                "a/3",
                "--image-folder",
                str(tmp_path / "pictures"),
            ]
        )
        == 0
    )
    assert {r["image"] for r in json.loads((tmp_path / "m" / "rows.json").read_text())} == {"a/3.jpg"}
    for wrong in (
        [str(tmp_path / "nothing.json"), "out"],
        [str(source), "out", "--num-rows", "0"],
        [str(source), "out", "--base-url", "http://x"],
        [str(source), "out", "--timeout", "0"],
        [str(source), "out", "--image-folder", str(tmp_path / "nowhere")],
        [str(source), str(tmp_path / "n"), "--match", "no such text"],
        [str(source)],
    ):
        assert cli.main(["data", "prepare", *wrong]) == 2, wrong
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["ftp://x", "x.example/pictures", "http://", "http://[x", "file:///etc"])
def test_a_base_url_is_of_the_web(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str):
    out = tmp_path / "out"
    assert cli.main(["data", "prepare", str(source), str(out), "--download", "--base-url", address]) == 2
    assert f"--base-url {address}: expected an http or https address" in capsys.readouterr().err
    assert not out.exists()


def test_an_output_folder_that_cannot_be_made(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "images").write_text("a file")
    for out in (str(source), "/proc/x", str(tmp_path / "half")):
        assert cli.main(["data", "prepare", str(source), out, "--image-folder", str(tmp_path / "pictures")]) == 2
        assert f"error: {out}/images: cannot be made (" in capsys.readouterr().err


def test_an_interruption_is_said_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vir_hf.curation.prepare.prepare_data", interrupt)
    assert cli.main(["data", "prepare", str(source), str(tmp_path / "out")]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "interrupted; run the same command again to go on\n"


def test_a_source_without_rows_to_take(tmp_path: Path):
    (tmp_path / "rows.json").write_text('["text"]')
    with pytest.raises(DataError, match="nothing to prepare"):
        prepare_data(str(tmp_path / "rows.json"), tmp_path / "out")


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("coco/llava_captions.json", "coco/images"),
        ("pretrain/pretrain.json", "pretrain/images"),
        ("bench/instruct_on_coco.json", "coco/images"),
    ],
)
def test_real_subsets(shared_data: Path, tmp_path: Path, name: str, images: str):
    fetching = Fetching(image_folder=str(shared_data / images), num_workers=2)
    prepared = prepare_data(str(shared_data / name), tmp_path, num_rows=30, seed=1, fetching=fetching)
    assert prepared.num_rows == 30 and not prepared.failed
    assert check_data(prepared.rows_file, tmp_path / "images").problems == []
