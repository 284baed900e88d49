# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Losses: hand-worked values, their edges, and patches to pixels and back."""

from __future__ import annotations

import math

import pytest
import torch

from clmae.modeling import losses

PEAK = 0.12 * math.sqrt(2 * math.pi)  # of the Gaussian term, at m = 1/2


def double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- patches ----------------------------------------------------------------------------------------------------------


def test_patchify_by_hand():
    """Rows of patches first; in a patch row, column, channel."""
    images = torch.arange(2 * 4 * 4).reshape(1, 2, 4, 4)
    patches = losses.patchify(images, (2, 2))
    assert patches.shape == (1, 4, 8)
    assert patches[0, 0].tolist() == [0, 16, 1, 17, 4, 20, 5, 21]
    assert patches[0, 1, 0] == 2
    assert patches[0, 2, 0] == 8


@pytest.mark.parametrize(
    ("channels", "size", "patch"), [(3, (8, 8), (2, 2)), (5, (6, 20), (3, 4)), (1, (8, 4), (1, 4))]
)
def test_unpatchify_is_the_inverse(channels, size, patch):
    images = torch.randn(2, channels, *size)
    patches = losses.patchify(images, patch)
    grid = size[0] // patch[0], size[1] // patch[1]
    assert patches.shape == (2, grid[0] * grid[1], patch[0] * patch[1] * channels)
    assert torch.equal(losses.unpatchify(patches, patch, grid), images)


def test_targets():
    images = double([[[[1, 2, 7, 7], [3, 6, 7, 7]]]])  # patch 0: mean 3, unbiased variance 14 / 3; patch 1: flat
    raw = losses.patch_targets(images, (2, 2), norm_pix_loss=False)
    assert raw.tolist() == [[[1, 2, 3, 6], [7, 7, 7, 7]]]
    scale = math.sqrt(14 / 3 + 1e-6)
    normed = losses.patch_targets(images, (2, 2), norm_pix_loss=True)
    torch.testing.assert_close(normed, double([[[-2 / scale, -1 / scale, 0, 3 / scale], [0, 0, 0, 0]]]))
    mean, std = losses.patch_moments(raw)
    torch.testing.assert_close(normed * std + mean, raw)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_targets_and_errors_of_half_precision_are_float32(dtype):
    images = torch.randn(1, 3, 4, 4).to(dtype)
    targets = losses.patch_targets(images, (2, 2), norm_pix_loss=True)
    assert targets.dtype == torch.float32
    assert losses.patch_errors(torch.zeros(1, 4, 12, dtype=dtype), targets).dtype == torch.float32


def test_masked_mean_is_over_all_masked_patches_of_the_batch():
    errors, mask = double([[1, 2, 3], [4, 5, 6]]), double([[1, 0, 0], [1, 1, 0]])
    assert losses.patch_errors(double([[[1, 3], [0, 0]]]), double([[[0, 0], [0, 2]]])).tolist() == [[5, 2]]
    assert losses.masked_mean(errors, mask).item() == pytest.approx(10 / 3)


# -- the masking module's terms ---------------------------------------------------------------------------------------


def test_gauss_loss_by_hand():
    assert losses.gauss_loss(double([[0.5, 0.5]]), 0.12).item() == pytest.approx(PEAK)
    m = double([[0.5, 0.62], [0.38, 0.26]])  # 0, 1, 1 and 2 sigma away
    assert losses.gauss_loss(m, 0.12).item() == pytest.approx(PEAK * (1 + 2 * math.exp(-0.5) + math.exp(-2)) / 4)
    assert losses.gauss_loss(double([[0.0, 1.0]]), 0.12).item() == pytest.approx(PEAK * math.exp(-0.125 / 0.0144))


def test_kl_loss_by_hand():
    assert losses.kl_loss(double([[0.1, 0.4], [0.25, 0.25]]), 0.75, "mean").item() == pytest.approx(0, abs=1e-15)
    m = double([[0.3, 0.7], [0.25, 0.25]])  # means 1/2 and 1/4
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert losses.kl_loss(m, 0.75, "sum").item() == pytest.approx(expected)
    assert losses.kl_loss(m, 0.75, "mean").item() == pytest.approx(expected / 2)
    expected = 0.2 * math.log(0.2 / 0.4) + 0.8 * math.log(0.8 / 0.6)  # not symmetric in its arguments
    assert losses.kl_loss(double([[0.2, 0.2]]), 0.6, "mean").item() == pytest.approx(expected)


def test_kl_loss_of_saturated_images_is_the_limit():
    m = double([[0.0, 0.0], [1.0, 1.0]])
    assert losses.kl_loss(m, 0.75, "sum").item() == pytest.approx(math.log(1 / 0.75) + math.log(1 / 0.25))


def test_diversity_loss_by_hand():
    m = double([[0.1, 0.2], [0.4, 0.6], [0.4, 0.2]])  # distances 0.5, 0.3, 0.4
    assert losses.diversity_loss(m[:2], 0.1).item() == pytest.approx(math.exp(-0.05))
    expected = (math.exp(-0.05) + math.exp(-0.03) + math.exp(-0.04)) / 3
    assert losses.diversity_loss(m, 0.1).item() == pytest.approx(expected)
    assert losses.diversity_loss(m[[0, 0]], 0.1).item() == 1


def test_one_image_has_no_diversity_loss():
    m = torch.rand(1, 8, requires_grad=True)
    loss = losses.diversity_loss(m, 0.1)
    loss.backward()
    assert loss.item() == 0
    assert not m.grad.any()


@pytest.mark.parametrize("rows", [[0, 0], [0, 0, 1], [0, 0, 0]])
def test_gradients_of_equal_rows_are_finite(rows):
    m = torch.rand(2, 8, dtype=torch.float64)[rows].requires_grad_()
    losses.diversity_loss(m, 0.1).backward()
    assert m.grad.isfinite().all()
    assert m.grad.any() == (len(set(rows)) > 1)


def test_gradients_of_the_other_terms_are_finite_at_the_edges():
    m = double([[0.5, 0.5], [1e-30, 1e-30], [1 - 1e-16, 1 - 1e-16]]).requires_grad_()
    (losses.gauss_loss(m, 0.12) + losses.kl_loss(m, 0.75, "mean")).backward()
    assert m.grad.isfinite().all()


# -- processes --------------------------------------------------------------------------------------------------------


def test_one_process_communicates_nothing():
    values = torch.rand(3, 2)
    assert losses.world_size() == 1
    assert losses.sum_across_processes(values) is values
    assert losses.gather_across_processes(values) is values


def test_scale_gradient_changes_the_gradient_alone():
    values = torch.rand(5, requires_grad=True)
    scaled = losses.scale_gradient(values, 3.0)
    assert torch.equal(scaled, values)
    scaled.sum().backward()
    assert values.grad.tolist() == [3.0] * 5
