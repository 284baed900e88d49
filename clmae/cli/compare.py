# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Pretrain by several recipes on the same images, with the same number of images seen and with the
same compute, and evaluate each. Any option of `clmae pretrain` applies to every recipe. If it is
killed, the same command goes on where it was.

examples:
  clmae compare --recipes recipes/mae_cifar10.yaml recipes/cl_mae_cifar10.yaml recipes/cmae_cifar10.yaml \\
      --output_dir out/compare --seeds 0 1 2
  clmae compare --recipes mae.yaml cl_mae.yaml --dataset ./images --eval_dataset ./labelled --output_dir out/compare \\
      --images_seen 1000000 --per_device_train_batch_size 128
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.hf_argparser import HfArg

from clmae.cli.options import CommandParser, read_recipe
from clmae.cli.pretrain import read_arguments
from clmae.configuration.errors import InputError
from clmae.evaluation.compare import compare
from clmae.evaluation.plan import BUDGETS, NUM_POINTS, Evaluation, Recipe, make_plan
from clmae.evaluation.report import PROTOCOLS

# Options of `clmae pretrain` that a comparison sets by itself.
REFUSED = {
    "config": "give the recipes by --recipes",
    "seed": "give --seeds",
    "resume_from_checkpoint": "an unfinished comparison goes on by itself",
    "push_to_hub": "share a run's model when it is finished",
}
# What may change between two calls, because no accuracy depends on it.
WITHOUT_EFFECT = {
    *("output_dir", "seed", "run_name", "disable_tqdm", "logging_steps", "report_to", "resume_from_checkpoint"),
    *("save_strategy", "save_steps", "save_total_limit", "eval_strategy", "eval_steps", "per_device_eval_batch_size"),
    *("difficulty_steps", "picture_steps", "num_probe_images", "max_eval_samples"),
    *("knn_dataset", "knn_split", "knn_steps", "knn_max_samples"),
    *("dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("num_train_epochs", "max_steps"),  # the numbers of steps are in the plan
}


@dataclass
class CompareArguments:
    """What to compare, and how to evaluate it."""

    recipes: list[str] = HfArg(help="YAML recipes of `clmae pretrain`; file names become row names.")
    output_dir: str = HfArg(help="Folder for runs, table and figure; the same command goes on there.")
    seeds: list[int] = HfArg(default_factory=lambda: [0], help="Seeds; each recipe is run with each of them.")
    budgets: list[str] = HfArg(default_factory=lambda: list(BUDGETS), help="images: equal images seen; compute: FLOPs.")
    protocols: list[str] = HfArg(default_factory=lambda: ["knn", "linear"], help=f"Some of {', '.join(PROTOCOLS)}.")
    images_seen: int | None = HfArg(default=None, help="Images that each recipe trains on; else the first recipe's.")
    num_points: int = HfArg(default=NUM_POINTS, help="Evaluations per run, evenly spaced, the last at its end.")
    eval_dataset: str | None = HfArg(default=None, help="Labelled images to evaluate on; else the recipes' dataset.")
    eval_config_name: str | None = HfArg(default=None, help="Configuration of eval_dataset.")
    eval_train_split: str = HfArg(default="train", help="Its split to learn from.")
    eval_test_split: str | None = HfArg(default=None, help="Its split to test on; test, or else a random fifth.")
    eval_image_column: str | None = HfArg(default=None, help="Its column of the images, if several.")
    eval_label_column: str | None = HfArg(default=None, help="Its column of the classes, if several.")
    eval_max_train_samples: int | None = HfArg(default=None, help="Learn from at most this many images.")
    eval_max_test_samples: int | None = HfArg(default=None, help="Test on at most this many images.")
    eval_feature: str | None = HfArg(default=None, help="As `feature` of `clmae evaluate`.")


def run(argv: Sequence[str]) -> int:
    """Compares recipes; table and figure are in `--output_dir` afterwards."""
    args, overrides = CommandParser(
        "clmae compare", __doc__, {"options": CompareArguments}, takes_recipe=False, refused=REFUSED
    ).read(argv)
    recipes = [recipe(path, overrides, args.output_dir) for path in args.recipes]
    options = {name.removeprefix("eval_"): value for name, value in asdict(args).items() if name.startswith("eval_")}
    if options["dataset"] is None and recipes:
        options["dataset"] = recipes[0].data.dataset
        options["config_name"] = options["config_name"] or recipes[0].data.dataset_config_name
    evaluation = Evaluation(protocols=tuple(args.protocols), **options)
    name = Path(str(evaluation.dataset)).name or "images"
    plan = make_plan(recipes, {name: evaluation}, args.images_seen, args.num_points)
    try:
        table = compare(plan, args.output_dir, args.seeds, args.budgets, log=lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        print("Stopped. Go on with the same command.")
        return 130
    print(f"\n{table}")
    print(f"wrote table.md, table.csv, table.json and accuracy.png in {args.output_dir}")
    return 0


def recipe(path: str, overrides: Sequence[str], output_dir: str) -> Recipe:
    """A recipe as `clmae pretrain` would read it.

    Raises:
        InputError: It cannot be read, or an option is wrong; the message names the recipe.
    """
    argv = ["--config", path, *overrides, "--output_dir", output_dir]
    try:
        config, data, args, known = read_arguments(argv)
    except InputError as error:
        raise InputError(f"recipe {path}: {error}") from error
    return Recipe(Path(path).stem, config, data, args, _options(path, overrides, known))


def _options(path: str, overrides: Sequence[str], known: dict[str, Any]) -> dict[str, Any]:
    """Values of all options that were given and that matter, as JSON."""
    names = {a.partition("=")[0][2:].replace("-", "_") for a in overrides if a.startswith("--")} | {*read_recipe(path)}
    names = {name if name in known else name.removeprefix("no_") for name in names} - WITHOUT_EFFECT
    return json.loads(json.dumps({name: known[name] for name in sorted(names)}, default=str))
