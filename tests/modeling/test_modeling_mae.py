# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""MAE against transformers' own, and what transformers expects of every model of both families."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoBackbone,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    BitImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    pipeline,
)

import clmae
from clmae.modeling.losses import patch_targets
from clmae.modeling.modeling_mae import MAELayer, MAEModel, resize_positions

from . import reference

HEADS = {"encoder": 1, "pretraining": 2, "classifier": 3, "backbone": 4}
every_family = pytest.mark.parametrize("family", list(clmae.FAMILIES))
every_head = pytest.mark.parametrize("head", HEADS)


@pytest.fixture
def build(tiny_config):
    """`build(family, head, **fields)`: a tiny model of random weights without zeros, in evaluation mode.

    CMAE without its contrast, which needs two views; test_modeling_cmae.py has those.
    """

    def make(family: str = "mae", head: str = "pretraining", **fields):
        fields = {"contrastive_loss_weight": 0.0, **fields} if family == "cmae" else fields
        model = clmae.FAMILIES[family][HEADS[head]](tiny_config(family, **fields))
        return perturb(model).eval()

    return make


def perturb(model):
    """Moves every parameter, so that no path is hidden by an initial zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def distinct_noise(batch_size: int, num_patches: int, dtype=torch.float32) -> torch.Tensor:
    """Uniform noise without near-ties, whose order differs between precisions."""
    return torch.rand(batch_size, num_patches).argsort(1).to(dtype) / num_patches


def gradients(model) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def vit_mae_fields(config) -> dict:
    """The fields that transformers' own configuration has too."""
    return {k: v for k, v in config.to_dict().items() if hasattr(ViTMAEConfig, k) and k != "model_type"}


def assert_equal_outputs(first, second, **tolerance) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


# -- golden -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_equals_transformers_vit_mae(build, make_images, norm_pix_loss, dtype, tolerance):
    ours = build(norm_pix_loss=norm_pix_loss).to(dtype).train()
    theirs = ViTMAEForPreTraining(ViTMAEConfig(**vit_mae_fields(ours.config))).to(dtype).train()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    pixel_values, noise = make_images(ours.config, 3, dtype), distinct_noise(3, 16, dtype)
    expected, actual = theirs(pixel_values, noise=noise), ours(pixel_values, noise=noise)
    assert torch.equal(actual.mask, expected.mask.float())
    assert torch.equal(actual.ids_restore, expected.ids_restore)
    for name in ("loss", "logits"):
        torch.testing.assert_close(actual[name], expected[name], atol=tolerance, rtol=0)
    assert actual.reconstruction_loss is actual.loss
    expected.loss.backward()
    actual.loss.backward()
    expected_gradients, actual_gradients = gradients(theirs), gradients(ours)
    assert actual_gradients.keys() == expected_gradients.keys()
    for name, gradient in actual_gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=tolerance, rtol=0)


@pytest.mark.parametrize("mask_sampler", ["random", "block", "grid"])
def test_equals_the_reference_on_non_square_images_of_any_channels(build, make_images, mask_sampler):
    model = build(image_size=(8, 12), patch_size=(2, 4), num_channels=5, mask_ratio=0.6, mask_sampler=mask_sampler)
    model.double()
    pixel_values, noise = make_images(model.config, 2, torch.float64), torch.rand(2, 12, dtype=torch.float64)
    outputs = model(pixel_values, noise=noise)
    if mask_sampler == "random":
        assert torch.equal(outputs.ids_restore, noise.argsort(1).argsort(1))
    expected = reference.mae_forward(model.state_dict(), model.config, pixel_values, outputs.ids_restore)
    assert torch.equal(outputs.mask.double(), expected["mask"])
    for name in ("loss", "logits"):
        torch.testing.assert_close(outputs[name], expected[name], atol=1e-12, rtol=0)


