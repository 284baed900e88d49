# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What happens beside the steps: epochs, mask difficulty, figures, crop boxes, the run's record, interrupts."""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.context
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.utils import logging

from clmae.configuration.configuration_mae import pair
from clmae.configuration.errors import InputError
from clmae.model_cards import RunRecord
from clmae.training.data import heat_map_box, object_heat_map, refresh_epochs
from clmae.training.pictures import curves_figure, figure_to_array, reconstruction_figure, save_figure

logger = logging.get_logger(__name__)


class RunComponent(TrainerCallback):
    """A callback that `BaseTrainer` also calls where a run starts, saves and ends.

    transformers hands no trainer to callbacks: a component that needs it keeps it (untyped: the trainer imports it).
    """

    def start(self, checkpoint: str | None) -> None:
        """A run begins: anew, or from the folder of a checkpoint; raises `InputError` where that does not fit."""

    def save(self, folder: str) -> None:
        """Weights were written to a folder, a checkpoint or the finished model; called in the process that writes."""

    def stop(self) -> None:
        """The run ended, perhaps by an exception."""


def epoch_of(state: Any) -> int:
    """The epoch that runs: `state.epoch` counts steps as fractions, whose sum may fall short of a whole number."""
    return int((state.epoch or 0) + 1e-6)


class EpochCallback(TrainerCallback):
    """Sets the epoch of the trainer's `epoch_sampler`; accelerate does not reach it through every wrapper."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.epoch_sampler is not None:
            self.trainer.epoch_sampler.set_epoch(epoch_of(state))


class RecordCallback(RunComponent):
    """Writes `pretraining.json` (see [`RunRecord`]) beside every set of weights."""

    def __init__(self, trainer: Any, data: dict[str, Any] | None):
        self.trainer, self.record = trainer, RunRecord(data)

    def start(self, checkpoint: str | None) -> None:
        """A session begins."""
        self.record.start(checkpoint, self.trainer.args)

    def save(self, folder: str) -> None:
        self.record.write(folder, self.trainer)

    def stop(self) -> None:
        """What follows (evaluation, uploads) is no pretraining time."""
        self.record.stop(self.trainer.state.global_step)


class PeriodicCallback(TrainerCallback):
    """Acts before the first step, every so many steps, and after the last one."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.act(args, state, control)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.interval(args) == 0 or state.global_step == state.max_steps:
            self.trainer.finite.check()  # nothing is measured or drawn of what is nan
            self.act(args, state, control)

    def interval(self, args: Any) -> int:
        """Steps from one time to the next."""
        raise NotImplementedError

    def act(self, args: Any, state: Any, control: Any) -> None:
        """What is due; every process takes part, for a sharded model cannot run in one alone."""
        raise NotImplementedError

    def log(self, control: Any, values: dict[str, float]) -> None:
        """Logs values of this step."""
        should_log = control.should_log
        self.trainer.log(values)
        control.should_log = should_log  # logging resets it, and this step's training log is still to come


class DifficultyCallback(PeriodicCallback):
    """Logs `mask_difficulty` before the first step, every `difficulty_steps`, and after the last."""

    def interval(self, args: Any) -> int:
        """See the class."""
        return args.difficulty_steps

    def act(self, args: Any, state: Any, control: Any) -> None:
        """Measures."""
        self.log(control, {"mask_difficulty": self.trainer.measure_difficulty()})


