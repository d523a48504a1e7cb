"""The short fault drills: a real process is killed while loading, stepping and writing; all of them: `make drills`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import victim


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a drill in which one run was not disturbed."""
    root = tmp_path_factory.mktemp("drill")
    parts, runs = victim.places(root)
    code, _, output = victim.run(victim.overrides(parts, runs / "whole"), root)
    assert code == 0, output
    return root


@pytest.mark.parametrize("moment", ["while stepping", "while writing a checkpoint", "while writing the final model"])
def test_a_killed_run_goes_on_to_the_same_bits(moment: str, undisturbed: Path) -> None:
    root = undisturbed
    parts, runs = victim.places(root)
    kill_at = {
        "while stepping": "drill.step gradients 2",
        "while writing a checkpoint": ".checkpoint-4.partial/optimizer.pt",
        "while writing the final model": ".final.partial/recipe.yaml",
    }[moment]
    shutil.rmtree(runs / "killed", ignore_errors=True)
    code, _, output = victim.run(victim.overrides(parts, runs / "killed"), root, kill_at=kill_at)
    assert code == -9, output
    code, _, output = victim.run(victim.overrides(parts, runs / "killed"), root)
    assert code == 0, output
    assert victim.same_bits(runs / "whole", runs / "killed")
    assert [path.name for path in (runs / "killed").glob(".*")] == [
        ".vir_hf"
    ]  # the record of what is ours, and no leftover
