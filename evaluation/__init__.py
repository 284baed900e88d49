# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""How good frozen representations are: k-NN and linear probe, beside a random encoder and raw pixels."""

from clmae.evaluation.features import LabelledImages, extract_features, random_encoder, raw_pixels
from clmae.evaluation.knn import EuclideanKNNResult, knn_accuracy, knn_euclidean_accuracy, knn_predict
from clmae.evaluation.linear import LinearProbeResult, linear_probe
from clmae.evaluation.report import (
    EvaluationResult,
    EvaluationRow,
    KNNProtocol,
    LinearProtocol,
    evaluate_model,
    evaluate_protocols,
)

__all__ = [
    "EuclideanKNNResult",
    "EvaluationResult",
    "EvaluationRow",
    "KNNProtocol",
    "LabelledImages",
    "LinearProbeResult",
    "LinearProtocol",
    "evaluate_model",
    "evaluate_protocols",
    "extract_features",
    "knn_accuracy",
    "knn_euclidean_accuracy",
    "knn_predict",
    "linear_probe",
    "random_encoder",
    "raw_pixels",
]
