"""The loss of held-out rows as a score: of sums over supervised tokens, so that long answers weigh more, as in training."""

from __future__ import annotations

import numpy as np

from vir_hf.scores.judging import Judged, ratio


def judged_losses(statistics: np.ndarray) -> Judged:
    """Return mean loss, token accuracy and perplexity over all supervised tokens; rows are the units."""

    def metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
        loss = ratio(sums[:, 0], sums[:, 1])
        return {"loss": loss, "token_accuracy": ratio(sums[:, 2], sums[:, 1]), "perplexity": np.exp(loss)}

    shares = ratio(statistics[:, 2], statistics[:, 1]).tolist()
    read_as = [f"loss {loss / max(count, 1):.4f}" for loss, count, _ in statistics]
    return Judged(shares, read_as, np.arange(len(statistics)), statistics, metrics)
