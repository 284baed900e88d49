# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Networks, masks and losses: one `modeling_<family>.py` a family."""

from clmae.modeling.image_processing_mae import MAEImageProcessor, MAEImageProcessorPil
from clmae.modeling.modeling_cl_mae import (
    CLMAEBackbone,
    CLMAEForImageClassification,
    CLMAEForPreTraining,
    CLMAEForPreTrainingOutput,
    CLMAEModel,
    CLMAEPreTrainedModel,
)
from clmae.modeling.modeling_cmae import (
    CMAEBackbone,
    CMAEForImageClassification,
    CMAEForPreTraining,
    CMAEForPreTrainingOutput,
    CMAEModel,
    CMAEPreTrainedModel,
)
from clmae.modeling.modeling_mae import (
    MAEBackbone,
    MAEForImageClassification,
    MAEForPreTraining,
    MAEForPreTrainingOutput,
    MAEModel,
    MAEModelOutput,
    MAEPreTrainedModel,
)

__all__ = [
    "CLMAEBackbone",
    "CLMAEForImageClassification",
    "CLMAEForPreTraining",
    "CLMAEForPreTrainingOutput",
    "CLMAEModel",
    "CLMAEPreTrainedModel",
    "CMAEBackbone",
    "CMAEForImageClassification",
    "CMAEForPreTraining",
    "CMAEForPreTrainingOutput",
    "CMAEModel",
    "CMAEPreTrainedModel",
    "MAEBackbone",
    "MAEForImageClassification",
    "MAEForPreTraining",
    "MAEForPreTrainingOutput",
    "MAEImageProcessor",
    "MAEImageProcessorPil",
    "MAEModel",
    "MAEModelOutput",
    "MAEPreTrainedModel",
]
