# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Faults, injected into runs: they are killed and hurt at random moments.

    python benchmarks/faults.py                                              # all, about 15 minutes on one core
    python benchmarks/faults.py kill disk --scale 0.1 --output some_folder   # two of them, a tenth of the cases

Writes `results.csv` and `results.md`: how many faults were tried, survived and lost; what is there of other faults
stays. A run survives if, resumed, it ends bit by bit with the weights of an undisturbed one, and `clmae verify` finds
its folder whole. `same` compares undisturbed runs with each other, and draws their losses (`losses.png`).

    MUTATIONS=2000 python -m pytest tests/test_mutations.py                   # mutated images and configurations
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import math
import multiprocessing.context
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pandas as pd
import psutil
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import nn
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import AutoModelForPreTraining

import clmae
from clmae.evaluation.tables import markdown_table
from clmae.model_cards.files import write_whole
from clmae.training import CurriculumTrainer, InterruptCallback, PretrainingArguments
from clmae.training.data import ImageDataset
from clmae.training.integrity import LOCK_NAME, checkpoint_step, checkpoints, last_valid_checkpoint, verify
from clmae.training.pictures import save_figure

TINY = dict(
    **dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16),
    **dict(decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, patch_size=4),
)
MASKER = dict(masker_num_hidden_layers=1, masker_num_attention_heads=2, masker_intermediate_size=32)
STEPS, SAVE_STEPS = 48, 2
PATIENCE = 60  # seconds that anything may take
_SCRATCH = tempfile.TemporaryDirectory()  # until the program ends

Row = dict[str, Any]


def row(fault: str, outcomes: Counter[str], survived: tuple[str, ...]) -> Row:
    """A line of the table, from how often each outcome was seen."""
    tried, good = outcomes.total(), sum(outcomes[name] for name in survived)
    return dict(fault=fault, tried=tried, survived=good, lost=tried - good, outcomes=dict(outcomes))


# -- runs -------------------------------------------------------------------------------------------------------------


def pictures(count: int, seed: int) -> datasets.Dataset:
    """Smooth random pictures of 20 pixels."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (count, 5, 5, 3))
    pixels = coarse.repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)
    return datasets.Dataset.from_dict({"image": list(pixels)}, datasets.Features({"image": datasets.Image()}))


def make_model(family: str) -> nn.Module:
    """A CMAE with learned masks, or a plain MAE; always the same weights."""
    torch.manual_seed(0)
    cmae = family == "cmae"
    config = clmae.CMAEConfig(**TINY, **MASKER, learned_masks=True) if cmae else clmae.MAEConfig(**TINY)
    return AutoModelForPreTraining.from_config(config)


def make_trainer(
    folder: Path, family: str = "cmae", num_images: int = 24, callbacks: tuple[Any, ...] = (), **options: Any
) -> CurriculumTrainer:
    """A run with all that has a state: learned masks, two views, object boxes; or of a MAE, with none of these."""
    cmae = family == "cmae"
    views = dict(image_size=(16, 16), num_channels=3, num_patches=16, patch_size=(4, 4), mean=[0.5] * 3, std=[0.25] * 3)
    train = ImageDataset(pictures(num_images, 0), "image", contrastive_crop=cmae, num_views=1 + cmae, **views)
    defaults = dict(
        **dict(output_dir=str(folder), max_steps=STEPS, learning_rate=1e-3, eval_strategy="steps", eval_steps=3),
        **dict(per_device_train_batch_size=4, per_device_eval_batch_size=4, save_steps=SAVE_STEPS, save_total_limit=2),
        **dict(logging_steps=1, difficulty_steps=0, picture_steps=0, dataloader_num_workers=1),
        **dict(use_cpu=True, disable_tqdm=True, report_to="none"),
    )
    return CurriculumTrainer(
        make_model(family),
        PretrainingArguments(**{**defaults, **options}),
        train_dataset=train,
        eval_dataset=ImageDataset(pictures(8, 1), "image", train=False, **views),
        callbacks=list(callbacks),
    )


def train(folder: Path, before: Callable[[], Any] | None, options: dict[str, Any]) -> None:
    """Trains on from the newest valid checkpoint; the exit code is 0, or 128 plus the signal that stopped the run."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the agent's, which a fork inherits and torchrun's process not
    interrupt = InterruptCallback()
    trainer = make_trainer(folder, callbacks=(interrupt,), **options)
    if before is not None:
        before()
    trainer.train(resume_from_checkpoint=bool(checkpoints(folder)))
    if interrupt.received is not None:
        sys.exit(128 + interrupt.received)
    trainer.save_model()


