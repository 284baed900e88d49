# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The protocols that train: fine-tuning, partial fine-tuning, and MAE's linear probe with LARS."""

from clmae.evaluation.finetuning.arguments import (
    PROTOCOLS,
    ClassificationArguments,
    FinetuningArguments,
    LinearLarsArguments,
)
from clmae.evaluation.finetuning.images import AugmentedImages, MixingCollator, label_subset
from clmae.evaluation.finetuning.judge import finetune
from clmae.evaluation.finetuning.lars import LARS
from clmae.evaluation.finetuning.models import LinearProbe, from_scratch, load_classifier
from clmae.evaluation.finetuning.parameters import (
    freeze_all_but_last,
    frozen_modules,
    layer_ids,
    layer_lr_scales,
    parameter_groups,
)
from clmae.evaluation.finetuning.trainer import ClassificationTrainer, EMACallback, classifier_scores

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
    "freeze_all_but_last",
    "from_scratch",
    "frozen_modules",
    "label_subset",
    "layer_ids",
    "layer_lr_scales",
    "load_classifier",
    "parameter_groups",
]