def test_encoder_with_noise_sees_the_visible_patches_only(build, make_images):
    model = build(head="encoder").double()
    pixel_values, noise = make_images(model.config, 2, torch.float64), distinct_noise(2, 16)
    outputs = model(pixel_values, noise=noise)
    assert outputs.last_hidden_state.shape == (2, 1 + 4, 32)
    assert outputs.mask.sum(1).tolist() == [12, 12]
    masked = outputs.mask.bool().reshape(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    hidden = model(pixel_values.masked_fill(masked, 1e3), noise=noise).last_hidden_state
    assert torch.equal(hidden, outputs.last_hidden_state)
    assert model(pixel_values).mask is None
    assert model(pixel_values).last_hidden_state.shape == (2, 1 + 16, 32)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_encoder_pooling(build, make_images, pooling):
    model = build(head="encoder", pooling=pooling)
    outputs = model(make_images(model.config))
    tokens = outputs.last_hidden_state
    torch.testing.assert_close(outputs.pooler_output, tokens[:, 1:].mean(1) if pooling == "mean" else tokens[:, 0])


def test_masks_are_drawn_anew_and_can_be_seeded(build, make_images):
    model = build()
    pixel_values = make_images(model.config, 4)
    state = torch.get_rng_state()
    first, second = model(pixel_values).mask, model(pixel_values).mask
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(model(pixel_values).mask, first)


# -- from scratch -----------------------------------------------------------------------------------------------------


@every_family
@every_head
def test_fresh_weights(tiny_config, family, head):
    config = tiny_config(family, image_size=(16, 24), num_labels=5)
    model = clmae.FAMILIES[family][HEADS[head]](config)
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


@every_family
def test_positions_stay_fixed_after_loading(tiny_config, make_images, family, tmp_path):
    # transformers gives every parameter that it loads a gradient, fixed or not.
    config = tiny_config(family)
    clmae.FAMILIES[family][HEADS["classifier"]](config).save_pretrained(tmp_path)
    model = clmae.FAMILIES[family][HEADS["classifier"]].from_pretrained(tmp_path).train()
    before = model.vit.embeddings.position_embeddings.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    model(make_images(config, 4), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    optimizer.step()
    assert before.any()
    assert torch.equal(model.vit.embeddings.position_embeddings, before)


@pytest.mark.parametrize("head", ["encoder", "pretraining"])
def test_same_seed_same_encoder_in_every_family(tiny_config, head):
    states = []
    for family in clmae.FAMILIES:
        torch.manual_seed(3)
        states.append(clmae.FAMILIES[family][HEADS[head]](tiny_config(family)).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@every_family
@pytest.mark.parametrize("head", ["pretraining", "classifier"])
def test_every_trainable_parameter_moves_within_three_steps(tiny_config, make_images, family, head):
    config = tiny_config(family)
    model = clmae.FAMILIES[family][HEADS[head]](config).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    # No weight decay: only a gradient moves a parameter.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    largest = dict.fromkeys(before, 0.0)
    inputs = {"labels": torch.tensor([0, 1, 0, 1])} if head == "classifier" else {}
    for _ in range(3):
        optimizer.zero_grad()
        images = make_images(config, 4)
        images = images.unflatten(0, (2, 2)) if (family, head) == ("cmae", "pretraining") else images
        model(images, **inputs).loss.backward()
        for name, gradient in gradients(model).items():
            largest[name] = max(largest[name], gradient.abs().max().item())
        optimizer.step()
    for name, parameter in model.named_parameters():
        moved = (parameter - before[name]).abs().max().item()
        if name.endswith("k_proj.bias"):
            # Adds one number to all scores of a query, which the softmax cancels: its gradient is rounding alone.
            assert largest[name] < 1e-6, name
        else:
            assert largest[name] > 1e-6, name
            assert moved > 1e-4, name


# -- files ------------------------------------------------------------------------------------------------------------


@every_family
def test_every_auto_class_loads_a_pretrained_folder(build, make_images, family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path)
    pixel_values, noise = make_images(model.config), distinct_noise(2, 16)
    _, encoder_class, pretraining_class, classifier_class, backbone_class = clmae.FAMILIES[family]

    encoder, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(encoder) is encoder_class
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_equal_outputs(encoder(pixel_values), model.vit(pixel_values))

    whole, info = AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert type(whole) is pretraining_class
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_equal_outputs(whole(pixel_values, noise=noise), model(pixel_values, noise=noise))

    classifier, info = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=5, output_loading_info=True)
    assert type(classifier) is classifier_class
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"classifier", "fc_norm"}
    assert not info["unexpected_keys"]
    assert classifier(pixel_values).logits.shape == (2, 5)
    last = classifier(pixel_values, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(last, model.vit(pixel_values, output_hidden_states=True).hidden_states[-1])

    backbone, info = backbone_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(AutoBackbone.from_config(model.config)) is backbone_class
    expected = model.vit(pixel_values).last_hidden_state[:, 1:].transpose(1, 2).reshape(2, 32, 4, 4)
    torch.testing.assert_close(backbone(pixel_values).feature_maps[-1], expected)


@every_family
def test_classifier_folder_gives_an_encoder(build, make_images, family, tmp_path):
    model = build(family, "classifier", pooling="cls")
    model.save_pretrained(tmp_path)
    encoder, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    pixel_values = make_images(model.config)
    assert torch.equal(encoder(pixel_values).last_hidden_state, model.vit(pixel_values).last_hidden_state)


@every_family
def test_pipelines(build, family, tmp_path):
    model = build(family, "classifier", image_size=32, patch_size=8, num_labels=3)
    model.save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=size, resample=3).save_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))
    pixel_values = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, 32, 32)

    scores = pipeline("image-classification", model=str(tmp_path))(image)
    expected = model(pixel_values).logits.softmax(-1)[0].sort(descending=True).values
    torch.testing.assert_close(torch.tensor([score["score"] for score in scores]), expected)

    encoder = AutoModel.from_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    features = pipeline("image-feature-extraction", model=encoder, image_processor=processor)(image)
    torch.testing.assert_close(torch.tensor(features), encoder(pixel_values).last_hidden_state)


