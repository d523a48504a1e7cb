"""The recipe: what is trained, on what, how. Composed by Hydra from recipes/, typed and checked before anything heavy loads.

    recipe = load_recipe(["experiment=local_lite", "training.learning_rate=5e-5", "data.data_path=rows.json"])
    recipe.training.learning_rate   # 5e-05
    SFTConfig(**recipe.training.sft_arguments())

Nothing here imports torch, so a typo is answered in a fraction of a second.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from vir_hf import files
from vir_hf.errors import RecipeError
from vir_hf.recipe import files as recipe_files
from vir_hf.recipe import keys as recipe_keys
from vir_hf.recipe import rules as recipe_rules
from vir_hf.recipe import upstream
from vir_hf.recipe.sections import (
    DataSection,
    ExperimentSection,
    LoraSection,
    ModelSection,
    QuantizationSection,
    SourceSection,
    TrainableSection,
    TrainingSection,
)


@dataclass
class Recipe:
    """A whole recipe, every value in its type."""

    experiment: ExperimentSection = field(default_factory=ExperimentSection)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    trainable: TrainableSection = field(default_factory=TrainableSection)
    lora: LoraSection = field(default_factory=LoraSection)
    quantization: QuantizationSection = field(default_factory=QuantizationSection)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain dictionaries, one a section, as `load_recipe` reads them back."""
        sections = dataclasses.asdict(self)
        for section in sections.values():
            section.update(section.pop("arguments", {}))
        return sections

    def to_yaml(self) -> str:
        """Return the resolved recipe; saved to a file it runs again with `vir-hf train --recipe FILE`."""
        from omegaconf import OmegaConf

        head = "# Every value of this run. Again: vir-hf train --recipe THIS_FILE [key=value ...]\n"
        return head + OmegaConf.to_yaml(OmegaConf.create(self.to_dict()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_yaml()` to a file, whole or not at all."""
        files.write_text(path, self.to_yaml())


class RecipeArgumentParser(argparse.ArgumentParser):
    """The arguments that every command over a recipe takes: overrides, `--recipe` and `--recipes-dir`.

    Args:
        takes_path: the words may be one path instead, to data that are looked at without a recipe.
        can_resume: add `--resume [PATH]`, a short way to say training.resume.
    """

    def __init__(self, *, takes_path: bool = False, can_resume: bool = False, **keywords: Any) -> None:
        keywords.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**keywords)
        self.takes_path = takes_path
        words = "experiment=NAME, GROUP=OPTION or section.key=value"
        self.add_argument(
            "overrides",
            nargs="*",
            metavar="PATH or key=value" if takes_path else "key=value",
            help=f"a data file, a directory or a quoted glob; or a recipe: {words}" if takes_path else words,
        )
        self.add_argument("--recipe", metavar="FILE", help="start from a recipe file, such as one that a run saved")
        self.add_argument("--recipes-dir", metavar="DIR", help="a folder of your own recipes, searched first")
        if can_resume:
            self.add_argument(
                "--resume",
                nargs="?",
                const="auto",
                metavar="PATH",
                help="go on from the newest whole checkpoint in training.output_dir, or from PATH (training.resume)",
            )
        self._takes_path = takes_path

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the parsed arguments, `--resume` among the overrides; flags and overrides may stand in any order."""
        options = self.parse_intermixed_args(args, namespace)
        resume = getattr(options, "resume", None)
        if resume is not None:
            if "=" in resume and not os.path.exists(resume):  # an override behind a bare --resume
                options.overrides, resume = [resume, *options.overrides], "auto"
            options.overrides = [*options.overrides, f"training.resume={resume}"]
        if self._takes_path and not options.overrides and not options.recipe:
            self.error("expected a path, or a recipe: experiment=NAME data.data_path=ROWS.json, or --recipe FILE")
        return options

    def error(self, message: str) -> NoReturn:
        """End with exit code 2; a recipe key written as a flag is answered with how to write it."""
        flag = re.match(r"unrecognized arguments: --?([A-Za-z][\w.-]*)", message)
        if flag:
            name = flag[1].replace("-", "_")
            known = next((f"{s}.{name}" for s, names in schema().items() if name in names), None)
            if known is None and name in recipe_keys.RENAMED:
                known = recipe_keys.RENAMED[name]
            message += f". Recipe keys are written key=value: {known or 'training.learning_rate=5e-5'}"
            message += "=VALUE" if known and " " not in known and "=" not in known else ""
        super().error(message)


def recipe_from(arguments: argparse.Namespace, *, require_data: bool = True) -> Recipe:
    """Return the recipe that parsed `RecipeArgumentParser` arguments ask for."""
    return load_recipe(
        arguments.overrides,
        recipe_file=arguments.recipe,
        recipes_dir=arguments.recipes_dir,
        require_data=require_data,
    )


_SECTIONS: dict[str, type[Any]] = {
    "experiment": ExperimentSection,
    "model": ModelSection,
    "data": DataSection,
    "training": TrainingSection,
    "trainable": TrainableSection,
    "lora": LoraSection,
    "quantization": QuantizationSection,
}


_PASSED_THROUGH: dict[str, Callable[[], dict[str, upstream.Argument]]] = {
    "training": upstream.sft_arguments,
    "lora": upstream.lora_arguments,
    "quantization": upstream.quantization_arguments,
}


@lru_cache
def schema() -> dict[str, dict[str, upstream.Argument]]:
    """Return every key a recipe may hold, by section: ours, and the installed upstream classes' own."""
    return {section: section_arguments(section) for section in _SECTIONS}


def section_names() -> tuple[str, ...]:
    """Return the sections of a recipe, in order."""
    return tuple(_SECTIONS)


@lru_cache
def section_arguments(section: str) -> dict[str, upstream.Argument]:
    """Return every key of one section; no source but this section's is read."""
    known = {**_PASSED_THROUGH.get(section, dict)(), **_own_arguments(_SECTIONS[section])}
    for key, words in recipe_keys.WORDS.items():
        of_section, _, name = key.partition(".")
        if of_section == section and name in known:
            known[name] = dataclasses.replace(known[name], choices=words)
    # These dictionaries are where a new word is added; their modules are too heavy to import for a typo.
    package = Path(__file__).parents[1]
    if section == "data":
        shapes = upstream.keys_of_dictionary(package / "rows/shapes.py", "SHAPES")
        known["format"] = dataclasses.replace(known["format"], choices=shapes)
    if section != "model":
        return known
    for name, file, dictionary, more in (
        ("projector_type", "llava/projectors.py", "PROJECTORS", ()),
        ("template", "rows/templates.py", "TEMPLATES", ("auto",)),
    ):
        words = (*upstream.keys_of_dictionary(package / file, dictionary), *more)
        known[name] = dataclasses.replace(known[name], choices=words)
    return known


def load_recipe(
    overrides: Sequence[str] = (),
    *,
    recipe_file: str | os.PathLike[str] | None = None,
    recipes_dir: str | os.PathLike[str] | None = None,
    require_data: bool = True,
) -> Recipe:
    """Return the typed recipe that these overrides make.

    What is left open is filled in by rule. `trainable`: stage pretrain trains the projector alone; stage finetune
    the projector and the language model, with LoRA when the recipe has a lora section or loads in 4 or 8 bit, else
    all of it. `lora`: the values of recipes/lora/default.yaml when a part is trained with LoRA and nothing is said.

    Args:
        overrides: `experiment=NAME`, `GROUP=NAME` or `section.key=value`, in Hydra's grammar.
        recipe_file: a recipe that stands alone (one that `Recipe.save` wrote) or an experiment file that has
            `defaults:`. `recipe=FILE` and `experiment=FILE` among the overrides say the same.
        recipes_dir: a folder of your own with `experiment/`, `model/` ... in it, searched before `./recipes` and before
            the recipes of the package.
        require_data: false for commands that need no data path.

    Raises:
        RecipeError: an unknown name or key, a value of another type, keys that contradict each other.
    """
    tree = recipe_files.compose(overrides, schema(), recipe_file=recipe_file, recipes_dir=recipes_dir)
    recipe = _typed(tree)
    recipe_rules.write_out(recipe)
    recipe_rules.check(recipe, require_data=require_data)
    return recipe


def _typed(tree: dict[str, dict[str, Any]]) -> Recipe:
    """Return the recipe a resolved tree holds, every value checked against its key's type."""
    known = schema()
    sections: dict[str, Any] = {}
    for section, section_class in _SECTIONS.items():
        own = {f.name: f for f in dataclasses.fields(section_class)}
        values: dict[str, Any] = {}
        passed_through: dict[str, Any] = {}
        for name, value in tree.get(section, {}).items():
            key = f"{section}.{name}"
            value = recipe_keys.checked_value(key, value, known[section][name])
            if key == "data.sources" and value is not None:
                value = [_source(number, source) for number, source in enumerate(value)]
            if name not in own:
                passed_through[name] = value
            elif value is not None or "none" in known[section][name].kinds:
                values[name] = value  # null for a key that takes no null means not given
        if passed_through:
            values["arguments"] = passed_through
        sections[section] = section_class(**values)
    return Recipe(**sections)


def _source(number: int, source: Any) -> SourceSection:
    """Return one entry of data.sources; a plain text is its path."""
    key = f"data.sources[{number}]"
    if isinstance(source, str):
        return SourceSection(path=source)
    if not isinstance(source, dict) or not source.get("path"):
        raise RecipeError(f"{key}: found {source!r}, expected a mapping with a path: {{path: rows.json, weight: 1.0}}.")
    known = _own_arguments(SourceSection)
    for name in source:
        if name not in known:
            near = recipe_keys.nearest_word(str(name), known)
            raise RecipeError(
                f"{key}.{name}: unknown key. {f'Did you mean {near}?' if near else ''} Known: {', '.join(known)}."
            )
    return SourceSection(**{n: recipe_keys.checked_value(f"{key}.{n}", v, known[n]) for n, v in source.items()})


def _own_arguments(section_class: type[Any]) -> dict[str, upstream.Argument]:
    """Return the keys a section of ours declares; its `arguments` field holds upstream's and is none."""
    return {
        f.name: upstream.argument_of(
            f.name, str(f.type), upstream.MISSING if f.default is dataclasses.MISSING else f.default
        )
        for f in dataclasses.fields(section_class)
        if f.name != "arguments"
    }
