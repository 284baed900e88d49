# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""One seed, one run; batches in parts, and bf16, come to the same. (Two processes: `test_distributed_training.py`.)"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .runs import assert_equal_weights, image_dataset, logged, tiny_model, tiny_trainer, weights


def everything(tmp_path, **options):
    """The log without times, and the weights, of a CMAE with learned masks, two views and crops around the objects."""
    dataset = image_dataset(contrastive_crop=True, num_views=2)
    model = tiny_model("cmae", learned_masks=True)
    options = dict(max_steps=8, contrastive_crop_interval=0.5, difficulty_steps=4) | options
    trainer = tiny_trainer(tmp_path, model, train_dataset=dataset, **options)
    trainer.train()
    times = ("runtime", "per_second")
    history = [{k: v for k, v in entry.items() if not k.endswith(times)} for entry in trainer.state.log_history]
    return history, weights(trainer.model)


@pytest.mark.slow
def test_one_seed_is_one_run_bit_by_bit(tmp_path):
    history, first = everything(tmp_path / "first")
    again, second = everything(tmp_path / "second", dataloader_num_workers=1)
    assert again == history
    assert len(history) > 8
    assert_equal_weights(second, first)
    other, third = everything(tmp_path / "third", seed=7)
    assert other != history
    assert not torch.equal(third["decoder.mask_token"], first["decoder.mask_token"])


def in_parts(tmp_path, family, parts):
    """Losses and weights of a run of batches of four images in so many parts, by plain gradient descent."""
    # What the masking module is told by one image's neighbours, it cannot be told by parts of a batch: the soft
    # reconstruction is a mean over the batch's soft masks, and diversity is between its images.
    fields = dict(curriculum_start=0.0, curriculum_end=0.0, diversity_loss_weight=0.0) if family == "cl_mae" else {}
    trainer = tiny_trainer(
        tmp_path,
        tiny_model(family, **fields),
        max_steps=8,
        per_device_train_batch_size=4 // parts,
        gradient_accumulation_steps=parts,
        optim="sgd",
        learning_rate=0.01,
    )
    trainer.train()
    return logged(trainer, "loss"), logged(trainer, "reconstruction_loss"), weights(trainer.model)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mae", "cl_mae"])
def test_four_images_accumulated_are_a_batch_of_four(tmp_path, family):
    *whole, expected = in_parts(tmp_path / "whole", family, 1)
    *split, actual = in_parts(tmp_path / "parts", family, 4)
    for losses, same in zip(whole, split, strict=True):
        assert len(losses) == 8
        assert same == pytest.approx(losses, rel=1e-5)
    start = weights(tiny_model(family))
    moved = max((expected[name] - start[name]).abs().max().item() for name in start)
    apart = max((actual[name] - expected[name]).abs().max().item() for name in start)
    assert moved > 1e-3
    assert apart < 1e-3 * moved


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tolerance"), [("mae", 0.01), ("cl_mae", 0.02)])
def test_bf16_tracks_float32(tmp_path, family, tolerance):
    curves = []
    for bf16 in (False, True):
        trainer = tiny_trainer(tmp_path / str(bf16), family, max_steps=30, bf16=bf16)
        trainer.train()
        curves.append(np.array(list(logged(trainer, "reconstruction_loss").values())))
    exact, rounded = curves
    assert len(exact) == 30
    assert not np.array_equal(exact, rounded)  # it was bf16
    np.testing.assert_allclose(rounded, exact, rtol=tolerance)
    assert exact[-5:].mean() < exact[:5].mean() * 0.98  # there was something to track
