"""The pages of `docs/reference/` that are made from the code: commands, recipe keys, variables, exit codes, the Python API."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MADE = "<!-- made by docs/reference_pages.py; not to be edited -->\n"

# Variables of the environment that the package reads or sets itself, and what for. A test compares the names with the source.
VARIABLES = {
    "VIR_HF_LOG_LEVEL": "The level from which messages are shown: `debug`, `info`, `warning` or `error`; `--log-level` sets it.",
    "VIR_HF_QUIET": "`1` leaves results, warnings and errors; `--quiet` sets it.",
    "VIR_HF_ASKED": "Set by `vir-hf launch` for its processes: the engine that was asked for. Not to be set by hand.",
    "VIR_HF_ERRORS": "Set by `vir-hf launch` for its processes: where they leave their errors. Not to be set by hand.",
    "VIR_HF_MODEL": "Read by a Space's `app.py`: the model it serves.",
}
VARIABLES_OF_OTHERS = {
    "HF_HOME": "Where models and data sets of the Hub are kept (`~/.cache/huggingface`).",
    "HF_DATASETS_CACHE": "Where rows are kept once they have been read (`HF_HOME/datasets`).",
    "HF_HUB_OFFLINE": "`1` asks the Hub nothing.",
    "HF_TOKEN": "The token for the Hub, in place of `hf auth login`.",
    "TERM": "`dumb` stands for a terminal that cannot redraw a line: no bars.",
    "TQDM_DISABLE": "`1` leaves out progress bars on a terminal too; useful with a screen reader.",
    "NO_COLOR": "Any value leaves out colours.",
    "CUDA_VISIBLE_DEVICES": "The GPUs that a run may use.",
    "GOMP_SPINCOUNT": "How long threads of a CPU spin while they wait; set to 1000 unless one of the next three is set.",
    "OMP_WAIT_POLICY": "See `GOMP_SPINCOUNT`.",
    "KMP_BLOCKTIME": "See `GOMP_SPINCOUNT`.",
    "KMP_LIBRARY": "See `GOMP_SPINCOUNT`.",
    "OMP_NUM_THREADS": "How many threads compute on a CPU.",
    "RANK": "Set by launchers: the number of this process. So are `WORLD_SIZE` and `LOCAL_WORLD_SIZE`.",
}

# What a page of the Python API shows, in this order.
API = {
    "Models": ["vir_hf.model.build.build", "vir_hf.model.for_use.load_run", "vir_hf.llava.configuration_llava.LlavaConfig",
               "vir_hf.llava.modeling_llava.LlavaForCausalLM", "vir_hf.llava.processing_llava.LlavaProcessor"],
    "Data": ["vir_hf.data.sources.load_llava_dataset", "vir_hf.rows.encoding.to_messages", "vir_hf.rows.encoding.encode_row",
             "vir_hf.images.opening.open_image", "vir_hf.batches.collator.LlavaDataCollator"],
    "Training": ["vir_hf.recipe.load.load_recipe", "vir_hf.training.run.train", "vir_hf.training.trainer.LlavaTrainer"],
    "Answers": ["vir_hf.inference.Question", "vir_hf.inference.Answerer"],
    "Errors": ["vir_hf.errors.RecipeError", "vir_hf.errors.DataError", "vir_hf.errors.ImageError", "vir_hf.errors.RunError"],
}  # fmt: skip


def write(folder: Path) -> None:
    """Write the pages into a folder; one that is the same as before is left alone, so that Sphinx does not build it again."""
    pages = {
        "commands": commands(),
        "recipe-keys": recipe_keys(),
        "environment": environment(),
        "exit-codes": exit_codes(),
        "python": python_api(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.is_file() or path.read_text(encoding="utf-8") != MADE + text:
            path.write_text(MADE + text, encoding="utf-8")


def cell(text: object) -> str:
    """Return a text as it stands in a table's cell."""
    return re.sub(r"\s+", " ", str(text)).replace("|", "\\|").replace("<", "&lt;").strip()


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def commands() -> str:
    """Return the page of all commands: what each does, how it is called, and its arguments."""
    from vir_hf.cli import COMMANDS, OUTPUT_OPTIONS
    from vir_hf.commands.data import WORDS

    parts = [
        "# Commands\n\n`vir-hf --help` lists the commands, `vir-hf COMMAND --help` explains one, `vir-hf --version` prints the "
        "versions of everything that matters. What a command ends with is on the page [exit codes](exit-codes.md).\n",
        "## Options of every command\n",
        table(["option", "meaning"], [[f"`{name}`", cell(text)] for name, text in OUTPUT_OPTIONS.items()]),
    ]
    for word, command in COMMANDS.items():
        if word == "data":
            parts.append(f"## vir-hf data\n\n{_sentence(command.help)}\n")
            for inner, (_, text) in WORDS.items():
                parts.append(_command(f"data {inner}", text, _parser("data", [inner]), "###"))
        else:
            parts.append(_command(word, command.help, _parser(word, []), "##"))
    return "\n".join(parts)


