# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Scores of classifiers; for the `evaluate` library as folders that `evaluate.load` and `combine` take, offline."""

from pathlib import Path

from clmae.configuration.errors import InputError

METRICS = ("top1_accuracy", "top5_accuracy", "mean_per_class_accuracy", "macro_f1")


def metric_folder(name: str) -> str:
    """The folder of one of `METRICS`, for `evaluate.load(metric_folder("top1_accuracy"))`.

    Raises:
        InputError: There is no such metric.
    """
    if name not in METRICS:
        raise InputError(f"`name` is {name!r}; choose one of {', '.join(METRICS)}.")
    return str(Path(__file__).parent / name)


__all__ = ["METRICS", "metric_folder"]
