# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Which patches stay visible.

Every sampler, learned or not, is a function that gives each patch a score; the K patches with the **lowest** scores
stay visible. All randomness comes from one uniform `noise` of shape `(batch_size, num_patches)`, so that a caller who
supplies the noise fixes the masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

# BEiT (arXiv 2106.08254, algorithm 1): blocks of 16 to 75 of the 196 patches, aspect ratio 0.3 to 1/0.3.
_BLOCK_AREA = (16 / 196, 75 / 196)
_BLOCK_ASPECT = 0.3
_MAX_BLOCKS = 64


class Masking(NamedTuple):
    """A choice of visible patches.

    Attributes:
        ids_keep (`torch.LongTensor` of shape `(batch_size, num_visible)`): Visible patches, lowest score first.
        mask (`torch.FloatTensor` of shape `(batch_size, num_patches)`): 1 = masked, 0 = visible.
        ids_restore (`torch.LongTensor` of shape `(batch_size, num_patches)`): Rank of each patch by score; gathers
            `[visible | masked]` tokens back into patch order.
    """

    ids_keep: torch.Tensor
    mask: torch.Tensor
    ids_restore: torch.Tensor


def keep_lowest(scores: torch.Tensor, num_visible: int) -> Masking:
    """Keeps the `num_visible` patches with the lowest `scores` `(batch_size, num_patches)` of each image."""
    ids_shuffle = scores.argsort(dim=1)
    ranks = torch.arange(scores.shape[1], device=scores.device).expand_as(ids_shuffle)
    # The inverse permutation, by one scatter instead of a second sort.
    ids_restore = torch.empty_like(ids_shuffle).scatter_(1, ids_shuffle, ranks)
    mask = (ids_restore >= num_visible).to(torch.float32)
    return Masking(ids_shuffle[:, :num_visible], mask, ids_restore)


def gather_tokens(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Tokens `(batch_size, n, width)` at the indices `ids` `(batch_size, k)`: `(batch_size, k, width)`."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def full_precision(noise: torch.Tensor) -> torch.Tensor:
    """Half-precision `noise` as float32, with random digits below its own: no ties, which places would decide."""
    if noise.dtype not in (torch.float16, torch.bfloat16):
        return noise
    digits = torch.rand(noise.shape, device=noise.device) * torch.finfo(noise.dtype).eps / 2
    return (noise.float() + digits).clamp_max(1 - torch.finfo(torch.float32).eps)


def finer_digits(noise: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in [0, 1), independent of the order of the uniform float32 `noise`: its digits below 2^-12."""
    return (noise * 2**12).frac()


def select_patches(values: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    """Of each patch's values `(B, N)` or `(B, N, width)`, those at the indices `ids` `(B, P)`; all with `None`."""
    if ids is None:
        return values
    return gather_tokens(values, ids) if values.ndim == 3 else values.gather(1, ids)


def random_scores(noise: torch.Tensor, grid_size: tuple[int, int], num_visible: int) -> torch.Tensor:
    """Uniform random masking (MAE, section 3): the noise itself."""
    return noise


def grid_scores(noise: torch.Tensor, grid_size: tuple[int, int], num_visible: int) -> torch.Tensor:
    """Grid-wise masking (MAE, figure 6): a regular lattice stays visible, one patch of every four at ratio 0.75.

    The lattice's offset is drawn per image, so that every position is seen in training. Where the lattice does not
    hold exactly K patches, the noise picks which of it are dropped or which others are added.
    """
    height, width = grid_size
    step = max(1, round(math.sqrt(height * width / num_visible)))
    position = torch.arange(height * width, device=noise.device)
    cell = (position // width % step) * step + position % width % step  # place within the step x step cell
    offset = (noise[:, :1] * step * step).long()
    return noise + (cell != offset)


def block_scores(noise: torch.Tensor, grid_size: tuple[int, int], num_visible: int) -> torch.Tensor:
    """Block-wise masking (MAE, figure 6; BEiT, algorithm 1): large rectangles are masked until N − K patches are.

    The centres are the patches with the smallest noise, in that order; area and aspect ratio of each rectangle come
    from further digits of its centre's noise. The last rectangle is filled in part, at random.
    """
    height, width = grid_size
    num_patches = height * width
    value, centre = noise.topk(min(_MAX_BLOCKS, num_patches), dim=1, largest=False)  # (B, R), ascending
    # The smallest of N numbers are of the order of 1 / N: only the digits below that are uniform.
    area_draw, aspect_draw = (value * num_patches * 2**4).frac(), (value * num_patches * 2**10).frac()
    area = num_patches * (_BLOCK_AREA[0] + (_BLOCK_AREA[1] - _BLOCK_AREA[0]) * area_draw)
    aspect = torch.exp((2 * aspect_draw - 1) * math.log(1 / _BLOCK_ASPECT))
    position = torch.arange(num_patches, device=noise.device)
    rows, columns = position // width, position % width
    inside = (rows - (centre // width).unsqueeze(-1)).abs() <= (area * aspect).sqrt().unsqueeze(-1) / 2
    inside &= (columns - (centre % width).unsqueeze(-1)).abs() <= (area / aspect).sqrt().unsqueeze(-1) / 2
    # (B, N): number of the first rectangle that covers a patch; the earlier, the higher the score.
    first = torch.where(inside.any(1), inside.to(torch.uint8).argmax(1), inside.shape[1])
    return noise - first


def gumbel_scores(noise: torch.Tensor, preferences: torch.Tensor) -> torch.Tensor:
    """Scores whose K lowest are K patches drawn without replacement with weights `exp(preferences)`.

    Gumbel top-K (arXiv 1903.06059) from the uniform `noise`; both `(batch_size, num_patches)`. Where all preferences of
    an image are equal, the same noise gives the same mask as [`random_scores`].
    """
    return (-torch.log1p(-noise)).log() - preferences


SAMPLERS: dict[str, Callable[[torch.Tensor, tuple[int, int], int], torch.Tensor]] = {
    "random": random_scores,
    "block": block_scores,
    "grid": grid_scores,
}

__all__ = [
    "SAMPLERS",
    "Masking",
    "block_scores",
    "finer_digits",
    "full_precision",
    "gather_tokens",
    "grid_scores",
    "gumbel_scores",
    "keep_lowest",
    "random_scores",
    "select_patches",
]
