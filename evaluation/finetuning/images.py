# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Images to learn from: which of them, how they are augmented, and how they are mixed."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor
from torchvision.transforms import v2

from clmae.configuration.errors import InputError
from clmae.evaluation.finetuning.arguments import MAX_RANDAUGMENT
from clmae.training.data import ImageDataset, normalize, sample_generator


@contextlib.contextmanager
def _drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Lets what knows only the global CPU generator, as torchvision's transforms do, draw from `generator`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(generator.get_state())
        yield


class AugmentedImages(ImageDataset):
    """Training images with their classes: `(pixel_values (C, H, W) float32, label, key)` by `epoch * n + index`.

    Random resized crop, flip, RandAugment, normalisation, random erasing (see [`FinetuningArguments`]). A sample
    depends on nothing but (seed, epoch, index). `labels` is `(n,)` int64; other arguments are [`ImageDataset`]'s.

    Raises:
        InputError: As [`ImageDataset`]; or RandAugment is to be done on images with other than 1 or 3 channels.
    """

    _name, _remedy = "the training images", "Remove or replace it, or evaluate with `on_bad_image` `skip`."

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str,
        labels: Tensor,
        *,
        randaugment_magnitude: float = 0.0,
        randaugment_std: float = 0.0,
        random_erasing_probability: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, image_column, num_patches=0, patch_size=(1, 1), **kwargs)
        if randaugment_magnitude and self.num_channels not in (1, 3):
            raise InputError(
                f"`randaugment_magnitude` is {randaugment_magnitude}, but RandAugment works on images with 1 or 3 "
                f"channels, and these have {self.num_channels}; set it to 0."
            )
        self.labels = labels
        self.randaugment_magnitude, self.randaugment_std = randaugment_magnitude, randaugment_std
        self.randaugment = v2.RandAugment(
            num_ops=1,
            num_magnitude_bins=10 * MAX_RANDAUGMENT + 1,
            interpolation=v2.InterpolationMode.BILINEAR,
            fill=[round(255 * value) for value in self.mean],
        )
        # Noise of mean 0 and deviation 1 is what "random" gives: after the normalisation, that of pixels.
        self.erase = v2.RandomErasing(random_erasing_probability, value="random")

    def __getitem__(self, key: int) -> tuple[Tensor, Tensor, int]:
        epoch, index = divmod(int(key), len(self))
        # The next image stands in for a bad one.
        pixels, shown = self._read(index, lambda value, shown: (self._views(value, epoch, index, shown)[0], shown))
        with _drawing_from(sample_generator(self.seed, epoch, index, "after the crop")):
            if self.randaugment_magnitude:
                pixels = self._rand_augment(pixels)
            pixels = self.erase(normalize(pixels, self.mean, self.std))
        return pixels, self.labels[shown], int(key)

    def _rand_augment(self, pixels: Tensor) -> Tensor:
        # Posterising and equalising are made for 8 bits.
        pixels = v2.functional.to_dtype(pixels, torch.uint8, scale=True)
        for _ in range(2):
            if torch.rand(()) < 0.5:
                level = self.randaugment_magnitude + self.randaugment_std * torch.randn(()).item()
                self.randaugment.magnitude = round(10 * min(max(level, 0.0), MAX_RANDAUGMENT))
                pixels = self.randaugment(pixels)
        return pixels


class MixingCollator:
    """A batch `{"pixel_values": (B, C, H, W), "labels"}` of samples `(pixel_values, label[, key])`.

    Samples with keys (those for training) are mixed: a batch by mixup (arXiv 1710.09412) or by cutmix (arXiv
    1905.04899), each image with the one before it; then `labels` are probabilities `(B, num_classes)`, otherwise
    classes `(B,)`. What is drawn depends on the seed and the batch's first key alone.
    """

    def __init__(self, num_classes: int, *, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0, seed: int = 0) -> None:
        alphas = ((v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha))
        self.mixers = [mixer(alpha=alpha, num_classes=num_classes) for mixer, alpha in alphas if alpha > 0]
        self.seed = seed

    def __call__(self, samples: Sequence[tuple]) -> dict[str, Tensor]:
        pixel_values, labels, *keys = zip(*samples, strict=True)
        batch = torch.stack(pixel_values), torch.stack([torch.as_tensor(label) for label in labels])
        if keys and self.mixers:
            with _drawing_from(sample_generator(self.seed, 0, keys[0][0], "mixing")):
                batch = self.mixers[int(torch.randint(len(self.mixers), ()))](*batch)
        return {"pixel_values": batch[0], "labels": batch[1]}
