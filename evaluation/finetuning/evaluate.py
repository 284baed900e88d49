# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Evaluating a pretrained encoder by a protocol that trains, beside the same without pretraining."""

import copy
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from clmae.configuration.errors import InputError
from clmae.evaluation.confidence import INTERVALS
from clmae.evaluation.finetuning.arguments import ClassificationArguments
from clmae.evaluation.finetuning.images import AugmentedImages
from clmae.evaluation.finetuning.models import LinearProbe, from_scratch, load_classifier
from clmae.evaluation.finetuning.trainer import ClassificationTrainer
from clmae.evaluation.images import LabelledImages, load_labelled_images
from clmae.evaluation.labels import label_subset, stratified_part
from clmae.evaluation.metrics.classes import Predictions
from clmae.evaluation.report import (
    EvaluationResult,
    EvaluationRow,
    Scores,
    classifier_scores,
    describe_run,
)
from clmae.model_cards.files import write_whole
from clmae.training.callbacks import InterruptCallback
from clmae.training.data import AnyDataset
from clmae.training.integrity import checkpoints, is_sealed


class _Data(NamedTuple):
    train: AugmentedImages
    validation: Subset | None
    test: LabelledImages
    num_classes: int


def finetune(
    model_path: str | os.PathLike,
    dataset_source: str | os.PathLike | AnyDataset | dict,
    args: ClassificationArguments,
    *,
    labels_per_class: int | None = None,
    label_fraction: float | None = None,
    baselines: bool = True,
    **images: Any,
) -> EvaluationResult:
    """Evaluates a pretrained encoder by what it becomes: fine-tuned, partially fine-tuned, or probed with LARS.

    The weights of the last step are evaluated, once, on the test set. Each row trains in a folder of its own below
    `args.output_dir`, which then holds the trained model. With `args.resume_from_checkpoint` rows that are done are
    taken from there, and the others go on from their last checkpoints.

    Args:
        model_path, args: See [`load_classifier`]. [`FinetuningArguments`] or [`LinearLarsArguments`] decide the
            protocol.
        dataset_source, images: As in [`load_labelled_images`].
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
    train, test, settings = load_labelled_images(model_path, dataset_source, **images)
    data = _prepare_data(train, test, args, labels_per_class, label_fraction)
    model = load_classifier(model_path, args, data.num_classes, train.class_names)
    is_probe = isinstance(model, LinearProbe)
    encoder = model.encoder if is_probe else model
    selected_on = {"split": settings["train_split"], "share_of_each_class": args.validation_share, "seed": args.seed}
    settings = {
        "parameters": args.recorded(),
        **settings,
        "labels_per_class": labels_per_class,
        "label_fraction": label_fraction,
        "image_column": test.image_column,
        "label_column": test.label_column,
        "num_train": len(data.train),
        "num_validation": 0 if data.validation is None else len(data.validation),
        "num_test": len(test),
        "num_classes": data.num_classes,
        "num_processes": args.world_size,
        "model_class": type(encoder).__name__,
        "selected_on": selected_on if args.load_best_model_at_end else None,  # else it is the last step
        "intervals": INTERVALS,
    }
    row, predictions = _run("pretrained", model, data, args, settings)
    rows = [row]
    if baselines:
        kind = "random encoder" if is_probe else "from scratch"
        baseline, others = _run(kind, from_scratch(model, args), data, args, settings)
        baseline.compare(*(Scores(correct={"top-1": each == test.labels.cpu()}) for each in (predictions, others)))
        rows.append(baseline)
    settings = {**describe_run(encoder, test, test), **settings}
    return EvaluationResult(args.protocol, rows, settings, Predictions(predictions, test.labels, train.class_names))


def _prepare_data(
    train: LabelledImages,
    test: LabelledImages,
    args: ClassificationArguments,
    labels_per_class: int | None,
    label_fraction: float | None,
) -> _Data:
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
    processor, num_channels = train.processor, train.num_channels
    is_normalized = getattr(processor, "do_normalize", True)
    augmented = AugmentedImages(
        train.dataset.select(chosen.numpy()),
        train.image_column,
        train.labels[chosen],
        image_size=tuple(test[0][0].shape[1:]),
        num_channels=num_channels,
        mean=processor.image_mean if is_normalized else [0.0] * num_channels,
        std=processor.image_std if is_normalized else [1.0] * num_channels,
        seed=args.data_order_seed,
        crop_scale=(args.min_crop_scale, 1.0),
        horizontal_flip=args.horizontal_flip,
        randaugment_magnitude=args.randaugment_magnitude,
        randaugment_std=args.randaugment_std,
        random_erasing_probability=args.random_erasing_probability,
    )
    num_classes = len(train.class_names) if train.class_names else int(max(train.labels.max(), test.labels.max())) + 1
    return _Data(augmented, validation, test, num_classes)


def _run(
    name: str, model: nn.Module, data: _Data, args: ClassificationArguments, settings: dict[str, Any]
) -> tuple[EvaluationRow, Tensor]:
    """Trains one row, or goes on with it, or takes it as it is; its scores, and the predicted classes `(num_test,)`."""
    args = copy.copy(args)
    record = Path(str(args.output_dir)) / name.replace(" ", "_") / "run.json"
    args.output_dir = str(record.parent)
    earlier = _read_record(record, settings, bool(args.resume_from_checkpoint))
    if earlier.get("row") is not None:
        return EvaluationRow(**earlier["row"]), torch.tensor(earlier["predictions"])
    # Where the first save was cut off, there is nothing to go on from.
    has_checkpoint = bool(earlier) and any(is_sealed(checkpoint) for checkpoint in checkpoints(record.parent))
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
    if args.should_save:
        write_whole(record, json.dumps(content))
    trainer.train(resume_from_checkpoint=has_checkpoint)
    if interrupt.interrupted:
        raise KeyboardInterrupt
    prediction = trainer.predict(data.test)
    top_classes, labels = (torch.from_numpy(part) for part in (prediction.predictions, prediction.label_ids))
    scores = classifier_scores(top_classes, labels, data.num_classes)
    scores.details["steps"] = trainer.state.global_step
    scores.details["trained_parameters"] = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    row = EvaluationRow.from_scores(name, trainer.model.classifier.in_features, scores)
    trainer.save_model()
    if args.should_save:
        write_whole(record, json.dumps({**content, "row": asdict(row), "predictions": top_classes[:, 0].tolist()}))
    return row, top_classes[:, 0]


def _read_record(record: Path, settings: dict[str, Any], resume: bool) -> dict[str, Any]:
    """What an earlier run with the same settings wrote; empty, if there was none."""
    if not record.is_file():
        return {}
    if not resume:
        raise InputError(
            f"`output_dir` {str(record.parents[1])!r} holds an earlier run ({record.parent.name}): go on with "
            "`resume_from_checkpoint` 'last', or choose another folder."
        )
    saved = json.loads(record.read_text(encoding="utf-8"))
    for old, new in ((saved["settings"]["parameters"], settings["parameters"]), (saved["settings"], settings)):
        changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        if changed:
            raise InputError(
                f"`resume_from_checkpoint`: {str(record.parent)!r} holds a run with other settings: `{changed[0]}` was "
                f"{old.get(changed[0])!r} and is {new.get(changed[0])!r}. Take the same, or another `output_dir`."
            )
    return saved