@every_family
def test_feature_extraction_pipeline_on_a_pretrained_folder(build, family, tmp_path):
    model = build(family, image_size=32, patch_size=8)
    model.save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=size, resample=3).save_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))
    extractor = pipeline("image-feature-extraction", model=str(tmp_path))
    pixel_values = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values
    expected = model.vit(pixel_values)
    torch.testing.assert_close(torch.tensor(extractor(image)), expected.last_hidden_state)
    torch.testing.assert_close(torch.tensor(extractor(image, pool=True)), expected.pooler_output)


@every_family
def test_loading_on_a_device_map(build, make_images, family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path, device_map="cpu")
    inputs = dict(pixel_values=make_images(model.config), noise=distinct_noise(2, 16))
    assert_equal_outputs(loaded(**inputs), model(**inputs))


# -- outputs ----------------------------------------------------------------------------------------------------------


@every_family
@every_head
def test_attentions_of_a_fused_kernel_are_refused(build, make_images, family, head):
    model = build(family, head, attn_implementation="sdpa")
    with pytest.raises(ValueError, match=r"`output_attentions=True`.*'sdpa'.*attn_implementation='eager'"):
        model(make_images(model.config), output_attentions=True)
    model.set_attn_implementation("eager")
    assert len(model(make_images(model.config), output_attentions=True).attentions) == 2


@every_family
def test_eager_and_sdpa_agree(build, make_images, family):
    model = build(family, attn_implementation="sdpa").double().train()
    eager = build(family, attn_implementation="eager").double().train()
    eager.load_state_dict(model.state_dict())
    inputs = dict(pixel_values=make_images(model.config, dtype=torch.float64), noise=distinct_noise(2, 16))
    outputs = []
    for each in (model, eager):
        outputs.append(each(**inputs))
        outputs[-1].loss.backward()
    assert_equal_outputs(*outputs, atol=1e-12, rtol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, gradients(eager)[name], atol=1e-12, rtol=0)


