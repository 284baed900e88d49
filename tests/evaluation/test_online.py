# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Accuracy while pretraining."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from clmae.configuration.errors import InputError
from clmae.evaluation import extract_features, knn_predict, linear_probe
from clmae.evaluation.online import OnlineEvaluationArguments, OnlineEvaluationCallback, trend
from clmae.training.data import make_image_processor

from ..training.runs import CONFIG, VARIANTS, assert_equal_weights, logged, tiny_trainer, weights


def labelled_images(count=40):
    """Pictures of noise, of which one class is a little brighter."""
    generator = np.random.default_rng(0)
    labels = np.arange(count) % 2
    pixels = generator.integers(0, 200, (count, 16, 16, 3)) + (6 * labels)[:, None, None, None]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": list(pixels.astype(np.uint8)), "label": labels.tolist()}
    return datasets.Dataset.from_dict(rows, features=features)


def online_trainer(output_dir, family="mae", steps=2, dataset=None, **options):
    processor = make_image_processor((16, 16), 3, [0.5] * 3, [0.25] * 3, 1.0)
    trainer = tiny_trainer(output_dir, family, max_steps=4, processing_class=processor, **options)
    if steps:
        trainer.add_callback(OnlineEvaluationCallback(trainer, dataset or labelled_images(), steps))
    return trainer


@pytest.mark.parametrize("family", VARIANTS)
def test_accuracies_are_logged_and_change_nothing(tmp_path, family):
    trainer, plain = online_trainer(tmp_path / "a", family), online_trainer(tmp_path / "b", family, steps=0)
    trainer.train()
    plain.train()
    assert_equal_weights(weights(trainer.model), weights(plain.model))
    entries = [entry for entry in trainer.state.log_history if "knn_accuracy" in entry]
    assert [entry["step"] for entry in entries] == [0, 2, 4]
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, OnlineEvaluationCallback))
    parts = [extract_features(trainer.model.vit, part) for part in (callback.references, callback.queries)]
    (train, train_labels), (test, test_labels) = parts
    assert len(train) == len(test) == 20
    correct = knn_predict(train, train_labels, test, ks=(20,))[20] == test_labels
    assert entries[-1]["knn_accuracy"] == correct.double().mean().item()
    assert entries[-1]["linear_accuracy"] == linear_probe(train, train_labels, test, test_labels).accuracy
    assert 0 < entries[-1]["linear_accuracy"] < 1
    assert len(logged(trainer, "reconstruction_loss")) == 4  # the training log is complete


def test_words_have_one_number_in_both_halves(tmp_path):
    """Also a word that is in one half alone, and first in the alphabet."""
    dataset = labelled_images(7).remove_columns("label").add_column("label", [*"bcbcbc", "a"])
    trainer = online_trainer(tmp_path, steps=0)
    callback = OnlineEvaluationCallback(trainer, dataset)
    names = [[part.class_names[label] for label in part.labels] for part in (callback.references, callback.queries)]
    assert callback.references.class_names == callback.queries.class_names == ["a", "b", "c"]
    assert sorted(names[0] + names[1]) == [*"abbbccc"]


def test_labels_are_needed(tmp_path):
    labelled_images().remove_columns("label").to_parquet(tmp_path / "images.parquet")
    arguments = OnlineEvaluationArguments(knn_dataset=str(tmp_path / "images.parquet"))
    with pytest.raises(InputError, match="`knn_dataset` has no column of class labels"):
        OnlineEvaluationCallback.from_arguments(online_trainer(tmp_path, steps=0), arguments)
    with pytest.raises(InputError, match=r"needs a model of this project's families.*ViTMAEForPreTraining"):
        online_trainer(tmp_path, ViTMAEForPreTraining(ViTMAEConfig(**CONFIG)))
    with pytest.raises(InputError, match="`knn_steps` is 0; give an int of at least 1"):
        OnlineEvaluationArguments(knn_steps=0)


NO_RISE = "Since step 100 k-NN has risen by no more than chance explains."


@pytest.mark.parametrize(
    ("accuracies", "sentence"),
    [
        ([0.2], None),
        ([0.2, 0.3, 0.4], "k-NN 20.0%, 40.0%; linear 30.0%, 50.0%."),
        (
            [0.2, 0.3, 0.4, 0.5],
            "k-NN 20.0%, 50.0%; linear 30.0%, 60.0%. k-NN still rises: a longer run should give more.",
        ),
        ([0.2, 0.5, 0.49, 0.51], f"51.0%; linear 30.0%, 61.0%. {NO_RISE}"),
        ([0.2, 0.5, 0.4, 0.3], f"30.0%; linear 30.0%, 40.0%. {NO_RISE}"),
    ],
)
def test_whether_it_still_rises(accuracies, sentence):
    history = [
        {"step": 100 * i, "knn_accuracy": accuracy, "linear_accuracy": accuracy + 0.1}
        for i, accuracy in enumerate(accuracies)
    ]
    text = trend([{"step": 0, "loss": 1.0}, *history], num_queries=1000)
    assert text is None if sentence is None else text.endswith(sentence)
    if accuracies[-1] == 0.5:
        assert text.startswith("On 1000 labelled images (±3.1 points), untrained and now: ")
