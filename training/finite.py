# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Stops a run whose loss or gradient is nan or inf, without waiting for the device at every step."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import torch
from transformers.utils import logging

from clmae.training.callbacks import RunComponent
from clmae.training.integrity import checkpoints, is_sealed

logger = logging.get_logger(__name__)

_CHECK_STEPS = 100  # after which values are read back where nothing is logged, so that they do not pile up
# Steps in a row that a loss scaler may skip; it starts from 2**16 and halves the scale at each.
_OVERFLOWS = 50
_GRADIENT = math.inf  # as the number of a micro-batch: after all of them


class NonFiniteError(ArithmeticError):
    """A loss or a gradient is nan or inf, and the run cannot go on; the message says where it began."""


class FiniteCallback(RunComponent):
    """Raises [`NonFiniteError`] where a loss or a gradient is nan or inf, before anything of it is logged or saved.

    Values stay on the device until they are read back together. Where the arguments have `max_skipped_steps`, up to so
    many of these steps are left out instead; then the device is waited for at every step. Under a loss scaler (fp16),
    which skips steps with such gradients by itself, these count only where it skips 50 in a row.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.start(None)

    def start(self, checkpoint: str | None) -> None:
        """Forgets an earlier run."""
        # By optimiser step (from 0), micro-batch and name.
        self._values: dict[tuple[int, float, str], torch.Tensor] = {}
        self.num_skipped = self.num_overflows = 0

    def add_losses(self, losses: dict[str, torch.Tensor]) -> None:
        """0-d losses of the next micro-batch of the running step; the trainer's `compute_loss` hands them over."""
        step = self.trainer.state.global_step
        last_step, last_batch, _ = next(reversed(self._values), (-1, 0, ""))
        batch = last_batch + 1 if last_step == step else 0
        self._values |= {(step, batch, name): value.detach().float() for name, value in losses.items()}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Notes the norm of the gradient, and skips the step where that is allowed."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        # With loss scaling infinite gradients are common, and the scaler skips their steps by itself.
        if gradients and self.trainer.accelerator.scaler is None:
            norm = torch.nn.utils.get_total_norm(gradients)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # sharded by FSDP 2
            self._values[state.global_step, _GRADIENT, "grad_norm"] = norm.float().to(args.device)
        if not args.max_skipped_steps or (problem := self._look()) is None:
            return
        self.num_skipped += 1
        if self.num_skipped > args.max_skipped_steps:
            raise self._error(problem)
        logger.warning(f"{problem} Skipped this step, number {self.num_skipped} of at most {args.max_skipped_steps}.")
        model.zero_grad()  # to none: neither momentum nor weight decay moves the weights

    def on_step_end(self, args, state, control, **kwargs):
        """Checks where the loss is read back anyway, and before anything is saved."""
        accelerator = self.trainer.accelerator
        skipped = accelerator.scaler is not None and accelerator.optimizer_step_was_skipped
        self.num_overflows = self.num_overflows + 1 if skipped else 0
        if self.num_overflows == _OVERFLOWS:
            problem = f"Step {state.global_step}: the gradient is not finite, as in the {_OVERFLOWS - 1} steps before."
            raise self._error(problem)
        if state.global_step % _CHECK_STEPS == 0 or control.should_training_stop:
            self.check()
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        """The same; not without a reason, for processes may end their epochs at different steps."""
        if control.should_log or control.should_save or control.should_evaluate:
            self.check()

    def check(self) -> None:
        """Looks now; all processes take part.

        Raises:
            NonFiniteError: Something was nan or inf since the last look.
        """
        if (problem := self._look()) is not None:
            raise self._error(problem)

    def _look(self) -> str | None:
        """What was nan or inf first since the last look, in any process, as a sentence. Waits for the device, once."""
        if not self._values:
            return None
        places, values = list(self._values), torch.stack(list(self._values.values()))
        self._values = {}
        flags = self.trainer.accelerator.gather((~values.isfinite()).int()).view(-1, len(places))
        bad = [(*places[i], process) for process, i in flags.nonzero().tolist()]
        if not bad:
            return None
        step, first, *_ = min(bad)
        # A loss explains the gradient that follows from it.
        bad = [place for place in bad if place[0] == step and (place[1] == _GRADIENT) == (first == _GRADIENT)]
        if first == _GRADIENT:
            what, num_batches = "the gradient", self.trainer.args.gradient_accumulation_steps
            batches = [(batch, process) for batch in range(num_batches) for process in range(len(flags))]
        else:
            what = f"the loss ({', '.join(dict.fromkeys(name for _, _, name, _ in bad))})"
            batches = sorted({(int(batch), process) for _, batch, _, process in bad})
        problem, indices = f"Step {step + 1}: {what} is not finite.", self._image_indices(step, batches)
        named = "" if indices is None else f" Its images, by their indices in the training set: {indices}."
        return problem + named

    def _image_indices(self, step: int, batches: list[tuple[int, int]]) -> list[int] | None:
        """Which training images were in some micro-batches `(batch, process)` of a step; `None` where unknown."""
        trainer, args = self.trainer, self.trainer.args
        sampler, loader = trainer.epoch_sampler, trainer.callback_handler.train_dataloader
        if sampler is None or loader is None or args.ignore_data_skip or args.accelerator_config.split_batches:
            return None
        accumulation, size = args.gradient_accumulation_steps, trainer._train_batch_size
        epoch, update = divmod(step, math.ceil(len(loader) / accumulation))
        order = sampler.order(epoch).tolist()
        starts = [((update * accumulation + b) * args.world_size + p) * size for b, p in batches]
        return [index for start in starts for index in order[start : start + size]]

    def _error(self, problem: str) -> NonFiniteError:
        args = self.trainer.args
        complete = [folder.name for folder in checkpoints(args.output_dir) if is_sealed(folder)]
        last = (
            f"The last checkpoint from before is {complete[-1]}" if complete else "There is no checkpoint from before"
        )
        remedy = "Take a smaller learning_rate, clip gradients (`max_grad_norm`), leave out fp16"
        remedy += ", or look at these images" if " images, by" in problem else ""
        if self.num_overflows < _OVERFLOWS and any(field.name == "max_skipped_steps" for field in fields(args)):
            remedy += "; `max_skipped_steps` lets a few such steps be skipped"
        return NonFiniteError(f"{problem} {last}. {remedy}.")
