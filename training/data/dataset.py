# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Samples for pretraining of a map-style dataset, and what streams share with it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import torch

from clmae.configuration.configuration_mae import pair
from clmae.configuration.errors import InputError
from clmae.training.data.colours import NUM_DRAWS, jitter_colours
from clmae.training.data.columns import AnyDataset, array_dtype, prepare_images
from clmae.training.data.crops import (
    COLOURS,
    FLIP,
    NOISE,
    Box,
    contrastive_crop_box,
    random_resized_crop_box,
    scale_box,
)
from clmae.training.data.decoding import ImageDecodeError, Reduction, decode_image, undecoded
from clmae.training.data.pixels import center_view, crop_and_resize, normalize
from clmae.training.data.randomness import Integers, sample_state, uint64, uniform
from clmae.training.data.sources import check_count

# Least number of source pixels per pixel of a view, along a side, where a JPEG is decoded at reduced size. On
# photographs at 64 pixels the views then differ from those of the whole image by 1.9/255 on average; with 1 it is 5.9.
_DETAIL = 2.0


def check_on_bad_image(value: str) -> None:
    """InputError unless it is `"raise"` or `"skip"`."""
    if value not in ("raise", "skip"):
        raise InputError(f"`on_bad_image` is {value!r}; choose one of raise, skip.")


