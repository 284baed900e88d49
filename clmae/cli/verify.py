# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clmae.cli.folders import PathsParser
from clmae.cli.options import UsageError
from clmae.training.sealing import checkpoints, is_sealed, verify

EXAMPLES = """\
  clmae verify out/cl-mae
  clmae verify out/cl-mae/checkpoint-2000"""


def run(argv: Sequence[str]) -> int:
    """Reads sealed folders again; the exit code: 0 all is well, 1 something is not."""
    parser = PathsParser(
        "clmae verify",
        "Check that a checkpoint, a model, or an output folder with its model and all its checkpoints is whole: every "
        "file there, with the size and the checksum with which it was saved. Ends with 1 if anything is wrong.",
        EXAMPLES,
    )
    parser.add_argument("dir", metavar="DIR", help="Output folder of a run, or a checkpoint in it.")
    folder = Path(parser.read(argv).dir)
    if not folder.is_dir():
        raise UsageError(f"DIR {str(folder)!r} is no folder.")
    found = checkpoints(folder)
    if is_sealed(folder) or (folder / "config.json").is_file() or (folder / "trainer_state.json").is_file():
        found.append(folder)
    if not found:
        raise UsageError(f"DIR {str(folder)!r} holds neither a checkpoint nor a model.")
    results = {path: verify(path) for path in found}
    for path, problems in results.items():
        print(f"{path}: {'damaged or unfinished' if problems else 'whole'}")
        for problem in problems:
            print(f"  {problem}")
    return 1 if any(results.values()) else 0
