# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What an experiment compares: recipes, evaluations, and how long each recipe is trained under each budget."""

from __future__ import annotations

import itertools
import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from clmae.configuration import MAEConfig
from clmae.configuration.errors import InputError
from clmae.evaluation.finetuning import FinetuningArguments, finetune
from clmae.evaluation.images import LabelledImages
from clmae.evaluation.report import PROTOCOLS, evaluate_model
from clmae.evaluation.tables import BUDGETS
from clmae.model_cards.files import write_whole
from clmae.model_cards.record import read_json
from clmae.training.arguments import PretrainingArguments
from clmae.training.data import DataArguments, build_datasets, load_image_dataset, refresh_epochs
from clmae.training.data.sources import check_count
from clmae.training.flops import count_encoder_flops, count_step_flops

# Rows without pretraining; "scratch" is fine-tuned from random weights.
BASELINES = {"random": "random encoder", "raw": "raw pixels", "scratch": "from scratch, with labels"}
NUM_POINTS = 4
# What decides which images a recipe trains on; how it shows them is its own affair.
SAME_DATA = (
    *("dataset", "dataset_config_name", "train_split", "eval_split", "num_held_out"),
    *("image_column", "streaming", "max_train_samples"),
)
IMAGES = (
    *("config_name", "train_split", "test_split", "image_column", "label_column"),
    *("max_train_samples", "max_test_samples"),
)


