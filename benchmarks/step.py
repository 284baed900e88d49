# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""How fast is a training step? Families, sizes and options, side by side with transformers' ViTMAE in one process.

    python benchmarks/step.py --preset cpu
    python benchmarks/step.py --preset gpu

The cases of a group run interleaved: a step of each, then again, so that what else the machine does hits all alike.
Written after every group: `step-<preset>.json`, with everything, and `step-<preset>.md`, with the median images/s, the
share of the matrix-product peak that was measured at the start (by the formula's FLOPs), the ratio to ViTMAE and to our
own MAE, and the peak memory. Times over several batches, numbers of patches or widths get a fitted exponent (`--only
batches`, `--only patches`, `--only widths`). On a GPU also: the largest kernels, and how often a step waits for the
device.

On a GPU that is lent by the minute, take one group at a time: `--only "batch 256"` writes `step-gpu-batch-256.json`.

    python benchmarks/step.py --cost
    python benchmarks/step.py --memory

measure nothing: they print the FLOPs of a step by part with the cost of the recipes that follows from them, and the
memory of a step by the sizes of its tensors (`docs/speed.md`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import statistics
import sys
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from clmae import FAMILIES, MAEConfig
from clmae.configuration.configuration_mae import SIZES
from clmae.model_cards.files import write_whole
from clmae.model_cards.record import device_name
from clmae.training.flops import step_flops, step_flops_by_part

HERE = Path(__file__).resolve().parent
VIT_MAE = "vit_mae"  # transformers' own
PRECISIONS = ("fp32", "medium", "bf16")
# For `--cost`: the MAE paper's epochs, ImageNet-1K's training images and their mean size, and an assumed speed.
EPOCHS, IMAGENET, IMAGE_MB = 800, 1_281_167, 0.11
SUSTAINED = 400e12  # FLOP/s of one GPU, its peak times the share that a step reaches; not measured
# Fields of the configuration by name.
AT_224 = {"image_size": 224}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        **dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4),
        **dict(decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2),
    },
    **{
        f"{width}x6-64px": dict(
            **dict(
                hidden_size=width, num_hidden_layers=6, num_attention_heads=width // 64, image_size=64, patch_size=8
            ),
            **dict(decoder_hidden_size=width * 2 // 3, decoder_num_hidden_layers=4, decoder_num_attention_heads=4),
        )
        for width in (192, 384, 576, 768)
    },
    "ViT-S/8-64px": {**SIZES["small"], "image_size": 64, "patch_size": 8},
    "ViT-B/16": {**SIZES["base"], **AT_224, "patch_size": 16},
    "ViT-L/16": {**SIZES["large"], **AT_224, "patch_size": 16},
    "ViT-H/14": {**SIZES["huge"], **AT_224, "patch_size": 14},
}
SHAPES |= {f"192x6-{side}px": {**SHAPES["192x6-64px"], "image_size": side} for side in (32, 96, 128)}
SHAPES |= {f"ViT-B/16-{side}px": {**SIZES["base"], "image_size": side} for side in (112, 160, 320)}
# Fields in which the shapes of a fitted exponent differ.
AXES = {
    "batch": (),
    "patches": ("image_size",),
    "width": ("hidden_size", "num_attention_heads", "decoder_hidden_size", "decoder_num_attention_heads"),
}


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        family: `"mae"`, `"cl_mae"`, `"cmae"`, or `"vit_mae"` for transformers' own.
        shape: A name in `SHAPES`.
        batch: Images a step; two views of an image are one.
        attention: `"eager"` or `"sdpa"`.
        precision: `"fp32"`; `"medium"` (`torch.set_float32_matmul_precision`); `"bf16"` (autocast).
        compiled: Encoder, decoder and masking module by `torch.compile`; the whole model where masks are random.
        interval: `masker_update_interval`; a time is the mean over so many steps.
        checkpointing: Gradient checkpointing.
        soft_masking: How pass B hides patches.
    """

    family: str
    shape: str
    batch: int
    attention: str = "eager"
    precision: str = "fp32"
    compiled: bool = False
    interval: int = 1
    checkpointing: bool = False
    soft_masking: str = "attention"

    @property
    def options(self) -> str:
        """All but shape and batch, in words."""
        found = [self.family, self.attention, self.precision]
        found += ["compiled"] * self.compiled + ["checkpointing"] * self.checkpointing
        found += [f"interval {self.interval}"] * (self.interval > 1)
        return ", ".join(found + [f"soft masking by {self.soft_masking}"] * (self.soft_masking != "attention"))

    @property
    def config(self) -> MAEConfig:
        """As our own configuration, transformers' too: for the FLOPs."""
        fields = dict(SHAPES[self.shape])
        if self.family == "cl_mae":
            fields["soft_masking"] = self.soft_masking
        if self.family == "cmae":  # it has a small decoder whatever the encoder
            fields = {name: value for name, value in fields.items() if not name.startswith("decoder_")}
        return FAMILIES["mae" if self.family == VIT_MAE else self.family][0](**fields)


