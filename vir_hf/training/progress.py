"""What a run prints as it goes: a bar where there is a terminal, and one line a log step with what matters."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vir_hf.console import Progress, duration, memory, say


class StepLines(TrainerCallback):
    """A bar over optimizer steps on a terminal and, at every log step, one line."""

    def __init__(self) -> None:
        self.progress: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.progress = Progress(state.max_steps, "", "step", initial=state.global_step, has_lines=False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress.update(state.global_step - self.progress.num_done)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.progress is not None and logs:
            say(step_line(logs, state, self.progress.seconds_left()))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.progress is not None:
            self.progress.close()
            self.progress = None


def step_line(logs: dict[str, Any], state: TrainerState, seconds_left: float | None = None) -> str:
    """Return one log entry as a line of `name value` pairs, two spaces between them.

    Args:
        logs: what the trainer logged: a step with its loss, an evaluation, or the end of training.
        seconds_left: how long the rest of the run takes, if anybody knows.
    """
    if "loss" not in logs:
        return _other_line(logs, state)
    step = f"step {state.global_step}"
    if state.max_steps > 0:
        step += f"/{state.max_steps} ({100 * state.global_step // state.max_steps} %)"
    parts = [
        step,
        f"epoch {state.epoch or 0:.2f}",
        f"lr {logs.get('learning_rate', 0):.2e}",
        f"loss {logs['loss']:.4f}",
        f"grad {logs.get('grad_norm', float('nan')):.3f}",
        f"supervised {logs.get('supervised_tokens', 0):,}",
        f"{logs.get('tokens_per_second', 0):,.0f} tokens/s",
        f"data {duration(logs.get('data_seconds', 0))}",
        memory(logs.get("memory_gib", 0) * 2**30),
    ]
    if logs.get("masked_rows"):
        parts.append(f"masked rows {logs['masked_rows']}")
    if seconds_left is not None and state.global_step < state.max_steps:
        parts.append(f"{duration(seconds_left)} left")
    return "  ".join(parts)


def _other_line(logs: dict[str, Any], state: TrainerState) -> str:
    """An evaluation, or the end of training."""
    shown = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
    title = "evaluation" if any(name.startswith("eval_") for name in shown) else "training"
    parts = []
    for name, value in shown.items():
        words = name.removeprefix("eval_").removeprefix("train_").replace("_", " ")
        if name in ("epoch", "total_flos"):  # upstream's count knows nothing of a vision tower
            continue
        if name.endswith("_runtime"):
            parts.append(f"took {duration(value)}")
        elif name.endswith("_per_second"):
            parts.append(f"{value:,.4g} {words.removesuffix(' per second')}/s")
        else:
            parts.append(f"{words} {value:,.4g}")
    return "  ".join([f"{title} at step {state.global_step}", *parts])
