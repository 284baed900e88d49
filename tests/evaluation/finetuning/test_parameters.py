# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Layer-wise learning rates and groups, by the closed form."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import Dinov2Config, ViTConfig

from clmae import FAMILIES, MAEForImageClassification
from clmae.evaluation.finetuning.parameters import layer_lr_scales, parameter_groups

from .samples import VIT


def classifiers() -> dict[str, nn.Module]:
    from transformers import Dinov2ForImageClassification, ViTForImageClassification

    mae = FAMILIES["mae"][0](**VIT, decoder_hidden_size=16, decoder_num_attention_heads=2)
    dinov2 = Dinov2Config(**{**VIT, "num_hidden_layers": 3})
    return {
        "mae": MAEForImageClassification(mae),
        "vit": ViTForImageClassification(ViTConfig(**VIT)),
        "dinov2": Dinov2ForImageClassification(dinov2),
    }


@pytest.mark.parametrize("name", ["mae", "vit", "dinov2"])
def test_layer_decay_is_the_closed_form(name):
    model = classifiers()[name]
    depth, decay = model.config.num_hidden_layers, 0.65
    scales = layer_lr_scales(model, decay)
    assert scales.keys() == dict(model.named_parameters()).keys()
    for parameter, scale in scales.items():
        if ".embeddings." in parameter:
            expected = decay ** (depth + 1)
        elif match := [i for i in range(depth) if f".{i}." in parameter]:
            expected = decay ** (depth + 1 - (match[0] + 1))
        else:
            expected = 1.0
        assert scale == pytest.approx(expected, rel=1e-12), parameter
    assert len(set(scales.values())) == depth + 2


def test_layer_decay_of_one_asks_for_no_blocks():
    model = nn.Sequential(nn.Linear(2, 2))
    assert layer_lr_scales(model, 1.0) == {"0.weight": 1.0, "0.bias": 1.0}
    with pytest.raises(ValueError, match="no numbered blocks"):
        layer_lr_scales(model, 0.9)


@pytest.mark.parametrize("name", ["mae", "vit", "dinov2"])
def test_groups_hold_every_trained_parameter_once_with_its_rate_and_decay(name):
    model = classifiers()[name]
    scales, names = layer_lr_scales(model, 0.5), {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, 0.1, 0.05, 0.5)
    seen = {}
    for group in groups:
        for parameter in group["params"]:
            seen[names[id(parameter)]] = group["weight_decay"]
            assert group["lr"] == pytest.approx(0.1 * scales[names[id(parameter)]])
    assert sum(len(group["params"]) for group in groups) == len(seen)
    assert seen.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for parameter, decay in seen.items():
        # As in pretraining: no decay for biases, norms and layer scales, which are vectors.
        assert decay == (0.05 if model.get_parameter(parameter).ndim > 1 else 0.0), parameter
    assert any("token" in parameter and decay for parameter, decay in seen.items())
    assert groups[0]["lr"] == pytest.approx(0.1)  # what the Trainer logs