@every_family
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention(build, make_images, family):
    model = build(family, attn_implementation="sdpa")
    flex = build(family, attn_implementation="flex_attention")
    flex.load_state_dict(model.state_dict())
    inputs = dict(pixel_values=make_images(model.config), noise=distinct_noise(2, 16))
    # On the CPU it has no backward pass. Its unfused form: compiling the kernel takes half a minute.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert_equal_outputs(flex(**inputs), model(**inputs), atol=1e-5, rtol=0)


# -- compilers --------------------------------------------------------------------------------------------------------


@every_family
def test_encoder_compiles_as_one_graph(build, make_images, family):
    model = build(family, "encoder")
    pixel_values = make_images(model.config)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal_outputs(compiled(pixel_values), model(pixel_values), atol=1e-6, rtol=0)
    noise = distinct_noise(2, 16)
    assert_equal_outputs(compiled(pixel_values, noise=noise), model(pixel_values, noise=noise), atol=1e-6, rtol=0)


@every_family
def test_encoder_exports(build, make_images, family):
    model = build(family, "encoder")
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (make_images(model.config),), dynamic_shapes={"pixel_values": {0: batch}})
    pixel_values = make_images(model.config, 5)
    assert_equal_outputs(program.module()(pixel_values), model(pixel_values), atol=1e-6, rtol=0)


# -- shapes -----------------------------------------------------------------------------------------------------------


@every_family
@every_head
@pytest.mark.parametrize(
    "fields",
    [
        dict(num_channels=1),
        dict(num_channels=5),
        dict(image_size=(8, 24)),
        dict(image_size=(12, 20), patch_size=(2, 5), num_channels=2),
    ],
    ids=str,
)
def test_any_channels_and_shape(build, make_images, family, head, fields):
    model = build(family, head, **fields)
    config = model.config
    outputs = model(make_images(config))
    shape = {
        "encoder": (2, 1 + config.num_patches, 32),
        "pretraining": (2, config.num_patches, config.patch_dim),
        "classifier": (2, 2),
        "backbone": (2, 32, *config.grid_size),
    }[head]
    name = {"encoder": "last_hidden_state", "backbone": "feature_maps"}.get(head, "logits")
    value = outputs[name][0] if head == "backbone" else outputs[name]
    assert value.shape == shape
    assert value.isfinite().all()


def test_interpolation_at_the_configured_size_changes_nothing(build, make_images):
    model = build()
    inputs = dict(pixel_values=make_images(model.config), noise=distinct_noise(2, 16))
    assert_equal_outputs(model(**inputs, interpolate_pos_encoding=True), model(**inputs), atol=0, rtol=0)


@pytest.mark.parametrize("new", [(8, 8), (6, 10), (2, 3)], ids=str)
def test_positions_are_interpolated_in_two_dimensions(new):
    old = (4, 5)
    positions = reference.sincos_positions(16, *old)[None].float()
    resized = resize_positions(positions, old, new)
    assert torch.equal(resized[:, :1], positions[:, :1])
    grid = resized[0, 1:].unflatten(0, new)
    # The first half of a position is a function of the column, the second of the row; both change.
    assert grid[:, :, :8].std(0).max() < 1e-6
    assert grid[:, :, 8:].std(1).max() < 1e-6
    assert grid[0, :, :8].std(0).max() > 0.1
    assert grid[:, 0, 8:].std(0).max() > 0.1
    # The middle of the image stays the middle: both grids agree there, up to the interpolation's error.
    middle = [p[0, 1:].unflatten(0, size)[..., [4, 12]].mean((0, 1)) for p, size in ((positions, old), (resized, new))]
    torch.testing.assert_close(*middle, atol=0.1, rtol=0)


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (8, 12)], ids=str)
def test_encoder_positions_are_interpolated_as_transformers_does(build, size):
    model = build(head="encoder")
    theirs = ViTMAEModel(ViTMAEConfig(**vit_mae_fields(model.config))).embeddings
    theirs.load_state_dict(model.embeddings.state_dict())
    pixel_values = torch.randn(2, 3, *size)
    patches = model.embeddings.patch_embeddings(pixel_values)
    expected = patches + theirs.interpolate_pos_encoding(patches, *size)[:, 1:]
    actual = model.embeddings(pixel_values, interpolate_pos_encoding=True)
    torch.testing.assert_close(actual[:, 1:], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("patch_size", "size"), [(4, (16, 16)), ((4, 8), (24, 16)), ((8, 2), (16, 32))], ids=str)
