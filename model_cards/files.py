# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Files that appear whole or not at all, whatever comes between."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of `path` at the end; after an error all is as before.

    It is an empty file in the folder of `path`, which is made if there is none; its mode is that of any new file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not with the suffix of `path`, by which others might find it; and another one in each process.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors makes files for their owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file (UTF-8, line ends as they are): it appears complete or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")
