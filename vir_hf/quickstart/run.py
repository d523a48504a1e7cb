"""From nothing to a model that answers questions about pictures: what `vir-hf train experiment=quickstart` does.

outputs/quickstart/data/                 pictures, pretrain.json, finetune.json, heldout.json
outputs/quickstart/parts/                vision_tower and language_model, as Hugging Face folders
outputs/quickstart/pretrain/             stage 1: the projector
outputs/quickstart/                      stage 2: the model, recipe.yaml, metrics.json and samples.png
"""

from __future__ import annotations

import copy
import json
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vir_hf.console import conclude, duration, say
from vir_hf.errors import RecipeError
from vir_hf.files import OutputFolder
from vir_hf.images.opening import open_image
from vir_hf.inference import Answerer, Question
from vir_hf.quickstart.drawing import KINDS, draw_blank, write_pictures
from vir_hf.quickstart.panel import Sample, draw_panel
from vir_hf.quickstart.parts import make_language_model, make_vision_tower
from vir_hf.recipe.load import Recipe
from vir_hf.recipe.rules import SELF_CONTAINED
from vir_hf.training.checkpoints import METRICS, OUTPUTS, read_metrics, run_folder
from vir_hf.training.run import train
from vir_hf.using.evaluation import Case, write_results, write_samples

ANSWER_BATCH = 96
MAX_ANSWER_TOKENS = 8
NUM_SAMPLES = 6


@dataclass(frozen=True)
class Size:
    """How much is drawn and how long the parts learn before the two stages; tests make it small."""

    num_pictures: int = 6400
    num_questions: int = 144  # held-out ones of each kind
    tower_steps: int = 350
    pretrain_rows: int = 1920


@dataclass
class Timer:
    """Seconds of each part of the run."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, name: str, title: str) -> Iterator[None]:
        """Print a heading, and keep how long what follows took."""
        say(f"\n== {title}")
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)


def run_quickstart(recipe: Recipe, size: Size | None = None) -> dict[str, Any]:
    """Draw, make the parts, train both stages, answer the held-out questions; return what `metrics.json` holds.

    The recipe describes stage 2. Beside what every run reports, the metrics hold `heldout_accuracy` (exact answers about
    scenes never trained on), `blind_accuracy` (the same questions, a blank picture), `chance_accuracy` (the commonest
    training answer to each question) and `accuracy_by_kind`.

    Raises:
        RecipeError: more than one process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            "experiment=quickstart: draws and trains in one process, found WORLD_SIZE="
            f"{os.environ['WORLD_SIZE']}. Start it with `vir-hf train`, or choose another experiment."
        )
    size, timer = size or Size(), Timer()
    output_dir = Path(recipe.training.output_dir)
    output, data, parts = _output_folder(output_dir), output_dir / "data", output_dir / "parts"
    seed = int(recipe.training.seed)
    with timer.measure("drawing", f"1/5 drawing {size.num_pictures} pictures and the conversations about them"):
        staging = output.stage("data")
        scenes = write_pictures(staging, num_pictures=size.num_pictures, num_questions=size.num_questions, seed=seed)
        output.replace_folder("data", staging)
    rows = {name: read_rows(data / f"{name}.json") for name in ("pretrain", "finetune", "heldout")}
    with timer.measure("parts", "2/5 making a tiny language model and a tiny vision tower, and training the tower"):
        staging = output.stage("parts")
        make_language_model(staging / "language_model", texts_of(rows["pretrain"] + rows["finetune"]), seed=seed)
        images = [data / "images" / str(row["image"]) for row in rows["pretrain"]]
        tower_loss = make_vision_tower(staging / "vision_tower", images, scenes, num_steps=size.tower_steps, seed=seed)
        output.replace_folder("parts", staging)
    with timer.measure("pretrain", "3/5 stage 1: the projector learns to show pictures to the language model"):
        first = train(_over_its_own(pretrain_recipe(recipe, data, parts, size.pretrain_rows)))
    with timer.measure("finetune", "4/5 stage 2: projector and language model learn to answer"):
        metrics = train(_over_its_own(finetune_recipe(recipe, data, parts)))
    with timer.measure("evaluation", f"5/5 answering {len(rows['heldout'])} questions about pictures never trained on"):
        scores, samples = evaluate(
            Answerer.load(str(output_dir)), rows["heldout"], rows["finetune"], data / "images", seed=seed
        )
        with output.writing("samples.png") as temporary:
            draw_panel(samples).save(temporary, "PNG")
        report(output_dir, scores, samples)
    metrics |= scores | {
        "tower_loss": tower_loss,
        "pretrain": {name: first[name] for name in ("num_steps", "num_rows", "first_loss", "final_loss")},
        "seconds_by_part": timer.seconds,
        "quickstart_seconds": round(sum(timer.seconds.values()), 1),
        "samples": str(output_dir / "samples.png"),
        "example_image": str(data / "images" / rows["heldout"][-1]["image"]),
    }
    output.write_json(METRICS, metrics)
    conclude(summary(metrics))
    return metrics


