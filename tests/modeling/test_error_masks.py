# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Masks drawn by predicted errors (`masker_objective="error"`), the decoder on a part of the patches or views."""

from __future__ import annotations

import itertools

import pytest
import torch

import clmae
from clmae.modeling.losses import error_prediction_loss, masked_mean, patch_errors, patch_targets
from clmae.modeling.masking import gumbel_scores, keep_lowest, random_scores
from clmae.modeling.modeling_mae import PretrainingStep, sample_masking

FAMILIES = {"cl_mae": {}, "cmae": {"learned_masks": True, "contrastive_loss_weight": 0, "position_loss_weight": 0}}
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def build(tiny_config):
    """`build(family, **fields)`: an autoencoder in training mode whose masks are drawn by predicted errors."""

    def make(family="cl_mae", **fields):
        torch.manual_seed(0)
        learned = FAMILIES.get(family, {}) | {"masker_objective": "error"} if family in FAMILIES else {}
        return clmae.FAMILIES[family][2](tiny_config(family, **(learned | fields))).train()

    return make


# -- functions --------------------------------------------------------------------------------------------------------


def test_patches_are_drawn_without_replacement_by_their_weights():
    weights, draws = torch.tensor([1.0, 2.0, 3.0, 6.0]), 40_000
    noise = torch.rand(draws, 4, generator=torch.Generator().manual_seed(0))
    masking = keep_lowest(gumbel_scores(noise, weights.log().expand(draws, -1)), 2)
    visible = 1 - masking.mask.mean(0)
    # P(i is among the two): first, or second after j.
    share = weights / weights.sum()
    pairs = itertools.permutations(range(4), 2)
    expected = torch.zeros(4)
    for first, second in pairs:
        probability = share[first] * share[second] / (1 - share[first])
        expected[first] += probability
        expected[second] += probability
    assert torch.allclose(visible, expected, atol=4 * 0.5 / draws**0.5)


def test_equal_preferences_are_random_masks():
    noise = torch.rand(8, 16, generator=torch.Generator().manual_seed(0))
    drawn = keep_lowest(gumbel_scores(noise, torch.full_like(noise, 2.0)), 4)
    assert torch.equal(drawn.ids_restore, keep_lowest(random_scores(noise, (4, 4), 4), 4).ids_restore)
    assert keep_lowest(gumbel_scores(torch.zeros(1, 4), torch.zeros(1, 4)), 2).mask.sum() == 2


def test_error_prediction_loss_by_hand():
    errors = torch.tensor([[1.0, torch.e**2, 5.0]]) - 1e-6  # logarithms 0 and 2 are masked: mean 1, deviation 1
    mask, predictions = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[0.5, 0.5, 9.0]], requires_grad=True)
    loss = error_prediction_loss(predictions, errors.requires_grad_(), mask)
    assert loss.item() == pytest.approx((1.5**2 + 0.5**2) / 2, abs=1e-5)
    loss.backward()
    assert errors.grad is None
    assert torch.allclose(predictions.grad, torch.tensor([[1.5, -0.5, 0.0]]), atol=1e-5)


# -- the families -----------------------------------------------------------------------------------------------------


@every_family
def test_each_gradient_reaches_its_own_half(build, make_images, family):
    model = build(family)
    pixel_values = make_images(model.config, 4)
    noise = torch.rand(4, model.config.num_patches)
    outputs = model(pixel_values, noise=noise, curriculum_factor=-1.0)
    assert torch.isclose(outputs.loss, outputs.reconstruction_loss + outputs.prediction_loss)
    outputs.loss.backward()
    both = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in both.values())
    model.zero_grad()
    alone = model(pixel_values, noise=noise, curriculum_factor=-1.0, compute_masker_loss=False)
    assert torch.equal(alone.mask, outputs.mask)
    assert alone.prediction_loss is None
    alone.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "masking_module" not in name:
            assert torch.equal(parameter.grad, both[name]), name
        elif parameter.requires_grad:
            assert parameter.grad is None, name
            assert both[name].abs().sum() > 0, name


