# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What a training step costs in FLOPs: by a closed formula, and counted from the shapes of the real model.

Both count matrix products and convolutions, 2 FLOPs per multiplication with addition, and what a step has to compute
once: not what gradient checkpointing or a fused attention computes again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForPreTraining

from clmae.configuration import MAEConfig
from clmae.configuration.configuration_mae import pair
from clmae.training.arguments import PretrainingArguments

# -- by formula -------------------------------------------------------------------------------------------------------


def step_flops(config: MAEConfig, batch_size: int = 1, masker_update_interval: int = 1) -> float:
    """FLOPs of a training step, forward and backward: the sum of [`step_flops_by_part`]."""
    return sum(step_flops_by_part(config, batch_size, masker_update_interval).values())


def step_flops_by_part(config: MAEConfig, batch_size: int = 1, masker_update_interval: int = 1) -> dict[str, float]:
    """FLOPs of a training step's parts, forward and backward, from the configuration alone.

    Of n tokens of width d, a block's linear layers take `2n(4d² + 2d·inner)` and its attention `4n²d`; the backward
    pass takes each twice, once for its input and once for its other factor. What is not trained or not on the way to
    a gradient does without: the images, and in pass B all weights and what comes before the first use of m.

    Args:
        config: Of any family; CL-MAE's part counts where the masks are learned, CMAE's tasks where they have a weight.
        batch_size: Images; two views of an image are one image.
        masker_update_interval: The masking module learns at every k-th step only; the result is the mean over its
            steps.

    Returns:
        FLOPs by the part's name, of the parts that there are: `"encoder"` (of visible patches) and `"decoder"`,
        `"masking module"` and `"pass B"`, `"token positions"` and `"contrast"`.
    """
    views = getattr(config, "num_views", 1)
    patches, width = config.num_patches, config.hidden_size
    visible = config.num_visible(patches)
    embedding = 2 * _linear(patches, config.patch_dim, width)  # the images need no gradient
    parts: dict[str, float] = {"encoder": embedding + 3 * sum(_encoder(config, visible + 1))}
    decoded = 1 / 2 if views == 2 and config.decoded_views == 1 else 1.0
    parts["decoder"] = 3 * decoded * sum(_decoder(config, visible + 1, config.prediction_ratio))
    if config.learns_masks:
        share = 1 / masker_update_interval
        if config.masker_objective == "error":
            parts["masking module"] = (1 + 2 * share) * _error_predictor(config)
            parts["masking module"] -= share * _linear(patches, width, config.masker_hidden_size)  # tokens: no gradient
        else:
            parts["masking module"] = (1 + 2 * share) * _masking_module(config)
            parts["pass B"] = share * _pass_b(config)
    if config.model_type == "cmae" and config.position_loss_weight:
        parts["token positions"] = 3 * _linear(int(visible * config.position_mask_ratio), width, patches) + embedding
    if config.model_type == "cmae" and config.contrastive_loss_weight:
        inner, size = config.projection_hidden_size, config.projection_size
        parts["contrast"] = 3 * (_linear(1, width, inner) + _linear(1, inner, size))
        parts["contrast"] += 3 * _linear(1, size, batch_size) / views  # each image with all of the batch
    return {name: batch_size * views * flops for name, flops in parts.items()}


def _linear(tokens: int, inputs: int, outputs: int) -> int:
    return 2 * tokens * inputs * outputs


def _blocks(count: int, tokens: int, width: int, inner: int | None) -> tuple[int, int]:
    """Forward FLOPs of `count` blocks: linear layers, attention."""
    assert inner is not None  # the configuration has filled it in
    return count * 2 * tokens * (4 * width**2 + 2 * width * inner), count * 4 * tokens**2 * width


def _encoder(config: MAEConfig, tokens: int) -> tuple[int, int]:
    return _blocks(config.num_hidden_layers, tokens, config.hidden_size, config.intermediate_size)


