# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""CL-MAE against the independent reference, and the separation of its two passes."""

from __future__ import annotations

import contextlib

import pytest
import torch

from clmae import CLMAEForPreTraining, MAEForPreTraining
from clmae.configuration.configuration_mae import pair
from clmae.modeling import modeling_cl_mae
from clmae.modeling.losses import patch_targets

from . import reference
from .models import assert_same, perturb

BACKBONE = ("vit.", "decoder.")
WEIGHTS = {name: f"{name}_weight" for name in ("gauss_loss", "kl_loss", "diversity_loss")}
SETTINGS = ["plain", "checkpointing", "autocast", "bfloat16", "accumulation"]
every_setting = pytest.mark.parametrize("setting", SETTINGS)


@pytest.fixture(params=["attention", "tokens"])
def build(tiny_config, request):
    """`build(**fields)`: a tiny CL-MAE in training mode whose weights are random without zeros; both soft maskings."""

    def make(**fields) -> CLMAEForPreTraining:
        fields = {"soft_masking": request.param, **fields}
        model = perturb(CLMAEForPreTraining(tiny_config("cl_mae", **fields)).train())
        with torch.no_grad():
            # Keep probabilities far enough apart that rounding to bfloat16 does not change the choice.
            model.masking_module.head.bias.copy_(torch.linspace(-2, 2, model.config.num_patches).roll(7))
        return model

    return make


def prepare(model, setting: str):
    if setting == "checkpointing":
        model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing
    return model.to(torch.bfloat16) if setting == "bfloat16" else model


def step(model, setting: str, pixel_values, *, term: str = "loss", noise=None, **inputs):
    """One backward pass from the output `term`: each parameter's gradient or `None`, and the micro-batches' outputs."""
    parts = 2 if setting == "accumulation" else 1
    noises = [None] * parts if noise is None else noise.chunk(parts)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if setting == "autocast" else contextlib.nullcontext()
    model.zero_grad(set_to_none=True)
    outputs = []
    for images, image_noise in zip(pixel_values.chunk(parts), noises, strict=True):
        with autocast:
            outputs.append(model(images, noise=image_noise, **inputs))
        (outputs[-1][term] / parts).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, outputs


def halves(gradients):
    """Gradients of encoder and decoder, and of the masking module."""
    backbone = {name: g for name, g in gradients.items() if name.startswith(BACKBONE)}
    masker = {name: g for name, g in gradients.items() if name.startswith(reference.MASKER)}
    assert len(backbone) + len(masker) == len(gradients)
    return backbone, masker


def only(model, *terms: str) -> None:
    """Switches off the weights of all terms but these."""
    for term, weight in WEIGHTS.items():
        if term not in terms:
            setattr(model.config, weight, 0.0)


