# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Batches made on the device: the same crops, boxes and samples as image by image, keyed, and resumable."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clmae.training.contrastive_crop import contrastive_crop_box
from clmae.training.data import DataArguments, ImageDataset, build_datasets
from clmae.training.images import crop_and_resize, normalize, random_resized_crop_box, sample_generator
from clmae.training.resident import (
    ResidentImageDataset,
    contrastive_crop_boxes,
    crop_and_resize_batch,
    crop_matrices,
    keyed_uniforms,
    random_resized_crop_boxes,
    stream_base,
)

from .runs import assert_equal_weights, image_dataset, logged, tiny_model, tiny_trainer, weights


def resident(count=8, **settings):
    return ResidentImageDataset(image_dataset(count, **settings), "cpu")


SAMPLES = dict(image_size=(16, 16), num_channels=3, num_patches=16, patch_size=(4, 4), mean=[0.5] * 3, std=[0.5] * 3)


def array_dataset(pixels, **settings):
    """Of arrays `(N, H, W, C)`."""
    feature = datasets.Array3D(pixels.shape[1:], str(pixels.dtype))
    data = datasets.Dataset.from_dict({"image": list(pixels)}, features=datasets.Features({"image": feature}))
    return ResidentImageDataset(ImageDataset(data, "image", **{**SAMPLES, **settings}), "cpu")


def draws(seed, *shape):
    return torch.rand(*shape, generator=sample_generator(seed, 0, 0), dtype=torch.float64)


# -- random numbers ---------------------------------------------------------------------------------------------------


def test_splitmix_is_the_published_one():
    # From state 0 its first outputs are 0xE220A8397B1DCDAF and 0x6E789E6AA1B965F4; state 0 is what 0 is mixed to.
    zero = torch.zeros(1, dtype=torch.int64)
    expected = torch.tensor([[0xE220A8397B1DCDAF >> 40, 0x6E789E6AA1B965F4 >> 40]]) * 2.0**-24
    assert torch.equal(keyed_uniforms(0, zero, zero, 2), expected)


def test_uniforms():
    epoch, index = torch.arange(4).repeat_interleave(500), torch.arange(500).repeat(4)
    numbers = keyed_uniforms(7, epoch, index, 8)
    assert numbers.dtype == torch.float32
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, 16, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 40  # chi-squared, 15 degrees of freedom: 1 in 2000
    assert torch.corrcoef(numbers.T).fill_diagonal_(0).abs().max() < 0.1
    assert len(numbers.flatten().unique()) > 15900
    assert torch.equal(keyed_uniforms(7, epoch[5:6], index[5:6], 8)[0], numbers[5])
    assert not torch.equal(keyed_uniforms(8, epoch, index, 8), numbers)


# -- crops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "scale"), [(32, 32, (0.2, 1.0)), (12, 60, (0.6, 1.0)), (60, 12, (0.9, 1))])
def test_boxes_are_those_of_single_images(monkeypatch, height, width, scale):
    size, place = draws(1, 64, 40), draws(2, 64, 4)
    objects = draws(3, 64, 2, 2).sort(1).values.flatten(1)
    boxes = random_resized_crop_boxes(height, width, size, scale)
    moved = contrastive_crop_boxes(height, width, objects, boxes, place)
    for i in range(64):
        rows = iter((size[i].view(10, 4), place[i], size[i].view(10, 4)))
        monkeypatch.setattr(torch, "rand", lambda *args, rows=rows, **kwargs: next(rows))
        assert tuple(moved[i].tolist()) == contrastive_crop_box(height, width, objects[i].tolist(), None, scale)
        assert tuple(boxes[i].tolist()) == random_resized_crop_box(height, width, None, scale)
    assert len(moved.unique(dim=0)) > 4


