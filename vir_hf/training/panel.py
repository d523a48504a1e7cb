"""A few held-out questions, answered at every evaluation: what the model says now, beside what it said before."""

from __future__ import annotations

import base64
import copy
import io
import json
import logging
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vir_hf.errors import DataError
from vir_hf.files import as_report
from vir_hf.images.opening import open_image
from vir_hf.inference import Answerer, Question
from vir_hf.rows.encoding import encode_prompt_with_images, last_question
from vir_hf.training import checkpoints

if TYPE_CHECKING:
    from vir_hf.training.trainer import LlavaTrainer

logger = logging.getLogger(__name__)

_THUMBNAIL = 240  # pixels of the longer side
MAX_NEW_TOKENS = 64


class Panel(TrainerCallback):
    """Asks the same held-out rows at each evaluation and keeps the answers in `panel.json`.

    Args:
        trainer: whose model is asked, on its main process.
        size: how many rows, spread evenly over the evaluation rows; those without a question and an answer are passed over.
    """

    def __init__(self, trainer: LlavaTrainer, size: int) -> None:
        self.trainer = trainer
        self.place = Path(trainer.args.output_dir) / checkpoints.PANEL
        self.asked: list[Question] = []
        self.rows: list[dict[str, Any]] = []
        self._choose(size)
        self.answers: dict[int, list[str]] = {}
        self.may_write = checkpoints.may_show(self.place.parent, checkpoints.PANEL)

    def _choose(self, size: int) -> None:
        rows = self.trainer.eval_dataset
        spread = [number * len(rows) // size for number in range(min(size, len(rows)))]
        others = (number for number in range(len(rows)) if number not in spread)
        for number in [*spread, *others]:
            if len(self.rows) == size:
                break
            self._add(rows[number])

    def _add(self, row: dict[str, Any]) -> None:
        messages = last_question(row["messages"])
        answer = row["messages"][len(messages)] if len(row["messages"]) > len(messages) else None
        if not messages or messages[-1]["role"] != "user" or answer is None:
            return
        num_images = sum(part["type"] == "image" for message in messages for part in message["content"])
        try:
            images = [open_image(image) for image in row["images"][:num_images]]
        except DataError:
            return  # the step that meets it says so
        if not self._fits(Question.of_messages(messages, images)):
            return
        self.asked.append(Question.of_messages(messages, images))
        self.rows.append(
            {
                "id": str(row["id"]),
                "question": _text(messages[-1]),
                "reference": _text(answer),
                "images": [_thumbnail(image) for image in images],
            }
        )

    def _fits(self, question: Question) -> bool:
        """Whether question and answer fit into what the model reads at once."""
        limit = getattr(self.trainer.model.config.get_text_config(), "max_position_embeddings", None)
        try:
            ids, _ = encode_prompt_with_images({"messages": question.messages()}, self.trainer.processing_class)
        except DataError:
            return False
        return limit is None or len(ids) + MAX_NEW_TOKENS <= limit

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the answers of the run this one goes on from."""
        if state.global_step:
            known = read_panel(self.place)
            if [row.get("id") for row in known.get("rows", ())] == [row["id"] for row in self.rows]:
                self.answers = {entry["step"]: entry["answers"] for entry in known["answers"]}
                self.answers = {step: found for step, found in self.answers.items() if step <= state.global_step}

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask, and write `panel.json`."""
        if not self.rows or not state.is_world_process_zero:
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        try:
            self.answers[state.global_step] = ask(model, self.trainer, self.asked)
        except (DataError, RuntimeError) as error:  # a look at the model is not worth the run
            logger.warning("the panel's questions could not be answered, and are not asked again: %s", error)
            self.rows = []
            return
        kept = [{"step": step, "answers": found} for step, found in sorted(self.answers.items())]
        if self.may_write:
            found = as_report({"rows": self.rows, "answers": kept})
            output = checkpoints.run_folder(self.place.parent)
            output.write_text(checkpoints.PANEL, found)


def ask(model: Any, trainer: LlavaTrainer, questions: list[Question]) -> list[str]:
    """Return the greedy answers of a model in training; its mode, defaults and all random numbers are as before afterwards."""
    defaults, was_training = model.generation_config, model.training
    python, numpy_state = random.getstate(), np.random.get_state()
    try:
        model.generation_config = copy.deepcopy(defaults)
        answerer = Answerer(model, trainer.processing_class)
        with torch.random.fork_rng(), trainer.accelerator.autocast():
            return [
                answerer.answer_prompts([answerer.encode(question)], max_new_tokens=MAX_NEW_TOKENS)[0]
                for question in questions
            ]
    finally:
        model.generation_config = defaults
        model.train(was_training)
        random.setstate(python)
        np.random.set_state(numpy_state)


def read_panel(path: Path) -> dict[str, Any]:
    """Return what a `panel.json` holds; nothing if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(message: Mapping[str, Any]) -> str:
    return "".join(part.get("text") or "" for part in message["content"] if part["type"] == "text").strip()


def _thumbnail(image: Any) -> str:
    small = image.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()
