# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Pictures and curves: what they show, for any number of channels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from clmae import MAEConfig
from clmae.modeling.modeling_cl_mae import CLMAEForPreTrainingOutput
from clmae.training.pictures import (
    curves_figure,
    figure_to_array,
    reconstruct,
    reconstruction_figure,
    save_figure,
)

from .runs import CONFIG, tiny_model

SIZE, PATCH, GRID = (8, 18), (4, 6), (2, 3)
MASK = torch.tensor([[1.0, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 0]])


def boxes(grid=GRID, patch=PATCH):
    """Slices of each patch, in order."""
    for row, column in itertools.product(range(grid[0]), range(grid[1])):
        top, left = row * patch[0], column * patch[1]
        yield slice(top, top + patch[0]), slice(left, left + patch[1])


def targets_by_hand(pixels, norm_pix_loss):
    """What a perfect decoder would say: patch by patch, channel fastest."""
    rows = []
    for image in pixels:
        vectors = [image[:, y, x].permute(1, 2, 0).flatten() for y, x in boxes()]
        if norm_pix_loss:
            vectors = [(v - v.mean()) / (v.var(unbiased=True) + 1e-6).sqrt() for v in vectors]
        rows.append(torch.stack(vectors))
    return torch.stack(rows)


class Fixed(nn.Module):
    """A model that returns given logits and masks."""

    def __init__(self, channels, norm_pix_loss, logits, keep=None):
        super().__init__()
        self.config = MAEConfig(
            **{**CONFIG, "image_size": SIZE, "patch_size": PATCH}, num_channels=channels, norm_pix_loss=norm_pix_loss
        )
        self.logits, self.keep, self.calls = logits, keep, []

    def forward(self, pixel_values, noise=None):
        self.calls.append((self.training, noise))
        return CLMAEForPreTrainingOutput(logits=self.logits, mask=MASK, keep_probabilities=self.keep)


def images(channels):
    return torch.randn(2, channels, *SIZE, generator=torch.Generator().manual_seed(channels))


