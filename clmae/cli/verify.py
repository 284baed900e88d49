# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Check that a checkpoint, a model, or an output folder with its model and all its checkpoints is whole:
every file is there, with the size and the checksum with which it was saved. A model without a manifest
(converted, or from the Hub) is checked by what its files say of each other. The exit code is 1 if anything
is wrong.

examples:
  clmae verify out/cl-mae
  clmae verify out/cl-mae/checkpoint-2000
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clmae.cli.options import CommandParser
from clmae.configuration.errors import InputError
from clmae.model_cards.hub import code_files, missing_files, weight_problems
from clmae.model_cards.record import read_json
from clmae.model_cards.run import INDEX_NAME, WEIGHTS_NAME


def run(argv: Sequence[str]) -> int:
    """Reads checkpoints and models again; the exit code: 0 all is well, 1 something is not."""
    parser = CommandParser("clmae verify", __doc__)
    parser.add_argument("dir", metavar="DIR", help="Output folder of a run, or a checkpoint or a model in it.")
    (args,) = parser.read(argv)
    from clmae.training.integrity import checkpoints, is_sealed, verify  # the help does not wait for it

    folder = Path(args.dir)
    if not folder.is_dir():
        raise InputError(f"DIR {str(folder)!r} is no folder.")
    folders = checkpoints(folder)
    is_checkpoint = folder.resolve() in checkpoints(folder.resolve().parent)
    marks = ("config.json", "trainer_state.json", WEIGHTS_NAME, INDEX_NAME)
    if is_sealed(folder) or any((folder / name).is_file() for name in marks):
        folders.append(folder)
    if not folders:
        raise InputError(f"DIR {str(folder)!r} holds neither a checkpoint nor a model.")
    damaged = False
    for path in folders:
        # A checkpoint always has a manifest: one without was cut off, whatever its files look like.
        without = path == folder and not is_checkpoint and not is_sealed(path)
        problems = problems_without_manifest(path) if without else verify(path)
        damaged |= bool(problems)
        whole = "whole, but without a manifest: the values of its weights were not compared" if without else "whole"
        print(f"{path}: {('damaged' if without else 'damaged or unfinished') if problems else whole}")
        for problem in problems:
            print(f"  {problem}")
    return 1 if damaged else 0


def problems_without_manifest(folder: Path) -> list[str]:
    """What is wrong with a model that has no manifest: files that are missing, cannot be read or contradict others."""
    try:
        config = read_json(folder / "config.json")
        if not isinstance(config, dict):
            return ["config.json is missing." if config is None else "config.json holds no configuration."]
        problems = missing_files(folder, code_files(folder)) + weight_problems(folder, values=False)
    except InputError as error:
        return [str(error)]
    return [f"{problem}." for problem in problems]
