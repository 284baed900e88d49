# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The folder that `clmae convert` and `clmae export` write."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from clmae.configuration.errors import InputError


@contextlib.contextmanager
def new_folder(destination: str) -> Iterator[Path]:
    """A folder to write into, which is renamed to `destination` at the end; after an error nothing is left.

    Raises:
        InputError: `destination` is a file, or a folder that holds something.
    """
    target = Path(destination)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"DST {destination!r} exists and is not empty; name a new folder.")
    new_parents = [parent for parent in target.parents if not parent.exists()]
    folder = target.with_name(f".{target.name}.{os.getpid()}")
    folder.mkdir(parents=True)
    try:
        yield folder
        if target.exists():
            target.rmdir()
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in new_parents:
            parent.rmdir()
        raise
