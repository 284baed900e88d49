# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Watches losses and gradients for nan and inf, without waiting for the device at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class NonFiniteError(ArithmeticError):
    """A loss or a gradient is nan or inf, and the run cannot go on; the message says where it began."""


class NonFinite(NamedTuple):
    """A step at which something was nan or inf.

    Attributes:
        step: The optimiser step, counted from 0.
        names: Loss terms, or `"grad_norm"`.
        batches: Which of the step's micro-batches, each with its process; none of a gradient.
    """

    step: int
    names: list[str]
    batches: list[tuple[int, int]]


class FiniteWatch:
    """Keeps scalars on the device until [`FiniteWatch.look`], which alone reads them back.

    Args:
        gather: Joins `(n,)` tensors of all processes to `(num_processes * n,)`.
    """

    def __init__(self, gather: Callable[[torch.Tensor], torch.Tensor]):
        self._gather = gather
        self.clear()

    def clear(self) -> None:
        """Forgets what was added."""
        self._values: list[torch.Tensor] = []
        self._places: list[tuple[int, int, str]] = []  # step, micro-batch (-1: a gradient), name
        self._batch = (-1, 0)

    def add_losses(self, step: int, losses: dict[str, torch.Tensor]) -> None:
        """0-d losses of the next micro-batch of a step."""
        self._batch = (step, self._batch[1] + 1 if self._batch[0] == step else 0)
        self._values += [value.detach().float() for value in losses.values()]
        self._places += [(*self._batch, name) for name in losses]

    def add_gradient(self, step: int, norm: torch.Tensor) -> None:
        """The 0-d norm of a step's gradient."""
        self._values.append(norm.detach().float())
        self._places.append((step, -1, "grad_norm"))

    def look(self) -> NonFinite | None:
        """Where the first nan or inf was since the last look, in any process; all processes must look.

        Waits for the device, once.
        """
        if not self._values:
            return None
        places, values = self._places, torch.stack(self._values)
        self._values, self._places = [], []
        bad = self._gather((~values.isfinite()).int()).view(-1, len(places)).tolist()
        found = [(*places[i], process) for process, flags in enumerate(bad) for i, flag in enumerate(flags) if flag]
        if not found:
            return None
        step = min(found)[0]
        # A loss explains the gradient that follows from it.
        here = [place for place in found if place[0] == step]
        here = [place for place in here if place[1] >= 0] or here
        names = list(dict.fromkeys(name for *_, name, _ in here))
        batches = sorted({(batch, process) for _, batch, _, process in here if batch >= 0})
        return NonFinite(step, names, batches)


__all__ = ["FiniteWatch", "NonFinite", "NonFiniteError"]
