# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Losses of the families, as pure functions with their formulas."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from clmae.configuration.errors import InputError


def patchify(pixel_values: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
    """Pixels `(B, C, H, W)` as patches `(B, N, p_h * p_w * C)`, channel fastest within a patch (MAE's layout)."""
    batch_size, channels, height, width = pixel_values.shape
    patch_height, patch_width = patch_size
    grid = height // patch_height, width // patch_width
    patches = pixel_values.reshape(batch_size, channels, grid[0], patch_height, grid[1], patch_width)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch_size, grid[0] * grid[1], -1)


def unpatchify(patches: torch.Tensor, patch_size: tuple[int, int], grid_size: tuple[int, int]) -> torch.Tensor:
    """The inverse of [`patchify`]: patches `(B, h * w, p_h * p_w * C)` as pixels `(B, C, H, W)`."""
    (patch_height, patch_width), (rows, columns) = patch_size, grid_size
    pixels = patches.reshape(patches.shape[0], rows, columns, patch_height, patch_width, -1)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, rows * patch_height, columns * patch_width)


def patch_moments(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation `(B, N, 1)` of each patch, the latter √(unbiased variance + 1e-6) (MAE's code)."""
    mean = patches.mean(-1, keepdim=True)
    # Not `var`, which takes 15 times as long on a CPU: 2 % of a small model's step.
    variance = (patches - mean).square().sum(-1, keepdim=True) / (patches.shape[-1] - 1)
    return mean, (variance + 1e-6).sqrt()


def patch_targets(pixel_values: torch.Tensor, patch_size: tuple[int, int], norm_pix_loss: bool) -> torch.Tensor:
    """What the decoder has to predict, `(B, N, p_h * p_w * C)` in float32 or wider: patches, normalised or raw."""
    patches = patchify(pixel_values, patch_size)
    patches = patches.float() if patches.dtype in (torch.float16, torch.bfloat16) else patches
    if not norm_pix_loss:
        return patches
    mean, std = patch_moments(patches)
    return (patches - mean) / std


def patch_errors(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean squared error e `(B, N)` of each patch, in the targets' precision."""
    return (logits.to(targets.dtype) - targets).square().mean(-1)


def masked_mean(errors: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`L_rec = Σ mask·e / Σ mask` over batch and patches (MAE, section 3: masked patches only)."""
    return (errors * mask).sum() / mask.sum()


def gauss_loss(keep: torch.Tensor, sigma: float) -> torch.Tensor:
    """`L_gauss = mean(σ√(2π)·exp(−(m − ½)²/2σ²))` (CL-MAE): pushes m `(B, N)` away from ½."""
    return (sigma * math.sqrt(2 * math.pi)) * torch.exp(-((keep - 0.5) ** 2) / (2 * sigma**2)).mean()


def kl_loss(keep: torch.Tensor, mask_ratio: float, reduction: str) -> torch.Tensor:
    """`L_kl = KL(Bernoulli(m̄_b) ‖ Bernoulli(1 − r))`, m̄_b the mean of an image's m (CL-MAE): holds the mask ratio.

    `reduction` is `"mean"` over the batch, or the authors' `"sum"`, whose weight depends on the batch size.
    """
    # A fully saturated image would have an infinite gradient.
    tiny = torch.finfo(keep.dtype).eps
    mean, visible = keep.mean(1).clamp(tiny, 1 - tiny), 1 - mask_ratio
    divergence = mean * (mean / visible).log() + (1 - mean) * ((1 - mean) / mask_ratio).log()
    return divergence.mean() if reduction == "mean" else divergence.sum()


def diversity_loss(keep: torch.Tensor, scale: float) -> torch.Tensor:
    """`L_div = mean over pairs i<j of exp(−scale·‖m_i − m_j‖₂)` (CL-MAE): keeps images' masks `(B, N)` apart.

    0 for a single image. `pdist` takes each pair once, and its gradient between equal rows is 0, not NaN.
    """
    if keep.shape[0] < 2:
        return keep.sum() * 0
    return torch.exp(-scale * torch.pdist(keep)).mean()


def error_prediction_loss(
    predictions: torch.Tensor, errors: torch.Tensor, mask: torch.Tensor, across_processes: bool = True
) -> torch.Tensor:
    """`L_err = Σ mask·(ê − z)² / Σ mask`, with z the logarithm of the errors e, standardised over the masked patches.

    Of all processes together, if `across_processes`. `predictions` ê, `errors` and `mask` are `(B, N)`; the gradient is
    for ê alone.
    """
    total_of = sum_across_processes if across_processes else lambda values: values
    targets = (errors.detach() + 1e-6).log()
    count, total = total_of(torch.stack([mask.sum(), (targets * mask).sum()]))
    deviations = targets - total / count
    variance = total_of((deviations.square() * mask).sum()) / count
    return masked_mean((predictions - deviations / (variance.sqrt() + 1e-6)).square(), mask)


def contrastive_loss(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """Symmetric InfoNCE of two views' vectors `(B, d)` (arXiv 1807.03748; symmetric as in SimCLR, arXiv 2002.05709).

    `½·[CE(S, i) + CE(Sᵀ, i)]`, `S_ij = cos(first_i, second_j) / temperature`: view i of one kind has to be found among
    all B of the other. Computed in float32 at least, whatever comes in, so that half precision does not round the
    similarities.

    Raises:
        InputError: There is one image, and so nothing to tell it from.
    """
    if len(first) < 2:
        raise InputError(
            "`pixel_values` holds one image, but contrast needs others to tell it from: take a batch of at least 2, or "
            "set `contrastive_loss_weight` to 0."
        )
    with torch.autocast(first.device.type, enabled=False):
        wide = torch.promote_types(first.dtype, torch.float32)
        first, second = (torch.nn.functional.normalize(vectors.to(wide), dim=1) for vectors in (first, second))
        scores = first @ second.T / temperature
        own = torch.arange(len(scores), device=scores.device)
        return (torch.nn.functional.cross_entropy(scores, own) + torch.nn.functional.cross_entropy(scores.T, own)) / 2


def world_size() -> int:
    """Number of data-parallel processes; 1 where torch.distributed is not running."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_across_processes(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all processes, without gradient; `values` itself where there is one process."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def gather_across_processes(values: torch.Tensor) -> torch.Tensor:
    """Rows of all processes, `(world_size * B, …)`; every process must hold equally many.

    For a loss that each process computes on the whole gathered batch. The gradient flows into the process's own rows
    only, times the world size: data-parallel training averages over processes, and so arrives at the gradient of one
    process with the whole batch, without any communication in the backward pass.
    """
    processes = world_size()
    if processes == 1:
        return values
    rows = [torch.empty_like(values) for _ in range(processes)]
    dist.all_gather(rows, values.detach().contiguous())
    rows[dist.get_rank()] = scale_gradient(values, processes)
    return torch.cat(rows)


def scale_gradient(values: torch.Tensor, factor: float) -> torch.Tensor:
    """`values`, exactly, with `factor` times their gradient."""
    return values.detach() + factor * (values - values.detach())
