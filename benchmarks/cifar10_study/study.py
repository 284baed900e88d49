# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What do MAE, CL-MAE and CMAE learn under equal conditions? Pretrains, judges and tabulates; see study.yaml.

    python benchmarks/cifar10_study/study.py run --scale cpu --seeds 0 1
    python benchmarks/cifar10_study/study.py run --scale gpu --minutes 9     # exit code 75: call again
    python benchmarks/cifar10_study/study.py cell --scale cpu --recipe cl_mae --budget images --seed 0 --protocol knn
    python benchmarks/cifar10_study/study.py table --scale cpu

A cell is a row (a recipe under a budget, or a baseline), a seed and a protocol. Its JSON file in
`<output_dir>/<scale>/cells` appears whole or not at all, and is the only thing that the table is made of; a cell that
is there is not done again. Pretrained models stay in `<output_dir>/<scale>/runs/*/model`, ready for `clmae card`.
Several processes may work in one folder, on seeds or rows of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from scipy.stats import t as student_t
from transformers import AutoModelForPreTraining, set_seed
from transformers.utils import logging

from clmae.cli.compare import WITHOUT_EFFECT
from clmae.cli.options import recipe_to_argv
from clmae.cli.pretrain import read_arguments
from clmae.evaluation.compare import (
    BUDGETS,
    Judging,
    Plan,
    Recipe,
    Run,
    headline,
    judge_points,
    keep_plan,
    make_plan,
    pretrain,
)
from clmae.evaluation.finetuning import FinetuningArguments, finetune
from clmae.evaluation.report import PROTOCOLS as FROZEN
from clmae.model_cards.files import write_whole
from clmae.model_cards.record import RECORD_NAME, read_json
from clmae.training.data import build_datasets
from clmae.training.pictures import save_figure
from clmae.training.sealing import last_valid_checkpoint

HERE = Path(__file__).resolve().parent
# Raw pixels have no weights, and no seed but the first.
BASELINES = {"random": "random encoder", "raw": "raw pixels", "scratch": "from scratch, with labels"}
NOT_FINISHED = 75  # the exit code by which programs say: call again
LEVEL = 0.95


# -- what is to be done -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A figure of the table under one seed; baselines have no budget."""

    row: str
    budget: str | None
    seed: int
    protocol: str

    @property
    def trained(self) -> str:
        """What its protocols share: the weights."""
        return "-".join([self.row, *([self.budget] if self.budget else []), f"seed-{self.seed}"])


@dataclass(frozen=True)
class Study:
    """One scale of the study, its plan and its folder."""

    settings: dict[str, Any]
    plan: Plan
    folder: Path

    def to_json(self) -> dict[str, Any]:
        """All that a figure depends on, except the seed."""
        own = {name: self.settings[name] for name in ("finetuning", "protocols", "from_scratch")}
        return {**self.plan.to_json(), **own}

    def path(self, cell: Cell) -> Path:
        """Of a cell's file."""
        return self.folder / "cells" / f"{cell.trained}-{cell.protocol}.json"


