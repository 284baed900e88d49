# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Datasets are opened wherever they are, their columns found, and split as the arguments say."""

import io
import os

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, HfArgumentParser

from clmae.configuration import MAEConfig
from clmae.training.data import (
    DataArguments,
    ImageDataset,
    StreamingImageDataset,
    build_datasets,
    decode_image,
    find_label_column,
    hold_out,
    load_image_dataset,
    make_image_processor,
    take_samples,
)

from .samples import SETTINGS, arrays, image, memory, png, rows, save_images, stream

CONFIG = MAEConfig.from_size("tiny", image_size=16, patch_size=4)


def write_parquet(path, count=5, start=0):
    encoded = [png(start + i) for i in range(count)]
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    pictures = {"picture": [{"bytes": data, "path": None} for data in encoded], "label": [i % 2 for i in range(count)]}
    datasets.Dataset.from_dict(pictures, features=features).to_parquet(path)
    return encoded


def loaded_bytes(source):
    return [row[source.image_column]["bytes"] for row in source.dataset]


# -- folders ----------------------------------------------------------------------------------------------------


def test_folder_of_images(tmp_path):
    # `load_dataset` may take `test_1.png` and `training-day.png` for two splits, and lose the rest.
    names = ["a.png", "B.JPG", "test_1.png", "training-day.png", "below/deeper/c.webp", ".hidden.png", ".git/d.png"]
    save_images(tmp_path, names)
    (tmp_path / "notes.txt").write_text("no image")
    dataset, column = load_image_dataset(tmp_path)
    assert column == "image"
    assert dataset.column_names == ["image"]
    paths = {row["image"]["path"].removeprefix(f"{tmp_path}/") for row in dataset}
    assert paths == set(names[:5])
    assert decode_image(dataset[0]["image"], 3).shape == (20, 24, 3)


def test_class_folders(tmp_path):
    save_images(tmp_path, ["cat/1.png", "cat/2.png", "dog/a/3.png", "test/4.png"])
    dataset, _ = load_image_dataset(str(tmp_path))
    assert dataset.features["label"].names == ["cat", "dog", "test"]
    assert dataset["label"] == [0, 0, 1, 2]
    assert find_label_column(dataset) == "label"
    one, _ = load_image_dataset(save_images(tmp_path / "cat" / "one", ["kind/1.png", "kind/2.png"]))
    assert one.column_names == ["image"], "one class is no label"
    with pytest.raises(ValueError, match=r"no column of class labels; its columns are 'image' \(Image\).*folder of"):
        find_label_column(one)


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


def test_a_folder_that_cannot_be_read_is_an_error_and_no_smaller_dataset(tmp_path, monkeypatch):
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


def test_changed_data_are_not_stale(tmp_path):
    save_images(tmp_path / "folder", ["a.png", "b.png"])
    before = load_image_dataset(tmp_path / "folder")
    image(9).save(tmp_path / "folder" / "a.png")
    image(10).save(tmp_path / "folder" / "c.png")
    after = load_image_dataset(tmp_path / "folder")
    assert (len(before.dataset), len(after.dataset)) == (2, 3)
    np.testing.assert_array_equal(decode_image(after.dataset[0]["image"], 3), np.array(image(9)))
    write_parquet(tmp_path / "data.parquet")
    load_image_dataset(tmp_path / "data.parquet")
    encoded = write_parquet(tmp_path / "data.parquet", start=50)
    assert loaded_bytes(load_image_dataset(tmp_path / "data.parquet")) == encoded


# -- other sources ----------------------------------------------------------------------------------------------


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
    assert loaded_bytes(load_image_dataset(tmp_path / "one", streaming=streaming)) == [png(i) for i in range(8)]
    assert len(list(load_image_dataset(tmp_path / "dict", "test", streaming=streaming).dataset)) == 1
    with pytest.raises(ValueError, match=r"`split` is 'eval', but .* has 'train', 'test'"):
        load_image_dataset(tmp_path / "dict", "eval")
    (tmp_path / "one" / "dataset_info.json").unlink()
    with pytest.raises(ValueError, match="cannot be loaded from disk"):
        load_image_dataset(tmp_path / "one")


def test_datasets_in_memory():
    for dataset in (memory(), memory().with_format("numpy"), datasets.Dataset.from_dict({"image": rows(8)})):
        loaded = load_image_dataset(dataset)
        assert loaded.image_column == "image"
        assert loaded_bytes(loaded) == [row["bytes"] for row in rows(8)]
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


BANDS = np.random.default_rng(0).integers(0, 1000, (4, 5, 16, 20))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("dtype", ["uint16", "float32", "uint8"])
@pytest.mark.parametrize("kind", ["Array3D", "List"])
def test_5_channel_arrays(kind, dtype, streaming):
    values = BANDS % 200 if dtype == "uint8" else BANDS / 1000 if dtype == "float32" else BANDS
    nested = datasets.List(datasets.List(datasets.List(datasets.Value(dtype))))
    feature = nested if kind == "List" else datasets.Array3D((5, 16, 20), dtype)
    dataset = arrays(feature, values.astype(dtype).tolist())
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
        (datasets.DatasetDict(a=memory(1)), {}, "`split` is 'train', but the dataset in memory has 'a'"),
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


# -- choosing ---------------------------------------------------------------------------------------------------


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


# -- arguments --------------------------------------------------------------------------------------------------


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
    for one in (memory(1), stream(1, shards=1)):
        assert build_datasets(DataArguments(dataset=one), CONFIG)[1] is None


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


def test_what_streams_cannot_do():
    for name, message in (
        ("contrastive_crop", "keeps a box for each image"),
        ("device_resident", "keeps all images on"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` {message}"):
            build_datasets(DataArguments(dataset=stream(4), **{name: True}), CONFIG)
        with pytest.raises(ValueError, match=f"`{name}` {message}"):
            DataArguments(dataset="d", streaming=True, **{name: True})


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
