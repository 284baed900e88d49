# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Runs the studies of this folder: pretrains, evaluates, makes tables and figures.

    python benchmarks/study.py run transfer_study --scale cpu --seeds 0 1
    python benchmarks/study.py run transfer_study --scale gpu --minutes 9    # exit code 75: call again
    python benchmarks/study.py cell transfer_study --recipe cmae --budget compute --seed 0 --protocol knn
    python benchmarks/study.py table curriculum --scale cpu-600

A study is a folder with a `study.yaml`: recipes as options of `clmae pretrain` beside what all of a scale share
(`pretraining`) and all of a family (`families`); seeds, images seen and budgets; datasets (`evaluations`; on
`--dataset`, if they name none) and protocols. Results are JSON files in `<output_dir>/<study>/<scale>/cells`, and
pretrained models in `runs/*/model`, ready for `clmae card`. Several processes may work in one folder. `table` writes
Markdown, CSV and figures to the study's `results`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
import yaml
from transformers.utils import logging

from clmae.cli.compare import WITHOUT_EFFECT
from clmae.cli.options import recipe_to_argv
from clmae.cli.pretrain import read_arguments
from clmae.evaluation.compare import Runner, last_difficulty
from clmae.evaluation.plan import BASELINES, Cell, Evaluation, Plan, Recipe, make_plan
from clmae.evaluation.report import PROTOCOLS
from clmae.evaluation.tables import BUDGETS, accuracy_figure, curves_figure, results_to_markdown, summarize
from clmae.model_cards.files import write_whole
from clmae.model_cards.record import RECORD_NAME, read_json
from clmae.training.pictures import save_figure

HERE = Path(__file__).resolve().parent
NOT_FINISHED = 75  # the exit code by which programs say: call again


def read_settings(study: str, scale: str | None) -> dict[str, Any]:
    """A scale's entries (the first one's, if none is named) over those that all scales share.

    Raises:
        SystemExit: There is no such study or scale.
    """
    path = next((p for p in (Path(study, "study.yaml"), HERE / study / "study.yaml") if p.is_file()), None)
    if path is None:
        raise SystemExit(f"`study` is {study!r}, which is no folder with a study.yaml.")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    scales = content.pop("scales")
    scale = next(iter(scales)) if scale is None else scale
    if scale not in scales:
        raise SystemExit(f"`--scale` is {scale!r}; {path} has {', '.join(scales)}.")
    entries = scales[scale]
    entries["pretraining"] = {**content.get("pretraining", {}), **entries.get("pretraining", {})}
    return {"name": path.parent.name, "folder": path.parent, "scale": scale, **content, **entries}


def read_plan(settings: dict[str, Any], dataset: str, folder: Path) -> Plan:
    """The plan of a scale; its recipes as `clmae pretrain` would read them."""
    recipes = []
    for name in settings.get("only", settings["recipes"]):
        recipe = settings["recipes"][name]
        options = {**settings["pretraining"], **settings.get("families", {}).get(recipe["options"]["family"], {})}
        options |= recipe["options"]
        config, data, args, _ = read_arguments(
            recipe_to_argv({"dataset": dataset, "output_dir": str(folder), **options})
        )
        kept = {option: value for option, value in options.items() if option not in WITHOUT_EFFECT}
        choices = dict(budgets=tuple(recipe.get("budgets", settings.get("budgets", BUDGETS))))
        choices["protocols"] = tuple(recipe["protocols"]) if "protocols" in recipe else None
        recipes.append(Recipe(name, config, data, args, kept, recipe.get("label", name), **choices))
    common = settings.get("finetuning", {})
    finetuning = {name: {**common, **fields} for name, fields in settings.get("protocols", {}).items()}
    fixed = dict(dataset=dataset, finetuning=finetuning, from_scratch=settings.get("from_scratch", {}))
    evaluations = {}
    for name, fields in settings["evaluations"].items():
        protocols = tuple(fields.get("protocols", (*PROTOCOLS, *finetuning)))
        evaluations[name] = Evaluation(**{**fixed, **fields, "protocols": protocols})
    names = ("images_seen", "num_points", "reference", "baselines")
    return make_plan(recipes, evaluations, **{name: settings[name] for name in names if name in settings})


