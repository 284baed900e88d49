# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""k-NN against answers worked out by hand, and against plain loops in float64."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch

from clmae.evaluation.knn import knn_euclidean_accuracy, knn_predict


def on_circle(*degrees: float) -> torch.Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def random_data(classes: int = 4):
    generator = torch.Generator().manual_seed(3)
    train, test = (torch.randn(n, 6, generator=generator) for n in (60, 25))
    train_labels, test_labels = (torch.randint(classes, (n,), generator=generator) for n in (60, 25))
    return train, train_labels, test, test_labels


def loop_vote(order: list[int], weights: list[float], labels: list[int]) -> int:
    votes = defaultdict(float)
    for i in order:
        votes[labels[i]] += weights[i]
    return max(votes, key=votes.get)  # the first of equals: dicts keep the order of the neighbours


def test_weights_by_hand():
    # Similarities 1, 1/2, 1/2. T = 1: e^1 = 2.72 for class 0 against 2 e^0.5 = 3.30; T = 1/2: e^2 = 7.39 against 5.44.
    train, labels, query = on_circle(0, 60, -60), torch.tensor([0, 1, 1]), on_circle(0)
    assert knn_predict(train, labels, query, ks=(1, 3), temperature=1.0) == {1: 0, 3: 1}
    assert knn_predict(train, labels, query, ks=(1, 3), temperature=0.5) == {1: 0, 3: 0}


def test_cosine_ignores_length_and_euclid_does_not():
    train, labels = torch.tensor([[10.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    query = torch.tensor([[1.0, 0.5]])
    assert knn_predict(train, labels, query, ks=(1,))[1] == 0
    assert knn_euclidean_accuracy(train, labels, query, torch.tensor([1]), k=1).majority == 1.0


def test_euclidean_by_hand():
    # Neighbours of 0 by distance: classes 2, 1, 1, 2, 0. Classes 1 and 2 have two votes each; the nearest is of 2.
    train = torch.tensor([[1.0], [-2.0], [3.0], [-4.0], [5.0], [60.0]])
    labels = torch.tensor([2, 1, 1, 2, 0, 3])
    query = torch.zeros(1, 1)
    for truth, majority, any_correct in ((2, 1, 1), (1, 0, 1), (0, 0, 1), (3, 0, 0)):
        result = knn_euclidean_accuracy(train, labels, query, torch.tensor([truth]))
        assert (result.majority, result.any_correct) == (majority, any_correct), truth


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_cosine_equals_plain_loops(chunk_size):
    train, train_labels, test, _ = random_data()
    found = knn_predict(train, train_labels, test, ks=(5, 10, 20), temperature=0.3, chunk_size=chunk_size)
    train, test, labels = train.double().tolist(), test.double().tolist(), train_labels.tolist()
    for q, query in enumerate(test):
        similarity = [
            sum(map(math.prod, zip(query, x, strict=True))) / math.hypot(*query) / math.hypot(*x) for x in train
        ]
        order = sorted(range(len(train)), key=lambda i: -similarity[i])
        weights = [math.exp(s / 0.3) for s in similarity]
        for k in (5, 10, 20):
            assert found[k][q] == loop_vote(order[:k], weights, labels)


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("offset", [0.0, 1000.0])  # far from the origin, |q|^2 - 2 q.r + |r|^2 would cancel away
def test_euclidean_equals_plain_loops(chunk_size, offset):
    train, train_labels, test, test_labels = random_data(classes=2)
    train, test = train + offset, test + offset
    result = knn_euclidean_accuracy(train, train_labels, test, test_labels, chunk_size=chunk_size)
    labels, majority, any_correct = train_labels.tolist(), 0, 0
    for query, truth in zip(test.double().tolist(), test_labels.tolist(), strict=True):
        order = sorted(range(len(labels)), key=lambda i: math.dist(query, train[i].double().tolist()))[:5]
        majority += loop_vote(order, [1.0] * len(labels), labels) == truth
        any_correct += truth in [labels[i] for i in order]
    assert (result.majority, result.any_correct) == (majority / 25, any_correct / 25)


def test_ties_go_to_the_nearest():
    # Weights at a high temperature are all equal in float32: two votes each, and the nearest is of the higher class.
    train, labels = on_circle(1, 2, 3, 4), torch.tensor([3, 1, 1, 3])
    assert knn_predict(train, labels, on_circle(0), ks=(4,), temperature=1e9)[4] == 3


def test_low_temperature_does_not_overflow():
    train, labels = on_circle(0, 5, 6), torch.tensor([1, 0, 0])
    assert knn_predict(train, labels, on_circle(0), ks=(3,), temperature=1e-4)[3] == 1


def test_half_precision_features_are_compared_in_float32():
    train, labels, test, _ = random_data()
    train, test = train.bfloat16(), test.bfloat16()
    rough, exact = (knn_predict(*data)[20] for data in ((train, labels, test), (train.float(), labels, test.float())))
    assert torch.equal(rough, exact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ks=(5, 61)), "`k` is 5, 61; give numbers from 1 to 60"),
        (dict(ks=(0,)), "`k` is 0"),
        (dict(ks=()), "`k` is empty"),
        (dict(temperature=0.0), "`temperature` is 0.0"),
        (dict(chunk_size=0), "`chunk_size` is 0"),
        (dict(train_labels=torch.zeros(59, dtype=torch.long)), "one label for each of 60 samples"),
        (dict(train_labels=torch.zeros(60)), "`train_labels` must hold class numbers"),
        (dict(test_features=torch.zeros(25, 5)), "`test_features` is 5 wide and `train_features` 6"),
        (dict(test_features=torch.full((25, 6), torch.nan)), "`test_features` holds NaN"),
        (dict(train_features=torch.zeros(0, 6)), r"`train_features` has shape \(0, 6\)"),
    ],
)
def test_bad_input(change, message):
    names = ("train_features", "train_labels", "test_features")
    with pytest.raises(ValueError, match=message):
        knn_predict(**{**dict(zip(names, random_data(), strict=False)), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=61), "`k` is 61; give numbers from 1 to 60"),
        (dict(test_labels=torch.full((25,), -1)), "`test_labels` must hold class numbers"),
    ],
)
def test_euclidean_bad_input(change, message):
    names = ("train_features", "train_labels", "test_features", "test_labels")
    with pytest.raises(ValueError, match=message):
        knn_euclidean_accuracy(**{**dict(zip(names, random_data(), strict=True)), **change})
