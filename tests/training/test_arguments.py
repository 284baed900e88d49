# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`PretrainingArguments`: MAE's recipe, the scaled learning rate, and what is refused."""

import math

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from clmae import MAEForPreTraining
from clmae.evaluation.finetuning import FinetuningArguments, LinearLarsArguments
from clmae.training import CurriculumTrainer, PretrainingArguments


@pytest.fixture
def make(tmp_path):
    return lambda **fields: PretrainingArguments(output_dir=str(tmp_path), use_cpu=True, **fields)


@pytest.mark.parametrize("accumulation", [1, 8])
def test_learning_rate_scales_with_the_total_batch(make, accumulation):
    args = make(base_learning_rate=1e-3, per_device_train_batch_size=64, gradient_accumulation_steps=accumulation)
    assert args.total_train_batch_size == 64 * accumulation
    assert args.learning_rate == args.to_dict()["learning_rate"] == 1e-3 * 64 * accumulation / 256
    assert make(learning_rate=0.125, base_learning_rate=7.0, gradient_accumulation_steps=4).learning_rate == 0.125


KINDS = (PretrainingArguments, FinetuningArguments, LinearLarsArguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("split", "images"), [(True, 64), (False, 128)])
def test_processes_share_batches_that_are_split(monkeypatch, tmp_path, kind, split, images):
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    fields = dict(base_learning_rate=1e-3, per_device_train_batch_size=64, gradient_accumulation_steps=2)
    args = kind(str(tmp_path), use_cpu=True, accelerator_config={"split_batches": split}, **fields)
    assert args.total_train_batch_size == 2 * images
    assert args.learning_rate == 1e-3 * 2 * images / 256


@pytest.mark.parametrize("kind", KINDS)
def test_processes_with_unequal_batches_are_refused(monkeypatch, tmp_path, kind):
    fields = dict(use_cpu=True, accelerator_config={"even_batches": False})
    kind(str(tmp_path), **fields)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match=r"`accelerator_config` has `even_batches` false.* 2 processes"):
        kind(str(tmp_path), **fields)


def test_defaults_are_those_of_the_recipe(make):
    args = make()
    assert args.base_learning_rate == 1.5e-4
    assert args.learning_rate == 1.5e-4 * 64 / 256
    assert (args.adam_beta1, args.adam_beta2) == (0.9, 0.95)
    assert args.weight_decay == 0.05
    assert args.optim.startswith("adamw")
    assert args.lr_scheduler_type == "cosine"
    assert args.get_warmup_steps(800) == 40
    assert args.max_grad_norm == 0
    assert args.dataloader_drop_last
    assert args.save_total_limit == 2
    assert not args.remove_unused_columns
    assert not args.logging_nan_inf_filter
    assert (args.masker_learning_rate_multiplier, args.masker_update_interval) == (1.0, 1)
    assert args.masker_lr_scheduler_type == "constant"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_learning_rate", -1e-4),
        ("base_learning_rate", math.nan),
        ("base_learning_rate", math.inf),
        ("learning_rate", -0.1),
        ("learning_rate", math.nan),
        ("masker_learning_rate_multiplier", -1.0),
        ("masker_learning_rate_multiplier", math.inf),
        ("masker_update_interval", 0),
        ("difficulty_steps", -1),
        ("picture_steps", -1),
        ("num_probe_images", 0),
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
    ],
)
def test_out_of_range_fields_are_refused(make, field, value):
    with pytest.raises(ValueError, match=rf"`{field}` is {value}; give "):
        make(**{field: value})


def test_unknown_masker_schedule_is_refused(make):
    with pytest.raises(ValueError, match=r"`masker_lr_scheduler_type` is 'cosin'; choose one of constant, .*, cosine"):
        make(masker_lr_scheduler_type="cosin")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("masker_learning_rate_multiplier", 0.0),
        ("difficulty_steps", 0),
        ("picture_steps", 0),
        ("num_probe_images", 1),
    ],
)
def test_bounds_themselves_are_accepted(make, field, value):
    assert getattr(make(**{field: value}), field) == value


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_bf16_runs_on_the_cpu_where_there_is_nothing_else(tmp_path):
    args = PretrainingArguments(output_dir=str(tmp_path), bf16=True)
    assert args.use_cpu
    assert args.device.type == "cpu"
    assert not PretrainingArguments(output_dir=str(tmp_path)).use_cpu  # left to transformers


def test_hf_argument_parser(tmp_path):
    parser = HfArgumentParser(PretrainingArguments)
    argv = "--use_cpu true --masker_update_interval 3 --picture_steps 7 --base_learning_rate 0.5 "
    argv += "--per_device_train_batch_size 32 --dataloader_drop_last false"
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), *argv.split()])
    assert (args.masker_update_interval, args.picture_steps, args.dataloader_drop_last) == (3, 7, False)
    assert args.learning_rate == 0.5 * 32 / 256
    helps = {action.dest: action.help for action in parser._actions}
    assert all(helps[name] for name in PretrainingArguments.__annotations__)


def test_trainer_refuses_plain_training_arguments(tmp_path, tiny_config):
    with pytest.raises(ValueError, match=r"`args` is a TrainingArguments; pass PretrainingArguments"):
        CurriculumTrainer(MAEForPreTraining(tiny_config()), TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
