# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Labelled images, and their features: of a frozen encoder, of an untrained one, or the pixels themselves."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from clmae.configuration import MAEConfig
from clmae.configuration.configuration_mae import pair
from clmae.configuration.errors import InputError
from clmae.model_cards.files import replacing
from clmae.training.data import (
    LABEL_NAMES,
    ImageDecodeError,
    array_dtype,
    decode_image,
    find_label_column,
    load_image_dataset,
    undecoded,
)

FEATURES = ("pooler_output", "cls", "mean", "cls+mean")
MAX_PIXELS = 3072  # 32 * 32 * 3


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
                f"image {index}{f' ({path})' if path else ''} of `dataset` cannot be used: {error} "
                "Remove or replace it."
            ) from error
        # Processors divide by 255, whatever the type.
        return image if image.dtype == np.uint8 else image * np.float32(255)


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


# -- features -------------------------------------------------------------------------------------------------------


def default_feature(model: PreTrainedModel, layer: int | None = None) -> str:
    """What represents an image by default: `pooler_output` for this project's families, else the class token.

    Elsewhere `pooler_output` may come from a layer that no pretraining has trained (transformers' ViT). With a `layer`
    it is what the family pools there: `"mean"` or `"cls"`.
    """
    if not isinstance(model.config, MAEConfig):
        return "cls"
    return "pooler_output" if layer is None else model.config.pooling


def extract_features(
    model: PreTrainedModel,
    dataset: Dataset,
    *,
    bf16: bool = False,
    feature: str | None = None,
    layer: int | None = None,
    **reading: Any,
) -> tuple[Tensor, Tensor]:
    """Features of all images from a frozen encoder, in one pass. Draws nothing from the global random state.

    Where `torch.distributed` is initialised, each process encodes its part, and all of them get all features.

    Args:
        model: What `AutoModel` loads: gives `last_hidden_state` `(B, 1 + N, D)` with the class token first (registers,
            if any, after it). A ViTMAE of transformers sees all patches in order, its masking switched off.
        dataset: Gives `(pixel_values, label)`, as [`LabelledImages`].
        bf16: Compute in bfloat16 autocast.
        feature: `"pooler_output"`, `"cls"` (class token), `"mean"` (mean of the patch tokens) or `"cls+mean"` (one
            after the other, `d = 2 D`); see [`default_feature`].
        layer: Take the tokens that so many blocks leave, before the final LayerNorm; 0 are the embeddings, and negative
            numbers count from the end (-1: the last block). The model's output, with its LayerNorm, if not given.
        reading: `batch_size` (256), `num_workers` (0), `progress` (True: a bar), and `cache_dir`: a folder that keeps
            features from run to run, by weights, configuration, processor, images and what is asked for; needs
            [`LabelledImages`]. Of files on disk only paths, sizes and times are looked at.

    Returns:
        `(features, labels)` on the CPU, in the dataset's order: `(n, d)` float32 and `(n,)` int64. Features from the
        cache are mapped from the file, and read as they are needed.

    Raises:
        InputError: An unknown feature or layer, or one that the model does not give.
    """
    feature = feature or default_feature(model, layer)
    request: dict[str, Any] = {"feature": feature, "layer": layer, "bf16": bf16}
    if reading.get("cache_dir") is not None:
        request["model"] = model_fingerprint(model)
    with _encoder(model, feature, layer, bf16) as encode:
        return _features(dataset, encode, request, **reading)


