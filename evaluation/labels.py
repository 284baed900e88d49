# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Labels `(n,)`, integers >= 0: random parts of every class, and what every protocol asks of features and labels."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from clmae.configuration.errors import InputError
from clmae.training.data.sources import check_count


def random_ranks(labels: Tensor, seed: int) -> Tensor:
    """Place of each sample in a random order of its class, `(n,)` int64 from 0; `labels` `(n,)` on the CPU."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    places = pd.Series(order.argsort().numpy()).groupby(labels.numpy()).rank() - 1
    return torch.from_numpy(places.to_numpy("int64"))


def stratified_part(labels: Tensor, share: float, seed: int) -> Tensor:
    """A random part of every class: `(n,)` bool on the CPU, True for `round(share * size)` samples of each class.

    That is one sample at least, but nothing of a class that has only one. `share` is in (0, 1); the same seed gives the
    same part.
    """
    labels = labels.cpu()
    sizes = labels.bincount()
    counts = torch.minimum((sizes * share).round().long().clamp(min=1), (sizes - 1).clamp(min=0))
    return random_ranks(labels, seed) < counts[labels]


def label_subset(
    labels: Tensor, *, labels_per_class: int | None = None, label_fraction: float | None = None, seed: int = 0
) -> Tensor:
    """Ascending indices of a random part of every class; all samples if no size is given.

    Args:
        labels: `(n,)` int64, >= 0.
        labels_per_class: Exactly so many of each class that occurs.
        label_fraction: Such a share of each class, in (0, 1], rounded, one at least.
        seed: A larger part drawn with the same seed holds the smaller one.

    Raises:
        InputError: Both sizes are given, one is out of range, or a class has too few samples.
    """
    if labels_per_class is not None and label_fraction is not None:
        raise InputError(
            f"`labels_per_class` is {labels_per_class} and `label_fraction` {label_fraction}; give one of the two."
        )
    sizes = labels.bincount()
    if labels_per_class is not None:
        check_count("labels_per_class", labels_per_class)
        least = int(sizes[sizes > 0].min())
        if least < labels_per_class:
            raise InputError(
                f"`labels_per_class` is {labels_per_class}, but class {int((sizes == least).nonzero()[0])} has {least} "
                f"training images: give at most {least}."
            )
        counts = torch.full_like(sizes, labels_per_class)
    elif label_fraction is None:
        counts = sizes
    elif 0 < label_fraction <= 1:
        counts = (sizes * label_fraction).round().clamp(min=1)
    else:
        raise InputError(f"`label_fraction` is {label_fraction}; give a number in (0, 1].")
    return (random_ranks(labels, seed) < counts[labels]).nonzero().flatten()


def check_inputs(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor | None = None
) -> None:
    """What every protocol asks of features `(n, d)` and `(m, d)`, and of labels `(n,)` and `(m,)`, integers >= 0.

    Raises:
        InputError: Shapes do not match, features are not finite, or labels are no classes.
    """
    for part, features, labels in (("train", train_features, train_labels), ("test", test_features, test_labels)):
        if features.ndim != 2 or 0 in features.shape:
            raise InputError(
                f"`{part}_features` has shape {tuple(features.shape)}; give (n, d) with at least one sample."
            )
        if not torch.isfinite(features).all():
            raise InputError(
                f"`{part}_features` holds NaN or infinity; look at the model's weights, or leave out bf16."
            )
        if labels is None:
            continue
        if labels.shape != features.shape[:1]:
            raise InputError(
                f"`{part}_labels` has shape {tuple(labels.shape)}; give one label for each of {len(features)} samples."
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or int(labels.min()) < 0:
            raise InputError(
                f"`{part}_labels` must hold class numbers from 0 (integers); it has {labels.dtype}, smallest "
                f"{labels.min().item()}: leave out the samples without a label."
            )
    if train_features.shape[1] != test_features.shape[1]:
        raise InputError(
            f"`test_features` is {test_features.shape[1]} wide and `train_features` {train_features.shape[1]}; extract "
            "both with the same model."
        )
