# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Random numbers, boxes and pixels: pure functions of their keys, distributed as torchvision's, the same in batches."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import beta, chisquare, ks_2samp, kstest
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as tvF

from clmae.training.data import (
    center_view,
    contrastive_crop_box,
    crop_and_resize,
    crop_and_resize_batch,
    normalize,
    random_resized_crop_box,
    sample_generator,
    sample_state,
    uniform,
)
from clmae.training.data.crops import center_crop_box, scale_box
from clmae.training.data.randomness import uint64

WHOLE = (0.0, 0.0, 1.0, 1.0)


def draws(count, epoch=0):
    """What `count` samples draw, as a batch."""
    return functools.partial(uniform, sample_state(0, uint64([epoch] * count), uint64(range(count)), uint64(0)))


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


# -- random numbers ---------------------------------------------------------------------------------------------


def test_splitmix_is_the_published_one():
    # From state 0 its first outputs are 0xE220A8397B1DCDAF and 0x6E789E6AA1B965F4.
    assert [uniform(0, i) for i in (0, 1)] == [(n >> 40) / 2**24 for n in (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4)]


def test_numbers_are_uniform_and_independent_over_every_key():
    numbers = np.stack([draws(4000)(i) for i in range(8)] + [draws(4000, epoch=1)(0)])
    numbers = np.concatenate([numbers, [[uniform(sample_state(0, 0, key, 1), 0) for key in range(4000)]]])
    numbers = np.concatenate([numbers, [[uniform(sample_state(1, 0, key), 0) for key in range(4000)]]])
    assert 0 <= numbers.min() <= numbers.max() < 1
    assert chisquare(np.histogram(numbers, 20, (0, 1))[0]).pvalue > 1e-3
    assert np.abs(np.corrcoef(numbers) - np.eye(len(numbers))).max() < 0.08
    assert abs(np.corrcoef(numbers[0, 1:], numbers[0, :-1])[0, 1]) < 0.06, "neighbours"
    assert (numbers.astype(np.float32) == numbers).all(), "or a float32 could be 1"


def test_one_sample_draws_what_it_draws_in_a_batch():
    epoch, key, view = (uint64(values) for values in ([0, 3, 2**31], [5, 2**32 - 1, 0], [1, 0, 1]))
    batch = uniform(sample_state(7, epoch, key, view)[:, None], range(70))
    for i in range(3):
        state = sample_state(7, int(epoch[i]), int(key[i]), int(view[i]))
        assert [uniform(state, position) for position in range(70)] == batch[i].tolist()


def test_sample_generator_is_pure_and_neighbours_are_uncorrelated():
    def draw(*args):
        return torch.rand(4000, generator=sample_generator(*args)).double()

    base = draw(0, 0, 0)
    assert torch.equal(base, draw(0, 0, 0))
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, "noise"), (0, 0, -1), (0, 0, 2**40)):
        assert abs(torch.corrcoef(torch.stack([base, draw(*other)]))[0, 1]) < 0.08
    assert not torch.equal(draw(1, 2, 3), draw(3, 2, 1))
    assert not torch.equal(draw(1, 12, 3), draw(11, 2, 3))


# -- boxes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (48, 64, (0.2, 1.0), (3 / 4, 4 / 3)),
        (100, 33, (0.08, 1.0), (3 / 4, 4 / 3)),
        (64, 64, (0.5, 0.5), (1.0, 1.0)),
        (300, 20, (0.9, 1.0), (3 / 4, 4 / 3)),  # nothing fits: the central box
        (20, 300, (0.9, 1.0), (3 / 4, 4 / 3)),
    ],
)
def test_random_crop_is_distributed_as_torchvisions(height, width, scale, ratio):
    count = 3000
    torch.manual_seed(0)
    blank = torch.zeros(1, height, width)
    expected = torch.tensor([RandomResizedCrop.get_params(blank, scale, ratio) for _ in range(count)]).numpy()
    boxes = random_resized_crop_box(height, width, draws(count), scale, ratio)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= (height, width)).all()
    for column in range(4):
        assert ks_2samp(boxes[:, column], expected[:, column]).pvalue > 1e-3
    for share in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2]):  # area and aspect ratio
        assert ks_2samp(share(boxes), share(expected)).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(32, 32), (375, 500), (60, 12), (1, 1), (1, 50), (2, 3)])