# -- reconstruct ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_a_perfect_prediction_is_the_image(channels, norm_pix_loss):
    pixels = images(channels)
    parts = reconstruct(Fixed(channels, norm_pix_loss, targets_by_hand(pixels, norm_pix_loss)), pixels)
    assert set(parts) == {"mask", "reconstruction"}
    assert parts["reconstruction"].shape == pixels.shape
    torch.testing.assert_close(parts["reconstruction"], pixels, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_visible_patches_stay_as_they_were(channels, norm_pix_loss):
    pixels = images(channels)
    parts = reconstruct(Fixed(channels, norm_pix_loss, torch.zeros(2, 6, 24 * channels)), pixels)
    assert parts["mask"].shape == (2, 1, *SIZE)
    for i, (patch, (y, x)) in itertools.product(range(2), enumerate(boxes())):
        drawn, original = parts["reconstruction"][i, :, y, x], pixels[i, :, y, x]
        assert torch.equal(parts["mask"][i, 0, y, x], MASK[i, patch].expand(PATCH))
        if MASK[i, patch]:
            # A prediction of 0 is the patch's mean where patches are normalised.
            value = original.mean() if norm_pix_loss else torch.tensor(0.0)
            torch.testing.assert_close(drawn, value.expand_as(drawn), rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(drawn, original)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_called_in_evaluation_mode_and_left_in_its_own(training):
    keep, noise = torch.arange(12.0).reshape(2, 6) / 12, torch.rand(2, 6)
    model = Fixed(3, True, torch.zeros(2, 6, 72), keep).train(training)
    parts = reconstruct(model, images(3), noise)
    assert model.calls == [(False, noise)]
    assert model.training is training
    assert parts["keep_probabilities"].tolist() == keep.reshape(2, *GRID).tolist()


@pytest.mark.parametrize("family", ["mae", "cl_mae"])
def test_real_models(family):
    model = tiny_model(family)
    pixels, noise = torch.randn(3, 3, 16, 16), torch.rand(3, 16)
    parts = reconstruct(model, pixels, noise)
    with torch.no_grad():
        expected = model.eval()(pixels, noise)
    assert torch.equal(parts["mask"][:, 0, ::4, ::4].flatten(1), expected.mask)
    assert not parts["reconstruction"].requires_grad
    if family == "cl_mae":
        assert torch.equal(parts["keep_probabilities"].flatten(1), expected.keep_probabilities)


def test_half_precision_is_drawn_in_float32():
    parts = reconstruct(tiny_model("mae").bfloat16(), torch.randn(1, 3, 16, 16).bfloat16(), torch.rand(1, 16))
    assert parts["reconstruction"].dtype == parts["mask"].dtype == torch.float32


# -- figures --------------------------------------------------------------------------------------------------------


def shown(figure):
    """The pictures of a figure, as rows of arrays."""
    rows = {}
    for axis in figure.axes:
        if axis.images:
            rows.setdefault(axis.get_subplotspec().rowspan.start, []).append(np.asarray(axis.images[0].get_array()))
    return [rows[i] for i in sorted(rows)]


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_figure_shows_original_visible_and_reconstruction(channels):
    pixels = images(channels)
    mean, std = [0.1 * (c + 1) for c in range(channels)], [0.05 * (c + 1) for c in range(channels)]
    model = Fixed(channels, True, targets_by_hand(pixels, True))
    rows = shown(reconstruction_figure(model, pixels, image_mean=mean, image_std=std))
    assert [len(row) for row in rows] == [2, 2, 2]
    drawn = (0, 1, 2) if channels >= 3 else (0, 0, 0)
    for i in range(2):
        original = np.stack([(pixels[i, c].numpy() * std[c] + mean[c]).clip(0, 1) for c in drawn], axis=-1)
        np.testing.assert_allclose(rows[0][i], original, atol=1e-6)
        np.testing.assert_allclose(rows[2][i], original, atol=1e-5)
        for patch, (y, x) in enumerate(boxes()):
            expected = 0.5 if MASK[i, patch] else original[y, x]
            np.testing.assert_allclose(rows[1][i][y, x], np.broadcast_to(expected, (*PATCH, 3)), atol=1e-6)


def test_figure_without_mean_and_std_shows_the_pixels_as_they_are():
    pixels = images(3)[:1]  # one image is enough
    (original,), *_ = shown(reconstruction_figure(tiny_model(image_size=SIZE, patch_size=PATCH), pixels))
    np.testing.assert_allclose(original, pixels[0].clamp(0, 1).permute(1, 2, 0).numpy())


def test_figure_of_a_masking_module_has_a_fourth_row_on_a_fixed_scale():
    keep = torch.rand(2, 6)
    figure = reconstruction_figure(Fixed(3, True, torch.zeros(2, 6, 72), keep), images(3), title="step 7")
    rows = shown(figure)
    assert len(rows) == 4
    np.testing.assert_allclose(np.stack(rows[3]), keep.reshape(2, *GRID).numpy())
    scales = {axis.images[0].get_clim() for axis in figure.axes if axis.images and axis.images[0].get_array().ndim == 2}
    assert scales == {(0, 1)}
    assert figure.get_suptitle() == "step 7"


def test_figure_of_partner_and_adversary():
    model = tiny_model("cl_mae", masker_objective="error").eval()
    pixels, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    _, *rows, errors = shown(reconstruction_figure(model, pixels, noise, curriculum_factors=(1.0, -1.0)))
    assert len(rows) == 4
    for factor, (visible, reconstruction) in ((1.0, rows[:2]), (-1.0, rows[2:])):
        ((_, expected, whole, _),) = [shown(reconstruction_figure(model, pixels, noise, curriculum_factors=[factor]))]
        np.testing.assert_array_equal(visible, expected)
        np.testing.assert_array_equal(reconstruction, whole)
    assert not np.array_equal(rows[0], rows[2])
    np.testing.assert_allclose(np.stack(errors), reconstruct(model, pixels, noise)["predicted_errors"].numpy())


def test_figure_to_array_and_file_agree_on_what_is_seen(tmp_path):
    figure = reconstruction_figure(tiny_model("mae"), torch.rand(2, 3, 16, 16), torch.rand(2, 16))
    array = figure_to_array(figure)
    assert array.dtype == np.uint8
    assert array.ndim == 3
    assert array.shape[2] == 3
    assert array.std() > 5
    path = save_figure(figure, tmp_path / "new" / "folder" / "picture.png")
    assert path == tmp_path / "new" / "folder" / "picture.png"
    assert [p.name for p in path.parent.iterdir()] == ["picture.png"]  # nothing unfinished is left
    with Image.open(path) as image:
        assert image.format == "PNG"
        # At another resolution, the same proportions and about the same brightness.
        assert image.width / image.height == pytest.approx(array.shape[1] / array.shape[0], rel=0.02)
        assert np.asarray(image.convert("RGB")).mean() == pytest.approx(array.mean(), rel=0.02)


def test_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    figure = curves_figure([])
    path = save_figure(figure, tmp_path / "curves.png")
    before = path.read_bytes()

    def fail(target, **kwargs):
        with open(target, "wb") as file:
            file.write(b"half a pict")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        save_figure(figure, path)
    assert path.read_bytes() == before


# -- curves ---------------------------------------------------------------------------------------------------------

HISTORY = [
    {"step": 0, "mask_difficulty": 0.9},
    {"step": 5, "loss": 3.0, "reconstruction_loss": 1.5, "soft_reconstruction_loss": 1.4, "curriculum_factor": 1.0}
    | {"keep_mean": 0.3, "keep_low": 0.5, "keep_high": 0.2, "keep_spread": 0.1},
    {"step": 5, "eval_loss": 1.6},
    {"step": 10, "loss": 2.0, "reconstruction_loss": 1.0, "soft_reconstruction_loss": 1.1, "curriculum_factor": -1.0}
    | {"keep_mean": 0.25, "keep_low": 0.7, "keep_high": 0.25, "keep_spread": 0.2},
    {"step": 10, "mask_difficulty": 1.2},
    {"step": 10, "train_runtime": 1.0},
]


def curves(figure):
    """Title of each panel: its labelled curves."""
    return {
        axis.get_title(): {
            line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
            for line in axis.lines
            if not line.get_label().startswith("_")
        }
        for axis in figure.axes
    }


def test_curves_with_a_masking_module():
    panels = curves(curves_figure(HISTORY))
    assert list(panels) == ["losses", "mask difficulty", "curriculum factor λ_CL", "keep probabilities"]
    assert panels["losses"] == {
        "reconstruction_loss": ([5, 10], [1.5, 1.0]),
        "soft_reconstruction_loss": ([5, 10], [1.4, 1.1]),
        "eval_loss": ([5], [1.6]),
    }
    assert panels["mask difficulty"] == {"mask_difficulty": ([0, 10], [0.9, 1.2])}
    assert panels["curriculum factor λ_CL"] == {"curriculum_factor": ([5, 10], [1.0, -1.0])}
    assert list(panels["keep probabilities"]) == ["keep_mean", "keep_low", "keep_high", "keep_spread"]


@pytest.mark.parametrize(
    ("names", "panels"),
    [
        (("step", "loss", "reconstruction_loss", "eval_loss"), {"losses": ["reconstruction_loss", "eval_loss"]}),
        (("step", "loss"), {"losses": ["reconstruction_loss"]}),  # a model that returns nothing but its loss
    ],
)
def test_curves_of_what_was_logged_alone(names, panels):
    history = [{name: entry[name] for name in names if name in entry} for entry in HISTORY]
    drawn = curves(curves_figure(history))
    assert {title: list(lines) for title, lines in drawn.items()} == panels
    assert drawn["losses"]["reconstruction_loss"] == ([5, 10], [3.0, 2.0] if len(names) == 2 else [1.5, 1.0])


def test_curves_of_a_run_that_logged_nothing(tmp_path):
    with Image.open(save_figure(curves_figure([]), tmp_path / "curves.png")) as image:
        assert min(image.size) > 50
