# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Mask samplers: how many, which, and that noise decides everything."""

from __future__ import annotations

import pytest
import torch

from clmae.configuration.configuration_mae import MASK_SAMPLERS
from clmae.modeling.masking import SAMPLERS, block_scores, gather_tokens, grid_scores, keep_lowest, random_scores

GRIDS = [(14, 14), (8, 8), (4, 6), (16, 4), (7, 5), (1, 9)]


def masks(sampler, grid_size, num_visible, batch_size=64, seed=0):
    """Masks `(batch_size, h, w)` of one sampler."""
    noise = torch.rand(batch_size, grid_size[0] * grid_size[1], generator=torch.Generator().manual_seed(seed))
    return keep_lowest(sampler(noise, grid_size, num_visible), num_visible).mask.unflatten(1, grid_size)


def masked_neighbours(mask):
    """Mean share of masked patches among the horizontal and vertical neighbours of the masked ones."""
    down, right = (mask[:, 1:] * mask[:, :-1]).sum(), (mask[:, :, 1:] * mask[:, :, :-1]).sum()
    pairs = mask[:, 1:].sum() + mask[:, :-1].sum() + mask[:, :, 1:].sum() + mask[:, :, :-1].sum()
    return (2 * (down + right) / pairs).item()


def test_every_sampler_of_the_configuration_exists():
    assert tuple(SAMPLERS) == MASK_SAMPLERS


@pytest.mark.parametrize("sampler", MASK_SAMPLERS)
@pytest.mark.parametrize("grid_size", GRIDS, ids=str)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.6, 0.75, 0.9])
def test_exactly_k_patches_stay_visible(sampler, grid_size, ratio):
    num_patches = grid_size[0] * grid_size[1]
    num_visible = int(num_patches * (1 - ratio)) or 1
    noise = torch.rand(16, num_patches)
    masking = keep_lowest(SAMPLERS[sampler](noise, grid_size, num_visible), num_visible)
    assert masking.ids_keep.shape == (16, num_visible)
    assert set(masking.mask.unique().tolist()) == {0.0, 1.0}
    assert ((masking.mask == 0).sum(1) == num_visible).all()
    assert not masking.mask.gather(1, masking.ids_keep).any()  # 0 = visible
    assert torch.equal(masking.ids_restore.sort(1).values, torch.arange(num_patches).expand(16, -1))


def test_keep_lowest_by_hand():
    masking = keep_lowest(torch.tensor([[0.3, -1.0, 0.9, 0.1], [4.0, 3.0, 2.0, 1.0]]), 2)
    assert masking.ids_keep.tolist() == [[1, 3], [3, 2]]
    assert masking.mask.tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]
    assert masking.ids_restore.tolist() == [[2, 0, 3, 1], [3, 2, 1, 0]]


def test_ids_restore_undoes_the_shuffle():
    scores, tokens = torch.rand(3, 12), torch.randn(3, 12, 5)
    masking = keep_lowest(scores, 4)
    shuffled = gather_tokens(tokens, scores.argsort(1))
    assert torch.equal(gather_tokens(tokens, masking.ids_keep), shuffled[:, :4])
    assert torch.equal(gather_tokens(shuffled, masking.ids_restore), tokens)


@pytest.mark.parametrize("sampler", MASK_SAMPLERS)
def test_noise_determines_everything(sampler):
    noise = torch.rand(8, 64)
    before = torch.get_rng_state()
    first, second = (SAMPLERS[sampler](noise.clone(), (8, 8), 16) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    # Image by image: an image's mask does not depend on its batch.
    assert torch.equal(SAMPLERS[sampler](noise[3:4], (8, 8), 16), first[3:4])
    assert not torch.equal(keep_lowest(first, 16).mask[0], keep_lowest(first, 16).mask[1])


def test_random_masks_every_patch_equally_often():
    share = masks(random_scores, (8, 8), 16, batch_size=4000).mean(0)
    assert (share - 0.75).abs().max() < 0.04  # 5.8 standard deviations


@pytest.mark.parametrize("ratio", [0.5, 0.75])
@pytest.mark.parametrize("grid_size", [(14, 14), (8, 8), (8, 16)], ids=str)
def test_block_masks_are_blocks(grid_size, ratio):
    num_visible = int(grid_size[0] * grid_size[1] * (1 - ratio))
    random, block = (masked_neighbours(masks(s, grid_size, num_visible, 256)) for s in (random_scores, block_scores))
    assert random == pytest.approx(ratio, abs=0.03)  # so the measure is right
    # Of the gap between chance and a single compact block, more than a third.
    assert block > ratio + (1 - ratio) / 3


def test_grid_keeps_one_patch_of_every_four():
    cells = masks(grid_scores, (8, 12), 24).unfold(1, 2, 2).unfold(2, 2, 2).flatten(-2)  # (B, 4, 6, 4)
    assert ((cells == 0).sum(-1) == 1).all()
    offset = (cells == 0).long().argmax(-1).flatten(1)
    assert (offset == offset[:, :1]).all()  # a lattice
    assert set(offset[:, 0].tolist()) == {0, 1, 2, 3}  # every position is seen


def test_grid_is_a_lattice_on_wide_grids_and_other_ratios():
    visible = masks(grid_scores, (9, 9), 9) == 0  # ratio 8/9: every third row and column
    for image in visible[:8]:
        rows, columns = image.nonzero().unbind(1)
        assert rows.unique().diff().tolist() == [3, 3]
        assert columns.unique().diff().tolist() == [3, 3]