@pytest.mark.parametrize("object_box", [None, (0.1, 0.3, 0.5, 0.6), (1, 1, 1, 1), WHOLE])
def test_a_crop_is_the_same_alone_and_in_a_batch(height, width, object_box):
    crop = random_resized_crop_box
    if object_box is not None:
        crop = functools.partial(contrastive_crop_box, object_box=object_box)
    boxes = crop(height, width, draw=draws(200))
    for key in range(200):
        assert crop(height, width, draw=functools.partial(uniform, sample_state(0, 0, key))) == tuple(boxes[key])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= (height, width)).all()
    if object_box is not None:
        np.testing.assert_array_equal(boxes[:, 2:], random_resized_crop_box(height, width, draws(200))[:, 2:])


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0.5, 0.5, 0.5, 0.5), (10, 20)),  # centre (20, 40) of 40 x 80
        ((0.4, 0.6, 0.4, 0.6), (6, 28)),  # centre (16, 48)
        ((0.25, 0.75, 0.25, 0.75), (0, 40)),  # centre (10, 60): touches two sides, needs no shift
        ((0.1, 0.5, 0.1, 0.5), (0, 20)),  # centre (4, 40): shifted down by 6
        ((0.5, 0.9, 0.5, 0.9), (10, 40)),  # centre (20, 72): shifted left by 12
        ((0, 0, 0, 0), (0, 0)),
        ((1, 1, 1, 1), (20, 40)),
        ((0, 1, 0, 1), (0, 40)),
    ],
)
def test_the_place_of_a_crop_by_hand(box, expected):
    # A quarter of 40 x 80 with aspect ratio 2 is 20 x 40; a box without area leaves nothing to chance.
    crop = contrastive_crop_box(40, 80, box, draws(1), scale=(0.25, 0.25), ratio=(2, 2))
    assert crop.tolist() == [[*expected, 20, 40]]


def test_the_largest_box_is_placed_like_any_other():
    # A fifth of 8 x 100 is a square of 12.6, which never fits: 8 x 8 around (4, 90).
    crop = contrastive_crop_box(8, 100, (0.5, 0.9, 0.5, 0.9), draws(1), scale=(0.2, 1), ratio=(1, 1))
    assert crop.tolist() == [[0, 86, 8, 8]]


@pytest.mark.parametrize("alpha", [0.3, 0.6, 5.0])
def test_centres_are_beta_inside_the_box(alpha):
    # Crops of at most 0.3 * sqrt(4 / 3) = 0.35 of a side around centres in 0.4..0.6 are never shifted; the side is
    # this long because for small alpha many centres fall into the first and the last pixel.
    side, (top, left, bottom, right) = 10**12, (0.4, 0.45, 0.6, 0.55)
    boxes = contrastive_crop_box(side, side, (top, left, bottom, right), draws(10_000), (0.04, 0.09), alpha=alpha)
    centres = (boxes[:, :2] + boxes[:, 2:] / 2) / side
    u = ((centres - (top, left)) / (bottom - top, right - left)).clip(0, 1)
    for axis in (0, 1):
        assert kstest(u[:, axis], beta(alpha, alpha).cdf).pvalue > 0.01
        assert kstest(u[:, axis], beta(1.2 * alpha, 1.2 * alpha).cdf).pvalue < 1e-3, "the test has power"
    # Independent of each other and of the size, in place and in spread: 4 / sqrt(10,000) is four standard deviations.
    height, width = boxes[:, 2:].astype(float).T
    columns = [*u.T, *np.abs(u - 0.5).T, height * width, width / height]
    assert np.abs(np.corrcoef(columns) - np.eye(6)).max() < 0.04


@pytest.mark.parametrize(
    ("shape", "size", "crop_ratio", "box"),
    [
        ((100, 200), (32, 32), 1.0, (0, 50, 100, 100)),
        ((200, 100), (32, 32), 1.0, (50, 0, 100, 100)),
        ((256, 256), (224, 224), 0.875, (16, 16, 224, 224)),
        ((100, 200), (32, 64), 1.0, (0, 0, 100, 200)),
        ((100, 100), (32, 64), 1.0, (25, 0, 50, 100)),
        ((100, 100), (64, 32), 0.5, (25, 37, 50, 25)),
        ((8, 8), (32, 32), 1.0, (0, 0, 8, 8)),
        ((1, 50), (8, 16), 0.5, (0, 24, 1, 1)),
    ],
)
def test_center_crop_box(shape, size, crop_ratio, box):
    assert center_crop_box(*shape, size, crop_ratio) == box


