# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Judging an encoder by a protocol, always beside its baselines, and writing down how."""

from __future__ import annotations

import json
import os
import platform
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

from clmae.configuration.errors import InputError
from clmae.evaluation.confidence import (
    LEVEL,
    NUM_RESAMPLES,
    Interval,
    class_score_intervals,
    mean_interval,
    share_interval,
)
from clmae.evaluation.features import (
    LabelledImages,
    default_feature,
    extract_features,
    find_class_column,
    random_encoder,
    raw_pixels,
)
from clmae.evaluation.fewshot import FEW_SHOT_L2_GRID, NUM_DRAWS, ONE_SHOT_L2, SHOTS, few_shot_probe
from clmae.evaluation.knn import CHUNK_SIZE, EUCLIDEAN_K, KS, TEMPERATURE, knn_euclidean_accuracy, knn_predict
from clmae.evaluation.linear import L2_GRID, MAX_ITER, VALIDATION_SHARE, linear_probe, stratified_part
from clmae.evaluation.metrics.classes import Predictions
from clmae.evaluation.metrics.scores import accuracy, class_counts, macro_f1, mean_per_class_accuracy
from clmae.model_cards.files import write_whole
from clmae.model_cards.run import read_model_config
from clmae.training.data import AnyDataset, load_image_dataset, take_samples

TEST_SHARE = 0.2  # of a data set without a test split
TOP_K = 5
INTERVALS = {
    "method": "percentile bootstrap over the test images",
    "level": LEVEL,
    "resamples": NUM_RESAMPLES,
    "seed": 0,
}


class SplitFeatures(NamedTuple):
    """Features `(n, d)` and labels `(n,)` of a training and a test set."""

    train_features: Tensor
    train_labels: Tensor
    test_features: Tensor
    test_labels: Tensor


# -- protocols ------------------------------------------------------------------------------------------------------


@dataclass
class Scores:
    """What a protocol says of features; all numbers in [0, 1].

    Attributes:
        accuracies: By column.
        intervals: Where each might have been with other test images (95 %).
        std: Of accuracies that are means over draws, the standard deviation.
        details: What else was found, as JSON.
        predictions: Classes of the test images, `(m,)` int64 on the CPU.
    """

    accuracies: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    std: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    predictions: Tensor | None = None

    def add_share(self, column: str, share: float, size: int) -> None:
        """An accuracy of `size` test images."""
        self.accuracies[column], self.intervals[column] = share, share_interval(share, size)

    def add_class_scores(self, references: Tensor, suffix: str = "") -> None:
        """The scores of `predictions` in which every class weighs the same."""
        references = references.cpu()
        counts = class_counts(self.predictions, references)
        scores = {f"mean per class{suffix}": mean_per_class_accuracy, f"macro F1{suffix}": macro_f1}
        self.accuracies |= {column: score(counts).item() for column, score in scores.items()}
        self.intervals |= class_score_intervals(self.predictions, references, scores)


@dataclass(frozen=True)
class KNNProtocol:
    """k-NN by cosine and by Euclidean distance; the fields are arguments of the functions in `knn`."""

    name: ClassVar[str] = "knn"
    ks: tuple[int, ...] = field(default=KS, metadata={"help": "Numbers of neighbours, by cosine similarity."})
    temperature: float = field(default=TEMPERATURE, metadata={"help": "A neighbour's vote is exp(similarity / this)."})
    euclidean_k: int = field(default=EUCLIDEAN_K, metadata={"help": "Number of neighbours, by Euclidean distance."})
    chunk_size: int = field(
        default=CHUNK_SIZE, metadata={"help": "Test images at a time; memory is this times the training images."}
    )

    @property
    def selected_on(self) -> None:
        """Nothing is chosen: all is fixed beforehand."""

    def score(self, data: SplitFeatures) -> Scores:
        """Accuracy for each k, with the class scores for the largest."""
        references, queries = len(data.train_labels), len(data.test_labels)
        # A small set may have fewer than the protocol's neighbours.
        ks, euclidean_k = [k for k in self.ks if k <= references] or self.ks, min(self.euclidean_k, references)
        predictions = knn_predict(*data[:3], ks=ks, temperature=self.temperature, chunk_size=self.chunk_size)
        scores = Scores()
        for k, found in predictions.items():
            counts = class_counts(found.cpu(), data.test_labels.cpu())
            scores.add_share(f"k = {k}", accuracy(counts).item(), queries)
        euclidean = knn_euclidean_accuracy(*data, k=euclidean_k, chunk_size=self.chunk_size)
        scores.add_share(f"Euclidean, majority of {euclidean_k}", euclidean.majority, queries)
        scores.add_share(f"Euclidean, any of {euclidean_k}", euclidean.any_correct, queries)
        scores.predictions = predictions[max(ks)].cpu()
        scores.add_class_scores(data.test_labels, f", k = {max(ks)}")
        return scores


