# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae evaluate finetune|partial|linear-lars`: the protocols that train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from clmae.cli.judging import JudgingArguments
from clmae.cli.options import nearest, parse
from clmae.configuration.errors import InputError
from clmae.evaluation.finetuning import PROTOCOLS as ARGUMENTS
from clmae.evaluation.finetuning import ClassificationArguments, finetune

PROTOCOLS = tuple(ARGUMENTS)
TITLES = {"finetune": "Fine-tuning", "partial": "Partial fine-tuning", "linear-lars": "Linear probe (LARS)"}
EXAMPLES = {
    "finetune": """\
  clmae evaluate finetune --model out/mae --dataset ./labelled --output out/ft.json --num_train_epochs 20
  clmae evaluate finetune --model out/mae --dataset ./labelled --output out/ft.json --labels_per_class 10
  clmae evaluate finetune --model out/mae --dataset ./labelled --output out/ft.json --resume_from_checkpoint last""",
    "partial": """\
  clmae evaluate partial --trained_blocks 4 --model out/mae --dataset ./labelled --output out/partial.json""",
    "linear-lars": """\
  clmae evaluate linear-lars --model out/mae --dataset ./labelled --output out/linear.json
  clmae evaluate linear-lars --model out/mae --dataset ./labelled --feature mean --num_train_epochs 20""",
}
TRAINING = "training (of transformers' TrainingArguments, the most used)"
# Options that `--help` explains beside the protocol's own; `--help_all` explains them all.
MOST_USED = {
    "max_steps",
    "gradient_accumulation_steps",
    "bf16",
    "torch_compile",
    "gradient_checkpointing",
    "use_cpu",
    "seed",
    "dataloader_num_workers",
    "eval_strategy",
    "load_best_model_at_end",
    "save_steps",
    "report_to",
    "resume_from_checkpoint",
}
_HIDDEN = {"label_names", "remove_unused_columns", "logging_nan_inf_filter"}


@dataclass
class EvaluateTrainedArguments(JudgingArguments):
    """What to judge, on which images, and how many of them to learn from."""

    labels_per_class: int | None = field(default=None, metadata={"help": "Learn from so many images of each class."})
    label_fraction: float | None = field(
        default=None, metadata={"help": "Learn from such a share of each class: 0.01 or 0.1."}
    )
    baselines: bool = field(default=True, metadata={"help": "Also train from random initialisation."})


def run(protocol: str, argv: Sequence[str]) -> int:
    """Trains by a protocol, prints the table, and writes it where `--output` says; the exit code.

    Raises:
        InputError: The command line is wrong, or the model cannot be loaded.
        InputError: What was given cannot be worked with.
    """
    if protocol not in PROTOCOLS:
        raise InputError(
            f"unknown protocol {protocol!r}{nearest(protocol, PROTOCOLS)}; protocols: {', '.join(PROTOCOLS)}"
        )
    arguments = ARGUMENTS[protocol]
    own = {name for owner in arguments.__mro__[:3] for name in owner.__annotations__}
    options, args = parse(
        {"options": EvaluateTrainedArguments, TRAINING: arguments},
        argv,
        prog=f"clmae evaluate {protocol}",
        description=f"{TITLES[protocol]} of a pretrained encoder, beside the same from random initialisation.",
        examples=EXAMPLES[protocol],
        shown={TRAINING: (own | MOST_USED) - _HIDDEN},
    )
    _check(protocol, options, args)
    data = asdict(options)
    try:
        result = finetune(
            data.pop("model"),
            data.pop("dataset"),
            args,
            config_name=data.pop("dataset_config_name"),
            **{name: value for name, value in data.items() if name != "output"},
        )
    except OSError as error:
        raise InputError(f"`model` {options.model!r} cannot be loaded: {error}") from error
    except KeyboardInterrupt:
        print("Stopped. Go on with the same command and\n  --resume_from_checkpoint last")
        raise
    if args.process_index == 0:
        table = f"## {TITLES[protocol]}, accuracy in %\n\n{result.to_markdown()}\n"
        print(f"\n{table}")
        if options.output is not None:
            output = Path(options.output)
            result.save_json(output)
            output.with_suffix(".md").write_text(table, encoding="utf-8")
            files = [output, output.with_suffix(".md"), *result.save_class_files(output)]
            print(f"wrote {', '.join(map(str, files))}; the trained models are in {args.output_dir}")
    return 0


def _check(protocol: str, options: EvaluateTrainedArguments, args: ClassificationArguments) -> None:
    """What the options do not allow together; and `output_dir` beside `output`, if it was not given."""
    if options.output is not None:
        output = Path(options.output)
        if output.suffix != ".json":
            raise InputError(f"`output` is {options.output!r}; give the name of a .json file.")
        if args.output_dir == type(args).output_dir:
            args.output_dir = str(output.with_suffix(""))
    if args.protocol != protocol:
        raise InputError(
            "`trained_blocks` is what partial fine-tuning needs: how many of the last blocks to train."
            if protocol == "partial"
            else f"`trained_blocks` is given, which is partial fine-tuning: `clmae evaluate partial`, not {protocol}."
        )
    if args.resume_from_checkpoint not in (None, "last", "true", "false"):
        raise InputError(
            f"`resume_from_checkpoint` is {args.resume_from_checkpoint!r}; say `last`: each row has checkpoints "
            "of its own below `output_dir`."
        )
    if args.resume_from_checkpoint == "false":
        args.resume_from_checkpoint = None
