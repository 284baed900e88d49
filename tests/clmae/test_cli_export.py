# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae export`: what each format's own library computes from the folder, in a process that has no `clmae` too."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, BitImageProcessor, ViTImageProcessor

import clmae.cli.export
from clmae import FAMILIES, MAEModel
from clmae.cli import main
from clmae.training.data import make_image_processor

from ..processes import script

KINDS = ("encoder", "autoencoder", "mean", "cls")  # "mean" and "cls": classifiers, by their pooling
# Every kind of model that transformers' own classes can hold.
STOCK = [
    ("vit", "encoder"),
    ("vit", "autoencoder"),
    ("vit", "cls"),
    ("vit_mae", "autoencoder"),
    ("beit", "mean"),
    ("dinov2", "encoder"),
    ("dinov2", "cls"),
]

# Loads every export with the Auto class alone: no flag, and `clmae` cannot be imported.
STRANGER = """
import sys
import torch, transformers
inputs, outputs = torch.load("inputs.pt"), {}
for case in sys.argv[1:]:
    target, kind = case.split("-")
    auto = {"mean": "AutoModelForImageClassification", "cls": "AutoModelForImageClassification"}.get(kind, "AutoModel")
    if target == "vit_mae":
        auto = "AutoModelForPreTraining"
    model = getattr(transformers, auto).from_pretrained(case).eval()
    assert type(model).__module__.startswith("transformers.models."), type(model)
    noise = {"noise": inputs["noise"]} if target == "vit_mae" else {}
    with torch.no_grad():
        result = model(inputs["images"], **noise)
    outputs[case] = result["last_hidden_state" if auto == "AutoModel" else "logits"]
    assert type(transformers.AutoImageProcessor.from_pretrained(case)).__name__.startswith("BitImageProcessor")
torch.save(outputs, "outputs.pt")
"""


def export(*argv, code=0):
    assert main(["export", *map(str, argv)]) == code


@pytest.fixture(scope="module")
def sources(tmp_path_factory, make_model):
    """`sources(kind, family)`: a saved model whose every parameter is random, and the model itself."""
    root = tmp_path_factory.mktemp("sources")
    made = {}

    def make(kind, family="cl_mae", **fields):
        key = (kind, family, *fields.items())
        if key not in made:
            folder, model = root / str(len(made)), make_model(family, kind, num_labels=3, **fields)
            model.save_pretrained(folder)
            BitImageProcessor(size={"shortest_edge": 20}, crop_size=sides((16, 16)), resample=3).save_pretrained(folder)
            made[key] = folder, model
        return made[key]

    return make


def sides(size):
    return {"height": size[0], "width": size[1]}


def differences(printed):
    """Name and value of every difference that was printed."""
    return {name: float(value) for name, value in re.findall(r"from the source, (\w+): (\S+)", printed)}


@pytest.fixture(scope="module")
def stock(sources, tmp_path_factory, processes):
    """The folders of all exports to transformers' classes, and what a process without `clmae` computes by them."""
    root = tmp_path_factory.mktemp("stock")
    inputs = {"images": torch.randn(2, 3, 16, 16), "noise": torch.rand(2, 16)}
    torch.save(inputs, root / "inputs.pt")
    for target, kind in STOCK:
        export("--to", target, sources(kind)[0], root / f"{target}-{kind}")
    cases = [f"{target}-{kind}" for target, kind in STOCK]
    processes.run(script, STRANGER, *cases, folder=root, clmae=False)
    return root, inputs, torch.load(root / "outputs.pt")


