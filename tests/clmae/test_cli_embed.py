# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae embed`: the features of images, in a file."""

from __future__ import annotations

import gc
import shutil
import signal
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from transformers import AutoImageProcessor, AutoModel, ViTConfig, ViTForImageClassification

from clmae.cli import embed, main
from clmae.evaluation.features import LabelledImages, extract_features
from clmae.training.data import load_image_dataset, make_image_processor
from clmae.training.integrity import run_lock

NAMES = ["blue", "green", "red"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_model):
    """The folder of an encoder."""
    folder = tmp_path_factory.mktemp("model")
    make_model("cl_mae").save_pretrained(folder)
    make_image_processor(16, 3, [0.5] * 3, [0.5] * 3).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 4 images."""
    monkeypatch.setattr(embed, "PART_ROWS", 4)


def run(*argv):
    assert main(["embed", *map(str, argv)]) == 0


def expected(model, source, split="train", **options):
    """Features `(n, d)` and labels `(n,)` as `clmae evaluate` sees them."""
    processor = AutoImageProcessor.from_pretrained(model, backend="pil")
    images = LabelledImages(load_image_dataset(source, split).dataset, processor)
    features, labels = extract_features(AutoModel.from_pretrained(model), images, progress=False, **options)
    return features.numpy(), labels.tolist()


def vectors(path):
    return np.stack(pq.read_table(path)["features"].to_pylist()).astype(np.float32)


def interrupted(monkeypatch, error, after, *argv):
    """Runs the command until so many batches are encoded; its exit code."""

    def stop_early(*args, **options):
        for i, batch in enumerate(stream(*args, **options)):
            if i == after:
                raise error
            yield batch

    stream = embed.stream_features
    with monkeypatch.context() as patch:
        patch.setattr(embed, "stream_features", stop_early)
        return main(["embed", *argv])


# -- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"feature": "cls+mean", "layer": -1, "batch_size": 5}], ids=["default", "cls"])
def test_parquet_has_paths_labels_and_the_features_of_evaluation(model, labelled, small_parts, capsys, options):
    run(model, labelled, "--output", "new/f.parquet", *(f"--{name}={value}" for name, value in options.items()))
    assert "wrote new/f.parquet: 24 images" in capsys.readouterr().out
    features, labels = expected(model, labelled, **options)
    np.testing.assert_array_equal(vectors("new/f.parquet"), features)
    table = pq.read_table("new/f.parquet")
    assert table.column_names == ["path", "label", "features"]
    assert str(table.schema.field("features").type).startswith("fixed_size_list<")
    assert table["label"].to_pylist() == labels
    assert [Path(path).parent.name for path in table["path"].to_pylist()] == [NAMES[label] for label in labels]
    assert pq.read_metadata("new/f.parquet").num_row_groups > 1 or not options
    loaded = datasets.load_dataset("parquet", data_files="new/f.parquet", split="train")
    assert loaded.features["label"].names == NAMES
    assert [path.name for path in Path("new").iterdir()] == ["f.parquet"]


def test_npy_with_a_csv_beside_it(model, labelled):
    run(model, labelled, "--output", "f.npy", "--split=test")
    features, labels = expected(model, labelled, "test")
    written = np.load("f.npy")
    assert written.dtype == np.float32
    np.testing.assert_array_equal(written, features)
    table = pd.read_csv("f.csv")
    assert list(table) == ["path", "label"]
    assert list(table["label"]) == [NAMES[label] for label in labels]
    assert {path.name for path in Path().iterdir()} == {"f.npy", "f.csv"}


def test_images_without_paths_have_an_index(model):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    data = datasets.Dataset.from_dict({"image": list(pixels), "label": [0.5, None, *range(7)]})
    data.cast_column("image", datasets.Array3D((16, 16, 3), "uint8")).save_to_disk("arrays")
    run(model, "arrays", "--output", "f.parquet", "--max_samples=4")
    table = pq.read_table("f.parquet")
    index = table["index"].to_pylist()
    assert len(index) == 4
    assert index == sorted(set(index))
    assert table["label"].to_pylist() == [data["label"][i] for i in index]  # of any type, or missing
    run(model, "arrays", "--output", "all.parquet")
    assert pq.read_table("all.parquet")["index"].to_pylist() == list(range(9))
    np.testing.assert_allclose(vectors("f.parquet"), vectors("all.parquet")[index], rtol=1e-5, atol=1e-5)


def test_images_without_labels(model, photos):
    run(model, photos, "--output", "f.parquet")
    assert pq.read_table("f.parquet").column_names == ["path", "features"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pca", "umap"])
@pytest.mark.parametrize(("source", "num_colours"), [("photos", 1), ("labelled", 3)])
def test_a_picture(model, request, monkeypatch, method, source, num_colours):
    if method == "umap":
        umap = ModuleType("umap")
        umap.__spec__ = ModuleSpec("umap", None)
        umap.UMAP = lambda **options: PCA(2, **options)
        monkeypatch.setitem(sys.modules, "umap", umap)
    run(model, request.getfixturevalue(source), "--output", "f.npy", f"--plot={method}")
    with Image.open("f.png") as picture:
        assert picture.format == "PNG"
        hue, saturation, value = np.asarray(picture.convert("HSV")).reshape(-1, 3).T
    hues = np.bincount(hue[(saturation > 120) & (value > 120)] // 8)
    assert (hues > 20).sum() == num_colours


# -- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["f.parquet", "f.npy"])
@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_run_goes_on(model, labelled, small_parts, monkeypatch, capsys, output, after):
    argv = [model, labelled, "--output", output, "--batch_size=4"]
    run(*argv)
    whole = {path.name: path.read_bytes() for path in Path().iterdir()}
    for name in whole:
        Path(name).unlink()
    assert interrupted(monkeypatch, KeyboardInterrupt(), after, *argv) == 130
    assert "The same command goes on" in capsys.readouterr().out
    assert [path.name for path in Path().iterdir()] == [f"{output}.parts"]
    starts = []
    stream = embed.stream_features
    monkeypatch.setattr(embed, "stream_features", lambda *a, **o: starts.append(o["start"]) or stream(*a, **o))
    run(*argv)
    assert starts == [4 * after]
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == whole


def test_going_on_with_something_else_is_refused(model, labelled, small_parts, monkeypatch, error, tmp_path):
    argv = [model, labelled, "--output=f.parquet", "--batch_size=4"]
    interrupted(monkeypatch, KeyboardInterrupt(), 2, *argv)
    shutil.copytree(model, "other")
    other = AutoModel.from_pretrained("other")
    torch.nn.init.zeros_(next(p for p in other.parameters() if p.requires_grad))
    other.save_pretrained("other")
    for changed, named in (
        (["other", *argv[1:]], "(model)"),
        ([*argv, "--split=test"], "(data)"),
        ([*argv, "--max_samples=9"], "(data)"),
        ([*argv, "--feature=cls", "--bf16=true"], "(bf16, feature)"),
        ([*argv, "--batch_size=8"], "(batch_size)"),
    ):
        message = error("embed", *changed)
        assert f"`output` 'f.parquet' was begun with other settings {named}" in message
        assert "remove that folder" in message
    run(*argv)


@pytest.mark.slow
def test_layers_that_a_checkpoint_lacks_are_no_other_model(labelled, small_parts, monkeypatch):
    """The pooler, which a classifier does not save, is drawn at random."""
    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4)
    ViTForImageClassification(ViTConfig(**size, intermediate_size=32)).save_pretrained("vit")
    make_image_processor(16, 3, [0.5] * 3, [0.5] * 3).save_pretrained("vit")
    argv = ["./vit", labelled, "--output=f.npy", "--batch_size=4"]
    assert interrupted(monkeypatch, KeyboardInterrupt(), 2, *argv) == 130
    torch.manual_seed(9)
    run(*argv)
    np.testing.assert_array_equal(np.load("f.npy"), expected("./vit", labelled, batch_size=4)[0])


@pytest.fixture
def many_images():
    """`many_images(n)`: saves so many tiny images; their folder."""

    def save(count):
        pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        features = datasets.Features({"image": datasets.Array3D((8, 8, 3), "uint8")})
        datasets.Dataset.from_dict({"image": pixels}, features=features).save_to_disk(f"images-{count}")
        return f"images-{count}"

    return save


def embed_in_parts(argv):
    embed.PART_ROWS = 64
    return embed.run(argv)


@pytest.mark.slow
def test_a_killed_process_goes_on(model, many_images, monkeypatch, processes):
    source = many_images(1000)
    argv = [model, source, "--batch_size=32", "--device=cpu"]
    process = processes.start(embed_in_parts, [*argv, "--output=f.parquet"])
    while not Path("f.parquet.parts/000000000192.parquet").exists():
        assert process.running
        time.sleep(0.01)
    process.signal(signal.SIGKILL)
    process.wait()
    assert not Path("f.parquet").exists()
    monkeypatch.setattr(embed, "PART_ROWS", 64)
    run(*argv, "--output=f.parquet")
    run(*argv, "--output=whole.parquet")
    assert Path("f.parquet").read_bytes() == Path("whole.parquet").read_bytes()
    assert not Path("f.parquet.parts").exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(model, many_images, monkeypatch):
    """Counted by the tensors of features that are alive whenever a part is written."""
    monkeypatch.setattr(embed, "PART_ROWS", 64)
    write, alive = embed._write_part, []

    def counted(path, values, *rest):
        tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and not each.requires_grad]
        alive.append(sum(each.numel() for each in tensors if each.ndim == 2 and each.shape[1] == values.shape[1]))
        write(path, values, *rest)

    monkeypatch.setattr(embed, "_write_part", counted)
    run(model, many_images(512), "--output", "f.npy", "--batch_size=32")
    assert len(alive) == 8
    assert max(alive[1:]) <= max(alive[:2])


# -- wrong use --------------------------------------------------------------------------------------------------------


def test_a_broken_image_is_named_and_nothing_left(model, save_image, error, small_parts):
    Path("images").mkdir()
    for i in range(6):
        save_image(f"images/{i}.png", seed=i)
    Path("images/2.png").write_bytes(b"no picture")
    argv = ["embed", model, "images", "--output=f.parquet", "--batch_size=2"]
    message = error(*argv)
    assert "image 2 (images/2.png)" in message
    assert {path.name for path in Path().iterdir()} == {"images"}
    assert main([*argv, "--on_bad_image=skip"]) == 0
    skipped = pq.read_table("f.parquet")
    assert skipped["path"].to_pylist() == [f"images/{i}.png" for i in (0, 1, 3, 4, 5)]
    Path("images/2.png").unlink()
    assert main(argv) == 0
    assert pq.read_table("f.parquet").equals(skipped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output=f.csv"], "`output` is 'f.csv'; give the name of a .parquet or .npy file"),
        (["--output=f.npy", "--batch_size=0"], "`batch_size` is 0"),
        (["--output=f.npy", "--on_bad_image=drop"], "`on_bad_image` is 'drop'; choose one of raise, skip"),
        (["--output=f.npy", "--max_samples=0"], "`max_samples` is 0"),
        (["--output=f.npy", "--feature=pool"], "`feature` is 'pool'"),
        (["--output=f.npy", "--label_column=klass"], "`label_column` is 'klass'"),
        (["--output=f.npy", "--split=extra"], "`split` is 'extra'"),
        (["--output=f.npy", "--device=gpu"], "`device` is 'gpu', which cannot be used"),
        (["--output=f.npy", "--plot=pca", "--max_samples=2"], "`plot` needs at least 3 images"),
        (["--output=f.npy", "--plot=tsne"], "--plot"),
        ([], "missing: --output"),
    ],
)
def test_wrong_use(model, labelled, error, options, message):
    assert message in error("embed", model, labelled, *options)
    assert not list(Path().iterdir())


def test_umap_is_asked_for_before_anything_is_read(error, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    assert "pip install umap-learn" in error("embed", "no/model", "no/data", "--output=f.npy", "--plot=umap")


def test_one_process_at_a_time(model, labelled, error, monkeypatch):
    argv = ["embed", model, labelled, "--output=f.npy"]
    with run_lock("f.npy.parts"):
        assert "`output` 'f.npy.parts' is in use by another run" in error(*argv)
        assert Path("f.npy.parts").is_dir()  # it is the other's
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in error(*argv)


def test_features_that_are_not_finite(model, labelled, error):
    shutil.copytree(model, "broken")
    broken = AutoModel.from_pretrained("broken")
    for parameter in broken.parameters():
        parameter.data.fill_(float("nan"))
    broken.save_pretrained("broken")
    assert "images 0 to 23 hold NaN or infinity" in error("embed", "broken", labelled, "--output=f.npy")
