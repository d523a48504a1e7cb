"""Two runs side by side: what their recipes differ in, how they learned, and whether their scores differ by more than chance."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vir_hf.curation.pages import Chart, Label, Line, render
from vir_hf.errors import DataError, RecipeError, clipped, shown
from vir_hf.recipe.files import read_yaml
from vir_hf.scores.intervals import Difference, differences
from vir_hf.scores.tasks import LOSS_TASK, find_task
from vir_hf.training.checkpoints import list_checkpoints, read_metrics
from vir_hf.using.gallery import side_by_side
from vir_hf.using.results import QUESTIONS, RESULTS, Scored, read_scored

EVALUATIONS = "evaluations"
_COLOURS = ("#3b76d6", "#d6703b")
_CURVES = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_gib")
_SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Compared:
    """One benchmark that both runs were asked, and every score's difference."""

    name: str
    first: Scored
    second: Scored
    differences: list[Difference]
    notes: list[str] = field(default_factory=list)


def evaluations_of(place: str | os.PathLike[str]) -> dict[str, Path]:
    """Return the folders of evaluations by name: those of a run, or the folder itself if it is one.

    Raises:
        RecipeError: there is none.
    """
    path = Path(place)
    if (path / RESULTS).is_file() and (path / QUESTIONS).is_file():
        return {path.name: path}
    found = {one.parent.name: one.parent for one in sorted(path.glob(f"{EVALUATIONS}/*/{RESULTS}"))}
    found = {name: folder for name, folder in found.items() if (folder / QUESTIONS).is_file()}
    if not found:
        raise RecipeError(
            f"{place}: holds no evaluation; expected a run that was evaluated with `vir-hf evaluate RUN --task NAME`, or a "
            "folder written with --output."
        )
    return found


def compare(first: str, second: str) -> list[Compared]:
    """Return every benchmark that both were asked, scored by the first one's scorer.

    Raises:
        RecipeError: no evaluation in common.
        DataError: the questions of one differ.
    """
    ours, theirs = evaluations_of(first), evaluations_of(second)
    if len(ours) == len(theirs) == 1:
        pairs = [(next(iter(ours)), next(iter(ours.values())), next(iter(theirs.values())))]
    else:
        pairs = [(name, ours[name], theirs[name]) for name in ours if name in theirs]
    if not pairs:
        raise RecipeError(
            clipped(f"{first} and {second} were not asked the same: {', '.join(ours)} and {', '.join(theirs)}.")
        )
    return [_compared(name, one, other) for name, one, other in pairs]


def _compared(name: str, one: Path, other: Path) -> Compared:
    about, against = (json.loads((folder / RESULTS).read_text(encoding="utf-8")) for folder in (one, other))
    if name == one.name != other.name:  # two folders of one evaluation each, called as the user liked
        name = f"{about['task']}, {about['results'][0]['dataset']}"
    if about["task"] != against["task"]:
        raise DataError(
            f"{one} and {other}: are of the tasks {about['task']} and {against['task']}, which do not compare."
        )
    task = LOSS_TASK if about["task"] == LOSS_TASK.name else find_task(about["task"])
    first, second = (read_scored(folder / QUESTIONS, task, about["variant"], name) for folder in (one, other))
    _check_same(first, second, (one, other))
    second = second.in_order_of(first)
    notes = []
    if against["variant"] != about["variant"]:
        notes.append(f"the second was scored as {against['variant']}; both are scored as {about['variant']} here")
    for key in ("prompt", "generation"):
        if about.get(key) != against.get(key) and key in about and key in against:
            notes.append(f"{key} differs: {shown(about[key])} and {shown(against[key])}")
    return Compared(name, first, second, differences(first.judged, second.judged), notes)


def _check_same(first: Scored, second: Scored, folders: tuple[Path, Path]) -> None:
    ours = {item.id: item.references for item in first.aligned.items}
    theirs = {item.id: item.references for item in second.aligned.items}
    only_first, only_second = set(ours) - set(theirs), set(theirs) - set(ours)
    other_answers = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    if only_first or only_second or other_answers:
        raise DataError(
            clipped(
                f"{folders[0]} and {folders[1]}: were not asked the same questions: {len(only_first):,} only the first, "
                f"{len(only_second):,} only the second, {len(other_answers):,} with other right answers. Evaluate both on the "
                "same file."
            )
        )


