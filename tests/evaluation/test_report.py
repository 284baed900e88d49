# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""From a saved model and a dataset to a table and a file that says how it was made."""

from __future__ import annotations

import json
import math
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTImageProcessor, ViTModel

import clmae
from clmae.evaluation import FewShotProtocol, KNNProtocol, LinearProtocol, evaluate_model
from clmae.evaluation.finetuning import FinetuningArguments, LinearLarsArguments, finetune, load_classifier
from clmae.evaluation.report import EvaluationResult, EvaluationRow, Scores
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


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_a_model_that_is_not_there_is_reported_before_the_images(tmp_path, kind):
    path = tmp_path / kind
    if kind == "empty":
        path.mkdir()
    reason = {"missing": "there is no such folder", "empty": r"there is no config\.json in this folder"}[kind]
    args = FinetuningArguments(output_dir=str(tmp_path / "out"), use_cpu=True)
    for evaluate in (
        lambda: evaluate_model(path, "nowhere/at/all", ["knn"]),
        lambda: finetune(path, "nowhere/at/all", args),
        lambda: load_classifier(path, args, 2),
        lambda: load_classifier(path, LinearLarsArguments(output_dir=args.output_dir, use_cpu=True), 2),
    ):
        with pytest.raises(ValueError, match=f"`model` .*{kind}' cannot be loaded: {reason}"):
            evaluate()


@pytest.mark.parametrize("damage", ["renamed", "cut"])
def test_incomplete_weights_are_refused_and_not_drawn_at_random(model_folder, tmp_path, damage):
    shutil.copytree(model_folder, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    if damage == "renamed":  # as DistributedDataParallel names them
        save_file({f"module.{name}": value for name, value in load_file(path).items()}, path, {"format": "pt"})
        message = "`model` '.*' lacks .* weights of its encoder, .*give a complete checkpoint"
    else:
        path.write_bytes(path.read_bytes()[:1000])
        message = "`model` '.*' cannot be loaded"
    with pytest.raises(ValueError, match=message):
        evaluate_model(tmp_path / "model", in_memory(), ["knn"], progress=False)


def in_memory(n: int = 12) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(COLOURS))})
    images = [coloured("red" if i % 2 else "blue", i) for i in range(n)]
    return datasets.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(n)]}, features=features)


@pytest.mark.slow
def test_whole_path(model_folder, image_folder, tmp_path):
    results = evaluate_model(model_folder, image_folder, test_split="validation", progress=False, seed=3)
    assert list(results) == ["knn", "linear"]
    for result in results.values():
        assert [row.name for row in result.rows] == ["pretrained", "random encoder", "raw pixels"]
        assert [row.dimension for row in result.rows] == [32, 32, 768]
        for row in result.rows:
            assert all(0 <= value <= 100 and round(value, 2) == value for value in row.accuracies.values())
    columns = ["k = 5", "k = 10", "k = 20", "Euclidean, majority of 5", "Euclidean, any of 5"]
    columns += ["mean per class, k = 20", "macro F1, k = 20"]
    assert results["knn"].rows[2].accuracies == dict.fromkeys(columns, 100.0)
    assert results["linear"].rows[2].accuracies == {"top-1": 100.0, "mean per class": 100.0, "macro F1": 100.0}
    for result, column in zip(results.values(), ("k = 20", "top-1"), strict=True):
        encoder, *others = result.rows
        for row in others:
            difference, low, high = row.differences[column]
            assert difference == pytest.approx(encoder.accuracies[column] - row.accuracies[column], abs=0.011)
            assert low <= difference <= high
        for row in result.rows:
            assert row.intervals.keys() == row.accuracies.keys()
            assert all(low <= row.accuracies[column] <= high for column, (low, high) in row.intervals.items())
    assert results["linear"].rows[2].details["l2"] == 1e-06
    assert results["linear"].rows[2].details["validation_accuracies"]["1e-06"] == 100.0

    path = tmp_path / "new" / "linear.json"
    results["linear"].save_json(path)
    saved = json.loads(path.read_text())
    assert saved["rows"][2]["accuracies"]["top-1"] == 100.0
    assert saved["rows"][2]["intervals"]["top-1"] == [72.25, 100.0]  # Wilson's, of 10 images
    assert saved.keys() == {"protocol", "rows", "settings"}
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
        layer=None,
        selected_on={"split": "train", "share_of_each_class": 0.2, "seed": 0},
        random_encoder_seed=3,
        label_column="label",
        device="cpu",
    )
    assert {key: settings[key] for key in expected} == expected
    assert settings["parameters"]["seed"] == 0
    assert settings["intervals"]["resamples"] >= 1000
    assert results["knn"].settings["selected_on"] is None
    assert settings["parameters"]["validation_share"] == 0.2
    assert settings["image_processor"]["class"] == "BitImageProcessorPil"
    assert torch.__version__.startswith(settings["versions"]["torch"])
    assert settings["date"].startswith("20")


