# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Which part of an image is shown: the boxes of random crops, of crops around an object, and of the centre.

A box is `(top, left, height, width)` in pixels. Random ones come from `draw`, which gives uniform numbers in [0, 1) by
position: floats for one crop, arrays `(N,)` for as many crops, which are then a [`Box`] or int64 `(N, 4)`. One function
serves a worker, which crops an image at a time, and the device-resident path, which crops a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Box = tuple[int, int, int, int]
Draw = Callable[[int], Any]

_TRIES = 10
FLIP = 4 * _TRIES
"""Position of the number that says whether a crop is mirrored."""
_CENTRE = FLIP + 1  # of the four numbers for the place of a crop around an object
COLOURS = 48
"""Position of the first of the numbers for a view's colours."""
NOISE = 64
"""Position of the first number for the patches' noise."""


def random_resized_crop_box(
    height: int,
    width: int,
    draw: Draw,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Any:
    """A random part of an image, drawn as torchvision's `RandomResizedCrop` does.

    Ten tries at a box whose share of the area is uniform in `scale` and whose aspect ratio (width / height) is
    log-uniform in `ratio`; if none fits, the largest central box with an aspect ratio inside `ratio`.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    box: Any = largest_crop_box(height, width, ratio)
    found = np.False_
    for first in range(0, 4 * _TRIES, 4):
        share = draw(first)
        xp: Any = math if isinstance(share, float) else np  # NumPy takes several times as long for one number
        side = xp.sqrt(height * width * (scale[0] + (scale[1] - scale[0]) * share))
        stretch = xp.exp((low + (high - low) * draw(first + 1)) / 2)
        box_height, box_width = (side / stretch + 0.5) // 1, (side * stretch + 0.5) // 1
        fits = (box_height > 0) & (box_height <= height) & (box_width > 0) & (box_width <= width)
        if xp is math and not fits:
            continue
        top, left = draw(first + 2) * (height - box_height + 1), draw(first + 3) * (width - box_width + 1)
        if xp is math:
            return int(top), int(left), int(box_height), int(box_width)
        tried = np.array((top, left, box_height, box_width), dtype=np.int64)  # which rounds the corner down
        box, found = np.where((fits & ~found)[:, None], tried.T, box), found | fits
        if found.all():
            break
    return box


def contrastive_crop_box(
    height: int,
    width: int,
    object_box: Sequence[float] | np.ndarray,
    draw: Draw,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    alpha: float = 0.6,
) -> Any:
    """A random part of an image around the object in it (ContrastiveCrop, Peng et al., CVPR 2022).

    As large as [`random_resized_crop_box`] draws it; its centre is drawn inside `object_box`, `([N,] 4)` as `(top,
    left, bottom, right)` in fractions of the height and width, by Beta(alpha, alpha) in both directions; then it is
    shifted by as little as brings it inside the image.
    """
    # Whether a size fits depends on the size alone, and the place is drawn apart from it: leaving out the place leaves
    # the distribution of the size as it is.
    size = np.asarray(random_resized_crop_box(height, width, draw, scale, ratio))[..., 2:]
    u, v = (np.array((draw(first), draw(first + 2))).T for first in (_CENTRE, _CENTRE + 1))
    object_box, extent = np.asarray(object_box, dtype=np.float64), np.array((height, width))
    start, end = object_box[..., :2], object_box[..., 2:]
    corner = np.rint(extent * (start + (end - start) * _symmetric_beta(u, v, alpha)) - size / 2)
    corner = np.minimum(np.maximum(corner, 0), extent - size)
    box = np.concatenate((corner.astype(np.int64), size), axis=-1)
    return tuple(box.tolist()) if box.ndim == 1 else box


def _symmetric_beta(u: np.ndarray, v: np.ndarray, alpha: float) -> np.ndarray:
    """Beta(alpha, alpha) variates in [0, 1] from two independent uniform ones in [0, 1).

    Exact for every alpha > 0: `T = sqrt(2a (U^(-1/a) - 1)) cos(2 pi V)` has Student's t distribution with 2a degrees of
    freedom (Bailey 1994), and `(1 + T / sqrt(2a + T^2)) / 2` is then Beta(a, a) (Devroye 1996).
    """
    # `rest` is 1 - U^(1/a), which does not overflow for small alpha and keeps its digits for large; 1 - u is not 0.
    rest = -np.expm1(np.log1p(-u) / alpha)
    cosine = np.cos(2 * math.pi * v)  # never exactly 0 in floating point, so that the root below is not either
    return (1 + cosine * np.sqrt(rest) / np.sqrt(1 - rest + rest * cosine**2)) / 2


def largest_crop_box(height: int, width: int, ratio: tuple[float, float]) -> Box:
    """The largest central box with an aspect ratio (width / height) inside `ratio`."""
    box_height, box_width = height, width
    if width / height < ratio[0]:
        box_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        box_width = round(height * ratio[1])
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def center_crop_box(height: int, width: int, size: tuple[int, int], crop_ratio: float = 1.0) -> Box:
    """The largest central box of the proportions of `size`, its sides times `crop_ratio`, in (0, 1]."""
    scale = crop_ratio * min(height / size[0], width / size[1])
    box_height, box_width = (max(1, round(side * scale)) for side in size)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def scale_box(box: Box, size: tuple[int, int], new_size: tuple[int, int]) -> Box:
    """A box of an image of `size` (height, width) as one of the same image at `new_size`."""
    scaled = []
    for start, length, old, new in zip(box[:2], box[2:], size, new_size, strict=True):
        length = max(1, round(length * new / old))
        scaled.append((min(round(start * new / old), new - length), length))
    (top, box_height), (left, box_width) = scaled
    return top, left, box_height, box_width
