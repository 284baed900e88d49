# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The protocols that train: fine-tuning, partial fine-tuning, and MAE's linear probe with LARS."""

from clmae.evaluation.finetuning.arguments import (
    PROTOCOLS,
    ClassificationArguments,
    FinetuningArguments,
    LinearLarsArguments,
)
from clmae.evaluation.finetuning.evaluate import finetune
from clmae.evaluation.finetuning.images import AugmentedImages, MixingCollator
from clmae.evaluation.finetuning.lars import LARS
from clmae.evaluation.finetuning.models import LinearProbe, from_scratch, load_classifier
from clmae.evaluation.finetuning.trainer import ClassificationTrainer, EMACallback
from clmae.evaluation.labels import label_subset
from clmae.evaluation.report import classifier_scores

__all__ = [
    "LARS",
    "PROTOCOLS",
    "AugmentedImages",
    "ClassificationArguments",
    "ClassificationTrainer",
    "EMACallback",
    "FinetuningArguments",
    "LinearLarsArguments",
    "LinearProbe",
    "MixingCollator",
    "classifier_scores",
    "finetune",
    "from_scratch",
    "label_subset",
    "load_classifier",
]
