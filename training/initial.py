# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Pretraining that goes on from the weights of another model."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForPreTraining, ViTMAEConfig
from transformers.utils import logging

from clmae.configuration import MAEConfig
from clmae.configuration.errors import InputError
from clmae.modeling import MAEForPreTraining

logger = logging.get_logger(__name__)


def initial_config(config_class: type[MAEConfig], source: str, **fields: Any) -> MAEConfig:
    """The configuration of a model that starts from the weights of `source` (see [`load_initial_weights`]).

    Args:
        config_class: Of the family that is to be trained.
        source: A folder or Hub id. The fields that both families have are taken from it: sizes, patches, mask ratio,
            targets.
        fields: Other values.

    Raises:
        InputError: `source` cannot be read or is no masked autoencoder, or a field is wrong.
    """
    config = _read_config(source)
    shared = [c for c in config_class.__mro__ if issubclass(c, MAEConfig) and isinstance(config, c)]
    objective = _masking_module(config)
    if fields.get("masker_objective", objective) != objective:  # another masking module, with sizes of its own
        shared = []
    names = [name for c in shared or [MAEConfig] for name in inspect.get_annotations(c) if not name.startswith("_")]
    return config_class(**{**{name: getattr(config, name) for name in names if hasattr(config, name)}, **fields})


def load_initial_weights(model: nn.Module, source: str) -> None:
    """Copies the weights of another masked autoencoder; a part that it does not have (a masking module) stays as it is.

    Args:
        model: One of this project's families.
        source: A folder or Hub id of an MAE, CL-MAE or CMAE, or of transformers' ViTMAE; with or without its decoder.
            Fixed positions are the model's own, so that its images may have another size.

    Raises:
        InputError: `source` cannot be read, has no encoder, or a weight of another shape.
    """
    config = _read_config(source)
    loader: Any = MAEForPreTraining if isinstance(config, ViTMAEConfig) else AutoModelForPreTraining
    try:
        initial, report = loader.from_pretrained(source, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"`init` {source!r} cannot be loaded: {error}") from error
    absent = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    if any(name.startswith("vit.") for name in absent):
        raise InputError(f"`init` {source!r} holds no whole encoder: it lacks {min(absent)}; give another model.")
    weights, own = initial.state_dict(), model.state_dict()
    parameters = {name for name, _ in model.named_parameters()}
    shared = sorted(parameters & weights.keys() - absent)
    if _masking_module(config) != _masking_module(model.config):
        shared = [name for name in shared if not name.startswith("masking_module.")]
    for name in shared:
        if weights[name].shape != own[name].shape:
            raise InputError(
                f"`init` {source!r} has {name} of shape {tuple(weights[name].shape)}, but this model of "
                f"{tuple(own[name].shape)}: leave out the options that change it, so that it is as large."
            )
    with torch.no_grad():
        for name in shared:
            own[name].copy_(weights[name])
    new = sorted({name.partition(".")[0] for name in parameters - {*shared}})
    logger.info(f"Started from {source}: {len(shared)} weights{'; new: ' if new else ''}{', '.join(new)}.")


def _masking_module(config: Any) -> str | None:
    """Which masking module a model has, if it has one."""
    return getattr(config, "masker_objective", None)


def _read_config(source: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(f"`init` {source!r} cannot be loaded: {error}") from error
    if not isinstance(config, (MAEConfig, ViTMAEConfig)):
        raise InputError(
            f"`init` {source!r} is a {config.model_type}; give an MAE, CL-MAE or CMAE, or transformers' ViTMAE. "
            "`clmae convert` makes one of the checkpoints of timm, of MAE's and of CL-MAE's authors."
        )
    return config