@pytest.mark.slow
@pytest.mark.parametrize(("target", "kind"), STOCK)
def test_transformers_own_classes_compute_the_same_without_clmae(target, kind, stock, sources):
    root, inputs, outputs = stock
    case, model = f"{target}-{kind}", sources(kind)[1]
    files = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {path.name for path in (root / case).iterdir()} == files
    config = json.loads((root / case / "config.json").read_text())
    assert (config["model_type"], "auto_map" in config) == (target, False)
    if kind in ("mean", "cls"):
        assert {int(i): label for i, label in config["id2label"].items()} == model.config.id2label
    with torch.no_grad():
        if target == "vit_mae":
            expected = model(inputs["images"], noise=inputs["noise"], masking="random").logits
        elif kind in ("mean", "cls"):
            expected = model(inputs["images"]).logits
        else:
            encoder = model.vit if kind == "autoencoder" else model
            expected = encoder(inputs["images"]).last_hidden_state
    torch.testing.assert_close(outputs[case], expected, atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_difference_is_printed_and_how_to_load(family, sources, tmp_path, capsys):
    for target, kind, names in (
        ("vit", "encoder", {"last_hidden_state"}),
        ("vit_mae", "autoencoder", {"logits", "loss"}),
        ("beit", "mean", {"logits"}),
    ):
        export("--to", target, sources(kind, family)[0], tmp_path / target)
        printed = capsys.readouterr().out
        assert set(differences(printed)) == names
        assert max(differences(printed).values()) <= 1e-5
        assert f".from_pretrained({str(tmp_path / target)!r}" in printed


@pytest.mark.slow
@pytest.mark.parametrize("target", ["vit", "vit_mae", "beit", "timm"])
def test_unusual_sizes(target, sources, tmp_path):
    kind = {"beit": "mean", "vit_mae": "autoencoder"}.get(target, "encoder")
    sizes = dict(image_size=(8, 24), patch_size=(4, 2)) if target in ("vit", "timm") else {}
    if target == "timm":
        pytest.importorskip("timm")
    fields = dict(num_channels=2, qkv_bias=False, intermediate_size=44, hidden_size=28, mask_sampler="block", **sizes)
    folder, _ = sources(kind, "mae", **fields)
    export("--to", target, folder, tmp_path / target)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_timm(kind, sources, tmp_path, capsys):
    timm = pytest.importorskip("timm")
    folder, model = sources(kind)
    export("--to", "timm", folder, tmp_path / "timm")
    printed = capsys.readouterr().out
    assert max(differences(printed).values()) <= 1e-5
    call = re.search(r"timm\.create_model\('(.*)', pretrained=True\)", printed)
    theirs = timm.create_model(call[1], pretrained=True).eval()
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        ours = model(images).logits if kind in ("mean", "cls") else getattr(model, "vit", model)(images).pooler_output
        torch.testing.assert_close(theirs(images), ours, atol=2e-5, rtol=1e-5)
    shown = timm.data.resolve_model_data_config(theirs)
    assert (shown["input_size"], shown["crop_pct"], shown["interpolation"]) == ((3, 16, 16), 0.8, "bicubic")
    assert list(shown["mean"]) == list(BitImageProcessor.from_pretrained(tmp_path / "timm").image_mean)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["vit", "timm"])
def test_no_code_of_ours_goes_along_where_one_channel_needs_it(target, tiny_config, tmp_path):
    pytest.importorskip("timm")
    MAEModel(tiny_config(num_channels=1)).save_pretrained(tmp_path / "ours")
    make_image_processor(16, 1, [0.4], [0.3]).save_pretrained(tmp_path / "ours")
    export("--to", target, tmp_path / "ours", tmp_path / "out")
    file = tmp_path / "out" / "preprocessor_config.json"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", file.name}
    shown = AutoImageProcessor.from_pretrained(file)
    assert type(shown) is BitImageProcessor
    assert "auto_map" not in json.loads(file.read_text())
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    ours = AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert torch.equal(*(each(grey, return_tensors="pt").pixel_values for each in (shown, ours)))


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [(16, 16), (8, 24), (42, 42), (224, 224)])
@pytest.mark.parametrize(
    "make",
    [
        lambda size: make_image_processor(size, 3, [0.4] * 3, [0.3] * 3),
        lambda size: make_image_processor(size, 3, [0.4] * 3, [0.3] * 3, 0.875),
        lambda size: ViTImageProcessor(size=sides(size), resample=2),
        lambda size: ViTImageProcessor(size=sides(size), do_normalize=False),
        lambda size: BitImageProcessor(size={"height": 50, "width": 50}, crop_size=sides(size), resample=0),
    ],
)
def test_timm_shows_images_as_the_processor_does(make, image_size, make_model, tmp_path):
    timm = pytest.importorskip("timm")
    halves = tuple(side // 2 for side in image_size)
    make_model("mae", "encoder", image_size=image_size, patch_size=halves).save_pretrained(tmp_path / "ours")
    processor = make(image_size)
    processor.save_pretrained(tmp_path / "ours")
    export("--to", "timm", tmp_path / "ours", tmp_path / "timm")
    details = json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]
    square = image_size[0] == image_size[1]
    assert details["crop_mode"] == ("center" if "shortest_edge" in processor.size else "squash")
    resized = [math.floor(side / details["crop_pct"]) for side in image_size]
    wanted = dict(processor.size)
    expected = [wanted["shortest_edge"]] * 2 if "shortest_edge" in wanted else [wanted["height"], wanted["width"]]
    if not square and resized != expected:  # one share of both sides does not give what was rounded for each
        assert max(abs(a - b) for a, b in zip(resized, expected, strict=True)) <= 2 or 50 in wanted.values()
        return
    assert resized == expected
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    view = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8))  # no half pixels
    exact = AutoImageProcessor.from_pretrained(tmp_path / "ours", backend="pil")
    torch.testing.assert_close(view(image), exact(image, return_tensors="pt").pixel_values[0], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["autoencoder", "mean"])
