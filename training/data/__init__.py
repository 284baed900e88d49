# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Images to learn from: from a Hub id, a folder, parquet or memory to the batches that training reads.

`sources` opens a dataset, `columns` finds its images, `arguments` splits it. `dataset`, `streaming` and `resident` make
samples of it by `decoding`, `crops` and `pixels`, with numbers from `randomness`; `batches` is how these reach the
device. `contrastive_crop` finds the boxes that crops are drawn around.
"""

from clmae.training.data.arguments import DataArguments, build_datasets
from clmae.training.data.batches import ImageCollator, unnormalized
from clmae.training.data.columns import LABEL_NAMES, AnyDataset, ImageSource, array_dtype, find_label_column
from clmae.training.data.contrastive_crop import heat_map_box, object_heat_map, refresh_epochs
from clmae.training.data.crops import contrastive_crop_box, random_resized_crop_box
from clmae.training.data.dataset import ImageDataset, check_on_bad_image
from clmae.training.data.decoding import ImageDecodeError, content_key, decode_image, undecoded
from clmae.training.data.pixels import (
    center_view,
    crop_and_resize,
    crop_and_resize_batch,
    make_image_processor,
    normalize,
)
from clmae.training.data.randomness import sample_generator, sample_state, uniform
from clmae.training.data.resident import ResidentImageDataset, resident_if_small
from clmae.training.data.sources import IMAGE_SUFFIXES, hold_out, load_image_dataset, take_samples
from clmae.training.data.streaming import StreamingImageDataset

__all__ = [
    "IMAGE_SUFFIXES",
    "LABEL_NAMES",
    "AnyDataset",
    "DataArguments",
    "ImageCollator",
    "ImageDataset",
    "ImageDecodeError",
    "ImageSource",
    "ResidentImageDataset",
    "StreamingImageDataset",
    "array_dtype",
    "build_datasets",
    "center_view",
    "check_on_bad_image",
    "content_key",
    "contrastive_crop_box",
    "crop_and_resize",
    "crop_and_resize_batch",
    "decode_image",
    "find_label_column",
    "heat_map_box",
    "hold_out",
    "load_image_dataset",
    "make_image_processor",
    "normalize",
    "object_heat_map",
    "random_resized_crop_box",
    "refresh_epochs",
    "resident_if_small",
    "sample_generator",
    "sample_state",
    "take_samples",
    "undecoded",
    "uniform",
    "unnormalized",
]
