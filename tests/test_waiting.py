"""How OpenMP's threads wait: bounded by the command before torch is loaded, unless the user has chosen."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vir_hf.waiting import CHOSEN_BY, SPINS, bound_spinning


@pytest.fixture
def unchosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CHOSEN_BY:
        monkeypatch.setenv(name, "")  # so that what the test sets is put back
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("unchosen")
def test_the_spin_is_bounded_where_nobody_has_chosen() -> None:
    assert bound_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == str(SPINS)
    assert not bound_spinning()  # a process started by the command finds its choice


@pytest.mark.usefixtures("unchosen")
@pytest.mark.parametrize("name", CHOSEN_BY)
def test_what_a_user_has_chosen_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "7")
    assert not bound_spinning()
    assert {other: os.environ[other] for other in CHOSEN_BY if other in os.environ} == {name: "7"}


@pytest.mark.parametrize("start", ["from vir_hf.cli import main; main(['--version'])", "import vir_hf.train"])
def test_only_the_command_sets_it_and_before_torch_is_loaded(start: str) -> None:
    code = f"import os, sys; {start}; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY}
    words = [sys.executable, "-c", code]
    if "cli" in start:  # as the command is started; `import vir_hf` in a program loads torch for the Auto classes
        words = [sys.executable, "-c", f"import sys; sys.orig_argv = ['python', '-m', 'vir_hf.cli']; {code}"]
    last = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    assert last == (f"{SPINS} False" if "cli" in start else "None True")
