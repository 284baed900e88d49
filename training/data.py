# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Data sets: from a Hub id, a folder, parquet or memory to the samples that pretraining reads."""

import copy
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import get_worker_info
from transformers import BitImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from clmae.configuration import MAEConfig
from clmae.configuration.configuration_mae import pair
from clmae.configuration.errors import InputError
from clmae.modeling.image_processing_mae import MAEImageProcessor
from clmae.training.contrastive_crop import contrastive_crop_box
from clmae.training.images import (
    Box,
    ImageDecodeError,
    center_view,
    crop_and_resize,
    decode_image,
    normalize,
    random_resized_crop_box,
    read_image_bytes,
    resized_side,
    sample_generator,
    scale_box,
)

# Pixels, in line, of which a view's pixel is made at least where a JPEG is decoded at reduced size. On photographs at
# 64 pixels the views then differ from those of the whole image by 1.9/255 on average; with 1 it is 5.9.
_DETAIL = 2.0

AnyDataset = datasets.Dataset | datasets.IterableDataset

# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga",
    ".tif", ".tiff", ".webp",
))
# fmt: on
# A folder that holds one of these was made for `datasets.load_dataset`, which then reads it.
_TABLE_SUFFIXES = frozenset({".parquet", ".arrow", ".tar", ".zip"})
_METADATA_NAMES = frozenset({"metadata.csv", "metadata.jsonl"})
_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
LABEL_NAMES = ("label", "labels", "fine_label", "coarse_label", "class", "target")
_ENCODED_TYPES = ("binary", "large_binary", "string", "large_string")  # image files, or paths, if the user says so
ON_BAD_IMAGE = ("raise", "skip")
_NO_CROPS_OF_STREAMS = (
    "`contrastive_crop` keeps a box for each image, which a stream has no place for; leave out `streaming`, give a "
    "data set that is no stream, or crop at random."
)
_NO_RESIDENT_STREAMS = (
    "`device_resident` keeps all images on the device, which a stream never holds at once; leave out one of them."
)
_SAMPLING_SEED = 0  # which samples a limit keeps must not change from run to run
_MAX_STREAM_WORKERS = 256


# -- loading ----------------------------------------------------------------------------------------------------


class ImageSource(NamedTuple):
    """A data set, and its column of images (undecoded: `{"bytes", "path"}`, or arrays)."""

    dataset: AnyDataset
    image_column: str


def load_image_dataset(
    source: str | os.PathLike | AnyDataset | dict,
    split: str = "train",
    *,
    config_name: str | None = None,
    image_column: str | None = None,
    streaming: bool = False,
    max_samples: int | None = None,
) -> ImageSource:
    """A split of an image data set, from wherever it is.

    Args:
        source: A Hub id; a folder of images, with or without a folder for each class (below a folder for each split,
            if there are splits); a parquet file; a folder that `datasets.load_dataset` understands; a folder written
            by `save_to_disk`; or a data set (or dict of them) in memory.
        split (`str`): Which split; a single data set in memory has none to choose. Sources that
            `datasets.load_dataset` reads also take slices such as `"train[:10%]"`.
        config_name (`str`, *optional*): Configuration of a Hub data set that has several.
        image_column (`str`, *optional*): The column that holds the images, if there are several.
        streaming (`bool`): Read while training instead of preparing everything first.
        max_samples (`int`, *optional*): At most so many samples: drawn with a fixed seed (folders are sorted by
            class), the first ones of a stream.

    Returns:
        `(dataset, image_column)`. A folder with several classes has a `"label"` column.

    Raises:
        InputError: There is no such source, split or column, or no image in it.
    """
    if isinstance(source, (str, os.PathLike)):
        dataset = _load_path(os.fspath(source), split, config_name, streaming)
    else:
        dataset = _pick_split(source, split, "the data set in memory")
    if streaming and isinstance(dataset, datasets.Dataset):
        dataset = dataset.to_iterable_dataset(num_shards=max(1, min(len(dataset), 64)))
    dataset, image_column = _prepare_images(dataset, image_column)
    return ImageSource(take_samples(dataset, max_samples), image_column)


def _load_path(source: str, split: str, config_name: str | None, streaming: bool) -> AnyDataset:
    path = Path(source).expanduser()
    if not path.exists():
        if source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise InputError(f"`dataset` is {source!r}, but there is no such file or folder.")
        return _load_with_datasets(
            source, split, f"{source!r} is no local folder, and as a Hub id", config_name, streaming
        )
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise InputError(f"`dataset` is the file {source!r}; give a .parquet file, or a folder of images.")
        where = f"the file {source!r}"
        return _load_with_datasets("parquet", split, where, None, streaming, data_files={"train": str(path)})
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        try:
            saved = datasets.load_from_disk(str(path))
        except Exception as error:
            raise InputError(f"`dataset` {source!r} cannot be loaded from disk: {error}") from error
        return _pick_split(saved, split, repr(source))
    images, tables = _scan_folder(path)
    if tables:
        return _load_with_datasets(str(path), split, f"the folder {source!r}", config_name, streaming)
    if not images:
        raise InputError(
            f"`dataset` is the folder {source!r}, which holds no images: looked in it and its sub-folders for "
            f"{', '.join(sorted(IMAGE_SUFFIXES))} files, parquet, and what `save_to_disk` writes."
        )
    return _pick_split(_image_folder(path, images), _SPLIT_NAMES.get(split, split), f"the folder {source!r}")


