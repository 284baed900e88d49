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

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm
from transformers import AutoModel, PreTrainedModel

from clmae.configuration import MAEConfig
from clmae.configuration.configuration_mae import pair
from clmae.configuration.errors import InputError
from clmae.evaluation.images import LabelledImages
from clmae.model_cards.files import replacing
from clmae.training.data.sources import check_count

FEATURES = ("pooler_output", "cls", "mean", "cls+mean")
MAX_PIXELS = 3072  # 32 * 32 * 3
_AFTER_THE_BLOCKS = ("pooler.", "layernorm.", "norm.")  # what a checkpoint of pretraining or a classifier may lack


# -- features -------------------------------------------------------------------------------------------------------


def default_feature(model: PreTrainedModel, layer: int | None = None) -> str:
    """What represents an image by default: `pooler_output` for this project's families, else the class token.

    Elsewhere `pooler_output` may come from a layer that no pretraining has trained (transformers' ViT). With a `layer`
    it is what the family pools there: `"mean"` or `"cls"`.
    """
    if not isinstance(model.config, MAEConfig):
        return "cls"
    return "pooler_output" if layer is None else model.config.pooling


def load_encoder(model_path: str | os.PathLike, argument: str = "`model`") -> PreTrainedModel:
    """What `AutoModel` loads; `argument` is what messages call `model_path`.

    Raises:
        InputError: It cannot be loaded, or lacks weights of its encoder, which transformers would draw at random.
    """
    try:
        model, report = AutoModel.from_pretrained(model_path, output_loading_info=True)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{argument} {os.fspath(model_path)!r} cannot be loaded: {error}") from error
    lacking = sorted(name for name in report["missing_keys"] if not name.startswith(_AFTER_THE_BLOCKS))
    if lacking:
        raise InputError(
            f"{argument} {os.fspath(model_path)!r} lacks {len(lacking)} weights of its encoder, {lacking[0]} among "
            "them, which would be random; give a complete checkpoint."
        )
    return model


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
    """From `pixel_values` to features `(B, d)`, on its device and not masked; afterwards the model is as before."""
    if feature not in FEATURES:
        raise InputError(f"`feature` is {feature!r}; choose one of {', '.join(FEATURES)}.")
    if layer is not None and feature == "pooler_output":
        raise InputError(f"`layer` is {layer}, but only a model's output is pooled by itself; choose cls or mean.")
    config, patch_size = model.config, getattr(model.config, "patch_size", None)
    masks = config.model_type == "vit_mae"  # and shuffles: transformers' own does so in every forward pass

    def encode(pixel_values: Tensor) -> Tensor:
        pixel_values = pixel_values.to(model.device, model.dtype, non_blocking=True)
        inputs: dict[str, Any] = {} if layer is None else {"output_hidden_states": True}
        num_patches = None
        if patch_size is not None:
            sides = zip(pixel_values.shape[2:], pair(patch_size), strict=True)
            num_patches = math.prod(side // step for side, step in sides)
        if masks and num_patches is not None:  # sorted noise keeps the patches in order
            inputs["noise"] = torch.arange(num_patches, device=model.device).expand(len(pixel_values), -1)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            return _pool(model, model(pixel_values, **inputs), num_patches, feature, layer)

    modes = {module: module.training for module in model.modules()}
    mask_ratio = getattr(config, "mask_ratio", None)
    model.eval()
    if masks:
        config.mask_ratio = 0.0
    try:
        yield encode
    finally:
        for module, training in modes.items():
            module.training = training
        if masks:
            config.mask_ratio = mask_ratio


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
    batches = list(_batches(dataset, encode, torch.arange(size).tensor_split(world)[rank].tolist(), **reading))
    batches = batches or [(torch.empty(0), torch.empty(0, dtype=torch.int64))]  # a part without images
    parts = _from_all_processes([torch.cat(tensors) for tensors in zip(*batches, strict=True)])
    features, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return features, labels


def _batches(
    dataset: Dataset,
    encode: Callable[[Tensor], Tensor],
    part: Sequence[int],
    batch_size: int = 256,
    num_workers: int = 0,
    progress: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features `(B, d)` float32 and labels `(B,)` of the images `part`, in order, on the CPU."""
    check_count("batch_size", batch_size)
    check_count("num_workers", num_workers, 0)
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


def _reduced_size(num_channels: int, height: int, width: int) -> tuple[int, int]:
    """The largest size of the same proportions, up to rounding, with at most `MAX_PIXELS` values."""
    scale = min(1.0, math.sqrt(MAX_PIXELS / (num_channels * height * width)))
    # The small term: 224 * sqrt(3072 / (3 * 224 * 224)) is 32, and must not be rounded down to 31.
    reduced_height = max(1, min(math.floor(height * scale + 1e-6), MAX_PIXELS // num_channels))
    reduced_width = max(1, min(math.floor(width * scale + 1e-6), MAX_PIXELS // (num_channels * reduced_height)))
    return reduced_height, reduced_width
