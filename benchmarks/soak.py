# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""A soak: thousands of tiny steps with all that a run does, while memory, open files and step time are watched.

    python benchmarks/soak.py                                    # 10,000 steps: some minutes on one core
    python benchmarks/soak.py --steps 2000 --output some_folder

Evaluation, mask difficulty, pictures, checkpoints with rotation, and refreshes of the object boxes go on all the time.
Writes `results.md` and `windows.csv`: how much each quantity grows in 1,000 steps, by a line through the windows after
a warm-up, with the line's standard error. The exit code is 1 if open files, memory or step time grow by more than their
limit and two standard errors. Step time is the processor's time of the main process: other work on the machine does not
count.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from faults import make_trainer
from scipy.stats import linregress
from transformers import TrainerCallback

from clmae.evaluation.tables import markdown_table
from clmae.model_cards.files import write_whole

NUM_IMAGES = 96  # 24 steps per epoch
WINDOW = 50  # steps: a window sees more than an epoch, at whose end the workers and their pipes go
WARM_UP = 0.3  # of the windows, in which caches fill; the drawing of pictures takes ten of them
# Growth in 1,000 steps; of the step time, as a share of it.
LIMITS = {"memory_mib": 1.0, "open_files": 0.0, "step_seconds": 0.01}
OUTPUT = Path(__file__).resolve().parent / "results" / "soak"


class Watch(TrainerCallback):
    """Measures after every step; `windows` holds the step, medians of memory and step time, the most open files."""

    def __init__(self) -> None:
        self.windows: list[dict[str, float]] = []
        self._process, self._looks = psutil.Process(), []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See the class."""
        self._begin = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See the class."""
        seconds = time.process_time() - self._begin
        self._looks.append((self._process.memory_info().rss / 2**20, self._process.num_fds(), seconds))
        if len(self._looks) == WINDOW:
            memory, files, seconds = zip(*self._looks, strict=True)
            window = (np.median(memory), max(files), np.median(seconds))
            self.windows.append({"step": state.global_step, **dict(zip(LIMITS, map(float, window), strict=True))})
            self._looks = []


def soak(folder: Path, steps: int, **options: Any) -> pd.DataFrame:
    """The windows of a run of so many steps; `options` are those of [`make_trainer`]."""
    watch = Watch()
    often = dict(eval_steps=100, difficulty_steps=100, save_steps=200, picture_steps=250, logging_steps=50)
    often |= dict(max_steps=steps, contrastive_crop_interval=0.02)
    trainer = make_trainer(folder, num_images=NUM_IMAGES, callbacks=(watch,), **{**often, **options})
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        trainer.train()
    return pd.DataFrame(watch.windows)


def check(windows: pd.DataFrame) -> pd.DataFrame:
    """A row for each quantity: at first, at the end, growth by least squares, and whether it is within its limit."""
    settled = windows[int(len(windows) * WARM_UP) :]
    rows = []
    for name, limit in LIMITS.items():
        fit = linregress(settled["step"] / 1000, settled[name])
        limit *= settled[name].median() if name == "step_seconds" else 1
        row = {"quantity": name, "after warm-up": settled[name].iloc[0], "at the end": settled[name].iloc[-1]}
        error = np.nan_to_num(fit.stderr)  # nan, where all values are the same
        row |= {"growth": fit.slope, "standard error": error, "limit": limit}
        rows.append(row | {"verdict": "flat" if fit.slope - 2 * error <= limit else "grows"})
    return pd.DataFrame(rows)


def main() -> int:
    """Runs and checks; the exit code: 0 if nothing grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for results.md and windows.csv")
    args = parser.parse_args()
    if args.steps < 10 * WINDOW:
        parser.error(f"`--steps` is {args.steps}: take at least {10 * WINDOW}, or a line says nothing.")
    torch.set_num_threads(1)
    begin, date = time.perf_counter(), time.strftime("%Y-%m-%d")
    with tempfile.TemporaryDirectory() as folder:
        windows = soak(Path(folder), args.steps)
    table = check(windows)
    text = f"{args.steps:,} steps in {time.perf_counter() - begin:.0f} s, {date}; growth in 1,000 steps.\n\n"
    text += markdown_table(table.map(lambda cell: f"{cell:.4g}" if isinstance(cell, float) else cell))
    write_whole(args.output / "windows.csv", windows.to_csv(index=False))
    write_whole(args.output / "results.md", text)
    print(text, end="")
    return 0 if (table["verdict"] == "flat").all() else 1


if __name__ == "__main__":
    sys.exit(main())
