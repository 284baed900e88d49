# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Samples depend on their key alone, whatever the workers; bad images are named or skipped; streams; batches."""

import io
import re
import zlib

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from clmae.configuration import MAEConfig
from clmae.training.base import EpochSampler
from clmae.training.data import (
    DataArguments,
    ImageCollator,
    ImageDataset,
    StreamingImageDataset,
    build_datasets,
    content_key,
    decode_image,
    load_image_dataset,
    normalize,
    sample_state,
    uniform,
    unnormalized,
)
from clmae.training.data.crops import NOISE

from .samples import SETTINGS, arrays, image, memory, png, rows, save_images, stream


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in ("pixel_values", "noise"))


def noise_of(seed, epoch, key):
    numbers = [uniform(sample_state(seed, epoch, key), NOISE + i) for i in range(16)]
    return torch.tensor(numbers, dtype=torch.float32)


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
@pytest.mark.parametrize("scale", [(0.002, 0.01), (0.01, 1.0), (0.8, 1.0)])
def test_training_decodes_jpegs_in_no_more_detail_than_their_crops_show(scale, views):
    settings = {**SETTINGS, "crop_scale": scale, "num_views": views}
    encoded = smooth_jpeg(480, 640)
    reduced = datasets.Dataset.from_dict({"image": [encoded]}).cast_column("image", datasets.Image())
    whole = arrays(datasets.Array3D((480, 640, 3), "uint8"), [decode_image(encoded, 3)])
    reduced, whole = ImageDataset(reduced, "image", **settings), ImageDataset(whole, "bands", **settings)
    differences = []
    for epoch in range(30):
        sample, expected = reduced[epoch], whole[epoch]
        assert torch.equal(sample["noise"], expected["noise"])
        differences.append((sample["pixel_values"] - expected["pixel_values"]).abs().mean().item() * 0.25)
    # Of another crop, or with another flip, the difference would be some tenths of the range.
    assert max(differences) < 0.05
    assert (max(differences) > 0) == (scale[1] == 1.0), "parts that are not much larger than a sample stay as they are"
    centre = ImageDataset(reduced.dataset, "image", **settings, train=False)[0]["pixel_values"]
    assert torch.equal(centre, ImageDataset(whole.dataset, "bands", **settings, train=False)[0]["pixel_values"])


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
    assert torch.equal(dataset[2 * 8 + 5]["noise"], noise_of(3, 2, 5))


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
    for key in range(120):
        a, b = flipping[key]["pixel_values"], fixed[key]["pixel_values"]
        assert torch.equal(a, b) or torch.equal(a, b.flip(-1))
        mirrored += not torch.equal(a, b)
    assert 40 < mirrored < 80


def test_other_columns_are_not_decoded():
    dataset = memory(2).add_column("other", [{"bytes": b"broken", "path": None}] * 2)
    dataset = dataset.cast_column("other", datasets.Image())
    assert ImageDataset(dataset, "image", **SETTINGS)[0]["noise"].shape == (16,)


def two_epochs(dataset, **kwargs):
    sampler, batches = EpochSampler(len(dataset), seed=0), []
    loader = DataLoader(dataset, batch_size=3, sampler=sampler, **kwargs)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches += list(loader)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


