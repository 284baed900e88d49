# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`CurriculumTrainer`: transformers' `Trainer` for masked autoencoders, with or without a masking module."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import run_as_future
from torch import nn
from torch.utils.data import DataLoader
from transformers import get_scheduler
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, SchedulerType
from transformers.utils import PushInProgress, logging

from clmae.configuration.configuration_mae import pair
from clmae.configuration.errors import InputError
from clmae.model_cards import EditedCardError, RunRecord, describe_data, hub_files, upload, write_card
from clmae.modeling import MAEPreTrainedModel
from clmae.training.arguments import PretrainingArguments
from clmae.training.base import BaseTrainer, check_pixel_values, first_samples
from clmae.training.callbacks import ContrastiveCropCallback, DifficultyCallback, PictureCallback
from clmae.training.curriculum import (
    curriculum_factor,
    keep_probability_statistics,
    keep_probability_sums,
    mask_warnings,
)
from clmae.training.data import (
    DataArguments,
    ImageCollator,
    ImageDataset,
    ResidentImageDataset,
    StreamingImageDataset,
    normalize,
    sample_generator,
    unnormalized,
)
from clmae.training.finite import FiniteWatch, NonFinite, NonFiniteError
from clmae.training.flops import step_flops
from clmae.training.pictures import curves_figure, save_figure
from clmae.training.sealing import checkpoints, is_sealed, unseal

logger = logging.get_logger(__name__)

_LOOK_STEPS = 100  # after which losses are read back also where nothing is logged

_REMEDY = (
    "Make an `ImageDataset(dataset, image_column, ...)` of images (in `clmae.training.data`, as is `build_datasets`, "
    "which makes it of a folder), or give samples {'pixel_values': (C, H, W)}, or a `data_collator`."
)

_NO_WORKERS = {
    **dict(dataloader_num_workers=0, dataloader_persistent_workers=False, dataloader_prefetch_factor=None),
    **dict(dataloader_multiprocessing_context=None, dataloader_pin_memory=False),
}


