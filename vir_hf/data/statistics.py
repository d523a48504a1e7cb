"""How long the rows of a data set are: what time and memory depend on, from the text alone."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from vir_hf.data.filters import failed_by_columns
from vir_hf.data.reading import READING_KEYS, Reading
from vir_hf.errors import DataError
from vir_hf.rows.files import find_data_files, read_rows
from vir_hf.rows.messages import examine, is_learned
from vir_hf.rows.shapes import in_llava_form, with_columns

if TYPE_CHECKING:
    from vir_hf.batches.sampling import RowSize
    from vir_hf.recipe.load import Recipe

# English in LLaVA-Instruct measures 4.2 to 5.0 bytes a token with Llama's and GPT-2's tokenizers, Chinese and code 2.3 to 4.
_BYTES_A_TOKEN = 4.0
# Role words and separators of one turn, and the system prompt of vicuna_v1.
_TOKENS_A_TURN, _SYSTEM_TOKENS = 6, 35


@dataclass(frozen=True)
class DatasetStatistics:
    """Lengths of rows in tokens, images expanded, none over `training.max_length`.

    Attributes:
        mean_supervised_tokens: tokens with a label; unknown if `None`.
        images_per_row, max_images: pictures a row, on average and at most.
        source: how it is known, for the table.
    """

    num_rows: int
    mean_tokens: float
    max_tokens: int
    std_tokens: float = 0.0
    mean_supervised_tokens: float | None = None
    images_per_row: float = 1.0
    max_images: int = 1
    source: str = "given"

    def longest(self, num_rows: int) -> int:
        """Tokens in the longest of many micro-batches of `num_rows` rows: three deviations above the mean, if that many."""
        spread = 3 * self.std_tokens * math.sqrt(num_rows)
        return round(min(max(self.mean_tokens * num_rows + spread, self.max_tokens), self.max_tokens * num_rows))

    @classmethod
    def of_lengths(
        cls,
        lengths: Iterable[tuple[int, int, int | None]],
        *,
        max_length: int | None = None,
        source: str = "given",
    ) -> DatasetStatistics:
        """Return the statistics of `(tokens, images, supervised tokens or None)`, one entry a row.

        Raises:
            DataError: there is no row.
        """
        count = images = max_images = longest = 0
        total = squares = supervised = 0.0
        is_supervised_known = True
        for tokens, num_images, num_supervised in lengths:
            tokens = tokens if max_length is None else min(tokens, max_length)
            count, total, squares = count + 1, total + tokens, squares + float(tokens) ** 2
            longest, max_images = max(longest, tokens), max(max_images, num_images)
            images += num_images
            is_supervised_known &= num_supervised is not None
            supervised += num_supervised or 0
        if not count:
            raise DataError(f"{source}: holds no rows to plan for. Set data.data_path to a file with rows.")
        mean = total / count
        return cls(
            num_rows=count,
            mean_tokens=mean,
            max_tokens=longest,
            std_tokens=math.sqrt(max(squares / count - mean**2, 0.0)),
            mean_supervised_tokens=supervised / count if is_supervised_known else None,
            images_per_row=images / count,
            max_images=max_images,
            source=source,
        )

    @classmethod
    def of_sizes(cls, sizes: Iterable[RowSize], *, source: str = "the encoded rows") -> DatasetStatistics:
        """Return the statistics of rows that training has measured already."""
        return cls.of_lengths(((size.num_tokens, size.num_images, None) for size in sizes), source=source)


def estimate_statistics(recipe: Recipe, tokens_per_image: int) -> tuple[DatasetStatistics | None, str]:
    """Return the statistics of the recipe's local rows, or `None`, and a line that says how or why not.

    Tokens are counted with the recipe's tokenizer if it is on this machine, else taken from the text's length.
    """
    data = recipe.data
    paths = [data.data_path] if data.data_path else [source.path for source in data.sources or []]
    if not paths:
        return None, "no data.data_path: steps, tokens and time of an epoch are not known"
    if any(source.weight is not None or source.num_rows is not None for source in data.sources or []):
        return None, "data.sources with weights or row counts: steps, tokens and time of an epoch are not counted"
    if not all(path and os.path.exists(path) for path in paths):
        return None, f"{', '.join(map(str, paths))}: not a local file, so its rows are not counted"
    reading = Reading.of(**{key: getattr(data, key) for key in READING_KEYS})
    count_tokens, how = _token_counter(recipe)
    overhead = 0 if recipe.model.template == "plain" else _SYSTEM_TOKENS

    def lengths() -> Iterable[tuple[int, int, int]]:
        num_rows = 0
        for path in paths:
            for file in find_data_files(path):
                for _, raw in read_rows(file):
                    row = _as_read(raw, reading)
                    measured = None if row is None else _row_length(row, count_tokens)
                    if measured is None:
                        continue
                    text, answer, turns, images = measured
                    yield text + overhead + turns * _TOKENS_A_TURN + images * tokens_per_image, images, answer
                    num_rows += 1
                    if data.max_rows and num_rows >= data.max_rows:
                        return

    source = f"{', '.join(map(str, paths))}, {how}"
    return DatasetStatistics.of_lengths(lengths(), max_length=recipe.training.max_length, source=source), source


def _as_read(raw: Any, reading: Reading) -> Any:
    """Return a row as the recipe reads it; None for one that it leaves out by a column or cannot read."""
    row = with_columns(raw, reading.columns)
    if failed_by_columns(reading.conditions, row, Counter()) is not None:
        return None
    try:
        return in_llava_form(row, reading.format)[1]
    except DataError:
        return None


def _row_length(row: Any, count_tokens: Callable[[str], int]) -> tuple[int, int, int, int] | None:
    """Return `(tokens of text, of answers that are learned, turns, images)` of a row; `None` for one that is left out."""
    normal = examine(row)[1]
    if normal is None:
        return None
    total = answers = 0
    for message in normal["messages"]:
        tokens = count_tokens("".join(part["text"] for part in message["content"] if part["type"] == "text"))
        total += tokens
        if is_learned(message):
            answers += tokens + 1
    return total, answers, len(normal["messages"]), len(normal["images"])


def _token_counter(recipe: Recipe) -> tuple[Callable[[str], int], str]:
    """Return a function that counts a text's tokens, and what it counts with."""
    name, revision = recipe.model.tokenizer_source()
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, TypeError):
        return lambda text: round(len(text.encode()) / _BYTES_A_TOKEN), f"lengths from {_BYTES_A_TOKEN:g} bytes a token"
    finally:
        transformers_logging.set_verbosity(level)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]), f"counted with {name}'s tokenizer"
