"""Where recipes lie, and how Hydra composes one from them and from what was typed."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vir_hf.errors import RecipeError
from vir_hf.recipe import keys as recipe_keys
from vir_hf.recipe import upstream

logger = logging.getLogger(__name__)

GROUPS = ("model", "data", "training", "lora", "quantization", "experiment")


@dataclass(frozen=True)
class Override:
    """One word of the command line: `key=value`, `group=option` or `~key`."""

    text: str
    key: str
    value: str | None
    is_removal: bool = False

    @property
    def is_group(self) -> bool:
        """Whether it chooses a file (`experiment=local_lite`) and does not set a key."""
        return self.key in GROUPS


def recipe_directories(recipes_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """Return the folders recipes are looked up in, first match wins: the one given, `./recipes`, the package's own."""
    found = []
    if recipes_dir is not None:
        given = Path(recipes_dir).expanduser().resolve()
        if not any((given / group).is_dir() for group in GROUPS):
            raise RecipeError(
                f"--recipes-dir {recipes_dir}: expected a folder with at least one of {', '.join(GROUPS)} in it. "
                "Put an experiment into DIR/experiment/NAME.yaml."
            )
        found.append(given)
    here = Path.cwd() / "recipes"
    if any((here / group).is_dir() for group in GROUPS):
        found.append(here.resolve())
    found.append(packaged_directory("recipes"))
    return list(dict.fromkeys(found))


def packaged_directory(name: str) -> Path:
    """Return a folder the package carries (`recipes`, `accelerate_configs`, `spaces`): in the wheel or in the clone."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{package / name}: the installation is incomplete. Install vir-hf again.")


def packaged_values(group: str, name: str) -> dict[str, Any]:
    """Return what one of the package's own group files holds, such as lora/default."""
    values = read_yaml(packaged_directory("recipes") / group / f"{name}.yaml")
    return {str(key): value for key, value in values.items()}


def group_options(group: str, recipes_dir: str | os.PathLike[str] | None = None) -> dict[str, Path]:
    """Return what can be chosen for a group (`experiment`, `model`, ...): each name and its file."""
    options: dict[str, Path] = {}
    for folder in recipe_directories(recipes_dir):
        for path in sorted((folder / group).rglob("*.yaml")):
            options.setdefault(path.relative_to(folder / group).with_suffix("").as_posix(), path)
    return options


