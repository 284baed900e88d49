# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""MAE against transformers' own and the independent reference; positions, drop path, attention scores, bad input."""

from __future__ import annotations

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from clmae.modeling.modeling_mae import MAELayer, MAEModel, resize_positions

from . import reference
from .models import assert_same, distinct_noise, gradients


def vit_mae_fields(config) -> dict:
    """The fields that transformers' own configuration has too."""
    return {k: v for k, v in config.to_dict().items() if hasattr(ViTMAEConfig, k) and k != "model_type"}


# -- golden -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_equals_transformers_vit_mae(build, norm_pix_loss, dtype, tolerance):
    ours, inputs = build(norm_pix_loss=norm_pix_loss)
    ours.to(dtype).train()
    theirs = ViTMAEForPreTraining(ViTMAEConfig(**vit_mae_fields(ours.config))).to(dtype).train()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    expected, actual = theirs(**inputs), ours(**inputs)
    assert torch.equal(actual.mask, expected.mask.float())
    assert torch.equal(actual.ids_restore, expected.ids_restore)
    for name in ("loss", "logits"):
        torch.testing.assert_close(actual[name], expected[name], atol=tolerance, rtol=0)
    assert actual.reconstruction_loss is actual.loss
    assert_same(gradients(ours, actual.loss), gradients(theirs, expected.loss), atol=tolerance, rtol=0)


@pytest.mark.parametrize("mask_sampler", ["random", "block", "grid"])
def test_equals_the_reference_on_non_square_images_of_any_channels(build, mask_sampler):
    fields = dict(image_size=(8, 12), patch_size=(2, 4), num_channels=5, mask_ratio=0.6, mask_sampler=mask_sampler)
    model, inputs = build(**fields)
    pixel_values, noise = inputs["pixel_values"].double(), inputs["noise"]
    outputs = model.double()(pixel_values, noise=noise)
    if mask_sampler == "random":
        assert torch.equal(outputs.ids_restore, noise.argsort(1).argsort(1))
    expected = reference.mae_forward(model.state_dict(), model.config, pixel_values, outputs.ids_restore)
    assert torch.equal(outputs.mask.double(), expected["mask"])
    for name in ("loss", "logits"):
        torch.testing.assert_close(outputs[name], expected[name], atol=1e-12, rtol=0)


def test_encoder_with_noise_sees_the_visible_patches_only(build):
    model, inputs = build(head="encoder")
    pixel_values, noise = inputs["pixel_values"].double(), distinct_noise(4, 16)
    outputs = model.double()(pixel_values, noise=noise)
    assert outputs.last_hidden_state.shape == (4, 1 + 4, 32)
    assert outputs.mask.sum(1).tolist() == [12] * 4
    masked = outputs.mask.bool().reshape(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    hidden = model(pixel_values.masked_fill(masked, 1e3), noise=noise).last_hidden_state
    assert torch.equal(hidden, outputs.last_hidden_state)
    assert model(pixel_values).mask is None
    assert model(pixel_values).last_hidden_state.shape == (4, 1 + 16, 32)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_encoder_pooling(build, pooling):
    model, inputs = build(head="encoder", pooling=pooling)
    outputs = model(**inputs)
    tokens = outputs.last_hidden_state
    torch.testing.assert_close(outputs.pooler_output, tokens[:, 1:].mean(1) if pooling == "mean" else tokens[:, 0])


def test_masks_are_drawn_anew_and_can_be_seeded(build):
    model, inputs = build()
    state = torch.get_rng_state()
    first, second = (model(inputs["pixel_values"]).mask for _ in range(2))
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(model(inputs["pixel_values"]).mask, first)


# -- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [(8, 8), (6, 10), (2, 3)], ids=str)
def test_positions_are_interpolated_in_two_dimensions(new):
    old = (4, 5)
    positions = reference.sincos_positions(16, *old)[None].float()
    assert resize_positions(positions, old, old) is positions
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
    model, _ = build(head="encoder")
    theirs = ViTMAEModel(ViTMAEConfig(**vit_mae_fields(model.config))).embeddings
    theirs.load_state_dict(model.embeddings.state_dict())
    pixel_values = torch.randn(2, 3, *size)
    patches = model.embeddings.patch_embeddings(pixel_values)
    expected = patches + theirs.interpolate_pos_encoding(patches, *size)[:, 1:]
    actual = model.embeddings(pixel_values, interpolate_pos_encoding=True)
    torch.testing.assert_close(actual[:, 1:], expected, atol=1e-6, rtol=0)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["encoder", "pretraining"])
@pytest.mark.parametrize("shape", [(4, 15), (4, 4, 4), (16,), (3, 16)], ids=str)
def test_wrong_noise(build, head, shape):
    model, inputs = build(head=head)
    with pytest.raises(ValueError, match=r"`noise` has shape .*expected \(4, 16\)"):
        model(inputs["pixel_values"], noise=torch.rand(shape))


def test_too_small_an_image_to_mask(build):
    with pytest.raises(ValueError, match=r"`mask_ratio` = 0.75 leaves 0 of these images' 2 patches visible"):
        build()[0](torch.randn(1, 3, 4, 8), interpolate_pos_encoding=True)


def test_encoder_needs_one_input(build):
    model, inputs = build(head="encoder")
    embeddings = model.embeddings(**inputs)
    assert_same(model(inputs_embeds=embeddings), model(**inputs))
    for wrong in ({}, {**inputs, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="either `pixel_values` or `inputs_embeds`"):
            model(**wrong)


# -- blocks -----------------------------------------------------------------------------------------------------------


def test_drop_path_is_off_in_evaluation_and_right_on_average_in_training(tiny_config, build):
    dropping, inputs = build(head="classifier", drop_path_rate=0.5, num_hidden_layers=3)
    keeping, _ = build(head="classifier", num_hidden_layers=3)
    keeping.load_state_dict(dropping.state_dict())
    assert [layer.drop_path_rate for layer in dropping.vit.layers] == [0.0, 0.25, 0.5]
    assert torch.equal(dropping(**inputs).logits, keeping(**inputs).logits)
    assert not torch.equal(dropping.train()(**inputs).logits, keeping.train()(**inputs).logits)

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
    model, _ = build("cl_mae", drop_path_rate=0.5)
    assert {layer.drop_path_rate for layer in [*model.decoder.decoder_layers, *model.masking_module.layers]} == {0.0}


def test_autocast_computes_the_loss_in_float32(build):
    model, inputs = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model.train()(**inputs)
    assert outputs.loss.dtype == torch.float32
    assert outputs.loss.item() == pytest.approx(model(**inputs).loss.item(), rel=0.02)
    assert all(gradient.isfinite().all() for gradient in gradients(model, outputs.loss).values())


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
