# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What transformers, and the libraries around it, expect of every model: all classes of all families alike."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoBackbone,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    DetrConfig,
    DetrForObjectDetection,
    Dinov2Backbone,
    Dinov2Config,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    initialization,
)

import clmae

from . import reference
from .models import FAMILIES, HEADS, assert_same, every_autoencoder, every_family, every_model, flat, gradients


def step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of the model's loss, or of something where it has none."""
    outputs = model(**inputs)
    return gradients(model, outputs.loss if "loss" in outputs else outputs[0][0].square().mean())


# -- from scratch -----------------------------------------------------------------------------------------------------


@every_model
def test_fresh_weights(tiny_config, family, head):
    family, _, learned = family.partition("-")
    config = tiny_config(family, image_size=(16, 24), **({"learned_masks": True} if learned else {}))
    model = clmae.FAMILIES[family][HEADS[head][0]](config)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.any() or name.endswith(".bias"), f"{name} is all zero"
        if name.endswith(".bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith(".weight"):  # Xavier uniform, a convolution's weight flattened
            bound = math.sqrt(6 / (parameter.shape[0] + parameter[0].numel()))
            assert 0.9 * bound < parameter.abs().max() <= bound, name
        elif name.endswith(("cls_token", "mask_token")):
            assert 0.01 < parameter.std() < 0.03, name
    assert len(dict(model.named_buffers())) == (2 if head == "pretraining" else 1)
    for position in model.buffers():
        expected = reference.sincos_positions(position.shape[-1], 4, 6)
        torch.testing.assert_close(position[0].double(), expected, atol=1e-6, rtol=0)
    with initialization.no_init_weights():
        bare = type(model)(config)
    assert_same(list(bare.buffers()), list(model.buffers()))


@pytest.mark.parametrize("head", ["encoder", "pretraining"])
def test_same_seed_same_encoder_in_every_family(tiny_config, head):
    states = []
    for family, classes in clmae.FAMILIES.items():
        torch.manual_seed(3)
        states.append(classes[HEADS[head][0]](tiny_config(family)).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.slow
@every_autoencoder
@pytest.mark.parametrize("head", ["pretraining", "classifier"])
def test_every_trainable_parameter_moves_within_three_steps(build, family, head, tmp_path):
    if (family, head) == ("cmae-learned", "classifier"):
        pytest.skip("the same as CMAE's")
    # From a folder: transformers gives every parameter that it loads a gradient, fixed or not.
    build(family, head)[0].save_pretrained(tmp_path)
    model = HEADS[head][1].from_pretrained(tmp_path).train()
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    # No weight decay: only a gradient moves a parameter.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    largest = {name: 0.0 for name, _ in model.named_parameters()}
    for _ in range(3):
        _, inputs = build(family, head)
        for name, gradient in step(model, inputs).items():
            largest[name] = max(largest[name], gradient.abs().max().item())
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.bias"):
            # Adds one number to all scores of a query, which the softmax cancels: its gradient is rounding alone.
            assert largest[name] < 1e-6, name
        else:
            assert largest[name] > 1e-6, name
            assert (parameter - before[name]).abs().max() > 1e-4, name
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())  # the positions


# -- files ------------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_round_trip(build, family, head, pooling, tmp_path):
    model, inputs = build(family, head, pooling=pooling, num_labels=3)
    model.save_pretrained(tmp_path)
    for options in ({}, {"device_map": "cpu"}):
        loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True, **options)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert not loaded.training
        assert_same(loaded.state_dict(), model.state_dict())
        assert_same(loaded(**inputs), model(**inputs))


@every_family
def test_every_auto_class_loads_a_pretrained_folder(build, family, tmp_path):
    model, inputs = build(family)
    model.save_pretrained(tmp_path)
    pixel_values = inputs["pixel_values"].flatten(0, -4)
    _, encoder_class, pretraining_class, classifier_class, backbone_class = clmae.FAMILIES[family]
    loaded = {}
    for auto_class, expected in (
        (AutoModel, encoder_class),
        (AutoModelForPreTraining, pretraining_class),
        (AutoModelForImageClassification, classifier_class),
        (backbone_class, backbone_class),  # AutoBackbone takes no folder
    ):
        loaded[auto_class], info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded[auto_class]) is expected
        new = {"classifier", "fc_norm"} if auto_class is AutoModelForImageClassification else set()
        assert {key.split(".")[0] for key in info["missing_keys"]} == new
        assert not info["unexpected_keys"]
    assert_same(loaded[AutoModel](pixel_values), model.vit(pixel_values))
    assert_same(loaded[AutoModelForPreTraining](**inputs), model(**inputs))
    hidden_states = loaded[AutoModelForImageClassification](pixel_values, output_hidden_states=True).hidden_states
    assert_same(hidden_states, model.vit(pixel_values, output_hidden_states=True).hidden_states)
    assert type(AutoBackbone.from_config(model.config)) is backbone_class
    expected = model.vit(pixel_values).last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(loaded[backbone_class](pixel_values).feature_maps[-1], expected)


