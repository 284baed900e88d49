# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Judging a pretrained encoder by a protocol that trains, beside the same without pretraining."""

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import AutoConfig, AutoImageProcessor, TrainingArguments

from clmae.configuration.errors import InputError
from clmae.evaluation.features import LabelledImages
from clmae.evaluation.finetuning.arguments import ClassificationArguments
from clmae.evaluation.finetuning.images import AugmentedImages, label_subset
from clmae.evaluation.finetuning.models import LinearProbe, from_scratch, load_classifier
from clmae.evaluation.finetuning.trainer import ClassificationTrainer, classifier_scores
from clmae.evaluation.linear import stratified_part
from clmae.evaluation.metrics.classes import Predictions
from clmae.evaluation.report import (
    INTERVALS,
    EvaluationResult,
    EvaluationRow,
    check_same_classes,
    describe_run,
    load_splits,
    make_row,
)
from clmae.model_cards.files import write_whole
from clmae.model_cards.run import read_model_config
from clmae.training.callbacks import InterruptCallback
from clmae.training.data import AnyDataset, take_samples
from clmae.training.sealing import checkpoints, is_sealed


class _Data(NamedTuple):
    train: AugmentedImages
    validation: Subset | None
    test: LabelledImages
    num_classes: int
    class_names: list[str] | None


def finetune(
    model_path: str | os.PathLike,
    dataset_source: str | os.PathLike | AnyDataset | dict,
    args: ClassificationArguments,
    train_split: str = "train",
    test_split: str | None = None,
    max_train_samples: int | None = None,
    max_test_samples: int | None = None,
    label_column: str | None = None,
    image_column: str | None = None,
    *,
    config_name: str | None = None,
    labels_per_class: int | None = None,
    label_fraction: float | None = None,
    baselines: bool = True,
) -> EvaluationResult:
    """Judges a pretrained encoder by what it becomes: fine-tuned, partially fine-tuned, or probed with LARS.

    The weights of the last step are judged, once, on the test set. Each row trains in a folder of its own below
    `args.output_dir`, which then holds the trained model. With `args.resume_from_checkpoint` rows that are done are
    taken from there, and the others go on from their last checkpoints.

    Args:
        model_path, args: See [`load_classifier`]. [`FinetuningArguments`] or [`LinearLarsArguments`] decide the
            protocol.
        dataset_source, train_split, test_split, max_train_samples, max_test_samples, label_column, image_column,
            config_name: As in [`evaluate_model`].
        labels_per_class, label_fraction: Learn from so many images of each class, or such a share of it, drawn by
            `args.seed`.
        baselines: Also train the same architecture from random initialisation ("from scratch"; under the linear probe,
            on a random encoder) by the same recipe.

    Returns:
        Rows `"pretrained"` and its baseline, in percent; the settings hold all that is needed to repeat them.

    Raises:
        InputError: There is no such model; something else that was given cannot be worked with; `output_dir` holds
            another run.

    >>> finetune("out/mae", "./labelled", FinetuningArguments(output_dir="out/ft", num_train_epochs=20)).to_markdown()
    """
    read_model_config(model_path)  # what is wrong is reported before anything is loaded
    *splits, tested_on = load_splits(dataset_source, train_split, test_split, config_name, image_column, label_column)
    splits = [take_samples(*pair) for pair in zip(splits, (max_train_samples, max_test_samples), strict=True)]
    data = _prepare_data(model_path, splits, args, image_column, label_column, labels_per_class, label_fraction)
    named = isinstance(dataset_source, (str, os.PathLike))
    asked = dict(model=os.fspath(model_path), dataset=os.fspath(dataset_source) if named else "in memory")
    asked |= dict(dataset_config_name=config_name, train_split=train_split, test_split=tested_on)
    asked |= dict(max_train_samples=max_train_samples, max_test_samples=max_test_samples)
    asked |= dict(labels_per_class=labels_per_class, label_fraction=label_fraction)
    return _judge(load_classifier(model_path, args, data.num_classes, data.class_names), data, args, asked, baselines)


def _judge(
    model: nn.Module, data: _Data, args: ClassificationArguments, asked: dict[str, Any], baselines: bool
) -> EvaluationResult:
    encoder = model.encoder if isinstance(model, LinearProbe) else model
    settings = {
        "parameters": args.recorded(),
        **asked,
        "image_column": data.test.image_column,
        "label_column": data.test.label_column,
        "num_train": len(data.train),
        "num_validation": 0 if data.validation is None else len(data.validation),
        "num_test": len(data.test),
        "num_classes": data.num_classes,
        "num_processes": args.world_size,
        "model_class": type(encoder).__name__,
        "selected_on": _selected_on(args, asked["train_split"]),
        "intervals": INTERVALS,
    }
    row, predictions = _run("pretrained", model, data, args, settings)
    rows = [row]
    if baselines:
        name = "random encoder" if isinstance(model, LinearProbe) else "from scratch"
        rows.append(_run(name, from_scratch(model, args), data, args, settings)[0])
    described = {**describe_run(encoder, data.test, data.test), **settings}
    classes = Predictions(predictions, data.test.labels, data.class_names)
    return EvaluationResult(args.protocol, rows, described, classes)


