# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae pretrain`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from clmae import FAMILIES
from clmae.cli.options import config_options, given, nearest, parse, split_recipe
from clmae.configuration import MAEConfig
from clmae.configuration.configuration_mae import SIZES
from clmae.configuration.errors import InputError
from clmae.training.arguments import PretrainingArguments, ScaledRateArguments
from clmae.training.build import build_trainer
from clmae.training.callbacks import InterruptCallback
from clmae.training.data import DataArguments, ImageDataset
from clmae.training.sealing import checkpoints
from clmae.training.trainer import CurriculumTrainer

EXAMPLES = """\
  clmae pretrain --family cl_mae --model_size small --dataset ./my_photos --output_dir out/cl-mae
  clmae pretrain --config recipes/cl_mae_cifar10.yaml --output_dir out/cifar --num_train_epochs 50
  clmae pretrain --config recipes/cl_mae_cifar10.yaml --output_dir out/cifar --resume_from_checkpoint last"""

TRAINING = "training (of transformers' TrainingArguments, the most used)"
# Options that `--help` explains; `--help_all` explains them all.
MOST_USED = {
    *ScaledRateArguments.__annotations__,
    *PretrainingArguments.__annotations__,
    "output_dir",
    "max_steps",
    "gradient_accumulation_steps",
    "bf16",
    "torch_compile",
    "gradient_checkpointing",
    "use_cpu",
    "seed",
    "dataloader_num_workers",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "resume_from_checkpoint",
    "run_name",
} - {"logging_nan_inf_filter", "remove_unused_columns"}


@dataclass
class FamilyArguments:
    """Which model to train."""

    family: str = field(
        default="cl_mae",
        metadata={"help": "mae (random masks), cl_mae (masks learned under a curriculum) or cmae (encoder tasks)."},
    )
    model_size: str = field(
        default="base", metadata={"help": f"Preset: {', '.join(SIZES)}; any option below overrides a part of it."}
    )

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise InputError(
                f"`family` is {self.family!r}{nearest(self.family, FAMILIES)}; choose one of {', '.join(FAMILIES)}."
            )


def run(argv: Sequence[str]) -> int:
    """Pretrains, and leaves model, image processor, checkpoints, logs and pictures in `--output_dir`."""
    config, data, args, _ = read_arguments(argv)
    checkpoint = _checkpoint(args)
    interrupt = InterruptCallback()
    trainer = build_trainer(config, data, args, [interrupt])
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        interrupt.restore()
    if interrupt.received is not None:
        if trainer.is_world_process_zero():
            print(f"Stopped at step {trainer.state.global_step}. Go on with the same command and")
            print("  --resume_from_checkpoint last", flush=True)
        trainer.accelerator.end_training()
        return 128 + interrupt.received
    _finish(trainer, result.metrics)
    trainer.accelerator.end_training()
    return 0


def read_arguments(
    argv: Sequence[str],
) -> tuple[MAEConfig, DataArguments, PretrainingArguments, dict[str, Any]]:
    """What to train, on what and how; and every option's value by its name.

    Raises:
        InputError: An option is unknown, has a wrong value, or does not go with another.
    """
    config_class = FAMILIES[_family(argv)][0]
    groups = {
        "family": FamilyArguments,
        "data": DataArguments,
        TRAINING: PretrainingArguments,
        f"model (fields of {config_class.__name__})": config_options(config_class),
    }
    family, data, args, model_options = parts = parse(
        groups,
        argv,
        prog="clmae pretrain",
        description="Pretrain a masked autoencoder on images. A recipe (--config) is a YAML file of these options.",
        examples=EXAMPLES,
        shown={TRAINING: MOST_USED},
    )
    config = config_class.from_size(family.model_size, **given(model_options))
    return config, data, args, {f.name: getattr(part, f.name) for part in parts for f in fields(part)}


def _family(argv: Sequence[str]) -> str:
    """The family named on the command line or in the recipe: it decides which model options there are."""
    recipe, _, rest = split_recipe(argv)
    name = str(recipe.get("family") or FamilyArguments.family)  # `parse` refuses an empty entry
    for i, argument in enumerate(rest):
        option, equals, value = argument.partition("=")
        if option == "--family":
            name = value if equals else (rest[i + 1] if i + 1 < len(rest) else name)
    return FamilyArguments(family=name).family


def _checkpoint(args: PretrainingArguments) -> str | bool:
    """The checkpoint to resume from, `True` for the last valid one; refuses to write over an earlier run by mistake."""
    last = next(reversed(checkpoints(args.output_dir)), None)
    wanted = args.resume_from_checkpoint
    if wanted is None or wanted == "false":
        if last is not None:
            raise InputError(
                f"`output_dir` {args.output_dir!r} holds the checkpoints of an earlier run ({last.name}): go on "
                "with `--resume_from_checkpoint last`, or choose another folder."
            )
        return False
    if wanted in ("last", "true"):
        if last is None:
            raise InputError(f"`resume_from_checkpoint` is {wanted!r}, but {args.output_dir!r} holds no checkpoint.")
        return True
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise InputError(f"`resume_from_checkpoint` is {wanted!r}, which is no checkpoint folder; or say `last`.")
    return wanted


def _num_bad_images(trainer: CurriculumTrainer, dataset: Any) -> int:
    """Broken images met in all processes; one that several met counts once, where images have an index."""
    found = trainer.accelerator.reduce(dataset.bad_images.long().to(trainer.args.device), reduction="sum")
    return int((found.clamp(max=1) if isinstance(dataset, ImageDataset) else found).sum())


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
