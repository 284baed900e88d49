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
import multiprocessing
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
_FORK = multiprocessing.get_context("fork")  # a new process would import for seconds
_scratch: list[tempfile.TemporaryDirectory] = []  # until the end

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
    """A CMAE with everything, or a plain MAE; always the same weights."""
    torch.manual_seed(0)
    everything = family == "cmae"
    config = clmae.CMAEConfig(**TINY, **MASKER, learned_masks=True) if everything else clmae.MAEConfig(**TINY)
    return AutoModelForPreTraining.from_config(config)


def make_trainer(
    folder: Path, family: str = "cmae", num_images: int = 24, callbacks: tuple[Any, ...] = (), **options: Any
) -> CurriculumTrainer:
    """A run with everything that has a state: learned masks, two views, crops; or of a MAE, with none of these."""
    views = dict(image_size=(16, 16), num_channels=3, num_patches=16, patch_size=(4, 4), mean=[0.5] * 3, std=[0.25] * 3)
    everything = family == "cmae"
    defaults = dict(
        **dict(output_dir=str(folder), max_steps=STEPS, learning_rate=1e-3, eval_strategy="steps", eval_steps=3),
        **dict(per_device_train_batch_size=4, per_device_eval_batch_size=4, save_steps=SAVE_STEPS, save_total_limit=2),
        **dict(logging_steps=1, difficulty_steps=0, picture_steps=0, dataloader_num_workers=1),
        **dict(use_cpu=True, disable_tqdm=True, report_to="none"),
    )
    return CurriculumTrainer(
        make_model(family),
        PretrainingArguments(**{**defaults, **options}),
        train_dataset=ImageDataset(
            pictures(num_images, 0), "image", contrastive_crop=everything, num_views=1 + everything, **views
        ),
        eval_dataset=ImageDataset(pictures(8, 1), "image", train=False, **views),
        callbacks=list(callbacks),
    )


def work(folder: Path, before: Callable[[], Any] | None, options: dict[str, Any]) -> None:
    """A run from its newest valid checkpoint on; its exit code is 0, or 128 plus the signal that stopped it."""
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


def run_process(folder: Path, before: Callable[[], Any] | None, processes: int, options: dict[str, Any]) -> None:
    """What a forked process does: the run, or with several processes what torchrun does."""
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(log, "a", buffering=1)  # which may have been something else than 1 and 2
    if processes == 1:
        return work(folder, before, options)
    config = LaunchConfig(
        **dict(min_nodes=1, max_nodes=1, nproc_per_node=processes, max_restarts=0, start_method="fork"),
        **dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=0.1),
        logs_specs=DefaultLogsSpecs(log_dir=str(folder.parent / "agent")),
    )
    elastic_launch(config, work)(folder, before, options)


def start(folder: Path, before: Callable[[], Any] | None = None, processes: int = 1, **options: Any) -> Any:
    """Starts a run in a folder, which is emptied if no checkpoint in it is complete: there is nothing to go on from.

    Args:
        folder: For its output, and `log.txt`.
        before: Called in the new process before the first step.
        processes: That the run has.
        options: Of [`make_trainer`].
    """
    if last_valid_checkpoint(folder)[0] is None:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    process = _FORK.Process(target=run_process, args=(folder, before, processes, options))
    process.start()
    return process


def end(process: Any) -> int | None:
    """The exit code of a run; `None` if it hung."""
    deadline = time.perf_counter() + PATIENCE
    while process.exitcode is None:  # `join` would also wait for the workers of a run that was killed
        if time.perf_counter() > deadline:
            process.kill()
            process.join()
            return None
        time.sleep(0.01)
    return process.exitcode


def last_line(folder: Path) -> str:
    """What a run said last, such as its error."""
    return (folder / "log.txt").read_text(errors="replace").strip().rpartition("\n")[2][:200]


def finish(folder: Path, expected: dict[str, torch.Tensor], **options: Any) -> str:
    """Lets a run go on to its end, or makes one where there is none, and compares."""
    code = end(start(folder, **options))
    if code != 0:
        return f"the resumed run ended with {code} and {last_line(folder)}"
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
    """A scratch folder, the weights of an undisturbed run in its sub-folder `whole`, and the seconds that took."""
    _scratch.append(tempfile.TemporaryDirectory())
    whole, begin = Path(_scratch[-1].name, "whole"), time.perf_counter()
    code = end(start(whole, processes=processes, **options))
    if code != 0:
        raise RuntimeError(f"the undisturbed run ended with {code}: {(whole / 'log.txt').read_text()[-2000:]}")
    return whole.parent, load_file(whole / "model.safetensors"), time.perf_counter() - begin


