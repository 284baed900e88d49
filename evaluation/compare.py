# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Pretraining recipes side by side: the same images seen, or the same compute, judged by the same protocols.

All that a comparison knows is in files that appear whole or not at all, so that it can be killed at any point and
called again: `plan.json`, and for each run a folder with its checkpoints, its weights on the way (`points/`) and at the
end (`model/`), and at last `result.json`.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import re
import shutil
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from clmae.configuration import MAEConfig
from clmae.configuration.errors import InputError
from clmae.evaluation.features import LabelledImages
from clmae.evaluation.report import PROTOCOLS, evaluate_model
from clmae.model_cards.files import write_whole
from clmae.training.arguments import PretrainingArguments
from clmae.training.build import build_trainer
from clmae.training.callbacks import InterruptCallback
from clmae.training.contrastive_crop import refresh_epochs
from clmae.training.data import DataArguments, build_datasets, load_image_dataset
from clmae.training.flops import count_encoder_flops, count_step_flops
from clmae.training.pictures import save_figure
from clmae.training.sealing import last_valid_checkpoint
from clmae.training.trainer import CurriculumTrainer

BUDGETS = {"images": "equal images seen", "compute": "equal compute"}
NUM_POINTS = 4
# What decides which images a recipe trains on; how it shows them is its own affair.
SAME_DATA = (
    *("dataset", "dataset_config_name", "train_split", "eval_split", "num_held_out"),
    *("image_column", "streaming", "max_train_samples"),
)


@dataclass(frozen=True)
class Recipe:
    """What is compared.

    Attributes:
        name: Of its row in the table and its folders; unique.
        config: Of the model, whose class is registered with `AutoModelForPreTraining`.
        data, args: As for `clmae pretrain`; output folder, seed and number of steps are the comparison's.
        options: What was asked for, as JSON; a comparison that goes on with other options is refused.
    """

    name: str
    config: MAEConfig
    data: DataArguments
    args: PretrainingArguments
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judging:
    """On which labelled images, and how; as the arguments of [`evaluate_model`]."""

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

    def check(self) -> None:
        """Refuses what would fail only after the training.

        Raises:
            InputError: An unknown protocol, or `dataset` has no such split, no classes, or images without a class.
        """
        unknown = [protocol for protocol in self.protocols if protocol not in PROTOCOLS]
        if unknown or not self.protocols or len(set(self.protocols)) < len(self.protocols):
            raise InputError(
                f"`protocols` is {list(self.protocols)}; give some of {', '.join(PROTOCOLS)}, each at most once."
            )
        for split in (self.train_split, self.test_split):
            if split is not None:
                images = load_image_dataset(
                    self.dataset, split, config_name=self.config_name, image_column=self.image_column
                ).dataset
                LabelledImages(images, None, image_column=self.image_column, label_column=self.label_column)

    @property
    def curve_protocol(self) -> str:
        """The one that judges the weights on the way."""
        return "knn" if "knn" in self.protocols else self.protocols[0]

    def judge(self, model: Path, protocols: Sequence[str], **options: Any) -> dict[str, Any]:
        """Accuracies in percent by encoder (`"pretrained"` ...), protocol and column."""
        settings = asdict(self)
        del settings["dataset"], settings["protocols"]
        results = evaluate_model(model, self.dataset, protocols, **settings, **options)
        rows = [(row, result.protocol) for result in results.values() for row in result.rows]
        accuracies: dict[str, dict[str, dict[str, float]]] = {row.name: {} for row, _ in rows}
        for row, protocol in rows:
            accuracies[row.name][protocol] = row.accuracies
        return {"accuracies": accuracies, "settings": {name: result.settings for name, result in results.items()}}


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
    """One pretraining; its length decides its schedules, so that runs of two lengths are two runs."""

    recipe: str
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.recipe}-{self.steps}-steps-seed-{self.seed}"

    def points(self, count: int) -> list[int]:
        """At most `count` evenly spaced steps at which it is judged, the last at its end."""
        return sorted({math.ceil(i * self.steps / count) for i in range(1, count + 1)})


