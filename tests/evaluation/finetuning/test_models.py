# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Which weights a classifier starts from, and which of them are trained."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from clmae import FAMILIES
from clmae.evaluation.finetuning import (
    FinetuningArguments,
    LinearLarsArguments,
    LinearProbe,
    from_scratch,
    load_classifier,
)
from clmae.evaluation.finetuning.parameters import layer_ids

from .samples import CLASSES, VIT


@pytest.mark.parametrize("family", FAMILIES)
def test_our_families_get_the_recipe_and_their_own_weights(tmp_path, tiny_config, arguments, family):
    pretrained = FAMILIES[family][2](tiny_config(family, pooling="cls"))
    pretrained.save_pretrained(tmp_path)
    model = load_classifier(tmp_path, arguments(drop_path_rate=0.2), 3, CLASSES)
    assert isinstance(model, FAMILIES[family][3])
    assert model.config.pooling == "mean"
    assert isinstance(model.fc_norm, nn.LayerNorm)
    assert model.vit.layers[-1].drop_path_rate == 0.2
    assert model.config.id2label == {0: "red", 1: "green", 2: "blue"}
    assert model.classifier.weight.abs().max() < 1e-3
    expected = pretrained.vit.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.vit.state_dict().items())
    assert "vit.embeddings.position_embeddings" not in dict(model.named_parameters())
    fresh = from_scratch(model, arguments())
    assert not torch.equal(fresh.vit.layers[0].mlp.fc1.weight, model.vit.layers[0].mlp.fc1.weight)
    assert torch.equal(fresh.vit.embeddings.position_embeddings, model.vit.embeddings.position_embeddings)
    assert torch.equal(fresh.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize("kind", [FinetuningArguments, LinearLarsArguments])
def test_transformers_vit_mae_becomes_ours(tmp_path, arguments, kind):
    torch.manual_seed(0)
    config = ViTMAEConfig(**VIT, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    released = ViTMAEForPreTraining(config).eval()
    with torch.no_grad():
        for parameter in released.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    released.save_pretrained(tmp_path)
    model = load_classifier(tmp_path, arguments(kind), 3).eval()
    released.vit.config.mask_ratio = 0.0
    images = torch.randn(2, 3, 16, 16)
    in_order = torch.arange(16.0).expand(2, -1)
    encoded = released.vit(images, noise=in_order, output_hidden_states=True)
    if kind is LinearLarsArguments:
        found, expected = model.encoder(images).last_hidden_state, encoded.last_hidden_state
    else:
        found, expected = model.vit(images).last_hidden_state, encoded.hidden_states[-1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("encoder", "config"), [(ViTModel, ViTConfig), (Dinov2Model, Dinov2Config)])
def test_transformers_encoders_are_taken(tmp_path, arguments, encoder, config):
    pretrained = encoder(config(**VIT))
    pretrained.save_pretrained(tmp_path)
    model = load_classifier(tmp_path, arguments(trained_blocks=1), 3)
    assert model.classifier.out_features == 3
    weights = pretrained.state_dict()
    inner = model.base_model.state_dict()
    assert all(torch.equal(inner[name], weights[name]) for name in inner if not name.startswith("pooler"))
    probe = load_classifier(tmp_path, arguments(LinearLarsArguments), 3)
    assert probe(torch.randn(2, 3, 16, 16)).logits.shape == (2, 3)


def test_incomplete_checkpoint_is_refused(tmp_path, saved, arguments):
    from safetensors.torch import save_file

    weights = load_file(saved / "model.safetensors")
    del weights["vit.layers.1.mlp.fc1.weight"]
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of its encoder, vit\.layers\.1\.mlp\.fc1\.weight"):
        load_classifier(tmp_path, arguments(), 3)


def test_probe_normalises_without_affine_parameters_and_reads_its_feature(saved, arguments):
    images = torch.randn(8, 3, 16, 16)
    for feature in ("cls", "mean"):
        model = load_classifier(saved, arguments(LinearLarsArguments, feature=feature), 3)
        assert isinstance(model, LinearProbe)
        (norm,) = (part for part in model.modules() if isinstance(part, nn.BatchNorm1d))
        assert norm.affine is False
        assert norm.eps == 1e-6
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}
        model.train()
        model.encoder.eval()
        tokens = model.encoder(images).last_hidden_state
        features = tokens[:, 0] if feature == "cls" else tokens[:, 1:].mean(1)
        expected = (features - features.mean(0)) / (features.var(0, unbiased=False) + 1e-6).sqrt()
        logits = model(images).logits
        torch.testing.assert_close(logits, model.classifier(expected), rtol=1e-4, atol=1e-5)
        assert torch.isfinite(model(images[:1]).logits).all()  # a lone image has no variance


@pytest.mark.parametrize(("trained_blocks", "least_depth"), [(0, 3), (1, 2), (2, 1)])
def test_partial_trains_the_last_blocks_and_the_head(saved, arguments, trained_blocks, least_depth):
    model = load_classifier(saved, arguments(trained_blocks=trained_blocks), 3)
    ids, _ = layer_ids(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, i in ids.items() if i >= least_depth
    }


def test_more_blocks_than_there_are_are_refused(saved, arguments):
    with pytest.raises(ValueError, match="`trained_blocks` is 3, but the model has 2 blocks"):
        load_classifier(saved, arguments(trained_blocks=3), 3)
