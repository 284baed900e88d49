# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Masked-image pretraining for transformers. Importing this registers the families with the Auto classes."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
)

from clmae.configuration import CLMAEConfig, CMAEConfig, MAEConfig
from clmae.modeling import (
    CLMAEBackbone,
    CLMAEForImageClassification,
    CLMAEForPreTraining,
    CLMAEModel,
    CMAEBackbone,
    CMAEForImageClassification,
    CMAEForPreTraining,
    CMAEModel,
    MAEBackbone,
    MAEForImageClassification,
    MAEForPreTraining,
    MAEImageProcessor,
    MAEImageProcessorPil,
    MAEModel,
)

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

__all__ = [
    "FAMILIES",
    "CLMAEBackbone",
    "CLMAEConfig",
    "CLMAEForImageClassification",
    "CLMAEForPreTraining",
    "CLMAEModel",
    "CMAEBackbone",
    "CMAEConfig",
    "CMAEForImageClassification",
    "CMAEForPreTraining",
    "CMAEModel",
    "MAEBackbone",
    "MAEConfig",
    "MAEForImageClassification",
    "MAEForPreTraining",
    "MAEImageProcessor",
    "MAEImageProcessorPil",
    "MAEModel",
]
