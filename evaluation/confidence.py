# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""95 % intervals of scores: where they might have been with other test samples."""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix
from torch import Tensor

LEVEL = 0.95
NUM_RESAMPLES = 1000
SEED = 0
# As it is written down.
INTERVALS = {
    "method": "Wilson's for shares of the test images, percentile bootstrap over them for other scores",
    "level": LEVEL,
    "resamples": NUM_RESAMPLES,
    "seed": SEED,
}

Interval = tuple[float, float]


def share_interval(share: float, size: int) -> Interval:
    """Wilson's interval of an accuracy `share` in [0, 1] of `size` test samples."""
    interval = binomtest(round(share * size), size).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: Tensor) -> Interval:
    """Percentile bootstrap interval of the mean of `(n,)` numbers, one for each test sample."""
    distinct, counts = np.unique(values.double().cpu().numpy(), return_counts=True)
    return _percentiles(_resample(counts) @ distinct / len(values))


def class_score_intervals(predictions: Tensor, references: Tensor) -> dict[str, Interval]:
    """Percentile bootstrap intervals of the mean recall of the classes and of macro F1, on the same resamples.

    Args:
        predictions, references: `(n,)` integers >= 0.
    """
    predictions, references = predictions.cpu(), references.cpu()
    matrix = confusion_matrix(references, predictions, labels=torch.cat([references, predictions]).unique())
    truth, predicted = (torch.from_numpy(part) for part in matrix.nonzero())
    draws = torch.from_numpy(_resample(matrix[matrix > 0])).double()
    zeros, correct = draws.new_zeros(NUM_RESAMPLES, len(matrix)), truth == predicted
    hits = zeros.index_add(1, truth[correct], draws[:, correct])
    support, chosen = zeros.index_add(1, truth, draws), zeros.index_add(1, predicted, draws)
    recall, f1 = hits / support.clamp(min=1), 2 * hits / (support + chosen).clamp(min=1)
    # A class that is not in a resample does not count there.
    return {
        "mean per class": _percentiles((recall.sum(1) / (support > 0).sum(1)).numpy()),
        "macro F1": _percentiles((f1.sum(1) / (support + chosen > 0).sum(1)).numpy()),
    }


def _resample(counts: np.ndarray) -> np.ndarray:
    """How often each of `(k,)` groups of equal samples is drawn with replacement, `(NUM_RESAMPLES, k)` int64.

    These numbers are multinomial. Drawing them is the bootstrap exactly, at a fraction of the cost of drawing samples.
    """
    return np.random.default_rng(SEED).multinomial(counts.sum(), counts / counts.sum(), size=NUM_RESAMPLES)


def _percentiles(resampled: np.ndarray) -> Interval:
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