class PictureCallback(PeriodicCallback):
    """Draws held-out images, their masks and reconstructions, at first, every `picture_steps` and at the end.

    PNG files in `output_dir/pictures/`, and the same figures in TensorBoard where it is reported to. At the end also
    the curves of the whole run, `pictures/curves.png`.
    """

    num_images = 8

    def interval(self, args: Any) -> int:
        """See the class."""
        return args.picture_steps

    def act(self, args: Any, state: Any, control: Any) -> None:
        """Draws."""
        batch = {name: values[: self.num_images] for name, values in self.trainer.held_out_batch().items()}
        processor = self.trainer.processing_class
        mean, std = (getattr(processor, name, None) for name in ("image_mean", "image_std"))
        title = f"step {state.global_step}"
        factor = self.trainer.curriculum_factor(state.global_step) if self.trainer.has_masking_module else None
        figure = reconstruction_figure(
            self.trainer.model, **batch, image_mean=mean, image_std=std, title=title, curriculum_factors=[factor]
        )
        if not state.is_world_process_zero:
            return
        save_figure(figure, Path(args.output_dir) / "pictures" / f"step-{state.global_step:06d}.png")
        for callback in self.trainer.callback_handler.callbacks:
            if (writer := getattr(callback, "tb_writer", None)) is not None:
                writer.add_image("reconstructions", figure_to_array(figure), state.global_step, dataformats="HWC")

    def on_train_end(self, args, state, control, **kwargs):
        """Draws the curves."""
        if state.is_world_process_zero:
            save_figure(curves_figure(state.log_history), Path(args.output_dir) / "pictures" / "curves.png")


class ContrastiveCropCallback(RunComponent):
    """Recomputes the boxes of an `ImageDataset` with `contrastive_crop` from what the encoder sees by now.

    Every `contrastive_crop_interval` of the epochs, not at the start; the images are shared among the processes, and
    all of them have all boxes afterwards. The boxes are saved in each checkpoint, and restored on resume.
    """

    file_name = "contrastive_crop.safetensors"

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.reset()

    def reset(self) -> None:
        """Sets every box to the whole image."""
        self.refreshed_epoch = 0
        self.trainer.train_dataset.crop_boxes[:] = torch.tensor([0.0, 0.0, 1.0, 1.0])

    def start(self, checkpoint: str | None) -> None:
        """Whole images, or the boxes of a checkpoint.

        Raises:
            InputError: The checkpoint has none, or of another number of images.
        """
        self.reset()
        if checkpoint is None:
            return
        path, boxes = Path(checkpoint) / self.file_name, self.trainer.train_dataset.crop_boxes
        if not path.is_file():
            raise InputError(
                f"`resume_from_checkpoint` is {checkpoint}, which has no {self.file_name}: that run cropped at random. "
                "Leave out `contrastive_crop`, or start anew."
            )
        saved = load_file(path)
        if saved["boxes"].shape != boxes.shape:
            raise InputError(
                f"`resume_from_checkpoint` is {checkpoint}, which has the boxes of {len(saved['boxes'])} images, but "
                f"the training set has {len(boxes)}: resume with the same images."
            )
        boxes.copy_(saved["boxes"])
        self.refreshed_epoch = int(saved["refreshed_epoch"])

    def save(self, folder: str) -> None:
        """Puts the boxes into a checkpoint; the finished model needs none."""
        if folder != self.trainer.args.output_dir:
            boxes, epoch = self.trainer.train_dataset.crop_boxes.clone(), torch.tensor(self.refreshed_epoch)
            save_file({"boxes": boxes, "refreshed_epoch": epoch}, Path(folder) / self.file_name)

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Refreshes the boxes, if it is time and was not done before a resume."""
        epoch = epoch_of(state)
        due = refresh_epochs(state.num_train_epochs, args.contrastive_crop_interval)
        if epoch > self.refreshed_epoch and epoch in due:
            self.refresh()
            self.refreshed_epoch = epoch

    @torch.no_grad()
    def refresh(self) -> None:
        """Runs the encoder over all training images, un-augmented, and takes the boxes of its heat maps."""
        trainer, args, dataset = self.trainer, self.trainer.args, self.trainer.train_dataset
        model, boxes = trainer.model, torch.zeros_like(dataset.crop_boxes, device=args.device)
        was_training = model.training
        model.eval()
        indices_here: Any = range(args.process_index, len(dataset), args.world_size)
        loader: DataLoader = DataLoader(
            indices_here,
            collate_fn=functools.partial(_load_whole, dataset),
            batch_size=args.eval_batch_size,
            num_workers=args.dataloader_num_workers,
            generator=torch.Generator(),  # or the loader would draw from the global one
        )
        quiet = args.disable_tqdm or not trainer.is_world_process_zero()
        for indices, pixel_values in tqdm(shield_workers(loader), desc="object boxes", disable=quiet, leave=False):
            with trainer.accelerator.autocast():  # which the model's own forward would enter
                tokens = model.vit(pixel_values.to(args.device)).last_hidden_state[:, 1:]
            maps = object_heat_map(tokens, model.config.grid_size)
            boxes[indices] = heat_map_box(maps, pair(model.config.image_size))
        dataset.crop_boxes.copy_(trainer.accelerator.reduce(boxes, reduction="sum"))
        model.train(was_training)


def _load_whole(dataset: Any, indices: list[int]) -> tuple[list[int], torch.Tensor]:
    return indices, torch.stack([dataset.whole_image(index) for index in indices])  # un-augmented


# -- interrupts -------------------------------------------------------------------------------------------------------


def _exit_with_parent() -> None:
    # Not the process that forked this one, which may be a fork server.
    parent = multiprocessing.parent_process()
    assert parent is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


def _start_shielded(initialize: Callable[[int], None] | None, worker_id: int) -> None:
    """What a worker process does first: ignore SIGTERM unless its parent sends it."""
    if hasattr(signal, "sigwaitinfo"):  # elsewhere the sender of a signal is unknown
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_with_parent, daemon=True).start()
    if initialize is not None:
        initialize(worker_id)


class _ShieldedProcess(multiprocessing.Process):
    """A process that starts with SIGTERM blocked: torch's handler in a worker would end it before it is shielded."""

    def start(self) -> None:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _ShieldedContext(multiprocessing.context.BaseContext):
    """The default way to start processes, of which each is a `_ShieldedProcess`."""

    Process = _ShieldedProcess

    def get_context(self, method: str | None = None) -> Any:
        return multiprocessing.get_context(method)


