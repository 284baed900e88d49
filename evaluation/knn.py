# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""k-nearest-neighbour classification of frozen features, in the field's usual definition and in CL-MAE's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clmae.configuration.errors import InputError
from clmae.evaluation.labels import check_inputs
from clmae.training.data.sources import check_count

KS = (5, 10, 20)
TEMPERATURE = 0.07
EUCLIDEAN_K = 5  # CL-MAE's
CHUNK_SIZE = 256  # queries at a time


class EuclideanKNNResult(NamedTuple):
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
        chunk_size: Queries at a time: memory is `chunk_size * n` similarities.

    Returns:
        For each k, the predicted classes, `(m,)` int64 on the references' device.

    Raises:
        InputError: Shapes do not match, features are not finite, labels are not classes, or an option is out of range.
    """
    check_inputs(train_features, train_labels, test_features)
    if not temperature > 0:
        raise InputError(f"`temperature` is {temperature}; give a number above 0.")
    references = F.normalize(train_features.float(), dim=1)
    similarity, nearest = _search(
        references, test_features, ks, chunk_size, lambda queries: F.normalize(queries, dim=1) @ references.T
    )
    labels = train_labels.to(references.device, torch.int64)[nearest]
    # Relative to the nearest neighbour, which changes no comparison and cannot overflow at low temperatures.
    weights = torch.exp((similarity - similarity[:, :1]) / temperature)
    return {k: _vote(labels[:, :k], weights[:, :k], chunk_size) for k in ks}


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

    Of classes with equally many votes, the one with the nearest neighbour wins. Arguments as for [`knn_predict`];
    `test_labels` `(m,)` are the queries' classes, and one that no reference has counts as an error.

    Raises:
        InputError: As [`knn_predict`], or `test_labels` does not match `test_features`.
    """
    check_inputs(train_features, train_labels, test_features, test_labels)
    # Distances do not change with the origin; one amid the references keeps the products below small, and so precise.
    origin = train_features.mean(0, dtype=torch.float32)
    references = train_features.float() - origin
    # |q - r|^2 = |q|^2 - 2 (q.r - |r|^2 / 2): the nearest reference has the largest bracket.
    half_norms = references.square().sum(1) / 2
    _, nearest = _search(
        references, test_features, (k,), chunk_size, lambda q: torch.addmm(-half_norms, q - origin, references.T)
    )
    labels = train_labels.to(references.device, torch.int64)[nearest]
    truth = test_labels.to(references.device)
    majority = _vote(labels, torch.ones_like(labels), chunk_size) == truth
    any_correct = (labels == truth[:, None]).any(1)
    return EuclideanKNNResult(*(correct.double().mean().item() for correct in (majority, any_correct)))


def _search(
    references: Tensor, queries: Tensor, ks: Sequence[int], chunk_size: int, similarity: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Similarities and indices, both `(m, max(ks))`, of the references that are most similar to each query."""
    if not ks or min(ks) < 1 or max(ks) > len(references):
        raise InputError(
            f"`k` is {', '.join(map(str, ks)) or 'empty'}; give numbers from 1 to {len(references)}, the number of "
            "references."
        )
    check_count("chunk_size", chunk_size)
    chunks = (chunk.to(references.device, torch.float32) for chunk in queries.split(chunk_size))
    values, indices = zip(*(similarity(chunk).topk(max(ks), dim=1) for chunk in chunks), strict=True)
    return torch.cat(values), torch.cat(indices)


def _vote(neighbours: Tensor, weights: Tensor, chunk_size: int) -> Tensor:
    """Class with the largest sum of weights; `neighbours` and `weights` `(m, k)`, the nearest first; gives `(m,)`."""
    chunks = zip(neighbours.split(chunk_size), weights.split(chunk_size), strict=True)
    return torch.cat([_vote_of_chunk(*chunk) for chunk in chunks])


def _vote_of_chunk(neighbours: Tensor, weights: Tensor) -> Tensor:
    same = neighbours[:, :, None] == neighbours[:, None, :]
    votes = (same * weights[:, None, :]).sum(2)  # of each neighbour's class
    # The first neighbour whose class has the most votes: the nearest one settles ties, on every device alike.
    rank = torch.arange(neighbours.shape[1], 0, -1, device=votes.device)
    winner = ((votes == votes.amax(1, keepdim=True)) * rank).argmax(1, keepdim=True)
    return neighbours.gather(1, winner)[:, 0]
