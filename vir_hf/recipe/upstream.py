"""What the installed TRL, PEFT and transformers accept in their configs, read from their source without importing them.

Importing `trl.SFTConfig` takes seconds and pulls in torch; parsing the three class bodies takes milliseconds, so a typo in
a recipe is answered at once. Where a future release moves a class, the class itself is imported instead: slow, still right.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

MISSING: Any = object()


@dataclass(frozen=True)
class Argument:
    """One argument of an upstream config.

    Args:
        name: as upstream spells it.
        kinds: the YAML types it takes, of "bool", "int", "float", "str", "list", "dict", "none"; empty: anything.
        choices: the words it takes, when upstream lists them; empty: any.
        default: upstream's default when it is written as a literal, else `MISSING`.
        is_writable: false when only a Python object will do, so that YAML cannot express it.
    """

    name: str
    kinds: frozenset[str] = frozenset()
    choices: tuple[str, ...] = ()
    default: Any = field(default=MISSING, compare=False)
    is_writable: bool = True


_SFT_CONFIG = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)
_LORA_CONFIG = (
    ("peft", "config.py", "PeftConfigMixin"),
    ("peft", "config.py", "PeftConfig"),
    ("peft", "tuners/lora/config.py", "LoraConfig"),
)
_QUANTIZATION_CONFIG = (("transformers", "utils/quantization_config.py", "BitsAndBytesConfig"),)
_ENUM_FILES = ("training_args.py", "trainer_utils.py")


@lru_cache
def sft_arguments() -> dict[str, Argument]:
    """Return every argument of the installed `trl.SFTConfig`, by name."""
    return _dataclass_arguments(_SFT_CONFIG, "trl")


@lru_cache
def lora_arguments() -> dict[str, Argument]:
    """Return every argument of the installed `peft.LoraConfig`, by name."""
    return _dataclass_arguments(_LORA_CONFIG, "peft")


@lru_cache
def quantization_arguments() -> dict[str, Argument]:
    """Return every argument of the installed `transformers.BitsAndBytesConfig`, by name."""
    package, file, class_name = _QUANTIZATION_CONFIG[0]
    body = _class_body(package, file, class_name)
    init = next((node for node in body if isinstance(node, ast.FunctionDef) and node.name == "__init__"), None)
    if init is None:
        parameters = inspect.signature(getattr(importlib.import_module(package), class_name)).parameters
        named = [p for p in parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        return {p.name: _from_default(p.name, p.default) for p in named}
    names = [argument.arg for argument in init.args.args if argument.arg != "self"]
    first = len(names) - len(init.args.defaults)
    defaults = [MISSING] * first + [_literal(node) for node in init.args.defaults]
    return {name: _from_default(name, default) for name, default in zip(names, defaults, strict=True)}


@lru_cache
def attention_words() -> tuple[str, ...]:
    """Return the attention implementations of the installed transformers that can train, besides eager."""
    text = _source("transformers", "modeling_utils.py")
    table = re.search(r"_global_mapping = \{(.*?)\}", text, re.DOTALL)
    words = tuple(re.findall(r'"([\w|]+)":', table[1])) if table else ()
    if not words:  # moved: the table itself says it
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        words = tuple(ALL_ATTENTION_FUNCTIONS)
    return tuple(word for word in words if "|" not in word)  # paged|... serve and do not train


@lru_cache
def tracker_words() -> tuple[str, ...]:
    """Return the trackers that the installed transformers can report to."""
    text = _source("transformers", "integrations/integration_utils.py")
    table = re.search(r"^INTEGRATION_TO_CALLBACK = \{(.*?)\}", text, re.DOTALL | re.MULTILINE)
    words = tuple(re.findall(r'"(\w+)":', table[1])) if table else ()
    if not words:
        from transformers.integrations import INTEGRATION_TO_CALLBACK

        words = tuple(INTEGRATION_TO_CALLBACK)
    return words


def argument_of(name: str, annotation: str, default: Any = MISSING) -> Argument:
    """Return the argument that a type annotation, given as text, describes."""
    kinds: set[str] = set()
    choices: list[str] = []
    is_open = _read_annotation(ast.parse(annotation, mode="eval").body, kinds, choices)
    is_writable = bool(kinds - {"none"}) or is_open
    return Argument(name, frozenset() if is_open else frozenset(kinds), tuple(choices), default, is_writable)


def keys_of_dictionary(path: Path, name: str) -> tuple[str, ...]:
    """Return the keys of a dictionary that a module's source spells out; the module is not imported."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.value, ast.Dict):
            continue
        if isinstance(node.target, ast.Name) and node.target.id == name:
            return tuple(str(key.value) for key in node.value.keys if isinstance(key, ast.Constant))
    raise LookupError(f"{path}: has no annotated dictionary {name} any more")


