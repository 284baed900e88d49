# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""CMAE against the independent reference: its tasks, its two views, and what is left when they are switched off."""

from __future__ import annotations

import math
import re

import pytest
import torch

from clmae import CLMAEForPreTraining, CMAEForPreTraining, MAEForPreTraining
from clmae.modeling.losses import contrastive_loss
from clmae.modeling.masking import keep_lowest
from clmae.modeling.modeling_mae import select_visible

from . import reference
from .models import assert_same, gradients, perturb

OFF = dict(contrastive_loss_weight=0.0, position_loss_weight=0.0)
LEARNED = dict(
    learned_masks=True, masker_num_hidden_layers=2, masker_num_attention_heads=2, masker_intermediate_size=48
)


@pytest.fixture
def build(tiny_config):
    """`build(**fields)`: a tiny CMAE in training mode whose weights are random without zeros."""

    def make(**fields):
        return perturb(CMAEForPreTraining(tiny_config("cmae", **fields)).train())

    return make


@pytest.fixture
def views(make_images):
    """`views(config, batch_size)`: normally distributed pixels `(B, 2, C, H, W)` and noise `(B, 2, N)`."""

    def make(config, batch_size=3, dtype=torch.float32):
        pixel_values = make_images(config, 2 * batch_size, dtype).unflatten(0, (batch_size, 2))
        noise = torch.rand(batch_size, 2, config.num_patches, generator=torch.Generator().manual_seed(7))
        return pixel_values, noise

    return make


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
    pixel_values, noise = views(model.config, batch_size, torch.float64)
    outputs = model(pixel_values, noise)
    expected = reference.cmae_gradients(model.state_dict(), model.config, pixel_values, noise)
    for name in ("loss", "reconstruction_loss", "contrastive_loss", "position_loss", "projections"):
        torch.testing.assert_close(outputs[name], expected[name], atol=1e-11, rtol=0, msg=lambda m, n=name: n + m)
    assert outputs.position_accuracy.item() == pytest.approx(expected["position_accuracy"])
    assert torch.equal(outputs.mask.double(), expected["mask"])
    actual = gradients(model, outputs.loss)
    assert_same({name: actual[name] for name in expected["grads"]}, expected["grads"], atol=1e-11, rtol=0)
    assert len(actual) == len(expected["grads"])


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_views_are_compared_in_float32(build, views, dtype):
    model = build()
    pixel_values, noise = views(model.config, 4)
    exact = model(pixel_values, noise)
    with torch.autocast("cpu", dtype):
        outputs = model(pixel_values, noise)
    assert outputs.projections.dtype == dtype
    for name in ("contrastive_loss", "position_loss", "reconstruction_loss"):
        assert outputs[name].dtype == torch.float32
        assert outputs[name].item() == pytest.approx(exact[name].item(), rel=0.03)
    assert all(torch.isfinite(g).all() for g in gradients(model, outputs.loss).values())
    assert model.to(dtype)(pixel_values, noise).position_loss.dtype == torch.float32


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
    assert_same(gradients(model, ours.loss), gradients(plain, theirs.loss))


def test_two_views_without_tasks_are_a_batch_of_two(build, views):
    model = build(**OFF)
    pixel_values, noise = views(model.config)
    both = model(pixel_values, noise)
    apart = [model(pixel_values[:, i], noise[:, i]) for i in (0, 1)]
    mean = (apart[0].reconstruction_loss + apart[1].reconstruction_loss) / 2
    torch.testing.assert_close(both.reconstruction_loss, mean, atol=1e-6, rtol=0)
    for i in (0, 1):
        torch.testing.assert_close(both.logits[:, i], apart[i].logits, atol=1e-5, rtol=0)
        assert torch.equal(both.mask[:, i], apart[i].mask)
        assert torch.equal(both.ids_restore[:, i], apart[i].ids_restore)


@pytest.mark.parametrize(("off", "left"), [("contrastive", "position"), ("position", "contrastive")])
def test_a_task_of_weight_0_is_not_there(build, views, off, left):
    model = build(**{f"{off}_loss_weight": 0.0})
    pixel_values, noise = views(model.config)
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
    model = build(**LEARNED, **OFF, **fields)
    theirs = CLMAEForPreTraining(tiny_config("cl_mae", **fields)).train()
    theirs.load_state_dict(model.state_dict())
    pixel_values, noise = views(model.config)
    ours = model(pixel_values, noise, curriculum_factor=-0.5)
    expected = theirs(pixel_values.flatten(0, 1), curriculum_factor=-0.5)
    assert torch.equal(ours.loss, expected.loss)
    assert torch.equal(ours.keep_probabilities, expected.keep_probabilities.unflatten(0, (3, 2)))
    assert_same(gradients(model, ours.loss), gradients(theirs, expected.loss))


def test_learned_masks_and_tasks_together(build, views):
    model = build(**LEARNED)
    pixel_values, noise = views(model.config)
    outputs = model(pixel_values, noise, curriculum_factor=-1.0)
    loss = outputs.reconstruction_loss + 0.1 * outputs.position_loss + 0.1 * outputs.contrastive_loss
    backbone = gradients(model, loss)
    assert not any(name.startswith("masking_module.") for name in backbone)
    everything = gradients(model, model(pixel_values, noise, curriculum_factor=-1.0).loss)
    masker = {name: everything.pop(name) for name in list(everything) if name.startswith("masking_module.")}
    assert_same(everything, {name: backbone[name] for name in everything})
    assert all(gradient.any() or name.endswith("k_proj.bias") for name, gradient in masker.items())


