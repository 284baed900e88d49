# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`CurriculumTrainer`: transformers' `Trainer` for masked autoencoders, with or without a masking module."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import get_scheduler
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from clmae.configuration.configuration_mae import pair
from clmae.configuration.errors import InputError
from clmae.model_cards import EditedCardError, describe_data, write_card
from clmae.modeling import MAEPreTrainedModel
from clmae.training.arguments import PretrainingArguments
from clmae.training.base import BaseTrainer
from clmae.training.callbacks import ContrastiveCropCallback, DifficultyCallback, PictureCallback, RecordCallback
from clmae.training.checks import check_samples, check_setup
from clmae.training.curriculum import curriculum_factor
from clmae.training.data import (
    DataArguments,
    ImageCollator,
    ImageDataset,
    ResidentImageDataset,
    StreamingImageDataset,
    normalize,
    resident_if_small,
    sample_generator,
    unnormalized,
)
from clmae.training.flops import step_flops
from clmae.training.initial import load_initial_weights
from clmae.training.log_means import LogMeans
from clmae.training.matmul import Float32MatmulCallback
from clmae.training.pictures import curves_figure, save_figure

logger = logging.get_logger(__name__)

_REMEDY = (
    "Make an `ImageDataset(dataset, image_column, ...)` of images (in `clmae.training.data`, as is `build_datasets`, "
    "which makes it of a folder), or give samples {'pixel_values': (C, H, W)}, or a `data_collator`."
)

_NO_WORKERS = {
    **dict(dataloader_num_workers=0, dataloader_persistent_workers=False, dataloader_prefetch_factor=None),
    **dict(dataloader_multiprocessing_context=None, dataloader_pin_memory=False),
}


