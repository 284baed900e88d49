# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The golden reference itself: hand-worked values, finite differences, and transformers' own MAE."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings

from clmae.configuration import CLMAEConfig

from . import reference

TINY = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    decoder_hidden_size=8,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=20,
    image_size=8,
    patch_size=2,
    num_channels=3,
    mask_ratio=0.6,  # K = int(16 * 0.4) = 6
)


def tiny_config(**kwargs) -> CLMAEConfig:
    masker = dict(masker_num_hidden_layers=2, masker_num_attention_heads=2, masker_intermediate_size=28)
    return CLMAEConfig(**{**TINY, **masker, **kwargs})


def block_shapes(name: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    shapes = {f"{name}.mlp.fc1.weight": (hidden, width), f"{name}.mlp.fc1.bias": (hidden,)}
    shapes |= {f"{name}.mlp.fc2.weight": (width, hidden), f"{name}.mlp.fc2.bias": (width,)}
    for part in "qkvo":
        shapes |= {
            f"{name}.attention.{part}_proj.weight": (width, width),
            f"{name}.attention.{part}_proj.bias": (width,),
        }
    for norm in ("layernorm_before", "layernorm_after"):
        shapes |= {f"{name}.{norm}.weight": (width,), f"{name}.{norm}.bias": (width,)}
    return shapes


def random_params(config, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random float64 parameters without zeros, so that no term is hidden by its initial value."""
    width, decoder_width, patches = config.hidden_size, config.decoder_hidden_size, config.num_patches
    shapes = {
        "vit.embeddings.cls_token": (1, 1, width),
        "vit.embeddings.position_embeddings": (1, patches + 1, width),
        "vit.embeddings.patch_embeddings.projection.weight": (
            (width, config.num_channels, *reference._two(config.patch_size))
        ),
        "vit.embeddings.patch_embeddings.projection.bias": (width,),
        "vit.layernorm.weight": (width,),
        "vit.layernorm.bias": (width,),
        "decoder.decoder_embed.weight": (decoder_width, width),
        "decoder.decoder_embed.bias": (decoder_width,),
        "decoder.mask_token": (1, 1, decoder_width),
        "decoder.decoder_pos_embed": (1, patches + 1, decoder_width),
        "decoder.decoder_norm.weight": (decoder_width,),
        "decoder.decoder_norm.bias": (decoder_width,),
        "decoder.decoder_pred.weight": (config.patch_dim, decoder_width),
        "decoder.decoder_pred.bias": (config.patch_dim,),
        "masking_module.cls_token": (1, 1, width),
        "masking_module.layernorm.weight": (width,),
        "masking_module.layernorm.bias": (width,),
        "masking_module.head.weight": (patches, width),
        "masking_module.head.bias": (patches,),
    }
    for i in range(2):
        shapes |= block_shapes(f"vit.layers.{i}", width, config.intermediate_size)
        shapes |= block_shapes(f"decoder.decoder_layers.{i}", decoder_width, config.decoder_intermediate_size)
        shapes |= block_shapes(f"masking_module.layers.{i}", width, config.masker_intermediate_size)
    generator = torch.Generator().manual_seed(seed)
    return {k: 0.4 * torch.randn(v, generator=generator, dtype=torch.float64) for k, v in shapes.items()}


def random_images(config, batch: int, seed: int = 1) -> torch.Tensor:
    shape = (batch, config.num_channels, *reference._two(config.image_size))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- geometry ---------------------------------------------------------------------------------------------------


def test_sincos_positions_by_hand():
    positions = reference.sincos_positions(8, 2, 3)  # frequencies 1 and 10000^(-1/2) = 0.01
    assert positions.shape == (7, 8)
    assert positions[0].tolist() == [0.0] * 8
    assert positions[1].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    sin, cos = math.sin, math.cos
    expected = [sin(2), sin(0.02), cos(2), cos(0.02), sin(1), sin(0.01), cos(1), cos(0.01)]  # column 2, row 1
    assert positions[6].tolist() == pytest.approx(expected, abs=1e-15)


def test_sincos_positions_have_the_layout_of_released_weights():
    embeddings = ViTMAEEmbeddings(ViTMAEConfig(**TINY))
    embeddings.initialize_weights()
    torch.testing.assert_close(
        embeddings.position_embeddings[0].double(), reference.sincos_positions(16, 4, 4), atol=1e-6, rtol=0
    )


def test_patch_pixels_order_non_square():
    config = SimpleNamespace(patch_size=(1, 2))
    image = torch.tensor([[[0, 1, 2, 3], [10, 11, 12, 13]], [[100, 101, 102, 103], [110, 111, 112, 113]]])
    assert reference.patch_pixels(config, image).tolist() == [
        [0, 100, 1, 101],
        [2, 102, 3, 103],
        [10, 110, 11, 111],
        [12, 112, 13, 113],
    ]
    config = SimpleNamespace(patch_size=(2, 1))
    assert reference.patch_pixels(config, image)[1].tolist() == [1, 101, 11, 111]


def test_target_is_normalised_by_unbiased_variance():
    image = torch.tensor([[[1.0, 2.0], [3.0, 6.0]]], dtype=torch.float64)  # mean 3, variance 14 / 3
    config = SimpleNamespace(patch_size=2, norm_pix_loss=True)
    scale = math.sqrt(14 / 3 + 1e-6)
    expected = [-2 / scale, -1 / scale, 0, 3 / scale]
    assert reference.target_pixels(config, image)[0].tolist() == pytest.approx(expected, rel=1e-14)
    config.norm_pix_loss = False
    assert reference.target_pixels(config, image)[0].tolist() == [1, 2, 3, 6]


# -- the masking module's terms -------------------------------------------------------------------------------------


def test_gauss_loss_by_hand():
    peak = 0.12 * math.sqrt(2 * math.pi)
    half = torch.full((2, 3), 0.5, dtype=torch.float64)
    assert reference.gauss_loss(half, 0.12).item() == pytest.approx(peak, rel=1e-14)
    m = torch.tensor([[0.5, 0.62], [0.38, 0.26]], dtype=torch.float64)  # 0, 1, 1 and 2 sigma away
    expected = peak * (1 + 2 * math.exp(-0.5) + math.exp(-2)) / 4
    assert reference.gauss_loss(m, 0.12).item() == pytest.approx(expected, rel=1e-13)


def test_kl_loss_by_hand():
    at_ratio = torch.tensor([[0.1, 0.4], [0.25, 0.25]], dtype=torch.float64)
    assert reference.kl_loss(at_ratio, 0.75).item() == pytest.approx(0, abs=1e-15)
    m = torch.tensor([[0.3, 0.7], [0.25, 0.25]], dtype=torch.float64)  # means 1/2 and 1/4
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert reference.kl_loss(m, 0.75, "sum").item() == pytest.approx(expected, rel=1e-14)
    assert reference.kl_loss(m, 0.75, "mean").item() == pytest.approx(expected / 2, rel=1e-14)
    asymmetric = torch.full((1, 4), 0.2, dtype=torch.float64)
    expected = 0.2 * math.log(0.2 / 0.4) + 0.8 * math.log(0.8 / 0.6)
    assert reference.kl_loss(asymmetric, 0.6).item() == pytest.approx(expected, rel=1e-14)


def test_diversity_loss_by_hand():
    m = torch.tensor([[0.1, 0.2], [0.4, 0.6], [0.4, 0.2]], dtype=torch.float64)  # distances 0.5, 0.3, 0.4
    assert reference.diversity_loss(m[:2], 0.1).item() == pytest.approx(math.exp(-0.05), rel=1e-14)
    expected = (math.exp(-0.05) + math.exp(-0.03) + math.exp(-0.04)) / 3
    assert reference.diversity_loss(m, 0.1).item() == pytest.approx(expected, rel=1e-14)
    assert reference.diversity_loss(m[[0, 0]], 0.1).item() == 1
    assert reference.diversity_loss(m[:1], 0.1).item() == 0


def test_curriculum_factor_by_hand():
    for shape in ("linear", "cosine"):
        assert reference.curriculum_factor(0, 5, shape, 0.7, -0.3) == 0.7
        assert reference.curriculum_factor(4, 5, shape, 0.7, -0.3) == -0.3
        assert reference.curriculum_factor(2, 5, shape, 1.0, -1.0) == pytest.approx(0, abs=1e-15)
    assert reference.curriculum_factor(1, 5, "linear", 1.0, -1.0) == 0.5
    assert reference.curriculum_factor(1, 5, "cosine", 1.0, -1.0) == pytest.approx(math.sqrt(0.5), rel=1e-14)
    assert {reference.curriculum_factor(step, 5, "constant", 0.7, -0.3) for step in range(5)} == {0.7}
    assert reference.curriculum_factor(0, 1, "linear", 1.0, -1.0) == 1.0
    with pytest.raises(ValueError, match="`step` is 5"):
        reference.curriculum_factor(5, 5, "linear", 1.0, -1.0)


# -- the autoencoder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_mae_forward_equals_transformers(norm_pix_loss):
    config = ViTMAEConfig(**TINY, norm_pix_loss=norm_pix_loss, layer_norm_eps=1e-6)
    model = ViTMAEForPreTraining(config).double().eval()
    params = {k: v for k, v in random_params(tiny_config()).items() if not k.startswith(reference.MASKER)}
    model.load_state_dict(params, strict=True)
    pixel_values = random_images(config, 3)
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        theirs, ours = model(pixel_values, noise=noise), reference.mae_forward(params, config, pixel_values, noise)
    assert torch.equal(ours["mask"], theirs.mask.double())
    assert torch.equal(ours["ids_restore"], theirs.ids_restore)
    for name in ("logits", "loss"):
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-10, rtol=0)


def test_mae_forward_non_square_follows_the_patch_embedding():
    """2 x 4 patches of 3 x 2 pixels, one channel: a change in a masked pixel changes the error of its patch alone."""
    config = tiny_config(image_size=(6, 8), patch_size=(3, 2), num_channels=1, norm_pix_loss=False, mask_ratio=0.5)
    params, pixel_values = random_params(config), random_images(config, 2)
    noise = torch.arange(8.0).expand(2, 8)  # patches 0 to 3, the upper row, stay visible
    before = reference.mae_forward(params, config, pixel_values, noise)
    assert before["mask"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]] * 2
    assert before["loss"].item() == pytest.approx(before["patch_errors"][:, 4:].mean().item(), rel=1e-14)
    pixel_values[1, 0, 4, 3] += 1.0  # masked: row 4 is in patch row 1, column 3 in patch column 1
    after = reference.mae_forward(params, config, pixel_values, noise)
    assert torch.equal(after["logits"], before["logits"])
    assert (after["patch_errors"] != before["patch_errors"]).nonzero().tolist() == [[1, 5]]


def test_pass_a_keeps_the_largest_probabilities():
    config = tiny_config(mask_ratio=0.75)
    m = torch.linspace(0.9, 0.1, 16, dtype=torch.float64).expand(1, 16)[:, torch.arange(16).roll(5)]
    output = reference.pass_a(random_params(config), config, random_images(config, 1), m)
    assert (output["mask"][0] == 0).nonzero().flatten().tolist() == [5, 6, 7, 8]
    assert output["ids_restore"][0].tolist() == torch.arange(16).roll(5).tolist()


def test_soft_loss_by_hand():
    """A decoder that predicts zero leaves the patches' mean squares as errors, whatever m does to the tokens."""
    config = tiny_config(norm_pix_loss=False)
    params = random_params(config)
    for name in ("decoder.decoder_pred.weight", "decoder.decoder_pred.bias"):
        params[name] = torch.zeros_like(params[name])
    levels = torch.arange(1.0, 33.0, dtype=torch.float64).reshape(2, 1, 4, 4)  # patch i of image b: 16 b + i + 1
    pixel_values = levels.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(2, 3, 8, 8)
    m = torch.ones(2, 16, dtype=torch.float64)
    m[0, 2], m[1, 3] = 0.5, 0.25  # errors 3² and 20², weights 0.5 and 0.75
    expected = (0.5 * 9 + 0.75 * 400) / 1.25
    assert reference.pass_b_soft_loss(params, config, pixel_values, m).item() == pytest.approx(expected, rel=1e-14)


def test_pass_b_scales_tokens_and_uses_no_mask_token():
    config = tiny_config(soft_masking="tokens")
    params, pixel_values = random_params(config), random_images(config, 1)
    ones = torch.ones(1, 16, dtype=torch.float64)
    full = reference.mae_forward(params, SimpleNamespace(**{**config.to_dict(), "mask_ratio": 0.0}), pixel_values, ones)
    soft = reference.pass_b(params, config, pixel_values, ones)
    torch.testing.assert_close(soft["patch_errors"], full["patch_errors"], atol=1e-12, rtol=0)
    # Halving m is halving the tokens: the patch projection and the patches' positions, not the class token.
    halved = {**params}
    for name in (
        "vit.embeddings.patch_embeddings.projection.weight",
        "vit.embeddings.patch_embeddings.projection.bias",
    ):
        halved[name] = params[name] / 2
    positions = params["vit.embeddings.position_embeddings"].clone()
    positions[:, 1:] /= 2
    halved["vit.embeddings.position_embeddings"] = positions
    expected = reference.pass_b(halved, config, pixel_values, ones)
    actual = reference.pass_b(params, config, pixel_values, ones / 2)
    torch.testing.assert_close(actual["logits"], expected["logits"], atol=1e-12, rtol=0)


def test_pass_b_by_attention_is_pass_a_where_m_is_0_or_1():
    config = tiny_config(soft_masking="attention")
    params, pixel_values = random_params(config), random_images(config, 2)
    m = torch.rand(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    hard = reference.pass_a(params, config, pixel_values, m)
    soft = reference.pass_b(params, config, pixel_values, 1 - hard["mask"])
    assert soft["loss"].item() == pytest.approx(hard["loss"].item(), abs=1e-6)  # 1e-8 a hidden token, times 2 x 16
    between = reference.pass_b(params, config, pixel_values, m)
    assert abs(between["loss"].item() - hard["loss"].item()) > 1e-4


def test_keep_probabilities_equal_transformers_encoder():
    """The masking module is an encoder with its own blocks and class token, and a head on that class token."""
    config = tiny_config()
    params, pixel_values = random_params(config), random_images(config, 2)
    params["vit.embeddings.position_embeddings"][:, 0] = 0.0
    sizes = dict(num_attention_heads=2, intermediate_size=28, layer_norm_eps=1e-5, mask_ratio=0.0)
    model = ViTMAEModel(ViTMAEConfig(**{**TINY, **sizes})).double().eval()
    state = {k.removeprefix("vit."): v for k, v in params.items() if k.startswith("vit.embeddings.")}
    state |= {k.removeprefix("masking_module."): v for k, v in params.items() if k.startswith(reference.MASKER)}
    state["embeddings.cls_token"] = state.pop("cls_token")
    head_weight, head_bias = state.pop("head.weight"), state.pop("head.bias")
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        class_token = model(pixel_values).last_hidden_state[:, 0]
    expected = 1 / (1 + torch.exp(-(class_token @ head_weight.T + head_bias)))
    m = reference.keep_probabilities(params, config, pixel_values)
    torch.testing.assert_close(m, expected, atol=1e-12, rtol=0)


def test_each_network_has_its_own_layer_norm_eps():
    config, other, masker = tiny_config(), tiny_config(layer_norm_eps=1e-2), tiny_config(masker_layer_norm_eps=1e-2)
    params, pixel_values = random_params(config), random_images(config, 1)
    m = reference.keep_probabilities(params, config, pixel_values)
    assert torch.equal(m, reference.keep_probabilities(params, other, pixel_values))
    assert not torch.equal(m, reference.keep_probabilities(params, masker, pixel_values))
    loss = reference.pass_b_soft_loss(params, config, pixel_values, m)
    assert not torch.equal(loss, reference.pass_b_soft_loss(params, other, pixel_values, m))
    assert torch.equal(loss, reference.pass_b_soft_loss(params, masker, pixel_values, m))


# -- gradients ----------------------------------------------------------------------------------------------------


def central_difference(function, params: dict[str, torch.Tensor], name: str, index: int, step: float = 1e-5) -> float:
    values = []
    for sign in (1, -1):
        moved = params[name].clone()
        moved.view(-1)[index] += sign * step
        with torch.no_grad():
            values.append(function({**params, name: moved}).item())
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("masking_module.head.weight", 37),
        ("masking_module.layers.0.attention.q_proj.weight", 11),
        ("masking_module.cls_token", 3),
    ],
)
def test_masker_gradient_is_the_derivative_of_its_loss(name, index):
    config = tiny_config(kl_reduction="sum", kl_loss_weight=0.3, gauss_loss_weight=0.8, diversity_loss_weight=2.0)
    params, pixel_values = random_params(config), random_images(config, 3)

    def terms(params):
        m = reference.keep_probabilities(params, config, pixel_values)
        return {
            "soft_reconstruction_loss": reference.pass_b_soft_loss(params, config, pixel_values, m),
            "gauss_loss": reference.gauss_loss(m, 0.12),
            "kl_loss": reference.kl_loss(m, 0.6, "sum"),
            "diversity_loss": reference.diversity_loss(m, 0.1),
        }

    output = reference.cl_mae_gradients(params, config, pixel_values, -0.5)
    expected = {t: central_difference(lambda p, t=t: terms(p)[t], params, name, index) for t in reference.TERMS}
    for term in reference.TERMS:
        actual = output["term_grads"][term][name].view(-1)[index].item()
        assert abs(expected[term]) > 1e-6
        assert actual == pytest.approx(expected[term], rel=1e-5, abs=1e-9), term
    total = dict(zip(reference.TERMS, (-0.5, 0.8, 0.3, 2.0), strict=True))
    combined = sum(weight * expected[term] for term, weight in total.items())
    assert output["grads"][name].view(-1)[index].item() == pytest.approx(combined, rel=1e-5, abs=1e-9)
    losses = sum(weight * output[term] for term, weight in total.items())
    assert output["masking_loss"].item() == pytest.approx(losses.item(), rel=1e-13)
    assert output["loss"].item() == pytest.approx((output["reconstruction_loss"] + losses).item(), rel=1e-13)


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("vit.embeddings.patch_embeddings.projection.weight", 50),
        ("vit.layers.1.mlp.fc1.weight", 7),
        ("decoder.mask_token", 2),
    ],
)
def test_backbone_gradient_is_the_derivative_of_reconstruction_only(name, index):
    config = tiny_config()
    params, pixel_values = random_params(config), random_images(config, 2)
    m = reference.keep_probabilities(params, config, pixel_values)
    output = reference.cl_mae_gradients(params, config, pixel_values, 1.0)
    assert torch.equal(output["keep_probabilities"], m)
    expected = central_difference(lambda p: reference.pass_a(p, config, pixel_values, m)["loss"], params, name, index)
    assert abs(expected) > 1e-6
    assert output["grads"][name].view(-1)[index].item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_gradients_name_every_trained_parameter():
    config = tiny_config()
    params = random_params(config)
    output = reference.cl_mae_gradients(params, config, random_images(config, 1), 1.0)
    assert set(output["grads"]) == set(params) - set(reference.FIXED)
    masker = {name for name in params if name.startswith(reference.MASKER)}
    assert all(set(output["term_grads"][term]) == masker for term in reference.TERMS)
    assert all(not grad.any() for grad in output["term_grads"]["diversity_loss"].values())  # one image
