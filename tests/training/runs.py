# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Tiny models, data and trainers, for the tests of what happens over time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

import clmae
from clmae.training import CurriculumTrainer, PretrainingArguments
from clmae.training.data import ImageDataset, StreamingImageDataset

from ..conftest import TINY, TINY_CMAE, TINY_MASKER

CONFIG = TINY | dict(decoder_num_hidden_layers=1)
MASKER = TINY_MASKER | dict(masker_num_hidden_layers=1)
VARIANTS: dict[str, dict[str, Any]] = {
    "mae": {},
    "cl_mae": MASKER,
    "cl_mae-error": dict(masker_num_attention_heads=2),
    "cmae": MASKER | TINY_CMAE,
    "cmae-error": dict(learned_masks=True, masker_num_attention_heads=2, prediction_ratio=0.5),
}
QUIET = dict(use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", dataloader_pin_memory=False)
SHORT = dict(per_device_train_batch_size=4, per_device_eval_batch_size=4, learning_rate=1e-3, warmup_steps=0)
SILENT = dict(logging_steps=1, difficulty_steps=0, picture_steps=0)


def tiny_model(family: str = "cl_mae", **fields: Any) -> nn.Module:
    """A model of 16 patches of 4 pixels, of a family or one of its `VARIANTS`; always the same weights."""
    torch.manual_seed(0)
    config, _, model, *_ = clmae.FAMILIES[family.partition("-")[0]]
    return model(config(**{**CONFIG, **VARIANTS[family], **fields}))


def pil_dataset(count: int, size: int = 20) -> datasets.Dataset:
    """Smooth random pictures of `size` pixels."""
    coarse = np.random.default_rng(0).uniform(0, 255, (count, 5, 5, 3))
    pixels = coarse.repeat(size // 5, axis=1).repeat(size // 5, axis=2).astype(np.uint8)
    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": list(pixels)}, features=features)


VIEWS = dict(image_size=(16, 16), num_channels=3, num_patches=16, patch_size=(4, 4), mean=[0.5] * 3, std=[0.25] * 3)


def image_dataset(count: int = 16, **settings: Any) -> ImageDataset:
    """Samples as every tiny model reads them."""
    return ImageDataset(pil_dataset(count), "image", **{**VIEWS, **settings})


def streaming_dataset(count: int = 16, shards: int = 2, **settings: Any) -> StreamingImageDataset:
    """A stream of them."""
    stream = pil_dataset(count).to_iterable_dataset(num_shards=shards)
    return StreamingImageDataset(stream, "image", **{**VIEWS, **settings})


def plain_dataset(count: int = 16) -> list[dict[str, torch.Tensor]]:
    """`pixel_values` alone, without noise."""
    generator = torch.Generator().manual_seed(5)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=generator)} for _ in range(count)]


def tiny_trainer(output_dir: Path, model: nn.Module | str = "cl_mae", **options: Any) -> CurriculumTrainer:
    """A quiet trainer on a CPU; `options` are fields of the arguments, or the trainer's own parameters.

    The learning rate has no warm-up, so that the first step moves the weights.
    """
    model = tiny_model(model) if isinstance(model, str) else model
    views = getattr(model.config, "num_views", 1)
    given = {"train_dataset": image_dataset(num_views=views), "eval_dataset": image_dataset(6, train=False)}
    for name in ("train_dataset", "eval_dataset", "data_collator", "callbacks", "processing_class", "optimizers"):
        if name in options:
            given[name] = options.pop(name)
    args = PretrainingArguments(output_dir=str(output_dir), **{**QUIET, **SHORT, **SILENT, **options})
    return CurriculumTrainer(model, args, **given)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every weight."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal_weights(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit by bit."""
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def warned(caplog: Any) -> list[str]:
    """The warnings of this package so far."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("clmae") and r.levelname == "WARNING"]


def logged(trainer: CurriculumTrainer, name: str) -> dict[int, float]:
    """Step and value of everything logged under a name."""
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


class EachStep(TrainerCallback):
    """Calls a function at the end of each step."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See the class."""
        self.function(state.global_step, **kwargs)


class FirstGradients(TrainerCallback):
    """Keeps what the first optimiser step was given."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """See the class."""
        if state.global_step == 0:
            self.gradients = {
                name.removeprefix("module."): parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }


def record_run(
    output_dir: Path,
    everything: bool = False,
    resident: bool = False,
    stream: bool = False,
    count: int = 16,
    resume: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Gradients of the first step, weights at the end and everything logged of a run by plain gradient descent.

    Not by AdamW: it turns the rounding errors of gradients that are 0 into whole steps. Of a CL-MAE, or with
    `everything` of a CMAE with learned masks, two views, and crops around the objects; with `resident` from a device-
    resident data set, with `stream` from a stream of two shards; `count` images; `resume` is a checkpoint.
    """
    first = FirstGradients()
    model = tiny_model("cmae", learned_masks=True) if everything else tiny_model()
    dataset = image_dataset(count, contrastive_crop=everything, num_views=1 + everything, device_resident=resident)
    if stream:
        dataset = streaming_dataset()
    seen: list[float] = []  # a number of each image in an epoch, in the order of the training

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            seen.extend(kwargs["noise"].flatten(1)[:, 0].tolist())

    model.register_forward_pre_hook(look, with_kwargs=True)
    trainer = tiny_trainer(
        output_dir,
        model,
        train_dataset=dataset,
        eval_dataset=image_dataset(8, train=False),
        eval_strategy="steps",
        eval_steps=2,
        difficulty_steps=2,
        callbacks=[first],
        **{"optim": "sgd", **options},
    )
    trainer.train(resume_from_checkpoint=resume)
    return {
        "gradients": first.gradients,
        "weights": weights(trainer.model),
        "history": trainer.state.log_history,
        "boxes": dataset.crop_boxes,
        "seen": seen,
    }
