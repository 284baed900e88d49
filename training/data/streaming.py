# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Samples for pretraining of a stream."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import get_worker_info

from clmae.configuration.errors import InputError
from clmae.training.data.dataset import ImageViews
from clmae.training.data.decoding import ImageDecodeError, content_key, undecoded, with_bytes
from clmae.training.data.sources import check_count

_MAX_WORKERS = 256


class StreamingImageDataset(ImageViews, torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """Samples of a stream for pretraining, as [`ImageDataset`] gives them and with the same arguments.

    A sample depends on nothing but (seed, epoch, content of the image). In training the stream is shuffled through a
    buffer, in a new order each epoch; `set_epoch` reaches workers that are already running.

    Args:
        shuffle_buffer_size: Images held for shuffling, in each worker; training only.
        excluded: [`content_key`]s of images to leave out, because they are held out.

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
        **kwargs,
    ) -> None:
        super().__init__(dataset, image_column, **kwargs)
        self.excluded, self.is_part = excluded, False
        # One counter per worker: additions from several processes to one would get lost.
        self.bad_images = torch.zeros(_MAX_WORKERS, dtype=torch.int64).share_memory_()
        if next(iter(self), None) is None:
            raise InputError(
                "`dataset` gives no image that can be used: the stream is empty, or all its images are held out or "
                f"bad ({self.num_bad_images})."
            )
        self.bad_images.zero_()
        if self.train:
            check_count("shuffle_buffer_size", shuffle_buffer_size)
            self.dataset = self.dataset.shuffle(seed=self.seed, buffer_size=shuffle_buffer_size)

    def part(self, index: int, count: int) -> StreamingImageDataset:
        """Part `index` of `count` disjoint parts: whole shards if their number can be divided, or every count-th image.

        What the parts hold changes with the order, from epoch to epoch; together they always are the whole.
        """
        part = copy.copy(self)
        part.dataset = split_dataset_by_node(self.dataset, index, count)
        part.is_part = True
        return part

    def set_epoch(self, epoch: int) -> None:
        """Choose the order, the augmentation and the noise of the next pass."""
        if self.train:  # evaluation reads in one order: its masks, and those who look at its first batch, stay put
            self.dataset.set_epoch(epoch)  # held in shared memory: running workers see it

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker, epoch = get_worker_info(), self.dataset.epoch
        for position, row in enumerate(self.dataset):
            try:
                value = with_bytes(undecoded(row[self.image_column], self._array_dtype))
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
