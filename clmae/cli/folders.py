# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Folders of models: reading whole ones, and writing new ones."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from clmae.configuration.errors import InputError


def load_whole(model_class: Any, name: str, argument: str, **options: Any) -> PreTrainedModel:
    """The model of a folder or Hub id, for inference; transformers would draw missing weights at random.

    Args:
        model_class, options: Whose `from_pretrained` loads it, and what else that takes.
        argument: What messages call `name`.

    Raises:
        InputError: It cannot be loaded, or its weights are not complete.
    """
    try:
        model, report = model_class.from_pretrained(name, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{argument} {name!r} cannot be loaded: {error}") from error
    if report["missing_keys"]:
        what = f"no whole {type(model).__name__}: its weights lack {min(report['missing_keys'])}"
        raise InputError(f"{argument} {name!r} is {what}; give a folder that holds all of the model.")
    return model.eval()


@contextlib.contextmanager
def new_folder(destination: str) -> Iterator[Path]:
    """A folder to write into, which is renamed to `destination` at the end; after an error nothing is left.

    Raises:
        InputError: `destination` is a file, or a folder that holds something.
    """
    target = Path(destination)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"DST {destination!r} exists and is not empty; name a new folder.")
    parent = next(parent for parent in target.absolute().parents if parent.exists())
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=parent) as temporary:
        folder = Path(temporary, target.name)  # with the mode of any new folder
        folder.mkdir()
        yield folder
        if target.exists():
            target.rmdir()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
