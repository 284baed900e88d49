# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Experiments: recipes pretrained on the same images or with the same compute, and evaluated by the same protocols.

`clmae compare` and the studies under `benchmarks/` run on this. All results are in files that appear whole or not at
all, so that an experiment can be killed at any point and called again, and several processes can share one folder:
`plan.json`; for each pretraining `runs/RUN` with its checkpoints, its weights at intermediate steps (`points/`), at the
end (`model/`), and then `training.json`; for each evaluation `cells/RUN-DATASET-PROTOCOL.json`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import operator
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout
from transformers import AutoModelForPreTraining, TrainerCallback, TrainerControl, TrainerState, set_seed

from clmae.configuration.errors import InputError
from clmae.evaluation.plan import BASELINES, Cell, Plan, Run, choose, keep_plan
from clmae.evaluation.report import PROTOCOLS
from clmae.evaluation.tables import BUDGETS, curves_figure, headline, results_to_markdown, summarize, with_means
from clmae.model_cards.files import write_whole
from clmae.model_cards.record import RECORD_NAME, read_json
from clmae.training.build import build_trainer
from clmae.training.callbacks import InterruptCallback
from clmae.training.data import build_datasets
from clmae.training.integrity import last_valid_checkpoint
from clmae.training.pictures import save_figure
from clmae.training.trainer import CurriculumTrainer

Metrics = Callable[[Sequence[dict[str, float]]], dict[str, float]]


class _Keeper(TrainerCallback):
    """Keeps the weights at the steps at which a run is evaluated."""

    def __init__(self, trainer: CurriculumTrainer, folder: Path, points: Sequence[int]):
        self.trainer, self.folder, self.points = trainer, folder, points

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Comes before the step's checkpoint: whoever resumes from it finds these weights."""
        if state.global_step in self.points:
            self.trainer.save_model(str(_emptied(self.folder / "unfinished")), _internal_call=True)
            os.replace(self.folder / "unfinished", _emptied(self.folder / f"step-{state.global_step}"))


