# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""CMAE against the independent reference: its tasks, its two views, and what is left when they are switched off."""

from __future__ import annotations

import math
import re

import pytest
import torch
from transformers import AutoModelForPreTraining

from clmae import CLMAEForPreTraining, CMAEForPreTraining, CMAEModel, MAEForPreTraining
from clmae.modeling.losses import contrastive_loss

from . import reference

OFF = dict(contrastive_loss_weight=0.0, position_loss_weight=0.0)
MASKER_FIELDS = dict(masker_num_hidden_layers=2, masker_num_attention_heads=2, masker_intermediate_size=48)


@pytest.fixture
def build(tiny_config):
    """`build(**fields)`: a tiny CMAE in training mode whose weights are random without zeros."""

    def make(model_class=CMAEForPreTraining, family="cmae", **fields):
        model = model_class(tiny_config(family, **fields)).train()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def views(make_images):
    """`views(config, batch_size)`: normally distributed pixels `(B, 2, C, H, W)` and noise `(B, 2, N)`."""

    def make(config, batch_size=3, dtype=torch.float64):
        pixel_values = make_images(config, 2 * batch_size, dtype).unflatten(0, (batch_size, 2))
        noise = torch.rand(batch_size, 2, config.num_patches, generator=torch.Generator().manual_seed(7))
        return pixel_values, noise

    return make


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# -- golden -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(norm_pix_loss=False, contrastive_loss_weight=1.7, position_loss_weight=0.6, contrastive_temperature=0.5),
        dict(image_size=(8, 12), patch_size=(2, 4), num_channels=5, mask_ratio=0.4, position_mask_ratio=0.5),
        dict(position_mask_ratio=1.0, qkv_bias=False),
    ],
    ids=["default", "weights", "non-square", "all positions withheld"],
)
@pytest.mark.parametrize("batch_size", [2, 5])
def test_equals_the_reference(build, views, batch_size, fields):
    model = build(**fields).double()
    pixel_values, noise = views(model.config, batch_size)
    outputs = model(pixel_values, noise)
    expected = reference.cmae_gradients(model.state_dict(), model.config, pixel_values, noise)
    for name in ("loss", "reconstruction_loss", "contrastive_loss", "position_loss", "projections"):
        torch.testing.assert_close(outputs[name], expected[name], atol=1e-11, rtol=0, msg=lambda m, n=name: n + m)
    assert outputs.position_accuracy.item() == pytest.approx(expected["position_accuracy"])
    assert torch.equal(outputs.mask.double(), expected["mask"])
    actual = gradients(model, outputs.loss)
    assert actual.keys() == expected["grads"].keys()
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected["grads"][name], atol=1e-11, rtol=0, msg=lambda m, n=name: n + m)


def test_contrastive_loss_by_hand():
    first = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    second = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # Similarities [[1, 1], [0, 0]] / 0.5: rows are undecided; columns say the first, which is right once.
    rows = math.log(2)
    columns = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))) / 2
    assert contrastive_loss(first, second, 0.5).item() == pytest.approx((rows + columns) / 2)


def test_perfect_views_have_no_loss_at_low_temperature():
    vectors = torch.eye(4)
    assert contrastive_loss(vectors, 5 * vectors, 0.01).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_contrast_is_computed_in_float32(dtype):
    first, second = torch.randn(2, 6, 8).to(dtype)
    expected = contrastive_loss(first.float(), second.float(), 0.1)
    for vectors in ((first, second), (first.float(), second.float())):
        with torch.autocast("cpu", dtype):
            assert torch.equal(contrastive_loss(*vectors, 0.1), expected)
        assert torch.equal(contrastive_loss(*vectors, 0.1), expected)


def test_positions_are_scored_in_float32(build, views):
    model = build().bfloat16()
    pixel_values, noise = views(model.config, 4, torch.float32)
    outputs = model(pixel_values, noise)
    assert {outputs[name].dtype for name in ("position_loss", "contrastive_loss")} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_views_are_compared_in_float32(build, views, dtype):
    model = build()
    pixel_values, noise = views(model.config, 4, torch.float32)
    exact = model(pixel_values, noise)
    with torch.autocast("cpu", dtype):
        outputs = model(pixel_values, noise)
    assert outputs.projections.dtype == dtype
    assert outputs.contrastive_loss.dtype == torch.float32
    for name in ("contrastive_loss", "position_loss", "reconstruction_loss"):
        assert outputs[name].item() == pytest.approx(exact[name].item(), rel=0.03)
    assert all(torch.isfinite(g).all() for g in gradients(model, outputs.loss).values())


# -- composition ------------------------------------------------------------------------------------------------------


def test_without_tasks_it_is_mae(build, tiny_config, make_images):
    model = build(**OFF).double()
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"vit", "decoder"}
    plain = MAEForPreTraining(tiny_config()).double().train()
    plain.load_state_dict(model.state_dict())
    pixel_values = make_images(model.config, 3, torch.float64)
    noise = torch.rand(3, 16)
    ours, theirs = model(pixel_values, noise), plain(pixel_values, noise)
    for name in ("loss", "logits", "mask", "ids_restore"):
        assert torch.equal(ours[name], theirs[name]), name
    assert {k: v for k, v in ours.items() if k not in theirs} == {}
    expected = gradients(plain, theirs.loss)
    for name, gradient in gradients(model, ours.loss).items():
        assert torch.equal(gradient, expected[name]), name


