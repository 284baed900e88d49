# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Frozen features of labelled images: what an encoder, an untrained one, or the bare pixels say about them."""

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
from torch.utils.data import DataLoader, Dataset, default_collate
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
    """Un-augmented images of a data set with their classes: `(pixel_values (C, H, W) float32, label)` by index.

    Args:
        dataset: A data set in memory (not a stream), its images encoded or as arrays.
        processor: An image processor of transformers, which resizes, crops the centre and normalises.
        image_column, label_column: Where images and classes are, if that is not plain. Classes are numbers, or words.
        num_channels: 1, 3 or 4, or what the arrays in the data set have: the model's `num_channels`.
        class_names: For classes that are words, which number each word is: the training set's `class_names`, so that a
            test set is numbered alike. The words of this data set in alphabetical order, if not given.

    Attributes:
        labels: All classes, `(n,)` int64, >= 0.
        class_names: By class number, or `None` where the data set gives numbers alone.

    Raises:
        InputError: There is no such column, the data set is empty or a stream, a label is missing, an image has several
            labels, labels are no classes (fractions), or a word is not in `class_names`. When indexed: an image cannot
            be decoded; the message names its index and path.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        processor: Callable[..., Any],
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        num_channels: int = 3,
        class_names: Sequence[str] | None = None,
    ) -> None:
        if not isinstance(dataset, datasets.Dataset):
            raise InputError(f"`dataset` is of type {type(dataset).__name__}; give a `datasets.Dataset` (no stream).")
        if not len(dataset):
            raise InputError("`dataset` is empty: there is no image in it.")
        dataset, self.image_column = load_image_dataset(dataset, image_column=image_column)
        self.label_column = find_class_column(dataset, label_column)
        self.class_names: list[str] | None = getattr(dataset.features[self.label_column], "names", None)
        if _is_text(dataset.features[self.label_column]):
            self.labels, self.class_names = _read_words(dataset, self.label_column, class_names)
        else:
            self.labels = _read_labels(dataset, self.label_column)
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
        return list(zip(*self.read_batch(indices), strict=True))

    def read_batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`(pixel_values (B, C, H, W) float32, labels (B,))`: one read of the table, one call of the processor."""
        indices = list(indices)
        values = self.dataset[indices][self.image_column]
        images = [self._decode(index, value) for index, value in zip(indices, values, strict=True)]
        pixel_values = self.processor(images, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        return pixel_values, self.labels[indices]

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
        return {
            "dataset": self.dataset._fingerprint,  # of the table and of what was selected from it
            "files": self._hash_of_files(),
            "image_column": self.image_column,
            "num_channels": self.num_channels,
            "processor": [type(self.processor).__name__, json.loads(self.processor.to_json_string())],
        }

    def _hash_of_files(self) -> str | None:
        if self._array_dtype is not None:
            return None
        paths = self.dataset.flatten().select_columns([f"{self.image_column}.path"])[:][f"{self.image_column}.path"]
        digest = hashlib.sha256()
        for path in paths:
            if path is not None and os.path.isfile(path):
                status = os.stat(path)
                digest.update(json.dumps([path, status.st_size, status.st_mtime_ns]).encode())
        return digest.hexdigest()

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
    candidates = [column for column in (LABEL_NAMES if name is None else [name]) if column in features]
    if name is None and (
        any(isinstance(kind, datasets.ClassLabel) for kind in features.values())
        or any(_dtype(features[column]).startswith(("int", "uint")) for column in candidates)
    ):
        return find_label_column(dataset)
    words = [column for column in candidates if _is_text(features[column])]
    if len(words) == 1:
        return words[0]
    for column in candidates:
        if isinstance(features[column], (list, datasets.List, datasets.LargeList)):
            raise InputError(
                f"`label_column` {column!r} holds several labels an image; these protocols judge by one class an "
                "image: set `label_column` to a column with one, or make one by `dataset.map`."
            )
        if _dtype(features[column]).startswith(("float", "double", "half")):
            raise InputError(
                f"`label_column` {column!r} holds {_dtype(features[column])}, and fractions are no classes; give a "
                f"column of class numbers, for instance by `dataset.cast_column({column!r}, datasets.Value('int64'))`."
            )
    return find_label_column(dataset, name)


def _dtype(feature: Any) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else ""


def _is_text(feature: Any) -> bool:
    return _dtype(feature) in ("string", "large_string")


def _column(dataset: datasets.Dataset, column: str) -> list:
    return dataset.select_columns([column]).with_format(None)[:][column]


def _read_labels(dataset: datasets.Dataset, column: str) -> Tensor:
    values = _column(dataset, column)
    _check_all_labelled(column, values, lambda value: value is None or value < 0)
    return torch.tensor(values, dtype=torch.int64)


def _read_words(dataset: datasets.Dataset, column: str, class_names: Sequence[str] | None) -> tuple[Tensor, list[str]]:
    """Class numbers `(n,)` of words, and the word of each number."""
    values = _column(dataset, column)
    _check_all_labelled(column, values, lambda value: not value)
    names = sorted(set(values)) if class_names is None else list(class_names)
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise InputError(
            f"`label_column` {column!r} holds classes that the training set lacks: {', '.join(map(repr, unknown[:5]))}"
            f"{' ...' if len(unknown) > 5 else ''}; leave out their images, or put some into the training set."
        )
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([number[value] for value in values], dtype=torch.int64), names


def _check_all_labelled(column: str, values: list, is_missing: Callable[[Any], bool]) -> None:
    missing = next((i for i, value in enumerate(values) if is_missing(value)), None)
    if missing is not None:
        raise InputError(
            f"`label_column` {column!r} has no class for image {missing} (its label is {values[missing]!r}): filter "
            "out the images without a class, or evaluate on a split that has them all."
        )


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
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    bf16: bool = False,
    feature: str | None = None,
    layer: int | None = None,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Features of all images from a frozen encoder, in one pass. Draws nothing from the global random state.

    Where `torch.distributed` is initialised, each process encodes its part, and all of them get all features.

    Args:
        model: What `AutoModel` loads: gives `last_hidden_state` `(B, 1 + N, D)` with the class token first (registers,
            if any, after it). A ViTMAE of transformers sees all patches in order, its masking switched off.
        dataset: Gives `(pixel_values, label)`, as [`LabelledImages`].
        batch_size, num_workers: How images are read.
        device: Where the model is moved first; where it is, if not given.
        bf16: Compute in bfloat16 autocast.
        feature: `"pooler_output"`, `"cls"` (class token), `"mean"` (mean of the patch tokens) or `"cls+mean"` (one
            after the other, `d = 2 D`); see [`default_feature`].
        layer: Take the tokens that so many blocks leave, before the final LayerNorm; 0 are the embeddings, and negative
            numbers count from the end (-1: the last block). The model's output, with its LayerNorm, if not given.
        cache_dir: Folder that keeps features from run to run, by weights, configuration, processor, images and what is
            asked for; needs [`LabelledImages`]. Of files on disk only paths, sizes and times are looked at.
        progress: Show a progress bar.

    Returns:
        `(features, labels)` on the CPU, in the data set's order: `(n, d)` float32 and `(n,)` int64. Features from the
        cache are mapped from the file, and read as they are needed.

    Raises:
        InputError: An unknown feature or layer, or one that the model does not give.
    """
    feature = feature or default_feature(model, layer)
    if feature not in FEATURES:
        raise InputError(f"`feature` is {feature!r}; choose one of {', '.join(FEATURES)}.")
    if layer is not None and feature == "pooler_output":
        raise InputError(f"`layer` is {layer}, but only a model's output is pooled by itself; choose cls or mean.")
    if device is not None:
        model.to(device)
    hidden_states = {} if layer is None else {"output_hidden_states": True}

    def encode(pixel_values: Tensor) -> Tensor:
        pixel_values = pixel_values.to(model.device, model.dtype, non_blocking=True)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            outputs = model(pixel_values, **_unmasking_inputs(model, pixel_values), **hidden_states)
            return _pool(model, outputs, pixel_values.shape[2:], feature, layer)

    def collect() -> tuple[Tensor, Tensor]:
        with _frozen(model):
            return _collect(
                dataset,
                encode,
                batch_size=batch_size,
                num_workers=num_workers,
                pin_memory=model.device.type == "cuda",
                progress=progress,
            )

    if cache_dir is None:
        return collect()
    asked = {"model": _model_fingerprint(model), "feature": feature, "layer": layer, "bf16": bf16}
    return _cached(cache_dir, dataset, asked, collect)


def raw_pixels(
    dataset: Dataset,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """The processed pixels themselves as features, the baseline that needs no encoder.

    Images of more than 3,072 values (32 x 32 x 3) are averaged down (adaptive average pooling, proportions kept) to at
    most that many.

    Args: as for [`extract_features`], which also says what is returned.
    """

    def encode(pixel_values: Tensor) -> Tensor:
        size = _reduced_size(*pixel_values.shape[1:])
        return F.adaptive_avg_pool2d(pixel_values.float(), size).flatten(1)

    def collect() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return _collect(
                dataset, encode, batch_size=batch_size, num_workers=num_workers, pin_memory=False, progress=progress
            )

    if cache_dir is None:
        return collect()
    return _cached(cache_dir, dataset, {"feature": "raw pixels", "most": MAX_PIXELS}, collect)


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


class _Batches(Dataset):
    """`dataset[indices]` is a batch: read at once where the data set can, which saves putting it together."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        if isinstance(self.dataset, LabelledImages):
            return self.dataset.read_batch(indices)
        return tuple(default_collate([self.dataset[index] for index in indices]))


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
            raise InputError(f"`{name}` is {value}; give {least} or more.")
    size = len(dataset)
    if not size:
        raise InputError("`dataset` is empty: there is no image in it.")
    first, end = _own_part(size)
    loader = DataLoader(
        _Batches(dataset),
        sampler=[range(i, min(i + batch_size, end)) for i in range(first, end, batch_size)],
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # without one, a loader draws from the global random state
    )
    features = None
    labels = torch.empty(size, dtype=torch.int64)
    start = first
    with tqdm(total=end - first, desc="features", unit="img", disable=not progress or not is_first_process()) as bar:
        for pixel_values, batch_labels in loader:
            encoded = encode(pixel_values)
            if features is None:
                features = torch.empty(size, encoded.shape[1])
            stop = start + len(encoded)
            features[start:stop] = encoded
            labels[start:stop] = batch_labels
            start = stop
            bar.update(len(encoded))
    _share_parts(features, labels)
    return features, labels


# -- several processes ----------------------------------------------------------------------------------------------


def is_first_process() -> bool:
    """Whether this process is the one that writes and talks."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _parts(size: int) -> list[tuple[int, int]]:
    """Where the part of each process starts and ends; every process does all of a data set with fewer images."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    world = world if size >= world else 1
    return [(size * rank // world, size * (rank + 1) // world) for rank in range(world)]


def _own_part(size: int) -> tuple[int, int]:
    parts = _parts(size)
    return parts[dist.get_rank()] if len(parts) > 1 else parts[0]


def _share_parts(*tensors: Tensor) -> None:
    """Every process gets the rows of all the others, in place."""
    parts = _parts(len(tensors[0]))
    if len(parts) == 1:
        return
    for tensor in tensors:
        for rank, (start, end) in enumerate(parts):
            part = tensor[start:end].to(_exchange_device())
            dist.broadcast(part, src=rank)
            tensor[start:end] = part


def _exchange_device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


# -- cache ----------------------------------------------------------------------------------------------------------


def _cached(
    cache_dir: str | os.PathLike,
    dataset: Dataset,
    asked: dict[str, Any],
    collect: Callable[[], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """What `collect` gives; from a file, if one was left for the same images and the same that is `asked`."""
    if not isinstance(dataset, LabelledImages):
        raise InputError(
            f"`cache_dir` is given, but `dataset` is a {type(dataset).__name__}, which does not say what is in it; "
            "give `LabelledImages`, or leave out `cache_dir`."
        )
    key = json.dumps([dataset.fingerprint(), asked], sort_keys=True)
    path = Path(cache_dir) / f"features-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    features = _read_cache(path, len(dataset))
    if _everywhere(features is not None):
        return features, dataset.labels.clone()
    features, labels = collect()
    if is_first_process():
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, features.numpy(), allow_pickle=False)
    return features, labels


def _read_cache(path: Path, size: int) -> Tensor | None:
    """Features `(size, d)` float32 mapped from a file; None if there is none or it is no such file (cut short)."""
    try:
        # Copy on write: whoever changes the tensor does not change the file.
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    is_right = array.ndim == 2 and len(array) == size and array.dtype == np.float32
    return torch.from_numpy(array) if is_right else None


def _everywhere(found: bool) -> bool:
    """Whether it is so in every process: else all must do the work together."""
    if not dist.is_initialized():
        return found
    flag = torch.tensor(int(found), device=_exchange_device())
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def _model_fingerprint(model: PreTrainedModel) -> str:
    """A hash of architecture, configuration and the values of all weights, wherever they were loaded from."""
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    digest = hashlib.sha256(json.dumps([type(model).__name__, config], sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# -- what is taken of an encoder ------------------------------------------------------------------------------------


def _pool(model: PreTrainedModel, outputs: Any, size: Sequence[int], feature: str, layer: int | None) -> Tensor:
    """Features `(B, d)` of an encoder's outputs for images of `size` (height, width)."""
    tokens = getattr(outputs, "last_hidden_state", None)
    if tokens is None or tokens.ndim != 3:
        raise InputError(
            f"`model` is a {type(model).__name__}, which gives no `last_hidden_state` of shape (batch_size, 1 + "
            "num_patches, hidden_size); load the encoder with `AutoModel.from_pretrained`."
        )
    if feature == "pooler_output":
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is None:
            raise InputError(
                f"`feature` is 'pooler_output', which a {type(model).__name__} does not give; choose 'cls' or 'mean'."
            )
        return pooled
    if layer is not None:
        tokens = _layer_tokens(model, outputs, layer)
    parts = []
    num_others = _num_other_tokens(model, tokens, size)
    if "cls" in feature:
        if not num_others:
            raise InputError(
                f"`feature` is {feature!r}, but a {type(model).__name__} has no class token; choose 'mean'."
            )
        parts.append(tokens[:, 0].float())
    if "mean" in feature:
        parts.append(tokens[:, num_others:].mean(1, dtype=torch.float32))
    return torch.cat(parts, 1)


def _layer_tokens(model: PreTrainedModel, outputs: Any, layer: int) -> Tensor:
    hidden_states = getattr(outputs, "hidden_states", None) or ()
    if not -len(hidden_states) <= layer < len(hidden_states):
        raise InputError(
            f"`layer` is {layer}, but a {type(model).__name__} gives "
            + (f"0 to {len(hidden_states) - 1}." if hidden_states else "no hidden states; leave it out.")
        )
    return hidden_states[layer]


def _num_other_tokens(model: PreTrainedModel, tokens: Tensor, size: Sequence[int]) -> int:
    """Tokens before those of the patches: class token and registers."""
    patch_size = getattr(model.config, "patch_size", None)
    if patch_size is None:
        return 1 + getattr(model.config, "num_register_tokens", 0)
    num_patches = math.prod(side // step for side, step in zip(size, pair(patch_size), strict=True))
    if tokens.shape[1] < num_patches:
        raise InputError(
            f"`model` is a {type(model).__name__}, which gives {tokens.shape[1]} tokens for {num_patches} patches; "
            "only encoders that keep a token for each patch can be judged by their tokens. Try feature 'pooler_output'."
        )
    return tokens.shape[1] - num_patches


def _masks_by_itself(model: PreTrainedModel) -> bool:
    # transformers' ViTMAE drops patches in every forward pass, and shuffles what it keeps.
    return model.config.model_type == "vit_mae"


def _unmasking_inputs(model: PreTrainedModel, pixel_values: Tensor) -> dict[str, Tensor]:
    if not _masks_by_itself(model):
        return {}
    steps = pair(model.config.patch_size)
    num_patches = math.prod(side // step for side, step in zip(pixel_values.shape[2:], steps, strict=True))
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
    """InputError unless `features` is `(n, d)` with n >= 1 and finite; `part` is the argument's prefix: `"train"`."""
    if features.ndim != 2 or 0 in features.shape:
        raise InputError(f"`{part}_features` has shape {tuple(features.shape)}; give (n, d) with at least one sample.")
    if not torch.isfinite(features).all():
        raise InputError(f"`{part}_features` holds NaN or infinity; look at the model's weights, or leave out bf16.")


def check_labelled(part: str, features: Tensor, labels: Tensor) -> None:
    """InputError unless `features` passes [`check_features`] and `labels` is `(n,)`, integers >= 0, for the same n."""
    check_features(part, features)
    if labels.ndim != 1 or len(labels) != len(features):
        raise InputError(
            f"`{part}_labels` has shape {tuple(labels.shape)}; give one label for each of {len(features)} samples."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or int(labels.min()) < 0:
        raise InputError(
            f"`{part}_labels` must hold class numbers from 0 (integers); found {labels.dtype}, smallest "
            f"{labels.min().item()}: leave out the samples without a label."
        )


def check_same_width(train_features: Tensor, test_features: Tensor) -> None:
    """InputError unless `train_features` `(n, d)` and `test_features` `(m, d)` match, and the latter are finite."""
    check_features("test", test_features)
    if train_features.shape[1] != test_features.shape[1]:
        raise InputError(
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
    "find_class_column",
    "is_first_process",
    "random_encoder",
    "raw_pixels",
]