def _load_with_datasets(
    builder: str, split: str, where: str, config_name: str | None, streaming: bool, **kwargs: Any
) -> AnyDataset:
    try:
        return datasets.load_dataset(builder, config_name, split=split, streaming=streaming, **kwargs)
    except Exception as error:  # dozens of types: network, file formats, names
        raise InputError(f"`dataset`: {where} cannot be loaded (split {split!r}): {error}") from error


def _pick_split(source: Any, split: str, where: str) -> AnyDataset:
    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        return source
    if not isinstance(source, dict):
        raise InputError(
            f"`dataset` is of type {type(source).__name__}; give a Hub id, a folder, a parquet file, or a data set of "
            "the datasets library."
        )
    if split not in source:
        raise InputError(f"`split` is {split!r}, but {where} has {', '.join(map(repr, source)) or 'none'}.")
    return source[split]


def _scan_folder(folder: Path) -> tuple[list[tuple[str, ...]], bool]:
    """Image files below a folder, as sorted tuples of path parts; and whether it holds tables or metadata."""
    images, tables, seen = [], False, set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        real = os.path.realpath(root)
        if real in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        parts = Path(root).relative_to(folder).parts
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in IMAGE_SUFFIXES and not name.startswith("."):
                images.append((*parts, name))
            tables = tables or suffix in _TABLE_SUFFIXES or name in _METADATA_NAMES
    return sorted(images), tables


def _refuse(error: OSError) -> None:
    raise InputError(f"`dataset` cannot be read: {error}. Give access to that folder, or move it away.") from error


