"""Captions: CIDEr-D, BLEU-1 to BLEU-4 and ROUGE-L as COCO's evaluation computes them.

Source: https://github.com/tylin/coco-caption, pycocoevalcap. How often an n-gram occurs is counted over the right captions of all
rows, so a CIDEr of few rows says little, and one of another subset is another scale.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from vir_hf.scores.judging import Item, Judged, ratio
from vir_hf.scores.matching import is_empty
from vir_hf.scores.words import caption_words

_LONGEST = 4
_SIGMA = 6.0  # of the penalty on another length, in words
_BETA = 1.2  # how much more recall weighs than precision in ROUGE-L
_SMALL, _TINY = 1e-9, 1e-15  # upstream's, so that nothing is divided by 0

Words = Sequence[str]
Counts = Counter[tuple[str, ...]]


def caption(items: Sequence[Item], answers: Sequence[str]) -> Judged:
    """Return CIDEr-D, BLEU and ROUGE-L; an empty caption is counted with its length of 0 and matches nothing."""
    said = [[] if is_empty(answer) else caption_words(answer) for answer in answers]
    right = [[caption_words(text) for text in item.references] for item in items]
    ciders = cider_d(said, right)
    rouges = [rouge_l_coco(given, texts) for given, texts in zip(said, right, strict=True)]
    # Upstream takes the mean length of the right captions for a single row, and the closest for more.
    lengths = [_bleu_sums(given, texts, len(items) == 1) for given, texts in zip(said, right, strict=True)]
    ones = np.ones((len(items), 1))
    statistics = np.concatenate(
        [ones, np.array(ciders)[:, None], np.array(rouges)[:, None], np.array(lengths, dtype=float)], axis=1
    )
    return Judged(rouges, [""] * len(items), np.arange(len(items)), statistics, _metrics)


def _metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    num_rows, cider, rouge, said, wanted = sums[:, :5].T
    correct, guessed = sums[:, 5 : 5 + _LONGEST], sums[:, 5 + _LONGEST :]
    found = {"cider": ratio(cider, num_rows)}
    length_ratio = (said + _TINY) / (wanted + _SMALL)
    penalty = np.where(length_ratio < 1, np.exp(np.minimum(0, 1 - 1 / length_ratio)), 1.0)
    product = np.ones(len(sums))
    for n in range(_LONGEST):
        product = product * (correct[:, n] + _TINY) / (guessed[:, n] + _SMALL)
        found[f"bleu_{n + 1}"] = product ** (1 / (n + 1)) * penalty
    return found | {"rouge_l": ratio(rouge, num_rows)}


def ngrams(words: Words) -> Counts:
    """Return how often each run of one to four words occurs."""
    return Counter(
        tuple(words[start : start + n]) for n in range(1, _LONGEST + 1) for start in range(len(words) - n + 1)
    )


def _bleu_sums(given: Words, texts: Sequence[Words], is_only: bool) -> list[float]:
    """Return the length, the length wanted, and for n of 1 to 4 the matching n-grams and all."""
    if is_only:
        wanted = sum(map(len, texts)) / len(texts)
    else:
        wanted = min((abs(len(text) - len(given)), len(text)) for text in texts)[1]
    most: Counts = Counter()
    for text in texts:
        most |= ngrams(text)
    correct = [0] * _LONGEST
    for gram, count in ngrams(given).items():
        correct[len(gram) - 1] += min(count, most[gram])
    return [len(given), wanted, *correct, *(max(0, len(given) - n) for n in range(_LONGEST))]


def rouge_l_coco(given: Words, texts: Sequence[Words]) -> float:
    """Return ROUGE-L with recall weighing more, of the best precision and the best recall over all right captions."""
    if not given:
        return 0.0
    common = [_longest_common(given, text) for text in texts]
    precision = max(length / len(given) for length in common)
    recall = max(length / len(text) if text else 0.0 for length, text in zip(common, texts, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _longest_common(one: Words, other: Words) -> int:
    row = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for place, against in enumerate(other, 1):
            diagonal, row[place] = row[place], diagonal + 1 if word == against else max(row[place], row[place - 1])
    return row[-1]


def cider_d(said: Sequence[Words], right: Sequence[Sequence[Words]]) -> list[float]:
    """Return CIDEr-D of every row, 0 to 10.

    Source: Vedantam et al., https://arxiv.org/abs/1411.5726, with the clipping and the length penalty of COCO's server.
    """
    counted = [[ngrams(text) for text in texts] for texts in right]
    rows_with: Counts = Counter()
    for texts in counted:
        rows_with.update(set().union(*texts))
    weight_of_rare = math.log(len(right)) if right else 0.0

    def weighted(counts: Counts) -> tuple[dict[tuple[str, ...], float], list[float], int]:
        weights = {
            gram: count * (weight_of_rare - math.log(max(1.0, rows_with[gram]))) for gram, count in counts.items()
        }
        norms = [0.0] * _LONGEST
        for gram, weight in weights.items():
            norms[len(gram) - 1] += weight**2
        # Upstream measures the length in pairs of words.
        num_pairs = sum(count for gram, count in counts.items() if len(gram) == 2)
        return weights, [math.sqrt(norm) for norm in norms], num_pairs

    scores = []
    for given, texts in zip(said, counted, strict=True):
        weights, norms, length = weighted(ngrams(given))
        total = 0.0
        for text in texts:
            against, other_norms, other_length = weighted(text)
            products = [0.0] * _LONGEST
            for gram, weight in weights.items():
                products[len(gram) - 1] += min(weight, against.get(gram, 0.0)) * against.get(gram, 0.0)
            penalty = math.exp(-((length - other_length) ** 2) / (2 * _SIGMA**2))
            for n in range(_LONGEST):
                if norms[n] and other_norms[n]:
                    products[n] /= norms[n] * other_norms[n]
                total += products[n] * penalty
        scores.append(10 * total / _LONGEST / len(texts))
    return scores
