# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Small images in every form in which datasets hold them."""

import io

import datasets
import numpy as np
from PIL import Image

SETTINGS = dict(
    image_size=(16, 16), num_channels=3, num_patches=16, patch_size=(4, 4), mean=[0.5] * 3, std=[0.25] * 3, seed=3
)


def image(number, height=20, width=24):
    """A smooth picture that tells its number by its mean colour."""
    y, x = np.mgrid[0 : 1 : 1j * height, 0 : 1 : 1j * width]
    waves = np.stack([np.sin(3 * x + number), np.cos(4 * y - number), np.sin(2 * (x + y))], axis=2)
    return Image.fromarray((127 + 100 * waves).astype(np.uint8))


def png(number, **size):
    """[`image`] as a file."""
    buffer = io.BytesIO()
    image(number, **size).save(buffer, "PNG")
    return buffer.getvalue()


def rows(count, bad=()):
    """Images as `datasets.Image(decode=False)` gives them, some of them broken."""
    return [{"bytes": b"broken" if i in bad else png(i), "path": f"{i}.png"} for i in range(count)]


def memory(count=8, bad=(), **columns):
    """A map-style dataset of [`rows`]."""
    features = {"image": datasets.Image(decode=False), **{name: datasets.Value("int64") for name in columns}}
    return datasets.Dataset.from_dict({"image": rows(count, bad), **columns}, features=datasets.Features(features))


def stream(count=8, bad=(), shards=2):
    """A stream of [`rows`]."""
    return memory(count, bad).to_iterable_dataset(num_shards=shards)


def save_images(folder, names):
    """Files of a folder, which is given back."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image(i).save(path, "PNG")
    return folder


def arrays(feature, values, column="bands"):
    """A dataset of a column of arrays."""
    return datasets.Dataset.from_dict({column: values}, features=datasets.Features({column: feature}))