@dataclass(frozen=True)
class Plan:
    """Steps by budget and recipe, and what they come from."""

    recipes: dict[str, Recipe]
    costs: dict[str, Cost]
    steps: dict[str, dict[str, int]]
    judging: Judging
    num_images: int
    images_seen: int
    num_points: int

    def to_json(self) -> dict[str, Any]:
        """All that a number of the table depends on, except the seed."""
        sides = {
            name: {
                "options": recipe.options,
                "flops_per_step": self.costs[name].step_flops,
                "steps": {budget: steps[name] for budget, steps in self.steps.items()},
            }
            for name, recipe in self.recipes.items()
        }
        rest = {k: getattr(self, k) for k in ("num_images", "images_seen", "num_points")}
        return json.loads(json.dumps({"recipes": sides, "judging": asdict(self.judging), **rest}, default=str))


def make_plan(
    recipes: Sequence[Recipe],
    judging: Judging,
    images_seen: int | None = None,
    num_points: int = NUM_POINTS,
    reference: str | None = None,
) -> Plan:
    """How long each recipe is trained under each budget.

    Args:
        recipes: At least one; all on the same training images.
        judging: How the encoders are judged.
        images_seen: Of each recipe (two views of an image count once); those of the first recipe, if not given.
        num_points: How often a run is judged, evenly spaced, the last time at its end.
        reference: Name of the recipe whose FLOPs are those of equal compute; the most expensive, if not given.

    Returns:
        Under `images` each recipe sees `images_seen`, to half a batch; under `compute` each takes the FLOPs of the
        reference, to a step.

    Raises:
        InputError: The recipes' data differ or cannot be read, or an argument is out of range.
    """
    _check_recipes(recipes)
    for name, value in (("images_seen", images_seen), ("num_points", num_points)):
        if value is not None and value < 1:
            raise InputError(f"`{name}` is {value}; give at least 1.")
    names = [recipe.name for recipe in recipes]
    if reference is not None and reference not in names:
        raise InputError(f"`reference` is {reference!r}; give the name of one of the recipes: {', '.join(names)}.")
    judging.check()
    first = recipes[0]
    dataset, *_ = build_datasets(first.data, first.config, first.args.seed)
    if not hasattr(dataset, "__len__"):
        raise InputError("`streaming` gives no number of images to compare by; leave it out.")
    costs = {recipe.name: Cost(recipe, len(dataset)) for recipe in recipes}
    if images_seen is None:
        cost = costs[first.name]
        steps = first.args.max_steps
        steps = steps if steps > 0 else math.ceil(first.args.num_train_epochs * cost.steps_per_epoch)
        images_seen = steps * cost.images_per_step
    by_images = {name: max(1, round(images_seen / cost.images_per_step)) for name, cost in costs.items()}
    flops = {name: cost.flops(by_images[name], by_images[name]) for name, cost in costs.items()}
    budget = max(flops.values()) if reference is None else flops[reference]
    by_compute = {
        # The reference is not trained again.
        name: by_images[name] if flops[name] == budget else cost.steps_for(budget)
        for name, cost in costs.items()
    }
    return Plan(
        recipes={recipe.name: recipe for recipe in recipes},
        costs=costs,
        steps={"images": by_images, "compute": by_compute},
        judging=judging,
        num_images=len(dataset),
        images_seen=images_seen,
        num_points=num_points,
    )


def _check_recipes(recipes: Sequence[Recipe]) -> None:
    names = [recipe.name for recipe in recipes]
    if not names or len(set(names)) < len(names):
        raise InputError(f"`recipes` is {names}; give at least one, and each under a name of its own.")
    first = recipes[0]
    if first.args.world_size > 1:
        raise InputError("a comparison runs in one process; start it without torchrun.")
    for recipe in recipes:
        for name in SAME_DATA:
            ours, theirs = getattr(recipe.data, name), getattr(first.data, name)
            if ours != theirs:
                raise InputError(
                    f"`{name}` is {theirs!r} in {first.name} and {ours!r} in {recipe.name}, but recipes are compared "
                    f"on the same images; give --{name}, which goes before what the recipes say."
                )


def keep_plan(plan: Plan, path: Path) -> None:
    """Writes the plan, or checks that it is the one that was written.

    Raises:
        InputError: It is another; the message names what differs.
    """
    new = plan.to_json()
    if not path.is_file():
        write_whole(path, json.dumps(new, indent=2) + "\n")
        return
    old = json.loads(path.read_text(encoding="utf-8"))
    if old != new:
        found = "; ".join(f"{name}: {a!r} there, {b!r} now" for name, a, b in _differences(old, new))
        raise InputError(
            f"`output_dir` {str(path.parent)!r} holds another comparison ({found}). Choose another folder, or go on "
            "with the same settings."
        )