def limit_files(size: int) -> None:
    """No file of this process can grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def disk(scale: float, rng: random.Random) -> list[Row]:
    """Files that cannot grow beyond a random size, as on a full disk."""
    outcomes = Counter()
    scratch, expected, _ = undisturbed()
    largest = max(path.stat().st_size for path in checkpoints(scratch / "whole")[-1].iterdir())
    for _ in range(max(1, round(8 * scale))):
        folder = scratch / "run"
        # Batches from workers would be files that cannot grow, too.
        limit = functools.partial(limit_files, rng.randrange(1000, largest))
        code = end(start(folder, limit, dataloader_num_workers=0))
        outcomes[finish(folder, expected) if code == 1 else f"ended with {code}"] += 1
        shutil.rmtree(folder)
    return [row("no space in the midst of a save", outcomes, ("same weights",))]


# -- what is done to runs from outside --------------------------------------------------------------------------------


def kill_child(process: Any, folder: Path, rng: random.Random, count: int = 1) -> None:
    """Kills one of the processes that a run has started, once there are `count`."""
    while process.exitcode is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children()
            if len(children) >= count:
                return rng.choice(children).kill()
        time.sleep(0.001)


def forbid(process: Any, folder: Path, rng: random.Random) -> None:
    """Nothing can be made or deleted in the folder any more."""
    folder.chmod(0o555)


def heed_permissions() -> None:
    """Gives up what lets root write everywhere: all capabilities of this thread (Linux)."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def set_clock_back() -> None:
    """From now on the clock runs backwards, an hour a second."""
    now, begin = time.time(), time.monotonic()
    time.time = lambda: now - 3600 * (time.monotonic() - begin)


def kill_and_turn_back(process: Any, folder: Path, rng: random.Random) -> None:
    """Kills a run whose later checkpoints are the older ones by the clock."""
    process.kill()
    process.join()
    for age, checkpoint in enumerate(checkpoints(folder)):
        os.utime(checkpoint, (1e9 - 1e6 * age,) * 2)


def run_second(process: Any, folder: Path, rng: random.Random) -> None:
    """Starts another run in the same folder while the first is held, and waits for its end."""
    while process.exitcode is None and not (folder / LOCK_NAME).exists():
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGSTOP)
        second = _FORK.Process(target=run_process, args=(folder, None, 1, {}))
        second.start()
        end(second)
        os.kill(process.pid, signal.SIGCONT)


class Injury(NamedTuple):
    """What is done to runs at random moments.

    Attributes:
        fault: Its line in the table.
        inflict: Called with the process, its folder and a source of random numbers.
        code: Exit code of a run that was hurt; any, if not given.
        message: What it leaves in `log.txt`.
        before, processes: As in [`start`].
        count: How often.
    """

    fault: str
    inflict: Callable[[Any, Path, random.Random], None]
    code: int | None = None
    message: str = ""
    before: Callable[[], None] | None = None
    processes: int = 1
    count: int = 10


def stop(number: signal.Signals, count: int) -> Injury:
    """By a signal. Saves and evaluations are most of a run's time, and so most of what is interrupted."""

    def inflict(run: Any, *_: Any) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended, and counts as late
            os.kill(run.pid, number)

    return Injury(f"{number.name} at a random moment", inflict, count=count)


# fmt: off
SIGNALS = (stop(signal.SIGKILL, 36), stop(signal.SIGTERM, 12), stop(signal.SIGINT, 12))
KILL_RANK = functools.partial(kill_child, count=2)
INJURIES = {
    "workers": Injury("a data worker killed", kill_child, 1, "DataLoader worker (pid"),
    "ranks": Injury("one of two processes killed", KILL_RANK, 1, "first observed failure", processes=2),
    "readonly": Injury("the folder made read-only", forbid, 1, "Permission denied", heed_permissions),
    "clock": Injury("killed with the clock set back", kill_and_turn_back, -signal.SIGKILL, "", set_clock_back),
    "second": Injury("a second run in the folder", run_second, 0, "in use by another run"),
}
# fmt: on


def injure(injury: Injury, scale: float, rng: random.Random) -> list[Row]:
    """Hurts runs at random moments: each must end, and say why; resumed, it must come to the same weights."""
    outcomes, slowest, how = Counter(), 0.0, {"before": injury.before, "processes": injury.processes}
    scratch, expected, seconds = undisturbed(injury.processes)
    folder = scratch / "run"
    for _ in range(max(1, round(injury.count * scale))):
        process = start(folder, **how)
        time.sleep(rng.uniform(0.1, 0.7) * seconds)
        late = process.exitcode is not None
        injury.inflict(process, folder, rng)
        begin = time.perf_counter()
        code = end(process)
        slowest = max(slowest, time.perf_counter() - begin)
        folder.chmod(0o755)
        log = (folder / "log.txt").read_text(errors="replace")
        if late or (code == 0 and injury.message not in log):
            outcomes[f"too late, {finish(folder, expected, **how)}"] += 1
        elif code is not None and injury.code in (None, code) and injury.message in log:
            outcomes[finish(folder, expected, **how)] += 1
        else:
            outcomes[f"ended with {code} and {last_line(folder)}"] += 1
        shutil.rmtree(folder)
    result = row(injury.fault, outcomes, ("same weights", "too late, same weights"))
    return [result | {"slowest_end_seconds": round(slowest, 2)}]


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
    scratch, expected, _ = undisturbed()
    for i in range(max(1, round(5 * scale))):
        again[finish(scratch / f"again-{i}", expected)] += 1
        other[finish(scratch / f"other-{i}", expected, seed=100 + i)] += 1
    rows = [row("the same seed", again, ("same weights",)), row("another seed", other, ("other weights",))]
    for name, (base, changed, tolerances) in ARRANGEMENTS.items():
        scratch, *_ = undisturbed(**base)
        whole, folder = scratch / "whole", scratch / "other"
        apart, curves = (math.inf, math.inf), []
        if end(start(folder, **{**base, **changed})) == 0:
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
    "kill": lambda scale, rng: [row for injury in SIGNALS for row in injure(injury, scale, rng)],
    "disk": disk,
    **{name: functools.partial(injure, injury) for name, injury in INJURIES.items()},
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