@dataclass(frozen=True)
class Recipe:
    """What is compared.

    Attributes:
        name: Of its folders; unique, and none of `BASELINES`.
        config: Of the model, whose class is registered with `AutoModelForPreTraining`.
        data, args: As for `clmae pretrain`; output folder, seed and number of steps are the experiment's.
        options: What was asked for, as JSON; an experiment that goes on with other options is refused.
        label: Of its row in the table; the name, if not given.
        budgets: Under which it is trained.
        protocols: By which it is evaluated; all, if not given.
    """

    name: str
    config: MAEConfig
    data: DataArguments
    args: PretrainingArguments
    options: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    budgets: tuple[str, ...] = tuple(BUDGETS)
    protocols: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Evaluation:
    """On which labelled images, and how.

    Attributes:
        dataset, config_name, ..., max_test_samples: As the arguments of [`evaluate_model`].
        protocols: Of `PROTOCOLS`, on frozen features; or keys of `finetuning`.
        feature, bf16: For frozen features.
        finetuning: Fine-tuning protocols by name: fields of [`FinetuningArguments`], and `label_fraction` or
            `labels_per_class`.
        from_scratch: What differs of these fields for the baseline without pretraining.
    """

    dataset: str
    protocols: tuple[str, ...] = ("knn", "linear")
    config_name: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    max_train_samples: int | None = None
    max_test_samples: int | None = None
    feature: str | None = None
    bf16: bool = False
    finetuning: dict[str, dict[str, Any]] = field(default_factory=dict)
    from_scratch: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Refuses what would fail only after the training.

        Raises:
            InputError: An unknown protocol, or `dataset` has no such split, no classes, or images without a class.
        """
        choose("protocols", self.protocols, (*PROTOCOLS, *self.finetuning))
        for protocol in self.finetuning:
            self._finetuning_arguments(protocol, "never", 0, False)
        for split in filter(None, (self.train_split, self.test_split)):
            column = self.image_column
            images = load_image_dataset(self.dataset, split, config_name=self.config_name, image_column=column)
            # No image is processed here.
            LabelledImages(images.dataset, dict, image_column=column, label_column=self.label_column)

    @property
    def curve_protocols(self) -> list[str]:
        """Those by which the weights at intermediate steps are evaluated: on frozen features, but for few-shot."""
        frozen = [protocol for protocol in self.protocols if protocol in PROTOCOLS]
        return [protocol for protocol in frozen if protocol != "fewshot"] or frozen

    def evaluate(
        self, model: Path, protocols: Sequence[str], run: Run, device: torch.device, folder: Path
    ) -> list[dict[str, Any]]:
        """Accuracies in percent, and the settings, by each protocol.

        Args:
            model: Folder of the encoder.
            protocols: On frozen features, which they share; or one that fine-tunes.
            run: Whose seed counts; baselines are evaluated in other ways.
            device: Where to compute.
            folder: For fine-tuning, which goes on where it was.
        """
        images: dict[str, Any] = {name: getattr(self, name) for name in IMAGES}
        row = BASELINES["raw"] if run.recipe == "raw" else "pretrained"
        if protocols[0] in PROTOCOLS:
            images |= dict(feature=self.feature, bf16=self.bf16, seed=run.seed, device=device, progress=False)
            baselines = run.recipe == "raw"
            results = list(evaluate_model(model, self.dataset, protocols, **images, baselines=baselines).values())
        else:
            args, labels = self._finetuning_arguments(protocols[0], str(folder), run.seed, run.recipe == "scratch")
            results = [finetune(model, self.dataset, args, baselines=False, **labels, **images)]
        return [
            {"accuracies": next(r.accuracies for r in result.rows if r.name == row), "settings": result.settings}
            for result in results
        ]

    def _finetuning_arguments(
        self, protocol: str, output_dir: str, seed: int, scratch: bool
    ) -> tuple[FinetuningArguments, dict[str, Any]]:
        """The arguments of a fine-tuning, and which labels it uses."""
        fields: dict[str, Any] = {**self.finetuning[protocol], **(self.from_scratch if scratch else {})}
        labels: dict[str, Any] = {
            name: fields.pop(name) for name in ("label_fraction", "labels_per_class") if name in fields
        }
        fields |= dict(report_to="none", disable_tqdm=True, resume_from_checkpoint="last")
        return FinetuningArguments(output_dir=output_dir, seed=seed, **fields), labels


def choose(name: str, values: Sequence[str], known: Iterable[str], least: int = 1) -> None:
    """InputError unless `values` are some of `known`, each at most once."""
    if len(values) < least or not set(values) <= set(known) or len(set(values)) < len(values):
        raise InputError(f"`{name}` is {list(values)}; give some of {', '.join(known)}, each at most once.")


# -- compute ----------------------------------------------------------------------------------------------------------


class Cost:
    """What training by a recipe costs, by the number of steps.

    Raises:
        InputError: The training set is smaller than a batch.
    """

    def __init__(self, recipe: Recipe, num_images: int):
        args = recipe.args
        batch = args.images_per_batch
        batches = num_images // batch if args.dataloader_drop_last else math.ceil(num_images / batch)
        if not batches:
            raise InputError(
                f"recipe {recipe.name}: `per_device_train_batch_size` asks for batches of {batch} images, but the "
                f"training set has {num_images}: take a smaller batch."
            )
        self.steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
        self.images_per_step = args.total_train_batch_size
        self.step_flops = count_step_flops(recipe.config, args)
        self.interval = args.contrastive_crop_interval if recipe.data.contrastive_crop else None
        self.refresh_flops = 0 if self.interval is None else num_images * count_encoder_flops(recipe.config)

    def flops(self, step: int, steps: int) -> int:
        """FLOPs of the first `step` of `steps` steps; those that look for the objects (ContrastiveCrop) among them."""
        refreshes = 0
        if self.interval is not None:
            epochs = math.ceil(steps / self.steps_per_epoch)
            refreshes = sum(e * self.steps_per_epoch < step for e in refresh_epochs(epochs, self.interval))
        return round(step * self.step_flops) + refreshes * self.refresh_flops

    def steps_for(self, flops: int) -> int:
        """The most steps, at least one, whose FLOPs are at most `flops`."""
        most = int(flops / self.step_flops) + 1
        return max(1, bisect_right(range(1, most + 1), flops, key=lambda steps: self.flops(steps, steps)))


# -- the plan ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One pretraining, or a baseline (of 0 steps); its length decides its schedules: of two lengths it is two runs."""

    recipe: str
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.recipe}-{f'{self.steps}-steps-' if self.steps else ''}seed-{self.seed}"

    def points(self, count: int) -> list[int]:
        """At most `count` evenly spaced steps at which it is evaluated, the last at its end."""
        return sorted({math.ceil(i * self.steps / count) for i in range(1, count + 1)})


