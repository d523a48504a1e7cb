"""A model that reads small print, and the same one with one view that cannot: what `experiment=quickstart_hd` does.

outputs/quickstart_hd/data/              pages, train.json, heldout.json
outputs/quickstart_hd/parts/             vision_tower and language_model, as Hugging Face folders
outputs/quickstart_hd/one_view/          the model that sees each page as one view
outputs/quickstart_hd/                   the model with tiles, recipe.yaml, metrics.json and samples.png
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from vir_hf.files import OutputFolder
from vir_hf.images.opening import open_image
from vir_hf.inference import Answerer, Question
from vir_hf.llava.views import Tiles
from vir_hf.quickstart.pages import LETTERS, SPOT, draw_blank_page, draw_cells, write_pages
from vir_hf.quickstart.panel import Sample, draw_panel
from vir_hf.quickstart.parts import make_language_model, teach_vision_tower
from vir_hf.quickstart.run import (
    Timer,
    answer_all,
    commonest_answers,
    mean,
    over_its_own,
    questions_of,
    read_rows,
    refuse_several_processes,
    report,
    texts_of,
)
from vir_hf.recipe.load import Recipe
from vir_hf.training.checkpoints import METRICS, OUTPUTS, run_folder
from vir_hf.training.run import train

NUM_SAMPLES = 6
_MARK = (38, 84, 214)


@dataclass(frozen=True)
class Size:
    """How much is drawn and how long the tower learns; tests make it small."""

    num_pages: int = 800
    num_heldout: int = 320
    num_questions: int = 12  # about each training page
    num_cells: int = 6400
    tower_steps: int = 350


def run_high_resolution(recipe: Recipe, size: Size | None = None) -> dict[str, Any]:
    """Draw pages, make the parts, train with one view and with tiles, ask held-out questions; return what `metrics.json` holds.

    Beside what every run reports, the metrics hold `heldout_accuracy` (with tiles), `one_view_accuracy` (the same pages and
    parts, one view), `blind_accuracy` (with tiles, nothing printed on the page) and `chance_accuracy` (the commonest answer).

    Raises:
        RecipeError: more than one process.
    """
    refuse_several_processes(recipe)
    size, timer, seed = size or Size(), Timer(), int(recipe.training.seed)
    output_dir = Path(recipe.training.output_dir)
    output, data, parts = _output_folder(output_dir), output_dir / "data", output_dir / "parts"
    with timer.measure(
        "drawing", f"1/5 drawing {size.num_pages} pages of small print and the conversations about them"
    ):
        staging = output.stage("data")
        pages = write_pages(
            staging,
            num_pages=size.num_pages,
            num_heldout=size.num_heldout,
            num_questions=size.num_questions,
            seed=seed,
        )
        output.replace_folder("data", staging)
    rows, heldout = read_rows(data / "train.json"), read_rows(data / "heldout.json")
    with timer.measure("parts", "2/5 making a tiny language model and a tiny vision tower, and training the tower"):
        staging = output.stage("parts")
        make_language_model(staging / "language_model", texts_of(rows), seed=seed)
        tower_loss = make_reading_tower(staging / "vision_tower", size, seed=seed)
        output.replace_folder("parts", staging)
    with timer.measure("one_view", "3/5 training with one view of each page"):
        one = train(over_its_own(one_view_recipe(recipe, data, parts)))
    with timer.measure("tiles", "4/5 training with tiles: the same pages, parts and steps"):
        metrics = train(over_its_own(tiles_recipe(recipe, data, parts)))
    with timer.measure("evaluation", f"5/5 answering {len(heldout)} questions about pages never trained on"):
        answerer = Answerer.load(str(output_dir))
        scores, given = _scores(answerer, output_dir, heldout, rows, [draw_blank_page(page) for page in pages])
        samples = _samples(answerer, heldout, given, data / "images", seed)
        with output.writing("samples.png") as temporary:
            draw_panel(samples).save(temporary, "PNG")
        report(output_dir, scores, samples, data_set="drawn pages, held out", earlier=output_dir / "one_view")
    metrics |= scores | {
        "tower_loss": tower_loss,
        "one_view": {name: one[name] for name in ("num_steps", "num_rows", "first_loss", "final_loss")},
        "seconds_by_part": timer.seconds,
        "quickstart_seconds": round(sum(timer.seconds.values()), 1),
        "samples": str(output_dir / "samples.png"),
        "example_image": str(data / "images" / heldout[-1]["image"]),
    }
    output.write_json(METRICS, metrics)
    print(summary(metrics), flush=True)
    return metrics


def make_reading_tower(folder: Path, size: Size, *, seed: int) -> float:
    """Return the final loss of a small tower that learns which letter a cell shows, and save it. No page is shown to it."""
    cells, targets = draw_cells(size.num_cells, random.Random(seed))
    return teach_vision_tower(
        folder,
        torch.from_numpy(cells),
        [torch.from_numpy(targets)],
        [len(LETTERS) + 1],
        num_steps=size.tower_steps,
        seed=seed,
        patch_size=SPOT,
    )


def tiles_recipe(recipe: Recipe, data: Path, parts: Path) -> Recipe:
    """Return the recipe with what was drawn and made filled in; saved beside the model, it is an ordinary one."""
    made = copy.deepcopy(recipe)
    made.model.language_model = str(parts / "language_model")
    made.model.vision_tower = str(parts / "vision_tower")
    made.data.data_path, made.data.image_folder = str(data / "train.json"), str(data / "images")
    return made


def one_view_recipe(recipe: Recipe, data: Path, parts: Path) -> Recipe:
    """Return the same run without tiles, beside the other."""
    made = tiles_recipe(recipe, data, parts)
    made.experiment.name = "quickstart_hd_one_view"
    made.model.tiling = "none"
    made.training.arguments["output_dir"] = str(Path(recipe.training.output_dir) / "one_view")
    return made


def _output_folder(output_dir: Path) -> OutputFolder:
    """The folder to draw and train in, once nothing of somebody else's has to give way."""
    output = run_folder(output_dir)
    for folder, needed in (
        (output, ("data", "parts", "samples.png", *OUTPUTS)),
        (run_folder(output_dir / "one_view"), OUTPUTS),
    ):
        key = f"training.output_dir={folder.path}"
        folder.refuse_foreign(needed, key, "Move it away, or name another training.output_dir.")
    return output


