# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae convert`: what files it reads, what it says, what it refuses; the tables are tested with `modeling`."""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import os
import pathlib
import pickle
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from clmae import FAMILIES, MAEConfig
from clmae.cli import main
from clmae.modeling.conversion import to_mae, to_vit_mae
from clmae.training.data import make_image_processor

RECIPES = Path(__file__).parents[2] / "recipes"
HEADS = ["--num_attention_heads", "4", "--decoder_num_attention_heads", "2"]


@pytest.fixture
def model(make_model):
    """An autoencoder whose weights the tests write in other layouts."""
    return make_model()


def convert(*argv, code=0):
    assert main(["convert", *argv]) == code


def assert_same(folder, model):
    state = AutoModelForPreTraining.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert list(state) == list(model.state_dict())


# -- what is read -------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_facebookresearch(model, capsys):
    run = argparse.Namespace(model="mae_vit_tiny", norm_pix_loss=False, mask_ratio=0.5, lr=1e-3, output_dir="out")
    torch.save({"model": to_mae(model), "optimizer": {"state": {}}, "epoch": 3, "args": run}, "checkpoint-3.pth")
    convert("checkpoint-3.pth", "ours", *HEADS)
    assert_same("ours", model)
    config = AutoConfig.from_pretrained("ours")
    assert (config.norm_pix_loss, config.mask_ratio, config.num_attention_heads) == (False, 0.5, 4)
    printed = capsys.readouterr().out
    weights = len(model.state_dict())
    assert "layout: facebookresearch/mae, CL-MAE's authors or timm; read as a MAEForPreTraining" in printed
    assert f"loaded: {weights} weights\nmissing: 0\nunexpected: 0\n" in printed
    assert "assumed: layer_norm_eps = 1e-06 (an option" in printed
    processor = AutoImageProcessor.from_pretrained("ours")
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    assert (processor.crop_size["height"], processor.size["shortest_edge"]) == (16, 18)


def test_options_go_before_what_is_assumed_or_read(model):
    torch.save({"model": to_mae(model), "args": argparse.Namespace(norm_pix_loss=False)}, "mae.pth")
    options = ["--norm_pix_loss", "true", "--mask_ratio=0.5", "--image_size", "16", "--layer_norm_eps", "1e-5"]
    convert("mae.pth", "ours", *HEADS, *options)
    config = AutoConfig.from_pretrained("ours")
    assert (config.norm_pix_loss, config.mask_ratio, config.image_size, config.layer_norm_eps) == (True, 0.5, 16, 1e-5)


@pytest.mark.parametrize("form", ["bare", "old format", "state_dict", "safetensors"])
def test_files_of_other_kinds(model, form):
    weights = to_mae(model)
    if form == "safetensors":
        save_file(weights, "mae.safetensors")
    else:
        payload = {"state_dict": weights} if form == "state_dict" else weights
        torch.save(payload, "mae.pth", _use_new_zipfile_serialization=form != "old format")
    convert("mae.safetensors" if form == "safetensors" else "mae.pth", "ours", *HEADS)
    assert_same("ours", model)


@pytest.mark.parametrize("kind", ["4, pickled", "5", "sharded"])
def test_a_folder_of_transformers_vit_mae(model, kind, capsys):
    config, weights = to_vit_mae(model)
    config.mask_ratio = 0.5
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained("theirs")
    if kind == "5":
        stock = ViTMAEForPreTraining(config)
        stock.load_state_dict(model.state_dict())
        stock.save_pretrained("theirs")
    elif kind == "sharded":
        config.save_pretrained("theirs")
        names = sorted(weights)
        shards = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
        for file, part in shards.items():
            save_file({name: weights[name] for name in part}, f"theirs/{file}")
        index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
        Path("theirs/model.safetensors.index.json").write_text(json.dumps(index))
    else:
        config.save_pretrained("theirs")
        torch.save(weights, "theirs/pytorch_model.bin")
    convert("theirs", "ours")  # the heads stand in config.json
    assert_same("ours", model)
    assert "assumed" not in capsys.readouterr().out
    assert AutoConfig.from_pretrained("ours").mask_ratio == 0.5
    assert type(AutoImageProcessor.from_pretrained("ours")).__name__.startswith("ViTImageProcessor")


