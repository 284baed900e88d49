# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What an output folder tells about the model in it and how it was trained."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.trainer_utils import get_last_checkpoint

from clmae.configuration.errors import InputError
from clmae.model_cards.record import RECORD_NAME, read_json

WEIGHTS_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
FAMILIES = {"mae": "MAE", "vit_mae": "MAE", "cl_mae": "CL-MAE", "cmae": "CMAE"}  # that cards are made for


@dataclass(frozen=True)
class Run:
    """What an output folder tells about the model in it.

    Attributes:
        config: `config.json`.
        record: `pretraining.json`, empty for a run that wrote none.
        state: `trainer_state.json`, empty if there is none.
        results: What `clmae pretrain` saved of its last evaluation.
        evaluations: What `clmae evaluate --output` wrote into the folder.
        pictures: Paths relative to the folder: `curves` and, by their steps, masks and reconstructions.
        num_parameters: Of the whole model and of its encoder.
    """

    folder: Path
    config: dict[str, Any]
    record: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    curves: str | None = None
    pictures: dict[int, str] = field(default_factory=dict)
    num_parameters: tuple[int, int] = (0, 0)


def read_run(folder: str | os.PathLike) -> Run:
    """Reads an output folder.

    Raises:
        InputError: It holds no model of a family that cards are made for, or a broken file.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if config is None:
        raise InputError(f"{str(folder)!r} holds no model: there is no config.json in it.")
    if config.get("model_type") not in FAMILIES:
        raise InputError(
            f"{str(folder)!r} holds a model of type {config.get('model_type')!r}; cards are made for "
            f"{', '.join(FAMILIES)}."
        )
    evaluations = []
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        if isinstance(content, dict) and {"protocol", "rows", "settings"} <= content.keys():
            evaluations.append(content)
    pictures = {int(path.stem.removeprefix("step-")): path.name for path in folder.glob("pictures/step-*.png")}
    return Run(
        folder=folder,
        config=config,
        record=read_json(folder / RECORD_NAME) or {},
        state=read_json(folder / "trainer_state.json") or {},
        results=read_json(folder / "pretrain_results.json") or {},
        evaluations=evaluations,
        curves="pictures/curves.png" if (folder / "pictures/curves.png").is_file() else None,
        pictures={step: f"pictures/{name}" for step, name in sorted(pictures.items())},
        num_parameters=count_parameters(folder),
    )


def read_model_config(model_path: str | os.PathLike, name: str = "`model`", **kwargs: Any) -> PreTrainedConfig:
    """The configuration of a saved model; read first, it says at once and clearly that there is none.

    Args:
        model_path: Folder or Hub id of anything that `AutoConfig` loads.
        name: What messages call it.
        kwargs: Of `AutoConfig.from_pretrained`.

    Raises:
        InputError: There is no such model, or its configuration cannot be read.
    """
    path = os.fspath(model_path)
    problem = None
    if Path(path).is_dir():
        if not Path(path, "config.json").is_file():
            problem = "there is no config.json in this folder."
            if newest := get_last_checkpoint(path):
                problem += f" The run in it has not ended; its newest checkpoint is {newest}."
    elif Path(path).exists():
        problem = "it is a file; give the folder of a model (`clmae convert` makes one of a checkpoint)."
    else:
        try:
            validate_repo_id(path)
        except HFValidationError:
            problem = "there is no such folder."
    if problem is None:
        try:
            return AutoConfig.from_pretrained(path, **kwargs)
        except (OSError, ValueError) as error:
            problem = str(error) if Path(path).is_dir() else f"there is no such folder, and as a Hub id: {error}"
    raise InputError(f"{name} {path!r} cannot be loaded: {problem}")


def weight_files(folder: Path) -> dict[str, set[str]]:
    """The safetensors files of a folder's weights: one, or the shards of an index, with the names that it says of each.

    Raises:
        InputError: The index is broken.
    """
    if (folder / WEIGHTS_NAME).is_file():
        return {WEIGHTS_NAME: set()}
    index = read_json(folder / INDEX_NAME)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    files: dict[str, set[str]] = {}
    for name, file in sorted(weight_map.items()) if isinstance(weight_map, dict) else ():
        files.setdefault(str(file), set()).add(name)
    if index is not None and not files:
        raise InputError(f"{INDEX_NAME} names no weights.")
    return files


def count_parameters(folder: Path) -> tuple[int, int]:
    """Parameters in the weights of a folder: all of them, and the encoder's; read from the files' headers."""
    total = encoder = 0
    for name in weight_files(folder):
        with safe_open(folder / name, "pt") as file:
            sizes = {key: math.prod(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        total += sum(sizes.values())
        encoder += sum(size for key, size in sizes.items() if key.startswith("vit."))
    return total, encoder or total
