# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What of an output folder belongs on the Hub, whether it is fit to go there, and sending it."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, metadata_load
from safetensors import SafetensorError, safe_open

from clmae.configuration.errors import InputError
from clmae.model_cards.card import CARD_NAME, EVAL_RESULTS_NAME
from clmae.model_cards.record import read_json
from clmae.model_cards.run import INDEX_NAME, WEIGHTS_NAME, weight_files

_IMPORT = re.compile(r"^[ \t]*from \.(\w+) import ", re.MULTILINE)
_LINK = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
# What an earlier upload may have left, that this one no longer has.
_OURS = ("pictures/step-*.png", "pictures/curves.png", EVAL_RESULTS_NAME, "model*.safetensors*")


def code_files(folder: Path) -> list[str]:
    """The modules that an `auto_map` points at, and all that these import; sorted, whether they exist or not."""
    targets: list[str] = []
    for name in ("config.json", "preprocessor_config.json"):
        for target in ((read_json(folder / name) or {}).get("auto_map") or {}).values():
            targets += target.values() if isinstance(target, dict) else [target]  # an image processor has backends
    waiting, names = {target.split("--")[-1].split(".")[0] for target in targets}, set()
    while waiting:
        names.add(name := waiting.pop())
        path = folder / f"{name}.py"
        if path.is_file():
            waiting |= set(_IMPORT.findall(path.read_text(encoding="utf-8"))) - names
    return sorted(f"{name}.py" for name in names)


def linked_pictures(folder: Path) -> list[str]:
    """Files that the card shows, relative to the folder; sorted, whether they exist or not."""
    card = folder / CARD_NAME
    links = set(_LINK.findall(card.read_text(encoding="utf-8"))) if card.is_file() else set()
    return sorted(link for link in links if "://" not in link)


def hub_files(folder: str | os.PathLike) -> list[str]:
    """Files of an output folder that belong on the Hub and are there, as paths relative to it.

    Weights, configuration, the model's code, image processor, card, the pictures that it shows, and scores. Neither
    checkpoints nor optimiser states, data or logs; nor `training_args.bin`, which holds paths and may hold a token.
    """
    folder = Path(folder)
    names = [CARD_NAME, "config.json", "preprocessor_config.json", INDEX_NAME]
    names += [*weight_files(folder), *code_files(folder), *linked_pictures(folder), EVAL_RESULTS_NAME]
    if WEIGHTS_NAME in names:
        names.remove(INDEX_NAME)  # of an earlier save
    root = folder.resolve()
    inside = [name for name in names if (folder / name).resolve().is_relative_to(root)]
    return [name for name in inside if (folder / name).is_file()]


def check_folder(folder: str | os.PathLike, progress: Callable[[list], Any] = iter) -> None:
    """Refuses a folder that would not load, or whose weights are broken; reads every weight.

    Args:
        folder: Output folder of a run, or what `save_pretrained` wrote.
        progress: Wraps the list of weight files, to show how far it is.

    Raises:
        InputError: It says everything that is wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is no folder; name the output folder of a run.")
    needed = ["config.json", "preprocessor_config.json", *code_files(folder)]
    problems = missing_files(folder, needed) + weight_problems(folder, progress)
    if problems:
        raise InputError(f"{str(folder)!r} is not fit for the Hub: {'; '.join(problems)}.")


def missing_files(folder: Path, names: list[str]) -> list[str]:
    """A phrase for each of the files that is not in the folder."""
    return [f"{name} is missing" for name in names if not (folder / name).is_file()]


def weight_problems(folder: Path, progress: Callable[[list], Any] = iter, values: bool = True) -> list[str]:
    """What is wrong with a folder's weights, a phrase each; with `values` every weight is read.

    Raises:
        InputError: Their index is broken.
    """
    files, problems = weight_files(folder), []
    for file in progress(list(files)):
        try:
            with safe_open(folder / file, "pt") as weights:  # compares the lengths in its header with the file's
                names = sorted(weights.keys())
                not_finite = [name for name in names if values and not torch.isfinite(weights.get_tensor(name)).all()]
        except FileNotFoundError:
            problems.append(f"{file} is missing")
        except (SafetensorError, OSError) as error:
            problems.append(f"{file} cannot be read: {error}")
        else:
            lacking = sorted(files[file].difference(names))
            for verb, bad in (("lacks", lacking), ("holds values that are not finite, in", not_finite)):
                more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
                problems += [f"{file} {verb} {bad[0]}{more}"] if bad else []
    return problems if files else [f"there are no weights ({WEIGHTS_NAME})"]


def check_card(folder: str | os.PathLike) -> None:
    """Refuses a card that is missing, has no front matter, or shows pictures that are not there.

    Raises:
        InputError: It says what is wrong.
    """
    folder = Path(folder)
    card = folder / CARD_NAME
    if not card.is_file():
        raise InputError(f"{str(folder)!r} has no {CARD_NAME}; make one with `clmae card {folder}`.")
    problems = missing_files(folder, linked_pictures(folder))
    try:
        metadata = metadata_load(card) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"the front matter of {card} cannot be read: {error}") from error
    problems += [f"its front matter has no `{key}`" for key in ("library_name", "license") if not metadata.get(key)]
    if problems:
        raise InputError(f"{card} is not complete: {'; '.join(problems)}.")


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    commit_message: str = "Upload model",
    files: list[str] | None = None,
    path_in_repo: str = "",
    token: str | None = None,
    revision: str | None = None,
) -> CommitInfo:
    """Puts a folder into an existing repository, in one commit: all of it or nothing. What is there already stays.

    Args:
        folder: Output folder of a run.
        repo_id: `owner/name`.
        commit_message, token, revision: As `huggingface_hub.create_commit`'s.
        files: Paths relative to the folder; [`hub_files`] if not given, and pictures and weights of an earlier upload
            that are no longer among them are deleted.
        path_in_repo: Folder in the repository.
    """
    api, folder = HfApi(), Path(folder)
    names = hub_files(folder) if files is None else files
    prefix = f"{path_in_repo}/" if path_in_repo else ""
    operations: list[Any] = [CommitOperationAdd(f"{prefix}{name}", folder / name) for name in names]
    if files is None:
        there = api.list_repo_files(repo_id, revision=revision, token=token)
        stale = [name for name in there if any(fnmatch.fnmatch(name, pattern) for pattern in _OURS)]
        operations += [CommitOperationDelete(name) for name in stale if name not in names]
    # Not by `upload_folder`, which may take several commits for many or large files.
    return api.create_commit(repo_id, operations, commit_message=commit_message, token=token, revision=revision)