@pytest.mark.parametrize("size", [(16, 16), (8, 12), (40, 40)])
def test_crops_are_those_of_single_images(size):
    pixels = np.random.default_rng(0).uniform(0, 255, (6, 24, 20, 3)).astype(np.uint8)
    boxes = torch.tensor([[0, 0, 24, 20], [3, 4, 16, 16], [10, 2, 5, 7], [23, 19, 1, 1], [0, 5, 20, 9], [4, 0, 8, 12]])
    flips = torch.tensor([False, True, False, True, True, False])
    batch = crop_and_resize_batch(torch.from_numpy(pixels).permute(0, 3, 1, 2), boxes, flips, size)
    assert batch.shape == (6, 3, *size)
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        part = torch.from_numpy(pixels[i, top : top + height, left : left + width]).permute(2, 0, 1)
        exact = F.interpolate(part[None].float(), size=size, mode="bicubic", antialias=True)[0].clamp(0, 255)
        own = batch[i].flip(-1) if flips[i] else batch[i]
        torch.testing.assert_close(own, exact, rtol=0, atol=2e-3)
        stored = crop_and_resize(pixels[i], (top, left, height, width), size).float()
        assert (own - stored).abs().mean() < 0.5  # which rounds to whole numbers, twice


def test_a_crop_that_is_not_resized_is_exact():
    matrix = crop_matrices(torch.tensor([3]), torch.tensor([8]), 12, 8)
    assert torch.equal(matrix[0], torch.eye(12)[3:11])


