# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""k-NN and linear accuracy of an encoder while it is pretrained, on a small labelled dataset."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from clmae.configuration.errors import InputError
from clmae.evaluation.features import extract_features
from clmae.evaluation.images import LabelledImages
from clmae.evaluation.knn import knn_predict
from clmae.evaluation.linear import linear_probe
from clmae.training.callbacks import PeriodicCallback
from clmae.training.data import hold_out, load_image_dataset, take_samples

_K = 20  # neighbours, or as many as there are references


@dataclass
class OnlineEvaluationArguments:
    """Labelled images that an encoder is evaluated on while it is pretrained.

    Raises:
        InputError: A number is out of range.
    """

    knn_dataset: str | None = field(
        default=None,
        metadata={"help": "Labelled images: their k-NN and linear accuracy is logged."},
    )
    knn_split: str = field(default="train", metadata={"help": "Split of knn_dataset."})
    knn_steps: int = field(default=500, metadata={"help": "Evaluate on knn_dataset every that many steps."})
    knn_max_samples: int = field(
        default=2000, metadata={"help": "Images taken of knn_dataset: half as references, half as queries."}
    )

    def __post_init__(self) -> None:
        for name, least in (("knn_steps", 1), ("knn_max_samples", 4)):
            if getattr(self, name) < least:
                raise InputError(f"`{name}` is {getattr(self, name)}; give an int of at least {least}.")


class OnlineEvaluationCallback(PeriodicCallback):
    """Logs `knn_accuracy` and `linear_accuracy`, in [0, 1], before the first step, every `steps` and after the last.

    The first values are those of the untrained encoder. Half of the images, the same ones every time, are references
    and train the linear classifier; the other half are classified. Nothing is drawn from the global random state.

    Args:
        trainer: A [`CurriculumTrainer`] of one of this project's families, with its image processor.
        dataset: Labelled images, a `datasets.Dataset`.
        steps: Optimiser steps between evaluations.
        image_column: Column of the images, if there are several.

    Raises:
        InputError: There are no labels, or fewer than two classes; the model is none of this project's families.
    """

    def __init__(self, trainer: Any, dataset: Any, steps: int = 500, image_column: str | None = None):
        super().__init__(trainer)
        config = trainer.model.config
        if not isinstance(getattr(trainer.model, "vit", None), PreTrainedModel) or not hasattr(config, "pooling"):
            raise InputError(
                f"`knn_dataset` needs a model of this project's families, whose encoder sees all patches; this is a "
                f"{type(trainer.model).__name__}."
            )
        self.steps = steps
        reading = dict(image_column=image_column, num_channels=config.num_channels)
        # Classes that are words are numbered alike in both halves, also where one of them lacks a class.
        class_names = LabelledImages(dataset, trainer.processing_class, **reading).class_names
        self.references, self.queries = (
            LabelledImages(part, trainer.processing_class, class_names=class_names, **reading)
            for part in hold_out(dataset, 0.5)
        )

    @classmethod
    def from_arguments(cls, trainer: Any, arguments: OnlineEvaluationArguments) -> OnlineEvaluationCallback:
        """As `arguments` say, whose `knn_dataset` is given."""
        try:
            dataset, column = load_image_dataset(arguments.knn_dataset, arguments.knn_split)
            return cls(trainer, take_samples(dataset, arguments.knn_max_samples), arguments.knn_steps, column)
        except InputError as error:
            raise InputError(str(error).replace("`dataset`", "`knn_dataset`")) from error

    def interval(self, args: Any) -> int:
        """See the class."""
        return self.steps

    def act(self, args: Any, state: Any, control: Any) -> None:
        """Evaluates; each process encodes its part of the images."""
        reading = dict(batch_size=args.eval_batch_size, progress=False, bf16=args.bf16)
        parts = [extract_features(self.trainer.model.vit, part, **reading) for part in (self.references, self.queries)]
        (train, train_labels), (test, test_labels) = parts
        k = min(_K, len(train))
        predicted = knn_predict(train, train_labels, test, ks=(k,))[k]
        linear = linear_probe(train, train_labels, test, test_labels)
        knn_accuracy = (predicted == test_labels).double().mean().item()
        self.log(control, {"knn_accuracy": knn_accuracy, "linear_accuracy": linear.accuracy})


def trend(log_history: list[dict[str, float]], num_queries: int) -> str | None:
    """What the logged accuracies were at first and at last, and whether the k-NN accuracy still rises.

    The best of the last quarter is compared with the best before it. What lies within the standard error of an accuracy
    of `num_queries` images is no rise. `None` with fewer than two values; no comparison with fewer than four.
    """
    entries = [entry for entry in log_history if "knn_accuracy" in entry]
    if len(entries) < 2:
        return None
    first, last = entries[0], entries[-1]
    accuracy = last["knn_accuracy"]
    error = math.sqrt(accuracy * (1 - accuracy) / num_queries)
    text = (
        f"On {num_queries} labelled images (±{196 * error:.1f} points), untrained and now: k-NN "
        f"{first['knn_accuracy']:.1%}, {accuracy:.1%}; linear {first['linear_accuracy']:.1%}, "
        f"{last['linear_accuracy']:.1%}."
    )
    if len(entries) < 4:
        return text
    split = len(entries) - len(entries) // 4
    before = max(entries[:split], key=lambda entry: entry["knn_accuracy"])
    if max(entry["knn_accuracy"] for entry in entries[split:]) > before["knn_accuracy"] + error:
        return f"{text} k-NN still rises: a longer run should give more."
    return f"{text} Since step {before['step']:.0f} k-NN has risen by no more than chance explains."
