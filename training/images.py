# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Pixels: decoding, cropping, resizing and normalising one image, and the random streams that drive them.

Arrays are `(H, W, C)`, tensors `(C, H, W)`; both hold uint8 in 0..255 or float32 in [0, 1] until `normalize`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from clmae.configuration.errors import InputError

Box = tuple[int, int, int, int]
"""A part of an image in pixels: `(top, left, height, width)`."""

_PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Through which mode the others are converted; PIL lacks some direct ways, and gets LAB to RGBA wrong.
_PIL_VIA = {"La": "LA", "RGBa": "RGBA", "CMYK": "RGB", "YCbCr": "RGB", "HSV": "RGB", "LAB": "RGB"}


class ImageDecodeError(InputError):
    """One image cannot be read; the message says why. (Wrong settings raise a plain InputError.)"""


# -- decoding ---------------------------------------------------------------------------------------------------


def decode_image(value: Any, num_channels: int, reduction: Callable[[int, int], float] | None = None) -> np.ndarray:
    """The pixels of an image in any of the forms in which data sets hold one.

    EXIF orientation is applied, transparency is laid over white (unless `num_channels` is 4), and 16-bit pixels are
    scaled to their full range, which PIL's own conversion would clip.

    Args:
        value: A PIL image; encoded bytes; a path; `{"bytes": ..., "path": ...}` as `datasets.Image(decode=False)`
            gives it; or an array, tensor or nested list `(H, W)`, `(H, W, C)` or `(C, H, W)`: floats in [0, 1],
            uint8, uint16, bool, or other integers in 0..255.
        num_channels (`int`): 1 for grey, 3 for RGB, 4 for RGBA; any number for arrays that have as many.
        reduction (`Callable`, *optional*): A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is much faster:
            called with its height and width, says by how much at most. Full size, if not given.

    Returns:
        `(H, W, num_channels)`, C-contiguous and writable: uint8, or float32 in [0, 1] if the source has more than 8
        bits a channel.

    Raises:
        ImageDecodeError: The image is missing, broken, empty, or has other channels or values than described.
        InputError: `num_channels` is none that an encoded image can be converted to.
    """
    if isinstance(value, dict):
        if value.get("bytes") is None and not value.get("path"):
            raise ImageDecodeError("there is no image: neither bytes nor a path.")
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise ImageDecodeError("there is no image: the value is None.")
    if isinstance(value, (str, os.PathLike)):
        value = read_image_bytes(value)
    if isinstance(value, (bytes, bytearray, memoryview, Image.Image)):
        array = _decode_pil(value, num_channels, reduction)
    else:
        array = _decode_array(value, num_channels)
    if 0 in array.shape:
        raise ImageDecodeError(f"it is empty: height and width are {array.shape[:2]}.")
    return array


def read_image_bytes(path: str | os.PathLike) -> bytes:
    """The bytes of an image file: a local path, or a remote or archive address as `datasets` streams them.

    Raises:
        ImageDecodeError: The file cannot be read.
    """
    path = os.fspath(path)
    try:
        if "://" in path:
            from datasets.utils.file_utils import xopen

            with xopen(path, "rb") as file:
                return file.read()
        with open(path, "rb") as file:
            return file.read()
    except Exception as error:  # remote file systems raise errors of their own
        raise ImageDecodeError(f"the file {path} cannot be read: {_reason(error)}") from error