def read_settings(path: Path, scale: str) -> dict[str, Any]:
    """A scale's entries, with what the scales share.

    Raises:
        SystemExit: There is no such scale.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    scales = content.pop("scales")
    if scale not in scales:
        raise SystemExit(f"`--scale` is {scale!r}; {path.name} has {', '.join(scales)}.")
    return {**content, **scales[scale], "pretraining": {**content["pretraining"], **scales[scale]["pretraining"]}}


def read_recipes(settings: dict[str, Any], dataset: str, folder: Path) -> list[Recipe]:
    """The recipes of a scale, as `clmae pretrain` would read them."""
    recipes = []
    for name, recipe in settings["recipes"].items():
        own = recipe["options"]
        options = {**settings["pretraining"], **settings["families"][own["family"]], **own}
        argv = recipe_to_argv({**options, "dataset": dataset, "output_dir": str(folder)})
        config, data, args, _ = read_arguments(argv)
        kept = {option: value for option, value in options.items() if option not in WITHOUT_EFFECT}
        recipes.append(Recipe(name, config, data, args, kept))
    return recipes


def open_study(settings: dict[str, Any], dataset: str, folder: Path) -> Study:
    """The study in a folder: a new one, or the one that was begun there.

    Raises:
        ValueError: The folder holds figures by other settings, or the settings or images cannot be worked with.
    """
    recipes = read_recipes(settings, dataset, folder)
    judging = Judging(dataset=dataset, protocols=tuple(FROZEN), **settings["judging"])
    plan = make_plan(recipes, judging, settings["images_seen"], settings["num_points"], settings["reference"])
    study = Study(settings, plan, folder)
    keep_plan(study, folder / "plan.json")
    return study


def table_rows(settings: dict[str, Any], steps: dict[str, dict[str, int]]) -> list[tuple[str, str | None]]:
    """`(recipe or baseline, budget)` of each row; equal compute only where it is longer than equal images.

    The reference is there at equal images; so are those that are dearer, which would be stopped before, and ablations.
    """
    longer = [name for name in settings["recipes"] if steps["compute"][name] > steps["images"][name]]
    longer = [name for name in longer if name not in ablations(settings)]
    return [
        *((name, "images") for name in settings["recipes"]),
        *((name, "compute") for name in longer),
        *((name, None) for name in BASELINES),
    ]


def ablations(settings: dict[str, Any]) -> dict[str, str]:
    """Which recipe each ablation is one of; they are judged by frozen features alone."""
    recipes = settings["recipes"].items()
    return {name: recipe["ablation_of"] for name, recipe in recipes if "ablation_of" in recipe}


def table_cells(
    settings: dict[str, Any], rows: Sequence[tuple[str, str | None]], seeds: Sequence[int] | None = None
) -> list[Cell]:
    """All cells of some rows, seed by seed."""
    protocols = dict.fromkeys([*BASELINES, *ablations(settings)], tuple(FROZEN))
    protocols["scratch"] = tuple(settings["protocols"])
    everything = (*FROZEN, *settings["protocols"])
    return [
        Cell(row, budget, seed, protocol)
        for seed in (settings["seeds"] if seeds is None else seeds)
        for row, budget in rows
        for protocol in protocols.get(row, everything)
        if row != "raw" or seed == settings["seeds"][0]
    ]


# -- doing it ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stopping(minutes: float | None) -> Iterator[None]:
    """Turns SIGTERM into Ctrl-C, on which training saves a checkpoint; and sends one when the minutes are over."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    if minutes is not None:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        if minutes is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before)


def run_cells(study: Study, cells: Sequence[Cell], log: Callable[[str], None] = print) -> None:
    """Whatever is not yet done of some cells; tells each figure.

    Raises:
        KeyboardInterrupt: A signal or the end of the time; another call goes on from there.
    """
    todo = [cell for cell in cells if not study.path(cell).is_file()]
    log(f"{len(cells) - len(todo)} of {len(cells)} cells are done; remove a cell's file to have it done again")
    number = itertools.count(1)
    for _, group in itertools.groupby(todo, key=lambda cell: cell.trained):
        group = list(group)
        model, training = _weights(study, group[0], log)
        # Those that look at frozen features share them.
        frozen = [cell for cell in group if cell.protocol in FROZEN]
        for part in ([frozen] if frozen else []) + [[cell] for cell in group if cell not in frozen]:
            start = time.perf_counter()
            results = _judge_frozen(study, part, model) if part is frozen else [_finetune(study, part[0], model)]
            seconds = round((time.perf_counter() - start) / len(part), 1)
            for cell, result in zip(part, results, strict=True):
                content = {**asdict(cell), **result, "seconds": seconds, "training": training}
                write_whole(study.path(cell), json.dumps(content, indent=2, allow_nan=False) + "\n")
                column, accuracy = _headline(cell.protocol, result["accuracies"])
                name = f"{cell.trained.replace('-', ' ')}: {cell.protocol}, {column}"
                log(f"[{next(number)}/{len(todo)}] {name}: {accuracy:.2f} % ({seconds:.0f} s)")
            shutil.rmtree(model.parent / part[0].protocol, ignore_errors=True)  # of fine-tuning


def _headline(protocol: str, accuracies: dict[str, float]) -> tuple[str, float]:
    column = headline(protocol, accuracies)
    return column, accuracies[column]


