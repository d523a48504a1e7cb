"""What an evaluation leaves: scores with their intervals, one line for each question, and a gallery of answers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vir_hf.errors import DataError
from vir_hf.files import OutputFolder
from vir_hf.rows.files import read_rows
from vir_hf.scores.intervals import intervals
from vir_hf.scores.judging import Item, Judged
from vir_hf.scores.losses import judged_losses
from vir_hf.scores.matching import is_empty
from vir_hf.scores.tasks import LOSS_TASK, Task, judge
from vir_hf.using.stored_answers import Aligned, notes_of

RESULTS = "results.json"
QUESTIONS = "questions.jsonl"
GALLERY = "gallery.html"


@dataclass
class Scored:
    """Answers of one model to one benchmark, and what they are worth.

    Attributes:
        dataset: what the card calls the data.
        blind: the same questions answered without their images, by condition.
        facts: what else the results file says: the model, the files, the prompt, the generation.
    """

    task: Task
    variant: str
    aligned: Aligned
    judged: Judged
    dataset: str
    blind: dict[str, Judged] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, task: Task, variant: str | None, aligned: Aligned, dataset: str, **facts: Any) -> Scored:
        """Return the answers judged by one of the task's scorers, by default the official one."""
        judged = judge(task, aligned.items, aligned.answers, variant)
        return cls(task, variant or task.default, aligned, judged, dataset, facts=facts)

    def in_order_of(self, other: Scored) -> Scored:
        """Return the same with its questions in another one's order; both have the same."""
        places = {item.id: number for number, item in enumerate(self.aligned.items)}
        order = [places[item.id] for item in other.aligned.items]
        items = [self.aligned.items[number] for number in order]
        answers = [self.aligned.answers[number] for number in order]
        aligned = Aligned(items, answers, self.aligned.counts, self.aligned.notes)
        if self.task is LOSS_TASK:
            return Scored(self.task, self.variant, aligned, judged_losses(self.judged.statistics[order]), self.dataset)
        return Scored.of(self.task, self.variant, aligned, self.dataset)


def results_of(scored: Scored) -> list[dict[str, Any]]:
    """Return every score with its 95 % interval, and the blind ones beside it."""
    found = intervals(scored.judged)
    blind = {how: judged.values() for how, judged in scored.blind.items()}
    empty = sum(map(is_empty, scored.aligned.answers))
    results = []
    for name, value in scored.judged.values().items():
        low, high = found[name]
        one: dict[str, Any] = {
            "dataset": scored.dataset,
            "metric": name,
            "value": round(value, 6),
            "low": round(low, 6),
            "high": round(high, 6),
            "num_rows": len(scored.aligned.items),
            "num_empty_answers": empty,
            "compared_as": f"{scored.task.name}, {scored.variant}",
        }
        if blind:
            one["blind"] = {how: round(values[name], 6) for how, values in blind.items() if name in values}
        results.append(one)
    return results


def document_of(scored: Scored) -> dict[str, Any]:
    """Return what `--json` and `results.json` hold."""
    counts = scored.aligned.counts
    return {
        "task": scored.task.name,
        "variant": scored.variant,
        **scored.facts,
        "results": results_of(scored),
        "counts": counts,
        "notes": [*notes_of(counts), *scored.aligned.notes, *scored.judged.notes],
    }


def question_lines(scored: Scored) -> list[dict[str, Any]]:
    """Return one row for each question: all that its score was made from, so that it can be made again."""
    blind = {how: judged.scores for how, judged in scored.blind.items()}
    rows = []
    for number, item in enumerate(scored.aligned.items):
        row: dict[str, Any] = {
            "id": item.id,
            "question": item.question,
            "image": item.image if isinstance(item.image, str) else None,
            "references": list(item.references),
            "answer": scored.aligned.answers[number],
            "score": scored.judged.scores[number],
            "read_as": scored.judged.read_as[number],
        }
        for name, value in (("options", list(item.options)), ("category", item.category), ("group", item.group)):
            if value:
                row[name] = value
        details = {name: value for name, value in item.details.items() if not name.startswith("_")}
        if details:
            row["details"] = details
        if scored.aligned.cut and scored.aligned.cut[number]:
            row["is_cut"] = True
        if scored.task is LOSS_TASK:
            row["statistics"] = scored.judged.statistics[number].tolist()
        for how, scores in blind.items():
            row.setdefault("blind", {})[how] = scores[number]
        rows.append(row)
    return rows


def write_all(output: OutputFolder, scored: Scored, image_folder: str | None, prefix: str = "") -> None:
    """Write scores, questions and gallery into a folder.

    Args:
        prefix: the way from the folder to where they go, with its final slash.
    """
    from vir_hf.using.gallery import gallery_page

    output.write_json(prefix + RESULTS, document_of(scored), indent=1)
    lines = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in question_lines(scored))
    output.write_text(prefix + QUESTIONS, lines)
    output.write_text(prefix + GALLERY, gallery_page(scored, image_folder))


def read_scored(place: str | os.PathLike[str], task: Task, variant: str, dataset: str) -> Scored:
    """Return an evaluation as its file of questions holds it, judged again.

    Raises:
        DataError: the file is missing or not one of ours.
    """
    path = Path(place)
    items, answers, cut, statistics = [], [], [], []
    for number, (_, row) in enumerate(read_rows(os.fspath(path))):
        if not isinstance(row, Mapping) or not {"id", "references", "answer"} <= set(row):
            raise DataError(f"{path} row {number}: is no line of an evaluation; expected id, references and answer.")
        items.append(_item(row))
        answers.append(str(row["answer"]))
        cut.append(bool(row.get("is_cut")))
        statistics.append(row.get("statistics"))
    aligned = Aligned(items, answers, {"questions": len(items), "answers": len(items)}, cut=cut)
    if task is LOSS_TASK:
        return Scored(task, variant, aligned, judged_losses(np.array(statistics, dtype=float)), dataset)
    return Scored.of(task, variant, aligned, dataset)


def _item(row: Mapping[str, Any]) -> Item:
    return Item(
        id=str(row["id"]),
        question=str(row.get("question") or ""),
        references=tuple(map(str, row["references"])),
        image=row.get("image"),
        options=tuple(row.get("options") or ()),
        category=str(row.get("category") or ""),
        group=str(row.get("group") or ""),
        details=row.get("details") or {},
    )


def table(documents: Sequence[Mapping[str, Any]]) -> str:
    """Return the scores as lines of text, with interval and blind scores."""
    lines = []
    for document in documents:
        results = document["results"]
        width = max(len(result["metric"]) for result in results)
        hows = list(dict.fromkeys(how for result in results for how in result.get("blind", {})))
        head = f"{'':{width}}  {'score':>9}  {'95 % interval':>19}" + "".join(f"  {how:>15}" for how in hows)
        lines.append(head)
        for result in results:
            interval = f"{_number(result['low'])} to {_number(result['high'])}"
            blind = "".join(f"  {_number(result.get('blind', {}).get(how)):>15}" for how in hows)
            lines.append(f"{result['metric']:{width}}  {_number(result['value']):>9}  {interval:>19}{blind}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
