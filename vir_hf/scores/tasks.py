"""The tasks of `vir-hf evaluate --task`: for each its scorers by name, the official one first, and its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vir_hf.errors import DataError, RecipeError
from vir_hf.scores import boxes, captions, choices, texts, vqa, yes_or_no
from vir_hf.scores.choices import LETTERS
from vir_hf.scores.judging import Item, Judged, Scorer, mean_of

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
BOX = "Please provide the bounding box coordinate of the region this sentence describes: {question}"


@dataclass(frozen=True)
class Task:
    """One kind of question.

    Attributes:
        variants: scorers by name; the first is the default, and the official one.
        prompt: how a question is asked, with `{question}` where it stands. LLaVA-1.5's, so that scores can be compared.
        max_new_tokens: the longest answer.
        best: the score that stands for the task, higher being better.
    """

    name: str
    variants: Mapping[str, Scorer]
    prompt: str
    max_new_tokens: int
    best: str

    @property
    def default(self) -> str:
        """The name of the official scorer."""
        return next(iter(self.variants))

    def scorer(self, variant: str | None = None) -> Scorer:
        """Return a scorer by its name, the official one without.

        Raises:
            RecipeError: there is none of that name.
        """
        name = variant or self.default
        if name not in self.variants:
            raise RecipeError(
                f"--variant {name!r}: --task {self.name} has no such scorer, expected one of {', '.join(self.variants)}."
            )
        return self.variants[name]


_CHOICE_READERS = {
    "mmbench": choices.read_mmbench,
    "scienceqa": choices.read_scienceqa,
    "mmstar": choices.read_mmstar,
    "letter": choices.read_letter,
}


def _choice_variants(first: str) -> dict[str, Scorer]:
    order = [first, *(name for name in _CHOICE_READERS if name != first)]
    variants = {name: choices.choice(_CHOICE_READERS[name]) for name in order}
    if first == "mmstar":
        variants["mmstar"] = choices.choice(choices.read_mmstar, over="categories")
        variants["lmms-eval"] = choices.choice(choices.read_mmstar, over="categories", category="l2_category")
    return variants


_VQA: dict[str, Scorer] = {
    "official": mean_of("accuracy", vqa.official),
    "m4c": mean_of("accuracy", vqa.m4c),
    "lmms-eval": mean_of("accuracy", vqa.m4c),
    "vlmevalkit": mean_of("accuracy", vqa.vlmevalkit),
}
_ANLS: dict[str, Scorer] = {
    "official": mean_of("anls", texts.anls),
    "lmms-eval": mean_of("anls", texts.anls),
    "vlmevalkit": mean_of("anls", texts.anls_collapsed),
    "pix2struct": mean_of("anls", texts.anls_as_written),
}
_SHORT = "{question}\n" + SHORT
_CHOICE = "{question}\n" + LETTER


def _choice_task(name: str, first: str) -> Task:
    return Task(name, _choice_variants(first), _CHOICE, 16, "accuracy")


TASKS = {
    task.name: task
    for task in (
        Task("vqa", _VQA, _SHORT, 16, "accuracy"),
        Task("textvqa", {"m4c": _VQA["m4c"], **_VQA}, _SHORT, 16, "accuracy"),
        Task("vizwiz", _VQA, "{question}\n" + UNANSWERABLE + "\n" + SHORT, 16, "accuracy"),
        Task(
            "gqa",
            {
                "official": mean_of("accuracy", texts.gqa),
                "strict": mean_of("accuracy", texts.gqa_strict),
                "lmms-eval": mean_of("accuracy", texts.gqa_lmms),
            },
            _SHORT,
            16,
            "accuracy",
        ),
        Task(
            "exact",
            {
                "strict": mean_of("exact_match", texts.exact_as_written),
                "ignore-case": mean_of("exact_match", texts.exact_ignoring_case),
                "normalised": mean_of("exact_match", texts.exact_normalised),
            },
            "{question}",
            128,
            "exact_match",
        ),
        Task(
            "relaxed",
            {
                "official": mean_of("relaxed_accuracy", texts.relaxed),
                "lmms-eval": mean_of("relaxed_accuracy", texts.relaxed),
                "vlmevalkit": mean_of("relaxed_accuracy", texts.relaxed_stripped),
            },
            _SHORT,
            16,
            "relaxed_accuracy",
        ),
        Task("anls", _ANLS, _SHORT, 32, "anls"),
        Task(
            "pope",
            {
                "llava": yes_or_no.pope(yes_or_no.read_llava),
                "lmms-eval": yes_or_no.pope(yes_or_no.read_exact, passes_over_others=True, ratio_of_labels=True),
                "vlmevalkit": yes_or_no.pope(yes_or_no.read_either),
            },
            _SHORT,
            16,
            "f1",
        ),
        _choice_task("mcq", "mmbench"),
        _choice_task("mmbench", "mmbench"),
        _choice_task("scienceqa", "scienceqa"),
        _choice_task("mmstar", "mmstar"),
        _choice_task("ai2d", "letter"),
        Task(
            "mme",
            {"official": yes_or_no.mme(yes_or_no.read_mme), "lmms-eval": yes_or_no.mme(yes_or_no.read_mme_lmms)},
            _SHORT,
            16,
            "perception",
        ),
        Task(
            "ocrbench",
            {"official": texts.ocrbench(lower_first=False), "lmms-eval": texts.ocrbench(lower_first=True)},
            "{question}",
            100,
            "score",
        ),
        Task("caption", {"coco": captions.caption}, CAPTION, 64, "cider"),
        Task(
            "grounding",
            {"relative": boxes.grounding(), "thousandths": boxes.grounding(1000.0)},
            BOX,
            64,
            "accuracy_at_0.5",
        ),
    )
}


LOSS_TASK = Task("loss", {}, "{question}", 0, "loss")  # not scored from answers, but measured on a model


def find_task(name: str) -> Task:
    """Return a task by its name.

    Raises:
        RecipeError: there is none of that name.
    """
    if name not in TASKS:
        raise RecipeError(f"--task {name!r}: unknown, expected one of {', '.join(TASKS)}, loss.")
    return TASKS[name]


def asked(task: Task, item: Item, prompt: str | None = None) -> str:
    """Return what the model is asked: hint, question and lettered options, and the instruction about the answer's form."""
    lines = [str(item.details["hint"])] if item.details.get("hint") else []
    lines.append(item.question)
    lines += [f"{letter}. {text}" for letter, text in zip(LETTERS, item.options, strict=False)]
    template = prompt if prompt is not None else task.prompt
    instruction = template.partition("{question}")[2].strip()
    if prompt is None and instruction and instruction in item.question:  # LLaVA's question files bring it with them
        return item.question.replace("<image>", "").strip()
    return template.replace("{question}", "\n".join(line for line in lines if line))


def judge(task: Task, items: Sequence[Item], answers: Sequence[str], variant: str | None = None) -> Judged:
    """Return what a scorer of the task makes of the answers.

    Raises:
        DataError: no questions, or right answers that the scorer cannot compare with.
        RecipeError: no scorer of that name.
    """
    scorer = task.scorer(variant)
    if not items:
        raise DataError(f"--task {task.name}: found no questions to score, expected at least one.")
    return scorer(items, answers)
