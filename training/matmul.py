# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Float32 matrix products on a CPU by oneDNN, where that is as exact as float32."""

from __future__ import annotations

import functools

import torch
from transformers.utils import logging

from clmae.training.arguments import PretrainingArguments
from clmae.training.callbacks import RunComponent

logger = logging.get_logger(__name__)


@functools.cache
def medium_is_float32() -> bool:
    """Whether this CPU computes float32 matrix products in float32 when their precision is "medium".

    They then go to oneDNN, which on many CPUs is twice as fast as the default. One with bf16 units rounds the factors
    to bf16 (an error of 1e-3 instead of 1e-7), so it is tried out.
    """
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    exact = torch.nn.functional.linear(a.double(), b.double())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        error = (torch.nn.functional.linear(a, b) - exact).abs().max() / exact.abs().max()
    finally:
        torch.set_float32_matmul_precision(before)
    return error.item() < 1e-5


class Float32MatmulCallback(RunComponent):
    """Sets matmul precision "medium" while a float32 run trains on a CPU where [`medium_is_float32`].

    Another precision than torch's default stays as it is.
    """

    def __init__(self, args: PretrainingArguments):
        self.in_float32_on_cpu = args.device.type == "cpu" and not (args.bf16 or args.fp16)
        self.before: str | None = None

    def start(self, checkpoint: str | None) -> None:
        """See the class."""
        default = torch.get_float32_matmul_precision()
        if self.in_float32_on_cpu and default == "highest" and medium_is_float32():
            logger.info('float32 matrix products go to oneDNN (matmul precision "medium"), which is as exact here.')
            self.before = default
            torch.set_float32_matmul_precision("medium")

    def stop(self) -> None:
        """Restores the precision."""
        if self.before is not None:
            torch.set_float32_matmul_precision(self.before)
            self.before = None
