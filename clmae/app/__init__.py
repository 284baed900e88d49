# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae app`: a web page that shows what a masked autoencoder does with an image.

`explorer` computes and draws, and knows nothing of the page; `page` is the page, made with gradio.
"""

from __future__ import annotations

from clmae.app.explorer import Explorer, Session, read_upload

__all__ = ["Explorer", "Session", "read_upload"]
