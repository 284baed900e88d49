# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae evaluate`: from the arguments to tables and files."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from clmae.cli import main
from clmae.training.data import make_image_processor

SIZE = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
QUICK = ["--use_cpu", "true", "--max_steps", "2", "--per_device_train_batch_size", "8", "--save_strategy", "no"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, make_model, labelled):
    """`--model` and `--dataset`."""
    folder = tmp_path_factory.mktemp("model")
    make_model("cl_mae").save_pretrained(folder)
    make_image_processor(16, 3, [0.5] * 3, [0.5] * 3).save_pretrained(folder)
    return ["--model", str(folder), "--dataset", labelled]


def evaluate(*argv):
    assert main(["evaluate", *argv]) == 0


def read(path):
    return json.loads(Path(path).read_text())


# -- frozen features --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("protocol", "options", "parameters", "column"),
    [
        ("knn", ["--ks", "1", "3"], {"ks": [1, 3]}, "k = 3"),
        ("linear", ["--l2_grid", "1.0", "0.1"], {"l2_grid": [1.0, 0.1], "seed": 3}, "top-1"),
        ("fewshot", ["--shots", "1", "--num_draws=2"], {"shots": [1], "num_draws": 2, "seed": 3}, None),
    ],
)
def test_table_and_files(capsys, inputs, protocol, options, parameters, column):
    evaluate(protocol, *inputs, "--output", "new/out.json", "--seed", "3", *options)
    content, table = read("new/out.json"), Path("new/out.md").read_text()
    assert table in capsys.readouterr().out
    assert f"| encoder | {next(iter(content['rows'][0]['accuracies']))} |" in table
    assert "| raw pixels | 100.0" in table
    assert "[100.0, 100.0]" in table
    settings = content["settings"]
    assert [settings[name] for name in ("model", "dataset", "test_split")] == [*inputs[1::2], "test"]
    assert (settings["num_train"], settings["num_test"], settings["random_encoder_seed"]) == (24, 12, 3)
    assert parameters.items() <= settings["parameters"].items()
    assert (settings["selected_on"] is None) == (protocol == "knn")
    assert content["rows"][0]["intervals"].keys() == content["rows"][0]["accuracies"].keys()
    tables = {"out-classes.csv", "out-confusion.csv", "out-confusion.png"} if column else set()
    assert {path.name for path in Path("new").iterdir()} == {"out.json", "out.md"} | tables
    if column is None:
        assert " ± 0.0 [" in table
        return
    with open("new/out-classes.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["class"], row["support"]) for row in rows] == [(name, "4") for name in ("blue", "green", "red")]
    share = sum(float(row["accuracy"]) * int(row["support"]) for row in rows) / 12  # it is the encoder's
    assert share == pytest.approx(content["rows"][0]["accuracies"][column], abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: ViTModel(ViTConfig(**SIZE, intermediate_size=32)),
        lambda: Dinov2Model(Dinov2Config(**SIZE, mlp_ratio=2)),
    ],
    ids=["vit", "dinov2"],
)
def test_other_encoders(labelled, make):
    torch.manual_seed(7)  # not the random encoder's
    make().save_pretrained("encoder")
    BitImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained("encoder")
    argv = ["--model", "./encoder", "--dataset", labelled, "--feature", "cls+mean", "--layer", "-1"]
    argv += ["--output", "o.json", "--feature_cache", "kept"]
    evaluate("knn", *argv)
    content = read("o.json")
    assert [row["dimension"] for row in content["rows"]] == [32, 32, 192]
    assert (content["settings"]["feature"], content["settings"]["layer"]) == ("cls+mean", -1)
    assert len(list(Path("kept").iterdir())) == 6
    evaluate("knn", *argv)
    assert read("o.json")["rows"] == content["rows"]


def test_under_torchrun_one_process_prints_and_writes(capsys, inputs, monkeypatch):
    """What the processes compute together is `tests/evaluation/test_features.py`'s."""
    started = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("clmae.cli.evaluate.PartialState", lambda: started.append(1) or SimpleNamespace(device="cpu"))
    monkeypatch.setattr("clmae.cli.evaluate.is_first_process", lambda: False)
    evaluate("knn", *inputs, "--output", "out.json")
    assert started == [1]
    assert capsys.readouterr().out == ""
    assert not Path("out.json").exists()


# -- protocols that train ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("protocol", "options", "parameters", "names"),
    [
        (
            "finetune",
            ["--labels_per_class", "4", "--layer_decay", "0.65", "--mixup_alpha", "0.3", "--seed", "7"],
            {"layer_decay": 0.65, "mixup_alpha": 0.3, "seed": 7, "max_steps": 2},
            ["pretrained", "from scratch"],
        ),
        ("partial", ["--trained_blocks", "1", "--no_baselines"], {"trained_blocks": 1}, ["pretrained"]),
        ("linear-lars", ["--feature", "mean"], {"feature": "mean"}, ["pretrained", "random encoder"]),
    ],
)
def test_trained_result_is_printed_and_written(inputs, capsys, protocol, options, parameters, names):
    evaluate(protocol, *inputs, *QUICK, *options, "--output", "results/out.json")
    result, table = read("results/out.json"), Path("results/out.md").read_text()
    assert result["protocol"] == protocol
    assert [row["name"] for row in result["rows"]] == names
    assert (result["settings"]["num_train"], result["settings"]["num_test"]) == (12 if len(options) > 4 else 24, 12)
    assert parameters.items() <= result["settings"]["parameters"].items()
    assert "| pretrained |" in table
    printed = capsys.readouterr().out
    assert table in printed
    assert "The classifier is in results/out/pretrained.\n" in printed
    assert Path("results/out-classes.csv").read_text().count("\n") == 4
    assert Path("results/out/pretrained/model.safetensors").is_file()  # in a folder called like the result


@pytest.mark.slow
def test_a_second_run_goes_on_only_if_asked_to(inputs, error):
    command = ["finetune", *inputs, *QUICK, "--no_baselines", "--output_dir", "work"]
    evaluate(*command)
    assert re.search(r"`output_dir` .* holds an earlier run", error("evaluate", *command))
    evaluate(*command, "--resume_from_checkpoint", "last", "--output", "out.json")
    assert read("out.json")["rows"] == [read("work/pretrained/run.json")["row"]]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "options", "message"),
    [
        ("knn", ["--output", "out.txt"], "`output` is 'out.txt'; give the name of a .json file"),
        ("knn", ["--layers", "1"], "did you mean '--layer'?"),
        ("knn", ["--shots", "1"], "unknown option '--shots'"),
        ("knn", ["--layer", "9"], "`layer` is 9, but a CLMAEModel gives 0 to 2"),
        ("finetune", ["--output", "out.txt"], "`output` is 'out.txt'"),
        ("finetune", ["--trained_blocks", "1"], "clmae evaluate partial"),
        ("partial", [], "`trained_blocks` is what partial fine-tuning needs"),
        ("finetune", ["--layer_deca", "0.5"], "did you mean '--layer_decay'"),
        ("linear-lars", ["--layer_decay", "0.5"], "unknown option '--layer_decay'"),
        ("finetune", ["--resume_from_checkpoint", "out/checkpoint-3"], "give `last`"),
    ],
)
def test_wrong_use_is_refused_at_once(inputs, error, protocol, options, message):
    assert message in error("evaluate", protocol, *inputs, *options)