def _parser(word: str, argv: list[str]) -> argparse.ArgumentParser:
    from vir_hf.cli import COMMANDS
    from vir_hf.commands.completion import _parser_of

    parser = _parser_of(COMMANDS[word].load(), argv)
    if parser is None:
        raise LookupError(f"vir-hf {word} has no parser")
    return parser


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _command(words: str, summary: str, parser: argparse.ArgumentParser, level: str) -> str:
    """Return a command's section."""
    formatter = argparse.HelpFormatter(parser.prog, width=100)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
    usage = formatter.format_help().removeprefix("usage: ").strip()
    rows = []
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or "--help" in action.option_strings:
            continue
        text = (action.help or "") % {"default": action.default, "prog": parser.prog}
        if action.choices:
            text += f" (one of {', '.join(f'`{choice}`' for choice in action.choices)})"
        rows.append([f"`{_shown(action)}`", cell(text)])
    text = f"{level} vir-hf {words}\n\n{parser.description or _sentence(summary)}\n\n```text\n{usage}\n```\n\n"
    if rows:
        text += table(["argument", "meaning"], rows)
    if parser.epilog:
        text += f"\n```text\n{parser.epilog.strip()}\n```\n"
    return text


def _shown(action: argparse.Action) -> str:
    value = action.metavar or (action.dest.upper() if action.nargs != 0 and not action.choices else "")
    value = " ".join(value) if isinstance(value, tuple) else value
    if not action.option_strings:
        return str(value or action.dest)
    return f"{', '.join(action.option_strings)} {value}".strip()


def recipe_keys() -> str:
    """Return the page of all keys of a recipe: ours with their meaning, upstream's with upstream's words."""
    from vir_hf.recipe.load import schema

    meanings = own_meanings()
    parts = [
        "# Recipe keys\n\nEvery key that a recipe may hold, by section. How a recipe is put together and written is on the "
        "page [recipes](../recipes.md). Keys of `training`, `lora` and `quantization` that are not ours are arguments of the "
        "installed `trl.SFTConfig`, `peft.LoraConfig` and `transformers.BitsAndBytesConfig`, with their own words.\n"
    ]
    for section, keys in schema().items():
        upstream = _upstream_meanings(section)
        ours = {name for name in keys if f"{section}.{name}" in meanings or name not in upstream}
        parts.append(f"## {section}\n")
        if ours:
            rows = [
                _key_row(section, name, keys[name], meanings.get(f"{section}.{name}", ""))
                for name in keys
                if name in ours
            ]
            parts.append(table(["key", "values", "default", "meaning"], rows))
        rest = [name for name in keys if name not in ours]
        if rest:
            parts.append(f"Arguments of `{UPSTREAM[section]}`:\n")
            rows = [_key_row(section, name, keys[name], cell(upstream[name])) for name in sorted(rest)]
            parts.append(table(["key", "values", "default", "meaning"], rows))
    return "\n".join(parts)