def stream_features(
    model: PreTrainedModel,
    dataset: Dataset,
    *,
    start: int = 0,
    bf16: bool = False,
    feature: str | None = None,
    layer: int | None = None,
    **reading: Any,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The features and labels of [`extract_features`], a batch at a time: memory does not grow with their number.

    Args:
        start: Index of the first image. Batches begin there: a multiple of `batch_size` leaves them as they are.
        model, dataset, bf16, feature, layer, reading: As there, without `cache_dir`; this process encodes all images.

    Raises:
        InputError: As there.
    """
    with _encoder(model, feature or default_feature(model, layer), layer, bf16) as encode:
        yield from _batches(dataset, encode, range(start, len(dataset)), **reading)  # type: ignore[arg-type]  # see there


@contextmanager
def _encoder(
    model: PreTrainedModel, feature: str, layer: int | None, bf16: bool
) -> Iterator[Callable[[Tensor], Tensor]]:
    """From `pixel_values` to features `(B, d)`, on the model's device."""
    if feature not in FEATURES:
        raise InputError(f"`feature` is {feature!r}; choose one of {', '.join(FEATURES)}.")
    if layer is not None and feature == "pooler_output":
        raise InputError(f"`layer` is {layer}, but only a model's output is pooled by itself; choose cls or mean.")
    # transformers' ViTMAE drops patches in every forward pass, and shuffles what it keeps.
    is_masking = model.config.model_type == "vit_mae"

    def encode(pixel_values: Tensor) -> Tensor:
        pixel_values = pixel_values.to(model.device, model.dtype, non_blocking=True)
        inputs: dict[str, Any] = {} if layer is None else {"output_hidden_states": True}
        num_patches = _num_patches(model, pixel_values)
        if is_masking and num_patches is not None:  # sorted noise keeps the patches in order
            inputs["noise"] = torch.arange(num_patches, device=model.device).expand(len(pixel_values), -1)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            return _pool(model, model(pixel_values, **inputs), num_patches, feature, layer)

    with _frozen(model, is_masking):
        yield encode


def raw_pixels(dataset: Dataset, **reading: Any) -> tuple[Tensor, Tensor]:
    """The processed pixels themselves as features, the baseline that needs no encoder.

    Images of more than 3,072 values (32 x 32 x 3) are averaged down (adaptive average pooling, proportions kept) to at
    most that many. Arguments and result are those of [`extract_features`].
    """

    def encode(pixel_values: Tensor) -> Tensor:
        size = _reduced_size(*pixel_values.shape[1:])
        return F.adaptive_avg_pool2d(pixel_values.float(), size).flatten(1)

    return _features(dataset, encode, {"feature": "raw pixels", "most": MAX_PIXELS}, **reading)


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
    trained = model.state_dict()
    with torch.no_grad():
        for name, value in (*fresh.named_parameters(), *fresh.named_buffers()):
            if not value.requires_grad and name in trained:
                value.copy_(trained[name])
    return fresh.to(model.device, model.dtype).eval()


# -- one pass over the images, or none ------------------------------------------------------------------------------


def _features(
    dataset: Dataset,
    encode: Callable[[Tensor], Tensor],
    request: dict[str, Any],
    *,
    cache_dir: str | os.PathLike | None = None,
    **reading: Any,
) -> tuple[Tensor, Tensor]:
    """Features and labels; from a file, if one was left for the same images and the same request."""
    if cache_dir is None:
        return _collect(dataset, encode, **reading)
    if not isinstance(dataset, LabelledImages):
        raise InputError(
            f"`cache_dir` is given, but `dataset` is a {type(dataset).__name__}, which does not say what is in it; "
            "give `LabelledImages`, or leave out `cache_dir`."
        )
    key = json.dumps([dataset.fingerprint(), request], sort_keys=True)
    path = Path(cache_dir) / f"features-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    features = _read_cache(path, len(dataset))
    # Where one process lacks the file, all must do the work together.
    if all(_from_all_processes(features is not None)):
        assert features is not None
        return features, dataset.labels.clone()
    features, labels = _collect(dataset, encode, **reading)
    if is_first_process():
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, features.numpy(), allow_pickle=False)
    return features, labels


