# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The fast linear probe: multinomial logistic regression on frozen, standardised features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from clmae.configuration.errors import InputError
from clmae.evaluation.labels import check_inputs, stratified_part

# L2 weights beside the mean loss. scikit-learn's C is 1 / (n * l2) from three classes on; with two it writes one
# weight vector instead of two opposite ones, and its C is 2 / (n * l2).
L2_GRID = tuple(10.0**exponent for exponent in range(1, -7, -1))
VALIDATION_SHARE = 0.2
MAX_ITER = 500
CHOICE_TOLERANCE = 1e-4  # of the fits that choose the L2 weight: enough for accuracies, and far fewer iterations
TOP_K = 5


@dataclass(frozen=True)
class LinearProbeResult:
    """Result of [`linear_probe`].

    Attributes:
        accuracy: Top-1 on the test set, in [0, 1].
        l2: The L2 weight chosen.
        validation_accuracies: Top-1 on the held-out part of the training set for each L2 weight, in [0, 1].
        top_classes: The (up to) five likeliest classes of the test samples, the best first, `(m, k)` int64 on the CPU,
            as `train_labels` numbers them.
    """

    accuracy: float
    l2: float
    validation_accuracies: dict[float, float]
    top_classes: Tensor = field(repr=False, compare=False)


class LogisticRegression(NamedTuple):
    """Logits are `features @ weight + bias`: `weight` `(d, num_classes)`, `bias` `(num_classes,)`, both float64."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Logits `(n, num_classes)` of features `(n, d)`, in their precision."""
        return features @ self.weight.to(features.dtype) + self.bias.to(features.dtype)


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    l2_grid: Sequence[float] = L2_GRID,
    validation_share: float = VALIDATION_SHARE,
    seed: int = 0,
    max_iter: int = MAX_ITER,
) -> LinearProbeResult:
    """Accuracy of a linear classifier on frozen features; the L2 weight is chosen without the test set.

    A stratified part of the training set is held out; the classifier is fitted on the rest for each L2 weight, from
    the strongest to the weakest, each starting at the one before; the weight with the best held-out accuracy, of equal
    ones that with the least held-out cross-entropy, is then used to fit all of the training set. Features are
    standardised by the mean and standard deviation of the part that is fitted.

    Args:
        train_features: `(n, d)`, real numbers; computed with in float32 on their device.
        train_labels: `(n,)` integers >= 0; at least two classes, at least two samples of each.
        test_features, test_labels: `(m, d)` and `(m,)`; a class that the training set lacks counts as an error.
        l2_grid: Candidates, above 0: weights of `|W|^2 / 2` beside the mean cross-entropy.
        validation_share: Share of each class that is held out, in (0, 1); at least one sample, and not all.
        seed: Of the split.
        max_iter: Most L-BFGS iterations for one candidate.

    Raises:
        InputError: Shapes do not match, features are not finite, labels are missing or too few, or an option is out
            of range.
    """
    check_inputs(train_features, train_labels, test_features, test_labels)
    l2_grid = check_l2_grid(l2_grid)
    if not 0 < validation_share < 1:
        raise InputError(f"`validation_share` is {validation_share}; give a number between 0 and 1.")
    device = train_features.device
    train, test = train_features.float(), test_features.to(device, torch.float32)
    # Classes need not be numbered without gaps.
    classes, labels, sizes = torch.unique(train_labels.to(device), return_inverse=True, return_counts=True)
    if (sizes == 1).any():
        raise InputError(
            f"`train_labels` holds classes with only one sample ({int((sizes == 1).sum())} of them); the choice of the "
            "L2 weight needs two of each class: give more samples, or leave these classes out."
        )
    held_out = stratified_part(labels, validation_share, seed).to(device)
    l2, accuracies, model = choose_l2(train, labels, [held_out], l2_grid, max_iter)
    train, test = standardize(train, test)
    # The classifier of a part is nearly that of all: from zero, a weak L2 weight takes far more iterations.
    model = next(regularization_path(train, labels, [l2], max_iter=max_iter, start=model))
    top_classes = classes[model.logits(test).topk(min(TOP_K, len(classes)), dim=1).indices].cpu()
    accuracy = (top_classes[:, 0] == test_labels.cpu()).double().mean().item()
    return LinearProbeResult(accuracy, l2, accuracies, top_classes)


def regularization_path(
    features: Tensor,
    labels: Tensor,
    l2_weights: Sequence[float],
    *,
    max_iter: int = MAX_ITER,
    tolerance: float = 1e-5,
    start: LogisticRegression | None = None,
) -> Iterator[LogisticRegression]:
    """Minimisers of `mean cross-entropy + l2 / 2 * |weight|^2` (the bias is free) for each L2 weight, by L-BFGS.

    Each fit starts at the one before, the first at `start` or zero; it stops after `max_iter` iterations, or when no
    component of the (preconditioned) gradient is above `tolerance`. scikit-learn's solver has the same optimum, but
    works on CPUs alone, and is not faster there (50,000 samples of 384 features in 200 classes).

    Args:
        features: `(n, d)`, centred (best standardised), float32 or float64, on any device.
        labels: `(n,)`, classes from 0; InputError if there is one only.
    """
    if len(labels.unique()) < 2:
        raise InputError("`train_labels` holds one class only; give at least two.")
    # Features of encoders, and pixels more so, are strongly correlated, and plain L-BFGS then needs thousands of
    # steps. In the eigenbasis of their covariance, each coordinate scaled by about the Hessian's size at the start, it
    # needs tens. The optimum is the same: a rotation changes neither logits nor penalty.
    variances, basis = _principal_axes(features)
    rotated, num_classes = features @ basis, int(labels.max()) + 1
    basis = basis.double()
    if start is None:
        model = LogisticRegression(basis.new_zeros(basis.shape[1], num_classes), basis.new_zeros(num_classes))
    else:
        model = LogisticRegression(basis.T @ start.weight, start.bias)
    for l2 in l2_weights:
        probabilities = model.logits(rotated).softmax(1)
        scales = (variances * (probabilities * (1 - probabilities)).mean() + l2).sqrt()
        model = _minimize(rotated, labels, l2, scales, model, {"maxiter": max_iter, "gtol": tolerance})
        yield LogisticRegression(basis @ model.weight, model.bias)


