"""How well a model answers questions it was not trained on: exact match, ROUGE-L, and the same without its pictures.

`evaluation.json` and `samples.json`, which the model card is made from, are written here and nowhere else.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from vir_hf.checkpoints import OF_EVALUATION, run_folder
from vir_hf.errors import DataError, clipped
from vir_hf.files import writing
from vir_hf.identity import picture_identity
from vir_hf.images import open_image
from vir_hf.inference import Answerer, Question
from vir_hf.questions import question_messages, row_question, row_references

EVALUATION = "evaluation.json"
SAMPLES = "samples.json"
SAMPLE_FOLDER = "samples"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NOT_WORDS = re.compile(r"[^\w\s-]")


@dataclass(frozen=True)
class Case:
    """One held-out row: its id, the question with its opened pictures, and the answers that count as right."""

    id: str
    question: Question
    references: Sequence[str]
    picture: str | None = None  # which image its first is


def read_cases(rows: Sequence[Mapping[str, Any]], folder: str) -> list[Case]:
    """Return the rows as cases.

    Raises:
        DataError: a row without question or right answer, or a picture that cannot be opened.
    """
    cases = []
    for row in rows:
        try:
            cases.append(Case(str(row["id"]), row_question(row, folder), row_references(row), _first_picture(row)))
        except DataError as error:
            raise DataError(f"row with id {clipped(str(row['id']), 80)}: {error}") from error
    return cases


def _first_picture(row: Mapping[str, Any]) -> str | None:
    images = question_messages(row)["images"]
    return str(picture_identity(images[0])) if images else None


def answer_cases(
    answerer: Answerer,
    cases: Sequence[Case],
    *,
    batch_size: int = 8,
    blank: bool = False,
    progress: Callable[[int], None] = lambda num: None,
    **generation: Any,
) -> list[str]:
    """Return the answer to every case, batch by batch.

    Args:
        blank: show a grey picture of the same size in place of every picture: what can be guessed without looking.
        progress: called with the number of cases of each finished batch.
        generation: as `Answerer.answer`.
    """
    answers: list[str] = []
    for start in range(0, len(cases), batch_size):
        questions = [case.question for case in cases[start : start + batch_size]]
        answers += answerer.answer_batch([blanked(asked) if blank else asked for asked in questions], **generation)
        progress(len(questions))
    return answers


def blanked(question: Question) -> Question:
    """Return the question with every picture, those of earlier turns too, replaced by a grey one of its size."""

    def without_picture(part: Any) -> Any:
        return {**part, "image": _grey(part["image"])} if isinstance(part, Mapping) and "image" in part else part

    history = [
        {**turn, "content": [without_picture(part) for part in turn["content"]]}
        if not isinstance(turn["content"], str)
        else turn
        for turn in question.history
    ]
    return replace(question, images=[_grey(image) for image in question.images], history=history)


def _grey(image: Any) -> Image.Image:
    size = image.size if isinstance(image, Image.Image) else (224, 224)
    return Image.new("RGB", size, (127, 127, 127))


def normalised(text: str) -> str:
    """Return a text as answers are compared: small letters, no articles, no punctuation, single spaces."""
    return " ".join(_ARTICLES.sub(" ", _NOT_WORDS.sub(" ", text.lower())).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Return 1 if the answer is one of the right ones, both `normalised`, else 0."""
    return float(normalised(answer) in {normalised(reference) for reference in references})


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Return ROUGE-L (F1 over words, Lin 2004), the best over all references."""
    return max(_rouge_l(normalised(answer).split(), normalised(reference).split()) for reference in references)


def _rouge_l(answer: Sequence[str], reference: Sequence[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    row = [0] * (len(reference) + 1)
    for word in answer:
        diagonal = 0
        for number, other in enumerate(reference, 1):
            diagonal, row[number] = row[number], diagonal + 1 if word == other else max(row[number], row[number - 1])
    common = row[-1]
    return 2 * common / (len(answer) + len(reference))


def score(dataset: str, how: str, answers: Sequence[str], cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Return the mean of every metric as `{"dataset", "metric", "value", "num_rows"}`.

    Args:
        how: says under what conditions the answers were given, as in `", blank pictures"`; may be empty.
    """
    metrics = {"exact match": exact_match, "ROUGE-L": rouge_l}
    return [
        {
            "dataset": dataset,
            "metric": f"{name}{how}",
            "value": round(
                sum(metric(answer, case.references) for answer, case in zip(answers, cases, strict=True)) / len(cases),
                4,
            ),
            "num_rows": len(cases),
        }
        for name, metric in metrics.items()
    ]


def choose_samples(cases: Sequence[Case], num_samples: int, seed: int = 0) -> list[int]:
    """Return the numbers of the cases to show: with pictures, no picture twice, drawn without a look at the answers."""
    order = list(range(len(cases)))
    random.Random(seed).shuffle(order)
    chosen: list[int] = []
    shown: set[str] = set()
    for number in order:
        case = cases[number]
        if len(chosen) < num_samples and case.question.images and (case.picture or case.id) not in shown:
            chosen.append(number)
            shown.add(case.picture or case.id)
    return chosen


def check_results(run: Path) -> None:
    """Raise before anything is asked if the results would take the place of files that are not ours.

    Raises:
        RecipeError: which file.
    """
    run_folder(run).refuse_foreign(
        OF_EVALUATION, str(run), "Move it away: the results of vir-hf evaluate get these names."
    )


def write_results(run: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Put the results into the run's `evaluation.json`; earlier ones about other data stay."""
    path = run / EVALUATION
    names = {result["dataset"] for result in results}
    earlier = json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else []
    run_folder(run).write_json(EVALUATION, {"results": [*(r for r in earlier if r["dataset"] not in names), *results]})


def write_samples(run: Path, cases: Sequence[Case], before: Sequence[str], after: Sequence[str]) -> None:
    """Write `samples.json` and its pictures, in place of earlier ones.

    Args:
        cases: each with a picture at least; the first is shown.
        before, after: the answer to each before and after tuning.
    """
    output = run_folder(run)
    staging = output.stage(SAMPLE_FOLDER)
    listed = []
    for number, (case, earlier, later) in enumerate(zip(cases, before, after, strict=True), 1):
        name = f"{number}.jpg"
        shown = open_image(case.question.images[0])
        shown.thumbnail((768, 768))
        with writing(staging / name) as temporary:
            shown.save(temporary, "JPEG", quality=90)  # pixels only: neither a place nor a camera is written
        listed.append(
            {"image": f"{SAMPLE_FOLDER}/{name}", "question": case.question.text, "before": earlier, "after": later}
        )
    output.replace_folder(SAMPLE_FOLDER, staging)
    output.write_json(SAMPLES, listed)
