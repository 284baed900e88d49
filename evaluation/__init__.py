# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""How good representations are: frozen ones, beside a random encoder and raw pixels, and fine-tuned ones."""

from clmae.evaluation.features import extract_features, random_encoder, raw_pixels
from clmae.evaluation.fewshot import few_shot_probe
from clmae.evaluation.finetuning import FinetuningArguments, LinearLarsArguments, finetune
from clmae.evaluation.images import LabelledImages
from clmae.evaluation.knn import knn_euclidean_accuracy, knn_predict
from clmae.evaluation.linear import linear_probe
from clmae.evaluation.metrics import METRICS, metric_folder
from clmae.evaluation.report import EvaluationResult, FewShotProtocol, KNNProtocol, LinearProtocol, evaluate_model

__all__ = [
    "METRICS",
    "EvaluationResult",
    "FewShotProtocol",
    "FinetuningArguments",
    "KNNProtocol",
    "LabelledImages",
    "LinearLarsArguments",
    "LinearProtocol",
    "evaluate_model",
    "extract_features",
    "few_shot_probe",
    "finetune",
    "knn_euclidean_accuracy",
    "knn_predict",
    "linear_probe",
    "metric_folder",
    "random_encoder",
    "raw_pixels",
]
