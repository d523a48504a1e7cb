"""The notebooks: outputs stripped, pins as the package's, commands with keys that exist; executed by `make notebooks`."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from vir_hf import __version__

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path: Path) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def sources(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path: Path) -> None:
    for cell in read(path)["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert set(cell["metadata"]) <= {"tags"}, "metadata of the editor belongs to nobody else"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_pins_are_the_packages(path: Path) -> None:
    torch = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    (install,) = [line for source in sources(path) for line in source.splitlines() if line.startswith("%pip")]
    extra = re.search(r"'vir-hf\[(\w+)\]==(\S+)'", install)
    assert torch and torch[1] in install and extra and extra[2] == __version__
    assert f"\n{extra[1]} =\n" in (ROOT / "setup.cfg").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_commands_compose(path: Path) -> None:
    from vir_hf.cli import COMMANDS
    from vir_hf.recipe.load import load_recipe

    values: dict[str, Any] = {}
    for source in sources(path):
        for line in re.findall(r"^[A-Z]+ = .*$", source, re.MULTILINE):
            exec(line, values)
        for line in source.splitlines():
            if line.startswith("!"):
                words = shlex.split(line[1:].format(**values))
                assert words[0] == "vir-hf" and words[1] in COMMANDS
                if any(word.startswith("experiment=") for word in words):
                    load_recipe([word for word in words[2:] if not word.startswith("--")])


def execute(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, parameters: str | None = None) -> str:
    """Run a notebook as it stands, but for the installation and, if given, its cell of parameters; return what it showed."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    programs = folder / "programs"
    programs.mkdir()
    (programs / "vir-hf").write_text('#!/bin/sh\nexec python -m vir_hf.cli "$@"\n', encoding="utf-8")
    (programs / "vir-hf").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "install" in tags:
            cell.source = ""
        if "parameters" in tags and parameters is not None:
            cell.source = parameters
    nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs)
    assert "error: " not in shown and "Traceback" not in shown, shown
    return shown


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_quickstart_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = execute(ROOT / "notebooks" / "quickstart.ipynb", tmp_path, monkeypatch)
    assert "heldout_accuracy" in shown and (tmp_path / "outputs" / "quickstart" / "samples.png").is_file()


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_notebook_for_a_t4_runs_with_tiny_parts(
    tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lm", "tower", "images"):
        shutil.copytree(tiny_parts / name, tmp_path / name)
    shutil.copy(tiny_parts / "rows.json", tmp_path)
    shutil.copy(tiny_parts / "rows.json", tmp_path / "heldout.json")
    more = (
        "model.name_or_path=null model.language_model=lm model.vision_tower=tower training.max_length=256 training.max_steps=2 "
        "training.global_batch_size=4 training.per_device_train_batch_size=2 training.dataloader_num_workers=0 "
        "training.logging_steps=1"
    )
    parameters = f"ROWS, HELDOUT, IMAGES, OUTPUT = 'rows.json', 'heldout.json', 'images', 'out'\nMORE = {more!r}"
    shown = execute(ROOT / "notebooks" / "finetune_on_t4.ipynb", tmp_path, monkeypatch, parameters)
    assert "step 2/2" in shown and "nothing was sent" in shown and (tmp_path / "published" / "README.md").is_file()