def test_two_views_without_tasks_are_a_batch_of_two(build, views):
    model = build(**OFF).double()
    pixel_values, noise = views(model.config)
    both = model(pixel_values, noise)
    apart = [model(pixel_values[:, i], noise[:, i]) for i in (0, 1)]
    mean = (apart[0].reconstruction_loss + apart[1].reconstruction_loss) / 2
    torch.testing.assert_close(both.reconstruction_loss, mean, atol=1e-12, rtol=0)
    for i in (0, 1):
        torch.testing.assert_close(both.logits[:, i], apart[i].logits, atol=1e-12, rtol=0)
        assert torch.equal(both.mask[:, i], apart[i].mask)
        assert torch.equal(both.ids_restore[:, i], apart[i].ids_restore)


@pytest.mark.parametrize(("off", "left"), [("contrastive", "position"), ("position", "contrastive")])
def test_a_task_of_weight_0_is_not_there(build, views, off, left):
    model = build(**{f"{off}_loss_weight": 0.0})
    pixel_values, noise = views(model.config, dtype=torch.float32)
    outputs = model(pixel_values, noise)
    assert f"{off}_loss" not in outputs
    assert outputs.loss.item() == pytest.approx((outputs.reconstruction_loss + 0.1 * outputs[f"{left}_loss"]).item())
    assert set(gradients(model, outputs.loss)) == {n for n, p in model.named_parameters() if p.requires_grad}


def test_evaluation_gives_all_positions_and_needs_one_view(build, make_images, tiny_config):
    model = build().eval()
    plain = MAEForPreTraining(tiny_config()).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    pixel_values, noise = make_images(model.config, 1), torch.rand(1, 16)
    outputs = model(pixel_values, noise)
    assert torch.equal(outputs.loss, plain(pixel_values, noise).loss)
    assert "position_loss" not in outputs
    asked = model(pixel_values.expand(2, 2, -1, -1, -1), noise.expand(2, 2, -1), compute_task_losses=True)
    assert asked.keys() >= {"position_loss", "contrastive_loss"}


def test_learned_masks_are_cl_maes(build, views, tiny_config):
    fields = dict(soft_masking="attention", diversity_loss_weight=0.3)
    model = build(learned_masks=True, **MASKER_FIELDS, **OFF, **fields).double()
    theirs = CLMAEForPreTraining(tiny_config("cl_mae", **fields)).double().train()
    theirs.load_state_dict(model.state_dict())
    pixel_values, noise = views(model.config)
    ours = model(pixel_values, noise, curriculum_factor=-0.5)
    expected = theirs(pixel_values.flatten(0, 1), curriculum_factor=-0.5)
    assert torch.equal(ours.loss, expected.loss)
    assert torch.equal(ours.keep_probabilities, expected.keep_probabilities.unflatten(0, (3, 2)))
    wanted = gradients(theirs, expected.loss)
    for name, gradient in gradients(model, ours.loss).items():
        assert torch.equal(gradient, wanted[name]), name


def test_learned_masks_and_tasks_together(build, views):
    model = build(learned_masks=True, **MASKER_FIELDS).double()
    pixel_values, noise = views(model.config)
    outputs = model(pixel_values, noise, curriculum_factor=-1.0)
    backbone = outputs.reconstruction_loss + 0.1 * outputs.contrastive_loss + 0.1 * outputs.position_loss
    own = gradients(model, backbone)
    assert not any(name.startswith("masking_module.") for name in own)
    everything = gradients(model, model(pixel_values, noise, curriculum_factor=-1.0).loss)
    for name, gradient in everything.items():
        if name.startswith("masking_module."):
            assert gradient.abs().max() > 0 or name.endswith("k_proj.bias"), name
        else:
            assert torch.equal(gradient, own[name]), name


# -- positions ----------------------------------------------------------------------------------------------------


