"""`data.filter`: which rows of a source are read, by a column of theirs or by what the row is."""

from __future__ import annotations

import operator
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vir_hf.errors import RecipeError, shown

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"\s*(>=|<=|==|!=|>|<)?\s*(.*?)\s*(\bor null)?\s*", re.DOTALL)
# What a condition may ask of a row that has no column of this name.
QUANTITIES = ("num_images", "num_turns", "num_characters", "image_width", "image_height", "script")
_OF_IMAGES = ("image_width", "image_height")
# The first word of a letter's Unicode name -> its script.
_SCRIPTS = {"CJK": "han", "HIRAGANA": "japanese", "KATAKANA": "japanese"}


class Condition(NamedTuple):
    """One condition: a column's (or quantity's) value compared with a number, a text, or the texts of a list."""

    column: str
    compare: Callable[[Any, Any], Any]
    value: Any
    takes_null: bool
    text: str

    def holds(self, found: Any) -> bool:
        """Whether a value fulfils it. A list does if all of its values do; null does not, unless `or null` says so.

        Raises:
            RecipeError: a text is compared with a number by size.
        """
        if found is None:
            return self.takes_null
        if isinstance(found, (list, tuple)):
            return all(self.holds(value) for value in found)
        if isinstance(self.value, list):
            return any(found == value or str(found) == str(value) for value in self.value)
        if isinstance(self.value, (int, float)) and isinstance(found, str):
            try:
                found = float(found)  # tables without types write numbers as text
            except ValueError:
                if self.compare not in (operator.eq, operator.ne):
                    raise RecipeError(
                        f"data.filter.{self.column}: is {self.text!r}, and a row has {shown(found)}, which is no number."
                    ) from None
        elif isinstance(self.value, str):
            found = str(found)
        return bool(self.compare(found, self.value))


def parse_filter(conditions: Mapping[str, Any] | None, key: str = "data.filter") -> tuple[Condition, ...]:
    """Return the conditions of `data.filter`: `{relevance_min: ">=3", source: [ai2d, chartqa], num_images: "<=4 or null"}`.

    Raises:
        RecipeError: a condition that cannot be read.
    """
    return tuple(_parse(str(column), condition, f"{key}.{column}") for column, condition in (conditions or {}).items())


def _parse(column: str, condition: Any, key: str) -> Condition:
    if isinstance(condition, (list, tuple)) and condition:
        return Condition(column, operator.eq, list(condition), False, f"one of {list(condition)}")
    if isinstance(condition, bool) or isinstance(condition, (int, float)):
        return Condition(column, operator.eq, condition, False, f"=={condition}")
    match = _CONDITION.fullmatch(condition) if isinstance(condition, str) else None
    if match is None or not match[2]:
        raise RecipeError(
            f"{key}: found {shown(condition)}; expected a comparison such as '>=3', a value, or a list of values; "
            "' or null' at its end also takes rows without one."
        )
    compare = match[1] or "=="
    value: Any = match[2]
    try:
        value = float(value)
    except ValueError:
        if compare not in ("==", "!="):
            raise RecipeError(f"{key}: found {condition!r}; expected a number after {compare}.") from None
    return Condition(column, _OPERATORS[compare], value, bool(match[3]), condition.strip())


def failed_by_columns(conditions: tuple[Condition, ...], raw: Any, absent: Counter[str]) -> Condition | None:
    """Return the first condition on a column that a raw row does not fulfil; `absent` counts the columns that rows lack."""
    row = raw if isinstance(raw, Mapping) else {}
    failed = None
    for condition in conditions:
        if condition.column in row:
            failed = failed or (None if condition.holds(row[condition.column]) else condition)
        elif condition.column not in QUANTITIES:
            absent[condition.column] += 1
            failed = failed or (None if condition.takes_null else condition)
    return failed


def failed_by_quantities(
    conditions: tuple[Condition, ...],
    raw: Any,
    row: Mapping[str, Any],
    read_size: Callable[[Any], tuple[int, int]],
) -> Condition | None:
    """Return the first condition on a quantity that a normal row does not fulfil.

    Args:
        raw: the row as it was read; a column of its own goes before a quantity of the same name.
        row: the same as `{"messages", "images"}`, its images located.
        read_size: gives width and height of an image; asked only if a condition does.
    """
    for condition in conditions:
        if condition.column in QUANTITIES and not (isinstance(raw, Mapping) and condition.column in raw):
            if not condition.holds(_quantity(condition.column, row, read_size)):
                return condition
    return None


def _quantity(name: str, row: Mapping[str, Any], read_size: Callable[[Any], tuple[int, int]]) -> Any:
    if name == "num_images":
        return len(row["images"])
    if name == "num_turns":
        return len(row["messages"])
    if name in _OF_IMAGES:
        sizes = [read_size(image)[_OF_IMAGES.index(name)] for image in row["images"]]
        return sizes or None
    texts = [part["text"] for message in row["messages"] for part in message["content"] if part.get("text")]
    return sum(map(len, texts)) if name == "num_characters" else script_of("".join(texts))


def script_of(text: str) -> str:
    """Return the script that most letters of a text are of, in small letters: `latin`, `cyrillic`, `han`, `arabic` ...

    A text with kana is `japanese`, however many Chinese characters it has; one without letters is `none`.
    """
    counts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if character.isalpha():
            word = unicodedata.name(character, "unknown").partition(" ")[0]
            counts[_SCRIPTS.get(word.partition("-")[0], word.lower())] += count
    if not counts:
        return "none"
    if counts["japanese"] * 5 > counts["han"] and counts["japanese"]:
        counts["japanese"] += counts.pop("han")
    return counts.most_common(1)[0][0]