def _collect(dataset: Dataset, encode: Callable[[Tensor], Tensor], **reading: Any) -> tuple[Tensor, Tensor]:
    """Each process encodes its part of the images, and gets all of them."""
    size = len(dataset)  # type: ignore[arg-type]  # torch's Dataset does not promise a length; these have one
    if not size:
        raise InputError("`dataset` is empty: there is no image in it.")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    features, labels = [torch.empty(0)], [torch.empty(0, dtype=torch.int64)]  # of a part without images
    part = torch.arange(size).tensor_split(world)[rank].tolist()
    for batch_features, batch_labels in _batches(dataset, encode, part, **reading):
        features.append(batch_features)
        labels.append(batch_labels)
    parts = _from_all_processes((torch.cat(features), torch.cat(labels)))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _batches(
    dataset: Dataset,
    encode: Callable[[Tensor], Tensor],
    part: Sequence[int],
    batch_size: int = 256,
    num_workers: int = 0,
    progress: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features `(B, d)` float32 and labels `(B,)` of the images `part`, in order, on the CPU."""
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if value < least:
            raise InputError(f"`{name}` is {value}; give {least} or more.")
    loader = DataLoader(
        Subset(dataset, part),
        batch_size,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # without one, a loader draws from the global random state
    )
    bar = tqdm(total=len(part), desc="features", unit="img", disable=not progress or not is_first_process())
    with bar:
        for pixel_values, labels in loader:
            with torch.no_grad():  # not around `yield`, which would switch off the caller's gradients
                features = encode(pixel_values).float().cpu()
            yield features, labels
            bar.update(len(labels))


def is_first_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _from_all_processes(value: Any) -> list[Any]:
    """The value that each process gave, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _read_cache(path: Path, size: int) -> Tensor | None:
    """Features `(size, d)` float32 mapped from a file; None if there is none or it is no such file (cut short)."""
    try:
        # Copy on write: whoever changes the tensor does not change the file.
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    is_right = array.ndim == 2 and len(array) == size and array.dtype == np.float32
    return torch.from_numpy(array) if is_right else None


def model_fingerprint(model: PreTrainedModel) -> str:
    """A hash of architecture, configuration and the values of all weights, wherever they were loaded from."""
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    digest = hashlib.sha256(json.dumps([type(model).__name__, config], sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# -- what is taken of an encoder ------------------------------------------------------------------------------------


def _pool(model: PreTrainedModel, outputs: Any, num_patches: int | None, feature: str, layer: int | None) -> Tensor:
    """Features `(B, d)` of an encoder's outputs."""
    name = type(model).__name__
    tokens = getattr(outputs, "last_hidden_state", None)
    if tokens is None or tokens.ndim != 3:
        raise InputError(
            f"`model` is a {name}, which gives no `last_hidden_state` of shape (batch_size, 1 + num_patches, "
            "hidden_size); load the encoder with `AutoModel.from_pretrained`."
        )
    if feature == "pooler_output":
        if getattr(outputs, "pooler_output", None) is None:
            raise InputError(f"`feature` is 'pooler_output', which a {name} does not give; choose 'cls' or 'mean'.")
        return outputs.pooler_output
    if layer is not None:
        hidden_states = getattr(outputs, "hidden_states", None) or ()
        if not -len(hidden_states) <= layer < len(hidden_states):
            layers = f"0 to {len(hidden_states) - 1}." if hidden_states else "no hidden states; leave it out."
            raise InputError(f"`layer` is {layer}, but a {name} gives {layers}")
        tokens = hidden_states[layer]
    # Class token and registers come first.
    num_others = 1 if num_patches is None else tokens.shape[1] - num_patches
    if num_others < 0:
        raise InputError(
            f"`model` is a {name}, which gives {tokens.shape[1]} tokens for {num_patches} patches; only encoders that "
            "keep a token for each patch can be evaluated by their tokens. Try feature 'pooler_output'."
        )
    parts = []
    if "cls" in feature:
        if not num_others:
            raise InputError(f"`feature` is {feature!r}, but a {name} has no class token; choose 'mean'.")
        parts.append(tokens[:, 0].float())
    if "mean" in feature:
        parts.append(tokens[:, num_others:].mean(1, dtype=torch.float32))
    return torch.cat(parts, 1)


def _num_patches(model: PreTrainedModel, pixel_values: Tensor) -> int | None:
    patch_size = getattr(model.config, "patch_size", None)
    if patch_size is None:
        return None
    return math.prod(side // step for side, step in zip(pixel_values.shape[2:], pair(patch_size), strict=True))


@contextmanager
def _frozen(model: PreTrainedModel, is_masking: bool) -> Iterator[None]:
    """Evaluation mode, no masking; afterwards all is as before."""
    modes = {module: module.training for module in model.modules()}
    mask_ratio = getattr(model.config, "mask_ratio", None)
    model.eval()
    if is_masking:
        model.config.mask_ratio = 0.0
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        if is_masking:
            model.config.mask_ratio = mask_ratio


def _reduced_size(num_channels: int, height: int, width: int) -> tuple[int, int]:
    """The largest size of the same proportions, up to rounding, with at most `MAX_PIXELS` values."""
    scale = min(1.0, math.sqrt(MAX_PIXELS / (num_channels * height * width)))
    # The small term: 224 * sqrt(3072 / (3 * 224 * 224)) is 32, and must not be rounded down to 31.
    reduced_height = max(1, min(math.floor(height * scale + 1e-6), MAX_PIXELS // num_channels))
    reduced_width = max(1, min(math.floor(width * scale + 1e-6), MAX_PIXELS // (num_channels * reduced_height)))
    return reduced_height, reduced_width


# -- checks ---------------------------------------------------------------------------------------------------------


def check_inputs(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor | None = None
) -> None:
    """What every protocol asks of features `(n, d)` and `(m, d)`, and of labels `(n,)` and `(m,)`, integers >= 0.

    Raises:
        InputError: Shapes do not match, features are not finite, or labels are no classes.
    """
    for part, features, labels in (("train", train_features, train_labels), ("test", test_features, test_labels)):
        if features.ndim != 2 or 0 in features.shape:
            raise InputError(
                f"`{part}_features` has shape {tuple(features.shape)}; give (n, d) with at least one sample."
            )
        if not torch.isfinite(features).all():
            raise InputError(
                f"`{part}_features` holds NaN or infinity; look at the model's weights, or leave out bf16."
            )
        if labels is None:
            continue
        if labels.shape != features.shape[:1]:
            raise InputError(
                f"`{part}_labels` has shape {tuple(labels.shape)}; give one label for each of {len(features)} samples."
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or int(labels.min()) < 0:
            raise InputError(
                f"`{part}_labels` must hold class numbers from 0 (integers); it has {labels.dtype}, smallest "
                f"{labels.min().item()}: leave out the samples without a label."
            )
    if train_features.shape[1] != test_features.shape[1]:
        raise InputError(
            f"`test_features` is {test_features.shape[1]} wide and `train_features` {train_features.shape[1]}; extract "
            "both with the same model."
        )


__all__ = [
    "FEATURES",
    "LabelledImages",
    "check_inputs",
    "default_feature",
    "extract_features",
    "find_class_column",
    "is_first_process",
    "model_fingerprint",
    "random_encoder",
    "raw_pixels",
    "read_classes",
    "stream_features",
]
