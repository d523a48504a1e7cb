"""`vir-hf evaluate --task NAME`: a benchmark scored as its own code does, from stored answers or by asking a model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vir_hf.commands.outputs import refuse_outputs, write_json
from vir_hf.errors import RecipeError

LOSS = "loss"

if TYPE_CHECKING:
    from vir_hf.scores.judging import Item
    from vir_hf.scores.tasks import Task
    from vir_hf.using.results import Scored


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what belongs to `--task`."""
    group = parser.add_argument_group("a benchmark (with --task)")
    group.add_argument(
        "--task", metavar="NAME", help="how answers are scored; `--task list` lists them with their variants"
    )
    group.add_argument(
        "--variant", metavar="NAME", help="of public scorers that differ, which one; the official by default"
    )
    group.add_argument(
        "--questions", metavar="FILE", help="the questions, where the labels lie in a file of their own (POPE, VQA)"
    )
    group.add_argument("--answers", metavar="FILE", help="score these answers, without a model")
    group.add_argument(
        "--missing-as-wrong",
        action="store_true",
        help="score questions without an answer as wrong, instead of refusing",
    )
    group.add_argument(
        "--prompt", metavar="TEXT", help="how questions are asked, with {question} in it; LLaVA's by default"
    )
    group.add_argument(
        "--circular", action="store_true", help="ask multiple choice once for each rotation of the options"
    )
    group.add_argument("--no-blind", action="store_true", help="do not ask again with blank and with shuffled images")
    group.add_argument(
        "--num-processes", type=int, default=1, metavar="N", help="models asked at once (1); on CUDA a GPU each"
    )
    group.add_argument("--adapter", metavar="A", help="an adapter to put on the model: a folder or a Hub id")
    group.add_argument("--load-in-4bit", action="store_true", help="NF4 weights, through bitsandbytes")
    group.add_argument("--harness", choices=["lmms-eval"], help="let it run --task, one of its own (comma for several)")
    group.add_argument("--include-path", metavar="DIR", help="with --harness: a folder of tasks of your own")
    group.add_argument("--json", metavar="FILE", help="write the scores as JSON to FILE, or - for standard output")
    group.add_argument(
        "--output", metavar="DIR", help="write scores, a file of all questions and a gallery into this folder"
    )
    group.add_argument("--overwrite", action="store_true", help="replace the file of --json")


def evaluate_task(arguments: argparse.Namespace) -> int:
    """Score one benchmark; return the exit code.

    Raises:
        RecipeError: a wrong call.
        DataError: files that cannot be read or do not line up.
    """
    from vir_hf.scores.tasks import TASKS, find_task

    if arguments.task == "list":
        for task in TASKS.values():
            print(f"{task.name:<12}{', '.join(task.variants)}")
        print(f"{LOSS:<12}of LLaVA rows, asks a model")
        return 0
    if arguments.task == LOSS:
        return _evaluate_loss(arguments)
    task = find_task(arguments.task)
    task.scorer(arguments.variant)
    if arguments.answers is None and arguments.model is None:
        raise RecipeError("evaluate: name a model to ask, or a file of stored answers with --answers.")
    if arguments.answers is not None and arguments.model is not None:
        raise RecipeError("evaluate: --answers are scored without a model; leave one of the two out.")
    inputs = [arguments.data, arguments.questions, arguments.answers]
    refuse_outputs([("--json", arguments.json)], inputs, overwrite=arguments.overwrite)
    if arguments.answers is None:
        from vir_hf.commands.ask_task import ask_task, write_card_scores

        if arguments.max_new_tokens is None:
            arguments.max_new_tokens = task.max_new_tokens
        scored = ask_task(task, arguments)
        if (Path(arguments.model) / "recipe.yaml").is_file():
            write_card_scores(scored, Path(arguments.model))
    else:
        scored = score_stored(task, arguments)
    report(scored, arguments)
    return 0


