# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae pretrain`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from transformers.trainer_utils import get_last_checkpoint

from clmae import FAMILIES
from clmae.cli.options import UsageError, config_options, given, nearest, parse, split_recipe
from clmae.configuration.configuration_mae import SIZES
from clmae.training.arguments import PretrainingArguments
from clmae.training.callbacks import InterruptCallback
from clmae.training.data import DataArguments, ImageDataset, build_datasets
from clmae.training.trainer import CurriculumTrainer

EXAMPLES = """\
  clmae pretrain --family cl_mae --model_size small --dataset ./my_photos --output_dir out/cl-mae
  clmae pretrain --config recipes/cl_mae_cifar10.yaml --output_dir out/cifar --num_train_epochs 50
  clmae pretrain --config recipes/cl_mae_cifar10.yaml --output_dir out/cifar --resume_from_checkpoint last"""

TRAINING = "training (of transformers' TrainingArguments, the most used)"
# Options that `--help` explains; `--help_all` explains them all.
MOST_USED = {
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
            raise UsageError(
                f"`family` is {self.family!r}{nearest(self.family, FAMILIES)}; choose one of {', '.join(FAMILIES)}."
            )


def run(argv: Sequence[str]) -> int:
    """Pretrains, and leaves model, image processor, checkpoints, logs and pictures in `--output_dir`."""
    config_class = FAMILIES[_family(argv)][0]
    groups = {
        "family": FamilyArguments,
        "data": DataArguments,
        TRAINING: PretrainingArguments,
        f"model (fields of {config_class.__name__})": config_options(config_class),
    }
    family, data, args, model_options = parse(
        groups,
        argv,
        prog="clmae pretrain",
        description="Pretrain a masked autoencoder on images. A recipe (--config) is a YAML file of these options.",
        examples=EXAMPLES,
        shown={TRAINING: MOST_USED},
    )
    checkpoint = _checkpoint(args)
    config = config_class.from_size(family.model_size, **given(model_options))
    train_dataset, eval_dataset, image_processor = build_datasets(data, config, args.seed)
    transformers.set_seed(args.seed)
    interrupt = InterruptCallback()
    # At these lengths the fused kernel is up to twice as slow on a CPU as plain attention; on a GPU it is the faster.
    attention = "eager" if args.device.type == "cpu" else "sdpa"
    trainer = CurriculumTrainer(
        model=FAMILIES[family.family][2]._from_config(config, attn_implementation=attention),
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=image_processor,
        callbacks=[interrupt],
    )
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        interrupt.restore()
    if interrupt.interrupted:
        print(f"Stopped at step {trainer.state.global_step}. Go on with the same command and")
        print("  --resume_from_checkpoint last")
        return 130
    _finish(trainer, result.metrics)
    trainer.accelerator.end_training()
    return 0


def _family(argv: Sequence[str]) -> str:
    """The family named on the command line or in the recipe: it decides which model options there are."""
    recipe, _, rest = split_recipe(argv)
    name = str(recipe.get("family", FamilyArguments.family))
    for i, argument in enumerate(rest):
        option, equals, value = argument.partition("=")
        if option == "--family":
            name = value if equals else (rest[i + 1] if i + 1 < len(rest) else name)
    return FamilyArguments(family=name).family


def _checkpoint(args: PretrainingArguments) -> str | None:
    """The checkpoint to resume from; refuses to write over an earlier run without being told to."""
    last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    wanted = args.resume_from_checkpoint
    if wanted is None or wanted == "false":
        if last is not None:
            raise UsageError(
                f"`output_dir` {args.output_dir!r} holds the checkpoints of an earlier run ({Path(last).name}): go on "
                "with `--resume_from_checkpoint last`, or choose another folder."
            )
        return None
    if wanted in ("last", "true"):
        if last is None:
            raise UsageError(f"`resume_from_checkpoint` is {wanted!r}, but {args.output_dir!r} holds no checkpoint.")
        return last
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise UsageError(f"`resume_from_checkpoint` is {wanted!r}, which is no checkpoint folder; or say `last`.")
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
