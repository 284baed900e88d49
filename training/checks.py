# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What trainers refuse before the first step, with a message that names the argument and the remedy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from transformers.trainer_utils import SchedulerType
from transformers.utils import logging

from clmae.configuration.errors import InputError
from clmae.modeling import MAEPreTrainedModel
from clmae.training.data import ImageDataset, StreamingImageDataset

logger = logging.get_logger(__name__)


def check_setup(trainer: Any) -> None:
    """Refuses, before the first step, what would fail in the midst of a run."""
    args, model, dataset, batch = trainer.args, trainer.model, trainer.train_dataset, trainer.args.images_per_batch
    learns = trainer.has_masking_module
    schedule = SchedulerType(args.lr_scheduler_type).value
    fsdp_plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    contrasts = bool(getattr(model.config, "contrastive_loss_weight", 0))
    images = len(dataset) if hasattr(dataset, "__len__") else 0
    crops = getattr(dataset, "crop_boxes", None) is not None
    inner_crops = getattr(getattr(dataset, "dataset", None), "crop_boxes", None) is not None
    problems = (
        (
            # Pass B differentiates inside the forward pass.
            learns and args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"),
            "`gradient_checkpointing_kwargs` asks for `use_reentrant`, which cannot differentiate inside the forward "
            "pass, as a masking module needs; leave it out.",
        ),
        (
            learns and trainer.lr_scheduler is None and schedule in ("reduce_lr_on_plateau", "greedy"),
            f"`lr_scheduler_type` is {schedule!r}, which gives all parameters one schedule, but the masking module has "
            "its own. Choose a schedule that is a function of the step, such as cosine.",
        ),
        (
            learns and trainer.is_fsdp_enabled and getattr(fsdp_plugin, "fsdp_version", 1) == 2,
            "`fsdp_config` has version 2, which re-shards the weights within the forward pass of a model with a "
            "masking module; set its `version` to 1, or use DDP.",
        ),
        (
            contrasts and batch == 1,
            "`per_device_train_batch_size` is 1 on one process, but contrast needs other images to tell one from: take "
            "at least 2, or set `contrastive_loss_weight` to 0.",
        ),
        (
            contrasts and args.world_size == 1 and not args.dataloader_drop_last and images % batch == 1,
            f"`dataloader_drop_last` is false, and {images} training images in batches of {batch} leave one alone, "
            "with nothing to contrast it with: drop the last batch, or take another batch size.",
        ),
        (
            crops and not isinstance(model, MAEPreTrainedModel),
            f"`model` is a {type(model).__name__}, but `contrastive_crop` needs an encoder of this project's families; "
            "take one, or crop at random.",
        ),
        (
            crops and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled),
            "`contrastive_crop` runs the encoder by itself, which a model whose weights are sharded (`fsdp`, "
            "`deepspeed`) cannot do; use DDP, or crop at random.",
        ),
        (
            not crops and inner_crops,
            f"`train_dataset` is a {type(dataset).__name__} of a dataset with `contrastive_crop`: its boxes would "
            "never be computed; choose the images before (`datasets.Dataset.select`), or crop at random.",
        ),
    )
    for applies, message in problems:
        if applies:
            raise InputError(message)
    _warn_of_wrapper(dataset)


def _warn_of_wrapper(dataset: Any) -> None:
    if isinstance(getattr(dataset, "dataset", None), ImageDataset):
        logger.warning(
            f"`train_dataset` is a {type(dataset).__name__} of an `ImageDataset`, which shows an image by "
            "the same crop and noise at every epoch: choose the images before (`datasets.Dataset.select`)."
        )


def check_samples(train_dataset: Any, eval_dataset: Any, pixel_values_of: Callable[[Any], Any], remedy: str) -> None:
    """Refuses datasets whose first sample holds no normalised image; this project's own check themselves.

    Args:
        train_dataset, eval_dataset: As the Trainer takes them.
        pixel_values_of: What a sample holds as `pixel_values`; `None` if nothing.
        remedy: What to do, as a sentence.

    Raises:
        InputError: A dataset is empty, or its `pixel_values` are missing or no array of floats; the message says what
            the sample is.
    """
    several = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    for name, dataset in [("train_dataset", train_dataset), *(("eval_dataset", dataset) for dataset in several)]:
        if dataset is None or isinstance(dataset, (ImageDataset, StreamingImageDataset)):
            continue
        try:
            sample = dataset[0] if hasattr(dataset, "__len__") else next(iter(dataset))
        except (StopIteration, IndexError):
            raise InputError(f"`{name}` is empty: there is no image in it.") from None
        values = pixel_values_of(sample)
        with contextlib.suppress(TypeError, ValueError):  # lists of what are no numbers, or of unequal lengths
            values = torch.as_tensor(values) if isinstance(values, (list, np.ndarray)) else values
        if not isinstance(values, torch.Tensor):
            described = _describe(sample) if values is None else f"`pixel_values` that are {_describe(values)}"
        elif not values.is_floating_point():
            described = f"`pixel_values` of {values.dtype}"
        else:
            continue
        raise InputError(f"`{name}` gives {described}, where normalised float `pixel_values` are needed. {remedy}")


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of ({', '.join(type(part).__name__ for part in value)})"
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(repr, value)) or 'nothing'}"
    return f"a {type(value).__name__}"
