# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Foreign layouts, written out by hand here, against the stock models whose weights they hold; and round trips."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from clmae import FAMILIES, CLMAEForPreTraining, MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEModel
from clmae.modeling.conversion import (
    STANDARD_HEADS,
    TIMM,
    TRANSFORMERS_4,
    TRANSFORMERS_5,
    export_weights,
    read_weights,
    to_beit,
    to_dinov2,
    to_mae,
    to_timm,
    to_vit_mae,
)

SIZES = dict(
    **dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16),
    **dict(decoder_hidden_size=16, decoder_num_hidden_layers=3, decoder_num_attention_heads=2, patch_size=4),
    decoder_intermediate_size=24,
)
HEADS = dict(num_attention_heads=4, decoder_num_attention_heads=2)


def randomize(model):
    """No parameter is left where two could be mixed up unseen: biases 0, norms 1, positions 0."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model.eval()


@pytest.fixture
def vit_mae():
    return randomize(ViTMAEForPreTraining(ViTMAEConfig(**SIZES, layer_norm_eps=1e-6, norm_pix_loss=True)))


def as_transformers_4(weights):
    """The names that transformers 4's ViTMAE gave its parameters."""
    keys = {"q": "query", "k": "key", "v": "value"}
    named = {}
    for name, tensor in weights.items():
        name = name.replace("vit.layers.", "vit.encoder.layer.")
        name = re.sub(r"attention\.(q|k|v)_proj", lambda m: f"attention.attention.{keys[m[1]]}", name)
        name = name.replace("attention.o_proj", "attention.output.dense")
        named[name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")] = tensor
    return named


def as_transformers_5_saves(weights):
    """What is in the files that transformers 5 writes: version 4's names, but other ones for the decoder's blocks."""
    return {
        name.replace("decoder_layers.", "decoder_encoder.layer."): tensor
        for name, tensor in as_transformers_4(weights).items()
    }


def as_facebookresearch(weights):
    """The names of facebookresearch/mae's pretraining checkpoints, "visualize" ones among them."""
    patches = "vit.embeddings.patch_embeddings.projection"
    top = {"cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings"}
    top |= {name: f"decoder.{name}" for name in ("mask_token", "decoder_pos_embed")}
    layers = {"patch_embed.proj": patches, "norm": "vit.layernorm"}
    layers |= {name: f"decoder.{name}" for name in ("decoder_embed", "decoder_norm", "decoder_pred")}
    block = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
    block |= {name: name for name in ("mlp.fc1", "mlp.fc2")}
    stacks = [(f"blocks.{i}", f"vit.layers.{i}") for i in range(2)]
    stacks += [(f"decoder_blocks.{i}", f"decoder.decoder_layers.{i}") for i in range(3)]
    layers |= {f"{a}.{name}": f"{b}.{ours}" for a, b in stacks for name, ours in block.items()}
    named = {theirs: weights[ours] for theirs, ours in top.items()}
    for kind in ("weight", "bias"):
        named |= {f"{theirs}.{kind}": weights[f"{ours}.{kind}"] for theirs, ours in layers.items()}
        for theirs, ours in stacks:
            parts = [weights[f"{ours}.attention.{part}_proj.{kind}"] for part in "qkv"]
            named[f"{theirs}.attn.qkv.{kind}"] = torch.cat(parts)
    return named


def masking_net(num_patches=16, width=32, depth=2):
    """What CL-MAE's authors have beyond MAE: a module of their own, with a constant added to its class token."""
    layers = {"mlp_head.0": (width,), "mlp_head.1": (num_patches, width)}
    for i in range(depth):
        layers |= {f"blocks.{i}.attn.qkv": (3 * width, width), f"blocks.{i}.attn.proj": (width, width)}
        layers |= {f"blocks.{i}.mlp.fc1": (80, width), f"blocks.{i}.mlp.fc2": (width, 80)}
        layers |= {f"blocks.{i}.{norm}": (width,) for norm in ("norm1", "norm2")}
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1, width)}
    shapes |= {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    return {f"masking_net.{name}": torch.randn(shape) for name, shape in shapes.items()}


LAYOUTS = {
    "facebookresearch": (as_facebookresearch, TIMM),
    "transformers 4": (as_transformers_4, TRANSFORMERS_4),
    "transformers 5": (dict, TRANSFORMERS_5),
}


def assert_same_weights(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


# -- import -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "layout"), [*LAYOUTS.values(), (as_transformers_5_saves, TRANSFORMERS_4)], ids=[*LAYOUTS, "5, saved"]
)
def test_an_autoencoder_of_each_layout_computes_what_the_stock_model_does(write, layout, vit_mae):
    read = read_weights(write(vit_mae.state_dict()), **HEADS)
    assert (read.layout, read.model_class, read.missing, read.unexpected) == (layout, MAEForPreTraining, [], [])
    assert {field: getattr(read.config, field) for field in SIZES} == SIZES
    assert read.assumed == {"norm_pix_loss": True, "layer_norm_eps": 1e-6}
    model = read.load()
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    with torch.no_grad():
        ours, stock = model(images, noise=noise), vit_mae(images, noise=noise)
    torch.testing.assert_close(ours.logits, stock.logits)
    torch.testing.assert_close(ours.loss, stock.loss)
    assert torch.equal(ours.mask, stock.mask)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_encoder_alone(name, vit_mae):
    whole = LAYOUTS[name][0](vit_mae.state_dict())
    encoder = {key: value for key, value in whole.items() if "decoder" not in key and "mask_token" not in key}
    read = read_weights(encoder, num_attention_heads=4)
    assert (read.model_class, read.missing, read.unexpected) == (MAEModel, [], [])
    bare = {key.removeprefix("vit."): value for key, value in encoder.items()}  # as ViTMAEModel saves itself
    expected = read_weights(whole, **HEADS).load().vit
    assert_same_weights(read.load(), expected)
    assert_same_weights(read_weights(bare, num_attention_heads=4).load(), expected)


def test_cl_mae_of_the_authors(vit_mae):
    masker = masking_net()
    read = read_weights(as_facebookresearch(vit_mae.state_dict()) | masker, **HEADS)
    assert (read.model_class, read.missing, read.unexpected) == (CLMAEForPreTraining, [], [])
    config = read.config
    assert (config.masker_num_hidden_layers, config.masker_intermediate_size) == (2, 80)
    assert (read.assumed["masker_num_attention_heads"], config.masker_layer_norm_eps) == (4, 1e-5)
    module = read.load().masking_module
    position = masker["masking_net.pos_embed"]
    assert torch.equal(module.cls_token, masker["masking_net.cls_token"] + position)
    for name, tensor in (
        ("layernorm.weight", masker["masking_net.mlp_head.0.weight"]),
        ("head.bias", masker["masking_net.mlp_head.1.bias"]),
        ("layers.1.attention.k_proj.weight", masker["masking_net.blocks.1.attn.qkv.weight"][32:64]),
        ("layers.0.layernorm_after.bias", masker["masking_net.blocks.0.norm2.bias"]),
    ):
        assert torch.equal(module.state_dict()[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "cls", "none"])
def test_timms_vision_transformer(pooling):
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, mlp_ratio=1.5)
    pool = "avg" if pooling == "mean" else "token"
    classes = 0 if pooling == "none" else 5
    theirs = randomize(timm.models.VisionTransformer(**sizes, num_classes=classes, global_pool=pool))
    read = read_weights(theirs.state_dict(), num_attention_heads=4)
    assert (read.missing, read.unexpected) == ([], [])
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        if pooling == "none":
            assert read.model_class is MAEModel
            torch.testing.assert_close(read.load()(images).last_hidden_state, theirs.forward_features(images))
        else:
            assert (read.model_class, read.config.pooling) == (MAEForImageClassification, pooling)
            torch.testing.assert_close(read.load()(images).logits, theirs(images))


