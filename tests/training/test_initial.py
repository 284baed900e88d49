# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Pretraining from the weights of another model."""

from __future__ import annotations

import pytest
import torch
from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

import clmae
from clmae.configuration.errors import InputError
from clmae.model_cards.record import changed_arguments
from clmae.training.initial import initial_config

from .runs import CONFIG, VARIANTS, tiny_model, tiny_trainer

# As in the configuration's own names, and as transformers' ViTMAE is published.
SHARED = {**CONFIG, "layer_norm_eps": 1e-12, "mask_ratio": 0.5, "norm_pix_loss": True}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """`sources(kind)`: the folder of a model with random weights."""
    folders = {}

    def get(kind):
        if kind not in folders:
            folders[kind] = str(tmp_path_factory.mktemp(kind))
            torch.manual_seed(1)
            model = ViTMAEForPreTraining(ViTMAEConfig(**SHARED)) if kind == "vit_mae" else tiny_model(kind)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(folders[kind])
        return folders[kind]

    return get


@pytest.mark.parametrize("source", ["vit_mae", "mae", "cl_mae-error", "cmae"])
@pytest.mark.parametrize("family", VARIANTS)
def test_a_run_starts_from_the_weights(tmp_path, sources, source, family):
    folder = sources(source)
    size = 24 if family == "mae" else 16  # positions are fixed, so that images may have another size
    config_class, _, model_class, *_ = clmae.FAMILIES[family.partition("-")[0]]
    config = initial_config(config_class, folder, **VARIANTS[family], image_size=size)
    assert config.mask_ratio == (0.5 if source == "vit_mae" else 0.75)
    assert config.image_size == size
    torch.manual_seed(0)
    fresh = model_class(config)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    trainer = tiny_trainer(tmp_path, fresh, init=folder, num_train_epochs=1)
    loader = clmae.MAEForPreTraining if source == "vit_mae" else clmae.FAMILIES[source.partition("-")[0]][2]
    expected = loader.from_pretrained(folder)
    weights, parameters = expected.state_dict(), dict(expected.named_parameters())
    for name, value in trainer.model.state_dict().items():
        # Another masking module is new.
        shared = name in parameters and not (name.startswith("masking_module") and family == "cl_mae")
        assert torch.equal(value, weights[name] if shared else before[name]), name
    assert {name for name, _ in fresh.named_parameters()} >= {n for n in parameters if n.startswith(("vit.", "dec"))}


def test_an_encoder_alone_gets_a_new_decoder(tmp_path, sources):
    clmae.AutoModel.from_pretrained(sources("mae")).save_pretrained(tmp_path / "encoder")
    model = tiny_model("mae")
    decoder = model.decoder.state_dict()["mask_token"].clone()
    trainer = tiny_trainer(tmp_path / "out", model, init=str(tmp_path / "encoder"))
    expected = clmae.MAEForPreTraining.from_pretrained(sources("mae"))
    assert torch.equal(trainer.model.vit.layernorm.weight, expected.vit.layernorm.weight)
    assert torch.equal(trainer.model.decoder.mask_token, decoder)


def test_what_cannot_be_started_from(tmp_path, sources):
    ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tmp_path / "vit")
    for source, message in (
        (tmp_path / "none", "`init` .*none' cannot be loaded"),
        (tmp_path / "vit", "is a vit; give an MAE, CL-MAE or CMAE, or transformers' ViTMAE"),
    ):
        with pytest.raises(InputError, match=message):
            initial_config(clmae.MAEConfig, str(source))
    model = tiny_model("mae", decoder_hidden_size=32)
    with pytest.raises(InputError, match=r"has decoder.\S+ of shape .*, but this model of .*: leave out the options"):
        tiny_trainer(tmp_path, model, init=sources("mae"))


def test_the_record_names_what_a_run_started_from(tmp_path, sources):
    trainer = tiny_trainer(tmp_path, "mae", init=sources("mae"))
    assert changed_arguments(trainer.args)["init"] == sources("mae").rpartition("/")[2]
