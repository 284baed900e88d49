# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Configurations: sizes, defaults, round trips, and every complaint with its field, value and remedy."""

from __future__ import annotations

import dataclasses
import json
import logging
import re

import pytest
from transformers import AutoConfig, PreTrainedConfig

from clmae.configuration import CLMAEConfig, CMAEConfig, MAEConfig

NAN, INF = float("nan"), float("inf")

# (fields, what the message must hold: the field, its value, the remedy)
BAD_MAE = [
    (dict(hidden_size=0), ("`hidden_size`", "0", "int of at least 1")),
    (dict(hidden_size=32.0), ("`hidden_size`", "32.0", "int of at least 1")),
    (dict(hidden_size=None), ("`hidden_size`", "None", "int of at least 1")),
    (dict(num_hidden_layers="12"), ("`num_hidden_layers`", "'12'", "int of at least 1")),
    (dict(num_channels=True), ("`num_channels`", "True", "int of at least 1")),
    (dict(intermediate_size=0), ("`intermediate_size`", "0", "int of at least 1")),
    (dict(decoder_intermediate_size=2.5), ("`decoder_intermediate_size`", "2.5", "int of at least 1")),
    (dict(qkv_bias=1), ("`qkv_bias`", "1", "true or false")),
    (dict(apply_layernorm=None), ("`apply_layernorm`", "None", "true or false")),
    (dict(initializer_range=NAN), ("`initializer_range`", "nan", "[0, inf)")),
    (dict(layer_norm_eps=0), ("`layer_norm_eps`", "0", "(0, 1]")),
    (dict(drop_path_rate=1.0), ("`drop_path_rate`", "1.0", "[0, 1)")),
    (dict(mask_ratio=1.0), ("`mask_ratio`", "1.0", "[0, 1)")),
    (dict(mask_ratio="0.75"), ("`mask_ratio`", "'0.75'", "[0, 1)")),
    (dict(mask_ratio=0.0), ("`mask_ratio`", "0.0", "196 of 196 patches visible", "take a ratio between")),
    (dict(mask_ratio=0.999), ("`mask_ratio`", "0.999", "0 of 196 patches visible", "take a ratio between")),
    (dict(mask_sampler="blocks"), ("`mask_sampler`", "'blocks'", "random, block, grid")),
    (dict(pooling="max"), ("`pooling`", "'max'", "mean, cls")),
    (dict(hidden_size=770), ("`hidden_size`", "770", "`num_attention_heads` = 12", "take 768")),
    (dict(hidden_size=30, num_attention_heads=3), ("`hidden_size`", "30", "multiple of 4", "take 24")),
    (dict(decoder_hidden_size=500), ("`decoder_hidden_size`", "500", "`decoder_num_attention_heads` = 16", "take 496")),
    (dict(decoder_hidden_size=18, decoder_num_attention_heads=9), ("`decoder_hidden_size`", "18", "take 36")),
    (dict(image_size="224"), ("`image_size`", "'224'", "positive int, or two")),
    (dict(image_size=(224,)), ("`image_size`", "(224,)", "positive int, or two")),
    (dict(patch_size=(16, 16, 3)), ("`patch_size`", "(16, 16, 3)", "positive int, or two")),
    (dict(patch_size=(16, 0)), ("`patch_size`", "(16, 0)", "positive int, or two")),
    (dict(image_size=230), ("`image_size`", "230", "`patch_size` 16", "height", "take 224 or 240")),
    (dict(image_size=(224, 230)), ("`image_size`", "(224, 230)", "width", "take 224 or 240")),
    (dict(image_size=8), ("`image_size`", "8", "take 16, or another patch size")),
    (dict(image_size=8, patch_size=1, num_channels=1), ("`norm_pix_loss`", "true", "set it to false", "`patch_size`")),
    (dict(hiden_size=768), ("`hiden_size`", "did you mean `hidden_size`")),
    (dict(num_channel=3), ("`num_channel`", "did you mean `num_channels`")),
    (dict(out_features=["stage13"]), ("out_features", "stage13", "stage12")),
    (dict(out_indices=[13]), ("out_indices", "13", "stage12")),
]
BAD_CMAE = [
    (dict(position_loss_weight=INF), ("`position_loss_weight`", "inf", "[0, inf)")),
    (dict(contrastive_temperature=0), ("`contrastive_temperature`", "0", "(0, inf)")),
    (dict(position_mask_ratio=0.0), ("`position_mask_ratio`", "0.0", "(0, 1]")),
    (
        dict(position_loss_weight=0.1, position_mask_ratio=0.01),
        ("`position_mask_ratio`", "0.01", "49 visible patches", "take at least 0.0205"),
    ),
    (
        dict(position_loss_weight=0.1, mask_sampler="grid"),
        ("`position_mask_ratio`", "0.75", "'grid'", "set `position_mask_ratio` to 1"),
    ),
    (dict(projection_hidden_size=-1), ("`projection_hidden_size`", "-1", "int of at least 1")),
    (dict(learned_masks=1), ("`learned_masks`", "1", "give true or false")),
]
BAD_CL_MAE = [
    (dict(masker_num_hidden_layers=0), ("`masker_num_hidden_layers`", "0", "int of at least 1")),
    (
        dict(masker_objective="soft", masker_num_attention_heads=5),
        ("`hidden_size`", "768", "`masker_num_attention_heads` = 5", "take 780"),
    ),
    (dict(masker_hidden_size=50), ("`masker_hidden_size`", "50", "`masker_num_attention_heads` = 4", "take 48")),
    (dict(masker_objective="soft", masker_hidden_size=48), ("`masker_hidden_size`", "48", "768", "leave it out")),
    (dict(masker_objective="errors"), ("`masker_objective`", "'errors'", "soft, error")),
    (dict(masker_layer_norm_eps=0.0), ("`masker_layer_norm_eps`", "0.0", "(0, 1]")),
    (dict(gauss_loss_weight=-1), ("`gauss_loss_weight`", "-1", "[0, inf)")),
    (dict(kl_loss_weight=-0.5), ("`kl_loss_weight`", "-0.5", "[0, inf)")),
    (dict(soft_masking="token"), ("`soft_masking`", "'token'", "attention, tokens")),
    (dict(curriculum_shape="step"), ("`curriculum_shape`", "'step'", "linear, cosine, constant")),
    (dict(curriculum_start=True), ("`curriculum_start`", "True", "give a finite number")),
    (dict(curiculum_end=-1.0), ("`curiculum_end`", "did you mean `curriculum_end`")),
]