def _output_folder(output_dir: Path) -> OutputFolder:
    """The folder to draw and train in, once nothing of somebody else's has to give way.

    Raises:
        RecipeError: a file that is not of a quickstart, or was changed since.
    """
    output = run_folder(output_dir)
    names = ("data", "parts", "samples.png")
    is_earlier = read_metrics(output_dir).get("experiment") == SELF_CONTAINED
    if is_earlier and not any(name.split("/")[0] in names for name in output.names()):  # by a version without records
        found = [path for name in names[:2] for path in (output_dir / name).rglob("*")]
        output.adopt(["samples.png", *(path.relative_to(output_dir).as_posix() for path in found)])
    for folder, needed in ((output, (*names, *OUTPUTS)), (run_folder(output_dir / "pretrain"), OUTPUTS)):
        key = f"training.output_dir={folder.path}"
        folder.refuse_foreign(needed, key, "Move it away, or name another training.output_dir.")
    return output


def _over_its_own(recipe: Recipe) -> Recipe:
    """The recipe with leave to take an earlier quickstart's place, which is made again from nothing."""
    earlier = read_metrics(Path(recipe.training.output_dir)).get("experiment")
    if earlier in (SELF_CONTAINED, recipe.experiment.name):
        recipe.training.overwrite_output_dir = True
    return recipe


def pretrain_recipe(recipe: Recipe, data: Path, parts: Path, num_rows: int) -> Recipe:
    """Return stage 1: the projector alone, on captions, tower and language model frozen."""
    first = finetune_recipe(recipe, data, parts)
    first.experiment.name, first.experiment.stage = "quickstart_pretrain", "pretrain"
    first.model.template = "plain"
    first.model.pretrained_projector = None
    first.data.data_path, first.data.max_rows = str(data / "pretrain.json"), num_rows
    first.training.stage = "pretrain"
    first.training.arguments |= {
        "output_dir": str(Path(recipe.training.output_dir) / "pretrain"),
        "num_train_epochs": 1.0,
        "max_steps": -1,
    }
    first.trainable.language_model = "frozen"
    return first


def finetune_recipe(recipe: Recipe, data: Path, parts: Path) -> Recipe:
    """Return the recipe with what was drawn and made filled in; saved beside the model, it is an ordinary one."""
    second = copy.deepcopy(recipe)
    second.model.language_model = str(parts / "language_model")
    second.model.vision_tower = str(parts / "vision_tower")
    second.model.pretrained_projector = str(Path(recipe.training.output_dir) / "pretrain")
    second.data.data_path, second.data.image_folder = str(data / "finetune.json"), str(data / "images")
    return second


