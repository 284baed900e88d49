# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The recipes are the published ones, and wrong values are refused."""

from __future__ import annotations

import pytest

from clmae.evaluation.finetuning import FinetuningArguments, LinearLarsArguments


def test_learning_rate_follows_the_total_batch(arguments):
    assert arguments(gradient_accumulation_steps=2).learning_rate == pytest.approx(5e-4 * 32 / 256)
    assert arguments(LinearLarsArguments).learning_rate == pytest.approx(0.1 * 16 / 256)
    assert arguments(learning_rate=0.3).learning_rate == 0.3


def test_recipes_are_the_published_ones(tmp_path):
    recipe = FinetuningArguments(output_dir=str(tmp_path), use_cpu=True).recorded()
    expected = dict(base_learning_rate=5e-4, layer_decay=0.75, weight_decay=0.05, num_train_epochs=100.0)
    expected |= dict(warmup_steps=0.05, drop_path_rate=0.1, label_smoothing_factor=0.1, mixup_alpha=0.8)
    expected |= dict(cutmix_alpha=1.0, randaugment_magnitude=9.0, randaugment_std=0.5, adam_beta1=0.9)
    expected |= dict(random_erasing_probability=0.25, adam_beta2=0.999, ema_decay=0.0, lr_scheduler_type="cosine")
    assert {name: recipe[name] for name in expected} == expected
    recipe = LinearLarsArguments(output_dir=str(tmp_path), use_cpu=True).recorded()
    expected = dict(base_learning_rate=0.1, weight_decay=0.0, num_train_epochs=90.0, warmup_steps=10 / 90)
    expected |= dict(lars_momentum=0.9, lars_trust_coefficient=0.001, label_smoothing_factor=0.0, feature="cls")
    assert {name: recipe[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (FinetuningArguments, "layer_decay", 0.0),
        (FinetuningArguments, "drop_path_rate", 1.0),
        (FinetuningArguments, "label_smoothing_factor", 1.0),
        (FinetuningArguments, "mixup_alpha", -0.1),
        (FinetuningArguments, "randaugment_magnitude", 11.0),
        (FinetuningArguments, "random_erasing_probability", 1.5),
        (FinetuningArguments, "trained_blocks", -1),
        (FinetuningArguments, "base_learning_rate", float("nan")),
        (FinetuningArguments, "validation_share", 1.0),
        (FinetuningArguments, "min_crop_scale", 0.0),
        (FinetuningArguments, "learning_rate", -1.0),
        (LinearLarsArguments, "feature", "pooler_output"),
        (LinearLarsArguments, "lars_momentum", 1.0),
        (LinearLarsArguments, "lars_trust_coefficient", 0.0),
    ],
)
def test_wrong_values_are_refused_by_name(arguments, kind, field, value):
    with pytest.raises(ValueError, match=f"`{field}` is"):
        arguments(kind, **{field: value})


def test_average_and_best_model_exclude_each_other(arguments):
    with pytest.raises(ValueError, match="`ema_decay` and `load_best_model_at_end`"):
        arguments(ema_decay=0.9, load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch")
