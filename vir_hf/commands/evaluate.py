"""`vir-hf evaluate`: how a run answers held-out questions, before and after tuning; what the model card reports."""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vir_hf.commands.answer import add_generation_arguments, generation_options
from vir_hf.commands.evaluate_task import add_task_arguments, evaluate_task, evaluate_with_harness
from vir_hf.commands.reading import add_reading, reading_of
from vir_hf.errors import DataError, RecipeError, RunError

if TYPE_CHECKING:
    from vir_hf.inference import Answerer
    from vir_hf.using.evaluation import Case

_EPILOG = """\
examples:
  vir-hf evaluate outputs/my-run --data heldout.json --image-folder images
  vir-hf evaluate outputs/my-run --data heldout.json --image-folder images --name "shelf photos, March" --blind --before

A row is a LLaVA row, whose last question is asked after the turns before it, or {"id", "image", "question", "answer"}, with
"answers" where several are right: a list of texts, or VQA's [{"answer": ...}, ...]. Written into the run: evaluation.json
(scores) and samples.json with samples/ (pictures with the answers before and after tuning). `vir-hf push` makes the card
from them.

  vir-hf evaluate outputs/my-run --task textvqa --data TextVQA_0.5.1_val.json --image-folder train_images
  vir-hf evaluate --task pope --data coco_pope_random.json --questions llava_pope_test.jsonl --answers answers.jsonl --json s.json
"""


