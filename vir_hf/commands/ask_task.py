"""The part of `vir-hf evaluate --task` that asks a model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vir_hf.commands.answer import generation_options
from vir_hf.commands.evaluate_task import labelled_items
from vir_hf.errors import DataError, RecipeError

if TYPE_CHECKING:
    from vir_hf.scores.judging import Item
    from vir_hf.scores.tasks import Task
    from vir_hf.using.asking import Plan
    from vir_hf.using.results import Scored

EVALUATIONS = "evaluations"


def ask_task(task: Task, arguments: argparse.Namespace) -> Scored:
    """Return a model's answers to a benchmark, judged; also without its images, unless told not to.

    Raises:
        RecipeError: a wrong call, or another evaluation's answers in the output folder.
        DataError: questions that cannot be asked.
    """
    from transformers.utils import logging

    from vir_hf.using.asking import ask, check_images
    from vir_hf.using.stored_answers import rotate

    logging.disable_progress_bar()
    _check(arguments)
    items, _ = labelled_items(task, arguments)
    items = items[: arguments.max_rows]
    if arguments.circular:
        items = rotate([item for item in items if not item.group] or items)
    folder = arguments.image_folder or str(Path(arguments.data).resolve().parent)
    check_images(items, folder)
    plan = plan_of(task, items, folder, arguments)
    output = Path(arguments.output or default_output(task, arguments))
    arguments.output, arguments.image_folder = str(output), folder
    print(f"asked as: {plan.prompt or task.prompt!r}", file=sys.stderr)
    with _bar(len(items) * len(plan.conditions)) as bar:
        found = ask(
            plan,
            output / "asked",
            items,
            num_processes=arguments.num_processes,
            device=arguments.device,
            progress=bar.update,
        )
    return scored_of(task, items, plan, found, arguments)


def _check(arguments: argparse.Namespace) -> None:
    for name in ("batch_size", "num_processes", "max_rows"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise RecipeError(f"evaluate: --{name.replace('_', '-')} {getattr(arguments, name)}; expected at least 1.")
    if arguments.temperature:
        raise RecipeError(
            "evaluate: --temperature draws answers by chance; a score needs the likeliest one, leave it out."
        )


def plan_of(task: Task, items: list[Item], folder: str, arguments: argparse.Namespace) -> Plan:
    """Return what is to be asked, and how."""
    from vir_hf.using.asking import BLANK, SEEN, SHUFFLED, Plan, digest_of, shuffled_images, weights_of

    conditions = [SEEN]
    if not arguments.no_blind and any(item.image is not None for item in items):
        conditions += [BLANK, *([SHUFFLED] if shuffled_images(items) else [])]
    return Plan(
        task.name,
        str(arguments.model),
        arguments.adapter,
        arguments.load_in_4bit,
        arguments.prompt,
        folder,
        tuple(conditions),
        arguments.batch_size,
        {**generation_options(arguments), "timeout_seconds": None},
        digest_of(items),
        weights_of(arguments.model, arguments.adapter),
    )


def default_output(task: Task, arguments: argparse.Namespace) -> Path:
    """Return where results go by themselves: into the run, or for a model of the Hub into a folder here."""
    name = arguments.name or Path(arguments.data).stem
    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in f"{task.name}-{name}")
    model = Path(arguments.model)
    return (
        model / EVALUATIONS / name if model.is_dir() else Path(EVALUATIONS) / model.as_posix().replace("/", "--") / name
    )


def scored_of(
    task: Task,
    items: list[Item],
    plan: Plan,
    found: dict[str, dict[str, tuple[str, bool]]],
    arguments: argparse.Namespace,
) -> Scored:
    """Return the answers judged, and beside them what is right without the images."""
    from vir_hf.scores.matching import is_empty
    from vir_hf.scores.tasks import judge
    from vir_hf.using.asking import SEEN
    from vir_hf.using.results import Scored
    from vir_hf.using.stored_answers import Aligned

    seen = [found[SEEN][item.id] for item in items]
    counts = {
        "questions": len(items),
        "answers": len(items),
        "empty_answers": sum(is_empty(text) for text, _ in seen),
        "cut_answers": sum(is_cut for _, is_cut in seen),
    }
    aligned = Aligned(list(items), [text for text, _ in seen], counts, cut=[is_cut for _, is_cut in seen])
    facts = {
        "model": str(arguments.model),
        "data": str(arguments.data),
        "questions": arguments.questions,
        "prompt": plan.prompt if plan.prompt is not None else task.prompt,
        "generation": plan.generation,
        "batch_size": plan.batch_size,
    }
    scored = Scored.of(task, arguments.variant, aligned, arguments.name or Path(arguments.data).stem, **facts)
    for condition in plan.conditions[1:]:
        answers = [found[condition][item.id][0] for item in items]
        scored.blind[condition] = judge(task, items, answers, arguments.variant)
    return scored


def measure_loss(arguments: argparse.Namespace) -> Scored:
    """Return the loss of LLaVA rows, with and without their images."""
    from vir_hf.inference import Answerer
    from vir_hf.rows.files import find_data_files, read_rows
    from vir_hf.scores.judging import Item
    from vir_hf.scores.losses import judged_losses
    from vir_hf.scores.tasks import LOSS_TASK
    from vir_hf.using.asking import BLANK
    from vir_hf.using.benchmarks import row_image, row_question_text
    from vir_hf.using.held_out_loss import row_losses
    from vir_hf.using.questions import row_references
    from vir_hf.using.results import Scored
    from vir_hf.using.stored_answers import Aligned

    _check(arguments)
    rows = [row for file in find_data_files(arguments.data) for _, row in read_rows(file)][: arguments.max_rows]
    if not rows:
        raise DataError(f"{arguments.data}: holds no rows, so there is nothing to measure.")
    folder = arguments.image_folder or str(Path(arguments.data).resolve().parent)
    arguments.image_folder = folder
    arguments.output = arguments.output or str(default_output(LOSS_TASK, arguments))
    answerer = Answerer.load(
        str(arguments.model), adapter=arguments.adapter, load_in_4bit=arguments.load_in_4bit, device=arguments.device
    )
    with _bar(len(rows) * (1 if arguments.no_blind else 2)) as bar:
        seen = judged_losses(row_losses(answerer, rows, folder, progress=bar.update))
        blind = {}
        if not arguments.no_blind:
            blind[BLANK] = judged_losses(row_losses(answerer, rows, folder, blank=True, progress=bar.update))
    items = [
        Item(str(row.get("id", number)), row_question_text(row), tuple(row_references(row)), row_image(row))
        for number, row in enumerate(rows)
    ]
    aligned = Aligned(items, [item.references[-1] for item in items], {"questions": len(items)})
    facts = {"model": str(arguments.model), "data": str(arguments.data)}
    return Scored(LOSS_TASK, "row by row", aligned, seen, arguments.name or Path(arguments.data).stem, blind, facts)


def _bar(total: int) -> Any:
    from vir_hf.console import Progress

    return Progress(total, "asking", "question")


def write_card_scores(scored: Scored, run: Path) -> None:
    """Put the main scores into the run's `evaluation.json`, which its card is made from."""
    from vir_hf.using import evaluation
    from vir_hf.using.results import results_of

    evaluation.check_results(run)
    dataset = f"{scored.dataset}, {scored.task.name} as {scored.variant}"
    rows = []
    for result in results_of(scored):
        if "," in result["metric"]:  # of one category
            continue
        rows.append({**result, "dataset": dataset})
        for how, value in result.get("blind", {}).items():
            without = {key: result[key] for key in ("num_rows", "num_empty_answers", "compared_as")}
            rows.append({"dataset": dataset, "metric": f"{result['metric']}, {how}", "value": value, **without})
    evaluation.write_results(run, rows)
