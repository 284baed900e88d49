# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Datasets that fit on the training device: a batch is cropped, flipped and normalised there, in one go.

No workers, no loop over images, and nothing waits for the device.
"""

from __future__ import annotations

import numpy as np
import psutil
import torch
from transformers.utils import logging

from clmae.configuration.errors import InputError
from clmae.training.data.dataset import ImageDataset
from clmae.training.data.pixels import crop_and_resize_batch, normalize
from clmae.training.data.randomness import uint64

logger = logging.get_logger(__name__)
SHARE_OF_MEMORY = 0.1


class NotResidentError(InputError):
    """The images are good, but cannot be kept on the device: they differ in size or type, or do not fit."""


class ResidentImageDataset(ImageDataset):
    """A training [`ImageDataset`] whose images lie on the device, where a batch is made of them at once.

    The samples are the dataset's, but for rounding. `__getitems__(keys)`, which loaders call, gives a whole batch:
    `{"pixel_values": (B, C, H, W), "noise": (B, num_patches)}`, with several views `(B, num_views, ...)`, both float32
    on the device. It needs [`ImageCollator`], no workers and no pinned memory; [`CurriculumTrainer`] sees to that.

    Args:
        source: For training; its images are all of one size and type.
        device: Where the images are kept: 1 byte per value, or 4 if they have more than 8 bits.

    Raises:
        InputError: An image is bad, or, as [`NotResidentError`], the images differ in size or type, or do not fit.
    """

    def __init__(self, source: ImageDataset, device: torch.device | str):
        if not source.train:
            raise InputError("`source` is for evaluation, which shows no random crops; leave it as it is.")
        self.__dict__.update(source.__dict__)
        self.device = torch.device(device)
        images = self._load_all()
        try:
            self.images = images.to(self.device)
            peak = 255 if images.dtype == torch.uint8 else 1
            self._moments = (peak * torch.tensor([self.mean, self.std])).to(self.device)
        except torch.OutOfMemoryError as error:
            raise NotResidentError(
                f"`device_resident` needs {images.nbytes / 1e9:.1f} GB on {self.device}, which does not have them; "
                "leave it out."
            ) from error

    def __getitem__(self, key: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([key]).items()}

    def __getitems__(self, keys: list[int]) -> dict[str, torch.Tensor]:
        """The samples of `keys` (see [`ImageDataset`]), stacked."""
        epoch, index = np.divmod(uint64(keys).repeat(self.num_views), uint64(len(self)))
        state = self._state(epoch, index, uint64(np.tile(np.arange(self.num_views), len(keys))))
        # Boxes are a few numbers: computed where the workers' are, they are the same to the bit.
        rows = torch.from_numpy(index.astype(np.int64))
        object_boxes = None if self.crop_boxes is None else self.crop_boxes[rows].numpy()
        boxes, flips = self._crop(self.images.shape[2], self.images.shape[3], state, object_boxes)
        drawn = (rows, torch.from_numpy(boxes), torch.from_numpy(flips), self._noise(state[:, None]))
        rows, on_device, flipped, noise = (values.to(self.device, non_blocking=True) for values in drawn)
        pixels = crop_and_resize_batch(self.images[rows], on_device, flipped, self.image_size)
        if self.color_jitter:
            last = slice(self.num_views - 1, None, self.num_views)
            peak = 255 if self.images.dtype == torch.uint8 else 1
            pixels[last] = self._jittered(pixels[last], state[last, None], peak)
        pixels = normalize(pixels, *self._moments)
        if self.num_views > 1:
            pixels, noise = (values.unflatten(0, (-1, self.num_views)) for values in (pixels, noise))
        return {"pixel_values": pixels, "noise": noise}

    def _load_all(self) -> torch.Tensor:
        """`(N, C, H, W)` on the CPU, as they are stored: uint8, or float32 in [0, 1]."""
        images = torch.empty(0)
        for i in range(len(self)):
            image = torch.from_numpy(self._read(i, lambda value, _: self._decode(value))).permute(2, 0, 1)
            if i == 0:
                images = torch.empty((len(self), *image.shape), dtype=image.dtype)
            if image.shape != images.shape[1:] or image.dtype != images.dtype:
                raise NotResidentError(
                    f"`device_resident` needs images of one size and type, but image 0 is {_describe(images[0])} and "
                    f"image {i} {_describe(image)}: resize them before, or leave it out."
                )
            images[i] = image
        return images


def resident_if_small(source: ImageDataset, device: torch.device, num_processes: int = 1) -> ImageDataset:
    """The dataset on the device, if its images are all of one size and fit in a tenth of its memory; else as it is.

    Args:
        source: As for [`ResidentImageDataset`].
        device: Where the images would be kept.
        num_processes: That share a CPU's memory, and each keep all images.

    Raises:
        InputError: An image is bad.
    """
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    elif device.type == "cpu":
        memory = psutil.virtual_memory().total // num_processes
    else:
        return source
    image = source._read(0, lambda value, _: source._decode(value))
    if len(source) * image.nbytes > SHARE_OF_MEMORY * memory:
        return source
    try:
        resident = ResidentImageDataset(source, device)
    except NotResidentError:
        return source
    logger.info("All training images are kept on %s (device_resident).", device)
    return resident


def _describe(image: torch.Tensor) -> str:
    return f"{tuple(image.shape[1:])} {str(image.dtype).removeprefix('torch.')}"