def _prepare_data(
    model_path: str | os.PathLike,
    splits: Sequence[datasets.Dataset],
    args: ClassificationArguments,
    image_column: str | None,
    label_column: str | None,
    labels_per_class: int | None,
    label_fraction: float | None,
) -> _Data:
    num_channels = getattr(AutoConfig.from_pretrained(model_path), "num_channels", 3)
    backend = "pil" if num_channels in (1, 3, 4) else "torchvision"
    processor = AutoImageProcessor.from_pretrained(model_path, backend=backend)
    columns = dict(image_column=image_column, label_column=label_column, num_channels=num_channels)
    train = LabelledImages(splits[0], processor, **columns)
    test = LabelledImages(splits[1], processor, class_names=train.class_names or (), **columns)
    check_same_classes(train, test)
    chosen = label_subset(
        train.labels, labels_per_class=labels_per_class, label_fraction=label_fraction, seed=args.seed
    )
    if len(train.labels[chosen].unique()) < 2:
        raise InputError("`dataset` has training images of one class only; give at least two.")
    validation = None
    if args.eval_strategy != "no":
        held_out = stratified_part(train.labels[chosen], args.validation_share, args.seed)
        if not held_out.any():
            raise InputError(
                "`eval_strategy` holds out a part of every class, but no class has two training images: give more "
                "labels, or leave out `eval_strategy` and `load_best_model_at_end`."
            )
        chosen, validation = chosen[~held_out], Subset(train, chosen[held_out].tolist())
    normalized = getattr(processor, "do_normalize", True)
    augmented = AugmentedImages(
        train.dataset.select(chosen.numpy()),
        train.image_column,
        train.labels[chosen],
        image_size=tuple(test[0][0].shape[1:]),
        num_channels=num_channels,
        mean=processor.image_mean if normalized else [0.0] * num_channels,
        std=processor.image_std if normalized else [1.0] * num_channels,
        seed=args.data_order_seed,
        crop_scale=(args.min_crop_scale, 1.0),
        horizontal_flip=args.horizontal_flip,
        **{
            name: getattr(args, name, 0.0)
            for name in ("randaugment_magnitude", "randaugment_std", "random_erasing_probability")
        },
    )
    num_classes = len(train.class_names) if train.class_names else int(max(train.labels.max(), test.labels.max())) + 1
    return _Data(augmented, validation, test, num_classes, train.class_names)


def _selected_on(args: ClassificationArguments, train_split: str) -> dict[str, Any] | None:
    """What the step is chosen on that is judged; nothing where it is the last."""
    if not args.load_best_model_at_end:
        return None
    return {"split": train_split, "share_of_each_class": args.validation_share, "seed": args.seed}


def _run(
    name: str, model: nn.Module, data: _Data, args: ClassificationArguments, settings: dict[str, Any]
) -> tuple[EvaluationRow, Tensor]:
    """Trains one row, or goes on with it, or takes it as it is; and judges it: the row, and classes `(num_test,)`."""
    args = copy.copy(args)
    args.output_dir = str(Path(args.output_dir) / name.replace(" ", "_"))
    record = Path(args.output_dir) / "run.json"
    done, goes_on = _earlier(record, settings, bool(args.resume_from_checkpoint))
    if done is not None:
        return done
    interrupt = InterruptCallback()
    trainer = ClassificationTrainer(
        model,
        args,
        data.train,
        data.validation,
        num_classes=data.num_classes,
        processing_class=data.test.processor,
        callbacks=[interrupt],
    )
    trainer.accelerator.wait_for_everyone()  # until every process has seen that there was no earlier run
    content: dict[str, Any] = {"settings": settings, "row": None}
    _write(record, content, args)
    try:
        trainer.train(resume_from_checkpoint=goes_on)
    finally:
        interrupt.restore()
    if interrupt.interrupted:
        raise KeyboardInterrupt
    prediction = trainer.predict(data.test)
    predicted, labels = (torch.from_numpy(found) for found in (prediction.predictions, prediction.label_ids))
    scores = classifier_scores(predicted, labels, data.num_classes)
    scores.details["steps"] = trainer.state.global_step
    scores.details["trained_parameters"] = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    row = make_row(name, trainer.model.classifier.in_features, scores)
    trainer.save_model()
    _write(record, {**content, "row": asdict(row), "predictions": scores.predictions.tolist()}, args)
    return row, scores.predictions


def _earlier(record: Path, settings: dict[str, Any], resume: bool) -> tuple[tuple[EvaluationRow, Tensor] | None, bool]:
    """Row and predictions, if an earlier run finished them; otherwise whether there are checkpoints to go on from."""
    if not record.is_file():
        return None, False
    if not resume:
        raise InputError(
            f"`output_dir` {str(record.parents[1])!r} holds an earlier run ({record.parent.name}): go on with "
            "`resume_from_checkpoint` 'last', or choose another folder."
        )
    saved = json.loads(record.read_text(encoding="utf-8"))
    parts = ((saved["settings"], settings), (saved["settings"]["parameters"], settings["parameters"]))
    for old, new in reversed(parts):
        changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        if changed:
            raise InputError(
                f"`resume_from_checkpoint`: {str(record.parent)!r} holds a run with other settings: `{changed[0]}` was "
                f"{old.get(changed[0])!r} and is {new.get(changed[0])!r}. Take the same, or another `output_dir`."
            )
    if saved["row"] is None:
        # Where the first save was cut off, there is nothing to go on from.
        return None, any(is_sealed(checkpoint) for checkpoint in checkpoints(record.parent))
    intervals = {name: tuple(interval) for name, interval in saved["row"].pop("intervals").items()}
    return (EvaluationRow(**saved["row"], intervals=intervals), torch.tensor(saved["predictions"])), False


def _write(record: Path, content: dict[str, Any], args: TrainingArguments) -> None:
    if args.should_save:
        write_whole(record, json.dumps(content))


__all__ = ["finetune"]
