# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Scores of a classifier, as small functions on tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clmae.configuration.errors import InputError


class ClassCounts(NamedTuple):
    """What every score of predicted classes is made of, for each class; leading dimensions are resamples.

    Attributes:
        hits: Samples of the class that were predicted to be of it, `(..., num_classes)`, >= 0.
        support: Samples of the class, `(..., num_classes)`.
        predicted: Samples predicted to be of the class, `(..., num_classes)`.
    """

    hits: Tensor
    support: Tensor
    predicted: Tensor


def class_counts(predictions: Tensor, references: Tensor) -> ClassCounts:
    """Counts of predicted and true classes, both `(n,)` integers >= 0; as many classes as the largest needs.

    Raises:
        InputError: There is no sample, shapes differ, or the numbers are no classes.
    """
    for name, labels in (("predictions", predictions), ("references", references)):
        if labels.ndim != 1 or not len(labels) or len(labels) != len(references):
            raise InputError(
                f"`{name}` has shape {tuple(labels.shape)}; give one class for each of at least one sample, `(n,)`."
            )
        if labels.is_floating_point() or int(labels.min()) < 0:
            raise InputError(
                f"`{name}` must hold class numbers from 0 (integers); found {labels.dtype}, smallest "
                f"{labels.min().item()}."
            )
    num_classes = 1 + int(torch.maximum(predictions.max(), references.max()))
    hits = references[predictions == references]
    return ClassCounts(*(labels.bincount(minlength=num_classes) for labels in (hits, references, predictions)))


def accuracy(counts: ClassCounts) -> Tensor:
    """Share of the samples that are predicted right, `(...)` float64 in [0, 1]."""
    return counts.hits.sum(-1).double() / counts.support.sum(-1)


def mean_per_class_accuracy(counts: ClassCounts) -> Tensor:
    """Mean over the classes that have samples of the share predicted right (their recall), `(...)` float64 in [0, 1].

    Every class weighs the same, however few samples it has: the score for imbalanced data.
    """
    present = counts.support > 0
    return (counts.hits.double() / counts.support.clamp(min=1)).sum(-1) / present.sum(-1)


def f1(counts: ClassCounts) -> Tensor:
    """F1 of each class, `2 hits / (support + predicted)`, `(..., num_classes)` in [0, 1]; 0 where there is neither."""
    return 2 * counts.hits.double() / (counts.support + counts.predicted).clamp(min=1)


def macro_f1(counts: ClassCounts) -> Tensor:
    """Mean F1 over the classes that have samples or are predicted, `(...)` in [0, 1]."""
    return f1(counts).sum(-1) / (counts.support + counts.predicted > 0).sum(-1)


def true_class_ranks(scores: Tensor, references: Tensor) -> Tensor:
    """How many classes are rated above the right one: `(n,)` int64, 0 for the best; k or more misses the top k.

    Of equal scores the lower class number is rated higher, so that a constant classifier is not always right.

    Args:
        scores: `(n, num_classes)`, finite; logits or probabilities.
        references: `(n,)` integers >= 0; a class without a column is rated below all others.

    Raises:
        InputError: Shapes do not match, or a score is not finite.
    """
    if scores.ndim != 2 or 0 in scores.shape or references.shape != scores.shape[:1]:
        raise InputError(
            f"`scores` has shape {tuple(scores.shape)} and `references` {tuple(references.shape)}; give "
            "(n, num_classes) and (n,), with at least one sample."
        )
    if not torch.isfinite(scores).all():
        raise InputError("`scores` holds NaN or infinity; look at the classifier's weights.")
    num_classes = scores.shape[1]
    known = references < num_classes
    column = references.clamp(max=num_classes - 1)[:, None]
    right = scores.gather(1, column)
    above = (scores > right) | ((scores == right) & (torch.arange(num_classes, device=scores.device) < column))
    return torch.where(known, above.sum(1), num_classes)


def top_k_accuracy(scores: Tensor, references: Tensor, k: int) -> float:
    """Share of the samples whose class is among the k rated highest, in [0, 1]; see [`true_class_ranks`].

    Raises:
        InputError: As [`true_class_ranks`], or k is not in [1, num_classes].
    """
    ranks = true_class_ranks(scores, references)
    if not 1 <= k <= scores.shape[1]:
        raise InputError(f"`k` is {k}; give a number from 1 to {scores.shape[1]}, the number of classes.")
    return (ranks < k).double().mean().item()


__all__ = [
    "ClassCounts",
    "accuracy",
    "class_counts",
    "f1",
    "macro_f1",
    "mean_per_class_accuracy",
    "top_k_accuracy",
    "true_class_ranks",
]