class CurriculumTrainer(BaseTrainer):
    """Pretrains masked autoencoders: this project's families, and transformers' `ViTMAEForPreTraining`.

    A `Trainer` in every respect (callbacks, logging, mixed precision, accumulation, DDP, resume), with what
    [`BaseTrainer`] adds, that also

    - gives a model that learns its masks the curriculum factor λ_CL, from the optimiser step over all steps, and its
      masking module a learning rate (`masker_learning_rate_multiplier`), a schedule (`masker_lr_scheduler_type`) and an
      update interval (`masker_update_interval`) of its own;
    - logs every scalar that the model returns beside its loss, and statistics of the keep probabilities, as
      [`LogMeans`] averages them, which warns where they show that the masking module has gone astray;
    - measures `mask_difficulty` and draws figures, on the first `num_probe_images` of `eval_dataset`;
    - evaluates by the reconstruction loss under fixed random masks, whatever masks the model learns, and reports
      `eval_mask_difficulty` beside it, on all of the evaluation set;
    - writes `pretraining.json` beside every set of weights, and makes the model card of it. `data_arguments`, where the
      datasets were built from such, say in the card what they are.

    With an [`ImageDataset`] every image's augmentation and mask noise are keyed by seed, epoch and index, and a resumed
    run continues bit by bit on a CPU. Other datasets must give `pixel_values`, and may give `noise`; without it, masks
    are keyed by seed, step and process.

    Raises:
        InputError: `args` are no [`PretrainingArguments`]; a dataset is empty, too small, or without pixels; the
            arguments do not suit the model.
    """

    args: PretrainingArguments
    model: Any  # of the families' classes, or transformers' ViTMAE; FSDP's wrapper while it trains
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: Any = None,
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
            check_samples(train_dataset, eval_dataset, _pixel_values, _REMEDY)
        if isinstance(train_dataset, StreamingImageDataset) and _reads_in_parts(args):
            train_dataset = train_dataset.part(args.process_index, args.world_size)
        resident = getattr(train_dataset, "device_resident", False)
        if resident:
            train_dataset = ResidentImageDataset(train_dataset, args.device)
        elif resident is None and not args.dataloader_num_workers and data_collator is None:  # which gets whole batches
            train_dataset = resident_if_small(train_dataset, args.device, args.world_size)
        # Uint8 to the device, and normalised there; but an own collator gets the samples that it knows.
        self._normalizes = data_collator is None and isinstance(train_dataset, (ImageDataset, StreamingImageDataset))
        if self._normalizes:
            data_collator = ImageCollator(train_dataset.mean, train_dataset.std)
        if args.ddp_find_unused_parameters is None and isinstance(model, MAEPreTrainedModel):
            # A step uses all parameters, so that there is nothing to look for; but with an interval the masking module
            # has no gradient on some steps, and must then stay as it is: a gradient of zero would still let AdamW's
            # momentum and weight decay move it.
            args.ddp_find_unused_parameters = args.masker_update_interval > 1
        if args.init:
            load_initial_weights(model, args.init)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, *rest, **kwargs)
        if self.accelerator.ddp_handler is not None:  # no second copy of the gradients
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        check_setup(self)
        self._accepts_noise = "noise" in inspect.signature(self.model.forward).parameters
        self._held_out: dict[str, torch.Tensor] | None = None
        # Mean and standard deviation of the channels: as they are, and on the device.
        self._moments: tuple[Any, tuple[torch.Tensor, ...]] = (None, ())
        self._substep = (-1, 0)  # optimiser step, and how many batches of it have been seen
        self._eval_sums = torch.zeros(2, device=self.args.device)  # L_rec of images under learned and random masks
        self.means = LogMeans(self)
        record = RecordCallback(self, None if data_arguments is None else describe_data(data_arguments))
        for component in (self.means, record, Float32MatmulCallback(args)):
            self.add_callback(component)
        if getattr(self.train_dataset, "crop_boxes", None) is not None:
            self.add_callback(ContrastiveCropCallback(self))
        if self.eval_dataset is not None and args.picture_steps:
            self.add_callback(PictureCallback(self))
        if self.has_masking_module and args.difficulty_steps:
            if self.eval_dataset is None:
                logger.warning("No `eval_dataset`: mask difficulty is not measured, and no figures are drawn.")
            else:
                self.add_callback(DifficultyCallback(self))

    @property
    def has_masking_module(self) -> bool:
        """Whether the model learns its masks."""
        return getattr(self.model.config, "learns_masks", False)

    # -- optimiser ------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimiser, with the masking module in parameter groups of its own."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        source = self.model if model is None else model
        masker = {id(p) for name, p in source.named_parameters() if "masking_module." in name}
        for group in list(optimizer.param_groups) if created and masker else ():
            params = [p for p in group["params"] if id(p) in masker]
            if params:
                group["params"] = [p for p in group["params"] if id(p) not in masker]
                rate = group["lr"] * self.args.masker_learning_rate_multiplier
                optimizer.add_param_group({**group, "params": params, "lr": rate, "masking_module": True})
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The Trainer's scheduler, with the masking module on a schedule of its own (`masker_lr_scheduler_type`)."""
        created = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        groups = scheduler.optimizer.param_groups
        masker_groups = [i for i, group in enumerate(groups) if group.get("masking_module")] if created else []
        if masker_groups:
            schedule = get_scheduler(
                self.args.masker_lr_scheduler_type,
                torch.optim.SGD([torch.zeros(1)], lr=1.0),  # only its function of the step is of use
                self.args.get_warmup_steps(num_training_steps),
                num_training_steps,
            ).lr_lambdas[0]
        for i in masker_groups:
            scheduler.lr_lambdas[i] = schedule
            groups[i]["lr"] = groups[i]["initial_lr"] * schedule(0)
        return scheduler

    # -- data -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's loader, whose workers ignore SIGTERM; without workers where the images are on the device.

        Of an [`ImageDataset`] or a [`StreamingImageDataset`], and without a collator of your own, a batch has uint8
        `pixel_values` (see [`~clmae.training.data.unnormalized`]), which `compute_loss` normalises.
        """
        dataset, config = self.train_dataset, self.accelerator.dataloader_config
        dispatch, is_part = config.dispatch_batches, getattr(dataset, "is_part", False)
        if is_part:  # accelerate would have the first process read for all, or make every process read everything
            config.dispatch_batches = False
        self.train_dataset = unnormalized(dataset) if self._normalizes else dataset
        try:
            with self.replaced_arguments(**(_NO_WORKERS if isinstance(dataset, ResidentImageDataset) else {})):
                loader: Any = super().get_train_dataloader()
        finally:
            self.train_dataset, config.dispatch_batches = dataset, dispatch
        if is_part:
            loader.dataset.num_processes, loader.dataset.process_index = 1, 0
        return loader

    def _normalized(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch whose `pixel_values` are normalised floats, made of uint8 ones."""
        pixels = inputs.get("pixel_values")
        if self._normalizes and isinstance(pixels, torch.Tensor) and pixels.dtype == torch.uint8:
            moments = ([*self.train_dataset.mean], [*self.train_dataset.std])
            if self._moments[0] != moments:  # once: the device would be waited for
                self._moments = moments, tuple(torch.tensor(values, device=pixels.device) for values in moments)
            pixel_values = normalize(pixels, *self._moments[1])
            inputs = {**inputs, "pixel_values": self._prepare_input(pixel_values)}  # DeepSpeed's dtype
        return inputs

    def held_out_batch(self) -> dict[str, torch.Tensor]:
        """The first `num_probe_images` of `eval_dataset`, with fixed `noise`, on the device; the same every time."""
        if self._held_out is None:
            source = self.eval_dataset
            source = next(iter(source.values())) if isinstance(source, dict) else source  # the first of several
            samples = map(source.__getitem__, range(len(source))) if hasattr(source, "__len__") else iter(source)
            batch = self.data_collator(list(itertools.islice(samples, self.args.num_probe_images)))
            batch = {name: batch[name] for name in ("pixel_values", "noise") if name in batch}
            if batch["pixel_values"].ndim == 5:  # several views of each image: one of them is looked at
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
        inputs = self._complete_inputs(self._normalized(inputs), model.training)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            terms = outputs if isinstance(outputs, dict) else {}
            scalars = {"loss": loss.detach().mean()} | {
                name: value.detach().float().mean()  # under DataParallel one value per device
                for name, value in terms.items()
                if name != "loss" and isinstance(value, torch.Tensor) and (value.ndim == 0 or name.endswith("_loss"))
            }
            self.finite.add_losses({name: value for name, value in scalars.items() if name.endswith("loss")})
            if "curriculum_factor" in inputs:
                scalars["curriculum_factor"] = torch.as_tensor(inputs["curriculum_factor"], device=self.args.device)
            self.means.add(scalars, terms.get("keep_probabilities"))
        return (loss, outputs) if return_outputs else loss

    def _complete_inputs(self, inputs: dict[str, Any], training: bool) -> dict[str, Any]:
        step = self.state.global_step
        if self.has_masking_module and training:
            factor = self.curriculum_factor(step)
            # A 0-d tensor made on the device: no synchronisation, and no recompilation as it changes. DataParallel
            # would try to split it.
            as_tensor = self.args.n_gpu <= 1
            inputs["curriculum_factor"] = torch.full((), factor, device=self.args.device) if as_tensor else factor
            inputs["masking"] = "learned"
            inputs["compute_masker_loss"] = step % self.args.masker_update_interval == 0
        elif self.has_masking_module:
            inputs["masking"] = "random"
        if "noise" not in inputs and self._accepts_noise and (not training or _uses_noise(self.model.config)):
            # In evaluation every batch has the same masks. In training each batch and process has its own: all
            # processes share one seed.
            key = (0, 0)
            if training:
                self._substep = (step, self._substep[1] + 1 if self._substep[0] == step else 0)
                key = (step + 1, self._substep[1] * self.args.world_size + self.args.process_index)
            inputs["noise"] = self._noise(inputs["pixel_values"], *key)
        return inputs

    def curriculum_factor(self, step: int) -> float:
        """λ_CL at optimiser step `step` of this run; its end where there is no run."""
        config = self.model.config
        if not self.state.max_steps:
            return config.curriculum_start if config.curriculum_shape == "constant" else config.curriculum_end
        return curriculum_factor(
            step, self.state.max_steps, config.curriculum_shape, config.curriculum_start, config.curriculum_end
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs; the training log also carries the means of every scalar since the last, over all processes.

        What no step has known (all were skipped) is left out.
        """
        if "loss" in logs and (means := self.means.take()) is not None:
            # Of steps that were skipped, the Trainer knows a loss of 0 and a gradient that is nan.
            known = {"loss": "loss" in means, "grad_norm": math.isfinite(logs.get("grad_norm", 0.0))}
            logs = {name: value for name, value in logs.items() if known.get(name, True)}
            logs |= {name: mean for name, mean in means.items() if name != "loss"}
            rates = [group["lr"] for group in self.optimizer.param_groups if group.get("masking_module")]
            if rates:
                logs["masker_learning_rate"] = max(rates)
        super().log(logs, start_time)

    # -- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's; the global random state stays as it was, so that a run does not depend on it."""
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, None, None]:
        """The batch's loss. There are no labels, and predictions of whole images are not gathered."""
        inputs = self._complete_inputs(self._normalized(self._prepare_inputs(inputs)), training=False)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, _ = self.compute_loss(model, inputs, return_outputs=True)
            loss = loss.detach().mean()
            if self.has_masking_module:
                factor = self.curriculum_factor(self.state.global_step)
                learned = model(**inputs | {"masking": "learned"}, curriculum_factor=factor).reconstruction_loss.mean()
                # Every image has equally many masked patches.
                self._eval_sums += len(inputs["pixel_values"]) * torch.stack([learned, loss]).float()
        return loss, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As the Trainer's; with a masking module, also `mask_difficulty` over the whole dataset.

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
            factor = self.curriculum_factor(self.state.global_step)
            learned = self.model(**batch, masking="learned", curriculum_factor=factor).reconstruction_loss
            random = self.model(**batch, masking="random").reconstruction_loss
        self.model.train(was_training)
        return (learned / random).item()

    # -- runs -----------------------------------------------------------------------------------------------------

    def start_run(self, checkpoint: str | None) -> None:
        """Warns where a resumed run will differ from the whole one."""
        super().start_run(checkpoint)
        if checkpoint and not hasattr(self.train_dataset, "__len__"):
            logger.warning("Resuming a stream: the run continues exactly only within the stream's first pass.")
        crops = any(isinstance(component, ContrastiveCropCallback) for component in self.components)
        if checkpoint and not crops and (Path(checkpoint) / ContrastiveCropCallback.file_name).is_file():
            logger.warning(f"{checkpoint} was made with `contrastive_crop`; this run goes on with random crops.")

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


def _uses_noise(config: Any) -> bool:
    """Whether a training step draws its masks, the tokens whose positions are withheld, or what is predicted."""
    drawn = not getattr(config, "learns_masks", False) or config.masker_objective == "error"
    return drawn or bool(getattr(config, "position_loss_weight", 0)) or config.prediction_ratio < 1


def _pixel_values(sample: Any) -> Any:
    return (sample if isinstance(sample, Mapping) else getattr(sample, "__dict__", {})).get("pixel_values")


def _reads_in_parts(args: PretrainingArguments) -> bool:
    """Whether each process reads its own part of a stream, instead of the first one reading for all.

    The parts may end at different steps, so that nothing that all processes do together may wait for an epoch's end.
    """
    by_epoch = "epoch" in (args.eval_strategy, args.save_strategy, args.logging_strategy)
    config = args.accelerator_config
    return args.world_size > 1 and config.dispatch_batches is None and not config.split_batches and not by_epoch