@contextlib.contextmanager
def stopping(minutes: float | None) -> Iterator[None]:
    """Turns SIGTERM into Ctrl-C, on which training saves a checkpoint; and sends one when the minutes are over."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    signal.setitimer(signal.ITIMER_REAL, 60 * (minutes or 0))  # 0: none
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before)


def chosen_cells(options: argparse.Namespace, plan: Plan, seeds: Sequence[int]) -> list[Cell]:
    """Those that the command line names.

    Raises:
        SystemExit: There is no such cell.
    """

    def chosen(values: list | None, value: Any) -> bool:
        return values is None or value in values

    rows = [
        (budget, name)
        for budget, name in plan.rows()
        if chosen(options.recipes, name) and (not budget or chosen(options.budgets, budget))
    ]
    cells = [
        cell
        for cell in plan.cells(rows, options.seeds or seeds)
        if chosen(options.protocols, cell.protocol) and chosen(options.datasets, cell.dataset)
    ]
    if not cells:
        names = ", ".join(f"{name} ({budget})" if budget else name for budget, name in plan.rows())
        raise SystemExit(f"there is no such cell; the rows are {names}.")
    return cells


def run(options: argparse.Namespace, settings: dict[str, Any], folder: Path) -> int:
    """What is missing of the cells that were asked for; the exit code."""
    torch.set_num_threads(settings.get("threads", torch.get_num_threads()))
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    out = sys.stdout
    plan = read_plan(settings, options.dataset, folder)
    cells = chosen_cells(options, plan, settings["seeds"])
    runner = Runner(plan, folder, lambda text: print(text, file=out, flush=True))
    with stopping(options.minutes), (folder / "log.txt").open("a", encoding="utf-8") as log:
        try:
            with contextlib.redirect_stdout(log):  # the trainers print what they log
                runner.run(cells)
        except KeyboardInterrupt:
            print("Not finished: go on with the same command.", flush=True)
            return NOT_FINISHED
    return 0


def table(options: argparse.Namespace, settings: dict[str, Any], folder: Path) -> int:
    """Writes `<scale>.md`, `.csv` and the figures, of the results that are there; the exit code."""
    if not (folder / "plan.json").is_file():
        raise SystemExit(f"`--output_dir` {str(options.output_dir)!r} holds no such study; make one with `run`.")
    plan = read_plan(settings, options.dataset, folder)
    runner, seeds = Runner(plan, folder), settings["seeds"]
    results = runner.results(plan.rows(), seeds, difficulty_by_quarter if settings.get("measure") else last_difficulty)
    if results.empty:
        raise SystemExit(f"`--output_dir` {str(options.output_dir)!r} holds no results; make some with `run`.")
    base = (options.results or settings["folder"] / "results") / settings["scale"]
    text = f"Made by `benchmarks/study.py run {settings['name']} --scale {settings['scale']}`, {_effort(folder)}; what "
    text += "is behind each row and column is in study.yaml.\n\n"
    text += results_to_markdown(results, settings["compared_with"])
    write_whole(base.with_suffix(".md"), text)
    write_whole(base.with_suffix(".csv"), summarize(results).to_csv(index=False))
    save_figure(accuracy_figure(results), base.with_suffix(".png"))
    save_figure(curves_figure(results), base.with_name(f"{base.name}-curves.png"))
    print(text)
    return 0


def difficulty_by_quarter(log: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of a run: the mean mask difficulty of each quarter of its steps, and the last one."""
    rows = pd.DataFrame([entry for entry in log if entry.get("mask_difficulty") and entry["step"]])
    if rows.empty:  # random masks
        return {}
    quarters = rows.groupby("Q" + np.ceil(4 * rows["step"] / rows["step"].max()).astype(int).astype(str))
    return {**quarters["mask_difficulty"].mean(), **last_difficulty(log)}


def _effort(folder: Path) -> str:
    """Hours of all that is in the folder, one after the other, and the devices."""
    sessions = [s for path in folder.glob(f"runs/*/model/{RECORD_NAME}") for s in read_json(path)["sessions"]]
    timed = [*sessions, *map(read_json, folder.glob("cells/*.json"))]
    devices = ", ".join(sorted({session["device"] for session in sessions}))
    hours = sum(entry["seconds"] for entry in timed) / 3600
    return f"{hours:.1f} hours of training and evaluating in one process on {devices}"


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recipes = f"a recipe of study.yaml, or {', '.join(BASELINES)}"
    for name, what in (("run", "all cells that are not done"), ("cell", "one cell"), ("table", "table and figures")):
        command = commands.add_parser(name, help=what)
        command.add_argument("study", help="a folder of benchmarks/ or another with a study.yaml")
        command.add_argument("--scale", help="a scale of study.yaml; the first, if not given")
        command.add_argument("--output_dir", type=Path, default=Path("outputs"))
        command.add_argument("--dataset", default="uoft-cs/cifar10", help="Hub id or local copy")
        if name == "table":
            command.add_argument("--results", type=Path, help="where the table goes")
            continue
        s, many = ("s", {"nargs": "+"}) if name == "run" else ("", {"nargs": 1})
        needed = {"required": True, **many} if name == "cell" else many
        command.add_argument(f"--recipe{s}", dest="recipes", help=recipes, **needed)
        command.add_argument(f"--seed{s}", dest="seeds", type=int, **needed)
        command.add_argument(f"--protocol{s}", dest="protocols", help="knn, finetune-10 ...", **needed)
        command.add_argument(f"--budget{s}", dest="budgets", choices=list(BUDGETS), **many)
        command.add_argument(f"--eval_dataset{s}", dest="datasets", help="a name among `evaluations`", **many)
        command.add_argument("--minutes", type=float, help=f"stop after so long, with exit code {NOT_FINISHED}")
    options = parser.parse_args(argv)
    settings = read_settings(options.study, options.scale)
    folder = options.output_dir / settings["name"] / settings["scale"]
    return (table if options.command == "table" else run)(options, settings, folder)


if __name__ == "__main__":
    raise SystemExit(main())
