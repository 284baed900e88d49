# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Features of every kind of encoder, in order, without masking, and without side effects."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BeitConfig,
    BeitModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

import clmae
from clmae.evaluation.features import LabelledImages, default_feature, extract_features, random_encoder, raw_pixels
from clmae.training.data import make_image_processor

SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)


def image_dataset(images, labels, names=("a", "b", "c")) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def random_images(n: int = 7, size: int = 16) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(n)]


def processor(num_channels: int = 3, size: int = 16):
    return make_image_processor(size, num_channels, [0.5] * num_channels, [0.5] * num_channels)


@pytest.fixture
def images() -> LabelledImages:
    return LabelledImages(image_dataset(random_images(), [0, 1, 2, 0, 1, 2, 0]), processor())


def make_model(name: str, tiny_config):
    mlp = dict(intermediate_size=64)
    made = {
        "vit": lambda: ViTModel(ViTConfig(**SIZE, **mlp, hidden_dropout_prob=0.5)),
        "vit_mae": lambda: ViTMAEModel(ViTMAEConfig(**SIZE, **mlp)),
        "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZE, mlp_ratio=2)),
        "registers": lambda: Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**SIZE, mlp_ratio=2, num_register_tokens=3)
        ),
        "beit": lambda: BeitModel(BeitConfig(**SIZE, **mlp)),
        "mae": lambda: clmae.MAEModel(tiny_config("mae")),
        "cl_mae": lambda: clmae.CLMAEModel(tiny_config("cl_mae")),
        "cmae": lambda: clmae.CMAEModel(tiny_config("cmae")),
    }
    model = made[name]()
    with torch.no_grad():  # nothing may be zero by accident: positions, class tokens and biases show in the features
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# -- images ---------------------------------------------------------------------------------------------------------


def test_images_are_normalised_and_in_order(images):
    for index, image in enumerate(random_images()):
        pixel_values, label = images[index]
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 * 2 - 1
        torch.testing.assert_close(pixel_values, expected)
        assert label == index % 3
    batch = images.__getitems__([5, 2])
    assert torch.equal(batch[0][0], images[5][0])
    assert torch.equal(batch[1][0], images[2][0])


def test_any_size_and_mode_becomes_one_shape():
    sources = [
        Image.new("L", (40, 20), 255),
        Image.new("RGBA", (9, 30), (0, 0, 0, 0)),  # transparent: white
        Image.fromarray(np.full((16, 16), 65535, dtype=np.uint16)),
        Image.new("CMYK", (16, 16)),
        Image.new("1", (5, 5), 1),
    ]
    found = LabelledImages(image_dataset(sources, [0] * 5), processor())
    for index in range(5):
        torch.testing.assert_close(found[index][0], torch.ones(3, 16, 16), msg=f"image {index}")


