"""The reference that is made from the code: every command, key, variable, exit code and public name is on it."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        return importlib.import_module("reference_pages")


def test_every_command_and_its_words_have_a_section(pages: ModuleType) -> None:
    from vir_hf.cli import COMMANDS
    from vir_hf.commands.data import WORDS

    text = pages.commands()
    sections = set(re.findall(r"^###? vir-hf (.+)$", text, re.MULTILINE))
    assert sections == {*COMMANDS, *(f"data {word}" for word in WORDS)}
    assert "`--log-level LEVEL`" in text and "`--recipe FILE`" in text


def test_every_key_stands_on_the_page_and_ours_have_a_meaning(pages: ModuleType) -> None:
    from vir_hf.recipe.load import schema

    text = pages.recipe_keys()
    keys = [f"{section}.{name}" for section, names in schema().items() for name in names]
    assert [key for key in keys if f"| `{key}` |" not in text] == []
    learning_rate = next(line for line in text.splitlines() if line.startswith("| `training.learning_rate`"))
    assert learning_rate.split("|")[4].strip() != ""


def test_every_variable_that_the_package_reads_is_on_the_page(pages: ModuleType) -> None:
    sources = [*(ROOT / "vir_hf").rglob("*.py"), ROOT / "spaces" / "app.py"]
    read = {name for path in sources for name in re.findall(r"\bVIR_HF_[A-Z_]+\b", path.read_text(encoding="utf-8"))}
    assert read == set(pages.VARIABLES)


def test_every_exit_code_is_on_the_page(pages: ModuleType) -> None:
    from vir_hf.cli import EXIT_CODES

    assert [int(code) for code in re.findall(r"^\| (\d+) \|", pages.exit_codes(), re.MULTILINE)] == list(EXIT_CODES)


def test_the_public_names_are_on_the_page(pages: ModuleType) -> None:
    import vir_hf

    text = pages.python_api()
    assert [name for name in vir_hf.__all__ if f":: vir_hf.{name}\n" not in text] == []
