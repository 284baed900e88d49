# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Where images come from: a Hub id, a folder, parquet or memory."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np

from clmae.configuration.errors import InputError
from clmae.training.data.columns import AnyDataset, ImageSource, prepare_images

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
SAMPLING_SEED = 0  # which samples a limit keeps must not change from run to run
Parts = tuple[str, ...]
Kind = TypeVar("Kind", datasets.Dataset, datasets.IterableDataset, AnyDataset)


def load_image_dataset(
    source: str | os.PathLike | AnyDataset | dict,
    split: str = "train",
    *,
    config_name: str | None = None,
    image_column: str | None = None,
    streaming: bool = False,
    max_samples: int | None = None,
) -> ImageSource:
    """A split of an image dataset, from wherever it is.

    Args:
        source: A Hub id; a folder of images, with or without a folder for each class (below a folder for each split,
            if there are splits); a parquet file; a folder that `datasets.load_dataset` understands; a folder written
            by `save_to_disk`; or a dataset (or dict of them) in memory.
        split: Of several. Sources that `datasets.load_dataset` reads also take slices such as `"train[:10%]"`.
        streaming: Read while training instead of preparing everything first.
        max_samples: As [`take_samples`].

    Returns:
        `(dataset, image_column)`. A folder with several classes has a `"label"` column.

    Raises:
        InputError: There is no such source, split or column, or no image in it.
    """
    if isinstance(source, (str, os.PathLike)):
        dataset = _load_path(os.fspath(source), split, config_name, streaming)
    else:
        dataset = _pick_split(source, split, "the dataset in memory")
    if streaming and isinstance(dataset, datasets.Dataset):
        dataset = dataset.to_iterable_dataset(num_shards=max(1, min(len(dataset), 64)))
    dataset, image_column = prepare_images(dataset, image_column)
    return ImageSource(take_samples(dataset, max_samples), image_column)


def _load_path(source: str, split: str, config_name: str | None, streaming: bool) -> AnyDataset:
    path = Path(source).expanduser()
    if not path.exists():
        if source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise InputError(f"`dataset` is {source!r}, but there is no such file or folder.")
        where = f"{source!r} is no local folder, and as a Hub id"
        return _load_with_datasets(source, split, where, config_name, streaming)
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
    images, has_tables = _scan_folder(path)
    if has_tables:
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
            f"`dataset` is of type {type(source).__name__}; give a Hub id, a folder, a parquet file, or a dataset of "
            "the datasets library."
        )
    if split not in source:
        raise InputError(f"`split` is {split!r}, but {where} has {', '.join(map(repr, source)) or 'none'}.")
    return source[split]


# -- folders of images ------------------------------------------------------------------------------------------

# Not `load_dataset("imagefolder")`, which silently leaves out linked folders, unreadable ones and broken links, drops
# all labels where a class has sub-folders, and takes 0.8 ms per image; with `data_dir=`, a `test.jpg` among a thousand
# photos makes all the others disappear.


def _scan_folder(folder: Path) -> tuple[list[Parts], bool]:
    """Image files below a folder, as sorted tuples of path parts; and whether it holds tables or metadata."""
    images, has_tables, seen = [], False, set()
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
            has_tables = has_tables or suffix in _TABLE_SUFFIXES or name in _METADATA_NAMES
    return sorted(images), has_tables


def _refuse(error: OSError) -> None:
    raise InputError(f"`dataset` cannot be read: {error}. Give access to that folder, or move it away.") from error


def _image_folder(folder: Path, images: list[Parts]) -> datasets.DatasetDict:
    """Splits of a folder of images, with labels if each image of a split lies in one of several class folders."""
    groups = _group_by_split(images)
    depth = 0 if groups is None else 1  # of the class folders
    groups = groups or {"train": images}
    names = sorted({parts[depth] for group in groups.values() for parts in group if len(parts) > depth + 1})
    number = {name: i for i, name in enumerate(names)}
    splits = {}
    for split, group in groups.items():
        columns: dict[str, list] = {"image": [str(folder.joinpath(*parts)) for parts in group]}
        features = {"image": datasets.Image(decode=False)}
        if len(names) > 1 and all(len(parts) > depth + 1 for parts in group):
            columns["label"] = [number[parts[depth]] for parts in group]
            features["label"] = datasets.ClassLabel(names=names)
        splits[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return datasets.DatasetDict(splits)


def _group_by_split(images: list[Parts]) -> dict[str, list[Parts]] | None:
    """Images by split, if the top folders are splits: all of them, or `train` and another (a class may be `test`)."""
    inside = [parts for parts in images if len(parts) > 1]
    known = {_SPLIT_NAMES.get(parts[0].lower()) for parts in inside}
    all_splits = bool(known) and None not in known and len(inside) == len(images)
    if not all_splits and not ("train" in known and known & {"validation", "test"}):
        return None
    groups: dict[str, list[Parts]] = {}
    for parts in inside:
        groups.setdefault(_SPLIT_NAMES.get(parts[0].lower(), parts[0]), []).append(parts)
    return groups


# -- choosing samples -------------------------------------------------------------------------------------------


def take_samples(dataset: Kind, max_samples: int | None) -> Kind:
    """At most `max_samples` samples: drawn with a fixed seed, in their old order (folders are sorted by class); of a
    stream, the first ones."""
    if max_samples is None:
        return dataset
    check_count("max_samples", max_samples)
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.take(max_samples)
    if max_samples >= len(dataset):
        return dataset
    chosen = np.random.default_rng(SAMPLING_SEED).permutation(len(dataset))[:max_samples]
    return dataset.select(np.sort(chosen))


def hold_out(
    dataset: datasets.Dataset, fraction_or_count: float | int, seed: int = 0
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Two disjoint random parts of a dataset, both in its order; the second is a share in (0, 1), or a number, of it.

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


def check_count(name: str, value: Any, minimum: int = 1) -> None:
    """Refuses what is no `int` of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise InputError(f"`{name}` is {value!r}; give an int of at least {minimum}.")
