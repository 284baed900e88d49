# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Judging an encoder by a protocol, always beside its baselines, and writing down how."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import datasets
import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel

from clmae.evaluation.features import (
    LabelledImages,
    default_feature,
    extract_features,
    random_encoder,
    raw_pixels,
)
from clmae.evaluation.knn import CHUNK_SIZE, EUCLIDEAN_K, KS, TEMPERATURE, knn_accuracy, knn_euclidean_accuracy
from clmae.evaluation.linear import L2_GRID, MAX_ITER, VALIDATION_SHARE, linear_probe
from clmae.training.data import AnyDataset, hold_out, load_image_dataset, take_samples

TEST_SHARE = 0.2  # of a data set without a test split


class SplitFeatures(NamedTuple):
    """Features `(n, d)` and labels `(n,)` of a training and a test set."""

    train_features: Tensor
    train_labels: Tensor
    test_features: Tensor
    test_labels: Tensor


# -- protocols ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KNNProtocol:
    """k-NN by cosine and by Euclidean distance; the fields are arguments of the functions in `knn`."""

    name: ClassVar[str] = "knn"
    ks: tuple[int, ...] = KS
    temperature: float = TEMPERATURE
    euclidean_k: int = EUCLIDEAN_K
    chunk_size: int = CHUNK_SIZE

    def score(self, data: SplitFeatures) -> tuple[dict[str, float], dict[str, Any]]:
        """`(accuracies in [0, 1] by name, what else was found)`."""
        references = len(data.train_labels)  # a small set may have fewer than the protocol's neighbours
        ks, euclidean_k = [k for k in self.ks if k <= references] or self.ks, min(self.euclidean_k, references)
        cosine = knn_accuracy(*data, ks=ks, temperature=self.temperature, chunk_size=self.chunk_size)
        euclidean = knn_euclidean_accuracy(*data, k=euclidean_k, chunk_size=self.chunk_size)
        accuracies = {f"k = {k}": accuracy for k, accuracy in cosine.items()}
        accuracies[f"Euclidean, majority of {euclidean_k}"] = euclidean.majority
        accuracies[f"Euclidean, any of {euclidean_k}"] = euclidean.any_correct
        return accuracies, {}


@dataclass(frozen=True)
class LinearProtocol:
    """The fast linear probe; the fields are arguments of [`linear_probe`]."""

    name: ClassVar[str] = "linear"
    l2_grid: tuple[float, ...] = L2_GRID
    validation_share: float = VALIDATION_SHARE
    seed: int = 0
    max_iter: int = MAX_ITER

    def score(self, data: SplitFeatures) -> tuple[dict[str, float], dict[str, Any]]:
        """`(accuracies in [0, 1] by name, what else was found)`."""
        result = linear_probe(*data, **asdict(self))
        validation = {f"{l2:g}": _percent(value) for l2, value in result.validation_accuracies.items()}
        return {"top-1": result.accuracy}, {"l2": result.l2, "validation_accuracies": validation}


Protocol = KNNProtocol | LinearProtocol
PROTOCOLS: dict[str, type[Protocol]] = {protocol.name: protocol for protocol in (KNNProtocol, LinearProtocol)}


# -- results --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationRow:
    """One encoder's scores.

    Attributes:
        name: `"pretrained"`, `"random encoder"` or `"raw pixels"`.
        dimension: Width of the features.
        accuracies: Percent, two decimals, by column.
        details: What else was found: the L2 weight chosen, and the accuracies that chose it.
    """

    name: str
    dimension: int
    accuracies: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of an encoder and its baselines by one protocol.

    Attributes:
        protocol: Its name.
        rows: The encoder first, then the baselines.
        settings: Everything needed to repeat it: parameters, data, model, seeds, versions, date.
    """

    protocol: str
    rows: list[EvaluationRow]
    settings: dict[str, Any]

    def to_markdown(self) -> str:
        """A table with a row for each encoder, in percent."""
        columns = list(self.rows[0].accuracies)
        lines = [["encoder", *columns], ["---", *["---:"] * len(columns)]]
        lines += [[row.name, *(f"{row.accuracies[column]:.2f}" for column in columns)] for row in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def save_json(self, path: str | os.PathLike) -> None:
        """Writes all of it; the file appears complete or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o644)  # mkstemp's files are for their owner alone
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


# -- evaluating -----------------------------------------------------------------------------------------------------


