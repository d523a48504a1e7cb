"""`report.html`: one page that is drawn again while a run goes on, with no request to anywhere."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from vir_hf.curation import pages
from vir_hf.curation.inspection import InspectedRow, inspect_row
from vir_hf.errors import DataError
from vir_hf.training import checkpoints
from vir_hf.training.panel import Panel

if TYPE_CHECKING:
    from vir_hf.recipe.load import Recipe
    from vir_hf.training.trainer import LlavaTrainer

_SECONDS_BETWEEN_DRAWINGS = 10
_NUM_ROWS = 3
# title -> the names in the log whose values are drawn together
_CHARTS = {
    "Loss per supervised token": {"training": "loss", "held out": "eval_loss"},
    "Right next tokens": {"training": "mean_token_accuracy", "held out": "eval_token_accuracy"},
    "Learning rate": {"rate": "learning_rate"},
    "Gradient norm": {"norm": "grad_norm"},
    "Tokens per second": {"tokens": "tokens_per_second"},
    "Memory, GiB": {"peak": "memory_gib"},
}


def watchers(trainer: LlavaTrainer, recipe: Recipe) -> list[TrainerCallback]:
    """Return what watches a run as the recipe asks: early stopping, the panel, the report, in the order they must speak."""
    training = recipe.training
    found: list[TrainerCallback] = []
    if training.early_stopping_patience is not None:
        found.append(EarlyStoppingCallback(early_stopping_patience=training.early_stopping_patience))
    panel = None
    is_sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if trainer.eval_dataset is not None and training.panel_size and not is_sharded:
        if trainer.args.process_index == 0:
            panel = Panel(trainer, training.panel_size)
            found.append(panel)
    is_wanted = training.report and trainer.args.process_index == 0
    if is_wanted and checkpoints.may_show(Path(trainer.args.output_dir), checkpoints.REPORT):
        found.append(Report(trainer, recipe, panel))
    return found


class Report(TrainerCallback):
    """Draws `report.html` at most every ten seconds, at each evaluation and at the end."""

    def __init__(self, trainer: LlavaTrainer, recipe: Recipe, panel: Panel | None) -> None:
        self.trainer, self.panel, self.name = trainer, panel, recipe.experiment.name
        self.rows = _first_rows(trainer, recipe)
        self._drawn = 0.0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw, unless it was drawn just now."""
        if time.monotonic() - self._drawn > _SECONDS_BETWEEN_DRAWINGS:
            self.draw(state, is_over=False)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw what was just measured."""
        self.draw(state, is_over=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the whole run."""
        self.draw(state, is_over=True)

    def draw(self, state: TrainerState, *, is_over: bool) -> None:
        """Write the page over the one before."""
        output = checkpoints.run_folder(Path(self.trainer.args.output_dir))
        output.write_text(checkpoints.REPORT, self.page(state, is_over=is_over))
        self._drawn = time.monotonic()

    def page(self, state: TrainerState, *, is_over: bool) -> str:
        """Return the page."""
        history, trainer = state.log_history, self.trainer
        totals = trainer.totals
        figures = [
            ("steps", f"{state.global_step} of {state.max_steps}"),
            ("rows trained on", pages.short_number(totals.rows)),
            ("supervised tokens", pages.short_number(totals.supervised_tokens)),
            ("rows held out", len(trainer.eval_dataset) if trainer.eval_dataset is not None else "none"),
            ("time", _duration(trainer.seconds_so_far())),
        ]
        if state.best_global_step:
            figures.append(("best step", state.best_global_step))
        return pages.render(
            "report.html",
            title=self.name,
            lead=f"{trainer.args.output_dir}",
            foot="Drawn again while the run goes on; reload to see more." if not is_over else "",
            tone="good" if is_over else "odd",
            verdict=_verdict(history, is_over=is_over),
            figures=figures,
            charts=[chart for title, names in _CHARTS.items() if (chart := _chart(title, names, history)) is not None],
            questions=self._questions(),
            rows=[
                {"title": row.title, "spans": [{"sort": s.sort, "text": s.text} for s in row.spans]}
                for row in self.rows
            ],
        )

    def _questions(self) -> list[dict[str, Any]]:
        if self.panel is None or not self.panel.rows:
            return []
        by_step = sorted(self.panel.answers.items())
        return [
            {**row, "answers": [(step, answers[number]) for step, answers in by_step]}
            for number, row in enumerate(self.panel.rows)
        ]


def _chart(title: str, names: dict[str, str], history: list[dict[str, Any]]) -> pages.Curves | None:
    series = {
        shown: [(entry["step"], float(entry[name])) for entry in history if isinstance(entry.get(name), (int, float))]
        for shown, name in names.items()
    }
    series = {shown: points for shown, points in series.items() if points}
    return pages.curves(title, series) if series else None


def _verdict(history: list[dict[str, Any]], *, is_over: bool) -> str:
    losses = [entry["loss"] for entry in history if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    words = ["This run has ended." if is_over else "This run goes on."]
    if losses:
        words.append(f"Loss {losses[0]:.3f} at first, {losses[-1]:.3f} now.")
    if held_out:
        words.append(f"Held out: {held_out[-1]:.3f}, at best {min(held_out):.3f}.")
    return " ".join(words)


def _first_rows(trainer: LlavaTrainer, recipe: Recipe) -> list[InspectedRow]:
    rows = trainer.train_dataset
    if not hasattr(rows, "__len__"):
        return []
    shown = []
    for number in range(min(_NUM_ROWS, len(rows))):
        try:
            shown.append(inspect_row(rows[number], number, trainer.processing_class, recipe.training.max_length))
        except DataError:
            continue  # said before the first step, or by the step that meets it
    return shown


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