def _cases(families: Sequence[str], shape: str, batch: int, **options: Any) -> list[Case]:
    return [Case(family, shape, batch, **options) for family in families]


def _cpu_group(shape: str, batch: int) -> list[Case]:
    return [
        *_cases((VIT_MAE, "mae", "cl_mae"), shape, batch, attention="sdpa"),
        *(c for p in PRECISIONS for c in _cases((VIT_MAE, "mae", "cl_mae", "cmae"), shape, batch, precision=p)),
        *(Case("cl_mae", shape, batch, precision="bf16", interval=k) for k in (2, 4)),
    ]


def _cpu_options(shape: str, batch: int) -> list[Case]:
    options = ({}, {"checkpointing": True}, {"compiled": True}, {"soft_masking": "tokens"})
    return [
        *_cases(("mae",), shape, batch, precision="bf16"),
        *(Case("cl_mae", shape, batch, precision="bf16", **option) for option in options),
    ]


def _gpu_group(shape: str, batch: int) -> list[Case]:
    fast = dict(attention="sdpa", precision="bf16", compiled=True)
    return [
        *_cases((VIT_MAE, "mae", "cl_mae", "cmae"), shape, batch, **fast),
        Case("cl_mae", shape, batch, interval=2, **fast),
        Case("cl_mae", shape, batch, interval=4, **fast),
        Case("cl_mae", shape, batch, checkpointing=True, **{**fast, "compiled": False}),
        *_cases((VIT_MAE, "mae", "cl_mae"), shape, batch, attention="sdpa", precision="bf16"),
        *_cases((VIT_MAE, "mae", "cl_mae"), shape, batch, attention="eager", precision="bf16"),
        *_cases((VIT_MAE, "mae", "cl_mae"), shape, batch, attention="sdpa", precision="fp32"),
        *_cases((VIT_MAE, "mae", "cl_mae"), shape, batch, attention="sdpa", precision="medium"),
    ]


def _sweep(shapes: Sequence[str], batches: Sequence[int], **options: Any) -> list[Case]:
    return [c for shape in shapes for batch in batches for c in _cases(("mae", "cl_mae"), shape, batch, **options)]


@dataclass(frozen=True)
class Preset:
    """Groups of cases, the rounds in which each is timed, steps between two readings of the clock, matrix size."""

    groups: Mapping[str, Sequence[Case]]
    rounds: int = 5
    steps: int = 1
    matrix: int = 2048


