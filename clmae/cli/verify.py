# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from clmae.cli.options import CommandParser
from clmae.configuration.errors import InputError
from clmae.model_cards.hub import code_files
from clmae.model_cards.record import read_json
from clmae.training.integrity import checkpoints, is_sealed, verify

EXAMPLES = """\
  clmae verify out/cl-mae
  clmae verify out/cl-mae/checkpoint-2000"""

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


def run(argv: Sequence[str]) -> int:
    """Reads checkpoints and models again; the exit code: 0 all is well, 1 something is not."""
    parser = CommandParser(
        "clmae verify",
        "Check that a checkpoint, a model, or an output folder with its model and all its checkpoints is whole:\n"
        "every file is there, with the size and the checksum with which it was saved. A model without a manifest\n"
        "(converted, or from the Hub) is checked by what its files say of each other. The exit code is 1 if anything\n"
        "is wrong.",
        EXAMPLES,
    )
    parser.add_argument("dir", metavar="DIR", help="Output folder of a run, or a checkpoint or a model in it.")
    (args,) = parser.read(argv)
    folder = Path(args.dir)
    if not folder.is_dir():
        raise InputError(f"DIR {str(folder)!r} is no folder.")
    folders = checkpoints(folder)
    is_checkpoint = folder.resolve() in checkpoints(folder.resolve().parent)
    marks = ("config.json", "trainer_state.json", WEIGHTS, INDEX)
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
        config, index = read_json(folder / "config.json"), read_json(folder / INDEX)
        if not isinstance(config, dict):
            return ["config.json is missing." if config is None else "config.json holds no configuration."]
        problems = [f"{name} is missing." for name in code_files(folder) if not (folder / name).is_file()]
    except InputError as error:
        return [str(error)]
    expected: dict[str, set[str]] = {}  # names of the weights in each file, as far as an index tells
    if (folder / WEIGHTS).is_file():
        expected[WEIGHTS] = set()
    elif index is None:
        return [*problems, f"there are no weights ({WEIGHTS})."]
    else:
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        for name, file in (weight_map if isinstance(weight_map, dict) else {}).items():
            expected.setdefault(str(file), set()).add(name)
        if not expected:
            problems.append(f"{INDEX} names no weights.")
    return problems + [
        problem for file, names in sorted(expected.items()) if (problem := _problem(folder, file, names))
    ]


def _problem(folder: Path, file: str, expected: set[str]) -> str | None:
    if not (folder / file).is_file():
        return f"{file} is missing."
    try:
        with safe_open(folder / file, "pt") as weights:  # compares the lengths in its header with the file's
            lacking = sorted(expected - set(weights.keys()))
    except (SafetensorError, OSError) as error:
        return f"{file} cannot be read: {error}."
    return f"{file} lacks {lacking[0]}{f' and {len(lacking) - 1} more' if lacking[1:] else ''}." if lacking else None
