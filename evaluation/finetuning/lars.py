# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""LARS, the optimiser of MAE's linear probe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def _trust_ratio(weight: Tensor, gradient: Tensor, weight_decay: float, trust_coefficient: float) -> Tensor:
    """LARS's local learning rate `η |w| / (|g| + β |w|)`, a scalar; 1 where the weight or the gradient is all zero."""
    weight_norm, gradient_norm = weight.norm(), gradient.norm()
    ratio = trust_coefficient * weight_norm / (gradient_norm + weight_decay * weight_norm)
    # Compared on the device: reading the norms back would wait for it at every step.
    return torch.where((weight_norm > 0) & (gradient_norm > 0), ratio, 1.0)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888).

    With learning rate γ, momentum m, weight decay β and trust coefficient η, for each parameter w with gradient g:
    `λ = η |w| / (|g| + β |w|)`, `v ← m v + λ (g + β w)`, `w ← w − γ v`. The paper has γ inside v, which is the same
    while γ is constant; outside, a schedule acts at once (as in SGD, and in MAE's linear probe). Parameters of one
    dimension (biases, norms) get plain momentum: λ = 1 and β = 0.

    Args:
        params: Parameters or parameter groups.
        lr, momentum, weight_decay, trust_coefficient: γ >= 0, m in [0, 1), β >= 0, η > 0.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        super().__init__(
            params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust_coefficient=trust_coefficient)
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                update = weight.grad
                if weight.ndim > 1:
                    decay = group["weight_decay"]
                    update = update.add(weight, alpha=decay) * _trust_ratio(
                        weight, weight.grad, decay, group["trust_coefficient"]
                    )
                velocity = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                weight.add_(velocity.mul_(group["momentum"]).add_(update), alpha=-group["lr"])
        return loss