def evaluate(
    answerer: Answerer, heldout: list[dict[str, Any]], training: list[dict[str, Any]], images: Path, *, seed: int
) -> tuple[dict[str, Any], list[Sample]]:
    """Return the scores over the held-out rows, and the samples to show."""
    asked = [next(questions_of(row)) for row in heldout]
    kinds = [str(row["id"]).rsplit("-", 1)[-1] for row in heldout]
    paths = [str(images / row["image"]) for row in heldout]
    blank = draw_blank()
    seen = answer_all(answerer, [Question(text, [path]) for (text, _), path in zip(asked, paths, strict=True)])
    blind = answer_all(answerer, [Question(text, [blank]) for text, _ in asked])
    guesses = commonest_answers(training)
    right = [given == answer for given, (_, answer) in zip(seen, asked, strict=True)]
    scores = {
        "heldout_accuracy": mean(right),
        "blind_accuracy": mean(given == answer for given, (_, answer) in zip(blind, asked, strict=True)),
        "chance_accuracy": mean(guesses.get(text) == answer for text, answer in asked),
        "accuracy_by_kind": {
            kind: mean(hit for hit, of in zip(right, kinds, strict=True) if of == kind) for kind in KINDS
        },
        "num_heldout_questions": len(asked),
        "num_heldout_pictures": len(set(paths)),
    }
    shown = choose_samples(paths, kinds, seed)
    return scores, [Sample(open_image(paths[i]), *asked[i], seen[i]) for i in shown]


def report(output_dir: Path, scores: dict[str, Any], samples: list[Sample]) -> None:
    """Write `evaluation.json` and `samples.json`, from which `vir-hf push` makes the card."""
    names = {"exact match": "heldout", "exact match, blank pictures": "blind", "best guess without pictures": "chance"}
    write_results(
        output_dir,
        [
            {
                "dataset": "drawn pictures, held out",
                "metric": metric,
                "value": scores[f"{name}_accuracy"],
                "num_rows": scores["num_heldout_questions"],
            }
            for metric, name in names.items()
        ],
    )
    questions = [Question(it.question, [it.image]) for it in samples]
    cases = [
        Case(str(number), lambda asked=asked: asked, [it.answer])  # type: ignore[misc]
        for number, (asked, it) in enumerate(zip(questions, samples, strict=True))
    ]
    before = answer_all(Answerer.load(str(output_dir / "pretrain")), questions)
    write_samples(output_dir, cases, before, [sample.given for sample in samples])


def answer_all(answerer: Answerer, questions: list[Question]) -> list[str]:
    """Return the generated answers, batch by batch."""
    batches = [questions[start : start + ANSWER_BATCH] for start in range(0, len(questions), ANSWER_BATCH)]
    return [text for batch in batches for text in answerer.answer_batch(batch, max_new_tokens=MAX_ANSWER_TOKENS)]


def commonest_answers(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Return, for every question of the training rows, its commonest answer: the best guess without the picture."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for question, answer in questions_of(row):
            answers[question][answer] += 1
    return {question: counts.most_common(1)[0][0] for question, counts in answers.items()}


def choose_samples(paths: list[str], kinds: list[str], seed: int) -> list[int]:
    """Return row numbers for the panel: every kind in turn, each on a picture of its own, drawn without a look at answers."""
    order = list(range(len(paths)))
    random.Random(seed).shuffle(order)
    chosen: list[int] = []
    for number in range(NUM_SAMPLES):
        shown = {paths[i] for i in chosen}
        kind = KINDS[number % len(KINDS)]
        chosen += [i for i in order if kinds[i] == kind and paths[i] not in shown][:1]
    return chosen


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a LLaVA JSON file that this run has written."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def texts_of(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield every text of the rows, without the image placeholder."""
    for row in rows:
        for turn in row["conversations"]:
            yield turn["value"].replace("<image>", "")


def questions_of(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield question and answer of each round of a row, the question without the image placeholder."""
    values = [turn["value"].replace("<image>", "").strip() for turn in row["conversations"]]
    yield from zip(values[0::2], values[1::2], strict=True)


def mean(hits: Any) -> float:
    """Return the share of true values, to four places."""
    values = list(hits)
    return round(sum(values) / len(values), 4)


def summary(metrics: dict[str, Any]) -> str:
    """Return the figures of the run as the lines that end it."""
    kinds = ", ".join(f"{kind} {score:.2f}" for kind, score in metrics["accuracy_by_kind"].items())
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in metrics["seconds_by_part"].items())
    return (
        f"\nexact answers to {metrics['num_heldout_questions']} held-out questions: {metrics['heldout_accuracy']:.3f} ({kinds})\n"
        f"the same with a blank picture: {metrics['blind_accuracy']:.3f}; the best guess: {metrics['chance_accuracy']:.3f}\n"
        f"took {duration(metrics['quickstart_seconds'])} ({parts}); six of them with their pictures: {metrics['samples']}"
    )