def test_half_precision_and_what_is_frozen_stay(vit_mae):
    weights = as_facebookresearch(vit_mae.half().state_dict())
    weights = {f"module.{name}": tensor for name, tensor in weights.items()}  # as DistributedDataParallel names them
    model = read_weights(weights, **HEADS).load()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert {name for name, _ in model.named_buffers()} == {
        "vit.embeddings.position_embeddings",
        "decoder.decoder_pos_embed",
    }


def test_sizes_of_another_shape():
    config = MAEConfig(**{**SIZES, "image_size": (8, 24), "patch_size": (4, 2), "num_channels": 2, "qkv_bias": False})
    model = randomize(MAEForPreTraining(config))
    weights = to_mae(model)
    with pytest.raises(
        ValueError, match=r"`image_size` cannot be inferred from 25 positions, .* no square .*--image_size"
    ):
        read_weights(weights, **HEADS)
    read = read_weights(weights, **HEADS, image_size=[8, 24])
    assert (read.config.patch_size, read.config.num_channels, read.config.qkv_bias) == ([4, 2], 2, False)
    assert read.config.grid_size == (2, 12)
    assert_same_weights(read.load(), model)


def test_heads_are_standard_or_asked_for(vit_mae):
    weights = as_facebookresearch(vit_mae.state_dict())
    with pytest.raises(ValueError, match=r"`num_attention_heads` cannot be inferred .* 32 .*--num_attention_heads"):
        read_weights(weights)
    with pytest.raises(ValueError, match=r"`decoder_num_attention_heads` cannot be inferred .* 16 "):
        read_weights(weights, num_attention_heads=4)
    assert STANDARD_HEADS == {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
    wide = {**SIZES, "hidden_size": 192, "num_attention_heads": 3, "decoder_hidden_size": 512}
    weights = to_mae(MAEForPreTraining(MAEConfig(**{**wide, "decoder_num_attention_heads": 16})))
    read = read_weights(weights)
    assert read.assumed["num_attention_heads"] == read.config.num_attention_heads == 3
    assert read.assumed["decoder_num_attention_heads"] == read.config.decoder_num_attention_heads == 16
    assert "num_attention_heads" not in read_weights(weights, num_attention_heads=6).assumed


def test_what_is_missing_or_unexpected_is_named(vit_mae):
    weights = as_facebookresearch(vit_mae.state_dict())
    weights["blocks.0.ls1.gamma"] = weights.pop("decoder_norm.bias")
    read = read_weights(weights, **HEADS)
    assert (read.missing, read.unexpected) == (["decoder.decoder_norm.bias"], ["blocks.0.ls1.gamma"])
    with pytest.raises(ValueError, match=r"no whole MAEForPreTraining: decoder\.decoder_norm\.bias are missing"):
        read.load()


def test_weights_that_are_no_mae(vit_mae):
    with pytest.raises(ValueError, match=r"no known layout: they are named layer1\.weight"):
        read_weights({"layer1.weight": torch.zeros(3)})
    weights = as_facebookresearch(vit_mae.state_dict())
    with pytest.raises(ValueError, match=r"lack `patch_embed\.proj\.weight`"):
        read_weights({name: value for name, value in weights.items() if "patch" not in name}, **HEADS)
    weights["blocks.1.attn.qkv.weight"] = torch.zeros(90, 32)
    with pytest.raises(ValueError, match=r"`blocks\.1\.attn\.qkv\.weight` has shape \(90, 32\).* \(32, 32\)"):
        read_weights(weights, **HEADS).load()


# -- round trips; to facebookresearch/mae and back is tested with `clmae export` -------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_to_vit_mae_and_back_is_exact(family, tiny_config):
    model = randomize(FAMILIES[family][2](tiny_config(family)))
    config, weights = to_vit_mae(model)
    read = read_weights(weights, **HEADS)
    assert (read.layout, read.missing, read.unexpected) == (TRANSFORMERS_4, [], [])
    back = read.load().state_dict()
    assert set(back) == {name for name in model.state_dict() if name.startswith(("vit.", "decoder."))}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in back.items())
    assert (config.norm_pix_loss, config.mask_ratio, config.layer_norm_eps) == (True, 0.75, 1e-6)


