"""Answers on a page: wrong and right ones by kind, with their images; and two runs' side by side."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vir_hf.curation.pages import render
from vir_hf.errors import DataError, clipped
from vir_hf.images.folder import ImageFolder
from vir_hf.images.opening import open_image
from vir_hf.scores.choices import LETTERS
from vir_hf.scores.judging import Item
from vir_hf.scores.matching import is_empty
from vir_hf.using.results import Scored, document_of

_DEGREES = (("Wrong", "bad", -1.0, 0.0), ("Partly right", "odd", 0.0, 0.999), ("Right", "good", 0.999, 2.0))
_PER_KIND = 12
_MOST_CATEGORIES = 16
_SIDE = 320  # pixels
_LONGEST = 400  # characters


@dataclass(frozen=True)
class Kind:
    """A section of the gallery: its title, how it is coloured, and the rows in it."""

    title: str
    tone: str
    rows: Sequence[int]


def kinds_of(scored: Scored) -> list[Kind]:
    """Return the rows by kind: empty, cut, read as nothing, wrong, partly right, right; by category where there are some."""
    judged, answers = scored.judged, scored.aligned.answers
    rows = range(len(answers))
    cut = scored.aligned.cut or [False] * len(answers)
    empty = [row for row in rows if is_empty(answers[row])]
    reads = any(judged.read_as)
    unread = [row for row in rows if reads and not is_empty(answers[row]) and judged.read_as[row] in ("", "other")]
    found = [Kind("Empty", "bad", empty), Kind("Cut by the greatest length", "odd", [row for row in rows if cut[row]])]
    found.append(Kind("Read as none of the possible answers", "bad", unread))
    taken = {*empty, *unread}
    for title, tone, low, high in (
        ("Wrong", "bad", -1.0, 0.0),
        ("Partly right", "odd", 0.0, 0.999),
        ("Right", "good", 0.999, 2.0),
    ):
        these = [row for row in rows if low < judged.scores[row] <= high and row not in taken]
        found += _by_category(title, tone, these, scored.aligned.items)
    return [kind for kind in found if kind.rows]


def _by_category(title: str, tone: str, rows: Sequence[int], items: Sequence[Item]) -> list[Kind]:
    categories = sorted({items[row].category for row in rows} - {""})
    if not 1 < len(categories) <= _MOST_CATEGORIES:
        return [Kind(title, tone, rows)]
    return [
        Kind(f"{title}: {category or 'no category'}", tone, [row for row in rows if items[row].category == category])
        for category in [*categories, ""]
    ]


def gallery_page(scored: Scored, image_folder: str | None = None) -> str:
    """Return the page of one evaluation: its scores, and of each kind of answer some drawn at random with a fixed seed."""
    document = document_of(scored)
    folder = ImageFolder(image_folder) if image_folder else None
    sections = []
    for kind in kinds_of(scored):
        chosen = sorted(random.Random(0).sample(list(kind.rows), min(_PER_KIND, len(kind.rows))))
        cards = [_card(scored.aligned.items[row], [_said(scored, row)], folder, _facts(scored, row)) for row in chosen]
        note = f"{len(chosen)} of {len(kind.rows):,}, drawn at random." if len(chosen) < len(kind.rows) else ""
        sections.append(
            {"title": kind.title, "tone": kind.tone, "count": f"{len(kind.rows):,}", "note": note, "cards": cards}
        )
    return render(
        "answers.html",
        title=f"Answers: {scored.dataset}",
        lead=f"{scored.facts.get('model') or scored.facts.get('answers') or ''}, {scored.task.name} as {scored.variant} "
        f"scores it, {len(scored.aligned.items):,} questions.",
        foot=" ".join(f"{note[0].upper()}{note[1:]}." for note in document["notes"]),
        tables=[score_table(document)],
        charts=[],
        sections=sections,
    )


def score_table(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores as a table of the page."""
    results = document["results"]
    hows = list(dict.fromkeys(how for result in results for how in result.get("blind", {})))
    rows = [
        [
            result["metric"],
            f"{result['value']:.4g}",
            f"{result['low']:.4g} to {result['high']:.4g}",
            *(f"{result['blind'][how]:.4g}" if how in result.get("blind", {}) else "-" for how in hows),
        ]
        for result in results
    ]
    return {"title": "Scores", "note": "", "head": ["score", "value", "95 % interval", *hows], "rows": rows}


def side_by_side(
    first: Scored, second: Scored, names: tuple[str, str], image_folder: str | None
) -> list[dict[str, Any]]:
    """Return the sections of a comparison: what only the second gets right, only the first, and neither."""
    folder = ImageFolder(image_folder) if image_folder else None
    one, other = first.judged.scores, second.judged.scores
    rows = range(len(one))
    kinds = (
        Kind(f"{names[1]} is better", "good", [row for row in rows if other[row] > one[row]]),
        Kind(f"{names[0]} is better", "bad", [row for row in rows if one[row] > other[row]]),
        Kind("The same score, other words", "odd", [row for row in rows if _differ_in_words(first, second, row)]),
    )
    sections = []
    for kind in kinds:
        chosen = sorted(random.Random(0).sample(list(kind.rows), min(2 * _PER_KIND, len(kind.rows))))
        cards = [
            _card(
                first.aligned.items[row],
                [_said(first, row, names[0]), _said(second, row, names[1])],
                folder,
                first.aligned.items[row].id,
            )
            for row in chosen
        ]
        sections.append(
            {"title": kind.title, "tone": kind.tone, "count": f"{len(kind.rows):,}", "note": "", "cards": cards}
        )
    return sections


def _differ_in_words(first: Scored, second: Scored, row: int) -> bool:
    is_same = first.judged.scores[row] == second.judged.scores[row]
    return is_same and first.aligned.answers[row] != second.aligned.answers[row]


def _said(scored: Scored, row: int, name: str = "") -> dict[str, str]:
    score, text = scored.judged.scores[row], scored.aligned.answers[row]
    tone = "good" if score > 0.999 else "odd" if score > 0 else "bad"
    return {"name": name, "tone": tone, "text": clipped(text, _LONGEST) if text.strip() else "(nothing)"}


def _facts(scored: Scored, row: int) -> str:
    item, read = scored.aligned.items[row], scored.judged.read_as[row]
    parts = [f"id {item.id}", f"score {scored.judged.scores[row]:.3g}"]
    return ", ".join([*parts, *([f"read as {read}"] if read else [])])


def _card(item: Item, answers: list[dict[str, str]], folder: ImageFolder | None, facts: str) -> dict[str, Any]:
    options = [f"{letter}. {text}" for letter, text in zip(LETTERS, item.options, strict=False)]
    return {
        "image": thumbnail(item.image, folder),
        "question": clipped("\n".join([item.question or "(no question)", *options]), _LONGEST),
        "answers": answers,
        "right": clipped(" | ".join(dict.fromkeys(item.references)), _LONGEST),
        "facts": clipped(facts, _LONGEST),
    }


def thumbnail(image: Any, folder: ImageFolder | None) -> str:
    """Return a small JPEG as base64; nothing where there is no image, or none that can be opened."""
    if image is None or (isinstance(image, str) and folder is None):
        return ""
    try:
        opened = open_image(image, folder) if folder is not None else open_image(image)
    except (DataError, OSError):
        return ""
    opened.thumbnail((_SIDE, _SIDE))
    content = io.BytesIO()
    opened.save(content, "JPEG", quality=80)
    return base64.b64encode(content.getvalue()).decode()