PRESETS = {
    "smoke": Preset(
        {
            "tiny": [
                Case(VIT_MAE, "tiny", 4, attention="sdpa"),
                *_cases((VIT_MAE, "mae", "cl_mae", "cmae"), "tiny", 4),
                Case("cl_mae", "tiny", 4, attention="sdpa", precision="bf16", interval=2, checkpointing=True),
                Case("mae", "tiny", 8),
            ]
        },
        rounds=2,
        matrix=64,
    ),
    "cpu": Preset(
        {
            "64 px, batch 64": _cpu_group("192x6-64px", 64),
            "ViT-S/8, 64 px, batch 64": _cpu_group("ViT-S/8-64px", 64),
            "ViT-B/16, batch 4": _cpu_group("ViT-B/16", 4),
            "ViT-B/16, batch 8": _cpu_group("ViT-B/16", 8),
            "64 px, options": _cpu_options("192x6-64px", 64),
            "64 px, batches": _sweep(["192x6-64px"], (32, 64, 128, 256, 512), precision="bf16"),
            "patches": _sweep([f"192x6-{side}px" for side in (32, 64, 96, 128)], [32], precision="bf16"),
            "64 px, widths": _sweep([f"{width}x6-64px" for width in (192, 384, 576, 768)], [32], precision="bf16"),
        }
    ),
    "gpu": Preset(
        {
            "ViT-B/16, batch 256": _gpu_group("ViT-B/16", 256),
            "ViT-B/16, batches": _sweep(["ViT-B/16"], (32, 64, 128, 256, 512), attention="sdpa", precision="bf16"),
            "ViT-B/16, patches": _sweep(
                ["ViT-B/16-112px", "ViT-B/16-160px", "ViT-B/16", "ViT-B/16-320px"],
                [64],
                **dict(attention="sdpa", precision="bf16"),
            ),
            "ViT-L/16, batch 128": _cases(
                ("mae", "cl_mae"), "ViT-L/16", 128, attention="sdpa", precision="bf16", compiled=True
            ),
            "ViT-H/14, batch 64": [
                Case("cl_mae", "ViT-H/14", 64, attention="sdpa", precision="bf16", checkpointing=True)
            ],
        },
        steps=4,
        matrix=8192,
    ),
}

# -- a step -----------------------------------------------------------------------------------------------------------


def build_model(case: Case) -> nn.Module:
    """The case's model in training mode, not compiled."""
    config: Any = case.config
    if case.family == VIT_MAE:
        names = ("intermediate_size", "decoder_intermediate_size", "norm_pix_loss", "mask_ratio")
        config = ViTMAEConfig(**SHAPES[case.shape], **{name: getattr(config, name) for name in names})
        model = ViTMAEForPreTraining._from_config(config, attn_implementation=case.attention)
    else:
        model = FAMILIES[case.family][2]._from_config(config, attn_implementation=case.attention)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def compile_model(model: nn.Module) -> None:
    """In place; encoder, decoder and masking module each where pass B differentiates between them.

    Their compiled backward passes then compute the gradients of the weights too, which pass B throws away: some 20 %
    more than the formula's FLOPs.
    """
    learned = hasattr(model, "masking_module")
    for module in (model.vit, model.decoder, model.masking_module) if learned else (model,):
        module.compile(dynamic=False)


class Step:
    """Forward and backward pass and AdamW's update on the same random images; a call is one step, its loss unread.

    `like`: a step whose model and optimiser to share, because they do not all fit beside each other.
    """

    def __init__(self, case: Case, device: torch.device, like: Step | None = None):
        self.case, self.device = case, device
        if like is not None:
            self.model, self.optimizer = like.model, like.optimizer
        else:
            with device:
                self.model = build_model(case)
            if case.compiled:
                compile_model(self.model)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        config = case.config
        views = getattr(config, "num_views", 1)
        shape = (case.batch, *((views,) if views > 1 else ()), config.num_channels, *2 * (config.image_size,))
        self.pixel_values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        # λ as a tensor that is there before the step, as the trainer gives it.
        self.factors = torch.linspace(1, -1, 64, device=device).unbind()
        self.count = 0

    def __call__(self) -> None:
        inputs: dict[str, Any] = {"pixel_values": self.pixel_values}
        if hasattr(self.model, "masking_module"):
            inputs["curriculum_factor"] = self.factors[self.count % len(self.factors)]
            inputs["compute_masker_loss"] = self.count % self.case.interval == 0
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.case.precision == "bf16"):
            loss = self.model(**inputs).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.count += 1

    @property
    def state_bytes(self) -> int:
        """Of parameters, buffers, the optimiser's state and the images."""
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *state, self.pixel_values]
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """float32 matrix products in float32, or by the device's fastest path that still starts from float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision == "medium" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; a CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device, times: int = 1) -> float:
    """Of one of `times` calls, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / times


