# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Folders that are whole or do not count: checkpoints and models sealed by a manifest, one run at a time in each.

The manifest names every file that belongs, with its size and checksum, and is written last: a folder in which a save
was cut off has none, and one that was damaged later does not fit it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers.utils import logging

from clmae.configuration.errors import InputError
from clmae.model_cards.files import replacing

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

logger = logging.get_logger(__name__)

MANIFEST_NAME = "sealed.json"
LOCK_NAME = "run.lock"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_DELETED = ".deleted"
_CHUNK = 1 << 22  # bytes read at once
_locked: set[str] = set()  # by this process, which its own lock would not keep out


# -- manifests --------------------------------------------------------------------------------------------------------


def seal(folder: str | os.PathLike, names: Iterable[str] | None = None) -> None:
    """Writes the manifest of a folder whose files are complete; only then do they count.

    All of it is on the disk when this returns, and the manifest appears whole or not at all.

    Args:
        folder: With the files.
        names: Which of them belong, relative to the folder; all, also in sub-folders, if not given.
    """
    folder = Path(folder)
    paths = [p for p in folder.rglob("*") if p.is_file()] if names is None else [folder / name for name in names]
    paths = sorted(path for path in paths if path.name != MANIFEST_NAME)
    files = {p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "crc32": checksum(p)} for p in paths}
    for path in {*paths, *(path.parent for path in paths)}:
        _flush(path)
    with replacing(folder / MANIFEST_NAME) as unfinished:
        manifest = {"files": files, "crc32": _checksum_of_entries(files)}
        unfinished.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _flush(unfinished)
    _flush(folder)
    _flush(folder.parent)


def unseal(folder: str | os.PathLike) -> None:
    """Takes the manifest away, before files change."""
    Path(folder, MANIFEST_NAME).unlink(missing_ok=True)


def is_sealed(folder: str | os.PathLike) -> bool:
    """Whether there is a manifest; whether the files fit it, [`verify`] tells."""
    return Path(folder, MANIFEST_NAME).is_file()