def test_arrays_with_many_channels():
    values = np.random.default_rng(0).integers(0, 65536, (2, 5, 16, 16), dtype=np.uint16)
    features = datasets.Features({"image": datasets.Array3D((5, 16, 16), "uint16"), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict({"image": values, "label": [3, 1]}, features=features)
    found = LabelledImages(data, processor(5), num_channels=5)
    assert found.labels.tolist() == [3, 1]
    torch.testing.assert_close(found[1][0], torch.from_numpy(values[1].astype(np.float32)) / 65535 * 2 - 1)


def test_broken_image_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.new("RGB", (16, 16)).save(tmp_path / "good.png")
    paths = [str(tmp_path / name) for name in ("good.png", "broken.png")]
    found = LabelledImages(image_dataset(paths, [0, 1]), processor())
    with pytest.raises(ValueError, match=r"image 1 \(.*broken.png\) of `dataset` cannot be used"):
        raw_pixels(found, progress=False)


@pytest.mark.parametrize("missing", [-1, None])
def test_missing_label_is_named(missing):
    with pytest.raises(ValueError, match="`label_column` 'label' has no class for image 2"):
        LabelledImages(image_dataset(random_images(4), [0, 1, missing, 0]), processor())


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([[0, 1], [1]], datasets.List(datasets.Value("int64")), "'label' holds several labels per image"),
        ([0.0, 1.0], datasets.Value("float32"), "'label' holds float32, and fractions are no classes"),
        (["cat", None], datasets.Value("string"), "'label' has no class for image 1"),
        (["cat", ""], datasets.Value("string"), "'label' has no class for image 1"),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_labels_that_are_no_classes(values, kind, message, named):
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    data = datasets.Dataset.from_dict({"image": random_images(2), "label": values}, features=features)
    with pytest.raises(ValueError, match=message):
        LabelledImages(data, processor(), label_column="label" if named else None)


def test_words_are_classes_as_the_training_set_numbers_them():
    def of(words, **options):
        data = {"image": random_images(len(words)), "label": words}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
        return LabelledImages(datasets.Dataset.from_dict(data, features=features), processor(), **options)

    train = of(["dog", "cat", "dog", "owl"])
    assert train.class_names == ["cat", "dog", "owl"]
    assert train.labels.tolist() == [1, 0, 1, 2]
    test = of(["owl", "dog"], class_names=train.class_names)
    assert (test.labels.tolist(), test.class_names) == ([2, 1], train.class_names)
    with pytest.raises(ValueError, match="classes that the training set lacks: 'ant', 'bee'; leave out"):
        of(["owl", "bee", "ant"], class_names=train.class_names)


def test_numbers_are_taken_before_words():
    data = image_dataset(random_images(2), [1, 0]).add_column("class", ["x", "y"])
    assert LabelledImages(data, processor()).label_column == "label"
    assert LabelledImages(data, processor(), label_column="class").class_names == ["x", "y"]


def test_bad_data():
    data = image_dataset(random_images(2), [0, 1])
    with pytest.raises(ValueError, match="`dataset` has no column of class labels"):
        LabelledImages(data.remove_columns("label"), processor())
    with pytest.raises(ValueError, match="`dataset` is empty"):
        LabelledImages(data.select([]), processor())
    with pytest.raises(ValueError, match="`dataset` is of type IterableDataset"):
        LabelledImages(data.to_iterable_dataset(), processor())


# -- encoders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", ["cls", "mean", "pooler_output"])
@pytest.mark.parametrize("name", ["vit", "dinov2", "mae", "cl_mae"])
def test_features_equal_the_models_own_output(name, feature, images, tiny_config):
    model = make_model(name, tiny_config)
    features, labels = extract_features(model, images, batch_size=3, feature=feature, progress=False)
    assert features.dtype == torch.float32
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    model.eval()
    for index in range(7):
        with torch.no_grad():
            outputs = model(images[index][0][None])
        tokens = outputs.last_hidden_state[0]
        expected = {"cls": tokens[0], "mean": tokens[1:].mean(0), "pooler_output": outputs.pooler_output[0]}
        torch.testing.assert_close(features[index], expected[feature], atol=1e-5, rtol=1e-4)


def test_vit_mae_sees_all_patches_in_order(images, tiny_config):
    model = make_model("vit_mae", tiny_config)
    features = {f: extract_features(model, images, feature=f, progress=False)[0] for f in ("cls", "mean")}
    assert model.config.mask_ratio == 0.75
    # The encoder by hand, from its parts.
    embeddings = model.embeddings
    pixel_values = torch.stack([images[i][0] for i in range(7)])
    with torch.no_grad():
        patches = embeddings.patch_embeddings(pixel_values) + embeddings.position_embeddings[:, 1:]
        class_token = (embeddings.cls_token + embeddings.position_embeddings[:, :1]).expand(7, -1, -1)
        tokens = torch.cat([class_token, patches], 1)
        for layer in model.layers:
            tokens = layer(tokens)
        tokens = model.layernorm(tokens)
    torch.testing.assert_close(features["cls"], tokens[:, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(features["mean"], tokens[:, 1:].mean(1), atol=1e-5, rtol=1e-4)


def test_registers_are_no_patches(images, tiny_config):
    model = make_model("registers", tiny_config).eval()
    features, _ = extract_features(model, images, feature="mean", progress=False)
    with torch.no_grad():
        tokens = model(images[0][0][None]).last_hidden_state[0]
    assert len(tokens) == 1 + 3 + 16
    torch.testing.assert_close(features[0], tokens[4:].mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit", "dinov2", "registers", "beit", "mae", "cl_mae", "cmae"])
def test_class_token_beside_the_mean(name, images, tiny_config):
    model = make_model(name, tiny_config)
    both, cls, mean = (
        extract_features(model, images, feature=feature, progress=False)[0] for feature in ("cls+mean", "cls", "mean")
    )
    assert both.shape == (7, 64)
    assert torch.equal(both, torch.cat([cls, mean], 1))


@pytest.mark.parametrize("name", ["vit", "vit_mae", "dinov2", "registers", "mae", "cl_mae", "cmae"])
def test_layers(name, images, tiny_config):
    model = make_model(name, tiny_config)
    found = {
        layer: extract_features(model, images, feature="cls+mean", layer=layer, progress=False)[0]
        for layer in (None, 0, 1, 2, -1, -3)
    }
    assert torch.equal(found[2], found[-1])
    assert torch.equal(found[0], found[-3])
    assert not any(torch.equal(found[a], found[b]) for a, b in ((0, 1), (1, 2), (2, None)))
    # The last block's tokens become the output by the final LayerNorm.
    extract = dict(feature="cls", progress=False)
    norm = getattr(model, "layernorm", None) or getattr(model, "norm", None)
    last, output = (extract_features(model, images, layer=layer, **extract)[0] for layer in (-1, None))
    torch.testing.assert_close(norm(last), output, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"`layer` is 3, but a \w+ gives 0 to 2"):
        extract_features(model, images, feature="cls", layer=3, progress=False)
    with pytest.raises(ValueError, match="`layer` is 1, but only a model's output is pooled by itself"):
        extract_features(model, images, feature="pooler_output", layer=1, progress=False)


def test_default_feature(tiny_config):
    for pooling in ("mean", "cls"):
        model = clmae.CLMAEModel(tiny_config("cl_mae", pooling=pooling))
        assert (default_feature(model), default_feature(model, layer=1)) == ("pooler_output", pooling)
    for name in ("vit", "vit_mae"):
        model = make_model(name, tiny_config)
        assert (default_feature(model), default_feature(model, layer=1)) == ("cls", "cls")


def test_an_encoder_without_a_token_for_each_patch(images):
    sizes = dict(image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2)
    model = SwinModel(SwinConfig(**sizes))
    with pytest.raises(ValueError, match="a SwinModel, which gives 16 tokens for 64 patches"):
        extract_features(model, images, feature="mean", progress=False)
    assert extract_features(model, images, feature="pooler_output", progress=False)[0].shape == (7, 32)


def test_nothing_is_left_changed(images, tiny_config):
    model = make_model("vit", tiny_config).train()
    model.layers[0].eval() if hasattr(model, "layers") else model.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    state = torch.get_rng_state()
    first, _ = extract_features(model, images, progress=False)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(state, torch.get_rng_state())
    assert not first.requires_grad
    assert torch.equal(first, extract_features(model, images, progress=False)[0])  # dropout is off


def test_all_is_restored_after_an_error(images, tiny_config):
    model = make_model("vit_mae", tiny_config).train()
    with pytest.raises(ValueError, match="`feature` is 'pooler_output', which a ViTMAEModel does not give"):
        extract_features(model, images, feature="pooler_output", progress=False)
    assert model.training
    assert model.config.mask_ratio == 0.75


def test_workers_and_bfloat16(images, tiny_config):
    model = make_model("mae", tiny_config)
    features, labels = extract_features(model, images, batch_size=2, progress=False)
    parallel, parallel_labels = extract_features(model, images, batch_size=2, num_workers=2, progress=False)
    assert torch.equal(features, parallel)
    assert torch.equal(labels, parallel_labels)
    rough, _ = extract_features(model, images, bf16=True, progress=False)
    assert rough.dtype == torch.float32
    assert 0 < (rough - features).abs().max() < 0.1 * features.abs().max()
    half, _ = extract_features(model.bfloat16(), images, progress=False)
    assert (half - features).abs().max() < 0.1 * features.abs().max()


def test_progress_bar(images, tiny_config, capsys):
    extract_features(make_model("mae", tiny_config), images)
    assert "7/7" in capsys.readouterr().err
    extract_features(make_model("mae", tiny_config), images, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(feature="pool"), "`feature` is 'pool'; choose one of pooler_output, cls, mean, cls\\+mean"),
        (dict(batch_size=0), "`batch_size` is 0"),
        (dict(num_workers=-1), "`num_workers` is -1"),
    ],
)
def test_bad_options(change, message, images, tiny_config):
    with pytest.raises(ValueError, match=message):
        extract_features(make_model("mae", tiny_config), images, progress=False, **change)


def test_a_model_that_is_no_encoder(images, tiny_config):
    model = clmae.MAEForPreTraining(tiny_config("mae"))
    with pytest.raises(ValueError, match=r"MAEForPreTraining, which gives no `last_hidden_state`.*AutoModel"):
        extract_features(model, images, progress=False)


# -- cache ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def forward_passes(monkeypatch):
    """How many batches went through an encoder of ours so far."""
    seen = []
    forward = clmae.MAEModel.forward

    def counted(self, *args, **kwargs):
        seen.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(clmae.MAEModel, "forward", counted)
    return seen


def test_features_are_kept(images, tiny_config, tmp_path, forward_passes):
    model = make_model("mae", tiny_config)
    options = dict(cache_dir=tmp_path / "new", progress=False)
    first, labels = extract_features(model, images, **options)
    assert len(forward_passes) == 1
    copied = clmae.MAEModel(model.config)
    copied.load_state_dict(model.state_dict())
    again, again_labels = extract_features(copied, images, **options)
    assert len(forward_passes) == 1
    assert torch.equal(first, again)
    assert torch.equal(labels, again_labels)
    (path,) = (tmp_path / "new").iterdir()
    before = path.read_bytes()
    again += 1  # what is done to the features stays out of the file
    assert path.read_bytes() == before
    raw, _ = raw_pixels(images, **options)
    assert torch.equal(raw, raw_pixels(images, **options)[0])
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_anything_that_matters_is_another_entry(images, tiny_config, tmp_path, forward_passes):
    model = make_model("mae", tiny_config)
    options = dict(cache_dir=tmp_path, progress=False)
    data = image_dataset(random_images(), [0, 1, 2, 0, 1, 2, 0])
    resized = make_image_processor(16, 3, [0.4] * 3, [0.5] * 3)
    runs = [
        (model, images, {}),
        (model, images, dict(feature="cls")),
        (model, images, dict(feature="mean")),
        (model, images, dict(feature="mean", layer=1)),
        (model, images, dict(bf16=True)),
        (random_encoder(model), images, {}),
        (model, LabelledImages(data.select([0, 2, 1]), processor()), {}),
        (model, LabelledImages(data.select([0, 1, 2]), processor()), {}),
        (model, LabelledImages(data, resized), {}),
    ]
    for n in (1, 2):  # the second time, all are there
        for which, part, change in runs:
            extract_features(which, part, **options, **change)
        assert len(forward_passes) == len(list(tmp_path.iterdir())) == len(runs), n
    # Labels do not matter, and are never the cache's.
    relabelled = LabelledImages(image_dataset(random_images(), [2] * 7), processor())
    _, labels = extract_features(model, relabelled, **options)
    assert labels.tolist() == [2] * 7
    with torch.no_grad():
        model.layers[0].mlp.fc1.bias[0] += 1e-3
    extract_features(model, images, **options)
    assert len(forward_passes) > len(runs)


def test_a_changed_file_is_noticed(tiny_config, tmp_path, forward_passes):
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for i, path in enumerate(paths):
        random_images(2)[i].save(path)
    model, data = make_model("mae", tiny_config), image_dataset(paths, [0, 1])
    options = dict(cache_dir=tmp_path / "cache", progress=False)
    first, _ = extract_features(model, LabelledImages(data, processor()), **options)
    extract_features(model, LabelledImages(data, processor()), **options)
    assert len(forward_passes) == 1
    Image.new("RGB", (16, 16)).save(paths[1])
    changed, _ = extract_features(model, LabelledImages(data, processor()), **options)
    assert torch.equal(first[0], changed[0])
    assert not torch.equal(first[1], changed[1])


@pytest.mark.parametrize("damage", ["cut", "empty", "other rows", "no array"])
def test_a_damaged_cache_is_written_anew(images, tiny_config, tmp_path, forward_passes, damage):
    model, options = make_model("mae", tiny_config), dict(cache_dir=tmp_path, progress=False)
    expected, _ = extract_features(model, images, **options)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    if damage == "other rows":
        np.save(path, np.zeros((6, 32), dtype=np.float32))
    else:
        path.write_bytes({"cut": content[:-20], "empty": b"", "no array": b"x" * len(content)}[damage])
    found, _ = extract_features(model, images, **options)
    assert torch.equal(found, expected)
    assert len(forward_passes) == 2
    assert path.read_bytes() == content


def test_what_cannot_be_recognised_is_not_kept(images, tiny_config, tmp_path):
    model, options = make_model("mae", tiny_config), dict(cache_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match="`cache_dir` is given, but `dataset` is a list"):
        extract_features(model, [images[0]], **options)
    images.processor = lambda *args, **kwargs: processor()(*args, **kwargs)
    with pytest.raises(ValueError, match="`cache_dir` is given, but `processor` is no image processor"):
        extract_features(model, images, **options)


# -- several processes ----------------------------------------------------------------------------------------------


def one_of_two(folder, sizes):
    """What each process does with the dataset of each size: leaves what it got in `<size>-<rank>.safetensors`."""
    dist.init_process_group("gloo")
    model = clmae.MAEModel.from_pretrained(folder / "model")
    encoded = []
    model.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
    for size in sizes:
        encoded.clear()
        images = LabelledImages(datasets.load_from_disk(str(folder / str(size))), processor())
        options = dict(batch_size=2, cache_dir=folder / "cache")
        features, labels = extract_features(model, images, **options)
        count = sum(encoded)
        dist.barrier()
        cached, _ = extract_features(model, images, **options, progress=False)
        assert sum(encoded) == count
        pixels, _ = raw_pixels(images, progress=False)
        got = {"features": features, "labels": labels, "cached": cached, "pixels": pixels}
        got |= {"encoded": torch.tensor(count)}
        path = folder / f"{size}-{dist.get_rank()}.safetensors"
        save_file({name: tensor.clone() for name, tensor in got.items()}, path)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tiny_config, tmp_path, processes):
    sizes = (7, 1)  # parts of 4 and 3, and fewer images than processes
    model = make_model("mae", tiny_config)
    model.save_pretrained(tmp_path / "model")
    data = {size: image_dataset(random_images(size), [0, 1, 2, 0, 1, 2, 0][:size]) for size in sizes}
    for size in sizes:
        data[size].save_to_disk(tmp_path / str(size))
    group = processes.launch(2, one_of_two, tmp_path, sizes)
    for size in sizes:
        alone = LabelledImages(data[size], processor())
        features, labels = extract_features(model, alone, batch_size=2, progress=False)
        pixels, _ = raw_pixels(alone, progress=False)
        for rank in (0, 1):
            found = load_file(tmp_path / f"{size}-{rank}.safetensors")
            torch.testing.assert_close(found["features"], features, rtol=0, atol=1e-5)  # other batches round otherwise
            assert torch.equal(found["features"], found["cached"])
            assert torch.equal(found["pixels"], pixels)
            assert torch.equal(found["labels"], labels)
            assert found["encoded"].item() == (1 - rank if size == 1 else 4 - rank)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert sum(one.stderr.count("features: 100%") for one in group) == 2  # one bar each


# -- baselines ------------------------------------------------------------------------------------------------------


def test_raw_pixels_are_the_pixels(images):
    features, labels = raw_pixels(images, batch_size=3, progress=False)
    assert features.shape == (7, 3 * 16 * 16)
    assert torch.equal(features[4], images[4][0].flatten())
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("shape", "reduced"),
    [
        ((3, 224, 224), (32, 32)),
        ((3, 32, 32), (32, 32)),
        ((1, 64, 64), (55, 55)),
        ((3, 64, 256), (16, 64)),
        ((12, 20, 20), (16, 16)),
        ((1, 1, 5000), (1, 3072)),
    ],
)
def test_large_images_are_averaged_down(shape, reduced):
    pixels = torch.randn(shape)
    features, _ = raw_pixels([(pixels, 0)], progress=False)
    assert features.shape[1] == shape[0] * reduced[0] * reduced[1] <= 3072
    assert features.mean().item() == pytest.approx(pixels.mean().item(), abs=0.05)
    if shape[1] % reduced[0] == shape[2] % reduced[1] == 0:
        block = pixels[0, : shape[1] // reduced[0], : shape[2] // reduced[1]]
        assert features[0, 0].item() == pytest.approx(block.mean().item(), abs=1e-5)


@pytest.mark.parametrize("name", ["vit", "vit_mae", "dinov2", "mae", "cl_mae"])
def test_random_encoder(name, tiny_config):
    model = make_model(name, tiny_config)
    state = torch.get_rng_state()
    first, again, other = (random_encoder(model, seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert type(first) is type(model)
    assert first.config is not model.config
    assert not first.training
    weights, trained = first.state_dict(), model.state_dict()
    assert all(torch.equal(weights[key], again.state_dict()[key]) for key in weights)
    matrices = [key for key in weights if key.endswith("weight") and weights[key].ndim >= 2]
    assert len(matrices) >= 10
    for key in matrices:
        assert not torch.equal(weights[key], other.state_dict()[key]), key
        assert not torch.equal(weights[key], trained[key]), key


@pytest.mark.parametrize("name", ["vit_mae", "mae"])
def test_random_encoder_keeps_fixed_positions(name, tiny_config):
    model = (
        make_model(name, tiny_config).bfloat16().requires_grad_(False)
    )  # a frozen model is no model of fixed weights
    fresh = random_encoder(model)
    assert fresh.dtype == torch.bfloat16
    assert torch.equal(fresh.embeddings.position_embeddings, model.embeddings.position_embeddings)
    assert not torch.equal(fresh.layers[0].mlp.fc1.weight, model.layers[0].mlp.fc1.weight)