def matmul_peak(precision: str, device: torch.device, size: int, tries: int = 20) -> float:
    """FLOP/s of the fastest of some products of two square matrices of `size`."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    with matmul_precision(precision):
        seconds(lambda: a @ b, device)
        best = min(seconds(lambda: a @ b, device, 4) for _ in range(tries))
    return 2 * size**3 / best


# -- measuring a group ------------------------------------------------------------------------------------------------


def measure_group(cases: Sequence[Case], preset: Preset, device: torch.device) -> list[dict[str, Any]]:
    """Times of all cases, interleaved; a case that does not fit into the GPU has an `error` instead."""
    rows = {case: {**asdict(case), "options": case.options} for case in cases}
    steps: dict[Case, Step] = {}
    models: dict[Case, Step] = {}
    for case in cases:
        model = replace(case, batch=1, precision="fp32", interval=1)  # what the model does not depend on
        try:
            steps[case] = _warm(case, device, models.get(model))
            models.setdefault(model, steps[case])
            if device.type == "cuda":
                rows[case]["peak_bytes"] = peak_bytes(steps[case])
        except torch.OutOfMemoryError:
            rows[case]["error"] = "out of memory"
            if model in models:
                models[model].optimizer.zero_grad()
            torch.cuda.empty_cache()
    times: dict[Case, list[float]] = {case: [] for case in steps}
    for _ in range(preset.rounds):
        for case, step in steps.items():
            with matmul_precision(case.precision):
                times[case].append(seconds(step, device, math.lcm(preset.steps, case.interval)))
    for case, found in times.items():
        median = statistics.median(found)
        rows[case] |= {"seconds": found, "median_seconds": median, "images_per_second": case.batch / median}
        rows[case]["flops"] = step_flops(case.config, case.batch, case.interval)
        if device.type == "cuda":
            rows[case] |= {"synchronisations": synchronisations(steps[case]), "kernels": kernels(steps[case])}
    return list(rows.values())


def _warm(case: Case, device: torch.device, like: Step | None) -> Step:
    step = Step(case, device, like)
    with matmul_precision(case.precision):
        for _ in range(2 * case.interval):  # both kinds of step, compiled and once more
            step()
    synchronize(device)
    return step


def peak_bytes(step: Step) -> int:
    """The largest memory of a step on a GPU, beside that of the other cases: state, activations and gradients."""
    torch.cuda.reset_peak_memory_stats(step.device)
    before = torch.cuda.memory_allocated(step.device)
    with matmul_precision(step.case.precision):
        for _ in range(step.case.interval):
            step()
    synchronize(step.device)
    return step.state_bytes + torch.cuda.max_memory_allocated(step.device) - before


def synchronisations(step: Step) -> int:
    """How often a step on a GPU waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught, matmul_precision(step.case.precision):
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def kernels(step: Step, count: int = 5, steps: int = 3) -> list[dict[str, Any]]:
    """The `count` kernels that take most of a step's time on the GPU: name, milliseconds a step, share."""
    activity = torch.profiler.ProfilerActivity
    with matmul_precision(step.case.precision), torch.profiler.profile(activities=[activity.CUDA]) as profile:
        for _ in range(steps):
            step()
        synchronize(step.device)
    times: Counter[str] = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.device_time_total / 1e3 / steps
    total = sum(times.values()) or 1
    return [{"name": name, "ms": ms, "share": ms / total} for name, ms in times.most_common(count)]


class AliveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and the most there ever were (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._storages: set[int] = set()

    def _free(self, key: int, size: int) -> None:
        self.alive -= size
        self._storages.remove(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and id(storage := tensor.untyped_storage()) not in self._storages:
                self._storages.add(id(storage))
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out


def counted_bytes(case: Case, with_pass_b: bool = True) -> tuple[int, int]:
    """State between steps, and the peak of a step, without a device: tensors have shapes but no numbers.

    With the operations of a CPU, whose `sdpa` keeps as little as a GPU's does; an allocator's gaps do not count.
    """
    with FakeTensorMode(), AliveBytes() as bytes_:
        step = Step(case, torch.device("cpu"))
        step()  # which makes the optimiser's state
        if not with_pass_b:
            step.case = replace(case, interval=step.count + 1)
        state = bytes_.peak = bytes_.alive
        step()
    return state, bytes_.peak


# -- report -----------------------------------------------------------------------------------------------------------


def describe(device: torch.device, script: str = "step.py") -> dict[str, Any]:
    """What was run, on what and when."""
    return {
        "command": shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(device),
        "cpu": cpu_name(),
        "load_average": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "transformers", "torchvision")},
    }


def cpu_name() -> str:
    """The processor's name as Linux gives it, or nothing."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def compare_rows(rows: Sequence[dict[str, Any]], peaks: Mapping[str, float]) -> None:
    """Adds to the rows of a group what they are beside others: the peak, ViTMAE and our own MAE."""
    timed = [row for row in rows if "median_seconds" in row]

    def fastest(row: dict[str, Any], **wanted: Any) -> float | None:
        wanted |= {"shape": row["shape"], "batch": row["batch"]}
        times = [r["median_seconds"] for r in timed if all(r[name] == value for name, value in wanted.items())]
        return min(times, default=None)

    for row in timed:
        own = row["median_seconds"]
        same = {name: row[name] for name in ("attention", "precision", "compiled", "checkpointing")}
        others = {
            "times_vit_mae_defaults": fastest(
                row, family=VIT_MAE, attention="sdpa", precision="fp32", compiled=False, checkpointing=False
            ),
            "times_vit_mae_best": fastest(row, family=VIT_MAE, precision=row["precision"]),
        }
        row["peak_share"] = row["flops"] / own / peaks[row["precision"]]
        row |= {name: other / own for name, other in others.items() if other is not None}
        mae = fastest(row, family="mae", **same)
        if mae is not None:
            row["over_own_mae"] = own / mae


def exponents(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of what was timed at three or more batches, numbers of patches or widths, all else equal: b in `time ~ x^b`.

    By least squares on the logarithms.
    """
    found = []
    for axis, fields in AXES.items():
        by_case: dict[Any, dict[int, float]] = {}
        for row in rows:
            if "median_seconds" not in row:
                continue
            shape = SHAPES[row["shape"]]
            sizes = {
                "batch": row["batch"],
                "patches": (shape["image_size"] // shape["patch_size"]) ** 2,
                "width": shape["hidden_size"],
            }
            same = tuple(sorted((name, value) for name, value in shape.items() if name not in fields))
            where = row["shape"] if axis == "batch" else f"batch {row['batch']}"
            by_case.setdefault((same, f"{where}, {row['options']}"), {})[sizes[axis]] = row["median_seconds"]
        for (_, case), times in by_case.items():
            if len(times) > 2:
                slope = np.polyfit(np.log(list(times)), np.log(list(times.values())), 1)[0]
                found.append({"case": case, "axis": axis, "values": sorted(times), "exponent": float(slope)})
    return found


_COLUMNS = (
    ("images/s", "images_per_second", "{:.1f}"),
    ("step, ms", "median_seconds", "{:.1f}"),
    ("share of the peak", "peak_share", "{:.0%}"),
    ("× ViTMAE, its defaults", "times_vit_mae_defaults", "{:.2f}"),
    ("× ViTMAE, its best at this precision", "times_vit_mae_best", "{:.2f}"),
    ("÷ own MAE", "over_own_mae", "{:.2f}"),
    ("peak memory, MB", "peak_bytes", "{:.0f}"),
    ("waits a step", "synchronisations", "{}"),
)
_UNITS = {"median_seconds": 1e3, "peak_bytes": 1e-6}


def to_markdown(results: Mapping[str, Any]) -> str:
    """All groups as tables, with what they were measured on."""
    peaks = ", ".join(f"{name} {peak / 1e9:.0f}" for name, peak in results["peaks"].items())
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"`{results['command']}`, {results['date']}, {results['device']}"
        f"{', ' + results['cpu'] if results['cpu'] else ''}, {versions}.",
        f"Measured matrix-product peak, GFLOP/s: {peaks}. Load average at the start: {results['load_average']:.1f}. "
        f"Medians of {results['rounds']} interleaved rounds.",
    ]
    for group, rows in results["groups"].items():
        shown = [column for column in _COLUMNS if any(column[1] in row for row in rows)]
        several = len({row["shape"] for row in rows}) > 1
        lines += ["", f"**{group}**", ""]
        lines += ["| case | batch | " + " | ".join(title for title, *_ in shown) + " |"]
        lines += ["| --- | --- | " + " | ".join("---" for _ in shown) + " |"]
        for row in rows:
            cells = [_cell(row, name, form) for _, name, form in shown]
            name = f"{row['shape']}, {row['options']}" if several else row["options"]
            lines.append(f"| {name} | {row['batch']} | {' | '.join(cells)} |")
        for row in rows:
            if row.get("kernels"):
                found = "; ".join(f"`{k['name'][:60]}` {k['ms']:.2f} ms ({k['share']:.0%})" for k in row["kernels"])
                lines += ["", f"Largest kernels of a step, {row['options']}, batch {row['batch']}: {found}."]
    if results["exponents"]:
        lines += ["", "| time ~ x^b | x | b |", "| --- | --- | --- |"]
        for fit in results["exponents"]:
            values = ", ".join(map(str, fit["values"]))
            lines.append(f"| {fit['case']} | {fit['axis']} {values} | {fit['exponent']:.3f} |")
    return "\n".join(lines) + "\n"


