# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""How fast is a training step? Families, sizes and options, side by side with transformers' ViTMAE in one process.

    python benchmarks/step.py --preset cpu
    python benchmarks/step.py --preset gpu --only "batch 256"    # one group at a time, on a GPU lent by the minute

The cases of a group (`step.yaml`) run interleaved: a step of each, then again, so that what else the machine does hits
all alike. Written after every group: `step-<preset>[-<only>].md`, with the median images/s, the share of the
matrix-product peak that was measured at the start (by the formula's FLOPs), the ratio to ViTMAE and to our own MAE and,
on a GPU, the peak memory, how often a step waits for the device, and each family's five largest kernels. A group of
three or more batches, numbers of patches or widths gets a fitted exponent.

    python benchmarks/step.py --cost
    python benchmarks/step.py --memory

measure nothing: they print the FLOPs of a step by part with the cost of the recipes that follows from them, and the
memory of a step by the sizes of its tensors (`docs/speed.md`).
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import statistics
import sys
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from measure import describe, largest_kernels, matmul_peak, matmul_precision, seconds
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from clmae import FAMILIES, MAEConfig
from clmae.configuration.configuration_mae import SIZES
from clmae.evaluation.tables import markdown_table
from clmae.model_cards.files import write_whole
from clmae.training.flops import step_flops, step_flops_by_part

HERE = Path(__file__).resolve().parent
CONTENT = yaml.safe_load((HERE / "step.yaml").read_text(encoding="utf-8"))
SHAPES: dict[str, dict[str, Any]] = {
    name: {**SIZES.get(shape.pop("size", ""), {}), **shape} for name, shape in CONTENT["shapes"].items()
}
PRESETS = CONTENT["presets"]
VIT_MAE = "vit_mae"  # transformers' own
PRECISIONS = ("fp32", "medium", "bf16")
# For `--cost`: the MAE paper's epochs, ImageNet-1K's training images and their mean size, and an assumed speed.
EPOCHS, IMAGENET, IMAGE_MB = 800, 1_281_167, 0.11
SUSTAINED = 400e12  # FLOP/s of one GPU, its peak times the share that a step reaches; not measured


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        family: `"mae"`, `"cl_mae"`, `"cmae"`, or `"vit_mae"` for transformers' own.
        shape: A name in `SHAPES`.
        batch: Images per step; two views of an image are one.
        attention: `"eager"` or `"sdpa"`.
        precision: `"fp32"`; `"medium"` (`torch.set_float32_matmul_precision`); `"bf16"` (autocast).
        compiled: Encoder, decoder and masking module by `torch.compile`; the whole model where masks are random.
        interval: `masker_update_interval`; a time is the mean over so many steps.
        checkpointing: Gradient checkpointing.
        masker: How masks are learned: `"error"` or `"soft"` (`masker_objective`); `"tokens"`: the authors' soft masks.
        prediction_ratio: Share of the masked patches that are decoded.
    """

    family: str
    shape: str
    batch: int
    attention: str = "eager"
    precision: str = "fp32"
    compiled: bool = False
    interval: int = 1
    checkpointing: bool = False
    masker: str = "error"
    prediction_ratio: float = 1.0

    @property
    def options(self) -> str:
        """All but shape and batch, in words."""
        words = [self.family, self.attention, self.precision]
        words += ["compiled"] * self.compiled + ["checkpointing"] * self.checkpointing
        words += [f"interval {self.interval}"] * (self.interval > 1)
        words += [f"masks by {self.masker}"] * (self.masker != "error")
        return ", ".join(words + [f"prediction ratio {self.prediction_ratio:g}"] * (self.prediction_ratio < 1))

    @property
    def config(self) -> MAEConfig:
        """As our own configuration, transformers' too: for the FLOPs."""
        values = {**SHAPES[self.shape], "prediction_ratio": self.prediction_ratio}
        if self.family == "cl_mae":
            values["masker_objective"] = "error" if self.masker == "error" else "soft"
            values["soft_masking"] = "tokens" if self.masker == "tokens" else "attention"
        if self.family == "cmae":  # it has a small decoder whatever the encoder
            values = {name: value for name, value in values.items() if not name.startswith("decoder_")}
        return FAMILIES["mae" if self.family == VIT_MAE else self.family][0](**values)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """`(C, H, W)`, or `(V, C, H, W)` of V views of an image."""
        config, views = self.config, getattr(self.config, "num_views", 1)
        return (*((views,) if views > 1 else ()), config.num_channels, config.image_size, config.image_size)


def read_cases(lines: Sequence[dict[str, Any]]) -> list[Case]:
    """All combinations of the lists of each line of a group."""
    cases = []
    for line in lines:
        lists = [value if isinstance(value, list) else [value] for value in line.values()]
        cases += [Case(**dict(zip(line, values, strict=True))) for values in itertools.product(*lists)]
    return list(dict.fromkeys(cases))


# -- a step -----------------------------------------------------------------------------------------------------------


def build_model(case: Case) -> nn.Module:
    """The case's model in training mode, not compiled."""
    config: Any = case.config
    kind = ViTMAEForPreTraining if case.family == VIT_MAE else FAMILIES[case.family][2]
    if case.family == VIT_MAE:
        names = ("intermediate_size", "decoder_intermediate_size", "norm_pix_loss", "mask_ratio")
        config = ViTMAEConfig(**SHAPES[case.shape], **{name: getattr(config, name) for name in names})
    model = kind._from_config(config, attn_implementation=case.attention)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


class Step:
    """Forward and backward pass and AdamW's update on the same random images; a call is one step, its loss unread.

    `like`: a step whose model and optimiser to share, because they do not all fit beside each other.
    """

    def __init__(self, case: Case, device: torch.device, like: Step | None = None):
        self.case, self.device, self.count = case, device, 0
        self.learns_masks = getattr(case.config, "learns_masks", case.family == "cl_mae")
        if like is not None:
            self.model, self.optimizer = like.model, like.optimizer
        else:
            with device:
                self.model = build_model(case)
            if case.compiled:  # in parts where pass B differentiates between them
                for part in ("vit", "decoder", "masking_module") if self.learns_masks else ("",):
                    self.model.get_submodule(part).compile(dynamic=False)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        images = torch.randn(case.batch, *case.sample_shape, generator=torch.Generator().manual_seed(0))
        self.inputs: dict[str, Any] = {"pixel_values": images.to(device)}
        if self.learns_masks:  # λ as a tensor that is there before the step, as the trainer gives it
            self.inputs["curriculum_factor"] = torch.tensor(0.5, device=device)

    def __call__(self) -> None:
        if self.learns_masks:
            self.inputs["compute_masker_loss"] = self.count % self.case.interval == 0
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.case.precision == "bf16"):
            loss = self.model(**self.inputs).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.count += 1

    def seconds(self, times: int) -> float:
        """Of one of `times` steps, from an idle device to an idle device."""
        with matmul_precision(self.case.precision):
            return seconds(self, self.device, times)

    @property
    def state_bytes(self) -> int:
        """Of parameters, buffers, the optimiser's state and the images."""
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *state, self.inputs["pixel_values"]]
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


