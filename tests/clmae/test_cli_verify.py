# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae verify`."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from clmae import FAMILIES, model_cards
from clmae.cli import main
from clmae.model_cards import hub_files
from clmae.modeling.conversion import to_mae

pytestmark = pytest.mark.slow


def test_what_is_wrong_is_named(capsys, trained):
    shutil.copytree(trained("mae"), "out")
    capsys.readouterr()
    assert main(["verify", "out"]) == 0
    assert capsys.readouterr().out.splitlines() == ["out/checkpoint-4: whole", "out: whole"]
    assert main(["verify", "out/checkpoint-4"]) == 0
    os.truncate("out/checkpoint-4/optimizer.pt", 10)
    Path("out/config.json").unlink()
    assert main(["verify", "out"]) == 1
    damaged, problem, model, missing = capsys.readouterr().out.splitlines()[1:]
    assert (damaged, model) == ("out/checkpoint-4: damaged or unfinished", "out: damaged or unfinished")
    assert problem.startswith("  optimizer.pt has 10 bytes")
    assert missing == "  config.json is missing."


def test_wrong_use(error):
    Path("empty").mkdir()
    assert "no folder" in error("verify", "nowhere")
    assert "neither a checkpoint nor a model" in error("verify", "empty")


def test_a_checkpoint_without_a_manifest_was_cut_off(capsys, trained):
    shutil.copytree(trained("mae"), "out")
    Path("out/checkpoint-4/sealed.json").unlink()
    for argument in ("out", "out/checkpoint-4", "out/checkpoint-4/"):
        assert main(["verify", argument]) == 1
        assert "out/checkpoint-4: damaged or unfinished\n  it is not sealed" in capsys.readouterr().out


def without_manifest(kind, folder, family, make_model, trained):
    """A whole model without a manifest."""
    if kind == "shipped":
        shutil.copytree(Path(model_cards.__file__).parent / "cl_mae_mnist", folder)
    elif kind == "downloaded":  # what is pushed is what comes back
        source = trained(family)
        for name in hub_files(source):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, folder / name)
    elif kind == "converted":
        torch.save(to_mae(make_model(family)), "mae.pth")
        heads = [f"--{name}num_attention_heads=2" for name in ("decoder_", "masker_")]
        assert main(["convert", "mae.pth", str(folder), "--num_attention_heads", "4", *heads]) == 0
    else:
        make_model(family).save_pretrained(folder, max_shard_size="20KB" if kind == "sharded" else "1GB")


@pytest.mark.parametrize(
    ("kind", "family"),
    [*itertools.product(["saved", "sharded", "converted", "downloaded"], FAMILIES), ("shipped", "cl_mae")],
)
def test_a_model_without_a_manifest(capsys, kind, family, make_model, trained):
    without_manifest(kind, folder := Path("model"), family, make_model, trained)
    weights = sorted(folder.glob("*.safetensors"))
    assert (len(weights) > 1) == (kind == "sharded")
    capsys.readouterr()
    assert main(["verify", "model"]) == 0
    printed = capsys.readouterr().out
    assert printed == "model: whole, but without a manifest: the values of its weights were not compared\n"
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    name = weights[-1].name
    damages = [
        *((name, content, f"{name} cannot be read") for content in (files[name][:-1], files[name] + b"0", b"123456")),
        (name, None, f"{name} is missing" if kind == "sharded" else "there are no weights"),
        ("config.json", files["config.json"][:-9], "config.json is no JSON file"),
        ("config.json", b"[]", "config.json holds no configuration"),
        ("config.json", None, "config.json is missing"),
    ]
    if kind == "sharded":
        index, other = "model.safetensors.index.json", {"weight_map": {"vit.no_such_weight": weights[0].name}}
        damages += [(index, json.dumps(other).encode(), f"{weights[0].name} lacks vit.no_such_weight")]
        damages += [(index, content, f"{index} names no weights") for content in (b"{}", b"[]", b'{"weight_map": [1]}')]
        damages += [(index, files[index][:-5], f"{index} is no JSON file")]
    if kind != "shipped":  # whose code is in the package
        damages += [(f"modeling_{json.loads(files['config.json'])['model_type']}.py", None, ".py is missing")]
    for name, content, message in damages:
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        assert main(["verify", "model"]) == 1, message
        printed = capsys.readouterr().out
        assert printed.startswith("model: damaged\n  ")
        assert message in printed
        (folder / name).write_bytes(files[name])
