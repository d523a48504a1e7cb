"""A model asked the questions of a benchmark: in fixed batches, by several processes, and again from where it was stopped.

Which questions share a batch depends on their order and the batch size alone. A batch that was not finished is asked again whole,
so that the answers are those of a run that was never stopped, on any number of processes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vir_hf import files
from vir_hf.errors import DataError, RecipeError, RunError, clipped, shown
from vir_hf.images.folder import ImageFolder
from vir_hf.images.identity import picture_identity
from vir_hf.images.opening import open_image
from vir_hf.inference import Answerer, Prompt, Question
from vir_hf.rows.files import lines_of
from vir_hf.scores.judging import Item
from vir_hf.scores.tasks import Task, asked, find_task
from vir_hf.using.benchmarks import ROW
from vir_hf.using.evaluation import blanked
from vir_hf.using.questions import look_at_picture, row_question

SEEN, BLANK, SHUFFLED = "images", "blank images", "shuffled images"
PLAN = "plan.json"


@dataclass(frozen=True)
class Plan:
    """What is asked of which model and how; the same plan gives the same answers.

    Attributes:
        conditions: `SEEN`, and `BLANK` or `SHUFFLED` for what can be guessed without looking.
        digest: of the questions, so that answers are never taken for those to others.
    """

    task: str
    model: str
    adapter: str | None
    load_in_4bit: bool
    prompt: str | None
    image_folder: str
    conditions: tuple[str, ...]
    batch_size: int
    generation: dict[str, Any]
    digest: str
    weights: str

    def batches(self, items: Sequence[Item]) -> list[list[Item]]:
        """Return the questions that are asked together."""
        return [list(items[start : start + self.batch_size]) for start in range(0, len(items), self.batch_size)]


def digest_of(items: Sequence[Item]) -> str:
    """Return a digest of what is asked, in its order."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        image = item.image if isinstance(item.image, str) else repr(picture_identity(item.image))
        digest.update(repr((item.id, item.question, item.options, image)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def weights_of(*places: str | None) -> str:
    """Return what tells weights on this disk from others in the same place: names, sizes and times of their files."""
    found = []
    for place in places:
        if place and os.path.isdir(place):
            for path in sorted(Path(place).glob("*.safetensors")):
                found.append((path.name, path.stat().st_size, path.stat().st_mtime_ns))
    return hashlib.blake2b(repr(found).encode(), digest_size=8).hexdigest() if found else ""


def open_plan(folder: Path, plan: Plan) -> None:
    """Keep the plan in a folder, or make sure that the one there is the same.

    Raises:
        RecipeError: answers of another plan lie there; with what differs.
    """
    path = folder / PLAN
    given = json.loads(json.dumps(dataclasses.asdict(plan)))
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in given if there.get(name) != given[name]]
        if changed:
            listed = ", ".join(f"{name} was {shown(there.get(name))}, is {shown(given[name])}" for name in changed)
            raise RecipeError(
                clipped(
                    f"{folder}: holds answers to another call: {listed}. Name another --output, or remove this folder."
                )
            )
        return
    if folder.exists() and any(folder.glob("answers-*.jsonl")):
        raise RecipeError(f"{folder}: holds answers without {PLAN}, which says to what. Name another --output.")
    files.write_json(path, given)


def answered(folder: Path, condition: str) -> dict[str, tuple[str, bool]]:
    """Return the answers that are there for a condition, by id: the text, and whether it was cut.

    The last line of a file whose writer was killed may be half a line; it counts for nothing.
    """
    found: dict[str, tuple[str, bool]] = {}
    for path in sorted(folder.glob("answers-*.jsonl")):
        content = path.read_bytes()
        for line in lines_of(content[: content.rfind(b"\n") + 1]):
            row = json.loads(line)
            if row["condition"] == condition:
                found.setdefault(row["id"], (row["answer"], row["is_cut"]))
    return found


def ask(
    plan: Plan,
    folder: Path,
    items: Sequence[Item],
    *,
    num_processes: int = 1,
    device: str = "auto",
    progress: Callable[[int], None] = lambda num: None,
    answerer: Answerer | None = None,
) -> dict[str, dict[str, tuple[str, bool]]]:
    """Return the answers to all questions under every condition, asking those that are not in the folder yet.

    Args:
        num_processes: how many models are loaded; on CUDA each has a GPU of its own.
        answerer: a model that is loaded already, for one process.

    Raises:
        RecipeError: the folder holds answers to another plan.
        DataError: a question that cannot be asked.
        RunError: a process that ended with an error.
    """
    open_plan(folder, plan)
    pending = len(_unasked(plan, folder, items))
    if pending and num_processes > 1:
        _ask_in_processes(plan, folder, items, min(num_processes, pending), device)
    elif pending:
        answerer = answerer or Answerer.load(
            plan.model, adapter=plan.adapter, load_in_4bit=plan.load_in_4bit, device=device
        )
        ask_part(plan, folder, items, answerer, progress=progress)
    found = {condition: answered(folder, condition) for condition in plan.conditions}
    for condition, answers in found.items():
        missing = [item.id for item in items if item.id not in answers]
        if missing:
            raise RunError(
                f"{len(missing)} questions were not answered with {condition}, the first is {shown(missing[0])}."
            )
    return found


def _unasked(
    plan: Plan, folder: Path, items: Sequence[Item], rank: int = 0, num_parts: int = 1
) -> list[tuple[str, list[Item]]]:
    """Return every condition and batch of a share that is not answered whole.

    Shares are dealt before a look at what is there: other processes are adding to it.
    """
    there = {condition: answered(folder, condition) for condition in plan.conditions}
    work = [(condition, batch) for condition in plan.conditions for batch in plan.batches(items)]
    return [
        (condition, batch)
        for condition, batch in work[rank::num_parts]
        if any(item.id not in there[condition] for item in batch)
    ]


def ask_part(
    plan: Plan,
    folder: Path,
    items: Sequence[Item],
    answerer: Answerer,
    *,
    rank: int = 0,
    num_parts: int = 1,
    progress: Callable[[int], None] = lambda num: None,
) -> None:
    """Ask one process's share of what is unasked and add the answers to its file, batch by batch."""
    task, images = find_task(plan.task), ImageFolder(plan.image_folder)
    shuffled = shuffled_images(items) if SHUFFLED in plan.conditions else {}
    work = _unasked(plan, folder, items, rank, num_parts)
    path = folder / f"answers-{rank}.jsonl"
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            files.cut_to(path, content.rfind(b"\n") + 1)
    there = {condition: answered(folder, condition) for condition in plan.conditions}
    with files.appending(path) as file:
        for condition, batch in work:
            prompts = [_encode(answerer, task, item, plan, images, condition, shuffled.get(item.id)) for item in batch]
            texts = answerer.answer_prompts_and_ends(prompts, **plan.generation)
            lines = [
                json.dumps({"id": item.id, "condition": condition, "answer": text, "is_cut": not ended})
                for item, (text, ended) in zip(batch, texts, strict=True)
                if item.id not in there[condition]
            ]
            file.write("".join(line + "\n" for line in lines))
            file.flush()
            progress(len(batch))


def question_of(task: Task, item: Item, images: ImageFolder, prompt: str | None = None, image: Any = None) -> Question:
    """Return what the model is asked about an item, its image opened.

    Args:
        image: shown in place of the item's own.
    """
    if ROW in item.details:
        question = row_question(item.details[ROW], images)
        if image is None:
            return question
        others = [open_image(image, images)] * len(question.images)
        return dataclasses.replace(question, images=others) if others else question
    shown_image = item.image if image is None else image
    opened = [] if shown_image is None else [open_image(shown_image, images)]
    return Question(asked(task, item, prompt), opened)


def _encode(
    answerer: Answerer, task: Task, item: Item, plan: Plan, images: ImageFolder, condition: str, other: Any
) -> Prompt:
    try:
        question = question_of(task, item, images, plan.prompt, other if condition == SHUFFLED else None)
        return answerer.encode(blanked(question) if condition == BLANK else question)
    except DataError as error:
        raise DataError(f"question {shown(item.id)}: {error}") from error


def shuffled_images(items: Sequence[Item], seed: int = 0) -> dict[str, Any]:
    """Return for each question the image of another one: every distinct image takes the place of exactly one other.

    Nothing for a single image, which has no other to change places with.
    """
    distinct: dict[Hashable, Any] = {}
    for item in items:
        if item.image is not None:
            distinct.setdefault(picture_identity(item.image), item.image)
    order = list(distinct)
    random.Random(seed).shuffle(order)
    if len(order) < 2:
        return {}
    after = {name: distinct[order[(number + 1) % len(order)]] for number, name in enumerate(order)}
    return {item.id: after[picture_identity(item.image)] for item in items if item.image is not None}


def check_images(items: Sequence[Item], folder: str) -> None:
    """Look at every image by its header, so that a missing one is named before a model is loaded.

    Raises:
        DataError: the first that cannot be opened, and how many there are.
    """
    images, failures = ImageFolder(folder), []
    seen: set[Hashable] = set()
    for item in items:
        if item.image is None or (key := picture_identity(item.image)) in seen:
            continue
        seen.add(key)
        try:
            look_at_picture(item.image, images)
        except DataError as error:
            failures.append(f"question {shown(item.id)}: {error}")
    if failures:
        more = f" {len(failures):,} of {len(seen):,} images are like this." if len(failures) > 1 else ""
        raise DataError(clipped(f"{failures[0]}{more} Name the folder with --image-folder."))


def _ask_in_processes(plan: Plan, folder: Path, items: Sequence[Item], num_processes: int, device: str) -> None:
    """Let processes ask a share each; the first that fails ends the others."""
    listed = folder / "items.json"
    files.write_text(listed, json.dumps([_as_plain(item) for item in items]))
    processes = []
    for rank in range(num_processes):
        arguments = [str(folder), str(rank), str(num_processes), _device_of(device, rank)]
        processes.append(subprocess.Popen([sys.executable, "-m", "vir_hf.using.asking", *arguments]))
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
    files.discard(listed)
    if any(codes):
        raise RunError(
            f"{sum(map(bool, codes))} of {num_processes} processes ended with an error, shown above. What is answered is kept in "
            f"{folder}; the same command goes on from there."
        )


def _device_of(device: str, rank: int) -> str:
    import torch

    if device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{rank % torch.cuda.device_count()}"
    return device


def _as_plain(item: Item) -> dict[str, Any]:
    if item.image is not None and not isinstance(item.image, str):
        raise RecipeError("evaluate: --num-processes needs images in files; these lie in the data. Use one process.")
    return dataclasses.asdict(item)


def _of_plain(row: Mapping[str, Any]) -> Item:
    return Item(**{**row, "references": tuple(row["references"]), "options": tuple(row["options"])})


def main(argv: Sequence[str]) -> None:
    """Ask one process's share: folder, rank, number of processes, device."""
    folder, rank, num_parts = Path(argv[0]), int(argv[1]), int(argv[2])
    given = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    plan = Plan(**{**given, "conditions": tuple(given["conditions"])})
    items = [_of_plain(row) for row in json.loads((folder / "items.json").read_text(encoding="utf-8"))]
    answerer = Answerer.load(plan.model, adapter=plan.adapter, load_in_4bit=plan.load_in_4bit, device=argv[3])
    ask_part(plan, folder, items, answerer, rank=rank, num_parts=num_parts)


if __name__ == "__main__":
    main(sys.argv[1:])
