# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Intervals: how often they hold the truth, and that the multinomial draws are the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import f1_score, recall_score

from clmae.evaluation.confidence import class_score_intervals, mean_interval, share_interval


def test_ninety_five_percent_of_them_hold_the_truth():
    counts = np.random.default_rng(0).binomial(400, 0.7, 600)
    held = [low <= 0.7 <= high for low, high in (share_interval(count / 400, 400) for count in counts)]
    assert 0.92 <= np.mean(held) <= 0.98  # three standard deviations of the share are 0.027


def test_intervals_of_shares_are_normal_theory_for_many_samples():
    low, high = share_interval(0.526, 10_000)
    half = 1.96 * (0.526 * 0.474 / 10_000) ** 0.5
    assert (low, high) == pytest.approx((0.526 - half, 0.526 + half), abs=0.02 * half)
    low, high = share_interval(1.0, 50)  # and not certain after 50 samples
    assert low == pytest.approx(0.9287, abs=1e-4)
    assert high == 1.0


@pytest.mark.parametrize("distinct", [[0.0, 1.0], [0.0, 0.2, 0.4, 1.0]])
def test_interval_of_a_mean_is_the_bootstrap(distinct):
    values = torch.tensor(distinct).repeat(300)
    sample = (values.double().numpy(),)
    expected = stats.bootstrap(sample, np.mean, method="percentile", n_resamples=3000, batch=100)
    low, high = map(float, expected.confidence_interval)
    assert mean_interval(values) == pytest.approx((low, high), abs=0.1 * (high - low))
    assert mean_interval(values) == mean_interval(values.flip(0))


@pytest.mark.slow
def test_class_scores_are_those_of_samples_drawn_with_replacement():
    generator = torch.Generator().manual_seed(1)
    references = (torch.rand(200, generator=generator) ** 2 * 5).long()
    noise = torch.randint(5, (200,), generator=generator)
    predictions = torch.where(torch.rand(200, generator=generator) < 0.6, references, noise)
    intervals = class_score_intervals(predictions, references)
    for name, score in (("mean per class", recall_score), ("macro F1", f1_score)):

        def statistic(indices, score=score):
            return score(references[indices], predictions[indices], average="macro", zero_division=0)

        expected = stats.bootstrap(
            (np.arange(200),), statistic, method="percentile", n_resamples=300, vectorized=False
        ).confidence_interval
        assert intervals[name] == pytest.approx(tuple(expected), abs=0.2 * float(np.ptp(expected))), name


def test_class_scores_where_classes_are_missing():
    predictions, references = torch.tensor([0, 0, 3, 5]), torch.tensor([0, 0, 5, 5])  # 3 is only predicted
    for low, high in class_score_intervals(predictions, references).values():
        assert 0 <= low <= high <= 1