def evaluate_protocols(
    protocols: Sequence[str | Protocol],
    model: PreTrainedModel,
    train: LabelledImages,
    test: LabelledImages,
    *,
    feature: str | None = None,
    baselines: bool = True,
    seed: int = 0,
    batch_size: int = 256,
    num_workers: int = 0,
    bf16: bool = False,
    progress: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, EvaluationResult]:
    """Judges a frozen encoder by several protocols on the same features, beside its baselines.

    Args:
        protocols: Names (`"knn"`, `"linear"`: with default settings) or settings ([`KNNProtocol`] ...).
        model: The encoder, on the device that is to be used.
        train, test: Images with labels; the test set decides nothing.
        feature: As in [`extract_features`].
        baselines: Also judge the same encoder at random initialisation, and raw pixels.
        seed: Of the random encoder.
        batch_size, num_workers, bf16, progress: As in [`extract_features`].
        settings: What else to write into the results: where model and data come from.

    Returns:
        A result for each protocol, by its name.

    Raises:
        ValueError: An unknown protocol, classes that differ between the sets, images that cannot be read, or what a
            protocol asks for is not there.
    """
    chosen = _choose_protocols(protocols)
    if train.class_names and test.class_names and train.class_names != test.class_names:
        raise ValueError(
            f"the classes of the training and the test set differ: {train.class_names[:5]}... and "
            f"{test.class_names[:5]}...; give both the same class names in the same order."
        )
    feature = feature or default_feature(model)
    loading = dict(batch_size=batch_size, num_workers=num_workers, progress=progress)
    rows: dict[str, list[EvaluationRow]] = {protocol.name: [] for protocol in chosen}
    for name, data in _representations(model, train, test, feature, bf16, seed if baselines else None, loading):
        for protocol in chosen:
            accuracies, details = protocol.score(data)
            accuracies = {column: _percent(value) for column, value in accuracies.items()}
            rows[protocol.name].append(EvaluationRow(name, data.train_features.shape[1], accuracies, details))
    common = {
        **(settings or {}),
        **_describe_run(model, train, test),
        "feature": feature,
        "random_encoder_seed": seed if baselines else None,
        "bf16": bf16,
        "batch_size": batch_size,
    }
    return {
        protocol.name: EvaluationResult(protocol.name, rows[protocol.name], {"parameters": asdict(protocol), **common})
        for protocol in chosen
    }


def _representations(
    model: PreTrainedModel,
    train: LabelledImages,
    test: LabelledImages,
    feature: str,
    bf16: bool,
    seed: int | None,
    loading: dict[str, Any],
) -> Iterator[tuple[str, SplitFeatures]]:
    """The encoder's features and, with a seed, those of the baselines; made one after the other, to save memory."""

    def split_features(extract: Callable[[LabelledImages], tuple[Tensor, Tensor]]) -> SplitFeatures:
        return SplitFeatures(*(tensor.to(model.device) for part in (train, test) for tensor in extract(part)))

    def encode(encoder: PreTrainedModel) -> SplitFeatures:
        return split_features(lambda part: extract_features(encoder, part, feature=feature, bf16=bf16, **loading))

    yield "pretrained", encode(model)
    if seed is not None:
        yield "random encoder", encode(random_encoder(model, seed))
        yield "raw pixels", split_features(lambda part: raw_pixels(part, **loading))