@pytest.mark.parametrize(
    ("config_class", "fields", "parts"),
    [(each, *case) for each in (MAEConfig, CLMAEConfig) for case in BAD_MAE]
    + [(CLMAEConfig, *case) for case in BAD_CL_MAE]
    + [(CMAEConfig, *case) for case in BAD_CMAE],
    ids=lambda v: str(v)[:60],
)
def test_bad_field(config_class, fields, parts):
    with pytest.raises(ValueError, match=re.escape(parts[0])) as error:
        config_class(**fields)
    assert [part for part in parts if part not in str(error.value)] == [], str(error.value)


@pytest.mark.parametrize("config_class", [MAEConfig, CLMAEConfig, CMAEConfig])
def test_every_field_has_a_rule(config_class):
    """A field without is unchecked; backbone fields are transformers' to check."""
    own = {f.name for f in dataclasses.fields(config_class)} - {f.name for f in dataclasses.fields(PreTrainedConfig)}
    ruled = {name for _, names in config_class._rules for name in names.split()}
    assert {name for name in own if not name.startswith("_")} == ruled


def test_unknown_size():
    with pytest.raises(ValueError, match=r"'giant'; choose one of tiny, small, base, large, huge"):
        MAEConfig.from_size("giant")


@pytest.mark.parametrize("image_size", [16, 32, 224])
def test_the_ratios_that_the_message_names_are_accepted(image_size):
    with pytest.raises(ValueError, match="take a ratio between") as error:
        MAEConfig(image_size=image_size, patch_size=4, mask_ratio=0.0)
    low, high = (float(v) for v in re.search(r"between (\S+) and ([\d.]+),", str(error.value)).groups())
    for ratio in (low, high):
        MAEConfig(image_size=image_size, patch_size=4, mask_ratio=ratio)


def test_unknown_entries_that_resemble_no_field_are_kept():
    # transformers' convention: a configuration of a later version, or a user's own note, survives loading.
    assert CLMAEConfig(note="trained on a Tuesday").note == "trained on a Tuesday"
    assert MAEConfig(num_labels=7).num_labels == 7


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_class", [MAEConfig, CLMAEConfig, CMAEConfig])
@pytest.mark.parametrize(
    ("size", "encoder", "decoder", "patch_size"),
    [
        ("tiny", (192, 12, 3), (128, 4, 4), 16),
        ("small", (384, 12, 6), (256, 4, 8), 16),
        ("base", (768, 12, 12), (512, 8, 16), 16),
        ("large", (1024, 24, 16), (512, 8, 16), 16),
        ("huge", (1280, 32, 16), (512, 8, 16), 14),
    ],
)
def test_preset(config_class, size, encoder, decoder, patch_size):
    config = config_class.from_size(size)
    assert type(config) is config_class
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == encoder
    sizes = config.decoder_hidden_size, config.decoder_num_hidden_layers, config.decoder_num_attention_heads
    assert sizes == ((128, 1, 4) if config_class is CMAEConfig else decoder)
    assert (config.image_size, config.patch_size) == (224, patch_size)
    assert config.intermediate_size == 4 * config.hidden_size
    assert config.decoder_intermediate_size == 4 * config.decoder_hidden_size