def test_boxes_of_the_same_image_at_another_size():
    generator = np.random.default_rng(0)
    for key in range(200):
        height, width = size = tuple(generator.integers(1, 400, 2).tolist())
        draw = functools.partial(uniform, sample_state(0, 0, key))
        box = random_resized_crop_box(height, width, draw, (0.01, 1.0))
        reduced = -(-height // 4), -(-width // 4)  # as a JPEG is
        scaled = scale_box(box, size, reduced)
        assert min(scaled[:2]) >= 0
        assert min(scaled[2:]) >= 1
        assert (np.add(scaled[:2], scaled[2:]) <= reduced).all()
        assert np.abs(scaled - np.array(box) * np.tile(np.divide(reduced, size), 2)).max() <= 1.5
        assert scale_box(box, size, size) == box
        assert scale_box((0, 0, *size), size, reduced) == (0, 0, *reduced)


# -- pixels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(16, 16), (20, 48)])
def test_resizing_equals_torchvisions(channels, size):
    array = noise(40, 50, channels)
    box = (3, 5, 30, 40)
    actual = crop_and_resize(array, box, size)
    pixels = torch.from_numpy(array).permute(2, 0, 1)
    expected = tvF.resized_crop(pixels.float(), *box, list(size), InterpolationMode.BICUBIC, antialias=True)
    assert actual.shape == (channels, *size)
    assert actual.dtype == torch.uint8
    assert actual.is_contiguous()
    assert (actual - expected.clamp(0, 255)).abs().mean() < 1
    floats = crop_and_resize((array / 255).astype(np.float32), box, size)
    assert floats.dtype == torch.float32
    torch.testing.assert_close(floats, (expected / 255).clamp(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(16, 16), (8, 12), (40, 40)])
def test_a_batch_of_crops_is_that_of_single_ones(size):
    pixels = np.stack([noise(24, 20)] * 6)
    boxes = torch.tensor([[0, 0, 24, 20], [3, 4, 16, 16], [10, 2, 5, 7], [23, 19, 1, 1], [0, 5, 20, 9], [4, 0, 8, 12]])
    flips = torch.tensor([False, True, False, True, True, False])
    batch = crop_and_resize_batch(torch.from_numpy(pixels).permute(0, 3, 1, 2), boxes, flips, size)
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        part = torch.from_numpy(pixels[i, top : top + height, left : left + width]).permute(2, 0, 1)
        exact = F.interpolate(part[None].float(), size=size, mode="bicubic", antialias=True)[0].clamp(0, 255)
        actual = batch[i].flip(-1) if flips[i] else batch[i]
        torch.testing.assert_close(actual, exact, rtol=0, atol=2e-3)
        if (height, width) == size:
            assert torch.equal(actual, part.float()), "a crop that is not resized is exact"


@pytest.mark.parametrize("shape", [(40, 60), (61, 40), (32, 32), (20, 21)])
@pytest.mark.parametrize("crop_ratio", [1.0, 0.8])
def test_center_view_is_resize_and_centre_crop(shape, crop_ratio):
    array = np.random.default_rng(0).random((*shape, 2)).astype(np.float32)
    pixels = torch.from_numpy(array).permute(2, 0, 1)
    resized = tvF.resize(pixels, [32 if crop_ratio == 1 else 40], InterpolationMode.BICUBIC, antialias=True)
    margins = [side - 32 for side in resized.shape[1:]]
    expected = resized[:, margins[0] // 2 :, margins[1] // 2 :][:, :32, :32].clamp(0, 1)
    torch.testing.assert_close(center_view(array, (32, 32), crop_ratio), expected, atol=1e-5, rtol=0)


def test_center_view_of_another_shape():
    array = noise(30, 30)
    expected = torch.from_numpy(array[10:20, 5:25]).permute(2, 0, 1)
    assert torch.equal(center_view(array, (10, 20), 2 / 3), expected)


@pytest.mark.parametrize("shape", [(4, 20_000), (20_000, 4), (1, 20_000), (1, 1)])
def test_extreme_shapes_take_no_extreme_memory(shape, monkeypatch):
    sizes = []
    resize = F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda *a, size, **k: sizes.append(size) or resize(*a, size=size, **k))
    array = noise(*shape)
    assert center_view(array, (224, 224), 0.875).shape == (3, 224, 224)
    assert all(max(size) <= 16 * 256 for size in sizes)


def test_float_overshoot_is_clamped():
    array = np.zeros((8, 8, 1), np.float32)
    array[:, 4:] = 1
    pixels = crop_and_resize(array, (0, 0, 8, 8), (32, 32))
    assert pixels.min() == 0
    assert pixels.max() == 1


def test_normalize():
    pixels = torch.tensor([[[0, 255]], [[51, 102]]], dtype=torch.uint8)
    expected = torch.tensor([[[-1.0, 1.0]], [[0.0, 2.0]]])
    torch.testing.assert_close(normalize(pixels, [0.5, 0.2], [0.5, 0.1]), expected)
    torch.testing.assert_close(normalize(pixels / 255, [0.5, 0.2], [0.5, 0.1]), expected)
    assert normalize((pixels / 255).double(), [0.5, 0.2], [0.5, 0.1]).dtype == torch.float32
