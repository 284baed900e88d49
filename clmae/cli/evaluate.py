# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae evaluate`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from transformers.hf_argparser import HfArg

from clmae.cli.options import MOST_USED, CommandParser, nearest, protocol_options
from clmae.configuration.errors import InputError
from clmae.evaluation.features import is_first_process
from clmae.evaluation.finetuning import PROTOCOLS as TRAINED
from clmae.evaluation.finetuning import ClassificationArguments, finetune
from clmae.evaluation.report import PROTOCOLS as FROZEN
from clmae.evaluation.report import EvaluationResult, evaluate_model

NAMES = (*FROZEN, *TRAINED)  # on frozen features, and those that train
USAGE = f"""\
usage: clmae evaluate PROTOCOL --model MODEL --dataset DATASET ...

examples:
  clmae evaluate knn --model out/cl-mae --dataset uoft-cs/cifar10
  clmae evaluate linear --model out/cl-mae --dataset ./labelled_photos --output out/cl-mae/linear.json
  clmae evaluate finetune --model out/mae --dataset ./labelled_photos --output out/finetune.json

protocols: {", ".join(NAMES)}

`clmae evaluate PROTOCOL --help` explains the options.
"""
TITLES = {
    **dict(knn="k-nearest neighbours", linear="Linear probe", fewshot="Few-shot probe"),
    **{"finetune": "Fine-tuning", "partial": "Partial fine-tuning", "linear-lars": "Linear probe (LARS)"},
}
EXAMPLE = "  clmae evaluate {0} --model out/cl-mae --dataset ./labelled --output out/{0}.json {1}"
EXAMPLE_OPTIONS = {
    "finetune": ("--num_train_epochs 20", "--labels_per_class 10", "--resume_from_checkpoint last"),
    "partial": ("--trained_blocks 4",),
    "linear-lars": ("", "--feature mean --num_train_epochs 20"),
}
# What `--help` explains of the protocols that train, beside their data; `--help-all` explains all.
SHOWN = {
    *("output_dir", "num_train_epochs", "per_device_train_batch_size", "base_learning_rate", *MOST_USED),
    *("layer_decay", "trained_blocks", "drop_path_rate", "mixup_alpha", "cutmix_alpha", "feature", "eval_strategy"),
}


@dataclass
class EvaluateArguments:
    """What every protocol needs: which model and images, and where to write the result."""

    model: str = HfArg(help="Folder or Hub id of an encoder that AutoModel loads.")
    dataset: str = HfArg(help="Labelled images: Hub id, folder with a folder per class, parquet file.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of a Hub dataset that has several.")
    train_split: str = HfArg(default="train", help="Split to learn from.")
    test_split: str | None = HfArg(default=None, help="Split to test on; test, or else a random fifth of each class.")
    image_column: str | None = HfArg(default=None, help="Column of the images, if there are several.")
    label_column: str | None = HfArg(default=None, help="Column of the classes, if there are several.")
    max_train_samples: int | None = HfArg(default=None, help="Learn from at most this many images.")
    max_test_samples: int | None = HfArg(default=None, help="Test on at most this many images.")
    on_bad_image: str = HfArg(default="raise", help="raise, or skip: leave out broken images; reads all once before.")
    output: str | None = HfArg(default=None, help="JSON file for result and settings; tables (.md, .csv) beside it.")
    baselines: bool = HfArg(default=True, help="Evaluate the same without pretraining, too.")


@dataclass
class FrozenArguments(EvaluateArguments):
    """Of the protocols on frozen features: which features, and how to compute them."""

    feature: str | None = HfArg(default=None, help="pooler_output (our default), cls (others'), mean or cls+mean.")
    layer: int | None = HfArg(default=None, help="Take tokens after this block, before the last LayerNorm; -1: last.")
    feature_cache: str | None = HfArg(default=None, help="Folder that keeps features for later runs.")
    batch_size: int = HfArg(default=256, help="Images per forward pass.")
    num_workers: int = HfArg(default=0, help="Processes that read images.")
    bf16: bool = HfArg(default=False, help="Encode in bfloat16.")
    seed: int = HfArg(default=0, help="Seed of the random encoder, and of what a protocol draws.")


@dataclass
class TrainedArguments(EvaluateArguments):
    """Of the protocols that train: how many labels to learn from."""

    labels_per_class: int | None = HfArg(default=None, help="Learn from this many images per class.")
    label_fraction: float | None = HfArg(default=None, help="Learn from this fraction of each class: 0.01 or 0.1.")