def test_preset_fields_can_be_overridden():
    config = CLMAEConfig.from_size("huge", image_size=(32, 64), patch_size=4, num_hidden_layers=3, mask_ratio=0.6)
    assert (config.hidden_size, config.num_hidden_layers, config.patch_size) == (1280, 3, 4)
    assert config.mask_ratio == 0.6


def test_defaults_are_the_papers_but_for_the_curriculum():
    config = CLMAEConfig(masker_objective="soft")
    expected = dict(
        **dict(mask_ratio=0.75, mask_sampler="random", layer_norm_eps=1e-6, soft_masking="attention"),
        **dict(masker_num_hidden_layers=5, masker_num_attention_heads=4, masker_layer_norm_eps=1e-5),
        **dict(masker_intermediate_size=4 * 768, gauss_loss_weight=0.1, gauss_sigma=0.12, diversity_loss_weight=0.5),
        **dict(diversity_scale=0.1, curriculum_shape="linear", curriculum_start=1.0, curriculum_end=-1.0),
    )
    assert {name: getattr(config, name) for name in expected} == expected


def test_the_masking_module_follows_its_objective():
    config = CLMAEConfig(hidden_size=96, num_attention_heads=4)
    assert (config.masker_objective, config.masker_num_hidden_layers) == ("error", 1)
    assert (config.masker_hidden_size, config.masker_intermediate_size) == (48, 96)
    assert (config.curriculum_start, config.curriculum_end) == (0, -1)  # from random masks to the hardest


@pytest.mark.parametrize("family", [CLMAEConfig, CMAEConfig])
def test_files_of_earlier_versions_keep_what_they_said(family, tmp_path):
    written = family().to_dict()
    later = {"masker_objective", "masker_error_scale", "masker_hidden_size", "prediction_ratio"}
    later |= {"projection_batch_norm", "decoded_views"}
    earlier = {name: value for name, value in written.items() if name not in later}
    config = family.from_dict(earlier | {"masker_num_hidden_layers": 5})
    assert (config.masker_objective, config.masker_hidden_size, config.prediction_ratio) == ("soft", 768, 1.0)
    assert family.from_dict(written).masker_objective == "error"
    if family is CMAEConfig:
        assert (config.projection_batch_norm, config.decoded_views) == (False, 2)


def test_kl_weight_follows_the_reduction():
    assert CLMAEConfig().kl_loss_weight == 25.6
    assert CLMAEConfig(kl_reduction="sum").kl_loss_weight == 0.1
    assert CLMAEConfig(kl_reduction="sum", kl_loss_weight=3.0).kl_loss_weight == 3.0
    assert CLMAEConfig(kl_loss_weight=0).kl_loss_weight == 0


def test_derived_sizes():
    config = MAEConfig(image_size=(32, 48), patch_size=(4, 8), num_channels=5)
    assert config.grid_size == (8, 6)
    assert config.num_patches == 48
    assert config.patch_dim == 4 * 8 * 5
    assert MAEConfig().num_visible(196) == 49
    assert MAEConfig(mask_ratio=0.6).num_visible(16) == 6  # int(6.4)