def _principal_axes(features: Tensor) -> tuple[Tensor, Tensor]:
    """Variances `(r, 1)` float64 and axes `(d, r)` of centred features; with fewer samples than columns r is n.

    Then the axes span the samples, outside of which the penalty leaves no weight.
    """
    if len(features) < features.shape[1]:
        _, singular_values, axes = torch.linalg.svd(features, full_matrices=False)
        variances, basis = singular_values.square() / len(features), axes.T
    else:
        variances, basis = torch.linalg.eigh(features.T @ features / len(features))
    return variances.double().clamp(min=0)[:, None], basis


def _minimize(
    features: Tensor, labels: Tensor, l2: float, scales: Tensor, start: LogisticRegression, options: dict[str, Any]
) -> LogisticRegression:
    """scipy's L-BFGS over `scales * weight` and the bias, its steps in float64 and the loss on the features' device."""

    def unpack(flat: np.ndarray) -> LogisticRegression:
        rows = torch.from_numpy(flat).to(scales.device).view(-1, len(start.bias))
        return LogisticRegression(rows[:-1] / scales, rows[-1])

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        model = LogisticRegression(*(part.requires_grad_() for part in unpack(flat)))
        with torch.enable_grad():
            loss = F.cross_entropy(model.logits(features), labels).double() + l2 / 2 * model.weight.square().sum()
        weight, bias = torch.autograd.grad(loss, model)
        return loss.item(), torch.cat([weight / scales, bias[None]]).flatten().cpu().numpy()

    flat = torch.cat([scales * start.weight, start.bias[None]]).flatten().cpu().numpy()
    # Where rounding hides every further decrease, a longer line search would not find one.
    options = {"ftol": 1e-14, "maxls": 10, **options}
    return unpack(minimize(objective, flat, jac=True, method="L-BFGS-B", options=options).x)


def standardize(train: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Each column shifted and scaled so that `train`'s has mean 0 and standard deviation 1; `(n, d)` float32 each.

    A column that is constant in `train`, up to float32's rounding, becomes 0 everywhere.
    """
    mean = train.mean(0, dtype=torch.float64).float()
    deviation = torch.linalg.vector_norm(train.float() - mean, dim=0, dtype=torch.float64) / len(train) ** 0.5
    divisor = torch.where(deviation <= 1e-6 * mean.abs(), torch.inf, deviation).float()
    return tuple((part.float() - mean) / divisor for part in (train, *others))


def check_l2_grid(l2_grid: Sequence[float]) -> list[float]:
    """The candidates, the strongest first; InputError unless there are some, all above 0."""
    if not l2_grid or not min(l2_grid) > 0:
        raise InputError(f"`l2_grid` is {tuple(l2_grid)}; give numbers above 0.")
    return sorted(set(l2_grid), reverse=True)


def choose_l2(
    features: Tensor, labels: Tensor, folds: Sequence[Tensor], l2_grid: Sequence[float], max_iter: int
) -> tuple[float, dict[float, float], LogisticRegression]:
    """The L2 weight that is most often right on what was held out, of equal ones that of the least cross-entropy.

    On few images many weights have one accuracy, and the strongest of them may hardly tell the classes apart: its
    nearly equal logits are then ordered by rounding, which differs between processors.

    Args:
        features: `(n, d)`, as they are; standardised by what is not held out.
        labels: `(n,)`, classes from 0 without gaps; each has samples that are not held out.
        folds: What is held out, each `(n,)` bool.
        l2_grid, max_iter: As in [`regularization_path`], from the strongest to the weakest.

    Returns:
        The weight, the held-out accuracy of each weight, and the classifier that the best one gave on the last fold.
    """
    correct, loss, models = dict.fromkeys(l2_grid, 0), dict.fromkeys(l2_grid, 0.0), {}
    for held_out in folds:
        train, validation = standardize(features[~held_out], features[held_out])
        path = regularization_path(train, labels[~held_out], l2_grid, max_iter=max_iter, tolerance=CHOICE_TOLERANCE)
        for l2, model in zip(l2_grid, path, strict=True):
            logits = model.logits(validation)
            correct[l2] += int((logits.argmax(1) == labels[held_out]).sum())
            loss[l2] += F.cross_entropy(logits, labels[held_out], reduction="sum").item()
            models[l2] = model
    best = max(l2_grid, key=lambda l2: (correct[l2], -loss[l2], l2))
    size = sum(int(held_out.sum()) for held_out in folds)
    return best, {l2: correct[l2] / size for l2 in l2_grid}, models[best]
