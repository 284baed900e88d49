# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Processes for tests, forked from a server that has imported the libraries: they start in a tenth of a second, not 8.

The server does not import `clmae`, and its huggingface_hub talks to the tests' own Hub. Nothing here may import
`clmae`: what runs without it comes through this module.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ["torch", "torchvision.transforms.v2", "transformers.trainer", "transformers.pipelines", "datasets"]
LIBRARIES += ["evaluate", "matplotlib.pyplot", "pandas", "sklearn.neighbors", "psutil"]


class Refuse:
    """Finds no `clmae`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "clmae":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def script(program: Path | str, *arguments: str) -> None:
    """Runs a file, or code, as `python` does."""
    sys.argv = [str(program) if isinstance(program, Path) else "-c", *map(str, arguments)]
    if isinstance(program, Path):
        sys.path.insert(0, str(program.parent))
        runpy.run_path(str(program), run_name="__main__")
    else:
        sys.path.insert(0, "")
        exec(compile(program, "-c", "exec"), {"__name__": "__main__"})


def _enter(
    target: Callable[..., Any], args: tuple[Any, ...], folder: Path, log: Path, environment: dict[str, str], clmae: bool
) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    for number, name in enumerate(("stdout", "stderr"), start=1):
        file = log.with_suffix(f".{name}").open("a", buffering=1)
        os.dup2(file.fileno(), number)
        setattr(sys, name, file)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # its own processes start as they do everywhere
    if not clmae:
        sys.meta_path.insert(0, Refuse())
    sys.exit(target(*args))


class Started:
    """A process, the leader of a group of its own, and what it prints."""

    def __init__(self, process: Any, log: Path) -> None:
        self.process, self.pid = process, process.pid
        self._stdout, self._stderr = log.with_suffix(".stdout"), log.with_suffix(".stderr")

    @property
    def stdout(self) -> str:
        return self._stdout.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self._stderr.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self.process.exitcode is None

    def signal(self, number: int) -> None:
        """To the whole group, as a terminal sends it."""
        os.killpg(self.pid, number)

    def wait(self, timeout: float = 300) -> int:
        """The exit code; minus the signal's number if one ended it."""
        self.process.join(timeout)
        assert not self.running, f"still running after {timeout} s:\n{self.stderr[-3000:]}"
        return self.process.exitcode


class Processes:
    """Starts processes that run a function, which must be importable, as `script` and functions of test modules are.

    Args:
        folder: For caches and what the processes print.
        environment: Of the server, beside this process's own.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.started = folder, list[Started]()
        kept = dict(os.environ)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(LIBRARIES)
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
            del os.environ[name]
        own = {
            "HF_HOME": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "MPLBACKEND": "agg",
        }
        os.environ.update(own | environment)
        try:
            forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(kept)

    def start(
        self,
        target: Callable[..., Any],
        *args: Any,
        folder: Path | None = None,
        environment: dict[str, str] | None = None,
        clmae: bool = True,
    ) -> Started:
        """A process that runs `target(*args)` and ends with what it returns, as `sys.exit` takes it.

        Args:
            folder: Where it works, by default where this process does.
            environment: What it adds to the server's; libraries that read it when they are imported have done so.
            clmae: Whether `clmae` can be imported.
        """
        log = self.folder / str(len(self.started))
        given = (target, args, folder or Path.cwd(), log, environment or {}, clmae)
        process = self.context.Process(target=_enter, args=given)
        process.start()
        self.started.append(Started(process, log))
        return self.started[-1]

    def run(self, target: Callable[..., Any], *args: Any, **options: Any) -> Started:
        """A process that has ended, with exit code 0; `options` as in `start`."""
        started = self.start(target, *args, **options)
        assert started.wait() == 0, started.stderr[-3000:]
        return started

    def launch(self, count: int, target: Callable[..., Any], *args: Any, **options: Any) -> list[Started]:
        """Runs `count` processes of one group as `torchrun` would. If one fails, all are ended."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        shared["LOCAL_WORLD_SIZE"] = str(count)
        group = [
            self.start(target, *args, environment={**shared, "RANK": str(i), "LOCAL_RANK": str(i)}, **options)
            for i in range(count)
        ]
        end = time.monotonic() + 300
        while any(one.running for one in group) and not any(one.process.exitcode for one in group):
            assert time.monotonic() < end, [one.stderr[-3000:] for one in group]
            time.sleep(0.02)
        for one in group:
            if one.running:
                one.signal(signal.SIGKILL)
        assert [one.wait() for one in group] == [0] * count, [one.stderr[-3000:] for one in group]
        return group

    def close(self) -> None:
        """Ends what still runs."""
        for one in self.started:
            if one.running:
                one.signal(signal.SIGKILL)
                one.process.join()