def test_what_pretraining_needs():
    one_view = CMAEConfig(learned_masks=True, contrastive_loss_weight=0.0)
    configs = (MAEConfig(), CLMAEConfig(), CMAEConfig(), one_view)
    assert [(c.learns_masks, c.num_views) for c in configs] == [(False, 1), (True, 1), (False, 2), (True, 1)]


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_class", [MAEConfig, CLMAEConfig])
def test_round_trip_through_json(config_class, tmp_path):
    own = {} if config_class is MAEConfig else dict(kl_reduction="sum", curriculum_shape="cosine", curriculum_end=-0.5)
    config = config_class.from_size(
        "tiny", image_size=(32, 64), patch_size=(4, 8), num_labels=3, out_features=["stage1", "stage12"], **own
    )
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == config_class.model_type
    for loaded in (config_class.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is config_class
        expected = {**config.to_dict(), "image_size": [32, 64], "patch_size": [4, 8]}
        assert {**loaded.to_dict(), "_name_or_path": ""} == expected
        assert loaded.grid_size == config.grid_size
        assert loaded.out_indices == [1, 12]


@pytest.mark.parametrize("config_class", [MAEConfig, CLMAEConfig, CMAEConfig])
@pytest.mark.parametrize("name", ["layer_norm_epsilon", "num_hidden_layer", "mask_ratios"])
def test_an_unknown_key_of_a_file_is_kept_with_a_warning(config_class, name, tmp_path, caplog, monkeypatch):
    config = config_class()
    setattr(config, name, 0.25)  # as of a later version, or of a program that sets all names that it knows
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    file = tmp_path / "config.json"
    loaded = [config_class.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)]
    loaded += [config_class.from_json_file(file), config_class.from_dict(json.loads(file.read_text()))]
    assert [getattr(each, name) for each in loaded] == [0.25] * 4
    assert caplog.text.count(f"`{name}` is no field of {config_class.__name__} and has no effect; did you mean") >= 4
    loaded[0].save_pretrained(tmp_path)
    assert json.loads(file.read_text())[name] == 0.25
    for make in (config_class, lambda **fields: config_class.from_pretrained(tmp_path, **fields)):
        with pytest.raises(ValueError, match=f"`{name}` is no field.*did you mean"):
            make(**{name: 0.25})


@pytest.mark.parametrize("config_class", [MAEConfig, CLMAEConfig])
def test_files_and_overrides_at_loading_are_checked(config_class, tmp_path):
    config_class().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`mask_ratio` is 1\.5"):
        config_class.from_pretrained(tmp_path, mask_ratio=1.5)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mask_ratio": 2.0}))
    with pytest.raises(ValueError, match=r"`mask_ratio` is 2\.0"):
        config_class.from_pretrained(tmp_path)


# -- files from anywhere ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10**9}, "`num_hidden_layers` is 1000000000; give at most 1,000."),
        ({"decoder_num_hidden_layers": 10**9}, "`decoder_num_hidden_layers` is 1000000000"),
        ({"hidden_size": 2**40}, "`hidden_size` is 1099511627776; give at most 65,536."),
        ({"intermediate_size": 10**12}, "`intermediate_size` is 1000000000000"),
        ({"num_channels": 10**9}, "`num_channels` is 1000000000; give at most 4,096."),
        ({"image_size": 10**9}, "`image_size` is 1000000000; give at most 65,536 pixels per side."),
        ({"image_size": [16, 10**9]}, "at most 65,536 pixels per side"),
        ({"image_size": 65_536, "patch_size": 16}, "16,777,216 patches, but at most 1,048,576 are possible"),
        ({"num_labels": 2**31}, "`num_labels` is 2147483648; give an int in 0..1,000,000."),
        ({"hidden_size": 49_152, "num_hidden_layers": 1_000}, "would have about 3e+13 parameters"),
        ({"patch_size": 65_536, "image_size": 131_072}, "`image_size` is 131072"),
        ({"hidden_act": "no such"}, "`hidden_act` is 'no such'; give one of "),
        ({"hidden_act": 3}, "`hidden_act` is 3"),
    ],
)
@pytest.mark.parametrize("config_class", [MAEConfig, CLMAEConfig])
def test_absurd_sizes_are_refused_before_anything_is_allocated(config_class, fields, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_class(**fields)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=re.escape(message)):
        config_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("fields", [dict(masker_num_hidden_layers=10**9), dict(masker_intermediate_size=10**9)])
def test_absurd_masking_modules_are_refused(fields):
    with pytest.raises(ValueError, match=r"`masker_.* is 1000000000; give at most"):
        CLMAEConfig(**fields)


def test_the_largest_that_were_built_are_accepted():
    vit_22b = dict(hidden_size=6144, num_hidden_layers=48, num_attention_heads=48, intermediate_size=24_576)
    assert MAEConfig(**vit_22b, image_size=448).num_patches == 784
    assert MAEConfig(image_size=8192).num_patches == 2**18


@pytest.mark.parametrize(
    "fields",
    [
        {"check": 1.5},
        {"num_visible": 3},
        {"__class__": 1},
        {"grid_size": 1},
        {"id2label": 3},
        {"quantization_config": [1]},
        {"out_indices": [[1]]},
        {"attn_implementation": 0.5},
        {"dtype": 1},
        {"dtype": "float17"},
        {"auto_map": 2.5},
        {"base_model_tp_plan": 7},
        {"num_labels": True},
    ],
)
def test_broken_entries_of_transformers_are_a_value_error(fields, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=next(iter(fields)) + "|cannot be used"):
        MAEConfig.from_pretrained(tmp_path)
