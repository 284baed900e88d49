# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Data sets that fit on the training device: a batch is cropped, flipped and normalised there, in one go.

No workers, no loop over images, and nothing waits for the device. Randomness is a hash of (seed, epoch, index), so a
sample depends on nothing else, as with [`~clmae.training.data.ImageDataset`]; the numbers drawn are others.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from transformers import default_data_collator

from clmae.configuration.errors import InputError
from clmae.training.data import ImageDataset
from clmae.training.images import largest_crop_box

_GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's increment
_SIZE_DRAWS = 40  # uniform values for a crop's size and place: ten tries of four
_FLIP_DRAW, _CENTRE_DRAWS = 40, slice(41, 45)
_DRAWS = 45  # of a view


# -- randomness -------------------------------------------------------------------------------------------------------


def stream_base(seed: int, stream: str) -> int:
    """The start of a named stream of random numbers, for [`keyed_uniforms`]."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def keyed_uniforms(base: int, epoch: torch.Tensor, index: torch.Tensor, count: int) -> torch.Tensor:
    """`count` uniform numbers in [0, 1) a sample: SplitMix64 (Steele et al. 2014), started from base, epoch and index.

    Args:
        base (`int`): As [`stream_base`] gives it.
        epoch, index (`torch.Tensor` of shape `(B,)`): int64, from 0.
        count (`int`): How many numbers.

    Returns:
        float32 `(B, count)` on the device of `index`, multiples of 2^-24; each row is a function of its keys alone.
    """
    state = _mix(_mix(epoch * _signed(_GOLDEN) + base) + index * _signed(_GOLDEN))
    steps = torch.arange(1, count + 1, device=index.device) * _signed(_GOLDEN)
    return _shift(_mix(state[:, None] + steps), 40).float() * 2.0**-24


def _mix(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function; int64 multiplication wraps around as the unsigned one does."""
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, with zeros from the left (torch's own keeps the sign)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


# -- crops ------------------------------------------------------------------------------------------------------------


def random_resized_crop_boxes(
    height: int,
    width: int,
    uniforms: torch.Tensor,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> torch.Tensor:
    """[`~clmae.training.images.random_resized_crop_box`] for a batch of images of one size.

    Args:
        height, width (`int`): Size of the images in pixels, from 1.
        uniforms (`torch.Tensor` of shape `(B, 40)`): In [0, 1).
        scale (`tuple[float, float]`): Smallest and largest share of the area, in (0, 1].
        ratio (`tuple[float, float]`): Smallest and largest aspect ratio (width / height), positive.

    Returns:
        int64 `(B, 4)`: `(top, left, height, width)`, inside the images.
    """
    u_area, u_ratio, u_top, u_left = uniforms.unflatten(1, (10, 4)).unbind(2)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u_area)
    aspect = (low + (high - low) * u_ratio).exp()
    box_width, box_height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (box_width > 0) & (box_width <= width) & (box_height > 0) & (box_height <= height)
    # In float32 a number just below 1 times n may round to n.
    top = torch.minimum((u_top * (height - box_height + 1)).floor(), height - box_height)
    left = torch.minimum((u_left * (width - box_width + 1)).floor(), width - box_width)
    first = fits.int().argmax(1)[:, None, None].expand(-1, 1, 4)  # the first maximum is the first try that fits
    chosen = torch.stack((top, left, box_height, box_width), dim=2).gather(1, first)[:, 0].long()
    sides = largest_crop_box(height, width, ratio)
    fallback = torch.stack([torch.full_like(chosen[:, 0], side) for side in sides], dim=1)
    return torch.where(fits.any(1, keepdim=True), chosen, fallback)


def contrastive_crop_boxes(
    height: int, width: int, boxes: torch.Tensor, sizes: torch.Tensor, uniforms: torch.Tensor, alpha: float = 0.6
) -> torch.Tensor:
    """[`~clmae.training.contrastive_crop.contrastive_crop_box`] for a batch of images of one size.

    Args:
        height, width (`int`): Size of the images in pixels, from 1.
        boxes (`torch.Tensor` of shape `(B, 4)`): `(top, left, bottom, right)` around the objects, in fractions.
        sizes (`torch.Tensor` of shape `(B, 4)`): Crops as [`random_resized_crop_boxes`] draws them, which are moved.
        uniforms (`torch.Tensor` of shape `(B, 4)`): In [0, 1).
        alpha (`float`): Positive; the centres' distribution within the boxes is Beta(alpha, alpha).

    Returns:
        int64 `(B, 4)`: `(top, left, height, width)`, inside the images.
    """
    u, v = uniforms[:, 0::2], uniforms[:, 1::2]  # of rows and columns
    rest = -(torch.log1p(-u) / alpha).expm1()
    cosine = (2 * math.pi * v).cos()
    beta = (1 + cosine * rest.sqrt() / (1 - rest + rest * cosine**2).sqrt()) / 2
    extent = torch.stack((torch.full_like(u[:, 0], height), torch.full_like(u[:, 0], width)), dim=1)
    centre = extent * (boxes[:, :2] + (boxes[:, 2:] - boxes[:, :2]) * beta)
    corner = (centre - sizes[:, 2:] / 2).round().long().clamp(min=0)
    return torch.cat((torch.minimum(corner, extent.long() - sizes[:, 2:]), sizes[:, 2:]), dim=1)


def crop_matrices(start: torch.Tensor, length: torch.Tensor, source: int, target: int) -> torch.Tensor:
    """What takes a line of `source` pixels to `target` pixels of its part: bicubic, antialiased where it shrinks.

    The weights of `torch.nn.functional.interpolate(..., mode="bicubic", antialias=True)` on the part alone.

    Args:
        start, length (`torch.Tensor` of shape `(B,)`): The parts, in pixels, inside the line.
        source, target (`int`): Pixels of the line and of the result.

    Returns:
        float32 `(B, target, source)`; every row adds up to 1.
    """
    start, length = start[:, None, None], length[:, None, None]
    scale = length / target
    centre = scale * (torch.arange(target, device=start.device)[:, None] + 0.5)
    place = torch.arange(source, device=start.device) - start
    distance = ((place + 0.5 - centre) / scale.clamp(min=1)).abs()
    near = (1.5 * distance - 2.5) * distance**2 + 1  # Keys' cubic, a = -0.5
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0))
    weights = weights.masked_fill((place < 0) | (place >= length), 0)
    return weights / weights.sum(2, keepdim=True)