def _weights(study: Study, cell: Cell, log: Callable[[str], None]) -> tuple[Path, dict[str, Any] | None]:
    """Folder of a cell's encoder, trained if need be, and what its training took; nothing of a baseline."""
    if cell.row in BASELINES:
        return _untrained(study, cell), None
    run = Run(cell.row, study.plan.steps[cell.budget][cell.row], cell.seed)
    folder = study.folder / "runs" / run.name
    model, path = folder / "model", folder / "training.json"
    if not path.is_file():
        recipe = study.plan.recipes[run.recipe]
        if not model.is_dir():
            with _output_to(folder / "log.txt"):
                if not pretrain(recipe, run, folder, study.plan.num_points):
                    raise KeyboardInterrupt
        _complete(folder)
        training = _describe_training(study, run, model)
        training["points"] = judge_points(run, study.plan, folder, recipe.args.device)
        write_whole(path, json.dumps(training, indent=2) + "\n")
        log(f"pretrained {run.name} in {training['seconds']:.0f} s")
    for leftover in [*folder.glob("checkpoint-*"), folder / "points"]:
        shutil.rmtree(leftover, ignore_errors=True)
    return model, read_json(path)


def _complete(folder: Path) -> None:
    """Puts into `model` what a card shows beside the weights."""
    checkpoint, _ = last_valid_checkpoint(folder)
    if checkpoint is not None:
        shutil.copy(Path(checkpoint) / "trainer_state.json", folder / "model")
    if (folder / "pictures").is_dir():
        shutil.copytree(folder / "pictures", folder / "model" / "pictures", dirs_exist_ok=True)


def _describe_training(study: Study, run: Run, model: Path) -> dict[str, Any]:
    cost, sessions = study.plan.costs[run.recipe], read_json(model / RECORD_NAME)["sessions"]
    return {
        "run": run.name,
        "steps": run.steps,
        "images_seen": run.steps * cost.images_per_step,
        "flops": cost.flops(run.steps, run.steps),
        "seconds": round(sum(session["seconds"] for session in sessions), 1),
        "device": ", ".join(dict.fromkeys(session["device"] for session in sessions)),
        "mask_difficulty": _last_difficulty(model),
    }


def _last_difficulty(model: Path) -> float | None:
    """As the run logged it last; `None` of random masks."""
    logs = (read_json(model / "trainer_state.json") or {}).get("log_history", [])
    return next((log["mask_difficulty"] for log in reversed(logs) if "mask_difficulty" in log), None)