# -- measuring a group ------------------------------------------------------------------------------------------------


def measure_group(cases: Sequence[Case], rounds: int, num_steps: int, device: torch.device) -> pd.DataFrame:
    """A row for each case, all interleaved: `seconds` (median) and `flops` of a step; `error`, if it does not fit."""
    rows = {case: {**asdict(case), "options": case.options} for case in cases}
    steps: dict[Case, Step] = {}
    models: dict[Case, Step] = {}
    for case in cases:
        model = replace(case, batch=1, precision="fp32", interval=1)  # what the model does not depend on
        try:
            step = Step(case, device, models.get(model))
            step.seconds(2 * case.interval)  # both kinds of step, compiled and once more
            steps[case] = models.setdefault(model, step) if model not in models else step
            if device.type == "cuda":
                rows[case] |= {"peak_bytes": peak_bytes(step), "synchronisations": synchronisations(step)}
                rows[case]["kernels"] = largest_kernels(step, device)
        except torch.OutOfMemoryError:
            rows[case]["error"] = "out of memory"
            if model in models:
                models[model].optimizer.zero_grad()
            torch.cuda.empty_cache()
    times: dict[Case, list[float]] = {case: [] for case in steps}
    for _ in range(rounds):
        for case, step in steps.items():
            times[case].append(step.seconds(math.lcm(num_steps, case.interval)))
    for case, measured in times.items():
        flops = step_flops(case.config, case.batch, case.interval)
        rows[case] |= {"seconds": statistics.median(measured), "flops": flops}
    return pd.DataFrame(rows.values())


def peak_bytes(step: Step) -> int:
    """The largest memory of a step on a GPU, beside that of the other cases: state, activations and gradients."""
    torch.cuda.reset_peak_memory_stats(step.device)
    before = torch.cuda.memory_allocated(step.device)
    step.seconds(step.case.interval)
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
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
            if id(storage) not in self._storages:
                self._storages.add(id(storage))
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out


def counted_bytes(case: Case) -> tuple[int, int]:
    """State between steps, and the peak of a step, without a device: tensors have shapes but no numbers.

    With the operations of a CPU, whose `sdpa` keeps as little as a GPU's does; an allocator's gaps do not count.
    """
    with FakeTensorMode(), AliveBytes() as bytes_:
        step = Step(case, torch.device("cpu"))
        step()  # which makes the optimiser's state
        state = bytes_.peak = bytes_.alive
        step()
    return state, bytes_.peak