def _differences(old: Any, new: Any, name: str = "") -> Iterable[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new


# -- a run ------------------------------------------------------------------------------------------------------------


class _Keeper(TrainerCallback):
    """Keeps the weights at the points where a run is judged."""

    def __init__(self, trainer: CurriculumTrainer, folder: Path, points: Sequence[int]):
        self.trainer, self.folder, self.points = trainer, folder, points

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the watch."""
        self.start, self.first_step = time.perf_counter(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Comes before the step's checkpoint: whoever resumes from it finds these weights."""
        step = state.global_step
        if step not in self.points:
            return
        last = step == self.points[-1]
        if last:
            seconds = (time.perf_counter() - self.start) / (step - self.first_step)
            write_whole(self.folder / "timing.json", json.dumps({"seconds_per_step": seconds}))
        folder = self.folder / "model" if last else self.folder / "points" / f"step-{step}"
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        for leftover in (unfinished, folder):  # of a run that was killed after it, and went on from before it
            shutil.rmtree(leftover, ignore_errors=True)
        self.trainer.save_model(str(unfinished), _internal_call=True)
        os.replace(unfinished, folder)


def pretrain(recipe: Recipe, run: Run, folder: Path, num_points: int) -> bool:
    """Trains, or goes on with, one run: as `clmae pretrain --max_steps ... --seed ...` would.

    Returns:
        Whether it came to its end; `False` after Ctrl-C.
    """
    args = dataclasses.replace(
        recipe.args, output_dir=str(folder), seed=run.seed, max_steps=run.steps, run_name=run.name, push_to_hub=False
    )
    checkpoint, _ = last_valid_checkpoint(folder)
    torch.compiler.reset()  # or the runs before would count as recompilations of this one's code
    interrupt = InterruptCallback()
    trainer = build_trainer(recipe.config, recipe.data, args, [interrupt])
    trainer.add_callback(_Keeper(trainer, folder, run.points(num_points)))
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        interrupt.restore()
    trainer.accelerator.end_training()
    return not interrupt.interrupted


def judge_points(run: Run, plan: Plan, folder: Path, device: torch.device) -> list[dict[str, Any]]:
    """Judges the weights of a trained run on the way to its end, which are then deleted; each at most once."""
    *between, _ = run.points(plan.num_points)
    judging, points = plan.judging, []
    for step in between:
        path = folder / "points" / f"step-{step}.json"
        if not path.is_file():
            weights = folder / "points" / f"step-{step}"
            options = dict(baselines=False, device=device, seed=run.seed, progress=False)
            judged = judging.judge(weights, [judging.curve_protocol], **options)
            write_whole(path, json.dumps(judged["accuracies"]["pretrained"]))
            shutil.rmtree(weights)
        points.append(_point(run, plan, step, json.loads(path.read_text(encoding="utf-8"))))
    return points


def _point(run: Run, plan: Plan, step: int, accuracies: dict[str, dict[str, float]]) -> dict[str, Any]:
    cost = plan.costs[run.recipe]
    return {
        "step": step,
        "images_seen": step * cost.images_per_step,
        "flops": cost.flops(step, run.steps),
        "accuracies": accuracies,
    }


def judge_run(run: Run, plan: Plan, folder: Path, device: torch.device, baselines: bool) -> dict[str, Any]:
    """Judges the weights of a trained run on the way and at its end; each at most once."""
    points = judge_points(run, plan, folder, device)
    options = dict(baselines=baselines, device=device, seed=run.seed, progress=False)
    judged = plan.judging.judge(folder / "model", plan.judging.protocols, **options)
    points.append(_point(run, plan, run.steps, judged["accuracies"].pop("pretrained")))
    return {
        "run": asdict(run),
        "points": points,
        "baselines": judged["accuracies"],
        **json.loads((folder / "timing.json").read_text(encoding="utf-8")),
        "settings": judged["settings"],
    }


def finish_run(run: Run, plan: Plan, folder: Path, baselines: bool) -> dict[str, Any] | None:
    """Whatever is still to be done of a run, and its result; `None` after Ctrl-C."""
    path = folder / "result.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if result is None:
        recipe = plan.recipes[run.recipe]
        if not (folder / "model").is_dir() and not pretrain(recipe, run, folder, plan.num_points):
            return None
        result = judge_run(run, plan, folder, recipe.args.device, baselines)
        write_whole(path, json.dumps(result, indent=2) + "\n")
    for leftover in [*folder.glob("checkpoint-*"), folder / "points"]:
        shutil.rmtree(leftover, ignore_errors=True)
    return result


# -- comparing --------------------------------------------------------------------------------------------------------


def compare(
    plan: Plan,
    output_dir: str | os.PathLike[str],
    seeds: Sequence[int] = (0,),
    budgets: Sequence[str] = tuple(BUDGETS),
    log: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """Pretrains and judges what is not yet done of a plan; writes `table.md`, `.json`, `.csv` and `accuracy.png`.

    Args:
        plan: From [`make_plan`]; import clmae first, for this project's families.
        output_dir: A new folder, or one with a comparison by the same plan, which goes on. Seeds and budgets only
            choose the runs: more of them may follow.
        seeds: One run each, of each recipe.
        budgets: Some of `"images"`, `"compute"`.
        log: Is told what goes on.

    Returns:
        What is in `table.json`; `None` after Ctrl-C.

    Raises:
        InputError: Unknown budgets, or another plan's folder.
    """
    if not budgets or any(budget not in BUDGETS for budget in budgets) or len(set(budgets)) < len(budgets):
        raise InputError(f"`budgets` is {list(budgets)}; give some of {', '.join(BUDGETS)}, each at most once.")
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"`seeds` is {list(seeds)}; give at least one, and each once.")
    folder = Path(output_dir)
    keep_plan(plan, folder / "plan.json")
    first = next(iter(plan.recipes))
    wanted = {
        Run(name, plan.steps[budget][name], seed): None for seed in seeds for budget in budgets for name in plan.recipes
    }
    results = {}
    for number, run in enumerate(wanted, 1):
        own = folder / "runs" / run.name
        state = "done before" if (own / "result.json").is_file() else f"in {own}"
        log(f"run {number} of {len(wanted)}: {run.recipe}, {run.steps:,} steps, seed {run.seed}: {state}")
        baselines = run.recipe == first and run.steps == plan.steps[budgets[0]][first]
        results[run] = finish_run(run, plan, own, baselines)
        if results[run] is None:
            return None
    table = make_table(plan, results, seeds, budgets)
    write_whole(folder / "table.json", json.dumps(table, indent=2, allow_nan=False) + "\n")
    write_whole(folder / "table.csv", table_to_csv(table))
    write_whole(folder / "table.md", table_to_markdown(table))
    save_figure(accuracy_figure(table), folder / "accuracy.png")
    return table


def make_table(
    plan: Plan, results: dict[Run, dict[str, Any]], seeds: Sequence[int], budgets: Sequence[str]
) -> dict[str, Any]:
    """Rows by budget and recipe, and the baselines': mean, standard deviation (of two seeds or more) and values."""
    rows, curves = [], []
    first = next(iter(plan.recipes))
    for budget in budgets:
        for name in plan.recipes:
            group = [results[Run(name, plan.steps[budget][name], seed)] for seed in seeds]
            points = [_merge([result["points"][i] for result in group]) for i in range(len(group[0]["points"]))]
            seconds = _statistics([result["seconds_per_step"] for result in group])
            common = {"budget": budget, "recipe": name, "seeds": list(seeds)}
            rows.append({**common, **points[-1], "seconds_per_step": seconds})
            curves.append({**common, "points": points})
    group = [results[Run(first, plan.steps[budgets[0]][first], seed)]["baselines"] for seed in seeds]
    for name in group[0]:
        nothing = {"step": 0, "images_seen": 0, "flops": 0, "seconds_per_step": None}
        accuracies = _merge([{"accuracies": baselines[name]} for baselines in group])
        rows.append({"budget": None, "recipe": name, "seeds": list(seeds), **nothing, **accuracies})
    return {"curve_protocol": plan.judging.curve_protocol, "rows": rows, "curves": curves}


def _merge(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The same point of several seeds; only their accuracies differ."""
    accuracies = {
        protocol: {column: _statistics([p["accuracies"][protocol][column] for p in points]) for column in columns}
        for protocol, columns in points[0]["accuracies"].items()
    }
    return {**points[0], "accuracies": accuracies}


def _statistics(values: list[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": deviation, "values": values}


def headline(protocol: str, columns: Iterable[str]) -> str:
    """The column by which a protocol is quoted: of k-NN's the largest k by cosine, else the first."""
    columns = list(columns)
    by_cosine = [column for column in columns if re.fullmatch(r"k = \d+", column)]
    return (by_cosine if protocol == "knn" and by_cosine else columns[:1])[-1]


def table_to_csv(table: dict[str, Any]) -> str:
    """A line a row, all columns; accuracies in percent, empty where there is none."""
    measured = [
        (protocol, column) for protocol, columns in table["rows"][0]["accuracies"].items() for column in columns
    ]
    lines = [["budget", "recipe", "seeds", "images_seen", "steps", "flops"]]
    lines[0] += [f"{protocol} {column}{part}" for protocol, column in measured for part in ("", " std")]
    lines[0].append("seconds_per_step")
    for row in table["rows"]:
        cells = [row["budget"] or "", row["recipe"], " ".join(map(str, row["seeds"]))]
        cells += [str(row[name]) for name in ("images_seen", "step", "flops")]
        for protocol, column in measured:
            found = row["accuracies"][protocol].get(column, {})
            cells += ["" if found.get(name) is None else f"{found[name]:.3f}" for name in ("mean", "std")]
        seconds = row["seconds_per_step"]
        lines.append([*cells, "" if seconds is None else f"{seconds['mean']:.4g}"])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def table_to_markdown(table: dict[str, Any]) -> str:
    """A table a budget, with each protocol's headline column; the other columns are in the CSV and JSON files."""
    measured = [(protocol, headline(protocol, columns)) for protocol, columns in table["rows"][0]["accuracies"].items()]
    seeds = ", ".join(map(str, table["rows"][0]["seeds"]))
    head = ["recipe", *(f"{protocol}, {column}" for protocol, column in measured)]
    head += ["images seen", "steps", "FLOPs", "s / step"]
    several = "," in seeds
    parts = [f"Accuracy in percent; seed{'s' * several} {seeds}{': mean ± standard deviation' * several}.\n"]
    for budget in dict.fromkeys(row["budget"] for row in table["rows"] if row["budget"]):
        lines = [head, ["---", *["---:"] * (len(head) - 1)]]
        for row in table["rows"]:
            if row["budget"] in (budget, None):
                cells = [_accuracy_cell(row["accuracies"][protocol][column]) for protocol, column in measured]
                if row["budget"]:
                    cells += [f"{row['images_seen']:,}", f"{row['step']:,}", f"{row['flops']:.3g}"]
                    cells += [f"{row['seconds_per_step']['mean']:.3g}"]
                lines.append([row["recipe"], *cells, *[""] * (len(head) - 1 - len(cells))])
        title = BUDGETS[budget].capitalize()
        parts.append(f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return "\n".join(parts)


def _accuracy_cell(found: dict[str, Any]) -> str:
    return f"{found['mean']:.2f}" + ("" if found["std"] is None else f" ± {found['std']:.2f}")


def accuracy_figure(table: dict[str, Any]) -> Figure:
    """Accuracy by the curve's protocol over images seen, and over FLOPs; the baselines as lines."""
    protocol = table["curve_protocol"]
    column = headline(protocol, table["curves"][0]["points"][0]["accuracies"][protocol])
    budgets = list(dict.fromkeys(curve["budget"] for curve in table["curves"]))
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    panels = (("images", "images_seen", "images seen"), ("compute", "flops", "compute (FLOPs)"))
    for axis, (budget, unit, label) in zip(axes, panels, strict=True):
        shown = budget if budget in budgets else budgets[0]
        curves = [curve for curve in table["curves"] if curve["budget"] == shown]
        for i, curve in enumerate(curves):
            _draw_curve(axis, curve, unit, protocol, column, f"C{i}")
        baselines = [row for row in table["rows"] if row["budget"] is None]
        for row, style in zip(baselines, ("--", ":"), strict=False):
            value = row["accuracies"][protocol][column]["mean"]
            axis.axhline(value, color="grey", linewidth=1, linestyle=style, label=row["recipe"])
        axis.set(title=f"runs at {BUDGETS[shown]}", xlabel=label)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{protocol}, {column}: accuracy in %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False)
    return figure


def _draw_curve(axis: Axes, curve: dict[str, Any], unit: str, protocol: str, column: str, color: str) -> None:
    points = curve["points"]
    x = [point[unit] for point in points]
    found = [point["accuracies"][protocol][column] for point in points]
    mean, deviation = [f["mean"] for f in found], [f["std"] for f in found]
    axis.plot(x, mean, marker="o", markersize=4, color=color, label=curve["recipe"])
    if deviation[0] is not None:
        low, high = ([m + sign * d for m, d in zip(mean, deviation, strict=True)] for sign in (-1, 1))
        axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


__all__ = ["BUDGETS", "Cost", "Judging", "Plan", "Recipe", "Run", "compare", "count_step_flops", "make_plan"]
