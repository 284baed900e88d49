# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""From options to a trainer: what the command line, comparisons and studies all start with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForPreTraining, TrainerCallback, set_seed

from clmae.configuration import MAEConfig
from clmae.training.arguments import PretrainingArguments
from clmae.training.data import DataArguments, build_datasets
from clmae.training.trainer import CurriculumTrainer


def build_trainer(
    config: MAEConfig,
    data_arguments: DataArguments,
    args: PretrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> CurriculumTrainer:
    """A trainer of a new model of `config`'s family (which `import clmae` registers), drawn from `args.seed`."""
    train_dataset, eval_dataset, processor = build_datasets(data_arguments, config, args.seed)
    set_seed(args.seed)
    return CurriculumTrainer(
        model=AutoModelForPreTraining.from_config(config, attn_implementation=fastest_attention(args.device)),
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        callbacks=list(callbacks),
        data_arguments=data_arguments,
    )


def fastest_attention(device: torch.device) -> str:
    """The device's faster attention implementation, by transformers' name.

    At these lengths the fused kernel is up to twice as slow on a CPU as plain attention; on a GPU it is the faster.
    """
    return "eager" if device.type == "cpu" else "sdpa"
