# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Figures of what a masked autoencoder reconstructs, and curves of its training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from clmae.configuration.configuration_mae import pair
from clmae.model_cards.files import replacing
from clmae.modeling.losses import patch_moments, patchify, unpatchify

_GREY = 0.5  # what a masked patch is drawn as


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    pixel_values: torch.Tensor,
    noise: torch.Tensor | None = None,
    curriculum_factor: float | None = None,
) -> dict[str, torch.Tensor]:
    """Masks and reconstructs images, under learned masks where the model has them.

    Args:
        model: A masked autoencoder (`MAEForPreTraining`, `CLMAEForPreTraining`, transformers' `ViTMAEForPreTraining`).
        pixel_values (`(B, C, H, W)`): Normalised images.
        noise (`(B, N)`, *optional*): Fixes what of the masks is drawn.
        curriculum_factor (`float`, *optional*): λ_CL of masks that are drawn by predicted errors; the curriculum's end
            if not given.

    Returns:
        `mask` (`(B, 1, H, W)`, 1 = masked), `reconstruction` (`(B, C, H, W)`: visible patches as they were, masked ones
        as predicted) and, where learned, `keep_probabilities` or `predicted_errors` (`(B, h, w)`).
    """
    was_training = model.training
    config: Any = model.config
    model.eval()
    factor = {}
    if getattr(config, "learns_masks", False):
        factor = {"curriculum_factor": config.curriculum_end if curriculum_factor is None else curriculum_factor}
    outputs = model(pixel_values=pixel_values, noise=noise, **factor)
    model.train(was_training)
    patch_size = pair(config.patch_size)
    grid_size = pixel_values.shape[-2] // patch_size[0], pixel_values.shape[-1] // patch_size[1]
    patches = patchify(pixel_values.float(), patch_size)
    predicted = outputs.logits.float()
    if config.norm_pix_loss:
        # The model predicts patches normalised by their own moments; only the original knows those.
        mean, std = patch_moments(patches)
        predicted = predicted * std + mean
    mask = outputs.mask.float().unsqueeze(-1)
    pixels_of_mask = mask.expand(-1, -1, patch_size[0] * patch_size[1])
    result = {
        "mask": unpatchify(pixels_of_mask, patch_size, grid_size),
        "reconstruction": unpatchify(torch.where(mask > 0, predicted, patches), patch_size, grid_size),
    }
    for name in ("keep_probabilities", "predicted_errors"):
        if outputs.get(name) is not None:
            result[name] = outputs[name].float().unflatten(1, grid_size)
    return result


def reconstruction_figure(
    model: nn.Module,
    pixel_values: torch.Tensor,
    noise: torch.Tensor | None = None,
    image_mean: list[float] | None = None,
    image_std: list[float] | None = None,
    title: str | None = None,
    curriculum_factors: Sequence[float | None] = (None,),
) -> Figure:
    """A row each of originals, masked images, reconstructions and, where masks are learned, what they are learned by.

    `image_mean` and `image_std` are those that `pixel_values` `(B, C, H, W)` were normalised by; without them the
    pixels are drawn as if in [0, 1]. With several `curriculum_factors` there are masks and reconstructions of each.
    """
    images = _displayable(pixel_values, image_mean, image_std)
    rows: list[tuple[str, np.ndarray, dict[str, Any]]] = [("image", images, {})]
    for factor in curriculum_factors:
        parts = reconstruct(model, pixel_values, noise, factor)
        masked = parts["mask"].cpu().permute(0, 2, 3, 1).numpy()
        at = f"\nat λ = {factor:g}" if factor is not None and len(curriculum_factors) > 1 else ""
        rows.append((f"visible{at}", images * (1 - masked) + _GREY * masked, {}))
        rows.append((f"reconstruction{at}", _displayable(parts["reconstruction"], image_mean, image_std), {}))
    if "keep_probabilities" in parts:
        keep = parts["keep_probabilities"].cpu().numpy()
        rows.append(("keep probability", keep, {"vmin": 0, "vmax": 1, "cmap": "viridis"}))
    if "predicted_errors" in parts:
        errors = parts["predicted_errors"].cpu().numpy()
        rows.append(("predicted error", errors, {"vmin": -2, "vmax": 2, "cmap": "viridis"}))  # in standard deviations
    columns = len(pixel_values)
    figure = Figure(figsize=(1.3 * columns + 1.2, 1.4 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (label, pictures, options) in enumerate(rows):
        for axis, picture in zip(axes[row], pictures, strict=True):
            shown = axis.imshow(picture, interpolation="nearest", **options)
            axis.set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(label)
        if options:
            figure.colorbar(shown, ax=axes[row].tolist(), fraction=0.02, pad=0.01)
    if title:
        figure.suptitle(title)
    if getattr(model.config, "norm_pix_loss", False):
        note = "masked patches: the pattern is predicted, brightness and contrast are the original's"
        figure.supxlabel(note, fontsize="x-small")
    return figure


def _displayable(pixel_values: torch.Tensor, mean: list[float] | None, std: list[float] | None) -> np.ndarray:
    """Pictures `(B, H, W, 3)` in [0, 1] of images with any number of channels: the first three, or the first."""
    pixels = pixel_values.detach().float().cpu()
    if mean is not None and std is not None:
        pixels = pixels * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    pixels = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    return pixels.clamp(0, 1).permute(0, 2, 3, 1).numpy()


def curves_figure(log_history: list[dict[str, float]]) -> Figure:
    """Curves of a run over its steps, from `trainer.state.log_history`: losses, curriculum, mask difficulty, masks.

    Only what was logged is drawn.
    """
    panels = [
        ("losses", ["reconstruction_loss", "soft_reconstruction_loss", "prediction_loss", "eval_loss"]),
        ("accuracy on labelled images", ["knn_accuracy", "linear_accuracy"]),
        ("mask difficulty", ["mask_difficulty"]),
        ("curriculum factor λ_CL", ["curriculum_factor"]),
        ("keep probabilities", ["keep_mean", "keep_low", "keep_high", "keep_spread"]),
    ]
    curves = {name: _curve(log_history, name) for _, names in panels for name in names}
    if not curves["reconstruction_loss"][0]:  # a model that returns nothing but its loss
        curves["reconstruction_loss"] = _curve(log_history, "loss")
    drawn = [(title, [n for n in names if curves[n][0]]) for title, names in panels]
    drawn = [(title, names) for title, names in drawn if names]
    figure = Figure(figsize=(7, 2.1 * max(1, len(drawn))), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(max(1, len(drawn)), squeeze=False)[:, 0], drawn, strict=False):
        for name in names:
            axis.plot(*curves[name], label=name, marker="." if len(curves[name][0]) < 40 else None)
        if "mask_difficulty" in names:
            axis.axhline(1.0, color="grey", linewidth=0.8)
        if len(names) > 1:
            axis.legend(fontsize="small")
        axis.set_title(title, fontsize="medium")
        axis.grid(alpha=0.3)
    figure.supxlabel("step", fontsize="medium")
    return figure


def _curve(log_history: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
    return [x for x, _ in points], [y for _, y in points]


def figure_to_array(figure: Figure) -> np.ndarray:
    """The drawn figure as `(height, width, 3)` uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes a PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return Path(path)