def _image_folder(folder: Path, images: list[tuple[str, ...]]) -> datasets.DatasetDict:
    """Splits of a folder of images, with labels if each image of a split lies in one of several class folders.

    Not `load_dataset("imagefolder")`: that one looks for split names inside file names, so that a `test.jpg` among
    a thousand photos makes all the others disappear.
    """
    groups = _group_by_split(images)
    depth = 0 if groups is None else 1  # of the class folders
    groups = groups or {"train": images}
    names = sorted({parts[depth] for group in groups.values() for parts in group if len(parts) > depth + 1})
    splits = {}
    for split, group in groups.items():
        columns: dict[str, list] = {"image": [str(folder.joinpath(*parts)) for parts in group]}
        features = {"image": datasets.Image(decode=False)}
        if len(names) > 1 and all(len(parts) > depth + 1 for parts in group):
            index = {name: i for i, name in enumerate(names)}
            columns["label"] = [index[parts[depth]] for parts in group]
            features["label"] = datasets.ClassLabel(names=names)
        splits[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return datasets.DatasetDict(splits)


def _group_by_split(images: list[tuple[str, ...]]) -> dict[str, list[tuple[str, ...]]] | None:
    """Images by split, if the top folders are splits: all of them, or `train` and another (a class may be `test`)."""
    tops = {parts[0] for parts in images if len(parts) > 1}
    known = {_SPLIT_NAMES.get(top.lower()) for top in tops}
    all_splits = bool(tops) and None not in known and all(len(parts) > 1 for parts in images)
    if not all_splits and not ("train" in known and known & {"validation", "test"}):
        return None
    groups: dict[str, list[tuple[str, ...]]] = {}
    for parts in images:
        if len(parts) > 1:
            groups.setdefault(_SPLIT_NAMES.get(parts[0].lower(), parts[0]), []).append(parts)
    return groups


# -- columns ----------------------------------------------------------------------------------------------------


def _resolved(dataset: AnyDataset) -> AnyDataset:
    """The data set, knowing its features: those of a stream without any are inferred from its head."""
    if dataset.features is not None:
        return dataset
    try:
        return dataset._resolve_features()
    except StopIteration:
        raise InputError("`dataset` is an empty stream: there is no image in it.") from None
    except Exception as error:
        raise InputError(
            f"`dataset` is a stream that does not say what its columns hold: pass `features` to it. ({error})"
        ) from error


def array_dtype(feature: Any) -> np.dtype | None:
    """Type of the numbers in an array feature of two or three dimensions; None for any other feature."""
    if isinstance(feature, (datasets.Array2D, datasets.Array3D)):
        return np.dtype(feature.dtype)
    depth = 0
    while isinstance(feature, (datasets.List, datasets.LargeList)):
        feature, depth = feature.feature, depth + 1
    if depth in (2, 3) and isinstance(feature, datasets.Value):
        dtype = {"float": "float32", "double": "float64", "halffloat": "float16"}.get(feature.dtype, feature.dtype)
        return np.dtype(dtype) if dtype.startswith(("int", "uint", "float", "bool")) else None
    return None


def _is_encoded_image(feature: Any) -> bool:
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _prepare_images(dataset: AnyDataset, column: str | None) -> ImageSource:
    """The data set with its image column undecoded, and the name of that column."""
    dataset = _resolved(dataset)
    features = dataset.features
    if column is None:
        found = [name for name in features if _is_encoded_image(features[name])]
        found = found or [name for name in features if array_dtype(features[name]) is not None]
        if not found:
            raise InputError(f"`dataset` has no column of images; its columns are {_describe(features)}.")
        if len(found) > 1:
            raise InputError(f"`dataset` has several columns of images: set `image_column` to one of {found}.")
        column = found[0]
    elif column not in features:
        raise InputError(f"`image_column` is {column!r}, but the columns are {_describe(features)}.")
    if isinstance(dataset, datasets.Dataset):
        dataset = dataset.with_format(None)
    feature = features[column]
    raw = isinstance(feature, datasets.Image) and not feature.decode
    if not raw and array_dtype(feature) is None:
        if not _is_encoded_image(feature) and _type_name(feature) not in _ENCODED_TYPES:
            raise InputError(
                f"`image_column` is {column!r}, which holds no images; the columns are {_describe(features)}."
            )
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return ImageSource(dataset, column)


def _describe(features: dict[str, Any]) -> str:
    return ", ".join(f"{name!r} ({_type_name(feature)})" for name, feature in features.items()) or "none"


def _type_name(feature: Any) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def find_label_column(dataset: AnyDataset, name: str | None = None) -> str:
    """The column of class labels: the one named, the only `ClassLabel`, or the only integer column named like one.

    Raises:
        InputError: There is none, there are several, or the one named holds no integers.
    """
    features = _resolved(dataset).features
    if name is not None:
        if name not in features:
            raise InputError(f"`label_column` is {name!r}, but the columns are {_describe(features)}.")
        if not _is_integer(features[name]):
            raise InputError(
                f"`label_column` is {name!r}, which holds {_type_name(features[name])} and no class numbers; convert "
                f"it with `dataset.class_encode_column({name!r})`."
            )
        return name
    found = [column for column in features if isinstance(features[column], datasets.ClassLabel)]
    found = found or [column for column in LABEL_NAMES if column in features and _is_integer(features[column])]
    if not found:
        raise InputError(
            f"`dataset` has no column of class labels; its columns are {_describe(features)}. Set `label_column`, or "
            "put the images of each class into a folder of its own."
        )
    if len(found) > 1:
        raise InputError(f"`dataset` has several columns of class labels: set `label_column` to one of {found}.")
    return found[0]


def _is_integer(feature: Any) -> bool:
    return isinstance(feature, datasets.ClassLabel) or (
        isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))
    )


# -- choosing samples -------------------------------------------------------------------------------------------


def take_samples(dataset: AnyDataset, max_samples: int | None) -> AnyDataset:
    """At most `max_samples` samples: drawn with a fixed seed, in their old order; the first ones of a stream."""
    if max_samples is None:
        return dataset
    _check_count("max_samples", max_samples)
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.take(max_samples)
    if max_samples >= len(dataset):
        return dataset
    chosen = np.random.default_rng(_SAMPLING_SEED).permutation(len(dataset))[:max_samples]
    return dataset.select(np.sort(chosen))


