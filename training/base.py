# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`BaseTrainer`: what pretraining and fine-tuning share."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import run_as_future
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress, logging

from clmae.configuration.errors import InputError
from clmae.model_cards import hub_files, upload
from clmae.model_cards.record import RECORD_NAME
from clmae.training.arguments import ScaledRateArguments
from clmae.training.callbacks import EpochCallback, RunComponent, shield_workers
from clmae.training.data import ImageDataset, sample_generator
from clmae.training.finite import FiniteCallback
from clmae.training.integrity import check_shapes, choose_checkpoint, rotate_checkpoints, run_lock, seal, unseal

logger = logging.get_logger(__name__)


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


def _has_bf16_products() -> bool:
    """Whether oneDNN multiplies matrices in bfloat16 here; of x86 processors those with AVX-512 do."""
    capabilities = torch.cpu.get_capabilities()
    return capabilities.get("architecture") != "x86_64" or bool(capabilities.get("avx512_f"))


class BaseTrainer(Trainer):
    """transformers' `Trainer`, as pretraining and fine-tuning use it.

    - Checkpoints and models have a manifest (see [`seal`]); a run resumes only from such, and keeps other runs out of
      its output folder. Callbacks that are [`RunComponent`]s take part in start, saves and end of a run.
    - A loss or a gradient that is nan or inf stops the run before anything of it is saved (see [`FiniteCallback`]).
    - The order of an [`ImageDataset`], and the keys of its samples, are functions of seed and epoch.
    - Evaluation and prediction take all images, also where training leaves out an epoch's last batch.
    - Weight decay applies to the parameters for which [`is_decayed`] is true.
    - To the Hub goes what [`hub_files`] names: no data, logs or training arguments.

    Raises:
        InputError: The training set is smaller than a batch.
    """

    # Two private methods of the Trainer are overridden, and no other in subclasses:
    # - `_get_train_sampler`: nothing public chooses the order of a map-style dataset.
    # - `_save_checkpoint`: `on_save` comes after the upload and after older checkpoints have been deleted; both must
    #   wait for the manifest.

    args: ScaledRateArguments
    epoch_sampler: EpochSampler | None = None
    push_in_progress: PushInProgress | None = None
    in_checkpoint = False  # while `save_model` writes into a checkpoint

    def __init__(
        self,
        model: Any,
        args: ScaledRateArguments,
        data_collator: Any = None,
        train_dataset: Any = None,
        *rest,
        **kwargs,
    ):
        batch = args.images_per_batch
        if args.dataloader_drop_last and hasattr(train_dataset, "__len__") and len(train_dataset) < batch:
            raise InputError(
                f"`per_device_train_batch_size` asks for batches of {batch} images in all, but the training set has "
                f"{len(train_dataset)}: take a smaller batch, or `dataloader_drop_last=False`."
            )
        if args.bf16 and args.device.type == "cpu" and not _has_bf16_products():
            logger.warning(
                "`bf16` is set, but this processor has no AVX-512: its matrix products in bfloat16 are several times "
                "slower than in float32. Leave `bf16` out here."
            )
        super().__init__(model, args, data_collator, train_dataset, *rest, **kwargs)
        self.finite = FiniteCallback(self)
        self.add_callback(self.finite)
        self.add_callback(EpochCallback(self))

    # -- runs -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As the Trainer's.

        Args:
            resume_from_checkpoint: A checkpoint's folder; `True` for the newest valid one of `output_dir`.
            kwargs: The Trainer's other arguments.

        Raises:
            InputError: The checkpoint is damaged, there is none, or another run uses `output_dir`.
            NonFiniteError: A loss or a gradient became nan or inf.
        """
        with run_lock(self.args.output_dir) if self.is_world_process_zero() else contextlib.nullcontext():
            checkpoint = self._choose_checkpoint(resume_from_checkpoint)
            if checkpoint and self.args.device.type == "cpu" and self.args.world_size > 1:
                _let_torch_load_numbered_cpus()
            try:
                if checkpoint:
                    check_shapes(checkpoint, self.model.state_dict())
                self.start_run(checkpoint)
                return super().train(resume_from_checkpoint=checkpoint, **kwargs)
            finally:
                for component in self.components:
                    component.stop()

    def start_run(self, checkpoint: str | None) -> None:
        """Tells the components that a run begins, anew or from a checkpoint that is whole."""
        for component in self.components:
            component.start(checkpoint)

    @property
    def components(self) -> list[RunComponent]:
        """The callbacks that take part in start, saves and end of a run."""
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, RunComponent)]

    def _choose_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """As [`choose_checkpoint`]; read in one process, for all."""
        chosen: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                chosen[0] = choose_checkpoint(resume_from_checkpoint, self.args.output_dir)
            except InputError as error:
                chosen[1] = str(error)
        checkpoint, message = broadcast_object_list(chosen)
        if message is not None:
            raise InputError(message)
        return checkpoint

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As the Trainer's; nothing where a resumed run had finished, of which the Trainer would take a step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    # -- optimiser and data ---------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The parameters for which [`is_decayed`] is true."""
        return [name for name, parameter in model.named_parameters() if is_decayed(parameter)]

    @property
    def data_seed(self) -> int:
        """Seed of the order of the images, and of what is drawn for a batch."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        self.epoch_sampler = EpochSampler(len(dataset), self.data_seed) if isinstance(dataset, ImageDataset) else None
        return self.epoch_sampler or super()._get_train_sampler(train_dataset)

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's loader, whose workers leave a SIGTERM to the run."""
        return shield_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The Trainer's loader, with its last batch."""
        with self.replaced_arguments(dataloader_drop_last=False):
            return shield_workers(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """The Trainer's loader, with its last batch."""
        with self.replaced_arguments(dataloader_drop_last=False):
            return shield_workers(super().get_test_dataloader(test_dataset))

    @contextlib.contextmanager
    def replaced_arguments(self, **values: Any) -> Iterator[None]:
        """Other training arguments for a while: the Trainer has one set of them for all that it does, and saves it."""
        before = {name: getattr(self.args, name) for name in values}
        try:
            for name, value in values.items():
                setattr(self.args, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(self.args, name, value)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        args, run = self.args, Path(self._get_output_dir(trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit, push = args.save_total_limit, args.push_to_hub
        self.in_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.in_checkpoint, args.save_total_limit, args.push_to_hub = False, limit, push
        self.accelerator.wait_for_everyone()  # each process saves its own random state
        if args.should_save:
            # Without the arguments, which name local folders and are not uploaded with a checkpoint.
            files = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.name != TRAINING_ARGS_NAME]
            seal(folder, [name.as_posix() for name in files])
            rotate_checkpoints(run, self.state.global_step, limit, self.state.best_model_checkpoint)
        if push and self.is_world_process_zero():
            self._upload_checkpoint(folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; the folder gets a manifest. A model that is not finite is not saved.

        Raises:
            NonFiniteError: A loss or a gradient since the last check was nan or inf.
        """
        self.finite.check()
        args, folder = self.args, self.args.output_dir if output_dir is None else output_dir
        if args.should_save:
            unseal(folder)  # an earlier run may have left one
        with self.replaced_arguments(hub_token=None):  # they are saved, too, and checkpoints are passed on
            super().save_model(folder, _internal_call=True)
        if args.should_save:
            for component in self.components:
                component.save(folder)
        if self.in_checkpoint:
            # Not yet: before the manifest is written. (And not sooner: the arguments are saved as they are.)
            args.save_total_limit, args.push_to_hub = None, False
            return
        if args.should_save:
            seal_model(folder)
        if args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=args.hub_revision)

    # -- Hub ------------------------------------------------------------------------------------------------------

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """As the Trainer's, but in one commit, and only what [`hub_files`] names.

        Returns:
            The commit, or with `blocking=False` its future.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            # Not every supported version takes `private` itself.
            self.args.hub_private_repo = self.args.hub_private_repo if private is None else private
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(license=kwargs.get("license"))
        self._finish_current_push()
        return self._upload(commit_message, blocking, token=token, revision=revision)

    def _upload(self, commit_message: str | None, blocking: bool = True, **options: Any) -> Any:
        options = {"folder": self.args.output_dir, "repo_id": self.hub_model_id, **options}
        options["token"] = options.get("token") or self.args.hub_token
        options["revision"] = options.get("revision") or self.args.hub_revision
        send = upload if blocking else functools.partial(run_as_future, upload)
        return send(commit_message=commit_message or "Upload model", **options)

    def _upload_checkpoint(self, checkpoint: Path) -> None:
        """As `hub_strategy` says; without `training_args.bin`, which names local folders."""
        strategy = self.args.hub_strategy
        if strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            if not self.args.hub_always_push:
                return
            self.push_in_progress.wait_until_done()  # it reads the files that are about to be written over
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        unseal(self.args.output_dir)
        for name in hub_files(checkpoint):
            shutil.copy(checkpoint / name, Path(self.args.output_dir, name))
        jobs = [self._upload(message, blocking=False)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            files = sorted(path.name for path in checkpoint.iterdir() if path.name != TRAINING_ARGS_NAME)
            place = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
            options = dict(folder=checkpoint, files=files, path_in_repo=place)
            jobs.append(self._upload(f"{message}, checkpoint", blocking=False, **options))
        self.push_in_progress = PushInProgress(jobs)


def seal_model(folder: str | os.PathLike) -> None:
    """Writes the manifest of a model: its weights, configuration and code, but no figures, scores or card."""
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