UPSTREAM = {
    "training": "trl.SFTConfig",
    "lora": "peft.LoraConfig",
    "quantization": "transformers.BitsAndBytesConfig",
}


def own_meanings() -> dict[str, str]:
    """Return what docs/recipes.md says of each key of ours."""
    found = {}
    for line in (HERE / "recipes.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            first, *rest = re.split(r"(?<!\\)\|", line.strip("| "))
            for key in re.findall(r"`(\w+\.\w+)`", first):
                found[key] = re.sub(r"\]\((?=[\w-]+\.md)", "](../", rest[-1].strip())  # the page lies a folder deeper
    return found


def _upstream_meanings(section: str) -> dict[str, str]:
    """Return upstream's first sentence on each of its arguments; empty where it says none."""
    if section not in UPSTREAM:
        return {}
    from importlib import import_module

    package, _, name = UPSTREAM[section].partition(".")
    kind: Any = getattr(import_module(package), name)
    if dataclasses.is_dataclass(kind) and section != "quantization":
        return {field.name: _first_sentence(str(field.metadata.get("help", ""))) for field in dataclasses.fields(kind)}
    described = re.findall(r"^\s{4,8}(\w+) \(`[^\n]*\n\s+([^\n]+)", kind.__doc__ or "", re.MULTILINE)
    return {name: _first_sentence(text) for name, text in described}


def _first_sentence(text: str) -> str:
    text = re.sub(r"\s+", " ", text.replace("`", "'")).strip()
    return re.split(r"(?<=[a-z\)\'])\. ", text)[0].rstrip(".")


def _key_row(section: str, name: str, argument: Any, meaning: str) -> list[str]:
    from vir_hf.recipe.upstream import MISSING

    values = (
        ", ".join(f"`{word}`" for word in argument.choices) or ", ".join(sorted(argument.kinds - {"none"})) or "any"
    )
    default = "" if argument.default is MISSING else f"`{_yaml(argument.default)}`"
    return [f"`{section}.{name}`", values.replace("|", "\\|"), default.replace("|", "\\|"), meaning]


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def environment() -> str:
    """Return the page of environment variables."""
    head = ["variable", "meaning"]
    return (
        "# Environment variables\n\n## Of vir_hf\n\n"
        + table(head, [[f"`{name}`", text] for name, text in VARIABLES.items()])
        + "\n## Of the libraries below, and of the system\n\n"
        + table(head, [[f"`{name}`", text] for name, text in VARIABLES_OF_OTHERS.items()])
    )


def exit_codes() -> str:
    """Return the page of exit codes."""
    from vir_hf.cli import EXIT_CODES

    return (
        "# Exit codes\n\nThe same for every command. `vir-hf launch` ends with the code of the processes it started; "
        "`accelerate launch` with 1 wherever one of them fails.\n\n"
        + table(["code", "meaning"], [[str(code), cell(text)] for code, text in EXIT_CODES.items()])
        + "\nAn error is one line on standard error. [Troubleshooting](../troubleshooting.md) explains each.\n"
    )


def python_api() -> str:
    """Return the page of the public Python API, which autodoc fills from the docstrings."""
    return "# Python\n\n" + "\n".join(_api_lines())


def _api_lines() -> Iterator[str]:
    import importlib

    import vir_hf

    yield "What `from vir_hf import ...` gives, and what else is kept stable. Everything else may move.\n"
    for title, names in API.items():
        yield f"## {title}\n"
        for path in names:
            module, _, name = path.rpartition(".")
            thing = getattr(importlib.import_module(module), name)
            directive = "autoclass" if isinstance(thing, type) else "autofunction"
            options = "\n   :members:" if path.startswith("vir_hf.inference") else ""
            shown = f"vir_hf.{name}" if name in vir_hf.__all__ else path
            yield f"```{{eval-rst}}\n.. {directive}:: {shown}{options}\n```\n"