@dataclass(frozen=True)
class Cell:
    """One evaluation of a run, after `step` of its steps."""

    run: Run
    step: int
    dataset: str
    protocol: str

    @property
    def name(self) -> str:
        """Of its file."""
        step = f"-step-{self.step}" if self.step < self.run.steps else ""
        return f"{self.run.name}-{self.dataset}-{self.protocol}{step}"


@dataclass(frozen=True)
class Plan:
    """Steps by budget and recipe, and what they come from; evaluations by a name of each dataset."""

    recipes: dict[str, Recipe]
    costs: dict[str, Cost]
    steps: dict[str, dict[str, int]]
    evaluations: dict[str, Evaluation]
    num_images: int
    images_seen: int
    num_points: int
    baselines: tuple[str, ...] = ("random", "raw")

    def to_json(self) -> dict[str, Any]:
        """All that a number of the table depends on, except the seed."""
        recipes = {
            name: {
                "options": recipe.options,
                "flops_per_step": self.costs[name].step_flops,
                "steps": {budget: steps[name] for budget, steps in self.steps.items()},
            }
            for name, recipe in self.recipes.items()
        }
        evaluations = {name: asdict(evaluation) for name, evaluation in self.evaluations.items()}
        rest = {k: getattr(self, k) for k in ("num_images", "images_seen", "num_points")}
        return json.loads(json.dumps({"recipes": recipes, "evaluations": evaluations, **rest}, default=str))

    def rows(self, budgets: Sequence[str] = tuple(BUDGETS)) -> list[tuple[str, str]]:
        """`(budget, recipe)` of each row of the table; a baseline has the budget `""`."""
        recipes = [(b, name) for b in budgets for name, recipe in self.recipes.items() if b in recipe.budgets]
        return [*recipes, *(("", name) for name in self.baselines)]

    def cells(self, rows: Sequence[tuple[str, str]], seeds: Sequence[int]) -> list[Cell]:
        """All evaluations of some rows, seed by seed; those of a run that two budgets share are there once."""
        cells: dict[Cell, None] = {}
        for seed, (budget, name), (dataset, evaluation) in itertools.product(seeds, rows, self.evaluations.items()):
            # Raw pixels are the same under every seed.
            run = Run(name, self.steps[budget][name] if budget else 0, 0 if name == "raw" else seed)
            protocols = [protocol for protocol in evaluation.protocols if self._applies(name, protocol)]
            curve = [protocol for protocol in protocols if protocol in evaluation.curve_protocols]
            points = run.points(self.num_points)[:-1]
            cells |= {Cell(run, step, dataset, protocol): None for step in points for protocol in curve}
            cells |= {Cell(run, run.steps, dataset, protocol): None for protocol in protocols}
        return list(cells)

    def _applies(self, name: str, protocol: str) -> bool:
        if name in BASELINES:
            return (protocol in PROTOCOLS) == (name != "scratch")
        return protocol in (self.recipes[name].protocols or [protocol])