class ImageViews:
    """What [`ImageDataset`] and [`StreamingImageDataset`] share: an image of either becomes a sample here."""

    normalizes = True  # see `unnormalized`
    _name, _remedy = "`dataset`", "Remove or replace it, or set `on_bad_image` to skip."

    def __init__(
        self,
        dataset: AnyDataset,
        image_column: str,
        *,
        image_size: tuple[int, int],
        num_channels: int,
        num_patches: int,
        patch_size: tuple[int, int],
        mean: list[float],
        std: list[float],
        train: bool = True,
        seed: int = 0,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        horizontal_flip: bool = True,
        crop_ratio: float = 1.0,
        num_views: int = 1,
        color_jitter: bool = False,
        on_bad_image: str = "raise",
    ) -> None:
        check_on_bad_image(on_bad_image)
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise InputError(f"`crop_scale` is {crop_scale}; give two shares of the area, 0 < low <= high <= 1.")
        if not 0 < crop_ratio <= 1:
            raise InputError(f"`crop_ratio` is {crop_ratio}; give a number in (0, 1].")
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != num_channels or (name == "std" and min(values) <= 0):
                above = ", each above 0" if name == "std" else ""
                raise InputError(f"`{name}` is {values}; give one number for each of {num_channels} channels{above}.")
        check_count("num_views", num_views)
        dataset, self.image_column = prepare_images(dataset, image_column)
        self._array_dtype = array_dtype(dataset.features[self.image_column])
        dataset = dataset.select_columns([self.image_column])  # so that no other column is read or decoded
        self.dataset: Any = dataset if self._array_dtype is None else dataset.with_format("numpy")
        self.image_size, self.patch_size = pair(image_size), pair(patch_size)
        self.num_channels, self.num_patches = num_channels, num_patches
        self.mean, self.std = list(mean), list(std)
        self.train, self.seed = train, seed
        self.crop_scale, self.horizontal_flip, self.crop_ratio = crop_scale, horizontal_flip, crop_ratio
        self.num_views = num_views if train else 1
        self.color_jitter = color_jitter
        self.crop_boxes: torch.Tensor | None = None
        self.on_bad_image = on_bad_image
        self._noise_positions = range(NOISE, NOISE + num_patches)
        self._colour_positions = range(COLOURS, COLOURS + NUM_DRAWS)

    @property
    def num_bad_images(self) -> int:
        """How many bad images were found so far, by any worker; a stream counts one again in each epoch."""
        return int(self.bad_images.sum())

    bad_images: torch.Tensor  # in shared memory, so that what a worker finds is known to all

    # -- what is drawn: for one sample by `int` keys, or for a batch by arrays --------------------------------------

    def _state(self, epoch: Integers, key: Integers, view: Integers) -> Integers:
        return sample_state(self.seed, epoch if self.train else 0, key, view)  # the same masks at every evaluation

    def _crop(self, height: int, width: int, state: Integers, object_box: Any) -> tuple[Any, Any]:
        """Which part a view shows of an image of this size, and whether it is mirrored."""
        draw = functools.partial(uniform, state)
        if object_box is None:
            box = random_resized_crop_box(height, width, draw, self.crop_scale)
        else:
            box = contrastive_crop_box(height, width, object_box, draw, self.crop_scale)
        return box, draw(FLIP) < (0.5 if self.horizontal_flip else 0)

    def _noise(self, state: Integers) -> torch.Tensor:
        return torch.from_numpy(uniform(state, self._noise_positions).astype(np.float32))

    def _jittered(self, pixels: torch.Tensor, states: np.ndarray, peak: float) -> torch.Tensor:
        """Views `(B, C, H, W)` in 0..peak with other colours, by their states `(B, 1)`."""
        draws = uniform(states, self._colour_positions).astype(np.float32)
        return jitter_colours(pixels, torch.from_numpy(draws).to(pixels.device), peak)

    # -- one sample -------------------------------------------------------------------------------------------------

    def _sample(self, views: list[torch.Tensor], epoch: int, key: int) -> dict[str, torch.Tensor]:
        noise = [self._noise(self._state(epoch, key, view)) for view in range(self.num_views)]
        if self.normalizes or views[0].dtype != torch.uint8:
            views = [normalize(pixels, self.mean, self.std) for pixels in views]
        if self.num_views == 1:
            return {"pixel_values": views[0], "noise": noise[0]}
        return {"pixel_values": torch.stack(views), "noise": torch.stack(noise)}

    def _views(self, value: Any, epoch: int, key: int, index: int = 0) -> list[torch.Tensor]:
        """The views `(C, H, W)` that a sample shows of an undecoded image, that of the dataset's `index`."""
        if not self.train:
            return [center_view(self._decode(value), self.image_size, self.crop_ratio)]
        # What is cropped is drawn for the whole image, and of a JPEG before it is decoded, in no more detail than that.
        size: tuple[int, int] | None = None
        crops: list[tuple[Box, bool]] = []

        def reduction(height: int, width: int) -> float:
            nonlocal size, crops
            size, crops = (height, width), self._draw(height, width, epoch, key, index)
            return min(self._reduction(*box[2:]) for box, _ in crops)

        image = self._decode(value, reduction)
        height, width = image.shape[:2]
        if size is None:
            crops = self._draw(height, width, epoch, key, index)
        elif size != (height, width):
            crops = [(scale_box(box, size, (height, width)), flipped) for box, flipped in crops]
        views = [crop_and_resize(image, box, self.image_size) for box, _ in crops]
        views = [pixels.flip(-1) if flipped else pixels for pixels, (_, flipped) in zip(views, crops, strict=True)]
        if self.color_jitter:
            state = uint64([[self._state(epoch, key, len(views) - 1)]])
            views[-1] = self._jittered(views[-1][None], state, 255 if views[-1].dtype == torch.uint8 else 1)[0]
        return views

    def _draw(self, height: int, width: int, epoch: int, key: int, index: int) -> list[tuple[Box, bool]]:
        object_box = None if self.crop_boxes is None else self.crop_boxes[index].tolist()
        crops = []
        for view in range(self.num_views):
            box, flipped = self._crop(height, width, self._state(epoch, key, view), object_box)
            crops.append((box, bool(flipped)))
        return crops

    def _reduction(self, height: float, width: float) -> float:
        """By how much a part of this size may be reduced, and still have the detail for a view."""
        return min(height / self.image_size[0], width / self.image_size[1]) / _DETAIL

    def _decode(self, value: Any, reduction: Reduction | None = None) -> np.ndarray:
        image = decode_image(value, self.num_channels, reduction)
        if image.shape[0] < self.patch_size[0] or image.shape[1] < self.patch_size[1]:
            raise ImageDecodeError(
                f"its size {image.shape[:2]} is smaller than a patch, {self.patch_size} (height, width); remove it, or "
                "take smaller patches."
            )
        return image

    def _error(self, where: str, value: Any, cause: Exception) -> InputError:
        path = value.get("path") if isinstance(value, dict) else None
        where += f" ({path})" if path else ""
        return InputError(f"image {where} of {self._name} cannot be used: {cause} {self._remedy}")


