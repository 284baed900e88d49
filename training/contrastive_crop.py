# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""ContrastiveCrop (Peng et al., CVPR 2022): crops whose centres lie in a box around the main object.

The boxes here are `(top, left, bottom, right)` in fractions of the image's height and width, in [0, 1]; only a crop
is a [`~clmae.training.images.Box`] in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from clmae.configuration.errors import InputError
from clmae.training.images import Box, random_resized_crop_box

CROP_THRESHOLD = 0.5  # of the heat map's range: chosen with the map, where the original's 0.1 holds nearly all


def contrastive_crop_box(
    height: int,
    width: int,
    box: Sequence[float],
    generator: torch.Generator,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    alpha: float = 0.6,
) -> Box:
    """A random part of an image around the object in it.

    As large as [`random_resized_crop_box`] draws it (to the pixel, for the same generator), also where that falls back
    to its largest box; its centre is drawn inside `box`, vertically and horizontally by Beta(alpha, alpha); then it is
    shifted by as little as brings it inside the image.

    Args:
        height, width (`int`): Size of the image in pixels, from 1.
        box (`Sequence[float]`): `(top, left, bottom, right)` in fractions of the height and width; may be a point.
        generator (`torch.Generator`): The only source of randomness; always the same number of values is drawn.
        scale (`tuple[float, float]`): Smallest and largest share of the area, in (0, 1].
        ratio (`tuple[float, float]`): Smallest and largest aspect ratio (width / height), positive.
        alpha (`float`): Positive. Below 1 the centres tend to the edges of the box, above 1 to its middle.

    Returns:
        `(top, left, height, width)` in pixels, inside the image.

    Raises:
        InputError: `box` is none, or `alpha` is not positive and finite.
    """
    top, left, bottom, right = box = tuple(map(float, box))
    if not (0 <= top <= bottom <= 1 and 0 <= left <= right <= 1):  # also true for nan
        raise InputError(f"`box` is {box}; give top <= bottom and left <= right, as fractions in [0, 1].")
    if not 0 < alpha < math.inf:
        raise InputError(f"`alpha` is {alpha}; the Beta distribution needs a positive number, such as 0.6.")
    # Whether a size fits depends on the size alone, and the place is drawn apart from it: leaving out the place
    # leaves the distribution of the size as it is.
    _, _, crop_height, crop_width = random_resized_crop_box(height, width, generator, scale, ratio)
    u_y, v_y, u_x, v_x = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    centre_y = height * (top + (bottom - top) * _symmetric_beta(u_y, v_y, alpha))
    centre_x = width * (left + (right - left) * _symmetric_beta(u_x, v_x, alpha))
    crop_top, crop_left = round(centre_y - crop_height / 2), round(centre_x - crop_width / 2)
    crop_top, crop_left = min(max(crop_top, 0), height - crop_height), min(max(crop_left, 0), width - crop_width)
    return crop_top, crop_left, crop_height, crop_width


def _symmetric_beta(u: float, v: float, alpha: float) -> float:
    """A Beta(alpha, alpha) variate in [0, 1] from two independent uniform ones in [0, 1).

    Exact for every alpha > 0, and always from two values: `T = sqrt(2a (U^(-1/a) - 1)) cos(2 pi V)` has Student's t
    distribution with 2a degrees of freedom (Bailey 1994), and `(1 + T / sqrt(2a + T^2)) / 2` is then Beta(a, a)
    (Devroye 1996). torch's own Beta takes no generator; gamma variates would draw a varying number of values from it,
    and end in 0 / 0 for small alpha.
    """
    # `rest` is 1 - U^(1/a), which does not overflow for small alpha and keeps its digits for large; 1 - u is not 0.
    rest = -math.expm1(math.log1p(-u) / alpha)
    cosine = math.cos(2 * math.pi * v)  # never exactly 0 in floating point, so that the root below is not either
    return (1 + cosine * math.sqrt(rest) / math.sqrt(1 - rest + rest * cosine**2)) / 2


def refresh_epochs(num_epochs: int, interval: float) -> list[int]:
    """Epochs, from 0, before which the boxes are recomputed: each `interval` of `num_epochs`, but not at the start.

    `interval` is a share of the epochs, in (0, 1]; the first one is the warm-up, in which the box is the whole image.
    """
    period = max(interval * num_epochs, 1e-3)  # of every epoch at most once

    def periods(epoch: int) -> int:
        return math.floor(epoch / period + 1e-9)

    return [epoch for epoch in range(1, num_epochs) if periods(epoch) > periods(epoch - 1)]


def object_heat_map(tokens: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Where an encoder sees something else than background.

    The distance of each patch token from the mean token of the image's border, chosen by measurement
    (`benchmarks/contrastive_crop/heat_maps.md`). The original's sum over the channels is constant for a ViT, whose
    tokens are layer-normalised.

    Args:
        tokens (`torch.Tensor` of shape `(B, h * w, D)`): The encoder's output for all patches.
        grid_size (`tuple[int, int]`): `(h, w)`.

    Returns:
        Float32 `(B, h, w)`; exactly constant where all tokens are alike up to rounding, bfloat16's too.
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
        heat_maps (`torch.Tensor` of shape `(B, h, w)`): One real value a patch, in any type and range.
        image_grid (`tuple[int, int]`, *optional*): Rows and columns of the finer map, such as the image's height and
            width; as they are if `None`.
        threshold (`float`): In [0, 1).

    Returns:
        float32 `(B, 4)` on the same device: `(top, left, bottom, right)` in fractions of the height and width.

    Raises:
        InputError: An argument has another shape or range than described.
    """
    if heat_maps.ndim != 3 or 0 in heat_maps.shape[1:]:
        raise InputError(f"`heat_maps` has the shape {tuple(heat_maps.shape)}; give (batch, rows, columns) of patches.")
    if image_grid is not None and (len(image_grid) != 2 or min(image_grid) < 1):
        raise InputError(f"`image_grid` is {image_grid}; give two positive numbers, rows and columns.")
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
        # The first maximum is the first hot line.
        start, end = line.int().argmax(1), line.shape[1] - line.flip(1).int().argmax(1)
        sides.append(torch.stack((start, end)).float() / line.shape[1])
    (top, bottom), (left, right) = sides
    # Where nothing is above, argmax is 0 from both ends: the whole image.
    return torch.stack((top, left, bottom, right), dim=1)


def box_iou(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Intersection over union of each box with its partner (torchvision's `box_iou` compares all with all).

    Args:
        boxes, others (`torch.Tensor` of shape `(B, 4)`): `(top, left, bottom, right)`, top <= bottom, left <= right.

    Returns:
        float32 `(B,)` in [0, 1]; 0 where both boxes have no area.

    Raises:
        InputError: The shapes are not both `(B, 4)`.
    """
    if boxes.shape != others.shape or boxes.ndim != 2 or boxes.shape[1] != 4:
        raise InputError(
            f"`boxes` and `others` have the shapes {tuple(boxes.shape)} and {tuple(others.shape)}; give (B, 4) twice."
        )
    boxes, others = boxes.float(), others.float()
    overlap = torch.minimum(boxes[:, 2:], others[:, 2:]) - torch.maximum(boxes[:, :2], others[:, :2])
    intersection = overlap.clamp(min=0).prod(1)
    areas = [(part[:, 2:] - part[:, :2]).prod(1) for part in (boxes, others)]
    union = areas[0] + areas[1] - intersection
    return torch.where(union > 0, intersection / union, 0.0)


__all__ = ["box_iou", "contrastive_crop_box", "heat_map_box", "object_heat_map", "refresh_epochs"]
