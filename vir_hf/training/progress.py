"""What a run prints: a progress bar, and one line a log step."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StepLines(TrainerCallback):
    """A progress bar over optimizer steps and, at every log step, one line with what matters."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.bar is not None and logs:
            self.bar.write(step_line(logs, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def step_line(logs: dict[str, Any], state: TrainerState) -> str:
    """One log entry as a line; an entry of another kind (evaluation, the end) as `key value` pairs."""
    if "loss" not in logs:
        shown = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
        return "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
    parts = [
        f"epoch {state.epoch or 0:.2f}",
        f"step {state.global_step}/{state.max_steps}",
        f"lr {logs.get('learning_rate', 0):.2e}",
        f"loss {logs['loss']:.4f}",
        f"grad {logs.get('grad_norm', float('nan')):.3f}",
        f"supervised {logs.get('supervised_tokens', 0)}",
        f"{logs.get('tokens_per_second', 0):.0f} tok/s",
        f"data {logs.get('data_seconds', 0):.2f} s",
        f"{logs.get('memory_gib', 0):.2f} GiB",
    ]
    if logs.get("masked_rows"):
        parts.append(f"masked rows {logs['masked_rows']}")
    return "  ".join(parts)
