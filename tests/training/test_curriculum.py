# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The curriculum factor and the statistics of the keep probabilities, against values worked out by hand."""

import math

import pytest
import torch

from clmae.training.curriculum import (
    curriculum_factor,
    keep_probability_statistics,
    keep_probability_sums,
    mask_warnings,
)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(1.0, -1.0), (0.3, 0.7), (-0.1, 0.1)])
@pytest.mark.parametrize("total_steps", [2, 3, 7, 1000])
def test_ends_are_exact(shape, start, end, total_steps):
    assert curriculum_factor(0, total_steps, shape, start, end) == start
    assert curriculum_factor(total_steps - 1, total_steps, shape, start, end) == end


HALF = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("shape", "start", "end", "factors"),
    [
        ("linear", 1.0, -1.0, [1.0, 0.5, 0.0, -0.5, -1.0, -1.0, -1.0]),  # beyond the last step it stays at the end
        ("linear", 0.2, 1.0, [0.2, 0.4, 0.6, 0.8, 1.0]),
        # p = 1/4: (1 - cos(pi/4)) / 2 = (1 - sqrt(2)/2) / 2, so that the factor is sqrt(2)/2.
        ("cosine", 1.0, -1.0, [1.0, HALF, 0.0, -HALF, -1.0, -1.0, -1.0]),
        ("constant", 1.0, 0.5, [1.0] * 7),
        ("constant", -1.0, 0.5, [-1.0] * 7),
    ],
)
def test_factors_of_five_steps_by_hand(shape, start, end, factors):
    actual = [curriculum_factor(step, 5, shape, start, end) for step in range(len(factors))]
    assert actual == pytest.approx(factors, abs=1e-12)
    assert curriculum_factor(0, 1, shape, 0.75, -1.0) == 0.75  # a run of one step


def test_unknown_shape_is_refused():
    with pytest.raises(ValueError, match=r"`curriculum_shape` is 'step'; choose one of linear, cosine, constant"):
        curriculum_factor(0, 10, "step", 1.0, -1.0)


def test_keep_probability_statistics_by_hand():
    keep = torch.tensor([[0.0, 1.0, 0.05, 0.95], [1.0, 1.0, 0.05, 0.35]])
    statistics = keep_probability_statistics(keep_probability_sums(keep))
    assert set(statistics) == {"keep_mean", "keep_std", "keep_low", "keep_high", "keep_spread"}
    assert all(value.shape == () for value in statistics.values())
    assert statistics["keep_mean"].item() == pytest.approx(4.4 / 8)
    # Squares: 0, 1, .0025, .9025, 1, 1, .0025, .1225, in all 4.03.
    assert statistics["keep_std"].item() == pytest.approx(math.sqrt(4.03 / 8 - (4.4 / 8) ** 2))
    assert statistics["keep_low"].item() == pytest.approx(3 / 8)
    assert statistics["keep_high"].item() == pytest.approx(4 / 8)
    # Half the distance between the two images at each patch: 0.5, 0, 0, 0.3.
    assert statistics["keep_spread"].item() == pytest.approx(0.8 / 4)


def test_collapse_to_one_mask_shows_as_no_spread():
    statistics = keep_probability_statistics(keep_probability_sums(torch.tensor([[0.0, 1.0]]).expand(5, -1)))
    assert statistics["keep_spread"].item() == 0
    assert statistics["keep_std"].item() == 0.5


def test_statistics_of_one_image_in_half_precision_are_finite_and_without_gradient():
    keep = torch.tensor([[0.25, 0.75]], dtype=torch.bfloat16, requires_grad=True)
    statistics = keep_probability_statistics(keep_probability_sums(keep))
    assert statistics["keep_spread"].item() == 0
    assert statistics["keep_std"].item() == 0.25
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in statistics.values())


def test_sums_of_parts_say_what_the_whole_batch_says():
    keep = torch.rand(6, 4)
    whole = keep_probability_statistics(keep_probability_sums(keep))
    parts = keep_probability_statistics(sum(keep_probability_sums(part) for part in keep.split([1, 2, 3])))
    assert {name: value.item() for name, value in parts.items()} == pytest.approx(
        {name: value.item() for name, value in whole.items()}, abs=1e-5
    )
    assert whole["keep_spread"].item() == pytest.approx(keep.std(0, correction=0).mean().item(), abs=1e-6)


HEALTHY = dict(keep_mean=0.26, keep_std=0.4, keep_low=0.7, keep_high=0.2, keep_spread=0.2)


@pytest.mark.parametrize(
    ("fields", "kind", "figure", "remedy"),
    [
        (dict(keep_spread=0.049), "collapsed", "0.049", "`diversity_loss_weight`"),
        (dict(keep_low=0.75, keep_high=0.245), "saturated", "99.5%", "`gauss_loss_weight`"),
        (dict(keep_mean=0.31), "mask_ratio", "0.310", "`kl_loss_weight`"),
        (dict(keep_mean=0.19), "mask_ratio", "0.190", "`kl_loss_weight`"),
    ],
)
def test_mask_warnings(fields, kind, figure, remedy):
    assert mask_warnings(HEALTHY, 0.75) == {}
    (found,) = mask_warnings({**HEALTHY, **fields}, 0.75).items()
    assert found[0] == kind
    assert figure in found[1]
    assert remedy in found[1]


def test_mask_warnings_follow_the_mask_ratio():
    assert set(mask_warnings(HEALTHY, 0.5)) == {"mask_ratio"}
    assert mask_warnings({**HEALTHY, "keep_mean": 0.52}, 0.5) == {}


def test_every_fault_is_told():
    statistics = dict(keep_mean=0.0, keep_low=1.0, keep_high=0.0, keep_spread=0.0)
    assert set(mask_warnings(statistics, 0.75)) == {"collapsed", "saturated", "mask_ratio"}
