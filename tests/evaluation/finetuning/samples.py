# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Small labelled images for these tests."""

from __future__ import annotations

import datasets
import numpy as np
import torch

from clmae.evaluation.finetuning import AugmentedImages

CLASSES = ["red", "green", "blue"]
VIT = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4
)
PLAIN = dict(
    mixup_alpha=0.0, cutmix_alpha=0.0, randaugment_magnitude=0.0, random_erasing_probability=0.0, drop_path_rate=0.0
)
STRONG = dict(randaugment_magnitude=9.0, randaugment_std=0.5, random_erasing_probability=0.5, crop_scale=(0.3, 1.0))


def coloured_images(count: int, seed: int = 0) -> datasets.Dataset:
    """Noise with one bright channel, which is the class; the classes take turns."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    images = random.integers(0, 80, (count, 16, 16, 3))
    images[np.arange(count), :, :, labels] += 120
    features = datasets.Features(
        {"image": datasets.Array3D((16, 16, 3), "uint8"), "label": datasets.ClassLabel(names=CLASSES)}
    )
    return datasets.Dataset.from_dict({"image": list(images.astype(np.uint8)), "label": labels}, features=features)


def augmented(**options) -> AugmentedImages:
    """Six such images, by default as they are but cropped and mirrored."""
    dataset = coloured_images(6)
    fields = dict(image_size=(16, 16), num_channels=3, mean=[0.5] * 3, std=[0.5] * 3, seed=5)
    return AugmentedImages(dataset, "image", torch.tensor(dataset["label"]), **{**fields, **options})
