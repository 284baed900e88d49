# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Few-shot probe: the fast linear probe with a handful of labelled images per class, over several draws of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clmae.configuration.errors import InputError
from clmae.evaluation.labels import check_inputs, random_ranks
from clmae.evaluation.linear import L2_GRID, MAX_ITER, check_l2_grid, choose_l2, regularization_path, standardize
from clmae.training.data.sources import check_count

SHOTS = (1, 2, 4, 8, 16)
FEW_SHOT_L2_GRID = L2_GRID[:5]  # a few images are always separated: weaker weights change little and take long
NUM_DRAWS = 5
NUM_FOLDS = 5
ONE_SHOT_L2 = 0.1  # with one image per class there is nothing to choose by, and the L2 weight hardly matters


@dataclass(frozen=True)
class FewShotResult:
    """Result of [`few_shot_probe`]; all by the number of images per class.

    Attributes:
        accuracies: Top-1 on the test set for each draw, in [0, 1].
        l2: The L2 weight for each draw.
        seeds: Of the draws, the same for all numbers.
        skipped: Numbers that the smallest class does not have.
        correct: Share of the draws that got each test sample right, `(m,)` float64 in [0, 1].
    """

    accuracies: dict[int, list[float]]
    l2: dict[int, list[float]]
    seeds: list[int]
    skipped: list[int]
    correct: dict[int, Tensor] = field(repr=False, compare=False)


def few_shot_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    shots: Sequence[int] = SHOTS,
    num_draws: int = NUM_DRAWS,
    l2_grid: Sequence[float] = FEW_SHOT_L2_GRID,
    one_shot_l2: float = ONE_SHOT_L2,
    seed: int = 0,
    max_iter: int = MAX_ITER,
) -> FewShotResult:
    """Accuracy of linear classifiers that saw n labelled images of each class, on all of the test set.

    Nothing but the images drawn is learnt from: they give the standardisation of the features, and the L2 weight by
    cross-validation among them (at most 5 parts, each with images of every class), chosen as in [`linear_probe`]. With
    n = 1 nothing can be left out, and the weight is `one_shot_l2`. The draws of one seed are nested: 4 images are those
    2 and two more.

    Args:
        train_features, train_labels, test_features, test_labels: As for [`linear_probe`].
        shots: Numbers of images per class, each >= 1; what the smallest class does not have is skipped.
        num_draws: How often images are drawn, with seeds `seed`, `seed + 1` ...
        l2_grid, max_iter: As for [`linear_probe`].
        one_shot_l2: L2 weight for n = 1, above 0.
        seed: Of the first draw.

    Raises:
        InputError: As [`linear_probe`], or no class is large enough for any of `shots`.
    """
    check_inputs(train_features, train_labels, test_features, test_labels)
    l2_grid = check_l2_grid(l2_grid)
    if not one_shot_l2 > 0:
        raise InputError(f"`one_shot_l2` is {one_shot_l2}; give a number above 0.")
    check_count("num_draws", num_draws)
    device = train_features.device
    classes, labels = torch.unique(train_labels.to(device), return_inverse=True)
    possible = _possible_shots(shots, smallest_class=int(labels.bincount().min()))
    test, truth = test_features.to(device, torch.float32), test_labels.to(device)
    seeds = [seed + draw for draw in range(num_draws)]
    accuracies: dict[int, list[float]] = {n: [] for n in possible}
    weights: dict[int, list[float]] = {n: [] for n in possible}
    correct = {n: torch.zeros(len(truth), dtype=torch.float64) for n in possible}
    for draw_seed in seeds:
        ranks = random_ranks(labels.cpu(), draw_seed).to(device)
        for n in possible:
            drawn = ranks < n
            features, drawn_labels = train_features[drawn].float(), labels[drawn]
            l2, num_folds = one_shot_l2, min(n, NUM_FOLDS)
            if n > 1:
                folds = [ranks[drawn] % num_folds == fold for fold in range(num_folds)]
                l2, _, _ = choose_l2(features, drawn_labels, folds, l2_grid, max_iter)
            features, queries = standardize(features, test)
            model = next(regularization_path(features, drawn_labels, [l2], max_iter=max_iter))
            is_right = (classes[model.logits(queries).argmax(1)] == truth).double().cpu()
            accuracies[n].append(is_right.mean().item())
            weights[n].append(l2)
            correct[n] += is_right / num_draws
    return FewShotResult(accuracies, weights, seeds, [n for n in shots if n not in possible], correct)


def _possible_shots(shots: Sequence[int], smallest_class: int) -> list[int]:
    """Those that every class has, in order."""
    if not shots or min(shots) < 1:
        raise InputError(f"`shots` is {tuple(shots)}; give numbers of images per class, 1 or more.")
    possible = sorted({n for n in shots if n <= smallest_class})
    if not possible:
        raise InputError(
            f"`shots` is {tuple(shots)}, but the smallest class has {smallest_class} training images; give at most "
            "that many, or leave out that class."
        )
    return possible