def accuracy_after(model, steps):
    """Accuracy on new noise images, whose content says nothing about places, after training the tasks' part alone."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps + 1):
        pixel_values = 0.3 * torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        outputs = model(pixel_values)
        optimizer.zero_grad()
        outputs.position_loss.backward()
        optimizer.step()
    return outputs.position_accuracy.item()


def test_withheld_positions_cannot_be_read_off_the_input(build, monkeypatch):
    """On images without structure nothing but the position tells where a token came from."""
    torch.manual_seed(0)
    withheld = accuracy_after(build(contrastive_loss_weight=0.0, position_mask_ratio=1.0), 150)
    assert withheld < 0.15  # chance is 1/16 = 0.0625, of 256 tokens

    def give(self, pixel_values, visible, *rest):
        _, withheld = original(self, pixel_values, visible, *rest)
        return visible, withheld

    original = CMAEForPreTraining.withhold_positions
    monkeypatch.setattr(CMAEForPreTraining, "withhold_positions", give)
    assert accuracy_after(build(contrastive_loss_weight=0.0, position_mask_ratio=1.0), 150) > 0.99


def test_given_positions_only_exclude_themselves(build):
    """Three quarters withheld, as by default: the rest tells no more than where a token is not."""
    torch.manual_seed(0)
    model = build(image_size=32, contrastive_loss_weight=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    found = []
    for step in range(60):
        pixel_values = 0.3 * torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        outputs = model(pixel_values)
        optimizer.zero_grad()
        outputs.position_loss.backward()
        optimizer.step()
        found.append(outputs.position_accuracy.item())
    chance, count = 1 / (64 - 4), 40 * 64 * 12
    assert abs(sum(found[20:]) / 40 - chance) < 5 * math.sqrt(chance / count)


def test_position_task_starts_at_chance(tiny_config):
    model = CMAEForPreTraining(tiny_config("cmae", image_size=32, contrastive_loss_weight=0.0)).train()
    accuracy = model(torch.randn(256, 3, 32, 32)).position_accuracy.item()
    count = 256 * 12
    assert abs(accuracy - 1 / 64) < 4 * math.sqrt(1 / 64 / count)


def test_the_share_of_withheld_positions(build, views):
    model = build(mask_ratio=0.5, position_mask_ratio=0.5).double()
    pixel_values, noise = views(model.config)
    calls = []
    original = model.withhold_positions
    model.withhold_positions = lambda *args: calls.append(original(*args)) or calls[-1]
    model(pixel_values, noise)
    ((_, withheld),) = calls
    assert withheld.shape == (6, 4)
    assert all(len(set(row)) == 4 for row in withheld.tolist())
    assert len({tuple(sorted(row)) for row in withheld.tolist()}) > 1


# -- bad input ----------------------------------------------------------------------------------------------------


def test_one_view_cannot_be_contrasted(build, make_images):
    model = build()
    with pytest.raises(ValueError, match=r"`pixel_values` has 1 view\(s\).*`contrastive_loss_weight` to 0"):
        model(make_images(model.config, 4))


def test_one_image_cannot_be_contrasted(build, views):
    model = build()
    with pytest.raises(ValueError, match=r"`pixel_values` holds one image, .* batch of at least 2"):
        model(*views(model.config, 1, torch.float32))


def test_no_masking_module_no_learned_masks(build, views):
    model = build()
    with pytest.raises(ValueError, match=r"`masking` is 'rand'; choose one of learned, random"):
        model(*views(model.config, dtype=torch.float32), masking="rand")
    with pytest.raises(ValueError, match=r"`learned_masks` is false"):
        model(*views(model.config, dtype=torch.float32), masking="learned")
    with pytest.raises(ValueError, match=r"`compute_masker_loss` is true, but `learned_masks` is false"):
        model(*views(model.config, dtype=torch.float32), compute_masker_loss=True)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("shape", [(3, 16), (6, 16), (3, 2, 9)])
def test_noise_of_another_shape(build, views, learned, shape):
    model = build(**(dict(learned_masks=True, **MASKER_FIELDS) if learned else {}))
    pixel_values, _ = views(model.config, 3, torch.float32)
    with pytest.raises(ValueError, match=rf"`noise` has shape {re.escape(str(shape))}; .* give \(3, 2, 16\)"):
        model(pixel_values, torch.rand(shape))


def test_wrong_channels_are_reported_as_they_were_given(build):
    with pytest.raises(
        ValueError, match=r"`pixel_values` has shape \(3, 2, 5, 16, 16\); expected \(batch_size, views, 3"
    ):
        build()(torch.randn(3, 2, 5, 16, 16))


def test_positions_need_the_configured_size(build):
    model = build(contrastive_loss_weight=0.0)
    with pytest.raises(ValueError, match=r"`position_loss_weight` is 0.1, which needs images of 16 pixels"):
        model(torch.randn(2, 3, 24, 24), interpolate_pos_encoding=True)


# -- saving -----------------------------------------------------------------------------------------------------------


def test_round_trip(build, views, tmp_path):
    model = build(learned_masks=True, **MASKER_FIELDS)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, CMAEForPreTraining)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixel_values, noise = views(model.config, dtype=torch.float32)
    assert torch.equal(loaded.train()(pixel_values, noise).loss, model(pixel_values, noise).loss)


@pytest.mark.parametrize("model_class", [CMAEModel, MAEForPreTraining, CLMAEForPreTraining])
def test_other_models_load_its_folder_without_its_tasks(build, model_class, tmp_path, tiny_config):
    model = build(learned_masks=True, **MASKER_FIELDS)
    model.save_pretrained(tmp_path)
    config = model_class.config_class.from_dict(
        {k: v for k, v in model.config.to_dict().items() if hasattr(model_class.config_class, k) and k != "model_type"}
    )
    loaded, info = model_class.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    encoder = loaded if model_class is CMAEModel else loaded.vit
    assert torch.equal(encoder.embeddings.cls_token, model.vit.embeddings.cls_token)