@every_family
def test_partner_masks_what_is_easy_and_adversary_what_is_hard(build, make_images, family):
    model = build(family).eval()
    pixel_values = make_images(model.config, 64)
    torch.nn.init.normal_(model.masking_module.head.weight)  # predictions that differ
    noise = torch.rand(64, model.config.num_patches)
    masked = {}
    for factor in (1.0, 0.0, -1.0):
        outputs = model(pixel_values, noise=noise, curriculum_factor=factor)
        predictions = outputs.predicted_errors
        masked[factor] = masked_mean((predictions - predictions.mean()) / predictions.std(), outputs.mask)
        assert (
            outputs.mask.sum(1) == model.config.num_patches - model.config.num_visible(model.config.num_patches)
        ).all()
    assert masked[1.0] < masked[0.0] - 0.1
    assert masked[-1.0] > masked[0.0] + 0.1
    neutral = model(pixel_values, noise=noise, curriculum_factor=0.0)
    assert torch.equal(neutral.mask, model(pixel_values, noise=noise, masking="random").mask)


@every_family
def test_any_image_size(build, family):
    model = build(family).eval()
    size = model.config.image_size * 2
    outputs = model(torch.rand(2, model.config.num_channels, size, size), interpolate_pos_encoding=True)
    assert outputs.predicted_errors.shape == (2, 4 * model.config.num_patches)


