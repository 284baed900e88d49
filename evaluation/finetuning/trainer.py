# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Training a classifier."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import Dataset
from transformers import EvalPrediction

from clmae.configuration.errors import InputError
from clmae.evaluation.finetuning.arguments import ClassificationArguments, LinearLarsArguments
from clmae.evaluation.finetuning.images import AugmentedImages, MixingCollator
from clmae.evaluation.finetuning.lars import LARS
from clmae.evaluation.finetuning.models import LinearProbe
from clmae.evaluation.finetuning.parameters import frozen_modules, parameter_groups
from clmae.evaluation.report import TOP_K
from clmae.training.base import BaseTrainer
from clmae.training.callbacks import RunComponent
from clmae.training.checks import check_samples

_REMEDY = "Make a `LabelledImages(dataset, processor)` of it (in `clmae.evaluation.features`), or give (tensor, label)."


class EMACallback(RunComponent):
    """Keeps an exponential moving average of the trained weights, and puts it into the model at the end.

    It is saved in each checkpoint and restored on resume.
    """

    file_name = "ema.safetensors"

    def __init__(self, trainer: BaseTrainer, decay: float) -> None:
        self.trainer = trainer
        self.parameters = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
        self.average: dict[str, Tensor] = {}
        self._update: Callable[..., None] = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def start(self, checkpoint: str | None) -> None:
        """Starts from the weights as they are, or takes the average of a checkpoint.

        Raises:
            InputError: The checkpoint has none.
        """
        saved: dict[str, Tensor] = self.parameters
        if checkpoint:
            path = Path(checkpoint) / self.file_name
            if not path.is_file():
                raise InputError(
                    f"`resume_from_checkpoint`: {checkpoint} has no {self.file_name}: that run kept no average. Leave "
                    "out `ema_decay`, or start anew."
                )
            saved = load_file(path)
        self.average = {
            name: saved.get(name, value).detach().clone().to(value.device) for name, value in self.parameters.items()
        }

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        """Moves the average."""
        self._update(list(self.average.values()), list(self.parameters.values()), None)

    def save(self, folder: str) -> None:
        """Puts the average into a checkpoint; the finished model has it as its weights."""
        if self.trainer.in_checkpoint:
            save_file(self.average, Path(folder) / self.file_name)

    @torch.no_grad()
    def on_train_end(self, args, state, control, **kwargs):
        """Puts the average into the model."""
        for name, value in self.parameters.items():
            value.copy_(self.average[name])


class LinearProbeCallback(RunComponent):
    """Saves a finished linear probe in its own format: the Trainer's checkpoints hold only what it loads."""

    def __init__(self, trainer: BaseTrainer) -> None:
        self.trainer = trainer

    def save(self, folder: str) -> None:
        """See the class."""
        if not self.trainer.in_checkpoint:
            self.trainer.model.save_pretrained(folder)


class ClassificationTrainer(BaseTrainer):
    """Trains a classifier by [`FinetuningArguments`] or [`LinearLarsArguments`].

    The loss is the cross-entropy to the mixed and smoothed targets; evaluation predicts the (up to) five likeliest
    classes. What is frozen stays in evaluation mode and out of the optimiser. Checkpoints, resume and order of
    the images are those of [`BaseTrainer`].

    Args:
        model: From [`load_classifier`] or [`from_scratch`].
        args: How to train.
        train_dataset: [`AugmentedImages`].
        eval_dataset: Gives `(pixel_values, label)`.
        num_classes: Of the targets.

    Raises:
        InputError: `train_dataset` is of another kind, `eval_dataset` empty or without pixels.
    """

    args: ClassificationArguments
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        model: nn.Module,
        args: ClassificationArguments,
        train_dataset: AugmentedImages,
        eval_dataset: Dataset | None = None,
        *,
        num_classes: int,
        **kwargs: Any,
    ) -> None:
        if not isinstance(train_dataset, AugmentedImages):
            raise InputError(
                f"`train_dataset` is a {type(train_dataset).__name__}: make an `AugmentedImages(dataset, image_column, "
                "labels, ...)` of it (in `clmae.evaluation.finetuning`)."
            )
        check_samples(None, eval_dataset, _pixel_values, _REMEDY)
        alphas = dict(mixup_alpha=args.mixup_alpha, cutmix_alpha=args.cutmix_alpha)
        collator = MixingCollator(num_classes, seed=args.data_order_seed, **alphas)
        kwargs |= dict(compute_metrics=_accuracy, preprocess_logits_for_metrics=_top_classes)
        super().__init__(model, args, collator, train_dataset, eval_dataset, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss below is a mean over its batch, whatever the model's would be
        self._frozen = frozen_modules(self.model)
        if args.ema_decay:
            self.add_callback(EMACallback(self, args.ema_decay))
        if isinstance(model, LinearProbe):
            self.add_callback(LinearProbeCallback(self))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """LARS for the linear probe, otherwise the Trainer's choice with layer-wise learning rates."""
        if self.optimizer is not None:
            return self.optimizer
        args, source = self.args, self.model if model is None else model
        assert args.learning_rate is not None  # the arguments have computed it
        groups = parameter_groups(source, args.learning_rate, args.weight_decay, args.layer_decay)
        if isinstance(args, LinearLarsArguments):
            self.optimizer = LARS(
                groups, args.learning_rate, args.lars_momentum, trust_coefficient=args.lars_trust_coefficient
            )
        else:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, source)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy to classes `(B,)` or probabilities `(B, num_classes)`; smoothed in training only."""
        if model.training:
            for part in self._frozen:  # the Trainer puts all of it into training mode at every step
                part.eval()
        logits = model(pixel_values=inputs["pixel_values"]).logits
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        loss = F.cross_entropy(logits.float(), inputs["labels"], label_smoothing=smoothing)
        if model.training:
            self.finite.add_losses({"loss": loss})
        return (loss, {"logits": logits}) if return_outputs else loss


def _pixel_values(sample: Any) -> Any:
    return sample[0] if isinstance(sample, (tuple, list)) and isinstance(sample[0], Tensor) else None


def _top_classes(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.topk(min(TOP_K, logits.shape[-1]), dim=-1).indices


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Of predictions that are the likeliest classes `(n, k)`, the best first."""
    return {"accuracy": float((prediction.predictions[:, 0] == prediction.label_ids).mean())}
