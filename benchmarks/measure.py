# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks share: a clock, the peak of matrix products, the largest kernels, and what ran on what."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from clmae.model_cards.record import device_name


def seconds(call: Callable[[], Any], device: torch.device, times: int = 1) -> float:
    """Of one of `times` calls, from an idle device to an idle device."""
    synchronize = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        call()
    synchronize()
    return (time.perf_counter() - start) / times


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """float32 matrix products in float32, or (`"medium"`) by the device's fastest path that starts from float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision == "medium" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def matmul_peak(precision: str, device: torch.device, size: int, tries: int = 20) -> float:
    """FLOP/s of the fastest of some products of two square matrices of `size`."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    with matmul_precision(precision):
        seconds(lambda: a @ b, device)
        return 2 * size**3 / min(seconds(lambda: a @ b, device, 4) for _ in range(tries))


def largest_kernels(call: Callable[[], Any], device: torch.device, count: int = 5) -> pd.DataFrame:
    """What takes most of a call's time: launches, milliseconds and share of kernels on a GPU, of operators on a CPU."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        seconds(call, device)
    kind, field = (DeviceType.CUDA, "self_device_time_total") if on_gpu else (DeviceType.CPU, "self_cpu_time_total")
    events = [event for event in profiler.key_averages() if event.device_type == kind]
    table = pd.DataFrame([[e.key.replace("|", "/")[:80], e.count, getattr(e, field)] for e in events])
    table.columns = ["kernel", "launches", "microseconds"]
    share = table["microseconds"] / table["microseconds"].sum()
    table = table.assign(ms=(table["microseconds"] / 1e3).round(2), share=share.map("{:.0%}".format))
    return table.nlargest(count, "microseconds").drop(columns="microseconds")


def describe(device: torch.device) -> str:
    """What was run, on what and when."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    words = [f"`{command}`", time.strftime("%Y-%m-%d"), device_name(device), *([cpu] if cpu else [])]
    words += [f"{name} {version(name)}" for name in ("torch", "transformers", "torchvision")]
    return f"{', '.join(words)}. Load average at the start: {os.getloadavg()[0]:.1f}."
