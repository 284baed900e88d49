# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Random changes of an image's colours, of one image or of a batch."""

from __future__ import annotations

import math

import torch

NUM_DRAWS = 6
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 0.4, 0.4, 0.2, 0.1
_JITTER_SHARE, _GREY_SHARE = 0.8, 0.2
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL's mode L


def jitter_colours(pixels: torch.Tensor, draws: torch.Tensor, peak: float = 255.0) -> torch.Tensor:
    """Brightness and contrast changed by up to 40 %, saturation by 20 %, hue by a tenth of a turn; some made grey.

    The strengths are BYOL's (arXiv 2006.07733, appendix B): 80 % of the images are changed, 20 % are made grey.

    Args:
        pixels: `(B, C, H, W)`, uint8 or float, in 0..peak. Where C is not 3, brightness and contrast alone are changed.
        draws: `(B, 6)`, uniform in [0, 1).
        peak: The greatest value that a pixel can have.

    Returns:
        As `pixels`, in the same type and range.
    """
    integer = pixels.dtype == torch.uint8
    values = pixels.float()
    draws = draws.to(values)[:, :, None, None, None]
    brightness, contrast, saturation = (
        1 + strength * (2 * draws[:, i] - 1) for i, strength in enumerate((_BRIGHTNESS, _CONTRAST, _SATURATION))
    )
    colour = values.shape[1] == 3
    luma = values.new_tensor(_LUMA if colour else [1 / values.shape[1]] * values.shape[1])[:, None, None]

    def grey(image: torch.Tensor) -> torch.Tensor:
        return (image * luma).sum(1, keepdim=True)

    changed = values * brightness
    mean = grey(changed).mean((2, 3), keepdim=True)
    changed = mean + (changed - mean) * contrast
    if colour:
        lightness = grey(changed)
        changed = lightness + (changed - lightness) * saturation
        changed = torch.einsum("bij,bjhw->bihw", _hue_rotation(draws[:, 3, 0, 0, 0]), changed)
    changed = torch.where(draws[:, 4] < _JITTER_SHARE, changed, values)
    if colour:
        changed = torch.where(draws[:, 5] < _GREY_SHARE, grey(changed).expand_as(changed), changed)
    changed = changed.clamp(0, peak)
    return changed.round().to(torch.uint8) if integer else changed


def _hue_rotation(draw: torch.Tensor) -> torch.Tensor:
    """Rotations `(B, 3, 3)` of the colours around the grey axis (Rodrigues' formula)."""
    angle = 2 * math.pi * _HUE * (2 * draw - 1)
    cosine, sine = (value[:, None, None] for value in (angle.cos(), angle.sin() / math.sqrt(3)))
    cross = draw.new_tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    return cosine * torch.eye(3, device=draw.device) + (1 - cosine) / 3 + sine * cross