def hold_out(
    dataset: datasets.Dataset, fraction_or_count: float | int, seed: int = 0
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Two disjoint random parts of a data set, for training and for evaluation.

    Args:
        dataset (`datasets.Dataset`): At least two samples.
        fraction_or_count (`float` or `int`): Size of the second part: a share in (0, 1), or a number of samples.
        seed (`int`): The same seed gives the same parts.

    Returns:
        `(train, held_out)`, both in the data set's order.

    Raises:
        InputError: One of the parts would be empty.
    """
    size = len(dataset)
    count = fraction_or_count if isinstance(fraction_or_count, int) else math.ceil(size * fraction_or_count)
    if not 0 < count < size:
        raise InputError(
            f"`fraction_or_count` is {fraction_or_count}, which holds out {count} of {size} samples; at least one must "
            "be held out and one stay."
        )
    order = np.random.default_rng(seed).permutation(size)
    return dataset.select(np.sort(order[count:])), dataset.select(np.sort(order[:count]))


def _check_count(name: str, value: Any, minimum: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise InputError(f"`{name}` is {value!r}; give an int of at least {minimum}.")


# -- samples for pretraining ------------------------------------------------------------------------------------


class _ImageViews:
    """What the map-style and the streaming data set share: an image of either becomes a sample here."""

    _is_normalized = True

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
        on_bad_image: str = "raise",
    ) -> None:
        if on_bad_image not in ON_BAD_IMAGE:
            raise InputError(f"`on_bad_image` is {on_bad_image!r}; choose one of {', '.join(ON_BAD_IMAGE)}.")
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise InputError(f"`crop_scale` is {crop_scale}; give two shares of the area, 0 < low <= high <= 1.")
        if not 0 < crop_ratio <= 1:
            raise InputError(f"`crop_ratio` is {crop_ratio}; give a number in (0, 1].")
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != num_channels or (name == "std" and min(values) <= 0):
                above = ", each above 0" if name == "std" else ""
                raise InputError(f"`{name}` is {values}; give one number for each of {num_channels} channels{above}.")
        _check_count("num_views", num_views)
        dataset, image_column = _prepare_images(dataset, image_column)
        self._array_dtype = array_dtype(dataset.features[image_column])
        self.dataset = dataset.select_columns([image_column])  # so that no other column is read or decoded
        if self._array_dtype is not None:
            self.dataset = self.dataset.with_format("numpy")
        self.image_column = image_column
        self.image_size, self.patch_size = pair(image_size), pair(patch_size)
        self.num_channels, self.num_patches = num_channels, num_patches
        self.mean, self.std = list(mean), list(std)
        self.train, self.seed = train, seed
        self.crop_scale, self.horizontal_flip, self.crop_ratio = crop_scale, horizontal_flip, crop_ratio
        self.num_views = num_views if train else 1
        self.crop_boxes: torch.Tensor | None = None
        self.on_bad_image = on_bad_image

    def _sample(self, views: list[torch.Tensor], epoch: int, key: int) -> dict[str, torch.Tensor]:
        epoch = epoch if self.train else 0  # the same masks at every evaluation
        generator = sample_generator(self.seed, epoch, key, "noise")
        noise = torch.rand(self.num_views, self.num_patches, generator=generator)
        if self._is_normalized:
            name, views = "pixel_values", [normalize(pixels, self.mean, self.std) for pixels in views]
        else:
            # Images with more than 8 bits may lie in a batch with others: in the same units.
            name, views = "pixels", [pixels if pixels.dtype == torch.uint8 else 255 * pixels for pixels in views]
        if self.num_views == 1:
            return {name: views[0], "noise": noise[0]}
        return {name: torch.stack(views), "noise": noise}

    def _views(self, value: Any, epoch: int, key: int, index: int = 0) -> list[torch.Tensor]:
        """The views `(C, H, W)` that a sample shows of an undecoded image, that of the data set's `index`."""
        if not self.train:
            return [center_view(self._decode(value), self.image_size, self.crop_ratio)]
        # What is cropped is drawn for the whole image, and of a JPEG before it is decoded, in no more detail than that.
        size: tuple[int, int] | None = None
        drawn: list[tuple[Box, bool]] = []

        def reduction(height: int, width: int) -> float:
            nonlocal size, drawn
            size, drawn = (height, width), self._draw(height, width, epoch, key, index)
            return min(self._reduction(*box[2:]) for box, _ in drawn)

        image = self._decode(value, reduction)
        found = image.shape[:2]
        if size is None:
            drawn = self._draw(*found, epoch, key, index)
        elif size != found:
            drawn = [(scale_box(box, size, found), flipped) for box, flipped in drawn]
        views = [(crop_and_resize(image, box, self.image_size), flipped) for box, flipped in drawn]
        return [pixels.flip(-1) if flipped else pixels for pixels, flipped in views]

    def _draw(self, height: int, width: int, epoch: int, key: int, index: int = 0) -> list[tuple[Box, bool]]:
        """Of each view: a part of an image of this size, and whether it is mirrored."""
        generator = sample_generator(self.seed, epoch, key, "augmentation")
        drawn = []
        for _ in range(self.num_views):
            if self.crop_boxes is None:
                box = random_resized_crop_box(height, width, generator, self.crop_scale)
            else:
                box = contrastive_crop_box(height, width, self.crop_boxes[index].tolist(), generator, self.crop_scale)
            drawn.append((box, self.horizontal_flip and torch.rand((), generator=generator).item() < 0.5))
        return drawn

    def _reduction(self, height: float, width: float) -> float:
        """By how much a part of this size may be reduced, and still have the detail for a view."""
        return min(height / self.image_size[0], width / self.image_size[1]) / _DETAIL

    def _for_any_crop(self, height: int, width: int) -> float:
        side = math.sqrt(0.75 * self.crop_scale[0]) * min(height, width)  # aspect ratios go to 4/3
        return self._reduction(side, side)

    def _decode(self, value: Any, reduction: Callable[[int, int], float] | None = None) -> np.ndarray:
        image = decode_image(value, self.num_channels, reduction)
        if image.shape[0] < self.patch_size[0] or image.shape[1] < self.patch_size[1]:
            raise ImageDecodeError(
                f"its size {image.shape[:2]} is smaller than a patch, {self.patch_size} (height, width); remove it, or "
                "take smaller patches."
            )
        return image

    def _error(self, where: str, value: Any, cause: Exception) -> InputError:
        path = value.get("path") if isinstance(value, dict) else None
        return InputError(
            f"image {where}{f' ({path})' if path else ''} of `dataset` cannot be used: {cause} "
            "Remove or replace it, or set `on_bad_image` to skip."
        )


class ImageDataset(_ImageViews, torch.utils.data.Dataset):
    """Samples of a map-style data set for pretraining: `{"pixel_values": (C, H, W), "noise": (num_patches,)}`.

    `pixel_values` is normalised, `noise` uniform in [0, 1); both float32. A sample depends on nothing but
    (seed, epoch, index), whatever the workers and wherever a run was resumed. The epoch travels in the key:
    `dataset[epoch * len(dataset) + index]`, which a sampler yields, so that no worker has to be told of it.

    Args:
        dataset (`datasets.Dataset`), image_column (`str`): As [`load_image_dataset`] returns them.
        image_size (`tuple[int, int]`): Height and width of the samples.
        num_channels (`int`): Channels of the samples: 1, 3 or 4, or what the arrays in the data set have.
        num_patches (`int`): Length of `noise`.
        patch_size (`tuple[int, int]`): Images smaller than that, on either side, count as bad.
        mean, std (`list[float]`): One value a channel, in units of [0, 1].
        train (`bool`): Random resized crop and flip, and new noise each epoch; otherwise the centre, and the same
            noise each epoch.
        seed (`int`): Of augmentation and noise, which are independent streams.
        crop_scale (`tuple[float, float]`): Smallest and largest share of the image in a random crop.
        horizontal_flip (`bool`): Whether half of the samples are mirrored.
        crop_ratio (`float`): Share of the sides that the centre shows, in (0, 1].
        num_views (`int`): Random views of an image in a training sample; with more than one, `pixel_values` is
            `(num_views, C, H, W)` and `noise` `(num_views, num_patches)`. Evaluation always shows one.
        contrastive_crop (`bool`): Whether random crops have their centres in `crop_boxes`, `(len(dataset), 4)` in
            shared memory, at first the whole image; `ContrastiveCropCallback` moves them to the objects.
        device_resident (`bool`): Whether `CurriculumTrainer` keeps all images on its device, and makes batches there
            (see `ResidentImageDataset`).
        on_bad_image (`str`): `"raise"`, or `"skip"`: the next readable image takes the place of a bad one.

    Raises:
        InputError: When constructed: the data set is empty, or its first image (with `"skip"`: every image) is bad.
            When indexed: the image is bad, and `on_bad_image` is `"raise"`.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str,
        *,
        contrastive_crop: bool = False,
        device_resident: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, image_column, **kwargs)
        self.device_resident = device_resident
        if not len(dataset):
            raise InputError("`dataset` is empty: there is no image in it.")
        # In shared memory, so that what a worker finds is known to all, and persistent workers see new boxes.
        self.bad_images = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
        if contrastive_crop:
            self.crop_boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(len(dataset), 1).share_memory_()
        self._load(0)

    def __len__(self) -> int:
        return len(self.bad_images)

    def __getitem__(self, key: int) -> dict[str, torch.Tensor]:
        epoch, index = divmod(int(key), len(self))
        views = self._read(index, lambda value, shown: self._views(value, epoch, index, shown))
        return self._sample(views, epoch, index)

    def whole_image(self, index: int) -> torch.Tensor:
        """All of an image, un-augmented and squeezed to `image_size`: normalised `(C, H, W)`."""
        image = self._load(index)
        return normalize(crop_and_resize(image, (0, 0, *image.shape[:2]), self.image_size), self.mean, self.std)

    @property
    def num_bad_images(self) -> int:
        """How many images were found to be bad so far, by any worker."""
        return int(self.bad_images.sum())

    def _load(self, index: int) -> np.ndarray:
        """An image: in training, in the detail that any crop of it may need."""
        return self._read(index, lambda value, _: self._decode(value, self._for_any_crop if self.train else None))

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
        raise InputError(f"none of the {len(self)} images of `dataset` can be used; the last one: {cause}")


class StreamingImageDataset(_ImageViews, torch.utils.data.IterableDataset):
    """Samples of a stream for pretraining, as [`ImageDataset`] gives them and with the same arguments.

    A sample depends on nothing but (seed, epoch, content of the image). In training the stream is shuffled through a
    buffer, in a new order each epoch; `set_epoch` reaches workers that are already running.

    Args:
        shuffle_buffer_size (`int`): Images held for shuffling, in each worker; training only.
        excluded (`frozenset[int]`): [`content_key`]s of images to leave out, because they are held out.

    Raises:
        InputError: As [`ImageDataset`]; with `on_bad_image="skip"` bad images are left out.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        image_column: str,
        *,
        shuffle_buffer_size: int = 1000,
        excluded: frozenset[int] = frozenset(),
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, image_column, **kwargs)
        self.excluded, self.is_part = excluded, False
        # One counter a worker: additions from several processes to one would get lost.
        self.bad_images = torch.zeros(_MAX_STREAM_WORKERS, dtype=torch.int64).share_memory_()
        if next(iter(self), None) is None:
            raise InputError(
                "`dataset` gives no image that can be used: the stream is empty, or all its images are held out or "
                f"bad ({self.num_bad_images})."
            )
        self.bad_images.zero_()
        if self.train:
            _check_count("shuffle_buffer_size", shuffle_buffer_size)
            self.dataset = self.dataset.shuffle(seed=self.seed, buffer_size=shuffle_buffer_size)

    def part(self, index: int, count: int) -> "StreamingImageDataset":
        """Part `index` of `count` disjoint parts: whole shards if their number can be divided, or every count-th image.

        What the parts hold changes with the order, from epoch to epoch; together they always are the whole.
        """
        found = copy.copy(self)
        found.dataset = split_dataset_by_node(self.dataset, index, count)
        found.is_part = True
        return found

    def set_epoch(self, epoch: int) -> None:
        """Choose the order, the augmentation and the noise of the next pass."""
        if self.train:  # evaluation reads in one order: its masks, and those who look at its first batch, stay put
            self.dataset.set_epoch(epoch)  # held in shared memory: running workers see it

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker, epoch = get_worker_info(), self.dataset.epoch
        for position, row in enumerate(self.dataset):
            try:
                value = _resolve_bytes(undecoded(row[self.image_column], self._array_dtype))
                key = content_key(value)
                if key in self.excluded:
                    continue
                views = self._views(value, epoch, key)
            except ImageDecodeError as error:
                if self.on_bad_image == "raise":
                    raise self._error(f"{position} of the stream", row[self.image_column], error) from error
                self.bad_images[worker.id if worker else 0] += 1
                continue
            yield self._sample(views, epoch, key)

    @property
    def num_bad_images(self) -> int:
        """How many bad images were left out so far, by any worker; one is counted again in each epoch."""
        return int(self.bad_images.sum())


