# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Which images are learnt from, what is drawn for them, and that mixed targets fit mixed images."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from clmae.evaluation.finetuning import AugmentedImages, MixingCollator, label_subset

from .samples import STRONG, augmented, coloured_images


def test_labels_per_class_takes_exactly_so_many_and_nests():
    labels = torch.tensor([0] * 7 + [1] * 5 + [3] * 9)[torch.randperm(21)]  # no class 2
    small, large = (label_subset(labels, labels_per_class=n, seed=3) for n in (2, 5))
    assert labels[small].bincount().tolist() == [2, 2, 0, 2]
    assert labels[large].bincount().tolist() == [5, 5, 0, 5]
    assert set(small.tolist()) < set(large.tolist())
    assert torch.equal(large, label_subset(labels, labels_per_class=5, seed=3))
    assert not torch.equal(large, label_subset(labels, labels_per_class=5, seed=4))
    assert torch.equal(large, large.sort().values)


def test_label_fraction_is_taken_of_every_class():
    labels = torch.tensor([0] * 100 + [1] * 40 + [2] * 3)
    chosen = label_subset(labels, label_fraction=0.1)
    assert labels[chosen].bincount().tolist() == [10, 4, 1]
    assert label_subset(labels, label_fraction=1.0).tolist() == label_subset(labels).tolist() == list(range(143))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(labels_per_class=4), "class 1 has 3"),
        (dict(labels_per_class=0), "`labels_per_class` is 0"),
        (dict(label_fraction=0.0), "`label_fraction` is 0.0"),
        (dict(labels_per_class=1, label_fraction=0.5), "one of the two"),
    ],
)
def test_impossible_subsets_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        label_subset(torch.tensor([0] * 5 + [1] * 3), **options)


def test_samples_depend_on_seed_epoch_and_index_alone():
    first, second = augmented(**STRONG), augmented(**STRONG)
    keys = list(range(18))
    in_order = {key: first[key] for key in keys}
    torch.rand(7)
    for key in reversed(keys):
        pixels, label, found = second[key]
        assert torch.equal(pixels, in_order[key][0])
        assert found == key
        assert label == key % 3  # six images; the classes take turns
    assert not torch.equal(in_order[0][0], in_order[6][0])  # another epoch
    assert not torch.equal(in_order[0][0], augmented(**{**STRONG, "seed": 6})[0][0])


def test_an_image_that_stands_in_for_a_bad_one_brings_its_own_label():
    colours = coloured_images(6)
    arrays = [Image.fromarray(np.array(pixels, np.uint8)) for pixels in colours["image"]]
    encoded = datasets.Dataset.from_dict({"image": arrays}, features=datasets.Features({"image": datasets.Image()}))
    rows = encoded.cast_column("image", datasets.Image(decode=False)).to_list()
    rows[2]["image"]["bytes"] = b"broken"
    dataset = datasets.Dataset.from_list(rows, features=datasets.Features({"image": datasets.Image()}))
    fields = dict(image_size=(16, 16), num_channels=3, mean=[0.5] * 3, std=[0.5] * 3, on_bad_image="skip")
    images = AugmentedImages(dataset, "image", torch.tensor(colours["label"]), **fields)
    for epoch in (0, 1):
        pixels, label, key = images[6 * epoch + 2]
        assert pixels.mean((1, 2)).argmax() == label == 0  # of the next image; its own was 2
        assert key == 6 * epoch + 2


def test_samples_leave_the_global_random_state_alone():
    images, state = augmented(**STRONG), torch.get_rng_state()
    images[0]
    assert torch.equal(state, torch.get_rng_state())


def test_no_augmentation_shows_the_normalised_image():
    images = augmented(crop_scale=(1.0, 1.0), horizontal_flip=False)
    pixels = torch.tensor(coloured_images(6)["image"][2]).permute(2, 0, 1) / 255
    torch.testing.assert_close(images[2][0], (pixels - 0.5) / 0.5)


def test_randaugment_reaches_the_strength_that_was_asked_for(monkeypatch):
    drawn = []
    images = augmented(randaugment_magnitude=9.0, randaugment_std=0.5)
    original = type(images.randaugment).forward

    def forward(self, pixels):
        drawn.append(self.magnitude)
        return original(self, pixels)

    monkeypatch.setattr(type(images.randaugment), "forward", forward)
    for key in range(300):
        images[key]
    assert 240 < len(drawn) < 360  # two operations an image, each with probability 1/2
    assert np.mean(drawn) == pytest.approx(90, abs=1.5)
    assert max(drawn) <= 100
    assert np.std(drawn) == pytest.approx(5, abs=1)


def test_randaugment_refuses_four_channels():
    pixels = np.zeros((2, 16, 16, 4), np.uint8)
    features = datasets.Features({"image": datasets.Array3D((16, 16, 4), "uint8")})
    dataset = datasets.Dataset.from_dict({"image": list(pixels)}, features=features)
    options = dict(image_size=(16, 16), num_channels=4, mean=[0.5] * 4, std=[0.5] * 4)
    with pytest.raises(ValueError, match=r"`randaugment_magnitude` is 9\.0.*1 or 3 channels"):
        AugmentedImages(dataset, "image", torch.zeros(2).long(), randaugment_magnitude=9.0, **options)


def samples(first_key: int = 0):
    """Image 0 is all 0 and of class 0, image 1 all 1 and of class 1."""
    return [(torch.full((1, 4, 4), float(i)), torch.tensor(i), first_key + i) for i in range(2)]


@pytest.mark.parametrize("alphas", [dict(mixup_alpha=0.8), dict(cutmix_alpha=1.0)])
def test_mixed_targets_are_the_shares_of_the_images(alphas):
    collate = MixingCollator(3, **alphas)
    shares = set()
    for key in range(0, 20, 2):
        batch = collate(samples(key))
        # Of image 0 (all 0) mixed with image 1 (all 1), the mean pixel is the share of image 1; or the other way round.
        share = batch["pixel_values"].mean((1, 2, 3))
        expected = torch.stack([1 - share, share, torch.zeros(2)], dim=1)
        torch.testing.assert_close(batch["labels"], expected)
        torch.testing.assert_close(batch["labels"].sum(1), torch.ones(2))
        shares.add(round(share[0].item(), 6))
    assert len(shares) > 3


def test_mixing_takes_both_kinds_and_depends_on_the_key_alone():
    collate = MixingCollator(2, mixup_alpha=0.8, cutmix_alpha=1.0, seed=1)
    state = torch.get_rng_state()
    batches = {key: collate(samples(key)) for key in range(0, 40, 2)}
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    for key in reversed(batches):
        assert torch.equal(collate(samples(key))["pixel_values"], batches[key]["pixel_values"])
    uniform = [batch["pixel_values"][0].unique().numel() == 1 for batch in batches.values()]
    assert True in uniform  # mixup: a constant image stays one
    assert False in uniform  # cutmix


def test_evaluation_batches_are_not_mixed():
    batch = MixingCollator(2, mixup_alpha=0.8)([sample[:2] for sample in samples()])
    assert batch["labels"].tolist() == [0, 1]
    assert batch["pixel_values"].unique().tolist() == [0.0, 1.0]