def test_the_tables_agree_with_the_layouts_written_by_hand(vit_mae):
    weights = vit_mae.state_dict()
    model = read_weights(weights, **HEADS).load()
    for write, layout in LAYOUTS.values():
        exported, expected = export_weights(model, layout), write(weights)
        assert set(exported) == set(expected)
        assert all(torch.equal(exported[name], expected[name]) for name in expected)


# -- refusals -----------------------------------------------------------------------------------------------------


def test_what_a_format_cannot_hold_is_refused(tiny_config):
    mean, cls = (MAEForImageClassification(tiny_config(pooling=pooling)) for pooling in ("mean", "cls"))
    for convert, model, message in (
        (to_dinov2, mean, "`--to dinov2` has no classifier with `pooling` 'mean'; take `--to beit`"),
        (to_beit, cls, "`--to beit` is for classifiers with `pooling` 'mean'"),
        (to_beit, MAEModel(tiny_config()), "`--to beit` is for classifiers"),
        (to_vit_mae, mean, "`--to vit_mae` needs an autoencoder"),
        (to_vit_mae, MAEForPreTraining(tiny_config(image_size=(8, 16))), "but `image_size` is (8, 16)"),
        (to_beit, MAEForImageClassification(tiny_config(patch_size=(4, 2))), "but `patch_size` is (4, 2)"),
        (to_dinov2, MAEModel(tiny_config(image_size=(8, 16))), "needs square images and patches"),
        (to_dinov2, MAEModel(tiny_config(intermediate_size=80)), "multiple of `hidden_size` = 32, but it is 80"),
        (to_timm, MAEModel(tiny_config(layer_norm_eps=1e-5)), "`layer_norm_eps` = 1e-06, but it is 1e-05"),
        (to_timm, MAEModel(tiny_config(hidden_act="relu")), "`hidden_act` = gelu, but it is relu"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            convert(model)


# -- going on from a MAE ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", [MAEForPreTraining, MAEModel])
def test_cl_mae_goes_on_from_a_mae_folder_with_a_fresh_masking_module(kind, tiny_config, tmp_path, make_images):
    source = randomize(kind(tiny_config()))
    source.save_pretrained(tmp_path / "mae")
    model = CLMAEForPreTraining.from_pretrained(tmp_path / "mae").train()
    assert (model.config.model_type, model.config.masker_num_hidden_layers) == ("cl_mae", 1)
    assert model.config.hidden_size == source.config.hidden_size
    prefix = "vit." if kind is MAEModel else ""
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[f"{prefix}{name}"], tensor), name
    fresh = model.masking_module
    assert fresh.head.weight.std() > 0.01
    assert all(layer.attention.q_proj.weight.std() > 0.05 for layer in fresh.layers)
    assert torch.equal(fresh.layernorm.weight, torch.ones(model.config.masker_hidden_size))
    model(make_images(model.config, 4)).loss.backward()
    for part in (model.vit.layers, model.decoder.decoder_layers, fresh):
        gradients = [parameter.grad for parameter in part.parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    model.save_pretrained(tmp_path / "cl_mae")
    assert_same_weights(CLMAEForPreTraining.from_pretrained(tmp_path / "cl_mae"), model)