def test_patches_embedded_alone_are_those_of_the_whole(build, dtype, patch_size, size):
    embeddings = build(head="encoder", patch_size=patch_size).to(dtype).embeddings
    pixel_values = torch.randn(3, 3, *size)
    whole = embeddings(pixel_values, interpolate_pos_encoding=True)
    ids = torch.rand(3, whole.shape[1] - 1).argsort(1)[:, :5]
    alone = embeddings(pixel_values, interpolate_pos_encoding=True, ids_keep=ids)
    assert alone.dtype == whole.dtype == dtype
    assert torch.equal(alone[:, 0], whole[:, 0])
    for i in range(3):
        torch.testing.assert_close(
            alone[i, 1:], whole[i, 1:][ids[i]], atol=1e-2 if dtype.itemsize == 2 else 1e-6, rtol=0
        )


@every_family
@every_head
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 16, 16), r"\(2, 4, 16, 16\).*`num_channels` = 3"),
        ((3, 16, 16), r"\(3, 16, 16\).*\(batch_size, 3, height, width\)"),
        ((2, 3, 18, 16), r"18x16 pixels, no multiple of the patch size 4x4.*resize or crop"),
    ],
    ids=str,
)
def test_wrong_pixel_values(build, family, head, shape, message):
    if head == "backbone" and shape[-2] == 18:
        pytest.skip("sees whole patches")
    with pytest.raises(ValueError, match=message):
        build(family, head)(torch.randn(shape), interpolate_pos_encoding=True)


@pytest.mark.parametrize("head", ["encoder", "pretraining"])
@pytest.mark.parametrize("shape", [(2, 15), (2, 4, 4), (16,)], ids=str)
def test_wrong_noise(build, make_images, head, shape):
    model = build(head=head)
    with pytest.raises(ValueError, match=r"`noise` has shape .*expected \(2, 16\)"):
        model(make_images(model.config), noise=torch.rand(shape))


@pytest.mark.parametrize("head", ["encoder", "pretraining"])
def test_noise_of_another_batch_size(build, make_images, head):
    model = build(head=head)
    with pytest.raises(ValueError, match="`noise`"):
        model(make_images(model.config, 3), noise=torch.rand(2, 16))


def test_too_small_an_image_to_mask(build):
    with pytest.raises(ValueError, match=r"`mask_ratio` = 0.75 leaves 0 of these images' 2 patches visible"):
        build()(torch.randn(1, 3, 4, 8), interpolate_pos_encoding=True)


def test_encoder_needs_one_input(build, make_images):
    model = build(head="encoder")
    pixel_values = make_images(model.config)
    embeddings = model.embeddings(pixel_values)
    assert torch.equal(model(inputs_embeds=embeddings).last_hidden_state, model(pixel_values).last_hidden_state)
    for inputs in ({}, {"pixel_values": pixel_values, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="either `pixel_values` or `inputs_embeds`"):
            model(**inputs)


# -- heads ------------------------------------------------------------------------------------------------------------


@every_family
def test_mean_pooling_classifier_normalises_after_pooling(build, make_images, family):
    model = build(family, "classifier", pooling="mean", num_labels=5)
    outputs = model(make_images(model.config), output_hidden_states=True)
    pooled = model.fc_norm(outputs.hidden_states[-1][:, 1:].mean(1))
    torch.testing.assert_close(outputs.logits, model.classifier(pooled))
    assert not any(name.startswith("vit.layernorm") for name in model.state_dict())


@every_family
def test_class_token_classifier(build, make_images, family):
    model = build(family, "classifier", pooling="cls", num_labels=5)
    outputs = model(make_images(model.config), output_hidden_states=True)
    pooled = model.vit.layernorm(outputs.hidden_states[-1])[:, 0]
    torch.testing.assert_close(outputs.logits, model.classifier(pooled))
    assert not any(name.startswith("fc_norm") for name in model.state_dict())


def test_classifier_loss_is_cross_entropy(build, make_images):
    model = build(head="classifier", num_labels=5)
    labels = torch.tensor([4, 0])
    outputs = model(make_images(model.config), labels=labels)
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, labels))
    assert model(make_images(model.config)).loss is None


