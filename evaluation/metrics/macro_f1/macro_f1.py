# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What `evaluate.load` reads of this folder; it copies this file alone, so the class is elsewhere."""

from clmae.evaluation.metrics.modules import MacroF1

__all__ = ["MacroF1"]