def recipe_differences(first: str, second: str) -> list[tuple[str, str, str]]:
    """Return every key of the two runs' recipes that differs, and its two values; nothing where one has no recipe."""
    recipes = [Path(place) / "recipe.yaml" for place in (first, second)]
    if not all(recipe.is_file() for recipe in recipes):
        return []
    ours, theirs = (dict(_flat(read_yaml(recipe))) for recipe in recipes)
    keys = [*ours, *(key for key in theirs if key not in ours)]
    return [(key, shown(ours.get(key)), shown(theirs.get(key))) for key in keys if ours.get(key) != theirs.get(key)]


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def history_of(run: str) -> list[dict[str, Any]]:
    """Return what a run logged, step by step: all of its newest checkpoint, or the losses of its metrics, whichever is more."""
    path, found = Path(run), []
    metrics = read_metrics(path)
    for entry in metrics.get("loss_history") or []:
        found.append(dict(entry))
    for entry in metrics.get("evaluation_history") or []:
        found.append({"step": entry["step"], "eval_loss": entry["loss"]})
    for checkpoint in list_checkpoints(path)[:1]:
        state = checkpoint.path / "trainer_state.json"
        if state.is_file():
            logged = json.loads(state.read_text(encoding="utf-8")).get("log_history", [])
            found = list(logged) if len(logged) >= len(found) else found
    return found


def curves(first: str, second: str, names: tuple[str, str]) -> list[dict[str, Any]]:
    """Return a chart of each curve that both or one of the runs logged."""
    histories = [history_of(first), history_of(second)]
    charts = []
    for key in _CURVES:
        lines = [
            [(float(entry["step"]), float(entry[key])) for entry in history if _has(entry, key)]
            for history in histories
        ]
        if any(len(line) > 1 for line in lines):
            charts.append(curve_chart(key, dict(zip(names, lines, strict=True))))
    return charts


def _has(entry: Mapping[str, Any], key: str) -> bool:
    value = entry.get(key)
    return isinstance(value, (int, float)) and math.isfinite(value) and isinstance(entry.get("step"), (int, float))


def curve_chart(title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Any]:
    """Return a chart of lines over steps, for `answers.html`."""
    points = [point for line in lines.values() for point in line]
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    left, right, top, bottom = 52.0, 392.0, 8.0, 128.0

    def place(x: float, y: float) -> str:
        across = left + (right - left) * (x - low_x) / ((high_x - low_x) or 1)
        return f"{across:.1f},{bottom - (bottom - top) * (y - low) / ((high - low) or 1):.1f}"

    chart = Chart(title, 400, 150)
    chart.lines.append(Line("axis", left, right, bottom, bottom))
    chart.labels.extend(
        [
            Label(left - 5, bottom, f"{low:.3g}", "end"),
            Label(left - 5, top + 8, f"{high:.3g}", "end"),
            Label(left, bottom + 16, f"step {low_x:g}"),
            Label(right, bottom + 16, f"{high_x:g}", "end"),
        ]
    )
    paths = [
        {"name": name, "colour": colour, "points": " ".join(place(x, y) for x, y in line)}
        for (name, line), colour in zip(lines.items(), _COLOURS, strict=False)
    ]
    return {"title": title, "width": 400, "height": 150, "lines": chart.lines, "labels": chart.labels, "paths": paths}


def difference_rows(compared: Compared) -> list[list[str]]:
    """Return one row for each score: both, the difference with its interval, the p-value, and what it means."""
    rows = []
    for one in compared.differences:
        said = "differ" if one.p_value < _SIGNIFICANT else "no difference shown"
        interval = f"{one.difference:+.4g} ({one.low:+.4g} to {one.high:+.4g})"
        rows.append([one.name, f"{one.first:.4g}", f"{one.second:.4g}", interval, f"{one.p_value:.4f}", said])
    return rows


HEAD = ("score", "first", "second", "second - first (95 % interval)", "p", "")


def comparison_page(
    first: str, second: str, found: Sequence[Compared], names: tuple[str, str], image_folder: str | None
) -> str:
    """Return the page: scores with significance, recipe differences, curves, answers side by side."""
    head = [HEAD[0], *names, f"{names[1]} - {names[0]} (95 % interval)", "p", ""]
    tables = [
        {"title": one.name, "note": "; ".join(one.notes), "head": head, "rows": difference_rows(one)} for one in found
    ]
    changed = recipe_differences(first, second)
    if changed:
        tables.append({"title": "Recipes", "note": "", "head": ["key", *names], "rows": [list(row) for row in changed]})
    sections = []
    for one in found:
        for section in side_by_side(one.first, one.second, names, image_folder):
            if section["cards"]:
                sections.append({**section, "title": f"{one.name}: {section['title']}"})
    return render(
        "answers.html",
        title=f"{names[0]} and {names[1]}",
        lead=f"{first} compared with {second}",
        foot="Intervals: bootstrap over questions, 2,000 draws. p: how often a difference as large comes about when each "
        "question's two answers are swapped by chance, 10,000 times.",
        tables=tables,
        charts=curves(first, second, names),
        sections=sections,
    )
