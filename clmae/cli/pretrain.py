# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Pretrain a masked autoencoder on images. A recipe (--config) is a YAML file of these options.

examples:
  clmae pretrain --family cl_mae --model_size small --dataset ./my_photos --output_dir out/cl-mae
  clmae pretrain --config recipes/cl_mae_cifar10.yaml --output_dir out/cifar --num_train_epochs 50
  clmae pretrain --config recipes/cl_mae_cifar10.yaml --output_dir out/cifar --resume_from_checkpoint last
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState
from transformers.hf_argparser import HfArg

from clmae import FAMILIES
from clmae.cli.options import MOST_USED, CommandParser, config_options, given, nearest, peek, read_recipe
from clmae.configuration import MAEConfig
from clmae.configuration.configuration_mae import SIZES, pair
from clmae.configuration.errors import InputError
from clmae.evaluation.online import OnlineEvaluationArguments, OnlineEvaluationCallback, trend
from clmae.model_cards.record import read_json
from clmae.training import CurriculumTrainer, InterruptCallback, PretrainingArguments, build_trainer
from clmae.training.callbacks import RunComponent
from clmae.training.data import DataArguments, ImageDataset
from clmae.training.initial import initial_config
from clmae.training.integrity import checkpoints

# What `--help` explains; `--help-all` explains all.
SHOWN = {
    *("family", "model_size", "init"),
    *("dataset", "min_crop_scale"),
    *("output_dir", "num_train_epochs", "per_device_train_batch_size", "base_learning_rate", *MOST_USED),
    *("image_size", "patch_size", "mask_ratio", "masker_objective", "curriculum_end"),
    *("learned_masks", "knn_dataset", "knn_steps"),
}


@dataclass
class FamilyArguments:
    """Which model to train."""

    family: str = HfArg(
        default="cmae",
        help="mae (random masks), cl_mae (masks learned under a curriculum) or cmae (contrast of views).",
    )
    model_size: str | None = HfArg(default=None, help=f"{', '.join(SIZES)}; options below override parts. [base]")

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise InputError(
                f"`family` is {self.family!r}{nearest(self.family, FAMILIES)}; choose one of {', '.join(FAMILIES)}."
            )


def run(argv: Sequence[str]) -> int:
    """Pretrains, and leaves model, image processor, checkpoints, logs and pictures in `--output_dir`."""
    config, data, args, values = read_arguments(argv)
    checkpoint = _checkpoint(args)
    interrupt = InterruptCallback()
    trainer = build_trainer(config, data, args, [interrupt, _ResumeMessage()])
    online = OnlineEvaluationArguments(**{f.name: values[f.name] for f in fields(OnlineEvaluationArguments)})
    if trainer.is_world_process_zero():
        print(describe(trainer), flush=True)
    evaluation = OnlineEvaluationCallback.from_arguments(trainer, online) if online.knn_dataset else None
    if evaluation is not None:
        trainer.add_callback(evaluation)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if interrupt.received is not None:
        if trainer.is_world_process_zero():
            print(f"Stopped at step {trainer.state.global_step}. Go on with the same command and")
            print("  --resume_from_checkpoint last", flush=True)
        trainer.accelerator.end_training()
        return 128 + interrupt.received
    _finish(trainer, result.metrics)
    text = None if evaluation is None else trend(trainer.state.log_history, len(evaluation.queries))
    if text is not None and trainer.is_world_process_zero():
        print(text, flush=True)
    trainer.accelerator.end_training()
    return 0


