# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae evaluate finetune|partial|linear-lars`: options, results on disk, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from clmae import FAMILIES
from clmae.cli.evaluate_trained import PROTOCOLS, run
from clmae.configuration.errors import InputError
from clmae.training.data import make_image_processor


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_config):
    """`--model` and `--dataset`: an untrained autoencoder, and a folder of images in two classes."""
    root = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    FAMILIES["cl_mae"][2](tiny_config("cl_mae")).save_pretrained(root / "model")
    make_image_processor(16, 3, [0.5] * 3, [0.5] * 3).save_pretrained(root / "model")
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for name, brightness in (("bright", 200), ("dark", 30)):
            folder = root / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(brightness - 30, brightness + 30, (20, 18, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return ["--model", str(root / "model"), "--dataset", str(root / "images")]


QUICK = ["--use_cpu", "true", "--max_steps", "2", "--per_device_train_batch_size", "8", "--save_strategy", "no"]


@pytest.mark.parametrize(
    ("protocol", "options", "names"),
    [
        ("finetune", ["--labels_per_class", "4", "--layer_decay", "0.65"], ["pretrained", "from scratch"]),
        ("partial", ["--trained_blocks", "1", "--no_baselines"], ["pretrained"]),
        ("linear-lars", ["--feature", "mean", "--learning_rate", "5"], ["pretrained", "random encoder"]),
    ],
)
def test_result_is_printed_and_written(inputs, tmp_path, capsys, protocol, options, names):
    output = tmp_path / "results" / "found.json"
    assert run(protocol, [*inputs, *QUICK, *options, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["protocol"] == protocol
    assert [row["name"] for row in result["rows"]] == names
    assert result["settings"]["num_test"] == 8
    table = output.with_suffix(".md").read_text()
    assert "| pretrained |" in table
    assert table in capsys.readouterr().out
    assert (tmp_path / "results" / "found-classes.csv").read_text().count("\n") == 3
    # The trained models lie in a folder called like the result.
    assert (tmp_path / "results" / "found" / "pretrained" / "model.safetensors").is_file()


def test_options_reach_the_settings(inputs, tmp_path):
    output = tmp_path / "found.json"
    options = ["--labels_per_class", "4", "--mixup_alpha", "0.3", "--seed", "7", "--weight_decay", "0.2"]
    run("finetune", [*inputs, *QUICK, *options, "--no_baselines", "--output", str(output)])
    settings = json.loads(output.read_text())["settings"]
    assert (settings["labels_per_class"], settings["num_train"]) == (4, 8)
    found = settings["parameters"]
    assert (found["mixup_alpha"], found["seed"], found["weight_decay"], found["max_steps"]) == (0.3, 7, 0.2, 2)


def test_second_run_goes_on_only_if_it_is_told_to(inputs, tmp_path):
    command = [*inputs, *QUICK, "--no_baselines", "--output_dir", str(tmp_path / "work")]
    output = tmp_path / "found.json"
    run("finetune", command)
    with pytest.raises(ValueError, match=r"`output_dir` .* holds an earlier run"):
        run("finetune", command)
    run("finetune", [*command, "--resume_from_checkpoint", "last", "--output", str(output)])
    saved = json.loads((tmp_path / "work" / "pretrained" / "run.json").read_text())
    assert json.loads(output.read_text())["rows"] == [saved["row"]]


@pytest.mark.parametrize(
    ("protocol", "options", "message"),
    [
        ("finetune", ["--output", "found.txt"], "`output` is 'found.txt'"),
        ("finetune", ["--trained_blocks", "1"], "clmae evaluate partial"),
        ("partial", [], "`trained_blocks` is what partial fine-tuning needs"),
        ("finetune", ["--layer_deca", "0.5"], "did you mean 'layer_decay'"),
        ("linear-lars", ["--layer_decay", "0.5"], "unknown option '--layer_decay'"),
        ("finetune", ["--resume_from_checkpoint", "out/checkpoint-3"], "say `last`"),
        ("fine-tune", [], "did you mean 'finetune'"),
    ],
)
def test_wrong_use_is_refused_at_once(inputs, protocol, options, message):
    with pytest.raises(InputError, match=message):
        run(protocol, [*inputs, *options])


def test_missing_model_is_reported(inputs, tmp_path):
    with pytest.raises(ValueError, match=r"`model` .*nothing.* cannot be loaded"):
        run("finetune", ["--model", str(tmp_path / "nothing"), *inputs[2:], "--output", str(tmp_path / "o.json")])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_help_explains_the_protocols_own_options(capsys, protocol):
    with pytest.raises(SystemExit) as stopped:
        run(protocol, ["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    own = {"finetune": "--mixup_alpha", "partial": "--trained_blocks", "linear-lars": "--lars_momentum"}[protocol]
    for option in (own, "--base_learning_rate", "--labels_per_class", "--output ", "--resume_from_checkpoint"):
        assert option in text
    assert "--adafactor" not in text
    assert "--label_names" not in text
