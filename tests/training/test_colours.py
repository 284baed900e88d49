# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Random colours of an image, against torchvision's functions; and where datasets use them."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from clmae.training.data import ImageDataset, ResidentImageDataset
from clmae.training.data.colours import jitter_colours

NEUTRAL = [0.5, 0.5, 0.5, 0.5, 0.0, 0.9]  # changed by nothing, not grey


def draws(**values: float) -> torch.Tensor:
    names = ("brightness", "contrast", "saturation", "hue", "jitter", "grey")
    return torch.tensor([[values.get(name, NEUTRAL[i]) for i, name in enumerate(names)]])


@pytest.fixture
def image():
    smooth = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(0.2 + 0.4 * smooth, size=16, mode="bilinear")


def test_neutral_draws_change_nothing(image):
    assert torch.allclose(jitter_colours(image, draws(), 1.0), image, atol=1e-6)
    extreme = draws(brightness=1.0, contrast=0.0, saturation=1.0, hue=0.0, jitter=0.85)
    assert torch.equal(jitter_colours(image, extreme, 1.0), image)  # one image in five keeps its colours


@pytest.mark.parametrize("draw", [0.0, 0.3, 0.999])
def test_each_change_is_torchvisions(image, draw):
    brighter = jitter_colours(image, draws(brightness=draw), 1.0)
    assert torch.allclose(brighter, F.adjust_brightness(image, 1 + 0.4 * (2 * draw - 1)), atol=1e-5)
    contrasted = jitter_colours(image, draws(contrast=draw), 1.0)
    assert torch.allclose(contrasted, F.adjust_contrast(image, 1 + 0.4 * (2 * draw - 1)), atol=2e-3)
    saturated = jitter_colours(image, draws(saturation=draw), 1.0)
    assert torch.allclose(saturated, F.adjust_saturation(image, 1 + 0.2 * (2 * draw - 1)), atol=2e-3)
    grey = jitter_colours(image, draws(grey=0.1), 1.0)
    assert torch.allclose(grey, F.rgb_to_grayscale(image, 3), atol=2e-3)


def test_hue_turns_around_the_grey_axis(image):
    turned = jitter_colours(image, draws(hue=1.0), 1.0)
    assert torch.allclose(turned.sum(1), image.sum(1), atol=1e-5)
    # A tenth of a turn, in the plane of colours.
    plane, after = (values - values.mean(1, keepdim=True) for values in (image, turned))
    cosine = torch.nn.functional.cosine_similarity(plane, after)
    assert torch.allclose(cosine, torch.tensor(0.8090), atol=1e-3)  # cos 36°
    assert torch.allclose(jitter_colours(turned, draws(hue=0.0), 1.0), image, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_types_and_ranges(channels):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, channels, 8, 8), generator=generator).to(torch.uint8)
    numbers = torch.rand(64, 6, generator=generator)
    changed = jitter_colours(pixels, numbers)
    assert changed.dtype == torch.uint8
    assert (changed != pixels).any()
    exact = jitter_colours(pixels.float(), numbers)
    assert (changed - exact).abs().max() <= 0.5
    assert torch.allclose(jitter_colours(pixels / 255, numbers, 1.0) * 255, exact, atol=1e-3)


@pytest.mark.parametrize("num_views", [1, 2])
def test_the_last_view_of_a_training_sample_has_other_colours(num_views):
    from datasets import Dataset
    from PIL import Image

    colours = [(200, 80, 40), (10, 200, 90), (90, 90, 220), (220, 210, 30)]
    data = Dataset.from_dict({"image": [Image.new("RGB", (16, 16), colour) for colour in colours]})
    sizes = dict(image_size=(16, 16), num_channels=3, num_patches=16, patch_size=(4, 4))
    settings = dict(**sizes, mean=[0.0] * 3, std=[1.0] * 3, num_views=num_views)
    plain, jittered = (ImageDataset(data, "image", color_jitter=jitter, **settings) for jitter in (False, True))
    resident = ResidentImageDataset(jittered, "cpu")
    views = [[dataset[key]["pixel_values"] for key in range(40)] for dataset in (plain, jittered, resident)]
    before, after, on_device = (torch.stack(samples).view(40, num_views, -1) for samples in views)
    assert torch.equal(before[:, :-1], after[:, :-1])
    changed = (before[:, -1] != after[:, -1]).any(1).float().mean()
    assert 0.6 < changed < 1
    assert (after - on_device).abs().max() < 1.5 / 255
    evaluation = ImageDataset(data, "image", color_jitter=True, train=False, **settings)
    assert torch.allclose(evaluation[0]["pixel_values"][:, 0, 0] * 255, torch.tensor(colours[0]).float(), atol=1e-3)
