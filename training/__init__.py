# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What happens over time: data, curriculum, and the Trainer that drives it."""

from clmae.training.arguments import PretrainingArguments
from clmae.training.build import build_trainer
from clmae.training.callbacks import DifficultyCallback, InterruptCallback, PictureCallback
from clmae.training.curriculum import curriculum_factor, keep_probability_statistics, keep_probability_sums
from clmae.training.trainer import CurriculumTrainer

__all__ = [
    "CurriculumTrainer",
    "DifficultyCallback",
    "InterruptCallback",
    "PictureCallback",
    "PretrainingArguments",
    "build_trainer",
    "curriculum_factor",
    "keep_probability_statistics",
    "keep_probability_sums",
]
