# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Boxes around objects: from heat maps, and over a run."""

import math

import pytest
import torch

import clmae.training.trainer as trainer_module
from clmae.training.callbacks import ContrastiveCropCallback
from clmae.training.data import heat_map_box, object_heat_map, refresh_epochs

from ..runs import assert_equal_weights, image_dataset, tiny_model, tiny_trainer, weights

WHOLE = (0.0, 0.0, 1.0, 1.0)


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


def test_small_batches_and_maps_without_a_wait_for_the_device():
    assert heat_map_box(torch.rand(0, 3, 5), (12, 20)).shape == (0, 4)
    assert heat_map_box(torch.rand(2, 1, 1)).tolist() == [list(WHOLE)] * 2
    # On `meta` a look at a value is an error: nothing is brought to the CPU on the way.
    assert heat_map_box(torch.rand(3, 4, 4, device="meta"), (16, 16)).device.type == "meta"
    with pytest.raises(ValueError, match="`threshold` is nan"):
        heat_map_box(torch.rand(2, 4, 4), threshold=math.nan)


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
    boxes = heat_map_box(object_heat_map(torch.randn(3, count, 8), grid_size), (8, 8))
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


@pytest.mark.parametrize(("family", "views"), [("mae", 1), ("cl_mae", 1), ("cmae", 2)])
def test_boxes_are_those_of_the_encoders_heat_maps(tmp_path, family, views):
    trainer = cropping(tmp_path, family, views=views, per_device_eval_batch_size=4)
    state, generator = trainer.train_dataset.crop_boxes, torch.get_rng_state()
    trainer.model.train()
    callback_of(trainer).refresh()
    assert trainer.model.training
    assert torch.equal(torch.get_rng_state(), generator)
    for i in range(10):
        tokens = trainer.model.vit(trainer.train_dataset.whole_image(i)[None]).last_hidden_state[:, 1:]
        expected = heat_map_box(object_heat_map(tokens, (4, 4)), (16, 16))[0]
        torch.testing.assert_close(state[i], expected, atol=1 / 16 + 1e-6, rtol=0)
    assert len(state.unique(dim=0)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_boxes_move_on_schedule_and_workers_see_them(tmp_path, persistent):
    refreshed, alone = [], cropping(tmp_path / "alone")
    trainer = cropping(tmp_path / "workers", dataloader_num_workers=1, dataloader_persistent_workers=persistent)
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


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 5])  # 2 steps an epoch; refreshed after 4 and 8
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


@pytest.mark.slow
def test_resuming_the_last_checkpoint_and_starting_anew(tmp_path):
    trainer = cropping(tmp_path, save_strategy="steps", save_steps=5)
    trainer.train()
    boxes = trainer.train_dataset.crop_boxes.clone()
    again = cropping(tmp_path, save_strategy="steps", save_steps=5)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(again.train_dataset.crop_boxes, boxes)
    callback_of(again).reset()
    assert again.train_dataset.crop_boxes.tolist() == [list(WHOLE)] * 10


@pytest.mark.slow
def test_checkpoints_that_do_not_fit(tmp_path):
    saving = dict(save_strategy="steps", save_steps=1, max_steps=1)
    cropping(tmp_path / "twelve", count=12, **saving).train()
    with pytest.raises(ValueError, match=r"has the boxes of 12 images, but the training set has 10"):
        cropping(tmp_path / "a").train(resume_from_checkpoint=str(tmp_path / "twelve" / "checkpoint-1"))
    tiny_trainer(tmp_path / "random", "mae", **saving).train()
    with pytest.raises(ValueError, match=r"has no contrastive_crop.safetensors: that run cropped at random"):
        cropping(tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "random" / "checkpoint-1"))


@pytest.mark.slow
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


def test_boxes_are_found_in_the_trainings_precision_without_dropped_paths(tmp_path):
    trainer, seen = cropping(tmp_path, bf16=True), set()
    trainer.model.train()
    trainer.model.vit.layers[0].mlp.fc1.register_forward_hook(lambda m, i, out: seen.add((out.dtype, m.training)))
    callback_of(trainer).refresh()
    assert seen == {(torch.bfloat16, False)}


@pytest.mark.parametrize("interval", [0, -0.2, 1.1])
def test_wrong_intervals(tmp_path, interval):
    with pytest.raises(ValueError, match=rf"`contrastive_crop_interval` is {interval}; give a share"):
        cropping(tmp_path, contrastive_crop_interval=interval)
