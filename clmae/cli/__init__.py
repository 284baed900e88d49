# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae <command>`."""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Sequence

import torch
from huggingface_hub.utils import enable_progress_bars
from transformers.utils.logging import disable_progress_bar

from clmae import __version__
from clmae.cli.options import nearest
from clmae.configuration.errors import InputError

COMMANDS = {
    "pretrain": "pretrain a masked autoencoder on images",
    "evaluate": "evaluate an encoder: k-NN, linear, few-shot, fine-tuning …",
    "compare": "pretrain by several recipes under equal conditions, and evaluate each",
    "embed": "turn images into features: parquet or npy",
    "visualize": "draw masks and reconstructions",
    "export": "write a model for transformers' own classes, timm or ONNX",
    "convert": "read a checkpoint of another MAE project",
    "card": "make the model card of an output folder",
    "app": "look at a model in the browser",
    "push": "upload a model to the Hub",
    "verify": "check that checkpoints and models are whole",
    "bench": "measure how fast this machine pretrains, and which batch size fits",
}
USAGE = f"""\
usage: clmae COMMAND ...

examples:
  clmae pretrain --family cl_mae --model_size small --dataset ./my_photos --output_dir out/cl-mae
  clmae evaluate knn --model out/cl-mae --dataset uoft-cs/cifar10
  clmae visualize --model out/cl-mae --images photo1.jpg photo2.jpg --output masks.png

commands:
{chr(10).join(f"  {name:<17} {text}" for name, text in COMMANDS.items())}

`clmae COMMAND --help` explains a command's options, `clmae --version` prints the version.
"""


def keep_freed_memory() -> None:
    """Lets this process keep the memory that a step on a CPU frees for the next step, if its C library is glibc.

    By default glibc gives it back to the system, and page faults take a seventh of a small model's step.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        _ = mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # older versions refuse more than that
        mallopt(trim_threshold, 2**31 - 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code: 0 done, 1 something is wrong, 2 wrong use or bad input, 130 or 143 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"clmae {__version__}")
        return 0
    name, *rest = argv
    try:
        if name not in COMMANDS:
            raise InputError(f"unknown command {name!r}{nearest(name, COMMANDS)}; commands: {', '.join(COMMANDS)}")
        # Imported only now: the help does not wait for matplotlib and datasets.
        command = importlib.import_module(f"clmae.cli.{name}")
        if not torch.accelerator.is_available():
            keep_freed_memory()
        disable_progress_bar()  # of each file of weights, in between the bar of the training
        enable_progress_bars()  # of downloads
        return command.run(rest)
    except InputError as error:
        print(f"clmae: error: {error}", file=sys.stderr)
        return 2
    except ArithmeticError as error:
        from clmae.training.finite import NonFiniteError  # as late as the commands

        if not isinstance(error, NonFiniteError):
            raise
        print(f"clmae: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("clmae: interrupted", file=sys.stderr)
        return 130
