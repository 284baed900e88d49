# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Frozen features of labelled images: what an encoder, an untrained one, or the bare pixels say about them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from clmae.configuration import MAEConfig
from clmae.training.data import array_dtype, find_label_column, load_image_dataset, undecoded
from clmae.training.images import ImageDecodeError, decode_image

FEATURES = ("pooler_output", "cls", "mean")
MAX_PIXELS = 3072  # 32 * 32 * 3


class LabelledImages(Dataset):
    """Un-augmented images of a data set with their classes: `(pixel_values (C, H, W) float32, label)` by index.

    Args:
        dataset: A data set in memory (not a stream), its images encoded or as arrays.
        processor: An image processor of transformers, which resizes, crops the centre and normalises.
        image_column, label_column: Where images and classes are, if that is not plain.
        num_channels: 1, 3 or 4, or what the arrays in the data set have: the model's `num_channels`.

    Attributes:
        labels: All classes, `(n,)` int64, >= 0.

    Raises:
        ValueError: There is no such column, the data set is empty or a stream, or a label is missing. When indexed: an
            image cannot be decoded; the message names its index and path.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        processor: Callable[..., Any],
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        num_channels: int = 3,
    ) -> None:
        if not isinstance(dataset, datasets.Dataset):
            raise ValueError(f"`dataset` is of type {type(dataset).__name__}; give a `datasets.Dataset` (no stream).")
        if not len(dataset):
            raise ValueError("`dataset` is empty: there is no image in it.")
        dataset, self.image_column = load_image_dataset(dataset, image_column=image_column)
        self.label_column = find_label_column(dataset, label_column)
        self.labels = _read_labels(dataset, self.label_column)
        self.class_names: list[str] | None = getattr(dataset.features[self.label_column], "names", None)
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
        # A batch at once: one read of the table and one call of the processor.
        images = [self._decode(index, self.dataset[index][self.image_column]) for index in indices]
        pixel_values = self.processor(images, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        return list(zip(pixel_values, self.labels[list(indices)], strict=True))

    def _decode(self, index: int, value: Any) -> np.ndarray:
        try:
            image = decode_image(undecoded(value, self._array_dtype), self.num_channels)
        except ImageDecodeError as error:
            path = value.get("path") if isinstance(value, dict) else None
            raise ValueError(
                f"image {index}{f' ({path})' if path else ''} of `dataset` cannot be used: {error} "
                "Remove or replace it."
            ) from error
        # Processors divide by 255, whatever the type.
        return image if image.dtype == np.uint8 else image * np.float32(255)


def _read_labels(dataset: datasets.Dataset, column: str) -> Tensor:
    values = dataset.select_columns([column]).with_format(None)[:][column]
    missing = next((i for i, value in enumerate(values) if value is None or value < 0), None)
    if missing is not None:
        raise ValueError(
            f"`label_column` {column!r} has no class for image {missing} (its label is {values[missing]}): filter out "
            "the images without a class, or evaluate on a split that has them all."
        )
    return torch.tensor(values, dtype=torch.int64)


# -- features -------------------------------------------------------------------------------------------------------


def default_feature(model: PreTrainedModel) -> str:
    """What represents an image by default: `pooler_output` for this project's families, else the class token.

    Elsewhere `pooler_output` may come from a layer that no pretraining has trained (transformers' ViT).
    """
    return "pooler_output" if isinstance(model.config, MAEConfig) else "cls"


def extract_features(
    model: PreTrainedModel,
    dataset: Dataset,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    bf16: bool = False,
    feature: str | None = None,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Features of all images from a frozen encoder, in one pass. Draws nothing from the global random state.

    Args:
        model: What `AutoModel` loads: gives `last_hidden_state` `(B, 1 + N, D)` with the class token first. A ViTMAE of
            transformers sees all patches in order, its masking switched off.
        dataset: Gives `(pixel_values, label)`, as [`LabelledImages`].
        batch_size, num_workers: How images are read.
        device: Where the model is moved first; where it is, if not given.
        bf16: Compute in bfloat16 autocast.
        feature: `"pooler_output"`, `"cls"` (class token) or `"mean"` (mean of the patch tokens); see
            [`default_feature`].
        progress: Show a progress bar.

    Returns:
        `(features, labels)` on the CPU, in the data set's order: `(n, d)` float32 and `(n,)` int64.

    Raises:
        ValueError: An unknown feature, or one that the model does not give.
    """
    feature = feature or default_feature(model)
    if feature not in FEATURES:
        raise ValueError(f"`feature` is {feature!r}; choose one of {', '.join(FEATURES)}.")
    if device is not None:
        model.to(device)

    def encode(pixel_values: Tensor) -> Tensor:
        pixel_values = pixel_values.to(model.device, model.dtype, non_blocking=True)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            return _pool(model, model(pixel_values, **_unmasking_inputs(model, pixel_values)), feature)

    with _frozen(model):
        return _collect(
            dataset,
            encode,
            batch_size=batch_size,
            num_workers=num_workers,
            pin_memory=model.device.type == "cuda",
            progress=progress,
        )


def raw_pixels(
    dataset: Dataset, *, batch_size: int = 256, num_workers: int = 0, progress: bool = True
) -> tuple[Tensor, Tensor]:
    """The processed pixels themselves as features, the baseline that needs no encoder.

    Images of more than 3,072 values (32 x 32 x 3) are averaged down (adaptive average pooling, proportions kept) to at
    most that many.

    Args: as for [`extract_features`], which also says what is returned.
    """

    def encode(pixel_values: Tensor) -> Tensor:
        size = _reduced_size(*pixel_values.shape[1:])
        return F.adaptive_avg_pool2d(pixel_values.float(), size).flatten(1)

    with torch.no_grad():
        return _collect(
            dataset, encode, batch_size=batch_size, num_workers=num_workers, pin_memory=False, progress=progress
        )


def random_encoder(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The same architecture at random initialisation, on the same device; the global random state is not touched.

    Weights that are fixed by design (sin-cos positions) are the model's: transformers' own ViTMAE, built from its
    configuration, leaves them zero.
    """
    # Drawn on the CPU, so that the weights do not depend on the device; seeding its generator alone, because
    # `torch.manual_seed` would reseed the accelerators too.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        fresh = type(model)(copy.deepcopy(model.config))
    trained = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if not parameter.requires_grad:
                parameter.copy_(trained[name])
    return fresh.to(model.device, model.dtype).eval()


def _collect(
    dataset: Dataset,
    encode: Callable[[Tensor], Tensor],
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    progress: bool,
) -> tuple[Tensor, Tensor]:
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if value < least:
            raise ValueError(f"`{name}` is {value}; give {least} or more.")
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # without one, a loader draws from the global random state
    )
    features = None
    labels = torch.empty(len(dataset), dtype=torch.int64)
    start = 0
    with tqdm(total=len(dataset), desc="features", unit="img", disable=not progress) as bar:
        for pixel_values, batch_labels in loader:
            encoded = encode(pixel_values)
            if features is None:
                features = torch.empty(len(dataset), encoded.shape[1])
            stop = start + len(encoded)
            features[start:stop] = encoded
            labels[start:stop] = batch_labels
            start = stop
            bar.update(len(encoded))
    if features is None:
        raise ValueError("`dataset` is empty: there is no image in it.")
    return features, labels


def _pool(model: PreTrainedModel, outputs: Any, feature: str) -> Tensor:
    """Features `(B, D)` of an encoder's outputs."""
    tokens = getattr(outputs, "last_hidden_state", None)
    if tokens is None or tokens.ndim != 3:
        raise ValueError(
            f"`model` is a {type(model).__name__}, which gives no `last_hidden_state` of shape (batch_size, 1 + "
            "num_patches, hidden_size); load the encoder with `AutoModel.from_pretrained`."
        )
    if feature == "cls":
        return tokens[:, 0]
    if feature == "mean":
        return tokens[:, 1 + getattr(model.config, "num_register_tokens", 0) :].float().mean(1)
    pooled = getattr(outputs, "pooler_output", None)
    if pooled is None:
        raise ValueError(
            f"`feature` is 'pooler_output', which a {type(model).__name__} does not give; choose 'cls' or 'mean'."
        )
    return pooled


def _masks_by_itself(model: PreTrainedModel) -> bool:
    # transformers' ViTMAE drops patches in every forward pass, and shuffles what it keeps.
    return model.config.model_type == "vit_mae"


def _unmasking_inputs(model: PreTrainedModel, pixel_values: Tensor) -> dict[str, Tensor]:
    if not _masks_by_itself(model):
        return {}
    num_patches = math.prod(side // model.config.patch_size for side in pixel_values.shape[2:])
    # Sorted noise keeps the patches in order.
    return {"noise": torch.arange(num_patches, device=pixel_values.device).expand(len(pixel_values), -1)}


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no gradients, no masking; afterwards all is as before."""
    modes = {module: module.training for module in model.modules()}
    mask_ratio = getattr(model.config, "mask_ratio", None)
    model.eval()
    if _masks_by_itself(model):
        model.config.mask_ratio = 0.0
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        if _masks_by_itself(model):
            model.config.mask_ratio = mask_ratio


def _reduced_size(num_channels: int, height: int, width: int) -> tuple[int, int]:
    """The largest size of the same proportions, up to rounding, with at most `MAX_PIXELS` values."""
    scale = min(1.0, math.sqrt(MAX_PIXELS / (num_channels * height * width)))
    # The small term: 224 * sqrt(3072 / (3 * 224 * 224)) is 32, and must not be rounded down to 31.
    reduced_height = max(1, min(math.floor(height * scale + 1e-6), MAX_PIXELS // num_channels))
    reduced_width = max(1, min(math.floor(width * scale + 1e-6), MAX_PIXELS // (num_channels * reduced_height)))
    return reduced_height, reduced_width


# -- checks ---------------------------------------------------------------------------------------------------------


def check_features(part: str, features: Tensor) -> None:
    """ValueError unless `features` is `(n, d)` with n >= 1 and finite; `part` is the argument's prefix: `"train"`."""
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"`{part}_features` has shape {tuple(features.shape)}; give (n, d) with at least one sample.")
    if not torch.isfinite(features).all():
        raise ValueError(f"`{part}_features` holds NaN or infinity; look at the model's weights, or leave out bf16.")


def check_labelled(part: str, features: Tensor, labels: Tensor) -> None:
    """ValueError unless `features` passes [`check_features`] and `labels` is `(n,)`, integers >= 0, for the same n."""
    check_features(part, features)
    if labels.ndim != 1 or len(labels) != len(features):
        raise ValueError(
            f"`{part}_labels` has shape {tuple(labels.shape)}; give one label for each of {len(features)} samples."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or int(labels.min()) < 0:
        raise ValueError(
            f"`{part}_labels` must hold class numbers from 0 (integers); found {labels.dtype}, smallest "
            f"{labels.min().item()}: leave out the samples without a label."
        )


def check_same_width(train_features: Tensor, test_features: Tensor) -> None:
    """ValueError unless `train_features` `(n, d)` and `test_features` `(m, d)` match, and the latter are finite."""
    check_features("test", test_features)
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"`test_features` is {test_features.shape[1]} wide and `train_features` {train_features.shape[1]}; extract "
            "both with the same model."
        )


__all__ = [
    "FEATURES",
    "LabelledImages",
    "check_features",
    "check_labelled",
    "check_same_width",
    "default_feature",
    "extract_features",
    "random_encoder",
    "raw_pixels",
]