def evaluate_model(
    model_path: str | os.PathLike,
    dataset_source: str | os.PathLike | AnyDataset | dict,
    protocols: Sequence[str | Protocol] = ("knn", "linear"),
    train_split: str = "train",
    test_split: str | None = None,
    max_train_samples: int | None = None,
    max_test_samples: int | None = None,
    label_column: str | None = None,
    image_column: str | None = None,
    *,
    config_name: str | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> dict[str, EvaluationResult]:
    """Judges a saved encoder on a data set; `import clmae` first, for this project's families.

    Args:
        model_path: Folder or Hub id of anything that `AutoModel` and `AutoImageProcessor` load.
        dataset_source, config_name, image_column: As in [`load_image_dataset`]; not a stream.
        protocols: As in [`evaluate_protocols`].
        train_split: Split to learn from.
        test_split: Split to be judged on; if not given `"test"` or, where there is none, a fixed random fifth of the
            training split, which is then not learnt from.
        max_train_samples, max_test_samples: At most so many, drawn with a fixed seed.
        label_column: Where the classes are, if there are several such columns.
        device: Where to compute; a GPU if there is one, if not given.
        options: The other arguments of [`evaluate_protocols`].

    Raises:
        ValueError: The data set has no such split or column, and whatever [`evaluate_protocols`] refuses.
    """
    _choose_protocols(protocols)  # a wrong name is reported before anything is loaded
    *splits, tested_on = _load_splits(dataset_source, train_split, test_split, config_name, image_column)
    model = AutoModel.from_pretrained(model_path)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    num_channels = getattr(model.config, "num_channels", 3)
    # The PIL backend equals torchvision's Resize and CenterCrop bit by bit, by which published numbers are made.
    backend = "pil" if num_channels in (1, 3, 4) else "torchvision"
    processor = AutoImageProcessor.from_pretrained(model_path, backend=backend)
    train, test = (
        LabelledImages(
            take_samples(split, most),
            processor,
            image_column=image_column,
            label_column=label_column,
            num_channels=num_channels,
        )
        for split, most in zip(splits, (max_train_samples, max_test_samples), strict=True)
    )
    settings = {
        "model": os.fspath(model_path),
        "dataset": os.fspath(dataset_source) if isinstance(dataset_source, (str, os.PathLike)) else "in memory",
        "dataset_config_name": config_name,
        "train_split": train_split,
        "test_split": tested_on,
        "max_train_samples": max_train_samples,
        "max_test_samples": max_test_samples,
    }
    return evaluate_protocols(protocols, model, train, test, settings=settings, **options)


def _load_splits(
    source: Any, train_split: str, test_split: str | None, config_name: str | None, image_column: str | None
) -> tuple[datasets.Dataset, datasets.Dataset, str]:
    """Training and test images, and what the test images are."""

    def load(option: str, split: str) -> datasets.Dataset:
        try:
            return load_image_dataset(source, split, config_name=config_name, image_column=image_column).dataset
        except ValueError as error:
            raise ValueError(f"{error} (`{option}` chooses the split that is read here.)") from error

    train = load("train_split", train_split)
    if test_split is not None:
        test = load("test_split", test_split)
        # A single data set answers to any split name; tested here, because a limit would make different ones of it.
        if train._fingerprint == test._fingerprint:
            raise ValueError(
                f"`dataset` gives the same images as {train_split!r} and as {test_split!r}, so that the test would be "
                "on what was learnt; leave out `test_split` to hold out a part of them."
            )
        return train, test, test_split
    try:
        test = load("test_split", "test")
    except ValueError:
        test = train  # there is no such split
    if train._fingerprint != test._fingerprint:
        return train, test, "test"
    if len(train) < 2:
        raise ValueError("`dataset` has a single image; give images to learn from, and others to be judged on.")
    return *hold_out(train, TEST_SHARE), f"{TEST_SHARE:.0%} of {train_split}, held out at random"


def _choose_protocols(protocols: Sequence[str | Protocol]) -> list[Protocol]:
    if isinstance(protocols, str) or not protocols:
        raise ValueError(f"`protocols` is {protocols!r}; give a list of some of {', '.join(PROTOCOLS)}.")
    for protocol in protocols:
        if isinstance(protocol, str) and protocol not in PROTOCOLS:
            raise ValueError(f"`protocols` holds {protocol!r}; choose from {', '.join(PROTOCOLS)}.")
    chosen = [PROTOCOLS[protocol]() if isinstance(protocol, str) else protocol for protocol in protocols]
    if len({protocol.name for protocol in chosen}) < len(chosen):
        raise ValueError(f"`protocols` is {list(protocols)!r}; give each protocol once.")
    return chosen


def _percent(share: float) -> float:
    return round(100 * share, 2)


def _describe_run(model: PreTrainedModel, train: LabelledImages, test: LabelledImages) -> dict[str, Any]:
    processor = train.processor
    described = json.loads(processor.to_json_string()) if hasattr(processor, "to_json_string") else {}
    return {
        "model_type": model.config.model_type,
        "num_train": len(train),
        "num_test": len(test),
        "image_column": train.image_column,
        "label_column": train.label_column,
        "image_processor": {**described, "class": type(processor).__name__},
        "device": str(model.device),
        "versions": _versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("clmae", "torch", "transformers", "datasets", "pillow"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None  # used from a checkout that is not installed
    return versions


__all__ = [
    "PROTOCOLS",
    "EvaluationResult",
    "EvaluationRow",
    "KNNProtocol",
    "LinearProtocol",
    "SplitFeatures",
    "evaluate_model",
    "evaluate_protocols",
]
