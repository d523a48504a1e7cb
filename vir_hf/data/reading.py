"""How the rows of a source are read: in which shape, which of them, with boxes in which form; and what a reader noticed."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from vir_hf.data.filters import Condition, parse_filter
from vir_hf.errors import DataError, RecipeError, clipped
from vir_hf.rows.boxes import BoxChange
from vir_hf.rows.shapes import SHAPES

logger = logging.getLogger(__name__)

# The keys of a recipe's section data, and of an entry of data.sources, that say how rows are read.
READING_KEYS = ("format", "columns", "filter", "boxes")


@dataclasses.dataclass(frozen=True)
class Reading:
    """How rows are read.

    Attributes:
        format: a shape of `SHAPES`; by default each row is recognised by its columns.
        columns: our name of a column -> the data's.
        conditions: what a row must fulfil to be read.
        boxes: what becomes of boxes in texts.
    """

    format: str | None = None
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()
    boxes: BoxChange | None = None

    @classmethod
    def of(
        cls,
        format: str | None = None,
        columns: Mapping[str, str] | None = None,
        filter: Mapping[str, Any] | None = None,
        boxes: Mapping[str, Any] | None = None,
    ) -> Reading:
        """Return the reading that a recipe's keys ask for.

        Raises:
            RecipeError: an unknown shape, a condition or a form of boxes that cannot be read.
        """
        if format is not None and format not in SHAPES:
            raise RecipeError(f"data.format: found {format!r}; expected one of {', '.join(SHAPES)}.")
        for name, column in (columns or {}).items():
            if not isinstance(column, str) or not column:
                raise RecipeError(
                    f"data.columns.{name}: found {column!r}; expected the name of a column, as in {{question: problem}}."
                )
        return cls(format, dict(columns or {}), parse_filter(filter), BoxChange.of(boxes) if boxes else None)

    @property
    def identity(self) -> list[Any]:
        """What a cache of rows depends on."""
        conditions = [(condition.column, condition.text) for condition in self.conditions]
        return [self.format, sorted(self.columns.items()), conditions, str(self.boxes)]


BY_COLUMNS = Reading()  # all rows, each in the shape that its columns are those of


@dataclasses.dataclass
class Seen:
    """What reading the rows of a source brought to light.

    Attributes:
        num_rows: all rows, also those filtered out and bad ones.
        unread: keys that nothing reads and that a model could have learned from -> number of rows.
        shapes: shape -> number of rows; firsts: shape -> the first row of it, as "FILE: row N".
        filtered: condition -> number of rows left out for it.
        absent: column that a condition names -> number of rows that have none.
        boxes: number of boxes written in another form.
    """

    num_rows: int = 0
    unread: Counter[str] = dataclasses.field(default_factory=Counter)
    shapes: Counter[str] = dataclasses.field(default_factory=Counter)
    firsts: dict[str, str] = dataclasses.field(default_factory=dict)
    filtered: Counter[str] = dataclasses.field(default_factory=Counter)
    absent: Counter[str] = dataclasses.field(default_factory=Counter)
    boxes: int = 0

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> Seen:
        """Return what `to_json` and JSON made of it."""
        counters = {name: Counter(value[name]) for name in ("unread", "shapes", "filtered", "absent")}
        return cls(value["num_rows"], firsts=dict(value["firsts"]), boxes=value["boxes"], **counters)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data; `dataclasses.asdict` would count the pairs of a counter."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def add(self, other: Seen) -> None:
        """Count in what was seen of further rows."""
        self.num_rows += other.num_rows
        self.boxes += other.boxes
        for name in ("unread", "shapes", "filtered", "absent"):
            getattr(self, name).update(getattr(other, name))
        self.firsts = {**other.firsts, **self.firsts}

    def add_shape(self, name: str, place: str) -> None:
        """Count a row of a shape."""
        self.shapes[name] += 1
        if name not in self.firsts:
            self.firsts[name] = place

    def shapes_line(self) -> str:
        """Return how the rows were read in one line, the commonest shape first."""
        parts = [f"{count:,} rows read as {SHAPES[name].title}" for name, count in self.shapes.most_common()]
        return ", ".join(parts)

    def odd_shapes(self) -> str:
        """Return a line about rows of another shape than most, or an empty one."""
        (usual, _), *others = self.shapes.most_common()
        places = [f"{self.firsts[name]} is the first read as {SHAPES[name].title}" for name, _ in others]
        if not places:
            return ""
        return (
            f"rows of several shapes: {'; '.join(places)}, most as {SHAPES[usual].title}. If that is not meant, set "
            f"data.format={usual}, and the others are bad rows"
        )

    def refuse_absent_columns(self, source: str) -> None:
        """Raise a `DataError` if a condition names a column that no row has: a slip, which would leave out everything."""
        for column, count in self.absent.items():
            if count == self.num_rows:
                raise DataError(
                    f"{source}: none of {count:,} rows has the column {column!r} that data.filter names. Correct "
                    f"data.filter.{column}, or remove it."
                )

    def report(self, source: str, tell: Callable[[str], None] = logger.info) -> None:
        """Say in a line each how the rows were read, which were left out, and what nothing reads.

        Args:
            tell: takes what is good to know; what may be wrong is logged as a warning.

        Raises:
            DataError: a condition names a column that no row has.
        """
        source = clipped(source, 120)
        self.refuse_absent_columns(source)
        if self.shapes:
            tell(f"{source}: {self.shapes_line()}")
            if odd := self.odd_shapes():
                logger.warning("%s: %s", source, clipped(odd, 360))
        if self.filtered:
            listed = ", ".join(f"{text} ({count:,})" for text, count in self.filtered.most_common(8))
            total = sum(self.filtered.values())
            tell(f"{source}: data.filter leaves out {total} of {self.num_rows} rows: {clipped(listed, 280)}")
        if self.boxes:
            tell(f"{source}: {self.boxes} boxes written in the form of data.boxes")
        if self.unread:
            listed = ", ".join(f"{name} ({count} rows)" for name, count in self.unread.most_common(8))
            logger.warning(
                "%s: nothing reads %s; put what the model shall see or learn into the turns, or remove the keys",
                source,
                clipped(listed, 280),
            )

    def report_new(self, seen: Seen, source: str) -> None:
        """Log what rows of a stream have that those before them had not, and keep it."""
        for name in seen.shapes:
            if name not in self.shapes:
                told = logger.info if not self.shapes else logger.warning
                told("%s: rows read as %s", source, SHAPES[name].title)
        new = Seen(unread=seen.unread - self.unread)
        new.report(source)
        self.unread |= seen.unread
        self.shapes |= seen.shapes