def test_onnx_takes_any_batch_size(kind, sources, tmp_path, capsys):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, model = sources(kind, num_hidden_layers=1)
    export("--to", "onnx", folder, tmp_path / "onnx")
    printed = capsys.readouterr().out
    names = ["logits"] if kind == "mean" else ["last_hidden_state", "pooler_output"]
    assert list(differences(printed)) == names
    assert (tmp_path / "onnx" / "preprocessor_config.json").is_file()
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    for batch_size in (1, 5):
        images = torch.randn(batch_size, 3, 16, 16)
        with torch.no_grad():
            expected = getattr(model, "vit", model)(images) if kind == "autoencoder" else model(images)
        for name, output in zip(names, session.run(names, {"pixel_values": images.numpy()}), strict=True):
            torch.testing.assert_close(torch.from_numpy(output), expected[name], atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_mae_comes_back_exactly(kind, family, sources, tmp_path, capsys):
    folder, model = sources(kind, family, qkv_bias=kind in ("autoencoder", "cls"))
    export("--to", "mae", folder, tmp_path / "mae")
    assert set(differences(capsys.readouterr().out).values()) == {0.0}
    assert set(torch.load(tmp_path / "mae" / "mae.pth")) == {"model", "config"}  # which are data alone
    assert main(["convert", str(tmp_path / "mae" / "mae.pth"), str(tmp_path / "back")]) == 0
    back_family = "cl_mae" if family == "cl_mae" and kind == "autoencoder" else "mae"
    back_class = FAMILIES[back_family][FAMILIES[family].index(type(model))]
    loaded = back_class.from_pretrained(tmp_path / "back")
    names = ["num_attention_heads", "image_size", "mask_ratio", "norm_pix_loss", "hidden_act", "layer_norm_eps"]
    if back_family == "cl_mae":
        names += ["soft_masking", "gauss_loss_weight", "masker_num_attention_heads"]
    assert [getattr(loaded.config, name) for name in names] == [getattr(model.config, name) for name in names]
    back = loaded.state_dict()
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith(("projector.", "position_head."))}
    assert set(back) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in back.items())


# -- what goes wrong ----------------------------------------------------------------------------------------------


def test_too_large_a_difference_leaves_nothing(sources, tmp_path, monkeypatch, capsys):
    convert = clmae.cli.export.to_vit

    def spoilt(model):
        exported = convert(model)
        exported.weights["layernorm.bias"] = exported.weights["layernorm.bias"] + 2e-4
        return exported

    monkeypatch.setitem(clmae.cli.export.EXPORTERS, "vit", clmae.cli.export.transformers_exporter(spoilt))
    export("--to", "vit", sources("encoder")[0], tmp_path / "some" / "where", code=2)
    assert "`last_hidden_state` differs from the source's by 2.0e-04, more than 0.0001" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_taken_and_a_full_one_refused(sources, tmp_path, capsys):
    (tmp_path / "vit").mkdir()
    export("--to", "vit", sources("encoder")[0], tmp_path / "vit")
    before = {path: path.read_bytes() for path in (tmp_path / "vit").iterdir()}
    export("--to", "vit", sources("encoder")[0], tmp_path / "vit", code=2)
    assert "exists and is not empty; name a new folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "vit").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["vit"]


def test_a_missing_package_is_named(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(clmae.cli.export.NEEDED, "timm", ("no_such_package",))
    export("--to", "timm", sources("encoder")[0], tmp_path / "timm", code=2)
    assert "needs the package no_such_package: pip install 'clmae[export]'" in capsys.readouterr().err


def test_wrong_use_is_explained(sources, tmp_path, error):
    encoder, mean = sources("encoder")[0], sources("mean")[0]
    (tmp_path / "empty").mkdir()
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text('{"model_type": "vit"}')
    for argv, message in (
        (["--to", "vit", mean, "out"], "`--to vit` has no classifier with `pooling` 'mean'; take `--to beit`"),
        (["--to", "vit_mae", encoder, "out"], "needs an autoencoder"),
        (["--to", "beit", encoder, "out"], "is for classifiers"),
        (["--to", "vit", "./empty", "out"], "cannot be loaded: there is no config.json in this folder"),
        (["--to", "vit", "./vit", "out"], "it is a 'vit', and no model of ours"),
        (["--to", "tensorflow", encoder, "out"], "invalid choice: 'tensorflow'"),
        ([encoder, "out"], "missing: --to"),
        (["--to", "vit", encoder], "missing: DST"),
        (["--too", "vit", encoder, "out"], "unknown option '--too'; did you mean '--to'?"),
    ):
        assert message in error("export", *argv), argv
        assert {path.name for path in tmp_path.iterdir()} == {"empty", "vit"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_source_that_lacks_weights_is_refused(family, sources, tmp_path, error):
    sources("autoencoder", family)[1].save_pretrained(tmp_path / "ours")
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    del weights["vit.layers.1.mlp.fc2.weight"]
    save_file(weights, tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    for target in ("vit", "mae"):
        message = error("export", "--to", target, tmp_path / "ours", tmp_path / "exported")
        assert "its weights lack vit.layers.1.mlp.fc2.weight" in message
    assert not (tmp_path / "exported").exists()


def test_a_source_without_an_image_processor(sources, tmp_path, capsys):
    sources("encoder")[1].save_pretrained(tmp_path / "ours")
    export("--to", "vit", tmp_path / "ours", tmp_path / "vit")
    assert "has no image processor" in capsys.readouterr().out
