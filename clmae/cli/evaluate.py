# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae evaluate`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import torch.distributed as dist
from accelerate import PartialState

from clmae.cli import evaluate_trained
from clmae.cli.judging import JudgingArguments
from clmae.cli.options import nearest, parse
from clmae.configuration.errors import InputError
from clmae.evaluation.features import is_first_process
from clmae.evaluation.report import PROTOCOLS, EvaluationResult, evaluate_model

NAMES = (*PROTOCOLS, *evaluate_trained.PROTOCOLS)  # on frozen features, and those that train
USAGE = f"""\
usage: clmae evaluate PROTOCOL --model MODEL --dataset DATASET ...

examples:
{{}}

protocols: {", ".join(NAMES)}

`clmae evaluate PROTOCOL --help` explains the options.
"""
EXAMPLES = """\
  clmae evaluate knn --model out/cl-mae --dataset uoft-cs/cifar10
  clmae evaluate linear --model out/cl-mae --dataset ./labelled_photos --output out/cl-mae/linear.json"""
TITLES = {"knn": "k-nearest neighbours", "linear": "Linear probe", "fewshot": "Few-shot probe"}


@dataclass
class EvaluateArguments(JudgingArguments):
    """What to judge, on which images, and by which features."""

    feature: str | None = field(
        default=None,
        metadata={
            "help": "pooler_output (our families' default), cls (others'), mean (of the patch tokens) or cls+mean."
        },
    )
    layer: int | None = field(
        default=None,
        metadata={"help": "Tokens after so many blocks, before the final LayerNorm; -1 is the last block."},
    )
    feature_cache: str | None = field(
        default=None, metadata={"help": "Folder that keeps features, for a second look at the same model and images."}
    )
    baselines: bool = field(default=True, metadata={"help": "Also judge a random encoder and raw pixels."})
    batch_size: int = field(default=256, metadata={"help": "Images encoded at once."})
    num_workers: int = field(default=0, metadata={"help": "Processes that read images."})
    bf16: bool = field(default=False, metadata={"help": "Encode in bfloat16."})
    seed: int = field(default=0, metadata={"help": "Of the random encoder, and of what a protocol draws."})


def run(argv: Sequence[str]) -> int:
    """Judges an encoder by a protocol, prints the table, and writes it where `--output` says."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(EXAMPLES), end="")
        return 0 if argv else 2
    protocol, *rest = argv
    if protocol not in NAMES:
        raise InputError(f"unknown protocol {protocol!r}{nearest(protocol, NAMES)}; protocols: {', '.join(NAMES)}")
    if protocol in evaluate_trained.PROTOCOLS:
        return evaluate_trained.run(protocol, rest)
    args, chosen = parse(
        {"options": EvaluateArguments, f"options of {protocol}": protocol_options(PROTOCOLS[protocol])},
        rest,
        prog=f"clmae evaluate {protocol}",
        description=f"{TITLES[protocol]} on frozen features, beside a random encoder and raw pixels.",
        examples=EXAMPLES,
    )
    output = None if args.output is None else Path(args.output)
    if output is not None and output.suffix != ".json":
        raise InputError(f"`output` is {args.output!r}; give the name of a .json file.")
    started = "RANK" in os.environ and not dist.is_initialized()  # by torchrun: each process encodes a part
    device = PartialState().device if started else None
    try:
        result = _evaluate(protocol, args, chosen, device)
        if is_first_process():
            _show(result, TITLES[protocol], output)
    finally:
        if started and dist.is_initialized():
            dist.destroy_process_group()
    return 0


def protocol_options(protocol: type) -> type:
    """A dataclass of a protocol's own fields as options; `seed` is one for all."""
    kinds = get_type_hints(protocol)
    options = []
    for each in fields(protocol):
        if each.name == "seed":
            continue
        several = get_args(kinds[each.name])  # (int, ...) of a tuple
        kind = list[several[0]] if several else kinds[each.name]
        default = (
            dict(default_factory=lambda value=each.default: list(value)) if several else dict(default=each.default)
        )
        options.append((each.name, kind, field(**default, metadata=dict(each.metadata))))
    return make_dataclass(f"{protocol.__name__}Options", options)


def _evaluate(protocol: str, args: EvaluateArguments, chosen: object, device: object) -> EvaluationResult:
    options = asdict(args)
    del options["output"]
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in asdict(chosen).items()}
    if any(each.name == "seed" for each in fields(PROTOCOLS[protocol])):
        values["seed"] = args.seed
    try:
        return evaluate_model(
            options.pop("model"),
            options.pop("dataset"),
            (PROTOCOLS[protocol](**values),),
            config_name=options.pop("dataset_config_name"),
            cache_dir=options.pop("feature_cache"),
            device=device,
            **options,
        )[protocol]
    except OSError as error:
        raise InputError(f"`model` {args.model!r} cannot be loaded: {error}") from error


def _show(result: EvaluationResult, title: str, output: Path | None) -> None:
    table = f"## {title}, accuracy in % [95 % interval]\n\n{result.to_markdown()}\n"
    print(f"\n{table}")
    if output is not None:
        result.save_json(output)
        markdown = output.with_suffix(".md")
        markdown.write_text(table, encoding="utf-8")
        print("wrote " + ", ".join(map(str, [output, markdown, *result.save_class_files(output)])))