@dataclass(frozen=True)
class LinearProtocol:
    """The fast linear probe; the fields are arguments of [`linear_probe`]."""

    name: ClassVar[str] = "linear"
    l2_grid: tuple[float, ...] = field(default=L2_GRID, metadata={"help": "L2 weights to choose from."})
    validation_share: float = field(
        default=VALIDATION_SHARE, metadata={"help": "Share of each training class by which the L2 weight is chosen."}
    )
    seed: int = 0
    max_iter: int = field(default=MAX_ITER, metadata={"help": "Most L-BFGS iterations for an L2 weight."})

    @property
    def selected_on(self) -> dict[str, Any]:
        """What the L2 weight is chosen on."""
        return {"split": "train", "share_of_each_class": self.validation_share, "seed": self.seed}

    def score(self, data: SplitFeatures) -> Scores:
        """Top-1, top-5 (of more than five classes) and the class scores; the L2 weight, and what chose it."""
        result = linear_probe(*data, **asdict(self))
        validation = {f"{l2:g}": _percent(value) for l2, value in result.validation_accuracies.items()}
        details = {"l2": result.l2, "validation_accuracies": validation}
        scores = Scores(predictions=result.predictions, details=details)
        scores.add_share("top-1", result.accuracy, result.n_test)
        if len(data.train_labels.unique()) > TOP_K:
            scores.add_share(f"top-{TOP_K}", (result.ranks < TOP_K).double().mean().item(), result.n_test)
        scores.add_class_scores(data.test_labels)
        return scores


@dataclass(frozen=True)
class FewShotProtocol:
    """The few-shot probe; the fields are arguments of [`few_shot_probe`]."""

    name: ClassVar[str] = "fewshot"
    shots: tuple[int, ...] = field(
        default=SHOTS, metadata={"help": "Numbers of labelled images a class; skipped if the smallest class has less."}
    )
    num_draws: int = field(default=NUM_DRAWS, metadata={"help": "How often the labelled images are drawn."})
    l2_grid: tuple[float, ...] = field(default=FEW_SHOT_L2_GRID, metadata={"help": "L2 weights to choose from."})
    one_shot_l2: float = field(default=ONE_SHOT_L2, metadata={"help": "L2 weight for one image a class."})
    seed: int = 0
    max_iter: int = field(default=MAX_ITER, metadata={"help": "Most L-BFGS iterations for an L2 weight."})

    @property
    def selected_on(self) -> dict[str, Any]:
        """What the L2 weight is chosen on."""
        return {
            "split": "train",
            "images": "those drawn, by cross-validation",
            "seeds": [self.seed + draw for draw in range(self.num_draws)],
            "one image a class": f"nothing, the L2 weight is {self.one_shot_l2:g}",
        }

    def score(self, data: SplitFeatures) -> Scores:
        """Mean top-1 over the draws for each number of images, with its standard deviation."""
        result = few_shot_probe(*data, **asdict(self))

        def columns(found: Mapping[int, Any]) -> dict[str, Any]:
            return {f"n = {n}": value for n, value in found.items()}

        return Scores(
            accuracies=columns(result.mean),
            intervals=columns({n: mean_interval(correct) for n, correct in result.correct.items()}),
            std=columns(result.std),
            details={
                "draws": columns({n: [_percent(value) for value in found] for n, found in result.accuracies.items()}),
                "l2": columns(result.l2),
                "seeds": result.seeds,
                "skipped": result.skipped,
            },
        )