def _untrained(study: Study, cell: Cell) -> Path:
    """A folder with the recipes' encoder at random initialisation; a row's own, for it may be trained there."""
    model = study.folder / "runs" / cell.trained / "model"
    if not model.is_dir():
        recipe = next(iter(study.plan.recipes.values()))
        set_seed(cell.seed)
        unfinished = model.with_name("model.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        AutoModelForPreTraining.from_config(recipe.config).save_pretrained(unfinished)
        build_datasets(recipe.data, recipe.config)[2].save_pretrained(unfinished)
        os.replace(unfinished, model)
    return model


def _judge_frozen(study: Study, cells: Sequence[Cell], model: Path) -> list[dict[str, Any]]:
    raw, device = cells[0].row == "raw", next(iter(study.plan.recipes.values())).args.device
    options = dict(baselines=raw, device=device, seed=cells[0].seed, progress=False)
    judged = study.plan.judging.judge(model, [cell.protocol for cell in cells], **options)
    accuracies = judged["accuracies"]["raw pixels" if raw else "pretrained"]
    return [{"accuracies": accuracies[c.protocol], "settings": judged["settings"][c.protocol]} for c in cells]


def finetuning_arguments(settings: dict[str, Any], cell: Cell, folder: Path) -> tuple[FinetuningArguments, float]:
    """How a cell is fine-tuned, and on which share of the labels, in (0, 1]."""
    own = dict(settings["protocols"][cell.protocol])
    fraction = own.pop("label_fraction")
    fields = {**settings["finetuning"], **own, **(settings["from_scratch"] if cell.row == "scratch" else {})}
    quiet = dict(report_to="none", disable_tqdm=True, resume_from_checkpoint="last")
    return FinetuningArguments(output_dir=str(folder), seed=cell.seed, **quiet, **fields), fraction


def _finetune(study: Study, cell: Cell, model: Path) -> dict[str, Any]:
    args, fraction = finetuning_arguments(study.settings, cell, model.parent / cell.protocol)
    images = asdict(study.plan.judging)
    del images["protocols"], images["feature"]
    with _output_to(model.parent / "log.txt"):
        result = finetune(model, images.pop("dataset"), args, label_fraction=fraction, baselines=False, **images)
    return {"accuracies": result.rows[0].accuracies, "settings": result.settings}


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """The trainers print their logs; they go to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        yield


# -- the table --------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean, and half of Student's 95 % interval of it; of a single value no interval."""
    n = len(values)
    half = None if n < 2 else float(student_t.ppf((1 + LEVEL) / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return {"mean": statistics.mean(values), "half_width": half, "n": n, "values": list(values)}


def collect(settings: dict[str, Any], steps: dict[str, dict[str, int]], folder: Path) -> list[dict[str, Any]]:
    """The table's rows, from the cells that are there."""
    found: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for path in sorted((folder / "cells").glob("*.json")):
        cell = read_json(path)
        found.setdefault((cell["row"], cell["budget"]), []).append(cell)
    return [
        _collect_row(settings, row, budget, found.get((row, budget), [])) for row, budget in table_rows(settings, steps)
    ]


def _collect_row(settings: dict[str, Any], row: str, budget: str | None, cells: list[dict[str, Any]]) -> dict[str, Any]:
    cells = sorted(cells, key=lambda cell: cell["seed"])
    by_protocol = {p: [c for c in cells if c["protocol"] == p] for p in (*FROZEN, *settings["protocols"])}
    accuracies = {
        protocol: {
            column: interval([c["accuracies"][column] for c in group]) | {"seeds": [c["seed"] for c in group]}
            for column in group[0]["accuracies"]
        }
        for protocol, group in by_protocol.items()
        if group
    }
    trainings = list({c["seed"]: c["training"] for c in cells if c["training"]}.values())
    training = None
    if trainings:
        training = {name: trainings[0][name] for name in ("steps", "images_seen", "flops")}
        training["seconds"] = interval([one["seconds"] for one in trainings])
        training["device"] = ", ".join(dict.fromkeys(one["device"] for one in trainings))
        if trainings[0]["mask_difficulty"] is not None:
            training["mask_difficulty"] = interval([one["mask_difficulty"] for one in trainings])
    return {
        "row": row,
        "label": settings["recipes"][row]["label"] if row in settings["recipes"] else BASELINES[row],
        "budget": budget,
        "seeds": sorted({cell["seed"] for cell in cells}),
        "accuracies": accuracies,
        "training": training,
        "judging_seconds": sum(cell["seconds"] for cell in cells),
        "curve": _curve(by_protocol["knn"]),
    }


def total_hours(rows: Sequence[dict[str, Any]]) -> float:
    """Of all that is in the table, one after the other."""
    trainings = [second for row in rows if row["training"] for second in row["training"]["seconds"]["values"]]
    return (sum(trainings) + sum(row["judging_seconds"] for row in rows)) / 3600


def _curve(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """k-NN accuracy on the way and at the end, over the seeds that came there; nothing of a baseline."""
    if not cells or cells[0]["training"] is None:
        return []
    runs = [[*c["training"]["points"], {**c["training"], "accuracies": {"knn": c["accuracies"]}}] for c in cells]
    return [
        {"images_seen": points[0]["images_seen"], "flops": points[0]["flops"]}
        | interval([_headline("knn", point["accuracies"]["knn"])[1] for point in points])
        for points in zip(*runs, strict=True)
    ]


def table_columns(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """`(protocol, column)` of the table: each protocol's headline, and every number of few-shot images."""
    columns: dict[str, dict[str, None]] = {}
    for row in rows:
        for protocol, found in row["accuracies"].items():
            chosen = found if protocol == "fewshot" else [headline(protocol, found)]
            columns.setdefault(protocol, {}).update(dict.fromkeys(chosen))
    return [(protocol, column) for protocol, found in columns.items() for column in found]


def differences(rows: Sequence[dict[str, Any]], base: dict[str, Any]) -> list[dict[str, Any]]:
    """Other rows' accuracies less those of `base` under the same seed: the seeds' common ups and downs drop out."""

    def paired(found: dict[str, Any], other: dict[str, Any] | None) -> dict[str, Any] | None:
        theirs = {} if other is None else dict(zip(other["seeds"], other["values"], strict=True))
        pairs = [v - theirs[seed] for seed, v in zip(found["seeds"], found["values"], strict=True) if seed in theirs]
        return interval(pairs) if pairs else None

    return [
        {
            **row,
            "accuracies": {
                protocol: {
                    column: paired(one, base["accuracies"].get(protocol, {}).get(column)) for column, one in f.items()
                }
                for protocol, f in row["accuracies"].items()
            },
        }
        for row in rows
        if row is not base
    ]


def to_markdown(scale: str, settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """A table a budget, and one of the baselines."""
    columns = table_columns(rows)
    parents = ablations(settings)
    whole = [row for row in rows if row["row"] not in parents]
    images, compute, baselines = ([row for row in whole if row["budget"] == b] for b in (*BUDGETS, None))
    reference = next(row for row in images if row["row"] == settings["reference"])
    dearer = [row["label"] for row in images if row["row"] not in {r["row"] for r in (*compute, reference)}]
    note = f"The FLOPs of {reference['label']} at equal images."
    if dearer:
        note += f" At equal images only, because they take more FLOPs than that: {', '.join(dearer)}."
    most = settings["judging"].get("max_test_samples")
    text = (
        f"Accuracy in percent on {f'{most:,} of ' if most else ''}the test images: mean ± half of the 95 % interval "
        "over the seeds (Student's t; every seed counts). (n): over n seeds, where that is not the row's number. -: "
        "not run. What is behind each row and column is in study.yaml. fewshot: images a class, means over draws; "
        f"finetune-10: 10 % of the labels. Made by `study.py run --scale {scale}`, {total_hours(rows):.1f} hours of "
        "training and judging in one process; a cell of it by `study.py cell`.\n"
    )
    parts = (("Equal images seen", "", images), ("Equal compute", note, [*compute, reference]))
    ablated = [
        row
        for parent in dict.fromkeys(parents.values())
        for row in rows
        if row["budget"] == "images" and parent in (row["row"], parents.get(row["row"]))
    ]
    last = ("Ablations", "At equal images, by frozen features alone.", ablated)
    for title, remark, group in (*parts, ("Baselines", "", baselines), *([last] if ablated else [])):
        shown = [column for column in columns if group is not ablated or column[0] in FROZEN]
        text += f"\n## {title}\n\n{remark}{2 * chr(10) if remark else ''}{_markdown_table(shown, group)}"
        # Of the same budget; of baselines and ablations, at equal images.
        base = next((row for row in (*group, *images) if row["row"] == settings["compared_with"]), None)
        if base is not None:
            text += f"\nLess {base['label']} under the same seed:\n\n"
            text += _markdown_table(shown, differences(group, base), with_costs=False)
    return text


def _markdown_table(columns: Sequence[tuple[str, str]], rows: Sequence[dict[str, Any]], with_costs: bool = True) -> str:
    columns = [(p, c) for p, c in columns if any(row["accuracies"].get(p, {}).get(c) for row in rows)]
    head = ["row", "seeds", *(f"{protocol}, {column}" for protocol, column in columns)]
    head += ["mask difficulty", "images seen", "PFLOPs", "seconds", "hardware"] * with_costs
    lines = [head, ["---", *["---:"] * (len(head) - 2), "---" if with_costs else "---:"]]
    for row in rows:
        cells = [row["label"], str(len(row["seeds"]))]
        cells += [_text(row["accuracies"].get(p, {}).get(c), len(row["seeds"])) for p, c in columns]
        training = row["training"]
        if training is None or not with_costs:
            cells += ["-"] * 5 * with_costs
        else:
            cells += [_text(training.get("mask_difficulty"), len(row["seeds"]), 3)]
            cells += [f"{training['images_seen']:,}", f"{training['flops'] / 1e15:.3g}"]
            cells += [f"{training['seconds']['mean']:.0f}", training["device"]]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _text(found: dict[str, Any] | None, seeds: int, digits: int = 2) -> str:
    if found is None:
        return "-"
    half = "" if found["half_width"] is None else f" ± {found['half_width']:.{digits}f}"
    return f"{found['mean']:.{digits}f}{half}" + (f" ({found['n']})" if found["n"] != seeds else "")


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """A line a figure, every column of every protocol; empty where there is none."""
    lines: list[list[Any]] = [["row", "budget", "protocol", "column", "seeds", "mean", "half_width", "values"]]
    lines[0] += ["images_seen", "flops", "seconds", "hardware"]
    for row in rows:
        training = row["training"] or {}
        cost = [training.get("images_seen"), training.get("flops"), training.get("seconds", {}).get("mean")]
        for protocol, columns in row["accuracies"].items():
            for column, found in columns.items():
                numbers = [found["n"], round(found["mean"], 3), found["half_width"] and round(found["half_width"], 3)]
                values = " ".join(map(str, found["values"]))
                line = [row["row"], row["budget"], protocol, column, *numbers, values, *cost, training.get("device")]
                lines.append(line)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _name(row: dict[str, Any]) -> str:
    return row["label"] + (", equal compute" if row["budget"] == "compute" else "")


def accuracy_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """A panel a protocol, with a line a row and the 95 % interval over the seeds; few-shot over images a class."""
    columns = table_columns(rows)
    single = [(protocol, column) for protocol, column in columns if protocol != "fewshot"]
    shots = [column for protocol, column in columns if protocol == "fewshot"]
    num_panels = len(single) + bool(shots)
    height = math.ceil(num_panels / 3)
    figure = Figure(figsize=(13, 1 + height * (1.2 + 0.28 * len(rows))), layout="constrained")
    axes = figure.subplots(height, 3, squeeze=False).ravel()
    for axis, (protocol, column) in zip(axes, single, strict=False):
        for i, row in enumerate(rows):
            found = row["accuracies"].get(protocol, {}).get(column)
            if found is not None:
                axis.errorbar(found["mean"], i, xerr=found["half_width"], fmt="o", color=f"C{i}", capsize=3)
        axis.set(title=f"{protocol}, {column}", xlabel="accuracy in %", ylim=(len(rows) - 0.5, -0.5))
        axis.set_yticks(range(len(rows)), [_name(row) for row in rows], fontsize="x-small")
        axis.grid(alpha=0.3)
    if shots:
        axis = axes[len(single)]
        for i, row in enumerate(rows):
            found = row["accuracies"].get("fewshot", {})
            points = [(int(column.rpartition("= ")[2]), found[column]) for column in shots if column in found]
            _draw(axis, [n for n, _ in points], [one for _, one in points], f"C{i}", None)
        axis.set(title="fewshot", xlabel="images a class (colours as beside)", ylabel="accuracy in %")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.grid(alpha=0.3)
    for axis in axes[num_panels:]:
        axis.set_axis_off()
    return figure


def curves_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """k-NN accuracy while training: over images seen, and over compute; bands are 95 % intervals over the seeds."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, unit, label in zip(axes, ("images_seen", "flops"), ("images seen", "compute (FLOPs)"), strict=True):
        for i, row in enumerate(rows):
            if row["curve"]:
                style = "--" if row["budget"] == "compute" else "-"
                _draw(axis, [point[unit] for point in row["curve"]], row["curve"], f"C{i}", _name(row), style)
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("k-NN accuracy in %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw(
    axis: Any, x: list[float], found: list[dict[str, Any]], color: str, label: str | None, style: str = "-"
) -> None:
    mean, half = [one["mean"] for one in found], [one["half_width"] or 0 for one in found]
    axis.plot(x, mean, marker="o", markersize=3, linestyle=style, color=color, label=label)
    low, high = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
    axis.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)


# -- commands ---------------------------------------------------------------------------------------------------------


def table(options: argparse.Namespace, settings: dict[str, Any], folder: Path) -> None:
    """Writes `<scale>.json`, `.csv`, `.md` and the figures, of the cells that are there."""
    plan = read_json(folder / "plan.json")
    if plan is None:
        raise SystemExit(f"`--output_dir` {str(options.output_dir)!r} holds no study; make one with `study.py run`.")
    steps = {b: {name: side["steps"][b] for name, side in plan["recipes"].items()} for b in BUDGETS}
    rows = collect(settings, steps, folder)
    if not any(row["accuracies"] for row in rows):
        raise SystemExit(f"`--output_dir` {str(options.output_dir)!r} holds no cells; make some with `study.py run`.")
    content = {"scale": options.scale, "settings": settings, "num_images": plan["num_images"], "rows": rows}
    text, base = to_markdown(options.scale, settings, rows), options.results / options.scale
    write_whole(base.with_suffix(".json"), json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_whole(base.with_suffix(".csv"), to_csv(rows))
    write_whole(base.with_suffix(".md"), text)
    drawn = [row for row in rows if row["row"] not in ablations(settings)]
    save_figure(accuracy_figure(drawn), base.with_suffix(".png"))
    if any(row["curve"] for row in drawn):
        save_figure(curves_figure(drawn), base.with_name(f"{options.scale}-curves.png"))
    print(text)


def run(options: argparse.Namespace, settings: dict[str, Any], folder: Path) -> int:
    """The cells that were asked for; the exit code."""
    if "threads" in settings:
        torch.set_num_threads(settings["threads"])
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with stopping(options.minutes):
        try:
            study = open_study(settings, options.dataset, folder)
            run_cells(study, chosen_cells(options, settings, study.plan), lambda text: print(text, flush=True))
        except KeyboardInterrupt:
            print("Not finished: go on with the same command.", flush=True)
            return NOT_FINISHED
    return 0


def chosen_cells(options: argparse.Namespace, settings: dict[str, Any], plan: Plan) -> list[Cell]:
    """Those that the command line names.

    Raises:
        SystemExit: There is no such cell.
    """
    rows = table_rows(settings, plan.steps)
    chosen = [
        cell
        for cell in table_cells(settings, rows, options.seeds)
        if cell.row in (options.recipes or [cell.row])
        and cell.budget in (*(options.budgets or [cell.budget]), None)
        and cell.protocol in (options.protocols or [cell.protocol])
    ]
    if not chosen:
        names = ", ".join(f"{row} ({budget})" if budget else row for row, budget in rows)
        raise SystemExit(f"there is no such cell; the rows are {names}.")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    several = (("--recipe", "a recipe of study.yaml, or random, raw, scratch"), ("--protocol", "knn, finetune-10 ..."))
    for name, what in (("run", "all cells that are not done"), ("cell", "one cell"), ("table", "table and figures")):
        command = commands.add_parser(name, help=what)
        command.add_argument("--scale", required=True, help="a scale of study.yaml")
        command.add_argument("--study", type=Path, default=HERE / "study.yaml", help="another study.yaml")
        command.add_argument("--output_dir", type=Path, default=Path("outputs/cifar10_study"))
        if name == "table":
            command.add_argument("--results", type=Path, default=HERE / "results", help="where the table goes")
            continue
        many = {"nargs": "+"} if name == "run" else {"nargs": 1, "required": True}
        s = "s" if name == "run" else ""
        for option, text in several:
            command.add_argument(f"{option}{s}", dest=f"{option[2:]}s", **many, help=text)
        command.add_argument(f"--seed{s}", dest="seeds", type=int, **many)
        command.add_argument(f"--budget{s}", dest="budgets", choices=list(BUDGETS), nargs="+" if s else 1)
        command.add_argument("--dataset", default="uoft-cs/cifar10", help="Hub id or local copy of CIFAR-10")
        command.add_argument("--minutes", type=float, help=f"stop after so long, with exit code {NOT_FINISHED}")
    options = parser.parse_args(argv)
    settings, folder = read_settings(options.study, options.scale), options.output_dir / options.scale
    if options.command == "table":
        table(options, settings, folder)
        return 0
    return run(options, settings, folder)


if __name__ == "__main__":
    raise SystemExit(main())