def _scores(
    answerer: Answerer,
    output_dir: Path,
    heldout: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    blanks: list[Image.Image],
) -> tuple[dict[str, Any], list[str]]:
    """Return the accuracies, and the answers of the model with tiles."""
    asked = [next(questions_of(row)) for row in heldout]
    paths = [str(output_dir / "data" / "images" / row["image"]) for row in heldout]
    questions = [Question(text, [path]) for (text, _), path in zip(asked, paths, strict=True)]
    seen = answer_all(answerer, questions)
    blind = answer_all(answerer, [Question(text, [blank]) for (text, _), blank in zip(asked, blanks, strict=True)])
    one_view = answer_all(Answerer.load(str(output_dir / "one_view")), questions)
    guesses = commonest_answers(rows)

    def accuracy(given: list[str]) -> float:
        return mean(answer == right for answer, (_, right) in zip(given, asked, strict=True))

    return {
        "heldout_accuracy": accuracy(seen),
        "one_view_accuracy": accuracy(one_view),
        "blind_accuracy": accuracy(blind),
        "chance_accuracy": accuracy([guesses.get(text, "") for text, _ in asked]),
        "num_heldout_questions": len(asked),
    }, seen


def _samples(
    answerer: Answerer, heldout: list[dict[str, Any]], given: list[str], images: Path, seed: int
) -> list[Sample]:
    """Return some pages with their tiles drawn, chosen without a look at the answers."""
    chosen = random.Random(seed).sample(range(len(heldout)), min(NUM_SAMPLES, len(heldout)))
    views = answerer.processor.views
    return [
        Sample(with_tiles(open_image(images / heldout[i]["image"]), views), *next(questions_of(heldout[i])), given[i])
        for i in chosen
    ]


def with_tiles(image: Image.Image, views: Tiles) -> Image.Image:
    """Return the image on a square, enlarged, with a line around each tile and its row and column beside it."""
    cut = views.of(*image.size)
    scale = 2
    shown = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(shown)
    width, height = shown.width / max(cut.columns, 1), shown.height / max(cut.rows, 1)
    for row in range(max(cut.rows, 1)):
        for column in range(max(cut.columns, 1)):
            left, top = round(column * width), round(row * height)
            pen.rectangle((left, top, round(left + width) - 1, round(top + height) - 1), outline=_MARK, width=2)
            pen.text((left + 6, top + 4), f"{row + 1},{column + 1}", _MARK)
    edge = max(shown.size)
    square = Image.new("RGB", (edge, edge), (255, 255, 255))
    square.paste(shown, ((edge - shown.width) // 2, (edge - shown.height) // 2))
    return square


def summary(metrics: dict[str, Any]) -> str:
    """Return the figures of the run as the lines that end it."""
    parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in metrics["seconds_by_part"].items())
    return (
        f"\nexact answers to {metrics['num_heldout_questions']} held-out questions about small print: with tiles "
        f"{metrics['heldout_accuracy']:.3f}, with one view {metrics['one_view_accuracy']:.3f}\n"
        f"with tiles and nothing printed on the page: {metrics['blind_accuracy']:.3f}; the best guess: "
        f"{metrics['chance_accuracy']:.3f}\n"
        f"{metrics['quickstart_seconds']:.0f} s ({parts}); pages with their tiles: {metrics['samples']}"
    )
