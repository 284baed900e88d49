# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The name of [`clmae.training.integrity`] in earlier versions."""

from clmae.training.integrity import *  # noqa: F403