def _decoder(config: MAEConfig, tokens: int, prediction_ratio: float = 1.0) -> tuple[int, int]:
    """Of the encoder's `tokens`; its blocks see all patches, or the visible ones and those that are predicted."""
    width, seen = config.decoder_hidden_size, config.num_patches + 1
    predicted = config.num_patches
    if prediction_ratio < 1:
        predicted = max(1, round(prediction_ratio * (seen - tokens)))
        seen = tokens + predicted
    linear, attention = _blocks(config.decoder_num_hidden_layers, seen, width, config.decoder_intermediate_size)
    linear += _linear(tokens, config.hidden_size, width) + _linear(predicted, width, config.patch_dim)
    return linear, attention


def _masking_module(config: MAEConfig) -> int:
    patches, width, inner = config.num_patches, config.hidden_size, config.masker_intermediate_size
    blocks = _blocks(config.masker_num_hidden_layers - 1, patches + 1, width, inner)
    # The last block computes the class token alone, of all tokens' keys and values.
    last = _linear(patches + 1, width, 2 * width) + 4 * (patches + 1) * width + _linear(1, width, 2 * width + 2 * inner)
    return sum(blocks) + last + _linear(1, width, patches)


def _error_predictor(config: MAEConfig) -> int:
    patches, width = config.num_patches, config.masker_hidden_size
    blocks = _blocks(config.masker_num_hidden_layers, patches, width, config.masker_intermediate_size)
    return _linear(patches, config.hidden_size, width) + sum(blocks) + _linear(patches, width, 1)


def _pass_b(config: MAEConfig) -> int:
    """Forward and backward pass of the frozen autoencoder over all tokens, without weight gradients."""
    tokens, width = config.num_patches + 1, config.hidden_size
    parts = _encoder(config, tokens), _decoder(config, tokens)
    flops = sum(2 * linear + 3 * attention for linear, attention in parts)
    if config.soft_masking == "attention":
        # m comes in with the first block's scores: no gradient for its queries, keys and values.
        flops -= 3 * _linear(tokens, width, width) + 3 * 2 * tokens**2 * width
    return flops


# -- counted ----------------------------------------------------------------------------------------------------------


def count_step_flops(config: MAEConfig, args: PretrainingArguments) -> float:
    """FLOPs of an optimiser step in all processes: forward and backward pass, counted from the real shapes.

    Matrix products and convolutions, 2 FLOPs per multiplication with addition, as torch counts them. With a
    `masker_update_interval` the mean over its steps. What gradient checkpointing computes again does not count.
    Nothing is computed, and nothing depends on the device.
    """
    views = getattr(config, "num_views", 1)
    shape = (args.train_batch_size, *((views,) if views > 1 else ()), config.num_channels, *pair(config.image_size))

    def count(**inputs: Any) -> int:
        with FakeTensorMode():
            model = AutoModelForPreTraining.from_config(config, attn_implementation="eager").train()
            if not config.learns_masks:
                inputs = {}
            with FlopCounterMode(display=False) as counter:
                model(pixel_values=torch.zeros(shape), **inputs).loss.backward()
        return counter.get_total_flops()

    interval = args.masker_update_interval
    flops: float = count(curriculum_factor=1.0, compute_masker_loss=True)
    if interval > 1:
        flops = (flops + (interval - 1) * count(curriculum_factor=1.0, compute_masker_loss=False)) / interval
    return args.total_train_batch_size // args.train_batch_size * flops


def count_encoder_flops(config: MAEConfig) -> int:
    """FLOPs of the encoder's forward pass over one whole image."""
    with FakeTensorMode(), torch.no_grad():
        model = AutoModelForPreTraining.from_config(config, attn_implementation="eager").eval()
        with FlopCounterMode(display=False) as counter:
            model.vit(torch.zeros(1, config.num_channels, *pair(config.image_size)))
    return counter.get_total_flops()
