"""The files around the package: workflows, forms, the Dockerfile, the citation agree with setup.cfg and the Makefile."""

from __future__ import annotations

import configparser
import fnmatch
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vir_hf import __version__

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(p for p in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if p.name != "config.yml")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CONFIG = configparser.ConfigParser(interpolation=None)
CONFIG.read(ROOT / "setup.cfg")
PYTHONS = SpecifierSet(CONFIG["options"]["python_requires"])
SUPPORTED = [f"3.{minor}" for minor in range(30) if f"3.{minor}" in PYTHONS]
TORCH = re.search(r"^TORCH \?= (.*)$", MAKEFILE, re.MULTILINE)[1]  # type: ignore[index]


def read(path: Path) -> dict[Any, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict), path
    return content


def jobs() -> list[tuple[str, dict[str, Any]]]:
    return [(f"{path.name}:{name}", job) for path in WORKFLOWS for name, job in read(path)["jobs"].items()]


def steps() -> list[tuple[str, dict[str, Any]]]:
    return [(name, step) for name, job in jobs() for step in job.get("steps", [])]


def lint(*command: str) -> None:
    """Run a linter, or skip where it is not installed: `make repository` installs them."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_actionlint_finds_nothing() -> None:
    lint("actionlint", *map(str, WORKFLOWS))


def test_hadolint_finds_nothing() -> None:
    lint("hadolint", "Dockerfile")


def test_cffconvert_accepts_the_citation() -> None:
    lint("cffconvert", "--validate", "--infile", "CITATION.cff")


def test_the_workflows_are_those_that_a_project_needs() -> None:
    assert {path.stem for path in WORKFLOWS} == {"tests", "release"}
    assert SUPPORTED == ["3.11", "3.12", "3.13"]


def test_tests_and_the_wheel_run_on_every_python_that_is_supported() -> None:
    known = read(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]
    for job in ("tests", "wheel"):
        assert known[job]["strategy"]["matrix"]["python-version"] == SUPPORTED
    classifiers = re.findall(r"Python :: (3\.\d+)$", CONFIG["metadata"]["classifiers"], re.MULTILINE)
    assert classifiers == SUPPORTED


def test_what_a_workflow_runs_is_a_target_of_the_makefile() -> None:
    targets = set(re.findall(r"^(\w+):", MAKEFILE, re.MULTILINE))
    ran = set()
    for name, step in steps():
        if "run" not in step or step["run"].startswith("sudo apt-get"):
            continue
        assert step["run"].startswith("make "), f"{name}: {step['run']}"
        words = {word for word in step["run"].split()[1:] if "=" not in word}
        assert words and words <= targets, f"{name}: {step['run']}"
        ran |= words
    assert ran == {"lint", "types", "compile", "test", "repository", "wheel"}


def test_jobs_may_read_and_no_more_but_for_the_one_that_publishes() -> None:
    for path in WORKFLOWS:
        assert read(path)["permissions"] == {"contents": "read"}
    assert {name: job["permissions"] for name, job in jobs() if "permissions" in job} == {
        "release.yml:publish": {"id-token": "write"}
    }
    for name, job in jobs():
        assert "uses" in job or "timeout-minutes" in job, f"{name} may run for six hours"
    for name, step in steps():
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False, name
    text = "".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    assert "secrets." not in text and "password" not in text.replace("without a password", "").replace(
        "instead of a password", ""
    )


def test_a_release_is_tested_and_built_before_it_is_published() -> None:
    release = read(ROOT / ".github" / "workflows" / "release.yml")
    assert release[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads `on` as true
    assert release["jobs"]["build"]["needs"] == "tests" and release["jobs"]["publish"]["needs"] == "build"
    assert release["jobs"]["tests"]["uses"] == "./.github/workflows/tests.yml"
    assert "workflow_call" in read(ROOT / ".github" / "workflows" / "tests.yml")[True]


def test_pre_commit_takes_ruff_as_setup_cfg_asks_for_it() -> None:
    wanted = next(
        line
        for line in CONFIG["options.extras_require"]["dev"].splitlines()
        if re.match(r"ruff\b", line) and Requirement(line)
    )
    hooks = [hook for repo in read(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert [hook["entry"].split()[:2] for hook in hooks] == [["ruff", "check"], ["ruff", "format"]]
    assert all(hook["additional_dependencies"] == [wanted] for hook in hooks)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_forms_ask_for_the_doctor(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "body"} <= set(form)
    (doctor,) = [field for field in form["body"] if field.get("id") == "doctor"]
    assert "`vir-hf doctor`" in doctor["attributes"]["label"]
    if path.name == "bug.yml":
        assert doctor["validations"] == {"required": True}
    labels = [field["attributes"]["label"] for field in form["body"] if field["type"] != "markdown"]
    assert len(labels) == len(set(labels))


def test_a_pull_request_is_asked_what_contributing_asks() -> None:
    text = (ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md").read_text(encoding="utf-8")
    assert "vir-hf doctor" in text and "make check" in text and "CHANGELOG.md" in text


def test_the_citation_is_this_version_and_licence() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert str(citation["version"]) == __version__
    assert citation["license"] == CONFIG["metadata"]["license"]


def test_the_dockerfile_has_the_makefiles_torch_and_a_supported_python() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert [f"torch=={version}" for version in re.findall(r"^ARG TORCH_VERSION=(.*)$", text, re.MULTILINE)] == [TORCH]
    (python,) = re.findall(r"^FROM python:(\d+\.\d+)-", text, re.MULTILINE)
    assert python in SUPPORTED
    extras = set(re.findall(r'"/source\[(\w+)\]"', text))
    assert extras == {"fast", "gpu"} <= set(CONFIG["options.extras_require"])


def test_what_the_wheel_is_built_from_reaches_docker() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = [line[1:] for line in lines if line.startswith("!")]
    assert "*" in lines
    folders = {path.split("/")[0] for path in CONFIG["options"]["package_dir"].split() if path.isalpha() or "_" in path}
    folders = {name for name in folders if (ROOT / name).is_dir()}
    files = {"setup.cfg", "pyproject.toml", "README.md", *CONFIG["metadata"]["license_files"].split()}
    needed = {"vir_hf", "recipes", "accelerate_configs", "spaces"} | folders | files
    assert sorted(name for name in needed if not any(fnmatch.fnmatch(name, pattern) for pattern in sent)) == []
    assert sorted(name for name in sent if not (ROOT / name).exists()) == []


def test_files_that_travel_alone_name_their_licence() -> None:
    source = (ROOT / "vir_hf" / "llava" / "modeling_llava.py").read_text(encoding="utf-8")
    copied = [ROOT / "vir_hf" / "llava" / name for name in set(re.findall(r'"(\w+\.py)"', source))]
    assert len(copied) >= 4
    for path in [*copied, ROOT / "spaces" / "app.py"]:
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first == f"# SPDX-License-Identifier: {CONFIG['metadata']['license']}", path


def test_no_workflow_or_form_has_a_carriage_return_or_a_tab() -> None:
    for path in [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]:
        assert not {"\r", "\t"} & set(path.read_text(encoding="utf-8")), path
