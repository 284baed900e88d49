# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae evaluate`: from the arguments to tables and files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

import clmae
from clmae.cli import main
from clmae.training.data import make_image_processor

COLOURS = {"blue": (20, 60, 200), "green": (40, 200, 40), "red": (220, 20, 60)}
SIZE = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.array(colour) + generator.integers(-9, 10, (8, 8, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_config) -> str:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    clmae.MAEModel(tiny_config("mae", image_size=8)).save_pretrained(folder)
    make_image_processor(8, 3, [0.5] * 3, [0.5] * 3).save_pretrained(folder)
    return str(folder)


def error(capsys, *argv: str) -> str:
    assert main(["evaluate", *argv]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("protocol", ["knn", "linear", "fewshot"])
def test_table_and_files(capsys, model, photos, protocol):
    argv = ["evaluate", protocol, "--model", model, "--dataset", photos, "--output", "new/out.json", "--seed", "3"]
    extra = {
        "knn": ["--ks", "1", "3"],
        "linear": ["--l2_grid", "1.0", "0.1"],
        "fewshot": ["--shots", "1", "--num_draws=2"],
    }
    assert main([*argv, *extra[protocol]]) == 0
    said = capsys.readouterr().out
    content = json.loads(Path("new/out.json").read_text())
    table = Path("new/out.md").read_text()
    assert table in said
    first = next(iter(content["rows"][2]["accuracies"]))
    assert f"| encoder | {first} |" in table
    assert "| raw pixels | 100.0" in table
    assert "[100.0, 100.0]" in table
    settings = content["settings"]
    assert (settings["model"], settings["dataset"], settings["test_split"]) == (model, photos, "test")
    assert (settings["num_train"], settings["num_test"], settings["random_encoder_seed"]) == (24, 12, 3)
    parameters = {"knn": ("ks", [1, 3]), "linear": ("l2_grid", [1.0, 0.1]), "fewshot": ("shots", [1])}
    name, value = parameters[protocol]
    assert settings["parameters"][name] == value
    if protocol != "knn":
        assert settings["parameters"]["seed"] == 3
    assert (settings["selected_on"] is None) == (protocol == "knn")
    assert content["rows"][0]["intervals"].keys() == content["rows"][0]["accuracies"].keys()
    names = {path.name for path in Path("new").iterdir()}
    if protocol == "fewshot":
        assert names == {"out.json", "out.md"}
        assert " ± 0.0 [" in table
        return
    assert names == {"out.json", "out.md", "out-classes.csv", "out-confusion.csv", "out-confusion.png"}
    with open("new/out-classes.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["class"], row["support"]) for row in rows] == [(name, "4") for name in COLOURS]
    share = sum(float(row["accuracy"]) * int(row["support"]) for row in rows) / 12  # it is the encoder's
    of_all = "k = 3" if protocol == "knn" else "top-1"
    assert share == pytest.approx(content["rows"][0]["accuracies"][of_all], abs=0.01)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ViTModel(ViTConfig(**SIZE, intermediate_size=32)),
        lambda: Dinov2Model(Dinov2Config(**SIZE, mlp_ratio=2)),
    ],
    ids=["vit", "dinov2"],
)
def test_other_encoders(photos, make):
    torch.manual_seed(7)  # not the random encoder's
    make().save_pretrained("encoder")
    BitImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained("encoder")
    argv = ["--model", "./encoder", "--dataset", photos, "--feature", "cls+mean", "--layer", "-1", "--output", "o.json"]
    assert main(["evaluate", "knn", *argv, "--feature_cache", "kept"]) == 0
    content = json.loads(Path("o.json").read_text())
    assert [row["dimension"] for row in content["rows"]] == [32, 32, 192]
    assert (content["settings"]["feature"], content["settings"]["layer"]) == ("cls+mean", -1)
    assert len(list(Path("kept").iterdir())) == 6
    assert main(["evaluate", "knn", *argv, "--feature_cache", "kept"]) == 0
    assert json.loads(Path("o.json").read_text())["rows"] == content["rows"]


def test_under_torchrun_one_process_talks_and_writes(capsys, model, photos, monkeypatch):
    """What the processes compute together is `tests/evaluation/test_features.py`'s."""
    started = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("clmae.cli.evaluate.PartialState", lambda: started.append(1) or SimpleNamespace(device="cpu"))
    monkeypatch.setattr("clmae.cli.evaluate.is_first_process", lambda: False)
    argv = ["evaluate", "knn", "--model", model, "--dataset", photos, "--output", "out.json"]
    assert main(argv) == 0
    assert started == [1]
    assert capsys.readouterr().out == ""
    assert not Path("out.json").exists()


def test_protocols_that_train_are_another_commands(monkeypatch):
    seen = []
    monkeypatch.setattr("clmae.cli.evaluate_trained.run", lambda protocol, rest: seen.append((protocol, rest)) or 0)
    assert main(["evaluate", "finetune", "--model", "m"]) == 0
    assert seen == [("finetune", ["--model", "m"])]


def test_mistakes(capsys, model, photos):
    assert "unknown protocol 'fewshots'; did you mean 'fewshot'?" in error(capsys, "fewshots")
    arguments = ["knn", "--model", model, "--dataset", photos]
    assert "`output` is 'out.txt'; give the name of a .json file" in error(capsys, *arguments, "--output", "out.txt")
    assert "did you mean 'layer'?" in error(capsys, *arguments, "--layers", "1")
    assert "unknown option '--shots'" in error(capsys, *arguments, "--shots", "1")
    assert "`model` './nowhere' cannot be loaded" in error(capsys, "knn", "--model", "./nowhere", "--dataset", photos)
    assert "`layer` is 9, but a MAEModel gives 0 to 2" in error(capsys, *arguments, "--layer", "9")


def test_help(capsys):
    assert main(["evaluate"]) == 2
    text = capsys.readouterr().out
    assert all(name in text for name in ("knn", "linear", "fewshot", "finetune", "partial", "linear-lars"))
    with pytest.raises(SystemExit):
        main(["evaluate", "fewshot", "--help"])
    text = capsys.readouterr().out
    assert "--shots" in text
    assert text.count("--seed") == 1