# -- report -----------------------------------------------------------------------------------------------------------


def compare_rows(rows: pd.DataFrame, peaks: dict[str, float]) -> pd.DataFrame:
    """With columns of what the rows of a group are beside others: the peak, ViTMAE and our own MAE."""
    at = ["shape", "batch"]
    same = [*at, "attention", "precision", "compiled", "checkpointing"]
    vit_mae, mae = rows[rows["family"] == VIT_MAE], rows[(rows["family"] == "mae") & (rows["prediction_ratio"] == 1)]
    defaults = vit_mae[(vit_mae[same[2:]] == ["sdpa", "fp32", False, False]).all(axis=1)]
    for name, others, keys in (
        ("defaults", defaults, at),
        ("best", vit_mae, [*at, "precision"]),
        ("mae", mae, same),
    ):
        rows = rows.join(others.groupby(keys)["seconds"].min().rename(name), on=keys)
    return rows.assign(
        images_per_second=rows["batch"] / rows["seconds"],
        peak_share=rows["flops"] / rows["seconds"] / rows["precision"].map(peaks),
        times_defaults=rows["defaults"] / rows["seconds"],
        times_best=rows["best"] / rows["seconds"],
        over_mae=rows["seconds"] / rows["mae"],
    )


def exponents(rows: pd.DataFrame) -> pd.DataFrame:
    """Where a group has three or more batches, numbers of patches or widths, all else equal: b in `time ~ x^b`.

    By least squares on the logarithms.
    """
    shapes = rows["shape"].map(SHAPES)
    sizes = {
        "batch": rows["batch"],
        "patches": [(shape["image_size"] // shape["patch_size"]) ** 2 for shape in shapes],
        "width": [shape["hidden_size"] for shape in shapes],
    }
    fits = []
    for options, group in rows.assign(**sizes).dropna(subset="seconds").groupby("options", sort=False):
        varied = [axis for axis in sizes if group[axis].nunique() > 1]
        if len(varied) == 1 and group[varied[0]].nunique() > 2:
            slope = np.polyfit(np.log(group[varied[0]]), np.log(group["seconds"]), 1)[0]
            values = ", ".join(map(str, sorted(group[varied[0]])))
            fits.append({"time ~ x^b": options, "x": f"{varied[0]} {values}", "b": f"{slope:.3f}"})
    return pd.DataFrame(fits)


COLUMNS = {
    "images/s": ("images_per_second", "{:.1f}", 1),
    "step, ms": ("seconds", "{:.1f}", 1e3),
    "share of the peak": ("peak_share", "{:.0%}", 1),
    "× ViTMAE, its defaults": ("times_defaults", "{:.2f}", 1),
    "× ViTMAE, its best at this precision": ("times_best", "{:.2f}", 1),
    "÷ own MAE": ("over_mae", "{:.2f}", 1),
    "peak memory, MB": ("peak_bytes", "{:.0f}", 1e-6),
    "waits per step": ("synchronisations", "{:.0f}", 1),
}


def group_to_markdown(group: str, rows: pd.DataFrame) -> str:
    """A table of a group, as [`compare_rows`] makes it, and the exponents."""
    cases = rows["options"] if rows["shape"].nunique() == 1 else rows["shape"] + ", " + rows["options"]
    table = pd.DataFrame({"case": cases, "batch": rows["batch"]})
    for title, (name, form, unit) in COLUMNS.items():
        if name in rows and rows[name].notna().any():
            table[title] = ["" if pd.isna(value) else form.format(value * unit) for value in rows[name]]
    if "error" in rows:
        table["images/s"] = table["images/s"].where(rows["error"].isna(), rows["error"])
    fits = exponents(rows)
    text = f"\n**{group}**\n\n{markdown_table(table)}" + ("" if fits.empty else f"\n{markdown_table(fits)}")
    if "kernels" in rows:
        for row in rows.dropna(subset="kernels").drop_duplicates("family").itertuples():
            text += f"\nThe largest kernels of a step, {row.options}:\n\n{markdown_table(row.kernels)}"
    return text


def cost_tables() -> str:
    """A ViT-B/16's step by part, and what the papers' ImageNet recipes cost by it: two tables."""
    case = Case("mae", "ViT-B/16", 256)
    soft = replace(case, family="cl_mae", masker="soft")
    cases = {
        "MAE": case,
        "MAE, half predicted": replace(case, prediction_ratio=0.5),
        "CL-MAE": replace(case, family="cl_mae"),
        "CL-MAE, soft masks": soft,
        "soft, interval 4": replace(soft, interval=4),
        "CMAE": replace(case, family="cmae"),
    }
    parts = pd.DataFrame(
        {name: step_flops_by_part(case.config, case.batch, case.interval) for name, case in cases.items()}
    )
    parts = parts.loc[[*dict.fromkeys(name for column in parts for name in parts[column].dropna().index)]] / 256
    sums = parts.sum()
    text = parts.map(lambda flops: "" if pd.isna(flops) else f"{flops / 1e9:.1f}")
    text.loc["**sum**"] = [f"{flops / 1e9:.1f}" for flops in sums]
    text.loc["÷ MAE"] = [f"{flops / sums['MAE']:.2f}" for flops in sums]
    costs = []
    for name, flops in sums.drop("CMAE").items():  # whose paper trains on small images
        speed = SUSTAINED / flops
        with FakeTensorMode():
            gradients = 4e-6 * sum(p.numel() for p in build_model(replace(cases[name], batch=1)).parameters())
        seen = EPOCHS * IMAGENET
        numbers = [seen * flops / 1e18, seen / speed / 3600, speed, speed * IMAGE_MB, gradients]
        costs.append([name, *(f"{number:.0f}" for number in numbers)])
    head = [f"{EPOCHS} epochs", "all FLOPs, 1e18", "GPU hours", "images/s a GPU", "read, MB/s a GPU", "gradients, MB"]
    table = markdown_table(text.reset_index(names="GFLOP an image"))
    return f"{table}\n{markdown_table(pd.DataFrame(costs, columns=head))}"


def memory_table() -> str:
    """Of the published sizes: what there is between two steps, the peak of a step, and the difference by images."""
    options = dict(attention="sdpa", precision="bf16")
    kinds = ("mae", "error"), ("cl_mae", "error"), ("cl_mae", "soft"), ("cmae", "error")
    base = [
        Case(family, "ViT-B/16", 256, masker=masker, checkpointing=checkpointing, **options)
        for family, masker in kinds
        for checkpointing in (False, True)
    ]
    huge = [Case(family, "ViT-H/14", 64, checkpointing=True, **options) for family in ("mae", "cl_mae")]
    rows = []
    for case in base + huge:
        state, peak = counted_bytes(case)
        name = f"{case.shape} {case.family}{', soft masks' * (case.masker == 'soft')}"
        name += ", checkpointing" * case.checkpointing
        cells = [f"{state / 1e9:.1f}", f"{peak / 1e9:.0f}", f"{(peak - state) / case.batch / 1e6:.0f}"]
        rows.append([name, case.batch, *cells])
        print(*rows[-1], file=sys.stderr, flush=True)
    head = ["sdpa, bf16", "batch", "between steps, GB", "peak, GB", "an image, MB"]
    return markdown_table(pd.DataFrame(rows, columns=head))


def run(name: str, output: Path, only: str | None, rounds: int, precisions: Sequence[str]) -> None:
    """Measures a preset and writes its tables."""
    preset = PRESETS[name]
    groups = {group: lines for group, lines in preset["groups"].items() if only is None or only in group}
    if not groups:
        raise SystemExit(f"`--only` {only!r} is in no group's name; groups: {'; '.join(preset['groups'])}.")
    if name == "gpu" and not torch.cuda.is_available():
        raise SystemExit("`--preset gpu` needs a GPU, and torch sees none; take `--preset cpu`.")
    device = torch.device("cuda" if name == "gpu" else "cpu")
    peaks = {precision: matmul_peak(precision, device, preset["matrix"]) for precision in precisions}
    measured = ", ".join(f"{precision} {peak / 1e9:.0f}" for precision, peak in peaks.items())
    text = f"{describe(device)}\nMeasured matrix-product peak, GFLOP/s: {measured}. "
    text += f"Medians of {rounds} interleaved rounds.\n"
    for group, lines in groups.items():
        print(group, flush=True)
        cases = [case for case in read_cases(lines) if case.precision in precisions]
        rows = compare_rows(measure_group(cases, rounds, preset["steps"], device), peaks)
        text += group_to_markdown(group, rows)
        write_whole(output / f"{'-'.join(['step', name, *re.findall(r'[0-9A-Za-z_]+', only or '')])}.md", text)
        if device.type == "cuda":
            torch._dynamo.reset()  # lets go of the group's compiled models
            torch.cuda.empty_cache()
    print(text)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="Folder of the results.")
    parser.add_argument("--only", metavar="TEXT", help="Only groups with this in their names.")
    parser.add_argument("--rounds", type=int, default=5, help="Interleaved rounds.")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="Others are left out.")
    parser.add_argument("--cost", action="store_true", help="Print FLOPs and projected cost; measure nothing.")
    parser.add_argument("--memory", action="store_true", help="Print the memory of a step, counted without a device.")
    args = parser.parse_args()
    if args.cost or args.memory:
        print(cost_tables() if args.cost else memory_table())
    else:
        run(args.preset, args.output, args.only, args.rounds, args.precisions)


if __name__ == "__main__":
    main()
