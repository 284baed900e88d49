# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Labelled images to learn from and to be evaluated on, as a saved model sees them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, BaseImageProcessor
from transformers.utils import logging

from clmae.configuration.errors import InputError
from clmae.evaluation.labels import stratified_part
from clmae.model_cards.run import read_model_config
from clmae.training.data import (
    LABEL_NAMES,
    AnyDataset,
    ImageDecodeError,
    array_dtype,
    check_on_bad_image,
    decode_image,
    find_label_column,
    load_image_dataset,
    take_samples,
    undecoded,
)

logger = logging.get_logger(__name__)

_REMEDY = " Remove or replace it, or set `on_bad_image` to skip."
TEST_SHARE = 0.2  # of a dataset without a test split


class LabelledImages(Dataset):
    """Un-augmented images of a dataset with their classes: `(pixel_values (C, H, W) float32, label)` by index.

    Args:
        dataset: A dataset in memory (not a stream), its images encoded or as arrays.
        processor: An image processor of transformers, which resizes, crops the centre and normalises.
        image_column, label_column: Needed where there are several. Classes are numbers, or words.
        num_channels: 1, 3 or 4, or what the arrays in the dataset have: the model's `num_channels`.
        class_names: For classes that are words, which number each word is: the training set's `class_names`, so that a
            test set is numbered alike. In alphabetical order, if not given.
        ignore_labels: Whatever the dataset says of classes, the label of each image is its index.

    Attributes:
        labels: All classes, `(n,)` int64, >= 0.
        class_names: By class number, or `None` where the dataset gives numbers alone.

    Raises:
        InputError: No such column, no image, a stream, a missing label, labels that are no classes, or a word that is
            not in `class_names`. When indexed: an image cannot be decoded; the message names its index and path.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        processor: Any,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        num_channels: int = 3,
        class_names: Sequence[str] | None = None,
        ignore_labels: bool = False,
    ) -> None:
        if not isinstance(dataset, datasets.Dataset):
            raise InputError(f"`dataset` is of type {type(dataset).__name__}; give a `datasets.Dataset` (no stream).")
        if not len(dataset):
            raise InputError("`dataset` is empty: there is no image in it.")
        dataset, self.image_column = load_image_dataset(dataset, image_column=image_column)
        self.label_column = None if ignore_labels else find_class_column(dataset, label_column)
        if self.label_column is None:
            self.labels, self.class_names = torch.arange(len(dataset)), None
        else:
            self.labels, self.class_names = read_classes(dataset, self.label_column, class_names)
        self._array_dtype = array_dtype(dataset.features[self.image_column])
        self.dataset = dataset.select_columns([self.image_column])  # so that no other column is read
        if self._array_dtype is not None:
            self.dataset = self.dataset.with_format("numpy")
        self.processor, self.num_channels = processor, num_channels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        values = self.dataset[list(indices)][self.image_column]
        images = [self._decode(index, value) for index, value in zip(indices, values, strict=True)]
        pixel_values = self.processor(images, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        return list(zip(pixel_values, self.labels[list(indices)], strict=True))

    def fingerprint(self) -> dict[str, Any]:
        """What `pixel_values` depend on, as JSON: data, order and choice of the images, and the processor.

        Of images that are files, their paths, sizes and times of change count, not what is in them.

        Raises:
            InputError: The processor does not say what it does.
        """
        if not hasattr(self.processor, "to_json_string"):
            raise InputError(
                "`cache_dir` is given, but `processor` is no image processor of transformers, so that a change of it "
                "would go unnoticed; leave out `cache_dir`."
            )
        files = hashlib.sha256()
        if self._array_dtype is None:
            paths = self.dataset.flatten()[f"{self.image_column}.path"]
            for path in filter(None, paths):
                if os.path.isfile(path):
                    status = os.stat(path)
                    files.update(json.dumps([path, status.st_size, status.st_mtime_ns]).encode())
        return {
            "dataset": self.dataset._fingerprint,  # of the table and of what was selected from it
            "files": files.hexdigest(),
            "image_column": self.image_column,
            "num_channels": self.num_channels,
            "processor": [type(self.processor).__name__, json.loads(self.processor.to_json_string())],
        }

    def _decode(self, index: int, value: Any) -> np.ndarray:
        try:
            image = decode_image(undecoded(value, self._array_dtype), self.num_channels)
        except ImageDecodeError as error:
            path = value.get("path") if isinstance(value, dict) else None
            raise InputError(
                f"image {index}{f' ({path})' if path else ''} of `dataset` cannot be used: {error}{_REMEDY}"
            ) from error
        # Processors divide by 255, whatever the type.
        return image if image.dtype == np.uint8 else image * np.float32(255)


def readable_images(dataset: datasets.Dataset, image_column: str | None, num_channels: int) -> list[int]:
    """The indices of the images that can be decoded; warns of each of the others."""
    images = LabelledImages(dataset, None, image_column=image_column, num_channels=num_channels, ignore_labels=True)
    good = []
    for i in tqdm(range(len(dataset)), desc="looking for bad images"):
        try:
            images._decode(i, images.dataset[i][images.image_column])
            good.append(i)
        except InputError as error:
            logger.warning(f"left out: {str(error).removesuffix(_REMEDY)}")
    return good


def find_class_column(dataset: datasets.Dataset, name: str | None = None) -> str:
    """The column of classes: as [`find_label_column`], or one of words, if it is named or called like one of labels.

    Raises:
        InputError: There is none or there are several, or what is there is no class: several labels, fractions.
    """
    features = dataset.features
    try:
        return find_label_column(dataset, name)
    except InputError:
        candidates = [column for column in (LABEL_NAMES if name is None else [name]) if column in features]
        words = [column for column in candidates if _dtype(features[column]) in ("string", "large_string")]
        if len(words) == 1:
            return words[0]
        for column in candidates:
            if isinstance(features[column], (list, datasets.List, datasets.LargeList)):
                raise InputError(
                    f"`label_column` {column!r} holds several labels per image; these protocols evaluate by one class "
                    "per image: set `label_column` to a column with one, or make one by `dataset.map`."
                ) from None
            if _dtype(features[column]).startswith(("float", "double", "half")):
                raise InputError(
                    f"`label_column` {column!r} holds {_dtype(features[column])}, and fractions are no classes; give a "
                    f"column of class numbers, e.g. by `dataset.cast_column({column!r}, datasets.Value('int64'))`."
                ) from None
        raise


def _dtype(feature: Any) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else ""


def read_classes(
    dataset: datasets.Dataset, column: str, class_names: Sequence[str] | None = None
) -> tuple[Tensor, list[str] | None]:
    """Class numbers `(n,)`, and the name of each class; words are numbered by `class_names`, or alphabetically."""
    values = dataset.select_columns([column]).with_format(None)[:][column]
    is_text = _dtype(dataset.features[column]) in ("string", "large_string")
    for i, value in enumerate(values):
        if value is None or (not value if is_text else value < 0):
            raise InputError(
                f"`label_column` {column!r} has no class for image {i} (its label is {value!r}): filter out the images "
                "without a class, or evaluate on a split that has them all."
            )
    if not is_text:
        return torch.tensor(values, dtype=torch.int64), getattr(dataset.features[column], "names", None)
    names = sorted(set(values)) if class_names is None else list(class_names)
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise InputError(
            f"`label_column` {column!r} holds classes that the training set lacks: {', '.join(map(repr, unknown[:5]))}"
            f"{' ...' if len(unknown) > 5 else ''}; leave out their images, or put some into the training set."
        )
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([number[value] for value in values], dtype=torch.int64), names


def load_labelled_images(
    model_path: str | os.PathLike,
    dataset_source: str | os.PathLike | AnyDataset | dict,
    *,
    train_split: str = "train",
    test_split: str | None = None,
    max_train_samples: int | None = None,
    max_test_samples: int | None = None,
    label_column: str | None = None,
    image_column: str | None = None,
    config_name: str | None = None,
    on_bad_image: str = "raise",
) -> tuple[LabelledImages, LabelledImages, dict[str, Any]]:
    """Training and test images as a saved model sees them, and what is written down of where they come from.

    Args:
        model_path: Folder or Hub id of a model with an image processor.
        dataset_source, config_name, image_column: As in [`load_image_dataset`]; not a stream.
        train_split: Split to learn from.
        test_split: Split to be evaluated on; if not given `"test"` or, where there is none, a fixed random fifth of
            each class of the training split, which is then not learnt from.
        max_train_samples, max_test_samples: At most so many, drawn with a fixed seed.
        label_column: Where the classes are, if there are several such columns.
        on_bad_image: `"skip"` leaves out images that cannot be decoded, for which all are read once before.

    Raises:
        InputError: There is no such model, split or column; both splits are the same images, or their classes differ.
    """
    read_model_config(model_path)  # what is wrong is reported before anything is loaded
    check_on_bad_image(on_bad_image)
    columns = dict(label_column=label_column, image_column=image_column)
    *splits, tested_on = _load_splits(dataset_source, train_split, test_split, config_name, **columns)
    processor, num_channels = load_image_processor(model_path)
    options: dict[str, Any] = dict(num_channels=num_channels, **columns)
    parts = [take_samples(splits[0], max_train_samples), take_samples(splits[1], max_test_samples)]
    if on_bad_image == "skip":
        parts = [part.select(readable_images(part, image_column, num_channels)) for part in parts]
    train = LabelledImages(parts[0], processor, **options)
    # A test set of words is numbered as the training set, without whose names it cannot be.
    options["class_names"] = train.class_names or ()
    test = LabelledImages(parts[1], processor, **options)
    if train.class_names != test.class_names:
        names = [f"{part.class_names[:5]}..." if part.class_names else "numbers" for part in (train, test)]
        raise InputError(
            f"the classes of the training and the test set differ: {names[0]} and {names[1]}; give both the same class "
            "names in the same order."
        )
    settings = {
        "model": os.fspath(model_path),
        "dataset": os.fspath(dataset_source) if isinstance(dataset_source, (str, os.PathLike)) else "in memory",
        "dataset_config_name": config_name,
        "train_split": train_split,
        "test_split": tested_on,
        "max_train_samples": max_train_samples,
        "max_test_samples": max_test_samples,
    }
    return train, test, settings


def load_image_processor(model_path: str | os.PathLike) -> tuple[BaseImageProcessor, int]:
    """How a saved model sees images: its image processor, and how many channels they have."""
    num_channels = getattr(read_model_config(model_path), "num_channels", 3)
    # The PIL backend equals torchvision's Resize and CenterCrop bit by bit, by which published numbers are made.
    backend = "pil" if num_channels in (1, 3, 4) else "torchvision"
    return AutoImageProcessor.from_pretrained(model_path, backend=backend), num_channels


def _load_splits(
    source: Any,
    train_split: str,
    test_split: str | None,
    config_name: str | None,
    label_column: str | None,
    image_column: str | None,
) -> tuple[datasets.Dataset, datasets.Dataset, str]:
    """Training and test images, and what the test images are."""

    def load(option: str, split: str) -> datasets.Dataset:
        try:
            return load_image_dataset(source, split, config_name=config_name, image_column=image_column).dataset
        except InputError as error:
            raise InputError(f"{error} (`{option}` chooses the split that is read here.)") from error

    train = load("train_split", train_split)
    try:
        test = load("test_split", test_split or "test")
    except InputError:
        if test_split is not None:
            raise
        test = train
    # A single dataset answers to any split name; compared here, because a limit would make different ones of it.
    if train._fingerprint != test._fingerprint:
        return train, test, test_split or "test"
    if test_split is not None:
        raise InputError(
            f"`dataset` gives the same images as {train_split!r} and as {test_split!r}, so that the test would be "
            "on what was learnt; leave out `test_split` to hold out a part of them."
        )
    labels, _ = read_classes(train, find_class_column(train, label_column))
    held_out = stratified_part(labels, TEST_SHARE, seed=0)
    if not held_out.any():
        raise InputError(
            "`dataset` has a single image of each class; give images to learn from, and others to be evaluated on."
        )
    parts = (train.select(part.nonzero().flatten().numpy()) for part in (~held_out, held_out))
    return *parts, f"{TEST_SHARE:.0%} of each class of {train_split}, held out at random"
