# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The curriculum factor λ_CL over time, and the numbers that show what the masking module is doing."""

from __future__ import annotations

import math

import torch

from clmae.configuration.configuration_cl_mae import CURRICULUM_SHAPES
from clmae.configuration.errors import InputError


def curriculum_factor(step: int, total_steps: int, shape: str, start: float, end: float) -> float:
    """λ_CL at optimiser step `step` of `total_steps` (CL-MAE, section 3).

    `start` at step 0 and `end` at the last step, `total_steps - 1`. With p = step / (total_steps − 1):

    - `"linear"`: `start + (end − start)·p`
    - `"cosine"`: `start + (end − start)·(1 − cos(πp))/2`
    - `"constant"`: `start`

    Being a function of the step alone, it is the same within an accumulated batch and after a resume.
    """
    progress = min(max(step / max(total_steps - 1, 1), 0.0), 1.0)
    if shape == "constant":
        return start
    if shape == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    elif shape != "linear":
        raise InputError(f"`curriculum_shape` is {shape!r}; choose one of {', '.join(CURRICULUM_SHAPES)}.")
    # Written so that both ends are exact.
    return start * (1 - progress) + end * progress


def keep_probability_sums(keep: torch.Tensor) -> torch.Tensor:
    """What [`keep_probability_statistics`] needs of m `(..., num_patches)`: sums `(5, num_patches)` over the images.

    Sums of several batches, or of several processes, may be added.
    """
    keep = keep.detach().float().flatten(0, -2)
    return torch.stack([torch.ones_like(keep), keep, keep.square(), (keep < 0.1).float(), (keep > 0.9).float()]).sum(1)


def keep_probability_statistics(sums: torch.Tensor) -> dict[str, torch.Tensor]:
    """What m looks like, from `sums` `(..., 5, num_patches)` of [`keep_probability_sums`]; values of shape `(...)`.

    - `keep_mean`, `keep_std`: mean (to be near 1 − r) and spread over all values;
    - `keep_low`, `keep_high`: share below 0.1 and above 0.9 (their sum near 1: saturated);
    - `keep_spread`: mean over patches of the standard deviation between images (near 0: the module has collapsed to
      one mask for all); 0 for a single image.
    """
    count, total, squares, low, high = sums.unbind(-2)
    images = count.sum(-1)
    mean = total.sum(-1) / images
    return {
        "keep_mean": mean,
        "keep_std": (squares.sum(-1) / images - mean.square()).clamp_min(0).sqrt(),
        "keep_low": low.sum(-1) / images,
        "keep_high": high.sum(-1) / images,
        "keep_spread": (squares / count - (total / count).square()).clamp_min(0).sqrt().mean(-1),
    }


def mask_warnings(statistics: dict[str, float], mask_ratio: float) -> dict[str, str]:
    """What is wrong with the masks by the `statistics` of [`keep_probability_statistics`]: kind -> message.

    `"collapsed"` (spread between images below 0.05), `"saturated"` (over 99 % of m beyond 0.1 and 0.9) and
    `"mask_ratio"` (mean of m further than 0.05 from 1 − `mask_ratio`); empty where all is well.
    """
    spread, mean = statistics["keep_spread"], statistics["keep_mean"]
    saturated = statistics["keep_low"] + statistics["keep_high"]
    warnings = {}
    if spread < 0.05:
        warnings["collapsed"] = (
            f"the masking module has collapsed: the spread of m between images is {spread:.3f}, nearly one mask for "
            "all. Raise `diversity_loss_weight`, or lower `masker_learning_rate_multiplier`."
        )
    if saturated > 0.99:
        warnings["saturated"] = (
            f"the masking module is saturated: {saturated:.1%} of m lie below 0.1 or above 0.9, where the sigmoid has "
            "hardly a gradient. Lower `gauss_loss_weight` and `diversity_loss_weight`."
        )
    if abs(mean - (1 - mask_ratio)) > 0.05:
        warnings["mask_ratio"] = (
            f"the masking module has left the mask ratio: the mean of m is {mean:.3f}, not 1 - mask_ratio = "
            f"{1 - mask_ratio:.3f}. Raise `kl_loss_weight`."
        )
    return warnings