class Run(multiprocessing.context.ForkProcess):
    """A run in a process of its own (forked: a new one would import for seconds), which starts at once.

    Its folder is emptied if no checkpoint in it is complete, for there is nothing to go on from.

    Args:
        folder: For its output, and `log.txt`.
        before: Called in the new process before the first step.
        processes: That the run has; several are started as torchrun does.
        shared: Another run is in the folder, which is left as it is.
        options: Of [`make_trainer`].
    """

    def __init__(
        self,
        folder: Path,
        before: Callable[[], Any] | None = None,
        processes: int = 1,
        shared: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.folder, self.processes, self.work = folder, processes, (folder, before, options)
        if not shared and last_valid_checkpoint(folder)[0] is None:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        self.start()

    def run(self) -> None:
        """What the process does."""
        log = os.open(self.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(log, "a", buffering=1)  # which may have been something else than 1 and 2
        if self.processes == 1:
            return train(*self.work)
        config = LaunchConfig(
            **dict(min_nodes=1, max_nodes=1, nproc_per_node=self.processes, max_restarts=0, start_method="fork"),
            **dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=0.1),
            logs_specs=DefaultLogsSpecs(log_dir=str(self.folder.parent / "agent")),
        )
        elastic_launch(config, train)(*self.work)

    def end(self) -> int | None:
        """Waits for the run; its exit code, `None` if it hung."""
        deadline = time.perf_counter() + PATIENCE
        while self.exitcode is None:  # `join` would also wait for the workers of a run that was killed
            if time.perf_counter() > deadline:
                self.kill()
                self.join()
                return None
            time.sleep(0.01)
        return self.exitcode

    def send(self, number: signal.Signals) -> None:
        """Sends a signal; nothing if the run has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def log(self) -> str:
        """What the run printed; the last line is its error, if it had one."""
        return (self.folder / "log.txt").read_text(errors="replace").strip()


def last_line(run: Run) -> str:
    """What a run printed last, such as its error."""
    return run.log().rpartition("\n")[2][:200]


def finish(folder: Path, expected: dict[str, torch.Tensor], **options: Any) -> str:
    """Lets a run go on to its end, or makes one where there is none, and compares its weights."""
    run = Run(folder, **options)
    code = run.end()
    if code != 0:
        return f"the resumed run ended with {code} and {last_line(run)}"
    weights = load_file(folder / "model.safetensors")
    if weights.keys() != expected.keys() or not all(torch.equal(weights[name], expected[name]) for name in expected):
        return "other weights"
    saved = checkpoints(folder)
    problems = [problem for path in [folder, *saved] for problem in verify(path)]
    if problems:
        return f"not whole: {problems[0]}"
    return "same weights" if checkpoint_step(saved[-1]) == STEPS else "the last checkpoint is missing"


@functools.cache
def undisturbed(processes: int = 1, **options: Any) -> tuple[Path, dict[str, torch.Tensor], float]:
    """The folder of an undisturbed run in a scratch folder, its weights, and the seconds that it took."""
    folder, begin = Path(tempfile.mkdtemp(dir=_SCRATCH.name), "whole"), time.perf_counter()
    run = Run(folder, processes=processes, **options)
    code = run.end()
    if code != 0:
        raise RuntimeError(f"the undisturbed run ended with {code}: {run.log()[-2000:]}")
    return folder, load_file(folder / "model.safetensors"), time.perf_counter() - begin


# -- what is done to runs ---------------------------------------------------------------------------------------------


def kill_child(run: Run, rng: random.Random, count: int = 1) -> None:
    """Kills one of the processes that a run has started, once there are `count`."""
    while run.exitcode is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(run.pid).children()
            if len(children) >= count:
                return rng.choice(children).kill()
        time.sleep(0.001)


def kill_and_turn_back(run: Run, rng: random.Random) -> None:
    """Kills a run whose later checkpoints are the older ones by the clock."""
    run.kill()
    run.join()
    for age, checkpoint in enumerate(checkpoints(run.folder)):
        os.utime(checkpoint, (1e9 - 1e6 * age,) * 2)


def run_second(run: Run, rng: random.Random) -> None:
    """Starts another run in the same folder while the first is held, and waits for its end."""
    while run.exitcode is None and not (run.folder / LOCK_NAME).exists():
        time.sleep(0.001)
    run.send(signal.SIGSTOP)
    Run(run.folder, shared=True).end()
    run.send(signal.SIGCONT)


def fill_disk(share: float) -> None:
    """No file of this process can grow beyond a share of the largest file of a checkpoint, as on a full disk."""
    largest = max(path.stat().st_size for path in checkpoints(undisturbed()[0])[-1].iterdir())
    size = round(1000 + share * (largest - 1000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def respect_permissions(share: float) -> None:
    """Gives up what lets root write everywhere: all capabilities of this thread (Linux)."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def set_clock_back(share: float) -> None:
    """From now on the clock runs backwards, by an hour per second."""
    now, begin = time.time(), time.monotonic()
    time.time = lambda: now - 3600 * (time.monotonic() - begin)


class Injury(NamedTuple):
    """What is done to runs.

    Attributes:
        fault: Its line in the table.
        inflict: Called at a random moment with the run and a source of random numbers.
        code: Exit code of a run that was hurt; any, if not given.
        message: What it leaves in `log.txt`.
        before: Called in the new process before the first step, with a random number from 0 to 1.
        options: Of [`Run`].
        count: How often.
    """

    fault: str
    inflict: Callable[[Run, random.Random], None] | None
    code: int | None = None
    message: str = ""
    before: Callable[[float], None] | None = None
    options: dict[str, Any] = {}
    count: int = 10


# fmt: off
# Saves and evaluations are most of a run's time, and so most of what a signal interrupts.
INJURIES = {
    "kill": [
        Injury(f"{number.name} at a random moment", lambda run, rng, number=number: run.send(number), count=count)
        for number, count in ((signal.SIGKILL, 36), (signal.SIGTERM, 12), (signal.SIGINT, 12))
    ],
    # Batches from workers would be files that cannot grow, too.
    "disk": [Injury("no space in the midst of a save", None, 1, "", fill_disk, dict(dataloader_num_workers=0), 8)],
    "workers": [Injury("a data worker killed", kill_child, 1, "DataLoader worker (pid")],
    "ranks": [Injury("one of two processes killed", functools.partial(kill_child, count=2), 1, "first observed failure",
                     options=dict(processes=2))],
    "readonly": [Injury("the folder made read-only", lambda run, rng: run.folder.chmod(0o555), 1, "Permission denied",
                        respect_permissions)],
    "clock": [Injury("killed with the clock set back", kill_and_turn_back, -signal.SIGKILL, "", set_clock_back)],
    "second": [Injury("a second run in the folder", run_second, 0, "in use by another run")],
}
# fmt: on


def injure(injury: Injury, scale: float, rng: random.Random) -> Row:
    """Hurts runs at random moments: each must end, and say why; resumed, it must come to the same weights."""
    outcomes, slowest = Counter(), 0.0
    whole, expected, seconds = undisturbed(injury.options.get("processes", 1))
    folder = whole.with_name("run")
    for _ in range(max(1, round(injury.count * scale))):
        before = functools.partial(injury.before, rng.random()) if injury.before else None
        run, late, resumed = Run(folder, before, **injury.options), False, {}
        if injury.inflict is not None:
            time.sleep(rng.uniform(0.1, 0.7) * seconds)
            late, resumed = run.exitcode is not None, dict(before=before, processes=run.processes)
            injury.inflict(run, rng)
        begin = time.perf_counter()
        code = run.end()
        slowest = max(slowest, time.perf_counter() - begin)
        folder.chmod(0o755)
        if late or (code == 0 and injury.message not in run.log()):
            outcomes[f"too late, {finish(folder, expected, **resumed)}"] += 1
        elif code is not None and injury.code in (None, code) and injury.message in run.log():
            outcomes[finish(folder, expected, **resumed)] += 1
        else:
            outcomes[f"ended with {code} and {last_line(run)}"] += 1
        shutil.rmtree(folder)
    result = row(injury.fault, outcomes, ("same weights", "too late, same weights"))
    return result | {"slowest_end_seconds": round(slowest, 2)}


# -- the same answer --------------------------------------------------------------------------------------------------

# Largest relative difference of a loss, and largest difference of a weight over the farthest that a weight moved.
ROUNDING, BF16 = (1e-4, 1e-3), (2e-2, math.inf)
_BARE = dict(dataloader_num_workers=0, eval_strategy="no", max_steps=48, save_steps=48)
_SGD = dict(_BARE, optim="sgd", learning_rate=1e-2)  # AdamW turns rounding errors of gradients of 0 into whole steps
_TWO = dict(processes=2, per_device_train_batch_size=2)
_PARTS = dict(gradient_accumulation_steps=4, per_device_train_batch_size=1)
# What is run, and what is changed of it.
ARRANGEMENTS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[float, float]]] = {
    "MAE: 2 processes x 2 images for 1 x 4": (dict(_SGD, family="mae"), _TWO, ROUNDING),
    "MAE: 4 x 1 images accumulated for 1 x 4": (dict(_SGD, family="mae"), _PARTS, ROUNDING),
    "CMAE: 2 processes x 2 images for 1 x 4": (dict(_SGD, family="cmae"), _TWO, ROUNDING),
    "MAE: bf16 for float32": (dict(_BARE, family="mae"), dict(bf16=True), BF16),
    "CMAE: bf16 for float32": (dict(_BARE, family="cmae"), dict(bf16=True), BF16),
}