# -- golden -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    "fields",
    [
        dict(gauss_loss_weight=0.8),
        dict(norm_pix_loss=False, kl_reduction="sum"),
        dict(image_size=(8, 12), patch_size=(2, 4), num_channels=5, mask_ratio=0.6, qkv_bias=False),
    ],
    ids=["normalised", "raw, sum", "non-square, channels"],
)
def test_equals_the_reference(build, make_images, batch_size, fields):
    model = build(**fields).double()
    pixel_values = make_images(model.config, batch_size, torch.float64)
    params = {name: value.clone() for name, value in model.state_dict().items()}
    for factor in (1.0, -0.7):
        expected = reference.cl_mae_gradients(params, model.config, pixel_values, factor)
        actual, (outputs,) = step(model, "plain", pixel_values, curriculum_factor=factor)
        for name in ("loss", "reconstruction_loss", *reference.TERMS, "logits", "keep_probabilities"):
            torch.testing.assert_close(outputs[name], expected[name], atol=1e-11, rtol=0, msg=lambda m, n=name: n + m)
        assert torch.equal(outputs.mask.double(), expected["mask"])
        assert torch.equal(outputs.ids_restore, expected["ids_restore"])
        assert_same(actual, {name: expected["grads"][name] for name in actual}, atol=1e-11, rtol=0)
        assert actual.keys() == expected["grads"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("term", reference.TERMS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_term_has_the_references_gradient(build, make_images, batch_size, term):
    model = build().double()
    pixel_values = make_images(model.config, batch_size, torch.float64)
    params = {name: value.clone() for name, value in model.state_dict().items()}
    expected = reference.cl_mae_gradients(params, model.config, pixel_values, 1.0)["term_grads"][term]
    if (batch_size, term) == (1, "diversity_loss"):
        assert not any(gradient.any() for gradient in expected.values())
    else:
        assert any(gradient.abs().max() > 1e-6 for gradient in expected.values())
    # As an output of its own, and as the one term of the loss.
    alone, _ = step(model, "plain", pixel_values, term=term)
    only(model, term)
    in_loss, _ = step(model, "plain", pixel_values, curriculum_factor=float(term == "soft_reconstruction_loss"))
    weight = getattr(model.config, WEIGHTS[term]) if term in WEIGHTS else 1.0
    for name, gradient in expected.items():
        torch.testing.assert_close(alone[name], gradient, atol=1e-11, rtol=0)
        torch.testing.assert_close(in_loss[name], weight * gradient, atol=1e-11, rtol=0)


def soft_loss(model, pixel_values, keep):
    """L_soft of keep probabilities that the masking module did not choose."""
    targets = patch_targets(pixel_values, pair(model.config.patch_size), model.config.norm_pix_loss)
    embeddings = model.vit.embeddings(pixel_values)
    return model.soft_reconstruction_loss(embeddings, keep, targets, model.config.grid_size)


def test_soft_masking_by_attention_is_the_hard_task_at_the_corners(build, make_images):
    """With m of 0 and 1, L_soft is pass A's loss under that mask; the authors' scaling is far from it."""
    model = build().double()
    pixel_values = make_images(model.config, 3, torch.float64)
    hard = model(pixel_values)
    difference = (soft_loss(model, pixel_values, 1 - hard.mask) - hard.reconstruction_loss).abs().item()
    assert difference < 1e-6 if model.config.soft_masking == "attention" else difference > 1e-2


def test_eager_and_fused_attention_give_the_same_soft_gradient(build, make_images):
    model = build().double()
    pixel_values = make_images(model.config, 3, torch.float64)
    keep = torch.linspace(0.01, 0.99, 48, dtype=torch.float64).reshape(3, 16).requires_grad_()
    gradients = []
    for implementation in ("eager", "sdpa"):
        model.config._attn_implementation = implementation
        gradients += torch.autograd.grad(soft_loss(model, pixel_values, keep), keep)
    assert gradients[0].abs().min() > 1e-9
    torch.testing.assert_close(*gradients, atol=1e-11, rtol=0)


# -- separation -------------------------------------------------------------------------------------------------------


@every_setting
@pytest.mark.parametrize("term", reference.TERMS)
def test_pass_b_leaves_no_gradient_on_the_backbone(build, make_images, setting, term):
    model = prepare(build(), setting)
    backbone, masker = halves(step(model, setting, make_images(model.config, 4), term=term)[0])
    assert all(gradient is None for gradient in backbone.values())
    assert all(gradient.isfinite().all() for gradient in masker.values())
    assert any(gradient.any() for gradient in masker.values())


def test_how_many_parts_pass_b_has(build):
    model = build(mask_ratio=0.75)
    # Batch and tokens of an image: small batches stay whole, and there are no more parts than keep the memory down.
    cases = {(4, 17): 1, (64, 197): 1, (128, 197): 3, (127, 197): 3, (251, 197): 4, (256, 197): 4, (1024, 197): 4}
    assert {case: model.soft_parts(*case) for case in cases} == cases
    assert build(mask_ratio=0.5).soft_parts(1024, 197) == 2


@pytest.mark.slow
@every_setting
@pytest.mark.parametrize("batch_size", [16, 14])
def test_pass_b_in_parts_is_pass_b(build, make_images, monkeypatch, setting, batch_size):
    model = prepare(build(), setting)
    pixel_values = make_images(model.config, batch_size)
    whole, outputs = step(model, setting, pixel_values, curriculum_factor=-0.7)
    monkeypatch.setattr(modeling_cl_mae, "_MIN_TOKENS", 17)
    assert model.soft_parts(batch_size // len(outputs), 17) == 4
    parts, part_outputs = step(model, setting, pixel_values, curriculum_factor=-0.7)
    for output, expected in zip(part_outputs, outputs, strict=True):
        torch.testing.assert_close(output.soft_reconstruction_loss, expected.soft_reconstruction_loss)
    # In half precision the size of a batch decides how its products are rounded, and the processor does.
    largest = max(gradient.abs().max().item() for gradient in whole.values())
    atol = 2 * torch.finfo(torch.bfloat16).eps * largest if setting in ("autocast", "bfloat16") else 1e-7
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=atol, msg=name)


@every_setting
def test_pass_a_leaves_no_gradient_on_the_masking_module(build, make_images, setting):
    model = prepare(build(), setting)
    for inputs in ({"term": "reconstruction_loss"}, {"compute_masker_loss": False}, {"masking": "random"}):
        backbone, masker = halves(step(model, setting, make_images(model.config, 4), **inputs)[0])
        assert all(gradient is None for gradient in masker.values())
        assert all(gradient is not None for gradient in backbone.values())


@every_setting
def test_backbone_gradient_is_that_of_plain_mae_under_the_same_mask(build, make_images, tiny_config, setting):
    model = prepare(build(), setting)
    pixel_values = make_images(model.config, 4)
    joint, outputs = step(model, setting, pixel_values, curriculum_factor=-0.7)
    plain = MAEForPreTraining(tiny_config()).train()
    assert not plain.load_state_dict(model.state_dict(), strict=False).missing_keys
    # Ranks as noise: the same patches in the same order.
    noise = torch.cat([part.ids_restore for part in outputs]) / model.config.num_patches
    expected, plain_outputs = step(prepare(plain, setting), setting, pixel_values, noise=noise)
    for part, plain_part in zip(outputs, plain_outputs, strict=True):
        assert torch.equal(part.mask, plain_part.mask)
        assert torch.equal(part.reconstruction_loss, plain_part.loss)
    backbone, masker = halves(joint)
    assert_same(backbone, expected)
    assert all(gradient is not None for gradient in masker.values())


@every_setting
@pytest.mark.parametrize("as_tensor", [True, False])
def test_the_soft_gradient_flips_sign_exactly(build, make_images, setting, as_tensor):
    model = prepare(build(), setting)
    only(model, "soft_reconstruction_loss")
    pixel_values = make_images(model.config, 4)
    partner, adversary = (
        halves(step(model, setting, pixel_values, curriculum_factor=torch.tensor(f) if as_tensor else f)[0])
        for f in (1.0, -1.0)
    )
    for name, gradient in partner[1].items():
        assert torch.equal(gradient, -adversary[1][name]), name
    assert sum(gradient.any().item() for gradient in partner[1].values()) > len(partner[1]) // 2
    for name, gradient in partner[0].items():
        assert torch.equal(gradient, adversary[0][name]), name


def test_reentrant_checkpointing_is_refused(build, make_images):
    model = build()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RuntimeError, match=r"use_reentrant=True.*use_reentrant=False"):
        model(make_images(model.config))


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_one_large_batch(build, make_images, parts):
    """For the terms that are means over images; L_soft and L_div are not."""
    model = build(diversity_loss_weight=0.0).double()
    pixel_values = make_images(model.config, 8, torch.float64)
    expected, (whole,) = step(model, "plain", pixel_values, curriculum_factor=0.0)
    model.zero_grad()
    outputs = [model(images, curriculum_factor=0.0) for images in pixel_values.chunk(parts)]
    for output in outputs:
        (output.loss / parts).backward()
    for term in ("reconstruction_loss", "gauss_loss", "kl_loss"):
        torch.testing.assert_close(torch.stack([o[term] for o in outputs]).mean(), whole[term], atol=1e-13, rtol=0)
    actual = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same(actual, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("setting", ["autocast", "bfloat16"])
def test_half_precision_is_close(build, make_images, setting):
    model = build()
    pixel_values = make_images(model.config, 4)
    exact, (expected,) = step(model, "plain", pixel_values, curriculum_factor=-0.7)
    rough, (outputs,) = step(prepare(model, setting), setting, pixel_values, curriculum_factor=-0.7)
    assert torch.equal(outputs.mask, expected.mask)
    assert outputs.keep_probabilities.dtype == torch.float32
    for name in ("loss", "reconstruction_loss", *reference.TERMS):
        assert outputs[name].dtype == torch.float32
        assert outputs[name].item() == pytest.approx(expected[name].item(), rel=0.03), name
    for ours, theirs in zip(halves(rough), halves(exact), strict=True):
        flat, expected_flat = (torch.cat([g[name].flatten().float() for name in ours]) for g in (ours, theirs))
        assert torch.nn.functional.cosine_similarity(flat, expected_flat, dim=0) > 0.99


def test_pass_b_keeps_small_gradients_in_float16(build, make_images):
    """It differentiates within the forward pass, where no loss scaling reaches it."""
    model = build(image_size=64, patch_size=16, norm_pix_loss=False)
    with torch.no_grad():
        model.decoder.decoder_pred.weight *= 1e-3
        model.decoder.decoder_pred.bias.zero_()
    pixel_values = 0.01 * make_images(model.config, 4)
    keep = torch.rand(4, 16, requires_grad=True)
    gradients = []
    for half in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss = soft_loss(model, pixel_values, keep)
        gradients += torch.autograd.grad(loss, keep)
    assert (gradients[1] - gradients[0]).norm() < 0.01 * gradients[0].norm()


# -- forward ----------------------------------------------------------------------------------------------------------


def test_learned_masks_keep_the_largest_probabilities(build, make_images):
    model = build()
    outputs = model(make_images(model.config, 3))
    keep = outputs.keep_probabilities
    assert keep.shape == (3, 16)
    assert ((keep > 0) & (keep < 1)).all()
    expected = torch.ones(3, 16).scatter(1, keep.topk(4).indices, 0.0)
    assert torch.equal(outputs.mask, expected)


@pytest.mark.parametrize("mask_sampler", ["random", "block", "grid"])
def test_random_masking_is_plain_mae(build, make_images, tiny_config, mask_sampler):
    model = build(mask_sampler=mask_sampler)
    plain = MAEForPreTraining(tiny_config(mask_sampler=mask_sampler))
    plain.load_state_dict(model.state_dict(), strict=False)
    inputs = dict(pixel_values=make_images(model.config), noise=torch.rand(2, 16))
    expected, outputs = plain(**inputs), model(**inputs, masking="random")
    assert outputs.keys() == expected.keys()  # no term, no keep probability
    assert all(torch.equal(outputs[name], expected[name]) for name in outputs)


def test_random_masking_with_pass_b(build, make_images):
    model = build()
    pixel_values = make_images(model.config)
    outputs = model(pixel_values, masking="random", noise=torch.rand(2, 16), compute_masker_loss=True)
    learned = model(pixel_values)
    assert torch.equal(outputs.keep_probabilities, learned.keep_probabilities)
    assert all(torch.equal(outputs[term], learned[term]) for term in reference.TERMS)
    assert not torch.equal(outputs.mask, learned.mask)


def test_evaluation_computes_pass_b_only_when_asked(build, make_images):
    model = build()
    pixel_values = make_images(model.config)
    trained = model(pixel_values)
    model.eval()
    plain = model(pixel_values)
    assert all(getattr(plain, term) is None for term in reference.TERMS)
    assert torch.equal(plain.loss, plain.reconstruction_loss)
    assert torch.equal(plain.keep_probabilities, trained.keep_probabilities)
    assert not plain.keep_probabilities.requires_grad
    for no_grad in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with no_grad():
            asked = model(pixel_values, compute_masker_loss=True)
        for term in ("loss", *reference.TERMS):  # without gradients another kernel may be chosen
            torch.testing.assert_close(asked[term], trained[term], rtol=1e-6, atol=0)


def test_the_default_factor_is_the_curriculums_start(build, make_images):
    model = build(curriculum_start=-0.5)
    pixel_values = make_images(model.config)
    default = model(pixel_values).loss
    for factor in (-0.5, torch.tensor(-0.5)):
        assert torch.equal(model(pixel_values, curriculum_factor=factor).loss, default)
    assert not torch.equal(model(pixel_values, curriculum_factor=0.5).loss, default)


def test_unknown_masking(build, make_images):
    model = build()
    with pytest.raises(ValueError, match=r"`masking` is 'Learned'; choose one of learned, random"):
        model(make_images(model.config), masking="Learned")


@pytest.mark.parametrize("inputs", [{}, dict(masking="random", compute_masker_loss=True)], ids=str)
def test_the_masking_module_needs_the_configured_size(build, inputs):
    with pytest.raises(ValueError, match=r"needs images of 16 pixels.*16 patches.*`masking='random'`"):
        build()(torch.randn(2, 3, 32, 32), interpolate_pos_encoding=True, **inputs)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_mae_folder_starts_a_cl_mae(build, make_images, tiny_config, tmp_path):
    plain = MAEForPreTraining(tiny_config())
    plain.save_pretrained(tmp_path)
    model, info = CLMAEForPreTraining.from_pretrained(
        tmp_path, output_loading_info=True, masker_num_hidden_layers=2, masker_num_attention_heads=2
    )
    assert model.config.masker_objective == "error"
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"masking_module"}
    assert not info["unexpected_keys"]
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    assert model(make_images(model.config)).predicted_errors.std() > 0.01  # the module is initialised


def test_a_cl_mae_folder_starts_a_mae(build, make_images, tmp_path):
    model = build().eval()
    model.save_pretrained(tmp_path)
    plain, info = MAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert {key.split(".")[0] for key in info["unexpected_keys"]} == {"masking_module"}
    inputs = dict(pixel_values=make_images(model.config), noise=torch.rand(2, 16))
    assert torch.equal(plain(**inputs).loss, model(**inputs, masking="random").loss)