def _dataclass_arguments(sources: tuple[tuple[str, str, str], ...], package: str) -> dict[str, Argument]:
    """Return the fields of a dataclass and its bases, given base first."""
    arguments: dict[str, Argument] = {}
    for source_package, file, class_name in sources:
        body = _class_body(source_package, file, class_name)
        if not body:
            imported = getattr(importlib.import_module(package), sources[-1][2])
            return {name: Argument(name) for name in inspect.signature(imported).parameters}
        for node in body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                arguments[node.target.id] = _from_annotation(node.target.id, node)
    return arguments


@lru_cache
def _source(package: str, file: str) -> str:
    """Return the text of a file of an installed package, or "" where it is not; the package is not imported."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / file
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return ""


@lru_cache
def _class_body(package: str, file: str, class_name: str) -> list[ast.stmt]:
    """Return the statements of one class, or [] when it is not there; only its own lines are parsed."""
    text = _source(package, file)
    start = re.search(rf"^class {class_name}\b", text, re.MULTILINE)
    if start is None:
        return []
    end = re.compile(r"^[^\s#)]", re.MULTILINE).search(text, start.end())
    tree = ast.parse(text[start.start() : end.start() if end else len(text)])
    found = tree.body[0]
    return found.body if isinstance(found, ast.ClassDef) else []


def _from_annotation(name: str, node: ast.AnnAssign) -> Argument:
    """Return the argument that one dataclass field declares."""
    kinds: set[str] = set()
    choices: list[str] = []
    is_open = _read_annotation(node.annotation, kinds, choices)
    default: Any = MISSING
    if isinstance(node.value, ast.Call):  # field(default=..., metadata={..., "choices": [...]})
        for keyword in node.value.keywords:
            if keyword.arg == "default":
                default = _literal(keyword.value)
            elif keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
                choices += _listed_choices(keyword.value)
    elif node.value is not None:
        default = _literal(node.value)
    is_writable = bool(kinds - {"none"}) or is_open
    return Argument(name, frozenset() if is_open else frozenset(kinds), tuple(choices), default, is_writable)


def _read_annotation(node: ast.expr, kinds: set[str], choices: list[str]) -> bool:
    """Add the YAML types and words of a type annotation; return true when it takes anything."""
    if isinstance(node, ast.BinOp):
        left = _read_annotation(node.left, kinds, choices)
        return _read_annotation(node.right, kinds, choices) or left
    if isinstance(node, ast.Constant):
        if node.value is None:
            kinds.add("none")
        return False
    if isinstance(node, ast.Subscript):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        outer = ast.unparse(node.value)
        if outer in ("Optional", "Union"):
            if outer == "Optional":
                kinds.add("none")
            takes_anything = [_read_annotation(part, kinds, choices) for part in inner]
            return any(takes_anything)
        if outer == "Literal":
            values = [part.value for part in inner if isinstance(part, ast.Constant)]
            kinds.update(type(value).__name__ for value in values)
            # A word with a gap in it ("pissa_niter_[number of iters]") is a pattern, so the list is not complete.
            if not any("[" in value for value in values if isinstance(value, str)):
                choices += [value for value in values if isinstance(value, str)]
            return False
        kinds.add({"tuple": "list"}.get(outer.lower(), outer.lower()))
        return False
    name = ast.unparse(node)
    if name in ("bool", "int", "float", "str", "list", "dict"):
        kinds.add(name)
    elif name == "Any":
        return True
    else:
        choices += _enum_values(name)
    return False


def _listed_choices(metadata: ast.Dict) -> list[str]:
    """Return the words under "choices" of a field's metadata, [] when there are none or they are computed."""
    for key, value in zip(metadata.keys, metadata.values, strict=True):
        if isinstance(key, ast.Constant) and key.value == "choices":
            listed = _literal(value)
            return [] if listed is MISSING else [choice for choice in listed if isinstance(choice, str)]
    return []


@lru_cache
def _enum_values(class_name: str) -> tuple[str, ...]:
    """Return the words of one of transformers' string enums, () when it is none."""
    for file in _ENUM_FILES:
        values = []
        for node in _class_body("transformers", file, class_name):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                values.append(node.value.value)
        if values:
            return tuple(value for value in values if isinstance(value, str))
    return ()


def _literal(node: ast.expr) -> Any:
    """Return the value an expression spells out, `MISSING` when it has to be computed."""
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return MISSING


def _from_default(name: str, default: Any) -> Argument:
    """Return an argument whose type is known only from its default; None and no default tell nothing."""
    if default is MISSING or default is None or default is inspect.Parameter.empty:
        return Argument(name, default=None if default is None else MISSING)
    return Argument(name, frozenset({type(default).__name__}), default=default)
