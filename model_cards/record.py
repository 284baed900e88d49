# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What a pretraining run writes down about itself, beside its weights, for the card that is made of it later."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clmae.configuration.errors import InputError
from clmae.model_cards.files import write_whole

if TYPE_CHECKING:  # of a checkpoint that is only read no Trainer is needed, and its import takes a second
    from transformers import Trainer, TrainingArguments

RECORD_NAME = "pretraining.json"
_PACKAGES = ("clmae", "torch", "torchvision", "transformers", "accelerate", "datasets")
# Of the machine or of how the run was watched, not of what was learned.
# fmt: off
_NOT_RECORDED = frozenset((
    "accelerator_config", "ddp_backend", "ddp_timeout", "deepspeed", "disable_tqdm", "do_eval", "do_train", "fsdp",
    "fsdp_config", "local_rank", "log_level", "output_dir", "overwrite_output_dir", "parallelism_config", "project",
    "push_to_hub", "report_to", "resume_from_checkpoint", "run_name", "trackio_space_id", "use_cpu",
))
# fmt: on
_NOT_RECORDED_PREFIXES = ("dataloader_num", "dataloader_p", "hub_", "logging_", "save_")


class RunRecord:
    """Sessions of a run, and how it was set up; [`RunRecord.write`] puts them into `pretraining.json`.

    A session is what one process did between start or resume and its last save. Paths and tokens are left out.

    Attributes:
        sessions: First and last optimiser step, seconds, device and number of processes of each.
        data: Description of the data, as [`describe_data`] gives it; `None` where nobody gave one.
    """

    def __init__(self, data: dict[str, Any] | None = None):
        self.sessions: list[dict[str, Any]] = []
        self.data = data
        self._started: float | None = None

    def start(self, checkpoint: str | None, args: TrainingArguments) -> None:
        """A session begins, at step 0 or where a checkpoint folder left off."""
        folder = Path(checkpoint) if checkpoint else None
        self.sessions = (read_json(folder / RECORD_NAME) or {}).get("sessions", []) if folder else []
        state = read_json(folder / "trainer_state.json") if folder else None
        first = state["global_step"] if state else 0
        self.sessions.append(
            {"first_step": first, "last_step": first, "seconds": 0.0, "device": device_name(args.device)}
            | {"num_processes": args.world_size}
        )
        self._started = time.perf_counter()

    def update(self, step: int) -> None:
        """The session that runs has come to `step`."""
        if self._started is not None:
            self.sessions[-1].update(last_step=step, seconds=round(time.perf_counter() - self._started, 1))

    def stop(self, step: int) -> None:
        """The session ends; what follows (evaluation, uploads) is no pretraining time."""
        self.update(step)
        self._started = None

    def write(self, folder: str | os.PathLike, trainer: Trainer) -> None:
        """Writes `pretraining.json` into a folder."""
        self.update(trainer.state.global_step)
        args, held_out = trainer.args, trainer.eval_dataset
        if isinstance(held_out, dict):
            held_out = next(iter(held_out.values()), None)
        record = {
            "sessions": self.sessions,
            "total_train_batch_size": args.total_train_batch_size,
            "seed": args.seed,
            "arguments": changed_arguments(args),
            "data": {
                **(self.data or {}),
                "num_train_images": num_images(trainer.train_dataset),
                "num_held_out_images": 0 if held_out is None else num_images(held_out),
            },
            "versions": _versions(),
        }
        write_whole(Path(folder, RECORD_NAME), json.dumps(record, indent=2) + "\n")


def describe_data(arguments: Any) -> dict[str, Any]:
    """The fields of a `DataArguments` that differ from their defaults; of a local dataset only its name.

    The entry `dataset` is a Hub id if `dataset_on_hub` is true, otherwise the name of a file or folder.
    """
    options = {}
    for field in dataclasses.fields(arguments):
        if field.name != "dataset" and getattr(arguments, field.name) != field.default:
            options[field.name] = getattr(arguments, field.name)
    on_hub = not Path(arguments.dataset).expanduser().exists()
    return {"dataset": _public_name(arguments.dataset), "dataset_on_hub": on_hub, "options": options}


def _public_name(source: str) -> str:
    """A Hub id as it is; of a file or folder its name alone."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


def changed_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Training arguments that differ from their defaults and say something about the training; no paths, no tokens."""
    values = args.to_dict()  # enumerations as their values, tokens masked
    changed = {}
    for field in dataclasses.fields(args):
        name, value = field.name, values.get(field.name)
        default: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if not field.init or name in _NOT_RECORDED or name.startswith(_NOT_RECORDED_PREFIXES):
            continue
        if name == "init" and value:
            changed[name] = _public_name(value)
            continue
        # What is off either way (False, None, an empty list) is no difference.
        if (value or default) and value not in (getattr(default, "value", default), None) and _shareable(value):
            changed[name] = value
    return changed


def _shareable(value: Any) -> bool:
    """Whether a value is a number, a word, or made of these; anything that may be a path is not."""
    if isinstance(value, (dict, list, tuple)):
        return all(map(_shareable, value.values() if isinstance(value, dict) else value))
    return isinstance(value, (bool, int, float)) or (isinstance(value, str) and not set(value) & set("/\\~:"))


def num_images(dataset: Any) -> int | None:
    """Images of a dataset; `None` of a stream."""
    return len(dataset) if hasattr(dataset, "__len__") else None


def device_name(device: torch.device) -> str:
    """What the run computed on, such as `"NVIDIA H100 80GB HBM3"` or `"CPU (2 threads)"`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({threads} thread{'s' * (threads > 1)})" if device.type == "cpu" else device.type


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue  # used from a checkout that is not installed
    return versions


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file holds; `None` if there is no such file.

    Raises:
        InputError: The file is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path} is no JSON file ({error}); remove or restore it.") from error
