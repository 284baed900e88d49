# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Evaluating a frozen encoder by a protocol, beside its baselines; and what is written down of it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import f1_score, recall_score
from torch import Tensor
from transformers import PreTrainedModel
from transformers.hf_argparser import HfArg

from clmae.configuration.errors import InputError
from clmae.evaluation.confidence import INTERVALS, Interval, class_score_intervals, mean_interval, share_interval
from clmae.evaluation.features import default_feature, extract_features, load_encoder, random_encoder, raw_pixels
from clmae.evaluation.fewshot import FEW_SHOT_L2_GRID, NUM_DRAWS, ONE_SHOT_L2, SHOTS, few_shot_probe
from clmae.evaluation.images import LabelledImages, load_labelled_images
from clmae.evaluation.knn import CHUNK_SIZE, EUCLIDEAN_K, KS, TEMPERATURE, knn_euclidean_accuracy, knn_predict
from clmae.evaluation.linear import L2_GRID, MAX_ITER, TOP_K, VALIDATION_SHARE, linear_probe
from clmae.evaluation.metrics.classes import Predictions
from clmae.evaluation.tables import markdown_table
from clmae.model_cards.files import write_whole
from clmae.training.data import AnyDataset


class SplitFeatures(NamedTuple):
    """Features `(n, d)` and labels `(n,)` of a training and a test set."""

    train_features: Tensor
    train_labels: Tensor
    test_features: Tensor
    test_labels: Tensor


# -- protocols ------------------------------------------------------------------------------------------------------


@dataclass
class Scores:
    """What a protocol says of an encoder; all numbers in [0, 1].

    Attributes:
        accuracies, intervals: By column; 95 % intervals, where the accuracy might be with other test images.
        std: Of accuracies that are means over draws, the standard deviation.
        details: Whatever else is to be written down, as JSON.
        predictions: Classes of the test images, `(m,)` int64 on the CPU.
        correct: By column, of each test image whether it is right, `(m,)` in [0, 1] (a mean over draws).
    """

    accuracies: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    std: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    predictions: Tensor | None = None
    correct: dict[str, Tensor] = field(default_factory=dict)

    def add_share(self, column: str, share: float, size: int) -> None:
        """An accuracy of `size` test images."""
        self.accuracies[column], self.intervals[column] = share, share_interval(share, size)

    def add_class_scores(self, references: Tensor, suffix: str = "") -> None:
        """The scores of `predictions` in which every class weighs the same."""
        assert self.predictions is not None
        truth, predicted = references.cpu().numpy(), self.predictions.numpy()
        # As `balanced_accuracy_score`, without its warning where a class is predicted that has no samples.
        recall = recall_score(truth, predicted, labels=np.unique(truth), average="macro", zero_division=0)
        scores = {"mean per class": recall, "macro F1": f1_score(truth, predicted, average="macro", zero_division=0)}
        intervals = class_score_intervals(self.predictions, references)
        self.accuracies |= {column + suffix: float(score) for column, score in scores.items()}
        self.intervals |= {column + suffix: interval for column, interval in intervals.items()}


def classifier_scores(top_classes: Tensor, labels: Tensor, num_classes: int) -> Scores:
    """Top-1, top-5 (of more than five classes), and the scores in which every class weighs the same.

    Args:
        top_classes: `(n, k)` predicted classes, the likeliest first; k is 5, or `num_classes` if that is less.
        labels: `(n,)` classes.
        num_classes: That the classifier tells apart.
    """
    correct = top_classes == labels[:, None]
    scores = Scores(predictions=top_classes[:, 0], correct={"top-1": correct[:, 0]})
    scores.add_share("top-1", correct[:, 0].double().mean().item(), len(labels))
    if num_classes > TOP_K:
        scores.add_share(f"top-{TOP_K}", correct.any(1).double().mean().item(), len(labels))
    scores.add_class_scores(labels)
    return scores