@pytest.mark.slow
def test_scores_are_of_the_test_split(model_folder, image_folder):
    results = evaluate_model(model_folder, image_folder, progress=False)  # its classes are exchanged
    assert set(results["knn"].rows[2].accuracies.values()) == {0.0}
    assert set(results["linear"].rows[2].accuracies.values()) == {0.0}
    assert set(results["linear"].rows[2].details["validation_accuracies"].values()) == {100.0}


def test_limits_settings_and_no_baselines(model_folder, image_folder):
    protocol = KNNProtocol(ks=(1,), euclidean_k=3)
    options = dict(protocols=[protocol], max_train_samples=8, max_test_samples=4, baselines=False, progress=False)
    results = evaluate_model(model_folder, image_folder, test_split="validation", **options)
    (row,) = results["knn"].rows
    assert list(row.accuracies)[:3] == ["k = 1", "Euclidean, majority of 3", "Euclidean, any of 3"]
    assert list(row.accuracies)[3:] == ["mean per class, k = 1", "macro F1, k = 1"]
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


def test_table_with_intervals_and_spread():
    scores = dict(accuracies={"n = 1": 52.64, "n = 2": 60.0}, std={"n = 1": 1.24})
    row = EvaluationRow("pretrained", 8, intervals={"n = 1": (51.66, 53.62), "n = 2": (59.04, 61.0)}, **scores)
    table = EvaluationResult("fewshot", [row], {}).to_markdown().splitlines()
    assert table[2] == "| pretrained | 52.6 ± 1.2 [51.7, 53.6] | 60.0 [59.0, 61.0] |"


def test_difference_on_the_same_images():
    encoder, baseline = EvaluationRow("pretrained", 8, {}), EvaluationRow("raw pixels", 3, {})
    right = [torch.arange(1000) % 10 < number for number in (6, 5)]  # 100 images are right by the encoder alone
    baseline.compare(*(Scores(correct={"top-1": correct}) for correct in right))
    ((difference, low, high),) = baseline.differences.values()
    assert difference == 10.0
    # The standard error of pairs is sqrt(0.1 * 0.9 / 1000) = 0.95 points; of unrelated images it would be 2.2.
    assert (low, high) == (pytest.approx(10 - 1.96 * 0.95, abs=0.2), pytest.approx(10 + 1.96 * 0.95, abs=0.2))
    text = EvaluationResult("linear", [encoder, baseline], {}).differences_to_markdown()
    assert text == f"- pretrained less raw pixels, top-1: +10.0 points [{low:+.1f}, {high:+.1f}]\n"


