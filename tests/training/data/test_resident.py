# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Batches made on the device are the samples that workers would make; runs on them resume bit by bit."""

from __future__ import annotations

from types import SimpleNamespace

import datasets
import numpy as np
import psutil
import pytest
import torch
from transformers import default_data_collator

from clmae.training.data import DataArguments, ImageDataset, ResidentImageDataset, build_datasets, resident_if_small

from ..runs import assert_equal_weights, image_dataset, logged, tiny_model, tiny_trainer, weights
from .samples import SETTINGS, arrays, memory


def float_dataset(**settings):
    pixels = np.random.default_rng(0).uniform(0, 1, (6, 20, 30, 3)).astype(np.float32)
    return ImageDataset(arrays(datasets.Array3D((20, 30, 3), "float32"), list(pixels)), "bands", **SETTINGS, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"num_views": 2}, {"num_views": 2, "contrastive_crop": True}, {"horizontal_flip": False}]
)
@pytest.mark.parametrize("kind", ["8 bits", "floats"])
def test_samples_are_those_of_workers(kind, settings):
    source = ImageDataset(memory(6), "image", **SETTINGS, **settings) if kind == "8 bits" else float_dataset(**settings)
    if source.crop_boxes is not None:
        source.crop_boxes[:] = torch.rand(6, 2, 2, generator=torch.Generator().manual_seed(0)).sort(1).values.flatten(1)
    resident, keys = ResidentImageDataset(source, "cpu"), [*range(60), 6 * 1000 + 2]
    batch, height, width = resident.__getitems__(keys), *resident.images.shape[2:]
    drawn = []
    resident._crop = lambda *args: drawn.append(source._crop(*args)) or drawn[-1]
    resident.__getitems__(keys)
    boxes, flips = (values.reshape(len(keys), source.num_views, -1).tolist() for values in drawn[0])
    for i, key in enumerate(keys):
        sample, crops = source[key], source._draw(height, width, *divmod(key, 6), key % 6)
        assert [(list(box), [flip]) for box, flip in crops] == list(zip(boxes[i], flips[i], strict=True))
        assert torch.equal(batch["noise"][i], sample["noise"])
        difference = (batch["pixel_values"][i] - sample["pixel_values"]).abs() * 0.25
        # Images of 8 bits are rounded to whole numbers, twice.
        assert difference.mean() < 0.5 / 255 if kind == "8 bits" else difference.max() < 1e-5
        torch.testing.assert_close(resident.__getitems__([key])["pixel_values"][0], batch["pixel_values"][i])
    mirrored = np.mean(flips)
    assert mirrored == 0 if "horizontal_flip" in settings else 0.3 < mirrored < 0.7


def test_what_is_refused():
    with pytest.raises(ValueError, match="`source` is for evaluation"):
        ResidentImageDataset(image_dataset(train=False), "cpu")
    values = [np.zeros((20, 20 + i // 2), np.uint8).tolist() for i in range(3)]
    mixed = arrays(datasets.List(datasets.List(datasets.Value("uint8"))), values)
    with pytest.raises(ValueError, match=r"image 0 is \(20, 20\) uint8 and image 2 \(20, 21\) uint8: resize them"):
        ResidentImageDataset(ImageDataset(mixed, "bands", **SETTINGS), "cpu")


def test_bad_images():
    source = ImageDataset(memory(3, bad=[1]), "image", on_bad_image="skip", **SETTINGS)
    dataset = ResidentImageDataset(source, "cpu")
    assert dataset.num_bad_images == source.num_bad_images == 1
    assert torch.equal(dataset.images[1], dataset.images[2])
    with pytest.raises(ValueError, match=r"image 1 \(1.png\) of `dataset` cannot be used"):
        ResidentImageDataset(ImageDataset(memory(3, bad=[1]), "image", **SETTINGS), "cpu")


@pytest.mark.slow
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


def test_small_sets_are_kept_on_the_device(monkeypatch):
    source = image_dataset(5, device_resident=None)
    kept = resident_if_small(source, torch.device("cpu"))
    assert isinstance(kept, ResidentImageDataset)
    enough = 10 * kept.images.nbytes
    for total, processes, fits in ((enough, 1, True), (enough - 10, 1, False), (enough, 2, False)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda total=total: SimpleNamespace(total=total))
        dataset = resident_if_small(source, torch.device("cpu"), processes)
        assert isinstance(dataset, ResidentImageDataset) if fits else dataset is source
    monkeypatch.undo()
    values = [np.zeros((20, 20 + i // 2), np.uint8).tolist() for i in range(3)]
    mixed = ImageDataset(arrays(datasets.List(datasets.List(datasets.Value("uint8"))), values), "bands", **SETTINGS)
    assert resident_if_small(mixed, torch.device("cpu")) is mixed

    def full(self, *args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.Tensor, "to", full)
    assert resident_if_small(source, torch.device("cpu")) is source
    with pytest.raises(ValueError, match=r"`device_resident` needs 0\.0 GB on cpu"):
        ResidentImageDataset(source, "cpu")


@pytest.mark.parametrize(
    ("device_resident", "options", "expected"),
    [
        (None, {}, True),
        (None, {"dataloader_num_workers": 1}, False),
        (None, {"data_collator": default_data_collator}, False),  # which gets samples, not whole batches
        (False, {}, False),
    ],
)
def test_unless_workers_or_another_collator_are_asked_for(tmp_path, device_resident, options, expected):
    trainer = tiny_trainer(tmp_path, "mae", train_dataset=image_dataset(device_resident=device_resident), **options)
    assert isinstance(trainer.train_dataset, ResidentImageDataset) == expected
