# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Generated images with one object each, whose box is known: to evaluate which heat map finds objects."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

SHAPES = ("ellipse", "rectangle", "triangle")
TEXTURES = ("stripes", "checks", "noise")


def object_images(count: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of one textured shape on a textured background of other colours.

    The shape is an ellipse, rectangle or triangle, upright, at a uniform place wholly inside the image; its height and
    width are drawn independently from 20 to 60 % of the side. The background is smooth noise.

    Args:
        count (`int`): How many, from 1. Image i depends on `seed` and i only: a larger set begins with a smaller one.
        size (`int`): Height and width in pixels, from 16.
        seed (`int`): Not negative.

    Returns:
        The images, uint8 `(count, 3, size, size)`, and the smallest boxes around the shapes, float32 `(count, 4)`:
        `(top, left, bottom, right)` in fractions of the side.
    """
    images, boxes = zip(*(_object_image(size, np.random.default_rng((seed, i))) for i in range(count)), strict=True)
    return torch.from_numpy(np.stack(images)), torch.tensor(boxes, dtype=torch.float32) / size


def _object_image(size: int, rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """uint8 `(3, size, size)` and the box of the shape in pixels."""
    colour = rng.random(3)
    coarse, fine = _smooth_noise(size, int(rng.integers(2, 5)), rng), _smooth_noise(size, 8, rng)
    background = _reflect(colour[:, None, None] + 0.35 * coarse + 0.15 * fine)
    mask = _shape_mask(size, rng)
    # Around the circle of values by 0.35 to 0.65: far from the background's colour in every channel.
    colour = (colour + rng.uniform(0.35, 0.65, 3)) % 1
    contrast = rng.uniform(-0.3, 0.3, 3)
    foreground = _reflect(colour[:, None, None] + contrast[:, None, None] * _texture(size, rng))
    pixels = np.where(mask, foreground, background)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)
    return np.round(pixels * 255).astype(np.uint8), box


def _shape_mask(size: int, rng: np.random.Generator) -> np.ndarray:
    """bool `(size, size)`: where the shape is."""
    shape = SHAPES[rng.integers(len(SHAPES))]
    height, width = rng.integers(math.ceil(0.2 * size), math.floor(0.6 * size) + 1, size=2)
    top, left = rng.integers(0, size - height + 1), rng.integers(0, size - width + 1)
    v, u = (np.arange(height)[:, None] + 0.5) / height, (np.arange(width)[None] + 0.5) / width
    if shape == "ellipse":
        part = (2 * v - 1) ** 2 + (2 * u - 1) ** 2 <= 1
    elif shape == "rectangle":
        part = np.ones((height, width), dtype=bool)
    else:  # a tip at the top (or the bottom), and the two other corners opposite
        tip = rng.random()
        v = v if rng.random() < 0.5 else 1 - v
        part = (u >= tip * (1 - v)) & (u <= tip + (1 - tip) * v)
    mask = np.zeros((size, size), dtype=bool)
    mask[top : top + height, left : left + width] = part
    return mask


def _texture(size: int, rng: np.random.Generator) -> np.ndarray:
    """float `(3, size, size)` or `(1, size, size)` in about [-1, 1]: stripes, checks or noise of random fineness."""
    texture = TEXTURES[rng.integers(len(TEXTURES))]
    period, angle = rng.uniform(1 / 16, 1 / 6) * size, rng.uniform(0, math.pi)
    if texture == "noise":
        return _smooth_noise(size, max(2, round(2 * size / period)), rng)
    y, x = np.mgrid[:size, :size]
    along, across = (
        np.sin(2 * math.pi * (x * math.cos(a) + y * math.sin(a)) / period) for a in (angle, angle + math.pi / 2)
    )
    return (along if texture == "stripes" else np.sign(along * across))[None]


def _smooth_noise(size: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    """float `(3, size, size)` in about [-1, 1]: uniform values on `cells` x `cells` points, and smooth between."""
    points = torch.from_numpy(rng.uniform(-1, 1, (1, 3, cells, cells)))
    return F.interpolate(points, size=(size, size), mode="bicubic", align_corners=True)[0].numpy()


def _reflect(values: np.ndarray) -> np.ndarray:
    """Values in [-1, 2] folded into [0, 1], so that bright and dark colours keep their texture."""
    return np.abs((values + 1) % 2 - 1)


__all__ = ["object_images"]
