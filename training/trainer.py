# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`CurriculumTrainer`: transformers' `Trainer` for masked autoencoders, with or without a masking module."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, get_scheduler
from transformers.trainer_utils import EvalLoopOutput, SchedulerType, get_last_checkpoint
from transformers.utils import logging

from clmae.configuration.configuration_mae import pair
from clmae.modeling import MAEPreTrainedModel
from clmae.training.arguments import PretrainingArguments
from clmae.training.callbacks import ContrastiveCropCallback, DifficultyCallback, EpochCallback, PictureCallback
from clmae.training.curriculum import (
    curriculum_factor,
    keep_probability_statistics,
    keep_probability_sums,
    mask_warnings,
)
from clmae.training.data import ImageDataset
from clmae.training.images import sample_generator

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
        # -1 is no sample's key: the order has a stream of its own.
        order = torch.randperm(self.num_samples, generator=sample_generator(self.seed, self.epoch, -1))
        yield from (self.epoch * self.num_samples + order).tolist()


class CurriculumTrainer(Trainer):
    """Pretrains masked autoencoders: `MAEForPreTraining`, transformers' `ViTMAEForPreTraining`, `CLMAEForPreTraining`.

    A `Trainer` in every respect (callbacks, logging, mixed precision, accumulation, DDP, resume), that also

    - gives a model with a masking module its curriculum factor λ_CL, from the optimiser step over all steps, and its
      own learning rate (`masker_learning_rate_multiplier`), schedule (`masker_lr_scheduler_type`) and update interval
      (`masker_update_interval`);
    - logs every scalar that the model returns beside its loss, and what the keep probabilities look like, averaged
      over accumulated batches and processes; warns where they show that the masking module has gone astray;
    - measures `mask_difficulty` and draws pictures, on the first `num_probe_images` of `eval_dataset`;
    - evaluates by the reconstruction loss under fixed random masks, whatever masks the model learns, and reports
      `eval_mask_difficulty` beside it, on all of the evaluation set.

    With an [`ImageDataset`] every image's augmentation and mask noise are keyed by seed, epoch and index, and a resumed
    run continues bit by bit on a CPU. Other data sets must give `pixel_values`, and may give `noise`; without it, masks
    are keyed by seed, step and process.

    Raises:
        ValueError: `args` are no [`PretrainingArguments`], or the data set is smaller than a batch.

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
        **kwargs: Any,
    ):
        args = PretrainingArguments(output_dir="clmae_output") if args is None else args
        if not isinstance(args, PretrainingArguments):
            raise ValueError(f"`args` is a {type(args).__name__}; pass PretrainingArguments (same fields, and more).")
        if kwargs.get("compute_metrics") is not None:
            raise ValueError("`compute_metrics` is given, but predictions are not gathered; use clmae.evaluation.")
        _check_size(train_dataset, args)
        if args.masker_update_interval > 1 and args.ddp_find_unused_parameters is None:
            # The masking module has no gradient on the steps between, and must then stay as it is: a gradient of
            # zero would still let AdamW's momentum and weight decay move it.
            args.ddp_find_unused_parameters = True
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, *rest, **kwargs)
        self._check_model()
        self._accepts_noise = "noise" in inspect.signature(self.model.forward).parameters
        self._sums: dict[str, tuple[torch.Tensor, int]] = {}
        self._keep_sums: dict[int, torch.Tensor] = {}  # by optimiser step
        self._held_out: dict[str, torch.Tensor] | None = None
        self._substep = (-1, 0)  # optimiser step, and how many batches of it have been seen
        self._eval_sums = torch.zeros(2, device=self.args.device)  # L_rec of images under learned and random masks
        self._warned: set[str] = set()
        self.add_callback(EpochCallback(self))
        self._crops = None
        if getattr(self.train_dataset, "crop_boxes", None) is not None:
            if not isinstance(self.model, MAEPreTrainedModel):
                raise ValueError(
                    f"`model` is a {type(self.model).__name__}, but `contrastive_crop` needs an encoder of this "
                    "project's families; take one, or crop at random."
                )
            self._crops = ContrastiveCropCallback(self)
            self.add_callback(self._crops)
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
            raise ValueError(
                "`gradient_checkpointing_kwargs` asks for `use_reentrant`, which cannot differentiate inside the "
                "forward pass, as a masking module needs; leave it out."
            )
        name = SchedulerType(self.args.lr_scheduler_type).value
        if self.lr_scheduler is None and name in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(
                f"`lr_scheduler_type` is {name!r}, which gives all parameters one schedule, but the masking module has "
                "its own. Choose a schedule that is a function of the step, such as cosine."
            )
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) == 2:
            raise ValueError(
                "`fsdp_config` has version 2, which re-shards the weights within the forward pass of a model with a "
                "masking module; set its `version` to 1, or use DDP."
            )

    @property
    def has_masking_module(self) -> bool:
        """Whether the model learns its masks."""
        return hasattr(self.model, "masking_module")

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As the Trainer's."""
        if resume_from_checkpoint and not hasattr(self.train_dataset, "__len__"):
            logger.warning("Resuming a stream: the run continues exactly only within the stream's first pass.")
        self._sums, self._keep_sums, self._warned = {}, {}, set()
        if self._crops is not None:
            self._crops.reset()
            last = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else None
            if last or resume_from_checkpoint:
                self._crops.load(last or resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    # -- optimiser ------------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay on everything but biases, norms and other 1-D parameters (MAE's recipe)."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

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

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, ImageDataset):
            self.epoch_sampler = EpochSampler(len(dataset), self.data_seed)
            return self.epoch_sampler
        return super()._get_train_sampler(train_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The Trainer's loader, with its last batch."""
        with self._last_batches():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """The Trainer's loader, with its last batch."""
        with self._last_batches():
            return super().get_test_dataloader(test_dataset)

    @contextlib.contextmanager
    def _last_batches(self) -> Iterator[None]:
        # `dataloader_drop_last` is one switch for all loaders, but only training may leave images out.
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    @property
    def data_seed(self) -> int:
        """Seed of the order of the images and of masks that the data set does not bring."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def held_out_batch(self) -> dict[str, torch.Tensor]:
        """The first `num_probe_images` of `eval_dataset`, with fixed `noise`, on the device; the same every time."""
        if self._held_out is None:
            source = self.eval_dataset
            source = next(iter(source.values())) if isinstance(source, dict) else source  # the first of several
            samples = list(itertools.islice(_samples(source), self.args.num_probe_images))
            batch = self.data_collator(samples)
            batch.setdefault("noise", self._noise(batch["pixel_values"], 0, 0))
            self._held_out = self._prepare_inputs({k: batch[k] for k in ("pixel_values", "noise")})
        return self._held_out

    def _noise(self, pixel_values: torch.Tensor, step: int, key: int) -> torch.Tensor:
        patch_size = pair(self.model.config.patch_size)
        num_patches = math.prod(n // p for n, p in zip(pixel_values.shape[-2:], patch_size, strict=True))
        generator = sample_generator(self.data_seed, step, key)
        # A row for each image, or for each of its views.
        return torch.rand(*pixel_values.shape[:-3], num_patches, generator=generator).to(pixel_values.device)

    # -- loss -----------------------------------------------------------------------------------------------------

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
            self._observe(outputs, inputs.get("curriculum_factor"))
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
        learned = self.has_masking_module and training
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

    def _observe(self, outputs: Any, factor: torch.Tensor | float | None) -> None:
        """Adds a batch's scalars to the running sums, on the device."""
        if not isinstance(outputs, dict):
            return
        values = {
            name: value.detach().float().mean()  # under DataParallel one value a device
            for name, value in outputs.items()
            if name != "loss" and isinstance(value, torch.Tensor) and (value.ndim == 0 or name.endswith("_loss"))
        }
        if factor is not None:
            values["curriculum_factor"] = torch.as_tensor(factor, device=self.args.device)
        if outputs.get("keep_probabilities") is not None:
            # Of the whole batch of a step: a spread between images does not average over its parts.
            sums = keep_probability_sums(outputs["keep_probabilities"])
            step = self.state.global_step
            self._keep_sums[step] = self._keep_sums[step] + sums if step in self._keep_sums else sums
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs; the training log also carries the means of every scalar since the last, over all processes."""
        if "loss" in logs and self._sums:
            names = sorted(self._sums)
            means = torch.stack([self._sums[name][0] / self._sums[name][1] for name in names])
            means = self.accelerator.reduce(means, reduction="mean").tolist()
            logs.update(zip(names, means, strict=True))
            if self._keep_sums:
                sums = self.accelerator.reduce(torch.stack(list(self._keep_sums.values())), reduction="sum")
                logs.update({k: v.mean().item() for k, v in keep_probability_statistics(sums).items()})
                self._warn(sums[[step >= self._settled for step in self._keep_sums]])
            rates = {group["lr"] for group in self.optimizer.param_groups if group.get("masking_module")}
            if rates:
                logs["masker_learning_rate"] = max(rates)
            self._sums, self._keep_sums = {}, {}
        super().log(logs, start_time)

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


def _samples(dataset: Any) -> Iterator[Any]:
    """The samples in order, of a map-style or an iterable data set."""
    return (dataset[i] for i in range(len(dataset))) if hasattr(dataset, "__len__") else iter(dataset)


def _check_size(train_dataset: Any, args: PretrainingArguments) -> None:
    if train_dataset is None or not hasattr(train_dataset, "__len__") or not args.dataloader_drop_last:
        return
    batch = args.train_batch_size * args.world_size
    if len(train_dataset) < batch:
        raise ValueError(
            f"`per_device_train_batch_size` asks for batches of {batch} images in all, but the training set has "
            f"{len(train_dataset)}: take a smaller batch, or `dataloader_drop_last=False`."
        )