def run(argv: Sequence[str]) -> int:
    """Evaluates an encoder by a protocol, prints the table, and writes it where `--output` says."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    protocol, *rest = argv
    if protocol not in NAMES:
        raise InputError(f"unknown protocol {protocol!r}{nearest(protocol, NAMES)}; protocols: {', '.join(NAMES)}")
    started = "RANK" in os.environ and not dist.is_initialized()  # by torchrun
    try:
        options, result = (_evaluate_frozen if protocol in FROZEN else _evaluate_trained)(protocol, rest)
        if is_first_process():
            _show(result, TITLES[protocol], options.output, intervals=protocol in FROZEN)
    finally:
        if started and dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _evaluate_frozen(protocol: str, argv: Sequence[str]) -> tuple[EvaluateArguments, EvaluationResult]:
    kind = FROZEN[protocol]
    groups: dict[str, type] = {"options": FrozenArguments, f"options of {protocol}": protocol_options(kind)}
    options, chosen = _read(protocol, argv, "on frozen features, beside a random encoder and raw pixels", groups)
    parameters: dict[str, Any] = asdict(chosen)
    parameters |= {name: tuple(value) for name, value in parameters.items() if isinstance(value, list)}
    if any(each.name == "seed" for each in fields(kind)):
        parameters["seed"] = options.seed
    # Under torchrun each process encodes a part of the images.
    device = PartialState().device if "RANK" in os.environ else None
    protocols = (kind(**parameters),)
    results = _call(evaluate_model, options, protocols=protocols, device=device, cache_dir=options.feature_cache)
    return options, results[protocol]


def _evaluate_trained(protocol: str, argv: Sequence[str]) -> tuple[EvaluateArguments, EvaluationResult]:
    groups: dict[str, type] = {"options": TrainedArguments, "training": TRAINED[protocol]}
    shown = SHOWN | {field.name for field in fields(TrainedArguments)}
    description = "of a pretrained encoder, beside the same from random initialisation"
    options, args = _read(protocol, argv, description, groups, shown)
    _check_training(protocol, args)
    if options.output is not None and args.output_dir == type(args).output_dir:
        args.output_dir = str(Path(options.output).with_suffix(""))
    try:
        result = _call(finetune, options, args=args)
    except KeyboardInterrupt:
        print("Stopped. Go on with the same command and\n  --resume_from_checkpoint last")
        raise
    if is_first_process():
        print(f"The classifier is in {Path(str(args.output_dir), 'pretrained')}.")
    return options, result


def _read(
    protocol: str, argv: Sequence[str], description: str, groups: dict[str, type], shown: set[str] | None = None
) -> tuple[Any, Any]:
    examples = "\n".join(EXAMPLE.format(protocol, more).rstrip() for more in EXAMPLE_OPTIONS.get(protocol, ("",)))
    description = f"{TITLES[protocol]} {description}.\n\nexamples:\n{examples}"
    options, chosen = CommandParser(f"clmae evaluate {protocol}", description, groups, shown=shown).read(argv)
    if options.output is not None and Path(options.output).suffix != ".json":
        raise InputError(f"`output` is {options.output!r}; give the name of a .json file.")
    return options, chosen


def _call(evaluate: Callable[..., Any], options: EvaluateArguments, **more: Any) -> Any:
    """`evaluate` with the options; InputError if the model cannot be loaded."""
    others = {name: value for name, value in asdict(options).items() if name not in ("output", "feature_cache")}
    model, dataset, config_name = (others.pop(name) for name in ("model", "dataset", "dataset_config_name"))
    try:
        return evaluate(model, dataset, config_name=config_name, **more, **others)
    except OSError as error:
        raise InputError(f"`model` {model!r} cannot be loaded: {error}") from error


def _check_training(protocol: str, args: ClassificationArguments) -> None:
    if args.protocol != protocol:
        raise InputError(
            "`trained_blocks` is what partial fine-tuning needs: how many of the last blocks to train."
            if protocol == "partial"
            else f"`trained_blocks` is given, which is partial fine-tuning: `clmae evaluate partial`, not {protocol}."
        )
    if args.resume_from_checkpoint not in (None, "last", "true", "false"):
        raise InputError(
            f"`resume_from_checkpoint` is {args.resume_from_checkpoint!r}; give `last`: each row has checkpoints "
            "of its own below `output_dir`."
        )
    if args.resume_from_checkpoint == "false":
        args.resume_from_checkpoint = None


def _show(result: EvaluationResult, title: str, output: str | None, intervals: bool) -> None:
    table = f"## {title}, accuracy in %{' [95 % interval]' if intervals else ''}\n\n{result.to_markdown()}\n"
    table += f"\nOn the same test images:\n\n{differences}" if (differences := result.differences_to_markdown()) else ""
    print(f"\n{table}")
    if output is not None:
        path = Path(output)
        result.save_json(path)
        path.with_suffix(".md").write_text(table, encoding="utf-8")
        print(f"wrote {', '.join(map(str, [path, path.with_suffix('.md'), *result.save_class_files(path)]))}")
