# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Resizing and normalising: bicubic and antialiased everywhere, of one image or of a batch on a device.

Arrays are `(H, W, C)`, tensors `(C, H, W)`; both hold uint8 in 0..255 or float32 in [0, 1] until `normalize`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers import BitImageProcessor

from clmae.configuration.configuration_mae import pair
from clmae.modeling.image_processing_mae import MAEImageProcessor
from clmae.training.data.crops import Box, center_crop_box


def crop_and_resize(array: np.ndarray, box: Box, size: tuple[int, int]) -> torch.Tensor:
    """A part of an image `(H, W, C)` at another size: `(C, *size)`, contiguous, in the array's type and range.

    May share memory with `array`.
    """
    top, left, height, width = box
    # uint8 is resized as it is: torch has a fast path for channels-last views, and no float copy is made.
    pixels = torch.from_numpy(array[top : top + height, left : left + width]).permute(2, 0, 1)
    if (height, width) != tuple(size):
        pixels = F.interpolate(pixels[None], size=size, mode="bicubic", antialias=True)[0]
        if pixels.is_floating_point():
            pixels = pixels.clamp_(0, 1)  # bicubic overshoots at edges
    return pixels.contiguous()


def crop_and_resize_batch(
    images: torch.Tensor, boxes: torch.Tensor, flips: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """[`crop_and_resize`] for a batch, by two matrix products.

    Of images `(B, C, H, W)`, boxes `(B, 4)`, and which ones to mirror, `(B,)`: float32 `(B, C, *size)` in the images'
    range, 0..255 or [0, 1], not rounded.
    """
    top, left, height, width = boxes.unbind(1)
    rows = crop_matrices(top, height, images.shape[2], size[0])
    columns = crop_matrices(left, width, images.shape[3], size[1])
    columns = torch.where(flips[:, None, None], columns.flip(1), columns)
    pixels = rows[:, None] @ images.float() @ columns.mT[:, None]
    return pixels.clamp_(0, 255 if images.dtype == torch.uint8 else 1)


def crop_matrices(start: torch.Tensor, length: torch.Tensor, source: int, target: int) -> torch.Tensor:
    """The matrices `(B, target, source)` that resize parts of lines of `source` pixels, from `start`, `length` long.

    The weights of `torch.nn.functional.interpolate(..., mode="bicubic", antialias=True)` on the part alone.
    """
    start, length = start[:, None, None], length[:, None, None]
    scale = length / target
    centre = scale * (torch.arange(target, device=start.device)[:, None] + 0.5)
    place = torch.arange(source, device=start.device) - start
    distance = ((place + 0.5 - centre) / scale.clamp(min=1)).abs()
    near = (1.5 * distance - 2.5) * distance**2 + 1  # Keys' cubic, a = -0.5
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0))
    weights = weights.masked_fill((place < 0) | (place >= length), 0)
    return weights / weights.sum(2, keepdim=True)


def center_view(array: np.ndarray, size: tuple[int, int], crop_ratio: float = 1.0) -> torch.Tensor:
    """The un-augmented view of an image `(H, W, C)`, for evaluation: `(C, *size)`.

    Square targets: resize the shortest side, then crop the centre, with the roundings of transformers' image
    processors, so that what they show is the same to the pixel. Other targets, and images more than 16 times as long as
    wide, which would be huge when resized: the largest central box of the target's shape, its sides times `crop_ratio`.
    """
    height, width = array.shape[:2]
    if size[0] != size[1] or max(height, width) > 16 * min(height, width):
        return crop_and_resize(array, center_crop_box(height, width, size, crop_ratio), size)
    short = resized_side(size[0], crop_ratio)
    resized = (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
    pixels = crop_and_resize(array, (0, 0, height, width), resized)
    top, left = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
    return pixels[:, top : top + size[0], left : left + size[1]].contiguous()


def resized_side(side: int, crop_ratio: float) -> int:
    """To how many pixels an image is resized of which the central `side` are shown: about `side / crop_ratio`.

    An even number of pixels is cut off, so that the centre is the centre.
    """
    return side + 2 * round((side / crop_ratio - side) / 2)


def normalize(
    pixels: torch.Tensor, mean: Sequence[float] | torch.Tensor, std: Sequence[float] | torch.Tensor
) -> torch.Tensor:
    """`(pixels - mean) / std` per channel, as a new float32 tensor.

    Args:
        pixels: `(..., C, H, W)`, uint8 in 0..255, or float in [0, 1].
        mean, std: One value per channel, in units of [0, 1]. float32 tensors on the device of `pixels` spare it a wait.
    """
    peak = 255.0 if pixels.dtype == torch.uint8 else 1.0
    values = pixels.to(torch.float32, copy=True)
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=values.device)[:, None, None] for v in (mean, std))
    return values.sub_(mean * peak).div_(std * peak)


def make_image_processor(
    image_size: int | tuple[int, int], num_channels: int, mean: list[float], std: list[float], crop_ratio: float = 1.0
) -> BitImageProcessor:
    """The image processor that shows an image as an evaluation dataset does; saved beside a model.

    Square sizes: the same to the pixel. Other sizes: resize to both sides, crop the centre, which is the same view for
    images of the target's proportions and a squeezed one for others (no stock processor takes the largest box of
    another shape). It is a stock class, so that a saved model needs no code of ours, except with one channel, where
    none makes images grey. 16-bit and float images go through [`decode_image`] first.

    3 channels convert everything to RGB, 1 to grey; other numbers leave the channels as they are.
    """
    height, width = pair(image_size)
    resized = {"height": resized_side(height, crop_ratio), "width": resized_side(width, crop_ratio)}
    kind, options = (MAEImageProcessor, {"do_grayscale": True}) if num_channels == 1 else (BitImageProcessor, {})
    return kind(
        **options,
        do_convert_rgb=num_channels == 3,
        size={"shortest_edge": resized["height"]} if height == width else resized,
        crop_size={"height": height, "width": width},
        resample=3,  # bicubic
        image_mean=list(mean),
        image_std=list(std),
    )
