"""ollama's Modelfile: the two GGUF files, and the chat template in ollama's words, read off the one that was trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vir_hf.errors import RecipeError
from vir_hf.rows.templates import adds_bos, render

_SYSTEM, _USER, _ANSWER = "\ue000system\ue000", "\ue000user\ue000", "\ue000answer\ue000"


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around the texts of a conversation."""

    before_system: str
    after_system: str
    before_user: str
    after_user: str
    after_answer: str
    default_system: str


def turns_of(tokenizer: Any, chat_template: str) -> Turns:
    """Return what stands around the texts of a conversation, found by rendering marks.

    Raises:
        RecipeError: the template writes a second turn otherwise than a first one, which ollama's cannot.
    """

    def rendered(*roles: str, prompt: bool = False) -> str:
        texts = {"system": _SYSTEM, "user": _USER, "assistant": _ANSWER}
        text = render(tokenizer, chat_template, [{"role": role, "content": texts[role]} for role in roles], prompt)
        start = tokenizer.bos_token or ""
        return text.removeprefix(start) if adds_bos(tokenizer) else text

    after_answer = rendered("user", "assistant").partition(_ANSWER)[2]
    again = rendered("user", "assistant", "user", prompt=True)
    first, _, rest = again.partition(_USER)
    between = rest.partition(_ANSWER)[2].partition(_USER)[0]
    after_user = rest.rpartition(_USER)[2]
    before_user = between.removeprefix(after_answer)
    start = first.removesuffix(before_user)
    before_system = after_system = ""
    try:
        with_system = rendered("system", "user", prompt=True)
    except Exception:  # a tokenizer's own template may refuse a system prompt in any way
        with_system = ""
    if _SYSTEM in with_system:
        before_system, _, tail = with_system.partition(_SYSTEM)
        after_system = tail.partition(_USER)[0].removesuffix(before_user)
    default_system = start.removeprefix(before_system).removesuffix(after_system)
    turns = Turns(before_system, after_system, before_user, after_user, after_answer, default_system)
    if not between or _written(turns, default_system) != again:
        raise RecipeError(
            "the chat template writes a second turn otherwise than a first one, which ollama's templates cannot."
        )
    return turns


def _written(turns: Turns, system: str) -> str:
    lead = turns.before_system + system + turns.after_system if system else ""
    # A model writes the space before its answer itself, so the answer that is sent back begins with it.
    space = " " if turns.after_user.endswith(":") else ""
    one = turns.before_user + _USER + turns.after_user + space + _ANSWER + turns.after_answer
    return lead + one + turns.before_user + _USER + turns.after_user


def modelfile(tokenizer: Any, chat_template: str, language_model: str, mmproj: str, stops: list[str]) -> str:
    """Return the text of a Modelfile.

    Args:
        language_model, mmproj: the names of the GGUF files beside it.
        stops: texts that end an answer.

    Raises:
        RecipeError: as `turns_of`.
    """
    turns, system = turns_of(tokenizer, chat_template), ""
    if turns.before_system or turns.after_system:
        system = f"{{{{ if .System }}}}{turns.before_system}{{{{ .System }}}}{turns.after_system}{{{{ end }}}}"
    template = f"{system}{turns.before_user}{{{{ .Prompt }}}}{turns.after_user}{{{{ .Response }}}}{turns.after_answer}"
    lines = [f"FROM ./{language_model}", f"FROM ./{mmproj}", f'TEMPLATE """{template}"""']
    if turns.default_system:
        lines.append(f'SYSTEM """{turns.default_system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops) if stop.strip() and '"' not in stop]
    return "\n".join([*lines, "PARAMETER temperature 0", ""])