@dataclass(frozen=True)
class KNNProtocol:
    """k-NN by cosine and by Euclidean distance; the fields are arguments of the functions in `knn`."""

    name: ClassVar[str] = "knn"
    selected_on: ClassVar[None] = None  # all is fixed beforehand
    ks: tuple[int, ...] = HfArg(default=KS, help="Numbers of neighbours, by cosine similarity.")
    temperature: float = HfArg(default=TEMPERATURE, help="A neighbour's vote is exp(similarity / this).")
    euclidean_k: int = HfArg(default=EUCLIDEAN_K, help="Number of neighbours, by Euclidean distance.")
    chunk_size: int = HfArg(default=CHUNK_SIZE, help="Test images at a time; memory is this times the training images.")

    def score(self, data: SplitFeatures) -> Scores:
        """Accuracy for each k, with the class scores for the largest."""
        references, queries = len(data.train_labels), len(data.test_labels)
        # A small set may have fewer than the protocol's neighbours.
        ks, euclidean_k = [k for k in self.ks if k <= references] or self.ks, min(self.euclidean_k, references)
        predictions = knn_predict(*data[:3], ks=ks, temperature=self.temperature, chunk_size=self.chunk_size)
        scores = Scores(predictions=predictions[max(ks)].cpu())
        for k, classes in predictions.items():
            correct = torch.eq(classes, data.test_labels.to(classes.device))
            scores.add_share(f"k = {k}", correct.double().mean().item(), queries)
            if k == max(ks):
                scores.correct[f"k = {k}"] = correct
        euclidean = knn_euclidean_accuracy(*data, k=euclidean_k, chunk_size=self.chunk_size)
        scores.add_share(f"Euclidean, majority of {euclidean_k}", euclidean.majority, queries)
        scores.add_share(f"Euclidean, any of {euclidean_k}", euclidean.any_correct, queries)
        scores.add_class_scores(data.test_labels, f", k = {max(ks)}")
        return scores


@dataclass(frozen=True)
class LinearProtocol:
    """The fast linear probe; the fields are arguments of [`linear_probe`]."""

    name: ClassVar[str] = "linear"
    l2_grid: tuple[float, ...] = HfArg(default=L2_GRID, help="L2 weights to choose from.")
    validation_share: float = HfArg(
        default=VALIDATION_SHARE, help="Share of each training class by which the L2 weight is chosen."
    )
    seed: int = 0
    max_iter: int = HfArg(default=MAX_ITER, help="Most L-BFGS iterations for an L2 weight.")

    @property
    def selected_on(self) -> dict[str, Any]:
        """What the L2 weight is chosen on."""
        return {"split": "train", "share_of_each_class": self.validation_share, "seed": self.seed}

    def score(self, data: SplitFeatures) -> Scores:
        """As [`classifier_scores`], with the L2 weight and the accuracies that chose it."""
        result = linear_probe(*data, **asdict(self))
        scores = classifier_scores(result.top_classes, data.test_labels.cpu(), len(data.train_labels.unique()))
        validation = {f"{l2:g}": _percent(value) for l2, value in result.validation_accuracies.items()}
        scores.details = {"l2": result.l2, "validation_accuracies": validation}
        return scores


@dataclass(frozen=True)
class FewShotProtocol:
    """The few-shot probe; the fields are arguments of [`few_shot_probe`]."""

    name: ClassVar[str] = "fewshot"
    shots: tuple[int, ...] = HfArg(
        default=SHOTS, help="Numbers of labelled images per class; skipped if the smallest class has less."
    )
    num_draws: int = HfArg(default=NUM_DRAWS, help="How often the labelled images are drawn.")
    l2_grid: tuple[float, ...] = HfArg(default=FEW_SHOT_L2_GRID, help="L2 weights to choose from.")
    one_shot_l2: float = HfArg(default=ONE_SHOT_L2, help="L2 weight for one image per class.")
    seed: int = 0
    max_iter: int = HfArg(default=MAX_ITER, help="Most L-BFGS iterations for an L2 weight.")

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
        scores = Scores(details={"draws": {}, "l2": {}, "seeds": result.seeds, "skipped": result.skipped})
        for n, accuracies in result.accuracies.items():
            column = f"n = {n}"
            scores.accuracies[column] = float(np.mean(accuracies))
            scores.std[column] = float(np.std(accuracies, ddof=min(1, len(accuracies) - 1)))
            scores.intervals[column] = mean_interval(result.correct[n])
            scores.correct[column] = result.correct[n]
            scores.details["draws"][column] = [_percent(accuracy) for accuracy in accuracies]
            scores.details["l2"][column] = result.l2[n]
        return scores


