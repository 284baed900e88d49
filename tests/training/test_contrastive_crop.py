# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Crops around boxes, boxes from heat maps, and the generated objects they are judged on."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from scipy.stats import beta, kstest, uniform

import clmae.training.trainer as trainer_module
from clmae.training.callbacks import ContrastiveCropCallback
from clmae.training.contrastive_crop import (
    CROP_THRESHOLD,
    box_iou,
    contrastive_crop_box,
    heat_map_box,
    object_heat_map,
    refresh_epochs,
)
from clmae.training.data import DataArguments, build_datasets
from clmae.training.images import crop_and_resize, random_resized_crop_box, sample_generator

from .runs import assert_equal_weights, image_dataset, pil_dataset, tiny_model, tiny_trainer, weights

WHOLE = (0.0, 0.0, 1.0, 1.0)


def crops(count, height, width, box, seed=0, **kwargs):
    """`(count, 4)` crops of one image, one after the other from one generator."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [contrastive_crop_box(height, width, box, generator, **kwargs) for _ in range(count)]
    return torch.tensor(drawn, dtype=torch.float64)


# -- crops, by hand ---------------------------------------------------------------------------------------------


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
    crop = contrastive_crop_box(40, 80, box, sample_generator(0, 0, 0), scale=(0.25, 0.25), ratio=(2, 2))
    assert crop == (*expected, 20, 40)


def test_alpha_puts_centres_at_the_edges_or_in_the_middle():
    kwargs = dict(scale=(0.04, 0.04), ratio=(1, 1))  # 20 x 20 of 100 x 100
    edges = crops(200, 100, 100, (0.2, 0.3, 0.6, 0.8), alpha=1e-9, **kwargs)[:, :2].int().tolist()
    assert {tuple(place) for place in edges} == {(10, 20), (10, 70), (50, 20), (50, 70)}
    middle = crops(200, 100, 100, (0.2, 0.3, 0.6, 0.8), alpha=1e15, **kwargs)[:, :2].int().tolist()
    assert {tuple(place) for place in middle} == {(30, 45)}


# -- crops, by distribution -------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.3, 0.6, 1.0, 5.0])
def test_centres_are_beta_inside_the_box(alpha):
    # Crops of at most 0.3 * sqrt(4 / 3) = 0.35 of a side around centres in 0.4..0.6 are never shifted; the side is
    # this long because for small alpha many centres fall into the first and the last pixel.
    side, box = 10**12, (0.4, 0.45, 0.6, 0.55)
    drawn = crops(10_000, side, side, box, scale=(0.04, 0.09), alpha=alpha)
    assert (drawn[:, :2] > 0).all()
    assert (drawn[:, :2] + drawn[:, 2:] < side).all()
    centres = (drawn[:, :2] + drawn[:, 2:] / 2) / side
    start, end = torch.tensor(box, dtype=torch.float64).view(2, 2)
    assert (centres >= start - 1 / side).all()
    assert (centres <= end + 1 / side).all()
    u = ((centres - start) / (end - start)).clamp(0, 1)
    for axis in (0, 1):
        assert kstest(u[:, axis].numpy(), beta(alpha, alpha).cdf).pvalue > 0.01
        assert kstest(u[:, axis].numpy(), beta(1.2 * alpha, 1.2 * alpha).cdf).pvalue < 1e-3  # the test has power
    # Independent of each other and of the size, in place and in spread: 4 / sqrt(10,000) is four standard deviations.
    columns = torch.cat((u, (u - 0.5).abs(), drawn[:, 2:3] * drawn[:, 3:], drawn[:, 3:] / drawn[:, 2:3]), dim=1)
    correlation = torch.corrcoef(columns.T) - torch.eye(6)
    assert correlation.abs().max() < 0.04


def test_area_and_aspect_are_as_specified():
    # At most sqrt(0.2 * 2e12 / 0.5) = 0.9e6 high and sqrt(0.2 * 2e12 * 1.5) = 0.8e6 wide: all of them fit.
    drawn = crops(10_000, 1_000_000, 2_000_000, WHOLE, scale=(0.05, 0.2), ratio=(0.5, 1.5))
    height, width = drawn[:, 2], drawn[:, 3]
    area, aspect = height * width / 2e12, (width / height).log()
    assert kstest(area.numpy(), uniform(0.05, 0.15).cdf).pvalue > 0.01
    assert kstest(aspect.numpy(), uniform(math.log(0.5), math.log(3)).cdf).pvalue > 0.01


@pytest.mark.parametrize(("height", "width"), [(400, 500), (64, 64), (300, 60), (8, 100), (1, 1)])
def test_sizes_are_those_of_the_random_resized_crop(height, width):
    for key in range(300):
        _, _, *expected = random_resized_crop_box(height, width, sample_generator(0, 0, key))
        crop = contrastive_crop_box(height, width, (0.1, 0.5, 0.3, 0.6), sample_generator(0, 0, key))
        assert list(crop[2:]) == expected


def test_the_largest_box_is_placed_like_any_other():
    # A fifth of 8 x 100 is a square of 12.6, which never fits: 8 x 8 around (4, 90).
    crop = contrastive_crop_box(8, 100, (0.5, 0.9, 0.5, 0.9), sample_generator(0, 0, 0), scale=(0.2, 1), ratio=(1, 1))
    assert crop == (0, 86, 8, 8)


def test_the_whole_image_is_covered():
    drawn = crops(2000, 100, 100, WHOLE, scale=(0.2, 0.4))
    assert (drawn[:, :2] >= 0).all()
    assert (drawn[:, :2] + drawn[:, 2:] <= 100).all()
    for axis in (0, 1):  # u < 0.2 has a probability of 0.28 at each end, which is beyond half of the smallest crop
        assert (drawn[:, axis] == 0).double().mean() > 0.25
        assert (drawn[:, axis] + drawn[:, axis + 2] == 100).double().mean() > 0.25


# -- crops, at the limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (2, 3), (3, 4000), (20000, 15000)])
@pytest.mark.parametrize(
    "box", [WHOLE, (0, 0, 0, 0), (1, 1, 1, 1), (0.3, 0, 0.3, 1), (0, 1, 1, 1), (0.2, 0.4, 0.3, 0.9)]
)
@pytest.mark.parametrize("alpha", [5e-324, 0.6, 1e300])
def test_crops_lie_inside_the_image(height, width, box, alpha):
    for key in range(20):
        crop = contrastive_crop_box(height, width, box, sample_generator(0, 0, key), alpha=alpha)
        assert all(type(value) is int for value in crop)
        top, left, crop_height, crop_width = crop
        assert crop_height >= 1
        assert crop_width >= 1
        assert 0 <= top <= height - crop_height
        assert 0 <= left <= width - crop_width


def test_always_the_same_number_of_values_is_drawn():
    states = []
    for height, width, box, alpha in [
        (100, 100, WHOLE, 0.6),
        (100, 100, (0.5, 0.5, 0.5, 0.5), 0.6),
        (1, 3000, (0.9, 0, 1, 0.1), 0.6),
        (100, 100, WHOLE, 1e-3),
        (100, 100, WHOLE, 50.0),
    ]:
        generator = sample_generator(0, 0, 0)
        contrastive_crop_box(height, width, box, generator, alpha=alpha)
        states.append(generator.get_state())
    assert all(torch.equal(state, states[0]) for state in states)
    assert not torch.equal(states[0], sample_generator(0, 0, 0).get_state())


def test_a_crop_is_a_pure_function_of_the_generator():
    global_state = torch.get_rng_state()
    box = (0.2, 0.1, 0.7, 0.8)
    a, b, c = (contrastive_crop_box(300, 400, box, sample_generator(0, 1, key)) for key in (5, 5, 6))
    assert a == b != c
    assert torch.equal(torch.get_rng_state(), global_state)
    assert a == contrastive_crop_box(300, 400, torch.tensor(box, dtype=torch.float64), sample_generator(0, 1, 5))


@pytest.mark.parametrize("alpha", [0, -0.6, math.nan, math.inf])
def test_wrong_alpha(alpha):
    with pytest.raises(ValueError, match=f"`alpha` is {alpha}; .* positive"):
        contrastive_crop_box(10, 10, WHOLE, sample_generator(0, 0, 0), alpha=alpha)


@pytest.mark.parametrize(
    "box", [(0.5, 0, 0.4, 1), (0, 0.5, 1, 0.4), (0, 0, 1, 1.1), (-0.1, 0, 1, 1), (math.nan, 0, 1, 1)]
)
def test_wrong_box(box):
    with pytest.raises(ValueError, match=r"`box` is \(.*fractions in \[0, 1\]"):
        contrastive_crop_box(10, 10, box, sample_generator(0, 0, 0))


# -- boxes from heat maps ---------------------------------------------------------------------------------------


def hot(rows, columns, *pixels, low=0.0, high=1.0):
    """A map `(rows, columns)` that is `high` at the pixels and `low` elsewhere."""
    heat_map = torch.full((rows, columns), low)
    for row, column in pixels:
        heat_map[row, column] = high
    return heat_map


def test_boxes_of_patch_maps_by_hand():
    maps = torch.stack(
        [
            hot(4, 8, (1, 2)),
            hot(4, 8, (0, 1), (2, 6)),
            hot(4, 8, (3, 7)),
            hot(4, 8, (0, 0), low=-7.0, high=-5.0),
            hot(4, 8, (2, 3), low=100.0, high=1.0),  # all but one
            torch.arange(32.0).view(4, 8),  # above 0.1 * 31 from 4 on: columns 4 to 7 of row 0, and all of the others
        ]
    )
    expected = [
        (0.25, 0.25, 0.5, 0.375),
        (0, 0.125, 0.75, 0.875),
        (0.75, 0.875, 1, 1),
        (0, 0, 0.25, 0.125),
        WHOLE,
        WHOLE,
    ]
    boxes = heat_map_box(maps, threshold=0.1)
    assert boxes.dtype == torch.float32
    torch.testing.assert_close(boxes, torch.tensor(expected), atol=0, rtol=0)


def test_the_threshold_is_strict_and_counts_after_rescaling():
    heat_map = torch.tensor([[[2.0, 3.0, 4.0, 6.0, 2.0]]])  # rescaled: 0, 1/4, 1/2, 1, 0
    for threshold, left, right in [
        (0, 0.2, 0.8),
        (0.24, 0.2, 0.8),
        (0.25, 0.4, 0.8),
        (0.5, 0.6, 0.8),
        (0.99, 0.6, 0.8),
    ]:
        box = heat_map_box(heat_map, threshold=threshold)
        torch.testing.assert_close(box, torch.tensor([[0, left, 1, right]]))


def test_boxes_of_resized_maps_by_hand():
    # Pixel i is at patch (i + 0.5) / 4 - 0.5. Columns 2 to 9 are 1/8, 3/8, 5/8, 7/8, 7/8, 5/8, 3/8, 1/8, times the
    # row's value; rows 0 to 5 are 1, 1, 7/8, 5/8, 3/8, 1/8, times the column's.
    heat_map = hot(2, 4, (0, 1))[None]
    box = heat_map_box(heat_map, (8, 16), threshold=0.1)  # 1/8 * 7/8 > 0.1
    torch.testing.assert_close(box, torch.tensor([[0, 2 / 16, 6 / 8, 10 / 16]]))
    box = heat_map_box(heat_map, (8, 16), threshold=0.2)
    torch.testing.assert_close(box, torch.tensor([[0, 3 / 16, 5 / 8, 9 / 16]]))


def test_the_batch_is_resized_each_by_itself():
    maps = torch.rand(5, 6, 7, generator=torch.Generator().manual_seed(0)) ** 8
    maps = maps * 10.0 ** torch.arange(5)[:, None, None]
    boxes = heat_map_box(maps, (48, 70), threshold=0.5)
    assert boxes.unique(dim=0).shape[0] == 5
    torch.testing.assert_close(torch.cat([heat_map_box(part[None], (48, 70), threshold=0.5) for part in maps]), boxes)
    for heat_map, box in zip(maps, boxes, strict=True):
        resized = torch.nn.functional.interpolate(heat_map[None, None], size=(48, 70), mode="bilinear")[0, 0]
        rows, columns = torch.where(resized > heat_map.min() + 0.5 * (heat_map.max() - heat_map.min()))
        expected = [rows.min() / 48, columns.min() / 70, (rows.max() + 1) / 48, (columns.max() + 1) / 70]
        torch.testing.assert_close(box, torch.tensor(expected))


@pytest.mark.parametrize("image_grid", [None, (32, 32)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_maps_that_tell_nothing_give_the_whole_image(image_grid, dtype):
    spoilt = [hot(4, 4, (1, 1), high=value) for value in (math.nan, math.inf, -math.inf)]
    spoilt.append(torch.full((4, 4), math.nan))
    spoilt.append(hot(4, 4, (1, 1), (2, 2), low=-math.inf, high=math.inf))
    constant = [torch.full((4, 4), value) for value in (0.0, 1.0, -0.3, 6e4)]
    maps = torch.stack([*spoilt, *constant, hot(4, 4, (1, 2))]).to(dtype)
    boxes = heat_map_box(maps, image_grid, threshold=0.5)
    torch.testing.assert_close(boxes[:-1], torch.tensor([WHOLE]).expand(9, 4), atol=0, rtol=0)
    assert boxes[-1].tolist() != list(WHOLE)  # its neighbours do not spoil a sound map


def test_nothing_above_the_threshold_gives_the_whole_image():
    # On a coarser grid the peak falls between the points: 1/4 is left of it.
    heat_map = hot(4, 4, (1, 1))[None]
    assert heat_map_box(heat_map, (2, 2), threshold=0.24).tolist() == [[0, 0, 0.5, 0.5]]
    assert heat_map_box(heat_map, (2, 2), threshold=0.26).tolist() == [list(WHOLE)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    # In units in which 8 bits are exact; the span, 2 * 60,000, is beyond float16.
    maps = torch.stack([hot(8, 8, (2, 3), (5, 4)), hot(8, 8, (6, 1), low=-60000.0, high=60000.0)])
    boxes = heat_map_box(maps.to(dtype), (64, 64))
    assert boxes.dtype == torch.float32
    torch.testing.assert_close(boxes, heat_map_box(maps, (64, 64)), atol=0, rtol=0)
    assert (boxes != torch.tensor(WHOLE)).any(1).all()


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches_and_maps(batch):
    assert heat_map_box(torch.rand(batch, 3, 5), (12, 20)).shape == (batch, 4)
    assert heat_map_box(torch.rand(batch, 1, 1)).tolist() == [list(WHOLE)] * batch


def test_boxes_never_wait_for_the_device():
    # On `meta` a look at a value is an error: nothing is brought to the CPU on the way.
    maps = torch.rand(3, 4, 4, device="meta")
    assert heat_map_box(maps, (16, 16)).device.type == "meta"
    assert box_iou(torch.rand(3, 4, device="meta"), torch.rand(3, 4, device="meta")).device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_boxes_on_a_gpu():
    maps = torch.rand(16, 14, 14, generator=torch.Generator().manual_seed(0)) ** 8
    maps[0], maps[1, 0, 0], maps[2, 0, 0] = 0.3, math.nan, math.inf
    boxes = heat_map_box(maps.cuda(), (224, 224), threshold=0.5)
    assert boxes.is_cuda
    torch.testing.assert_close(boxes.cpu(), heat_map_box(maps, (224, 224), threshold=0.5), atol=1 / 223, rtol=0)
    assert boxes[:3].tolist() == [list(WHOLE)] * 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(heat_maps=torch.rand(4, 4)), r"`heat_maps` has the shape \(4, 4\)"),
        (dict(heat_maps=torch.rand(2, 0, 4)), r"`heat_maps` has the shape \(2, 0, 4\)"),
        (dict(image_grid=(0, 4)), r"`image_grid` is \(0, 4\)"),
        (dict(image_grid=(4,)), r"`image_grid` is \(4,\)"),
        (dict(threshold=1.0), "`threshold` is 1.0"),
        (dict(threshold=-0.1), "`threshold` is -0.1"),
        (dict(threshold=math.nan), "`threshold` is nan"),
    ],
)
def test_wrong_heat_map_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        heat_map_box(**{"heat_maps": torch.rand(2, 4, 4), **kwargs})


# -- comparing boxes --------------------------------------------------------------------------------------------


def test_box_iou_by_hand():
    pairs = [
        ((0, 0, 0.5, 0.5), (0, 0, 0.5, 0.5), 1),
        ((0, 0, 0.5, 1), (0, 0, 1, 0.5), 1 / 3),
        ((0.25, 0.25, 0.5, 0.75), WHOLE, 1 / 8),
        ((0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1), 0),  # touch
        ((0, 0, 0.2, 0.2), (0.5, 0.5, 1, 1), 0),  # apart in both directions: no product of two negative sides
        ((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5), 0),
        ((0.5, 0.5, 0.5, 0.5), WHOLE, 0),
    ]
    boxes, others, expected = (torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True))
    torch.testing.assert_close(box_iou(boxes, others), expected)
    torch.testing.assert_close(box_iou(others.double(), boxes.double()), expected)


@pytest.mark.parametrize(("first", "second"), [((2, 4), (3, 4)), ((4,), (4,)), ((2, 3), (2, 3)), ((1, 4), (2, 4))])
def test_box_iou_of_wrong_shapes(first, second):
    with pytest.raises(ValueError, match=r"`boxes` and `others` have the shapes"):
        box_iou(torch.rand(first), torch.rand(second))


# -- generated objects ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def object_images():
    path = Path(__file__).parents[2] / "benchmarks" / "contrastive_crop" / "object_images.py"
    spec = importlib.util.spec_from_file_location("object_images", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.object_images


@pytest.mark.parametrize("size", [16, 32, 64, 75])
def test_object_images(object_images, size):
    images, boxes = object_images(60, size, 0)
    assert (images.dtype, images.shape) == (torch.uint8, (60, 3, size, size))
    assert (boxes.dtype, boxes.shape) == (torch.float32, (60, 4))
    assert ((boxes >= 0) & (boxes <= 1)).all()
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (sides > 0.2 - 1 / size).all()  # the tip of a triangle may be thinner than a pixel
    assert (sides <= 0.6 + 1e-6).all()
    assert sides.std(0).min() > 0.05
    assert images.flatten(1).unique(dim=0).shape[0] == 60


def test_the_boxes_hold_the_objects(object_images):
    # The edges of the objects are by far the sharpest in each image: the background is smooth.
    images, boxes = object_images(40, 64, 1)
    values = images.float().sum(1)
    sharp = torch.zeros(40, 64, 64)
    sharp[:, 1:] += values.diff(dim=1).abs()
    sharp[:, :, 1:] += values.diff(dim=2).abs()
    found = box_iou(heat_map_box(sharp, threshold=0.35), boxes)
    assert found.mean() > 0.8
    assert found.mean() > 2 * box_iou(torch.tensor([WHOLE]).expand(40, 4), boxes).mean()
    assert found.mean() > 2 * box_iou(boxes.roll(1, 0), boxes).mean()


def test_object_images_are_a_function_of_seed_and_place(object_images):
    global_state = torch.get_rng_state()
    images, boxes = object_images(5, 32, 3)
    again, more = object_images(5, 32, 3), object_images(8, 32, 3)
    for other, other_boxes in (again, more):
        assert torch.equal(other[:5], images)
        assert torch.equal(other_boxes[:5], boxes)
    assert not torch.equal(object_images(5, 32, 4)[1], boxes)
    assert torch.equal(torch.get_rng_state(), global_state)


@pytest.mark.parametrize(
    ("count", "size", "seed", "name"), [(0, 32, 0, "count"), (1, 15, 0, "size"), (1, 32, -1, "seed")]
)
def test_wrong_object_images(object_images, count, size, seed, name):
    with pytest.raises(ValueError, match=f"`{name}` is "):
        object_images(count, size, seed)


# -- heat map of an encoder -------------------------------------------------------------------------------------


def test_object_heat_map_by_hand():
    tokens = torch.zeros(1, 3, 4, 2)
    tokens[..., 0] = 1.0  # the background, and the border's mean
    tokens[0, 1, 2] = torch.tensor([1.0, 3.0])
    tokens[0, 1, 1] = torch.tensor([5.0, 0.0])
    maps = object_heat_map(tokens.flatten(1, 2), (3, 4))
    expected = torch.zeros(1, 3, 4)
    expected[0, 1, 2], expected[0, 1, 1] = 3.0, 4.0
    torch.testing.assert_close(maps, expected)


def test_tokens_alike_up_to_rounding_give_the_whole_image():
    tokens = torch.randn(1, 1, 8).expand(2, 16, 8) * (1 + 1e-6 * torch.randn(2, 16, 1))
    maps = object_heat_map(tokens, (4, 4))
    assert not maps.any()
    assert heat_map_box(maps, (16, 16)).tolist() == [list(WHOLE)] * 2


@pytest.mark.parametrize("grid_size", [(1, 4), (2, 2), (1, 1)])
def test_grids_that_are_all_border(grid_size):
    count = math.prod(grid_size)
    boxes = heat_map_box(object_heat_map(torch.randn(3, count, 8), grid_size), (8, 8), CROP_THRESHOLD)
    assert boxes.isfinite().all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


# -- over a run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_epochs", "interval", "expected"),
    [
        (10, 0.2, [2, 4, 6, 8]),
        (5, 0.2, [1, 2, 3, 4]),
        (3, 0.2, [1, 2]),
        (100, 0.3, [30, 60, 90]),
        (7, 0.5, [4]),
        (1, 0.2, []),
        (10, 1.0, []),
        (3, 1e-320, [1, 2]),
    ],
)
def test_refresh_epochs(num_epochs, interval, expected):
    assert refresh_epochs(num_epochs, interval) == expected


def cropping(tmp_path, family="mae", count=10, views=1, **options):
    """A trainer of 5 epochs whose crops follow the boxes, which are refreshed before the epochs 2 and 4."""
    dataset = image_dataset(count, contrastive_crop=True, num_views=views)
    model = tiny_model(family, **({"contrastive_loss_weight": 0.0} if family == "cmae" and views == 1 else {}))
    defaults = dict(num_train_epochs=5, contrastive_crop_interval=0.4)
    return tiny_trainer(tmp_path, model, train_dataset=dataset, **{**defaults, **options})


def callback_of(trainer):
    (found,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, ContrastiveCropCallback))
    return found


def test_samples_are_cropped_around_their_boxes():
    dataset = image_dataset(4, contrastive_crop=True, horizontal_flip=False, crop_scale=(0.3, 0.3))
    assert dataset.crop_boxes.tolist() == [list(WHOLE)] * 4
    dataset.crop_boxes[2] = torch.tensor([0.9, 0.9, 1.0, 1.0])
    key = 3 * 4 + 2
    pixels = dataset._load(2)
    generator = sample_generator(dataset.seed, 3, 2, "augmentation")
    box = contrastive_crop_box(20, 20, (0.9, 0.9, 1.0, 1.0), generator, (0.3, 0.3))
    assert (box[0] + box[2], box[1] + box[3]) == (20, 20)
    expected = (crop_and_resize(pixels, box, (16, 16)).float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(dataset[key]["pixel_values"], expected)


@pytest.mark.parametrize(("family", "views"), [("mae", 1), ("cl_mae", 1), ("cmae", 2)])
def test_boxes_are_those_of_the_encoders_heat_maps(tmp_path, family, views):
    trainer = cropping(tmp_path, family, views=views, per_device_eval_batch_size=4)
    state, generator = trainer.train_dataset.crop_boxes, torch.get_rng_state()
    trainer.model.train()
    callback_of(trainer).refresh()
    assert trainer.model.training
    assert torch.equal(torch.get_rng_state(), generator)
    for i in range(10):
        image = crop_and_resize(trainer.train_dataset._load(i), (0, 0, 20, 20), (16, 16)).float() / 255
        tokens = trainer.model.vit(((image - 0.5) / 0.25)[None]).last_hidden_state[:, 1:]
        expected = heat_map_box(object_heat_map(tokens, (4, 4)), (16, 16), CROP_THRESHOLD)[0]
        torch.testing.assert_close(state[i], expected, atol=1 / 16 + 1e-6, rtol=0)
    assert len(state.unique(dim=0)) > 1


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (1, False), (1, True)])
def test_boxes_move_on_schedule_and_workers_see_them(tmp_path, workers, persistent):
    refreshed, alone = [], cropping(tmp_path / "alone")
    trainer = cropping(tmp_path / "workers", dataloader_num_workers=workers, dataloader_persistent_workers=persistent)
    original = callback_of(trainer).refresh
    callback_of(trainer).refresh = lambda: refreshed.append(trainer.state.epoch) or original()
    trainer.train()
    assert refreshed == [2, 4]
    alone.train()
    assert torch.equal(trainer.train_dataset.crop_boxes, alone.train_dataset.crop_boxes)
    assert_equal_weights(weights(trainer.model), weights(alone.model))
    fixed = cropping(tmp_path / "fixed", contrastive_crop_interval=1.0)
    fixed.train()
    assert not torch.equal(fixed.model.decoder.mask_token, alone.model.decoder.mask_token)


@pytest.mark.parametrize("step", [3, 4, 5, 6])  # 2 steps an epoch; refreshed after 4 and 8
def test_resumed_runs_have_the_boxes_of_whole_ones(tmp_path, step):
    options = dict(save_strategy="steps", save_steps=1, save_total_limit=None)
    whole = cropping(tmp_path / "whole", **options)
    whole.train()
    refreshed, resumed = [], cropping(tmp_path / "resumed")
    original = callback_of(resumed).refresh
    callback_of(resumed).refresh = lambda: refreshed.append(resumed.state.epoch) or original()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert refreshed == ([2, 4] if step <= 4 else [4])
    assert torch.equal(resumed.train_dataset.crop_boxes, whole.train_dataset.crop_boxes)
    assert_equal_weights(weights(resumed.model), weights(whole.model))


def test_resuming_the_last_checkpoint_and_starting_anew(tmp_path):
    trainer = cropping(tmp_path, save_strategy="steps", save_steps=5)
    trainer.train()
    boxes = trainer.train_dataset.crop_boxes.clone()
    again = cropping(tmp_path, save_strategy="steps", save_steps=5)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(again.train_dataset.crop_boxes, boxes)
    callback_of(again).reset()
    assert again.train_dataset.crop_boxes.tolist() == [list(WHOLE)] * 10


def test_checkpoints_that_do_not_fit(tmp_path):
    saving = dict(save_strategy="steps", save_steps=1, max_steps=1)
    cropping(tmp_path / "twelve", count=12, **saving).train()
    with pytest.raises(ValueError, match=r"has the boxes of 12 images, but the training set has 10"):
        cropping(tmp_path / "a").train(resume_from_checkpoint=str(tmp_path / "twelve" / "checkpoint-1"))
    tiny_trainer(tmp_path / "random", "mae", **saving).train()
    with pytest.raises(ValueError, match=r"has no contrastive_crop.safetensors: that run cropped at random"):
        cropping(tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "random" / "checkpoint-1"))


def test_resuming_what_is_not_there(tmp_path, monkeypatch):
    for wrong in (True, str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match=r"[Cc]heckpoint"):
            cropping(tmp_path / "empty").train(resume_from_checkpoint=wrong)
    cropping(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    at_random = tiny_trainer(tmp_path / "random", "mae", train_dataset=image_dataset(10), max_steps=1)
    warnings = []
    monkeypatch.setattr(trainer_module.logger, "warning", warnings.append)
    at_random.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert any("this run goes on with random crops" in warning for warning in warnings)


def test_boxes_are_saved_with_the_weights_of_checkpoints_alone(tmp_path):
    # With them, not after: what is pushed to the Hub is read as soon as the weights are written.
    trainer = cropping(tmp_path)
    trainer.save_model(tmp_path / "checkpoint-1")
    trainer.save_model()
    assert (tmp_path / "checkpoint-1" / ContrastiveCropCallback.file_name).is_file()
    assert not (tmp_path / ContrastiveCropCallback.file_name).exists()


def test_a_part_of_a_data_set_with_boxes(tmp_path):
    part = torch.utils.data.Subset(image_dataset(10, contrastive_crop=True), range(8))
    with pytest.raises(ValueError, match=r"`train_dataset` is a Subset .* `contrastive_crop`"):
        tiny_trainer(tmp_path, "mae", train_dataset=part)


def test_boxes_are_found_in_the_trainings_precision(tmp_path):
    trainer, dtypes = cropping(tmp_path, bf16=True), set()
    hook = trainer.model.vit.layers[0].mlp.fc1.register_forward_hook(lambda m, i, output: dtypes.add(output.dtype))
    callback_of(trainer).refresh()
    hook.remove()
    assert dtypes == {torch.bfloat16}


def test_boxes_are_found_without_dropped_paths(tmp_path):
    trainer = cropping(tmp_path)
    trainer.model.train()
    modes = []
    trainer.model.vit.layers[0].register_forward_hook(lambda module, *_: modes.append(module.training))
    callback_of(trainer).refresh()
    assert set(modes) == {False}


def test_streams_are_refused():
    stream = pil_dataset(4).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"`contrastive_crop` keeps a box for each image, which a stream has no place"):
        build_datasets(DataArguments(dataset=stream, contrastive_crop=True), tiny_model("mae").config)
    with pytest.raises(ValueError, match=r"`contrastive_crop` keeps a box for each image.*leave out `streaming`"):
        DataArguments(dataset="d", contrastive_crop=True, streaming=True)


@pytest.mark.parametrize("interval", [0, -0.2, 1.1])
def test_wrong_intervals(tmp_path, interval):
    with pytest.raises(ValueError, match=rf"`contrastive_crop_interval` is {interval}; give a share"):
        cropping(tmp_path, contrastive_crop_interval=interval)
