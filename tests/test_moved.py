"""Modules are still found where 0.1.0 had them."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from vir_hf.moved import MOVED


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_name_is_the_module_that_took_its_place(old: str) -> None:
    places = [importlib.import_module(f"vir_hf.{name}") for name in MOVED[old].split()]
    name = f"vir_hf.{old}"
    sys.modules.pop(name, None)
    with pytest.warns(DeprecationWarning, match=f"is now {places[0].__name__}"):
        found = importlib.import_module(name)
    if len(places) == 1:
        assert found is places[0] and found.__spec__ is not None and found.__spec__.name == found.__name__
    for place in places:
        for word in (word for word, value in vars(place).items() if getattr(value, "__module__", "") == place.__name__):
            assert getattr(found, word) is not None


def test_names_of_a_module_that_was_split_are_found_where_they_were() -> None:
    with pytest.warns(DeprecationWarning):
        for old in ("loading", "conversations"):
            sys.modules.pop(f"vir_hf.{old}", None)
        from vir_hf.conversations import encode_row, to_messages  # type: ignore[import-not-found]
        from vir_hf.loading import build, load_run, precision_of  # type: ignore[import-not-found]
    assert all(map(callable, (encode_row, to_messages, build, load_run, precision_of)))


def test_rooms_with_the_name_of_an_old_module_have_its_names() -> None:
    script = (
        "from vir_hf.recipe import Recipe, load_recipe\nfrom vir_hf.data import load_llava_dataset\n"
        "from vir_hf.rows import normalise_row\nfrom vir_hf.images import open_image\nfrom vir_hf.training import train\n"
        "from vir_hf.training import trainer, resume\nassert callable(train) and trainer.LlavaTrainer and resume.__name__\n"
        "import vir_hf.images\nassert not hasattr(vir_hf.images, 'nothing_of_that_name')"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_name_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"vir_hf\.nonsense"):
        importlib.import_module("vir_hf.nonsense")