def _cell(row: Mapping[str, Any], name: str, form: str) -> str:
    if name not in row:
        return row.get("error", "") if name == "images_per_second" else ""
    return form.format(row[name] * _UNITS.get(name, 1))


def cost_tables() -> str:
    """A ViT-B/16's step by part, and what the papers' ImageNet recipes cost by it: two tables."""
    columns = {"MAE": ("mae", 1), **{f"CL-MAE, interval {k}": ("cl_mae", k) for k in (1, 2, 4)}, "CMAE": ("cmae", 1)}
    flops = {
        name: step_flops_by_part(Case(family, "ViT-B/16", 256).config, 256, interval)
        for name, (family, interval) in columns.items()
    }
    parts = list(dict.fromkeys(part for found in flops.values() for part in found))
    lines = [f"| GFLOP an image | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for part in parts:
        cells = [f"{found[part] / 256e9:.1f}" if part in found else "" for found in flops.values()]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    sums = {name: sum(found.values()) / 256 for name, found in flops.items()}
    lines.append(f"| **sum** | {' | '.join(f'{total / 1e9:.1f}' for total in sums.values())} |")
    ratios = [f"{total / sums['MAE']:.2f}" for total in sums.values()]
    lines += [f"| ÷ MAE | {' | '.join(ratios)} |", ""]
    seen = EPOCHS * IMAGENET
    lines += [
        f"| {EPOCHS} epochs | all FLOPs, 1e18 | GPU hours | images/s a GPU | read, MB/s a GPU | gradients, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, total in sums.items():
        if name == "CMAE":  # whose paper trains on small images
            continue
        speed = SUSTAINED / total
        hours = seen / speed / 3600
        with FakeTensorMode():
            gradients = 4e-6 * sum(p.numel() for p in build_model(Case(columns[name][0], "ViT-B/16", 1)).parameters())
        cells = [seen * total / 1e18, hours, speed, speed * IMAGE_MB, gradients]
        lines.append(f"| {name} | {' | '.join(f'{cell:.0f}' for cell in cells)} |")
    return "\n".join(lines) + "\n"


def memory_table() -> str:
    """Of the published sizes: what there is between two steps, the peak of a step, and the difference by images."""
    lines = [
        "| sdpa, bf16 | batch | between steps, GB | peak, GB | an image, MB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    base = [
        Case(family, "ViT-B/16", 256, checkpointing=c) for family in ("mae", "cl_mae", "cmae") for c in (False, True)
    ]
    huge = [Case(family, "ViT-H/14", 64, checkpointing=True) for family in ("mae", "cl_mae")]
    wanted = [(case, True) for case in base + huge] + [(case, False) for case in base if case.family == "cl_mae"]
    for case, with_pass_b in wanted:
        state, peak = counted_bytes(replace(case, attention="sdpa", precision="bf16"), with_pass_b)
        name = (
            f"{case.shape} {case.family}{', checkpointing' * case.checkpointing}{'' if with_pass_b else ', no pass B'}"
        )
        cells = f"{case.batch} | {state / 1e9:.1f} | {peak / 1e9:.0f} | {(peak - state) / case.batch / 1e6:.0f}"
        lines.append(f"| {name} | {cells} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines) + "\n"


def run(name: str, output: Path, only: str | None, rounds: int | None) -> None:
    """Measures a preset and writes its results."""
    preset = PRESETS[name]
    preset = preset if rounds is None else replace(preset, rounds=rounds)
    groups = {group: cases for group, cases in preset.groups.items() if only is None or only in group}
    if not groups:
        raise SystemExit(f"`--only` {only!r} is in no group's name; groups: {'; '.join(preset.groups)}.")
    if name == "gpu" and not torch.cuda.is_available():
        raise SystemExit("`--preset gpu` needs a GPU, and torch sees none; take `--preset cpu`.")
    device = torch.device("cuda" if name == "gpu" else "cpu")
    stem = "-".join(["step", name, *re.findall(r"\w+", only or "")])
    results: dict[str, Any] = {**describe(device), "rounds": preset.rounds}
    results["peaks"] = {precision: matmul_peak(precision, device, preset.matrix) for precision in PRECISIONS}
    results |= {"groups": {}, "exponents": []}
    for group, cases in groups.items():
        print(group, flush=True)
        rows = measure_group(cases, preset, device)
        compare_rows(rows, results["peaks"])
        results["groups"][group] = rows
        results["exponents"] = exponents([row for rows in results["groups"].values() for row in rows])
        write_whole(output / f"{stem}.json", json.dumps(results, indent=1) + "\n")
        write_whole(output / f"{stem}.md", to_markdown(results))
        if device.type == "cuda":
            torch._dynamo.reset()  # lets go of the group's compiled models
            torch.cuda.empty_cache()
    print(to_markdown(results))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="Folder of the results.")
    parser.add_argument("--only", metavar="TEXT", help="Only groups with this in their names.")
    parser.add_argument("--rounds", type=int, help="Interleaved rounds; the preset's if not given.")
    parser.add_argument("--cost", action="store_true", help="Print FLOPs and projected cost; measure nothing.")
    parser.add_argument("--memory", action="store_true", help="Print the memory of a step, counted without a device.")
    args = parser.parse_args()
    if args.cost:
        print(cost_tables())
    elif args.memory:
        print(memory_table())
    else:
        run(args.preset, args.output, args.only, args.rounds)


if __name__ == "__main__":
    main()