@pytest.mark.slow
def test_shuffled_labels_give_chance(model_folder, tmp_path):
    # The colours are as easy as ever, so that a protocol which sees the labels of test images would tell.
    order = np.random.default_rng(0).permutation(600) % 2
    data = in_memory(600).remove_columns("label").add_column("label", order.tolist())
    split = {"train": data.select(range(400)), "test": data.select(range(400, 600))}
    protocols = [KNNProtocol(ks=(1, 20)), "linear", FewShotProtocol(shots=(16,))]
    results = list(evaluate_model(model_folder, split, protocols, progress=False).values())
    for kind in (FinetuningArguments, LinearLarsArguments):
        args = kind(output_dir=str(tmp_path / kind.__name__), max_steps=10, use_cpu=True, report_to="none")
        results.append(finetune(model_folder, split, args))
    bound = 3.3 * 50 / math.sqrt(200)  # 99.9 % of what 200 tosses of a coin give
    for result in results:
        for row in result.rows:
            for column in {"k = 1", "k = 20", "top-1", "n = 16"} & row.accuracies.keys():
                assert abs(row.accuracies[column] - 50) < bound, (result.protocol, row.name, column)
    assert [result.protocol for result in results] == ["knn", "linear", "fewshot", "finetune", "linear-lars"]


@pytest.mark.slow
def test_few_shot(model_folder, image_folder):
    protocol = FewShotProtocol(shots=(1, 2, 32), num_draws=3, l2_grid=(1.0, 0.1), seed=5)
    result = evaluate_model(model_folder, image_folder, [protocol], test_split="validation", progress=False)["fewshot"]
    pixels = result.rows[2]
    assert pixels.accuracies == {"n = 1": 100.0, "n = 2": 100.0}
    assert pixels.std == {"n = 1": 0.0, "n = 2": 0.0}
    assert pixels.details["draws"] == {"n = 1": [100.0] * 3, "n = 2": [100.0] * 3}
    assert pixels.details["l2"]["n = 1"] == [0.1] * 3
    assert (pixels.details["seeds"], pixels.details["skipped"]) == ([5, 6, 7], [32])
    assert result.settings["selected_on"]["seeds"] == [5, 6, 7]
    assert result.save_class_files("none.json") == []