@every_family
def test_classifier_folder_gives_an_encoder(build, family, tmp_path):
    model, inputs = build(family, "classifier", pooling="cls")
    model.save_pretrained(tmp_path)
    encoder, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same(encoder(inputs["pixel_values"]), model.vit(inputs["pixel_values"]))


@every_model
def test_from_config(build, family, head):
    model, inputs = build(family, head)
    made = HEADS[head][1].from_config(model.config, dtype=torch.bfloat16)
    assert type(made) is type(model)
    assert {tensor.dtype for tensor in made.state_dict().values()} == {torch.bfloat16}
    made.load_state_dict(model.state_dict())
    assert_same(made.eval().float()(**inputs), model.bfloat16().float()(**inputs))


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights(build, family, head, dtype, tmp_path):
    model, inputs = build(family, head)
    if model.config.model_type != "mae" and head == "pretraining":  # the same masks, so that only rounding differs
        inputs["masking"] = "random"
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype}
    for a, b in zip(flat(model(**inputs)), flat(loaded(**inputs)), strict=True):
        assert (a.double() - b.double()).abs().max() < 0.05 * a.double().abs().max()


@pytest.mark.slow
@every_model
@pytest.mark.parametrize("layout", ["transformers 4", "transformers 5", "native"])
@pytest.mark.parametrize("written", [ViTMAEForPreTraining, ViTMAEModel])
def test_a_folder_of_vit_mae_loads_exactly(build, family, head, layout, written, tmp_path):
    model, inputs = build(family, head)
    fields = {name: value for name, value in model.config.to_dict().items() if hasattr(ViTMAEConfig, name)}
    theirs = written(ViTMAEConfig(**{**fields, "model_type": "vit_mae", "layer_norm_eps": 1e-3})).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    weights = theirs.state_dict() if layout == "native" else load_file(tmp_path / "model.safetensors")
    if layout == "transformers 4":  # which gave the decoder's blocks this name
        weights = {name.replace("decoder_encoder.layer", "decoder_layers"): value for name, value in weights.items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})

    fields = {"masker_num_attention_heads": 2, **FAMILIES[family]} if family != "mae" else {}
    config = type(model.config).from_pretrained(tmp_path, **fields)
    loaded = HEADS[head][1].from_pretrained(tmp_path, config=config) if head != "backbone" else None
    loaded = loaded or type(model).from_pretrained(tmp_path, config=config)  # AutoBackbone takes no folder
    assert type(loaded) is type(model)
    source, target = (
        {name.removeprefix("vit."): value for name, value in each.state_dict().items()} for each in (theirs, loaded)
    )
    new = ("masking_module.", "projector.", "position_head.", "classifier.", "fc_norm.")
    lacking = {name for name in target.keys() - source.keys() if not name.startswith(new)}
    assert all(name.startswith("decoder.") and written is ViTMAEModel for name in lacking), lacking
    shared = sorted(target.keys() & source.keys())
    assert_same([target[name] for name in shared], [source[name] for name in shared])

    if head == "encoder" or (head == "pretraining" and written is ViTMAEForPreTraining):
        images, noise = inputs["pixel_values"].flatten(0, -4), torch.rand(4, 16)
        encoder, theirs_encoder = getattr(loaded, "vit", loaded), getattr(theirs, "vit", theirs)
        expected = theirs_encoder(images, noise=noise).last_hidden_state
        torch.testing.assert_close(encoder(images, noise=noise).last_hidden_state, expected, atol=1e-6, rtol=0)
    if head == "pretraining" and written is ViTMAEForPreTraining:
        outputs = loaded(images, noise=noise, **({} if family == "mae" else {"masking": "random"}))
        torch.testing.assert_close(outputs.logits, theirs(images, noise=noise).logits, atol=1e-6, rtol=0)

    loaded.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == loaded.state_dict().keys()
    assert_same(type(model).from_pretrained(tmp_path / "again").state_dict(), loaded.state_dict())


