# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae bench`."""

from __future__ import annotations

import gc
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForPreTraining, PrinterCallback, TrainerCallback

from clmae.cli.options import parse, split_options
from clmae.cli.pretrain import read_arguments
from clmae.configuration import MAEConfig
from clmae.configuration.configuration_mae import pair
from clmae.configuration.errors import InputError
from clmae.model_cards.record import device_name
from clmae.training.arguments import PretrainingArguments
from clmae.training.build import fastest_attention
from clmae.training.flops import step_flops
from clmae.training.trainer import CurriculumTrainer

EXAMPLES = """\
  clmae bench --family cl_mae --model_size small --image_size 96 --patch_size 8
  clmae bench --config recipes/mae_cifar10.yaml --bf16 --batch_sizes 128 256 512 --num_images 50000"""

# Options of `clmae pretrain` that a measurement sets by itself.
TAKEN = {
    "per_device_train_batch_size": "give --batch_sizes",
    "output_dir": "nothing is written",
    "resume_from_checkpoint": "nothing is trained",
    "push_to_hub": "nothing is trained",
}
# Of a recipe: nothing is logged, evaluated, saved or drawn while steps are timed.
QUIET = {
    **dict(eval_strategy="no", save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm="true"),
    **dict(difficulty_steps="0", picture_steps="0", gradient_accumulation_steps="1", dataloader_num_workers="0"),
    "contrastive_crop": "false",
}
_ROW = "{:>6} {:>10} {:>9} {:>11} {:>10}"
LARGEST = 4096  # MAE's batch over all devices; more on one is no recipe, and host memory has to hold it
WARM_UP = 2  # steps, times the interval: what happens once, such as compilation


@dataclass
class BenchArguments:
    """What to measure, beside the options of `clmae pretrain` (family, model, precision, compilation ...)."""

    batch_sizes: list[int] = field(
        default_factory=lambda: [16, 32, 64, 128],
        metadata={"help": f"Images a step; on a GPU then doubled until it no longer fits, up to {LARGEST}."},
    )
    num_steps: int = field(default=5, metadata={"help": "Steps that are timed; the median counts."})
    num_images: int = field(default=1_281_167, metadata={"help": "Images of an epoch; ImageNet-1K's if not given."})

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_images"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` is {getattr(self, name)}; give at least 1.")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise InputError(f"`batch_sizes` is {self.batch_sizes}; give one or more numbers of at least 1.")


class Measured(NamedTuple):
    """Median seconds of a step, and the peak of the GPU's memory in bytes; `None` on a CPU."""

    seconds: float
    memory: int | None


class Images(torch.utils.data.Dataset):
    """`length` times the same random samples, as many views as the family wants, ready made."""

    def __init__(self, config: MAEConfig, length: int):
        views = getattr(config, "num_views", 1)
        shape = ((views,) if views > 1 else ()) + (config.num_channels, *pair(config.image_size))
        self.length = length
        self.sample = {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(0))}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.sample


class Stopwatch(TrainerCallback):
    """The seconds of each step, from an idle device to an idle device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(self._now() - self.start)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def run(argv: Sequence[str]) -> int:
    """Times training steps on synthetic images, and prints what to expect."""
    own, rest = split_options(argv, BenchArguments, TAKEN, "a measurement")
    (bench,) = parse(
        {"options": BenchArguments},
        own,
        prog="clmae bench",
        description="How fast does this machine pretrain, and which batch fits? Times real training steps on random\n"
        "images (reading yours is not included). Every option of `clmae pretrain` that says what is trained\n"
        "and how applies: --family, --model_size, --image_size, --bf16, --torch_compile, a recipe ...",
        examples=EXAMPLES,
    )
    config, args = read(rest, bench.batch_sizes[0])
    if args.world_size > 1:
        raise InputError("a measurement runs in one process; start it without torchrun.")
    gpu = args.device.type == "cuda"
    what = f"{config.model_type}, {config.hidden_size} wide, {config.num_hidden_layers} blocks"
    print(f"{what}, on {device_name(args.device)}; an epoch: {bench.num_images:,} images")
    print(_ROW.format("batch", "images/s", "TFLOP/s", "memory", "epoch"))
    fastest, largest = None, None
    for batch in batch_sizes(bench.batch_sizes, more=gpu):
        _, args = read(rest, batch)
        found = measure(config, args, bench.num_steps)
        if found is None:
            print(f"{batch:>6} does not fit")
            break
        speed, largest = args.train_batch_size / found.seconds, batch
        if fastest is None or speed > fastest[1]:
            fastest = batch, speed
        teraflops = step_flops(config, args.train_batch_size, args.masker_update_interval) / found.seconds / 1e12
        memory = "-" if found.memory is None else f"{found.memory / 2**30:.1f} GiB"
        epoch = duration(bench.num_images / speed)
        print(_ROW.format(batch, f"{speed:.1f}", f"{teraflops:.2g}", memory, epoch), flush=True)
    if fastest is None:
        print("Not even the smallest batch fits; try --gradient_checkpointing, --bf16 or a smaller model.")
        return 1
    fits = f"; the largest that was seen to fit: {largest}" if gpu else ""
    print(f"Fastest: {fastest[1]:.1f} images/s, with --per_device_train_batch_size {fastest[0]}{fits}.")
    return 0


def read(rest: Sequence[str], batch: int) -> tuple[MAEConfig, PretrainingArguments]:
    """What `clmae pretrain` would train with these options, in batches of `batch`, and nothing but that."""
    quiet = [f"--{name}={value}" for name, value in QUIET.items()]
    own = ["--dataset=none", "--output_dir=none", f"--per_device_train_batch_size={batch}", "--learning_rate=1e-4"]
    config, _, args, _ = read_arguments([*rest, *quiet, *own])
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
    interval, batch = args.masker_update_interval, args.train_batch_size
    cycles = math.ceil(num_steps / interval)  # a time is the mean over an interval
    args.max_steps = interval * (WARM_UP + cycles)
    watch = Stopwatch(args.device)
    gpu = args.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(args.device)
    trainer = None
    try:
        with tempfile.TemporaryDirectory() as folder:
            args.output_dir = folder
            trainer = CurriculumTrainer(
                AutoModelForPreTraining.from_config(config, attn_implementation=fastest_attention(args.device)),
                args,
                train_dataset=Images(config, args.max_steps * batch),
                callbacks=[watch],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
    except torch.OutOfMemoryError:
        return None
    finally:
        # The next batch is not to find less room, nor the compiled code of this one.
        trainer = None
        gc.collect()
        torch.compiler.reset()
        if gpu:
            torch.cuda.empty_cache()
    times = watch.seconds[interval * WARM_UP :]
    means = [statistics.mean(times[i : i + interval]) for i in range(0, len(times), interval)]
    return Measured(statistics.median(means), torch.cuda.max_memory_allocated(args.device) if gpu else None)


def duration(seconds: float) -> str:
    """In the largest unit that it reaches: `"42 s"`, `"3.5 min"`, `"7.1 h"`, `"2.3 days"`."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
