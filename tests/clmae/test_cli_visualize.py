# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae visualize`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clmae import FAMILIES
from clmae.cli import main
from clmae.training.data import make_image_processor

pytestmark = pytest.mark.slow


@pytest.fixture
def saved(make_model):
    """`saved(family, kind, **fields)`: writes a model and its image processor into the folder `model`."""

    def save(family, kind="autoencoder", **fields):
        make_model(family, kind, **fields).save_pretrained("model")
        make_image_processor(16, 3, [0.5] * 3, [0.5] * 3).save_pretrained("model")

    return save


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_picture(capsys, saved, save_image, family):
    saved(family)
    images = [save_image("a.png"), save_image("b.jpg", seed=1, size=(60, 33)), save_image("c.png", mode="L")]
    argv = ["visualize", "--model", "model", "--images", *images]
    assert main([*argv, "--output", "new/masks.png"]) == 0
    assert "new/masks.png" in capsys.readouterr().out
    with Image.open("new/masks.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200
        assert np.asarray(picture.convert("L")).std() > 10
    assert main([*argv, "--output", "again.png"]) == 0
    assert main([*argv, "--output", "other.png", "--seed", "1"]) == 0
    first, again, other = (Path(name).read_bytes() for name in ("new/masks.png", "again.png", "other.png"))
    assert again == first
    assert (other == first) == (family == "cl_mae")  # learned masks are not drawn at random


def test_a_folder_is_its_images(saved, save_image):
    saved("mae")
    Path("folder").mkdir()
    for i in range(2):
        save_image(f"folder/{i}.png", seed=i)
    for name, images in (("folder.png", ["folder"]), ("files.png", ["folder/0.png", "folder/1.png"])):
        assert main(["visualize", "--model", "model", "--images", *images, "--output", name]) == 0
    assert Path("folder.png").read_bytes() == Path("files.png").read_bytes()


def test_wrong_use(error, saved, save_image):
    saved("mae")
    Path("broken.png").write_bytes(b"no picture")
    images = ["--images", save_image("good.png")]
    for argv, message in (
        (["--model", "model", *images, "broken.png"], "`images`: broken.png: it cannot be decoded"),
        (["--model", "model", *images, "none.png"], "`images`: none.png: the file none.png cannot be read"),
        (["--model", "model", *images, "--output", "masks.jpg"], "`output` is 'masks.jpg'"),
        (images, "missing: --model"),
        (["--model", "model", *images, "--outptu", "x.png"], "did you mean '--output'?"),
    ):
        assert message in error("visualize", *argv)
    assert not list(Path().glob("masks*"))


@pytest.mark.parametrize("kind", ["encoder", "mean"])
@pytest.mark.parametrize("family", [*FAMILIES, "cmae, learned masks"])
def test_an_encoder_has_no_reconstruction(error, saved, save_image, family, kind):
    family, *masks = family.split(", ")
    saved(family, kind, **({"learned_masks": True} if masks else {}))
    message = error("visualize", "--model", "model", "--images", save_image("a.png"), "--output", "masks.png")
    assert message.startswith(f"`model` 'model' is no whole {FAMILIES[family][2].__name__}: its weights lack decoder.")
    assert not Path("masks.png").exists()
