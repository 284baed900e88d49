# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Trains under given settings on CIFAR-10, records what happens, then tabulates and draws it.

    python benchmarks/study.py run curriculum --setting default --seed 0
    python benchmarks/study.py report curriculum

A study is a folder here with a `settings.yaml`: `curriculum` (does CL-MAE's masking module turn from partner to
adversary?), `cmae` (what does each part of CMAE do?). `run` writes
`<study>/results/<scale>-<setting>-<target>-<seed>.json` when it is done; `report` makes `table.md` of all of them and,
where masks are learned, `<scale>-difficulty.png` and `<scale>-causes.png`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from transformers import TrainerCallback

from clmae import FAMILIES, CLMAEConfig
from clmae.configuration.configuration_mae import pair
from clmae.evaluation import LabelledImages, evaluate_protocols
from clmae.modeling.losses import patch_errors, patch_targets
from clmae.modeling.masking import keep_lowest
from clmae.modeling.modeling_mae import select_visible
from clmae.training import CurriculumTrainer, PretrainingArguments, build_trainer
from clmae.training.curriculum import keep_probability_statistics, keep_probability_sums
from clmae.training.data import DataArguments, load_image_dataset, take_samples
from clmae.training.pictures import save_figure

HERE = Path(__file__).resolve().parent
SCALES = {
    # Minutes a run on a CPU core: the trials' scale.
    "cpu": dict(
        model=dict(
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            decoder_hidden_size=64,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=4,
            masker_num_hidden_layers=2,
        ),
        args=dict(max_steps=2000, per_device_train_batch_size=32, learning_rate=1e-3),
        max_train_samples=10_000,
        max_eval_samples=5_000,
        measure_steps=25,
    ),
    # All of CIFAR-10, 200 epochs.
    "gpu": dict(
        model=dict(decoder_hidden_size=128, decoder_num_hidden_layers=2, masker_num_hidden_layers=2),
        args=dict(
            num_train_epochs=200,
            per_device_train_batch_size=256,
            base_learning_rate=5e-4,
            warmup_steps=0.1,
            dataloader_num_workers=12,
            dataloader_persistent_workers=True,
        ),
        max_train_samples=None,
        max_eval_samples=None,
        measure_steps=200,
    ),
}
PROBE, SWAPS = 64, 8  # images for gradients and alignment; exchanges of two patches an image
WEIGHTS = {
    "gauss_loss": "gauss_loss_weight",
    "kl_loss": "kl_loss_weight",
    "diversity_loss": "diversity_loss_weight",
}


# -- measuring --------------------------------------------------------------------------------------------------------


class MeasureCallback(TrainerCallback):
    """Records the masks' numbers before the first step and every `every` steps, and how long the steps took."""

    def __init__(self, every: int):
        self.every = every
        self.trainer: CurriculumTrainer | None = None
        self.rows: list[dict[str, float]] = []
        self.step_seconds: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _synchronize()
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _synchronize()
        self.step_seconds.append(time.perf_counter() - self._start)
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(state.global_step)

    def _measure(self, step: int) -> None:
        row = {"step": step, **measure(self.trainer, with_gradients=len(self.rows) % 4 == 0)}
        self.rows.append({name: round(float(value), 5) for name, value in row.items()})


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(trainer: CurriculumTrainer, with_gradients: bool) -> dict[str, float]:
    """Losses on 256 held-out images under random and learned masks; of the masks, statistics and gradients."""
    model, batch = trainer.model, trainer.held_out_batch()
    was_training = model.training
    model.eval()
    row = {}
    if not trainer.has_masking_module:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            row["random_loss"] = model(**batch).reconstruction_loss
    else:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            row["random_loss"] = model(**batch, masking="random").reconstruction_loss
            learned = model(pixel_values=batch["pixel_values"])
        row["factor"] = trainer.curriculum_factor(trainer.state.global_step)
        row["difficulty"] = learned.reconstruction_loss / row["random_loss"]
        row |= keep_probability_statistics(keep_probability_sums(learned.keep_probabilities))
        if with_gradients:
            row |= gradients_and_alignment(model, batch["pixel_values"].flatten(0, -4)[:PROBE], row["factor"])
    if getattr(model.config, "position_loss_weight", 0):
        views = {name: torch.stack([value] * model.config.num_views, 1) for name, value in batch.items()}
        with torch.no_grad(), trainer.compute_loss_context_manager():
            row["position_accuracy"] = model(**views, compute_task_losses=True).position_accuracy
    model.train(was_training)
    return row


