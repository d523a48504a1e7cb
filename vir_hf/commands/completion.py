"""`vir-hf completion SHELL`: the script by which a shell completes commands, options, recipe keys and files.

The script asks back at every TAB: `vir-hf completion --words vir-hf train experiment=lo` prints what the last word may
become. What it prints comes from the table of commands, from the parsers that the commands build for themselves, from
the recipes that can be chosen here and from the installed upstream classes, so nothing has to be kept up to date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vir_hf.console import LEVELS
from vir_hf.errors import DataError, RecipeError

FILES = "*files*"  # printed alone: the shell completes file names itself, quotes and ~ included
_TAKEN_AS_TEXT = ("question", "repo")  # positional words that are no file

_BASH = r"""# Completion of vir-hf for bash. Now: source <(vir-hf completion bash). Always: that line in ~/.bashrc.
_vir_hf_complete() {
    local line word piece head answer
    local -a words=()
    # Bash cuts words at = and :, vir-hf does not: what stood without a gap is joined again, up to the cursor.
    local index gap=1 rest=${COMP_LINE:0:COMP_POINT}
    for ((index = 0; index <= COMP_CWORD; index++)); do
        if [[ $rest == [[:space:]]* ]]; then gap=1; fi
        rest=${rest#"${rest%%[![:space:]]*}"}
        piece=${COMP_WORDS[index]}
        if ((index == COMP_CWORD)); then piece=$rest; fi
        rest=${rest#"$piece"}
        if ((gap)); then words+=("$piece"); else words[${#words[@]}-1]+=$piece; fi
        gap=0
    done
    word=${words[${#words[@]}-1]}
    head=
    [[ $COMP_WORDBREAKS == *=* && $word == *=* ]] && head=${word%"${word##*=}"}
    COMPREPLY=()
    while IFS= read -r answer; do
        answer=${answer%%$'\t'*}
        if [[ $answer == '*files*' ]]; then
            piece=${word#"$head"}
            [[ -z $head && $word == *=* ]] && head=${word%"${word##*=}"} piece=${word##*=}
            compopt +o nospace -o filenames 2>/dev/null
            while IFS= read -r line; do COMPREPLY+=("$line"); done < <(compgen -f -- "$piece")
            return
        fi
        answer=${answer#"$head"}
        case $answer in *[=.]) ;; *) answer+=' ' ;; esac
        COMPREPLY+=("$answer")
    done < <("${words[0]}" completion --words "${words[@]}" 2>/dev/null)
}
complete -o nospace -F _vir_hf_complete vir-hf
"""

_ZSH = r"""#compdef vir-hf
# Completion of vir-hf for zsh. Now: source <(vir-hf completion zsh), after compinit. Always: that line in ~/.zshrc,
# or this text as a file named _vir-hf in a folder of $fpath.
_vir_hf() {
    local line value
    local -a open_values open_shown whole_values whole_shown
    for line in "${(@f)$("${(Q)words[1]}" completion --words "${(@Q)words[1,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)}"; do
        value=${line%%$'\t'*}
        if [[ $value == '*files*' ]]; then
            compset -P 1 '*='
            _files
            return
        fi
        [[ -n $value ]] || continue
        [[ $line == *$'\t'* ]] && line="${(r:24:)value} ${line#*$'\t'}"
        case $value in
            *[=.]) open_values+=("$value") open_shown+=("$line") ;;
            *) whole_values+=("$value") whole_shown+=("$line") ;;
        esac
    done
    (( $#open_values )) && compadd -S '' -l -d open_shown -a -- open_values
    (( $#whole_values )) && compadd -l -d whole_shown -a -- whole_values
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _vir_hf "$@"; else compdef _vir_hf vir-hf; fi
"""

_FISH = r"""# Completion of vir-hf for fish. Always: vir-hf completion fish > ~/.config/fish/completions/vir-hf.fish
function __vir_hf_complete
    set -l before (commandline -opc)
    set -l word (commandline -ct)
    for line in ($before[1] completion --words $before "$word" 2>/dev/null)
        if test "$line" = '*files*'
            set -l head (string match -r '^[^=]*=' -- "$word")
            for path in (__fish_complete_path (string replace -r '^[^=]*=' '' -- "$word"))
                printf '%s%s\n' "$head" "$path"
            end
        else
            printf '%s\n' "$line"
        end
    end
end
complete -c vir-hf -f -a '(__vir_hf_complete)'
"""

_EPILOG = """\
bash: add to ~/.bashrc                   source <(vir-hf completion bash)
zsh:  add to ~/.zshrc, after compinit    source <(vir-hf completion zsh)
fish: once                               vir-hf completion fish > ~/.config/fish/completions/vir-hf.fish
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def main(argv: list[str]) -> int:
    """Print a shell's script, or what the last of the words after `--words` may become; return the exit code."""
    if argv[:1] == ["--words"]:
        try:
            candidates = list(complete(argv[1:]))
        except (RecipeError, DataError):  # such as --recipes-dir of a folder that is none: nothing to offer
            candidates = []
        sys.stdout.write("".join(f"{line}\n" for line in candidates))
        return 0
    parser = argparse.ArgumentParser(
        prog="vir-hf completion",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Print the script by which a shell completes commands, options, experiments, recipe keys and files.",
        epilog=_EPILOG,
    )
    parser.add_argument("shell", choices=tuple(SCRIPTS), help="bash, zsh or fish")
    sys.stdout.write(SCRIPTS[parser.parse_args(argv).shell])
    return 0


def complete(words: Sequence[str]) -> Iterable[str]:
    """Return what the last word may become, a line each, a tab before its help; or `FILES` alone.

    Args:
        words: the command line from `vir-hf` to the cursor; the last one may be empty.
    """
    from vir_hf.cli import COMMANDS, OUTPUT_OPTIONS

    if len(words) <= 2:
        listed = [f"{name}\t{command.help}" for name, command in COMMANDS.items()]
        return _starting(words[-1] if len(words) == 2 else "", [*listed, "--help", "--version"])
    command = COMMANDS.get(words[1])
    if command is None:
        return []
    before, word = list(words[2:-1]), words[-1]
    if words[1] == "data":
        from vir_hf.commands.data import WORDS

        if not before:
            return _starting(word, [*(f"{name}\t{text}" for name, (_, text) in WORDS.items()), "--help"])
        if before[0] not in WORDS:
            return []
    parser = _parser_of(command.load(), before[:1] if words[1] == "data" else [])
    if parser is None:
        return []
    if words[1] != "completion":
        parser.add_argument("--quiet", action="store_true", help=OUTPUT_OPTIONS["--quiet"])
        parser.add_argument("--log-level", choices=LEVELS, help=OUTPUT_OPTIONS["--log-level LEVEL"])
    return _complete_arguments(parser, before, word)


class _Built(Exception):
    """A command has built its parser, which is all that is wanted of it."""


def _parser_of(command: Any, argv: list[str]) -> argparse.ArgumentParser | None:
    """Return the parser a command builds, or None where it has none; the command goes no further than that."""
    try:
        with _stopped_at_parsing():
            command(argv)
    except _Built as built:
        parser: argparse.ArgumentParser = built.args[0]
        return parser
    return None


@contextmanager
def _stopped_at_parsing() -> Iterator[None]:
    """Make every parser raise `_Built` when it is asked to parse."""

    def stop(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise _Built(parser)

    names = ("parse_args", "parse_intermixed_args", "parse_known_args")
    kept = {name: getattr(argparse.ArgumentParser, name) for name in names}
    try:
        for name in names:
            setattr(argparse.ArgumentParser, name, stop)
        yield
    finally:
        for name in names:
            setattr(argparse.ArgumentParser, name, kept[name])


def _complete_arguments(parser: argparse.ArgumentParser, before: list[str], word: str) -> list[str]:
    """Return what a word may become among a command's arguments."""
    options = {option: action for action in parser._actions for option in action.option_strings}
    waiting = options.get(before[-1]) if before else None
    if waiting is not None and waiting.nargs is None:
        return _values_of(waiting, word)
    if word.startswith("-"):
        option, is_value, value = word.partition("=")
        if is_value:
            action = options.get(option)
            found = [] if action is None or action.nargs == 0 else _values_of(action, value)
            return found if found == [FILES] else [f"{option}={line}" for line in found]
        shown = {option: action for option, action in options.items() if action.help != argparse.SUPPRESS}
        return _starting(word, [_with_help(o, a.help) for o, a in shown.items() if o.startswith("--")])
    positional = {action.dest: action for action in parser._actions if not action.option_strings}
    if "overrides" in positional:
        found = _complete_override(word, _option_value(before, "--recipes-dir"))
        is_path = getattr(parser, "takes_path", False) and "=" not in word
        return [FILES] if is_path and (not word or not found) else found
    found = _starting(word, [str(choice) for action in positional.values() for choice in action.choices or ()])
    takes_files = any(a.choices is None and name not in _TAKEN_AS_TEXT for name, a in positional.items())
    return found or ([FILES] if takes_files else [])


def _values_of(action: argparse.Action, word: str) -> list[str]:
    """Return what the value of an option may become."""
    if action.choices is not None:
        return _starting(word, [str(choice) for choice in action.choices])
    if action.type in (int, float):
        return []
    if action.dest == "template":
        from vir_hf.recipe.load import section_arguments

        return _starting(word, section_arguments("model")["template"].choices)
    if action.dest == "config":
        from vir_hf.recipe.files import packaged_directory

        names = sorted(path.stem for path in packaged_directory("accelerate_configs").glob("*.yaml"))
        return _starting(word, names) or [FILES]
    return [FILES]


def _complete_override(word: str, recipes_dir: str | None) -> list[str]:
    """Return what an override may become: a group and its options, a section, its keys and their values."""
    from vir_hf.recipe import files as recipe_files
    from vir_hf.recipe.keys import REFUSED
    from vir_hf.recipe.load import section_arguments, section_names

    key, is_value, value = word.partition("=")
    section, is_key, name = key.partition(".")
    prefix = section[: len(section) - len(section.lstrip("+~"))]
    section = section[len(prefix) :]
    if not is_key:
        if is_value:
            if section not in recipe_files.GROUPS:
                return [FILES] if section == "recipe" else []
            names = recipe_files.group_options(section, recipes_dir)
            found = _starting(value, names)
            return [f"{key}={line}" for line in found] or ([FILES] if section == "experiment" else [])
        groups = [f"{group}=" for group in (*recipe_files.GROUPS, "recipe")]
        return _starting(word, [prefix + text for text in (*groups, *(f"{name}." for name in section_names()))])
    if section not in section_names():
        return []
    known = section_arguments(section)
    if not is_value:
        keys = [n for n, argument in known.items() if argument.is_writable and f"{section}.{n}" not in REFUSED]
        return _starting(word, [f"{prefix}{section}.{n}=" for n in sorted(keys)])
    argument = known.get(name)
    if argument is None:
        return []
    words = argument.choices or (("true", "false") if "bool" in argument.kinds else ())
    if words:
        return [f"{key}={line}" for line in _starting(value, words)]
    return [FILES] if "str" in argument.kinds or not argument.kinds else []


def _option_value(words: Sequence[str], option: str) -> str | None:
    """Return what was given to an option among the words before, None where it was not."""
    for position, word in enumerate(words):
        if word == option and position + 1 < len(words):
            return words[position + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def _with_help(word: str, text: str | None) -> str:
    """Return a candidate and its help on one line."""
    return f"{word}\t{' '.join(text.replace('%%', '%').split())}" if text else word


def _starting(word: str, candidates: Iterable[str]) -> list[str]:
    """Return the candidates that begin with what was typed."""
    return [candidate for candidate in candidates if candidate.startswith(word)]
