# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""From a saved model and a data set to a table and a file that says how it was made."""

from __future__ import annotations

import json
import os

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor, ViTModel

import clmae
from clmae.evaluation import KNNProtocol, LinearProtocol, evaluate_model
from clmae.evaluation.report import EvaluationResult, EvaluationRow
from clmae.training.data import make_image_processor

COLOURS = {"blue": (30, 30, 200), "red": (200, 30, 30)}


def coloured(name: str, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-25, 26, (16, 16, 3))
    return Image.fromarray((np.array(COLOURS[name]) + noise).astype(np.uint8))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tiny_config):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    clmae.CLMAEForPreTraining(tiny_config("cl_mae")).save_pretrained(folder)
    make_image_processor(16, 3, [0.5] * 3, [0.5] * 3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Two colours; in the test split every file lies in the folder of the other one."""
    folder = tmp_path_factory.mktemp("images")
    for split, count in (("train", 20), ("validation", 5), ("test", 5)):
        for name, other in (("blue", "red"), ("red", "blue")):
            target = folder / split / (other if split == "test" else name)
            target.mkdir(parents=True)
            for i in range(count):
                coloured(name, 1000 * len(split) + 10 * i + len(name)).save(target / f"{i}.png")
    return folder


def in_memory(n: int = 12) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(COLOURS))})
    images = [coloured("red" if i % 2 else "blue", i) for i in range(n)]
    return datasets.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(n)]}, features=features)


def test_whole_path(model_folder, image_folder, tmp_path):
    results = evaluate_model(model_folder, image_folder, test_split="validation", progress=False, seed=3)
    assert list(results) == ["knn", "linear"]
    for result in results.values():
        assert [row.name for row in result.rows] == ["pretrained", "random encoder", "raw pixels"]
        assert [row.dimension for row in result.rows] == [32, 32, 768]
        for row in result.rows:
            assert all(0 <= value <= 100 and round(value, 2) == value for value in row.accuracies.values())
    columns = ["k = 5", "k = 10", "k = 20", "Euclidean, majority of 5", "Euclidean, any of 5"]
    assert results["knn"].rows[2].accuracies == dict.fromkeys(columns, 100.0)
    assert results["linear"].rows[2].accuracies == {"top-1": 100.0}
    assert results["linear"].rows[2].details["l2"] == 10.0
    assert results["linear"].rows[2].details["validation_accuracies"]["1e-06"] == 100.0

    path = tmp_path / "new" / "linear.json"
    results["linear"].save_json(path)
    saved = json.loads(path.read_text())
    assert saved["rows"][2]["accuracies"] == {"top-1": 100.0}
    settings = saved["settings"]
    expected = dict(
        model=str(model_folder),
        model_type="cl_mae",
        dataset=str(image_folder),
        train_split="train",
        test_split="validation",
        num_train=40,
        num_test=10,
        feature="pooler_output",
        random_encoder_seed=3,
        label_column="label",
        device="cpu",
    )
    assert {key: settings[key] for key in expected} == expected
    assert settings["parameters"]["seed"] == 0
    assert settings["parameters"]["validation_share"] == 0.2
    assert settings["image_processor"]["class"] == "BitImageProcessorPil"
    assert torch.__version__.startswith(settings["versions"]["torch"])
    assert settings["date"].startswith("20")


def test_scores_are_of_the_test_split(model_folder, image_folder):
    results = evaluate_model(model_folder, image_folder, progress=False)  # its classes are exchanged
    assert set(results["knn"].rows[2].accuracies.values()) == {0.0}
    assert results["linear"].rows[2].accuracies == {"top-1": 0.0}
    assert set(results["linear"].rows[2].details["validation_accuracies"].values()) == {100.0}


def test_limits_settings_and_no_baselines(model_folder, image_folder):
    protocol = KNNProtocol(ks=(1,), euclidean_k=3)
    options = dict(protocols=[protocol], max_train_samples=8, max_test_samples=4, baselines=False, progress=False)
    results = evaluate_model(model_folder, image_folder, test_split="validation", **options)
    (row,) = results["knn"].rows
    assert list(row.accuracies) == ["k = 1", "Euclidean, majority of 3", "Euclidean, any of 3"]
    settings = results["knn"].settings
    assert (settings["num_train"], settings["num_test"], settings["max_train_samples"]) == (8, 4, 8)
    assert settings["parameters"]["ks"] == (1,)
    assert settings["random_encoder_seed"] is None
    again = evaluate_model(model_folder, image_folder, test_split="validation", **options)
    assert again["knn"].rows == results["knn"].rows


def test_a_vit_of_transformers(tmp_path, image_folder):
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    ViTModel(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    results = evaluate_model(tmp_path, image_folder, ["knn"], test_split="validation", progress=False)
    assert results["knn"].settings["feature"] == "cls"
    assert results["knn"].rows[2].accuracies["k = 5"] == 100.0


def test_table():
    rows = [
        EvaluationRow("pretrained", 8, {"k = 5": 61.5, "k = 10": 7.0}),
        EvaluationRow("raw pixels", 3, {"k = 10": 1.234, "k = 5": 100.0}),
    ]
    assert EvaluationResult("knn", rows, {}).to_markdown() == (
        "| encoder | k = 5 | k = 10 |\n"
        "| --- | ---: | ---: |\n"
        "| pretrained | 61.50 | 7.00 |\n"
        "| raw pixels | 100.00 | 1.23 |"
    )


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    EvaluationResult("knn", [], {"run": 1}).save_json(path)

    def fail(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        EvaluationResult("knn", [], {"run": 2}).save_json(path)
    assert json.loads(path.read_text())["settings"] == {"run": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_missing_split_is_named(model_folder, image_folder, tmp_path):
    with pytest.raises(ValueError, match=r"'holdout', but .* has 'test', 'train', 'validation'.*`test_split`"):
        evaluate_model(model_folder, image_folder, test_split="holdout")
    (tmp_path / "only.png").write_bytes((image_folder / "test" / "red" / "0.png").read_bytes())
    with pytest.raises(ValueError, match=r"`split` is 'test', but .* has 'train'.*`test_split`"):
        evaluate_model(model_folder, tmp_path, test_split="test")


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_training_data_is_no_test_data(model_folder, where, tmp_path):
    data = in_memory()
    if where == "disk":
        data.save_to_disk(tmp_path / "saved")
        data = tmp_path / "saved"
    with pytest.raises(ValueError, match="the same images as 'train' and as 'test'"):
        evaluate_model(model_folder, data, test_split="test", max_train_samples=8, max_test_samples=4)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_without_a_test_split_a_fifth_is_held_out(model_folder, where, tmp_path):
    data = in_memory()
    images = len(data)
    if where == "disk":
        data.save_to_disk(tmp_path / "saved")
        data = tmp_path / "saved"
    settings = evaluate_model(model_folder, data, ["linear"], progress=False)["linear"].settings
    assert settings["test_split"] == "20% of train, held out at random"
    assert settings["num_test"] == -(-images // 5)
    assert settings["num_train"] == images - settings["num_test"]


def test_a_small_set_is_judged_by_the_neighbours_it_has(model_folder):
    data = {"train": in_memory(12), "test": in_memory(6)}
    row = evaluate_model(model_folder, data, ["knn"], progress=False)["knn"].rows[0]
    assert list(row.accuracies) == ["k = 5", "k = 10", "Euclidean, majority of 5", "Euclidean, any of 5"]


def test_classes_must_agree(model_folder):
    other = in_memory(6).cast_column("label", datasets.ClassLabel(names=["red", "blue"]))
    with pytest.raises(ValueError, match="classes of the training and the test set differ"):
        evaluate_model(model_folder, {"train": in_memory(), "test": other}, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(protocols=["kmeans"]), "`protocols` holds 'kmeans'; choose from knn, linear"),
        (dict(protocols="knn"), "`protocols` is 'knn'; give a list"),
        (dict(protocols=["knn", KNNProtocol()]), "give each protocol once"),
        (dict(label_column="class"), "`label_column` is 'class', but the columns are 'image'"),
        (dict(protocols=[KNNProtocol(ks=(50,))]), "`k` is 50; give numbers from 1 to 12"),
        (dict(protocols=[LinearProtocol(l2_grid=())]), "`l2_grid`"),
        (dict(feature="tokens"), "`feature` is 'tokens'"),
    ],
)
def test_bad_options(model_folder, change, message):
    data = {"train": in_memory(12), "test": in_memory(6)}
    with pytest.raises(ValueError, match=message):
        evaluate_model(model_folder, data, **{"protocols": ["linear"], "progress": False, **change})
