# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What transformers, and the libraries around it, expect of every model: all classes of all families alike."""

from __future__ import annotations

import copy
import inspect
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
from transformers.utils import TransformersKwargs

import clmae

HEADS = {
    "encoder": (1, AutoModel),
    "pretraining": (2, AutoModelForPreTraining),
    "classifier": (3, AutoModelForImageClassification),
    "backbone": (4, AutoBackbone),
}
FAMILIES = {"mae": {}, "cl_mae": {}, "cmae": {}, "cmae-learned": {"learned_masks": True}}
# Learned masks of a CMAE are its pretraining's alone.
CASES = [(family, head) for family in FAMILIES for head in HEADS if family != "cmae-learned" or head == "pretraining"]
every_model = pytest.mark.parametrize(("family", "head"), CASES)
every_autoencoder = pytest.mark.parametrize("family", FAMILIES)
every_backbone = pytest.mark.parametrize("family", list(clmae.FAMILIES))


@pytest.fixture
def build(tiny_config, make_images):
    """`build(family, head, **fields)`: a model whose weights are random without zeros, and its inputs.

    All randomness is in the inputs: uniform noise for masks, and labels for a classifier's loss.
    """

    def make(family: str, head: str = "pretraining", **fields: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        masker = {"masker_num_hidden_layers": 1, "masker_num_attention_heads": 2} if family != "mae" else {}
        name = family.removesuffix("-learned")
        config = tiny_config(name, **{**masker, **FAMILIES[family], **fields})
        model = clmae.FAMILIES[name][HEADS[head][0]](config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        images = make_images(config, 4)
        inputs = {"pixel_values": images}
        if head == "pretraining":
            if name == "cmae":
                images = images.unflatten(0, (2, 2))
            noise = torch.linspace(0, 0.99, config.num_patches)[torch.rand(4, config.num_patches).argsort(1)]
            inputs = {"pixel_values": images, "noise": noise.unflatten(0, images.shape[:-3])}
        elif head == "classifier":
            inputs["labels"] = torch.tensor([0, 1, 0, 1])
        return model, inputs

    return make


def flat(outputs: Any) -> list[torch.Tensor]:
    """All tensors of an output, however nested."""
    if isinstance(outputs, torch.Tensor):
        return [outputs.detach()]
    parts = outputs.to_tuple() if hasattr(outputs, "to_tuple") else outputs
    return [tensor for part in parts if part is not None for tensor in flat(part)]


def assert_same(first: Any, second: Any, **tolerance: float) -> None:
    first, second = flat(first), flat(second)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or dict(atol=0, rtol=0)))


def gradients(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    outputs = model(**inputs)
    (outputs.loss if "loss" in outputs else outputs[0][0].square().mean()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# -- files ------------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_round_trip(build, family, head, pooling, tmp_path):
    model, inputs = build(family, head, pooling=pooling, num_labels=3)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert_same(loaded.state_dict().values(), model.state_dict().values())
    assert_same(loaded(**inputs), model(**inputs))


@every_model
def test_from_config(build, family, head):
    model, inputs = build(family, head)
    made = HEADS[head][1].from_config(model.config, dtype=torch.bfloat16)
    assert type(made) is type(model)
    assert {tensor.dtype for tensor in made.state_dict().values()} == {torch.bfloat16}
    made.load_state_dict(model.state_dict())
    assert_same(made.eval().float()(**inputs), model.bfloat16().float()(**inputs))


@every_model
def test_positions_are_right_without_initialisation(build, family, head):
    model, _ = build(family, head)
    with initialization.no_init_weights():
        bare = type(model)(model.config)
    assert_same(list(bare.buffers()), list(model.buffers()))
    assert all(buffer.any() for buffer in bare.buffers())


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
    assert_same(type(model).from_pretrained(tmp_path / "again").state_dict().values(), loaded.state_dict().values())


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


@every_backbone
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
@pytest.mark.parametrize("size", [(32, 32), (16, 24), (8, 12)], ids=str)
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


@every_backbone
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


@every_backbone
@pytest.mark.parametrize("size", [(16, 16), (64, 96), (70, 101)], ids=str)
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


@every_model
def test_what_is_no_batch_of_normalised_images(build, family, head):
    model, inputs = build(family, head)
    images = inputs["pixel_values"]
    with pytest.raises(ValueError, match=r"`pixel_values` has dtype torch\.uint8; .*image processor"):
        model(**{**inputs, "pixel_values": images.to(torch.uint8)})
    with pytest.raises(ValueError, match=r"`pixel_values` has shape \(0, .* empty batch; give at least one image"):
        model(**{name: value[:0] for name, value in inputs.items()})


# -- clients ----------------------------------------------------------------------------------------------------------


@every_model
def test_forward_names_its_keywords(build, family, head):
    model, _ = build(family, head)
    annotation = str(inspect.signature(type(model).forward).parameters["kwargs"].annotation)
    assert annotation == "Unpack[TransformersKwargs]"
    assert set(TransformersKwargs.__annotations__) >= {"output_hidden_states", "output_attentions"}


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


@every_autoencoder
def test_lora_trains_every_layer(build, family):
    model, inputs = build(family)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False)).train()
    trained = gradients(adapted, inputs)
    assert all(gradient.any() for gradient in trained.values())
    assert len(trained) == 2 * len(layers)


@every_autoencoder
@pytest.mark.parametrize("soft_masking", ["attention", "tokens"])
def test_flops_can_be_counted_by_torch(build, family, soft_masking):
    if family == "mae":
        model, inputs = build(family, attn_implementation="eager")
    else:
        model, inputs = build(family, attn_implementation="eager", soft_masking=soft_masking)
    model.train()
    expected = gradients(model, inputs)
    with FlopCounterMode(display=False) as counter:
        counted = gradients(model, inputs)
    assert counter.get_total_flops() > 0
    assert_same(list(counted.values()), list(expected.values()))


@every_model
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_gradient_checkpointing_changes_no_gradient(build, family, head, use_reentrant):
    if use_reentrant and head == "pretraining" and family in ("cl_mae", "cmae-learned"):
        pytest.skip("refused: pass B differentiates with respect to its input")
    model, inputs = build(family, head)
    expected = gradients(model.train(), inputs)
    options = None if use_reentrant is None else {"use_reentrant": use_reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    assert model.is_gradient_checkpointing
    actual = gradients(model, inputs)
    assert actual.keys() == expected.keys()
    assert_same(list(actual.values()), list(expected.values()))
