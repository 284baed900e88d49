# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Tiny models with weights of no special value, and inputs that hold all their randomness."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import clmae

from .models import FAMILIES, HEADS, distinct_noise, perturb


@pytest.fixture
def build(tiny_config, make_images):
    """`build(family, head, **fields)`: a model in evaluation mode, and inputs for four images (CMAE: two of two views).

    All randomness is in the inputs: uniform noise for masks, and labels for a classifier's loss.
    """

    def make(family: str = "mae", head: str = "pretraining", **fields: Any) -> tuple[nn.Module, dict[str, Any]]:
        masker = {"masker_num_hidden_layers": 1, "masker_num_attention_heads": 2} if family != "mae" else {}
        name = family.partition("-")[0]
        config = tiny_config(name, **{**masker, **FAMILIES[family], **fields})
        model = perturb(clmae.FAMILIES[name][HEADS[head][0]](config)).eval()
        images = make_images(config, 4)
        if head != "pretraining":
            labels = {"labels": torch.tensor([0, 1, 0, 1])} if head == "classifier" else {}
            return model, {"pixel_values": images, **labels}
        images = images.unflatten(0, (2, 2)) if name == "cmae" else images
        noise = distinct_noise(4, config.num_patches).unflatten(0, images.shape[:-3])
        return model, {"pixel_values": images, "noise": noise}

    return make
