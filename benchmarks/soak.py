# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""A soak: thousands of tiny steps with all that a run does, while memory, open files and step time are watched.

    python benchmarks/soak.py                                    # 10,000 steps: some minutes on one core
    python benchmarks/soak.py --steps 2000 --output some_folder

Evaluation, mask difficulty, pictures, checkpoints with rotation, and refreshes of the object boxes go on all the time.
Writes `results.json` and `results.md`: how much each quantity grows in 1,000 steps, by a line through the windows after
a warm-up, with the line's standard error. The exit code is 1 if open files, memory or step time grow by more than their
limit and two standard errors. Step time is the processor's time of the main process: other work on the machine does not
count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers
from faults import make_trainer
from transformers import TrainerCallback

NUM_IMAGES = 96  # 24 steps an epoch
WINDOW = 50  # steps: a window sees more than an epoch, at whose end the workers and their pipes go
WARM_UP = 0.3  # of the windows, in which caches fill; the drawing of pictures takes ten of them
# Growth in 1,000 steps; of the step time, as a share of it.
LIMITS = {"memory_mib": 1.0, "open_files": 0.0, "step_seconds": 0.01}
OUTPUT = Path(__file__).resolve().parent / "results" / "soak"


class Watch(TrainerCallback):
    """Looks after every step; `windows` holds the step, medians of memory and step time, and the most open files."""

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


def soak(folder: Path, steps: int, **options: Any) -> list[dict[str, float]]:
    """The windows of a run of so many steps; `options` are those of [`make_trainer`]."""
    watch = Watch()
    often = dict(eval_steps=100, difficulty_steps=100, save_steps=200, picture_steps=250, logging_steps=50)
    trainer = make_trainer(
        folder,
        num_images=NUM_IMAGES,
        callbacks=(watch,),
        **{"max_steps": steps, "contrastive_crop_interval": 0.02, **often, **options},
    )
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        trainer.train()
    return watch.windows


def slope(steps: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Growth in 1,000 steps by least squares, and its standard error; three points or more `(n,)`."""
    x = (steps - steps.mean()) / 1000
    growth = (x * values).sum() / (x**2).sum()
    rest = values - values.mean() - growth * x
    return float(growth), float(np.sqrt((rest**2).sum() / (len(x) - 2) / (x**2).sum()))


def judge(windows: list[dict[str, float]]) -> list[dict[str, Any]]:
    """A row a quantity: at first and at the end, growth, its standard error, and whether it stays within its limit."""
    settled = windows[int(len(windows) * WARM_UP) :]
    rows = []
    for name, limit in LIMITS.items():
        values = np.array([window[name] for window in settled])
        growth, error = slope(np.array([window["step"] for window in settled]), values)
        limit *= np.median(values) if name == "step_seconds" else 1
        good = bool(growth - 2 * error <= limit)
        row = {"quantity": name, "first": values[0], "last": values[-1], "growth": growth, "standard_error": error}
        rows.append(row | {"limit": float(limit), "within": good})
    return rows


def to_markdown(results: dict[str, Any]) -> str:
    """What was run, and a line a quantity."""
    text = (
        f"{results['steps']:,} steps in {results['seconds']:.0f} s, {results['date'][:10]}; growth in 1,000 steps.\n\n"
    )
    text += "| | after warm-up | at the end | growth | standard error | limit | |\n"
    text += "| --- | ---: | ---: | ---: | ---: | ---: | --- |\n"
    for row in results["rows"]:
        numbers = [row[name] for name in ("first", "last", "growth", "standard_error", "limit")]
        verdict = "flat" if row["within"] else "grows"
        text += f"| {row['quantity']} | {' | '.join(f'{number:.4g}' for number in numbers)} | {verdict} |\n"
    return text


def main() -> int:
    """Runs and judges; the exit code: 0 if nothing grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for results.json and results.md")
    args = parser.parse_args()
    if args.steps < 10 * WINDOW:
        parser.error(f"`--steps` is {args.steps}: take at least {10 * WINDOW}, or a line says nothing.")
    torch.set_num_threads(1)
    begin, date = time.perf_counter(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory() as folder:
        windows = soak(Path(folder), args.steps)
    results = {"steps": args.steps, "date": date, "seconds": time.perf_counter() - begin, "rows": judge(windows)}
    results["versions"] = {module.__name__: module.__version__ for module in (torch, transformers)}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps({**results, "windows": windows}, indent=1) + "\n")
    (args.output / "results.md").write_text(to_markdown(results))
    print(to_markdown(results), end="")
    return 0 if all(row["within"] for row in results["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
