# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`DataArguments`, and the datasets that are built from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import datasets
from transformers import BitImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from clmae.configuration import MAEConfig
from clmae.configuration.configuration_mae import pair
from clmae.configuration.errors import InputError
from clmae.training.data.columns import AnyDataset, ImageSource, array_dtype
from clmae.training.data.dataset import ImageDataset, check_on_bad_image
from clmae.training.data.decoding import content_key, undecoded
from clmae.training.data.pixels import make_image_processor
from clmae.training.data.sources import SAMPLING_SEED, check_count, hold_out, load_image_dataset, take_samples
from clmae.training.data.streaming import StreamingImageDataset

PretrainingDataset = ImageDataset | StreamingImageDataset
_NOT_OF_STREAMS = {
    "contrastive_crop": "`contrastive_crop` keeps a box for each image, which a stream has no place for; leave out "
    "`streaming`, give a dataset that is no stream, or crop at random.",
    "device_resident": "`device_resident` keeps all images on the device, which a stream never holds at once; leave "
    "out one of them.",
}


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class DataArguments:
    """Which images to train on, and how to show them."""

    dataset: str = field(
        metadata={"help": "Hub id, folder of images (class folders or not), parquet file, or save_to_disk folder."}
    )
    dataset_config_name: str | None = _option(None, "Configuration of a Hub dataset that has several.")
    train_split: str = _option("train", "Split to train on.")
    eval_split: str | None = _option(
        None, "Split to evaluate on; without one, num_held_out training images are held out."
    )
    num_held_out: int = _option(
        512, "Training images held out without an eval_split (at most a tenth of them); 0 for none."
    )
    image_column: str | None = _option(None, "Column of the images, if there are several.")
    streaming: bool = _option(False, "Read the data while training, without preparing it.")
    max_train_samples: int | None = _option(None, "Train on at most so many images.")
    max_eval_samples: int | None = _option(None, "Evaluate on at most so many images.")
    on_bad_image: str = _option("raise", "Broken image: raise (stop, naming it) or skip (take another, count it).")
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Mean of each channel, in 0 to 1; ImageNet's for 3 channels, otherwise 0.5."}
    )
    image_std: list[float] | None = field(
        default=None, metadata={"help": "Deviation of each channel, in 0 to 1; ImageNet's for 3 channels, else 0.5."}
    )
    min_crop_scale: float = _option(0.2, "Smallest share of an image's area that a random crop shows, in (0, 1].")
    horizontal_flip: bool = _option(True, "Mirror half of the training images.")
    color_jitter: bool | None = _option(
        None, "Change the colours of the last view of an image; yes where there are two views, if not given."
    )
    contrastive_crop: bool = _option(
        False, "Crop around the objects that the encoder finds while it trains (ContrastiveCrop)."
    )
    device_resident: bool | None = _option(
        None,
        "Keep all training images, which must be of one size, on the training device and augment there, a batch at "
        "once, without workers. If not given: where they fit in a tenth of its memory, without workers.",
    )
    crop_ratio: float | None = _option(
        None, "Share of the sides that evaluation shows; 0.875 from 160 pixels on, 1 for smaller images."
    )

    def __post_init__(self) -> None:
        check_on_bad_image(self.on_bad_image)
        if self.streaming:
            self._refuse_stream()
        check_count("num_held_out", self.num_held_out, minimum=0)
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        for name in ("min_crop_scale", "crop_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise InputError(f"`{name}` is {value!r}; give a number in (0, 1].")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if values is not None and not all(0 <= value <= 1 for value in values):
                raise InputError(f"`{name}` is {values}; give one number in [0, 1] per channel (divide by 255).")
        if self.image_std is not None and 0 in self.image_std:
            raise InputError(f"`image_std` is {self.image_std}; every deviation must be above 0.")

    def _refuse_stream(self) -> None:
        for name, message in _NOT_OF_STREAMS.items():
            if getattr(self, name):
                raise InputError(message)

    def mean_and_std(self, num_channels: int) -> tuple[list[float], list[float]]:
        """Mean and standard deviation for each of `num_channels` channels, given or default."""
        moments = []
        for name, default in (("image_mean", IMAGENET_DEFAULT_MEAN), ("image_std", IMAGENET_DEFAULT_STD)):
            given = getattr(self, name)
            values = given if given is not None else default if num_channels == 3 else [0.5] * num_channels
            if len(values) != num_channels:
                raise InputError(f"`{name}` has {len(values)} values; give one for each of {num_channels} channels.")
            moments.append(list(values))
        return moments[0], moments[1]


def build_datasets(
    args: DataArguments, config: MAEConfig, seed: int = 0
) -> tuple[PretrainingDataset, PretrainingDataset | None, BitImageProcessor]:
    """`(train_dataset, eval_dataset, image_processor)` for a model.

    There is no evaluation data if `num_held_out` is 0 and no `eval_split` is named, or if there is only one image. What
    is held out does not depend on `seed`, which is that of augmentation and noise.

    Raises:
        InputError: The data cannot be found, read or shown as asked.
    """
    mean, std = args.mean_and_std(config.num_channels)
    image_size = pair(config.image_size)
    crop_ratio = args.crop_ratio or (0.875 if min(image_size) >= 160 else 1.0)
    num_views = getattr(config, "num_views", 1)
    settings: dict[str, Any] = dict(
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
        num_views=num_views,
        color_jitter=num_views > 1 if args.color_jitter is None else args.color_jitter,
        on_bad_image=args.on_bad_image,
    )
    (train, column), evaluation, excluded = _split(args)
    train_dataset: PretrainingDataset
    if isinstance(train, datasets.IterableDataset):
        args._refuse_stream()
        train_dataset = StreamingImageDataset(train, column, excluded=excluded, **settings)
    else:
        of_files: dict[str, Any] = dict(contrastive_crop=args.contrastive_crop, device_resident=args.device_resident)
        train_dataset = ImageDataset(train, column, **of_files, **settings)
    eval_dataset: PretrainingDataset | None = None
    if evaluation is not None:
        is_stream = isinstance(evaluation.dataset, datasets.IterableDataset)
        eval_dataset = (StreamingImageDataset if is_stream else ImageDataset)(*evaluation, train=False, **settings)
    processor = make_image_processor(image_size, config.num_channels, mean, std, crop_ratio)
    return train_dataset, eval_dataset, processor


def _split(args: DataArguments) -> tuple[ImageSource, ImageSource | None, frozenset[int]]:
    """Training and evaluation data, and the content keys that a training stream must leave out."""
    load: dict[str, Any] = dict(
        config_name=args.dataset_config_name, image_column=args.image_column, streaming=args.streaming
    )
    train, column = load_image_dataset(args.dataset, args.train_split, **load)
    excluded: frozenset[int] = frozenset()
    evaluation: AnyDataset | None = None
    if args.eval_split is not None:
        try:
            evaluation, eval_column = load_image_dataset(args.dataset, args.eval_split, **load)
        except InputError as error:
            raise InputError(f"{error} (Leave out `eval_split` to hold out training images instead.)") from error
    else:
        eval_column = column
        if isinstance(train, datasets.IterableDataset):
            evaluation, excluded = _hold_out_of_stream(train, column, args.num_held_out)
        elif args.num_held_out and len(train) > 1:
            train, evaluation = hold_out(train, min(args.num_held_out, max(1, len(train) // 10)), SAMPLING_SEED)
    if args.max_train_samples is not None:  # a stream drops those that are held out only while it is read
        train = take_samples(train, args.max_train_samples + len(excluded))
    if evaluation is None:
        return ImageSource(train, column), None, excluded
    return (
        ImageSource(train, column),
        ImageSource(take_samples(evaluation, args.max_eval_samples), eval_column),
        excluded,
    )


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