# -- outputs ----------------------------------------------------------------------------------------------------------


@every_model
def test_tuples_and_determinism(build, family, head):
    model, inputs = build(family, head)
    state = torch.get_rng_state()
    expected, again, as_tuple = model(**inputs), model(**inputs), model(**inputs, return_dict=False)
    assert torch.equal(torch.get_rng_state(), state)  # evaluation with noise, or without need of it, draws none
    assert type(as_tuple) is tuple
    assert_same(again, expected)
    assert_same(as_tuple, expected)


@pytest.mark.parametrize("family", ["cl_mae", "cmae-learned"])
def test_learned_masks_need_no_noise_in_evaluation(build, family):
    model, inputs = build(family)
    state = torch.get_rng_state()
    assert_same(model(inputs["pixel_values"]), model(**inputs))
    assert torch.equal(torch.get_rng_state(), state)


@every_model
def test_attentions_of_a_fused_kernel_are_refused(build, family, head):
    model, inputs = build(family, head, attn_implementation="sdpa")
    with pytest.raises(ValueError, match=r"`output_attentions=True`.*'sdpa'.*attn_implementation='eager'"):
        model(**inputs, output_attentions=True)
    model.set_attn_implementation("eager")
    assert len(model(**inputs, output_attentions=True).attentions) == 2


