"""How well a model answers questions it was not trained on, by `scores.matching.SCORERS`, and the same without its pictures.

`evaluation.json` and `samples.json`, which the model card is made from, are written here and nowhere else.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from vir_hf.errors import DataError, clipped
from vir_hf.files import writing
from vir_hf.images.folder import ImageFolder
from vir_hf.images.identity import picture_identity
from vir_hf.images.opening import open_image
from vir_hf.inference import Answerer, Prompt, Question
from vir_hf.scores.matching import NORMALISATION, is_empty, mean_scores
from vir_hf.scores.matching import exact_match as exact_match  # where scripts have found them since the first version
from vir_hf.scores.matching import rouge_l as rouge_l
from vir_hf.training.checkpoints import OF_EVALUATION, run_folder
from vir_hf.using.questions import look_at_picture, row_question, row_references

EVALUATION = "evaluation.json"
SAMPLES = "samples.json"
SAMPLE_FOLDER = "samples"


@dataclass(frozen=True)
class Case:
    """One held-out row.

    Attributes:
        id: the row's.
        open: returns the question with its pictures opened. Each call opens them again: whoever calls it lets go of them
            before the next, so that no number of rows takes more memory than one.
        references: the answers that count as right.
        picture: the identity of the first image of the conversation, if it has one.
    """

    id: str
    open: Callable[[], Question]
    references: Sequence[str]
    picture: Hashable | None = None


def read_cases(rows: Sequence[Mapping[str, Any]], folder: str) -> list[Case]:
    """Return the rows as cases; every picture has been looked at, by its header, and none is kept.

    Raises:
        DataError: a row without question or right answer, or a picture that cannot be opened.
    """
    images = ImageFolder(folder)
    cases = []
    for row in rows:
        try:
            looked_at = row_question(row, images, open_picture=look_at_picture).all_images()
            first = picture_identity(looked_at[0]) if looked_at else None
            open_again = functools.partial(row_question, row, images)
            cases.append(Case(str(row["id"]), open_again, row_references(row), first))
        except DataError as error:
            raise DataError(f"row with id {clipped(str(row['id']), 80)}: {error}") from error
    return cases


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

    Raises:
        DataError: a picture whose damage its header did not show, or a question too long for the model.
    """
    answers: list[str] = []
    for start in range(0, len(cases), batch_size):
        # Encoded one by one: of a picture only what the model reads of it outlives its row.
        prompts = [_encode(answerer, case, blank) for case in cases[start : start + batch_size]]
        answers += answerer.answer_prompts(prompts, **generation)
        progress(len(prompts))
    return answers


def _encode(answerer: Answerer, case: Case, blank: bool) -> Prompt:
    try:
        question = case.open()
        return answerer.encode(blanked(question) if blank else question)
    except DataError as error:
        raise DataError(f"row with id {case.id}: {error}") from error


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


def score(dataset: str, how: str, answers: Sequence[str], cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Return the mean of every metric: `{"dataset", "metric", "value", "num_rows", "num_empty_answers", "compared_as"}`.

    Args:
        how: says under what conditions the answers were given, as in `", blank pictures"`; may be empty.
    """
    means = mean_scores(answers, [case.references for case in cases])
    return [
        {
            "dataset": dataset,
            "metric": f"{name}{how}",
            "value": round(value, 4),
            "num_rows": len(cases),
            "num_empty_answers": sum(map(is_empty, answers)),
            "compared_as": NORMALISATION,
        }
        for name, value in means.items()
    ]


def choose_samples(cases: Sequence[Case], num_samples: int, seed: int = 0) -> list[int]:
    """Return the numbers of the cases to show: with pictures, no picture twice, drawn without a look at the answers."""
    order = list(range(len(cases)))
    random.Random(seed).shuffle(order)
    chosen: list[int] = []
    shown: set[Hashable] = set()
    for number in order:
        picture = cases[number].picture
        if len(chosen) < num_samples and picture is not None and picture not in shown:
            chosen.append(number)
            shown.add(picture)
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
        question = case.open()
        shown = open_image(question.all_images()[0])
        shown.thumbnail((768, 768))
        with writing(staging / name) as temporary:
            shown.save(temporary, "JPEG", quality=90)  # pixels only: neither a place nor a camera is written
        listed.append(
            {"image": f"{SAMPLE_FOLDER}/{name}", "question": question.text, "before": earlier, "after": later}
        )
    output.replace_folder(SAMPLE_FOLDER, staging)
    output.write_json(SAMPLES, listed)