Protocol = KNNProtocol | LinearProtocol | FewShotProtocol
PROTOCOLS: dict[str, type[Protocol]] = {
    protocol.name: protocol for protocol in (KNNProtocol, LinearProtocol, FewShotProtocol)
}


# -- results --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationRow:
    """One encoder's scores.

    Attributes:
        name: `"pretrained"`, `"random encoder"` or `"raw pixels"`.
        dimension: Width of the features.
        accuracies: Percent, two decimals, by column.
        details: What else was found: the L2 weight chosen, and the accuracies that chose it.
        intervals: Percent, two decimals, by column: 95 % intervals, from other draws of the test images.
        std: Percent, two decimals: standard deviation over the draws of the training images, where there are several.
    """

    name: str
    dimension: int
    accuracies: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    std: dict[str, float] = field(default_factory=dict)

    def cell(self, column: str) -> str:
        """`"52.6 ± 0.4 [51.6, 53.6]"`: accuracy, standard deviation and interval, as far as there are such."""
        if column not in self.intervals:
            return f"{self.accuracies[column]:.2f}"
        spread = f" ± {self.std[column]:.1f}" if column in self.std else ""
        low, high = self.intervals[column]
        return f"{self.accuracies[column]:.1f}{spread} [{low:.1f}, {high:.1f}]"


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of an encoder and its baselines by one protocol.

    Attributes:
        protocol: Its name.
        rows: The encoder first, then the baselines.
        settings: Everything needed to repeat it: parameters, data, model, seeds, versions, date.
        predictions: The encoder's, for tables by class; not in the JSON file.
    """

    protocol: str
    rows: list[EvaluationRow]
    settings: dict[str, Any]
    predictions: Predictions | None = field(default=None, repr=False, compare=False)

    def to_markdown(self) -> str:
        """A table with a row for each encoder, in percent."""
        columns = list(self.rows[0].accuracies)
        lines = [["encoder", *columns], ["---", *["---:"] * len(columns)]]
        lines += [[row.name, *(row.cell(column) for column in columns)] for row in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def save_json(self, path: str | os.PathLike) -> None:
        """Writes all of it; the file appears complete or not at all."""
        content = {
            "protocol": self.protocol,
            "rows": [asdict(row) for row in self.rows],
            "settings": self.settings,
        }
        write_whole(path, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def save_class_files(self, json_path: str | os.PathLike) -> list[Path]:
        """Writes tables by class and a confusion matrix beside a JSON file, if the protocol predicts classes.

        For `out.json`: `out-classes.csv`, `out-confusion.csv` and `out-confusion.png`. Returns the paths written.
        """
        return [] if self.predictions is None else self.predictions.save(Path(json_path).with_suffix(""))


# -- evaluating -----------------------------------------------------------------------------------------------------


def evaluate_protocols(
    protocols: Sequence[str | Protocol],
    model: PreTrainedModel,
    train: LabelledImages,
    test: LabelledImages,
    *,
    feature: str | None = None,
    layer: int | None = None,
    baselines: bool = True,
    seed: int = 0,
    batch_size: int = 256,
    num_workers: int = 0,
    bf16: bool = False,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, EvaluationResult]:
    """Judges a frozen encoder by several protocols on the same features, beside its baselines.

    Args:
        protocols: Names (`"knn"`, `"linear"`, `"fewshot"`: with default settings) or settings ([`KNNProtocol`] ...).
        model: The encoder, on the device that is to be used.
        train, test: Images with labels; the test set decides nothing.
        feature, layer: As in [`extract_features`].
        baselines: Also judge the same encoder at random initialisation, and raw pixels.
        seed: Of the random encoder.
        batch_size, num_workers, bf16, cache_dir, progress: As in [`extract_features`]; raw pixels are kept as well.
        settings: What else to write into the results: where model and data come from.

    Returns:
        A result for each protocol, by its name.

    Raises:
        InputError: An unknown protocol, classes that differ between the sets, images that cannot be read, or what a
            protocol asks for is not there.
    """
    chosen = _choose_protocols(protocols)
    check_same_classes(train, test)
    feature = feature or default_feature(model, layer)
    loading = dict(batch_size=batch_size, num_workers=num_workers, cache_dir=cache_dir, progress=progress)
    encoding = dict(feature=feature, layer=layer, bf16=bf16, **loading)
    rows: dict[str, list[EvaluationRow]] = {protocol.name: [] for protocol in chosen}
    predictions: dict[str, Predictions] = {}
    for name, data in _representations(model, train, test, seed if baselines else None, encoding, loading):
        for protocol in chosen:
            scores = protocol.score(data)
            rows[protocol.name].append(make_row(name, data.train_features.shape[1], scores))
            if scores.predictions is not None and protocol.name not in predictions:  # the encoder comes first
                predictions[protocol.name] = Predictions(scores.predictions, test.labels, train.class_names)
    common = {
        **(settings or {}),
        **describe_run(model, train, test),
        "feature": feature,
        "layer": layer,
        "random_encoder_seed": seed if baselines else None,
        "bf16": bf16,
        "batch_size": batch_size,
        "intervals": INTERVALS,
    }
    return {
        protocol.name: EvaluationResult(
            protocol.name,
            rows[protocol.name],
            {"parameters": asdict(protocol), "selected_on": protocol.selected_on, **common},
            predictions.get(protocol.name),
        )
        for protocol in chosen
    }


def make_row(name: str, dimension: int, scores: Scores) -> EvaluationRow:
    """Scores in [0, 1] as a row in percent; `dimension` is the width of the features."""
    return EvaluationRow(
        name,
        dimension,
        {column: _percent(value) for column, value in scores.accuracies.items()},
        scores.details,
        {column: (_percent(low), _percent(high)) for column, (low, high) in scores.intervals.items()},
        {column: _percent(value) for column, value in scores.std.items()},
    )


def check_same_classes(train: LabelledImages, test: LabelledImages) -> None:
    """InputError unless both have the same class names in the same order, or none."""
    if train.class_names != test.class_names:
        found = [names and names[:5] for names in (train.class_names, test.class_names)]
        raise InputError(
            f"the classes of the training and the test set differ: {found[0] or 'numbers'}... and "
            f"{found[1] or 'numbers'}...; give both the same class names in the same order."
        )


def _representations(
    model: PreTrainedModel,
    train: LabelledImages,
    test: LabelledImages,
    seed: int | None,
    encoding: dict[str, Any],
    loading: dict[str, Any],
) -> Iterator[tuple[str, SplitFeatures]]:
    """The encoder's features and, with a seed, those of the baselines; made one after the other, to save memory."""

    def split_features(extract: Callable[[LabelledImages], tuple[Tensor, Tensor]]) -> SplitFeatures:
        return SplitFeatures(*(tensor.to(model.device) for part in (train, test) for tensor in extract(part)))

    def encode(encoder: PreTrainedModel) -> SplitFeatures:
        return split_features(lambda part: extract_features(encoder, part, **encoding))

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
        test_split: Split to be judged on; if not given `"test"` or, where there is none, a fixed random fifth of each
            class of the training split, which is then not learnt from.
        max_train_samples, max_test_samples: At most so many, drawn with a fixed seed.
        label_column: Where the classes are, if there are several such columns.
        device: Where to compute; a GPU if there is one, if not given.
        options: The other arguments of [`evaluate_protocols`].

    Raises:
        InputError: There is no such model, the data set has no such split or column, and whatever
            [`evaluate_protocols`] refuses.
    """
    _choose_protocols(protocols)  # what is wrong is reported before anything is loaded
    read_model_config(model_path)
    *splits, tested_on = load_splits(dataset_source, train_split, test_split, config_name, image_column, label_column)
    model = AutoModel.from_pretrained(model_path)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    num_channels = getattr(model.config, "num_channels", 3)
    # The PIL backend equals torchvision's Resize and CenterCrop bit by bit, by which published numbers are made.
    backend = "pil" if num_channels in (1, 3, 4) else "torchvision"
    processor = AutoImageProcessor.from_pretrained(model_path, backend=backend)
    columns = dict(image_column=image_column, label_column=label_column, num_channels=num_channels)
    train = LabelledImages(take_samples(splits[0], max_train_samples), processor, **columns)
    # A test set of words is numbered as the training set, without whose names it cannot be.
    class_names = train.class_names or ()
    test = LabelledImages(take_samples(splits[1], max_test_samples), processor, class_names=class_names, **columns)
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


def load_splits(
    source: Any,
    train_split: str,
    test_split: str | None,
    config_name: str | None,
    image_column: str | None,
    label_column: str | None = None,
) -> tuple[datasets.Dataset, datasets.Dataset, str]:
    """Training and test images, and what the test images are; the arguments are those of [`evaluate_model`].

    Raises:
        InputError: There is no such split, both are the same images, or none can be held out.
    """

    def load(option: str, split: str) -> datasets.Dataset:
        try:
            return load_image_dataset(source, split, config_name=config_name, image_column=image_column).dataset
        except InputError as error:
            raise InputError(f"{error} (`{option}` chooses the split that is read here.)") from error

    train = load("train_split", train_split)
    if test_split is not None:
        test = load("test_split", test_split)
        # A single data set answers to any split name; tested here, because a limit would make different ones of it.
        if train._fingerprint == test._fingerprint:
            raise InputError(
                f"`dataset` gives the same images as {train_split!r} and as {test_split!r}, so that the test would be "
                "on what was learnt; leave out `test_split` to hold out a part of them."
            )
        return train, test, test_split
    try:
        test = load("test_split", "test")
    except InputError:
        test = train  # there is no such split
    if train._fingerprint != test._fingerprint:
        return train, test, "test"
    words = train.select_columns([find_class_column(train, label_column)]).with_format(None)[:].popitem()[1]
    number = {word: i for i, word in enumerate(dict.fromkeys(words))}
    held_out = stratified_part(torch.tensor([number[word] for word in words], dtype=torch.int64), TEST_SHARE, seed=0)
    if not held_out.any():
        raise InputError(
            "`dataset` has a single image of each class; give images to learn from, and others to be judged on."
        )
    parts = (train.select(torch.nonzero(part).flatten().numpy()) for part in (~held_out, held_out))
    return *parts, f"{TEST_SHARE:.0%} of each class of {train_split}, held out at random"


def _choose_protocols(protocols: Sequence[str | Protocol]) -> list[Protocol]:
    if isinstance(protocols, str) or not protocols:
        raise InputError(f"`protocols` is {protocols!r}; give a list of some of {', '.join(PROTOCOLS)}.")
    for protocol in protocols:
        if isinstance(protocol, str) and protocol not in PROTOCOLS:
            raise InputError(f"`protocols` holds {protocol!r}; choose from {', '.join(PROTOCOLS)}.")
    chosen = [PROTOCOLS[protocol]() if isinstance(protocol, str) else protocol for protocol in protocols]
    if len({protocol.name for protocol in chosen}) < len(chosen):
        raise InputError(f"`protocols` is {list(protocols)!r}; give each protocol once.")
    return chosen


def _percent(share: float) -> float:
    return round(100 * share, 2)


def describe_run(model: PreTrainedModel, train: LabelledImages, test: LabelledImages) -> dict[str, Any]:
    """What is written down of model and data, with versions and date, as JSON has it."""
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
    for package in ("clmae", "torch", "transformers", "datasets", "numpy", "pillow"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None  # used from a checkout that is not installed
    return versions


__all__ = [
    "INTERVALS",
    "PROTOCOLS",
    "TOP_K",
    "EvaluationResult",
    "EvaluationRow",
    "FewShotProtocol",
    "KNNProtocol",
    "LinearProtocol",
    "Scores",
    "SplitFeatures",
    "check_same_classes",
    "describe_run",
    "evaluate_model",
    "evaluate_protocols",
    "load_splits",
    "make_row",
]
