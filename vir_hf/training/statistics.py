"""What a run counts: tokens, rows, images, seconds of waiting for data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    pass


@dataclass
class StepStatistics:
    """Counts since the last log line and since the start of the run."""

    supervised_tokens: int = 0
    computed_tokens: int = 0
    real_tokens: int = 0
    rows: int = 0
    images: int = 0
    data_seconds: float = 0.0
    masked_rows: list[dict[str, str]] = field(default_factory=list)
    unsupervised_micro_batches: int = 0

    def add(self, other: StepStatistics) -> None:
        for name in ("supervised_tokens", "computed_tokens", "real_tokens", "rows", "images", "data_seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.masked_rows += other.masked_rows
        self.unsupervised_micro_batches += other.unsupervised_micro_batches


def memory_in_use() -> int:
    """Peak bytes: on the GPU since the start, or resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
