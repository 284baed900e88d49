# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`BaseTrainer`: what pretraining and fine-tuning share."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from clmae.configuration.errors import InputError
from clmae.model_cards import hub_files
from clmae.model_cards.record import RECORD_NAME
from clmae.training.arguments import ScaledRateArguments
from clmae.training.callbacks import EpochCallback, shield_workers
from clmae.training.data import ImageDataset, StreamingImageDataset, sample_generator
from clmae.training.sealing import choose_checkpoint, rotate_checkpoints, run_lock, seal, unseal


class EpochSampler(Sampler[int]):
    """A new order of `num_samples` every epoch, as keys `epoch * num_samples + index` (see [`ImageDataset`]).

    Order and keys are functions of seed and epoch alone, so a resumed run sees what the whole run would have.
    """

    def __init__(self, num_samples: int, seed: int):
        self.num_samples = num_samples
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Takes effect when the next epoch starts."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        yield from (self.epoch * self.num_samples + self.order(self.epoch)).tolist()

    def order(self, epoch: int) -> torch.Tensor:
        """Indices in the order of an epoch."""
        # -1 is no sample's key: the order has a stream of its own.
        return torch.randperm(self.num_samples, generator=sample_generator(self.seed, epoch, -1))


class BaseTrainer(Trainer):
    """transformers' `Trainer`, as pretraining and fine-tuning use it.

    - Checkpoints and models are sealed (see [`seal`]), a run resumes only from such, and keeps other runs out of its
      output folder.
    - The order of an [`ImageDataset`], and the keys of its samples, are functions of seed and epoch.
    - Evaluation and prediction take all images, also where training leaves out an epoch's last batch.
    - Weight decay is on all that [`is_decayed`].

    Raises:
        InputError: The training set is smaller than a batch.
    """

    args: ScaledRateArguments
    _in_checkpoint = False

    def __init__(
        self,
        model: nn.Module | None,
        args: ScaledRateArguments,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *rest: Any,
        **kwargs: Any,
    ):
        batch = args.images_per_batch
        if args.dataloader_drop_last and hasattr(train_dataset, "__len__") and len(train_dataset) < batch:
            raise InputError(
                f"`per_device_train_batch_size` asks for batches of {batch} images in all, but the training set has "
                f"{len(train_dataset)}: take a smaller batch, or `dataloader_drop_last=False`."
            )
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, *rest, **kwargs)
        self.add_callback(EpochCallback(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As the Trainer's.

        Args:
            resume_from_checkpoint: A checkpoint's folder; `True` for the newest valid one of `output_dir`.
            kwargs: The Trainer's other arguments.

        Raises:
            InputError: The checkpoint is damaged, there is none, or another run uses `output_dir`.
            NonFiniteError: In pretraining, a loss or a gradient became nan or inf.
        """
        with run_lock(self.args.output_dir) if self.is_world_process_zero() else contextlib.nullcontext():
            checkpoint = self._choose_checkpoint(resume_from_checkpoint)
            if checkpoint and self.args.device.type == "cpu" and self.args.world_size > 1:
                _let_torch_load_numbered_cpus()
            return self._train_from(checkpoint, **kwargs)

    def _train_from(self, checkpoint: str | None, **kwargs: Any) -> Any:
        """The training itself, from a checkpoint that is whole."""
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _choose_checkpoint(self, wanted: str | bool | None) -> str | None:
        """As [`choose_checkpoint`]; read in one process, for all."""
        chosen: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                chosen[0] = choose_checkpoint(wanted, self.args.output_dir)
            except InputError as error:
                chosen[1] = str(error)
        checkpoint, message = broadcast_object_list(chosen)
        if message is not None:
            raise InputError(message)
        return checkpoint

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that was killed after its last checkpoint has nothing left to do; the Trainer would take another step.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # -- optimiser and data ---------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The parameters that [`is_decayed`]."""
        return [name for name, parameter in model.named_parameters() if is_decayed(parameter)]

    @property
    def data_seed(self) -> int:
        """Seed of the order of the images, and of what is drawn for a batch."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, ImageDataset):
            self.epoch_sampler = EpochSampler(len(dataset), self.data_seed)
            return self.epoch_sampler
        return super()._get_train_sampler(train_dataset)

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's loader, whose workers leave a SIGTERM to the run."""
        return shield_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The Trainer's loader, with its last batch."""
        with self._replaced(dataloader_drop_last=False):
            return shield_workers(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """The Trainer's loader, with its last batch."""
        with self._replaced(dataloader_drop_last=False):
            return shield_workers(super().get_test_dataloader(test_dataset))

    @contextlib.contextmanager
    def _replaced(self, **values: Any) -> Iterator[None]:
        # Of the arguments, for a while: the Trainer has one set of them for all loaders, but only training may leave
        # images out, and only it may do without workers; and it saves them as they are, the token among them.
        own = {name: getattr(self.args, name) for name in values}
        vars(self.args).update(values)
        try:
            yield
        finally:
            vars(self.args).update(own)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's, then sealed, and only then are older ones deleted."""
        run, limit = Path(self._get_output_dir(trial)), self.args.save_total_limit
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            unseal(folder)  # an earlier run may have left one of this step
        self._in_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._in_checkpoint, self.args.save_total_limit = False, limit
        self.accelerator.wait_for_everyone()  # each process saves its own random state
        if self.args.should_save:
            # Without the arguments, which name local folders and are not pushed with a checkpoint.
            files = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.name != TRAINING_ARGS_NAME]
            seal(folder, [name.as_posix() for name in files])
            rotate_checkpoints(run, self.state.global_step, limit, self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; the folder is sealed."""
        folder = self.args.output_dir if output_dir is None else output_dir
        if self.args.should_save:
            unseal(folder)
        super().save_model(output_dir, _internal_call)
        if self._in_checkpoint:
            self.args.save_total_limit = None  # the Trainer would delete older ones before this one is sealed
        elif self.args.should_save:
            seal_model(folder)

    def _save(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        with self._replaced(hub_token=None):  # the arguments are saved, too, and checkpoints are passed on
            super()._save(output_dir, *args, **kwargs)


def seal_model(folder: str | os.PathLike) -> None:
    """Seals the model in a folder: its weights, configuration and code, but no pictures, scores or card."""
    files = [name for name in hub_files(folder) if name.endswith((".json", ".py", ".safetensors"))]
    files += [name for name in (RECORD_NAME, TRAINING_ARGS_NAME) if Path(folder, name).is_file()]
    seal(folder, files)


@functools.cache
def _let_torch_load_numbered_cpus() -> None:
    # The oldest supported transformers has each of several processes on CPUs load the optimiser to its own device, of
    # which accelerate calls the second one's cpu:1, a name that torch refuses.
    torch.serialization.register_package(
        15, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
    )


def is_decayed(parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: to all but biases, norms and other 1-D parameters; so class and mask tokens decay.

    MAE's rule for pretraining, which is followed in fine-tuning, too.
    """
    return parameter.ndim > 1


# -- what data sets give ----------------------------------------------------------------------------------------------


def first_samples(train_dataset: Any, eval_dataset: Any) -> Iterator[tuple[str, Any]]:
    """The first sample of each data set that is not this project's own, with the name of its argument.

    Raises:
        InputError: A data set is empty.
    """
    several = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    for name, dataset in [("train_dataset", train_dataset), *(("eval_dataset", dataset) for dataset in several)]:
        if dataset is None or isinstance(dataset, (ImageDataset, StreamingImageDataset)):  # which look at it themselves
            continue
        try:
            yield name, dataset[0] if hasattr(dataset, "__len__") else next(iter(dataset))
        except (StopIteration, IndexError):
            raise InputError(f"`{name}` is empty: there is no image in it.") from None


def check_pixel_values(name: str, sample: Any, pixel_values: Any, remedy: str) -> None:
    """Refuses what is no normalised image.

    Args:
        name: Of the argument that has the data set.
        sample: As the data set gives it.
        pixel_values: What it holds of that name; `None` if it holds none.
        remedy: What to do, as a sentence.

    Raises:
        InputError: `pixel_values` are missing, or no array of floats; the message says what came.
    """
    with contextlib.suppress(TypeError, ValueError):  # lists of what are no numbers, or of unequal lengths
        pixel_values = torch.as_tensor(pixel_values) if isinstance(pixel_values, (list, np.ndarray)) else pixel_values
    if isinstance(pixel_values, torch.Tensor):
        if pixel_values.is_floating_point():
            return
        came = f"`pixel_values` of {pixel_values.dtype}"
    else:
        came = _describe(sample) if pixel_values is None else f"`pixel_values` that are {_describe(pixel_values)}"
    raise InputError(f"`{name}` gives {came}, where normalised float `pixel_values` are needed. {remedy}")


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of ({', '.join(type(part).__name__ for part in value)})"
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(repr, value)) or 'nothing'}"
    return f"a {type(value).__name__}"


__all__ = [
    "BaseTrainer",
    "EpochSampler",
    "check_pixel_values",
    "first_samples",
    "is_decayed",
    "seal_model",
]
