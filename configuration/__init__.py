# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What a model is: one configuration class a family."""

from clmae.configuration.configuration_cl_mae import CLMAEConfig
from clmae.configuration.configuration_cmae import CMAEConfig
from clmae.configuration.configuration_mae import MAEConfig

__all__ = ["CLMAEConfig", "CMAEConfig", "MAEConfig"]