def gradients_and_alignment(model: torch.nn.Module, pixel_values: torch.Tensor, factor: float) -> dict[str, float]:
    """What pulls at the masking module's logits, and whether pass B's pull points where the hard task does.

    `gradient_<term>`: L2 norm of the weighted term's gradient at the logits `(PROBE, N)`. `alignment_<soft masking>`:
    exchange a visible and a masked patch of the hard mask, SWAPS times an image; the correlation of the change in the
    image's L_rec with the change that L_soft's gradient foretells. In float32, whatever the training's precision.
    """
    config = model.config
    targets = patch_targets(pixel_values, pair(config.patch_size), config.norm_pix_loss)
    with torch.no_grad():
        embeddings = model.vit.embeddings(pixel_values)
        keep = model.masking_module(embeddings[:, 1:])
    slope = keep * (1 - keep)
    row = {}
    leaf = keep.clone().requires_grad_()
    for name, term in model.masker_terms(embeddings, leaf, targets, config.grid_size).items():
        weight = getattr(config, WEIGHTS[name]) if name in WEIGHTS else abs(factor)
        (gradient,) = torch.autograd.grad(weight * term, leaf, retain_graph=True)
        row[f"gradient_{name}"] = (gradient * slope).norm()

    count = config.num_visible(keep.shape[1])
    mask = keep_lowest(-keep, count).mask
    changes, exchanged = _exchange(model, embeddings, targets, mask, count)
    own = config.soft_masking
    for config.soft_masking in ("tokens", "attention"):
        leaf = keep.clone().requires_grad_()
        loss = model.soft_reconstruction_loss(embeddings, leaf, targets, config.grid_size)
        (gradient,) = torch.autograd.grad(loss, leaf)
        images = torch.arange(len(keep), device=keep.device)
        foretold = torch.stack([gradient[images, shown] - gradient[images, hidden] for shown, hidden in exchanged])
        row[f"alignment_{config.soft_masking}"] = torch.corrcoef(torch.stack([foretold.ravel(), changes.ravel()]))[0, 1]
    config.soft_masking = own
    return row


