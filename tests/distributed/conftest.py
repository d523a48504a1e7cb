"""Fixtures of the launches: tiny parts, and every scenario trained once in one plain process to compare with."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny parts and rows of which most have no picture."""
    import scenarios

    return scenarios.make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def reference(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of every scenario on one process."""
    import launches
    import scenarios

    folder = tmp_path_factory.mktemp("reference")
    launches.run_scenarios(parts, folder, list(scenarios.SCENARIOS), config=None)
    return folder
