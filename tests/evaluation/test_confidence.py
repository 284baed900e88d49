# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Bootstrap intervals: how often they hold the truth, and that the multinomial draws are the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clmae.evaluation.confidence import class_score_intervals, mean_interval, share_interval
from clmae.evaluation.metrics.scores import accuracy, class_counts, macro_f1, mean_per_class_accuracy


def test_ninety_five_percent_of_them_hold_the_truth():
    generator, held, trials = torch.Generator().manual_seed(0), 0, 600
    for trial in range(trials):
        low, high = mean_interval((torch.rand(400, generator=generator) < 0.7).double(), seed=trial)
        held += low <= 0.7 <= high
    # 0.95 give or take: three standard deviations of the share are 0.027, and the interval of 400 values is not exact.
    assert 0.915 <= held / trials <= 0.975


def test_intervals_of_shares_are_normal_theory_for_many_samples():
    low, high = share_interval(0.526, 10_000)
    half = 1.96 * (0.526 * 0.474 / 10_000) ** 0.5
    assert (low, high) == pytest.approx((0.526 - half, 0.526 + half), abs=0.1 * half)
    assert (low, high) == mean_interval(torch.tensor([1.0] * 5260 + [0.0] * 4740))
    assert share_interval(1.0, 50) == (1.0, 1.0)


def test_values_between_zero_and_one():
    values = torch.tensor([0.0, 0.2, 0.4, 1.0]).repeat(500)
    low, high = mean_interval(values)
    half = 1.96 * values.double().std().item() / 2000**0.5
    assert (low, high) == pytest.approx((0.4 - half, 0.4 + half), abs=0.15 * half)


def test_class_scores_are_those_of_samples_drawn_with_replacement():
    generator = torch.Generator().manual_seed(1)
    references = (torch.rand(200, generator=generator) ** 2 * 5).long()
    noise = torch.randint(5, (200,), generator=generator)
    predictions = torch.where(torch.rand(200, generator=generator) < 0.6, references, noise)
    scores = {"accuracy": accuracy, "mean": mean_per_class_accuracy, "f1": macro_f1}
    found = class_score_intervals(predictions, references, scores, num_resamples=4000)
    plain = {name: [] for name in scores}
    for _ in range(4000):
        drawn = torch.randint(200, (200,), generator=generator)
        for name, score in scores.items():
            plain[name].append(score(class_counts(predictions[drawn], references[drawn])).item())
    for name, values in plain.items():
        low, high = np.quantile(values, [0.025, 0.975])
        assert found[name] == pytest.approx((low, high), abs=0.1 * (high - low)), name
    assert found["accuracy"] == pytest.approx(mean_interval(predictions == references), abs=0.015)


def test_resamples_in_chunks_are_the_same(monkeypatch):
    data = torch.arange(30) % 3, torch.arange(30) % 4
    whole = class_score_intervals(*data, {"f1": macro_f1})
    monkeypatch.setattr("clmae.evaluation.confidence._CELLS_AT_ONCE", 100)
    assert class_score_intervals(*data, {"f1": macro_f1}) == whole


def test_seed_and_level():
    values = torch.arange(50) % 2
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1) != mean_interval(values, seed=2)
    wide, narrow = (np.diff(mean_interval(values, level=level)) for level in (0.99, 0.5))
    assert wide > 1.5 * narrow


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(level=1.0), "`level` is 1.0"),
        (dict(num_resamples=0), "`num_resamples` is 0"),
        (dict(values=torch.zeros(0)), r"`values` has shape \(0,\)"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        mean_interval(**{"values": torch.zeros(3), **change})