class CurriculumTrainer(BaseTrainer):
    """Pretrains masked autoencoders: `MAEForPreTraining`, transformers' `ViTMAEForPreTraining`, `CLMAEForPreTraining`.

    A `Trainer` in every respect (callbacks, logging, mixed precision, accumulation, DDP, resume), that also

    - gives a model with a masking module its curriculum factor λ_CL, from the optimiser step over all steps, and its
      own learning rate (`masker_learning_rate_multiplier`), schedule (`masker_lr_scheduler_type`) and update interval
      (`masker_update_interval`);
    - logs every scalar that the model returns beside its loss, and what the keep probabilities look like, averaged
      over accumulated batches and processes; warns where they show that the masking module has gone astray;
    - measures `mask_difficulty` and draws pictures, on the first `num_probe_images` of `eval_dataset`;
    - evaluates by the reconstruction loss under fixed random masks, whatever masks the model learns, and reports
      `eval_mask_difficulty` beside it, on all of the evaluation set;
    - stops where a loss or a gradient is not finite, and says where, before anything of it is saved
      (`max_skipped_steps` lets it go on); seals checkpoints and models (see [`seal`]), and resumes only from such;
      keeps other runs out of its output folder;
    - writes `pretraining.json` beside every set of weights, and makes the model card of it. `data_arguments`, where the
      data sets were built from such, tell the card what they are. To the Hub goes only what belongs there.

    With an [`ImageDataset`] every image's augmentation and mask noise are keyed by seed, epoch and index, and a resumed
    run continues bit by bit on a CPU. Other data sets must give `pixel_values`, and may give `noise`; without it, masks
    are keyed by seed, step and process.

    Raises:
        InputError: `args` are no [`PretrainingArguments`]; a data set is empty, too small, or without pixels.

    Example:

    ```python
    >>> trainer = CurriculumTrainer(
    ...     model=CLMAEForPreTraining(CLMAEConfig.from_size("tiny", image_size=32, patch_size=4)),
    ...     args=PretrainingArguments(output_dir="out", num_train_epochs=10),
    ...     train_dataset=train_dataset,
    ...     eval_dataset=eval_dataset,
    ... )
    >>> trainer.train()
    ```
    """

    args: PretrainingArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        args: PretrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *rest: Any,
        data_arguments: DataArguments | None = None,
        **kwargs: Any,
    ):
        args = PretrainingArguments(output_dir="clmae_output") if args is None else args
        if not isinstance(args, PretrainingArguments):
            raise InputError(f"`args` is a {type(args).__name__}; pass PretrainingArguments (same fields, and more).")
        if kwargs.get("compute_metrics") is not None:
            raise InputError("`compute_metrics` is given, but predictions are not gathered; use clmae.evaluation.")
        if data_collator is None:
            for name, sample in first_samples(train_dataset, eval_dataset):
                fields = sample if isinstance(sample, Mapping) else getattr(sample, "__dict__", {})
                check_pixel_values(name, sample, fields.get("pixel_values"), _REMEDY)
        if isinstance(train_dataset, StreamingImageDataset) and _reads_in_parts(args):
            train_dataset = train_dataset.part(args.process_index, args.world_size)
        if getattr(train_dataset, "device_resident", False):
            train_dataset = ResidentImageDataset(train_dataset, args.device)
        # Uint8 to the device, and normalised there; but an own collator gets the samples that it knows.
        self._normalizes = data_collator is None and isinstance(train_dataset, (ImageDataset, StreamingImageDataset))
        if self._normalizes:
            data_collator = ImageCollator(train_dataset.mean, train_dataset.std)
        if args.ddp_find_unused_parameters is None and isinstance(model, MAEPreTrainedModel):
            # A step uses all parameters, so that there is nothing to look for; but with an interval the masking module
            # has no gradient on the steps between, and must then stay as it is: a gradient of zero would still let
            # AdamW's momentum and weight decay move it.
            args.ddp_find_unused_parameters = args.masker_update_interval > 1
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, *rest, **kwargs)
        if self.accelerator.ddp_handler is not None:  # no second copy of the gradients
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        self._record = RunRecord(None if data_arguments is None else describe_data(data_arguments))
        self._check_model()
        self._check_contrast()
        self._accepts_noise = "noise" in inspect.signature(self.model.forward).parameters
        self._sums: dict[str, torch.Tensor] = {}  # by name, `(2,)`: sum and number of finite values
        self._keep_sums: dict[int, torch.Tensor] = {}  # by optimiser step
        self._held_out: dict[str, torch.Tensor] | None = None
        # Mean and standard deviation of the channels: as they are, and on the device.
        self._moments: tuple[Any, tuple[torch.Tensor, ...]] = (None, ())
        self._substep = (-1, 0)  # optimiser step, and how many batches of it have been seen
        self._eval_sums = torch.zeros(2, device=self.args.device)  # L_rec of images under learned and random masks
        self._warned: set[str] = set()
        self._watch = FiniteWatch(self.accelerator.gather)
        self._skipped = 0
        self._crops = None
        if getattr(self.train_dataset, "crop_boxes", None) is not None:
            if not isinstance(self.model, MAEPreTrainedModel):
                raise InputError(
                    f"`model` is a {type(self.model).__name__}, but `contrastive_crop` needs an encoder of this "
                    "project's families; take one, or crop at random."
                )
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise InputError(
                    "`contrastive_crop` runs the encoder by itself, which a model whose weights are sharded (`fsdp`, "
                    "`deepspeed`) cannot do; use DDP, or crop at random."
                )
            self._crops = ContrastiveCropCallback(self)
            self.add_callback(self._crops)
        elif getattr(getattr(self.train_dataset, "dataset", None), "crop_boxes", None) is not None:
            raise InputError(
                f"`train_dataset` is a {type(self.train_dataset).__name__} of a data set with `contrastive_crop`: its "
                "boxes would never be found; choose the images before (`datasets.Dataset.select`), or crop at random."
            )
        if self.eval_dataset is not None and args.picture_steps:
            self.add_callback(PictureCallback(self))
        if self.has_masking_module and args.difficulty_steps:
            if self.eval_dataset is None:
                logger.warning("No `eval_dataset`: mask difficulty is not measured, and no pictures are drawn.")
            else:
                self.add_callback(DifficultyCallback(self))

    def _check_model(self) -> None:
        """Refuses what would break pass B, which differentiates inside the forward pass, in the midst of a step."""
        if not self.has_masking_module:
            return
        checkpointing = self.args.gradient_checkpointing_kwargs or {}
        if self.args.gradient_checkpointing and checkpointing.get("use_reentrant"):
            raise InputError(
                "`gradient_checkpointing_kwargs` asks for `use_reentrant`, which cannot differentiate inside the "
                "forward pass, as a masking module needs; leave it out."
            )
        name = SchedulerType(self.args.lr_scheduler_type).value
        if self.lr_scheduler is None and name in ("reduce_lr_on_plateau", "greedy"):
            raise InputError(
                f"`lr_scheduler_type` is {name!r}, which gives all parameters one schedule, but the masking module has "
                "its own. Choose a schedule that is a function of the step, such as cosine."
            )
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) == 2:
            raise InputError(
                "`fsdp_config` has version 2, which re-shards the weights within the forward pass of a model with a "
                "masking module; set its `version` to 1, or use DDP."
            )

    def _check_contrast(self) -> None:
        """Refuses batches of one image, which the last one of an epoch may be, before the first step."""
        if not getattr(self.model.config, "contrastive_loss_weight", 0):
            return
        args, batch = self.args, self.args.images_per_batch
        images = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else 0
        if batch == 1:
            raise InputError(
                "`per_device_train_batch_size` is 1 on one process, but contrast needs other images to tell one from: "
                "take at least 2, or set `contrastive_loss_weight` to 0."
            )
        if args.world_size == 1 and not args.dataloader_drop_last and images % batch == 1:
            raise InputError(
                f"`dataloader_drop_last` is false, and {images} training images in batches of {batch} leave one alone, "
                "with nothing to contrast it with: drop the last batch, or take another batch size."
            )

    @property
    def has_masking_module(self) -> bool:
        """Whether the model learns its masks."""
        return hasattr(self.model, "masking_module")

    def _train_from(self, checkpoint: str | None, **kwargs: Any) -> Any:
        if checkpoint and not hasattr(self.train_dataset, "__len__"):
            logger.warning("Resuming a stream: the run continues exactly only within the stream's first pass.")
        self._sums, self._keep_sums, self._warned, self._skipped = {}, {}, set(), 0
        self._watch.clear()
        if self._crops is not None:
            self._crops.reset()
            if checkpoint:
                self._crops.load(checkpoint)
        elif checkpoint and (Path(checkpoint) / ContrastiveCropCallback.file_name).is_file():
            logger.warning(f"{checkpoint} was made with `contrastive_crop`; this run goes on with random crops.")
        self._record.start(checkpoint, self.args)
        try:
            with fast_float32_matmul(self.args):
                return super()._train_from(checkpoint, **kwargs)
        finally:
            self._record.stop(self.state.global_step)

    # -- optimiser ------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimiser, with the masking module in parameter groups of its own."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(model) if model is not None else super().create_optimizer()
        source = self.model if model is None else model
        masker = {id(p) for name, p in source.named_parameters() if "masking_module." in name}
        if created and masker:
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in masker]
                if own:
                    group["params"] = [p for p in group["params"] if id(p) not in masker]
                    rate = group["lr"] * self.args.masker_learning_rate_multiplier
                    optimizer.add_param_group({**group, "params": own, "lr": rate, "masking_module": True})
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The Trainer's scheduler, with the masking module on a schedule of its own (`masker_lr_scheduler_type`)."""
        created = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if not created:
            return scheduler
        groups = scheduler.optimizer.param_groups
        own = [i for i, group in enumerate(groups) if group.get("masking_module")]
        if not own:
            return scheduler
        schedule = get_scheduler(
            self.args.masker_lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)], lr=1.0),  # only its function of the step is wanted
            self.args.get_warmup_steps(num_training_steps),
            num_training_steps,
        ).lr_lambdas[0]
        for i in own:
            scheduler.lr_lambdas[i] = schedule
            groups[i]["lr"] = groups[i]["initial_lr"] * schedule(0)
        return scheduler

    # -- data -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's loader, whose workers leave a SIGTERM to the run; none where the images are on the device.

        Of an [`ImageDataset`] or a [`StreamingImageDataset`], and without an own collator, a batch has uint8
        `pixel_values` (see [`~clmae.training.data.unnormalized`]), which `_prepare_inputs` normalises.
        """
        if isinstance(self.train_dataset, ResidentImageDataset):
            with self._replaced(**_NO_WORKERS):
                return super().get_train_dataloader()
        train_dataset = self.train_dataset
        if self._normalizes:
            self.train_dataset = unnormalized(train_dataset)
        try:
            return self._train_dataloader()
        finally:
            self.train_dataset = train_dataset

    def _train_dataloader(self) -> DataLoader:
        if not getattr(self.train_dataset, "is_part", False):
            return super().get_train_dataloader()
        # accelerate would have the first process read for all, or all of them everything.
        config = self.accelerator.dataloader_config
        config.dispatch_batches = False
        try:
            loader = super().get_train_dataloader()
        finally:
            config.dispatch_batches = None
        loader.dataset.num_processes, loader.dataset.process_index = 1, 0
        return loader

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        pixels = inputs.get("pixel_values")
        if self._normalizes and isinstance(pixels, torch.Tensor) and pixels.dtype == torch.uint8:
            pixels = pixels.to(self.args.device)
            moments = ([*self.train_dataset.mean], [*self.train_dataset.std])
            if self._moments[0] != moments:  # the device would be waited for
                self._moments = moments, tuple(torch.tensor(values, device=pixels.device) for values in moments)
            inputs = {**inputs, "pixel_values": normalize(pixels, *self._moments[1])}
        return super()._prepare_inputs(inputs)

    def held_out_batch(self) -> dict[str, torch.Tensor]:
        """The first `num_probe_images` of `eval_dataset`, with fixed `noise`, on the device; the same every time."""
        if self._held_out is None:
            source = self.eval_dataset
            source = next(iter(source.values())) if isinstance(source, dict) else source  # the first of several
            samples = list(itertools.islice(_samples(source), self.args.num_probe_images))
            batch = self.data_collator(samples)
            batch = {name: batch[name] for name in ("pixel_values", "noise") if name in batch}
            if batch["pixel_values"].ndim == 5:  # several views of each image: one of them is judged
                batch = {name: values[:, 0] for name, values in batch.items()}
            batch.setdefault("noise", self._noise(batch["pixel_values"], 0, 0))
            self._held_out = self._prepare_inputs(batch)
        return self._held_out

    def _noise(self, pixel_values: torch.Tensor, step: int, key: int) -> torch.Tensor:
        patch_size = pair(self.model.config.patch_size)
        num_patches = math.prod(n // p for n, p in zip(pixel_values.shape[-2:], patch_size, strict=True))
        generator = sample_generator(self.data_seed, step, key)
        # A row for each image, or for each of its views.
        return torch.rand(*pixel_values.shape[:-3], num_patches, generator=generator).to(pixel_values.device)

    # -- loss -----------------------------------------------------------------------------------------------------

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """FLOPs of a batch's forward and backward pass, by [`step_flops`]; the mean over a `masker_update_interval`.

        The Trainer's own estimate multiplies all parameters by all pixels.
        """
        if not isinstance(self.model, MAEPreTrainedModel):
            return super().floating_point_ops(inputs)
        return round(step_flops(self.model.config, len(inputs["pixel_values"]), self.args.masker_update_interval))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The model's loss; in training under the curriculum, in evaluation under fixed random masks."""
        inputs = self._complete_inputs(inputs, model.training)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self._observe(loss, outputs, inputs.get("curriculum_factor"))
        return (loss, outputs) if return_outputs else loss

    def _complete_inputs(self, inputs: dict[str, Any], training: bool) -> dict[str, Any]:
        inputs = dict(inputs)
        step = self.state.global_step
        if self.has_masking_module and training:
            factor = self.curriculum_factor(step)
            # A 0-d tensor made on the device: no synchronisation, and no recompilation as it changes. DataParallel
            # would try to split it.
            as_tensor = self.args.n_gpu <= 1
            inputs["curriculum_factor"] = torch.full((), factor, device=self.args.device) if as_tensor else factor
            inputs["compute_masker_loss"] = step % self.args.masker_update_interval == 0
        elif self.has_masking_module:
            inputs["masking"] = "random"
        learned = self.has_masking_module and training and not hasattr(self.model, "position_head")
        if "noise" not in inputs and not learned and self._accepts_noise:
            inputs["noise"] = self._noise(inputs["pixel_values"], *self._noise_key(training))
        return inputs

    def _noise_key(self, training: bool) -> tuple[int, int]:
        # In evaluation every batch has the same masks. In training each batch and process has its own: all processes
        # share one seed.
        step = self.state.global_step
        if not training:
            return 0, 0
        self._substep = (step, self._substep[1] + 1 if self._substep[0] == step else 0)
        return step + 1, self._substep[1] * self.args.world_size + self.args.process_index

    def curriculum_factor(self, step: int) -> float:
        """λ_CL at optimiser step `step` of this run."""
        config = self.model.config
        return curriculum_factor(
            step, self.state.max_steps, config.curriculum_shape, config.curriculum_start, config.curriculum_end
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's; the global random state stays as it was, so that a run does not depend on it."""
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """The batch's loss. There are no labels, and predictions of whole images are not gathered."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs).detach().mean()
            if self.has_masking_module:
                pixel_values = inputs["pixel_values"]
                learned = model(pixel_values=pixel_values, masking="learned").reconstruction_loss.mean()
                # Every image has equally many masked patches.
                self._eval_sums += len(pixel_values) * torch.stack([learned, loss]).float()
        return loss, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As the Trainer's; with a masking module, also `mask_difficulty` over the whole data set.

        As in the Trainer's own loss, images that accelerate repeats to fill the processes' last batches count twice.
        """
        self._eval_sums.zero_()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.has_masking_module:
            learned, random = self.accelerator.reduce(self._eval_sums, reduction="sum").tolist()
            output.metrics[f"{metric_key_prefix}_mask_difficulty"] = learned / random
        return output

    @torch.no_grad()
    def measure_difficulty(self) -> float:
        """Mask difficulty: L_rec under the learned mask / L_rec under a random one, on the held-out batch.

        Below 1 while the masking module is a partner, above 1 once it is an adversary. Draws no random numbers.
        """
        batch, was_training = self.held_out_batch(), self.model.training
        self.model.eval()
        with self.compute_loss_context_manager():
            learned = self.model(pixel_values=batch["pixel_values"], masking="learned").reconstruction_loss
            random = self.model(**batch, masking="random").reconstruction_loss
        self.model.train(was_training)
        return (learned / random).item()

    # -- logging --------------------------------------------------------------------------------------------------

    def _observe(self, loss: torch.Tensor, outputs: Any, factor: torch.Tensor | float | None) -> None:
        """Adds a batch's scalars to the running sums, on the device."""
        step, terms = self.state.global_step, outputs if isinstance(outputs, dict) else {}
        values = {"loss": loss.detach().mean()} | {
            name: value.detach().float().mean()  # under DataParallel one value a device
            for name, value in terms.items()
            if name != "loss" and isinstance(value, torch.Tensor) and (value.ndim == 0 or name.endswith("_loss"))
        }
        self._watch.add_losses(step, {name: value for name, value in values.items() if name.endswith("loss")})
        if factor is not None:
            values["curriculum_factor"] = torch.as_tensor(factor, device=self.args.device)
        if terms.get("keep_probabilities") is not None:
            # Of the whole batch of a step: a spread between images does not average over its parts.
            sums = keep_probability_sums(terms["keep_probabilities"])
            self._keep_sums[step] = self._keep_sums[step] + sums if step in self._keep_sums else sums
        for name, value in values.items():
            self._add(name, value)

    def _add(self, name: str, values: torch.Tensor) -> None:
        finite = values.isfinite()  # what is not belongs to a step that is skipped
        sums = torch.stack([torch.where(finite, values, 0).float().sum(), finite.float().sum()])
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def _fold(self) -> None:
        """Takes the statistics of the keep probabilities, step by step, into the running sums; by all processes."""
        if self._keep_sums:
            sums = self.accelerator.reduce(torch.stack(list(self._keep_sums.values())), reduction="sum")
            for name, values in keep_probability_statistics(sums).items():
                self._add(name, values)
            self._warn(sums[[step >= self._settled for step in self._keep_sums]])
            self._keep_sums = {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs; the training log also carries the means of every scalar since the last, over all processes.

        What no step has known (all were skipped) is left out.
        """
        if "loss" in logs and self._sums:
            self._fold()
            names = sorted(self._sums)
            sums = self.accelerator.reduce(torch.stack([self._sums[name] for name in names]), reduction="sum").tolist()
            means = {name: total / count for name, (total, count) in zip(names, sums, strict=True) if count}
            if "loss" in means:
                means["loss"] = logs["loss"]
            else:
                del logs["loss"]
            logs.update(means)
            rates = {group["lr"] for group in self.optimizer.param_groups if group.get("masking_module")}
            if rates:
                logs["masker_learning_rate"] = max(rates)
            self._sums = {}
        super().log(logs, start_time)

    # -- nan and inf ----------------------------------------------------------------------------------------------

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # With loss scaling infinite gradients are everyday, and the scaler skips them by itself.
        if norm is not None and self.accelerator.scaler is None:
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
            self._watch.add_gradient(self.state.global_step, norm.to(self.args.device))
        if not self.args.max_skipped_steps:
            return norm
        found = self._watch.look()
        if found is None:
            return norm
        self._skipped += 1
        if self._skipped > self.args.max_skipped_steps:
            raise self._non_finite(found)
        logger.warning(
            f"{self._describe(found)} Skipped this step, the {self._skipped}. of at most {self.args.max_skipped_steps}."
        )
        self._keep_sums.pop(found.step, None)
        model.zero_grad()  # to none: neither momentum nor weight decay moves the weights
        return None

    def _check_finite(self) -> None:
        """Stops the run if anything since the last look was nan or inf; all processes take part."""
        found = self._watch.look()
        if found is not None:
            raise self._non_finite(found)

    def _non_finite(self, found: NonFinite) -> NonFiniteError:
        sealed = [checkpoint for checkpoint in checkpoints(self.args.output_dir) if is_sealed(checkpoint)]
        last = (
            f"The last checkpoint from before is {sealed[-1].name}" if sealed else "There is no checkpoint from before"
        )
        return NonFiniteError(
            f"{self._describe(found)} {last}. Take a smaller learning_rate, clip gradients (`max_grad_norm`), leave "
            "out fp16, look at these images, or let a few such steps be skipped (`max_skipped_steps`)."
        )

    def _describe(self, found: NonFinite) -> str:
        what = "the gradient" if found.names == ["grad_norm"] else f"the loss ({', '.join(found.names)})"
        text = f"Step {found.step + 1}: {what} is not finite."
        per_step = range(self.args.gradient_accumulation_steps)
        batches = found.batches or [(b, p) for b in per_step for p in range(self.args.world_size)]
        indices = self._image_indices(found.step, batches)
        return text if indices is None else f"{text} Its images, by their indices in the training set: {indices}."

    def _image_indices(self, step: int, batches: list[tuple[int, int]]) -> list[int] | None:
        """Which training images were in some micro-batches `(batch, process)` of a step; `None` where nobody knows."""
        sampler, loader = getattr(self, "epoch_sampler", None), self.callback_handler.train_dataloader
        if (
            sampler is None
            or loader is None
            or self.args.ignore_data_skip
            or self.args.accelerator_config.split_batches
        ):
            return None
        accumulation, size = self.args.gradient_accumulation_steps, self._train_batch_size
        epoch, update = divmod(step, math.ceil(len(loader) / accumulation))
        order = sampler.order(epoch).tolist()
        starts = [((update * accumulation + b) * self.args.world_size + p) * size for b, p in batches]
        return [index for start in starts for index in order[start : start + size]]

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # Where the loss is read back anyway, and before anything is saved; and often enough that nothing piles up.
        due = self.state.global_step % _LOOK_STEPS == 0
        if due or self.control.should_log or self.control.should_save or self.control.should_evaluate:
            self._check_finite()
        if due:
            self._fold()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._check_finite()
        return super()._finalize_training(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; the folder is sealed. A model that is not finite is not saved.

        Raises:
            NonFiniteError: A loss or a gradient since the last look was nan or inf.
        """
        self._check_finite()
        super().save_model(output_dir, _internal_call)

    # -- record, card and Hub -------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        super()._save(output_dir, *args, **kwargs)
        if not self.args.should_save:
            return
        folder = self.args.output_dir if output_dir is None else output_dir
        self._record.write(folder, self)
        if self._crops is not None and folder != self.args.output_dir:  # a checkpoint, not the finished model
            self._crops.save(folder)

    def create_model_card(
        self, language: str | None = None, license: str | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Makes `README.md` from what the run recorded; one that was edited by hand stays as it is, with a warning.

        Args:
            license: Of the weights, by the Hub's identifier; the earlier card's, or Apache-2.0, if not given.
            language, args, kwargs: The Trainer's other arguments, not used: the record knows better.
        """
        if not self.is_world_process_zero():
            return
        self.save_state()
        if self.state.log_history:
            save_figure(curves_figure(self.state.log_history), Path(self.args.output_dir) / "pictures" / "curves.png")
        try:
            write_card(self.args.output_dir, self.hub_model_id, license)
        except EditedCardError as error:
            logger.warning(f"The model card stays as it is: {error}")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the Trainer's, but in one commit, and only what [`hub_files`] names: no logs, data or training arguments.

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
        if blocking:
            return upload(commit_message=commit_message, **options)
        return run_as_future(upload, commit_message=commit_message, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As the Trainer's, with the model's code, and without `training_args.bin`, which names local folders."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            if not self.args.hub_always_push:
                return
            self.push_in_progress.wait_until_done()  # it reads the files that are about to be written over
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        checkpoint, message = Path(checkpoint_folder), f"Training in progress, step {self.state.global_step}"
        unseal(self.args.output_dir)
        for name in hub_files(checkpoint):
            shutil.copy(checkpoint / name, Path(self.args.output_dir, name))
        jobs = [self._upload(message, blocking=False)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            files = sorted(path.name for path in checkpoint.iterdir() if path.name != "training_args.bin")
            place = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
            jobs.append(
                self._upload(
                    f"{message}, checkpoint", blocking=False, folder=checkpoint, files=files, path_in_repo=place
                )
            )
        self.push_in_progress = PushInProgress(jobs)

    @property
    def _settled(self) -> float:
        """The step from which on the masks are judged; before, m has hardly left its start."""
        return max(self.state.max_steps / 10, 50)

    def _warn(self, keep_sums: torch.Tensor) -> None:
        """Says once what is wrong with the masks, by the sums `(steps, 5, num_patches)` of settled steps."""
        if not len(keep_sums) or not self.is_world_process_zero():
            return
        statistics = {k: v.mean().item() for k, v in keep_probability_statistics(keep_sums).items()}
        few = keep_sums[0, 0, 0] < 8  # images, whose spread says little
        for kind, message in mask_warnings(statistics, self.model.config.mask_ratio).items():
            if kind not in self._warned and not (kind == "collapsed" and few):
                self._warned.add(kind)
                logger.warning(f"Step {self.state.global_step}: {message}")


@functools.cache
def medium_is_float32() -> bool:
    """Whether this CPU computes float32 matrix products in float32 when their precision is "medium".

    They then go to oneDNN, which on many CPUs is twice as fast as the default. One with bf16 units rounds the factors
    to bf16 (an error of 1e-3 instead of 1e-7), so it is tried out.
    """
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    exact = nn.functional.linear(a.double(), b.double())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        error = (nn.functional.linear(a, b) - exact).abs().max() / exact.abs().max()
    finally:
        torch.set_float32_matmul_precision(before)
    return error.item() < 1e-5


@contextlib.contextmanager
def fast_float32_matmul(args: PretrainingArguments) -> Iterator[None]:
    """Within it, float32 training on a CPU multiplies by oneDNN where that is as exact ([`medium_is_float32`]).

    Another `torch.set_float32_matmul_precision` than torch's default stays as it is.
    """
    default = torch.get_float32_matmul_precision()
    in_float32 = not (args.bf16 or args.fp16) and default == "highest"
    if args.device.type != "cpu" or not in_float32 or not medium_is_float32():
        yield
        return
    logger.info('float32 matrix products go to oneDNN (matmul precision "medium"), which is as exact on this CPU.')
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(default)


def _samples(dataset: Any) -> Iterator[Any]:
    """The samples in order, of a map-style or an iterable data set."""
    return (dataset[i] for i in range(len(dataset))) if hasattr(dataset, "__len__") else iter(dataset)


def _reads_in_parts(args: PretrainingArguments) -> bool:
    """Whether each process reads its own part of a stream, instead of the first one reading for all.

    The parts may end at different steps, so that nothing that all processes do together may wait for an epoch's end.
    """
    by_epoch = "epoch" in (args.eval_strategy, args.save_strategy, args.logging_strategy)
    config = args.accelerator_config
    return args.world_size > 1 and config.dispatch_batches is None and not config.split_batches and not by_epoch
