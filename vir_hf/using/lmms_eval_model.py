"""Our checkpoints and adapters as a model of lmms-eval, which finds it through its entry points and imports it by its path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms

from vir_hf.errors import RunError
from vir_hf.inference import Answerer, Question


class VirHf(lmms):
    """A model that lmms-eval asks: `--model vir_hf --model_args pretrained=RUN[,adapter=A][,load_in_4bit=True]`.

    Args:
        pretrained: a run, a checkpoint, an adapter or a Hub id.
        adapter: put on top of it.
        load_in_4bit: NF4 weights, through bitsandbytes.
        device: `auto` is the GPU if there is one.
        batch_size: questions computed together.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        load_in_4bit: bool = False,
        device: str = "auto",
        batch_size: int | str = 1,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.batch_size = int(batch_size)
        name = "auto" if str(device).startswith("cuda") and ":" not in str(device) else str(device)
        self.answerer = Answerer.load(pretrained, adapter=adapter, load_in_4bit=load_in_4bit, device=name)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the answers, in the order of the requests; greedy unless the task asks otherwise."""
        answers: list[str] = [""] * len(requests)
        by_options: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_options.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(number)
        for numbers in by_options.values():
            options, until = _options(requests[numbers[0]].args[1])
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                texts = self.answerer.answer_batch([self._question(requests[number]) for number in batch], **options)
                for number, text in zip(batch, texts, strict=True):
                    answers[number] = _cut(text, until)
        return answers

    def _question(self, request: Any) -> Question:
        context, _, doc_to_visual, doc_id, task, split = request.args
        images = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        return Question(context.replace("<image>", "").strip(), images)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused: tasks of several rounds are not asked.

        Raises:
            RunError: always.
        """
        raise RunError("lmms-eval: a task of several rounds, which vir_hf does not answer; leave it out of the tasks.")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refused: tasks that compare likelihoods are not asked.

        Raises:
            RunError: always.
        """
        raise RunError("lmms-eval: a task of likelihoods, which vir_hf does not answer; leave it out of the tasks.")


def _options(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the options of ours and the texts at which an answer ends."""
    until = given.get("until") or []
    options: dict[str, Any] = {"max_new_tokens": int(given.get("max_new_tokens") or 1024)}
    if given.get("do_sample") and given.get("temperature"):
        options |= {"temperature": float(given["temperature"]), "top_p": float(given.get("top_p") or 1.0)}
    if int(given.get("num_beams") or 1) > 1:
        options["num_beams"] = int(given["num_beams"])
    return options, [until] if isinstance(until, str) else list(until)


def _cut(text: str, until: Sequence[str]) -> str:
    for end in until:
        if end:
            text = text.split(end)[0]
    return text.strip()