def _decode_pil(
    source: bytes | bytearray | memoryview | Image.Image,
    num_channels: int,
    reduction: Callable[[int, int], float] | None,
) -> np.ndarray:
    if num_channels not in _PIL_MODES:
        raise InputError(
            f"`num_channels` is {num_channels}, but the data set holds encoded images, which have 1, 3 or 4 channels; "
            "set `num_channels` to one of these, or store the images as arrays."
        )
    with _decoding():
        image = source if isinstance(source, Image.Image) else _open(source)
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    is_jpeg = not isinstance(source, Image.Image) and image.format in ("JPEG", "MPO")
    factor = 1
    if is_jpeg and reduction is not None:
        size = image.size if orientation in range(5, 9) else image.size[::-1]  # upright
        most = max(1, reduction(*size))
        factor = next(power for power in (8, 4, 2, 1) if power <= most)
    with _decoding():
        if (
            is_jpeg
            and orientation in (0, 1)
            and (pixels := _decode_jpeg(source, image, num_channels, factor)) is not None
        ):
            return pixels
        if factor > 1:
            image.draft(image.mode, (image.width // factor, image.height // factor))
        image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):
            return _spread(_scale_values(_deep_pixels(image)), num_channels)
        return _to_array(_flatten(image, num_channels).convert(_PIL_MODES[num_channels]))


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Says of whatever fails that the image cannot be decoded."""
    try:
        yield
    except (ImageDecodeError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageDecodeError("it cannot be decoded: it is in no image format that PIL knows.") from error
    except Exception as error:  # the many decoders inside PIL raise almost anything on broken input
        raise ImageDecodeError(f"it cannot be decoded: {_reason(error)}") from error


def _open(data: bytes | bytearray | memoryview) -> Image.Image:
    image, limit = Image.open(io.BytesIO(data)), Image.MAX_IMAGE_PIXELS
    # PIL itself refuses only twice as many; up to that a file of a few bytes would still take gigabytes.
    if limit is not None and image.width * image.height > limit:
        raise ImageDecodeError(
            f"it has {image.width} x {image.height} pixels, more than the limit of {limit:,} against decompression "
            "bombs; make it smaller, or raise `PIL.Image.MAX_IMAGE_PIXELS`."
        )
    return image


def _decode_jpeg(
    data: bytes | bytearray | memoryview, image: Image.Image, num_channels: int, factor: int
) -> np.ndarray | None:
    """What PIL would decode, reduced by `factor`, without its copies of it. `None`: this one is PIL's to decode."""
    colors = {("RGB", 3): "RGB", ("L", 1): "GRAY"}.get((image.mode, num_channels))
    if colors is None:
        return None
    smallest = {"min_height": -(-image.height // factor), "min_width": -(-image.width // factor)}
    try:
        return simplejpeg.decode_jpeg(data, colors, min_factor=factor, **smallest)
    except ValueError:  # PIL says more clearly what is wrong, or decodes it (`ImageFile.LOAD_TRUNCATED_IMAGES`)
        return None


def _deep_pixels(image: Image.Image) -> np.ndarray:
    """Pixels of the modes with more than 8 bits: uint16 `(H, W)`, or floats for mode F."""
    pixels = np.array(image)
    if image.mode == "F":
        return pixels
    if pixels.size and not (pixels.min() >= 0 and pixels.max() <= 65535):
        raise ImageDecodeError(
            f"its integer pixels go from {pixels.min()} to {pixels.max()}; save it with 16 bits (0 to 65535)."
        )
    return pixels.astype(np.uint16)


def _flatten(image: Image.Image, num_channels: int) -> Image.Image:
    """The image without transparency, laid over white; transparency stays if alpha is wanted."""
    image = image.convert(_PIL_VIA.get(image.mode, image.mode))
    if num_channels == 4 or not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _to_array(image: Image.Image) -> np.ndarray:
    array = np.array(image)
    return array if array.ndim == 3 else array[..., None]


def _decode_array(value: Any, num_channels: int) -> np.ndarray:
    try:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.is_floating_point() else value).numpy()
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ImageDecodeError(f"it is no array: {_reason(error)}") from error
    if array.dtype.kind not in "buif":
        raise ImageDecodeError(f"a value of type {type(value).__name__} is no image.")
    if array.ndim == 2:
        return _spread(_scale_values(array), num_channels)
    if array.ndim == 3 and array.shape[2] == num_channels:
        return _scale_values(array)
    if array.ndim == 3 and array.shape[0] == num_channels:
        return _scale_values(array.transpose(1, 2, 0))
    raise ImageDecodeError(
        f"its shape is {array.shape}, without an axis of {num_channels} channels; "
        "set `num_channels` to what the images have."
    )


def _scale_values(array: np.ndarray) -> np.ndarray:
    """uint8 for what has 8 bits, otherwise float32 in [0, 1]; always a fresh C-contiguous array."""
    if array.dtype == np.bool_:
        return np.where(array, np.uint8(255), np.uint8(0))
    if array.dtype == np.uint8:
        return np.array(array, order="C")
    if array.dtype == np.uint16:
        return np.array(array, dtype=np.float32, order="C") / np.float32(65535)
    low, high = (array.min(), array.max()) if array.size else (0, 0)
    if array.dtype.kind == "f":
        if not (low >= 0 and high <= 1):  # also false for nan
            raise ImageDecodeError(f"its float values go from {low} to {high}; scale them to [0, 1].")
        return np.array(array, dtype=np.float32, order="C")
    if not (low >= 0 and high <= 255):
        raise ImageDecodeError(
            f"its {array.dtype} values go from {low} to {high}; store them as uint8 or uint16, or as floats in [0, 1]."
        )
    return np.array(array, dtype=np.uint8, order="C")


def _spread(array: np.ndarray, num_channels: int) -> np.ndarray:
    """Grey `(H, W)` as `(H, W, num_channels)`; alpha, if wanted, is opaque."""
    if num_channels not in _PIL_MODES:
        raise ImageDecodeError(
            f"its shape is {array.shape}, without an axis of {num_channels} channels; "
            "set `num_channels` to what the images have."
        )
    array = np.repeat(array[..., None], num_channels, axis=2)
    if num_channels == 4:
        array[..., 3] = 255 if array.dtype == np.uint8 else 1
    return array


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).removesuffix('.')}."