@pytest.fixture(params=["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def start_method(request):
    """How workers start: as forks of this process, or of a server, which inherit nothing."""
    return request.getfixturevalue("processes").context if request.param == "forkserver" else request.param


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_change_nothing(start_method, persistent):
    alone = ImageDataset(memory(8, bad=[2, 6]), "image", **SETTINGS, on_bad_image="skip")
    shared = ImageDataset(memory(8, bad=[2, 6]), "image", **SETTINGS, on_bad_image="skip")
    expected = two_epochs(alone)
    options = dict(num_workers=2, multiprocessing_context=start_method, persistent_workers=persistent)
    assert same(expected, two_epochs(shared, **options))
    assert len(expected["noise"].unique(dim=0)) == 16, "each epoch has its own masks"
    assert shared.num_bad_images == alone.num_bad_images == 2, "what workers find is known here"


# -- batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("train", [True, False])
def test_images_of_8_bits_become_the_same_when_they_are_normalised_later(views, train):
    dataset = ImageDataset(memory(), "image", **SETTINGS, num_views=views, train=train)
    raw = unnormalized(dataset)
    for key in range(2 * len(dataset)):
        pixels, expected = raw[key]["pixel_values"], dataset[key]
        assert pixels.dtype == torch.uint8
        assert torch.equal(normalize(pixels, raw.mean, raw.std), expected["pixel_values"])
        assert torch.equal(raw[key]["noise"], expected["noise"])


def test_images_of_more_bits_are_normalised_and_so_is_what_shares_their_batch():
    deep = Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160)
    deep.save(buffer := io.BytesIO(), "PNG")
    data = datasets.Dataset.from_list([*rows(2), {"bytes": buffer.getvalue(), "path": None}])
    data = datasets.Dataset.from_dict({"image": list(data)}, features=datasets.Features({"image": datasets.Image()}))
    dataset = ImageDataset(data, "image", **SETTINGS)
    samples, collate = [unnormalized(dataset)[i] for i in range(3)], ImageCollator(dataset.mean, dataset.std)
    assert [sample["pixel_values"].dtype for sample in samples] == [torch.uint8, torch.uint8, torch.float32]
    assert collate(samples[:2])["pixel_values"].dtype == torch.uint8
    expected = torch.stack([dataset[i]["pixel_values"] for i in range(3)])
    assert torch.equal(collate(samples)["pixel_values"], expected)
    assert collate(batch := {"pixel_values": expected}) is batch, "a batch that was made on the device"


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
    assert dataset.num_bad_images == 1, "the first is read when the dataset is made"
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
    sample = unnormalized(dataset)[2]["pixel_values"]
    boxes[2] = torch.tensor([0.0, 0, 0, 0])  # the bad one's own box says nothing
    assert torch.equal(unnormalized(dataset)[2]["pixel_values"], sample)
    boxes[3] = torch.tensor([1.0, 1, 1, 1])
    assert not torch.equal(unnormalized(dataset)[2]["pixel_values"], sample)


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
    for kind, streaming in ((ImageDataset, False), (StreamingImageDataset, True)):
        with pytest.raises(ValueError, match=r"image 0 .* size \(30, 3\) is smaller than a patch, \(4, 4\)"):
            kind(*load_image_dataset(small, streaming=streaming), **SETTINGS)


def test_wrong_number_of_channels_is_not_skipped():
    five = {**SETTINGS, "num_channels": 5, "mean": [0.5] * 5, "std": [0.5] * 5}
    for on_bad_image in ("raise", "skip"):
        with pytest.raises(ValueError, match="`num_channels` is 5, but the dataset holds encoded images"):
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
    assert noise_of(3, 1, zlib.crc32(png(5))).numpy().tobytes() in by_noise(second)


def test_stream_order_changes_with_the_epoch():
    dataset = StreamingImageDataset(
        stream(40), "image", **SETTINGS, shuffle_buffer_size=30, crop_scale=(1.0, 1.0), horizontal_flip=False
    )

    def order(epoch):
        dataset.set_epoch(epoch)
        return [round(sample["pixel_values"][0].mean().item(), 4) for sample in dataset]

    assert order(0) == order(0) != order(1)


def test_stream_with_persistent_workers(start_method):
    alone = StreamingImageDataset(stream(12, bad=[3]), "image", **SETTINGS, on_bad_image="skip")
    shared = StreamingImageDataset(stream(12, bad=[3]), "image", **SETTINGS, on_bad_image="skip")
    options = dict(num_workers=2, multiprocessing_context=start_method, persistent_workers=True)
    loader = DataLoader(shared, batch_size=None, **options)
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
    keys = [zlib.crc32((tmp_path / name).read_bytes()) for name in ("a.png", "b.png", "c.png")]
    assert by_noise(dataset).keys() == {noise_of(3, 0, key).numpy().tobytes() for key in keys}
    (tmp_path / "b.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"of the stream \(.*b.png\) of `dataset` cannot be used"):
        list(dataset)


def test_stream_that_does_not_know_its_columns():
    unknown = datasets.IterableDataset.from_generator(lambda: ({"x": row, "n": 1} for row in rows(3)))
    assert unknown.features is None
    loaded = load_image_dataset(unknown)
    assert loaded.image_column == "x"
    assert len(list(StreamingImageDataset(*loaded, **SETTINGS))) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_held_out_of_a_stream_is_not_trained_on(tmp_path, workers):
    config = MAEConfig.from_size("tiny", image_size=16, patch_size=4)
    names = [f"{i:02}.png" for i in range(30)]
    save_images(tmp_path, names)
    args = DataArguments(dataset=str(tmp_path), streaming=True, num_held_out=5)
    train, evaluation, _ = build_datasets(args, config)
    assert isinstance(evaluation, ImageDataset)
    assert len(evaluation) == 5
    held_out = {content_key(row["image"]) for row in evaluation.dataset}
    all_keys = {zlib.crc32((tmp_path / name).read_bytes()) for name in names}

    seen = by_noise(DataLoader(train, batch_size=None, num_workers=workers)).keys()
    assert seen == {noise_of(0, 0, key).numpy().tobytes() for key in all_keys - held_out}
    args = DataArguments(dataset=str(tmp_path), streaming=True, num_held_out=5, max_train_samples=8)
    assert len(list(build_datasets(args, config)[0])) == 8


def test_iterating_a_dataset_ends():
    dataset = ImageDataset(memory(4), "image", **SETTINGS)
    assert len(list(dataset)) == 4
