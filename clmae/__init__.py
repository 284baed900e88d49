# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Masked-image pretraining for transformers. Importing this registers the families with the Auto classes."""

# What is public, `configuration` and the modules of `modeling` say by their `__all__`.
# ruff: noqa: F403, F405

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
)

from clmae.configuration import *
from clmae.modeling.image_processing_mae import *
from clmae.modeling.modeling_cl_mae import *
from clmae.modeling.modeling_cmae import *
from clmae.modeling.modeling_mae import *

__version__ = "0.1.0"

# (config, encoder, pretraining, classifier, backbone) of each family, by its name on the command line.
FAMILIES = {
    "mae": (MAEConfig, MAEModel, MAEForPreTraining, MAEForImageClassification, MAEBackbone),
    "cl_mae": (CLMAEConfig, CLMAEModel, CLMAEForPreTraining, CLMAEForImageClassification, CLMAEBackbone),
    "cmae": (CMAEConfig, CMAEModel, CMAEForPreTraining, CMAEForImageClassification, CMAEBackbone),
}

for _config, *_models in FAMILIES.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    for _auto, _model in zip(
        (AutoModel, AutoModelForPreTraining, AutoModelForImageClassification, AutoBackbone), _models, strict=True
    ):
        _auto.register(_config, _model, exist_ok=True)
    AutoImageProcessor.register(
        _config,
        image_processor_classes={"torchvision": MAEImageProcessor, "pil": MAEImageProcessorPil},
        exist_ok=True,
    )