class _ResumeMessage(RunComponent):
    """Says where a resumed run goes on, and whether that is another schedule."""

    max_steps: int | None = None  # of the run that is resumed

    def start(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.max_steps = (read_json(Path(checkpoint, "trainer_state.json")) or {}).get("max_steps")

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Comes when the checkpoint has been read."""
        if not state.global_step or not state.is_world_process_zero:
            return
        done = ": nothing is left to do" if state.global_step >= state.max_steps else ""
        print(f"Going on from step {state.global_step:,} of {state.max_steps:,}{done}.", flush=True)
        if self.max_steps not in (None, state.max_steps) and not done:
            print(f"It was begun as a run of {self.max_steps:,} steps: learning rate and curriculum jump.", flush=True)


def describe(trainer: CurriculumTrainer) -> str:
    """What is about to be trained, on what, and for how long."""
    model, args = trainer.model, trainer.args
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    parts = ", ".join(f"{name.replace('vit', 'encoder').replace('_', ' ')} {n / 1e6:.2f}" for name, n in sizes.items())
    text = f"{model.config.model_type}: {parts} million parameters; images of {model.config.image_size} pixels, "
    text += f"{model.config.num_patches} patches; {args.total_train_batch_size} images per step."
    if isinstance(trainer.train_dataset, ImageDataset):
        held_out = 0 if trainer.eval_dataset is None else len(trainer.eval_dataset)
        images = len(trainer.train_dataset)
        epochs = args.num_train_epochs if args.max_steps <= 0 else args.max_steps * args.total_train_batch_size / images
        text += f" {images:,} images to learn from, {held_out:,} to evaluate on; {epochs:,.4g} epochs."
        first, size = trainer.train_dataset.first_size, pair(model.config.image_size)
        if first[0] < size[0] and first[1] < size[1]:
            text += f" The first image has {first[0]} x {first[1]} pixels, and is enlarged:"
            text += " a smaller --image_size, and a --patch_size that divides it, take less time."
    if sizes["decoder"] > sizes["vit"]:
        text += " The decoder is larger than the encoder, and takes most of the time: see the `decoder_…` options."
    return text


def read_arguments(argv: Sequence[str]) -> tuple[MAEConfig, DataArguments, PretrainingArguments, dict[str, Any]]:
    """What to train, on what and how; and every option's value by its name.

    Raises:
        InputError: An option is unknown, has a wrong value, or does not go with another.
    """
    config_class = FAMILIES[_family(argv)][0]
    groups = {
        "family": FamilyArguments,
        "data": DataArguments,
        "training": PretrainingArguments,
        "evaluation": OnlineEvaluationArguments,
        f"model (fields of {config_class.__name__})": config_options(config_class),
    }
    parts = CommandParser("clmae pretrain", __doc__, groups, shown=SHOWN).read(argv)
    family, data, args, _, model_options = parts
    if args.init and family.model_size:
        raise InputError(f"`init` is {args.init!r}, whose sizes the model has; leave out `model_size`.")
    if args.init:
        config = initial_config(config_class, args.init, **given(model_options))
    else:
        config = config_class.from_size(family.model_size or "base", **given(model_options))
    return config, data, args, {f.name: getattr(part, f.name) for part in parts for f in fields(part)}


def _family(argv: Sequence[str]) -> str:
    """The family named on the command line or in the recipe: it decides which model options there are."""
    options, _ = peek(argv, "config", "family")
    recipe = {} if options.config is None else read_recipe(options.config)
    name = options.family or recipe.get("family") or FamilyArguments.family  # the parser refuses an empty entry
    return FamilyArguments(family=str(name)).family


def _checkpoint(args: PretrainingArguments) -> str | bool:
    """The checkpoint to resume from, `True` for the last valid one; refuses to write over an earlier run by mistake."""
    last = next(reversed(checkpoints(args.output_dir)), None)
    name = args.resume_from_checkpoint
    if name in (None, "false"):
        if last is None:
            return False
        raise InputError(
            f"`output_dir` {args.output_dir!r} holds the checkpoints of an earlier run ({last.name}): go on "
            "with `--resume_from_checkpoint last`, or choose another folder."
        )
    if name in ("last", "true"):
        if last is None:
            raise InputError(f"`resume_from_checkpoint` is {name!r}, but {args.output_dir!r} holds no checkpoint.")
        return True
    if not (Path(name) / "trainer_state.json").is_file():
        raise InputError(f"`resume_from_checkpoint` is {name!r}, which is no checkpoint folder; or give `last`.")
    return name


def _num_bad_images(trainer: CurriculumTrainer, dataset: Any) -> int:
    """Broken images read in all processes; one that several read counts once, where images have an index."""
    counts = trainer.accelerator.reduce(dataset.bad_images.long().to(trainer.args.device), reduction="sum")
    return int((counts.clamp(max=1) if isinstance(dataset, ImageDataset) else counts).sum())


def _finish(trainer: CurriculumTrainer, metrics: dict[str, Any]) -> None:
    args = trainer.args
    trainer.save_model()
    trainer.save_state()
    bad = sum(_num_bad_images(trainer, d) for d in (trainer.train_dataset, trainer.eval_dataset) if d is not None)
    if trainer.eval_dataset is not None:
        metrics = {**metrics, **trainer.evaluate()}
    trainer.log_metrics("pretrain", metrics)
    trainer.save_metrics("pretrain", {**metrics, "num_bad_images": bad}, combined=False)
    if args.push_to_hub:
        trainer.push_to_hub()
    if not trainer.is_world_process_zero():
        return
    if bad:
        print(f"{bad} broken images were skipped.")
    print(f"The model is in {args.output_dir}, pictures in {args.output_dir}/pictures. Next:")
    print(f"  clmae evaluate knn --model {args.output_dir} --dataset LABELLED_IMAGES")
    print(f"  clmae visualize --model {args.output_dir} --images PHOTO.jpg --output masks.png")
