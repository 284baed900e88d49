# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Data sets: loading from everywhere, samples that depend on nothing but their key, bad images, the processor."""

import io
import os
import re
import zlib

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, HfArgumentParser

from clmae.configuration import MAEConfig
from clmae.training import data as data_module
from clmae.training.data import (
    DataArguments,
    ImageDataset,
    StreamingImageDataset,
    build_datasets,
    content_key,
    find_label_column,
    hold_out,
    load_image_dataset,
    make_image_processor,
    take_samples,
    unnormalized,
)
from clmae.training.images import decode_image, normalize, sample_generator

SETTINGS = dict(
    image_size=(16, 16), num_channels=3, num_patches=16, patch_size=(4, 4), mean=[0.5] * 3, std=[0.25] * 3, seed=3
)


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory, monkeypatch):
    """A cache of its own, and no Hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def image(number, height=20, width=24):
    """A smooth picture that tells its number by its mean colour."""
    y, x = np.mgrid[0 : 1 : 1j * height, 0 : 1 : 1j * width]
    waves = np.stack([np.sin(3 * x + number), np.cos(4 * y - number), np.sin(2 * (x + y))], axis=2)
    return Image.fromarray((127 + 100 * waves).astype(np.uint8))


def png(number, **size):
    buffer = io.BytesIO()
    image(number, **size).save(buffer, "PNG")
    return buffer.getvalue()


def rows(count, bad=()):
    return [{"bytes": b"broken" if i in bad else png(i), "path": f"{i}.png"} for i in range(count)]


def memory(count=8, bad=(), **columns):
    features = {"image": datasets.Image(decode=False), **{name: datasets.Value("int64") for name in columns}}
    return datasets.Dataset.from_dict({"image": rows(count, bad), **columns}, features=datasets.Features(features))


def stream(count=8, bad=(), shards=2):
    return memory(count, bad).to_iterable_dataset(num_shards=shards)


def save_images(folder, names):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image(i).save(path, "PNG")
    return folder


def write_parquet(path, count=5, start=0):
    encoded = [png(start + i) for i in range(count)]
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    pictures = {"picture": [{"bytes": data, "path": None} for data in encoded], "label": [i % 2 for i in range(count)]}
    datasets.Dataset.from_dict(pictures, features=features).to_parquet(path)
    return encoded


def loaded_bytes(source):
    return [row[source.image_column]["bytes"] for row in source.dataset]


# -- loading ----------------------------------------------------------------------------------------------------


def test_folder_of_images(tmp_path):
    # `load_dataset` would take `test_1.png` and `training-day.png` for two splits, and lose the rest.
    names = ["a.png", "B.JPG", "test_1.png", "training-day.png", "below/deeper/c.webp", ".hidden.png", ".git/d.png"]
    save_images(tmp_path, names)
    (tmp_path / "notes.txt").write_text("no image")
    dataset, column = load_image_dataset(tmp_path)
    assert column == "image"
    assert dataset.column_names == ["image"]
    found = {row["image"]["path"].removeprefix(f"{tmp_path}/") for row in dataset}
    assert found == set(names[:5])
    assert decode_image(dataset[0]["image"], 3).shape == (20, 24, 3)


def test_class_folders(tmp_path):
    save_images(tmp_path, ["cat/1.png", "cat/2.png", "dog/a/3.png", "test/4.png"])
    dataset, _ = load_image_dataset(str(tmp_path))
    assert dataset.features["label"].names == ["cat", "dog", "test"]
    assert dataset["label"] == [0, 0, 1, 2]
    assert find_label_column(dataset) == "label"


def test_one_class_is_no_label(tmp_path):
    dataset, _ = load_image_dataset(save_images(tmp_path, ["cat/1.png", "cat/2.png"]))
    assert dataset.column_names == ["image"]
    with pytest.raises(
        ValueError, match=r"no column of class labels; its columns are 'image' \(Image\).*folder of its"
    ):
        find_label_column(dataset)


@pytest.mark.parametrize("extra", [[], ["unlabelled/9.png", "banner.png"]])
def test_split_folders(tmp_path, extra):
    save_images(tmp_path, ["train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "test/dog/4.png", *extra])
    for split, labels in (("train", [0, 1]), ("validation", [0]), ("val", [0]), ("test", [1])):
        dataset, _ = load_image_dataset(tmp_path, split)
        assert dataset["label"] == labels
        assert dataset.features["label"].names == ["cat", "dog"]
    if extra:
        assert load_image_dataset(tmp_path, "unlabelled").dataset.column_names == ["image"]
    with pytest.raises(ValueError, match=r"`split` is 'other', but the folder .* has 'test', 'train',.* 'validation'"):
        load_image_dataset(tmp_path, "other")


def test_linked_class_folders_and_loops(tmp_path):
    save_images(tmp_path, ["elsewhere/1.png", "data/dog/2.png"])
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "dog" / "loop").symlink_to(tmp_path / "data")
    assert load_image_dataset(tmp_path / "data").dataset["label"] == [0, 1]


def test_a_folder_that_cannot_be_read_is_an_error_and_no_smaller_data_set(tmp_path, monkeypatch):
    save_images(tmp_path, ["cat/1.png", "dog/2.png"])
    scan = os.scandir

    def refuse(path):
        if os.path.basename(path) == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"`dataset` cannot be read: .*Permission denied: .*dog"):
        load_image_dataset(tmp_path)


def hostile_folder(folder):
    """Images of every kind that can be used, and of every kind that cannot: how many there are of both."""
    names = ["plain.png", "wrong.jpg", "ünïcødé 図.png", "x" * 251 + ".png", "line\nbreak.png", "#?%20.PNG", "gone.png"]
    save_images(folder, names)  # `wrong.jpg` is a PNG file all the same
    for i, size in enumerate([(4, 20_000), (20_000, 4), (4, 4)]):
        image(i, *size).save(folder / f"shape-{i}.png")
    good = len(names) + 3
    bad = {"empty.png": b"", "zeros.jpg": bytes(1000), "text.png": b"no image", "half.png": png(1)[:200]}
    bad |= {"tiny.png": png(1, height=1, width=1), "thin.png": png(1, height=1, width=20_000)}
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    (folder / "nowhere.png").symlink_to(folder / "nothing")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    return good, len(bad) + 2


@pytest.mark.parametrize("streaming", [False, True])
def test_skip_ends_with_the_right_count(tmp_path, streaming):
    good, bad = hostile_folder(tmp_path)
    source = load_image_dataset(tmp_path, streaming=streaming)
    kind = StreamingImageDataset if streaming else ImageDataset
    dataset = kind(*source, **SETTINGS, train=False, on_bad_image="skip")
    (tmp_path / "gone.png").unlink()  # while it is being read
    samples = list(dataset) if streaming else [dataset[i] for i in range(len(dataset))]
    assert len(samples) == (good - 1 if streaming else good + bad)
    assert dataset.num_bad_images == bad + 1
    assert all(sample["pixel_values"].isfinite().all() for sample in samples)


def test_changed_folder_is_not_stale(tmp_path):
    save_images(tmp_path, ["a.png", "b.png"])
    before = load_image_dataset(tmp_path)
    image(9).save(tmp_path / "a.png")
    image(10).save(tmp_path / "c.png")
    after = load_image_dataset(tmp_path)
    assert (len(before.dataset), len(after.dataset)) == (2, 3)
    np.testing.assert_array_equal(decode_image(after.dataset[0]["image"], 3), np.array(image(9)))


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_file_and_folder(tmp_path, streaming):
    encoded = write_parquet(tmp_path / "data.parquet")
    for source in (tmp_path / "data.parquet", str(tmp_path)):
        loaded = load_image_dataset(source, streaming=streaming)
        assert isinstance(loaded.dataset, datasets.IterableDataset) == streaming
        assert loaded.image_column == "picture"
        assert loaded_bytes(loaded) == encoded
        assert find_label_column(loaded.dataset) == "label"
    with pytest.raises(ValueError, match=r"(?s)cannot be loaded \(split 'test'\).*train"):
        load_image_dataset(tmp_path, "test", streaming=streaming)


def test_changed_parquet_is_not_stale(tmp_path):
    path = tmp_path / "data.parquet"
    write_parquet(path)
    load_image_dataset(path)
    encoded = write_parquet(path, start=50)
    assert loaded_bytes(load_image_dataset(path)) == encoded


def test_folder_for_load_dataset(tmp_path):
    save_images(tmp_path, ["screenshot.png"])
    (tmp_path / "data").mkdir()
    encoded = write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: data/test-*\n---\n"
    )
    assert loaded_bytes(load_image_dataset(tmp_path, "test")) == encoded
    assert len(load_image_dataset(tmp_path, "test[:40%]").dataset) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_to_disk(tmp_path, streaming):
    dataset = memory()
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(tmp_path / "dict")
    assert loaded_bytes(load_image_dataset(tmp_path / "one", streaming=streaming)) == loaded_bytes_of(dataset)
    assert len(list(load_image_dataset(tmp_path / "dict", "test", streaming=streaming).dataset)) == 1
    with pytest.raises(ValueError, match=r"`split` is 'eval', but .* has 'train', 'test'"):
        load_image_dataset(tmp_path / "dict", "eval")
    (tmp_path / "one" / "dataset_info.json").unlink()
    with pytest.raises(ValueError, match="cannot be loaded from disk"):
        load_image_dataset(tmp_path / "one")


def loaded_bytes_of(dataset):
    return [row["image"]["bytes"] for row in dataset]


def test_data_sets_in_memory():
    for dataset in (memory(), memory().with_format("numpy"), datasets.Dataset.from_dict({"image": rows(8)})):
        loaded = load_image_dataset(dataset)
        assert loaded.image_column == "image"
        assert loaded_bytes(loaded) == loaded_bytes_of(memory())
    decoded = datasets.Dataset.from_dict({"image": [image(0), image(1)]})
    assert decoded.features["image"].decode
    assert Image.open(io.BytesIO(load_image_dataset(decoded).dataset[1]["image"]["bytes"])).size == (24, 20)
    assert isinstance(load_image_dataset(stream()).dataset, datasets.IterableDataset)
    assert isinstance(load_image_dataset(memory(), streaming=True).dataset, datasets.IterableDataset)
    assert len(load_image_dataset(datasets.DatasetDict(a=memory(3), b=memory(2)), "b").dataset) == 2
    both = datasets.IterableDatasetDict(a=stream(3), b=stream(2))
    assert len(list(load_image_dataset(both, "b").dataset)) == 2


def test_image_column_of_binary_or_paths_when_named(tmp_path):
    save_images(tmp_path, ["0.png"])
    raw = datasets.Dataset.from_dict({"data": [png(0)], "file": [str(tmp_path / "0.png")], "n": [1]})
    for column in ("data", "file"):
        loaded = load_image_dataset(raw, image_column=column)
        np.testing.assert_array_equal(decode_image(loaded.dataset[0][column], 3), np.array(image(0)))


def array_dataset(feature, values):
    return datasets.Dataset.from_dict({"bands": values}, features=datasets.Features({"bands": feature}))


BANDS = np.random.default_rng(0).integers(0, 1000, (4, 5, 16, 20))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("dtype", ["uint16", "float32", "uint8"])
@pytest.mark.parametrize("kind", ["Array3D", "List"])
def test_5_channel_arrays(kind, dtype, streaming):
    values = BANDS % 200 if dtype == "uint8" else BANDS / 1000 if dtype == "float32" else BANDS
    nested = datasets.List(datasets.List(datasets.List(datasets.Value(dtype))))
    feature = nested if kind == "List" else datasets.Array3D((5, 16, 20), dtype)
    dataset = array_dataset(feature, values.astype(dtype).tolist())
    loaded = load_image_dataset(dataset, streaming=streaming)
    assert loaded.image_column == "bands"
    settings = {**SETTINGS, "num_channels": 5, "mean": [0.0] * 5, "std": [1.0] * 5, "image_size": (16, 20)}
    samples = (StreamingImageDataset if streaming else ImageDataset)(*loaded, train=False, **settings)
    samples = list(samples) if streaming else [samples[i] for i in range(4)]
    scale = {"uint8": 255, "uint16": 65535, "float32": 1}[dtype]
    for sample, expected in zip(samples, values, strict=True):
        torch.testing.assert_close(sample["pixel_values"], torch.tensor(expected / scale).float())


@pytest.mark.parametrize(
    ("dataset", "kwargs", "message"),
    [
        ("./nowhere", {}, r"`dataset` is './nowhere', but there is no such file or folder"),
        ("~/no/where", {}, "no such file or folder"),
        ("data/photos/birds", {}, "no such file or folder"),
        ("nobody/nothing", {}, r"(?s)'nobody/nothing' is no local folder, and as a Hub id cannot be loaded.*nothing"),
        ("my_photos", {}, "'my_photos' is no local folder, and as a Hub id cannot be loaded"),
        ([1, 2], {}, "`dataset` is of type list; give a Hub id"),
        (memory(2, n=[1, 2]), {"image_column": "n"}, r"`image_column` is 'n', which holds no images; .*'n' \(int64\)"),
        (memory(2), {"image_column": "x"}, r"`image_column` is 'x', but the columns are 'image' \(Image\)"),
        (datasets.Dataset.from_dict({"n": [1], "s": ["x"]}), {}, r"no column of images; .*'n' \(int64\), 's' \(string"),
        (
            memory(2).add_column("b", rows(2)),
            {},
            r"several columns of images: set `image_column` to one of \['image', 'b",
        ),
        (datasets.DatasetDict(a=memory(1)), {}, "`split` is 'train', but the data set in memory has 'a'"),
        (datasets.DatasetDict(), {}, "has none"),
        (memory(2), {"max_samples": 0}, "`max_samples` is 0; give an int of at least 1"),
        (datasets.IterableDataset.from_generator(lambda: iter(())), {}, "empty stream"),
        (datasets.IterableDataset.from_generator(lambda: iter([{"x": image(0)}])), {}, "pass `features` to it"),
    ],
    ids=str,
)
def test_wrong_sources(dataset, kwargs, message):
    with pytest.raises(ValueError, match=message):
        load_image_dataset(dataset, **kwargs)


def test_wrong_folders(tmp_path):
    (tmp_path / "readme.txt").write_text("nothing here")
    with pytest.raises(ValueError, match=r"holds no images: looked in it and its sub-folders for .*\.jpg.*parquet"):
        load_image_dataset(tmp_path)
    with pytest.raises(ValueError, match=r"is the file .*readme.txt'; give a .parquet file, or a folder"):
        load_image_dataset(tmp_path / "readme.txt")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ValueError, match=r"the file .*broken.parquet' cannot be loaded"):
        load_image_dataset(tmp_path / "broken.parquet")


def test_max_samples():
    dataset = memory(50, label=list(range(50)))
    chosen = [list(load_image_dataset(dataset, max_samples=10).dataset["label"]) for _ in range(2)]
    assert chosen[0] == chosen[1] == sorted(set(chosen[0]))
    assert len(chosen[0]) == 10
    assert max(chosen[0]) > 30, "the first ten would be one class of a sorted folder"
    assert len(take_samples(dataset, 99)) == 50
    assert len(list(load_image_dataset(stream(), max_samples=3).dataset)) == 3


def test_find_label_column():
    class_label = datasets.Dataset.from_dict(
        {"label": [0], "kind": [1]},
        features=datasets.Features({"label": datasets.Value("int64"), "kind": datasets.ClassLabel(num_classes=2)}),
    )
    assert find_label_column(class_label) == "kind"
    assert find_label_column(class_label, "label") == "label"
    plain = datasets.Dataset.from_dict({"fine_label": [0], "coarse_label": [1], "name": ["x"], "n": [2]})
    assert find_label_column(plain.remove_columns("coarse_label")) == "fine_label"
    assert find_label_column(plain.to_iterable_dataset(), "n") == "n"
    for dataset, name, message in (
        (plain, None, r"set `label_column` to one of \['fine_label', 'coarse_label'\]"),
        (plain, "x", "`label_column` is 'x', but the columns are 'fine_label'"),
        (plain, "name", r"`label_column` is 'name', which holds string .*class_encode_column\('name'\)"),
        (plain.select_columns(["n"]), None, r"no column of class labels; its columns are 'n' \(int64\)"),
    ):
        with pytest.raises(ValueError, match=message):
            find_label_column(dataset, name)


def test_hold_out():
    dataset = memory(40, label=list(range(40)))
    for size, count in ((8, 8), (0.1, 4), (0.01, 1)):
        train, held_out = hold_out(dataset, size, seed=1)
        assert len(held_out) == count
        assert sorted([*train["label"], *held_out["label"]]) == list(range(40))
    parts = [list(hold_out(dataset, 8, seed)[1]["label"]) for seed in (1, 1, 2)]
    assert parts[0] == parts[1] != parts[2]
    for wrong in (0, 40, 1.0, -0.5):
        with pytest.raises(ValueError, match=f"`fraction_or_count` is {wrong}, which holds out"):
            hold_out(dataset, wrong)


# -- samples ----------------------------------------------------------------------------------------------------


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in ("pixel_values", "noise"))


def test_sample_shapes_types_and_ranges():
    dataset = ImageDataset(memory(), "image", **SETTINGS)
    sample = dataset[5]
    assert {name: (tuple(t.shape), t.dtype) for name, t in sample.items()} == {
        "pixel_values": ((3, 16, 16), torch.float32),
        "noise": ((16,), torch.float32),
    }
    assert len(dataset) == 8
    assert sample["noise"].min() >= 0
    assert sample["noise"].max() < 1
    assert sample["pixel_values"].min() >= -2
    assert sample["pixel_values"].max() <= 2


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("kind", ["8 bits", "16 bits"])
def test_unnormalized_samples_become_the_same(kind, views):
    data, column = memory(), "image"
    if kind == "16 bits":
        values = np.arange(2 * 20 * 24 * 3).reshape(2, 20, 24, 3)
        data, column = array_dataset(datasets.Array3D((20, 24, 3), "uint16"), values), "bands"
    for train in (True, False):
        dataset = ImageDataset(data, column, **SETTINGS, num_views=views, train=train)
        raw, shape = unnormalized(dataset), (2, 3, 16, 16) if train and views == 2 else (3, 16, 16)
        for key in range(2 * len(dataset)):
            sample, expected = raw[key], dataset[key]
            assert sample.keys() == {"pixels", "noise"}
            assert sample["pixels"].shape == shape
            pixels = sample["pixels"]
            assert pixels.is_contiguous()
            if kind == "16 bits":
                torch.testing.assert_close(normalize(pixels / 255, raw.mean, raw.std), expected["pixel_values"])
            else:
                assert pixels.dtype == torch.uint8
                assert torch.equal(normalize(pixels, raw.mean, raw.std), expected["pixel_values"])
            assert torch.equal(sample["noise"], expected["noise"])
        assert "pixel_values" in dataset[0], "the data set itself stays as it was"


WRONG_VIEWS = [("crop_scale", value) for value in ((0, 1), (0.5, 0.2), (0.2, 1.5), (-0.1, 1))]
WRONG_VIEWS += [("crop_ratio", 0), ("crop_ratio", 1.5), ("std", [0.5, 0.0, 0.5]), ("std", [0.5]), ("mean", [0.5, 0.5])]
WRONG_VIEWS += [("num_views", 0)]


@pytest.mark.parametrize(("name", "value"), WRONG_VIEWS, ids=str)
@pytest.mark.parametrize("kind", [ImageDataset, StreamingImageDataset])
def test_wrong_views(kind, name, value):
    source = memory() if kind is ImageDataset else stream(8)
    with pytest.raises(ValueError, match=rf"`{name}` is {re.escape(str(value))}; give "):
        kind(source, "image", **{**SETTINGS, name: value})


def smooth_jpeg(height, width):
    """Waves of some fifty pixels, which a reduced decoding keeps."""
    y, x = np.mgrid[:height, :width] / 25
    pixels = 127 + 60 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=2) + 60 * (x > y)[..., None]
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer := io.BytesIO(), "JPEG", quality=95)
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("low", [0.02, 0.2, 0.8])
def test_training_decodes_jpegs_in_no_more_detail_than_their_crops_show(monkeypatch, low, views):
    data = datasets.Dataset.from_dict({"image": [smooth_jpeg(480, 640)]}).cast_column("image", datasets.Image())
    settings = {**SETTINGS, "crop_scale": (low, 1.0), "num_views": views}
    dataset = ImageDataset(data, "image", **settings)
    side, shapes, differences = SETTINGS["image_size"][0], [], []

    def spied(*args):
        image = decode_image(*args)
        shapes.append(image.shape)
        return image

    monkeypatch.setattr(data_module, "decode_image", spied)
    samples = [dataset[key] for key in range(30)]
    monkeypatch.setattr(data_module, "decode_image", lambda value, channels, reduction: decode_image(value, channels))
    for epoch, (sample, shape) in enumerate(zip(samples, shapes, strict=True)):
        boxes = [box for box, _ in dataset._draw(480, 640, epoch, 0)]
        most = min(min(box[2:]) for box in boxes) / side / 2
        factor = next(f for f in (8, 4, 2, 1) if f <= max(1, most))
        assert shape == (480 // factor, 640 // factor, 3)
        whole = dataset[epoch]
        assert torch.equal(sample["noise"], whole["noise"])
        differences.append((sample["pixel_values"] - whole["pixel_values"]).abs().mean().item() * 0.25)
    # Of another crop, or with another flip, the difference would be some tenths of the range.
    assert max(differences) < 0.05
    assert ImageDataset(data, "image", **settings, train=False)._load(0).shape == (480, 640, 3)


def test_evaluation_sample_is_the_centre():
    dataset = ImageDataset(memory(), "image", **{**SETTINGS, "image_size": (20, 20)}, train=False)
    expected = np.array(image(2))[:, 2:22].transpose(2, 0, 1) / 255
    torch.testing.assert_close(dataset[2]["pixel_values"], torch.tensor((expected - 0.5) / 0.25).float())
    assert same(dataset[2], dataset[2 + 8 * 5]), "evaluation sees the same picture and the same mask in every epoch"


def test_samples_are_keyed_by_seed_epoch_and_index():
    dataset = ImageDataset(memory(), "image", **SETTINGS)
    other_seed = ImageDataset(memory(), "image", **{**SETTINGS, "seed": 4})
    assert same(dataset[3], dataset[3])
    for other in (dataset[3 + 8], dataset[4], other_seed[3]):
        assert not torch.equal(dataset[3]["noise"], other["noise"])
        assert not torch.equal(dataset[3]["pixel_values"], other["pixel_values"])
    expected = torch.rand(16, generator=sample_generator(3, 2, 5, "noise"))
    assert torch.equal(dataset[2 * 8 + 5]["noise"], expected)


def test_two_views_are_two_draws():
    one = ImageDataset(memory(), "image", **SETTINGS)
    two = ImageDataset(memory(), "image", **SETTINGS, num_views=2)
    sample = two[13]
    assert {name: tuple(t.shape) for name, t in sample.items()} == {"pixel_values": (2, 3, 16, 16), "noise": (2, 16)}
    assert same({name: t[0] for name, t in sample.items()}, one[13])
    assert not torch.equal(sample["pixel_values"][0], sample["pixel_values"][1])
    assert not torch.equal(sample["noise"][0], sample["noise"][1])
    assert same(sample, two[13])
    still = ImageDataset(memory(), "image", **SETTINGS, num_views=2, train=False)
    assert same(still[2], ImageDataset(memory(), "image", **SETTINGS, train=False)[2])


def test_masks_do_not_depend_on_augmentation():
    plain = ImageDataset(memory(), "image", **SETTINGS, crop_scale=(1.0, 1.0), horizontal_flip=False)
    augmented = ImageDataset(memory(), "image", **SETTINGS)
    still = ImageDataset(memory(), "image", **SETTINGS, train=False)
    for key in range(8):
        assert torch.equal(plain[key]["noise"], augmented[key]["noise"])
        assert torch.equal(plain[key]["noise"], still[key]["noise"])


def test_half_of_the_samples_are_mirrored():
    flipping = ImageDataset(memory(1), "image", **SETTINGS)
    fixed = ImageDataset(memory(1), "image", **SETTINGS, horizontal_flip=False)
    mirrored = 0
    for key in range(300):
        a, b = flipping[key]["pixel_values"], fixed[key]["pixel_values"]
        assert torch.equal(a, b) or torch.equal(a, b.flip(-1))
        mirrored += not torch.equal(a, b)
    assert 110 < mirrored < 190


def test_other_columns_are_not_decoded():
    dataset = memory(2).add_column("other", [{"bytes": b"broken", "path": None}] * 2)
    dataset = dataset.cast_column("other", datasets.Image())
    assert ImageDataset(dataset, "image", **SETTINGS)[0]["noise"].shape == (16,)


class EpochSampler:
    """Yields keys as a trainer's sampler does: another order, and the next epoch's keys, each time."""

    def __init__(self, count):
        self.count, self.epoch = count, 0

    def __iter__(self):
        yield from (self.epoch * self.count + np.random.default_rng(self.epoch).permutation(self.count)).tolist()
        self.epoch += 1

    def __len__(self):
        return self.count


def two_epochs(dataset, **kwargs):
    loader = DataLoader(dataset, batch_size=3, sampler=EpochSampler(len(dataset)), **kwargs)
    batches = [batch for _ in range(2) for batch in loader]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


@pytest.mark.parametrize(
    ("workers", "context", "persistent"), [(2, "fork", False), (2, "fork", True), (1, "spawn", True)]
)
def test_workers_change_nothing(workers, context, persistent):
    alone = ImageDataset(memory(8, bad=[2, 6]), "image", **SETTINGS, on_bad_image="skip")
    shared = ImageDataset(memory(8, bad=[2, 6]), "image", **SETTINGS, on_bad_image="skip")
    expected = two_epochs(alone)
    actual = two_epochs(shared, num_workers=workers, multiprocessing_context=context, persistent_workers=persistent)
    assert same(expected, actual)
    assert len(expected["noise"].unique(dim=0)) == 16, "each epoch has its own masks"
    assert shared.num_bad_images == alone.num_bad_images == 2, "what workers find is known here"


# -- bad images -------------------------------------------------------------------------------------------------


def test_raise_names_the_image():
    dataset = ImageDataset(memory(4, bad=[2]), "image", **SETTINGS)
    with pytest.raises(
        ValueError, match=r"image 2 \(2.png\) of .* be used: it cannot be decoded: it is in no image .*\. Remove"
    ):
        dataset[2]
    assert dataset.num_bad_images == 0
    with pytest.raises(ValueError, match=r"image 0 \(0.png\) of `dataset` cannot be used"):
        ImageDataset(memory(4, bad=[0]), "image", **SETTINGS)


def test_skip_takes_the_next_readable_image(monkeypatch):
    dataset = ImageDataset(memory(6, bad=[0, 4, 5]), "image", **SETTINGS, train=False, on_bad_image="skip")
    assert dataset.num_bad_images == 1, "the first is read when the data set is made"
    good = ImageDataset(memory(6), "image", **SETTINGS, train=False)
    for index, stand_in in ((0, 1), (4, 1), (5, 1), (2, 2)):
        assert torch.equal(dataset[index]["pixel_values"], good[stand_in]["pixel_values"])
        assert torch.equal(dataset[index]["noise"], good[index]["noise"])
    assert dataset.num_bad_images == 3
    read = []
    original = ImageDataset._decode
    monkeypatch.setattr(
        ImageDataset, "_decode", lambda self, value: (read.append(value["path"]), original(self, value))[1]
    )
    dataset[4]
    assert read == ["1.png"], "what is known to be bad is not decoded again"


def test_skip_crops_around_the_object_of_the_image_that_is_shown():
    fields = dict(image_size=(20, 24), patch_size=(4, 4), num_patches=30, on_bad_image="skip", contrastive_crop=True)
    dataset = ImageDataset(memory(6, bad=[2]), "image", **{**SETTINGS, **fields})
    boxes = dataset.crop_boxes
    boxes[2], boxes[3] = torch.tensor([1.0, 1, 1, 1]), torch.tensor([0.0, 0, 0, 0])
    sample = unnormalized(dataset)[2]["pixels"]
    boxes[2] = torch.tensor([0.0, 0, 0, 0])  # the bad one's own box says nothing
    assert torch.equal(unnormalized(dataset)[2]["pixels"], sample)
    boxes[3] = torch.tensor([1.0, 1, 1, 1])
    assert not torch.equal(unnormalized(dataset)[2]["pixels"], sample)


def test_all_bad_or_empty():
    with pytest.raises(
        ValueError, match=r"none of the 3 images of `dataset` can be used; the last one: it cannot be dec"
    ):
        ImageDataset(memory(3, bad=range(3)), "image", **SETTINGS, on_bad_image="skip")
    with pytest.raises(ValueError, match="`dataset` is empty"):
        ImageDataset(memory(2).select([]), "image", **SETTINGS)
    with pytest.raises(ValueError, match=r"gives no image that can be used: .*bad \(3\)"):
        StreamingImageDataset(stream(3, bad=range(3)), "image", **SETTINGS, on_bad_image="skip")
    with pytest.raises(ValueError, match="gives no image that can be used: the stream is empty"):
        StreamingImageDataset(stream().filter(lambda row: False), "image", **SETTINGS)


def test_images_smaller_than_a_patch():
    small = datasets.Dataset.from_dict({"image": [{"bytes": png(0, height=30, width=3), "path": None}]})
    with pytest.raises(ValueError, match=r"image 0 of `dataset` .* size \(30, 3\) is smaller than a patch, \(4, 4\)"):
        ImageDataset(*load_image_dataset(small), **SETTINGS)
    with pytest.raises(ValueError, match="smaller than a patch"):
        StreamingImageDataset(*load_image_dataset(small, streaming=True), **SETTINGS)


def test_wrong_number_of_channels_is_not_skipped():
    five = {**SETTINGS, "num_channels": 5, "mean": [0.5] * 5, "std": [0.5] * 5}
    for on_bad_image in ("raise", "skip"):
        with pytest.raises(ValueError, match="`num_channels` is 5, but the data set holds encoded images"):
            ImageDataset(memory(2), "image", **five, on_bad_image=on_bad_image)
    with pytest.raises(ValueError, match="`on_bad_image` is 'ignore'; choose one of raise, skip"):
        ImageDataset(memory(2), "image", **SETTINGS, on_bad_image="ignore")


def test_null_and_missing_images(tmp_path):
    save_images(tmp_path, ["a.png", "b.png", "c.png"])
    loaded = load_image_dataset(tmp_path)
    dataset = ImageDataset(*loaded, **SETTINGS)
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match=r"image 1 \(.*b.png\) .*FileNotFoundError"):
        dataset[1]
    nulls = datasets.Dataset.from_dict({"image": [rows(1)[0], None]})
    with pytest.raises(ValueError, match="image 1 of `dataset` cannot be used: there is no image"):
        ImageDataset(*load_image_dataset(nulls), **SETTINGS)[1]


# -- streams ----------------------------------------------------------------------------------------------------


def by_noise(samples):
    """Samples of a pass, whatever their order."""
    return {sample["noise"].numpy().tobytes(): sample["pixel_values"].numpy().tobytes() for sample in samples}


def test_stream_samples_are_keyed_by_content():
    dataset = StreamingImageDataset(stream(), "image", **SETTINGS, shuffle_buffer_size=4)
    first = list(dataset)
    again = list(dataset)
    dataset.set_epoch(1)
    second = list(dataset)
    assert len(first) == len(second) == 8
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not by_noise(first).keys() & by_noise(second).keys()
    noise = torch.rand(16, generator=sample_generator(3, 1, zlib.crc32(png(5)), "noise"))
    assert noise.numpy().tobytes() in by_noise(second)


def test_stream_order_changes_with_the_epoch():
    dataset = StreamingImageDataset(
        stream(40), "image", **SETTINGS, shuffle_buffer_size=30, crop_scale=(1.0, 1.0), horizontal_flip=False
    )

    def order(epoch):
        dataset.set_epoch(epoch)
        return [round(sample["pixel_values"][0].mean().item(), 4) for sample in dataset]

    assert order(0) == order(0) != order(1)


@pytest.mark.parametrize(("workers", "context"), [(2, "fork"), (1, "spawn")])
def test_stream_with_persistent_workers(workers, context):
    alone = StreamingImageDataset(stream(12, bad=[3]), "image", **SETTINGS, on_bad_image="skip")
    shared = StreamingImageDataset(stream(12, bad=[3]), "image", **SETTINGS, on_bad_image="skip")
    loader = DataLoader(
        shared, batch_size=None, num_workers=workers, persistent_workers=True, multiprocessing_context=context
    )
    for epoch in range(2):
        alone.set_epoch(epoch)
        shared.set_epoch(epoch)
        expected = by_noise(alone)
        assert len(expected) == 11
        assert by_noise(loader) == expected
    assert shared.num_bad_images == alone.num_bad_images == 2, "once an epoch, in whichever worker"


def test_evaluation_stream_is_the_same_in_every_epoch():
    dataset = StreamingImageDataset(stream(), "image", **SETTINGS, train=False)
    first = list(dataset)
    dataset.set_epoch(3)  # which would change the order of the shards
    assert all(same(a, b) for a, b in zip(first, dataset, strict=True))


def test_streamed_folder_reads_files(tmp_path):
    loaded = load_image_dataset(save_images(tmp_path, ["a.png", "b.png", "c.png"]), streaming=True)
    dataset = StreamingImageDataset(*loaded, **SETTINGS)
    expected = {
        torch.rand(16, generator=sample_generator(3, 0, zlib.crc32((tmp_path / name).read_bytes()), "noise"))
        for name in ("a.png", "b.png", "c.png")
    }
    assert by_noise(dataset).keys() == {noise.numpy().tobytes() for noise in expected}
    (tmp_path / "b.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"of the stream \(.*b.png\) of `dataset` cannot be used"):
        list(dataset)


def test_stream_that_does_not_know_its_columns():
    unknown = datasets.IterableDataset.from_generator(lambda: ({"x": row, "n": 1} for row in rows(3)))
    assert unknown.features is None
    loaded = load_image_dataset(unknown)
    assert loaded.image_column == "x"
    assert len(list(StreamingImageDataset(*loaded, **SETTINGS))) == 3


# -- image processor --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image_size", "crop_ratio", "shape"),
    [((32, 32), 1.0, (60, 80)), ((32, 32), 0.875, (80, 60)), ((32, 32), 1.0, (20, 24)), ((24, 48), 0.75, (64, 128))],
)
def test_processor_shows_what_evaluation_shows(tmp_path, image_size, crop_ratio, shape):
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    make_image_processor(image_size, 3, mean, std, crop_ratio).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    encoded = [{"bytes": png(i, height=shape[0], width=shape[1]), "path": None} for i in range(3)]
    dataset = ImageDataset(
        *load_image_dataset(datasets.Dataset.from_dict({"image": encoded})),
        **{**SETTINGS, "image_size": image_size, "mean": mean, "std": std},
        train=False,
        crop_ratio=crop_ratio,
    )
    for i in range(3):
        processed = processor(image(i, *shape), return_tensors="pt").pixel_values[0]
        assert processed.shape == (3, *image_size)
        difference = (processed - dataset[i]["pixel_values"]).abs()
        assert difference.mean() < 0.002
        assert difference.max() < 2.01 / 255 / 0.2  # rounding, in units of the smallest deviation


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK"])
def test_processor_takes_any_mode_to_rgb(mode):
    processor = make_image_processor(16, 3, [0.5] * 3, [0.25] * 3)
    source = image(0, 16, 16).convert(mode)
    expected = (torch.tensor(decode_image(source, 3)).permute(2, 0, 1) / 255 - 0.5) / 0.25
    torch.testing.assert_close(processor(source, return_tensors="pt").pixel_values[0], expected, atol=1e-5, rtol=0)


def test_processor_for_other_channel_counts():
    grey = make_image_processor(16, 1, [0.5], [0.5])
    assert grey(image(0).convert("L"), return_tensors="pt").pixel_values.shape == (1, 1, 16, 16)
    bands = torch.randint(0, 256, (5, 20, 24), dtype=torch.uint8)
    five = make_image_processor(16, 5, [0.5] * 5, [0.5] * 5)
    values = five(bands, return_tensors="pt", input_data_format="channels_first").pixel_values
    assert values.shape == (1, 5, 16, 16)


# -- arguments, and all together --------------------------------------------------------------------------------


def test_arguments_parse():
    parser = HfArgumentParser(DataArguments)
    (args,) = parser.parse_args_into_dataclasses(["--dataset", "x"])
    assert args == DataArguments(dataset="x")
    line = "--dataset x --eval_split val --max_train_samples 7 --image_mean 0.1 0.2 0.3 --crop_ratio 0.9 --streaming"
    (args,) = parser.parse_args_into_dataclasses([*line.split(), "--horizontal_flip", "false"])
    assert (args.eval_split, args.max_train_samples, args.image_mean) == ("val", 7, [0.1, 0.2, 0.3])
    assert (args.crop_ratio, args.streaming, args.horizontal_flip) == (0.9, True, False)
    assert all(action.help for action in parser._actions)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("on_bad_image", "ignore", "`on_bad_image` is 'ignore'; choose one of raise, skip"),
        ("num_held_out", -1, "`num_held_out` is -1; give an int of at least 0"),
        ("max_train_samples", 0, "`max_train_samples` is 0; give an int of at least 1"),
        ("max_eval_samples", -3, "`max_eval_samples` is -3"),
        ("min_crop_scale", 0.0, r"`min_crop_scale` is 0.0; give a number in \(0, 1\]"),
        ("crop_ratio", 1.5, r"`crop_ratio` is 1.5; give a number in \(0, 1\]"),
        ("image_mean", [127.0, 127.0, 127.0], r"`image_mean` is \[127.0.*divide by 255"),
        ("image_std", [0.0, 0.1, 0.1], "`image_std` is .*; every deviation must be above 0"),
    ],
)
def test_wrong_arguments(field, value, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(dataset="x", **{field: value})


def test_default_mean_and_std():
    args = DataArguments(dataset="x")
    assert args.mean_and_std(3) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert args.mean_and_std(5) == ([0.5] * 5, [0.5] * 5)
    with pytest.raises(ValueError, match="`image_mean` has 2 values; give one for each of 3 channels"):
        DataArguments(dataset="x", image_mean=[0.5, 0.5]).mean_and_std(3)


CONFIG = MAEConfig.from_size("tiny", image_size=16, patch_size=4)


def encoded_of(samples):
    return {row["image"]["bytes"] or open(row["image"]["path"], "rb").read() for row in samples.dataset}


def test_build_datasets_holds_out(tmp_path):
    save_images(tmp_path, [f"{kind}/{i}.png" for kind in "ab" for i in range(20)])
    train, evaluation, processor = build_datasets(DataArguments(dataset=str(tmp_path)), CONFIG, seed=0)
    assert (len(train), len(evaluation)) == (36, 4)
    assert not encoded_of(train) & encoded_of(evaluation)
    assert train.train
    assert not evaluation.train
    assert train[0]["noise"].shape == (CONFIG.num_patches,)
    assert processor.crop_size["height"] == 16
    assert processor.size["shortest_edge"] == 16
    other_seed = build_datasets(DataArguments(dataset=str(tmp_path)), CONFIG, seed=1)
    assert encoded_of(other_seed[1]) == encoded_of(evaluation)
    assert not torch.equal(other_seed[0][0]["noise"], train[0]["noise"])
    limited = DataArguments(dataset=str(tmp_path), max_train_samples=10, max_eval_samples=3)
    train, evaluation, _ = build_datasets(limited, CONFIG)
    assert (len(train), len(evaluation)) == (10, 3)
    assert build_datasets(DataArguments(dataset=str(tmp_path), num_held_out=0), CONFIG)[1] is None


def test_build_datasets_with_an_evaluation_split(tmp_path):
    save_images(tmp_path, ["train/1.png", "train/2.png", "val/3.png"])
    args = DataArguments(dataset=str(tmp_path), eval_split="val", min_crop_scale=0.5, on_bad_image="skip")
    config = MAEConfig.from_size("tiny", image_size=192, patch_size=16)
    train, evaluation, processor = build_datasets(args, config)
    assert (len(train), len(evaluation)) == (2, 1)
    assert train.crop_scale == (0.5, 1.0)
    assert evaluation.on_bad_image == "skip"
    assert evaluation.crop_ratio == 0.875
    assert processor.size["shortest_edge"] == 220
    streamed = DataArguments(dataset=str(tmp_path), eval_split="val", streaming=True)
    assert [len(list(samples)) for samples in build_datasets(streamed, CONFIG)[:2]] == [2, 1]


def test_single_image_is_not_held_out(tmp_path):
    save_images(tmp_path, ["1.png"])
    for streaming in (False, True):
        args = DataArguments(dataset=str(tmp_path), streaming=streaming)
        assert build_datasets(args, CONFIG)[1] is None


@pytest.mark.parametrize("workers", [0, 2])
def test_build_datasets_from_a_stream(tmp_path, workers):
    names = [f"{i:02}.png" for i in range(30)]
    save_images(tmp_path, names)
    args = DataArguments(dataset=str(tmp_path), streaming=True, num_held_out=5)
    train, evaluation, _ = build_datasets(args, CONFIG)
    assert isinstance(evaluation, ImageDataset)
    assert len(evaluation) == 5
    held_out = {content_key(row["image"]) for row in evaluation.dataset}
    all_keys = {zlib.crc32((tmp_path / name).read_bytes()) for name in names}

    def noises(some_keys):
        return {torch.rand(16, generator=sample_generator(0, 0, key, "noise")).numpy().tobytes() for key in some_keys}

    seen = by_noise(DataLoader(train, batch_size=None, num_workers=workers)).keys()
    assert seen == noises(all_keys - held_out)
    args = DataArguments(dataset=str(tmp_path), streaming=True, num_held_out=5, max_train_samples=8)
    assert len(list(build_datasets(args, CONFIG)[0])) == 8
