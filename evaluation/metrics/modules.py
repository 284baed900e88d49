# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""scikit-learn's scores as metrics of the `evaluate` library, whose import takes seconds: import this where needed."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, f1_score, recall_score

from clmae.configuration.errors import InputError

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
        predictions, references = np.asarray(predictions), np.asarray(references)
        if not np.isfinite(predictions).all():
            raise InputError("`predictions` holds NaN or infinity; look at the classifier's weights.")
        if references.min() < 0 or (predictions.ndim == 1 and predictions.min() < 0):
            raise InputError(
                "`predictions` and `references` must hold class numbers from 0; leave out unlabelled samples."
            )
        return {self.name: float(self._score(predictions, references))}

    def _score(self, predictions: np.ndarray, references: np.ndarray) -> float:
        raise NotImplementedError


def _classes(predictions: np.ndarray) -> np.ndarray:
    return predictions if predictions.ndim == 1 else predictions.argmax(1)


class Top1Accuracy(_ClassificationMetric):
    """Share of the samples whose class is predicted."""

    def _score(self, predictions: np.ndarray, references: np.ndarray) -> float:
        return accuracy_score(references, _classes(predictions))


class Top5Accuracy(_ClassificationMetric):
    """Share of the samples whose class is among the five with the highest scores; of equal scores the last count."""

    def _score(self, predictions: np.ndarray, references: np.ndarray) -> float:
        if predictions.ndim == 1 or predictions.shape[1] < 5:
            raise InputError(
                f"`predictions` has shape {predictions.shape}, but the top 5 need scores of at least five classes, "
                "(n, num_classes): give logits."
            )
        # Not `top_k_accuracy_score`, which refuses a class that has no score: it is an error of the classifier.
        best = np.argsort(predictions, axis=1, kind="stable")[:, -5:]
        return (best == references[:, None]).any(1).mean()


class MeanPerClassAccuracy(_ClassificationMetric):
    """Mean over the classes that have samples of the share of their samples that is predicted right."""

    def _score(self, predictions: np.ndarray, references: np.ndarray) -> float:
        # As `balanced_accuracy_score`, without its warning where a class is predicted that has no samples.
        return recall_score(references, _classes(predictions), labels=np.unique(references), average="macro")


class MacroF1(_ClassificationMetric):
    """Mean F1 over the classes that have samples or are predicted."""

    def _score(self, predictions: np.ndarray, references: np.ndarray) -> float:
        return f1_score(references, _classes(predictions), average="macro")