Protocol = KNNProtocol | LinearProtocol | FewShotProtocol
PROTOCOLS: dict[str, type[Protocol]] = {
    protocol.name: protocol for protocol in (KNNProtocol, LinearProtocol, FewShotProtocol)
}


# -- results --------------------------------------------------------------------------------------------------------


def _percent(share: float) -> float:
    return round(100 * share, 2)


@dataclass(frozen=True)
class EvaluationRow:
    """One encoder's scores; accuracies, intervals and standard deviations by column, in percent with two decimals.

    Attributes:
        name: `"pretrained"`, or that of a baseline: `"random encoder"`, `"raw pixels"`, `"from scratch"`.
        dimension: Width of the features.
        accuracies, details, intervals, std: See [`Scores`].
        differences: Of a baseline, by column: by how many points the encoder is better on the same test images, and the
            ends of the 95 % interval of that (bootstrap over the images).
    """

    name: str
    dimension: int
    accuracies: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)
    std: dict[str, float] = field(default_factory=dict)
    differences: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def from_scores(cls, name: str, dimension: int, scores: Scores) -> EvaluationRow:
        """Scores in [0, 1] as a row in percent."""
        return cls(
            name,
            dimension,
            {column: _percent(value) for column, value in scores.accuracies.items()},
            scores.details,
            {column: [_percent(low), _percent(high)] for column, (low, high) in scores.intervals.items()},
            {column: _percent(value) for column, value in scores.std.items()},
        )

    def compare(self, encoder: Scores, baseline: Scores) -> None:
        """Fills in `differences`; this is the row of `baseline`."""
        for column, correct in encoder.correct.items():
            difference = correct.double() - baseline.correct[column].double()
            low, high = mean_interval(difference)
            self.differences[column] = [_percent(value) for value in (difference.mean().item(), low, high)]

    def cell(self, column: str) -> str:
        """`"52.6 ± 0.4 [51.6, 53.6]"`: accuracy, standard deviation and interval, as far as there are such."""
        if column not in self.intervals:
            return f"{self.accuracies[column]:.2f}"
        spread = f" ± {self.std[column]:.1f}" if column in self.std else ""
        low, high = self.intervals[column]
        return f"{self.accuracies[column]:.1f}{spread} [{low:.1f}, {high:.1f}]"


