"""How the package is built: which module may import which, the doors of heavy libraries, and the house rules of the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vir_hf"

# Modules that import a heavy library, anywhere in their source; annotations alone do not count.
DOORS = {
    "datasets": {"data.sources", "data.cache"},
    "trl": {"training.arguments", "training.step"},
    "peft": {
        "exporting.importing",
        "exporting.witness",
        "model.adapters",
        "kernels.fused_lora",
        "model.for_use",
        "model.precision",
        "model.merging",
        "training.state",
        "model.trainable",
    },
    "gradio": set(),  # spaces/app.py, which `commands.demo` loads as a file
    "bitsandbytes": set(),  # transformers and peft call it
    "deepspeed": {"training.consolidated", "training.engine_check"},
    "hydra": {"recipe.files"},
    "omegaconf": {"recipe.load", "recipe.files"},
    "simplejpeg": {"images.preprocessing"},
    "numba": {"images.resampling"},
    "flash_attn": {"llava.attention"},
}


@dataclass
class Module:
    """One module: where it lies, its syntax tree, and what it imports, by when that happens."""

    name: str
    path: Path
    tree: ast.Module
    at_import: set[str] = field(default_factory=set)
    later: set[str] = field(default_factory=set)


def read_modules() -> dict[str, Module]:
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        words = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(words[:-1] if words[-1] == "__init__" else words)
        modules[name] = Module(name, path, ast.parse(path.read_text(encoding="utf-8")))
    for module in modules.values():
        collect_imports(module, module.tree, set(modules), is_at_import=True)
    return modules


def collect_imports(module: Module, node: ast.AST, known: set[str], *, is_at_import: bool) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        is_main = isinstance(child, ast.If) and "__main__" in ast.unparse(child.test)
        target = module.at_import if is_at_import and not is_main else module.later
        if isinstance(child, ast.Import):
            target |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            base = absolute_name(module, child)
            names = {f"{base}.{alias.name}" for alias in child.names}
            target |= {name if name in known else base for name in names}
        is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        collect_imports(module, child, known, is_at_import=is_at_import and not is_function and not is_main)


def absolute_name(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module.name.split(".") if module.path.name == "__init__.py" else module.name.split(".")[:-1]
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, *([node.module] if node.module else [])])


def short(name: str) -> str:
    return name.removeprefix("vir_hf.")


def read_rooms() -> dict[str, int]:
    """The rooms of CONTRIBUTING.md's table, a folder or a module that lies in none -> number of its line, from the ground up."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## Where what lives")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    rooms = {}
    for number, line in enumerate(lines):
        for name in re.findall(r"`(\w+)(?:/|\.py)`", line.split("|")[1]):
            assert name not in rooms, f"CONTRIBUTING.md names {name} twice"
            rooms[name] = number
    return rooms


MODULES = read_modules()
ROOMS = read_rooms()


def room_of(name: str) -> str:
    return short(name).partition(".")[0]


def test_every_module_lies_in_a_room_and_every_room_is_there() -> None:
    found = {room_of(name) for name in MODULES if name != "vir_hf"}
    assert found - set(ROOMS) == set(), "give these a line in CONTRIBUTING.md, 'Where what lives'"
    assert set(ROOMS) - found == set(), "CONTRIBUTING.md names rooms that are not there"


def test_a_module_imports_only_from_its_own_room_and_from_those_above_it() -> None:
    wrong = [
        f"{short(module.name)} imports {short(imported)}"
        for module in MODULES.values()
        for imported in sorted(module.at_import | module.later)
        if module.name != "vir_hf" and imported in MODULES and imported != "vir_hf"
        if room_of(imported) != room_of(module.name) and ROOMS[room_of(imported)] > ROOMS[room_of(module.name)]
    ]
    assert wrong == []


def test_the_files_that_start_a_folder_hold_nothing_but_what_it_is() -> None:
    for module in MODULES.values():
        if module.path.name == "__init__.py" and module.name != "vir_hf":
            code = [ast.unparse(node) for node in module.tree.body[1:]]
            is_lazy = (
                len(code) == 2
                and code[0] == "from vir_hf.moved import names_of"
                and code[1].startswith("__getattr__ =")
            )
            assert code == [] or is_lazy, f"{module.path} holds code"