def make_plan(
    recipes: Sequence[Recipe],
    evaluations: dict[str, Evaluation],
    images_seen: int | None = None,
    num_points: int = NUM_POINTS,
    reference: str | None = None,
    baselines: Sequence[str] = ("random", "raw"),
) -> Plan:
    """How long each recipe is trained under each budget.

    Args:
        recipes: At least one; all on the same training images.
        evaluations: By a name of each dataset.
        images_seen: Of each recipe (two views of an image count once); those of the first recipe, if not given.
        num_points: How often a run is evaluated, evenly spaced, the last time at its end.
        reference: Name of the recipe whose FLOPs are those of equal compute; the most expensive, if not given.
        baselines: Some of `BASELINES`.

    Returns:
        Under `images` each recipe sees `images_seen`, to half a batch; under `compute` each takes the FLOPs of the
        reference, to a step.

    Raises:
        InputError: The recipes' data differ or cannot be read, or an argument is out of range.
    """
    _check_recipes(recipes)
    for name, value in (("images_seen", images_seen), ("num_points", num_points)):
        if value is not None:
            check_count(name, value)
    choose("baselines", baselines, BASELINES, least=0)
    names = [recipe.name for recipe in recipes]
    if reference not in (None, *names):
        raise InputError(f"`reference` is {reference!r}; give the name of one of the recipes: {', '.join(names)}.")
    for evaluation in evaluations.values():
        evaluation.check()
    first = recipes[0]
    dataset = build_datasets(first.data, first.config, first.args.seed)[0]
    if not hasattr(dataset, "__len__"):
        raise InputError("`streaming` gives no number of images to compare by; leave it out.")
    costs = {recipe.name: Cost(recipe, len(dataset)) for recipe in recipes}
    if images_seen is None:
        cost, steps = costs[first.name], first.args.max_steps
        steps = steps if steps > 0 else math.ceil(first.args.num_train_epochs * cost.steps_per_epoch)
        images_seen = steps * cost.images_per_step
    by_images = {name: max(1, round(images_seen / cost.images_per_step)) for name, cost in costs.items()}
    flops = {name: cost.flops(by_images[name], by_images[name]) for name, cost in costs.items()}
    budget = max(flops.values()) if reference is None else flops[reference]
    by_compute = {name: cost.steps_for(budget) for name, cost in costs.items()}
    by_compute |= {name: by_images[name] for name in names if flops[name] == budget}  # not trained again
    steps_by_budget = {"images": by_images, "compute": by_compute}
    counts = dict(num_images=len(dataset), images_seen=images_seen, num_points=num_points)
    by_name = dict(zip(names, recipes, strict=True))
    return Plan(by_name, costs, steps_by_budget, evaluations, **counts, baselines=tuple(baselines))


def _check_recipes(recipes: Sequence[Recipe]) -> None:
    names = [recipe.name for recipe in recipes]
    if not names or len(set(names)) < len(names) or set(names) & BASELINES.keys():
        raise InputError(
            f"`recipes` is {names}; give at least one, and each under a name of its own ({', '.join(BASELINES)} are "
            "those of the baselines)."
        )
    first = recipes[0]
    if first.args.world_size > 1:
        raise InputError("a comparison runs in one process; start it without torchrun.")
    for recipe in recipes:
        for name in SAME_DATA:
            value, expected = getattr(recipe.data, name), getattr(first.data, name)
            if value != expected:
                raise InputError(
                    f"`{name}` is {expected!r} in {first.name} and {value!r} in {recipe.name}, but recipes are "
                    f"compared on the same images; give --{name}, which goes before what the recipes say."
                )


def keep_plan(plan: Plan, path: Path) -> None:
    """Writes the plan, or checks that it is the one that was written, to which recipes may have been added.

    Raises:
        InputError: It is another; the message names what differs.
    """
    new, old = plan.to_json(), read_json(path)
    grown = old and {**old, "recipes": {**new["recipes"], **old["recipes"]}}
    if grown in (None, new):
        write_whole(path, json.dumps(new, indent=2) + "\n")
    else:
        before, now = (pd.json_normalize(content).to_dict("records")[0] for content in (grown, new))
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        changed = "; ".join(f"{name}: {before.get(name)!r} there, {now.get(name)!r} now" for name in names)
        raise InputError(
            f"`output_dir` {str(path.parent)!r} holds another comparison ({changed}). Choose another folder, or go on "
            "with the same settings."
        )
