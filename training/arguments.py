# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`PretrainingArguments`: transformers' `TrainingArguments` with the defaults of masked-image pretraining."""

import math
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_xla_available

from clmae.configuration.errors import InputError

# Those of transformers' schedules that are functions of the step alone, and need no further settings.
MASKER_SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "inverse_sqrt")


@dataclass
class ScaledRateArguments(TrainingArguments):
    """`TrainingArguments` whose learning rate follows the total batch, with what MAE's recipes share as defaults.

    Raises:
        InputError: One of the fields is out of range; the message names it.
    """

    base_learning_rate: float = field(
        default=1.5e-4,
        metadata={"help": "Learning rate for a total batch of 256 images; scaled linearly with the total batch."},
    )
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate as it is, instead of base_learning_rate * total batch / 256."},
    )
    num_train_epochs: float = field(default=100.0, metadata={"help": "Passes over the training images."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Training images per device and step."})
    weight_decay: float = field(
        default=0.05, metadata={"help": "Weight decay; none on biases, norms and other 1-D parameters (MAE's rule)."}
    )
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "Learning-rate schedule, by transformers' name."}
    )
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Linear warm-up: steps, or below 1 the share of all steps."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip gradients to this norm; 0: do not clip."})
    logging_steps: float = field(default=50, metadata={"help": "Log every that many steps."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop columns that the model's forward does not name."}
    )
    # The filter reads the loss back at every step, and hides a diverging run.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave nan and inf losses out of the logged mean."}
    )

    max_skipped_steps = 0  # a field of `PretrainingArguments`

    def __post_init__(self) -> None:
        self._check()
        computed_rate = self.learning_rate is None
        if computed_rate:
            self.learning_rate = self.base_learning_rate
        if self.bf16 and not torch.accelerator.is_available() and not is_torch_xla_available():
            self.use_cpu = True  # or transformers refuses bf16
        super().__post_init__()
        if self.world_size > 1 and not self.accelerator_config.even_batches:
            raise InputError(
                f"`accelerator_config` has `even_batches` false, but {self.world_size} processes must take equally "
                "many batches of equally many images, or wait for each other for ever; leave it true."
            )
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin it for, and torch would warn
        if computed_rate:
            # Only now is the number of processes known.
            self.learning_rate = self.base_learning_rate * self.total_train_batch_size / 256

    @property
    def images_per_batch(self) -> int:
        """Images of a batch in all processes: each has one of its own, or with `split_batches` they share it."""
        return self.train_batch_size * (1 if self.accelerator_config.split_batches else self.world_size)

    @property
    def total_train_batch_size(self) -> int:
        """Images per optimiser step: those of a batch in all processes x accumulation steps."""
        return self.images_per_batch * self.gradient_accumulation_steps

    def _check(self) -> None:
        self._check_rate("base_learning_rate")
        self._check_rate("learning_rate", ", or leave it out")
        if self.auto_find_batch_size and self.learning_rate is None:
            raise InputError(
                "`auto_find_batch_size` changes the batch that `learning_rate` follows; give a learning_rate."
            )
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise InputError(f"`num_train_epochs` is {self.num_train_epochs}; give a number above 0, or max_steps.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            self._check_int(name, 1)

    def _check_rate(self, name: str, otherwise: str = "") -> None:
        value = getattr(self, name)
        if value is not None and not 0 <= value < math.inf:
            raise InputError(f"`{name}` is {value}; give a finite number of at least 0{otherwise}.")

    def _check_int(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise InputError(f"`{name}` is {value}; give an int of at least {minimum}.")


@dataclass
class PretrainingArguments(ScaledRateArguments):
    """`TrainingArguments` with MAE's recipe (arXiv 2111.06377, appendix A.1) as defaults, and what a curriculum needs.

    Defaults that differ: AdamW betas (0.9, 0.95), weight decay 0.05, cosine schedule with 5 % warm-up (the paper's 40
    of 800 epochs; the masking module's rate is constant), no gradient clipping (it would let the masking module's
    gradient scale the autoencoder's step), `dataloader_drop_last`, the last two checkpoints kept, and `learning_rate`
    computed from `base_learning_rate`.

    Raises:
        InputError: One of the fields below is out of range; the message names it.
    """

    init: str | None = field(
        default=None,
        metadata={"help": "Start from a folder or Hub id: MAE, CL-MAE, CMAE or ViTMAE; sizes are its own."},
    )
    masker_learning_rate_multiplier: float = field(
        default=1.0, metadata={"help": "Masking module's learning rate, as a multiple of the autoencoder's."}
    )
    masker_lr_scheduler_type: str = field(
        default="constant",
        metadata={
            "help": "Masking module's learning-rate schedule: constant, constant_with_warmup, linear, cosine or "
            "inverse_sqrt; warm-up as the autoencoder's. Not for an optimiser of your own."
        },
    )
    masker_update_interval: int = field(
        default=1, metadata={"help": "Update the masking module at every k-th step only (cheaper)."}
    )
    contrastive_crop_interval: float = field(
        default=0.2,
        metadata={
            "help": "With contrastive_crop: share of the epochs after which the objects' boxes are first computed, and "
            "then anew each time; in (0, 1]."
        },
    )
    difficulty_steps: int = field(
        default=100,
        metadata={
            "help": "Measure mask difficulty (loss under learned masks / under random masks) on fixed held-out images "
            "every that many steps; 0: never."
        },
    )
    picture_steps: int = field(
        default=1000,
        metadata={"help": "Draw masks and reconstructions of held-out images every that many steps; 0: never."},
    )
    num_probe_images: int = field(
        default=64, metadata={"help": "Held-out images on which difficulty is measured; the first 8 are drawn."}
    )

    max_skipped_steps: int = field(
        default=0,
        metadata={
            "help": "Leave out up to that many steps whose loss or gradient is nan or inf; one more, or 0, stops the "
            "run. Waits for the device at every step."
        },
    )

    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Evaluation images per device and step."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta."})
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Send the first process's buffers to all at every step; they never change."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept; the oldest is deleted."})
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Leave out an epoch's last batch if it is not full."}
    )

    def __post_init__(self) -> None:
        # The logged mean of a run that goes on after such steps leaves them out.
        self.logging_nan_inf_filter = self.logging_nan_inf_filter or self.max_skipped_steps > 0
        super().__post_init__()

    def _check(self) -> None:
        super()._check()
        self._check_rate("masker_learning_rate_multiplier")
        if not 0 < self.contrastive_crop_interval <= 1:
            raise InputError(
                f"`contrastive_crop_interval` is {self.contrastive_crop_interval}; give a share of the epochs, in "
                "(0, 1]."
            )
        if self.masker_lr_scheduler_type not in MASKER_SCHEDULES:
            raise InputError(
                f"`masker_lr_scheduler_type` is {self.masker_lr_scheduler_type!r}; choose one of "
                f"{', '.join(MASKER_SCHEDULES)}."
            )
        self._check_int("masker_update_interval", 1)
        self._check_int("num_probe_images", 1)
        for name in ("difficulty_steps", "picture_steps", "max_skipped_steps"):
            self._check_int(name, 0)
        if self.max_skipped_steps and self.deepspeed:
            raise InputError(
                "`max_skipped_steps` has no effect under `deepspeed`, which takes a step before its gradients can be "
                "seen: leave it out."
            )
