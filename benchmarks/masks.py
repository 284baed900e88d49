# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What a study with `measure: true` logs of the masks, and what table and figures make of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import TrainerCallback

from clmae.configuration.configuration_mae import pair
from clmae.modeling.losses import patch_errors, patch_targets
from clmae.modeling.masking import keep_lowest
from clmae.modeling.modeling_mae import select_visible
from clmae.training import CurriculumTrainer
from clmae.training.curriculum import keep_probability_statistics, keep_probability_sums

EVERY, GRADIENTS = 25, 4  # steps between two measurements, and how many of these to one with gradients
PROBE, SWAPS = 64, 8  # images for gradients and alignment; exchanges of two patches per image
TERMS = {  # of the masking module's loss: weight in the configuration, and its name in the figure
    "soft_reconstruction_loss": (None, "λ_CL · L_soft"),
    "gauss_loss": ("gauss_loss_weight", "λ_g · L_gauss"),
    "kl_loss": ("kl_loss_weight", "λ_kl · L_kl"),
    "diversity_loss": ("diversity_loss_weight", "λ_d · L_div"),
}
Log = list[dict[str, float]]


class MeasureCallback(TrainerCallback):
    """Logs [`measure`] before the first step, every `EVERY` steps and after the last."""

    def __init__(self, trainer: CurriculumTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See the class."""
        if state.global_step == 0:
            self.on_step_end(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See the class."""
        step = state.global_step
        if step % EVERY == 0 or step == state.max_steps:
            should_log = control.should_log
            self.trainer.log(measure(self.trainer, with_gradients=step % (EVERY * GRADIENTS) == 0))
            control.should_log = should_log  # logging resets it, and this step's training log is still to come


def callbacks(trainer: CurriculumTrainer) -> list[TrainerCallback]:
    """For [`Runner`]."""
    return [MeasureCallback(trainer)]


def measure(trainer: CurriculumTrainer, with_gradients: bool) -> dict[str, float]:
    """Losses on the held-out images under random and learned masks; of the masks, statistics and gradients."""
    model, batch = trainer.model, trainer.held_out_batch()
    was_training = model.training
    model.eval()
    values: dict[str, Any] = {}
    with torch.no_grad(), trainer.compute_loss_context_manager():
        if trainer.has_masking_module:
            values["random_loss"] = model(**batch, masking="random").reconstruction_loss
            learned = model(pixel_values=batch["pixel_values"])
            values["difficulty"] = learned.reconstruction_loss / values["random_loss"]
            values |= keep_probability_statistics(keep_probability_sums(learned.keep_probabilities))
        else:
            values["random_loss"] = model(**batch).reconstruction_loss
        if getattr(model.config, "position_loss_weight", 0):
            views = {name: torch.stack([value] * model.config.num_views, 1) for name, value in batch.items()}
            values["position_accuracy"] = model(**views, compute_task_losses=True).position_accuracy
    if trainer.has_masking_module:
        values["factor"] = trainer.curriculum_factor(trainer.state.global_step)
        if with_gradients:
            values |= gradients_and_alignment(model, batch["pixel_values"].flatten(0, -4)[:PROBE], values["factor"])
    model.train(was_training)
    return {name: round(float(value), 5) for name, value in values.items()}


def gradients_and_alignment(model: torch.nn.Module, pixel_values: torch.Tensor, factor: float) -> dict[str, float]:
    """What pulls at the masking module's logits, and whether pass B's pull points where the hard task does.

    `gradient_<term>`: L2 norm of the weighted term's gradient at the logits `(PROBE, N)`. `alignment_<soft masking>`:
    exchange a visible and a masked patch of the hard mask, SWAPS times per image; the correlation of the change in the
    image's L_rec with the change that L_soft's gradient predicts. In float32, whatever the training's precision.
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
        weight = getattr(config, TERMS[name][0]) if TERMS[name][0] else abs(factor)
        (gradient,) = torch.autograd.grad(weight * term, leaf, retain_graph=True)
        row[f"gradient_{name}"] = (gradient * slope).norm()
    count = config.num_visible(keep.shape[1])
    changes, exchanged = _exchange(model, embeddings, targets, keep_lowest(-keep, count).mask, count)
    images, before = torch.arange(len(keep), device=keep.device), config.soft_masking
    for config.soft_masking in ("tokens", "attention"):
        leaf = keep.clone().requires_grad_()
        loss = model.soft_reconstruction_loss(embeddings, leaf, targets, config.grid_size)
        (gradient,) = torch.autograd.grad(loss, leaf)
        predicted = torch.stack([gradient[images, shown] - gradient[images, hidden] for shown, hidden in exchanged])
        both = torch.stack([predicted.ravel(), changes.ravel()])
        row[f"alignment_{config.soft_masking}"] = torch.corrcoef(both)[0, 1]
    config.soft_masking = before
    row["alignment"] = row[f"alignment_{before}"]
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


def metrics(log: Log) -> dict[str, float]:
    """Of a run: mean difficulty of each quarter and at the end; m after the first tenth of the steps; losses."""
    rows = [entry for entry in log if "random_loss" in entry]
    end, steps = rows[-1], rows[-1]["step"]
    values = {"random-mask loss": end["random_loss"]}
    if "position_accuracy" in end:
        values["position accuracy"] = end["position_accuracy"]
    if "difficulty" in end:
        for quarter in range(1, 5):
            inside = [r["difficulty"] for r in rows if quarter - 1 < 4 * r["step"] / steps <= quarter]
            if inside:  # a very short run has quarters without a measurement
                values[f"Q{quarter}"] = statistics.mean(inside)
        later = [r for r in rows if r["step"] >= steps / 10]
        means = [r["keep_mean"] for r in later]
        values |= {"difficulty at the end": end["difficulty"], "least mean of m": min(means), "largest": max(means)}
        values["least spread of m"] = min(r["keep_spread"] for r in later)
    return values


def figures(logs: dict[str, list[Log]]) -> dict[str, Figure]:
    """By the ends of their names, of the logs of each row of the table, one per seed; none where masks are random."""
    logs = {label: group for label, group in logs.items() if any("difficulty" in entry for entry in group[0])}
    if not logs:
        return {}
    difficulty, causes = Figure(figsize=(11, 3.4), layout="constrained"), Figure(figsize=(13, 7), layout="constrained")
    for axis, name, title, level in zip(
        difficulty.subplots(1, 3),
        ("difficulty", "keep_spread", "keep_mean"),
        ("mask difficulty", "spread of m between images", "mean of m"),
        (1.0, 0.0, 0.25),
        strict=True,
    ):
        _draw(axis, {label: (group, name) for label, group in logs.items()}, title, level)
    axes = causes.subplots(2, 2).ravel()
    _draw(axes[0], {label: (group, "difficulty") for label, group in logs.items()}, "mask difficulty", 1.0)
    title = "does pass B's gradient know what is hard? (correlation with exchanges of patches)"
    _draw(axes[1], {label: (group, "alignment") for label, group in logs.items()}, title, 0.0)
    for axis, label in zip(axes[2:], dict.fromkeys([next(iter(logs)), list(logs)[-1]]), strict=False):
        lines = {text: (logs[label], f"gradient_{term}") for term, (_, text) in TERMS.items()}
        _draw(axis, lines, f"gradient norm at the masking module's logits: {label}", None)
        axis.set_yscale("log")
    return {"-difficulty": difficulty, "-causes": causes}


def _draw(axis: Any, lines: dict[str, tuple[Sequence[Log], str]], title: str, level: float | None) -> None:
    """Means over the seeds over λ_CL, and the bands between their extremes."""
    for label, (group, name) in lines.items():
        rows = [[entry for entry in log if name in entry] for log in group]
        values = np.array([[entry[name] for entry in one] for one in rows])
        factors = [entry["factor"] for entry in rows[0]]
        (line,) = axis.plot(factors, values.mean(0), label=label)
        axis.fill_between(factors, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    if level is not None:
        axis.axhline(level, color="grey", linewidth=0.8)
    axis.set_title(title, fontsize="medium")
    axis.set_xlim(1, -1)
    axis.set_xlabel("curriculum factor λ_CL: partner to adversary", fontsize="small")
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)
