# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What the commands are tested with: an empty folder, photos, tiny models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clmae import FAMILIES
from clmae.cli import main

KINDS = {"encoder": 1, "autoencoder": 2, "mean": 3, "cls": 3}  # places in FAMILIES; classifiers by their pooling
TINY = """\
model_size: tiny
hidden_size: 32
num_hidden_layers: 1
num_attention_heads: 4
decoder_hidden_size: 16
decoder_num_hidden_layers: 1
decoder_num_attention_heads: 2
image_size: 16
patch_size: 4
learning_rate: 1.0e-3
use_cpu: true
disable_tqdm: true
dataloader_pin_memory: false
"""
TINY_MASKER = "masker_num_hidden_layers: 1\nmasker_num_attention_heads: 2\n"


@pytest.fixture(scope="module", autouse=True)
def _without_hub(offline):
    """See `offline`."""


@pytest.fixture(autouse=True)
def _in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def error(capsys):
    """`error(*argv)`: the message of a command that ends with exit code 2."""

    def run(*argv):
        capsys.readouterr()
        assert main(list(map(str, argv))) == 2
        _, marked, message = capsys.readouterr().err.partition("clmae: error: ")
        assert marked
        return message

    return run


@pytest.fixture(scope="session")
def save_image():
    """`save_image(path, seed, size, mode)`: writes a smooth random picture; its path."""

    def save(path, seed=0, size=(24, 20), mode="RGB"):
        coarse = np.random.default_rng(seed).uniform(0, 255, (5, 5, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize(size, Image.BICUBIC).convert(mode).save(path)
        return str(path)

    return save


@pytest.fixture(scope="session")
def photos(tmp_path_factory, save_image):
    """A folder of 24 pictures."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(24):
        save_image(folder / f"{i:02}.png", seed=i)
    return str(folder)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """A folder of pictures in three colours: 8 per colour to learn from, 4 to test on."""
    folder, generator = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for name, colour in {"blue": (20, 60, 200), "green": (40, 200, 40), "red": (220, 20, 60)}.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.array(colour) + generator.integers(-9, 10, (16, 16, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")
    return str(folder)


@pytest.fixture(scope="session")
def make_model(tiny_config):
    """`make_model(family, kind, **fields)`: a tiny model, every parameter of which is random."""

    def make(family="mae", kind="autoencoder", **fields):
        torch.manual_seed(1)
        pooling = {"pooling": kind} if kind in ("mean", "cls") else {}
        model = FAMILIES[family][KINDS[kind]](tiny_config(family, **{**pooling, **fields})).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return model

    return make


@pytest.fixture(scope="session")
def recipe_text():
    """`recipe_text(family, batch_size)`: a recipe for a tiny model."""

    def write(family, batch_size=4):
        masker = TINY_MASKER if family == "cl_mae" else ""
        return f"family: {family}\n{TINY}{masker}per_device_train_batch_size: {batch_size}\n"

    return write


@pytest.fixture
def recipe(tmp_path, recipe_text):
    """`recipe(family, text)`: the path of a recipe for a tiny model."""

    def write(family="cl_mae", text=""):
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe_text(family) + text)
        return str(path)

    return write


@pytest.fixture(scope="session")
def trained(tmp_path_factory, photos, recipe_text):
    """`trained(family)`: the folder of a model that `clmae pretrain` left after 4 steps."""
    folders: dict[str, Path] = {}

    def get(family):
        if family not in folders:
            folder = tmp_path_factory.mktemp(family)
            (folder / "recipe.yaml").write_text(recipe_text(family) + "max_steps: 4\nlogging_steps: 2\n")
            argv = ["--config", str(folder / "recipe.yaml"), "--dataset", photos, "--output_dir", str(folder / "out")]
            assert main(["pretrain", *argv]) == 0
            folders[family] = folder / "out"
        return folders[family]

    return get