class _UnnormalizedImageDataset(ImageDataset):
    _is_normalized = False


class _UnnormalizedStream(StreamingImageDataset):
    _is_normalized = False


def unnormalized(dataset: Any) -> Any:
    """The same samples with `pixels` instead of `pixel_values`, for who normalises whole batches on the device.

    `pixels` is `(C, H, W)` (with several views one axis more) in 0..255: uint8, or float32 where the images have more
    than 8 bits. A quarter of the bytes to move, and less to do for a worker. The result shares all attributes with
    `dataset`, which stays as it is. What is no [`ImageDataset`] or [`StreamingImageDataset`], or a subclass of one, is
    returned itself.
    """
    other = {ImageDataset: _UnnormalizedImageDataset, StreamingImageDataset: _UnnormalizedStream}.get(type(dataset))
    if other is None:
        return dataset
    found = object.__new__(other)
    found.__dict__ = dataset.__dict__
    return found


def undecoded(value: Any, dtype: np.dtype | None) -> Any:
    """An image as `decode_image` and `content_key` take it; `dtype` is that of an array column."""
    if dtype is None or value is None:
        return value
    try:  # lists come back as int64, which says nothing of their range
        return np.asarray(value, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise ImageDecodeError(f"it is no array: {error}.") from error


def _resolve_bytes(value: Any) -> Any:
    """An image of a stream with its file's bytes, so that it is read only once."""
    if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
        return {**value, "bytes": read_image_bytes(value["path"])}
    return value


def content_key(value: Any) -> int:
    """A checksum of an image as a data set holds it, undecoded: `{"bytes", "path"}` or an array; in 0..2**32 - 1."""
    if isinstance(value, dict):
        return zlib.crc32(_resolve_bytes(value)["bytes"] or b"")
    return 0 if value is None else zlib.crc32(np.ascontiguousarray(value))


# -- putting it together ----------------------------------------------------------------------------------------


def make_image_processor(
    image_size: int | tuple[int, int], num_channels: int, mean: list[float], std: list[float], crop_ratio: float = 1.0
) -> BitImageProcessor:
    """The image processor that shows an image as [`ImageDataset`] with `train=False` does; saved beside a model.

    Square sizes: the same to the pixel. Other sizes: resize to both sides, crop the centre, which is the same view for
    images of the target's proportions and a squeezed one for others (no stock processor takes the largest box of
    another shape). It is a stock class, so that a saved model needs no code of ours, but with one channel, where none
    makes images grey. 16-bit and float images go through [`decode_image`] first.

    Args:
        image_size (`int` or two): Height and width of `pixel_values`.
        num_channels (`int`): 3 converts everything to RGB, 1 to grey; other numbers leave the channels as they are.
        mean, std (`list[float]`): One value a channel, in units of [0, 1].
        crop_ratio (`float`): Share of the sides that is shown, in (0, 1].
    """
    height, width = pair(image_size)
    resized = {"height": resized_side(height, crop_ratio), "width": resized_side(width, crop_ratio)}
    kind, options = (MAEImageProcessor, {"do_grayscale": True}) if num_channels == 1 else (BitImageProcessor, {})
    return kind(
        **options,
        do_convert_rgb=num_channels == 3,
        size={"shortest_edge": resized["height"]} if height == width else resized,
        crop_size={"height": height, "width": width},
        resample=3,  # bicubic
        image_mean=list(mean),
        image_std=list(std),
    )


@dataclass
class DataArguments:
    """Which images to train on, and how to show them."""

    dataset: str = field(
        metadata={"help": "Hub id, folder of images (class folders or not), parquet file, or save_to_disk folder."}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set that has several."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; without one, num_held_out training images are held out."}
    )
    num_held_out: int = field(
        default=512,
        metadata={"help": "Training images held out without an eval_split (at most a tenth of them); 0 for none."},
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images, if there are several."})
    streaming: bool = field(default=False, metadata={"help": "Read the data while training, without preparing it."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most so many images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most so many images."})
    on_bad_image: str = field(
        default="raise", metadata={"help": "Broken image: raise (stop, naming it) or skip (take another, count it)."}
    )
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Mean of each channel, in 0 to 1; ImageNet's for 3 channels, otherwise 0.5."}
    )
    image_std: list[float] | None = field(
        default=None, metadata={"help": "Deviation of each channel, in 0 to 1; ImageNet's for 3 channels, else 0.5."}
    )
    min_crop_scale: float = field(
        default=0.2, metadata={"help": "Smallest share of an image's area that a random crop shows, in (0, 1]."}
    )
    horizontal_flip: bool = field(default=True, metadata={"help": "Mirror half of the training images."})
    contrastive_crop: bool = field(
        default=False,
        metadata={"help": "Crop around the objects that the encoder finds while it trains (ContrastiveCrop)."},
    )
    device_resident: bool = field(
        default=False,
        metadata={
            "help": "Keep all training images, which must be of one size, on the training device and augment there, a "
            "batch at once: for small sets such as CIFAR-10 (3 KB an image), without workers. Draws other crops than "
            "without it."
        },
    )
    crop_ratio: float | None = field(
        default=None,
        metadata={"help": "Share of the sides that evaluation shows; 0.875 from 160 pixels on, 1 for smaller images."},
    )

    def __post_init__(self) -> None:
        if self.on_bad_image not in ON_BAD_IMAGE:
            raise InputError(f"`on_bad_image` is {self.on_bad_image!r}; choose one of {', '.join(ON_BAD_IMAGE)}.")
        if self.contrastive_crop and self.streaming:
            raise InputError(_NO_CROPS_OF_STREAMS)
        if self.device_resident and self.streaming:
            raise InputError(_NO_RESIDENT_STREAMS)
        _check_count("num_held_out", self.num_held_out, minimum=0)
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        for name in ("min_crop_scale", "crop_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise InputError(f"`{name}` is {value!r}; give a number in (0, 1].")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if values is not None and not all(0 <= value <= 1 for value in values):
                raise InputError(f"`{name}` is {values}; give one number in [0, 1] a channel (divide by 255).")
        if self.image_std is not None and 0 in self.image_std:
            raise InputError(f"`image_std` is {self.image_std}; every deviation must be above 0.")

    def mean_and_std(self, num_channels: int) -> tuple[list[float], list[float]]:
        """Mean and standard deviation for each of `num_channels` channels, given or default.

        Raises:
            InputError: There is not one value a channel.
        """
        default = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if num_channels == 3 else ([0.5] * num_channels,) * 2
        mean = list(default[0] if self.image_mean is None else self.image_mean)
        std = list(default[1] if self.image_std is None else self.image_std)
        for name, values in (("image_mean", mean), ("image_std", std)):
            if len(values) != num_channels:
                raise InputError(f"`{name}` has {len(values)} values; give one for each of {num_channels} channels.")
        return mean, std


def build_datasets(
    args: DataArguments, config: MAEConfig, seed: int = 0
) -> tuple[ImageDataset | StreamingImageDataset, ImageDataset | StreamingImageDataset | None, BitImageProcessor]:
    """Training data, evaluation data and image processor for a model.

    Args:
        args (`DataArguments`): What the user asked for.
        config (`MAEConfig`): The model's `image_size`, `patch_size`, `num_channels` and `num_patches`.
        seed (`int`): Of augmentation and noise. What is held out does not depend on it.

    Returns:
        `(train_dataset, eval_dataset, image_processor)`; no evaluation data if `num_held_out` is 0 and no
        `eval_split` is named, or if there is only one image.

    Raises:
        InputError: The data cannot be found, read or shown as asked.
    """
    mean, std = args.mean_and_std(config.num_channels)
    image_size = pair(config.image_size)
    crop_ratio = args.crop_ratio or (0.875 if min(image_size) >= 160 else 1.0)
    settings = dict(
        image_size=image_size,
        num_channels=config.num_channels,
        num_patches=config.num_patches,
        patch_size=pair(config.patch_size),
        mean=mean,
        std=std,
        seed=seed,
        crop_scale=(args.min_crop_scale, 1.0),
        horizontal_flip=args.horizontal_flip,
        crop_ratio=crop_ratio,
        num_views=getattr(config, "num_views", 1),
        on_bad_image=args.on_bad_image,
    )
    train, evaluation, excluded = _split(args)
    own = {name: True for name in ("contrastive_crop", "device_resident") if getattr(args, name)}
    train_samples = _views(*train, excluded=excluded, **settings, **own)
    eval_samples = None if evaluation is None else _views(*evaluation, train=False, **settings)
    processor = make_image_processor(image_size, config.num_channels, mean, std, crop_ratio)
    return train_samples, eval_samples, processor


def _split(args: DataArguments) -> tuple[ImageSource, ImageSource | None, frozenset[int]]:
    """Training and evaluation data, and the content keys that a training stream must leave out."""
    load = dict(config_name=args.dataset_config_name, image_column=args.image_column, streaming=args.streaming)
    train, column = load_image_dataset(args.dataset, args.train_split, **load)
    excluded: frozenset[int] = frozenset()
    if args.eval_split is not None:
        try:
            evaluation = load_image_dataset(args.dataset, args.eval_split, **load)
        except InputError as error:
            raise InputError(f"{error} (Leave out `eval_split` to hold out training images instead.)") from error
    else:
        if isinstance(train, datasets.IterableDataset):
            held_out, excluded = _hold_out_of_stream(train, column, args.num_held_out)
        else:
            train, held_out = _hold_out_tenth(train, args.num_held_out)
        evaluation = None if held_out is None else ImageSource(held_out, column)
    if evaluation is not None:
        evaluation = evaluation._replace(dataset=take_samples(evaluation.dataset, args.max_eval_samples))
    if args.max_train_samples is not None:  # a stream drops those that are held out only while it is read
        train = take_samples(train, args.max_train_samples + len(excluded))
    return ImageSource(train, column), evaluation, excluded


def _views(
    dataset: AnyDataset, column: str, excluded: frozenset[int] = frozenset(), **settings: Any
) -> ImageDataset | StreamingImageDataset:
    if isinstance(dataset, datasets.IterableDataset):
        if settings.pop("contrastive_crop", False):
            raise InputError(_NO_CROPS_OF_STREAMS)
        if settings.pop("device_resident", False):
            raise InputError(_NO_RESIDENT_STREAMS)
        return StreamingImageDataset(dataset, column, excluded=excluded, **settings)
    return ImageDataset(dataset, column, **settings)


def _hold_out_tenth(dataset: datasets.Dataset, count: int) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    if count == 0 or len(dataset) < 2:
        return dataset, None
    return hold_out(dataset, min(count, max(1, len(dataset) // 10)), _SAMPLING_SEED)


def _hold_out_of_stream(
    stream: datasets.IterableDataset, column: str, count: int
) -> tuple[datasets.Dataset | None, frozenset[int]]:
    """The first images of a stream, in memory, and their content keys.

    Left out by content and not with `skip`: workers share the number to skip among their own parts of the stream, so
    that what they skip is not what was held out.
    """
    features = datasets.Features({column: stream.features[column]})
    rows = list(islice(stream.select_columns([column]), count))
    if len(rows) < count:
        rows = rows[: max(1, len(rows) // 10)] if len(rows) > 1 else []
    if not rows:
        return None, frozenset()
    dtype = array_dtype(features[column])
    keys = frozenset(content_key(undecoded(row[column], dtype)) for row in rows)
    return datasets.Dataset.from_list(rows, features=features), keys


__all__ = [
    "IMAGE_SUFFIXES",
    "LABEL_NAMES",
    "DataArguments",
    "ImageDataset",
    "ImageSource",
    "StreamingImageDataset",
    "build_datasets",
    "content_key",
    "find_label_column",
    "hold_out",
    "load_image_dataset",
    "make_image_processor",
    "take_samples",
]
