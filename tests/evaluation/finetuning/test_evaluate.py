# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""That classes are told apart, runs go on where they were stopped, and bad data are refused."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, TrainerState

from clmae import FAMILIES
from clmae.evaluation.finetuning import ClassificationTrainer, FinetuningArguments, LinearLarsArguments, finetune
from clmae.training.data import make_image_processor
from clmae.training.integrity import verify

from .samples import PLAIN, coloured_images

pytestmark = pytest.mark.slow  # all of it trains


@pytest.fixture(scope="module")
def dataset():
    return datasets.DatasetDict({"train": coloured_images(48), "test": coloured_images(30, seed=1)})


@pytest.mark.parametrize(
    ("kind", "fields", "baseline"),
    [
        (FinetuningArguments, dict(learning_rate=5e-3, max_steps=25), "from scratch"),
        (FinetuningArguments, dict(learning_rate=5e-3, max_steps=20, trained_blocks=1, **PLAIN), "from scratch"),
        (LinearLarsArguments, dict(learning_rate=100.0, max_steps=40, feature="mean"), "random encoder"),
    ],
)
def test_separable_classes_are_told_apart(saved, dataset, arguments, tmp_path, kind, fields, baseline):
    args = arguments(kind, **fields)
    result = finetune(saved, dataset, args)
    assert result.protocol == args.protocol
    assert [row.name for row in result.rows] == ["pretrained", baseline]
    assert all(row.accuracies["top-1"] >= 90 for row in result.rows), result.to_markdown()
    assert result.settings["parameters"]["learning_rate"] == fields["learning_rate"]
    assert result.settings["num_train"] == 48
    assert result.settings["num_test"] == 30
    low, high = result.rows[0].intervals["top-1"]
    assert low <= result.rows[0].accuracies["top-1"] <= high
    assert result.rows[1].differences["top-1"][0] == pytest.approx(
        result.rows[0].accuracies["top-1"] - result.rows[1].accuracies["top-1"], abs=0.011
    )
    result.save_json(tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["rows"][0]["name"] == "pretrained"


def test_few_labels_and_a_held_out_part_come_from_the_training_set(saved, dataset, arguments):
    args = arguments(eval_strategy="epoch", load_best_model_at_end=True, save_strategy="epoch", validation_share=0.25)
    result = finetune(saved, dataset, args, labels_per_class=8, baselines=False)
    assert [row.name for row in result.rows] == ["pretrained"]
    assert result.settings["num_train"] == 3 * 6
    assert result.settings["num_validation"] == 3 * 2
    assert result.settings["labels_per_class"] == 8
    assert result.settings["selected_on"] == {"split": "train", "share_of_each_class": 0.25, "seed": 42}
    single = arguments(eval_strategy="epoch")
    single.output_dir += "-single"
    with pytest.raises(ValueError, match="no class has two training images"):
        finetune(saved, dataset, single, labels_per_class=1)


def test_interrupted_run_goes_on_to_the_same_result(saved, dataset, arguments, monkeypatch, tmp_path):
    fields = dict(learning_rate=1e-2, max_steps=6, save_strategy="steps", save_steps=2)
    whole = finetune(saved, dataset, arguments(**fields))
    whole_weights = load_file(tmp_path / "out" / "from_scratch" / "model.safetensors")

    broken = arguments(**fields, run_name="second")
    broken.output_dir = str(tmp_path / "second")
    steps = []

    original = ClassificationTrainer.training_step

    def training_step(self, *rest, **kwargs):
        steps.append(self.args.output_dir)
        if len(steps) == 10:  # in the fourth step of the second row
            raise Killed
        return original(self, *rest, **kwargs)

    monkeypatch.setattr(ClassificationTrainer, "training_step", training_step)
    with pytest.raises(Killed):
        finetune(saved, dataset, broken)
    with pytest.raises(ValueError, match="holds an earlier run"):
        finetune(saved, dataset, broken)
    broken.resume_from_checkpoint = "last"
    result = finetune(saved, dataset, broken)
    assert len(steps) == 10 + 4  # from step 2 of the second row; the first row was done
    assert result.rows == whole.rows
    assert torch.equal(result.predictions.predictions, whole.predictions.predictions)
    weights = load_file(tmp_path / "second" / "from_scratch" / "model.safetensors")
    assert all(torch.equal(weights[name], whole_weights[name]) for name in whole_weights)
    broken.layer_decay = 0.5
    with pytest.raises(ValueError, match=r"`layer_decay` was 0\.75 and is 0\.5"):
        finetune(saved, dataset, broken)


class Killed(Exception):
    """As if the process had been killed."""


@pytest.mark.parametrize(
    ("moment", "fields"),
    [("first save", {}), ("second save", dict(ema_decay=0.5)), ("after the last step", dict(ema_decay=0.5))],
)
def test_killed_run_goes_on_from_its_newest_whole_checkpoint(
    saved, dataset, arguments, monkeypatch, tmp_path, moment, fields
):
    fields = dict(learning_rate=1e-2, max_steps=4, save_strategy="steps", save_steps=2, **fields)
    whole = finetune(saved, dataset, arguments(**fields), baselines=False)
    args, saves = arguments(**fields), []
    args.output_dir += "-killed"

    def kill_at(owner, name, number):
        original = getattr(owner, name)

        def call(*rest, **options):
            saves.append(name)
            if len(saves) == number:
                raise Killed
            return original(*rest, **options)

        monkeypatch.setattr(owner, name, call)

    if moment == "after the last step":
        kill_at(ClassificationTrainer, "predict", 1)
    else:  # the weights are there already
        kill_at(TrainerState, "save_to_json", 1 if moment == "first save" else 2)
    with pytest.raises(Killed):
        finetune(saved, dataset, args, baselines=False)
    args.resume_from_checkpoint = "last"
    result = finetune(saved, dataset, args, baselines=False)
    assert result.rows == whole.rows
    assert torch.equal(result.predictions.predictions, whole.predictions.predictions)
    folder = Path(args.output_dir, "pretrained")
    assert [verify(path) for path in (folder, folder / "checkpoint-4")] == [[], []]
    expected, found = (
        load_file(Path(path, "pretrained", "model.safetensors"))
        for path in (f"{args.output_dir}"[:-7], args.output_dir)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_test_image_is_evaluated(saved, dataset, arguments):
    fields = dict(per_device_train_batch_size=12, per_device_eval_batch_size=8, eval_strategy="epoch")
    fields["validation_share"] = 0.25  # 36 images are trained on: whole batches
    whole = finetune(saved, dataset, arguments(**fields), baselines=False)
    args = arguments(**fields, dataloader_drop_last=True)
    args.output_dir += "-dropped"
    result = finetune(saved, dataset, args, baselines=False)
    assert len(result.predictions.predictions) == 30
    assert result.rows == whole.rows


def test_trained_model_is_saved_whole(saved, dataset, arguments, tmp_path):
    finetune(saved, dataset, arguments(), baselines=False)
    folder = tmp_path / "out" / "pretrained"
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.config.label2id == {"red": 0, "green": 1, "blue": 2}
    assert list(AutoImageProcessor.from_pretrained(folder).image_mean) == [0.5] * 3


@pytest.mark.parametrize("feature", ["cls", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_linear_probe_is_saved_as_its_encoder_and_a_linear_layer(
    family, feature, dataset, arguments, tiny_config, tmp_path
):
    encoder = FAMILIES[family][1](tiny_config(family)).eval()
    encoder.save_pretrained(tmp_path / "model")
    make_image_processor(16, 3, [0.5] * 3, [0.5] * 3).save_pretrained(tmp_path / "model")
    args = arguments(LinearLarsArguments, feature=feature, learning_rate=100.0, max_steps=40)
    result = finetune(tmp_path / "model", dataset, args, baselines=False)
    folder = tmp_path / "out" / "pretrained"
    assert verify(folder) == []
    loaded = AutoModel.from_pretrained(folder).eval()
    assert type(loaded) is type(encoder)
    assert all(torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    layer = load_file(folder / "linear_probe.safetensors")
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    images = processor(dataset["test"].with_format("numpy")["image"][:], return_tensors="pt").pixel_values
    with torch.no_grad():
        tokens = loaded(images).last_hidden_state
    features = tokens[:, 0] if feature == "cls" else tokens[:, 1:].mean(1)
    predicted = (features @ layer["weight"].T + layer["bias"]).argmax(1)
    assert torch.equal(predicted, result.predictions.predictions)
    assert len(predicted.unique()) == 3


def test_bad_data_is_refused(saved, dataset, arguments):
    one_class = dataset["train"].filter(lambda label: label == 0, input_columns="label")
    with pytest.raises(ValueError, match="one class only"):
        finetune(saved, {"train": one_class, "test": dataset["test"]}, arguments())
    renamed = dataset["test"].cast_column("label", datasets.ClassLabel(names=["blue", "green", "red"]))
    with pytest.raises(ValueError, match="classes of the training and the test set differ"):
        finetune(saved, {"train": dataset["train"], "test": renamed}, arguments())
