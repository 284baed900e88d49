# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""How far a score might be off, had other test samples been drawn: bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from clmae.configuration.errors import InputError
from clmae.evaluation.metrics.scores import ClassCounts

LEVEL = 0.95
NUM_RESAMPLES = 1000
_CELLS_AT_ONCE = 10_000_000

Interval = tuple[float, float]


def mean_interval(
    values: Tensor, *, level: float = LEVEL, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean of values: of an accuracy, where they are 0 and 1.

    Only how often each distinct value is drawn matters, and those numbers are multinomial: they are drawn as such,
    which is the bootstrap exactly (for 0 and 1: the binomial distribution), not an approximation to it.

    Args:
        values: `(n,)`, one for each test sample; real numbers.
        level: Share of data sets whose interval shall hold the true mean, in (0, 1).
        num_resamples: How often the samples are drawn anew.
        seed: Of the draws; the same seed gives the same interval.

    Raises:
        InputError: There is no value, or an option is out of range.
    """
    if values.ndim != 1 or not len(values):
        raise InputError(f"`values` has shape {tuple(values.shape)}; give (n,) with at least one sample.")
    distinct, counts = torch.unique(values.cpu().double(), return_counts=True)
    means = [draws.double() @ distinct / len(values) for draws in _resampled(counts, level, num_resamples, seed)]
    return _percentiles(torch.cat(means), level)


def share_interval(share: float, size: int) -> Interval:
    """[`mean_interval`] of an accuracy `share` in [0, 1] of `size` test samples."""
    return mean_interval(torch.arange(size) < round(share * size))


def class_score_intervals(
    predictions: Tensor,
    references: Tensor,
    scores: Mapping[str, Callable[[ClassCounts], Tensor]],
    *,
    level: float = LEVEL,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile bootstrap intervals of scores of predicted classes, all on the same resamples.

    Such a score depends only on how many samples there are in each cell of the confusion matrix: these numbers are
    multinomial, and drawn as such (see [`mean_interval`]).

    Args:
        predictions, references: `(n,)` integers >= 0.
        scores: By name, what [`metrics.scores`] makes of [`ClassCounts`].
        level, num_resamples, seed: As for [`mean_interval`].
    """
    predictions, references = predictions.cpu(), references.cpu()
    num_classes = 1 + int(torch.maximum(predictions.max(), references.max()))
    cells, counts = torch.unique(references * num_classes + predictions, return_counts=True)
    truth, found = cells // num_classes, cells % num_classes
    right = truth == found
    resampled: dict[str, list[Tensor]] = {name: [] for name in scores}
    for draws in _resampled(counts, level, num_resamples, seed):
        zeros = draws.new_zeros(len(draws), num_classes)
        drawn = ClassCounts(
            zeros.index_add(1, truth[right], draws[:, right]),
            zeros.index_add(1, truth, draws),
            zeros.index_add(1, found, draws),
        )
        for name, score in scores.items():
            resampled[name].append(score(drawn))
    return {name: _percentiles(torch.cat(parts), level) for name, parts in resampled.items()}


def _resampled(counts: Tensor, level: float, num_resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each of `(k,)` groups is drawn in `sum(counts)` draws: chunks `(r, k)` int64, num_resamples in all."""
    if not 0 < level < 1:
        raise InputError(f"`level` is {level}; give a number between 0 and 1.")
    if num_resamples < 1:
        raise InputError(f"`num_resamples` is {num_resamples}; give 1 or more, better 1000.")
    generator, size = np.random.default_rng(seed), int(counts.sum())
    chunk = max(1, _CELLS_AT_ONCE // len(counts))
    for start in range(0, num_resamples, chunk):
        rows = min(chunk, num_resamples - start)
        yield torch.from_numpy(generator.multinomial(size, counts.numpy() / size, size=rows))


def _percentiles(resampled: Tensor, level: float) -> Interval:
    low, high = np.quantile(resampled.numpy(), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


__all__ = ["LEVEL", "NUM_RESAMPLES", "Interval", "class_score_intervals", "mean_interval", "share_interval"]