# -- views ------------------------------------------------------------------------------------------------------


def random_resized_crop_box(
    height: int,
    width: int,
    generator: torch.Generator,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """A random part of an image, drawn as torchvision's `RandomResizedCrop` does.

    Ten tries at a box whose share of the area is uniform in `scale` and whose aspect ratio (width / height) is
    log-uniform in `ratio`; if none fits, the largest central box with an aspect ratio inside `ratio`.

    Args:
        height, width (`int`): Size of the image in pixels, from 1.
        generator (`torch.Generator`): The only source of randomness; always the same number of values is drawn.
        scale (`tuple[float, float]`): Smallest and largest share of the area, in (0, 1].
        ratio (`tuple[float, float]`): Smallest and largest aspect ratio, positive.

    Returns:
        `(top, left, height, width)`, inside the image.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for u_area, u_ratio, u_top, u_left in torch.rand(10, 4, generator=generator, dtype=torch.float64).tolist():
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u_area)
        aspect = math.exp(low + (high - low) * u_ratio)
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = int(u_top * (height - box_height + 1)), int(u_left * (width - box_width + 1))
            return top, left, box_height, box_width
    return largest_crop_box(height, width, ratio)


def largest_crop_box(height: int, width: int, ratio: tuple[float, float]) -> Box:
    """The largest central box `(top, left, height, width)` with an aspect ratio (width / height) inside `ratio`."""
    box_height, box_width = height, width
    if width / height < ratio[0]:
        box_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        box_width = round(height * ratio[1])
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def center_crop_box(height: int, width: int, size: tuple[int, int], crop_ratio: float = 1.0) -> Box:
    """The largest central box of the target's shape, its sides times a ratio.

    For a square target this is, up to rounding, what [`center_view`] shows.

    Args:
        height, width (`int`): Size of the image in pixels, from 1.
        size (`tuple[int, int]`): Target height and width; only their proportion matters.
        crop_ratio (`float`): Share of the largest box's sides that is shown, in (0, 1].

    Returns:
        `(top, left, height, width)`, inside the image.
    """
    scale = crop_ratio * min(height / size[0], width / size[1])
    box_height, box_width = (max(1, round(side * scale)) for side in size)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def resized_side(side: int, crop_ratio: float) -> int:
    """To how many pixels an image is resized of which the central `side` are shown: about `side / crop_ratio`.

    An even number of pixels is cut off, so that the centre is the centre.
    """
    return side + 2 * round((side / crop_ratio - side) / 2)


def scale_box(box: Box, size: tuple[int, int], new_size: tuple[int, int]) -> Box:
    """A box of an image of `size` (height, width) as a box of the same image at `new_size`."""
    scaled = []
    for start, length, old, new in zip(box[:2], box[2:], size, new_size, strict=True):
        length = max(1, round(length * new / old))
        scaled.append((min(round(start * new / old), new - length), length))
    (top, box_height), (left, box_width) = scaled
    return top, left, box_height, box_width


def center_view(array: np.ndarray, size: tuple[int, int], crop_ratio: float = 1.0) -> torch.Tensor:
    """The un-augmented view of an image, for evaluation.

    Square targets: resize the shortest side, then crop the centre, with the roundings of transformers' image
    processors, so that what they show is the same to the pixel. Other targets, and images more than 16 times as long as
    wide, which would be huge when resized: the largest central box of the target's shape.

    Args:
        array (`np.ndarray` of shape `(H, W, C)`): uint8, or float32 in [0, 1].
        size (`tuple[int, int]`): Height and width of the result.
        crop_ratio (`float`): Share of the sides that is shown, in (0, 1].

    Returns:
        `(C, *size)`, contiguous, in the array's type and range. May share memory with `array`.
    """
    height, width = array.shape[:2]
    if size[0] != size[1] or max(height, width) > 16 * min(height, width):
        return crop_and_resize(array, center_crop_box(height, width, size, crop_ratio), size)
    short = resized_side(size[0], crop_ratio)
    resized = (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
    pixels = crop_and_resize(array, (0, 0, height, width), resized)
    top, left = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
    return pixels[:, top : top + size[0], left : left + size[1]].contiguous()


def crop_and_resize(array: np.ndarray, box: Box, size: tuple[int, int]) -> torch.Tensor:
    """A part of an image at another size, bicubic with antialiasing.

    Args:
        array (`np.ndarray` of shape `(H, W, C)`): uint8, or float32 in [0, 1].
        box (`tuple`): `(top, left, height, width)` inside the image.
        size (`tuple[int, int]`): Height and width of the result.

    Returns:
        `(C, *size)`, contiguous, in the array's type and range. May share memory with `array`.
    """
    top, left, height, width = box
    # uint8 is resized as it is: torch has a fast path for channels-last views, and no float copy is made.
    pixels = torch.from_numpy(array[top : top + height, left : left + width]).permute(2, 0, 1)
    if (height, width) != tuple(size):
        pixels = F.interpolate(pixels[None], size=size, mode="bicubic", antialias=True)[0]
        if pixels.is_floating_point():
            pixels = pixels.clamp_(0, 1)  # bicubic overshoots at edges
    return pixels.contiguous()


def normalize(
    pixels: torch.Tensor, mean: Sequence[float] | torch.Tensor, std: Sequence[float] | torch.Tensor
) -> torch.Tensor:
    """`(pixels - mean) / std` per channel.

    Args:
        pixels (`torch.Tensor` of shape `(..., C, H, W)`): uint8 in 0..255, or float in [0, 1].
        mean, std (`Sequence[float]` or float32 `torch.Tensor`): One value a channel, in units of [0, 1]. Tensors on the
            device of `pixels` spare it a wait.

    Returns:
        float32 of the same shape; a new tensor.
    """
    peak = 255.0 if pixels.dtype == torch.uint8 else 1.0
    found = pixels.to(torch.float32, copy=True)
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=found.device)[:, None, None] for v in (mean, std))
    return found.sub_(mean * peak).div_(std * peak)


# -- randomness -------------------------------------------------------------------------------------------------


def sample_generator(seed: int, epoch: int, key: int, stream: str = "") -> torch.Generator:
    """A CPU generator whose state is a well-mixed pure function of its arguments.

    What it draws for a sample depends on no other sample, so results are the same for any number of workers and
    after a resume. Streams of different names are independent of each other.
    """
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}/{stream}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


__all__ = [
    "Box",
    "ImageDecodeError",
    "center_crop_box",
    "center_view",
    "crop_and_resize",
    "decode_image",
    "largest_crop_box",
    "normalize",
    "random_resized_crop_box",
    "read_image_bytes",
    "resized_side",
    "sample_generator",
    "scale_box",
]
