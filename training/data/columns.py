# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Which column of a dataset holds the images, which the class labels."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import datasets
import numpy as np

from clmae.configuration.errors import InputError

AnyDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset
LABEL_NAMES = ("label", "labels", "fine_label", "coarse_label", "class", "target")
_ENCODED_TYPES = ("binary", "large_binary", "string", "large_string")  # image files, or paths, if the user says so


class ImageSource(NamedTuple):
    """A dataset, and its column of images (undecoded: `{"bytes", "path"}`, or arrays)."""

    dataset: AnyDataset
    image_column: str


def prepare_images(dataset: AnyDataset, column: str | None) -> ImageSource:
    """The dataset with its image column undecoded, and the name of that column: the one named, or the only one.

    Raises:
        InputError: There is none, there are several, or the one named holds no images.
    """
    dataset = _resolved(dataset)
    features = dataset.features
    if column is None:
        candidates = [name for name in features if _is_encoded_image(features[name])]
        candidates = candidates or [name for name in features if array_dtype(features[name]) is not None]
        if not candidates:
            raise InputError(f"`dataset` has no column of images; its columns are {_describe(features)}.")
        if len(candidates) > 1:
            raise InputError(f"`dataset` has several columns of images: set `image_column` to one of {candidates}.")
        column = candidates[0]
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


def find_label_column(dataset: AnyDataset, name: str | None = None) -> str:
    """The column of class labels: the one named, the only `ClassLabel`, or the only integer column named like one."""
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
    candidates = [column for column in features if isinstance(features[column], datasets.ClassLabel)]
    candidates = candidates or [name for name in LABEL_NAMES if name in features and _is_integer(features[name])]
    if not candidates:
        raise InputError(
            f"`dataset` has no column of class labels; its columns are {_describe(features)}. Set `label_column`, or "
            "put the images of each class into a folder of its own."
        )
    if len(candidates) > 1:
        raise InputError(f"`dataset` has several columns of class labels: set `label_column` to one of {candidates}.")
    return candidates[0]


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


def _resolved(dataset: AnyDataset) -> AnyDataset:
    """The dataset, knowing its features: those of a stream without any are inferred from its head."""
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


def _is_encoded_image(feature: Any) -> bool:
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _is_integer(feature: Any) -> bool:
    return isinstance(feature, datasets.ClassLabel) or _type_name(feature).startswith(("int", "uint"))


def _describe(features: dict[str, Any]) -> str:
    return ", ".join(f"{name!r} ({_type_name(feature)})" for name, feature in features.items()) or "none"


def _type_name(feature: Any) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