def _emptied(folder: Path) -> Path:
    """Without what a run left there that was killed after it, and went on from before it."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


class Runner:
    """Does in a folder what is not yet done of a plan; import clmae first, for this project's families.

    Args:
        plan: From [`make_plan`].
        output_dir: A new folder, or one with an experiment by the same plan, which goes on.
        log: Gets a line for each thing that is done.

    Raises:
        InputError: `output_dir` holds an experiment by another plan.
    """

    def __init__(self, plan: Plan, output_dir: str | os.PathLike[str], log: Callable[[str], None] = print):
        self.plan, self.folder, self.log = plan, Path(output_dir), log
        self.device = next(iter(plan.recipes.values())).args.device
        keep_plan(plan, self.folder / "plan.json")

    def run(self, cells: Sequence[Cell]) -> None:
        """Does what is missing of some cells. Another process may do the same: each run is one process's at a time.

        Raises:
            KeyboardInterrupt: Ctrl-C or a signal; another call goes on from there.
        """
        missing = self._missing(cells)
        done = len(cells) - len(missing)
        self.log(f"{done} of {len(cells)} results are there; delete the file of a run's end to have it made again")
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        for blocking in (False, True):  # at last waits for other processes, and does what they left when they ended
            for run, group in itertools.groupby(self._missing(missing), key=operator.attrgetter("run")):
                lock = FileLock(self.folder / "locks" / f"{run.name}.lock")
                try:
                    held = lock.acquire(blocking=blocking)
                except Timeout:
                    continue
                with held:
                    self._finish(run, self._missing(list(group)))

    def path(self, cell: Cell) -> Path:
        """Of a cell's file."""
        return self.folder / "cells" / f"{cell.name}.json"

    def _missing(self, cells: Sequence[Cell]) -> list[Cell]:
        return [cell for cell in cells if not self.path(cell).is_file()]

    def _finish(self, run: Run, cells: Sequence[Cell]) -> None:
        """Trains if need be, and evaluates; protocols on frozen features share them."""
        if not cells:
            return
        folder, model = self.folder / "runs" / run.name, self._model(run)
        if not model.is_dir():
            self.log(f"{run.name}: pretraining in {folder}" if run.steps else f"{run.name}: random weights")
            (self._pretrain if run.steps else self._save_untrained)(run, folder)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        for (step, dataset, _), group in itertools.groupby(
            cells, lambda cell: (cell.step, cell.dataset, cell.protocol in PROTOCOLS or cell.protocol)
        ):
            weights = model if step == run.steps else folder / "points" / f"step-{step}"
            self._evaluate(list(group), weights, folder / dataset)
        evaluated = self.plan.cells(self.plan.rows(), [run.seed])
        if not self._missing([cell for cell in evaluated if cell.run == run and cell.step < run.steps]):
            shutil.rmtree(folder / "points", ignore_errors=True)

    def _evaluate(self, cells: Sequence[Cell], weights: Path, place: Path) -> None:
        """Cells that share features, or one that fine-tunes."""
        start, protocols = time.perf_counter(), [cell.protocol for cell in cells]
        tuned = place.with_name(f"{place.name}-{protocols[0]}")
        evaluation, run = self.plan.evaluations[cells[0].dataset], cells[0].run
        results = evaluation.evaluate(weights, protocols, run, self.device, tuned)
        seconds = round((time.perf_counter() - start) / len(cells), 1)
        for cell, result in zip(cells, results, strict=True):
            content = {**asdict(cell), **result, "seconds": seconds}
            write_whole(self.path(cell), json.dumps(content, indent=2, allow_nan=False) + "\n")
            column = headline(cell.protocol, result["accuracies"])
            self.log(f"{cell.name}, {column}: {result['accuracies'][column]:.2f} % ({seconds:.0f} s)")
        shutil.rmtree(tuned, ignore_errors=True)

    def _model(self, run: Run) -> Path:
        return self.folder / "runs" / run.name / "model"

    def _save_untrained(self, run: Run, folder: Path) -> None:
        """The first recipe's model at random initialisation."""
        recipe, unfinished = next(iter(self.plan.recipes.values())), _emptied(folder / "unfinished")
        set_seed(run.seed)
        AutoModelForPreTraining.from_config(recipe.config).save_pretrained(unfinished)
        build_datasets(recipe.data, recipe.config)[2].save_pretrained(unfinished)
        os.replace(unfinished, folder / "model")

    def _pretrain(self, run: Run, folder: Path) -> None:
        """Trains, or goes on, as `clmae pretrain --max_steps ... --seed ...` would."""
        recipe = self.plan.recipes[run.recipe]
        fields: dict[str, Any] = dict(output_dir=str(folder), run_name=run.name, push_to_hub=False)
        fields |= dict(seed=run.seed, max_steps=run.steps)
        checkpoint = last_valid_checkpoint(folder)[0]
        torch.compiler.reset()  # or the runs before would count as recompilations of this one's code
        interrupt = InterruptCallback()
        trainer = build_trainer(recipe.config, recipe.data, dataclasses.replace(recipe.args, **fields), [interrupt])
        trainer.add_callback(_Keeper(trainer, folder / "points", run.points(self.plan.num_points)))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.accelerator.end_training()
        if interrupt.interrupted:
            raise KeyboardInterrupt
        # With what a card shows beside the weights.
        last = folder / "points" / f"step-{run.steps}"
        trainer.state.save_to_json(str(last / "trainer_state.json"))
        if (folder / "pictures").is_dir():
            shutil.copytree(folder / "pictures", last / "pictures", dirs_exist_ok=True)
        os.replace(last, folder / "model")

    # -- results ------------------------------------------------------------------------------------------------------

    def results(
        self, rows: Sequence[tuple[str, str]], seeds: Sequence[int], metrics: Metrics | None = None
    ) -> pd.DataFrame:
        """A line for each number that is there: accuracies in percent, and what `metrics` makes of training logs.

        Columns: budget, recipe, label, seed, step, images_seen, flops, dataset, protocol, column, value, and whether it
        is `final` (or of an intermediate step). The protocol of what is no accuracy is `"training"`. Where there are
        several datasets, their mean comes first.
        """
        records: list[dict[str, Any]] = []
        for budget, name in rows:
            label = BASELINES.get(name) or self.plan.recipes[name].label or name
            cells = self.plan.cells([(budget, name)], seeds)
            trained = [Cell(run, run.steps, "", "training") for run in dict.fromkeys(cell.run for cell in cells)]
            for cell in [*trained, *cells]:
                if cell.protocol == "training":
                    values = self._measured(cell.run, metrics or last_difficulty)
                else:
                    values = (read_json(self.path(cell)) or {}).get("accuracies", {})
                about = dict(budget=budget, recipe=name, label=label, seed=cell.run.seed, **self._cost(cell))
                about |= dict(final=cell.step == cell.run.steps, dataset=cell.dataset, protocol=cell.protocol)
                records += [{**about, "column": column, "value": value} for column, value in values.items()]
        evaluations = self.plan.evaluations.values()
        num_datasets = {name: sum(name in e.protocols for e in evaluations) for name in ("knn", "linear")}
        return with_means(pd.DataFrame(records), num_datasets) if records else pd.DataFrame()

    def _cost(self, cell: Cell) -> dict[str, int]:
        if not cell.step:
            return dict(step=0, images_seen=0, flops=0)
        cost = self.plan.costs[cell.run.recipe]
        flops = cost.flops(cell.step, cell.run.steps)
        return dict(step=cell.step, images_seen=cell.step * cost.images_per_step, flops=flops)

    def _measured(self, run: Run, metrics: Metrics) -> dict[str, float]:
        """Of a finished run; nothing of a baseline."""
        record, state = (read_json(self._model(run) / name) for name in (RECORD_NAME, "trainer_state.json"))
        if record is None:
            return {}
        seconds = sum(session["seconds"] for session in record["sessions"])
        steps = sum(session["last_step"] - session["first_step"] for session in record["sessions"])
        return {**metrics(state["log_history"]), "s / step": seconds / max(steps, 1)}