class ImageDataset(ImageViews, torch.utils.data.Dataset[Any]):
    """Samples of a map-style dataset for pretraining: `{"pixel_values": (C, H, W), "noise": (num_patches,)}`.

    `pixel_values` is normalised, `noise` uniform in [0, 1); both float32. A sample depends on nothing but
    (seed, epoch, index), whatever the workers and wherever a run was resumed. The epoch travels in the key:
    `dataset[epoch * len(dataset) + index]`, which a sampler yields, so that no worker has to be told of it.

    Args:
        dataset, image_column: As [`load_image_dataset`] gives them.
        num_channels: Channels of the samples: 1, 3 or 4, or what the arrays in the dataset have.
        patch_size: Images smaller than that, on either side, count as bad.
        mean, std: One value per channel, in units of [0, 1].
        train: Random resized crop and flip, and new noise each epoch; otherwise the centre, and the same noise.
        crop_scale: Smallest and largest share of the image in a random crop.
        horizontal_flip: Whether half of the samples are mirrored.
        crop_ratio: Share of the sides that the centre shows, in (0, 1].
        num_views: Random views of an image in a training sample; with more than one, `pixel_values` is
            `(num_views, C, H, W)` and `noise` `(num_views, num_patches)`. Evaluation always shows one.
        contrastive_crop: Whether random crops have their centres in `crop_boxes`, `(len(dataset), 4)` in shared
            memory, at first the whole image; `ContrastiveCropCallback` moves them to the objects.
        device_resident: Whether `CurriculumTrainer` keeps all images on its device, and makes batches there (see
            [`ResidentImageDataset`]); `None`: where [`resident_if_small`] finds it suits them.
        color_jitter: Whether the last view of a training sample has other colours (see [`jitter_colours`]).
        on_bad_image: `"raise"`, or `"skip"`: the next readable image takes the place of a bad one.

    Attributes:
        first_size: Height and width of the first image, as it is stored.

    Raises:
        InputError: When constructed: the dataset is empty, or its first image (with `"skip"`: every image) is bad.
            When indexed: the image is bad, and `on_bad_image` is `"raise"`.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str,
        *,
        contrastive_crop: bool = False,
        device_resident: bool | None = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, image_column, **kwargs)
        self.device_resident = device_resident
        if not len(dataset):
            raise InputError("`dataset` is empty: there is no image in it.")
        self.bad_images = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
        if contrastive_crop:  # in shared memory, so that persistent workers see new boxes
            self.crop_boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(len(dataset), 1).share_memory_()
        self.first_size: tuple[int, int] = self._read(0, lambda value, _: self._decode(value).shape[:2])

    def __len__(self) -> int:
        return len(self.bad_images)

    def __iter__(self) -> Iterator[Any]:
        """The first epoch's samples. (Python's own iteration would go on: larger keys are later epochs.)"""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, key: int) -> Any:
        epoch, index = divmod(int(key), len(self))
        views = self._read(index, lambda value, shown: self._views(value, epoch, index, shown))
        return self._sample(views, epoch, index)

    def whole_image(self, index: int) -> torch.Tensor:
        """All of an image, un-augmented and squeezed to `image_size`: normalised `(C, H, W)`."""
        # In training in the detail that any crop may need; aspect ratios go to 4/3.
        share = math.sqrt(0.75 * self.crop_scale[0]) if self.train else 0.0

        def reduction(height: int, width: int) -> float:
            return self._reduction(share * min(height, width), share * min(height, width))

        image = self._read(index, lambda value, _: self._decode(value, reduction))
        return normalize(crop_and_resize(image, (0, 0, *image.shape[:2]), self.image_size), self.mean, self.std)

    def _read(self, index: int, decode: Callable[[Any, int], Any]) -> Any:
        """What `decode` makes of an image and its index; with `on_bad_image="skip"`, of the next one that is good."""
        value, cause = None, None
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            if self.bad_images[candidate]:
                continue
            try:
                value = self.dataset[candidate][self.image_column]
                return decode(undecoded(value, self._array_dtype), candidate)
            except ImageDecodeError as error:
                if self.on_bad_image == "raise":
                    raise self._error(str(candidate), value, error) from error
                self.bad_images[candidate], cause = True, error
        raise InputError(f"none of the {len(self)} images of {self._name} can be used; the last one: {cause}")
