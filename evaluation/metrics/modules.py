# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The scores as metrics of the `evaluate` library; imported only by those who use that library."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import torch
from torch import Tensor

from clmae.configuration.errors import InputError
from clmae.evaluation.metrics.scores import (
    ClassCounts,
    accuracy,
    class_counts,
    macro_f1,
    mean_per_class_accuracy,
    top_k_accuracy,
)

_INPUTS = """
Args:
    predictions: Scores of the classes, (n, num_classes) floats, or predicted classes, (n,) integers.
    references: True classes, (n,) integers.
"""


class _ClassificationMetric(evaluate.Metric):
    """Takes scores, or classes where these suffice; gives a number in [0, 1] under the metric's own name."""

    def _info(self) -> evaluate.MetricInfo:
        truth = {"references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": datasets.List(datasets.Value("float64")), **truth}),
                datasets.Features({"predictions": datasets.Value("int64"), **truth}),
            ],
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {self.name: self._score(torch.as_tensor(predictions), torch.as_tensor(references))}

    def _score(self, predictions: Tensor, references: Tensor) -> float:
        raise NotImplementedError


def _counts(predictions: Tensor, references: Tensor) -> ClassCounts:
    return class_counts(predictions if predictions.ndim == 1 else predictions.argmax(1), references)


class Top1Accuracy(_ClassificationMetric):
    """Share of the samples whose class is predicted."""

    def _score(self, predictions: Tensor, references: Tensor) -> float:
        return accuracy(_counts(predictions, references)).item()


class Top5Accuracy(_ClassificationMetric):
    """Share of the samples whose class is among the five with the highest scores."""

    def _score(self, predictions: Tensor, references: Tensor) -> float:
        if predictions.ndim == 1:
            raise InputError("`predictions` holds classes, but the top 5 need scores, (n, num_classes): give logits.")
        return top_k_accuracy(predictions, references, 5)


class MeanPerClassAccuracy(_ClassificationMetric):
    """Mean over the classes of the share of their samples that is predicted right."""

    def _score(self, predictions: Tensor, references: Tensor) -> float:
        return mean_per_class_accuracy(_counts(predictions, references)).item()


class MacroF1(_ClassificationMetric):
    """Mean F1 over the classes that have samples or are predicted."""

    def _score(self, predictions: Tensor, references: Tensor) -> float:
        return macro_f1(_counts(predictions, references)).item()


__all__ = ["MacroF1", "MeanPerClassAccuracy", "Top1Accuracy", "Top5Accuracy"]