@every_family
@pytest.mark.parametrize("apply_layernorm", [True, False])
@pytest.mark.parametrize("reshape_hidden_states", [True, False])
def test_backbone_feature_maps(build, make_images, family, apply_layernorm, reshape_hidden_states):
    model = build(
        family,
        "backbone",
        image_size=(8, 16),
        out_features=["stem", "stage2"],
        apply_layernorm=apply_layernorm,
        reshape_hidden_states=reshape_hidden_states,
    )
    assert model.channels == [32, 32]
    outputs = model(make_images(model.config), output_hidden_states=True)
    assert len(outputs.feature_maps) == 2
    for feature_map, hidden_state in zip(outputs.feature_maps, (outputs.hidden_states[i] for i in (0, 2)), strict=True):
        expected = model.layernorm(hidden_state) if apply_layernorm else hidden_state
        if reshape_hidden_states:
            assert feature_map.shape == (2, 32, 2, 4)
            assert torch.equal(feature_map[:, :, 1, 2], expected[:, 1 + 4 + 2])
            feature_map = torch.cat([expected[:, :1], feature_map.flatten(2).transpose(1, 2)], 1)
        torch.testing.assert_close(feature_map, expected)
    assert model(make_images(model.config)).hidden_states is None


# -- training ---------------------------------------------------------------------------------------------------------


def test_drop_path_is_off_in_evaluation_and_right_on_average_in_training(tiny_config, build):
    dropping = build(head="classifier", drop_path_rate=0.5, num_hidden_layers=3)
    keeping = build(head="classifier", num_hidden_layers=3)
    keeping.load_state_dict(dropping.state_dict())
    assert [layer.drop_path_rate for layer in dropping.vit.layers] == [0.0, 0.25, 0.5]
    pixel_values = torch.randn(2, 3, 16, 16)
    assert torch.equal(dropping(pixel_values).logits, keeping(pixel_values).logits)
    assert not torch.equal(dropping.train()(pixel_values).logits, keeping.train()(pixel_values).logits)

    layer = MAELayer(tiny_config(), 32, 4, 64, 1e-6, drop_path_rate=0.25)
    torch.nn.init.zeros_(layer.mlp.fc2.weight)
    torch.nn.init.zeros_(layer.mlp.fc2.bias)  # one branch is left
    tokens = torch.randn(1, 3, 32).expand(4000, -1, -1)
    branch = layer.eval()(tokens)[:1] - tokens[:1]
    shares = ((layer.train()(tokens) - tokens) * branch).sum((1, 2)) / branch.square().sum()
    dropped = shares.abs() < 1e-4
    torch.testing.assert_close(shares[~dropped], torch.full_like(shares[~dropped], 4 / 3), atol=1e-4, rtol=0)
    assert shares.mean().item() == pytest.approx(1.0, abs=0.04)  # 4.4 standard deviations


def test_drop_path_is_the_encoders_alone(build):
    model = build("cl_mae", drop_path_rate=0.5)
    assert {layer.drop_path_rate for layer in [*model.decoder.decoder_layers, *model.masking_module.layers]} == {0.0}


