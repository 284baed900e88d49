# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Integrity of checkpoints and models: manifests, the choice of a valid checkpoint, rotation, one run per folder.

A manifest names every file that belongs to a folder, with its size and checksum. It is written last: a folder whose
save was cut off has none, and a folder that was damaged later does not match it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import safe_open
from transformers.utils import logging

from clmae.configuration.errors import InputError
from clmae.model_cards.files import replacing

logger = logging.get_logger(__name__)

MANIFEST_NAME = "sealed.json"
LOCK_NAME = "run.lock"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_DELETED = ".deleted"
_CHUNK = 1 << 22  # bytes read at once


# -- manifests --------------------------------------------------------------------------------------------------------


def seal(folder: str | os.PathLike, names: Iterable[str] | None = None) -> None:
    """Writes the manifest of a folder whose files are complete; everything is on the disk when this returns.

    Args:
        folder: With the files.
        names: Which of them belong, relative to the folder; by default all, also in sub-folders.
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
    """Removes the manifest, before files change."""
    Path(folder, MANIFEST_NAME).unlink(missing_ok=True)


def is_sealed(folder: str | os.PathLike) -> bool:
    """Whether there is a manifest; whether the files match it, [`verify`] says."""
    return Path(folder, MANIFEST_NAME).is_file()


def verify(folder: str | os.PathLike) -> list[str]:
    """Reads every file that the manifest of a folder names; files that it does not name may be there.

    Returns:
        A sentence per problem: no manifest, or a file that is missing, has another size, or another checksum.
    """
    folder = Path(folder)
    if not is_sealed(folder):
        return [f"it is not sealed: there is no manifest ({MANIFEST_NAME}), as if its save had been cut off."]
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
        if checksum(path) != crc32:
            return f"{name} has changed: its checksum is not the one of what was saved."
    except (OSError, ValueError) as error:
        return f"{name} cannot be read: {error}."
    return None


def _checksum_of_entries(files: Any) -> int:
    return zlib.crc32(json.dumps(files, sort_keys=True).encode())


def checksum(path: str | os.PathLike) -> int:
    """CRC-32 of a file; it reveals damage, not malice."""
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
    """All checkpoints of an output folder, valid or not, by their steps."""
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if _CHECKPOINT.fullmatch(p.name) and p.is_dir()]
    return sorted(folders, key=checkpoint_step)


def last_valid_checkpoint(output_dir: str | os.PathLike) -> tuple[Path | None, dict[Path, list[str]]]:
    """The newest checkpoint of an output folder in which [`verify`] sees no problem.

    Returns:
        `(checkpoint, passed_over)`: `None` if there is no valid one; and the newer ones, each with its problems.
    """
    passed_over: dict[Path, list[str]] = {}
    for checkpoint in reversed(checkpoints(output_dir)):
        problems = verify(checkpoint)
        if not problems:
            return checkpoint, passed_over
        passed_over[checkpoint] = problems
    return None, passed_over


def choose_checkpoint(resume: str | os.PathLike | bool | None, output_dir: str | os.PathLike) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means; `True` is the newest valid one, with a warning of others.

    One that is named may be without a manifest (another program may have written it), which is warned about.

    Raises:
        InputError: There is no valid checkpoint, or the one that was named is damaged; the message says how.
    """
    if not resume:
        return None
    if resume is True:
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
    if not Path(resume).is_dir():
        raise InputError(f"`resume_from_checkpoint` is {str(resume)!r}, but there is no such folder.")
    problems = verify(resume)
    if problems and is_sealed(resume):
        raise InputError(
            f"`resume_from_checkpoint` is {str(resume)!r}, which is damaged: {' '.join(problems)} Name an earlier "
            "checkpoint, or give true (on the command line: last) for the newest valid one."
        )
    if problems:
        logger.warning(f"{resume} has no manifest ({MANIFEST_NAME}): whether it is complete cannot be checked.")
    return str(resume)


def check_shapes(checkpoint: str | os.PathLike, weights: Mapping[str, Any]) -> None:
    """Refuses a checkpoint whose tensors have other shapes than those of `weights`, by name.

    Raises:
        InputError: See above. Checkpoints in another form than one safetensors file are not looked at.
    """
    path = Path(checkpoint, "model.safetensors")
    if not path.is_file():
        return
    with safe_open(path, framework="pt") as file:
        for name in sorted(weights.keys() & set(file.keys())):
            saved, shape = tuple(file.get_slice(name).get_shape()), tuple(weights[name].shape)
            if saved != shape:
                raise InputError(
                    f"`resume_from_checkpoint` is {str(checkpoint)!r}, where {name} has shape {saved}, but in this "
                    f"model {shape}: resume with the options of that run (its config.json has them)."
                )


def rotate_checkpoints(
    output_dir: str | os.PathLike, step: int, limit: int | None, best: str | os.PathLike | None = None
) -> None:
    """Deletes checkpoints beyond `limit`: first those of later steps, which a run left that went on from before them.

    By their steps and not by time: a clock may be set back. Each is renamed first, so that a half-deleted one, where a
    run is killed at that moment, does not look like a damaged checkpoint. The next rotation deletes the rest.

    Args:
        output_dir: With the checkpoints.
        step: Of the newest one, which stays.
        limit: How many stay; all if `None` or below 1.
        best: One that stays as well.
    """
    if limit is None or limit < 1:
        return
    folders = sorted(checkpoints(output_dir), key=lambda path: (checkpoint_step(path) <= step, checkpoint_step(path)))
    best = best and os.path.realpath(best)
    kept = [path for path in folders if checkpoint_step(path) == step or os.path.realpath(path) == best]
    others = [path for path in folders if path not in kept]
    for path in others[: max(0, len(folders) - max(limit, len(kept)))]:
        with contextlib.suppress(OSError):
            path.replace(path.with_name(f".{path.name}{_DELETED}"))
    for path in Path(output_dir).glob(f".checkpoint-*{_DELETED}"):
        shutil.rmtree(path, ignore_errors=True)


# -- one run at a time ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def run_lock(output_dir: str | os.PathLike, argument: str = "output_dir") -> Iterator[None]:
    """Keeps other runs out of an output folder, which is made if it is not there; messages call it `argument`.

    The operating system's lock: it ends with the process, however that ends.

    Raises:
        InputError: Another run holds it, or the folder cannot be written to.
    """
    path = Path(os.path.realpath(output_dir), LOCK_NAME)
    lock = FileLock(path, timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise InputError(
            f"`{argument}` {str(output_dir)!r} is in use by another run{_holder(path)}: wait for its end, or choose "
            "another folder."
        ) from None
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", errno.ENOLCK) not in (errno.ENOLCK, errno.ENOTSUP):
            raise InputError(f"`{argument}` {str(output_dir)!r} cannot be written to: {error}.") from error
        # A file system without locks.
        logger.warning(f"{path.parent} cannot be locked ({error}): take care that no other run writes to it.")
    try:
        with contextlib.suppress(OSError):  # Windows lets nobody write to a locked file
            path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        with contextlib.suppress(OSError):  # what ended the run may have removed the folder, too
            path.unlink()
        lock.release()


def _holder(path: Path) -> str:
    try:
        holder: Any = json.loads(path.read_text(encoding="utf-8"))
        pid, host = holder["pid"], holder["host"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return " of this process" if (pid, host) == (os.getpid(), socket.gethostname()) else f" (process {pid} on {host})"