def evaluate_with_harness(arguments: argparse.Namespace) -> int:
    """Let lmms-eval ask the model its own tasks, and keep the scores.

    Raises:
        RecipeError: a wrong call, or lmms-eval is not installed.
        RunError: it gave no scores.
    """
    if arguments.model is None or not arguments.task:
        raise RecipeError("evaluate: --harness lmms-eval takes a model and --task, the names of its tasks.")
    refuse_outputs([("--json", arguments.json)], [], overwrite=arguments.overwrite)
    from vir_hf.using import evaluation
    from vir_hf.using.harness import HARNESS, run_harness

    run = Path(arguments.model)
    output = Path(arguments.output or (run / "evaluations" if run.is_dir() else Path("evaluations")) / HARNESS)
    given = {"adapter": arguments.adapter, "load_in_4bit": arguments.load_in_4bit, "device": arguments.device}
    results = run_harness(
        str(arguments.model),
        arguments.task.split(","),
        output,
        model_arguments={name: value for name, value in given.items() if value},
        batch_size=arguments.batch_size,
        limit=arguments.max_rows,
        include_path=arguments.include_path,
    )
    write_json(arguments.json, {"harness": HARNESS, "model": str(arguments.model), "results": results})
    if (run / "recipe.yaml").is_file():
        evaluation.check_results(run)
        evaluation.write_results(run, results)
    for row in results:
        print(f"{row['dataset']:<24}{row['metric']:<28}{row['value']:.4f}   {row['num_rows']} questions")
    print(f"in {output}")
    return 0


def _evaluate_loss(arguments: argparse.Namespace) -> int:
    if arguments.model is None or arguments.answers or arguments.questions or arguments.variant:
        raise RecipeError(
            "evaluate: --task loss takes a model and --data, without --answers, --questions and --variant."
        )
    refuse_outputs([("--json", arguments.json)], [arguments.data], overwrite=arguments.overwrite)
    from vir_hf.commands.ask_task import measure_loss

    report(measure_loss(arguments), arguments)
    return 0


def labelled_items(task: Task, arguments: argparse.Namespace) -> tuple[list[Item], set[str]]:
    """Return the questions with their right answers, and the ids of questions of other categories in the question file."""
    from vir_hf.using.benchmarks import read_items
    from vir_hf.using.stored_answers import asked_items

    items = read_items(task, arguments.data)
    if arguments.questions is None:
        return items, set()
    return asked_items(items, arguments.questions, arguments.data)


def score_stored(task: Task, arguments: argparse.Namespace) -> Scored:
    """Return the stored answers, brought together with their questions and judged."""
    from vir_hf.using.results import Scored
    from vir_hf.using.stored_answers import align, read_answers, with_rounds, without_others

    items, others = labelled_items(task, arguments)
    answers, num_others = without_others(with_rounds(read_answers(arguments.answers)), others)
    aligned = align(
        items,
        answers,
        names=(str(arguments.questions or arguments.data), str(arguments.answers)),
        missing_is_wrong=arguments.missing_as_wrong,
    )
    aligned.counts["answers_of_other_categories"] = num_others
    dataset = arguments.name or Path(arguments.data).stem
    facts = {"data": str(arguments.data), "questions": arguments.questions, "answers": str(arguments.answers)}
    return Scored.of(task, arguments.variant, aligned, dataset, **facts)


def report(scored: Scored, arguments: argparse.Namespace) -> None:
    """Write what was asked for and print the table."""
    from vir_hf.files import OutputFolder
    from vir_hf.using.results import document_of, table, write_all

    document = document_of(scored)
    write_json(arguments.json, document)
    if arguments.output:
        folder = arguments.image_folder or str(Path(arguments.data).resolve().parent)
        write_all(OutputFolder(arguments.output), scored, folder)
    stream: Any = sys.stderr if arguments.json == "-" else sys.stdout
    print(f"{scored.task.name}, scored as {scored.variant}: {len(scored.aligned.items):,} questions", file=stream)
    print(table([document]), file=stream)
    for note in document["notes"]:
        print(f"note: {note}", file=stream)
    if arguments.output:
        print(f"in {arguments.output}", file=stream)