def main(argv: list[str]) -> int:
    """Evaluate; return the exit code: 0 done, 1 it could not go on, 2 a wrong call or data that cannot be asked."""
    try:
        return _main(argv)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vir-hf evaluate",
        description="Measure a run on held-out rows.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", nargs="?", help="a run's output directory; with --task also a checkpoint, adapter or Hub id"
    )
    parser.add_argument("--data", metavar="ROWS", help="a .json or .jsonl file of rows with right answers")
    parser.add_argument(
        "--image-folder", metavar="DIR", help="where the rows' pictures lie; beside the rows by default"
    )
    parser.add_argument("--name", help="what the card calls the data; the file's name without its ending by default")
    parser.add_argument("--max-rows", type=int, metavar="N", help="of the rows, the first N")
    parser.add_argument(
        "--blind", action="store_true", help="also with grey pictures: what can be guessed without looking"
    )
    parser.add_argument("--before", action="store_true", help="also score the model as it was before tuning")
    parser.add_argument("--samples", type=int, default=6, metavar="N", help="rows shown in the card (6); 0 for none")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="questions computed together (8)")
    parser.add_argument("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda, cuda:1 ...")
    add_reading(parser)
    add_generation_arguments(parser)
    add_task_arguments(parser)
    parser.set_defaults(max_new_tokens=None)  # a task has its own
    arguments = parser.parse_args(argv)
    if arguments.harness is not None:
        return evaluate_with_harness(arguments)
    if arguments.task is not None and (arguments.data is not None or arguments.task == "list"):
        return evaluate_task(arguments)
    arguments.max_new_tokens = 512 if arguments.max_new_tokens is None else arguments.max_new_tokens
    if arguments.model is None or arguments.data is None:
        raise RecipeError("evaluate: expected a run's output directory and --data ROWS, or --task NAME --data FILE.")
    for name in ("batch_size", "max_rows"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise RecipeError(f"evaluate: --{name.replace('_', '-')} {getattr(arguments, name)}; expected at least 1.")
    if arguments.samples < 0:
        raise RecipeError(f"evaluate: --samples {arguments.samples}; expected 0 or more.")
    from vir_hf.using.evaluation import check_results

    run = Path(arguments.model)
    if not run.is_dir():
        raise RecipeError(
            f"{run}: no such folder; evaluate writes its results into a run's own, so name one on this disk."
        )
    if not any((run / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise RecipeError(f"{run}: holds neither a model nor an adapter; name the output directory of a finished run.")
    check_results(run)
    return _evaluate(run, arguments)


def _evaluate(run: Path, arguments: argparse.Namespace) -> int:
    from transformers.utils import logging

    from vir_hf.console import Progress
    from vir_hf.inference import Answerer
    from vir_hf.scores.matching import NORMALISATION
    from vir_hf.using import evaluation
    from vir_hf.using.questions import read_questions

    logging.disable_progress_bar()
    options = generation_options(arguments)
    data = Path(arguments.data)
    rows = read_questions(data, reading_of(arguments))[: arguments.max_rows]
    if not rows:
        raise DataError(f"{data}: holds no rows, so there is nothing to measure.")
    was_trained_on = _is_trained_on(run, data)
    folder = arguments.image_folder or str(data.resolve().parent)
    cases = evaluation.read_cases(rows, folder)
    # The card calls its samples held out, so rows that were learned are none.
    shown = [cases[number] for number in evaluation.choose_samples(cases, 0 if was_trained_on else arguments.samples)]
    name = (arguments.name or data.stem) + (" (trained on)" if was_trained_on else "")

    def ask(answerer: Answerer, cases: list[Case], what: str, **how: Any) -> list[str]:
        with Progress(len(cases), what, "row") as progress:
            return evaluation.answer_cases(
                answerer, cases, batch_size=arguments.batch_size, progress=progress.update, **how, **options
            )

    answerer = Answerer.load(str(run), device=arguments.device)
    after = ask(answerer, cases, "after tuning")
    results = evaluation.score(name, "", after, cases)
    if arguments.blind:
        results += evaluation.score(name, ", blank pictures", ask(answerer, cases, "blank pictures", blank=True), cases)
    before_of_shown: list[str] = []
    if arguments.before or shown:
        with _before_tuning(run, answerer) as earlier:
            if arguments.before:
                before = ask(earlier, cases, "before tuning")
                results += evaluation.score(name, ", before tuning", before, cases)
                by_case = dict(zip(map(id, cases), before, strict=True))
                before_of_shown = [by_case[id(case)] for case in shown]
            else:
                before_of_shown = ask(earlier, shown, "before tuning")
    evaluation.write_results(run, results)
    if shown:
        by_case = dict(zip(map(id, cases), after, strict=True))
        evaluation.write_samples(run, shown, before_of_shown, [by_case[id(case)] for case in shown])
    for result in results:
        num_empty = result["num_empty_answers"]
        empty = f", {num_empty} of them answered with nothing" if num_empty else ""
        print(f"{result['metric']:<28}{result['value']:.4f}   {result['num_rows']} rows of {result['dataset']}{empty}")
    print(f"compared as: {NORMALISATION}; an empty answer scores 0")
    print(f"in {run / evaluation.EVALUATION}" + (f" and {run / evaluation.SAMPLES}" if shown else ""))
    return 0


@contextlib.contextmanager
def _before_tuning(run: Path, answerer: Answerer) -> Iterator[Answerer]:
    """The model as it was when training began: without the adapter, or built again from the run's recipe.

    Raises:
        RecipeError: the run has no recipe, or its parts are not there any more.
    """
    from vir_hf.inference import Answerer
    from vir_hf.model.for_training import load_model_and_processor
    from vir_hf.model.precision import Precision
    from vir_hf.recipe.load import load_recipe

    if hasattr(answerer.model, "disable_adapter"):
        with answerer.model.disable_adapter():
            yield answerer
        return
    recipe_file = run / "recipe.yaml"
    if not recipe_file.is_file():
        raise RecipeError(
            f"{run}: has no recipe.yaml, which says what the model was before tuning. Leave out --before and set --samples 0."
        )
    recipe = load_recipe(recipe_file=recipe_file, require_data=False)
    device = next(answerer.model.parameters()).device
    same = Precision(answerer.model.dtype, None, "the run's own, to compare with")
    model, processor = load_model_and_processor(recipe, same)
    yield Answerer(model.to(device), processor)


def _is_trained_on(run: Path, data: Path) -> bool:
    """Whether the rows are those of training, by file or by content; said, because such a score tells little of others."""
    from vir_hf.recipe.files import read_yaml

    recipe_file = run / "recipe.yaml"
    if not recipe_file.is_file():
        return False
    section = read_yaml(recipe_file).get("data") or {}
    paths = [section.get("data_path"), *(source.get("path") for source in section.get("sources") or [])]
    for path in paths:
        if path is not None and Path(path).is_file() and Path(path).stat().st_size == data.stat().st_size:
            if Path(path).samefile(data) or filecmp.cmp(path, data, shallow=False):
                print(
                    f"warning: {data} is what this run was trained on; results say so, and no samples are kept",
                    file=sys.stderr,
                )
                return True
    return False