# -- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"num_views": 2, "contrastive_crop": True}])
def test_a_sample_depends_on_its_key_alone(settings):
    dataset = resident(**settings)
    keys = [3, 8 + 3, 7, 16 + 1]
    batch, alone = dataset.__getitems__(keys), dataset.__getitems__([11])
    views = (2,) if settings else ()
    assert batch["pixel_values"].shape == (4, *views, 3, 16, 16)
    assert batch["noise"].shape == (4, *views, 16)
    assert torch.equal(batch["noise"][1], alone["noise"][0])
    torch.testing.assert_close(batch["pixel_values"][1], alone["pixel_values"][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(dataset[11], {name: values[0] for name, values in alone.items()})
    for values in batch.values():
        assert len(values.flatten(0, len(views)).unique(dim=0)) == 4 * (2 if views else 1)
    other = resident(seed=1, **settings).__getitems__(keys)
    assert not torch.isclose(other["noise"], batch["noise"]).any(-1).all()
    assert (other["pixel_values"] - batch["pixel_values"]).abs().mean() > 0.01


def test_samples_are_normalised_crops_of_their_images():
    source = image_dataset(4)
    batch = ResidentImageDataset(source, "cpu").__getitems__([0, 5, 10, 15])["pixel_values"]  # four images and epochs
    draws = keyed_uniforms(stream_base(0, "augmentation"), torch.arange(4), torch.arange(4), 45)
    for i, box in enumerate(random_resized_crop_boxes(20, 20, draws[:, :40]).tolist()):
        expected = normalize(crop_and_resize(source._load(i), tuple(box), (16, 16)), source.mean, source.std)
        expected = expected.flip(-1) if draws[i, 40] < 0.5 else expected
        assert (batch[i] - expected).abs().mean() < 0.5 / 255 / 0.25


def test_half_of_the_samples_are_mirrored():
    ramp = np.tile(np.arange(20, dtype=np.uint8)[None, None, :, None] * 10, (4, 20, 1, 3))

    def leans(**settings):
        pixels = array_dataset(ramp, **settings).__getitems__(list(range(400)))["pixel_values"]
        return (pixels[..., 12:].mean((1, 2, 3)) < pixels[..., :4].mean((1, 2, 3))).float().mean().item()

    assert leans() == pytest.approx(0.5, abs=0.1)
    assert leans(horizontal_flip=False) == 0


def test_crops_gather_around_the_objects():
    dataset = resident(contrastive_crop=True, crop_scale=(0.2, 0.3))
    dataset.crop_boxes[:] = torch.tensor([0.0, 0.0, 0.1, 0.1])
    uniforms = keyed_uniforms(0, torch.zeros(64, dtype=torch.int64), torch.arange(64), 45)
    boxes = dataset._boxes(uniforms, torch.arange(64) % 8)
    assert (boxes[:, :2] == 0).all()


def test_float_images():
    pixels = np.random.default_rng(0).uniform(0, 1, (3, 20, 20, 2)).astype(np.float32)
    dataset = array_dataset(pixels, num_channels=2, mean=[0.0] * 2, std=[1.0] * 2)
    values = dataset.__getitems__([0, 1, 2])["pixel_values"]
    assert values.min() >= 0
    assert 0.5 < values.max() <= 1


# -- refused ----------------------------------------------------------------------------------------------------------


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`device_resident` keeps all images on the device, which a stream never"):
        DataArguments(dataset="x", device_resident=True, streaming=True)
    with pytest.raises(ValueError, match="`source` is for evaluation"):
        resident(train=False)
    mixed = image_dataset(3)
    mixed._load = lambda index: np.zeros((20, 20 + index // 2, 3), np.uint8)
    with pytest.raises(
        ValueError, match=r"image 0 is \(20, 20\) uint8 and image 2 \(20, 21\) uint8: resize them before"
    ):
        ResidentImageDataset(mixed, "cpu")


def test_bad_images():
    features = datasets.Features({"image": datasets.Image(decode=False)})
    good = image_dataset(4).dataset[0]["image"]
    data = datasets.Dataset.from_dict({"image": [good, {"bytes": b"broken", "path": "b.png"}, good]}, features=features)
    source = ImageDataset(data, "image", on_bad_image="skip", **SAMPLES)
    dataset = ResidentImageDataset(source, "cpu")
    assert dataset.num_bad_images == source.num_bad_images == 1
    assert torch.equal(dataset.images[1], dataset.images[2])
    with pytest.raises(ValueError, match=r"image 1 \(b.png\) of `dataset` cannot be used"):
        ResidentImageDataset(ImageDataset(data, "image", **SAMPLES), "cpu")


# -- training ---------------------------------------------------------------------------------------------------------


def test_resumed_runs_end_bit_by_bit_as_whole_ones(tmp_path):
    def run(folder, resume=None, **options):
        model = tiny_model("cmae", learned_masks=True)
        train = image_dataset(num_views=2, contrastive_crop=True, device_resident=True)
        trainer = tiny_trainer(
            tmp_path / folder, model, train_dataset=train, num_train_epochs=2, save_strategy="steps", save_steps=3,
            contrastive_crop_interval=0.5, eval_strategy="steps", eval_steps=4, difficulty_steps=4,
            **options,
        )  # fmt: skip
        assert isinstance(trainer.train_dataset, ResidentImageDataset)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    assert whole.state.global_step == 8
    assert set(logged(whole, "eval_loss")) == {4, 8}
    assert len(whole.train_dataset.crop_boxes.unique(dim=0)) > 1
    resumed = run("resumed", resume=str(tmp_path / "whole" / "checkpoint-6"))
    assert_equal_weights(weights(resumed.model), weights(whole.model))
    assert logged(resumed, "loss") == logged(whole, "loss")
    other = run("other", seed=7)
    assert not torch.equal(other.model.decoder.decoder_pred.weight, whole.model.decoder.decoder_pred.weight)


def test_workers_are_for_evaluation_only(tmp_path):
    options = dict(dataloader_num_workers=1, dataloader_prefetch_factor=2, dataloader_persistent_workers=True)
    trainer = tiny_trainer(tmp_path, "mae", train_dataset=image_dataset(device_resident=True), **options)
    loader = trainer.get_train_dataloader()
    assert (loader.num_workers, loader.pin_memory, loader.persistent_workers) == (0, False, False)
    (first, *_), evaluation = loader, trainer.get_eval_dataloader()
    assert (evaluation.num_workers, evaluation.persistent_workers) == (1, True)
    assert first["pixel_values"].shape == (4, 3, 16, 16)
    assert trainer.args.dataloader_num_workers == 1
    assert trainer.args.dataloader_drop_last


def test_built_from_options(tmp_path):
    for i, image in enumerate(image_dataset(20).dataset["image"]):
        (tmp_path / f"{i}.png").write_bytes(image["bytes"])
    args = DataArguments(dataset=str(tmp_path), device_resident=True)
    train, evaluation, _ = build_datasets(args, tiny_model("mae").config)
    assert (train.device_resident, evaluation.device_resident) == (True, False)
    assert (len(train), len(evaluation)) == (18, 2)