def losses(folder: Path) -> np.ndarray:
    """The loss of every step of a run that has ended."""
    history = json.loads((checkpoints(folder)[-1] / "trainer_state.json").read_text())["log_history"]
    return np.array([entry["loss"] for entry in history if "loss" in entry])


def differences(folder: Path, other: Path, family: str) -> tuple[float, float]:
    """Of two runs, as the tolerances above."""
    first, second = losses(folder), losses(other)
    start, end = make_model(family).state_dict(), load_file(folder / "model.safetensors")
    weights = load_file(other / "model.safetensors")
    moved = max((end[name] - start[name]).abs().max().item() for name in end)
    apart = max((end[name] - weights[name]).abs().max().item() for name in end)
    return float(np.abs(second / first - 1).max()), apart / moved


def same(scale: float, rng: random.Random) -> list[Row]:
    """Runs that should do the same, or with another seed should not."""
    again, other = Counter(), Counter()
    whole, expected, _ = undisturbed()
    for i in range(max(1, round(5 * scale))):
        again[finish(whole.with_name(f"again-{i}"), expected)] += 1
        other[finish(whole.with_name(f"other-{i}"), expected, seed=100 + i)] += 1
    rows = [row("the same seed", again, ("same weights",)), row("another seed", other, ("other weights",))]
    for name, (base, changed, tolerances) in ARRANGEMENTS.items():
        whole, *_ = undisturbed(**base)
        folder = whole.with_name("other")
        apart, curves = (math.inf, math.inf), []
        if Run(folder, **{**base, **changed}).end() == 0:
            apart = differences(whole, folder, base["family"])
            curves = [losses(path).round(5).tolist() for path in (whole, folder)]
        shutil.rmtree(folder)
        good = all(difference <= most for difference, most in zip(apart, tolerances, strict=True))
        (loss, weights), (most, most_weights) = apart, tolerances
        text = f"loss apart by {loss:.1e}, weights by {weights:.1e}, of {most:.0e} and {most_weights:.0e}"
        rows.append(row(name, Counter({text: 1}), (text,) if good else ()) | {"differences": apart, "losses": curves})
    return rows