@every_model
@pytest.mark.parametrize("has_accelerator", [False, True])
def test_the_default_attention_is_that_of_the_machine(build, tmp_path, monkeypatch, family, head, has_accelerator):
    """On a CPU never the fused kernel, unless it is asked for; also of a model that is loaded."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_accelerator)
    model, _ = build(family, head)
    model.save_pretrained(tmp_path)
    for options, expected in (({}, "sdpa" if has_accelerator else "eager"), ({"attn_implementation": "sdpa"}, "sdpa")):
        loaded = type(model).from_pretrained(tmp_path, **options)
        assert loaded.config._attn_implementation == expected
        assert (
            type(model)
            ._from_config(loaded.config.__class__.from_pretrained(tmp_path), **options)
            .config._attn_implementation
            == expected
        )


@every_autoencoder
def test_eager_and_sdpa_agree(build, family):
    model, inputs = build(family, attn_implementation="sdpa")
    model.double().train()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    outputs, trained = model(**inputs), step(model, inputs)
    model.set_attn_implementation("eager")
    assert_same(model(**inputs), outputs, atol=1e-12, rtol=0)
    assert_same(step(model, inputs), trained, atol=1e-12, rtol=0)


@pytest.mark.slow
@every_autoencoder
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention(build, family):
    model, inputs = build(family, attn_implementation="sdpa")
    # On the CPU it has no backward pass. Its unfused form: compiling the kernel takes half a minute.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = model(**inputs)
        model.set_attn_implementation("flex_attention")
        assert_same(model(**inputs), expected, atol=1e-5, rtol=0)


@every_model
@pytest.mark.parametrize("by_config", [True, False])
def test_hidden_states_and_attentions(build, family, head, by_config):
    asked = {"output_hidden_states": True, "output_attentions": True}
    fields = asked if by_config else {}
    model, inputs = build(family, head, attn_implementation="eager", num_hidden_layers=3, **fields)
    outputs = model.train()(**inputs, **({} if by_config else asked))
    length = 5 if head == "pretraining" else 17  # pass A's: class token and visible tokens
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(4, length, 32)] * 4
    assert [tuple(a.shape) for a in outputs.attentions] == [(4, 4, length, length)] * 3
    for attention in outputs.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(4, 4, length))
    if head == "encoder":
        assert torch.equal(outputs.hidden_states[0], model.embeddings(inputs["pixel_values"]))
        assert torch.equal(model.layernorm(outputs.hidden_states[-1]), outputs.last_hidden_state)
    if not by_config:
        plain = model(**inputs)
        assert plain.get("hidden_states") is plain.get("attentions") is None


@every_family
def test_backbone_selects_hidden_states_as_transformers_does(build, family):
    model, inputs = build(family, "backbone")
    dinov2 = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
    theirs = Dinov2Backbone(Dinov2Config(**dinov2)).eval()

    def selected(backbone: nn.Module, asked: Any) -> list[int | None]:
        whole, states = (backbone(**inputs, output_hidden_states=each).hidden_states for each in (True, asked))
        return [s if s is None else next(i for i, w in enumerate(whole) if torch.equal(s, w)) for s in states or ()]

    for asked in ([0, -1], [1], True, False):
        assert selected(model, asked) == selected(theirs, asked)


# -- sizes ------------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize(
    "fields",
    [dict(num_channels=1), dict(image_size=(8, 24)), dict(image_size=(12, 20), patch_size=(2, 5), num_channels=5)],
    ids=str,
)
def test_any_channels_and_shape(build, family, head, fields):
    model, inputs = build(family, head, **fields)
    config, outputs = model.config, model(**inputs)
    name, shape = {
        "encoder": ("last_hidden_state", (4, 1 + config.num_patches, 32)),
        "pretraining": ("logits", (*inputs["pixel_values"].shape[:-3], config.num_patches, config.patch_dim)),
        "classifier": ("logits", (4, 2)),
        "backbone": ("feature_maps", (4, 32, *config.grid_size)),
    }[head]
    (value,) = flat(outputs[name])
    assert value.shape == shape
    assert value.isfinite().all()


@every_model
@pytest.mark.parametrize("size", [(32, 32), (8, 12)], ids=str)
def test_other_image_sizes(build, family, head, size):
    model, inputs = build(family, head)
    extra = {"labels": inputs["labels"]} if head == "classifier" else {}
    if head == "pretraining" and model.config.model_type != "mae":
        extra["masking"] = "random"
    pixel_values = torch.randn(*inputs["pixel_values"].shape[:-2], *size)
    strict = {"interpolate_pos_encoding": False} if head == "backbone" else {}
    with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]} pixels.*16x16.*interpolate_pos_encoding=True"):
        model(pixel_values, **strict, **extra)
    outputs = model(pixel_values, interpolate_pos_encoding=True, **extra)
    num_patches = size[0] * size[1] // 16
    if head == "pretraining":
        assert outputs.logits.shape == (*pixel_values.shape[:-3], num_patches, 48)
        assert (outputs.mask == 0).sum(-1).unique().tolist() == [num_patches // 4]
        assert outputs.loss.isfinite()
    elif head == "backbone":
        assert outputs.feature_maps[0].shape == (4, 32, size[0] // 4, size[1] // 4)
    elif head == "encoder":
        assert outputs.last_hidden_state.shape == (4, 1 + num_patches, 32)


@every_family
@pytest.mark.parametrize("size", [(16, 16), (19, 27), (40, 23)], ids=str)
def test_backbone_sees_whole_patches(build, family, size):
    model, _ = build(family, "backbone", out_features=["stem", "stage2"])
    pixel_values = torch.randn(2, 3, *size)
    cropped = pixel_values[..., : size[0] // 4 * 4, : size[1] // 4 * 4]
    maps = model(pixel_values).feature_maps
    assert [tuple(m.shape) for m in maps] == [(2, 32, size[0] // 4, size[1] // 4)] * 2
    assert_same(maps, model(cropped).feature_maps)
    with pytest.raises(ValueError, match="3x16 pixels, no multiple of the patch size 4x4"):
        model(torch.randn(2, 3, 3, 16))


@every_family
@pytest.mark.slow
@pytest.mark.parametrize("size", [(16, 16), (70, 101)], ids=str)
@pytest.mark.parametrize("task", ["detection", "segmentation", "depth"])
def test_transformers_heads_take_the_backbone(tiny_config, family, task, size):
    indices = {"detection": [2], "segmentation": [0, 1, 2, 2], "depth": [0, 1, 2, 2]}[task]
    fields = dict(num_hidden_layers=4, out_indices=indices if task == "detection" else [1, 2, 3, 4])
    backbone = tiny_config(family, **fields, reshape_hidden_states=task != "depth")
    pixel_values = torch.randn(2, 3, *size)
    if task == "detection":
        layers = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
        widths = dict(d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=3)
        model = DetrForObjectDetection(DetrConfig(backbone_config=backbone, **layers, **widths))
        mask = torch.ones(2, *size, dtype=torch.long)
        mask[1, :, size[1] // 2 :] = 0
        outputs = model(pixel_values, pixel_mask=mask).logits
    elif task == "segmentation":
        sizes = dict(hidden_size=16, auxiliary_in_channels=32, auxiliary_channels=8, num_labels=3, pool_scales=[1, 2])
        model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, **sizes))
        outputs = model(pixel_values, labels=torch.zeros(2, *size, dtype=torch.long)).logits
        assert outputs.shape[2:] == size
    else:
        necks = dict(reassemble_hidden_size=32, neck_hidden_sizes=[8] * 4, fusion_hidden_size=8, head_hidden_size=4)
        config = DepthAnythingConfig(backbone_config=backbone, patch_size=4, **necks)
        outputs = DepthAnythingForDepthEstimation(config)(pixel_values).predicted_depth
        assert outputs.shape[1:] == (size[0] // 4 * 4, size[1] // 4 * 4)
    assert outputs.isfinite().all()
    assert outputs.requires_grad


# -- bad input --------------------------------------------------------------------------------------------------------


@every_model
def test_unknown_keywords(build, family, head):
    model, inputs = build(family, head)
    unknown = {"attention_mask": torch.ones(4, 17), "bool_masked_pos": None, "labls": 1}
    for name, value in (unknown | ({"masking": "random"} if family == "mae" or head != "pretraining" else {})).items():
        with pytest.raises(ValueError, match=rf"`{name}` \(here a \w+\) is no .*{type(model).__name__}.* pixel_values"):
            model(**inputs, **{name: value})
    annotation = str(inspect.signature(type(model).forward).parameters["kwargs"].annotation)
    assert annotation == "Unpack[TransformersKwargs]"  # where generic code and editors look the others up


@every_model
def test_what_is_no_batch_of_normalised_images(build, family, head):
    model, inputs = build(family, head)
    images = inputs["pixel_values"]
    with pytest.raises(ValueError, match=r"`pixel_values` has dtype torch\.uint8; .*image processor"):
        model(**{**inputs, "pixel_values": images.to(torch.uint8)})
    with pytest.raises(ValueError, match=r"`pixel_values` has shape \(0, .* empty batch; give at least one image"):
        model(**{name: value[:0] for name, value in inputs.items()})
    with pytest.raises(ValueError, match=r"`pixel_values` has shape \(4, 5, 16, 16\).*`num_channels` = 3"):
        model(torch.randn(4, 5, 16, 16))
    with pytest.raises(ValueError, match=r"`pixel_values` has shape \(3, 16, 16\).*\(batch_size, 3, height, width\)"):
        model(torch.randn(3, 16, 16))
    if head != "backbone":  # which sees whole patches
        with pytest.raises(ValueError, match=r"18x16 pixels, no multiple of the patch size 4x4.*resize or crop"):
            model(torch.randn(*images.shape[:-2], 18, 16), interpolate_pos_encoding=True)


# -- heads ------------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_classifier(build, family, pooling):
    """The mean is normalised after pooling, the class token before it."""
    model, inputs = build(family, "classifier", pooling=pooling, num_labels=5)
    outputs = model(**inputs, output_hidden_states=True)
    last = outputs.hidden_states[-1]
    pooled = model.fc_norm(last[:, 1:].mean(1)) if pooling == "mean" else model.vit.layernorm(last)[:, 0]
    torch.testing.assert_close(outputs.logits, model.classifier(pooled))
    torch.testing.assert_close(outputs.loss, nn.functional.cross_entropy(outputs.logits, inputs["labels"]))
    assert model(inputs["pixel_values"]).loss is None
    other = "vit.layernorm" if pooling == "mean" else "fc_norm"
    assert not any(name.startswith(other) for name in model.state_dict())


@every_family
@pytest.mark.parametrize("apply_layernorm", [True, False])
@pytest.mark.parametrize("reshape_hidden_states", [True, False])
def test_backbone_feature_maps(build, family, apply_layernorm, reshape_hidden_states):
    fields = dict(apply_layernorm=apply_layernorm, reshape_hidden_states=reshape_hidden_states)
    model, inputs = build(family, "backbone", image_size=(8, 16), out_features=["stem", "stage2"], **fields)
    assert model.channels == [32, 32]
    outputs = model(**inputs, output_hidden_states=True)
    for feature_map, hidden_state in zip(outputs.feature_maps, outputs.hidden_states[::2], strict=True):
        expected = model.layernorm(hidden_state) if apply_layernorm else hidden_state
        if reshape_hidden_states:
            assert feature_map.shape == (4, 32, 2, 4)
            feature_map = torch.cat([expected[:, :1], feature_map.flatten(2).transpose(1, 2)], 1)
        torch.testing.assert_close(feature_map, expected)
    assert model(**inputs).hidden_states is None


# -- clients ----------------------------------------------------------------------------------------------------------


@every_model
def test_every_module_with_tensors_of_its_own_is_called(build, family, head):
    # Its hooks bring its tensors, where they are sharded, offloaded or quantised; wrappers (LoRA) take its place.
    model, inputs = build(family, head)
    called = set()
    owners = {
        name: module
        for name, module in model.named_modules()
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    }
    for name, module in owners.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model.train()(**inputs)
    assert owners.keys() - called == set()


@every_family
def test_models_list_their_blocks_and_input_embeddings(build, family):
    model, _ = build(family)
    assert {type(module).__name__ for module in model.modules()} >= set(model._no_split_modules)
    assert model.vit.get_input_embeddings() is model.vit.embeddings.patch_embeddings
    assert model.main_input_name == "pixel_values"
    assert model.accepts_loss_kwargs is False


@every_model
def test_deepcopy_after_a_run(build, family, head):
    model, inputs = build(family, head)
    model(**inputs, output_hidden_states=True)
    duplicate = copy.deepcopy(model)
    assert_same(duplicate(**inputs), model(**inputs))
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert not torch.equal(next(duplicate.parameters()), next(model.parameters()))


@every_family
@pytest.mark.slow
def test_encoder_compiles_as_one_graph_and_exports(build, family):
    model, inputs = build(family, "encoder")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for noise in ({}, {"noise": torch.linspace(0, 0.9, 16).expand(4, 16)}):
        assert_same(compiled(**inputs, **noise), model(**inputs, **noise), atol=1e-6, rtol=0)
    dynamic = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (inputs["pixel_values"],), dynamic_shapes=dynamic)
    assert_same(program.module()(inputs["pixel_values"][:3]), model(inputs["pixel_values"][:3]), atol=1e-6, rtol=0)


@pytest.mark.slow
@every_model
@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_offloading(build, family, head, to, tmp_path):
    model, inputs = build(family, head)
    model.train()
    offloaded = copy.deepcopy(model)
    if to == "cpu":
        cpu_offload(offloaded, torch.device("cpu"), offload_buffers=True)
    else:
        disk_offload(offloaded, tmp_path, torch.device("cpu"), offload_buffers=True)
    assert {tensor.device.type for tensor in offloaded.state_dict().values()} == {"meta"}
    assert_same(offloaded(**inputs), model(**inputs))


@every_autoencoder
@pytest.mark.filterwarnings("ignore")  # deprecated, still in use
def test_dynamic_quantisation(build, family):
    model, inputs = build(family)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    for a, b in zip(flat(quantised(**inputs).loss), flat(model(**inputs).loss), strict=True):
        torch.testing.assert_close(a, b, atol=0.05, rtol=0)


@pytest.mark.slow
@every_autoencoder
def test_lora_trains_every_layer(build, family):
    model, inputs = build(family)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False)).train()
    trained = step(adapted, inputs)
    assert all(gradient.any() for gradient in trained.values())
    assert len(trained) == 2 * len(layers)


@every_autoencoder
@pytest.mark.parametrize("soft_masking", ["attention", "tokens"])
def test_flops_can_be_counted_by_torch(build, family, soft_masking):
    fields = {} if family == "mae" else {"soft_masking": soft_masking}
    model, inputs = build(family, attn_implementation="eager", **fields)
    model.train()
    expected = step(model, inputs)
    with FlopCounterMode(display=False) as counter:
        counted = step(model, inputs)
    assert counter.get_total_flops() > 0
    assert_same(counted, expected)


@every_model
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_gradient_checkpointing_changes_no_gradient(build, family, head, use_reentrant):
    if use_reentrant and head == "pretraining" and family in ("cl_mae", "cmae-learned"):
        pytest.skip("refused: pass B differentiates with respect to its input")
    model, inputs = build(family, head)
    expected = step(model.train(), inputs)
    options = None if use_reentrant is None else {"use_reentrant": use_reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    assert model.is_gradient_checkpointing
    assert_same(step(model, inputs), expected)