def crop_and_resize_batch(
    images: torch.Tensor, boxes: torch.Tensor, flips: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """A part of each image, at another size, some of them mirrored.

    Args:
        images (`torch.Tensor` of shape `(B, C, H, W)`): uint8, or float32 in [0, 1].
        boxes (`torch.Tensor` of shape `(B, 4)`): `(top, left, height, width)`, inside the images.
        flips (`torch.Tensor` of shape `(B,)`): Which ones to mirror.
        size (`tuple[int, int]`): Height and width of the result.

    Returns:
        float32 `(B, C, *size)` in the images' range, 0..255 or [0, 1], not rounded.
    """
    top, left, height, width = boxes.unbind(1)
    rows = crop_matrices(top, height, images.shape[2], size[0])
    columns = crop_matrices(left, width, images.shape[3], size[1])
    columns = torch.where(flips[:, None, None], columns.flip(1), columns)
    pixels = rows[:, None] @ images.float() @ columns.mT[:, None]
    return pixels.clamp_(0, 255 if images.dtype == torch.uint8 else 1)  # bicubic overshoots at edges


# -- data set ---------------------------------------------------------------------------------------------------------


class ResidentImageDataset(ImageDataset):
    """A training [`ImageDataset`] whose images lie on the device, where a batch is made of them at once.

    `dataset[key]` and the attributes are the data set's; `__getitems__(keys)`, which loaders call, gives a whole batch:
    `{"pixel_values": (B, C, H, W), "noise": (B, num_patches)}`, with several views `(B, num_views, ...)`, both float32
    on the device. It needs [`collate`], no workers and no pinned memory; [`CurriculumTrainer`] sees to that.

    Args:
        source (`ImageDataset`): For training; its images are all of one size and type.
        device (`torch.device`): Where the images are kept: 1 byte a value, or 4 if they have more than 8 bits.

    Raises:
        InputError: The images differ in size or type, one of them is bad (unless these are skipped), they do not fit
            on the device, or `source` is for evaluation.
    """

    def __init__(self, source: ImageDataset, device: torch.device | str):
        if not source.train:
            raise InputError("`source` is for evaluation, which shows no random crops; leave it as it is.")
        vars(self).update(vars(source))
        self.device = torch.device(device)
        images = self._load_all()
        try:
            self.images = images.to(self.device)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"`device_resident` needs {images.nbytes / 1e9:.1f} GB on {self.device}, which does not have them; "
                "leave it out."
            ) from error
        if self.crop_boxes is not None:
            self.crop_boxes = self.crop_boxes.to(self.device)
        peak = 255 if images.dtype == torch.uint8 else 1
        self._mean, self._std = (
            (torch.tensor(values) * peak)[:, None, None].to(self.device) for values in (source.mean, source.std)
        )
        self._bases = {stream: stream_base(source.seed, stream) for stream in ("augmentation", "noise")}

    def __getitem__(self, key: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([key]).items()}

    def __getitems__(self, keys: list[int]) -> dict[str, torch.Tensor]:
        """The samples of `keys` (see [`ImageDataset`]), stacked."""
        key = torch.tensor(keys, dtype=torch.int64).to(self.device, non_blocking=True)
        epoch, index = key // len(self), key % len(self)
        views = self.num_views
        draws = keyed_uniforms(self._bases["augmentation"], epoch, index, views * _DRAWS).view(-1, _DRAWS)
        index_of_view = index.repeat_interleave(views)
        flips = draws[:, _FLIP_DRAW] < (0.5 if self.horizontal_flip else 0)
        pixels = crop_and_resize_batch(
            self.images[index_of_view], self._boxes(draws, index_of_view), flips, self.image_size
        )
        pixels = (pixels - self._mean) / self._std
        noise = keyed_uniforms(self._bases["noise"], epoch, index, views * self.num_patches)
        if views > 1:
            pixels, noise = pixels.unflatten(0, (-1, views)), noise.unflatten(1, (views, -1))
        return {"pixel_values": pixels, "noise": noise}

    def _load_all(self) -> torch.Tensor:
        """`(N, C, H, W)` on the CPU, as they are stored: uint8, or float32 in [0, 1]."""
        first = torch.from_numpy(self._load(0)).permute(2, 0, 1)
        images = torch.empty((len(self), *first.shape), dtype=first.dtype)
        for i in range(len(self)):
            image = torch.from_numpy(self._load(i)).permute(2, 0, 1)
            if image.shape != first.shape or image.dtype != first.dtype:
                raise InputError(
                    f"`device_resident` needs images of one size and type, but image 0 is {_describe(first)} and image "
                    f"{i} {_describe(image)}: resize them before, or leave it out."
                )
            images[i] = image
        return images

    def _boxes(self, draws: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        height, width = self.images.shape[2:]
        boxes = random_resized_crop_boxes(height, width, draws[:, :_SIZE_DRAWS], self.crop_scale)
        if self.crop_boxes is None:
            return boxes
        return contrastive_crop_boxes(height, width, self.crop_boxes[index], boxes, draws[:, _CENTRE_DRAWS])


def _describe(image: torch.Tensor) -> str:
    return f"{tuple(image.shape[1:])} {str(image.dtype).removeprefix('torch.')}"


def collate(samples: Any) -> dict[str, Any]:
    """A batch of a [`ResidentImageDataset`] as it is; samples of other data sets stacked."""
    return samples if isinstance(samples, dict) else default_data_collator(samples)


__all__ = [
    "ResidentImageDataset",
    "collate",
    "contrastive_crop_boxes",
    "crop_and_resize_batch",
    "crop_matrices",
    "keyed_uniforms",
    "random_resized_crop_boxes",
    "stream_base",
]