def compose(
    overrides: Sequence[str],
    schema: recipe_keys.Schema,
    *,
    recipe_file: str | os.PathLike[str] | None = None,
    recipes_dir: str | os.PathLike[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the composed recipe as plain dictionaries, one a section: names known, references resolved.

    Raises:
        RecipeError: an override that cannot be read, an unknown key or option, a file that is no recipe.
    """
    parsed = [read_override(text) for text in overrides]
    _refuse_two_options(parsed)
    recipe_file, parsed = _take_recipe_file(parsed, recipe_file)
    typed = {override.key for override in parsed}
    hydra_overrides = [_key_override(override, schema) for override in parsed if not override.is_group]
    if "training.max_tokens_per_batch" in typed and "training.per_device_train_batch_size" not in typed:
        # A token budget replaces the row count that the recipe's training group brings.
        hydra_overrides.insert(0, "++training.per_device_train_batch_size=null")
    with tempfile.TemporaryDirectory(prefix="vir_hf_recipe_") as scratch:
        directories, config_name, chosen = _lay_out(parsed, recipe_file, recipes_dir, Path(scratch))
        raw = _compose_with_hydra(directories, config_name, chosen + hydra_overrides)
    _check_tree(raw, schema, typed)
    if typed & {"training", "training.stage"} and "experiment.stage" not in typed:
        # What a file says of its stage was said of its own training, and another was asked for.
        (raw.get("experiment") or {}).pop("stage", None)
    return _resolved(raw, schema)


def read_override(text: str) -> Override:
    """Return the parts of one override.

    Raises:
        RecipeError: it is no `key=value`.
    """
    found = re.fullmatch(r"(\+{0,2}|~)([A-Za-z_][\w.]*)(?:=(.*))?", text.strip(), re.DOTALL)
    if found is None or (found[3] is None and found[1] != "~"):
        flag = re.match(r"--?([A-Za-z][\w.-]*)", text)
        hint = f"training.{flag[1].replace('-', '_')}=VALUE" if flag else "training.learning_rate=5e-5"
        raise RecipeError(f"{text}: expected key=value, such as experiment=local_lite or {hint}.")
    prefix, key, value = found.groups()
    if key.split(".")[0] == "hydra":
        raise RecipeError(f"{text}: Hydra's own settings are fixed. Remove it; results go to training.output_dir.")
    return Override(text, key, value, is_removal=prefix == "~")


def _refuse_two_options(overrides: list[Override]) -> None:
    """Raise when a group is chosen twice; which one counts would be a guess."""
    chosen: dict[str, str] = {}
    for override in overrides:
        if override.is_group and chosen.setdefault(override.key, override.text) != override.text:
            raise RecipeError(f"{override.text}: {chosen[override.key]} is given too. Choose one {override.key}.")


def _take_recipe_file(
    overrides: list[Override], recipe_file: str | os.PathLike[str] | None
) -> tuple[Path | None, list[Override]]:
    """Return the recipe file that was named, if any, and the other overrides."""
    named = [str(recipe_file)] if recipe_file is not None else []
    others = []
    for override in overrides:
        value = override.value or ""
        if override.key == "recipe" or (override.key == "experiment" and value.endswith((".yaml", ".yml"))):
            named.append(value.strip("'\""))
        else:
            others.append(override)
    if len(set(named)) > 1:
        raise RecipeError(f"two recipe files: {' and '.join(named)}. Name one.")
    if not named:
        return None, others
    path = Path(named[0]).expanduser().resolve()
    if path.is_dir():
        path = path / "recipe.yaml"
    if path.is_dir():
        raise RecipeError(
            f"{path}: is a folder, expected a recipe file. Name the file, such as outputs/RUN/recipe.yaml."
        )
    if not path.is_file():
        raise RecipeError(
            f"{named[0]}: no such recipe file. Name one that a run saved, such as outputs/RUN/recipe.yaml."
        )
    return path, others


def _key_override(override: Override, schema: recipe_keys.Schema) -> str:
    """Return the override as Hydra takes it, after checking that the key exists."""
    argument = recipe_keys.find_argument(override.key, schema)
    if override.is_removal:
        return f"~{override.key}"
    value = override.value or ""
    if not value.strip():
        raise RecipeError(f"{override.text}: nothing stands after the equals sign. Write {override.key}=null for none.")
    if argument.kinds <= {"str", "none"} and argument.kinds:
        if value.lower() in ("null", "none") and "none" in argument.kinds:
            value = "null"
        elif "${" not in value and value[:1] not in "'\"" and value != "null":
            # A path may hold spaces, commas and brackets, which Hydra's grammar would take apart.
            value = _quoted(value)
    elif not _is_hydra_value(value):
        if "str" not in argument.kinds or value[0] in "{[":
            raise RecipeError(
                f"{override.text}: the value cannot be read. Write a list as '{override.key}=[A,B]', a mapping as "
                f"'{override.key}={{NAME:VALUE}}', in quotes for the shell."
            )
        value = _quoted(value)  # such as a regular expression for lora.target_modules
    return f"++{override.key}={value}"


def _is_hydra_value(value: str) -> bool:
    """Return whether Hydra's grammar reads what stands after the equals sign as one value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return not OverridesParser.create().parse_override(f"key={value}").is_sweep_override()
    except HydraException:
        return False


def _quoted(text: str) -> str:
    """Return a text in Hydra's single quotes; backslashes count only before a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def _lay_out(
    overrides: list[Override],
    recipe_file: Path | None,
    recipes_dir: str | os.PathLike[str] | None,
    scratch: Path,
) -> tuple[list[Path], str, list[str]]:
    """Return the folders Hydra searches, the file it starts from, and the options chosen for the groups."""
    groups = [override for override in overrides if override.is_group]
    typed = {override.key for override in overrides}
    directories = recipe_directories(recipes_dir)
    chosen = []
    name = ""
    if recipe_file is not None:
        content = read_yaml(recipe_file)
        if not content:
            raise RecipeError(
                f"{recipe_file}: is empty, expected a mapping of sections (model, data, training ...). Correct the file."
            )
        if "defaults" not in content:
            if groups:
                raise RecipeError(
                    f"{groups[0].text}: {recipe_file} stands alone, it takes no groups. Set keys instead, such as "
                    "quantization.load_in_4bit=false."
                )
            (scratch / "config.yaml").write_text(recipe_file.read_text(encoding="utf-8"), encoding="utf-8")
            return [scratch], "config", []
        if any(override.key == "experiment" for override in groups):
            raise RecipeError(f"{recipe_file}: is an experiment already. Leave out experiment=NAME.")
        text = re.sub(r"^# @package .*$", "", recipe_file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        (scratch / "experiment").mkdir()
        (scratch / "experiment" / "recipe_file.yaml").write_text(f"# @package _global_\n{text}", encoding="utf-8")
        name = recipe_file.stem
        chosen.append("experiment=recipe_file")
    for override in groups:
        option = _checked_option(override, recipes_dir)
        chosen.append(f"{override.key}={option}")
        if override.key == "experiment":
            name = option.rsplit("/", 1)[-1]
    if name and "experiment.name" not in typed:
        chosen.append(f"++experiment.name={_quoted(name)}")
    if recipe_file is not None or len(directories) > 1:
        # Hydra looks for the file it starts from in the first folder only; it is always the package's own.
        (scratch / "config.yaml").write_bytes((packaged_directory("recipes") / "config.yaml").read_bytes())
        directories = [scratch, *directories]
    return directories, "config", chosen


def _checked_option(override: Override, recipes_dir: str | os.PathLike[str] | None) -> str:
    """Return the option an override chooses for its group.

    Raises:
        RecipeError: there is no such file; names the nearest one.
    """
    value = (override.value or "").strip("'\"")
    options = group_options(override.key, recipes_dir)
    if value in ("null", "None") and "none" in options:
        value = "none"
    if override.is_removal or value not in options:
        near = recipe_keys.nearest_word(value, options)
        hint = f" Did you mean {override.key}={near}?" if near else ""
        raise RecipeError(f"{override.text}: unknown {override.key}, expected one of {', '.join(options)}.{hint}")
    packaged = packaged_directory("recipes") / override.key / f"{value}.yaml"
    if packaged.is_file() and options[value] != packaged and options[value].read_bytes() != packaged.read_bytes():
        logger.warning("%s is taken from %s, which differs from the package's own", override.text, options[value])
    return value


def read_yaml(path: Path) -> dict[Any, Any]:
    """Return what a recipe file holds.

    Raises:
        RecipeError: it is no YAML mapping, or it tries to set up Hydra.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as YAML: {_first_lines(error)}. Correct the file.") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected a mapping of sections (model, data, training ...). Correct the file.")
    if "hydra" in content:
        raise RecipeError(f"{path}: the key hydra is not accepted: Hydra's own settings are fixed. Remove it.")
    return content


def _compose_with_hydra(directories: list[Path], config_name: str, overrides: list[str]) -> Any:
    """Return the composed configuration as plain dictionaries, references still unresolved."""
    import yaml
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with _hydra(directories) as compose_config:
            config = compose_config(config_name=config_name, overrides=overrides + _search_path(directories))
        raw = OmegaConf.to_container(config, resolve=False)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise RecipeError(
            f"the recipe cannot be composed: {_first_lines(error)}. Correct that override or file."
        ) from error
    recipe_keys.refuse_code("", raw)
    return raw


def _resolved(raw: Any, schema: recipe_keys.Schema) -> dict[str, dict[str, Any]]:
    """Return the tree with `${section.key}` replaced; a key that is not set stands for its default."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = {section: values or {} for section, values in raw.items()}
    defaults = {
        section: {name: a.default for name, a in arguments.items() if a.default is not upstream.MISSING}
        for section, arguments in schema.items()
    }
    resolved: dict[str, dict[str, Any]] = {}
    try:
        merged = OmegaConf.merge(defaults, tree)
        for section, values in tree.items():
            whole: Any = OmegaConf.to_container(merged[section], resolve=True, throw_on_missing=True)
            resolved[section] = {name: whole[name] for name in values}
    except OmegaConfBaseException as error:
        raise RecipeError(f"the recipe cannot be resolved: {_first_lines(error)}. Correct that key.") from error
    return resolved


@contextmanager
def _hydra(directories: list[Path]) -> Iterator[Any]:
    """Yield Hydra's compose function over a folder; no output folder, no logging set-up, no change of directory."""
    from hydra import compose as compose_config
    from hydra import initialize_config_dir

    with initialize_config_dir(config_dir=str(directories[0]), version_base="1.3"):
        yield compose_config


def _search_path(directories: list[Path]) -> list[str]:
    """Return the override that adds all folders but the first to Hydra's search path."""
    if len(directories) == 1:
        return []
    return [f"hydra.searchpath=[{','.join(_quoted(f'file://{folder}') for folder in directories[1:])}]"]


def _check_tree(tree: Any, schema: recipe_keys.Schema, typed: set[str]) -> None:
    """Raise for a key that does not exist, wherever it was written, and for code asked for by a file."""
    for section, values in tree.items():
        if section not in schema:
            raise RecipeError(recipe_keys.unknown_key(str(section), schema))
        if values is None:
            continue
        if not isinstance(values, dict):
            raise RecipeError(f"{section}: found {values!r}, expected a mapping. Write {section}.NAME=VALUE.")
        for name in values:
            recipe_keys.find_argument(f"{section}.{name}", schema)
    if (tree.get("model") or {}).get("trust_remote_code") and "model.trust_remote_code" not in typed:
        raise RecipeError(
            "model.trust_remote_code: a file cannot turn it on, because recipes travel with downloaded models. If you trust "
            "the code of this model, add model.trust_remote_code=true to the command."
        )


def _first_lines(error: Exception) -> str:
    """Return what an error of Hydra or YAML says, on one line."""
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:400].rstrip(". ")
