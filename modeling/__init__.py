# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Networks, masks and losses: one `modeling_<family>.py` per family."""

from clmae.modeling.image_processing_mae import *  # noqa: F403
from clmae.modeling.modeling_cl_mae import *  # noqa: F403
from clmae.modeling.modeling_cmae import *  # noqa: F403
from clmae.modeling.modeling_mae import *  # noqa: F403