@torch.no_grad()
def _exchange(
    model: torch.nn.Module, embeddings: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, count: int
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Changes of L_rec `(SWAPS, B)`, and which patch was shown and which hidden, `(B,)` each."""

    def losses(mask: torch.Tensor) -> torch.Tensor:
        chosen = keep_lowest(mask, count)
        encoded = model.vit(inputs_embeds=select_visible(embeddings, chosen)).last_hidden_state
        errors = patch_errors(model.decoder(encoded, chosen.ids_keep, model.config.grid_size), targets)
        return (errors * chosen.mask).sum(1) / chosen.mask.sum(1)

    before, changes, exchanged = losses(mask), [], []
    images = torch.arange(len(mask), device=mask.device)
    generator = torch.Generator().manual_seed(0)
    for _ in range(SWAPS):
        draw = torch.rand(mask.shape, generator=generator).to(mask.device)
        shown, hidden = (draw * mask).argmax(1), (draw * (1 - mask)).argmax(1)
        other = mask.clone()
        other[images, shown], other[images, hidden] = 0.0, 1.0
        changes.append(losses(other) - before)
        exchanged.append((shown, hidden))
    return torch.stack(changes), exchanged


# -- running ----------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """One run, and its file."""
    setting = _settings(options.study)[options.setting]
    scale = SCALES[options.scale]
    family = setting.get("family", "cl_mae")
    fields = {k: v for k, v in scale["model"].items() if family != "mae" or not k.startswith("masker_")}
    config_class = FAMILIES[family][0]
    fields |= {"image_size": 32, "patch_size": 4, "norm_pix_loss": not options.raw, **setting.get("config", {})}
    config = config_class.from_size("tiny", **fields)
    args = PretrainingArguments(
        **{
            "output_dir": f"outputs/{options.study}/{_name(options)}",
            "seed": options.seed,
            "bf16": True,
            "use_cpu": options.scale == "cpu",
            "save_strategy": "no",
            "report_to": "none",
            "difficulty_steps": 0,  # measured here
            "picture_steps": 500,
            "num_probe_images": 256,
            **scale["args"],
            **setting.get("args", {}),
            **({"max_steps": options.max_steps} if options.max_steps else {}),
        }
    )
    data = DataArguments(
        dataset=options.dataset,
        num_held_out=512,
        max_train_samples=scale["max_train_samples"],
        **{"min_crop_scale": 0.5, **setting.get("data", {})},
    )
    measuring = MeasureCallback(scale["measure_steps"])
    trainer = build_trainer(config, data, args, [measuring])
    measuring.trainer = trainer
    trainer.train()
    result = {
        "setting": options.setting,
        "label": setting["label"],
        "target": "raw" if options.raw else "normalised",
        "seed": options.seed,
        "scale": options.scale,
        "max_steps": trainer.state.max_steps,
        "images_seen": trainer.state.max_steps * args.total_train_batch_size,
        "seconds_per_step": round(statistics.median(measuring.step_seconds), 4),
        "device": str(args.device),
        "rows": measuring.rows,
    }
    if options.evaluate:
        result |= evaluate(trainer, options.dataset, scale["max_eval_samples"])
    folder = _results(options)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_name(options)}.json"
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(f"{path}: {json.dumps({k: v for k, v in result.items() if k != 'rows'})}")


def evaluate(trainer: CurriculumTrainer, dataset: str, most: int | None) -> dict[str, float]:
    """k-NN (k = 20) and linear accuracy of the frozen encoder, in percent; CIFAR-10's test images."""
    trainer.model.eval()
    train, test = (
        LabelledImages(take_samples(load_image_dataset(dataset, split).dataset, most), trainer.processing_class)
        for split in ("train", "test")
    )
    results = evaluate_protocols(["knn", "linear"], trainer.model.vit, train, test, baselines=False, bf16=False)
    return {name: result.rows[0].accuracies for name, result in results.items()}


def _settings(study: str) -> dict[str, dict[str, Any]]:
    return yaml.safe_load((HERE / study / "settings.yaml").read_text(encoding="utf-8"))


def _results(options: argparse.Namespace) -> Path:
    return options.results or HERE / options.study / "results"


def _name(options: argparse.Namespace) -> str:
    suffix = f"-{options.max_steps}" if options.max_steps else ""
    return f"{options.scale}-{options.setting}-{'raw' if options.raw else 'normalised'}-{options.seed}{suffix}"


# -- reporting --------------------------------------------------------------------------------------------------------

COLUMNS = (
    *("Q1", "Q2", "Q3", "Q4", "end", "mean of m", "least spread"),
    *("random-mask loss", "position accuracy", "k-NN", "linear"),
)


def report(options: argparse.Namespace) -> None:
    """Table and figures of every file in the folder of results."""
    settings, folder = _settings(options.study), _results(options)
    names = list(settings)
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    if not runs:
        raise SystemExit(f"`--results` {folder} holds no runs; make some with `study.py run`.")
    unknown = sorted({run["setting"] for run in runs} - set(names))
    if unknown:
        raise SystemExit(f"`--results` {folder} holds runs of {', '.join(unknown)}: not in settings.yaml.")
    runs.sort(key=lambda run: (run["scale"], -run["max_steps"], names.index(run["setting"]), run["target"]))
    groups: dict[tuple[str, int, str, str], list[dict]] = {}
    for one in runs:
        groups.setdefault((one["scale"], one["max_steps"], one["label"], one["target"]), []).append(one)
    text = table(groups)
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(text)
    for scale in sorted({key[0] for key in groups}):
        masked = {key[1:]: g for key, g in groups.items() if key[0] == scale and "factor" in g[0]["rows"][0]}
        shortest = min((steps for steps, _, _ in masked), default=0)
        causes = {label: g for (n, label, target), g in masked.items() if (n, target) == (shortest, "normalised")}
        full = {f"{label}, {target} targets, {n} steps": g for (n, label, target), g in masked.items() if n > shortest}
        if full:  # else all runs are of one length, and there are no shorter ones to compare causes by
            save_figure(difficulty_figure(full), folder / f"{scale}-difficulty.png")
        if causes:
            save_figure(causes_figure(causes, settings), folder / f"{scale}-causes.png")


def table(groups: dict[tuple, list[dict]]) -> str:
    """A row a setting: mean and standard deviation over the seeds; for m and its spread the extremes of all."""
    summaries = {key: [summary(one) for one in group] for key, group in groups.items()}
    columns = [column for column in COLUMNS if any(column in s for group in summaries.values() for s in group)]
    head = ("setting", "targets", "steps", "seeds", *columns)
    lines = [head, ("---",) * 2 + ("---:",) * (len(head) - 2)]
    for key, group in groups.items():
        _, steps, label, target = key
        cells = [label, target, str(steps), ", ".join(str(one["seed"]) for one in group)]
        for column in columns:
            values = [s[column] for s in summaries[key] if column in s]
            cells.append(_cell(column, values) if values else "")
        lines.append(tuple(cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(column: str, values: list[Any]) -> str:
    if column == "mean of m":
        return f"{min(v[0] for v in values):.3f} to {max(v[1] for v in values):.3f}"
    if column == "least spread":
        return f"{min(values):.2f}"
    digits = 2 if column in ("k-NN", "linear") else 3
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def summary(one: dict[str, Any]) -> dict[str, Any]:
    """A run in figures: mean difficulty of each quarter; m and its spread after the first tenth of the steps."""
    rows, steps = one["rows"], one["max_steps"]
    result: dict[str, Any] = {"random-mask loss": rows[-1]["random_loss"]}
    if "position_accuracy" in rows[-1]:
        result["position accuracy"] = rows[-1]["position_accuracy"]
    if "difficulty" in rows[0]:
        for quarter in range(4):
            inside = [r for r in rows if quarter / 4 < r["step"] / steps <= (quarter + 1) / 4]
            if inside:  # a very short run has quarters without a measurement
                result[f"Q{quarter + 1}"] = statistics.mean(r["difficulty"] for r in inside)
        later = [r for r in rows if r["step"] >= steps / 10]
        means = [r["keep_mean"] for r in later]
        result |= {
            "end": rows[-1]["difficulty"],
            "mean of m": (min(means), max(means)),
            "least spread": min(r["keep_spread"] for r in later),
        }
    if "knn" in one:
        result |= {"k-NN": one["knn"]["k = 20"], "linear": one["linear"]["top-1"]}
    return result


def difficulty_figure(groups: dict[str, list[dict]]) -> Figure:
    """Mask difficulty, random-mask loss and the spread of m over the curriculum factor."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = zip(
        figure.subplots(1, 3),
        ("difficulty", "keep_spread", "keep_mean"),
        ("mask difficulty", "spread of m between images", "mean of m (dotted: 1 - r)"),
        strict=True,
    )
    for axis, name, title in panels:
        for label, group in groups.items():
            _draw(axis, group, name, label)
        _label(axis, title)
        if name == "difficulty":
            axis.axhline(1.0, color="grey", linewidth=0.8)
        elif name == "keep_mean":
            axis.axhline(0.25, color="grey", linewidth=0.8, linestyle=":")
            axis.set_ylim(0, 0.5)
            axis.legend(fontsize="small", loc="lower right")  # where the lines leave room for it
        else:
            axis.set_ylim(0, None)
    return figure


def causes_figure(groups: dict[str, list[dict]], settings: dict[str, dict[str, Any]]) -> Figure:
    """Difficulty and alignment of each setting; what pulls at the logits under the first and the last setting."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for label, group in groups.items():
        _draw(axes[0, 0], group, "difficulty", label)
        soft_masking = settings[group[0]["setting"]].get("config", {}).get("soft_masking", CLMAEConfig.soft_masking)
        _draw(axes[0, 1], group, f"alignment_{soft_masking}", label)
    _label(axes[0, 0], "mask difficulty")
    axes[0, 0].axhline(1.0, color="grey", linewidth=0.8)
    axes[0, 0].legend(fontsize="small")
    _label(axes[0, 1], "does pass B's gradient know what is hard? (correlation with exchanges of patches)")
    axes[0, 1].axhline(0.0, color="grey", linewidth=0.8)
    for axis, name in zip(axes[1], ("authors' settings", "default"), strict=True):
        if name not in groups:
            continue
        for term, label in (
            ("soft_reconstruction_loss", "λ_CL · L_soft"),
            ("gauss_loss", "λ_g · L_gauss"),
            ("kl_loss", "λ_kl · L_kl"),
            ("diversity_loss", "λ_d · L_div"),
        ):
            _draw(axis, groups[name], f"gradient_{term}", label)
        _label(axis, f"gradient norm at the masking module's logits: {name}")
        axis.set_yscale("log")
        axis.legend(fontsize="small")
    return figure


def _draw(axis: Any, group: list[dict], name: str, label: str) -> None:
    """Mean over the seeds over λ_CL, and the band between their extremes."""
    rows = [[r for r in one["rows"] if name in r] for one in group]
    factors = [r["factor"] for r in rows[0]]
    values = np.array([[r[name] for r in one] for one in rows])
    (line,) = axis.plot(factors, values.mean(0), label=label)
    axis.fill_between(factors, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)


def _label(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize="medium")
    axis.set_xlim(1, -1)
    axis.set_xlabel("curriculum factor λ_CL: partner to adversary", fontsize="small")
    axis.grid(alpha=0.3)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    studies = sorted(path.parent.name for path in HERE.glob("*/settings.yaml"))
    runner = commands.add_parser("run", help="train under one setting")
    runner.add_argument("study", choices=studies)
    runner.add_argument("--setting", required=True, help="a name in settings.yaml")
    runner.add_argument("--seed", type=int, default=0)
    runner.add_argument("--raw", action="store_true", help="raw pixels as targets, not normalised patches")
    runner.add_argument("--scale", choices=list(SCALES), default="cpu")
    runner.add_argument("--max_steps", type=int, help="another number of steps than the scale's")
    runner.add_argument("--dataset", default="uoft-cs/cifar10", help="Hub id or local copy of CIFAR-10")
    runner.add_argument("--evaluate", action="store_true", help="k-NN and linear accuracy afterwards")
    runner.add_argument("--results", type=Path, help="another folder for the results than the study's")
    runner.set_defaults(function=run)
    reporter = commands.add_parser("report", help="table and figures of all runs")
    reporter.add_argument("study", choices=studies)
    reporter.add_argument("--results", type=Path, help="another folder of results than the study's")
    reporter.set_defaults(function=report)
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    main()