def last_difficulty(log: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mask difficulty that was logged last; nothing where masks are random."""
    return next(({"mask_difficulty": e["mask_difficulty"]} for e in reversed(log) if "mask_difficulty" in e), {})


def compare(
    plan: Plan,
    output_dir: str | os.PathLike[str],
    seeds: Sequence[int] = (0,),
    budgets: Sequence[str] = tuple(BUDGETS),
    log: Callable[[str], None] = print,
) -> str:
    """Pretrains and evaluates what is not yet done; writes `table.md`, `.csv`, `.json` and `accuracy.png`.

    Args:
        plan, output_dir, log: As of [`Runner`].
        seeds: One run each, of each recipe. Seeds and budgets only choose the runs: more of them may follow.
        budgets: Some of `"images"`, `"compute"`.

    Returns:
        The table as Markdown.

    Raises:
        InputError: Unknown budgets, seeds that repeat, or another plan's folder.
        KeyboardInterrupt: Ctrl-C; another call goes on from there.
    """
    choose("budgets", budgets, BUDGETS)
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"`seeds` is {list(seeds)}; give at least one, and each once.")
    runner, rows = Runner(plan, output_dir, log), plan.rows(budgets)
    runner.run(plan.cells(rows, seeds))
    results, base = runner.results(rows, seeds), Path(output_dir, "table")
    write_whole(base.with_suffix(".json"), results.to_json(orient="records", indent=2) + "\n")
    write_whole(base.with_suffix(".csv"), summarize(results).to_csv(index=False))
    text = results_to_markdown(results, compared_with=next(iter(plan.recipes)))
    write_whole(base.with_suffix(".md"), text)
    save_figure(curves_figure(results), Path(output_dir, "accuracy.png"))
    return text
