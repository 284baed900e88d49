# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The few-shot probe against an answer worked out by hand, and against scikit-learn on the images drawn."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from clmae.evaluation.fewshot import ONE_SHOT_L2, few_shot_probe
from clmae.evaluation.labels import random_ranks
from clmae.evaluation.linear import choose_l2, standardize


def clouds(n: int, classes: int = 3, d: int = 5, spread: float = 1.0, seed: int = 0):
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(9))
    return centres[labels] + spread * torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), labels


def test_one_image_of_each_of_two_classes_by_hand():
    # All images of a class are alike, so every draw is {-1, 3} with mean 1: left of 1 is class 4, right of it class 7.
    train, labels = torch.tensor([[-1.0], [3.0]]).repeat(6, 1), torch.tensor([4, 7]).repeat(6)
    test, truth = torch.tensor([[0.9], [1.1], [-5.0], [9.0], [0.0]]), torch.tensor([4, 7, 4, 4, 7])
    result = few_shot_probe(train, labels, test, truth, shots=(1, 2), num_draws=3)
    assert result.accuracies == {1: [0.6] * 3, 2: [0.6] * 3}
    assert result.correct[1].tolist() == [1, 1, 1, 0, 0]
    assert result.l2[1] == [ONE_SHOT_L2] * 3


@pytest.mark.slow
def test_it_is_logistic_regression_on_the_images_drawn():
    (train, labels), (test, truth) = clouds(90), clouds(60, seed=1)
    options = dict(shots=(1, 8), num_draws=3, seed=4, l2_grid=(1.0, 0.1, 0.01))
    result = few_shot_probe(train, labels, test, truth, **options)
    assert result.seeds == [4, 5, 6]
    for i, seed in enumerate(result.seeds):
        for n in (1, 8):
            drawn = random_ranks(labels, seed) < n
            assert labels[drawn].bincount().tolist() == [n] * 3
            own, queries = standardize(train[drawn], test)
            model = LogisticRegression(C=1 / (3 * n * result.l2[n][i]), tol=1e-10, max_iter=5000)
            model.fit(own.double().numpy(), labels[drawn].numpy())
            assert result.accuracies[n][i] == pytest.approx(model.score(queries.double().numpy(), truth.numpy()))
    assert len(set(result.accuracies[1])) > 1  # other seeds, other images
    assert sum(result.accuracies[1]) / 3 == pytest.approx(result.correct[1].mean().item())
    assert few_shot_probe(train, labels, test, truth, **options) == result


def test_choice_by_cross_validation():
    features, labels = clouds(12, spread=1.5)
    ranks, grid = random_ranks(labels, 0), [10.0, 0.1, 1e-4]
    right = {}
    for l2 in grid:
        right[l2] = 0
        for fold in range(4):
            held_out = ranks == fold
            own, rest = standardize(features[~held_out], features[held_out])
            model = LogisticRegression(C=1 / (9 * l2), tol=1e-10, max_iter=5000).fit(own.numpy(), labels[~held_out])
            right[l2] += int((model.predict(rest.numpy()) == labels[held_out].numpy()).sum())
    assert len(set(right.values())) > 1
    best, accuracies, _ = choose_l2(features, labels, [ranks == fold for fold in range(4)], grid, max_iter=500)
    assert best == max(grid, key=lambda l2: (right[l2], l2))
    assert accuracies == {l2: count / 12 for l2, count in right.items()}


@pytest.mark.slow
def test_choice_ignores_the_test_set():
    (train, labels), (test, truth) = clouds(60, spread=2.0), clouds(60, seed=1, spread=2.0)
    result = few_shot_probe(train, labels, test, truth, shots=(4,), l2_grid=(1.0, 0.01))
    other = few_shot_probe(train, labels, -test, (truth + 1) % 3, shots=(4,), l2_grid=(1.0, 0.01))
    assert result.l2 == other.l2
    assert result.accuracies != other.accuracies


def test_numbers_that_the_smallest_class_lacks_are_skipped():
    train, labels = clouds(30)
    keep = torch.cat([torch.arange(3), torch.nonzero(labels != 2).flatten()[2:]])  # one image of class 2
    result = few_shot_probe(train[keep], labels[keep], train, labels, num_draws=2)
    assert list(result.accuracies) == [1]
    assert result.skipped == [2, 4, 8, 16]
    with pytest.raises(ValueError, match=r"`shots` is \(2, 4\), but the smallest class has 1 training images"):
        few_shot_probe(train[keep], labels[keep], train, labels, shots=(2, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(shots=()), r"`shots` is \(\)"),
        (dict(shots=(0, 1)), r"`shots` is \(0, 1\)"),
        (dict(num_draws=0), "`num_draws` is 0"),
        (dict(l2_grid=(0.0,)), "`l2_grid`"),
        (dict(one_shot_l2=-1.0), "`one_shot_l2` is -1.0"),
        (dict(train_labels=torch.zeros(30, dtype=torch.long)), "one class only"),
        (dict(test_features=torch.zeros(9, 4)), "is 4 wide and `train_features` 5"),
    ],
)
def test_bad_input(change, message):
    names = ("train_features", "train_labels", "test_features", "test_labels")
    with pytest.raises(ValueError, match=message):
        few_shot_probe(**{**dict(zip(names, (*clouds(30), *clouds(9)), strict=True)), **change})
