# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`LogMeans`: what the model's scalars and its keep probabilities were, from one training log to the next."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import logging

from clmae.training.callbacks import RunComponent
from clmae.training.curriculum import keep_probability_statistics, keep_probability_sums, mask_warnings

logger = logging.get_logger(__name__)

_FOLD_STEPS = 100  # after which statistics are computed where nothing is logged, so that nothing piles up
_MIN_IMAGES = 8  # in a step, below which a small spread of the masks says little


class LogMeans(RunComponent):
    """Sums scalars on the device over accumulated batches and steps; a log takes their means over all processes.

    It warns once about masks that have collapsed, saturated or left the mask ratio (see [`mask_warnings`]).
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.start(None)

    def start(self, checkpoint: str | None) -> None:
        """Forgets an earlier run."""
        self._sums: dict[str, torch.Tensor] = {}  # by name, `(2,)`: sum and number of finite values
        # By optimiser step, of its whole batch: a spread between images does not average over parts of a batch.
        self._keep_sums: dict[int, torch.Tensor] = {}
        self._warned: set[str] = set()

    def add(self, scalars: dict[str, torch.Tensor], keep_probabilities: torch.Tensor | None = None) -> None:
        """Adds a micro-batch of the running step: tensors of any shape, and m `(..., num_patches)`."""
        for name, values in scalars.items():
            finite = values.isfinite()  # what is not belongs to a step that is skipped
            sums = torch.stack([torch.where(finite, values, 0).float().sum(), finite.float().sum()])
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        if keep_probabilities is not None:
            step, sums = self.trainer.state.global_step, keep_probability_sums(keep_probabilities)
            self._keep_sums[step] = self._keep_sums[step] + sums if step in self._keep_sums else sums

    def take(self) -> dict[str, float] | None:
        """Means since the last call, without what no step has known (all were skipped); all processes take part.

        `None` if nothing was added.
        """
        self._fold()
        names = sorted(self._sums)
        if not names:
            return None
        sums = self.trainer.accelerator.reduce(torch.stack([self._sums[name] for name in names]), reduction="sum")
        self._sums = {}
        return {name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True) if count}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps the statistics of few steps, whether or not they are logged."""
        if state.global_step % _FOLD_STEPS == 0:
            self._fold()

    def _fold(self) -> None:
        """Adds the statistics of each step's keep probabilities to the sums; all processes take part."""
        if self._keep_sums:
            sums = self.trainer.accelerator.reduce(torch.stack(list(self._keep_sums.values())), reduction="sum")
            self.add(keep_probability_statistics(sums))
            state = self.trainer.state
            settled = max(state.max_steps / 10, 50)  # steps after which m has left its start
            self._warn(sums[[step >= settled for step in self._keep_sums]])
            self._keep_sums = {}

    def _warn(self, keep_sums: torch.Tensor) -> None:
        """Says once what is wrong with the masks, by the sums `(steps, 5, num_patches)` of settled steps."""
        if not len(keep_sums) or not self.trainer.is_world_process_zero():
            return
        statistics = {k: v.mean().item() for k, v in keep_probability_statistics(keep_sums).items()}
        few_images = keep_sums[0, 0, 0] < _MIN_IMAGES
        for kind, message in mask_warnings(statistics, self.trainer.model.config.mask_ratio).items():
            if kind not in self._warned and not (kind == "collapsed" and few_images):
                self._warned.add(kind)
                logger.warning(f"Step {self.trainer.state.global_step}: {message}")