def test_autocast_computes_the_loss_in_float32(build, make_images):
    model = build().train()
    inputs = dict(pixel_values=make_images(model.config), noise=distinct_noise(2, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**inputs)
    outputs.loss.backward()
    assert outputs.loss.dtype == torch.float32
    assert outputs.loss.item() == pytest.approx(model(**inputs).loss.item(), rel=0.02)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_autocast_casts_a_blocks_tokens_once(tiny_config, monkeypatch):
    layer = MAELayer(tiny_config(attn_implementation="eager"), 32, 4, 64, 1e-6)
    tokens = torch.randn(2, 9, 32)

    def run():
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as profile:
            out = layer(tokens)
            out.square().mean().backward()
        casts = sum(event.count for event in profile.key_averages() if event.key == "aten::_to_copy")
        return out, [parameter.grad.clone() for parameter in layer.parameters()], casts

    once, gradients, casts = run()
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # the block's own question alone
    thrice, expected, more = run()
    assert torch.equal(once, thrice)
    assert casts < more
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=0.01 * other.abs().max().item(), rtol=0)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_loss_counts_masked_patches_only(build, make_images, norm_pix_loss):
    model = build(norm_pix_loss=norm_pix_loss)
    pixel_values = make_images(model.config)
    outputs = model(pixel_values, noise=distinct_noise(2, 16))
    targets = patch_targets(pixel_values, (4, 4), norm_pix_loss)
    masked = outputs.mask.bool()
    expected = torch.nn.functional.mse_loss(outputs.logits[masked], targets[masked])
    torch.testing.assert_close(outputs.loss, expected)


@every_family
@every_head
def test_deepcopy_after_a_run(build, make_images, family, head):
    model = build(family, head)
    inputs = dict(pixel_values=make_images(model.config))
    if head == "pretraining":
        inputs["noise"] = distinct_noise(2, 16)
    model(**inputs, output_hidden_states=True)
    duplicate = copy.deepcopy(model)
    torch.testing.assert_close(duplicate(**inputs).to_tuple(), model(**inputs).to_tuple())
    with torch.no_grad():
        model.get_parameter(next(name for name, _ in model.named_parameters())).add_(1)
    assert not torch.equal(next(duplicate.parameters()), next(model.parameters()))


@every_family
def test_models_list_their_blocks_and_input_embeddings(build, family):
    model = build(family)
    assert {type(module).__name__ for module in model.modules()} >= set(model._no_split_modules)
    assert model.vit.get_input_embeddings() is model.vit.embeddings.patch_embeddings
    assert model.main_input_name == "pixel_values"
    assert model.accepts_loss_kwargs is False


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_scores_are_added_whatever_the_attention(tiny_config, implementation):
    """What cannot add to the scores, or not differentiate it, falls back to the fused kernel that can."""
    model = MAEModel(tiny_config()).double()
    tokens = torch.randn(3, 17, 32, dtype=torch.float64)
    weights, outputs = torch.randn_like(tokens), []
    for name in ("eager", implementation):
        model.config._attn_implementation = name
        scores = torch.linspace(-9, 0, 51, dtype=torch.float64).reshape(3, 1, 1, 17).requires_grad_()
        hidden_states = model(inputs_embeds=tokens, attention_bias=scores).last_hidden_state
        outputs.append((hidden_states, *torch.autograd.grad((weights * hidden_states).sum(), scores)))
    assert outputs[0][1].abs().max() > 1e-3
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-10, rtol=0)


def test_a_score_of_minus_infinity_removes_a_token(tiny_config):
    model = MAEModel(tiny_config(attn_implementation="eager")).double()
    tokens = torch.randn(2, 17, 32, dtype=torch.float64)
    scores = torch.zeros(2, 1, 1, 17, dtype=torch.float64)
    scores[..., 10:] = -torch.inf
    hidden_states = model(inputs_embeds=tokens, attention_bias=scores).last_hidden_state[:, :10]
    expected = model(inputs_embeds=tokens[:, :10]).last_hidden_state
    torch.testing.assert_close(hidden_states, expected, atol=1e-12, rtol=0)
