"""The wheel: built, installed outside the clone, it carries everything the command needs."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import warnings
import zipfile
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
CARRIED = [name for name in ("recipes", "accelerate_configs", "spaces") if (ROOT / name).is_dir()]


def files_below(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that building leaves nothing in the clone."""
    copy = tmp_path_factory.mktemp("source") / "vir_hf_source"
    unwanted = shutil.ignore_patterns(
        ".git", ".venv", "outputs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, copy, ignore=unwanted)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(folder),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel in it, which borrows the other packages from the one the tests run in."""
    environment = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    (site_packages,) = environment.glob("lib/python*/site-packages")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--no-deps",
            "--no-index",
            "--quiet",
            str(wheel),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    # A path line borrows the packages but not the clone, which an editable install adds by a .pth file of its own.
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


def run(environment: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(environment / "bin" / "vir-hf"), *words]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=120)


def test_setup_cfg_names_every_package() -> None:
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    named = set(config["options"]["packages"].split())
    on_disk = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "vir_hf").rglob("__init__.py") if path.parts
    }
    assert named == on_disk | {f"vir_hf.{name}" for name in CARRIED}


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_every_carried_folder(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"vir_hf/{name}" for name in files_below(ROOT / "vir_hf")}
    for folder in CARRIED:
        expected |= {f"vir_hf/{folder}/{name}" for name in files_below(ROOT / folder)}
    inside = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert inside == expected
    assert any(name.endswith("LICENSE") for name in names)


@pytest.mark.slow
def test_the_source_archive_holds_what_the_wheel_is_built_from(source: Path, wheel: Path, tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, text=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    for folder in ("vir_hf", *CARRIED):
        assert {f"{folder}/{name}" for name in files_below(ROOT / folder)} <= names


@pytest.mark.slow
def test_the_installed_command_finds_its_recipes_outside_the_clone(installed: Path, tmp_path: Path) -> None:
    done = run(installed, "recipes", "--json", "-", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    experiments = json.loads(done.stdout)["experiments"]
    assert {experiment["name"] for experiment in experiments} == {
        path.stem for path in (ROOT / "recipes" / "experiment").rglob("*.yaml")
    }
    assert all(Path(experiment["path"]).is_relative_to(installed) for experiment in experiments)


@pytest.mark.slow
def test_the_installed_command_composes_and_checks_recipes(installed: Path, tmp_path: Path) -> None:
    done = run(installed, "train", "experiment=local_lite", "training.lerning_rate=1", cwd=tmp_path)
    assert done.returncode == 2 and "Did you mean training.learning_rate?" in done.stderr
    done = run(installed, "train", "experiment=local_lite", "model.use_qlora=true", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: data.data_path: is not set")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_accelerate_configs_are_found_outside_the_clone(installed: Path, tmp_path: Path) -> None:
    # Called vir-hf, as the command is: importing the package then loads nothing heavy.
    script = tmp_path / "vir-hf"
    script.write_text(
        "from vir_hf.recipe.files import packaged_directory\nprint(packaged_directory('accelerate_configs'))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(installed / "bin" / "python"), str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(installed) and files_below(folder) == files_below(ROOT / "accelerate_configs")


@pytest.mark.slow
def test_the_wheel_trains_outside_the_clone(installed: Path, tiny_parts: Path, tmp_path: Path) -> None:
    import tiny

    changes = {"training.max_steps": 2, "training.logging_steps": 1}
    overrides = tiny.training_overrides(tiny_parts, tmp_path / "out", **changes)
    python = str(installed / "bin" / "python")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = subprocess.run(
        [python, "-c", "import vir_hf; print(vir_hf.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.split()[-1]).is_relative_to(installed)
    command = [python, "-m", "vir_hf.train", *overrides]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["num_steps"] == 2 and len(metrics["loss_history"]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_warning_from_one_of_our_modules_fails_the_run() -> None:
    with pytest.raises(UserWarning, match="ours"):
        warnings.warn_explicit("ours", UserWarning, "data.py", 1, module="vir_hf.llava.attention")
    with pytest.warns(UserWarning, match="theirs"):
        warnings.warn_explicit("theirs", UserWarning, "x.py", 1, module="transformers.trainer")


def test_every_dependency_has_a_lower_bound_and_an_upper_one_on_the_major_version() -> None:
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    wanted = [line for line in config["options"]["install_requires"].splitlines() if line.strip() and "#" not in line]
    for line in wanted:
        requirement = Requirement(line)
        assert {s.operator for s in requirement.specifier} == {">=", "<"}, line
        installed = version(requirement.name)
        assert installed in requirement.specifier, f"{line} but the tests run with {installed}"


def test_every_imported_package_is_a_dependency() -> None:
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"] + "".join(config["options.extras_require"].values())
    wanted = {canonicalize_name(name) for name in re.findall(r"^\s*([A-Za-z][\w.-]*)", lines, re.MULTILINE)}
    distributions = packages_distributions()
    found: dict[str, str] = {}
    for path in (ROOT / "vir_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0]: path.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found[node.module.split(".")[0]] = path.name
    imported_if_there = {
        "flash_attn",
        "torch_xla",
        "lmms_eval",
        "llama_cpp",
        "vllm",
        "spaces",
        "wandb",
    }  # used where someone has installed them
    for name, file in sorted(found.items()):
        if name in sys.stdlib_module_names or name in imported_if_there or name == "vir_hf":
            continue
        names = {canonicalize_name(distribution) for distribution in distributions.get(name, [name])}
        assert names & wanted, f"{file} imports {name}, which setup.cfg does not ask for"


def test_versions_agree() -> None:
    from vir_hf import __version__

    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {__version__}" in changelog