@dataclass
class EvaluationResult:
    """Scores of an encoder and its baselines by one protocol.

    Attributes:
        protocol: Its name.
        rows: The encoder first, then the baselines.
        settings: Everything needed to repeat it: parameters, data, model, seeds, versions, date.
        predictions, scores: The encoder's, for tables by class and for differences; not in the JSON file.
    """

    protocol: str
    rows: list[EvaluationRow]
    settings: dict[str, Any]
    predictions: Predictions | None = field(default=None, repr=False, compare=False)
    scores: Scores | None = field(default=None, repr=False, compare=False)

    def add_row(self, name: str, dimension: int, scores: Scores) -> None:
        """The encoder's row, if it is the first, or a baseline's, which is compared with it."""
        self.rows.append(EvaluationRow.from_scores(name, dimension, scores))
        if self.scores is None:
            self.scores = scores
        else:
            self.rows[-1].compare(self.scores, scores)

    def to_markdown(self) -> str:
        """A table with a row for each encoder, in percent."""
        cells = [{"encoder": row.name, **{c: row.cell(c) for c in self.rows[0].accuracies}} for row in self.rows]
        return markdown_table(pd.DataFrame(cells)).rstrip("\n")

    def differences_to_markdown(self) -> str:
        """A line for each baseline: how much better the encoder is on the same images, with the 95 % interval."""
        return "".join(
            f"- {self.rows[0].name} less {row.name}, {column}: {value:+.1f} points [{low:+.1f}, {high:+.1f}]\n"
            for row in self.rows
            for column, (value, low, high) in row.differences.items()
        )

    def save_json(self, path: str | os.PathLike) -> None:
        """Writes all of it; the file appears complete or not at all."""
        content = {"protocol": self.protocol, "rows": [asdict(row) for row in self.rows], "settings": self.settings}
        write_whole(path, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def save_class_files(self, json_path: str | os.PathLike) -> list[Path]:
        """Writes tables by class and a confusion matrix beside a JSON file, if the protocol predicts classes.

        For `out.json`: `out-classes.csv`, `out-confusion.csv` and `out-confusion.png`. Returns the paths written.
        """
        return [] if self.predictions is None else self.predictions.save(Path(json_path).with_suffix(""))


# -- evaluating -----------------------------------------------------------------------------------------------------


def evaluate_model(
    model_path: str | os.PathLike,
    dataset_source: str | os.PathLike | AnyDataset | dict,
    protocols: Sequence[str | Protocol] = ("knn", "linear"),
    *,
    feature: str | None = None,
    layer: int | None = None,
    bf16: bool = False,
    baselines: bool = True,
    seed: int = 0,
    device: torch.device | str | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
    **images: Any,
) -> dict[str, EvaluationResult]:
    """Evaluates a saved, frozen encoder by several protocols on the same features, beside its baselines.

    `import clmae` first, for this project's families.

    Args:
        model_path: Folder or Hub id of anything that `AutoModel` and `AutoImageProcessor` load.
        dataset_source, images: As in [`load_labelled_images`].
        protocols: Names (`"knn"`, `"linear"`, `"fewshot"`: with default settings) or settings ([`KNNProtocol`] ...).
        feature, layer, bf16, batch_size, num_workers, cache_dir, progress: As in [`extract_features`]; raw pixels are
            cached as well.
        baselines: Also evaluate the same encoder at random initialisation, and raw pixels.
        seed: Of the random encoder.
        device: Where to compute; a GPU if there is one, if not given.

    Returns:
        A result for each protocol, by its name.

    Raises:
        InputError: There is no such model, an unknown protocol, images that cannot be read, or what a protocol asks
            for is not there.
    """
    chosen = _choose_protocols(protocols)  # what is wrong is reported before anything is loaded
    train, test, settings = load_labelled_images(model_path, dataset_source, **images)
    model = load_encoder(model_path)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    feature = feature or default_feature(model, layer)
    reading = dict(batch_size=batch_size, num_workers=num_workers, cache_dir=cache_dir, progress=progress)

    def encode(encoder: PreTrainedModel) -> SplitFeatures:
        return split(lambda part: extract_features(encoder, part, feature=feature, layer=layer, bf16=bf16, **reading))

    def split(extract: Callable[[LabelledImages], tuple[Tensor, Tensor]]) -> SplitFeatures:
        return SplitFeatures(*(tensor.to(model.device) for part in (train, test) for tensor in extract(part)))

    representations = {"pretrained": lambda: encode(model)}  # made one after the other, to save memory
    if baselines:
        representations["random encoder"] = lambda: encode(random_encoder(model, seed))
        representations["raw pixels"] = lambda: split(lambda part: raw_pixels(part, **reading))
    settings |= describe_run(model, train, test)
    settings |= dict(feature=feature, layer=layer, random_encoder_seed=seed if baselines else None)
    settings |= dict(bf16=bf16, batch_size=batch_size, intervals=INTERVALS)
    results = {protocol.name: _empty_result(protocol, settings) for protocol in chosen}
    for name, represent in representations.items():
        data = represent()
        for protocol in chosen:
            scores, result = protocol.score(data), results[protocol.name]
            result.add_row(name, data.train_features.shape[1], scores)
            if scores.predictions is not None and name == "pretrained":
                result.predictions = Predictions(scores.predictions, test.labels, train.class_names)
    return results


def _empty_result(protocol: Protocol, settings: dict[str, Any]) -> EvaluationResult:
    settings = {"parameters": asdict(protocol), "selected_on": protocol.selected_on, **settings}
    return EvaluationResult(protocol.name, [], settings)


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


def describe_run(model: PreTrainedModel, train: LabelledImages, test: LabelledImages) -> dict[str, Any]:
    """What is written down of model and data, with versions and date, as JSON has it."""
    processor = train.processor
    described = json.loads(processor.to_json_string()) if hasattr(processor, "to_json_string") else {}
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("clmae", "torch", "transformers", "datasets", "numpy", "pillow"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None  # used from a checkout that is not installed
    return {
        "model_type": model.config.model_type,
        "num_train": len(train),
        "num_test": len(test),
        "image_column": train.image_column,
        "label_column": train.label_column,
        "image_processor": {**described, "class": type(processor).__name__},
        "device": str(model.device),
        "versions": versions,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
