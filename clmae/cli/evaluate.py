# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from clmae.cli.options import UsageError, nearest, parse
from clmae.evaluation.report import PROTOCOLS, evaluate_model

USAGE = f"""\
usage: clmae evaluate PROTOCOL --model MODEL --dataset DATASET ...

examples:
{{}}

protocols: {", ".join(PROTOCOLS)}

`clmae evaluate PROTOCOL --help` explains the options.
"""
EXAMPLES = """\
  clmae evaluate knn --model out/cl-mae --dataset uoft-cs/cifar10
  clmae evaluate linear --model out/cl-mae --dataset ./labelled_photos --output out/cl-mae/linear.json"""
TITLES = {"knn": "k-nearest neighbours", "linear": "Linear probe"}


@dataclass
class EvaluateArguments:
    """What to judge, and on which images."""

    model: str = field(metadata={"help": "Folder or Hub id of an encoder that AutoModel loads."})
    dataset: str = field(metadata={"help": "Labelled images: Hub id, folder with a folder for each class, parquet."})
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set that has several."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to learn from."})
    test_split: str | None = field(
        default=None, metadata={"help": "Split to be judged on; test, or without one a random fifth of train_split."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images, if there are several."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the classes, if there are several."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Learn from at most so many images."})
    max_test_samples: int | None = field(default=None, metadata={"help": "Be judged on at most so many images."})
    feature: str | None = field(
        default=None,
        metadata={"help": "pooler_output (our families' default), cls (others') or mean (of the patch tokens)."},
    )
    baselines: bool = field(default=True, metadata={"help": "Also judge a random encoder and raw pixels."})
    batch_size: int = field(default=256, metadata={"help": "Images encoded at once."})
    num_workers: int = field(default=0, metadata={"help": "Processes that read images."})
    bf16: bool = field(default=False, metadata={"help": "Encode in bfloat16."})
    seed: int = field(default=0, metadata={"help": "Of the random encoder."})
    output: str | None = field(
        default=None, metadata={"help": "JSON file for the result and all that is needed to repeat it; also as .md."}
    )


def run(argv: Sequence[str]) -> int:
    """Judges an encoder by a protocol, prints the table, and writes it where `--output` says."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(EXAMPLES), end="")
        return 0 if argv else 2
    protocol, *rest = argv
    if protocol not in PROTOCOLS:
        raise UsageError(
            f"unknown protocol {protocol!r}{nearest(protocol, PROTOCOLS)}; protocols: {', '.join(PROTOCOLS)}"
        )
    (args,) = parse(
        {"options": EvaluateArguments},
        rest,
        prog=f"clmae evaluate {protocol}",
        description=f"{TITLES[protocol]} on frozen features, beside a random encoder and raw pixels.",
        examples=EXAMPLES,
    )
    output = None if args.output is None else Path(args.output)
    if output is not None and output.suffix != ".json":
        raise UsageError(f"`output` is {args.output!r}; give the name of a .json file.")
    options = asdict(args)
    del options["output"]
    try:
        result = evaluate_model(
            options.pop("model"),
            options.pop("dataset"),
            (protocol,),
            config_name=options.pop("dataset_config_name"),
            **options,
        )[protocol]
    except OSError as error:
        raise UsageError(f"`model` {args.model!r} cannot be loaded: {error}") from error
    table = f"## {TITLES[protocol]}, accuracy in %\n\n{result.to_markdown()}\n"
    print(f"\n{table}")
    if output is not None:
        result.save_json(output)
        output.with_suffix(".md").write_text(table, encoding="utf-8")
        print(f"wrote {output} and {output.with_suffix('.md')}")
    return 0