def shield_workers(loader: DataLoader) -> DataLoader:
    """Lets a loader's workers outlive a SIGTERM to the whole group, or the run could not finish its step and save."""
    for part in (loader, getattr(loader, "base_dataloader", loader)):  # accelerate's, which wraps torch's
        if getattr(part.worker_init_fn, "func", None) is not _start_shielded:
            part.worker_init_fn = functools.partial(_start_shielded, part.worker_init_fn)
        if part.num_workers and hasattr(signal, "sigwaitinfo"):
            part.multiprocessing_context = _ShieldedContext()
    return loader


class InterruptCallback(RunComponent):
    """On the first Ctrl-C or SIGTERM: finish the step, save a checkpoint, stop. On a second Ctrl-C: stop at once.

    `received` is the signal afterwards, if there was one. Under several processes Ctrl-C is left to the launcher, and
    SIGTERM, which schedulers send before they take a machine away, takes effect at the next logging step: the processes
    must stop at the same one, and agree there.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def interrupted(self) -> bool:
        """Whether a signal stopped the run."""
        return self.received is not None

    def on_train_begin(self, args, state, control, **kwargs):
        """Installs the signal handlers."""
        self.received = None
        if threading.current_thread() is threading.main_thread():
            signals = (signal.SIGINT, signal.SIGTERM) if args.world_size == 1 else (signal.SIGTERM,)
            self._previous = {number: signal.signal(number, self._handle) for number in signals}

    def on_step_end(self, args, state, control, **kwargs):
        """Stops the run, with a checkpoint and without an evaluation, for which there may be no time."""
        if args.world_size > 1 and control.should_log:
            received = torch.tensor(self.received or 0, device=args.device)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            self.received = int(received) or None
        if self.interrupted and (args.world_size == 1 or control.should_log):
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs):
        """For a `Trainer` that calls no [`RunComponent`]."""
        self.stop()

    def stop(self) -> None:
        """Restores the signal handlers."""
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted and number == signal.SIGINT:
            self.stop()
            raise KeyboardInterrupt
        self.received = self.received or number
        logger.warning("Interrupted: finishing this step and saving a checkpoint. Ctrl-C stops at once.")
