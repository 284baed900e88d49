# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""How images reach the device. The rule: uint8 `pixel_values` are yet to be normalised, floats are normalised."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import default_data_collator

from clmae.training.data.dataset import ImageDataset
from clmae.training.data.pixels import normalize
from clmae.training.data.streaming import StreamingImageDataset


def unnormalized(dataset: Any) -> Any:
    """The same samples, but uint8 `pixel_values` of images of 8 bits, for who normalises whole batches on the device.

    A quarter of the bytes to move, and less to do for a worker. Shares all state with `dataset`, which stays as it is.
    What is no [`ImageDataset`] or [`StreamingImageDataset`], or a subclass, which may compute with normalised pixels,
    is returned itself.
    """
    if type(dataset) not in (ImageDataset, StreamingImageDataset):
        return dataset
    raw = copy.copy(dataset)
    raw.normalizes = False
    return raw


@dataclass
class ImageCollator:
    """Stacks samples to a batch; a batch that a dataset made itself (see [`ResidentImageDataset`]) stays as it is.

    `pixel_values` of a batch are uint8 if they are so in all samples. Where some images have more than 8 bits, the
    others are normalised by `mean` and `std`, too.
    """

    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, samples: Any) -> dict[str, Any]:
        if isinstance(samples, dict):
            return samples
        images = [sample.get("pixel_values") for sample in samples if isinstance(sample, dict)]
        types = {image.dtype for image in images if isinstance(image, torch.Tensor)}
        if torch.uint8 in types and len(types) > 1:
            samples = [{**sample, "pixel_values": self._normalized(sample["pixel_values"])} for sample in samples]
        return default_data_collator(samples)

    def _normalized(self, pixels: torch.Tensor) -> torch.Tensor:
        return normalize(pixels, self.mean, self.std) if pixels.dtype == torch.uint8 else pixels