@pytest.mark.slow
def test_imbalanced_classes_and_the_top_five(model_folder):
    """Nine greys, of which the first has most of the images and is learnt; the rest are of one look."""
    images = [Image.new("RGB", (16, 16), (0,) * 3 if i < 40 else (200,) * 3) for i in range(72)]
    labels = [0] * 40 + [1 + i % 8 for i in range(32)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    twice = {"train": data, "test": data.select(range(1, 72))}
    row = evaluate_model(model_folder, twice, ["linear"], progress=False)["linear"].rows[2]
    # 39 of class 0, and 4 of whichever other class is predicted for the 32 that look alike.
    assert row.accuracies["top-1"] == round(100 * 43 / 71, 2)
    assert row.accuracies["mean per class"] == round(100 * 2 / 9, 2)
    assert row.accuracies["top-5"] == pytest.approx(100 * (39 + 20) / 71, abs=6)  # five of the eight, or zero and four
    low, high = row.intervals["mean per class"]
    assert low <= 100 * 2 / 9 <= high


@pytest.mark.slow
def test_words_are_classes(model_folder):
    words = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    names = [["blue", "red"][i % 2] for i in range(12)]
    images = [coloured(name, i) for i, name in enumerate(names)]
    train = datasets.Dataset.from_dict({"image": images, "label": names}, features=words)
    test = train.select([1, 3, 5])  # red alone, which would be class 0 of its own
    results = evaluate_model(model_folder, {"train": train, "test": test}, ["linear"], progress=False)
    assert results["linear"].rows[2].accuracies["top-1"] == 100.0
    assert results["linear"].predictions.references.tolist() == [1, 1, 1]
    settings = evaluate_model(model_folder, train, ["linear"], progress=False, baselines=False)["linear"].settings
    assert (settings["num_train"], settings["num_test"]) == (10, 2)
    numbered = in_memory(4).cast_column("label", datasets.Value("int64"))
    for pair in ((train, numbered), (numbered, train)):
        with pytest.raises(ValueError, match="classes"):
            evaluate_model(model_folder, dict(zip(("train", "test"), pair, strict=True)), progress=False)


def test_features_are_kept_for_all_representations(model_folder, image_folder, tmp_path, monkeypatch):
    options = dict(protocols=["knn"], test_split="validation", progress=False, cache_dir=tmp_path, seed=1)
    first = evaluate_model(model_folder, image_folder, **options)
    assert len(list(tmp_path.iterdir())) == 6
    monkeypatch.setattr("clmae.evaluation.features._collect", None)  # nothing is read again
    assert evaluate_model(model_folder, image_folder, **options)["knn"].rows == first["knn"].rows


def test_one_image_of_each_class_cannot_be_split(model_folder):
    with pytest.raises(ValueError, match="a single image of each class"):
        evaluate_model(model_folder, in_memory(2), progress=False)


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


@pytest.mark.slow
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_without_a_test_split_a_fifth_is_held_out(model_folder, where, tmp_path):
    data = in_memory()
    images = len(data)
    if where == "disk":
        data.save_to_disk(tmp_path / "saved")
        data = tmp_path / "saved"
    settings = evaluate_model(model_folder, data, ["linear"], progress=False)["linear"].settings
    assert settings["test_split"] == "20% of each class of train, held out at random"
    assert settings["num_test"] == 2  # of 6 of each class one
    assert settings["num_train"] == images - settings["num_test"]


def test_a_small_set_is_evaluated_by_the_neighbours_it_has(model_folder):
    data = {"train": in_memory(12), "test": in_memory(6)}
    row = evaluate_model(model_folder, data, ["knn"], progress=False)["knn"].rows[0]
    assert list(row.accuracies)[:4] == ["k = 5", "k = 10", "Euclidean, majority of 5", "Euclidean, any of 5"]


def test_broken_images_are_left_out_with_their_labels(model_folder):
    images = in_memory(12).cast_column("image", datasets.Image(decode=False))
    rows = [dict(row, image={"bytes": b"no image", "path": None}) if i == 3 else row for i, row in enumerate(images)]
    broken = datasets.Dataset.from_list(rows, features=images.features)
    with pytest.raises(ValueError, match=r"image 3 of `dataset` cannot be used.*set `on_bad_image` to skip"):
        evaluate_model(model_folder, {"train": broken, "test": in_memory(6)}, ["linear"], progress=False)
    whole = images.select([i for i in range(12) if i != 3])
    skipped, expected = (
        evaluate_model(model_folder, {"train": train, "test": in_memory(6)}, ["linear"], progress=False, **options)
        for train, options in ((broken, {"on_bad_image": "skip"}), (whole, {}))
    )
    assert skipped["linear"].rows == expected["linear"].rows
    assert skipped["linear"].settings["num_train"] == 11


def test_classes_must_agree(model_folder):
    other = in_memory(6).cast_column("label", datasets.ClassLabel(names=["red", "blue"]))
    with pytest.raises(ValueError, match="classes of the training and the test set differ"):
        evaluate_model(model_folder, {"train": in_memory(), "test": other}, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(protocols=["kmeans"]), "`protocols` holds 'kmeans'; choose from knn, linear, fewshot"),
        (dict(layer=5, feature="cls"), "`layer` is 5, but a CLMAEModel gives 0 to 2"),
        (dict(protocols=[FewShotProtocol(shots=(20,))]), r"`shots` is \(20,\), but the smallest class has 6"),
        (dict(protocols="knn"), "`protocols` is 'knn'; give a list"),
        (dict(protocols=["knn", KNNProtocol()]), "give each protocol once"),
        (dict(label_column="class"), "`label_column` is 'class', but the columns are 'image'"),
        (dict(protocols=[KNNProtocol(ks=(50,))]), "`k` is 50; give numbers from 1 to 12"),
        (dict(protocols=[LinearProtocol(l2_grid=())]), "`l2_grid`"),
        (dict(feature="tokens"), "`feature` is 'tokens'"),
        (dict(on_bad_image="drop"), "`on_bad_image` is 'drop'; choose one of raise, skip"),
    ],
)
def test_bad_options(model_folder, change, message):
    data = {"train": in_memory(12), "test": in_memory(6)}
    with pytest.raises(ValueError, match=message):
        evaluate_model(model_folder, data, **{"protocols": ["linear"], "progress": False, **change})
