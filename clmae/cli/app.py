# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Look at a model in the browser: keep probabilities, masks (learned, random, or clicked), reconstructions,
errors, attention, patch tokens, nearest images; over the checkpoints of a run. The page is served on this
machine alone and fetches nothing from elsewhere. Needs: pip install 'clmae[app]'.

examples:
  clmae app out/cl-mae
  clmae app org/cl-mae-vit-b --dataset ./my_photos --port 7861
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from clmae.cli.options import CommandParser
from clmae.configuration.errors import InputError


def run(argv: Sequence[str]) -> int:
    """Serves a page about a model until it is interrupted."""
    parser = CommandParser("clmae app", __doc__)
    parser.add_argument("model", metavar="MODEL", help="Output folder of a run, or Hub id.")
    parser.add_argument(
        "--dataset", help="Folder or Hub id of images: examples, and where nearest images are searched."
    )
    parser.add_argument("--split", default="train", help="Of that dataset; train, if not given.")
    parser.add_argument("--port", type=int, default=7860, help="Of the page; 7860, if not given.")
    parser.add_argument("--share", action="store_true", help="Give a public address too, through gradio's servers.")
    (args,) = parser.read(argv)
    if importlib.util.find_spec("gradio") is None:
        raise InputError("`clmae app` needs the package gradio: pip install 'clmae[app]'.")
    if not 1 <= args.port <= 65535:
        raise InputError(f"--port is {args.port}; give a number from 1 to 65535.")
    # Imported only now: the help and the checks above do not wait for torch and gradio.
    from clmae.app.page import serve

    serve(args.model, args.dataset, args.split, port=args.port, share=args.share)
    return 0