def verify(folder: str | os.PathLike) -> list[str]:
    """Reads every file of a sealed folder, and says what is wrong; files that the manifest does not name may be there.

    Returns:
        A sentence a problem: no manifest, or a file that is missing, has another size, or another checksum.
    """
    folder = Path(folder)
    if not is_sealed(folder):
        return [f"it is not sealed: there is no {MANIFEST_NAME}, as if its save had been cut off."]
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["crc32"] != _checksum_of_entries(files):
            return [f"{MANIFEST_NAME} has changed: its checksum is not the one of what was saved."]
        expected = {str(name): (int(entry["size"]), int(entry["crc32"])) for name, entry in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        return [f"{MANIFEST_NAME} cannot be read: {type(error).__name__}: {error}."]
    return [problem for name, entry in expected.items() if (problem := _problem(folder, name, *entry))]


def _problem(folder: Path, name: str, size: int, crc32: int) -> str | None:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return f"{MANIFEST_NAME} names {name!r}, which is outside of the folder."
    try:
        if not path.is_file():
            return f"{name} is missing."
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, but {size:,} were written."
        return (
            None if checksum(path) == crc32 else f"{name} has changed: its checksum is not the one of what was saved."
        )
    except (OSError, ValueError) as error:
        return f"{name} cannot be read: {error}."


def _checksum_of_entries(files: Any) -> int:
    return zlib.crc32(json.dumps(files, sort_keys=True).encode())


def checksum(path: str | os.PathLike) -> int:
    """CRC-32 of a file; it finds damage, not malice."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name == "nt":  # flushes files that are open for writing only, and no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint_step(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """All checkpoints of an output folder, whole or not, by their steps."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if _CHECKPOINT.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=checkpoint_step)


def last_valid_checkpoint(output_dir: str | os.PathLike) -> tuple[Path | None, dict[Path, list[str]]]:
    """The newest checkpoint of an output folder that [`verify`] has nothing against.

    Returns:
        `(checkpoint, passed_over)`: `None` if there is no valid one; and the newer ones, each with its problems.
    """
    passed_over = {}
    for checkpoint in reversed(checkpoints(output_dir)):
        problems = verify(checkpoint)
        if not problems:
            return checkpoint, passed_over
        passed_over[checkpoint] = problems
    return None, passed_over


def choose_checkpoint(wanted: str | os.PathLike | bool | None, output_dir: str | os.PathLike) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means; `True` is the newest valid one, with a warning of others.

    One that is named may be unsealed (another program may have written it), which is warned about.

    Raises:
        InputError: There is no valid checkpoint, or the one that was named is damaged; with what is wrong.
    """
    if not wanted:
        return None
    if wanted is True:
        checkpoint, passed_over = last_valid_checkpoint(output_dir)
        reasons = [f"{path.name}: {' '.join(problems)}" for path, problems in passed_over.items()]
        if checkpoint is None:
            raise InputError(
                f"`resume_from_checkpoint` is true, but `output_dir` {str(output_dir)!r} holds no valid checkpoint"
                f"{': ' + ' '.join(reasons) if reasons else '.'} Start anew in another folder."
            )
        for reason in reasons:
            logger.warning(f"Passed over {reason}")
        if reasons:
            logger.warning(f"Resuming from {checkpoint.name}, the newest valid checkpoint.")
        return str(checkpoint)
    if not Path(wanted).is_dir():
        raise InputError(f"`resume_from_checkpoint` is {str(wanted)!r}, but there is no such folder.")
    problems = verify(wanted)
    if problems and is_sealed(wanted):
        raise InputError(
            f"`resume_from_checkpoint` is {str(wanted)!r}, which is damaged: {' '.join(problems)} Name an earlier "
            "checkpoint, or give true (on the command line: last) for the newest valid one."
        )
    if problems:
        logger.warning(f"{wanted} has no {MANIFEST_NAME}: whether it is whole cannot be told.")
    return str(wanted)


def rotate_checkpoints(
    output_dir: str | os.PathLike, step: int, limit: int | None, best: str | os.PathLike | None = None
) -> None:
    """Deletes checkpoints beyond `limit`: first those of later steps, which a run left that this one went back behind.

    By their steps and not by time: a clock may be set back. Each goes aside first: a half-deleted one, where a run is
    killed at that moment, must not look like a damaged checkpoint. The next rotation deletes the rest.

    Args:
        output_dir: With the checkpoints.
        step: Of the newest one, which stays, and is sealed.
        limit: How many stay; all if `None` or below 1.
        best: One that stays as well.
    """
    if limit is None or limit < 1:
        return
    found = sorted(checkpoints(output_dir), key=lambda path: (checkpoint_step(path) <= step, checkpoint_step(path)))
    same = best and os.path.realpath(best)
    kept = [path for path in found if checkpoint_step(path) == step or os.path.realpath(path) == same]
    others = [path for path in found if path not in kept]
    for path in others[: max(0, len(found) - max(limit, len(kept)))]:
        with contextlib.suppress(OSError):
            path.replace(path.with_name(f".{path.name}{_DELETED}"))
    for path in Path(output_dir).glob(f".checkpoint-*{_DELETED}"):
        shutil.rmtree(path, ignore_errors=True)


# -- one run at a time ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def run_lock(output_dir: str | os.PathLike) -> Iterator[None]:
    """Keeps other runs out of an output folder, which is made if it is not there.

    The operating system's lock: it ends with the process, however that ends. Where there are none (Windows, some
    network drives), nothing is locked.

    Raises:
        InputError: Another run holds it, or the folder cannot be written to.
    """
    folder = os.path.realpath(output_dir)
    path = Path(folder, LOCK_NAME)
    if folder in _locked:
        raise InputError(f"`output_dir` {str(output_dir)!r} is in use by another run of this process.")
    try:
        os.makedirs(folder, exist_ok=True)
        descriptor = _lock(path)
    except BlockingIOError:
        raise InputError(
            f"`output_dir` {str(output_dir)!r} is in use by another run{_holder(path)}: wait for its end, or choose "
            "another folder."
        ) from None
    except OSError as error:
        raise InputError(f"`output_dir` {str(output_dir)!r} cannot be written to: {error}.") from error
    _locked.add(folder)
    try:
        yield
    finally:
        _locked.discard(folder)
        if descriptor is not None:
            with contextlib.suppress(OSError):  # what ended the run may have taken the folder, too
                path.unlink()
            os.close(descriptor)


def _lock(path: Path) -> int | None:
    """An open lock file, locked by this process alone; `None` where the file system has no locks."""
    if fcntl is None:
        return None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # A record lock: unlike flock's, worker processes do not inherit it, and cannot outlive the run with it.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
                return descriptor
        except FileNotFoundError:
            pass  # the run before ended in between, and took its file away: lock the next one
        except (BlockingIOError, PermissionError) as error:
            os.close(descriptor)
            raise BlockingIOError from error
        except OSError as error:
            os.close(descriptor)
            logger.warning(f"{path.parent} cannot be locked ({error}): take care that no other run writes to it.")
            return None
        os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        holder: Any = json.loads(path.read_text(encoding="utf-8"))
        return f" (process {holder['pid']} on {holder['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


__all__ = [
    "LOCK_NAME",
    "MANIFEST_NAME",
    "checkpoint_step",
    "checkpoints",
    "choose_checkpoint",
    "is_sealed",
    "last_valid_checkpoint",
    "rotate_checkpoints",
    "run_lock",
    "seal",
    "unseal",
    "verify",
]
