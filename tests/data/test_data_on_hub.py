"""Data sets and models fetched through the real clients from a Hub on loopback, each in a process of its own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import minihub
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[minihub.Hub]:
    running, http = minihub.start(tmp_path / "hub")
    yield running
    http.shutdown()


def run(server: minihub.Hub, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": server.token,
        "HF_HOME": str(home / "hf-home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, timeout=180)


def rows() -> list[dict]:
    found = []
    for number in range(5):
        buffer = io.BytesIO()
        Image.new("RGB", (20 + number, 10), (number, 0, 0)).save(buffer, "PNG")
        turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": f"Number {number}."}]
        image = {"bytes": buffer.getvalue(), "path": None}
        found.append({"id": f"r{number}", "image": image, "conversations": turns})
    return found


LOAD = """
import json, sys
from vir_hf.data.sources import load_llava_dataset
for streaming in (False, True):
    rows = load_llava_dataset(sys.argv[1], *sys.argv[2:], streaming=streaming)
    print(json.dumps([[row["id"], row["images"][0].size] for row in rows]))
"""


@pytest.mark.slow
def test_a_data_set_by_its_name_and_a_file_of_one(server: minihub.Hub, tmp_path: Path):
    import datasets

    datasets.Dataset.from_list(rows()).to_parquet(tmp_path / "rows.parquet")
    repository = server.create("dataset", "user/pictures")
    (tmp_path / "images").mkdir()
    plain = []
    for row in rows():
        (tmp_path / "images" / f"{row['id']}.png").write_bytes(row["image"]["bytes"])
        plain.append({**row, "image": f"{row['id']}.png"})
    server.commit(
        repository, "main", "rows", {"data/train-00000-of-00001.parquet": (tmp_path / "rows.parquet").read_bytes()}, []
    )
    plain_repository = server.create("dataset", "user/plain")
    server.commit(plain_repository, "main", "rows", {"rows.json": json.dumps(plain).encode()}, [])
    expected = [[f"r{n}", [20 + n, 10]] for n in range(5)]
    for words in (["user/pictures"], ["hf://datasets/user/plain/rows.json", str(tmp_path / "images")]):
        done = run(server, tmp_path, "-c", LOAD, *words)
        assert [json.loads(line) for line in done.stdout.splitlines()] == [expected, expected], done.stderr
    checked = run(server, tmp_path, "-m", "vir_hf.cli", "data", "check", "user/pictures", "--json", "-")
    report = json.loads(checked.stdout)
    assert (checked.returncode, report["num_rows"], report["num_images"]) == (0, 5, 5), checked.stderr
    missing = run(server, tmp_path, "-c", LOAD, "user/nothing")
    assert "DataError: user/nothing: neither a file here nor a Hub data set" in missing.stderr


@pytest.mark.slow
def test_models_of_a_recipe_are_fetched(server: minihub.Hub, tiny_parts: Path, tmp_path: Path):
    names = {"lm": "user/tiny-lm", "tower": "user/tiny-tower"}
    for folder, name in names.items():
        files = {path.name: path.read_bytes() for path in (tiny_parts / folder).iterdir()}
        files["pytorch_model.bin"] = b"the same weights for another framework"
        server.commit(server.create("model", name), "main", "weights", files, [])
    recipe = [f"model.language_model={names['lm']}", f"model.vision_tower={names['tower']}"]
    command = ["-m", "vir_hf.cli", "data", "download-models", *recipe]
    done = run(server, tmp_path, *command, "--json", "-")
    assert done.returncode == 0, done.stderr
    models = json.loads(done.stdout)["models"]
    assert [model["name"] for model in models] == list(names.values())
    for model in models:
        found = {path.name for path in Path(model["path"]).iterdir()}
        assert {"config.json", "model.safetensors"} <= found and "pytorch_model.bin" not in found
        assert model["num_bytes"] > 1_000
    wrong = run(server, tmp_path, "-m", "vir_hf.cli", "data", "download-models", "model.name_or_path=user/nothing")
    assert wrong.returncode == 2 and "error: user/nothing: cannot be fetched" in wrong.stderr


REVISION = """
import json, sys
from vir_hf.data.statistics import _token_counter
from vir_hf.model.for_training import load_model_and_processor
from vir_hf.model.precision import choose_precision
from vir_hf.recipe.load import load_recipe
from vir_hf.model.row_processor import load_recipe_processor
from vir_hf.budget.shapes import load_configs
found = []
for more in ["model.revision=v2"], [], ["model.revision=v2", "model.tokenizer=user/words"]:
    recipe = load_recipe([*sys.argv[1:], *more], require_data=False)
    model, processor = load_model_and_processor(recipe, choose_precision())
    rows = load_recipe_processor(recipe)
    found.append({
        "weights": float(model.model.language_model.norm.weight[0]),
        "eps": load_configs(recipe)[0].text_config.rms_norm_eps,
        "generation": model.generation_config.max_new_tokens,
        "tokenizers": ["second" in one.tokenizer.get_vocab() for one in (processor, rows)],
        "counted": _token_counter(recipe)[0]("second"),
    })
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_revision_is_one_of_everything_in_its_repository_and_of_nothing_else(
    server: minihub.Hub, tiny_parts: Path, tmp_path: Path
):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    def files(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    second = tmp_path / "second"
    model = AutoModelForCausalLM.from_pretrained(tiny_parts / "lm", rms_norm_eps=2e-5)
    model.model.norm.weight.data.fill_(7.0)
    model.generation_config = GenerationConfig(max_new_tokens=17)
    model.save_pretrained(second)
    tokenizer = AutoTokenizer.from_pretrained(tiny_parts / "lm")
    tokenizer.add_tokens(["second"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(second)
    server.commit(server.create("model", "user/tower"), "main", "weights", files(tiny_parts / "tower"), [])
    repository = server.create("model", "user/lm")
    server.commit(repository, "main", "weights", files(tiny_parts / "lm"), [])
    server.commit(repository, "v2", "better weights", files(second), [])
    server.commit(server.create("model", "user/words"), "main", "words", files(second), [])  # has no v2
    parts = ["model.language_model=user/lm", "model.vision_tower=user/tower", "model.template=vicuna_v1"]

    done = run(server, tmp_path, "-c", REVISION, *parts)
    assert done.returncode == 0, done.stderr
    pinned, latest, other = json.loads(done.stdout.splitlines()[-1])
    assert (pinned["weights"], pinned["eps"], pinned["generation"]) == (7.0, 2e-5, 17)
    assert pinned["tokenizers"] == [True, True] and pinned["counted"] == 1
    assert (latest["weights"], latest["generation"]) == (1.0, None)
    assert latest["tokenizers"] == [False, False] and latest["counted"] > 1
    assert other["weights"] == 7.0 and other["tokenizers"] == [True, True]


CONFIGURATIONS = """---
configs:
- config_name: ai2d
  data_files:
  - {split: train, path: ai2d/train-*}
  - {split: test, path: ai2d/test-*}
- config_name: chartqa
  data_files:
  - {split: train, path: chartqa/train-*}
---
"""

MIX = """
import json
from vir_hf.data.sources import load_sources
finevision = {"path": "user/finevision"}
sources = [
    {**finevision, "name": "ai2d", "filter": {"relevance_min": ">=2"}},
    {**finevision, "name": "ai2d", "split": "test"},
    {**finevision, "name": "chartqa"},
]
for streaming in (False, True):
    rows = load_sources(sources, streaming=streaming)
    print(json.dumps([row["messages"][1]["content"][0]["text"] for row in rows]))
try:
    load_sources([{**finevision, "name": "ai3d"}])
except Exception as error:
    print(type(error).__name__, str(error)[:500])
"""


@pytest.mark.slow
def test_configurations_and_splits_of_finevision(server: minihub.Hub, tmp_path: Path):
    import datasets

    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "texts": datasets.List({"user": datasets.Value("string"), "assistant": datasets.Value("string")}),
            "source": datasets.Value("string"),
            "relevance_min": datasets.Value("int64"),
        }
    )
    contents: dict[str, bytes] = {"README.md": CONFIGURATIONS.encode()}
    for part in ("ai2d/train", "ai2d/test", "chartqa/train"):
        made = [
            {
                "images": [row["image"]],
                "texts": [{"user": "Which?", "assistant": f"{part} {n}"}],
                "source": part,
                "relevance_min": n,
            }
            for n, row in enumerate(rows()[:3])
        ]
        path = tmp_path / "part.parquet"
        datasets.Dataset.from_list(made, features=features).to_parquet(path)
        contents[f"{part}-00000-of-00001.parquet"] = path.read_bytes()
    server.commit(server.create("dataset", "user/finevision"), "main", "rows", contents, [])
    done = run(server, tmp_path, "-c", MIX)
    expected = ["ai2d/train 2", *(f"ai2d/test {n}" for n in range(3)), *(f"chartqa/train {n}" for n in range(3))]
    *loaded, refused = done.stdout.splitlines()
    assert [json.loads(line) for line in loaded] == [expected, expected], done.stderr
    assert refused.startswith("DataError user/finevision: neither a file here") and "(name: ai3d)" in refused
