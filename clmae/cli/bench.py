# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Measure how fast this machine pretrains, and which batch size fits. Times training steps on random
images (reading yours is not included). Every option of `clmae pretrain` that says what is trained
and how applies: --family, --model_size, --image_size, --bf16, --torch_compile, a recipe ...

examples:
  clmae bench --family cl_mae --model_size small --image_size 96 --patch_size 8
  clmae bench --config recipes/mae_cifar10.yaml --bf16 --batch_sizes 128 256 512 --num_images 50000
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from transformers import AutoModelForPreTraining, PrinterCallback, TrainerCallback
from transformers.hf_argparser import HfArg

from clmae.cli.options import CommandParser
from clmae.cli.pretrain import read_arguments
from clmae.configuration import MAEConfig
from clmae.configuration.configuration_mae import pair
from clmae.configuration.errors import InputError
from clmae.model_cards.record import device_name
from clmae.training import CurriculumTrainer, PretrainingArguments
from clmae.training.build import fastest_attention
from clmae.training.flops import step_flops

# Options of `clmae pretrain` that a measurement sets by itself.
REFUSED = {
    "per_device_train_batch_size": "give --batch_sizes",
    "output_dir": "nothing is written",
    "resume_from_checkpoint": "nothing is trained",
    "push_to_hub": "nothing is trained",
}
# Nothing is logged, evaluated, saved or drawn while steps are timed, whatever the recipe says.
QUIET = {
    **dict(eval_strategy="no", save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm="true"),
    **dict(difficulty_steps="0", picture_steps="0", gradient_accumulation_steps="1", dataloader_num_workers="0"),
    **dict(contrastive_crop="false", dataset="none", output_dir="none", learning_rate="1e-4"),
}
_ROW = "{:>6} {:>10} {:>9} {:>11} {:>10}"
LARGEST = 4096  # MAE's batch over all devices; host memory has to hold it
SIZES_HELP = f"Images per step; on a GPU then doubled until they no longer fit, up to {LARGEST}."
WARM_UP = 2  # steps, times the interval: compilation and other things that happen once


@dataclass
class BenchArguments:
    """What to measure, beside the options of `clmae pretrain` (family, model, precision, compilation ...)."""

    batch_sizes: list[int] = HfArg(default_factory=lambda: [16, 32, 64, 128], help=SIZES_HELP)
    num_steps: int = HfArg(default=5, help="Steps that are timed; the median is reported.")
    num_images: int = HfArg(default=1_281_167, help="Images per epoch; ImageNet-1K's if not given.")

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_images"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` is {getattr(self, name)}; give at least 1.")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise InputError(f"`batch_sizes` is {self.batch_sizes}; give one or more numbers of at least 1.")


class Measured(NamedTuple):
    """Median seconds per step, and the peak of the GPU's memory in bytes; `None` on a CPU."""

    seconds: float
    memory: int | None


class Stopwatch(TrainerCallback):
    """The times at which each step begins and ends, with the device idle."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.times.append(time.perf_counter())

    on_step_end = on_step_begin


def run(argv: Sequence[str]) -> int:
    """Times training steps on synthetic images, and prints what to expect."""
    bench, options = CommandParser("clmae bench", __doc__, {"options": BenchArguments}, refused=REFUSED).read(argv)
    config, args = read(options, bench.batch_sizes[0])
    if args.world_size > 1:
        raise InputError("a measurement runs in one process; start it without torchrun.")
    gpu = args.device.type == "cuda"
    what = f"{config.model_type}, {config.hidden_size} wide, {config.num_hidden_layers} blocks"
    print(f"{what}, on {device_name(args.device)}; an epoch: {bench.num_images:,} images")
    print(_ROW.format("batch", "images/s", "TFLOP/s", "memory", "epoch"))
    speeds: dict[int, float] = {}
    for batch in batch_sizes(bench.batch_sizes, more=gpu):
        _, args = read(options, batch)
        measured = measure(config, args, bench.num_steps)
        if measured is None:
            print(f"{batch:>6} does not fit")
            break
        speeds[batch] = speed = args.train_batch_size / measured.seconds
        teraflops = step_flops(config, args.train_batch_size, args.masker_update_interval) / measured.seconds / 1e12
        memory = "-" if measured.memory is None else f"{measured.memory / 2**30:.1f} GiB"
        epoch = duration(bench.num_images / speed)
        print(_ROW.format(batch, f"{speed:.1f}", f"{teraflops:.2g}", memory, epoch), flush=True)
    if not speeds:
        print("Not even the smallest batch fits; try --gradient_checkpointing, --bf16 or a smaller model.")
        return 1
    fastest = max(speeds, key=lambda batch: speeds[batch])
    fits = f"; the largest that fitted: {max(speeds)}" if gpu else ""
    print(f"Fastest: {speeds[fastest]:.1f} images/s, with --per_device_train_batch_size {fastest}{fits}.")
    return 0


def read(options: Sequence[str], batch: int) -> tuple[MAEConfig, PretrainingArguments]:
    """What `clmae pretrain` would train with these options, in batches of `batch`, and nothing but that."""
    quiet = {**QUIET, "per_device_train_batch_size": batch}
    config, _, args, _ = read_arguments([*options, *(f"--{name}={value}" for name, value in quiet.items())])
    return config, args


def batch_sizes(asked: Sequence[int], more: bool) -> Iterator[int]:
    """The batch sizes in order; with `more` then the last one doubled, again and again, up to `LARGEST`."""
    yield from (ordered := sorted(set(asked)))
    batch = 2 * ordered[-1]
    while more and batch <= LARGEST:
        yield batch
        batch *= 2


def measure(config: MAEConfig, args: PretrainingArguments, num_steps: int) -> Measured | None:
    """Times steps of the trainer on images that are all the same; `None` if they do not fit into the GPU."""
    interval = args.masker_update_interval  # a time is the mean over an interval
    args.max_steps = interval * (WARM_UP + math.ceil(num_steps / interval))
    views = getattr(config, "num_views", 1)
    shape = ((views,) if views > 1 else ()) + (config.num_channels, *pair(config.image_size))
    sample = {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(0))}
    watch, trainer, gpu = Stopwatch(), None, args.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(args.device)
    try:
        with tempfile.TemporaryDirectory() as folder:
            args.output_dir = folder
            trainer = CurriculumTrainer(
                AutoModelForPreTraining.from_config(config, attn_implementation=fastest_attention(args.device)),
                args,
                train_dataset=[sample] * (args.max_steps * args.train_batch_size),
                callbacks=[watch],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
    except torch.OutOfMemoryError:
        return None
    finally:
        # The next batch size starts with free memory and without this one's compiled code.
        trainer = None
        torch.compiler.reset()
        clear_device_cache(garbage_collection=True)
    seconds = np.subtract(watch.times[1::2], watch.times[::2])[interval * WARM_UP :]
    median = float(np.median(seconds.reshape(-1, interval).mean(1)))
    return Measured(median, torch.cuda.max_memory_allocated(args.device) if gpu else None)


def duration(seconds: float) -> str:
    """In the largest unit of which it is at least one: `"42 s"`, `"3.5 min"`, `"7.1 h"`, `"2.3 days"`."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
