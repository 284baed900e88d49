# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What a training step costs, without timing it: FLOPs, parameters without gradient, graph breaks, recompilations."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import clmae
from clmae.training.arguments import PretrainingArguments
from clmae.training.flops import count_step_flops, step_flops

# Family and fields.
FAMILIES = {
    "mae": ("mae", {}),
    "cl_mae": ("cl_mae", {}),
    "cl_mae-tokens": ("cl_mae", {"soft_masking": "tokens"}),
    "cmae": ("cmae", {}),
    "cmae-one-view": ("cmae", {"contrastive_loss_weight": 0.0}),
    "cmae-no-tasks": ("cmae", {"contrastive_loss_weight": 0.0, "position_loss_weight": 0.0}),
    "cmae-learned": ("cmae", {"learned_masks": True}),
    "mae-partial": ("mae", {"prediction_ratio": 0.4}),
    "cl_mae-error": ("cl_mae", {"masker_objective": "error"}),
    "cmae-error": ("cmae", {"learned_masks": True, "masker_objective": "error", "decoded_views": 1}),
}
SMALL = dict(
    **dict(hidden_size=384, num_hidden_layers=3, num_attention_heads=6, intermediate_size=1536),
    **dict(decoder_hidden_size=256, decoder_num_hidden_layers=2, decoder_num_attention_heads=8),
    **dict(decoder_intermediate_size=1024, image_size=64, patch_size=8),
)


def arguments(**fields):
    return PretrainingArguments(output_dir="never", use_cpu=True, **fields)


@pytest.fixture
def make_step(tiny_config, make_images):
    """`make_step(name, batch_size, **fields)`: the model, and its step as `step(factor, with_pass_b)`."""

    def make(name, batch_size=4, **more):
        family, fields = FAMILIES[name]
        config = tiny_config(family, **fields, **more)
        model = clmae.FAMILIES[family][2]._from_config(config, attn_implementation="eager").train()
        images = make_images(config, batch_size)
        images = torch.stack([images, images.flip(-1)], 1) if config.num_views == 2 else images

        def step(factor=1.0, with_pass_b=True):
            inputs = {}
            if config.learns_masks:
                inputs = {"curriculum_factor": torch.tensor(factor), "compute_masker_loss": with_pass_b}
            model(pixel_values=images, **inputs).loss.backward()
            model.zero_grad()

        return model, step

    return make


# -- FLOPs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"), [*((name, {}) for name in FAMILIES), ("mae", SMALL), ("cl_mae", SMALL), ("cmae-error", SMALL)]
)
def test_formula_is_what_is_counted(tiny_config, name, size):
    family, fields = FAMILIES[name]
    config = tiny_config(family, **size, **fields)
    counted = count_step_flops(config, arguments(per_device_train_batch_size=4))
    assert step_flops(config, 4) == pytest.approx(counted, rel=0.03)


@pytest.mark.slow
def test_formula_follows_the_masker_interval(tiny_config):
    config = tiny_config("cl_mae")
    args = arguments(per_device_train_batch_size=4, masker_update_interval=4)
    assert step_flops(config, 4, 4) == pytest.approx(count_step_flops(config, args), rel=0.03)


def test_formula_of_the_published_sizes():
    # By hand for ViT-B/16 at ratio 0.75, in GFLOP forward: 49 and 196 tokens through the encoder, decoder, patches.
    gflops = step_flops(clmae.MAEConfig()) / 1e9
    assert gflops == pytest.approx(3 * (8.61 + 10.80) + 2 * 0.06, rel=0.01)


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_uses_all_parameters(make_step, monkeypatch, name):
    # Several processes then need not look for those without a gradient, at every step (`ddp_find_unused_parameters`).
    model, step = make_step(name)
    monkeypatch.setattr(model, "zero_grad", lambda: None)
    step(with_pass_b=False)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(name.startswith("masking_module.") == (p.grad is None) for name, p in trained.items())
    step()
    assert all(parameter.grad is not None for parameter in trained.values())


# -- compilation ------------------------------------------------------------------------------------------------------


SHALLOW = dict(num_hidden_layers=1, decoder_num_hidden_layers=1)  # tracing takes seconds


def graphs_over_a_curriculum(step, steps=5, interval=2):
    """How many graphs there are after each step of a curriculum from partner to adversary."""
    found = []
    for i in range(steps):
        step(1 - 2 * i / (steps - 1), i % interval == 0)
        found.append(counters["stats"]["unique_graphs"])
    return found


@pytest.fixture
def dynamo():
    """Without what other tests compiled."""
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mae", "cmae"])
def test_random_masks_compile_whole(dynamo, make_step, name):
    model, step = make_step(name, **SHALLOW)
    model.compile(backend="eager", fullgraph=True, dynamic=False)  # raises at a graph break
    assert graphs_over_a_curriculum(step) == [1] * 5


@pytest.mark.slow
def test_learned_masks_compile_in_parts(dynamo, make_step):
    # Not whole: pass B differentiates within the forward pass, which a graph cannot hold. So encoder, decoder and
    # masking module each, for pass A and pass B; the masking module once more for steps without its gradient.
    model, step = make_step("cl_mae", **SHALLOW, masker_num_hidden_layers=1)
    for part in (model.vit, model.decoder, model.masking_module):
        part.compile(backend="eager", fullgraph=True, dynamic=False)
    assert graphs_over_a_curriculum(step) == [5] + [6] * 4
