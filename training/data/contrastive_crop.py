# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""ContrastiveCrop (Peng et al., CVPR 2022): the boxes around the main objects, in which crops have their centres.

Boxes are `(top, left, bottom, right)` in fractions of the image's height and width, in [0, 1].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from clmae.configuration.errors import InputError

CROP_THRESHOLD = 0.5  # of the heat map's range: chosen with the map, where the original's 0.1 holds nearly all


def refresh_epochs(num_epochs: int, interval: float) -> list[int]:
    """Epochs, from 0, before which the boxes are recomputed: each `interval` of `num_epochs`, but not at the start.

    `interval` is a share of the epochs, in (0, 1]; the first one is the warm-up, in which the box is the whole image.
    """
    period = max(interval * num_epochs, 1e-3)  # at most once per epoch

    def periods(epoch: int) -> int:
        return math.floor(epoch / period + 1e-9)

    return [epoch for epoch in range(1, num_epochs) if periods(epoch) > periods(epoch - 1)]


def object_heat_map(tokens: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Where an encoder sees something else than background.

    The distance of each patch token from the mean token of the image's border, chosen by measurement
    (`benchmarks/contrastive_crop/heat_maps.md`). The original's sum over the channels is constant for a ViT, whose
    tokens are layer-normalised.

    Args:
        tokens: `(B, h * w, D)`, the encoder's output for all patches.
        grid_size: `(h, w)`.

    Returns:
        float32 `(B, h, w)`; exactly constant where all tokens are alike up to rounding, bfloat16's too.
    """
    tokens = tokens.float().unflatten(1, grid_size)
    inner = torch.zeros(grid_size, dtype=torch.bool, device=tokens.device)
    inner[1:-1, 1:-1] = True
    distances = (tokens - tokens[:, ~inner].mean(1)[:, None, None]).norm(dim=-1)
    noise = 1e-2 * tokens.norm(dim=-1).amax((1, 2), keepdim=True)
    flat = distances.amax((1, 2), keepdim=True) - distances.amin((1, 2), keepdim=True) <= noise
    return torch.where(flat, 0.0, distances)


def heat_map_box(
    heat_maps: torch.Tensor, image_grid: tuple[int, int] | None = None, threshold: float = CROP_THRESHOLD
) -> torch.Tensor:
    """The smallest box around what is hot in each map.

    Each map is rescaled to [0, 1], then resized bilinearly to `image_grid`; the box holds every pixel above
    `threshold`. It is the whole image where no pixel is, and for maps that are constant or not finite.

    Args:
        heat_maps: `(B, h, w)`, one real value per patch, in any type and range.
        image_grid: Rows and columns of the finer map, such as the image's height and width; as they are if `None`.
        threshold: In [0, 1).

    Returns:
        float32 `(B, 4)` on the same device.

    Raises:
        InputError: `threshold` is out of range.
    """
    if not 0 <= threshold < 1:
        raise InputError(f"`threshold` is {threshold}; the maps are rescaled to [0, 1]: give a number in [0, 1).")
    maps = heat_maps.to(torch.promote_types(heat_maps.dtype, torch.float32))
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    # A constant map becomes nan (0 / 0), one that holds nan or infinities becomes nan and 0: nothing is above.
    maps = (maps - low) / (high - low)
    if image_grid is not None:
        maps = F.interpolate(maps[:, None], size=tuple(image_grid), mode="bilinear", align_corners=False)[:, 0]
    above = maps > threshold
    sides = []
    for line in (above.any(2), above.any(1)):  # which rows, then which columns hold a pixel
        # The first maximum is the first hot line; where nothing is above, argmax is 0 from both ends: the whole image.
        start, end = line.int().argmax(1), line.shape[1] - line.flip(1).int().argmax(1)
        sides.append(torch.stack((start, end)).float() / line.shape[1])
    (top, bottom), (left, right) = sides
    return torch.stack((top, left, bottom, right), dim=1)