# -- the table --------------------------------------------------------------------------------------------------------

FAULTS: dict[str, Callable[[float, random.Random], list[Row]]] = {
    **{
        name: lambda scale, rng, group=group: [injure(injury, scale, rng) for injury in group]
        for name, group in INJURIES.items()
    },
    "same": same,
}
COLUMNS = ["fault", "tried", "survived", "lost", "outcomes"]
OUTPUT = Path(__file__).resolve().parent / "results" / "faults"


def loss_figure(rows: list[Row]) -> Figure:
    """A panel for each pair of runs whose losses should be the same."""
    figure = Figure(figsize=(3.2 * len(rows), 3), layout="constrained")
    for axis, pair in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        for curve, style in zip(pair["losses"], ("-", "--"), strict=True):
            axis.plot(range(1, len(curve) + 1), curve, style)
        axis.set_title(pair["fault"], fontsize="small")
        axis.set_xlabel("step")
    figure.axes[0].set_ylabel("loss; dashed: the other run")
    return figure


def main() -> int:
    """Injects the faults that were asked for; the exit code: 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", help=f"some of {', '.join(FAULTS)}; all, if none is named")
    parser.add_argument("--output", default=OUTPUT, type=Path, help="folder for results.csv and results.md")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the cases")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    unknown = [name for name in args.faults if name not in FAULTS]
    if unknown:
        parser.error(f"unknown faults {unknown}; choose from {', '.join(FAULTS)}")
    torch.set_num_threads(1)
    path, lost = args.output / "results.csv", 0
    for name in args.faults or FAULTS:
        begin, date = time.perf_counter(), time.strftime("%Y-%m-%d")
        rows = FAULTS[name](args.scale, random.Random(f"{args.seed}/{name}"))
        if drawn := [row for row in rows if "losses" in row]:
            save_figure(loss_figure(drawn), args.output / "losses.png")
        table = pd.DataFrame(rows)[COLUMNS].assign(date=date, command=name, seconds=round(time.perf_counter() - begin))
        table["outcomes"] = [", ".join(f"{o}: {n:,}" for o, n in counts.items()) for counts in table["outcomes"]]
        lost += table["lost"].sum()
        print(markdown_table(table), flush=True)
        if path.is_file():  # in place of what earlier runs of the same commands gave
            earlier = pd.read_csv(path)
            table = pd.concat([earlier[earlier["command"] != name], table])
            order = {command: i for i, command in enumerate(FAULTS)}
            table = table.sort_values("command", key=lambda names: names.map(order), kind="stable")
        write_whole(path, table.to_csv(index=False))
        write_whole(path.with_suffix(".md"), markdown_table(table.map(lambda cell: str(cell).replace("|", "/"))))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
