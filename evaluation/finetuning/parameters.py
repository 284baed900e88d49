# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Which parameters of a classifier are trained, at which rate, and with which weight decay."""

import re
from typing import Any

from torch import nn

from clmae.configuration.errors import InputError
from clmae.training.base import is_decayed

_BLOCK = re.compile(r"(?:^|\.)(?:layers|layer|blocks)\.(\d+)\.")


def layer_ids(model: nn.Module) -> tuple[dict[str, int], int]:
    """Depth of every parameter of a vision transformer, and the number of blocks L.

    Embeddings have depth 0, block i (from 0) i + 1, and what follows the blocks L + 1. Parameters are named as in this
    project and in transformers (`...layers.3...`, `...layer.3...`).

    Raises:
        InputError: There are no numbered blocks.
    """
    names = [name for name, _ in model.named_parameters()]
    blocks = {name: int(match[1]) for name in names if (match := _BLOCK.search(name))}
    if not blocks:
        raise InputError(
            f"`model` is a {type(model).__name__}, which has no numbered blocks (`layers.0`, ...); take a vision "
            "transformer, or `layer_decay` 1 and no `trained_blocks`."
        )
    depth = max(blocks.values()) + 1
    others = {name: 0 if "embeddings" in name.split(".") else depth + 1 for name in names}
    return {**others, **{name: block + 1 for name, block in blocks.items()}}, depth


def layer_lr_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Layer-wise learning-rate decay: `decay ** (L + 1 - i)` for every parameter, i its depth in [`layer_ids`].

    Args:
        model: A vision transformer of L blocks.
        decay: In (0, 1]; with 1 every scale is 1, whatever the model.
    """
    if decay == 1:
        return {name: 1.0 for name, _ in model.named_parameters()}
    ids, depth = layer_ids(model)
    return {name: decay ** (depth + 1 - i) for name, i in ids.items()}


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups of the trained parameters by learning rate and decay; the highest rate (which is logged) first."""
    scales = layer_lr_scales(model, layer_decay)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate, decay = learning_rate * scales[name], weight_decay if is_decayed(parameter) else 0.0
            group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
            group["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: (-group["lr"], -group["weight_decay"]))


def freeze_all_but_last(model: nn.Module, trained_blocks: int) -> None:
    """Leaves gradients to the last blocks and what follows them (last LayerNorm, classifier).

    Raises:
        InputError: There are not so many blocks.
    """
    ids, depth = layer_ids(model)
    if not 0 <= trained_blocks <= depth:
        raise InputError(f"`trained_blocks` is {trained_blocks}, but the model has {depth} blocks; give 0 to {depth}.")
    for name, parameter in model.named_parameters():
        if ids[name] <= depth - trained_blocks:
            parameter.requires_grad_(False)


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """The largest parts of which no parameter is trained."""
    parameters = list(model.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return [model]
    return [part for child in model.children() for part in frozen_modules(child)] if parameters else []
