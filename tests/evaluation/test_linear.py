# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The fast linear probe against scikit-learn's logistic regression, and its choice of the L2 weight."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression as SklearnLogisticRegression

from clmae.evaluation.linear import (
    linear_probe,
    regularization_path,
    standardize,
    stratified_part,
)


def blobs(n: int = 300, d: int = 8, classes: int = 4, spread: float = 1.0, seed: int = 0):
    """Overlapping clouds, their columns strongly correlated."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(9))
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(8)) * 0.5 ** torch.arange(d)[:, None]
    return (centres[labels] + spread * torch.randn(n, d, generator=generator)) @ mixing, labels


def sklearn_fit(features, labels, l2):
    # It minimises C * (sum of the losses) + |W|^2 / 2.
    return SklearnLogisticRegression(C=1 / (len(labels) * l2), solver="newton-cg", tol=1e-12, max_iter=1000).fit(
        features.double().numpy(), labels.numpy()
    )


def fit(features, labels, l2, tolerance=1e-5):
    return next(regularization_path(features, labels, [l2], tolerance=tolerance))


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize(("dtype", "tolerance", "bound"), [(torch.float64, 1e-8, 1e-6), (torch.float32, 1e-5, 1e-3)])
def test_same_optimum_as_scikit_learn(l2, dtype, tolerance, bound):
    features, labels = blobs()
    (features,) = standardize(features)
    ours = fit(features.to(dtype), labels, l2, tolerance=tolerance)
    theirs = sklearn_fit(features, labels, l2)
    probabilities = torch.from_numpy(theirs.predict_proba(features.double().numpy()))
    assert (ours.logits(features.to(dtype)).softmax(1) - probabilities).abs().max() < bound
    coefficients = torch.from_numpy(theirs.coef_.T)
    assert (ours.weight - coefficients).abs().max() < bound * coefficients.abs().max()

    def loss(weight, bias):
        logits = features.double() @ weight + bias
        return torch.nn.functional.cross_entropy(logits, labels) + l2 / 2 * weight.square().sum()

    assert loss(ours.weight, ours.bias) <= loss(coefficients, torch.from_numpy(theirs.intercept_)) + bound**2 + 1e-12


def test_two_classes_as_scikit_learn():
    features, labels = blobs(classes=2)
    (features,) = standardize(features)
    ours = fit(features.double(), labels, 0.05, tolerance=1e-8)
    theirs = sklearn_fit(features, labels, 0.05 / 2)  # one vector v for our pair v / 2 and -v / 2
    torch.testing.assert_close(ours.weight[:, 1] - ours.weight[:, 0], torch.from_numpy(theirs.coef_[0]))


def test_gradient_vanishes_for_more_columns_than_samples():
    features, labels = blobs(n=20, d=64)
    (features,) = standardize(features)
    model = fit(features.double(), labels, 0.1)
    residual = model.logits(features.double()).softmax(1) - torch.nn.functional.one_hot(labels)
    gradient = features.double().T @ residual / 20 + 0.1 * model.weight
    assert gradient.abs().max() < 1e-4
    assert residual.mean(0).abs().max() < 1e-4


def test_path_does_not_depend_on_where_a_fit_starts():
    features, labels = blobs()
    (features,) = standardize(features)
    for l2, model in zip((1.0, 0.1, 0.01), regularization_path(features, labels, (1.0, 0.1, 0.01)), strict=True):
        alone = fit(features, labels, l2)
        torch.testing.assert_close(model.weight, alone.weight, atol=1e-3, rtol=1e-3)


def test_probe_is_its_parts_done_by_scikit_learn():
    (train, train_labels), (test, test_labels) = blobs(), blobs(n=100, seed=1)
    grid = (1.0, 0.01)
    result = linear_probe(train, train_labels, test, test_labels, l2_grid=grid, seed=5)
    held_out = stratified_part(train_labels, 0.2, 5)
    fitted, validation = standardize(train[~held_out], train[held_out])
    for l2 in grid:
        model = sklearn_fit(fitted, train_labels[~held_out], l2)
        expected = model.score(validation.double().numpy(), train_labels[held_out].numpy())
        assert result.validation_accuracies[l2] == pytest.approx(expected)
    assert result.l2 == max(grid, key=result.validation_accuracies.get)
    train, test = standardize(train, test)
    expected = sklearn_fit(train, train_labels, result.l2).score(test.double().numpy(), test_labels.numpy())
    assert result.accuracy == pytest.approx(expected)


def test_choice_ignores_the_test_set():
    (train, labels), (test, test_labels) = blobs(spread=2.0), blobs(n=100, seed=1, spread=2.0)
    result = linear_probe(train, labels, test, test_labels)
    other = linear_probe(train, labels, -test, (test_labels + 1) % 4)
    assert (result.l2, result.validation_accuracies) == (other.l2, other.validation_accuracies)
    assert result.accuracy != other.accuracy


def test_of_equally_accurate_candidates_that_of_the_least_loss_is_chosen():
    train, labels = blobs(spread=0.001)
    result = linear_probe(train, labels, train, labels, l2_grid=(1e-3, 1e-2, 1e-4))
    assert result.validation_accuracies == {1e-2: 1.0, 1e-3: 1.0, 1e-4: 1.0}
    assert result.l2 == 1e-4  # the classes are apart: the weaker the penalty, the surer
    assert result.accuracy == 1.0


def test_scale_and_constant_columns_do_not_matter():
    (train, labels), (test, test_labels) = blobs(spread=2.0), blobs(n=100, seed=1, spread=2.0)
    result = linear_probe(train, labels, test, test_labels)
    scales = 2.0 ** torch.tensor([-60, -20, -3, 0, 1, 7, 30, 60])  # powers of two: exact
    assert linear_probe(train * scales, labels, test * scales, test_labels) == result
    constant = torch.full((300, 1), 1e4 / 3)
    wider = linear_probe(torch.cat([train, constant], 1), labels, torch.cat([test, constant[:100] + 1], 1), test_labels)
    assert wider.accuracy == pytest.approx(result.accuracy, abs=0.011)
    assert wider.l2 == result.l2


def test_standardize():
    train = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    found = standardize(train, torch.tensor([[5.0, 9.0]]))
    torch.testing.assert_close(found[0], torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    torch.testing.assert_close(found[1], torch.tensor([[3.0, 0.0]]))


def test_classes_may_have_gaps():
    (train, labels), (test, test_labels) = blobs(), blobs(n=100, seed=1)
    result = linear_probe(train, labels, test, test_labels)
    assert linear_probe(train, 10 * labels + 3, test, 10 * test_labels + 3) == result
    unknown = linear_probe(train, labels, test, torch.full((100,), 99))
    assert unknown.accuracy == 0.0


def test_stratified_part():
    labels = torch.tensor([0] * 10 + [2] * 3 + [1] * 2 + [5] * 100)[torch.randperm(115)]
    mask = stratified_part(labels, 0.2, seed=0)
    assert {label: int(mask[labels == label].sum()) for label in (0, 1, 2, 5)} == {0: 2, 1: 1, 2: 1, 5: 20}
    assert torch.equal(mask, stratified_part(labels, 0.2, seed=0))
    assert not torch.equal(mask, stratified_part(labels, 0.2, seed=1))
    assert {label: int(stratified_part(labels, 0.99, 0)[labels == label].sum()) for label in (0, 1)} == {0: 9, 1: 1}


def test_draws_nothing_from_the_global_random_state():
    before = torch.get_rng_state()
    linear_probe(*blobs(), *blobs(n=10))
    assert torch.equal(before, torch.get_rng_state())


def test_works_under_no_grad():
    with torch.no_grad():
        assert linear_probe(*blobs(), *blobs(n=100, seed=1)).accuracy > 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(train_labels=torch.zeros(300, dtype=torch.long)), "one class only"),
        (dict(train_labels=torch.cat([torch.zeros(299), torch.ones(1)]).long()), "classes with only one sample"),
        (dict(train_labels=torch.arange(300) % 4 - 1), "`train_labels` must hold class numbers .*smallest -1"),
        (dict(train_labels=torch.arange(299) % 4), "one label for each of 300 samples"),
        (dict(test_labels=torch.arange(4)), "one label for each of 100 samples"),
        (dict(train_features=torch.full((300, 8), torch.nan)), "`train_features` holds NaN"),
        (dict(test_features=torch.full((100, 8), torch.inf)), "`test_features` holds NaN or infinity"),
        (dict(test_features=torch.zeros(100, 7)), "is 7 wide and `train_features` 8"),
        (dict(l2_grid=()), r"`l2_grid` is \(\)"),
        (dict(l2_grid=(1.0, 0.0)), r"`l2_grid` is \(1.0, 0.0\)"),
        (dict(validation_share=1.0), "`validation_share` is 1.0"),
    ],
)
def test_bad_input(change, message):
    names = ("train_features", "train_labels", "test_features", "test_labels")
    data = dict(zip(names, (*blobs(), *blobs(n=100, seed=1)), strict=True))
    with pytest.raises(ValueError, match=message):
        linear_probe(**{**data, **change})