def test_the_tests_of_a_module_lie_where_it_lies() -> None:
    for path in sorted((ROOT / "tests").glob("*/test_*.py")):
        if path.parent.name not in ("distributed", "drills"):
            assert path.parent.name in ROOMS, f"{path.relative_to(ROOT)} lies in no room of the package"


def test_the_design_page_names_files_that_are_there() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(vir_hf/[\w/]+\.py)`", text))
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
    journey = text.partition("## The journey of a row")[2].partition("\n## ")[0]
    assert len(re.findall(r"^\d+\. ", journey, re.MULTILINE)) <= 8
    rooms = text.partition("## The rooms")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(\w+)(?:/|\.py)`", rooms)) >= set(ROOMS)


def test_there_is_no_circle_among_modules_at_import() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for imported in sorted(MODULES[name].at_import & set(MODULES)):
                visit(imported, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_importing_the_package_pulls_in_no_module_of_ours_by_name() -> None:
    assert MODULES["vir_hf"].at_import & set(MODULES) == set()


@pytest.mark.parametrize("library", DOORS)
def test_a_heavy_library_has_its_stated_doors(library: str) -> None:
    found = {
        short(module.name)
        for module in MODULES.values()
        if any(name.split(".")[0] == library for name in module.at_import | module.later)
    }
    assert found == DOORS[library]


def test_modules_copied_into_checkpoints_import_only_each_other() -> None:
    source = (PACKAGE / "llava" / "modeling_llava.py").read_text(encoding="utf-8")
    copied = set(re.findall(r'"(\w+)\.py"', source))
    assert {"configuration_llava", "projectors", "attention", "modeling_llava"} <= copied
    for name in copied:
        module = MODULES[f"vir_hf.llava.{name}"]
        ours = {imported for imported in module.at_import | module.later if imported.split(".")[0] == "vir_hf"}
        assert ours <= {f"vir_hf.llava.{sibling}" for sibling in copied}, name
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("vir_hf", *copied):
                assert node.level == 1, (
                    f"{name} must import its siblings as `from .sibling`, to work in transformers' folder"
                )


def test_no_module_is_a_drawer_for_everything() -> None:
    names = {path.stem for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    assert names & {"utils", "util", "common", "helpers", "misc"} == set()


def nodes() -> Iterator[tuple[str, ast.AST]]:
    for module in MODULES.values():
        for node in ast.walk(module.tree):
            if hasattr(node, "lineno"):
                yield f"{module.path.relative_to(ROOT)}:{node.lineno}", node


def test_pictures_are_opened_in_one_place() -> None:
    """By the list of kinds in `images.FORMATS`: Pillow would start another program for some of its other kinds."""
    paths = [*PACKAGE.rglob("*.py"), *(ROOT / "spaces").rglob("*.py")]
    calls = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node).endswith("Image.open"):
                calls.append(path.relative_to(ROOT).as_posix())
            if isinstance(node, ast.Name) and node.id in ("load_image", "load_images"):  # transformers' own way to open
                calls.append(path.relative_to(ROOT).as_posix())
            if (
                isinstance(node, ast.Call) and ast.unparse(node.func) == "gr.Image"
            ):  # else Gradio decodes uploads by itself
                assert "image_mode=None" in ast.unparse(node) and "type='filepath'" in ast.unparse(node)
    assert len(calls) == 1 and calls[0].endswith("images/opening.py")


def test_assert_is_for_tests() -> None:
    assert [place for place, node in nodes() if isinstance(node, ast.Assert)] == []


def test_no_except_is_bare_and_none_swallows_everything() -> None:
    def swallows(handler: ast.ExceptHandler) -> bool:
        catches_all = handler.type is None or ast.unparse(handler.type) in ("Exception", "BaseException")
        return catches_all and all(isinstance(line, (ast.Pass, ast.Continue)) for line in handler.body)

    handlers = [(place, node) for place, node in nodes() if isinstance(node, ast.ExceptHandler)]
    assert [place for place, node in handlers if node.type is None or swallows(node)] == []


def test_every_public_function_and_class_says_what_it_is() -> None:
    missing = []
    for module in MODULES.values():
        assert ast.get_docstring(module.tree), f"{module.path} says nothing of itself"
        for node in module.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith(
                "_"
            ):
                if not ast.get_docstring(node):
                    missing.append(f"{module.path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert missing == []


# What may write, move or remove files outside `files`, and why. Everything else goes through it.
WRITERS = {
    "model.adapters": {"save_pretrained": "PEFT's own, into the folder that its caller names"},
    "training.checkpoints": {
        "os.rename": "a checkpoint that was written beside its place gets its name, ours proved by its manifest"
    },
    "cli": {"os.open": "the null device"},
    "batches.features": {
        "open": "shards that are only ever added to, under names drawn at random",
        "mkdir": "the cache's own folder",
    },
    "curation.inspection": {"save": "a picture into memory"},
    "publishing.card": {"save": "a picture into memory"},
    "images.preprocessing": {"save": "a picture into memory"},
    "llava.modeling_llava": {
        "save_pretrained": "upstream's own, into the folder that its caller names",
        "write_text": "the code and the configuration beside what `save_pretrained` has just written there",
    },
    "model.language_models": {"save_pretrained": "a trial copy into a temporary folder"},
    "llava.processing_llava": {"save_pretrained": "upstream's own, into the folder that its caller names"},
    "llava.portable": {
        "write_text": "over what `save_pretrained` has just written there",
        "shutil.copyfile": "the tokenizer's own file beside it, where there is none",
    },
    "model.for_training": {"save_pretrained": "into a staging folder of `files`"},
    "curation.image_check": {"pq.write_table": "into memory"},
    "model.merging": {
        "save_pretrained": "into a staging folder of `files`",
        "os.replace": "between two parts of one staging folder of `files`",
    },
    "training.preflight": {
        "save_pretrained": "into a staging or temporary folder",
        "save": "a recipe, which `files` writes",
    },
    "quickstart.drawing": {"save": "pictures into a staging folder of `files`", "mkdir": "in it"},
    "quickstart.parts": {"save_pretrained": "into a staging folder of `files`"},
    "quickstart.run": {"save": "a picture into a temporary name of `files`"},
    "recipe.files": {
        "write_text": "into a temporary folder",
        "write_bytes": "into a temporary folder",
        "mkdir": "in it",
    },
    "budget.changes": {"save": "a recipe into a temporary folder"},
    "using.evaluation": {"save": "a picture into a temporary name of `files`"},
    "using.gallery": {"save": "a picture into memory"},
    "model.projector_files": {"save_file": "into a temporary name of `files`"},
    "exporting.adapter": {"save_pretrained": "into a staging folder of `files`"},
    "exporting.importing": {"save_pretrained": "into a staging folder of `files`"},
    "exporting.original": {"save_pretrained": "into a staging folder of `files`", "mkdir": "in it"},
    "exporting.plain": {"save_pretrained": "into a staging folder of `files`"},
    "exporting.proof": {"save_file": "into a temporary folder"},
    "exporting.tensors": {
        "save_file": "into a staging folder of `files`",
        "os.replace": "between two names in it",
    },
    "exporting.witness": {
        "save_file": "into the temporary folder of the process that asked",
        "write_text": "the same; it knows nothing of this project",
    },
    "training.state": {"save_file": "into a temporary name of `files`"},
    "training.safeguards": {"torch.save": "into a temporary name of `files`"},
    "images.unpacked": {
        "mkdir": "the cache's own folder",
        "open": "into a temporary name of `files`",
        "shutil.copyfileobj": "into a temporary name of `files`",
    },
    "data.cache": {"pa.OSFile": "into a temporary name of `files`", "mkdir": "the cache's own folder"},
    "training.checkpointing": {
        "torch.save": "into a checkpoint's staging folder",
        "save": "a recipe, which `files` writes",
    },
    "curation.prepare": {"mkdir": "the folder it was told to fill"},
    "training.panel": {"save": "an image into memory"},
    "training.watch": {"mkdir": "the folder of the ranks' signs", "rmdir": "the same, when it is empty"},
}
_METHODS = {
    "write_text", "write_bytes", "unlink", "rmdir", "rename", "touch", "mkdir", "symlink_to", "hardlink_to", "save_file",
    "save_pretrained", "to_parquet", "to_csv", "save", "truncate", "write_table",
}  # fmt: skip
_FUNCTIONS = {
    *(f"os.{name}" for name in ("remove", "unlink", "rename", "renames", "replace", "rmdir", "removedirs", "truncate", "link",
                                "symlink", "makedirs", "mkdir", "open")),
    *(f"shutil.{name}" for name in ("rmtree", "move", "copy", "copy2", "copyfile", "copytree", "copyfileobj")),
    "torch.save", "json.dump", "yaml.dump", "yaml.safe_dump_all", "pickle.dump", "np.save", "pa.OSFile", "pq.write_table",
    "tempfile.mkstemp", "tempfile.mkdtemp",
}  # fmt: skip


def writes(node: ast.AST) -> str | None:
    """The word under which a call writes, moves or removes a file; `None` if it does not."""
    if not isinstance(node, ast.Call):
        return None
    name = ast.unparse(node.func)
    if name in _FUNCTIONS:
        return name
    word = name.rpartition(".")[2]
    if word == "open" and not name.startswith(
        ("Image.", "os.", "files.", "opener.", "zipfile.", "tarfile.", "webbrowser.")
    ):
        modes = [arg.value for arg in [*node.args, *(k.value for k in node.keywords if k.arg == "mode")]
                 if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]  # fmt: skip
        return (
            "open" if any(re.fullmatch(r"[rwax]b?\+?b?", mode) and set(mode) & set("wax+") for mode in modes) else None
        )
    if word == "replace" and "." in name and len(node.args) == 1 and not node.keywords:
        return "replace"  # of a path: a text's takes two words
    is_ours = name.startswith("files.") or name.split(".")[0] in ("output", "hub", "api")
    return word if word in _METHODS and ("." in name or word == "save_file") and not is_ours else None


def test_the_net_catches_what_writes() -> None:
    caught = [
        'open(p, "w")', 'path.open("ab")', 'open(p, mode="r+")', "path.unlink()", "os.replace(a, b)", "path.replace(b)",
        "shutil.rmtree(p)", "path.write_text(t)", "torch.save(x, p)", "model.save_pretrained(p)", "save_file(x, p)",
        "json.dump(x, f)", "path.rename(q)", "image.save(p)", "frame.to_parquet(p)",
    ]  # fmt: skip
    free = [
        "open(p)",
        'open(p, "rb")',
        'text.replace("a", "b")',
        "Image.open(p)",
        "files.write_text(p, t)",
        "json.dumps(x)",
    ]
    assert [line for line in caught if writes(ast.parse(line, mode="eval").body) is None] == []
    assert [line for line in free if writes(ast.parse(line, mode="eval").body) is not None] == []


def test_only_files_writes_and_removes_files() -> None:
    found: dict[str, set[str]] = {}
    places = []
    sources = [
        (short(module.name), module.path, module.tree) for module in MODULES.values() if short(module.name) != "files"
    ]
    sources.append(
        ("spaces.app", ROOT / "spaces" / "app.py", ast.parse((ROOT / "spaces" / "app.py").read_text("utf-8")))
    )
    for name, path, tree in sources:
        for node in ast.walk(tree):
            word = writes(node)
            if word is not None:
                found.setdefault(name, set()).add(word)
                if word not in WRITERS.get(name, {}):
                    places.append(f"{path.relative_to(ROOT)}:{node.lineno} {word}")
    assert places == [], "write through vir_hf.files, or say here why not"
    unused = {name: set(words) - found.get(name, set()) for name, words in WRITERS.items()}
    assert {name: words for name, words in unused.items() if words} == {}, "take these out of the list"


def test_no_function_has_more_than_60_lines_of_code_and_no_module_more_than_400_without_a_reason() -> None:
    """Of a function its signature and docstring do not count: what it takes and does may be told at length."""
    long_functions = [
        f"{place} {node.name}"
        for place, node in nodes()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (node.end_lineno or 0)
        - (node.body[bool(ast.get_docstring(node))] if len(node.body) > 1 else node.body[0]).lineno
        >= 60
    ]
    assert long_functions == []
    for module in MODULES.values():
        text = module.path.read_text(encoding="utf-8")
        if text.count("\n") > 400:
            assert "\n# Over 400 lines: " in text, f"{module.path} is long: split it, or say why at its top"
