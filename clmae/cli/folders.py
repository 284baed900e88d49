# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What `clmae convert` and `clmae export` share: the arguments SRC and DST, and a folder that is whole or not there."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from clmae.cli.options import nearest
from clmae.configuration.errors import InputError


class PathsParser(argparse.ArgumentParser):
    """A parser of `SRC DST` and options, that raises [`InputError`] instead of exiting."""

    def __init__(self, prog: str, description: str, examples: str):
        super().__init__(
            prog,
            description=f"{description}\n\nexamples:\n{examples}",
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110),
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(message.replace("the following arguments are required", "missing"))

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments; a misspelt option is named before what is missing."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        for argument in argv:
            option = argument.partition("=")[0]
            if option.startswith("--") and option not in known:
                raise InputError(f"unknown option {option!r}{nearest(option, known)}")
        return self.parse_args(list(argv))


@contextlib.contextmanager
def new_folder(destination: str) -> Iterator[Path]:
    """A folder to write into, beside `destination`, which it becomes at the end; after an error nothing is left.

    Raises:
        InputError: `destination` is a file, or a folder that holds something.
    """
    target = Path(destination)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"DST {destination!r} exists and is not empty; name a new folder.")
    made = [parent for parent in target.parents if not parent.exists()]
    folder = target.with_name(f".{target.name}.{os.getpid()}")
    folder.mkdir(parents=True)
    try:
        yield folder
        if target.exists():
            target.rmdir()
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            parent.rmdir()
        raise