def test_what_config_json_leaves_out_is_vit_maes_default(model):
    config, weights = to_vit_mae(model)
    config.save_pretrained("theirs")
    save_file(weights, "theirs/model.safetensors")
    written = json.loads(Path("theirs/config.json").read_text())
    for name in ("layer_norm_eps", "norm_pix_loss"):
        written.pop(name, None)
    Path("theirs/config.json").write_text(json.dumps(written))
    convert("theirs", "ours")
    read = AutoConfig.from_pretrained("ours")
    assert (read.layer_norm_eps, read.norm_pix_loss) == (ViTMAEConfig().layer_norm_eps, ViTMAEConfig().norm_pix_loss)


def test_an_encoder_loads_with_automodel(make_model):
    encoder = make_model("cl_mae", "encoder")
    torch.save({"model": to_mae(encoder)}, "mae.pth")
    convert("mae.pth", "ours", "--num_attention_heads", "4")
    state = AutoModel.from_pretrained("ours").state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())


class WindowsPath(PureWindowsPath):
    """What a path in a file from Windows is called, whatever this machine is."""

    __module__, __qualname__ = "pathlib", "WindowsPath"


def with_other_names(path):
    """The file as numpy 1 and Python 3.13 write it."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for name, there, others in (
        ("scalar", (b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"), b"cnumpy._core"),
        ("PosixPath", (b"cpathlib\nPosixPath", b"cpathlib._local\nPosixPath"), b"cpathlib\nPosixPath"),
    ):
        key = next(key for key in parts if key.endswith("data.pkl"))
        assert name.encode() in parts[key]
        parts[key] = parts[key].replace(*there)
        assert others not in parts[key]
    with zipfile.ZipFile(path, "w") as archive:
        for part in parts.items():
            archive.writestr(*part)


@pytest.mark.parametrize("form", ["zip", "old", "numpy 1, Python 3.13"])
def test_arguments_that_hold_paths_and_numpy_scalars(model, form, monkeypatch):
    monkeypatch.setattr(pathlib, "WindowsPath", WindowsPath)
    run = argparse.Namespace(
        **dict(output_dir=Path("out/mae"), data=PurePosixPath("/data"), log_dir=WindowsPath("C:/logs")),
        **dict(lr=np.float64(1e-3), epochs=np.int64(800), seed=np.uint8(0), eps=np.float32(1e-6), name=np.str_("run")),
        **dict(norm_pix_loss=np.bool_(False), mask_ratio=np.float64(0.5)),
    )
    torch.save({"model": to_mae(model), "args": run}, "mae.pth", _use_new_zipfile_serialization=form != "old")
    if form == "numpy 1, Python 3.13":
        with_other_names("mae.pth")
    convert("mae.pth", "ours", *HEADS)
    config = AutoConfig.from_pretrained("ours")
    assert (config.norm_pix_loss, config.mask_ratio) == (False, 0.5)


def test_a_checkpoint_of_cl_maes_authors_has_their_form(make_model, capsys):
    torch.save({"model": to_mae(make_model("cl_mae"))}, "cl_mae.pth")
    heads = [*HEADS, "--masker_num_attention_heads", "2"]
    convert("cl_mae.pth", "ours", *heads)
    config = AutoConfig.from_pretrained("ours")
    recipe = yaml.safe_load((RECIPES / "cl_mae_authors.yaml").read_text())
    others = ("image_size", "patch_size", "norm_pix_loss", "mask_ratio")
    theirs = {name: value for name, value in recipe.items() if hasattr(config, name) and "_num_" not in name}
    theirs = {name: value for name, value in theirs.items() if name not in others}
    assert {"soft_masking", "gauss_loss_weight", "diversity_loss_weight", "kl_loss_weight"} <= theirs.keys()
    assert {name: getattr(config, name) for name in theirs} == theirs
    printed = capsys.readouterr().out
    assert "soft_masking = tokens, gauss_loss_weight = 1.0, diversity_loss_weight = 2.0" in printed
    convert("cl_mae.pth", "other", *heads, "--soft_masking", "attention", "--gauss_loss_weight", "0.1")
    config = AutoConfig.from_pretrained("other")
    assert (config.soft_masking, config.gauss_loss_weight, config.diversity_loss_weight) == ("attention", 0.1, 2.0)


# -- timm ---------------------------------------------------------------------------------------------------------


VIT = dict(img_size=16, patch_size=4, embed_dim=192, depth=2, num_heads=4, mlp_ratio=1.5)


def save_timm(folder, architecture="vit_base_patch16_224", pretrained_cfg=None, **args):
    """What timm itself writes for a model with random weights; the model."""
    timm = pytest.importorskip("timm")
    model = timm.create_model(architecture, pretrained=False, **args)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.pretrained_cfg.update(pretrained_cfg or {})
    timm.models.save_for_hf(model.eval(), folder, model_args=args, safe_serialization=True)
    return model


def assert_shown_as_by_timm(num_channels):
    timm = pytest.importorskip("timm")
    read = timm.create_model("local-dir:theirs", pretrained=False)
    view = timm.data.create_transform(**timm.data.resolve_model_data_config(read))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((40, 30))
    shown = AutoImageProcessor.from_pretrained("ours", backend="pil")(image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(shown, view(image.convert("L") if num_channels == 1 else image), atol=2e-2, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        dict(num_classes=0),
        dict(num_classes=0, global_pool="avg", fc_norm=False),
        dict(num_classes=5),
        dict(num_classes=5, global_pool="avg"),
        dict(num_classes=0, act_layer="quick_gelu", drop_path_rate=0.2, qkv_bias=False),
        dict(num_classes=0, act_layer="gelu_tanh", img_size=(8, 24), patch_size=(4, 2)),
        dict(num_classes=0, in_chans=1),
        dict(num_classes=0, architecture="vit_base_patch16_clip_224", pre_norm=False),  # its epsilon is another
    ],
)
@pytest.mark.parametrize(
    "shown", [dict(crop_pct=0.8), dict(crop_pct=1.0, crop_mode="squash", interpolation="bilinear")]
)
def test_a_folder_of_timm_is_read_by_its_config(args, shown, capsys):
    args = {**VIT, **args}
    channels = args.get("in_chans", 3)
    shown = {**shown, "mean": (0.4,) * channels, "std": (0.3,) * channels}
    theirs = save_timm("theirs", pretrained_cfg=shown, **args)
    convert("theirs", "ours")
    assert "assumed" not in capsys.readouterr().out
    config = AutoConfig.from_pretrained("ours")
    assert config.drop_path_rate == args.get("drop_path_rate", 0)
    classifier = args["num_classes"] > 0
    ours = (AutoModelForImageClassification if classifier else AutoModel).from_pretrained("ours").eval()
    images = torch.randn(2, channels, *theirs.patch_embed.img_size)
    with torch.no_grad():
        outputs = ours(images).logits if classifier else ours(images).pooler_output
        torch.testing.assert_close(outputs, theirs(images), atol=1e-5, rtol=1e-5)
    if theirs.patch_embed.img_size[0] == theirs.patch_embed.img_size[1] or "crop_mode" in shown:
        assert_shown_as_by_timm(channels)


@pytest.mark.slow
def test_a_folder_of_timm_by_an_architectures_name_alone():
    theirs = save_timm("theirs", "test_vit", num_classes=0)
    config = json.loads(Path("theirs/config.json").read_text())
    assert "num_heads" not in config["model_args"]
    convert("theirs", "ours")
    assert AutoConfig.from_pretrained("ours").num_attention_heads == theirs.blocks[0].attn.num_heads == 2
    images = torch.randn(1, 3, *theirs.patch_embed.img_size)
    with torch.no_grad():
        features = AutoModel.from_pretrained("ours").eval()(images).pooler_output
        torch.testing.assert_close(features, theirs(images), atol=1e-4, rtol=1e-4)


def test_timms_mean_after_its_layernorm_is_no_classifier_here_but_a_feature(capsys):
    theirs = save_timm("theirs", **VIT, num_classes=5, global_pool="avg", fc_norm=False)
    convert("theirs", "ours", code=2)
    captured = capsys.readouterr()
    assert "unexpected: 2: head.bias, head.weight" in captured.out
    assert "--ignore_unexpected" in captured.err
    convert("theirs", "ours", "--ignore_unexpected")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        features = AutoModel.from_pretrained("ours").eval()(images).pooler_output
        expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "args", "message"),
    [
        ("vit_base_patch16_224", {**VIT, "global_pool": "max"}, "global_pool 'max' has no counterpart here"),
        ("vit_base_patch16_224", {**VIT, "act_layer": "mish"}, "activation 'Mish' has no counterpart here"),
        ("resnet10t", {}, "is a ResNet of timm, and no VisionTransformer"),
    ],
)
def test_models_of_timm_that_are_none_of_ours(architecture, args, message, capsys):
    save_timm("theirs", architecture, **args)
    convert("theirs", "ours", code=2)
    assert message in capsys.readouterr().err
    config = json.loads(Path("theirs/config.json").read_text())
    Path("theirs/config.json").write_text(json.dumps({**config, "architecture": "no_such_model"}))
    convert("theirs", "ours", code=2)
    assert "timm cannot make a model of it" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("kind", ["encoder, mean", "encoder, cls", "mean, mean", "cls, cls"])
def test_export_to_timm_and_back_is_the_identity(kind, num_channels, family, make_model):
    pytest.importorskip("timm")
    kind, pooling = kind.split(", ")
    fields = dict(num_channels=num_channels, drop_path_rate=0.1, hidden_size=36, intermediate_size=44, pooling=pooling)
    fields |= dict(image_size=(8, 24), patch_size=(4, 2)) if pooling == "cls" else {}
    labels = dict(id2label={0: "cat", 1: "dog", 2: "owl"}, label2id={"cat": 0, "dog": 1, "owl": 2})
    model = make_model(family, kind, **fields, **labels)
    model.save_pretrained("source")
    processor = make_image_processor(
        model.config.image_size, num_channels, [0.4] * num_channels, [0.3] * num_channels, 0.875
    )
    processor.save_pretrained("source")
    assert main(["export", "--to", "timm", "source", "theirs"]) == 0
    convert("theirs", "ours")
    back = (AutoModel if kind == "encoder" else AutoModelForImageClassification).from_pretrained("ours")
    assert list(back.state_dict()) == list(model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in back.state_dict().items())
    others = ("_", "decoder_", "masker_", "mask_ratio", "initializer_range")  # of pretraining
    for name in (name for name in inspect.get_annotations(MAEConfig) if not name.startswith(others)):
        values = (getattr(config, name) for config in (back.config, model.config))
        assert len({tuple(value) if isinstance(value, list) else value for value in values}) == 1, name
    assert kind == "encoder" or back.config.id2label == labels["id2label"]
    assert AutoImageProcessor.from_pretrained("ours").to_dict() == processor.to_dict()
    if pooling == "mean":  # timm's own file says it all, too
        Path("theirs/preprocessor_config.json").unlink()
        convert("theirs", "again")
        assert AutoImageProcessor.from_pretrained("again").to_dict() == processor.to_dict()


# -- what is refused ----------------------------------------------------------------------------------------------


class Malicious:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("form", ["torch", "old torch", "pickle", "among weights", "among arguments"])
def test_a_file_that_would_run_code_is_refused_and_nothing_runs(model, form, capsys):
    run = argparse.Namespace(output_dir=Path("out"), lr=np.float64(1), hook=Malicious())
    among = {"among weights": Malicious(), "among arguments": run}
    payload = {"model": to_mae(model), "args": among[form]} if form in among else Malicious()
    if form == "pickle":
        with open("mae.pth", "wb") as file:
            pickle.dump(payload, file, protocol=2)
    else:
        torch.save(payload, "mae.pth", _use_new_zipfile_serialization=form != "old torch")
    convert("mae.pth", "ours", *HEADS, code=2)
    assert sorted(os.listdir()) == ["mae.pth"]
    error = capsys.readouterr().err
    assert "is refused, and nothing in it was run" in error
    assert "safetensors.torch.save_file" in error
    assert form == "pickle" or "mkdir`" in error
    with open("mae.pth", "rb") as file:  # the file would do it, if it were loaded without care
        torch.load(file, weights_only=False) if form != "pickle" else pickle.load(file)
    assert os.path.isdir("ran")


@pytest.mark.parametrize(
    ("held", "name"),
    [
        (argparse.ArgumentParser, "argparse.ArgumentParser"),
        (np.load, "numpy.load"),
        (functools.partial(print), "functools.partial"),
        (os.path.join, "posixpath.join"),
        (np.dtype(object), "something else than tensors"),
        (np.dtype([("a", "O")]), "something else than tensors"),
    ],
)
def test_only_what_arguments_are_made_of_is_let_through(model, held, name, capsys):
    torch.save({"model": to_mae(model), "args": held}, "mae.pth")
    convert("mae.pth", "ours", *HEADS, code=2)
    message = capsys.readouterr().err
    assert "is refused, and nothing in it was run" in message
    assert name in message
    torch.save(argparse.Namespace(), "namespace.pth")
    with pytest.raises(pickle.UnpicklingError):  # and not beyond this command
        torch.load("namespace.pth", weights_only=True)


def test_unexpected_weights_are_refused_unless_dropped(model, capsys):
    torch.save({**to_mae(model), "blocks.0.ls1.gamma": torch.ones(32)}, "mae.pth")
    convert("mae.pth", "ours", *HEADS, code=2)
    captured = capsys.readouterr()
    assert "unexpected: 1: blocks.0.ls1.gamma" in captured.out
    assert "--ignore_unexpected" in captured.err
    assert not os.path.exists("ours")
    convert("mae.pth", "ours", *HEADS, "--ignore_unexpected")
    assert_same("ours", model)


def test_missing_weights_are_refused_and_nothing_is_left(model, capsys):
    torch.save({name: value for name, value in to_mae(model).items() if name != "mask_token"}, "mae.pth")
    convert("mae.pth", "some/where/ours", *HEADS, code=2)
    captured = capsys.readouterr()
    assert "missing: 1: decoder.mask_token" in captured.out
    assert "complete checkpoint" in captured.err
    assert os.listdir() == ["mae.pth"]


def test_wrong_use_is_explained(model, error):
    torch.save(to_mae(model), "mae.pth")
    torch.save([1, 2], "list.pth")
    torch.save({"model": {"epoch": 1}}, "empty.pth")
    os.mkdir("bare")
    model.save_pretrained("full/model")
    Path("broken.pth").write_bytes(b"PK\x03\x04 and then nothing")
    for argv, message in (
        (["mae.pth", "ours"], "give it (--num_attention_heads)"),
        (["mae.pth", "ours", *HEADS[:2]], "give it (--decoder_num_attention_heads)"),
        (["mae.pth", "ours", "--num_attention_heads", "5", *HEADS[2:]], "`num_attention_heads` = 5 does not divide"),
        (["mae.pth", "full", *HEADS], "DST 'full' exists and is not empty"),
        (["mae.pth", "mae.pth", *HEADS], "DST 'mae.pth' exists"),
        (["nowhere.pth", "ours"], "SRC 'nowhere.pth' does not exist"),
        (["bare", "ours"], "SRC 'bare' holds none of model.safetensors, pytorch_model.bin"),
        (["full/model", "ours"], "is a model of this package already"),
        (["list.pth", "ours"], "holds no weights by name"),
        (["empty.pth", "ours"], "holds no weights by name"),
        (["broken.pth", "ours"], "SRC 'broken.pth'"),
        (["mae.pth"], "missing: DST"),
        (["mae.pth", "ours", "--num_heads", "4"], "unknown option '--num_heads'; did you mean"),
    ):
        assert message in error("convert", *argv), argv
        assert not os.path.exists("ours")
