# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The pixels of an image in any of the forms in which datasets hold one."""

from __future__ import annotations

import contextlib
import io
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from clmae.configuration.errors import InputError

_PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Through which mode the others are converted; PIL lacks some direct ways, and gets LAB to RGBA wrong.
_PIL_VIA = {"La": "LA", "RGBa": "RGBA", "CMYK": "RGB", "YCbCr": "RGB", "HSV": "RGB", "LAB": "RGB"}
Reduction = Callable[[int, int], float]
"""By how much at most an image of a height and width may be reduced while it is decoded."""


class ImageDecodeError(InputError):
    """One image cannot be read; the message says why. (Wrong settings raise a plain InputError.)"""


def decode_image(value: Any, num_channels: int, reduction: Reduction | None = None) -> np.ndarray:
    """The pixels of an image in any of the forms in which datasets hold one.

    EXIF orientation is applied, transparency is laid over white (unless `num_channels` is 4), and 16-bit pixels are
    scaled to their full range, which PIL's own conversion would clip.

    Args:
        value: A PIL image; encoded bytes; a path; `{"bytes": ..., "path": ...}` as `datasets.Image(decode=False)`
            gives it; or an array, tensor or nested list `(H, W)`, `(H, W, C)` or `(C, H, W)`: floats in [0, 1],
            uint8, uint16, bool, or other integers in 0..255.
        num_channels: 1 for grey, 3 for RGB, 4 for RGBA; any number for arrays that have as many.
        reduction: A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is much faster.

    Returns:
        `(H, W, num_channels)`, C-contiguous and writable: uint8, or float32 in [0, 1] if the source has more than 8
        bits per channel.

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
        array = _decode_encoded(value, num_channels, reduction)
    else:
        array = _decode_array(value, num_channels)
    if 0 in array.shape:
        raise ImageDecodeError(f"it is empty: height and width are {array.shape[:2]}.")
    return array


def read_image_bytes(path: str | os.PathLike) -> bytes:
    """The bytes of a local file, or of a remote or archive address as `datasets` streams them."""
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


def _decode_encoded(
    source: bytes | bytearray | memoryview | Image.Image, num_channels: int, reduction: Reduction | None
) -> np.ndarray:
    if num_channels not in _PIL_MODES:
        raise InputError(
            f"`num_channels` is {num_channels}, but the dataset holds encoded images, which have 1, 3 or 4 channels; "
            "set `num_channels` to one of these, or store the images as arrays."
        )
    with _decoding():
        image = source if isinstance(source, Image.Image) else _open(source)
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if isinstance(source, Image.Image) or image.format not in ("JPEG", "MPO"):
        with _decoding():
            return _decode_pil(image, num_channels)
    factor = 1
    if reduction is not None:
        size = image.size if orientation in range(5, 9) else image.size[::-1]  # upright
        most = max(1, reduction(*size))
        factor = next(power for power in (8, 4, 2, 1) if power <= most)
    with _decoding():
        pixels = _decode_jpeg(source, image, num_channels, factor) if orientation in (0, 1) else None
        if pixels is not None:
            return pixels
        if factor > 1:
            image.draft(image.mode, (image.width // factor, image.height // factor))
        return _decode_pil(image, num_channels)


def _decode_pil(image: Image.Image, num_channels: int) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        pixels = np.array(image)
        if image.mode != "F" and not (pixels.min(initial=0) >= 0 and pixels.max(initial=0) <= 65535):
            raise ImageDecodeError(
                f"its integer pixels go from {pixels.min()} to {pixels.max()}; save it with 16 bits (0 to 65535)."
            )
        return _spread(_scale_values(pixels if image.mode == "F" else pixels.astype(np.uint16)), num_channels)
    array = np.array(_flatten(image, num_channels).convert(_PIL_MODES[num_channels]))
    return array if array.ndim == 3 else array[..., None]


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


def _flatten(image: Image.Image, num_channels: int) -> Image.Image:
    """The image without transparency, laid over white; transparency stays if alpha is wanted."""
    image = image.convert(_PIL_VIA.get(image.mode, image.mode))
    if num_channels == 4 or not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


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
    raise _channels_error(array, num_channels)


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
        raise _channels_error(array, num_channels)
    array = np.repeat(array[..., None], num_channels, axis=2)
    if num_channels == 4:
        array[..., 3] = 255 if array.dtype == np.uint8 else 1
    return array


def _channels_error(array: np.ndarray, num_channels: int) -> ImageDecodeError:
    return ImageDecodeError(
        f"its shape is {array.shape}, without an axis of {num_channels} channels; set `num_channels` to what the "
        "images have."
    )


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).removesuffix('.')}."


# -- images as datasets hold them -------------------------------------------------------------------------------


def undecoded(value: Any, dtype: np.dtype | None) -> Any:
    """An image as `decode_image` and `content_key` take it; `dtype` is that of an array column."""
    if dtype is None or value is None:
        return value
    try:  # lists come back as int64, which says nothing of their range
        return np.asarray(value, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise ImageDecodeError(f"it is no array: {error}.") from error


def with_bytes(value: Any) -> Any:
    """An image with its file's bytes, so that it is read only once."""
    if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
        return {**value, "bytes": read_image_bytes(value["path"])}
    return value


def content_key(value: Any) -> int:
    """A checksum of an image as a dataset holds it, undecoded: `{"bytes", "path"}` or an array; in 0..2**32 - 1."""
    if isinstance(value, dict):
        return zlib.crc32(with_bytes(value)["bytes"] or b"")
    return 0 if value is None else zlib.crc32(np.ascontiguousarray(value).data)
