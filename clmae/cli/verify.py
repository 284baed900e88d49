# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from clmae.cli.folders import PathsParser
from clmae.configuration.errors import InputError
from clmae.model_cards.hub import code_files
from clmae.model_cards.record import read_json
from clmae.training.sealing import checkpoints, is_sealed, verify

EXAMPLES = """\
  clmae verify out/cl-mae
  clmae verify out/cl-mae/checkpoint-2000"""

INDEX = "model.safetensors.index.json"


def run(argv: Sequence[str]) -> int:
    """Reads checkpoints and models again; the exit code: 0 all is well, 1 something is not."""
    parser = PathsParser(
        "clmae verify",
        "Check that a checkpoint, a model, or an output folder with its model and all its checkpoints is whole: every "
        "file there, with the size and the checksum with which it was saved. A model without those (converted, or "
        "from the Hub) is checked by what its files say of each other. Ends with 1 if anything is wrong.",
        EXAMPLES,
    )
    parser.add_argument("dir", metavar="DIR", help="Output folder of a run, or a checkpoint or a model in it.")
    folder = Path(parser.read(argv).dir)
    if not folder.is_dir():
        raise InputError(f"DIR {str(folder)!r} is no folder.")
    found = checkpoints(folder)
    is_checkpoint = folder.resolve() in checkpoints(folder.resolve().parent)
    marks = ("config.json", "trainer_state.json", "model.safetensors", INDEX)
    if is_sealed(folder) or any((folder / name).is_file() for name in marks):
        found.append(folder)
    if not found:
        raise InputError(f"DIR {str(folder)!r} holds neither a checkpoint nor a model.")
    damaged = False
    for path in found:
        # The Trainer seals every checkpoint: one without a manifest was cut off, whatever its files look like.
        without = path == folder and not is_checkpoint and not is_sealed(path)
        problems = unsealed_problems(path) if without else verify(path)
        damaged |= bool(problems)
        whole = "whole, but without a manifest: the values of its weights were not compared" if without else "whole"
        print(f"{path}: {('damaged' if without else 'damaged or unfinished') if problems else whole}")
        for problem in problems:
            print(f"  {problem}")
    return 1 if damaged else 0


def unsealed_problems(folder: Path) -> list[str]:
    """What is wrong with a model that has no manifest: files that are missing, cannot be read or contradict others."""
    try:
        config, index = read_json(folder / "config.json"), read_json(folder / INDEX)
        if not isinstance(config, dict):
            return ["config.json is missing." if config is None else "config.json holds no configuration."]
        problems = [f"{name} is missing." for name in code_files(folder) if not (folder / name).is_file()]
    except InputError as error:
        return [str(error)]
    names: dict[str, set[str]] = {"model.safetensors": set()}  # of the weights that each file is to hold
    if not (folder / "model.safetensors").is_file() and index is not None:
        try:
            names = {
                file: {name for name, other in index["weight_map"].items() if other == file}
                for file in sorted(set(index["weight_map"].values()))
            }
        except (TypeError, KeyError, AttributeError):
            names = {}
        if not names:
            problems.append(f"{INDEX} names no weights.")
    elif not (folder / "model.safetensors").is_file():
        return [*problems, "there are no weights (model.safetensors)."]
    for file, expected in names.items():
        if not (folder / file).is_file():
            problems.append(f"{file} is missing.")
            continue
        try:
            with safe_open(folder / file, "pt") as weights:  # compares the lengths in its header with the file's
                lacking = sorted(expected - set(weights.keys()))
        except (SafetensorError, OSError) as error:
            problems.append(f"{file} cannot be read: {error}.")
            continue
        if lacking:
            problems.append(f"{file} lacks {lacking[0]}{f' and {len(lacking) - 1} more' if lacking[1:] else ''}.")
    return problems
