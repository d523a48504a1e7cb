"""docs/troubleshooting.md has an entry for every error and warning of the source, and none for what nobody prints."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [*sorted((ROOT / "vir_hf").rglob("*.py")), ROOT / "spaces" / "app.py"]
PAGE = ROOT / "docs" / "troubleshooting.md"
# The pages that are written by hand; those of docs/reference are made when the site is built.
PAGES = [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.parent.name != "reference"]
HOLE = "…"
OURS = {"RecipeError", "DataError", "ImageError", "RunError", "gr.Error"}
# Caught where they are raised, and said in other words; or our own mistake if anybody sees them.
INTERNAL = (
    "it has no owner",
    "no LAB conversion",
    "expected a multiple of every number in",
    "expected windows inside the new lengths",
    "pixels …, out …, table …; expected",
)


def skeleton(node: ast.expr) -> str:
    """A message with `…` for each part that is only known when it is printed."""
    if isinstance(node, ast.Constant):
        return re.sub(r"%[.\d]*[a-z]", HOLE, node.value) if isinstance(node.value, str) else HOLE
    if isinstance(node, ast.JoinedStr):
        return "".join(skeleton(part) if isinstance(part, ast.Constant) else HOLE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return skeleton(node.left) + skeleton(node.right)
    return HOLE


def messages() -> Iterator[tuple[str, str]]:
    """Every (place, message) of our errors, of a ValueError that is raised, and of a warning."""
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue  # a raised call is met twice, which does no harm
            kind = ast.unparse(call.func)
            is_printed = kind in {*OURS, "logger.warning", "warnings.warn"}
            if is_printed or (kind == "ValueError" and isinstance(node, ast.Raise)):
                text = skeleton(call.args[1] if kind == "ImageError" and len(call.args) > 1 else call.args[0])
                if not any(words in text for words in INTERNAL):
                    yield f"{name}:{call.lineno}", text


def all_strings() -> str:
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)):
                found.append(skeleton(node))
    return "\n".join(found)


def entries() -> list[str]:
    """The fragments in the first column of every table headed `it says`."""
    found: list[str] = []
    is_inside = False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| it says"):
            is_inside = True
        elif not line.startswith("|"):
            is_inside = False
        elif is_inside:
            found += re.findall(r"`([^`]+)`", line.split(" | ")[0])
    return found


def holds(message: str, fragment: str) -> bool:
    return fragment in message


def test_every_error_and_warning_has_its_entry() -> None:
    fragments = entries()
    missing = [
        f"{place} {text[:160]}"
        for place, text in messages()
        if len(re.sub(r"\W|\d", "", text)) > 8 and not any(holds(text, fragment) for fragment in fragments)
    ]
    assert missing == [], "give each an entry in docs/troubleshooting.md"


def test_the_page_explains_nothing_that_is_not_printed() -> None:
    source = all_strings()
    assert [fragment for fragment in entries() if not holds(source, fragment)] == []


def test_entries_are_distinctive_and_stand_once() -> None:
    fragments = entries()
    assert [fragment for fragment in fragments if len(re.sub(r"\W", "", fragment)) < 6] == []
    assert sorted({fragment for fragment in fragments if fragments.count(fragment) > 1}) == []


def test_every_entry_has_a_cause_and_a_remedy() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 3 and all(len(cell) > 5 for cell in cells), row


@pytest.mark.parametrize(
    "path", sorted([*PAGES, *ROOT.glob("*.md")]), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_links_between_pages_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file) if file else path
        assert page.exists(), f"{path.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            known = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in known, f"{path.name} links to {target}"


def test_every_page_is_reached_from_the_first_one_and_that_from_the_readme() -> None:
    assert "docs/index.md" in (ROOT / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^([\w/-]+)$", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), re.MULTILINE))
    pages = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in PAGES} - {"index"}
    made = {f"reference/{name}" for name in ("commands", "recipe-keys", "environment", "exit-codes", "python")}
    assert listed == pages | made


def test_the_performance_page_says_how_to_run_every_benchmark() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    lines = re.findall(r"^python benchmarks/(\w+\.py)(.*)$", page, re.MULTILINE)
    assert {name for name, _ in lines} == {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    for name, words in lines:
        source = (ROOT / "benchmarks" / name).read_text(encoding="utf-8")
        for flag in re.findall(r"--[\w-]+", words.partition("#")[0]):
            assert f'"{flag}"' in source, f"{name} has no {flag}"


def shown_commands() -> Iterator[tuple[str, list[str]]]:
    """Every (page, words) of a `vir-hf ...` call shown on a page, in a block or between words."""
    for path in [*PAGES, ROOT / "README.md"]:
        text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
        for call in re.findall(r"^(?:\$ )?(vir-hf [^\n]*)|`(vir-hf [^`\n]*)`", text, re.MULTILINE):
            yield path.name, re.split(r" #| \||&&|;|  +\(", call[0] or call[1])[0].split()


def test_commands_shown_on_the_pages_exist_with_their_options() -> None:
    from vir_hf.cli import COMMANDS
    from vir_hf.commands.data import WORDS

    shared = (ROOT / "vir_hf" / "recipe" / "load.py").read_text(encoding="utf-8")
    wrong = []
    for page, words in shown_commands():
        if len(words) < 2 or not re.fullmatch(r"[a-z-]+", words[1]):
            continue  # `vir-hf --help`, or the word COMMAND
        command = COMMANDS.get(words[1])
        if command is None:
            wrong.append(f"{page}: vir-hf {words[1]}")
            continue
        module = command.module
        if words[1] == "data" and len(words) > 2 and words[2] in WORDS:
            module = WORDS[words[2]][0]
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        for borrowed in re.findall(r"^from (vir_hf\.commands\.\w+) import", source, re.MULTILINE):
            source += (ROOT / (borrowed.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        for flag in (word.partition("=")[0].rstrip(".,:)") for word in words if re.match(r"--[a-z]", word)):
            if f'"{flag}"' not in source + shared and flag != "--help":
                wrong.append(f"{page}: vir-hf {words[1]} has no {flag}")
    assert wrong == []


def test_recipe_keys_on_the_pages_exist() -> None:
    from vir_hf.recipe.load import schema

    known = schema()
    not_keys = {"model.safetensors", "model.multi_modal_projector"}  # a file, and a module in memory
    wrong = []
    for path in [*PAGES, ROOT / "README.md"]:
        text = path.read_text(encoding="utf-8")
        for section, key in re.findall(rf"(?<![\w./-])({'|'.join(known)})\.([a-z_]\w+)(?=[=`:,\s])", text):
            if key not in known[section] and f"{section}.{key}" not in not_keys:
                wrong.append(f"{path.name}: {section}.{key}")
    assert wrong == []


def test_the_design_page_names_files_that_are_there_and_a_row_has_a_short_journey() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(vir_hf/[\w/]+\.py)`", text))
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
    journey = text.partition("## The journey of a row")[2].partition("\n## ")[0]
    assert 1 <= len(re.findall(r"^\d+\. ", journey, re.MULTILINE)) <= 8