# -- positions ----------------------------------------------------------------------------------------------------


def accuracies(model, steps, size=16):
    """Accuracy at each step of training for positions alone, on noise images whose content says nothing of places."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    result = []
    for step in range(steps):
        outputs = model(0.3 * torch.randn(64, 3, size, size, generator=torch.Generator().manual_seed(step)))
        optimizer.zero_grad()
        outputs.position_loss.backward()
        optimizer.step()
        result.append(outputs.position_accuracy.item())
    return result


class GivenPositions(CMAEForPreTraining):
    """Predicts positions that it is given."""

    def visible_tokens(self, step):
        super().visible_tokens(step)  # chooses whose positions are asked for
        return select_visible(step.tokens, step.masking)


@pytest.mark.slow
@pytest.mark.parametrize("model_class", [CMAEForPreTraining, GivenPositions])
def test_withheld_positions_cannot_be_read_off_the_input(tiny_config, model_class):
    """On images without structure nothing but the position tells where a token came from."""
    config = tiny_config("cmae", contrastive_loss_weight=0.0, position_mask_ratio=1.0)
    accuracy = accuracies(perturb(model_class(config).train()), 151)[-1]
    # Chance is 1/16 = 0.0625, of 256 tokens.
    assert accuracy < 0.15 if model_class is CMAEForPreTraining else accuracy > 0.99


@pytest.mark.slow
def test_given_positions_only_exclude_themselves(build):
    """Three quarters withheld, as by default: the rest tells no more than where a token is not."""
    found = accuracies(build(image_size=32, contrastive_loss_weight=0.0), 60, size=32)[20:]
    chance, count = 1 / (64 - 4), 40 * 64 * 12
    assert abs(sum(found) / 40 - chance) < 5 * math.sqrt(chance / count)


def test_position_task_starts_at_chance(tiny_config):
    model = CMAEForPreTraining(tiny_config("cmae", image_size=32, contrastive_loss_weight=0.0)).train()
    accuracy = model(torch.randn(256, 3, 32, 32)).position_accuracy.item()
    count = 256 * 12
    assert abs(accuracy - 1 / 64) < 4 * math.sqrt(1 / 64 / count)


def test_the_share_of_withheld_positions(build):
    model = build(mask_ratio=0.5, position_mask_ratio=0.5)
    noise = torch.rand(6, 16)
    withheld = model.withheld_tokens(noise, keep_lowest(noise, 8))
    assert withheld.shape == (6, 4)
    assert all(len(set(row)) == 4 for row in withheld.tolist())
    assert len({tuple(sorted(row)) for row in withheld.tolist()}) > 1


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "inputs", "message"),
    [
        ((4, 3, 16, 16), {}, r"`pixel_values` has 1 view\(s\).*`contrastive_loss_weight` to 0"),
        ((1, 2, 3, 16, 16), {}, r"`pixel_values` holds one image, .* batch of at least 2"),
        ((3, 2, 5, 16, 16), {}, r"`pixel_values` has shape \(3, 2, 5, 16, 16\); expected \(batch_size, views, 3"),
        (
            (2, 2, 3, 24, 24),
            {"interpolate_pos_encoding": True},
            "`position_loss_weight` is 0.1.*of 16 pixels",
        ),
        ((2, 2, 3, 16, 16), {"masking": "rand"}, "`masking` is 'rand'; choose one of learned, random"),
        ((2, 2, 3, 16, 16), {"masking": "learned"}, "`masking` is 'learned', but `learned_masks` is false"),
        (
            (2, 2, 3, 16, 16),
            {"compute_masker_loss": True},
            "`compute_masker_loss` is true, but `learned",
        ),
    ],
    ids=str,
)
def test_bad_input(build, shape, inputs, message):
    with pytest.raises(ValueError, match=message):
        build()(torch.randn(shape), **inputs)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("shape", [(3, 16), (6, 16), (3, 2, 9)])
def test_noise_of_another_shape(build, views, learned, shape):
    model = build(**(LEARNED if learned else {}))
    pixel_values, _ = views(model.config)
    with pytest.raises(ValueError, match=rf"`noise` has shape {re.escape(str(shape))}; .* give \(3, 2, 16\)"):
        model(pixel_values, torch.rand(shape))


# -- saving -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [MAEForPreTraining, CLMAEForPreTraining])
def test_other_families_load_its_folder_without_its_tasks(build, model_class, tmp_path, tiny_config):
    model = build(**LEARNED)
    model.save_pretrained(tmp_path)
    config = model_class.config_class.from_dict(
        {k: v for k, v in model.config.to_dict().items() if hasattr(model_class.config_class, k) and k != "model_type"}
    )
    loaded, info = model_class.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not info["missing_keys"]
    assert {key.split(".")[0] for key in info["unexpected_keys"]} >= {"projector", "position_head"}
    assert torch.equal(loaded.vit.embeddings.cls_token, model.vit.embeddings.cls_token)
