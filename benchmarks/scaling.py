# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What data-parallel training costs: a step in several processes beside the same step in one.

    python benchmarks/scaling.py --processes 2

Each process trains on a batch of its own, by `CurriculumTrainer`, on one CPU core or one GPU. Three ways, in turn:
one process **alone**; as many as asked, each for itself, **apart**, where the slowest one's time of each step is taken:
what sharing a machine and waiting for each other costs without a word; and **together**, by `torchrun`. The efficiency
is a step's time alone over that together; apart over together is the share that communication leaves. Writes
`scaling.md`: medians over the steps of all rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from measure import describe
from step import SHAPES, Case, build_model
from transformers import TrainerCallback

from clmae import FAMILIES
from clmae.evaluation.tables import markdown_table
from clmae.model_cards.files import write_whole
from clmae.training import CurriculumTrainer, PretrainingArguments

HERE = Path(__file__).resolve().parent
WAYS = ("alone", "apart", "together")
WARM_UP = 4  # steps that are not counted
PATIENCE = 300  # seconds that one process waits for another, which may have failed


def usable_cores() -> int:
    """Of this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class StepTimes(TrainerCallback):
    """The clock at the end of each step, with nothing left to do; after the warm-up it waits for the others."""

    def __init__(self, folder: Path, place: int, count: int) -> None:
        self.clock: list[float] = []
        self.folder, self.place, self.count = folder, place, count

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads it."""
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        if state.global_step == WARM_UP:
            (self.folder / f"{self.place}.ready").touch()
            deadline = time.perf_counter() + PATIENCE
            while len(list(self.folder.glob("*.ready"))) < self.count:
                if time.perf_counter() > deadline:
                    raise TimeoutError(f"not all {self.count} processes came to step {WARM_UP} within {PATIENCE} s.")
                time.sleep(0.01)
        self.clock.append(time.perf_counter())


def leave_the_group() -> None:
    """Makes a process that torchrun started train for itself, on a GPU of its own."""
    place = int(os.environ.pop("LOCAL_RANK"))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(place + 1)))).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
    del os.environ["RANK"], os.environ["WORLD_SIZE"]


def work(case: Case, steps: int, place: int, count: int, folder: Path) -> None:
    """Trains for `steps` steps after the warm-up, and writes their times into `folder`; `place`: which of `count`."""
    use_cpu = not torch.cuda.is_available()
    if use_cpu:
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[place % len(cores)]})
    images = [{"pixel_values": torch.randn(case.sample_shape)} for _ in range(2 * case.batch)] * 64
    times, together = StepTimes(folder, place, count), "WORLD_SIZE" in os.environ
    args = PretrainingArguments(
        str(folder / ("run" if together else f"run-{place}")),  # a folder is one run's at a time
        **dict(per_device_train_batch_size=case.batch, max_steps=WARM_UP + steps, use_cpu=use_cpu, bf16=True),
        **dict(save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=10_000),
    )
    CurriculumTrainer(build_model(case), args, train_dataset=images, callbacks=[times]).train()
    if args.process_index == 0:  # of those that train for themselves, each
        clock = times.clock[WARM_UP - 1 :]
        path = folder / f"{place}.json"
        path.write_text(json.dumps([after - before for before, after in itertools.pairwise(clock)]))
    os._exit(0)  # at an ordinary end the threads of gloo abort the process, now and then


def measure(case: Case, way: str, processes: int, steps: int, folder: Path) -> list[float]:
    """Times of the steps, one way; of processes apart: the slowest one's of each step."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    count = 1 if way == "alone" else processes
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command += [str(HERE / "scaling.py"), "--families", case.family, "--shape", case.shape, "--batch", str(case.batch)]
    command += ["--steps", str(steps), "--worker", way, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode:
        raise SystemExit(run.stdout[-4000:])
    return [max(step) for step in zip(*(json.loads(path.read_text()) for path in folder.glob("*.json")), strict=True)]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--families", choices=list(FAMILIES), nargs="+", default=["mae", "cl_mae", "cmae"])
    parser.add_argument("--shape", choices=SHAPES, default="192x6-64px")
    parser.add_argument("--batch", type=int, default=64, help="Images per process and step.")
    parser.add_argument("--steps", type=int, default=12, help="Steps that are timed in each round.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=HERE / "results", help="Folder of the results.")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)  # one of the ways, and a folder
    args = parser.parse_args()
    if args.worker:
        place, count = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
        if args.worker[0] != "together":
            leave_the_group()  # before CUDA is asked for anything
    on_gpus = torch.cuda.is_available()
    cases = [Case(family, args.shape, args.batch, "sdpa" if on_gpus else "eager", "bf16") for family in args.families]
    if args.worker:
        return work(cases[0], args.steps, place, count, Path(args.worker[1]))
    places = torch.cuda.device_count() if on_gpus else usable_cores()
    if args.processes > places:
        raise SystemExit(f"`--processes` is {args.processes}, but there are {places} {'GPUs' if on_gpus else 'cores'}.")
    text = f"{describe(torch.device('cuda' if on_gpus else 'cpu'))} {args.processes} processes, one "
    text += f"{'GPU' if on_gpus else 'core'} each; {args.shape}, batch {args.batch} per process, bf16; medians over "
    text += f"{args.rounds} interleaved rounds of {args.steps} steps.\n\n"
    rows = []
    for case in cases:
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        with tempfile.TemporaryDirectory() as folder:
            for _, way in itertools.product(range(args.rounds), WAYS):
                seconds[way] += measure(case, way, args.processes, args.steps, Path(folder))
        alone, apart, together = (statistics.median(seconds[way]) for way in WAYS)
        cells = [f"{1e3 * median:.0f}" for median in (alone, apart, together)]
        rows.append([case.family, *cells, f"{alone / together:.2f}", f"{apart / together:.2f}"])
        head = ["a step, ms", *WAYS, "efficiency: alone ÷ together", "apart ÷ together"]
        write_whole(args.output / "scaling.md", text + markdown_table(pd.DataFrame(rows, columns=head)))
    print((args.output / "scaling.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