@pytest.mark.slow
@every_family
def test_the_masking_module_learns_what_is_hard(build, family):
    """Half of each image is smooth, half is noise: after some steps the adversary masks the noise."""
    torch.manual_seed(0)
    model = build(family, norm_pix_loss=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        images = torch.zeros(32, model.config.num_channels, model.config.image_size, model.config.image_size)
        images[..., images.shape[-1] // 2 :] = torch.randn_like(images[..., images.shape[-1] // 2 :])
        model(images, curriculum_factor=-1.0 if step > 40 else 0.0).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    mask = model.eval()(images, curriculum_factor=-1.0).mask.unflatten(1, model.config.grid_size).mean((0, 1))
    half = len(mask) // 2
    assert mask[half:].mean() > mask[:half].mean() + 0.15


# -- parts of the decoder's work --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mae", "cl_mae", "cmae"])
def test_prediction_ratio(build, make_images, family):
    fields = {"contrastive_loss_weight": 0, "position_loss_weight": 0} if family == "cmae" else {}
    model = build(family, prediction_ratio=0.5, **fields)
    pixel_values = make_images(model.config, 4)
    noise = torch.rand(4, model.config.num_patches)
    outputs = model(pixel_values, noise=noise)
    num_masked = int(outputs.mask[0].sum())
    assert outputs.ids_predicted.shape == (4, round(num_masked / 2))
    assert (outputs.mask.gather(1, outputs.ids_predicted) == 1).all()
    assert all(len(set(ids)) == len(ids) for ids in outputs.ids_predicted.tolist())
    targets = patch_targets(pixel_values, (model.config.patch_size,) * 2, model.config.norm_pix_loss)
    chosen = targets.gather(1, outputs.ids_predicted.unsqueeze(-1).expand(-1, -1, targets.shape[-1]))
    assert torch.isclose(outputs.reconstruction_loss, patch_errors(outputs.logits, chosen).mean())
    whole = model.eval()(pixel_values, noise=noise)
    assert whole.ids_predicted is None
    assert whole.logits.shape[1] == model.config.num_patches


def test_predicted_patches_are_uniform_among_the_masked(build):
    model = build("mae", prediction_ratio=0.25, mask_sampler="block")
    noise = torch.rand(4000, model.config.num_patches, generator=torch.Generator().manual_seed(0))
    step = PretrainingStep(torch.zeros(4000, 0), noise)
    step.masking = chosen = sample_masking(model.config, noise, 4000, model.config.grid_size)
    ids = model.predicted_patches(step)
    times = torch.zeros_like(chosen.mask).scatter(1, ids, 1.0)
    assert (times * (1 - chosen.mask)).sum() == 0
    share = times.sum(0) / chosen.mask.sum(0)
    assert (share - ids.shape[1] / chosen.mask[0].sum()).abs().max() < 0.05


def test_all_of_the_masked_patches_in_parts_is_all_of_them(build, make_images):
    """The decoder attends among the tokens that it has: with a ratio of nearly 1, it has all of them."""
    model = build("mae", prediction_ratio=0.9999999)
    pixel_values = make_images(model.config, 2)
    noise = torch.rand(2, model.config.num_patches)
    part = model(pixel_values, noise=noise)
    assert part.ids_predicted.shape[1] == int(part.mask[0].sum())
    whole = model.eval()(pixel_values, noise=noise)
    assert torch.isclose(part.loss, whole.loss, rtol=1e-5)


def test_one_decoded_view(build, make_images):
    fields = {"learned_masks": False, "decoded_views": 1, "position_loss_weight": 0, "contrastive_loss_weight": 1.0}
    model = build("cmae", projection_batch_norm=True, **fields)
    pixel_values = make_images(model.config, 8).unflatten(0, (4, 2))
    noise = torch.rand(4, 2, model.config.num_patches)
    outputs = model(pixel_values, noise=noise)
    assert outputs.logits.shape[:2] == (4, 1)
    assert outputs.mask.shape[:2] == (4, 2)
    first = model.eval()(pixel_values[:, 0], noise=noise[:, 0])
    assert torch.isclose(outputs.reconstruction_loss, first.reconstruction_loss, rtol=1e-5)
    assert torch.isclose(outputs.loss, outputs.reconstruction_loss + outputs.contrastive_loss)


# -- siblings of the families -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["cl_mae", "cmae"])
def test_a_family_that_goes_on_from_a_mae_is_what_its_configuration_says(tmp_path, tiny_config, make_images, family):
    """Not what a file of an earlier version would be; and every part that the MAE lacks is initialised."""
    clmae.MAEForPreTraining(tiny_config("mae")).save_pretrained(tmp_path)
    configuration, _, kind, *_ = clmae.FAMILIES[family]
    model = kind.from_pretrained(tmp_path).train()
    fresh = configuration(**tiny_config("mae").to_diff_dict() | {"model_type": family})
    names = ("masker_objective", "masker_num_hidden_layers", "masker_hidden_size")
    assert [getattr(model.config, name) for name in names] == [getattr(fresh, name) for name in names]
    pixel_values = make_images(model.config, 8)
    loss = model(pixel_values.unflatten(0, (4, 2)) if family == "cmae" else pixel_values).loss
    assert loss.isfinite()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    if family == "cmae":
        assert (model.config.projection_batch_norm, model.config.decoded_views) == (True, 1)
        assert torch.equal(model.projector.norm.weight, torch.ones_like(model.projector.norm.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_patches_are_masked_and_predicted_by_chance_whatever_the_noises_type(build, make_images, dtype):
    model = build("mae", prediction_ratio=0.25)
    noise = torch.rand(2000, model.config.num_patches, generator=torch.Generator().manual_seed(0)).to(dtype)
    outputs = model(make_images(model.config, 2000), noise=noise.clamp_max(1 - torch.finfo(dtype).eps / 2))
    assert (outputs.mask.mean(0) - model.config.mask_ratio).abs().max() < 0.05
    share = torch.zeros_like(outputs.mask).scatter(1, outputs.ids_predicted, 1.0).sum(0) / outputs.mask.sum(0)
    assert (share - outputs.ids_predicted.shape[1] / outputs.mask[0].sum()).abs().max() < 0.06


def test_all_that_has_a_row_for_each_view_has_two(build, make_images):
    model = build("cmae", prediction_ratio=0.5, contrastive_loss_weight=0.0)
    outputs = model(make_images(model.config, 6).unflatten(0, (3, 2)))
    rows = ("logits", "mask", "ids_restore", "ids_predicted", "predicted_errors")
    assert all(outputs[name].shape[:2] == (3, 2) for name in rows)
