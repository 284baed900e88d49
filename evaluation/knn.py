# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""k-nearest-neighbour classification of frozen features, in the field's usual definition and in CL-MAE's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clmae.configuration.errors import InputError
from clmae.evaluation.features import check_labelled, check_same_width

KS = (5, 10, 20)
TEMPERATURE = 0.07
EUCLIDEAN_K = 5  # CL-MAE's
CHUNK_SIZE = 256  # queries at a time


@dataclass(frozen=True)
class EuclideanKNNResult:
    """Accuracies in [0, 1] of [`knn_euclidean_accuracy`].

    Attributes:
        majority: Share of the queries whose class is the majority among their k neighbours.
        any_correct: Share of the queries of which at least one of the k neighbours has the right class.
    """

    majority: float
    any_correct: float


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    num_classes: int | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> dict[int, Tensor]:
    """Classes of the queries by weighted votes of their most similar references.

    A reference at cosine similarity `s` votes with weight `exp(s / temperature)`. Of classes with equal votes, the one
    with the most similar reference wins.

    Args:
        train_features: References, `(n, d)`, real numbers; compared in float32 on their device.
        train_labels: Their classes, `(n,)`, integers >= 0.
        test_features: Queries, `(m, d)`; moved to the references' device chunk by chunk.
        ks: Numbers of neighbours, each in [1, n]; all are answered by one search.
        temperature: Above 0; the lower, the more the nearest neighbours decide.
        num_classes: Classes there are; one more than the largest of `train_labels` if not given.
        chunk_size: Queries at a time: memory is `chunk_size * n` similarities.

    Returns:
        For each k, the predicted classes, `(m,)` int64 on the references' device.

    Raises:
        InputError: Shapes do not match, features are not finite, labels are not classes, or an option is out of range.
    """
    ks = _check(train_features, train_labels, test_features, ks, chunk_size)
    if not temperature > 0:
        raise InputError(f"`temperature` is {temperature}; give a number above 0.")
    most = int(train_labels.max())
    if num_classes is None:
        num_classes = most + 1
    elif num_classes <= most:
        raise InputError(
            f"`num_classes` is {num_classes}, but `train_labels` holds class {most}; give at least {most + 1}."
        )
    references = F.normalize(train_features.float(), dim=1)
    labels = train_labels.to(references.device, torch.int64)
    predictions: dict[int, list[Tensor]] = {k: [] for k in ks}
    for queries in _chunks(test_features, chunk_size, references.device):
        similarity, nearest = (F.normalize(queries, dim=1) @ references.T).topk(max(ks), dim=1)
        # Relative to the nearest neighbour, which changes no comparison and cannot overflow at low temperatures.
        weights = torch.exp((similarity - similarity[:, :1]) / temperature)
        for k in ks:
            predictions[k].append(_vote(labels[nearest[:, :k]], weights[:, :k], num_classes))
    return {k: torch.cat(parts) for k, parts in predictions.items()}


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    num_classes: int | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> dict[int, float]:
    """Top-1 accuracy in [0, 1] for each k of [`knn_predict`], which explains the arguments.

    `test_labels` `(m,)` are the queries' classes; one that no reference has counts as an error.

    Raises:
        InputError: As [`knn_predict`], or `test_labels` does not match `test_features`.
    """
    check_labelled("test", test_features, test_labels)
    predictions = knn_predict(
        train_features,
        train_labels,
        test_features,
        ks=ks,
        temperature=temperature,
        num_classes=num_classes,
        chunk_size=chunk_size,
    )
    return {k: (found == test_labels.to(found.device)).double().mean().item() for k, found in predictions.items()}


def knn_euclidean_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = EUCLIDEAN_K,
    chunk_size: int = CHUNK_SIZE,
) -> EuclideanKNNResult:
    """CL-MAE's nearest-neighbour protocol: Euclidean distance, every one of the k neighbours with the same vote.

    Of classes with equally many votes, the one with the nearest neighbour wins. Arguments as for [`knn_accuracy`].

    Raises:
        InputError: As [`knn_accuracy`].
    """
    check_labelled("test", test_features, test_labels)
    _check(train_features, train_labels, test_features, (k,), chunk_size)
    # Distances do not change with the origin; one amid the references keeps the products below small, and so precise.
    origin = train_features.mean(0, dtype=torch.float32)
    references = train_features.float() - origin
    # |q - r|^2 = |q|^2 - 2 (q.r - |r|^2 / 2): the nearest reference has the largest bracket.
    half_norms = references.square().sum(1) / 2
    labels = train_labels.to(references.device, torch.int64)
    num_classes = int(train_labels.max()) + 1
    majority = any_correct = 0
    for queries, truth in zip(
        _chunks(test_features, chunk_size, references.device), test_labels.split(chunk_size), strict=True
    ):
        truth = truth.to(references.device)
        nearest = torch.addmm(-half_norms, queries - origin, references.T).topk(k, dim=1).indices
        neighbours = labels[nearest]
        majority += (_vote(neighbours, torch.ones_like(neighbours, dtype=torch.float32), num_classes) == truth).sum()
        any_correct += (neighbours == truth[:, None]).any(1).sum()
    return EuclideanKNNResult(int(majority) / len(test_labels), int(any_correct) / len(test_labels))


def _vote(neighbours: Tensor, weights: Tensor, num_classes: int) -> Tensor:
    """Class with the largest sum of weights; `neighbours` and `weights` `(c, k)`, the nearest first; gives `(c,)`."""
    votes = weights.new_zeros(len(neighbours), num_classes).scatter_add_(1, neighbours, weights)
    own = votes.gather(1, neighbours)
    # The first neighbour whose class has the most votes: the nearest one settles ties, on every device alike.
    rank = torch.arange(neighbours.shape[1], 0, -1, device=own.device)
    winner = ((own == own.amax(1, keepdim=True)) * rank).argmax(1, keepdim=True)
    return neighbours.gather(1, winner)[:, 0]


def _chunks(features: Tensor, chunk_size: int, device: torch.device) -> Iterator[Tensor]:
    for chunk in features.split(chunk_size):
        yield chunk.to(device, torch.float32)


def _check(train: Tensor, labels: Tensor, test: Tensor, ks: Sequence[int], chunk_size: int) -> tuple[int, ...]:
    check_labelled("train", train, labels)
    check_same_width(train, test)
    if not ks or min(ks) < 1 or max(ks) > len(train):
        raise InputError(
            f"`k` is {', '.join(map(str, ks)) or 'empty'}; give numbers from 1 to {len(train)}, the number of "
            "references."
        )
    if chunk_size < 1:
        raise InputError(f"`chunk_size` is {chunk_size}; give 1 or more.")
    return tuple(ks)


__all__ = ["EuclideanKNNResult", "knn_accuracy", "knn_euclidean_accuracy", "knn_predict"]
