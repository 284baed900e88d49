# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What the tests of models share: which there are, and how outputs and gradients are compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoBackbone, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

import clmae

# Place in `clmae.FAMILIES`, and Auto class.
HEADS = {
    "encoder": (1, AutoModel),
    "pretraining": (2, AutoModelForPreTraining),
    "classifier": (3, AutoModelForImageClassification),
    "backbone": (4, AutoBackbone),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mae": {},
    "cl_mae": {},
    "cl_mae-error": {"masker_objective": "error"},
    "cmae": {},
    "cmae-learned": {"learned_masks": True},
    "cmae-error": {"learned_masks": True, "masker_objective": "error", "decoded_views": 1, "prediction_ratio": 0.5},
}
# Variants of a family differ in pretraining alone.
CASES = [(family, head) for family in FAMILIES for head in HEADS if "-" not in family or head == "pretraining"]
every_model = pytest.mark.parametrize(("family", "head"), CASES)
every_autoencoder = pytest.mark.parametrize("family", FAMILIES)
every_family = pytest.mark.parametrize("family", list(clmae.FAMILIES))


def perturb(model: nn.Module) -> nn.Module:
    """Moves every parameter, so that no path is hidden by an initial zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def distinct_noise(batch_size: int, num_patches: int) -> torch.Tensor:
    """Uniform noise without near-ties, whose order differs between precisions."""
    return torch.linspace(0, 0.99, num_patches)[torch.rand(batch_size, num_patches).argsort(1)]


def flat(outputs: Any) -> list[torch.Tensor]:
    """All tensors of an output, however nested."""
    if isinstance(outputs, torch.Tensor):
        return [outputs.detach()]
    parts = outputs.to_tuple() if hasattr(outputs, "to_tuple") else outputs
    return [tensor for part in parts if part is not None for tensor in flat(part)]


def assert_same(first: Any, second: Any, **tolerance: float) -> None:
    """Equal tensors, exactly unless a tolerance is given; dictionaries have equal keys too."""
    if isinstance(first, dict) and isinstance(second, dict):
        assert first.keys() == second.keys()
        first, second = first.values(), [second[name] for name in first]
    first, second = flat(first), flat(second)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or dict(atol=0, rtol=0)))


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the parameters that have one."""
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
